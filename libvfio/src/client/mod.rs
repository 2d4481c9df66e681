//! The D-Bus interface `org.vfiod1` in Rust: what it is called, what its methods take and give,
//! how it fails. Used by the daemon and by its callers alike, so that both mean the same.
//! Talks to the bus only; never touches the host.

mod failure;
mod holding;
mod mediated;
mod policy;
mod records;
mod setting;

pub use failure::Failure;
pub use holding::{HolderRecord, HoldersRecord, UseRecord};
pub use mediated::{MediatedDeviceRecord, MediatedRecord, MediatedTypeRecord};
pub use policy::{DONE, FAILED, PolicyRecord, UnitRecord};
pub use records::{
    BarRecord, CareRecord, CheckedRecord, CleanedRecord, DeviceRecord, GroupRecord, HistoryRecord,
    LeaseRecord, PlanRecord, QuarantineRecord, ReasonRecord, StepRecord,
};
pub use setting::{ChoiceRecord, SettingRecord};

use std::collections::HashMap;

use zbus::wire::{OwnedObjectPath, OwnedVariant, Variant};

/// The daemon's name on the bus.
pub const BUS_NAME: &str = "org.vfiod1";
/// Where root finds, without a bus, [`ManagerProxy`] and a [`LeaseProxy`] for each lease made there.
pub const PRIVATE_SOCKET: &str = "/run/vfiod/private";
/// The root of its objects, where [`ManagerProxy`] is.
pub const ROOT_PATH: &str = "/org/vfiod1";

/// Options of a call; unknown ones are refused.
pub type Options<'a> = HashMap<&'a str, Variant<'a>>;
/// A record as it is on the bus: a dictionary that may gain entries.
pub type Dictionary = HashMap<String, OwnedVariant>;

/// The daemon.
#[zbus::proxy(
    interface = "org.vfiod1.Manager",
    default_service = "org.vfiod1",
    default_path = "/org/vfiod1"
)]
pub trait Manager {
    /// Leases devices to a tenant: their groups go to VFIO, all or none.
    #[zbus(allow_interactive_auth)]
    fn attach(
        &self,
        devices: &[&str],
        tenant: &str,
        options: Options<'_>,
    ) -> Result<(String, OwnedObjectPath), Failure>;

