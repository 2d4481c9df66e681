//! Virtual functions: how many a physical function has, and which of them are free. A change of
//! their number is walked and recorded like a lease, as a task of the daemon's own, so that it
//! survives what leases survive.

use std::collections::BTreeSet;
use std::sync::{Arc, MutexGuard, PoisonError};

use libvfio::address::PciAddress;
use libvfio::backend::{self, Maker};
use libvfio::client::{Failure, PlanRecord};
use libvfio::error::ErrorKind;
use libvfio::inventory::Inventory;
use libvfio::modalias;
use libvfio::pci::{self, Sriov};
use libvfio::plan::{self, Circumstances, Plan, Reason, Refusal, Request};
use libvfio::step::Step;
use tracing::{info, warn};

use super::leasing::{Late, done, new_lease};
use super::{Around, Broker, Data, Reply, circumstances};
use crate::history::Event;
use crate::lease::{Lease, State};
use crate::transition::Walk;

impl Broker {
    /// Gives the physical function at `device` `count` virtual functions, which no host driver
    /// gets. Answers their addresses, by index.
    pub fn set_virtual_functions(
        self: &Arc<Self>,
        device: PciAddress,
        count: u16,
        user: u32,
    ) -> Result<Vec<PciAddress>, Failure> {
        let found = self.surroundings(device)?;
        let task = {
            let mut data = self.await_bus(device)?;
            let plan = planned(&data, device, count, found)?;
            if plan.steps.is_empty() {
                None
            } else {
                let before = data.inventory.get(device).map_or(0, |f| f.enabled_vfs());
                let task = format!("from {before} to {count} virtual functions of {device}");
                let lease = Lease { owner: user, task: Some(task), ..new_lease(&data, &plan) };
                data.leases.insert(lease.id.clone(), lease.clone());
                Some(lease)
            }
        };
        if let Some(lease) = task {
            self.apart(move |broker, reply| broker.renumber(lease, device, reply))?;
        }
        Ok(virtual_functions(&self.inventory(), device))
    }

    /// Waits until nobody changes virtual functions on the buses of this physical one's. The kernel
    /// makes a bus when the first function on it appears, and two that do so at once may disagree.
    pub(super) fn await_bus(&self, device: PciAddress) -> Result<MutexGuard<'_, Data>, Failure> {
        let mut data = self.data();
        while data.bus_is_changing(device)? {
            data = self.ended.wait(data).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(data)
    }

    /// What that would do, or why it would not be done.
    pub fn plan_virtual_functions(
        &self,
        device: PciAddress,
        count: u16,
    ) -> Result<PlanRecord, Failure> {
        let found = self.surroundings(device)?;
        Ok(PlanRecord::new(&planned(&self.data(), device, count, found)))
    }

    /// Looks at a physical function and its virtual ones, at what the host does with these, and at
    /// whom it takes to make others.
    fn surroundings(&self, device: PciAddress) -> Result<Surroundings, Failure> {
        let virtuals = virtual_functions(&self.inventory(), device);
        self.refresh(virtuals.iter().copied().chain([device]));
        let inventory = self.inventory();
        let on_host_driver = |address: &PciAddress| {
            inventory.get(*address).is_some_and(|f| f.driver.is_some() && !f.on_vfio())
        };
        let uses = self.uses(&virtuals.into_iter().filter(on_host_driver).collect())?;
        let parts = self.look_at_mediated(&Request::default())?;
        let around = Around { uses, parts, ..Around::default() };
        let driverless = inventory.get(device).filter(|f| f.driver.is_none());
        let module = match driverless.and_then(|f| f.modalias.as_deref()) {
            Some(modalias) => {
                let aliases = self.host().modules("modules.alias")?.unwrap_or_default();
                modalias::host_module(&aliases, modalias).map(str::to_owned)
            }
            None => None,
        };
        Ok(Surroundings { around, maker: backend::maker(self.host(), device), module })
    }

    /// Walks a change to its end, or all the way back.
    fn renumber(&self, mut lease: Lease, device: PciAddress, reply: &Reply<()>) {
        let late = Late { broker: self, tell: &|failure| reply.give(Err(failure)) };
        let walk = self.walker.walk(&lease.id, &late);
        let walked = walk.forward(&mut lease);
        self.look_at_virtual(device, &lease);
        if let Err(stopped) = walked {
            return reply.give(Err(self.give_up(&walk, lease, device, &stopped)));
        }
        self.remember_autoprobe(&lease);
        let task = lease.task.clone().unwrap_or_default();
        info!(%device, user = lease.owner, task, "virtual functions changed: {}", done(&lease.forward));
        self.note(&lease, Event::VirtualFunctions, &task);
        self.close(&mut lease, &[], None);
        reply.give(Ok(()));
    }

    /// What follows from a change that was undone after a restart.
    pub(super) fn renumbered_back(&self, lease: &Lease) {
        let physical = lease.forward.iter().filter_map(|recorded| match recorded.step {
            Step::SetVirtualFunctions { device, .. } => Some(device),
            _ => None,
        });
        let physical: BTreeSet<PciAddress> = physical.collect();
        for device in &physical {
            self.look_at_virtual(*device, lease);
        }
        if !physical.is_empty() {
            self.remember_autoprobe(lease);
        }
    }

