//! `org.vfiod1.Device`: one PCI function's properties.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use libvfio::address::PciAddress;
use libvfio::client::{Failure, PlanRecord, lease_path};
use libvfio::error::ErrorKind;
use libvfio::pci::Function;
use zbus::message::Header;
use zbus::wire::{ObjectPath, OwnedObjectPath, Variant};

use super::Caller;
use crate::authority::Action;
use crate::broker::{Broker, Property};
use crate::request::{RawOptions, check_no_options};

#[derive(Debug)]
pub(super) struct DeviceObject {
    broker: Arc<Broker>,
    /// Set once there is a connection, before anyone can call.
    caller: Arc<OnceLock<Caller>>,
    address: PciAddress,
}

impl DeviceObject {
    pub(super) fn new(
        broker: Arc<Broker>,
        caller: Arc<OnceLock<Caller>>,
        address: PciAddress,
    ) -> Self {
        Self { broker, caller, address }
    }

    fn caller(&self) -> Result<&Caller, Failure> {
        let early = || Failure::new(ErrorKind::Internal, "the daemon is not ready; call again");
        self.caller.get().ok_or_else(early)
    }

    /// The function as last seen; none between its end and the object's.
    fn function(&self) -> Option<Arc<Function>> {
        self.broker.inventory().get(self.address).cloned()
    }

    /// The value of one of its properties now.
    pub(super) fn value(&self, property: Property) -> (&'static str, Variant<'static>) {
        match property {
            Property::Driver => ("Driver", self.driver().into()),
            Property::DriverOverride => ("DriverOverride", self.driver_override().into()),
            Property::IommuGroup => ("IommuGroup", self.iommu_group().into()),
            Property::EnabledVirtualFunctions => {
                ("EnabledVirtualFunctions", self.enabled_virtual_functions().into())
            }
            Property::Lease => ("Lease", self.lease().into_inner().into()),
            Property::Quarantine => ("Quarantine", self.quarantine().into()),
        }
    }
}

/// Properties cannot be absent: an empty string stands for none, `-1` for no number.
#[zbus::interface(name = "org.vfiod1.Device", introspection_docs = false)]
impl DeviceObject {
    #[zbus(out_args("addresses"))]
    async fn set_virtual_functions(
        &self,
        #[zbus(header)] header: Header<'_>,
        count: u16,
        options: RawOptions,
    ) -> Result<Vec<String>, Failure> {
        check_no_options(&options)?;
        let caller = self.caller()?;
        let (address, device, number) = (self.address, self.address(), count.to_string());
        let details = HashMap::from([("device", device.as_str()), ("count", number.as_str())]);
        let user = caller.authority.check(&header, Action::VirtualFunctions, &details).await?;
        let set = move |broker: &Arc<Broker>| broker.set_virtual_functions(address, count, user);
        let addresses = caller.run(set).await?;
        Ok(addresses.iter().map(ToString::to_string).collect())
    }

    #[zbus(out_args("plan"))]
    async fn plan_virtual_functions(
        &self,
        count: u16,
        options: RawOptions,
    ) -> Result<PlanRecord, Failure> {
        check_no_options(&options)?;
        let address = self.address;
        self.caller()?.run(move |broker| broker.plan_virtual_functions(address, count)).await
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn address(&self) -> String {
        self.address.to_string()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn vendor_id(&self) -> u16 {
        self.function().and_then(|f| f.ids.vendor).unwrap_or(0xffff)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn device_id(&self) -> u16 {
        self.function().and_then(|f| f.ids.device).unwrap_or(0xffff)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn class(&self) -> u32 {
        self.function().and_then(|f| f.ids.class).unwrap_or(0)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> String {
        let inventory = self.broker.inventory();
        inventory.get(self.address).map(|f| inventory.describe(f)).unwrap_or_default()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn numa_node(&self) -> i32 {
        let node = self.function().and_then(|f| f.numa_node);
        node.and_then(|node| i32::try_from(node).ok()).unwrap_or(-1)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn physical_function(&self) -> String {
        let physical = self.function().and_then(|f| f.physical());
        physical.map(|address| address.to_string()).unwrap_or_default()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn reset_methods(&self) -> Vec<String> {
        self.function().map(|f| f.reset_methods.clone()).unwrap_or_default()
    }

    #[zbus(property)]
    fn driver(&self) -> String {
        self.function().and_then(|f| f.driver.clone()).unwrap_or_default()
    }

    #[zbus(property)]
    fn driver_override(&self) -> String {
        self.function().and_then(|f| f.driver_override.clone()).unwrap_or_default()
    }

    #[zbus(property)]
    fn iommu_group(&self) -> i64 {
        self.function().and_then(|f| f.iommu_group).map_or(-1, i64::from)
    }

    #[zbus(property)]
    fn enabled_virtual_functions(&self) -> u16 {
        self.function().map_or(0, |f| f.enabled_vfs())
    }

    #[zbus(property)]
    fn lease(&self) -> OwnedObjectPath {
        let path = self.broker.holder(self.address).map(|id| lease_path(&id));
        path.and_then(|path| path.try_into().ok())
            .unwrap_or_else(|| ObjectPath::from_static_str_unchecked("/").into())
    }

    #[zbus(property)]
    fn quarantine(&self) -> String {
        self.broker.quarantine_of(self.address).unwrap_or_default()
    }
}
