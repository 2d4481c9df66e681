//! What the interface tells of mediated devices. Records are as in [`super::records`].

use zbus::wire::{DeserializeDict, SerializeDict, Type};

use crate::mediated;

/// What mediated devices there can be, and which there are.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct MediatedRecord {
    /// What can be made.
    pub types: Vec<MediatedTypeRecord>,
    /// What was made.
    pub devices: Vec<MediatedDeviceRecord>,
}

/// A type of a parent.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct MediatedTypeRecord {
    /// How it is named: `mtty/mtty-2`.
    pub name: String,
    /// What its driver calls it.
    pub label: Option<String>,
    /// More of it, in its driver's words.
    pub description: Option<String>,
    /// How many more there can be now.
    pub available: u32,
    /// What kind of device a guest sees: `vfio-pci`.
    pub api: Option<String>,
}

/// A mediated device.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct MediatedDeviceRecord {
    /// What it is called.
    pub uuid: String,
    /// Its parent and type: `mtty/mtty-2`.
    pub name: String,
    /// IOMMU group, valid for this boot.
    pub iommu_group: Option<u32>,
    /// VFIO character device, on kernels that have them.
    pub vfio_device: Option<String>,
    /// The lease that holds it; none if it is somebody else's.
    pub lease: Option<String>,
    /// That lease's tenant.
    pub tenant: Option<String>,
    /// That lease's state.
    pub lease_state: Option<String>,
}

impl MediatedTypeRecord {
    /// What is known of a type of a parent.
    pub fn new(parent: &str, kind: &str, found: &mediated::Type) -> Self {
        Self {
            name: format!("{parent}/{kind}"),
            label: found.name.clone(),
            description: found.description.clone(),
            available: found.available,
            api: found.api.clone(),
        }
    }
}

impl MediatedDeviceRecord {
    /// What is known of a device; its lease is for the daemon to add.
    pub fn new(uuid: mediated::Uuid, found: &mediated::Device) -> Self {
        Self {
            uuid: uuid.to_string(),
            name: found.of.to_string(),
            iommu_group: found.iommu_group,
            vfio_device: found.vfio_device.clone(),
            ..Self::default()
        }
    }
}