    /// Remembers whose autoprobe was turned off, to turn it on again with the last one.
    pub(super) fn remember_autoprobe(&self, lease: &Lease) {
        let mut data = self.data();
        let steps = lease.forward.iter().chain(&lease.backward);
        for recorded in steps.filter(|recorded| recorded.outcome.is_some()) {
            match recorded.step {
                Step::SetAutoprobe { device, to: false, .. } => data.autoprobe_off.insert(device),
                Step::SetAutoprobe { device, to: true, .. } => data.autoprobe_off.remove(&device),
                _ => continue,
            };
        }
        let functions = data.autoprobe_off.clone();
        drop(data);
        if let Err(error) = self.walker.ledger.write_autoprobe_off(&functions) {
            warn!(%error, "whose autoprobe is off will be forgotten with this daemon");
        }
    }

    fn give_up(
        &self,
        walk: &Walk<'_>,
        lease: Lease,
        device: PciAddress,
        stopped: &crate::transition::Stopped,
    ) -> Failure {
        let before = lease.clone();
        let failure = self.abandon(walk, lease, stopped);
        self.look_at_virtual(device, &before);
        failure
    }

    /// Looks at the virtual functions there were and there are.
    pub(super) fn look_at_virtual(&self, device: PciAddress, lease: &Lease) {
        let now = pci::virtual_functions(self.host(), device);
        let all: BTreeSet<PciAddress> = lease.devices.keys().copied().chain(now).collect();
        self.refresh(all);
    }

    /// The first `count` virtual functions of `device` that nothing is known to keep from a lease,
    /// but for those `barred`.
    pub(super) fn free_virtual_functions(
        &self,
        device: PciAddress,
        count: u32,
        tenant: Option<&str>,
        barred: &BTreeSet<PciAddress>,
    ) -> Result<Vec<PciAddress>, Failure> {
        let data = self.data();
        let quarantined = data.quarantined(tenant);
        let pools = data.pools();
        let ours = |address: &PciAddress| pools.get(address).is_some_and(|(_, on_vfio)| *on_vfio);
        let free = |address: &PciAddress| {
            !barred.contains(address)
                && !quarantined.contains_key(address)
                && data.holder(*address).is_none()
                && data.inventory.get(*address).is_some_and(|f| !f.on_vfio() || ours(address))
        };
        let all = virtual_functions(&data.inventory, device);
        let total = all.len();
        let wanted = usize::try_from(count).unwrap_or(usize::MAX);
        let free: Vec<PciAddress> = all.into_iter().filter(free).take(wanted).collect();
        if free.len() == wanted {
            return Ok(free);
        }
        let refusal = Refusal::new(vec![Reason {
            kind: ErrorKind::Busy,
            code: "too-few",
            object: device.to_string(),
            text: format!(
                "has {} virtual functions free of {total}, and {count} were asked for",
                free.len()
            ),
            remedy: format!(
                "ask for fewer, wait, or make more with 'vfioctl vf set {device} N' while none is \
                 leased"
            ),
        }]);
        Err(refusal.map_or_else(|| super::internal("no reason"), Failure::from))
    }
}

impl Data {
    /// Whether the virtual functions of a physical one on any bus of this one's are being changed.
    /// Wedged, if that may be so for ever.
    fn bus_is_changing(&self, device: PciAddress) -> Result<bool, Failure> {
        let buses = buses(&self.inventory, device);
        let shares = |other: &&PciAddress| {
            **other != device && buses.intersection(&buses_of(self, **other)).count() > 0
        };
        let changing = self.leases.values().filter_map(|lease| {
            let moves = lease.task.is_some() && lease.state.moves();
            Some((lease, *lease.devices.keys().find(shares).filter(|_| moves)?))
        });
        let mut some = false;
        for (lease, other) in changing {
            some = true;
            if lease.state == State::Wedged {
                let (id, reason) = (&lease.id, lease.reason.as_deref().unwrap_or_default());
                let why = format!(
                    "virtual functions of {device} share a bus with those of {other}, whose change \
                     does not come to an end (lease {id}): {reason}"
                );
                return Err(Failure::new(ErrorKind::Wedged, why));
            }
        }
        Ok(some)
    }
}

fn buses_of(data: &Data, device: PciAddress) -> BTreeSet<(u32, u8)> {
    buses(&data.inventory, device)
}

/// The buses that all virtual functions of a physical one would be on.
fn buses(inventory: &Inventory, device: PciAddress) -> BTreeSet<(u32, u8)> {
    let Some(Sriov::Physical { total, offset, stride, .. }) =
        inventory.get(device).map(|f| f.sriov.clone())
    else {
        return BTreeSet::new();
    };
    let first = u32::from(device.routing_id()) + u32::from(offset);
    let last = first + u32::from(stride) * u32::from(total.saturating_sub(1));
    let bus = |routing_id: u32| u8::try_from(routing_id >> 8).unwrap_or(u8::MAX);
    (bus(first)..=bus(last)).map(|bus| (device.domain(), bus)).collect()
}

fn virtual_functions(inventory: &Inventory, device: PciAddress) -> Vec<PciAddress> {
    inventory.virtual_functions(device).into_iter().map(|(_, address)| address).collect()
}

/// What was found around a physical function, beside the inventory.
struct Surroundings {
    around: Around,
    maker: Maker,
    /// That of its driver, if it is on none.
    module: Option<String>,
}

fn planned(
    data: &Data,
    device: PciAddress,
    count: u16,
    found: Surroundings,
) -> Result<Plan, Refusal> {
    let Surroundings { around, maker, module } = found;
    let circumstances = Circumstances {
        makers: [(device, maker)].into_iter().collect(),
        host_modules: module.map(|module| (device, module)).into_iter().collect(),
        ..circumstances(data, around)
    };
    plan::virtual_functions(&data.inventory, &circumstances, device, count)
}
