//! Faults armed at operations of the simulated kernel, when they strike, and how. Changes the
//! kernel's state, sleeps never.

use std::os::unix::fs::FileExt;

use libvfio::address::PciAddress;
use nix::errno::Errno;

use super::kernel::{Kernel, Stop};

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
    /// A write to `reset`, or a reset of a bus, which is of the function it is asked for.
    Reset,
    /// Clearing a function's memory.
    Scrub,
    /// A write to `remove`.
    Remove,
    /// A write to nvidia's `unbindLock`.
    UnbindLock,
    /// A read of any attribute of a function.
    Read,
    /// Opening a node below `dev`. A group's is that of its first function.
    Open,
    /// Saying who may open a node below `dev`; likewise.
    Access,
    /// A write to a file that gives a virtual function something.
    Setting,
    /// A write to the `create` of a type of mediated devices. Of the function that is the parent,
    /// or of none.
    CreateMediated,
    /// A write to the `remove` of a mediated device; likewise.
    RemoveMediated,
    /// Loading a module. It is of no function.
    LoadModule,
}

/// How it goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// It fails with this error, and nothing changes.
    Errno(Errno),
    /// It reports success, and nothing changes.
    SucceedWithoutEffect,
    /// It is done, and afterwards the function is like this.
    Spoil(Damage),
    /// It is done, and afterwards something is in so many bytes of its memory from this one on.
    Leave(u64, usize),
    /// It reports success, and afterwards this driver has the function.
    BindOther(String),
    /// It does not return, uninterruptibly, until [`let_go`](super::Sim::let_go) has it done.
    BlockForever,
    /// The function is gone, and the operation fails with `ENODEV`.
    Vanish,
    /// The process that does it is killed, and nothing changes.
    KillBefore,
    /// It is done, and the process that did it is killed before it hears of that.
    KillAfter,
}

/// What a function looks like that did not come back well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// Its configuration space reads all ones.
    Silent,
    /// It says that it is another kind of device.
    OtherIds,
    /// Its link has half the lanes.
    HalfLink,
    /// Its base addresses are lost.
    NoAddresses,
}

/// A fault. It strikes once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The operation.
    pub on: Operation,
    /// The function, or any. If the operation is of none, the one that the effect is on.
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

    /// Counts an operation. The first fault whose time has come, which is spent.
    pub(super) fn strike(&mut self, on: Operation, device: Option<PciAddress>) -> Option<Fault> {
        let mut due = None;
        for (place, fault) in self.0.iter_mut().enumerate() {
            let same = fault.device.is_none_or(|one| device.is_none_or(|other| one == other));
            if fault.on == on && same {
                fault.nth = fault.nth.saturating_sub(1);
                due = due.or((fault.nth == 0).then_some(place));
            }
        }
        due.map(|place| self.0.remove(place))
    }

    pub(super) fn disarm(&mut self) {
        self.0.clear();
    }

    pub(super) fn disarm_at(&mut self, device: PciAddress) {
        self.0.retain(|fault| fault.device != Some(device));
    }
}

impl Kernel {
    /// Does an operation as `act` does, or goes wrong as the fault says that strikes it. `nothing`
    /// is what a caller hears for whom nothing was done.
    pub(super) fn or_fault<T>(
        &mut self,
        on: Operation,
        device: Option<PciAddress>,
        nothing: T,
        act: impl FnOnce(&mut Self) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
        let Some(fault) = self.faults.strike(on, device) else { return act(self) };
        let device = device.or(fault.device);
        match fault.effect {
            Effect::Errno(errno) => Err(errno.into()),
            Effect::SucceedWithoutEffect => Ok(nothing),
            Effect::Spoil(damage) => {
                let done = act(self)?;
                if let Some(device) = device.and_then(|device| self.devices.get_mut(&device)) {
                    device.damage = Some(damage);
                }
                Ok(done)
            }
            Effect::Leave(at, bytes) => {
                let done = act(self)?;
                let device = device.and_then(|device| self.devices.get(&device));
                if let Some(memory) = device.and_then(|device| device.memory.as_ref()) {
                    memory.write_all_at(&vec![0xff; bytes], at).map_err(|_| Errno::EFAULT)?;
                }
                Ok(done)
            }
            Effect::BlockForever => Err(Stop::Forever),
            Effect::KillBefore => Err(Stop::Killed),
            Effect::KillAfter => act(self).and(Err(Stop::Killed)),
            Effect::Vanish => {
                device.map_or(Ok(()), |device| self.unplug(device))?;
                Err(Errno::ENODEV.into())
            }
            Effect::BindOther(driver) => {
                let binds = matches!(on, Operation::Bind | Operation::Probe | Operation::Open);
                let done = if binds { nothing } else { act(self)? };
                if let Some(device) = device {
                    self.drop_driver(device);
                    self.attach(device, &driver)?;
                }
                Ok(done)
            }
        }
    }
}
