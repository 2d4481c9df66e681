//! `org.vfiod1.Device`: one PCI function's properties.

use std::sync::Arc;

use libvfio::address::PciAddress;
use libvfio::client::{DeviceRecord, lease_path};
use zbus::wire::{ObjectPath, OwnedObjectPath};

use crate::broker::Broker;

#[derive(Debug)]
pub(super) struct DeviceObject {
    broker: Arc<Broker>,
    address: PciAddress,
}

impl DeviceObject {
    pub(super) fn new(broker: Arc<Broker>, address: PciAddress) -> Self {
        Self { broker, address }
    }

    /// What is known now; all unknown between the function's end and the object's.
    fn record(&self) -> DeviceRecord {
        self.broker.device(self.address).unwrap_or_default()
    }
}

/// Properties cannot be absent: an empty string stands for none, `-1` for no number.
#[zbus::interface(name = "org.vfiod1.Device", introspection_docs = false)]
impl DeviceObject {
    #[zbus(property(emits_changed_signal = "const"))]
    fn address(&self) -> String {
        self.address.to_string()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn vendor_id(&self) -> u16 {
        self.record().vendor.unwrap_or(0xffff)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn device_id(&self) -> u16 {
        self.record().device.unwrap_or(0xffff)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn class(&self) -> u32 {
        self.record().class.unwrap_or(0)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> String {
        self.record().name
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn numa_node(&self) -> i32 {
        self.record().numa_node.and_then(|node| i32::try_from(node).ok()).unwrap_or(-1)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn physical_function(&self) -> String {
        self.record().physical_function.unwrap_or_default()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn reset_methods(&self) -> Vec<String> {
        self.record().reset_methods.unwrap_or_default()
    }

    #[zbus(property)]
    pub(super) fn driver(&self) -> String {
        self.record().driver.unwrap_or_default()
    }

    #[zbus(property)]
    pub(super) fn driver_override(&self) -> String {
        self.record().driver_override.unwrap_or_default()
    }

    #[zbus(property)]
    pub(super) fn iommu_group(&self) -> i64 {
        self.record().iommu_group.map_or(-1, i64::from)
    }

    #[zbus(property)]
    pub(super) fn enabled_virtual_functions(&self) -> u16 {
        self.record().enabled_vfs.unwrap_or(0)
    }

    #[zbus(property)]
    pub(super) fn lease(&self) -> OwnedObjectPath {
        let path = self.record().lease.map(|id| lease_path(&id));
        path.and_then(|path| path.try_into().ok())
            .unwrap_or_else(|| ObjectPath::from_static_str_unchecked("/").into())
    }
}
