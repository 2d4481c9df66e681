//! What leases survive: the end of their owners, the daemon's end at any time, and a kernel that
//! does not return.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::lab::product::{busctl_attach, device, lease, refused, vfioctl, vfioctl_json};
use crate::lab::{Guest, Lab, command, sysfs, wait_until};
use crate::machine::{FAR_NIC, GPU, GPU_AUDIO};

/// How often the daemon is killed in the time that an attachment takes.
const KILLS: u32 = 12;
const LIMIT: Duration = Duration::from_secs(60);
/// What is asked of a daemon that is told to stop.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// A lease bound to a process, and one bound to a connection.
pub(super) fn owners(lab: &mut Lab) -> Result<()> {
    let before = drivers();
    let mut owner = Command::new("sleep").arg("600").spawn()?;
    let pid = owner.id().to_string();
    vfioctl(["attach", GPU.address, "--tenant", "tenant-a", "--pid", &pid])?.success()?;
    let id = device(GPU.address)?.context("no GPU")?["lease"].clone();
    let id = id.as_str().context("no lease")?;
    let record = lease(id)?.context("no lease")?;
    ensure!(record["bound"] == format!("process {pid}"), "{record}");
    command::run(["systemctl", "restart", "vfiod"])?.success()?;
    owner.kill()?;
    owner.wait()?;
    wait_until("the lease ends with its process", LIMIT, || Ok(lease(id)?.is_none()))?;
    ensure!(drivers() == before, "drivers are {:?}, were {before:?}", drivers());
    lab.step("a lease ended with the process it was bound to, a restart of the daemon between")?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let id = runtime.block_on(async {
        let connection = zbus::Connection::system().await?;
        let manager = libvfio::client::ManagerProxy::new(&connection).await?;
        let options = [("while_connected", true.into())].into_iter().collect();
        let (id, _) = manager.attach(&[GPU.address], "tenant-a", options).await?;
        ensure!(lease(&id)?.is_some_and(|lease| lease["state"] == "active"), "it is not active");
        anyhow::Ok(id)
    })?;
    drop(runtime);
    wait_until("the lease ends with its connection", LIMIT, || Ok(lease(&id)?.is_none()))?;
    ensure!(drivers() == before, "drivers are {:?}, were {before:?}", drivers());
    lab.step("a lease ended with the connection of its caller")
}

/// `SIGKILL` for the daemon at many moments of an attachment, and beside a guest.
pub(super) fn killed(lab: &mut Lab) -> Result<()> {
    let before = drivers();
    let start = Instant::now();
    attach_apart()?.wait()?;
    let whole = start.elapsed();
    vfioctl(["release", GPU.address])?.success()?;
    let (mut kept, mut undone) = (0, 0);
    for number in 0..KILLS {
        // Known to be running, so that what is killed is at its work.
        vfioctl(["leases"])?.success()?;
        let mut caller = attach_apart()?;
        std::thread::sleep(whole * number / KILLS);
        kill_daemon()?;
        caller.wait()?;
        let settled = || Ok(vfioctl_json(["leases"])?.as_array().is_some_and(|all| settled(all)));
        wait_until("the restarted daemon has settled what it found", LIMIT, settled)?;
        match vfioctl_json(["leases"])?.as_array().map(Vec::as_slice) {
            Some([lease]) => {
                ensure!(lease["state"] == "active", "{lease}");
                ensure!(drivers().iter().all(|d| d.as_deref() == Some("vfio-pci")), "{lease}");
                vfioctl(["release", GPU.address])?.success()?;
                kept += 1;
            }
            _ => undone += 1,
        }
        ensure!(drivers() == before, "kill {number}: {:?}, not {before:?}", drivers());
    }
    lab.step(format!(
        "killed {KILLS} times while attaching: {kept} times the GPU was leased and recorded, \
         {undone} times as before, never in between"
    ))?;

    let id = busctl_attach(GPU.address, "tenant-a")?;
    let mut guest = Guest::start([GPU.address, GPU_AUDIO.address])?;
    guest.write_video(5)?;
    kill_daemon()?;
    let record = lease(&id)?.context("the restarted daemon does not know the lease")?;
    ensure!(record["state"] == "active", "{record}");
    let size = guest.read_video(5)?;
    ensure!(size > 0, "the guest's memory has gone");
    guest.power_off()?;
    vfioctl(["release", &id])?.success()?;
    lab.step(format!("killed beside a guest, whose {size} bytes stayed; the lease is known"))
}

fn settled(leases: &[Value]) -> bool {
    leases.iter().all(|lease| lease["state"] == "active")
}

