//! One change of the kernel, done, read back and undone: the words for it here, for what stops it in
//! `failure.rs`, the doing in `execute.rs` alone.

mod execute;
mod failure;
mod health;

pub use failure::{Cause, StepError};

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::address::PciAddress;
use crate::assigned::Assigned;
use crate::backend::Maker;
use crate::host::HostRoot;
use crate::mediated::{TypeName, Uuid};
use crate::scrub::Scrubber;
use crate::shape::{Setting, Value};

/// One change. What a dry run prints, what is executed, what the ledger records and, inverted,
/// what undo and release run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub enum Step {
    /// Load the module that brings a driver, so that its directory appears on the PCI bus.
    LoadModule {
        /// The module, as `modprobe` takes it.
        module: String,
    },
    /// Take NVIDIA's unbind lock, or see that nobody uses the card where its driver has none:
    /// unbinding a card in use never returns.
    UnbindLock {
        /// The function.
        device: PciAddress,
    },
    /// Take the function from its driver.
    Unbind {
        /// The function.
        device: PciAddress,
        /// The driver that has it.
        driver: String,
    },
    /// Say which driver alone may have the function.
    SetOverride {
        /// The function.
        device: PciAddress,
        /// The override there is.
        from: Option<String>,
        /// The override there shall be.
        to: Option<String>,
    },
    /// Give the function to a driver.
    Bind {
        /// The function.
        device: PciAddress,
        /// The driver.
        driver: String,
    },
    /// Reset a function that is on VFIO, by the first of its methods that works, or by its bus; then
    /// see that it is the one it was, and as well as it was.
    Reset {
        /// The function.
        device: PciAddress,
        /// The others on its bus, where only all of them can be reset together. Empty: it alone.
        #[serde(default)]
        with: Vec<PciAddress>,
    },
    /// Clear the memory of a function that is where its scrubber works, and see that it is clear.
    Scrub {
        /// The function.
        device: PciAddress,
        /// What does it.
        #[serde(flatten)]
        with: Scrubber,
    },
    /// Say whether host drivers are offered a physical function's new virtual functions.
    SetAutoprobe {
        /// The physical function.
        device: PciAddress,
        /// Whether they are.
        from: bool,
        /// Whether they shall be.
        to: bool,
    },
    /// Make or remove all virtual functions of a physical one. The kernel knows no other change.
    SetVirtualFunctions {
        /// The physical function.
        device: PciAddress,
        /// How many there are.
        from: u16,
        /// How many there shall be.
        to: u16,
        /// Who makes them.
        #[serde(default)]
        by: Maker,
    },
    /// Change a setting of a virtual function.
    Shape {
        /// The virtual function.
        device: PciAddress,
        /// The setting.
        setting: Setting,
        /// What it is.
        from: Value,
        /// What it shall be.
        to: Value,
    },
    /// Let a user open the nodes of what is on VFIO, or no longer.
    NodeAccess {
        /// The function or mediated device.
        device: Assigned,
        /// The user's id.
        user: u32,
        /// Whether it shall be so.
        allowed: bool,
    },
    /// Let a process lock so much memory, which VFIO does with a guest's. Ends with the process.
    LockMemory {
        /// The process's id.
        process: u32,
        /// How much, in bytes.
        bytes: u64,
    },
    /// Have a driver make a mediated device.
    CreateMediated {
        /// Of what, and of which kind.
        #[serde(flatten)]
        of: TypeName,
        /// What it is to be called.
        uuid: Uuid,
    },
    /// Have a driver take a mediated device away.
    RemoveMediated {
        /// Of what it is, and of which kind.
        #[serde(flatten)]
        of: TypeName,
        /// What it is called.
        uuid: Uuid,
    },
    /// Change a setting that the PCI core has for the function.
    Tune {
        /// The function.
        device: PciAddress,
        /// Which.
        setting: Tunable,
        /// What it is.
        from: String,
        /// What it shall be.
        to: String,
    },
    /// Ask VFIO whether the whole group may be given to a guest. Changes nothing.
    CheckViable {
        /// The group's number.
        group: u32,
    },
}

/// A setting of the PCI core (`Documentation/ABI/testing/sysfs-bus-pci`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tunable {
    /// Reset methods to use, in this order.
    ResetMethod,
    /// Whether it may lose power when idle: `1` or `0`.
    D3cold,
}

