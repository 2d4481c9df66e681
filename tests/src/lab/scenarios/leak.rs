//! What one tenant leaves in a device's memory, and what the next one finds.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::lab::product::{refused, vfioctl, vfioctl_json};
use crate::lab::{Guest, Lab, sysfs};
use crate::machine::{GPU, GPU_AUDIO};

/// The secrets of the first tenants.
const SECRETS: [u64; 2] = [0x5ec_7e7, 0x5ec_7e8];

/// What the daemon keeps of what happened.
const HISTORY: &str = "/var/lib/vfiod/history.jsonl";

/// The leak, then its cure.
pub(super) fn run(lab: &mut Lab) -> Result<()> {
    let (size, alice) = lease("alice", &["--no-scrub"], |guest| guest.write_video(SECRETS[0]))?;
    lab.step(format!(
        "alice left a secret in {size} bytes of video memory, which were not cleared"
    ))?;
    // The reset after her lease has not cleared them either, or the cure would prove nothing.
    let (found, bob) = lease("bob", &[], |guest| {
        let found = guest.read_video(SECRETS[0])?;
        guest.write_video(SECRETS[1])?;
        Ok(found)
    })?;
    ensure!(found * 2 > size, "bob found {found} bytes of {size}: there was no leak to cure");
    lab.step(format!("bob read {found} bytes of it after a reset, and left a secret of his own"))?;
    let ((found, zeros), _) =
        lease("carol", &[], |guest| Ok((guest.read_video(SECRETS[1])?, guest.zero_video()?)))?;
    ensure!((found, zeros) == (0, size), "carol found {found} bytes, and {zeros} zeros of {size}");
    lab.step(format!("his memory was cleared: carol read zeros in all {zeros} bytes"))?;
    let certified = vfioctl(["certify", &bob])?.success()?;
    ensure!(certified.contains("memory zeroed") && certified.contains("clean"), "{certified}");
    refused(&vfioctl(["certify", &alice])?, 1, &["memory left, by request", "NOT clean"])?;
    lab.step("bob's lease is certified clean, alice's is not")?;
    tampered(lab)
}

/// An entry that somebody has changed.
fn tampered(lab: &mut Lab) -> Result<()> {
    let whole = vfioctl(["history", "--check"])?.success()?;
    let written = fs::read_to_string(HISTORY)?;
    ensure!(written.contains("alice"), "the history does not know alice:\n{written}");
    fs::write(HISTORY, written.replace("alice", "alibi"))?;
    refused(&vfioctl(["history", "--check"])?, 1, &["was changed"])?;
    fs::write(HISTORY, written)?;
    ensure!(vfioctl(["history", "--check"])?.success()? == whole);
    lab.step("an edit of the history is seen")
}

/// A lease of the GPU to a tenant, whose guest does something in it.
fn lease<T>(
    tenant: &str,
    options: &[&str],
    work: impl FnOnce(&mut Guest) -> Result<T>,
) -> Result<(T, String)> {
    let attach = ["attach", GPU.address, "--tenant", tenant];
    vfioctl(attach.into_iter().chain(options.iter().copied()))?.success()?;
    let mut guest = Guest::start([GPU.address, GPU_AUDIO.address])?;
    let done = work(&mut guest)?;
    guest.power_off()?;
    let ended = vfioctl_json(["release", GPU.address, "--wait"])?;
    let id = ended[0].as_str().with_context(|| format!("released {ended}"))?;
    ensure!(sysfs::driver(GPU.address).as_deref() != Some("vfio-pci"));
    Ok((done, id.to_owned()))
}
