//! What the interface tells of devices, groups, plans, leases and what became of them. On the bus each record is a
//! dictionary `a{sv}` with the field's name as key; absent fields are unknown or do not apply.

use zbus::wire::{DeserializeDict, SerializeDict, Type};

use crate::inventory::Inventory;
use crate::iommu::Group;
use crate::pci::{Bar, Function, Sriov};
use crate::plan::{Plan, Reason, Refusal};
use crate::step::{Outcome, Step};

/// A PCI function.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct DeviceRecord {
    /// `0000:03:00.0`.
    pub address: String,
    /// Vendor id.
    pub vendor: Option<u16>,
    /// Device id.
    pub device: Option<u16>,
    /// Subsystem vendor id.
    pub subsystem_vendor: Option<u16>,
    /// Subsystem device id.
    pub subsystem_device: Option<u16>,
    /// Class code, 24 bits.
    pub class: Option<u32>,
    /// Revision.
    pub revision: Option<u8>,
    /// Vendor and device in words.
    pub name: String,
    /// Class in words.
    pub class_name: String,
    /// The driver that has it.
    pub driver: Option<String>,
    /// The override set on it.
    pub driver_override: Option<String>,
    /// IOMMU group, valid for this boot.
    pub iommu_group: Option<u32>,
    /// Isolation grade: `full`, `no-interrupt-remapping`, `acs-override`, `none`.
    pub isolation: String,
    /// NUMA node.
    pub numa_node: Option<u32>,
    /// Ports above it, from the root port down.
    pub upstream: Option<Vec<String>>,
    /// Link speed now, in GT/s.
    pub link_speed: Option<f64>,
    /// Link width now, in lanes.
    pub link_width: Option<u16>,
    /// Link speed at most, in GT/s.
    pub link_speed_max: Option<f64>,
    /// Link width at most, in lanes.
    pub link_width_max: Option<u16>,
    /// Regions.
    pub bars: Option<Vec<BarRecord>>,
    /// Reset methods, in the kernel's order.
    pub reset_methods: Option<Vec<String>>,
    /// Power state: `D0`, `D3hot`, `D3cold`, `unknown`.
    pub power_state: Option<String>,
    /// Whether the firmware used it as the console.
    pub boot_vga: Option<bool>,
    /// Device serial number, from configuration space.
    pub serial: Option<String>,
    /// Names of the capabilities found in configuration space.
    pub capabilities: Option<Vec<String>>,
    /// `physical` or `virtual` where SR-IOV is in play.
    pub sriov: Option<String>,
    /// VFs this PF can have.
    pub total_vfs: Option<u16>,
    /// VFs this PF has.
    pub enabled_vfs: Option<u16>,
    /// Whether host drivers are offered this PF's new VFs.
    pub vf_autoprobe: Option<bool>,
    /// Routing id distance from a PF to its first VF.
    pub vf_offset: Option<u16>,
    /// Routing id distance from one of its VFs to the next.
    pub vf_stride: Option<u16>,
    /// Interrupt vectors (MSI-X) it has.
    pub msix_vectors: Option<u16>,
    /// This VF's PF.
    pub physical_function: Option<String>,
    /// This VF's index, from 0.
    pub vf_index: Option<u16>,
    /// VFIO character device, on kernels that have them.
    pub vfio_device: Option<String>,
    /// The lease that holds it.
    pub lease: Option<String>,
    /// That lease's tenant.
    pub tenant: Option<String>,
    /// That lease's state.
    pub lease_state: Option<String>,
    /// The pool of the policy that it is in.
    pub pool: Option<String>,
    /// On a VFIO driver without a lease or the policy: somebody else's.
    pub external: Option<bool>,
    /// Why it is not trusted, if so.
    pub quarantine: Option<String>,
    /// What could not be read or makes no sense.
    pub problems: Option<Vec<String>>,
}

