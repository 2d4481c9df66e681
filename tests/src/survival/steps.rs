//! Where in the kernel each step of a lease strikes. Plain; touches nothing.

use std::collections::BTreeMap;
use std::fmt;

use libvfio::address::PciAddress;
use libvfio::backend::Maker;
use libvfio::step::Step;

use crate::sim::{Effect, Fault, Operation};

/// A step, and the operation of the kernel that carries it out.
#[derive(Debug, Clone)]
pub struct Place {
    /// The step.
    pub step: Step,
    /// The operation.
    pub on: Operation,
    /// The function it is on, or that is to suffer for it, if there is one.
    pub device: Option<PciAddress>,
    /// At which time, counted from 1.
    pub nth: u32,
}

impl Place {
    /// Something that goes wrong there.
    pub fn fault(&self, effect: Effect) -> Fault {
        Fault { on: self.on, device: self.device, nth: self.nth, effect }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.step)
    }
}

/// The steps from one number of virtual functions of a physical one to another, when the daemon made
/// those there are.
pub fn numbering(device: PciAddress, from: u16, to: u16) -> Vec<Step> {
    let by = Maker::Kernel;
    let number = |from, to| Step::SetVirtualFunctions { device, from, to, by };
    let autoprobe = |to: bool| Step::SetAutoprobe { device, from: !to, to };
    match (from, to) {
        (0, _) => vec![autoprobe(false), number(0, to)],
        (_, 0) => vec![number(from, 0), autoprobe(true)],
        _ => vec![number(from, 0), number(0, to)],
    }
}

/// The places of steps that are carried out in this order. Those of no function are the concern of
/// `first`, the lowest of the lease, if it has any.
pub fn places<'a>(
    steps: impl IntoIterator<Item = &'a Step>,
    first: Option<PciAddress>,
) -> Vec<Place> {
    let mut times: BTreeMap<(&str, Option<PciAddress>), u32> = BTreeMap::new();
    let place = |step: &Step| {
        let on = match step {
            Step::LoadModule { .. } => Operation::LoadModule,
            Step::UnbindLock { .. } => Operation::UnbindLock,
            Step::Unbind { .. } => Operation::Unbind,
            Step::SetOverride { .. } => Operation::Override,
            Step::Bind { .. } => Operation::Bind,
            Step::Reset { .. } => Operation::Reset,
            Step::Scrub { .. } => Operation::Scrub,
            Step::SetAutoprobe { .. } => Operation::Autoprobe,
            Step::SetVirtualFunctions { .. } => Operation::NumVfs,
            Step::Shape { .. } => Operation::Setting,
            Step::NodeAccess { .. } => Operation::Access,
            Step::CreateMediated { .. } => Operation::CreateMediated,
            Step::RemoveMediated { .. } => Operation::RemoveMediated,
            // Described hosts have no process whose limits count, and no fault strikes at settings
            // of the PCI core.
            Step::LockMemory { .. } | Step::Tune { .. } => return None,
            Step::CheckViable { .. } => Operation::Open,
        };
        let device = step.device().or(first);
        let nth = times.entry((step.name(), device)).or_default();
        *nth += 1;
        Some(Place { step: step.clone(), on, device, nth: *nth })
    };
    steps.into_iter().filter_map(place).collect()
}
