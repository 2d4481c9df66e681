//! The policy through boots of a real kernel. Each boot is a phase of the scenario, which is run anew
//! after it and finds on disk how far it was.

mod trouble;

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::lab::product::{refused, vfioctl, vfioctl_json};
use crate::lab::{Lab, command, sysfs, wait_until};
use crate::machine::{GPU, GPU_AUDIO, NIC, SWITCH_NIC_A};
use crate::protocol::BenchRow;

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
/// What the boot took that is compared with one without us.
const TOOK: &str = "/var/lib/lab-took";
const PHASE: &str = "/var/lib/lab-phase";
const UNIT: &str = "vfiod-provision.service";
/// What provisioning and a slow machine may take.
const LIMIT: Duration = Duration::from_secs(120);

pub(super) use trouble::run as trouble;

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

/// A property of a unit.
fn show(unit: &str, property: &str) -> Result<String> {
    let shown = command::run(["systemctl", "show", "--value", "--property", property, unit])?;
    Ok(shown.success()?.trim().to_owned())
}

/// Waits until provisioning has come to its end, and answers its result.
fn provisioned() -> Result<String> {
    wait_until("provisioning ends", LIMIT, || {
        Ok(matches!(show(UNIT, "ActiveState")?.as_str(), "active" | "failed"))
    })?;
    show(UNIT, "Result")
}

/// What systemd has of provisioning.
fn what_it_said() -> Result<String> {
    let status = ["systemctl", "status", "--full", "--no-pager", "--lines=20", UNIT];
    Ok(command::run(status)?.stdout)
}

fn microseconds(of: &[&str], property: &str) -> Result<f64> {
    let show = ["systemctl", "show", "--value", "--property", property].into_iter();
    let shown = command::run(show.chain(of.iter().copied()))?.success()?;
    Ok(f64::from(u32::try_from(shown.trim().parse::<u64>()?)?))
}

/// From systemd's start until the host is up, in milliseconds.
fn whole_boot() -> Result<f64> {
    let began = microseconds(&[], "UserspaceTimestampMonotonic")?;
    let up = microseconds(&["multi-user.target"], "ActiveEnterTimestampMonotonic")?;
    Ok((up - began) / 1e3)
}

/// What the program of a unit took, in milliseconds.
fn own_time(unit: &str) -> Result<f64> {
    let began = microseconds(&[unit], "ExecMainStartTimestampMonotonic")?;
    Ok((microseconds(&[unit], "ExecMainExitTimestampMonotonic")? - began) / 1e3)
}

/// Has systemd start all of ours with the host, or none.
fn of_units(verb: &str) -> Result<()> {
    let units = ["vfiod.service", "vfiod-early.service", UNIT];
    command::run(["systemctl", verb].into_iter().chain(units))?.success().map(drop)
}

fn kernel_log() -> Result<String> {
    command::run(["journalctl", "--dmesg", "--boot", "--no-pager", "--output=cat"])?.success()
}

fn is_up() -> Result<bool> {
    Ok(show("multi-user.target", "ActiveState")? == "active")
}

fn as_wanted(lab: &mut Lab) -> Result<()> {
    let result = provisioned()?;
    ensure!(result == "success", "provisioning: {result}\n{}", what_it_said()?);
    for address in [GPU.address, GPU_AUDIO.address] {
        let driver = sysfs::driver(address);
        ensure!(driver.as_deref() == Some("vfio-pci"), "{address} is on {driver:?}");
    }
    let log = kernel_log()?;
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
    wait_until("the host is up", LIMIT, is_up)?;
    fs::write(TOOK, whole_boot()?.to_string())?;
    for (name, unit) in [("boot-early", "vfiod-early.service"), ("boot-provision", UNIT)] {
        lab.bench(BenchRow::of(name, "ms", &[own_time(unit)?]))?;
    }
    let applied = u32::try_from(milliseconds)?;
    lab.bench(BenchRow::of("boot-apply", "ms", &[applied.into()]))?;
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
    let said = what_it_said()?;
    ensure!(said.contains("did you mean 'mode'?"), "{said}");
    refused(&vfioctl(["status"])?, 2, &["vfiod.toml:5:1", "did you mean 'mode'?"])?;
    wait_until("the host is up", LIMIT, is_up)?;
    lab.step("a broken policy kept no boot from its end; systemctl and vfioctl say what is wrong")?;
    fs::remove_file(FILE)?;
    vfioctl(["policy", "reload"])?.success()?;
    ensure!(!Path::new(RULES).exists(), "there are rules of a policy that is no more");
    of_units("disable")?;
    next(lab, "none")
}

fn none(lab: &mut Lab) -> Result<()> {
    fs::remove_file(PHASE)?;
    wait_until("the host is up", LIMIT, is_up)?;
    let (with, without) = (fs::read_to_string(TOOK)?.parse()?, whole_boot()?);
    let mut row = BenchRow::of("boot", "ms", &[with]);
    row.floor_ratio = Some(with / without);
    lab.bench(row)?;
    lab.step(format!(
        "up {with:.0} ms after the first program, and after {without:.0} without us"
    ))?;
    of_units("enable")?;
    for (function, driver) in [(GPU, "bochs"), (GPU_AUDIO, "snd_hda_intel")] {
        let now = sysfs::driver(function.address).unwrap_or_default();
        ensure!(now.starts_with(driver), "{} is on {now:?}", function.address);
    }
    lab.step("without a policy, the host's drivers have all again")
}
