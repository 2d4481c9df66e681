//! Functions that this process opens itself, by their groups, to do something to them. Closes them
//! before it returns. The ioctls are those of `include/uapi/linux/vfio.h`.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::size_u32;
use crate::address::PciAddress;
use crate::host::HostRoot;
use crate::pci::Function;

/// `VFIO_TYPE1v2_IOMMU`.
const TYPE1V2: i32 = 3;
/// More functions than a bus has.
const MOST: usize = 256;

/// `struct vfio_pci_dependent_device`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct RawDependent {
    group: u32,
    segment: u16,
    bus: u8,
    devfn: u8,
}

/// `struct vfio_pci_hot_reset_info` with room for its devices.
#[repr(C)]
#[derive(Debug)]
struct RawResetInfo {
    argsz: u32,
    flags: u32,
    count: u32,
    devices: [RawDependent; MOST],
}

/// `struct vfio_pci_hot_reset` with room for its groups.
#[repr(C)]
#[derive(Debug)]
struct RawReset {
    argsz: u32,
    flags: u32,
    count: u32,
    groups: [i32; MOST],
}

mod ioctls {
    #![allow(missing_docs, clippy::undocumented_unsafe_blocks)]
    use super::{RawReset, RawResetInfo};

    const TYPE: u8 = b';';
    const BASE: u8 = 100;
    nix::ioctl_write_int_bad!(set_iommu, nix::request_code_none!(TYPE, BASE + 2));
    nix::ioctl_write_ptr_bad!(set_container, nix::request_code_none!(TYPE, BASE + 4), i32);
    nix::ioctl_write_ptr_bad!(
        get_device,
        nix::request_code_none!(TYPE, BASE + 6),
        std::ffi::c_char
    );
    nix::ioctl_readwrite_bad!(
        hot_reset_info,
        nix::request_code_none!(TYPE, BASE + 12),
        RawResetInfo
    );
    nix::ioctl_write_ptr_bad!(hot_reset, nix::request_code_none!(TYPE, BASE + 13), RawReset);
}

/// Resets functions by the bus they share (`VFIO_DEVICE_PCI_HOT_RESET`): exactly these, or none. The
/// kernel asks for the groups of all it will reset; where it would reset a function that is not
/// among these, whoever has that would lose it.
pub(crate) fn hot_reset(host: &HostRoot, functions: &[PciAddress]) -> io::Result<()> {
    let mut groups = BTreeMap::new();
    let mut first = None;
    for address in functions {
        let number = Function::read(host, *address).and_then(|f| f.iommu_group);
        let number = number.ok_or(io::ErrorKind::NotFound)?;
        first.get_or_insert((*address, number));
        if let std::collections::btree_map::Entry::Vacant(place) = groups.entry(number) {
            place.insert(node(host, &number.to_string())?);
        }
    }
    let Some((address, number)) = first else { return Ok(()) };
    let container = node(host, "vfio")?;
    let device = device(&groups[&number], &container, address)?;
    let affected = affected(device.as_raw_fd())?;
    if !affected.iter().all(|other| functions.contains(other)) {
        return Err(io::Error::from_raw_os_error(nix::libc::EPERM));
    }
    let mut request =
        RawReset { argsz: size_u32::<RawReset>(), flags: 0, count: 0, groups: [0; MOST] };
    for (place, group) in request.groups.iter_mut().zip(groups.values()) {
        *place = group.as_raw_fd();
        request.count += 1;
    }
    // SAFETY: the descriptor is that of an open VFIO device; `request` is the structure this request
    // reads, and the groups in it are open.
    unsafe { ioctls::hot_reset(device.as_raw_fd(), &raw const request) }?;
    Ok(())
}

/// What a reset of the function's bus or slot would reset.
fn affected(device: RawFd) -> io::Result<BTreeSet<PciAddress>> {
    let mut info = RawResetInfo {
        argsz: size_u32::<RawResetInfo>(),
        flags: 0,
        count: 0,
        devices: [RawDependent::default(); MOST],
    };
    // SAFETY: the descriptor is that of an open VFIO device and `info` is the structure this request
    // fills, with the room it says it has.
    unsafe { ioctls::hot_reset_info(device, &raw mut info) }?;
    let count = usize::try_from(info.count).unwrap_or(MOST);
    let address = |other: &RawDependent| {
        PciAddress::new(other.segment.into(), other.bus, other.devfn >> 3, other.devfn & 0x7)
    };
    let all: Option<BTreeSet<_>> = info.devices.iter().take(count).map(address).collect();
    all.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Opens a function, which takes its group in a container with an IOMMU.
fn device(group: &File, container: &File, address: PciAddress) -> io::Result<OwnedFd> {
    let name = CString::new(address.to_string())?;
    let number = container.as_raw_fd();
    // SAFETY: both descriptors are open, and the request reads one number.
    unsafe { ioctls::set_container(group.as_raw_fd(), &raw const number) }?;
    // SAFETY: the descriptor is open and the request takes a number.
    unsafe { ioctls::set_iommu(number, TYPE1V2) }?;
    // SAFETY: the descriptor is open and `name` is a string that ends.
    let device = unsafe { ioctls::get_device(group.as_raw_fd(), name.as_ptr()) }?;
    // SAFETY: the kernel has just made this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(device) })
}

fn node(host: &HostRoot, name: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(host.path("dev/vfio").join(name))
}
