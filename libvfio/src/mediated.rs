//! Mediated devices: parts that a device's driver makes of it on demand, each with a VFIO group of
//! its own (`Documentation/driver-api/vfio-mediated-device.rst`). Reads sysfs through
//! [`crate::host`]; never writes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
pub use uuid::Uuid;

use crate::address::PciAddress;
use crate::error::Error;
use crate::host::{HostRoot, SysDir, plain};

/// Where the kernel lists those that can be made into parts, functions or not.
pub(crate) const PARENTS: &str = "class/mdev_bus";
/// Where it lists the parts.
pub(crate) const DEVICES: &str = "bus/mdev/devices";
/// In a parent's directory, that of its types.
pub(crate) const TYPES: &str = "mdev_supported_types";

/// What kind of part of which parent, as people name it: `mtty/mtty-2`, `0000:41:00.4/nvidia-63`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TypeName {
    /// The parent's name in `/sys/class/mdev_bus`; of a PCI function its address.
    pub parent: String,
    /// The name of the type's directory.
    #[serde(rename = "type")]
    pub kind: String,
}

/// A text that names no kind of mediated device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' names no kind of mediated device; write it as PARENT/TYPE, such as mtty/mtty-2")]
pub struct InvalidTypeName(String);

impl TypeName {
    /// The parent, if it is a PCI function.
    pub fn function(&self) -> Option<PciAddress> {
        self.parent.parse().ok()
    }
}

impl fmt::Display for TypeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.parent, self.kind)
    }
}

impl FromStr for TypeName {
    type Err = InvalidTypeName;

    /// A PCI function may be named by its short address. Both names become parts of paths.
    fn from_str(text: &str) -> Result<Self, InvalidTypeName> {
        let invalid = || InvalidTypeName(plain(&text.chars().take(64).collect::<String>()));
        let is_name = |name: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "._:-+".contains(c);
            (1..=64).contains(&name.len()) && !name.starts_with('.') && name.chars().all(plain)
        };
        let (parent, kind) = text.split_once('/').ok_or_else(invalid)?;
        if !is_name(parent) || !is_name(kind) {
            return Err(invalid());
        }
        let address = parent.parse::<PciAddress>().map(|address| address.to_string());
        Ok(Self { parent: address.unwrap_or_else(|_| parent.to_owned()), kind: kind.to_owned() })
    }
}

/// A kind of parts that a parent can be made into.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Type {
    /// What its driver calls it.
    pub name: Option<String>,
    /// More of it, in its driver's words: sizes, frame rates, how many there can be.
    pub description: Option<String>,
    /// How many more there can be now; those of other types may count, too.
    pub available: u32,
    /// What kind of device a guest sees: `vfio-pci`, `vfio-ccw`, `vfio-ap`.
    pub api: Option<String>,
}

/// The types of a parent, by the names of their directories.
pub type Types = BTreeMap<String, Type>;

/// A mediated device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Of what it is a part, and of which kind.
    pub of: TypeName,
    /// Number of its IOMMU group, where it has one. Valid for this boot.
    pub iommu_group: Option<u32>,
    /// Its VFIO character device (`vfio0`), on kernels that have them.
    pub vfio_device: Option<String>,
}

impl Device {
    /// The device with this UUID, if there is one.
    pub fn read(host: &HostRoot, uuid: Uuid) -> Option<Self> {
        let (all, name) = (host.sys(DEVICES), uuid.to_string());
        let dir = all.sub(&name);
        // Its directory lies in its parent's.
        let parent = all.link(&name)?.parent()?.file_name()?.to_str()?.to_owned();
        let group = dir.link_name("iommu_group");
        Some(Self {
            of: TypeName { parent, kind: dir.link_name("mdev_type")? },
            iommu_group: group.and_then(|group| group.parse().ok()),
            vfio_device: dir.sub("vfio-dev").list().ok()?.into_iter().next(),
        })
    }
}