    /// Ends the lease that `target` names or is part of; answers the ids of those ended.
    #[zbus(allow_interactive_auth)]
    fn release(&self, target: &str, options: Options<'_>) -> Result<Vec<String>, Failure>;

    /// What [`attach`](Self::attach) would do or why it would not, without doing it.
    fn plan(&self, devices: &[&str], options: Options<'_>) -> Result<PlanRecord, Failure>;

    /// Whether one device can be attached, and its group's story.
    fn explain(&self, device: &str) -> Result<PlanRecord, Failure>;

    /// What the host does with a device's group, and which processes hold it.
    fn holders(&self, device: &str) -> Result<HoldersRecord, Failure>;

    /// What can be set on a virtual function for the time of a lease.
    fn list_settings(&self, device: &str) -> Result<Vec<SettingRecord>, Failure>;

    /// Every PCI function.
    fn list_devices(&self, options: Options<'_>) -> Result<Vec<DeviceRecord>, Failure>;

    /// Every IOMMU group.
    fn list_groups(&self) -> Result<Vec<GroupRecord>, Failure>;

    /// What mediated devices there can be, and which there are.
    fn list_mediated(&self) -> Result<MediatedRecord, Failure>;

    /// Every lease.
    fn list_leases(&self) -> Result<Vec<LeaseRecord>, Failure>;

    /// One lease.
    fn describe_lease(&self, id: &str) -> Result<LeaseRecord, Failure>;

    /// Every device that is not trusted.
    fn list_quarantine(&self) -> Result<Vec<QuarantineRecord>, Failure>;

    /// Keeps a device from leases to come; answers its address.
    #[zbus(allow_interactive_auth)]
    fn quarantine(&self, device: &str, reason: &str) -> Result<String, Failure>;

    /// Trusts a device again; answers whether it was not trusted.
    #[zbus(allow_interactive_auth)]
    fn clear_quarantine(&self, device: &str) -> Result<bool, Failure>;

    /// Cleans once more a device that did not come back well; answers its address.
    #[zbus(allow_interactive_auth)]
    fn heal(&self, device: &str) -> Result<String, Failure>;

    /// What became of leases and of devices not trusted, oldest first.
    fn list_history(&self, options: Options<'_>) -> Result<Vec<HistoryRecord>, Failure>;

    /// Whether that is what was written.
    fn check_history(&self) -> Result<CheckedRecord, Failure>;

    /// Where the host stands with the policy, and what applying would do.
    fn plan_policy(&self, options: Options<'_>) -> Result<PolicyRecord, Failure>;

    /// Does what the policy says, as far as nothing is in the way.
    #[zbus(allow_interactive_auth)]
    fn apply_policy(&self, options: Options<'_>) -> Result<PolicyRecord, Failure>;

    /// Reads the policy anew; one that is wrong leaves the one in force.
    #[zbus(allow_interactive_auth)]
    fn reload_policy(&self, options: Options<'_>) -> Result<PolicyRecord, Failure>;

    /// What applying the policy came to when the host booted.
    fn boot_report(&self, options: Options<'_>) -> Result<PolicyRecord, Failure>;

    /// All that is known of the device a name means.
    fn describe_device(&self, name: &str) -> Result<DeviceRecord, Failure>;

    /// The object of the device a name means.
    fn get_device(&self, name: &str) -> Result<OwnedObjectPath, Failure>;

    /// A lease changed state.
    #[zbus(signal)]
    fn lease_changed(&self, lease: &str, state: &str, reason: &str);

    /// A device appeared.
    #[zbus(signal)]
    fn device_added(&self, address: &str);

    /// A device changed: driver, override, group, VFs, lease or quarantine.
    #[zbus(signal)]
    fn device_changed(&self, address: &str);

    /// A device went away.
    #[zbus(signal)]
    fn device_removed(&self, address: &str);

    /// A step of applying the policy was carried out, or failed.
    #[zbus(signal)]
    fn policy_step(&self, pool: &str, device: &str, text: &str);

    /// The daemon's version.
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> Result<String, Failure>;

    /// The name of the simulated host that is served; empty on a real one.
    #[zbus(property(emits_changed_signal = "const"))]
    fn simulated(&self) -> Result<String, Failure>;
}

/// One PCI function. Its properties are for whoever follows one device; a record has them all.
#[zbus::proxy(interface = "org.vfiod1.Device", default_service = "org.vfiod1")]
pub trait Device {
    /// Gives a physical function so many virtual ones; answers their addresses, by index.
    #[zbus(allow_interactive_auth)]
    fn set_virtual_functions(
        &self,
        count: u16,
        options: Options<'_>,
    ) -> Result<Vec<String>, Failure>;

    /// What that would do or why it would not be done, without doing it.
    fn plan_virtual_functions(
        &self,
        count: u16,
        options: Options<'_>,
    ) -> Result<PlanRecord, Failure>;
}

/// One lease. Its descriptors are for whoever made it.
#[zbus::proxy(interface = "org.vfiod1.Lease", default_service = "org.vfiod1")]
pub trait Lease {
    /// Ends it.
    #[zbus(allow_interactive_auth)]
    fn release(&self, options: Options<'_>) -> Result<(), Failure>;

    /// Descriptors of its functions by address, or of its groups by number.
    #[zbus(allow_interactive_auth)]
    fn open_devices(&self) -> Result<Vec<(String, zbus::OwnedFd)>, Failure>;

    /// A descriptor of what is to translate for its devices.
    #[zbus(allow_interactive_auth)]
    fn open_iommu(&self) -> Result<zbus::OwnedFd, Failure>;

    /// Lets this process lock so much memory.
    #[zbus(allow_interactive_auth)]
    fn lock_memory(&self, bytes: u64) -> Result<(), Failure>;

    /// By what its devices are opened: `iommufd` or `group`.
    #[zbus(property(emits_changed_signal = "const"))]
    fn interface(&self) -> Result<String, Failure>;
}

/// The path of a device's object.
pub fn device_path(address: crate::address::PciAddress) -> String {
    format!("{ROOT_PATH}/device/{}", address.to_string().replace([':', '.'], "_"))
}

/// The path of a group's object.
pub fn group_path(number: u32) -> String {
    format!("{ROOT_PATH}/group/{number}")
}

/// The path of a lease's object.
pub fn lease_path(id: &str) -> String {
    format!("{ROOT_PATH}/lease/{id}")
}
