//! Ending leases: on request, with their owners, after a failure, and after a restart. Devices that
//! somebody still holds open are waited for.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use libvfio::address::PciAddress;
use libvfio::client::Failure;
use libvfio::error::ErrorKind;
use libvfio::holders;
use libvfio::pci::aer::Errors;
use libvfio::pci::{Function, Identity, Ids};
use libvfio::step::{Cause, Step};
use nix::errno::Errno;
use tracing::{error, info, warn};

use super::leasing::{Late, all, done};
use super::{Broker, Change, Data, Reply, internal};
use crate::history::{Entry, Event};
use crate::lease::{Bound, Lease, State};
use crate::owner::Process;
use crate::request::ReleaseOptions;
use crate::transition::{Stopped, Walk};

/// How often one looks whether a device is still held open.
const LOOKING: Duration = Duration::from_millis(300);
/// How long a refusal that nobody explains is left before it is believed.
const MOMENT: Duration = Duration::from_millis(50);
/// How long whoever runs a virtual machine may need after its end to be done with its devices.
const TIDYING: Duration = Duration::from_secs(10);
/// How long a start waits for what the daemon before it has left.
const STARTING: Duration = Duration::from_secs(2);

impl Broker {
    /// Ends every lease that `target` [names](Self::named). Nothing to end is no failure, so a
    /// caller may repeat itself.
    pub fn release(
        self: &Arc<Self>,
        target: &str,
        options: &ReleaseOptions,
    ) -> Result<Vec<String>, Failure> {
        let ids = self.named(target);
        self.release_all(&ids, options)?;
        Ok(ids)
    }

    /// The leases that `target` names: by lease id, by virtual machine, or by a device of it.
    pub fn named(&self, target: &str) -> Vec<String> {
        let ids =
            self.leases_where(|lease| lease.id == target || lease.vm.as_deref() == Some(target));
        if !ids.is_empty() {
            return ids;
        }
        let address = self.resolve(target).ok().or_else(|| target.parse().ok());
        let uuid = target.parse().ok();
        self.leases_where(|lease| {
            address.is_some_and(|address| lease.devices.contains_key(&address))
                || uuid.is_some_and(|uuid| lease.mediated.contains_key(&uuid))
        })
    }

    /// Ends these leases, and no other.
    pub fn release_all(
        self: &Arc<Self>,
        ids: &[String],
        options: &ReleaseOptions,
    ) -> Result<(), Failure> {
        let end = |id: &String| {
            let (id, options) = (id.clone(), options.clone());
            self.apart(move |broker, reply| broker.end(&id, &options, reply))
        };
        // One that cannot end yet is no reason to keep the others.
        let ended: Vec<_> = ids.iter().map(end).collect();
        ended.into_iter().collect()
    }

    /// The same, where it is one on the thread that calls, which a step that does not return keeps
    /// after the answer.
    pub fn release_on_this_thread(
        self: &Arc<Self>,
        ids: &[String],
        options: &ReleaseOptions,
        reply: &Reply<()>,
    ) {
        match ids {
            [id] => self.end(id, options, reply),
            ids => reply.give(self.release_all(ids, options)),
        }
    }

    fn leases_where(&self, meant: impl Fn(&Lease) -> bool) -> Vec<String> {
        let data = self.data();
        data.leases.values().filter(|lease| meant(lease)).map(|lease| lease.id.clone()).collect()
    }

    fn end(self: &Arc<Self>, id: &str, options: &ReleaseOptions, reply: &Reply<()>) {
        let wait = options.wait;
        let state = self.data().leases.get(id).map(|lease| lease.state);
        match state {
            None => return reply.give(Ok(())),
            Some(State::Failed) => return reply.give(self.dismiss(id)),
            Some(State::Active | State::Preparing | State::Releasing | State::Wedged) => {}
        }
        let begun = begin(&mut self.data(), id, options.no_reset, None);
        let Some(lease) = begun else { return reply.give(self.await_end(id, wait)) };
        let early = |failure: Failure| {
            if !wait || failure.kind() == Some(ErrorKind::Wedged) {
                reply.give(Err(failure));
            }
        };
        self.give_back(lease, &early, reply);
        self.stop_waiting();
    }

