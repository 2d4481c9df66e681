//! What the product costs, beside the bare kernel and its peers, in one boot.

mod guests;
mod hundreds;
mod many;
mod sanitise;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use libvfio::client::{BUS_NAME, ManagerProxy, PRIVATE_SOCKET};
use zbus::connection::Builder;
use zbus::proxy::CacheProperties;

use crate::lab::product::busctl_attach;
use crate::lab::{Lab, command, sysfs};
use crate::machine::NIC;
use crate::protocol::{BenchRow, median};

/// Runs of what takes milliseconds.
const MANY: usize = 60;
/// Runs of what takes a tenth of a second or more.
const SOME: usize = 15;

pub(super) use hundreds::run as hundreds;

pub(super) fn run(lab: &mut Lab) -> Result<()> {
    attaching(lab)?;
    lab.step("releasing with a reset, and clearing memory")?;
    sanitise::run(lab)?;
    lab.step("listing, memory, starting")?;
    list(lab, "list", SOME)?;
    memory(lab, "resident-memory")?;
    startup(lab)
}

/// Only what brings functions to VFIO and back.
pub(super) fn attaching(lab: &mut Lab) -> Result<()> {
    command::run(["modprobe", "vfio-pci"])?.success()?;
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "0")?;
    sysfs::write(NIC.address, "sriov_numvfs", "1")?;
    let vf = sysfs::virtual_function(NIC.address, 0)?;
    for unit in ["libvirtd.service", "vfiod.service"] {
        command::run(["systemctl", "start", unit])?.success()?;
    }
    command::run(["udevadm", "settle"])?.success()?;

    lab.step("measuring a cycle of attach and release on one connection")?;
    attach_release(lab, &vf)?;
    lab.step("the same with a process for each operation")?;
    each_a_process(lab, &vf)?;
    lab.step("making virtual functions, and leasing many at once")?;
    sysfs::write(NIC.address, "sriov_numvfs", "0")?;
    many::enable(lab)?;
    many::attach(lab)?;
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "1")
}

/// Only what leaves nothing of a tenant.
pub(super) fn sanitising(lab: &mut Lab) -> Result<()> {
    sanitise::run(lab)
}

/// On the machine that starts guests.
pub(super) fn guests(lab: &mut Lab) -> Result<()> {
    guests::run(lab)
}

/// One function, one connection: a cycle of attach and release. At the daemon's own socket, as virsh
/// asks libvirt at one; and over the bus.
fn attach_release(lab: &mut Lab, vf: &str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (private, bus) = runtime.block_on(async {
        let bus = ManagerProxy::new(&zbus::Connection::system().await?).await?;
        anyhow::Ok((manager().await?, bus))
    })?;
    let cycle = |manager: &ManagerProxy<'_>| {
        runtime.block_on(async {
            let (lease, _) = manager.attach(&[vf], "bench", [].into()).await?;
            // The bare writes do not reset either.
            let ended = manager.release(&lease, [("no_reset", true.into())].into()).await?;
            ensure!(ended == [lease], "released {ended:?}");
            Ok(())
        })
    };
    let mut virsh = Virsh::start()?;
    let node = node_name(vf);
    // Taken in turns, so that what the machine does besides falls on all alike.
    let (mut ours, mut by_bus, mut floor, mut session) =
        <(Vec<_>, Vec<_>, Vec<_>, Vec<_>)>::default();
    for _ in 0..MANY {
        // What udev makes of the changes before is no part of the next.
        let settle = || command::run(["udevadm", "settle"])?.success();
        settle()?;
        floor.push(timed(|| {
            sysfs::bind(vf, Some("vfio-pci"))?;
            sysfs::write(vf, "driver/unbind", vf)?;
            sysfs::write(vf, "driver_override", "\n")
        })?);
        settle()?;
        ours.push(timed(|| cycle(&private))?);
        settle()?;
        by_bus.push(timed(|| cycle(&bus))?);
        settle()?;
        session.push(timed(|| {
            virsh.ask(&format!("nodedev-detach {node}"), "detached")?;
            virsh.ask(&format!("nodedev-reattach {node}"), "re-attached")
        })?);
    }
    for (name, times) in [("attach-release", &ours), ("attach-release-bus", &by_bus)] {
        let mut row = BenchRow::of(name, "ms", times);
        row.floor_ratio = Some(row.median / median(&floor));
        row.peer_ratios = peers(&row, [("virsh-session", &session)]);
        lab.bench(row)?;
    }
    Ok(())
}

/// The daemon, at its own socket.
async fn manager() -> Result<ManagerProxy<'static>> {
    let socket = Builder::unix_stream(UnixStream::connect(PRIVATE_SOCKET)?).p2p();
    let manager = ManagerProxy::builder(&socket.build().await?).destination(BUS_NAME);
    Ok(manager.cache_properties(CacheProperties::No).build().await?)
}

/// The same with a process for each operation, as scripts and hooks do it.
fn each_a_process(lab: &mut Lab, vf: &str) -> Result<()> {
    let node = node_name(vf);
    let cycle = |first: &[&str], second: &[&str]| {
        timed(|| {
            command::run(first.iter().copied())?.success()?;
            command::run(second.iter().copied())?.success().map(drop)
        })
    };
    let (mut ours, mut virsh, mut driverctl) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..SOME {
        let attach = ["vfioctl", "attach", vf, "--tenant", "bench"];
        ours.push(cycle(&attach, &["vfioctl", "release", "--no-reset", vf])?);
        let detach = ["virsh", "nodedev-detach", &node];
        virsh.push(cycle(&detach, &["virsh", "nodedev-reattach", &node])?);
        driverctl.push(timed(|| {
            command::run(["driverctl", "--nosave", "set-override", vf, "vfio-pci"])?.success()?;
            // It complains that no host driver takes the function then, as none did before.
            command::run(["driverctl", "--nosave", "unset-override", vf])?;
            ensure!(sysfs::driver(vf).is_none() && sysfs::driver_override(vf)?.is_none());
            Ok(())
        })?);
    }
    let mut row = BenchRow::of("cli-attach-release", "ms", &ours);
    row.peer_ratios = peers(&row, [("virsh", &virsh), ("driverctl", &driverctl)]);
    lab.bench(row)
}

