//! VFIO's device nodes: group status, resets by bus, device memory, and handing nodes to
//! programs.
//! Opens nodes below `/dev/vfio` and closes them before returning, so that it never stands in a
//! VMM's way; only `nodes` opens any for somebody else. The ioctls that vfio-ioctls lacks are
//! written out here (`include/uapi/linux/vfio.h`).

mod memory;
mod nodes;
mod opened;
mod region;

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use vfio_ioctls::{VfioContainer, VfioDevice};

use crate::error::Error;
use crate::host::HostRoot;
use crate::pci::Function;

pub use memory::{Memory, Wrong};
pub(crate) use nodes::nodes_of;
pub use nodes::{Interface, Node, Openable, interface, nodes, open_iommu, open_nodes};
pub(crate) use opened::hot_reset;
pub(crate) use region::Region;

#[repr(C)]
#[derive(Debug, Default)]
struct RawGroupStatus {
    argsz: u32,
    flags: u32,
}

/// `VFIO_GROUP_FLAGS_VIABLE`: every member is on VFIO or on no driver.
const GROUP_VIABLE: u32 = 1;

mod ioctls {
    #![allow(missing_docs, clippy::undocumented_unsafe_blocks)]
    use super::RawGroupStatus;

    const TYPE: u8 = b';';
    const BASE: u8 = 100;
    nix::ioctl_readwrite_bad!(
        group_get_status,
        nix::request_code_none!(TYPE, BASE + 3),
        RawGroupStatus
    );
}

/// Asks VFIO whether a group may go to a guest (`VFIO_GROUP_GET_STATUS`). Opening the group node is
/// exclusive: `EBUSY` means that a VMM has it. It is opened for reading, which root may also where
/// libvirt has given the node to a guest's user. On a described host, and on kernels without group
/// nodes, the answer is worked out from the members' drivers by the kernel's rule.
pub fn group_viable(host: &HostRoot, group: u32) -> Result<bool, Error> {
    let node = host.path(format!("dev/vfio/{group}"));
    let file = match open(&node) {
        Err(Error::Io { source, .. })
            if source.kind() == ErrorKind::NotFound
                && (!host.is_real() || host.path("dev/vfio/devices").exists()) =>
        {
            None
        }
        opened => Some(opened?),
    };
    let Some(file) = file.filter(|_| host.is_real()) else {
        return viable_by_drivers(host, group);
    };
    let mut status =
        RawGroupStatus { argsz: size_u32::<RawGroupStatus>(), ..RawGroupStatus::default() };
    // SAFETY: the descriptor is open and `status` is the structure this request fills.
    unsafe { ioctls::group_get_status(file.as_raw_fd(), &raw mut status) }
        .map_err(|errno| Error::io("ask the status of", &node)(errno.into()))?;
    Ok(status.flags & GROUP_VIABLE != 0)
}

fn viable_by_drivers(host: &HostRoot, group: u32) -> Result<bool, Error> {
    let members = host.sys(format!("kernel/iommu_groups/{group}/devices")).list()?;
    let functions = members.iter().filter_map(|name| Function::read(host, name.parse().ok()?));
    Ok(functions.into_iter().all(|f| f.driver.is_none() || f.on_vfio() || f.is_pci_bridge()))
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
    OpenOptions::new().read(true).open(node).map_err(Error::io("open", node))
}

fn size_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}
