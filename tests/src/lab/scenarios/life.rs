//! What happens to leases when the daemon or a device goes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::lab::product::{busctl_attach, busctl_release, device, lease, vfioctl, vfioctl_json};
use crate::lab::{Guest, Lab, command, sysfs, wait_until};
use crate::machine::{self, GPU, GPU_AUDIO, NIC, SWITCH_NIC_A};

/// Unplugging takes the guest's kernel some seconds.
const UNPLUG_LIMIT: Duration = Duration::from_secs(60);

/// The daemon restarts while a guest has its devices.
pub(super) fn restart(lab: &mut Lab) -> Result<()> {
    let id = busctl_attach(GPU.address, "tenant-a")?;
    let mut guest = Guest::start([GPU.address, GPU_AUDIO.address])?;
    guest.write_video(3)?;
    command::run(["systemctl", "restart", "vfiod"])?.success()?;
    let record = lease(&id)?.context("the restarted daemon does not know the lease")?;
    ensure!(record["state"] == "active" && record["tenant"] == "tenant-a", "{record}");
    let size = guest.write_video(4)?;
    lab.step(format!("restarted: the lease is there, the guest still has {size} bytes"))?;
    guest.power_off()?;
    ensure!(busctl_release(&id)? == [id.as_str()]);
    ensure!(sysfs::driver(GPU.address).as_deref() != Some("vfio-pci"));
    lab.step("release by the restarted daemon gave the GPU back")
}

/// What the host's own tools see of a lease: journal, systemd, and the readiness check.
pub(super) fn host(lab: &mut Lab) -> Result<()> {
    let checked = vfioctl_json(["check"])?;
    let findings = checked.as_array().context("findings are no array")?;
    let fails = findings.iter().filter(|finding| finding["verdict"] == "fail");
    ensure!(fails.count() == 0 && findings.len() > 8, "{checked}");
    vfioctl(["check"])?.success()?;
    lab.step(format!("vfioctl check made {} findings and found nothing wrong", findings.len()))?;

    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "0")?;
    sysfs::write(NIC.address, "sriov_numvfs", "1")?;
    let vf = sysfs::virtual_function(NIC.address, 0)?;
    let id = busctl_attach(&vf, "tenant-a")?;
    let group = sysfs::group(&vf).context("no group")?;
    let unit = format!("dev-vfio-{group}.device");
    let plugged = || {
        let shown = command::run(["systemctl", "show", "--property=ActiveState", &unit])?;
        Ok(shown.success()?.contains("=active"))
    };
    wait_until("the VFIO node is a device unit", UNPLUG_LIMIT, plugged)?;
    lab.step(format!("{unit} is there for other units to bind to"))?;

    vfioctl(["release", &vf])?.success()?;
    let journal = command::run(["journalctl", "--output=cat", &format!("VFIOD_LEASE={id}")])?;
    let journal = journal.success()?;
    for words in ["attached", &format!("reset {vf}"), "released"] {
        ensure!(journal.contains(words), "the journal does not say {words:?}:\n{journal}");
    }
    lab.step("the journal tells the lease's story by its id, the reset before release included")?;
    sysfs::write(NIC.address, "sriov_numvfs", "0")?;
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "1")
}

/// A device goes and comes; a leased one takes its lease with it.
pub(super) fn hotplug(lab: &mut Lab) -> Result<()> {
    let address = SWITCH_NIC_A.address;
    let watch = Monitor::start()?;
    unplug(lab)?;
    ensure!(device(address)?.is_none(), "the inventory still has it");
    replug(lab)?;
    let record = device(address)?.context("the inventory does not have it again")?;
    ensure!(record["driver"] == "e1000e", "{record}");
    let seen = watch.stop()?;
    for word in ["device-removed", "device-added"] {
        ensure!(seen.contains(word) && seen.contains(address), "no {word} in:\n{seen}");
    }
    lab.step("unplugged and plugged in again: inventory and signals followed")?;

    let id = busctl_attach(address, "tenant-a")?;
    unplug(lab)?;
    let failed = || Ok(lease(&id)?.is_some_and(|lease| lease["state"] == "failed"));
    wait_until("the lease fails", UNPLUG_LIMIT, failed)?;
    let record = lease(&id)?.context("the lease has gone")?;
    let reason = record["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains(address) && reason.contains("unplugged"), "{record}");
    lab.step(format!("unplugging a leased device failed its lease: {reason}"))?;

    replug(lab)?;
    ensure!(sysfs::driver_override(address)?.is_none());
    let record = device(address)?.context("the inventory does not have it again")?;
    ensure!(record["lease"] == Value::Null, "the new device inherited a lease: {record}");
    busctl_release(&id)?;
    ensure!(lease(&id)?.is_none(), "the failed lease cannot be dismissed");
    lab.step("the device that came back inherited nothing; the failed lease was dismissed")
}

fn unplug(lab: &mut Lab) -> Result<()> {
    lab.qmp("device_del", json!({"id": SWITCH_NIC_A.id}))?;
    wait_until("the device goes", UNPLUG_LIMIT, || Ok(!sysfs::exists(SWITCH_NIC_A.address)))?;
    wait_until("the daemon notices", UNPLUG_LIMIT, || Ok(device(SWITCH_NIC_A.address)?.is_none()))
}

fn replug(lab: &mut Lab) -> Result<()> {
    lab.qmp("device_add", machine::switch_nic_a())?;
    let bound = || Ok(sysfs::driver(SWITCH_NIC_A.address).is_some());
    wait_until("the device is back", UNPLUG_LIMIT, bound)?;
    let noticed = || Ok(device(SWITCH_NIC_A.address)?.is_some_and(|d| d["driver"].is_string()));
    wait_until("the daemon notices", UNPLUG_LIMIT, noticed)
}

/// `vfioctl monitor`, writing to a file.
struct Monitor {
    process: std::process::Child,
}

const SEEN: &str = "/run/lab-monitor";

impl Monitor {
    fn start() -> Result<Self> {
        let file = std::fs::File::create(SEEN)?;
        let process = std::process::Command::new("vfioctl")
            .args(["--json", "monitor"])
            .stdout(file)
            .spawn()
            .context("starting vfioctl monitor")?;
        // It has subscribed once a call made after it is answered and its own set-up is over.
        std::thread::sleep(Duration::from_secs(1));
        vfioctl(["list"])?.success()?;
        Ok(Self { process })
    }

    fn stop(mut self) -> Result<String> {
        std::thread::sleep(Duration::from_millis(500));
        self.process.kill()?;
        self.process.wait()?;
        std::fs::read_to_string(SEEN).context("reading what monitor saw")
    }
}
