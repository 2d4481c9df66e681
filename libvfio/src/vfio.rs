//! VFIO's device nodes in group mode: group status, a device as a VMM would see it, resets.
//! Opens nodes below `/dev/vfio` and closes them before returning, so that it never stands in a
//! VMM's way. The ioctls that vfio-ioctls lacks are written out here
//! (`include/uapi/linux/vfio.h`).

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vfio_ioctls::{VfioContainer, VfioDevice};

use crate::address::PciAddress;
use crate::error::Error;
use crate::host::HostRoot;
use crate::pci::Function;

/// What `VFIO_GROUP_GET_STATUS` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupStatus {
    /// Every member is on VFIO or on no driver.
    pub viable: bool,
    /// Somebody has put the group into a container.
    pub in_container: bool,
}

/// A device as a VMM would find it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// The function.
    pub device: PciAddress,
    /// Vendor as read through VFIO, which virtualises what a VF does not have.
    pub vendor: u16,
    /// Device as read through VFIO.
    pub id: u16,
    /// Regions that exist: BARs, ROM, configuration space, VGA and what the driver adds.
    pub regions: Vec<Region>,
    /// Interrupt vectors the guest can use at most.
    pub interrupts: u32,
    /// Whether the device can be reset by itself.
    pub resets_alone: bool,
    /// All functions a bus reset would hit; empty if the slot cannot be reset.
    pub reset_with: Vec<PciAddress>,
}

/// One region as VFIO offers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// VFIO's index: 0 to 5 BARs, 6 ROM, 7 configuration space, 8 VGA.
    pub index: u32,
    /// Bytes.
    pub size: u64,
    /// Whether it can be mapped.
    pub mappable: bool,
}

#[repr(C)]
#[derive(Debug, Default)]
struct RawGroupStatus {
    argsz: u32,
    flags: u32,
}

const GROUP_VIABLE: u32 = 1;
const GROUP_CONTAINER_SET: u32 = 2;
const REGION_FLAG_MMAP: u32 = 4;
const CONFIG_REGION: u32 = 7;
/// Regions of `vfio-pci` itself, before those a driver adds (`VFIO_PCI_NUM_REGIONS`).
const PCI_REGIONS: u32 = 9;
/// More functions than one bus can hold need no room.
const MOST_DEPENDENTS: usize = 256;

/// One entry of `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct RawDependent {
    group: u32,
    segment: u16,
    bus: u8,
    devfn: u8,
}

#[repr(C)]
#[derive(Debug)]
struct RawHotResetInfo {
    argsz: u32,
    flags: u32,
    count: u32,
    devices: [RawDependent; MOST_DEPENDENTS],
}

mod ioctls {
    #![allow(missing_docs, clippy::undocumented_unsafe_blocks)]
    use super::{RawGroupStatus, RawHotResetInfo};

    const TYPE: u8 = b';';
    const BASE: u8 = 100;
    nix::ioctl_readwrite_bad!(
        group_get_status,
        nix::request_code_none!(TYPE, BASE + 3),
        RawGroupStatus
    );
    nix::ioctl_none_bad!(device_reset, nix::request_code_none!(TYPE, BASE + 11));
    nix::ioctl_readwrite_bad!(
        device_hot_reset_info,
        nix::request_code_none!(TYPE, BASE + 12),
        RawHotResetInfo
    );
}

/// Asks VFIO for a group's status. Opening the group node is exclusive: `EBUSY` means that a VMM
/// has it. On a described host, and on kernels without group nodes, the answer is worked out from
/// the members' drivers by the kernel's rule.
pub fn group_status(host: &HostRoot, group: u32) -> Result<GroupStatus, Error> {
    let node = host.path(format!("dev/vfio/{group}"));
    if !host.is_real() || !node.exists() && host.path("dev/vfio/devices").exists() {
        return Ok(GroupStatus { viable: viable_by_drivers(host, group)?, in_container: false });
    }
    let file = open(&node)?;
    let mut status =
        RawGroupStatus { argsz: size_u32::<RawGroupStatus>(), ..RawGroupStatus::default() };
    // SAFETY: the descriptor is open and `status` is the structure this request fills.
    unsafe { ioctls::group_get_status(file.as_raw_fd(), &raw mut status) }
        .map_err(|errno| Error::io("ask the status of", &node)(errno.into()))?;
    Ok(GroupStatus {
        viable: status.flags & GROUP_VIABLE != 0,
        in_container: status.flags & GROUP_CONTAINER_SET != 0,
    })
}

