//! `vfioctl run`: an ordinary user starts a guest with a GPU, and whatever ends gives it back.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::refusals::with_rule;
use super::survival::{drivers, kill_daemon};
use crate::lab::command::{UNPRIVILEGED, run_unprivileged};
use crate::lab::product::{device, lease, refused, vfioctl, vfioctl_json, vfioctl_unprivileged};
use crate::lab::{Guest, Lab, command, sysfs, wait_until};
use crate::machine::{GPU, GPU_AUDIO};

const LIMIT: Duration = Duration::from_secs(60);
const LAUNCHER: [&str; 11] = command::launcher("gpu");
/// How often the launcher is killed on its way.
const KILLS: u32 = 8;

pub(super) fn run(lab: &mut Lab) -> Result<()> {
    command::run(["usermod", "--append", "--groups=kvm", UNPRIVILEGED])?.success()?;
    let plan = [&LAUNCHER[5..10], &["--dry-run", "--", "qemu-system-x86_64", "{vfio}"]].concat();
    let said = vfioctl_unprivileged(plan[1..].iter().copied())?.success()?;
    ensure!(said.contains(GPU.address) && said.contains("node"), "{said}");
    lab.step("a dry run shows the steps and the command")?;
    with_rule("true", || as_a_user(lab))?;
    lab.step("without a rule of polkit the same is refused")?;
    let ran = command::run(LAUNCHER.into_iter().chain(["qemu-system-x86_64", "{vfio}"]))?;
    refused(&ran, 4, &["org.vfiod1.attach"])
}

fn as_a_user(lab: &mut Lab) -> Result<()> {
    let before = drivers();
    let mut guest = Guest::launch(&LAUNCHER, ["{vfio}".to_owned()])?;
    for function in [GPU, GPU_AUDIO] {
        ensure!(guest.sees(function.vendor, function.device), "no {} in it", function.id);
    }
    let id = device(GPU.address)?.context("no GPU")?["lease"].clone();
    let id = id.as_str().context("the GPU is not leased")?;
    let record = lease(id)?.context("no lease")?;
    ensure!(record["bound"] == format!("process {}", guest.pid()), "{record}");
    ensure!(record["owner"] != 0, "root has it: {record}");
    let interface = record["interface"].as_str().context("no interface")?.to_owned();
    lab.step(format!("an ordinary user's guest under KVM has the GPU, by {interface}"))?;

    kill_daemon()?;
    ensure!(lease(id)?.is_some_and(|lease| lease["state"] == "active"), "it lost the lease");
    guest.write_video(6)?;
    lab.step("the daemon was killed: the lease stays while QEMU lives")?;

    guest.kill()?;
    wait_until("the lease ends with QEMU", LIMIT, || Ok(lease(id)?.is_none()))?;
    ensure!(drivers() == before, "drivers are {:?}, were {before:?}", drivers());
    lab.step("QEMU was killed: the lease ended and the GPU is back on its drivers")?;

    vfioctl(["attach", GPU.address, "--tenant", "other"])?.success()?;
    let group = sysfs::group(GPU.address).context("no group")?;
    let opened = run_unprivileged(["sh", "-c", &format!(": < /dev/vfio/{group}")])?;
    refused(&opened, 2, &["ermission denied"])?;
    vfioctl(["release", GPU.address])?.success()?;
    lab.step("the next lease's node is closed to that user")?;

    let mut held = 0;
    for number in 0..KILLS {
        let monitor = ["--vmm=qemu", "--", "sleep", "600", "{vfio}"];
        let mut launcher = Command::new(LAUNCHER[0])
            .args(&LAUNCHER[1..10])
            .args(monitor)
            .stderr(Stdio::null())
            .spawn()?;
        std::thread::sleep(Duration::from_millis(u64::from(200 * number)));
        launcher.kill()?;
        launcher.wait()?;
        // A call that was under way ends with whom it was for.
        std::thread::sleep(Duration::from_millis(500));
        held += usize::from(!none()?);
        wait_until("all leases end", LIMIT, none)?;
        ensure!(drivers() == before, "kill {number}: {:?}, not {before:?}", drivers());
    }
    lab.step(format!(
        "vfioctl was killed {KILLS} times on its way ({held} times with a lease to end): all is back"
    ))
}

fn none() -> Result<bool> {
    Ok(vfioctl_json(["leases"])?.as_array().is_some_and(Vec::is_empty))
}