/// All functions with their drivers: whole processes.
fn list(lab: &mut Lab, name: &str, runs: usize) -> Result<()> {
    let whole =
        |command: &[&str]| timed(|| command::run(command.iter().copied())?.success().map(drop));
    let (mut ours, mut lspci, mut nodedev) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        ours.push(whole(&["vfioctl", "list", "--all"])?);
        lspci.push(whole(&["lspci", "-nnk"])?);
        nodedev.push(whole(&["virsh", "nodedev-list", "--cap", "pci"])?);
    }
    let mut row = BenchRow::of(name, "ms", &ours);
    row.peer_ratios = peers(&row, [("lspci", &lspci), ("nodedev-list", &nodedev)]);
    lab.bench(row)
}

/// What stays in memory after all of the above.
fn memory(lab: &mut Lab, name: &str) -> Result<()> {
    let ours = [resident("vfiod.service")?];
    let mut row = BenchRow::of(name, "MiB", &ours);
    row.peer_ratios = peers(&row, [("libvirtd", &[resident("libvirtd.service")?])]);
    lab.bench(row)
}

/// From the start of the unit to its readiness, with one lease to look after.
fn startup(lab: &mut Lab) -> Result<()> {
    let lease = busctl_attach(NIC_FREE, "bench")?;
    let (mut ours, mut own, mut bare) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..SOME {
        command::run(["systemctl", "stop", "vfiod"])?.success()?;
        ours.push(timed(|| command::run(["systemctl", "start", "vfiod"])?.success().map(drop))?);
        let bus = ["org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus"];
        let call = ["busctl", "call"].into_iter().chain(bus).chain(["GetId"]);
        bare.push(timed(|| command::run(call)?.success().map(drop))?);
        own.push(own_work()?);
        // More starts in ten seconds than systemd allows by itself.
        command::run(["systemctl", "reset-failed", "vfiod"])?;
    }
    command::run(["vfioctl", "release", &lease])?.success()?;
    let mut startup = BenchRow::of("startup", "ms", &ours);
    startup.floor_ratio = Some(startup.median / median(&bare));
    lab.bench(startup)?;
    lab.bench(BenchRow::of("startup-own-work", "ms", &own))
}

/// What the daemon says its last start took, from its first line of code to readiness.
fn own_work() -> Result<f64> {
    let last = ["journalctl", "--unit=vfiod", "--output=json", "--reverse", "--lines=1"];
    let ready = last.into_iter().chain(["--output-fields=VFIOD_MILLISECONDS", "MESSAGE=ready"]);
    let entry: serde_json::Value = serde_json::from_str(&command::run(ready)?.success()?)?;
    let told = entry["VFIOD_MILLISECONDS"].as_str().context("the daemon does not say")?;
    Ok(told.parse()?)
}

/// A function nobody uses, to hold a lease on while the daemon restarts.
const NIC_FREE: &str = crate::machine::EDU.address;

/// A `virsh` that reads its commands from us.
struct Virsh {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Virsh {
    fn start() -> Result<Self> {
        // It tells of what it did only where it is not quiet, and keeps it back in a pipe.
        let mut process = Command::new("stdbuf")
            .args(["-oL", "virsh", "--connect", "qemu:///system"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting virsh")?;
        let input = process.stdin.take().context("no stdin")?;
        let output = BufReader::new(process.stdout.take().context("no stdout")?);
        Ok(Self { process, input, output })
    }

    /// Gives a command and reads until a line has `answer` in it.
    fn ask(&mut self, line: &str, answer: &str) -> Result<()> {
        writeln!(self.input, "{line}")?;
        let mut said = String::new();
        loop {
            let length = self.output.read_line(&mut said)?;
            if said.lines().last().is_some_and(|last| last.contains(answer)) {
                return Ok(());
            }
            ensure!(length > 0, "virsh ended; it said\n{said}");
            if said.contains("error:") {
                bail!("virsh {line}: {said}");
            }
        }
    }
}

impl Drop for Virsh {
    fn drop(&mut self) {
        // Already ended is as good as killed.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// libvirt's name of a function: `pci_0000_01_10_0`.
fn node_name(address: &str) -> String {
    format!("pci_{}", address.replace([':', '.'], "_"))
}

/// Resident memory of a unit's main process, in MiB.
fn resident(unit: &str) -> Result<f64> {
    let pid =
        command::run(["systemctl", "show", "--property=MainPID", "--value", unit])?.success()?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.trim()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.split_whitespace().next().context("no number")?.parse()?;
    Ok(kib / 1024.0)
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(milliseconds(start.elapsed()))
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn peers<'a>(
    ours: &BenchRow,
    theirs: impl IntoIterator<Item = (&'a str, &'a (impl AsRef<[f64]> + ?Sized + 'a))>,
) -> BTreeMap<String, f64> {
    let ratio = |(name, runs): (&str, &_)| {
        (name.to_owned(), ours.median / median(AsRef::<[f64]>::as_ref(runs)))
    };
    theirs.into_iter().map(ratio).collect()
}
