//! Trying once more what did not leave a device well: its lease's way back, or the cleaning of a
//! device that is nobody's any more. Only what went well ends a quarantine.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use libvfio::address::PciAddress;
use libvfio::client::Failure;
use libvfio::error::ErrorKind;
use libvfio::plan::{self, Care, Plan, Scrubbing};
use libvfio::step::Step;
use tracing::info;

use super::leasing::{Late, done, new_lease};
use super::{Broker, Data, Reply};
use crate::history::Event;
use crate::lease::{Lease, State};

impl Broker {
    /// Cleans the device that `name` means once more, on behalf of user `by`, and trusts it again if
    /// that goes well. Answers its address.
    pub fn heal(self: &Arc<Self>, name: &str, by: u32) -> Result<PciAddress, Failure> {
        let device = self.resolve(name)?;
        self.refresh([device]);
        let left = unfinished(&mut self.data(), device)?;
        let devices: Vec<PciAddress> = if let Some(lease) = left {
            let devices = lease.devices.keys().copied().collect();
            self.apart(move |broker, reply| broker.give_back(lease, &|_| {}, reply))?;
            devices
        } else {
            let task = reset_of(&mut self.data(), device, by)?;
            let devices = task.devices.keys().copied().collect();
            self.apart(move |broker, reply| broker.reset_again(task, reply))?;
            devices
        };
        for device in devices {
            self.clear_quarantine(&device.to_string(), by)?;
        }
        Ok(device)
    }

    /// Walks the cleaning of devices that are on VFIO without a lease.
    fn reset_again(&self, mut lease: Lease, reply: &Reply<()>) {
        let late = Late { broker: self, tell: &|failure| reply.give(Err(failure)) };
        let walk = self.walker.walk(&lease.id, &late);
        if let Some(who) = self.held(&walk, &mut lease) {
            let failure = Failure::new(ErrorKind::Busy, format!("{who} open; close it first"));
            self.close(&mut lease, &[], None);
            return reply.give(Err(failure));
        }
        let walked = walk.forward(&mut lease);
        if let Err(stopped) = walked {
            let failure = Failure::new(stopped.kind(), stopped.to_string());
            self.distrust_unclean(&lease, std::slice::from_ref(&stopped));
            self.note(&lease, Event::Failed, &stopped.to_string());
            self.close(&mut lease, &[], None);
            return reply.give(Err(failure));
        }
        info!(devices = ?lease.devices.keys(), user = lease.owner, "healed: {}", done(&lease.forward));
        self.close(&mut lease, &[], None);
        reply.give(Ok(()));
    }
}

/// A failed lease whose way back ended at this device, set on it again.
fn unfinished(data: &mut Data, device: PciAddress) -> Result<Option<Lease>, Failure> {
    let stopped = |lease: &Lease| {
        lease.state == State::Failed
            && lease.backward.iter().any(|r| r.outcome.is_none() && r.step.device() == Some(device))
    };
    let Some(id) = data.leases.values().find(|l| stopped(l)).map(|l| l.id.clone()) else {
        return Ok(None);
    };
    let devices: Vec<PciAddress> = data.leases[&id].devices.keys().copied().collect();
    for device in devices {
        refuse_held(data, device)?;
    }
    let lease = data.leases.get_mut(&id).map(|lease| {
        lease.state = State::Releasing;
        (lease.reason, lease.failure) = (None, None);
        lease.clone()
    });
    Ok(lease)
}

/// A task that cleans a device that is on VFIO without a lease, with what has to be reset with it. Its
/// lease's record is gone, and with that whether its memory was cleared: so it is.
fn reset_of(data: &mut Data, device: PciAddress, by: u32) -> Result<Lease, Failure> {
    refuse_held(data, device)?;
    let inventory = data.inventory.clone();
    let refused = |kind, why: &str| Err(Failure::new(kind, format!("{device} {why}")));
    let Some(function) = inventory.get(device).filter(|f| f.on_vfio()) else {
        return refused(
            ErrorKind::Busy,
            "is not on VFIO, so the host has it; attach it, or clear its quarantine if it is well",
        );
    };
    let beside = |f: &&Arc<libvfio::pci::Function>| {
        f.address.same_slot(device) && f.on_vfio() && data.holder(f.address).is_none()
    };
    let all: BTreeSet<PciAddress> =
        inventory.functions().filter(beside).map(|f| f.address).chain([function.address]).collect();
    let mut steps: Vec<_> = plan::resets(&inventory, &all)
        .into_iter()
        .filter(|step| step.device() == Some(device) || step.others().contains(&device))
        .collect();
    if steps.is_empty() {
        return refused(ErrorKind::Unsupported, "has no way to be reset; power it off and on");
    }
    let touched = steps.iter().flat_map(|s| s.device().into_iter().chain(s.others().to_vec()));
    let touched: BTreeSet<PciAddress> = touched.collect();
    steps.extend(clearings(data, &touched)?);
    let bindings = touched.into_iter().filter_map(|a| Some((a, inventory.get(a)?.binding())));
    let plan = Plan { devices: bindings.collect(), steps, ..Plan::default() };
    let task = format!("a reset of {device}");
    let lease = Lease { owner: by, task: Some(task), ..new_lease(data, &plan) };
    data.leases.insert(lease.id.clone(), lease.clone());
    Ok(lease)
}

/// What clears the memory of functions as the policy has it now, or as is known without one.
fn clearings(data: &Data, functions: &BTreeSet<PciAddress>) -> Result<Vec<Step>, Failure> {
    let rules = data.rules(&BTreeSet::new());
    let mut care = BTreeMap::new();
    for function in functions.iter().filter_map(|address| data.inventory.get(*address)) {
        let rule = rules.get(&function.address).map(|rule| rule.scrub.clone()).unwrap_or_default();
        let Ok(Some(scrubber)) = rule.for_function(function) else { continue };
        if let Some(driver) = scrubber.driver() {
            let address = function.address;
            let why = format!(
                "{address} is to be cleared on host driver {driver}, which only the end of a lease \
                 does, and that lease is no longer on record; clear it by hand, then its quarantine \
                 ('vfioctl quarantine clear {address}')"
            );
            return Err(Failure::new(ErrorKind::Unsupported, why));
        }
        let scrub = Scrubbing::With(scrubber);
        care.insert(function.address, Care { scrub, ..Care::default() });
    }
    Ok(plan::scrubs(&data.inventory, &care, |_| None).before)
}

fn refuse_held(data: &Data, device: PciAddress) -> Result<(), Failure> {
    let Some(lease) = data.holder(device) else { return Ok(()) };
    let why = format!("{device} is held by lease {} ({})", lease.id, lease.state.name());
    Err(Failure::new(ErrorKind::AlreadyLeased, format!("{why}; release it first")))
}