/// A region of a function.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct BarRecord {
    /// 0 to 5, or 6 for the expansion ROM.
    pub index: u8,
    /// Bytes.
    pub size: u64,
    /// `memory` or `io`.
    pub kind: String,
    /// Whether reads have no side effects.
    pub prefetchable: bool,
}

/// An IOMMU group.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct GroupRecord {
    /// Its number, valid for this boot.
    pub number: u32,
    /// Its functions.
    pub members: Vec<String>,
    /// Whether a guest could have it now: no member is on a host driver.
    pub viable: bool,
    /// Members on host drivers.
    pub host_owned: Vec<String>,
    /// Isolation grade.
    pub isolation: String,
    /// Why it has more than one function.
    pub sharing: String,
    /// Leases that hold members.
    pub leases: Vec<String>,
}

/// What attaching would do, or why it would not be done.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct PlanRecord {
    /// Whether it would be done.
    pub possible: bool,
    /// The functions that would change hands.
    pub devices: Vec<String>,
    /// What the mediated devices would be called that would be made; another time, otherwise.
    pub mediated: Vec<String>,
    /// The groups concerned.
    pub groups: Vec<GroupRecord>,
    /// What would be done, in order.
    pub steps: Vec<StepRecord>,
    /// Why it would not, weightiest first.
    pub reasons: Vec<ReasonRecord>,
    /// What should be known but forbids nothing.
    pub warnings: Vec<String>,
}

/// One step of a plan or a lease.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct StepRecord {
    /// The kind: `unbind`, `set-override`, `bind` and so on.
    pub step: String,
    /// The function it changes, by its address, or the mediated device, by its UUID.
    pub device: Option<String>,
    /// The step in words.
    pub text: String,
    /// `done` or `already-so`; absent while it has not been carried out.
    pub outcome: Option<String>,
    /// The step that takes it back, in words; absent where nothing needs to be.
    pub undo: Option<String>,
}

/// One reason for a refusal.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct ReasonRecord {
    /// The error it leads to: `Busy`, `NotViable` and so on.
    pub kind: String,
    /// A stable word: `leased`, `quarantined`, `sibling`.
    pub code: String,
    /// What stands in the way.
    pub object: String,
    /// Why, as the second half of a sentence about the object.
    pub text: String,
    /// What to do.
    pub remedy: String,
}

/// A lease.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct LeaseRecord {
    /// Its id.
    pub id: String,
    /// Who has it.
    pub tenant: String,
    /// The virtual machine it is for.
    pub vm: Option<String>,
    /// `preparing`, `active`, `releasing`, `wedged` or `failed`.
    pub state: String,
    /// Why it failed, or what it waits for.
    pub reason: Option<String>,
    /// What it ends with: a process or a connection to the bus.
    pub bound: Option<String>,
    /// What the daemon does with the devices, if they are for no tenant.
    pub task: Option<String>,
    /// By what its functions can be opened: `iommufd` or `group`; absent before that is known.
    pub interface: Option<String>,
    /// Its functions.
    pub devices: Vec<String>,
    /// Its mediated devices, by their UUIDs.
    pub mediated: Vec<String>,
    /// User id of the caller that attached it.
    pub owner: u32,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// How each of its functions is cleaned when it ends.
    pub cleaning: Vec<CareRecord>,
    /// What was done for it.
    pub steps: Vec<StepRecord>,
}

/// How a function is cleaned when its lease ends.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct CareRecord {
    /// The function's address.
    pub device: String,
    /// The method it is reset by (`flr`, `bus`), or `none` (by the policy), `skipped` (by request) or
    /// `impossible`.
    pub reset: String,
    /// `bar-zero`, `bar-zero-sampled`, `nvme` or `command`, or `none` (by the policy), `skipped` (by
    /// request) or `unknown`.
    pub scrub: String,
    /// In what that is less than the default, if it is.
    pub weaker: Option<String>,
}

