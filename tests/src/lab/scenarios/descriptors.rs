//! Who gets descriptors of leased devices, and what they are good for.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libvfio::client::{LeaseProxy, lease_path};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::refusals::with_rule;
use crate::lab::command::{Ran, run_unprivileged};
use crate::lab::product::{
    busctl_attach, give_to_all, lease, refused, vfioctl, vfioctl_unprivileged,
};
use crate::lab::{Lab, sysfs, wait_until};
use crate::machine::EDU;

const LIMIT: Duration = Duration::from_secs(30);

/// What an ordinary user hears who asks a lease for its descriptors.
fn open_unprivileged(id: &str, method: &str) -> Result<Ran> {
    let path = lease_path(id);
    run_unprivileged(["busctl", "call", "org.vfiod1", &path, "org.vfiod1.Lease", method])
}

/// The owner has them, others do not, nobody keeps any, and none outlives the lease.
pub(super) fn run(lab: &mut Lab) -> Result<()> {
    let id = busctl_attach(EDU.address, "tenant-a")?;
    let record = lease(&id)?.context("no lease")?;
    let interface = record["interface"].as_str().context("it does not say how it is opened")?;
    lab.step(format!("a lease says by what its devices are opened: {interface}"))?;
    for method in ["OpenDevices", "OpenIommu"] {
        refused(&open_unprivileged(&id, method)?, 1, &["org.vfiod1.open"])?;
    }
    for guess in ["00000000", "ffffffff"] {
        let ran = open_unprivileged(guess, "OpenDevices")?;
        ensure!(ran.status != Some(0), "lease {guess}, which is not there, was opened");
    }
    let group = sysfs::group(EDU.address).context("no group")?;
    let opened = run_unprivileged(["sh", "-c", &format!(": < /dev/vfio/{group}")])?;
    refused(&opened, 2, &["ermission denied"])?;
    lab.step("another user is refused both, by the bus, by guessed paths and by the node itself")?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (devices, iommu) = runtime.block_on(async {
        let connection = zbus::Connection::system().await?;
        let lease = LeaseProxy::builder(&connection).path(lease_path(&id)).build().await?;
        let devices = lease.open_devices().await?;
        if interface == "group" {
            let again = lease.open_devices().await.err().context("a group was opened twice")?;
            ensure!(again.to_string().contains("once at a time"), "{again}");
        }
        anyhow::Ok((devices, lease.open_iommu().await?))
    })?;
    ensure!(devices.len() == 1, "{devices:?}");
    let name = if interface == "group" { group.as_str() } else { EDU.address };
    ensure!(devices[0].0 == name, "it is named {}, not {name}", devices[0].0);
    ensure!(holders()? == [std::process::id()], "held by {:?}", holders()?);
    lab.step("its owner has them, and neither the daemon nor a worker keeps a copy")?;

    refused(&vfioctl(["release", &id])?, 5, &["releasing", "lab-agent"])?;
    let other = vfioctl(["attach", EDU.address, "--tenant", "tenant-b"])?;
    refused(&other, 8, &[&id])?;
    let known = join(devices[0].1.as_raw_fd(), iommu.as_raw_fd(), interface)?;
    ensure!(translates(iommu.as_raw_fd(), interface, known), "it does not translate for it");
    drop(devices);
    wait_until("the lease ends", LIMIT, || Ok(lease(&id)?.is_none()))?;
    lab.step("while one is open the lease does not end and nobody else gets the device")?;

    // What translated for a device knows nothing of the next lease's.
    let next = busctl_attach(EDU.address, "tenant-a")?;
    ensure!(!translates(iommu.as_raw_fd(), interface, known), "it still translates for a device");
    let opened = File::options().read(true).write(true).open(node(interface)?)?;
    drop((opened, iommu));
    vfioctl(["release", &next])?.success()?;
    lab.step("what translated for it keeps nobody from the device, and is good for nothing more")?;

    // It cannot be reset.
    let kept = vfioctl(["attach", EDU.address, "--tenant", "ours"])?;
    refused(&kept, 11, &["cannot be reset", "only 'tenant-a' may have it"])?;
    give_to_all()?;
    let ours = "action.lookup('tenant') == 'ours'";
    with_rule(ours, || {
        vfioctl_unprivileged(["attach", EDU.address, "--tenant", "ours"])?.success()?;
        let leases = crate::lab::product::vfioctl_json(["leases"])?;
        let id = leases[0]["id"].as_str().context("no lease")?.to_owned();
        let answer = open_unprivileged(&id, "OpenDevices")?.success()?;
        ensure!(answer.starts_with("a(sh) 1 "), "{answer}");
        open_unprivileged(&id, "OpenIommu")?.success()?;
        let path = lease_path(&id);
        let lock = ["busctl", "call", "org.vfiod1", &path, "org.vfiod1.Lease", "LockMemory", "t"];
        let locked = run_unprivileged(lock.into_iter().chain(["1073741824"]))?;
        refused(&locked, 1, &["org.vfiod1.lock-memory"])?;
        vfioctl(["release", &id])?.success().map(drop)
    })?;
    give_to_all()?;
    lab.step("an ordinary user opens what it leased itself, and may lock memory only if allowed")?;

    hidden(lab, interface)
}