/// All mediated devices there are.
pub fn devices(host: &HostRoot) -> Result<BTreeMap<Uuid, Device>, Error> {
    let names = host.sys(DEVICES).list()?;
    let uuids = names.iter().filter_map(|name| name.parse().ok());
    Ok(uuids.filter_map(|uuid| Some((uuid, Device::read(host, uuid)?))).collect())
}

/// The names of all that can be made into parts.
pub fn parents(host: &HostRoot) -> Result<BTreeSet<String>, Error> {
    Ok(host.sys(PARENTS).list()?.into_iter().collect())
}

/// The types of a parent; none if it is none.
pub fn types(host: &HostRoot, parent: &str) -> Result<Types, Error> {
    let dir = host.sys(PARENTS).sub(parent).sub(TYPES);
    let kinds = dir.directories();
    kinds.into_iter().map(|kind| Ok((kind.clone(), read_type(&dir.sub(&kind))?))).collect()
}

/// Drivers answer these, and some of them take locks for it.
fn read_type(dir: &SysDir) -> Result<Type, Error> {
    let names = ["name", "description", "available_instances", "device_api"];
    let [name, description, available, api] = dir.locked_attrs(names);
    let available = available?.and_then(|text| text.parse().ok()).unwrap_or(0);
    Ok(Type {
        name: name?.map(|name| plain(&name)),
        description: description?.map(|text| plain(&text.replace('\n', ", "))),
        available,
        api: api?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_named_by_its_parent_and_its_type() {
        let named: TypeName = "mtty/mtty-2".parse().unwrap();
        assert_eq!((named.to_string().as_str(), named.function()), ("mtty/mtty-2", None));
        let named: TypeName = "41:00.4/nvidia-63".parse().unwrap();
        assert_eq!(named.parent, "0000:41:00.4");
        assert_eq!(named.function(), "41:00.4".parse().ok());
    }

    #[test]
    fn what_leads_elsewhere_is_no_name() {
        let long = format!("mtty/{}", "x".repeat(65));
        for bad in
            ["mtty", "/", "mtty/", "/mtty-2", "../x", "mtty/..", "a/b/c", "a/b\n", "a/ü", &long]
        {
            let error = bad.parse::<TypeName>().unwrap_err().to_string();
            assert!(error.contains("PARENT/TYPE") && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn what_sysfs_shows_is_read() {
        let root = tempfile::tempdir().unwrap();
        let sys = root.path().join("sys");
        let parent = sys.join("devices/virtual/mtty/mtty");
        let kind = parent.join("mdev_supported_types/mtty-2");
        let uuid = Uuid::new_v4();
        let device = parent.join(uuid.to_string());
        for dir in [&kind, &device.join("vfio-dev/vfio3"), &sys.join(DEVICES), &sys.join(PARENTS)] {
            std::fs::create_dir_all(dir).unwrap();
        }
        let link = |to: &str, at| std::os::unix::fs::symlink::<_, std::path::PathBuf>(to, at);
        link("../../devices/virtual/mtty/mtty", sys.join(PARENTS).join("mtty")).unwrap();
        let at = sys.join(DEVICES).join(uuid.to_string());
        link(&format!("../../../devices/virtual/mtty/mtty/{uuid}"), at).unwrap();
        link("../mdev_supported_types/mtty-2", device.join("mdev_type")).unwrap();
        link("../../../../../kernel/iommu_groups/7", device.join("iommu_group")).unwrap();
        for (file, text) in [("name", "Dual port serial"), ("available_instances", "12")] {
            std::fs::write(kind.join(file), format!("{text}\n")).unwrap();
        }
        let host = HostRoot::new(root.path());
        assert_eq!(parents(&host).unwrap(), ["mtty".to_owned()].into());
        let types = types(&host, "mtty").unwrap();
        assert_eq!(types["mtty-2"].available, 12);
        assert_eq!(types["mtty-2"].name.as_deref(), Some("Dual port serial"));
        let found = &devices(&host).unwrap()[&uuid];
        assert_eq!(found.of.to_string(), "mtty/mtty-2");
        assert_eq!((found.iommu_group, found.vfio_device.as_deref()), (Some(7), Some("vfio3")));
    }
}
