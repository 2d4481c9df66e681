//! What starting guests costs: libvirt with our hook beside libvirt alone, and `vfioctl run` beside
//! bare QEMU.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, poll};

use super::super::libvirt::{define, hostdev, none_leased};
use super::{peers, timed};
use crate::lab::{Lab, command, sysfs, wait_until};
use crate::machine::NIC;
use crate::protocol::{BenchRow, median};

/// Runs of what takes a second.
const FEW: usize = 12;
const LIMIT: Duration = Duration::from_secs(60);
const HOOK: &str = "/etc/libvirt/hooks/qemu.d/50-vfiod";
const SOCKET: &str = "/run/lab-bench.qmp";

pub(super) fn run(lab: &mut Lab) -> Result<()> {
    command::run(["modprobe", "kvm_amd"])?.success()?;
    command::run(["modprobe", "vfio-pci"])?.success()?;
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "0")?;
    sysfs::write(NIC.address, "sriov_numvfs", "2")?;
    let [vf, other] = [0, 1].map(|index| sysfs::virtual_function(NIC.address, index));
    let (vf, other) = (vf?, other?);
    lab.step("measuring the start of a domain")?;
    domains(lab, &vf, &other)?;
    lab.step("measuring the start of a monitor")?;
    monitors(lab, &vf)?;
    sysfs::write(NIC.address, "sriov_numvfs", "0")?;
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "1")
}

/// From `virsh start` to a guest that could run, with our hook and `managed='no'`, and by libvirt alone.
///
/// Each with a function of its own: libvirt takes one that a domain with `managed='no'` has had for
/// detached by hand, and then leaves it on VFIO (`virHostdevPreparePCIDevices`).
fn domains(lab: &mut Lab, vf: &str, other: &str) -> Result<()> {
    define("ours", "6b3c7d5e-0d3b-4e0f-9b53-1a2c3d4e5f60", None, &hostdev(vf, "no")?)?;
    define("theirs", "0b9d3f52-6b0d-4a3f-8b57-3a7d0e3a9c11", None, &hostdev(other, "yes")?)?;
    let start = |domain: &str, vf: &str, hook: u32| {
        fs::set_permissions(HOOK, fs::Permissions::from_mode(hook))?;
        command::run(["udevadm", "settle"])?.success()?;
        let took =
            timed(|| command::run(["virsh", "start", "--paused", domain])?.success().map(drop))?;
        command::run(["virsh", "destroy", domain])?.success()?;
        // The hook does not keep libvirt waiting for what follows the guest's end.
        wait_until("the function is back", LIMIT, || Ok(sysfs::driver(vf).is_none()))?;
        anyhow::Ok(took)
    };
    // Taken in turns, so that what the machine does besides falls on both alike.
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..FEW {
        theirs.push(start("theirs", other, 0o644)?);
        ours.push(start("ours", vf, 0o755)?);
    }
    for domain in ["ours", "theirs"] {
        command::run(["virsh", "undefine", domain])?.success()?;
    }
    let mut row = BenchRow::of("guest-start", "ms", &ours);
    row.peer_ratios = peers(&row, [("libvirt", &theirs)]);
    lab.bench(row)
}

/// From the command line to a monitor that answers, with a lease, with a device bound just before by
/// bare writes, and with one bound long before.
fn monitors(lab: &mut Lab, vf: &str) -> Result<()> {
    const LAUNCHER: [&str; 5] = ["vfioctl", "run", "--tenant=bench", "--vmm=qemu", "--device"];
    let device = format!("vfio-pci,host={vf}");
    let bare = ["qemu-system-x86_64"];
    let run = |program| [&LAUNCHER[..], &[vf, "--", program]].concat();
    let settle = || command::run(["udevadm", "settle"])?.success();
    let unbind = || {
        sysfs::write(vf, "driver/unbind", vf)?;
        sysfs::write(vf, "driver_override", "\n")?;
        settle()
    };
    let (mut ours, mut bound, mut floor) = (Vec::new(), Vec::new(), Vec::new());
    let (mut before, mut nothing) = (Vec::new(), Vec::new());
    // Taken in turns, so that what the machine does besides falls on all alike.
    for _ in 0..FEW {
        sysfs::bind(vf, Some("vfio-pci"))?;
        settle()?;
        bound.push(answering(Instant::now(), &bare, &["-device", &device])?);
        unbind()?;
        let begun = Instant::now();
        sysfs::bind(vf, Some("vfio-pci"))?;
        floor.push(answering(begun, &bare, &["-device", &device])?);
        unbind()?;
        ours.push(answering(Instant::now(), &run(bare[0]), &["{vfio}"])?);
        wait_until("the lease ends", LIMIT, none_leased)?;
        settle()?;
        // What is started instead of a monitor ends at once.
        let program = [&run("true")[..], &["{vfio}"]].concat();
        before.push(timed(|| command::run(program)?.success().map(drop))?);
        wait_until("the lease ends", LIMIT, none_leased)?;
        settle()?;
        nothing.push(timed(|| command::run(["true"])?.success().map(drop))?);
    }
    let mut row = BenchRow::of("run", "ms", &ours);
    row.floor_ratio = Some(row.median / median(&floor));
    row.peer_ratios = peers(&row, [("qemu", &bound)]);
    lab.bench(row)?;
    let (nothing, bound) = (median(&nothing), median(&bound));
    for took in &mut before {
        *took -= nothing;
    }
    let mut row = BenchRow::of("run-before-exec", "ms", &before);
    row.peer_ratios = [("qemu".to_owned(), (bound + row.median) / bound)].into();
    lab.bench(row)
}

/// How long it takes from `begun` until the monitor of a guest that does not run yet has answered a
/// command, in milliseconds.
fn answering(begun: Instant, program: &[&str], devices: &[&str]) -> Result<f64> {
    if fs::exists(SOCKET)? {
        fs::remove_file(SOCKET)?;
    }
    // It calls, so that nobody has to look whether it is there.
    let listener = UnixListener::bind(SOCKET)?;
    let mut monitor = Command::new(program[0])
        .args(&program[1..])
        .args(["-accel", "kvm", "-cpu", "host", "-machine", "q35", "-m", "64", "-nodefaults"])
        .args(["-display", "none", "-S", "-qmp", &format!("unix:{SOCKET}")])
        .args(devices)
        .stdin(Stdio::null())
        .spawn()
        .context("starting a monitor")?;
    let answered = answered(&listener, &mut monitor);
    let took = super::milliseconds(begun.elapsed());
    monitor.kill()?;
    monitor.wait()?;
    answered.map(|()| took)
}

/// It greets as soon as it has read its command line, and answers when its devices are there.
fn answered(listener: &UnixListener, monitor: &mut Child) -> Result<()> {
    let mut calls = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    while poll(&mut calls, 1000u16)? == 0 {
        ensure!(monitor.try_wait()?.is_none(), "the monitor ended");
    }
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut lines = BufReader::new(&stream).lines();
    let mut line = || lines.next().context("the monitor ended")?.context("reading its answer");
    let greeting = line()?;
    ensure!(greeting.contains("QMP"), "it greets with {greeting:?}");
    (&stream).write_all(b"{\"execute\": \"qmp_capabilities\"}\n")?;
    let answer = line()?;
    ensure!(answer.contains("return"), "it answers with {answer:?}");
    Ok(())
}