/// A device that is not trusted.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct QuarantineRecord {
    /// Where it is, or where it was if it is not there.
    pub address: String,
    /// Vendor and device in words, or their ids if it is not there.
    pub name: String,
    /// When it was put there, in seconds since 1970.
    pub since: u64,
    /// Why.
    pub reason: String,
    /// Who put it there: a user id, or `vfiod`.
    pub by: String,
    /// Whether it is there.
    pub present: bool,
    /// The tenant who may have it all the same, if one may.
    pub but_for: Option<String>,
}

/// Something that happened.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct HistoryRecord {
    /// When, in seconds since 1970.
    pub time: u64,
    /// `attached`, `released`, `failed`, `recovered`, `policy`, `quarantined`, `cleared` or `set-aside`.
    pub event: String,
    /// The lease it happened to.
    pub lease: Option<String>,
    /// That lease's tenant.
    pub tenant: Option<String>,
    /// The virtual machine it was for.
    pub vm: Option<String>,
    /// The functions and the mediated devices concerned.
    pub devices: Vec<String>,
    /// Why or how; may be empty.
    pub text: String,
    /// When the lease that ended was made, in seconds since 1970.
    pub since: Option<u64>,
    /// What was done so that nothing of the lease's tenant is left in its functions.
    pub cleaned: Vec<CleanedRecord>,
    /// Its number; each entry has the one after that of the entry before.
    pub number: u64,
    /// The hash of this entry and of all before it.
    pub chain: String,
}

/// What was done so that nothing of a tenant is left in a function.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct CleanedRecord {
    /// The function's address.
    pub device: String,
    /// `alone`, `bus`, `none`, `skipped`, `impossible`, `gone` or `failed`.
    pub reset: String,
    /// `zeros`, `zeros-sampled`, `erased`, `command`, `none`, `skipped`, `unknown`, `gone` or `failed`.
    pub scrub: String,
    /// In what that is less than the default, if it is.
    pub weaker: Option<String>,
}

/// Whether the history is what was written.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct CheckedRecord {
    /// How many entries hold together.
    pub entries: u64,
    /// The number of the oldest that is kept.
    pub first: u64,
    /// The number the next one will have.
    pub next: u64,
    /// The hash of the newest entry and of all before it.
    pub chain: String,
    /// What is wrong; empty if nothing is.
    pub faults: Vec<String>,
}

impl DeviceRecord {
    /// All that an inventory knows of a function.
    pub fn full(inventory: &Inventory, function: &Function) -> Self {
        let link = function.config.pcie().and_then(|pcie| pcie.link);
        let sriov = match function.sriov {
            Sriov::Physical { total, enabled, autoprobe, .. } => {
                (Some(total), Some(enabled), Some(autoprobe))
            }
            _ => (None, None, None),
        };
        let layout = match function.sriov {
            Sriov::Physical { offset, stride, .. } => Some((offset, stride)),
            _ => None,
        };
        Self {
            subsystem_vendor: function.ids.subsystem_vendor,
            subsystem_device: function.ids.subsystem_device,
            revision: function.ids.revision,
            upstream: Some(texts(&function.upstream)),
            link_speed: link.and_then(|l| l.current_speed.gigatransfers()).map(f64::from),
            link_width: link.map(|l| l.current_width).filter(|width| *width > 0),
            link_speed_max: link.and_then(|l| l.max_speed.gigatransfers()).map(f64::from),
            link_width_max: link.map(|l| l.max_width),
            bars: Some(function.bars.iter().map(BarRecord::from).collect()),
            reset_methods: Some(function.reset_methods.clone()),
            power_state: function.power_state.clone(),
            boot_vga: Some(function.boot_vga),
            serial: function.config.serial().map(|serial| serial.to_string()),
            capabilities: Some(function.config.capability_names()),
            total_vfs: sriov.0,
            enabled_vfs: sriov.1,
            vf_autoprobe: sriov.2,
            vf_offset: layout.map(|(offset, _)| offset),
            vf_stride: layout.map(|(_, stride)| stride),
            msix_vectors: function.config.msix_vectors(),
            vf_index: inventory.vf_index(function),
            vfio_device: function.vfio_device.clone(),
            ..Self::brief(inventory, function)
        }
    }

