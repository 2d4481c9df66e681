//! What starting guests costs: libvirt with our hook beside libvirt alone, and `vfioctl run` beside
//! bare QEMU.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::super::libvirt::{define, hostdev, none_leased};
use super::{peers, timed};
use crate::lab::{Lab, command, sysfs, wait_until};
use crate::machine::NIC;
use crate::protocol::BenchRow;

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

/// From `virsh start` to running, with our hook and `managed='no'`, and by libvirt alone.
///
/// Each with a function of its own: libvirt takes one that a domain with `managed='no'` has had for
/// detached by hand, and then leaves it on VFIO (`virHostdevPreparePCIDevices`).
fn domains(lab: &mut Lab, vf: &str, other: &str) -> Result<()> {
    define("ours", "6b3c7d5e-0d3b-4e0f-9b53-1a2c3d4e5f60", None, &hostdev(vf, "no")?)?;
    define("theirs", "0b9d3f52-6b0d-4a3f-8b57-3a7d0e3a9c11", None, &hostdev(other, "yes")?)?;
    let start = |domain: &str, vf: &str, hook: u32| {
        fs::set_permissions(HOOK, fs::Permissions::from_mode(hook))?;
        command::run(["udevadm", "settle"])?.success()?;
        let took = timed(|| command::run(["virsh", "start", domain])?.success().map(drop))?;
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

/// From the command line to a monitor that answers, with a lease and with a device bound before.
fn monitors(lab: &mut Lab, vf: &str) -> Result<()> {
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..FEW {
        sysfs::bind(vf, Some("vfio-pci"))?;
        command::run(["udevadm", "settle"])?.success()?;
        let device = format!("vfio-pci,host={vf}");
        bare.push(answering(&["qemu-system-x86_64"], &["-device", &device])?);
        sysfs::write(vf, "driver/unbind", vf)?;
        sysfs::write(vf, "driver_override", "\n")?;
        command::run(["udevadm", "settle"])?.success()?;
        let launcher = ["vfioctl", "run", "--tenant=bench", "--device", vf, "--"];
        ours.push(answering(&[&launcher[..], &["qemu-system-x86_64"]].concat(), &["{vfio}"])?);
        wait_until("the lease ends", LIMIT, none_leased)?;
    }
    let mut row = BenchRow::of("run", "ms", &ours);
    row.peer_ratios = peers(&row, [("qemu", &bare)]);
    lab.bench(row)
}

/// How long it takes until the monitor greets, in milliseconds.
fn answering(program: &[&str], devices: &[&str]) -> Result<f64> {
    if fs::exists(SOCKET)? {
        fs::remove_file(SOCKET)?;
    }
    let qmp = format!("unix:{SOCKET},server=on,wait=off");
    let mut monitor = Command::new(program[0]);
    monitor
        .args(&program[1..])
        .args(["-accel", "kvm", "-cpu", "host", "-machine", "q35", "-m", "64", "-nodefaults"])
        .args(["-display", "none", "-S", "-qmp", &qmp])
        .args(devices)
        .stdin(Stdio::null());
    let begun = Instant::now();
    let mut monitor = monitor.spawn().context("starting a monitor")?;
    let greeted = greeting(&mut monitor);
    let took = super::milliseconds(begun.elapsed());
    monitor.kill()?;
    monitor.wait()?;
    greeted.map(|()| took)
}

fn greeting(monitor: &mut Child) -> Result<()> {
    let begun = Instant::now();
    let stream = loop {
        if let Ok(stream) = UnixStream::connect(SOCKET) {
            break stream;
        }
        ensure!(monitor.try_wait()?.is_none(), "the monitor ended");
        ensure!(begun.elapsed() < LIMIT, "the monitor does not answer");
        std::thread::sleep(Duration::from_millis(1));
    };
    stream.set_read_timeout(Some(LIMIT))?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    ensure!(line.contains("QMP"), "it greets with {line:?}");
    Ok(())
}
