//! What one tenant leaves in a device's memory, and what the next one finds.

use anyhow::{Result, ensure};

use crate::lab::product::{vfioctl, vfioctl_json};
use crate::lab::{Guest, Lab, sysfs};
use crate::machine::{GPU, GPU_AUDIO};

/// The secrets of the first tenants.
const SECRETS: [u64; 2] = [0x5ec_7e7, 0x5ec_7e8];

/// The leak, then its cure.
pub(super) fn run(lab: &mut Lab) -> Result<()> {
    let size = lease("alice", &["--no-scrub"], |guest| guest.write_video(SECRETS[0]))?;
    lab.step(format!(
        "alice left a secret in {size} bytes of video memory, which were not cleared"
    ))?;
    // The reset after her lease has not cleared them either, or the cure would prove nothing.
    let found = lease("bob", &[], |guest| {
        let found = guest.read_video(SECRETS[0])?;
        guest.write_video(SECRETS[1])?;
        Ok(found)
    })?;
    ensure!(found * 2 > size, "bob found {found} bytes of {size}: there was no leak to cure");
    lab.step(format!("bob read {found} bytes of it after a reset, and left a secret of his own"))?;
    let (found, zeros) =
        lease("carol", &[], |guest| Ok((guest.read_video(SECRETS[1])?, guest.zero_video()?)))?;
    ensure!((found, zeros) == (0, size), "carol found {found} bytes, and {zeros} zeros of {size}");
    lab.step(format!("his memory was cleared: carol read zeros in all {zeros} bytes"))
}

/// A lease of the GPU to a tenant, whose guest does something in it.
fn lease<T>(
    tenant: &str,
    options: &[&str],
    work: impl FnOnce(&mut Guest) -> Result<T>,
) -> Result<T> {
    let attach = ["attach", GPU.address, "--tenant", tenant];
    vfioctl(attach.into_iter().chain(options.iter().copied()))?.success()?;
    let mut guest = Guest::start([GPU.address, GPU_AUDIO.address])?;
    let done = work(&mut guest)?;
    guest.power_off()?;
    let ended = vfioctl_json(["release", GPU.address, "--wait"])?;
    ensure!(ended.as_array().is_some_and(|ended| ended.len() == 1), "released {ended}");
    ensure!(sysfs::driver(GPU.address).as_deref() != Some("vfio-pci"));
    Ok(done)
}