/// Somebody else changes what a lease holds.
pub(super) fn drift(lab: &mut Lab) -> Result<()> {
    let before = drivers();
    let id = busctl_attach(GPU.address, "tenant-a")?;
    sysfs::write(GPU_AUDIO.address, "driver/unbind", GPU_AUDIO.address)?;
    let failed = || Ok(lease(&id)?.is_some_and(|lease| lease["state"] == "failed"));
    wait_until("the lease fails", LIMIT, failed)?;
    let record = lease(&id)?.context("the lease has gone")?;
    let reason = record["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains(GPU_AUDIO.address) && reason.contains("somebody else"), "{record}");
    ensure!(sysfs::driver(GPU.address) == before[0], "the rest of the GPU was not given back");
    lab.step(format!("a device taken from VFIO by others failed its lease: {reason}"))?;

    let ran = vfioctl(["attach", GPU.address, "--tenant", "tenant-b"])?;
    refused(&ran, 11, &[GPU_AUDIO.address, "quarantine clear"])?;
    let listed = vfioctl(["quarantine"])?.success()?;
    ensure!(listed.contains(GPU_AUDIO.address), "{listed}");
    command::run(["systemctl", "restart", "vfiod"])?.success()?;
    refused(&vfioctl(["attach", GPU.address, "--tenant", "tenant-b"])?, 11, &[])?;
    vfioctl(["quarantine", "clear", GPU_AUDIO.address])?.success()?;
    vfioctl(["release", &id])?.success()?;
    sysfs::bind(GPU_AUDIO.address, None)?;
    lab.step("its device is in quarantine, through a restart, until that is cleared")?;

    let id = busctl_attach(GPU.address, "tenant-a")?;
    sysfs::write(GPU.address, "driver_override", "pci-stub")?;
    wait_until("the lease fails", LIMIT, || {
        Ok(lease(&id)?.is_some_and(|lease| lease["state"] == "failed"))
    })?;
    let history = vfioctl(["leases", "--history"])?.success()?;
    for word in [&id, "failed", "driver_override", "cleared"] {
        ensure!(history.contains(word), "the history does not say {word}:\n{history}");
    }
    lab.step("an override that others changed, of which no kernel tells, was noticed too")?;
    vfioctl(["quarantine", "clear", GPU.address])?.success()?;
    vfioctl(["release", &id])?.success()?;
    sysfs::bind(GPU.address, None)?;
    ensure!(drivers() == before, "drivers are {:?}, were {before:?}", drivers());
    Ok(())
}

/// The kernel sleeps with the card's lock held: VFs are to go, and a guest has one of them open.
pub(super) fn deadlock(lab: &mut Lab) -> Result<()> {
    sysfs::write(FAR_NIC.address, "sriov_drivers_autoprobe", "0")?;
    sysfs::write(FAR_NIC.address, "sriov_numvfs", "1")?;
    let vf = sysfs::virtual_function(FAR_NIC.address, 0)?;
    sysfs::bind(&vf, Some("vfio-pci"))?;
    let guest = Guest::start([vf.as_str()])?;
    let write = format!("echo 0 > /sys/bus/pci/devices/{}/sriov_numvfs", FAR_NIC.address);
    let mut writer = Command::new("sh").args(["-c", &write]).spawn()?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(writer.try_wait()?.is_none(), "the kernel did not sleep");
    lab.step("the kernel sleeps: VFs are being removed while a guest has one open")?;

    // A daemon that finds it so, and one whose workers have found out.
    command::run(["systemctl", "restart", "vfiod"])?.success()?;
    let record = device(FAR_NIC.address)?.context("the card is not listed")?;
    ensure!(record["problems"].to_string().contains("not returned"), "{record}");
    let refusal = vfioctl(["attach", FAR_NIC.address, "--tenant", "tenant-a"])?;
    refused(&refusal, 12, &[FAR_NIC.address, "has not returned"])?;
    lab.step("a restarted daemon lists all, and says of the card that the kernel is at it")?;

    let id = busctl_attach(GPU.address, "tenant-a")?;
    vfioctl(["release", &id])?.success()?;
    lab.step("the GPU was leased and given back meanwhile")?;

    let stuck = workers()?;
    ensure!(stuck.iter().any(|state| state == "D"), "no worker sleeps in the kernel: {stuck:?}");
    let start = Instant::now();
    command::run(["systemctl", "stop", "vfiod"])?.success()?;
    let took = start.elapsed();
    ensure!(took < STOP_LIMIT, "the daemon took {took:?} to stop");
    lab.step(format!("the daemon stopped in {took:.1?} beside a worker asleep in the kernel"))?;

    command::run(["systemctl", "start", "vfiod"])?.success()?;
    drop(guest);
    writer.wait()?;
    let legible = || Ok(device(FAR_NIC.address)?.is_some_and(|d| d["problems"] == Value::Null));
    wait_until("the card can be read again", LIMIT, legible)?;
    ensure!(workers()?.iter().all(|state| state != "D"), "a worker still sleeps");
    lab.step("the guest ended, the kernel woke, and the card is like any other again")?;
    sysfs::write(FAR_NIC.address, "sriov_drivers_autoprobe", "1")
}

/// The states of the daemon's workers, as `/proc/PID/stat` has them: `S`, `D`.
fn workers() -> Result<Vec<String>> {
    let processes = std::fs::read_dir("/proc")?.filter_map(|entry| Some(entry.ok()?.path()));
    let state = |path: std::path::PathBuf| {
        let stat = std::fs::read_to_string(path.join("stat")).ok()?;
        let (_, rest) = stat.split_once("(vfiod-worker) ")?;
        Some(rest.chars().take(1).collect())
    };
    Ok(processes.filter_map(state).collect())
}

pub(super) fn drivers() -> [Option<String>; 2] {
    [GPU, GPU_AUDIO].map(|function| sysfs::driver(function.address))
}

/// A call of which nobody knows when it ends, or how.
fn attach_apart() -> Result<Child> {
    Command::new("vfioctl")
        .args(["attach", GPU.address, "--tenant", "tenant-a"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("starting vfioctl")
}

/// Kills the daemon, which systemd then starts again.
pub(super) fn kill_daemon() -> Result<()> {
    // So many ends in so short a time are meant.
    command::run(["systemctl", "reset-failed", "vfiod"])?.success()?;
    command::run(["systemctl", "kill", "--kill-whom=main", "--signal=KILL", "vfiod"])?.success()?;
    let active = || {
        let state = command::run(["systemctl", "is-active", "vfiod"])?;
        Ok(state.stdout.trim() == "active")
    };
    wait_until("systemd has the daemon again", LIMIT, active)
}
