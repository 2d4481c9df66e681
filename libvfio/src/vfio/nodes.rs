//! The nodes by which a program gets devices that are on VFIO: which those are, and opening them on
//! its behalf. Opens them and gives them away; binds, maps and resets nothing.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::assigned::Assigned;
use crate::host::HostRoot;
use crate::mediated::{Device, Uuid};
use crate::pci::Function;

/// How VFIO hands devices to programs (`Documentation/driver-api/vfio.rst`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Interface {
    /// A node for each IOMMU group, which one program can have open at a time.
    Group,
    /// A node for each function or mediated device, to be bound to an `/dev/iommu`.
    Iommufd,
}

impl Interface {
    /// The word for it on every surface.
    pub fn name(self) -> &'static str {
        match self {
            Self::Group => "group",
            Self::Iommufd => "iommufd",
        }
    }
}

/// What nodes are for: a function or a mediated device, as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Openable {
    /// Its address or UUID.
    pub device: Assigned,
    /// Number of its IOMMU group.
    pub iommu_group: Option<u32>,
    /// Its VFIO character device (`vfio0`), on kernels that have them.
    pub vfio_device: Option<String>,
}

impl Openable {
    /// A mediated device.
    pub fn of_part(uuid: Uuid, part: &Device) -> Self {
        Self {
            device: uuid.into(),
            iommu_group: part.iommu_group,
            vfio_device: part.vfio_device.clone(),
        }
    }
}

impl From<&Function> for Openable {
    fn from(function: &Function) -> Self {
        Self {
            device: function.address.into(),
            iommu_group: function.iommu_group,
            vfio_device: function.vfio_device.clone(),
        }
    }
}

/// A node to be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The function's address or the mediated device's UUID, or the group's number.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
}

/// By what these can be opened: by themselves where all have nodes of their own and there is an
/// `/dev/iommu`, else by their groups. `None` where they are not on VFIO.
///
/// `vfio-dev/vfioN` in sysfs says nothing of that: kernels without `CONFIG_VFIO_DEVICE_CDEV` have it
/// too.
pub fn interface(host: &HostRoot, all: &[Openable]) -> Option<Interface> {
    let there = |path: Option<PathBuf>| path.is_some_and(|path| path.exists());
    if host.path("dev/iommu").exists() && all.iter().all(|one| there(device_node(host, one))) {
        return Some(Interface::Iommufd);
    }
    all.iter().all(|one| there(group_node(host, one))).then_some(Interface::Group)
}

/// The nodes of these, each once, in their order; the first that has none if one has not.
pub fn nodes(
    host: &HostRoot,
    interface: Interface,
    all: &[Openable],
) -> Result<Vec<Node>, Assigned> {
    let mut found: Vec<Node> = Vec::new();
    for one in all {
        let node = match interface {
            Interface::Iommufd => {
                device_node(host, one).map(|path| Node { name: one.device.to_string(), path })
            }
            Interface::Group => group_node(host, one)
                .zip(one.iommu_group)
                .map(|(path, number)| Node { name: number.to_string(), path }),
        };
        let node = node.ok_or(one.device)?;
        if !found.contains(&node) {
            found.push(node);
        }
    }
    Ok(found)
}

/// The nodes of one that are there, by whichever interface.
pub(crate) fn nodes_of(host: &HostRoot, one: &Openable) -> Vec<PathBuf> {
    let nodes = [group_node(host, one), device_node(host, one)];
    nodes.into_iter().flatten().filter(|node| node.exists()).collect()
}

fn device_node(host: &HostRoot, one: &Openable) -> Option<PathBuf> {
    let name = one.vfio_device.as_ref()?;
    Some(host.path("dev/vfio/devices").join(name))
}

fn group_node(host: &HostRoot, one: &Openable) -> Option<PathBuf> {
    Some(host.path(format!("dev/vfio/{}", one.iommu_group?)))
}

/// Opens nodes for somebody else; the first that cannot be opened ends it.
pub fn open_nodes(paths: &[PathBuf]) -> Result<Vec<OwnedFd>, (PathBuf, io::Error)> {
    let opened = |path: &PathBuf| {
        let file = open(path).map_err(|e| (path.clone(), e))?;
        Ok(file.into())
    };
    paths.iter().map(opened).collect()
}

/// Opens what translates for devices: an `/dev/iommu`, or a container for groups. Memory that is
/// mapped in the former counts against the limit of the process that maps it, as in the latter,
/// and not against that of all its user's processes together.
pub fn open_iommu(host: &HostRoot, interface: Interface) -> Result<OwnedFd, (PathBuf, io::Error)> {
    let path = host.path(match interface {
        Interface::Iommufd => "dev/iommu",
        Interface::Group => "dev/vfio/vfio",
    });
    let open = || {
        let file = open(&path)?;
        if interface == Interface::Iommufd && host.is_real() {
            count_by_process(&file)?;
        }
        Ok(file.into())
    };
    open().map_err(|e| (path.clone(), e))
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// `struct iommu_option` (`include/uapi/linux/iommufd.h`).
#[repr(C)]
#[derive(Debug, Default)]
struct RawOption {
    size: u32,
    option: u32,
    operation: u16,
    reserved: u16,
    object: u32,
    value: u64,
}

mod ioctls {
    #![allow(missing_docs, clippy::undocumented_unsafe_blocks)]
    use super::RawOption;

    nix::ioctl_readwrite_bad!(iommu_option, nix::request_code_none!(b';', 0x87), RawOption);
}

/// `IOMMU_OPTION_RLIMIT_MODE`, which takes `CAP_SYS_RESOURCE` and an `/dev/iommu` that is new.
fn count_by_process(iommu: &File) -> io::Result<()> {
    let mut option =
        RawOption { size: super::size_u32::<RawOption>(), value: 1, ..RawOption::default() };
    // SAFETY: the descriptor is open and `option` is the structure this request reads.
    unsafe { ioctls::iommu_option(iommu.as_raw_fd(), &raw mut option) }?;
    Ok(())
}