impl Tunable {
    /// The attribute in the function's directory.
    pub fn attribute(self) -> &'static str {
        match self {
            Self::ResetMethod => "reset_method",
            Self::D3cold => "d3cold_allowed",
        }
    }
}

/// What executing a step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The kernel was changed (or, for a check, asked).
    Done,
    /// It was so already.
    AlreadySo,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LoadModule { module } => write!(f, "load module {module}"),
            Self::UnbindLock { device } => write!(f, "take the unbind lock of {device}"),
            Self::Unbind { device, driver } => write!(f, "unbind {device} from {driver}"),
            Self::SetOverride { device, from, to: Some(to) } => {
                write!(
                    f,
                    "set driver_override of {device} to {to} (was {})",
                    or_none(from.as_ref())
                )
            }
            Self::SetOverride { device, from, to: None } => {
                write!(f, "clear driver_override of {device} (was {})", or_none(from.as_ref()))
            }
            Self::Bind { device, driver } => write!(f, "bind {device} to {driver}"),
            Self::Reset { device, with } if with.is_empty() => write!(f, "reset {device}"),
            Self::Reset { device, with } => {
                write!(f, "reset {device}")?;
                with.iter().try_for_each(|other| write!(f, ", {other}"))?;
                write!(f, " by their bus")
            }
            Self::Scrub { device, with } => write!(f, "clear the memory of {device} ({with})"),
            Self::SetAutoprobe { device, to: true, .. } => {
                write!(f, "offer new virtual functions of {device} to host drivers")
            }
            Self::SetAutoprobe { device, to: false, .. } => {
                write!(f, "keep host drivers from new virtual functions of {device}")
            }
            Self::SetVirtualFunctions { device, from, to, by } => {
                let by = match by {
                    Maker::Kernel => "",
                    Maker::SriovManage => " with sriov-manage",
                };
                match to {
                    0 => write!(f, "remove all virtual functions of {device}{by} (were {from})"),
                    _ => write!(f, "make {to} virtual functions of {device}{by} (were {from})"),
                }
            }
            Self::Shape { device, setting, from, to } => {
                let unit = setting.unit().map(|unit| format!(" {unit}")).unwrap_or_default();
                write!(f, "give {device} {} {to}{unit} (was {from})", setting.label())
            }
            Self::NodeAccess { device, user, allowed: true } => {
                write!(f, "let user {user} open the VFIO nodes of {device}")
            }
            Self::NodeAccess { device, user, allowed: false } => {
                write!(f, "let user {user} no longer open the VFIO nodes of {device}")
            }
            Self::LockMemory { process, bytes } => {
                write!(f, "let process {process} lock {} MiB of memory", bytes.div_ceil(1 << 20))
            }
            Self::CreateMediated { of, uuid } => {
                write!(f, "create mediated device {uuid} of {of}")
            }
            Self::RemoveMediated { of, uuid } => {
                write!(f, "remove mediated device {uuid} of {of}")
            }
            Self::Tune { device, setting, from, to } => {
                write!(f, "set {} of {device} to '{to}' (was '{from}')", setting.attribute())
            }
            Self::CheckViable { group } => write!(f, "check that VFIO finds group {group} viable"),
        }
    }
}

fn or_none(name: Option<&String>) -> &str {
    name.map_or("none", String::as_str)
}

impl Step {
    /// The words of all kinds of steps.
    pub const KINDS: [&str; 16] = [
        "load-module",
        "unbind-lock",
        "unbind",
        "set-override",
        "bind",
        "reset",
        "scrub",
        "set-autoprobe",
        "set-virtual-functions",
        "shape",
        "node-access",
        "lock-memory",
        "create-mediated",
        "remove-mediated",
        "tune",
        "check-viable",
    ];