/// A descriptor that no process has: sent to a socket and never received. It outlives the process that
/// opened it, but not the lease.
fn hidden(lab: &mut Lab, interface: &str) -> Result<()> {
    let id = busctl_attach(EDU.address, "tenant-a")?;
    let node = node(interface)?;
    let (ours, theirs) = UnixStream::pair()?;
    let opened = File::options().read(true).write(true).open(&node)?;
    let rights = [opened.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&rights)];
    let data = [IoSlice::new(b"x")];
    sendmsg::<()>(ours.as_raw_fd(), &data, &rights, MsgFlags::empty(), None)?;
    drop(opened);
    // A worker that looked may still be closing it.
    wait_until("no process has it", LIMIT, || Ok(holders()?.is_empty()))?;
    let mut release = Ended(Command::new("vfioctl").args(["release", &id, "--wait"]).spawn()?);
    std::thread::sleep(Duration::from_secs(2));
    ensure!(release.0.try_wait()?.is_none(), "the lease ended beside a descriptor");
    refused(&vfioctl(["attach", EDU.address, "--tenant", "tenant-b"])?, 8, &[&id])?;
    drop((ours, theirs));
    wait_until("the lease ends", LIMIT, || Ok(lease(&id)?.is_none()))?;
    lab.step(format!("one hidden in a socket kept {node} from the next tenant until it was gone"))
}

/// The node of the device, by whichever interface.
fn node(interface: &str) -> Result<String> {
    Ok(match interface {
        "group" => format!("/dev/vfio/{}", sysfs::group(EDU.address).context("no group")?),
        _ => format!("/dev/vfio/devices/{}", sysfs::vfio_device(EDU.address)?),
    })
}

/// `struct vfio_device_bind_iommufd`.
#[repr(C)]
struct Binding {
    size: u32,
    flags: u32,
    iommu: i32,
    device: u32,
}

/// `struct iommu_hw_info`.
#[repr(C)]
struct Hardware {
    size: u32,
    flags: u32,
    device: u32,
    length: u32,
    data: u64,
    kind: u32,
    reserved: u32,
    capabilities: u64,
}

mod ioctls {
    #![allow(missing_docs, clippy::undocumented_unsafe_blocks)]
    use super::{Binding, Hardware};

    nix::ioctl_write_int_bad!(set_iommu, nix::request_code_none!(b';', 102));
    nix::ioctl_write_ptr_bad!(set_container, nix::request_code_none!(b';', 104), i32);
    nix::ioctl_readwrite_bad!(bind_iommufd, nix::request_code_none!(b';', 118), Binding);
    nix::ioctl_readwrite_bad!(hardware, nix::request_code_none!(b';', 0x8a), Hardware);
}

/// Has an IOMMU translate for a device or its group; what it calls the device, if it calls it anything.
fn join(device: RawFd, iommu: RawFd, interface: &str) -> Result<u32> {
    if interface == "group" {
        // SAFETY: both descriptors are open and the request reads one number.
        unsafe { ioctls::set_container(device, &raw const iommu) }?;
        return Ok(0);
    }
    let mut binding = Binding { size: 16, flags: 0, iommu, device: 0 };
    // SAFETY: the descriptor is open and `binding` is the structure this request reads and fills.
    unsafe { ioctls::bind_iommufd(device, &raw mut binding) }?;
    Ok(binding.device)
}

/// Whether an IOMMU knows the device: a container translates only if it has a group.
fn translates(iommu: RawFd, interface: &str, device: u32) -> bool {
    if interface == "group" {
        // SAFETY: the descriptor is open and the request takes a number, `VFIO_TYPE1v2_IOMMU`.
        return unsafe { ioctls::set_iommu(iommu, 3) }.is_ok();
    }
    let mut hardware = Hardware {
        size: 40,
        flags: 0,
        device,
        length: 0,
        data: 0,
        kind: 0,
        reserved: 0,
        capabilities: 0,
    };
    // SAFETY: the descriptor is open and `hardware` is the structure this request reads and fills.
    unsafe { ioctls::hardware(iommu, &raw mut hardware) }.is_ok()
}

/// A program that does not outlive the scenario.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // Ended already is as good as killed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Processes that have a node of VFIO open.
fn holders() -> Result<Vec<u32>> {
    let mut holders = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse().ok()) else {
            continue;
        };
        let open = std::fs::read_dir(path.join("fd")).into_iter().flatten().flatten();
        let mut links = open.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        if links.any(|link| link.starts_with("/dev/vfio") || link.starts_with("/dev/iommu")) {
            holders.push(pid);
        }
    }
    Ok(holders)
}