    /// What a list of functions needs: half the cost of [`full`](Self::full) on a large host.
    pub fn brief(inventory: &Inventory, function: &Function) -> Self {
        let sriov = match function.sriov {
            Sriov::None => None,
            Sriov::Physical { .. } => Some("physical"),
            Sriov::Virtual { .. } => Some("virtual"),
        };
        Self {
            address: function.address.to_string(),
            vendor: function.ids.vendor,
            device: function.ids.device,
            class: function.ids.class,
            name: inventory.describe(function),
            class_name: inventory.class_name(function).to_owned(),
            driver: function.driver.clone(),
            driver_override: function.driver_override.clone(),
            iommu_group: function.iommu_group,
            isolation: inventory.isolation(function).to_string(),
            numa_node: function.numa_node,
            sriov: sriov.map(str::to_owned),
            physical_function: function.physical().map(|a| a.to_string()),
            problems: Some(function.problems.clone()).filter(|p| !p.is_empty()),
            ..Self::default()
        }
    }
}

impl From<&Bar> for BarRecord {
    fn from(bar: &Bar) -> Self {
        Self {
            index: bar.index,
            size: bar.size,
            kind: if bar.io { "io" } else { "memory" }.to_owned(),
            prefetchable: bar.prefetchable,
        }
    }
}

impl GroupRecord {
    /// What an inventory knows of a group; leases are for the daemon to add.
    pub fn new(inventory: &Inventory, group: &Group) -> Self {
        let host_owned: Vec<String> =
            inventory.host_owned(group).map(|f| f.address.to_string()).collect();
        Self {
            number: group.number,
            members: texts(&group.members),
            viable: host_owned.is_empty(),
            host_owned,
            isolation: inventory.platform.isolation.to_string(),
            sharing: inventory.sharing(group).to_string(),
            leases: Vec::new(),
        }
    }
}

impl PlanRecord {
    /// The outcome of planning; its groups are for the daemon to add.
    pub fn new(planned: &Result<Plan, Refusal>) -> Self {
        match planned {
            Ok(plan) => Self {
                possible: true,
                devices: plan.devices.keys().map(ToString::to_string).collect(),
                mediated: plan.mediated.keys().map(ToString::to_string).collect(),
                steps: plan.steps.iter().map(|step| StepRecord::new(step, None)).collect(),
                warnings: plan.warnings.clone(),
                ..Self::default()
            },
            Err(refusal) => Self {
                reasons: refusal.reasons().iter().map(ReasonRecord::from).collect(),
                ..Self::default()
            },
        }
    }
}

impl StepRecord {
    /// A step and, once it was carried out, its outcome.
    pub fn new(step: &Step, outcome: Option<Outcome>) -> Self {
        let outcome = outcome.map(|outcome| match outcome {
            Outcome::Done => "done",
            Outcome::AlreadySo => "already-so",
        });
        Self {
            step: step.name().to_owned(),
            device: step
                .device()
                .map(|device| device.to_string())
                .or_else(|| step.mediated().map(|uuid| uuid.to_string())),
            text: step.to_string(),
            outcome: outcome.map(str::to_owned),
            undo: step.inverse().map(|step| step.to_string()),
        }
    }
}

impl From<&Reason> for ReasonRecord {
    fn from(reason: &Reason) -> Self {
        Self {
            kind: reason.kind.name().to_owned(),
            code: reason.code.to_owned(),
            object: reason.object.clone(),
            text: reason.text.clone(),
            remedy: reason.remedy.clone(),
        }
    }
}

fn texts<T: ToString>(items: &[T]) -> Vec<String> {
    items.iter().map(ToString::to_string).collect()
}