    /// The word for this kind of step, as it is serialised.
    pub fn name(&self) -> &'static str {
        match self {
            Self::LoadModule { .. } => "load-module",
            Self::UnbindLock { .. } => "unbind-lock",
            Self::Unbind { .. } => "unbind",
            Self::SetOverride { .. } => "set-override",
            Self::Bind { .. } => "bind",
            Self::Reset { .. } => "reset",
            Self::Scrub { .. } => "scrub",
            Self::SetAutoprobe { .. } => "set-autoprobe",
            Self::SetVirtualFunctions { .. } => "set-virtual-functions",
            Self::Shape { .. } => "shape",
            Self::NodeAccess { .. } => "node-access",
            Self::LockMemory { .. } => "lock-memory",
            Self::CreateMediated { .. } => "create-mediated",
            Self::RemoveMediated { .. } => "remove-mediated",
            Self::Tune { .. } => "tune",
            Self::CheckViable { .. } => "check-viable",
        }
    }

    /// The function it changes, if it changes one.
    pub fn device(&self) -> Option<PciAddress> {
        match self {
            Self::UnbindLock { device }
            | Self::Unbind { device, .. }
            | Self::SetOverride { device, .. }
            | Self::Bind { device, .. }
            | Self::SetAutoprobe { device, .. }
            | Self::SetVirtualFunctions { device, .. }
            | Self::Shape { device, .. }
            | Self::Tune { device, .. }
            | Self::Scrub { device, .. }
            | Self::Reset { device, .. } => Some(*device),
            Self::NodeAccess { device, .. } => device.function(),
            Self::LoadModule { .. }
            | Self::LockMemory { .. }
            | Self::CreateMediated { .. }
            | Self::RemoveMediated { .. }
            | Self::CheckViable { .. } => None,
        }
    }

    /// The mediated device it changes, makes or takes away, if it does.
    pub fn mediated(&self) -> Option<Uuid> {
        match self {
            Self::CreateMediated { uuid, .. } | Self::RemoveMediated { uuid, .. } => Some(*uuid),
            Self::NodeAccess { device, .. } => device.mediated(),
            _ => None,
        }
    }

    /// Functions that it changes beside that one.
    pub fn others(&self) -> &[PciAddress] {
        match self {
            Self::Reset { with, .. } => with,
            _ => &[],
        }
    }

    /// Whether it is there so that nothing is left of a tenant.
    pub fn is_cleaning(&self) -> bool {
        matches!(self, Self::Reset { .. } | Self::Scrub { .. })
    }

    /// Whether it changes what configuration space says for as long as the function is there.
    pub fn changes_configuration(&self) -> bool {
        matches!(self, Self::Shape { setting: Setting::Msix, .. })
    }

    /// Whether it is about which driver a function is on.
    pub fn is_binding(&self) -> bool {
        matches!(
            self,
            Self::UnbindLock { .. }
                | Self::Unbind { .. }
                | Self::SetOverride { .. }
                | Self::Bind { .. }
        )
    }

    /// The step that takes this one back; `None` where nothing needs to be. A loaded module stays,
    /// the unbind lock ends with the binding and a limit with its process, what was reset or scrubbed
    /// cannot be undone, a check changed nothing.
    pub fn inverse(&self) -> Option<Self> {
        match self {
            Self::Unbind { device, driver } => {
                Some(Self::Bind { device: *device, driver: driver.clone() })
            }
            Self::Bind { device, driver } => {
                Some(Self::Unbind { device: *device, driver: driver.clone() })
            }
            Self::SetOverride { device, from, to } => {
                Some(Self::SetOverride { device: *device, from: to.clone(), to: from.clone() })
            }
            Self::SetAutoprobe { device, from, to } => {
                Some(Self::SetAutoprobe { device: *device, from: *to, to: *from })
            }
            Self::SetVirtualFunctions { device, from, to, by } => {
                Some(Self::SetVirtualFunctions { device: *device, from: *to, to: *from, by: *by })
            }
            Self::Shape { device, setting, from, to } => {
                let (device, setting) = (*device, *setting);
                Some(Self::Shape { device, setting, from: to.clone(), to: from.clone() })
            }
            Self::NodeAccess { device, user, allowed } => {
                Some(Self::NodeAccess { device: *device, user: *user, allowed: !allowed })
            }
            Self::CreateMediated { of, uuid } => {
                Some(Self::RemoveMediated { of: of.clone(), uuid: *uuid })
            }
            Self::RemoveMediated { of, uuid } => {
                Some(Self::CreateMediated { of: of.clone(), uuid: *uuid })
            }
            Self::Tune { device, setting, from, to } => Some(Self::Tune {
                device: *device,
                setting: *setting,
                from: to.clone(),
                to: from.clone(),
            }),
            Self::LoadModule { .. }
            | Self::UnbindLock { .. }
            | Self::Reset { .. }
            | Self::Scrub { .. }
            | Self::LockMemory { .. }
            | Self::CheckViable { .. } => None,
        }
    }

    /// Carries the step out on `host` and reads back that it is so.
    pub fn execute(&self, host: &HostRoot) -> Result<Outcome, StepError> {
        execute::execute(self, host).map_err(|cause| StepError::new(self.clone(), cause))
    }
}
