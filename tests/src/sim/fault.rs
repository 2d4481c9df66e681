//! Faults armed at operations of the simulated kernel, and when they strike. Plain types; touches
//! nothing.

use libvfio::address::PciAddress;
use nix::errno::Errno;

/// What can be made to go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// A write to a driver's `bind`.
    Bind,
    /// A write to a driver's `unbind`.
    Unbind,
    /// A write to `drivers_probe`.
    Probe,
    /// A write to `driver_override`.
    Override,
    /// A write to `sriov_numvfs`.
    NumVfs,
    /// A write to `sriov_drivers_autoprobe`.
    Autoprobe,
    /// A write to `reset`.
    Reset,
    /// A write to `remove`.
    Remove,
    /// A write to nvidia's `unbindLock`.
    UnbindLock,
    /// A read of any attribute of a function.
    Read,
}

/// How it goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// It fails with this error, and nothing changes.
    Errno(Errno),
    /// It reports success, and nothing changes.
    SucceedWithoutEffect,
    /// It reports success, and afterwards this driver has the function.
    BindOther(String),
    /// It never returns, uninterruptibly.
    BlockForever,
    /// The function is gone, and the operation fails with `ENODEV`.
    Vanish,
}

/// A fault. It strikes once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The operation.
    pub on: Operation,
    /// The function, or any.
    pub device: Option<PciAddress>,
    /// At which time the operation is done to the function, counted from 1 since it was armed.
    pub nth: u32,
    /// How it goes wrong.
    pub effect: Effect,
}

/// The faults that have not struck yet.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<Fault>);

impl Faults {
    pub(super) fn arm(&mut self, fault: Fault) {
        self.0.push(fault);
    }

    /// Counts an operation. The effect of the first fault whose time has come, which is spent.
    pub(super) fn strike(&mut self, on: Operation, device: PciAddress) -> Option<Effect> {
        let mut due = None;
        for (place, fault) in self.0.iter_mut().enumerate() {
            if fault.on == on && fault.device.is_none_or(|address| address == device) {
                fault.nth = fault.nth.saturating_sub(1);
                due = due.or((fault.nth == 0).then_some(place));
            }
        }
        due.map(|place| self.0.remove(place).effect)
    }
}