fn viable_by_drivers(host: &HostRoot, group: u32) -> Result<bool, Error> {
    let members = host.sys(format!("kernel/iommu_groups/{group}/devices")).list()?;
    let functions = members.iter().filter_map(|name| Function::read(host, name.parse().ok()?));
    Ok(functions.into_iter().all(|f| f.driver.is_none() || f.on_vfio() || f.is_pci_bridge()))
}

/// Opens a function through VFIO as a VMM would, looks at what it offers and closes it. The
/// kernel resets the device on both occasions if it can.
pub fn inspect(host: &HostRoot, function: &Function) -> Result<DeviceReport, Error> {
    let device = open_device(host, function)?;
    let mut ids = [0u8; 4];
    device.region_read(CONFIG_REGION, &mut ids, 0);
    let regions = (0..PCI_REGIONS)
        .map(|index| Region {
            index,
            size: device.get_region_size(index),
            mappable: device.get_region_flags(index) & REGION_FLAG_MMAP != 0,
        })
        .filter(|region| region.size > 0)
        .collect();
    let reset_with = dependents(&device).unwrap_or_default();
    Ok(DeviceReport {
        device: function.address,
        vendor: u16::from_le_bytes([ids[0], ids[1]]),
        id: u16::from_le_bytes([ids[2], ids[3]]),
        regions,
        interrupts: device.max_interrupts(),
        resets_alone: function.reset_methods.iter().any(|m| m != "bus" && m != "cxl_bus"),
        reset_with: reset_with.into_iter().filter_map(RawDependent::address).collect(),
    })
}

/// Resets a function that is on a VFIO driver by its own means; functions that only a bus reset
/// reaches answer `ENOTTY`. vfio-ioctls has this request too, but drops its errno.
pub fn reset(host: &HostRoot, function: &Function) -> Result<(), Error> {
    let device = open_device(host, function)?;
    // SAFETY: the descriptor is that of an open VFIO device; the request takes no argument.
    unsafe { ioctls::device_reset(device.as_raw_fd()) }
        .map_err(|errno| refused(function, &format!("VFIO_DEVICE_RESET answered {errno}")))?;
    Ok(())
}

/// The functions a hot reset would hit (`VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`).
fn dependents(device: &VfioDevice) -> nix::Result<Vec<RawDependent>> {
    let mut info = RawHotResetInfo {
        argsz: size_u32::<RawHotResetInfo>(),
        flags: 0,
        count: 0,
        devices: [RawDependent::default(); MOST_DEPENDENTS],
    };
    // SAFETY: the descriptor is that of an open VFIO device, and `info` has the room it states.
    unsafe { ioctls::device_hot_reset_info(device.as_raw_fd(), &raw mut info) }?;
    let count = usize::try_from(info.count).unwrap_or(0).min(MOST_DEPENDENTS);
    Ok(info.devices[..count].to_vec())
}

impl RawDependent {
    fn address(self) -> Option<PciAddress> {
        PciAddress::new(u32::from(self.segment), self.bus, self.devfn >> 3, self.devfn & 7)
    }
}

fn open_device(host: &HostRoot, function: &Function) -> Result<VfioDevice, Error> {
    if !host.is_real() {
        return Err(refused(function, "a described host has no VFIO"));
    }
    let container = VfioContainer::new(None).map_err(|e| refused(function, &e.to_string()))?;
    VfioDevice::new(host.function(function.address).path(), Arc::new(container), false)
        .map_err(|e| refused(function, &e.to_string()))
}

fn refused(function: &Function, reason: &str) -> Error {
    Error::Vfio { address: function.address, reason: reason.to_owned() }
}

fn open(node: &Path) -> Result<File, Error> {
    OpenOptions::new().read(true).write(true).open(node).map_err(Error::io("open", node))
}

fn size_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}