    /// What can be said of a lease that is on its way, or its end if that is waited for.
    fn await_end(&self, id: &str, wait: bool) -> Result<(), Failure> {
        let mut data = self.data();
        data.asked.insert(id.to_owned(), Instant::now());
        self.ended.notify_all();
        loop {
            let Some(lease) = data.leases.get(id).filter(|lease| lease.state.moves()) else {
                return Ok(());
            };
            let reason = lease.reason.as_deref().unwrap_or("wait until that is done");
            let message = format!("lease {id} is {}: {reason}", lease.state.name());
            match lease.state {
                State::Wedged => return Err(Failure::new(ErrorKind::Wedged, message)),
                State::Releasing if wait => {}
                _ => return Err(Failure::new(ErrorKind::Busy, message)),
            }
            data = self.ended.wait(data).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends a lease that lost a device or was changed by others: what is left of it goes back to
    /// the host, and its record stays until it is dismissed.
    pub(super) fn fail(self: &Arc<Self>, id: &str, reason: &str) {
        // A release may have begun since the device was looked at; it has the lease then.
        let Some(lease) = begin(&mut self.data(), id, false, Some(reason)) else { return };
        warn!(lease = id, tenant = lease.tenant, reason, "a lease failed");
        self.give_back_apart(lease);
    }

    /// Ends a lease when a process does.
    pub(super) fn end_with(self: &Arc<Self>, id: String, process: Process) {
        let broker = self.clone();
        std::thread::spawn(move || {
            process.wait();
            broker.owner_gone(&id);
        });
    }

    /// Ends the leases that are bound to a connection of the bus, which has gone.
    pub fn connection_gone(self: &Arc<Self>, bound: &Bound) {
        for id in self.leases_where(|lease| lease.bound.as_ref() == Some(bound)) {
            self.owner_gone(&id);
        }
    }

    fn owner_gone(self: &Arc<Self>, id: &str) {
        let Some(lease) = begin(&mut self.data(), id, false, None) else { return };
        let owner = lease.bound.as_ref().map(ToString::to_string);
        info!(lease = id, tenant = lease.tenant, owner, "a lease ends with its owner");
        self.give_back_apart(lease);
    }

    fn give_back_apart(self: &Arc<Self>, lease: Lease) {
        let broker = self.clone();
        std::thread::spawn(move || {
            // Nobody asked.
            let reply = Reply::new(drop);
            broker.give_back(lease, &|_| {}, &reply);
            broker.stop_waiting();
        });
    }

    /// Walks a lease's way back once nobody holds its devices, and files it.
    pub(super) fn give_back(&self, mut lease: Lease, early: &dyn Fn(Failure), reply: &Reply<()>) {
        let late = Late { broker: self, tell: early };
        let walk = self.walker.walk(&lease.id, &late);
        // Whatever is opened from now on is seen to be held.
        self.await_openings(&lease.id);
        self.await_holders(&walk, &mut lease, early);
        let strangers = self.strangers(&lease);
        let errors = self.distrust_failing(&lease, &strangers);
        let failures = walk.backward(&mut lease, &strangers);
        self.distrust_unclean(&lease, &failures);
        self.keep_for_tenant(&lease);
        let message = (!failures.is_empty()).then(|| all(&failures));
        let why = lease.failure.as_deref().into_iter().chain(message.as_deref());
        let why: Vec<&str> = why.collect();
        let event = if why.is_empty() { Event::Released } else { Event::Failed };
        let why = why.into_iter().chain(errors.iter().map(String::as_str)).collect::<Vec<_>>();
        self.note(&lease, event, &why.join("; "));
        let kind = failures.first().map_or(ErrorKind::Internal, Stopped::kind);
        self.close(&mut lease, &failures, message.as_deref());
        reply.give(match message {
            None => Ok(()),
            Some(message) => Err(Failure::new(
                kind,
                format!("lease {} has ended, but not everything is as it was: {message}", lease.id),
            )),
        });
        info!(
            lease = lease.id,
            tenant = lease.tenant,
            devices = ?lease.devices.keys(),
            mediated = ?lease.mediated.keys(),
            "released: {}",
            done(&lease.backward)
        );
    }

    /// Waits for whoever holds a group of the lease open. Unbinding would block in the kernel until
    /// then, and the guest would lose its device.
    fn await_holders(&self, walk: &Walk<'_>, lease: &mut Lease, early: &dyn Fn(Failure)) {
        let mut last = None;
        loop {
            let looked = Instant::now();
            let Some(who) = self.held(walk, lease) else { break };
            last = Some(looked);
            let reason = format!("{who} open; it ends by itself when that is closed");
            if lease.reason.as_ref() != Some(&reason) {
                lease.reason = Some(reason.clone());
                self.file(lease);
                early(Failure::new(
                    ErrorKind::Busy,
                    format!("lease {} is releasing: {reason}; shut the guest down", lease.id),
                ));
            }
            std::thread::sleep(LOOKING);
        }
        if let Some(last) = last.filter(|_| lease.vm.is_some()) {
            let why = "its virtual machine has ended; it ends when whoever ran that asks for it, or in \
                       a moment";
            lease.reason = Some(why.to_owned());
            self.file(lease);
            self.await_machine(&lease.id, last);
        }
        lease.reason = None;
    }

    /// Waits for whoever runs the virtual machine of a lease, which has just ended, to ask for the
    /// lease's end, too. libvirt resets devices after its domain has let go of them, if a driver of
    /// the host has them by then: by writes of its own, which leave several functions that only
    /// their bus resets without addresses (`virPCIDeviceTrySecondaryBusReset`).
    fn await_machine(&self, id: &str, gone: Instant) {
        let unasked = |data: &mut Data| data.asked.get(id).is_none_or(|asked| *asked < gone);
        drop(
            self.ended
                .wait_timeout_while(self.data(), TIDYING, unasked)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Who holds which group of a lease, if somebody does.
    pub(super) fn held(&self, walk: &Walk<'_>, lease: &mut Lease) -> Option<String> {
        let inventory = self.inventory();
        let functions: Vec<&Arc<Function>> = lease
            .devices
            .keys()
            .filter_map(|address| inventory.get(*address))
            .filter(|f| f.on_vfio())
            .collect();
        let mediated = self.mediated_of(lease);
        let groups = functions.iter().map(|f| f.iommu_group);
        let groups: BTreeSet<u32> =
            groups.chain(mediated.iter().map(|(_, m)| m.iommu_group)).flatten().collect();
        let devices = functions.iter().map(|f| f.vfio_device.as_deref());
        let devices: Vec<&str> = devices
            .chain(mediated.iter().map(|(_, m)| m.vfio_device.as_deref()))
            .flatten()
            .collect();
        groups.into_iter().find_map(|group| self.group_held(walk, lease, group, &devices))
    }

    /// Who holds a group, if somebody does. A refusal that no process explains is asked for once
    /// more: whoever it was has mostly closed it by then.
    fn group_held(
        &self,
        walk: &Walk<'_>,
        lease: &mut Lease,
        group: u32,
        devices: &[&str],
    ) -> Option<String> {
        let mut busy = || match walk.carry_out(lease, &Step::CheckViable { group }) {
            Err(Stopped::Step(error)) => *error.cause == Cause::Kernel { errno: Errno::EBUSY },
            _ => false,
        };
        let holders = || {
            let holders = holders::of_group(self.host(), group, devices).unwrap_or_default();
            holders.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        };
        // A device's own node can be open without its group's being taken.
        let mut refused = busy();
        if !refused && !self.host().path("dev/vfio/devices").exists() {
            return None;
        }
        let mut who = holders();
        if refused && who.is_empty() {
            std::thread::sleep(MOMENT);
            refused = busy();
            who = holders();
        }
        let who = match who.is_empty() {
            false => who,
            true if refused => "a process".to_owned(),
            true => return None,
        };
        Some(format!("{who} holds IOMMU group {group}"))
    }

    /// Keeps those from leases to come that may have something left of a tenant, or are not well:
    /// whose cleaning failed, or was not come to.
    pub(super) fn distrust_unclean(&self, lease: &Lease, failures: &[Stopped]) {
        for failure in failures {
            let Some(step) = failure.step() else { continue };
            let devices = step.device().into_iter().chain(step.others().iter().copied());
            let unclean = devices.filter(|device| step.is_cleaning() || lease.is_unclean(*device));
            self.quarantine_devices(unclean.collect::<Vec<_>>(), &failure.to_string());
        }
    }

    /// Keeps those from leases to come that have reported errors nobody could correct since their
    /// tenant got them; says which and what. Asked before they are cleaned, for a reset makes some
    /// cards report what is nobody's fault.
    fn distrust_failing(&self, lease: &Lease, strangers: &BTreeSet<PciAddress>) -> Vec<String> {
        // What the daemon does for itself is no tenant's, and one that was never whole was nobody's.
        let used = lease.forward.iter().all(|recorded| recorded.outcome.is_some());
        if !used || lease.task.is_some() {
            return Vec::new();
        }
        let mut told = Vec::new();
        for (device, found) in lease.devices.iter().filter(|(d, _)| !strangers.contains(d)) {
            let errors = Errors::read(self.host(), *device).since(&found.errors);
            if !errors.is_empty() {
                let errors = errors.join(", ");
                let tenant = &lease.tenant;
                let reason = format!("uncorrectable errors while {tenant} had {device}: {errors}");
                self.quarantine_devices([*device], &reason);
                told.push(reason);
            }
        }
        told
    }

    /// Devices at a lease's addresses that are not the lease's.
    pub(super) fn strangers(&self, lease: &Lease) -> BTreeSet<PciAddress> {
        let known = self.inventory();
        // Of one that is still there nothing changes by which it is known.
        let there =
            |device: &PciAddress| known.get(*device).is_some_and(|f| f.is_there(self.host()));
        self.refresh(lease.devices.keys().copied().filter(|device| !there(device)));
        let inventory = self.inventory();
        let stranger = |(address, found): (&PciAddress, &crate::lease::Found)| {
            let now = inventory.get(*address)?;
            (!now.stuck && !is_same(now, &found.identity)).then_some(*address)
        };
        lease.devices.iter().filter_map(stranger).collect()
    }

    /// Files a lease whose way back was walked: forgotten if all went well, else kept as failed.
    pub(super) fn close(&self, lease: &mut Lease, failures: &[Stopped], reason: Option<&str>) {
        let reasons: Vec<&str> = lease.failure.as_deref().into_iter().chain(reason).collect();
        lease.reason = (!reasons.is_empty()).then(|| reasons.join("; "));
        self.data().asked.remove(&lease.id);
        let ended = failures.is_empty() && lease.failure.is_none();
        // First: whoever attaches next plans by how its devices are now, not by a look half way.
        let changes = self.refresh_leased(lease);
        let state = if ended { "released" } else { State::Failed.name() };
        if ended {
            if let Err(error) = self.walker.ledger.remove(&lease.id) {
                error!(lease = lease.id, %error, "cannot remove the lease file");
            }
            self.data().leases.remove(&lease.id);
        } else {
            lease.state = State::Failed;
            if let Err(error) = self.walker.ledger.write(lease) {
                error!(lease = lease.id, %error, "cannot record that the lease failed");
            }
            self.data().leases.insert(lease.id.clone(), lease.clone());
        }
        self.tell_all(changes);
        // A task that went well was never told of.
        if lease.task.is_none() || state != "released" {
            let reason = lease.reason.clone();
            self.tell(Change::LeaseChanged { id: lease.id.clone(), state, reason });
        }
        self.tell_holder_changed(lease);
        self.ended.notify_all();
    }

    fn dismiss(&self, id: &str) -> Result<(), Failure> {
        self.walker.ledger.remove(id).map_err(Stopped::from).map_err(internal)?;
        if let Some(lease) = self.data().leases.remove(id) {
            let text = "it had failed, and its record was dismissed";
            // What was done to its devices was told when it ended.
            self.record(&Entry { cleaned: Vec::new(), ..Entry::of(&lease, Event::Released, text) });
        }
        self.tell(Change::LeaseChanged { id: id.to_owned(), state: "released", reason: None });
        Ok(())
    }

    /// Brings every lease found on start to a defined end: active ones stay if their devices are
    /// still what they were, all others are undone. Returns when that is done, or after a moment
    /// if it takes longer.
    pub fn recover(self: &Arc<Self>) {
        let (under_way, all_done) = std::sync::mpsc::channel::<()>();
        for lease in self.leases() {
            let (broker, under_way) = (self.clone(), under_way.clone());
            match lease.state {
                State::Failed => {}
                State::Active => {
                    self.judge(&lease.id);
                    self.find_owner(&lease);
                }
                State::Preparing | State::Releasing | State::Wedged => {
                    std::thread::spawn(move || {
                        broker.resume(lease);
                        drop(under_way);
                    });
                }
            }
        }
        drop(under_way);
        let _ = all_done.recv_timeout(STARTING);
    }

    /// Undoes a lease that an earlier daemon was at.
    fn resume(&self, mut lease: Lease) {
        let state = if lease.backward.is_empty() { State::Preparing } else { State::Releasing };
        warn!(lease = lease.id, state = state.name(), "a lease was interrupted and is undone");
        if let Ok(None) = self.walker.ledger.try_lock(&lease.id) {
            lease.state = State::Wedged;
            lease.reason =
                Some("a step of the daemon that ran before has not returned yet".to_owned());
            self.file(&lease);
        }
        let late = Late { broker: self, tell: &|_| {} };
        let walk = self.walker.walk(&lease.id, &late);
        lease.state = State::Releasing;
        if lease.backward.is_empty() {
            lease.backward = lease.way_home(&self.inventory());
        }
        self.data().leases.insert(lease.id.clone(), lease.clone());
        self.await_holders(&walk, &mut lease, &|_| {});
        let strangers = self.strangers(&lease);
        let errors = self.distrust_failing(&lease, &strangers);
        let failures = walk.backward(&mut lease, &strangers);
        self.renumbered_back(&lease);
        self.distrust_unclean(&lease, &failures);
        self.keep_for_tenant(&lease);
        let mut reason = format!("the daemon stopped while it was {}", state.name());
        if !failures.is_empty() {
            reason = format!("{reason}; {}", all(&failures));
        }
        let told: Vec<String> = std::iter::once(reason.clone()).chain(errors).collect();
        self.note(&lease, Event::Recovered, &told.join("; "));
        self.close(&mut lease, &failures, Some(&reason));
    }

    /// Looks for the process that a lease found on start is bound to.
    fn find_owner(self: &Arc<Self>, lease: &Lease) {
        if let Some(Bound::Process { pid, started }) = lease.bound {
            match Process::find(pid, started) {
                Some(process) => self.end_with(lease.id.clone(), process),
                None => self.owner_gone(&lease.id),
            }
        }
    }
}

/// Whether a function is the one that was leased. Of one that does not answer only what the kernel
/// remembers can be compared; a reset may bring it back.
pub(super) fn is_same(now: &Function, leased: &Identity) -> bool {
    let is = Identity::of(now);
    if !now.is_silent() {
        return is == *leased;
    }
    let (ids, was) = (is.ids, leased.ids);
    let kept = |ids: Ids| (ids.vendor, ids.device, ids.class);
    kept(ids) == kept(was) && is.upstream == leased.upstream
}

/// Begins the end of an active lease, with `failure` as why it will have failed. `None` if it is
/// not active.
fn begin(data: &mut Data, id: &str, no_reset: bool, failure: Option<&str>) -> Option<Lease> {
    let inventory = data.inventory.clone();
    let lease = data.leases.get_mut(id).filter(|lease| lease.state == State::Active)?;
    lease.skipped.reset = no_reset;
    lease.backward = lease.way_home(&inventory);
    lease.failure = failure.map(str::to_owned);
    lease.state = State::Releasing;
    Some(lease.clone())
}
