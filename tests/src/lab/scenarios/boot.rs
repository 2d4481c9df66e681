//! The policy through boots of a real kernel. Each boot is a phase of the scenario, which is run anew
//! after it and finds on disk how far it was.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::lab::product::{refused, vfioctl, vfioctl_json};
use crate::lab::{Lab, command, sysfs, wait_until};
use crate::machine::{GPU, GPU_AUDIO, NIC, SWITCH_NIC_A};

const POLICY: &str = r#"
boot.limit = 60

[pool.gpus]
mode = "passthrough"
select = [{ vendor = "1234", class = "gpu" }]

[pool.vnics]
mode = "passthrough"
select = [{ address = "0000:01:00.0" }]
vfs = 2
shape = { vlan = 40 }
"#;
const FILE: &str = "/etc/vfiod/vfiod.toml";
const RULES: &str = "/etc/udev/rules.d/10-vfiod.rules";
const PHASE: &str = "/var/lib/lab-phase";
const UNIT: &str = "vfiod-provision.service";
/// What provisioning and a slow machine may take.
const LIMIT: Duration = Duration::from_secs(120);

/// A cold boot puts everything where the policy wants it before a host driver has it; a broken policy
/// keeps no boot from its end; without a policy all is as it was.
pub(super) fn policy(lab: &mut Lab) -> Result<()> {
    let phase = fs::read_to_string(PHASE).unwrap_or_default();
    match phase.as_str() {
        "" => prepare(lab),
        "as-wanted" => as_wanted(lab),
        "broken" => broken(lab),
        "none" => none(lab),
        other => bail!("no phase '{other}'"),
    }
}

fn next(lab: &mut Lab, phase: &str) -> Result<()> {
    fs::write(PHASE, phase)?;
    command::run(["sync"])?.success()?;
    lab.reboot()
}

fn prepare(lab: &mut Lab) -> Result<()> {
    fs::create_dir_all("/etc/vfiod")?;
    fs::write(FILE, POLICY)?;
    vfioctl(["policy", "check"])?.success()?;
    vfioctl(["policy", "reload"])?.success()?;
    let rules = fs::read_to_string(RULES).context("udev has no rules of the policy")?;
    ensure!(rules.contains("driver_override"), "{rules}");
    let verified = command::run(["udevadm", "verify", "--no-style", RULES]);
    if let Ok(verified) = verified {
        verified.success()?;
    }
    lab.step("a policy for the GPU and two virtual functions is in place; booting with it")?;
    next(lab, "as-wanted")
}

/// Waits until provisioning has come to its end, and answers its result.
fn provisioned() -> Result<String> {
    let show = |property: &str| {
        let shown = command::run(["systemctl", "show", "--value", "--property", property, UNIT])?;
        Ok::<_, anyhow::Error>(shown.success()?.trim().to_owned())
    };
    wait_until("provisioning ends", LIMIT, || {
        Ok(matches!(show("ActiveState")?.as_str(), "active" | "failed"))
    })?;
    show("Result")
}

fn as_wanted(lab: &mut Lab) -> Result<()> {
    let result = provisioned()?;
    let told = vfioctl(["status"])?;
    ensure!(result == "success", "provisioning: {result}\n{}{}", told.stdout, told.stderr);
    for address in [GPU.address, GPU_AUDIO.address] {
        let driver = sysfs::driver(address);
        ensure!(driver.as_deref() == Some("vfio-pci"), "{address} is on {driver:?}");
    }
    let log = command::run(["journalctl", "--dmesg", "--boot", "--no-pager", "--output=cat"])?;
    let log = log.success()?;
    for (driver, function) in [("bochs", GPU), ("snd_hda_intel", GPU_AUDIO)] {
        let bound = |line: &&str| line.contains(driver) && line.contains(function.address);
        let lines: Vec<&str> = log.lines().filter(bound).collect();
        ensure!(lines.is_empty(), "{driver} had {}: {lines:?}", function.address);
    }
    lab.step("after a cold boot the GPU is on VFIO, and the kernel log knows of no other driver")?;
    for index in 0..2 {
        let vf = sysfs::virtual_function(NIC.address, index)?;
        ensure!(
            sysfs::driver(&vf).as_deref() == Some("vfio-pci"),
            "{vf}: {:?}",
            sysfs::driver(&vf)
        );
    }
    let links = command::run(["ip", "link", "show"])?.success()?;
    ensure!(links.matches("vlan 40").count() == 2, "{links}");
    let other = sysfs::driver(SWITCH_NIC_A.address);
    ensure!(other.as_deref() == Some("e1000e"), "another card is on {other:?}");
    lab.step("two virtual functions are there, in their VLAN, on VFIO; the rest is untouched")?;
    let verified = vfioctl(["verify-boot"])?.success()?;
    ensure!(verified.contains("from the start"), "{verified}");
    let report = vfioctl_json(["verify-boot"])?;
    let milliseconds = report["milliseconds"].as_u64().context("no time")?;
    lab.step(format!("verify-boot agrees; provisioning took {milliseconds} ms"))?;
    let again = vfioctl_json(["apply"])?;
    let idle = |unit: &serde_json::Value| unit["standing"] == "as-wanted";
    ensure!(again["units"].as_array().is_some_and(|units| units.iter().all(idle)), "{again}");
    lab.step("applying again has nothing to do")?;
    fs::write(FILE, POLICY.replace("mode", "moed"))?;
    next(lab, "broken")
}

fn broken(lab: &mut Lab) -> Result<()> {
    let result = provisioned()?;
    ensure!(result != "success", "provisioning took a broken policy");
    let status = command::run(["systemctl", "status", "--no-pager", "--lines=20", UNIT])?;
    ensure!(status.stdout.contains("did you mean 'mode'?"), "{}", status.stdout);
    refused(&vfioctl(["status"])?, 2, &["vfiod.toml:5:1", "did you mean 'mode'?"])?;
    let booted = || {
        let state = command::run(["systemctl", "is-active", "multi-user.target"])?;
        Ok(state.stdout.trim() == "active")
    };
    wait_until("the host is up", LIMIT, booted)?;
    lab.step("a broken policy kept no boot from its end; systemctl and vfioctl say what is wrong")?;
    fs::remove_file(FILE)?;
    vfioctl(["policy", "reload"])?.success()?;
    ensure!(!Path::new(RULES).exists(), "there are rules of a policy that is no more");
    next(lab, "none")
}

fn none(lab: &mut Lab) -> Result<()> {
    fs::remove_file(PHASE)?;
    for (function, driver) in [(GPU, "bochs"), (GPU_AUDIO, "snd_hda_intel")] {
        let now = sysfs::driver(function.address).unwrap_or_default();
        ensure!(now.starts_with(driver), "{} is on {now:?}", function.address);
    }
    lab.step("without a policy, the host's drivers have all again")
}
