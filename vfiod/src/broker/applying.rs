//! Doing what the policy says, a device at a time. Each is walked and recorded like a lease, as a
//! task of the daemon's own, so that it survives what leases survive: a device is as it was, or as
//! wanted. What is leased waits, and what takes its time keeps nobody else waiting.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use libvfio::address::PciAddress;
use libvfio::client::{DONE, FAILED, Failure, PolicyRecord, StepRecord, UnitRecord};
use libvfio::error::ErrorKind;
use libvfio::pci::Binding;
use libvfio::plan::{self, Kind, Lead, Plan, Standing, Unit};
use libvfio::step::Step;
use tracing::{info, warn};

use super::leasing::{Late, done, new_lease};
use super::policy::{Look, noted};
use super::{Answer, Around, Broker, Change, Reply};
use crate::boot::BootReport;
use crate::history::{self, Event};
use crate::lease::Lease;
use crate::request::ApplyOptions;

/// How long a unit is waited for before the next one begins beside it.
const PATIENCE: Duration = Duration::from_secs(1);

/// What became of a unit.
struct Conformed {
    unit: Unit,
    lease: Option<Lease>,
    failure: Option<Failure>,
}

/// A unit on its way.
struct Walking<'a> {
    lead: &'a Lead,
    /// Its place among all.
    place: usize,
    unit: Unit,
    answer: Answer<Lease>,
}

/// How a unit begins.
enum Way {
    /// There is nothing to do, or nothing that can be done.
    None,
    /// It cannot begin.
    Barred(Failure),
    Walks(Answer<Lease>),
}

/// Whoever takes what became of a unit, with its place, or why it could not be looked at.
type Take<'a> = dyn FnMut(usize, &Lead, Result<Conformed, Failure>) + 'a;

impl Broker {
    /// Does what the policy says, as far as nothing is in the way, and tells what is left.
    pub fn apply_policy(
        self: &Arc<Self>,
        options: &ApplyOptions,
        user: u32,
    ) -> Result<PolicyRecord, Failure> {
        let started = Instant::now();
        let one_at_a_time = self.applying.lock().unwrap_or_else(PoisonError::into_inner);
        noted(self.meet(options.accept))?;
        let mut record = self.plan_policy()?;
        let looked = self.data().looked_at();
        let leads = plan::policy_leads(&looked.inventory, &looked.wish());
        self.data().in_force.given_up.clear();
        let numbers: BTreeSet<PciAddress> = leads
            .iter()
            .filter(|lead| lead.kind == Kind::Physical)
            .map(|lead| lead.device)
            .collect();
        let mut as_wanted: BTreeMap<PciAddress, UnitRecord> = BTreeMap::new();
        for unit in std::mem::take(&mut record.units).into_iter().filter(UnitRecord::is_as_wanted) {
            as_wanted.extend(unit.device.parse().map(|device| (device, unit)));
        }
        let mut units: Vec<(usize, UnitRecord)> = Vec::new();
        // What was as wanted a moment ago needs no second look, unless it is made anew.
        let mut rest = Vec::new();
        for (place, lead) in leads.iter().enumerate() {
            let parent = looked.inventory.get(lead.device).and_then(|f| f.physical());
            let anew =
                parent.is_some_and(|of| numbers.contains(&of) && !as_wanted.contains_key(&of));
            let there = looked.inventory.get(lead.device).is_some();
            match as_wanted.get(&lead.device).filter(|_| there && !anew) {
                Some(unit) => {
                    self.data().in_force.waiting.remove(&lead.device);
                    units.push((place, unit.clone()));
                }
                None => rest.push((place, lead)),
            }
        }
        let mut unseen = None;
        self.conform_each(&rest, user, &mut |place, lead, conformed| {
            let conformed = match conformed {
                Ok(conformed) => conformed,
                Err(failure) => return unseen = Some(failure),
            };
            let waits = conformed.unit.standing() == Standing::Waits;
            let waiting = &mut self.data().in_force.waiting;
            if waits {
                waiting.insert(lead.device)
            } else {
                waiting.remove(&lead.device)
            };
            units.push((place, told(&looked.policy, &conformed, options.boot)));
        });
        if let Some(failure) = unseen {
            return Err(failure);
        }
        units.sort_by_key(|(place, _)| *place);
        record.units = units.into_iter().map(|(_, unit)| unit).collect();
        drop(one_at_a_time);
        // Virtual functions that were made are in their pool now, and others met.
        noted(self.meet(false))?;
        let milliseconds = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        record.initramfs = self.outdated_initramfs();
        record.time = Some(history::now());
        record.milliseconds = Some(milliseconds);
        if options.boot {
            self.keep_boot_report(&record);
        }
        let left = record.units.iter().filter(|unit| !unit.is_as_wanted()).count();
        info!(units = record.units.len(), left, milliseconds, "the policy was applied");
        Ok(record)
    }

    /// Brings units to where the policy wants them, one after another but for those that take their
    /// time: all that does not depend on them goes on. Each is taken with its place as soon as it is
    /// known what became of it, or why it could not be looked at.
    fn conform_each(self: &Arc<Self>, leads: &[(usize, &Lead)], user: u32, take: &mut Take<'_>) {
        let mut behind: Vec<Walking<'_>> = Vec::new();
        let mut after_them = Vec::new();
        for (place, lead) in leads {
            if behind.iter().any(|slow| self.depends_on(lead, slow.lead)) {
                after_them.push((*place, *lead));
                continue;
            }
            let still = |unit, failure| Conformed { unit, lease: None, failure };
            match self.conform(lead, user) {
                Ok(None) => {}
                Ok(Some((unit, Way::None))) => take(*place, lead, Ok(still(unit, None))),
                Ok(Some((unit, Way::Barred(why)))) => {
                    take(*place, lead, Ok(still(unit, Some(why))));
                }
                Ok(Some((unit, Way::Walks(answer)))) => match answer.within(PATIENCE) {
                    Ok(answer) => take(*place, lead, Ok(self.walked(unit, answer))),
                    Err(answer) => behind.push(Walking { lead, place: *place, unit, answer }),
                },
                Err(failure) => take(*place, lead, Err(failure)),
            }
        }
        for Walking { lead, place, unit, answer } in behind {
            take(place, lead, Ok(self.walked(unit, answer.wait())));
        }
        if !after_them.is_empty() {
            self.conform_each(&after_them, user, take);
        }
    }

    /// Whether a unit is of virtual functions that another one makes. Which one makes those that are not
    /// there yet is not known here.
    fn depends_on(&self, lead: &Lead, other: &Lead) -> bool {
        let physical = self.inventory().get(lead.device).map(|function| function.physical());
        other.kind == Kind::Physical
            && lead.kind != Kind::Physical
            && physical.is_none_or(|physical| physical == Some(other.device))
    }

    /// What became of a unit that walked.
    fn walked(&self, unit: Unit, answer: Result<Lease, Failure>) -> Conformed {
        match answer {
            Ok(lease) => {
                self.data().in_force.settled.insert(unit.device);
                Conformed { unit, lease: Some(lease), failure: None }
            }
            Err(failure) => Conformed { unit, lease: None, failure: Some(failure) },
        }
    }

    /// Begins to bring one unit to where the policy wants it. `None` if it is not there.
    fn conform(self: &Arc<Self>, lead: &Lead, user: u32) -> Result<Option<(Unit, Way)>, Failure> {
        self.refresh(self.around(lead));
        let Look { circumstances, .. } = self.look_for_policy(Some(lead))?;
        let (unit, lease) = {
            // As for a change of virtual functions by hand.
            let (mut data, barred) = match lead.kind {
                Kind::Physical => match self.await_bus(lead.device) {
                    Ok(data) => (data, None),
                    Err(failure) => (self.data(), Some(failure)),
                },
                Kind::Device | Kind::Kept => (self.data(), None),
            };
            let _ = Arc::make_mut(&mut data.inventory).refresh_vfio(self.host());
            let looked = data.looked_at();
            // Leases may have come and gone during the look.
            let plan::Circumstances { claims, quarantined, rules, .. } =
                super::circumstances(&data, Around::default());
            let now = plan::Circumstances { claims, quarantined, rules, ..circumstances };
            let unit = plan::policy_unit(&looked.inventory, &now, &looked.wish(), lead);
            let Some(unit) = unit else { return Ok(None) };
            match barred {
                _ if unit.standing() != Standing::ToDo => return Ok(Some((unit, Way::None))),
                Some(failure) => return Ok(Some((unit, Way::Barred(failure)))),
                None => {}
            }
            let (devices, steps) = (unit.devices.clone(), unit.steps.clone());
            let plan = Plan { devices, steps, ..Plan::default() };
            let task = format!("policy: {} {}", lead.device, unit.wanted);
            let lease = Lease { owner: user, task: Some(task), ..new_lease(&data, &plan) };
            data.leases.insert(lease.id.clone(), lease.clone());
            (unit, lease)
        };
        let (kind, pool) = (lead.kind, unit.pool.clone());
        let device = lead.device;
        let answer =
            self.begin(move |broker, reply| broker.walk_unit(lease, &pool, device, kind, reply));
        Ok(Some((unit, Way::Walks(answer))))
    }

    /// All functions whose state decides on a unit.
    fn around(&self, lead: &Lead) -> BTreeSet<PciAddress> {
        let inventory = self.inventory();
        let mut around: BTreeSet<PciAddress> = lead.members.iter().copied().collect();
        for member in &lead.members {
            around.extend(inventory.group_of(*member).into_iter().flat_map(|group| &group.members));
        }
        if lead.kind == Kind::Physical {
            around.extend(inventory.virtual_functions(lead.device).into_iter().map(|vf| vf.1));
        }
        around
    }

    /// Walks a unit to its end, or all the way back.
    fn walk_unit(
        &self,
        mut lease: Lease,
        pool: &str,
        device: PciAddress,
        kind: Kind,
        reply: &Reply<Lease>,
    ) {
        let late = Late { broker: self, tell: &|failure| reply.give(Err(failure)) };
        let walk = self.walker.walk(&lease.id, &late);
        let walked = walk.forward(&mut lease);
        let look = |lease: &Lease| match kind {
            Kind::Physical => self.look_at_virtual(device, lease),
            Kind::Device | Kind::Kept => self.refresh(lease.devices.keys().copied()),
        };
        look(&lease);
        if let Err(stopped) = walked {
            let before = lease.clone();
            self.tell_step(pool, device, &format!("failed: {stopped}"));
            let failure = self.abandon(&walk, lease, &stopped);
            look(&before);
            return reply.give(Err(failure));
        }
        if kind == Kind::Physical {
            self.remember_autoprobe(&lease);
        }
        let task = lease.task.clone().unwrap_or_default();
        info!(%device, pool, user = lease.owner, "as the policy wants it: {}", done(&lease.forward));
        for recorded in &lease.forward {
            self.tell_step(pool, device, &recorded.step.to_string());
        }
        self.note(&lease, Event::Policy, &task);
        self.close(&mut lease, &[], None);
        reply.give(Ok(lease));
    }

    /// What applying the policy came to when the host booted.
    pub fn boot_report(&self) -> Result<PolicyRecord, Failure> {
        let report = self.walker.ledger.boot_report().map_err(super::internal)?;
        let none = || {
            let why = "the policy was not applied at boot; see 'systemctl status vfiod-provision'";
            Failure::new(ErrorKind::NotFound, why)
        };
        let record = report.map(BootReport::record).ok_or_else(none)?;
        let looked = self.data().looked_at();
        let boot_limit = looked.policy.boot_limit.as_secs();
        let (files, initramfs) = (looked.policy.files.clone(), self.outdated_initramfs());
        Ok(PolicyRecord { files, boot_limit, initramfs, ..record })
    }

    fn keep_boot_report(&self, record: &PolicyRecord) {
        if let Err(error) = self.walker.ledger.write_boot_report(&BootReport::from(record)) {
            warn!(%error, "what became of the policy at boot is not on record");
        }
    }

    fn tell_step(&self, pool: &str, device: PciAddress, text: &str) {
        let (pool, text) = (pool.to_owned(), text.to_owned());
        self.tell(Change::PolicyStep { pool, device, text });
    }

    /// Does what waited for a lease that has ended, if anything did.
    pub(super) fn stop_waiting(self: &Arc<Self>) {
        if self.data().in_force.waiting.is_empty() {
            return;
        }
        let broker = self.clone();
        std::thread::spawn(move || {
            broker
                .conform_all(|broker, lead| broker.data().in_force.waiting.contains(&lead.device));
        });
    }

    /// Changes back what others have changed, of pools that say so.
    pub fn correct_drift(self: &Arc<Self>) {
        let corrects = |broker: &Self| {
            broker.data().in_force.policy.pools.iter().any(|pool| pool.correct_drift)
        };
        if !corrects(self) {
            return;
        }
        self.notice_silent_changes();
        let Ok(record) = self.plan_policy() else { return };
        let drifted: BTreeSet<String> = record
            .units
            .into_iter()
            .filter(|unit| unit.drifted == Some(true) && unit.standing == Standing::ToDo.name())
            .map(|unit| unit.device)
            .collect();
        if drifted.is_empty() {
            return;
        }
        self.conform_all(|broker, lead| {
            let in_force = &broker.data().in_force;
            let pool = in_force.policy.pools.get(lead.pool);
            pool.is_some_and(|pool| pool.correct_drift)
                && drifted.contains(&lead.device.to_string())
                && !in_force.given_up.contains(&lead.device)
        });
    }

    /// Overrides change without a report.
    fn notice_silent_changes(self: &Arc<Self>) {
        let (assignment, inventory) = {
            let data = self.data();
            (data.assignment(), data.inventory.clone())
        };
        let changed = |device: &PciAddress| {
            let now = Binding::read(self.host(), *device).ok();
            now.is_some_and(|now| inventory.get(*device).is_some_and(|f| f.binding() != now))
        };
        let changed: Vec<PciAddress> =
            assignment.members().map(|member| member.0).filter(changed).collect();
        if !changed.is_empty() {
            self.notice(changed);
        }
    }

    /// Brings all units there that are `meant`; those that fail are left from then on.
    fn conform_all(self: &Arc<Self>, meant: impl Fn(&Self, &Lead) -> bool) {
        let _one_at_a_time = self.applying.lock().unwrap_or_else(PoisonError::into_inner);
        let looked = self.data().looked_at();
        let leads = plan::policy_leads(&looked.inventory, &looked.wish());
        let meant: Vec<(usize, &Lead)> =
            leads.iter().enumerate().filter(|(_, lead)| meant(self, lead)).collect();
        self.conform_each(&meant, 0, &mut |_, lead, conformed| {
            let failure = match conformed {
                Ok(Conformed { failure, .. }) if failure.is_some() => failure,
                Ok(conformed) => {
                    if conformed.unit.standing() != Standing::Waits {
                        self.data().in_force.waiting.remove(&lead.device);
                    }
                    None
                }
                Err(failure) => Some(failure),
            };
            if let Some(failure) = failure {
                warn!(device = %lead.device, %failure, "the policy is not kept here any more");
                self.data().in_force.given_up.insert(lead.device);
            }
        });
    }
}

/// A unit and what became of it. At boot, a host driver that had what was to be on VFIO is named.
fn told(policy: &libvfio::policy::Policy, conformed: &Conformed, boot: bool) -> UnitRecord {
    let Conformed { unit, lease, failure } = conformed;
    let mut record = UnitRecord::from(unit);
    if let Some(lease) = lease {
        record.standing = String::from(DONE);
        let steps = lease.forward.iter();
        record.steps = steps.map(|r| StepRecord::new(&r.step, r.outcome)).collect();
    }
    if let Some(failure) = failure {
        record.standing = String::from(FAILED);
        record.failure = Some(failure.to_string());
    }
    let passthrough = policy.pool(&unit.pool).map(|pool| pool.mode);
    // Nobody was to have had first what is not the device that is meant.
    let meant = unit.reasons.iter().all(|reason| reason.kind != ErrorKind::IdentityMismatch);
    if boot && meant && passthrough == Some(libvfio::policy::Mode::Passthrough) {
        record.lost_to = unit.steps.iter().find_map(|step| match step {
            Step::Unbind { driver, .. } => Some(driver.clone()),
            _ => None,
        });
    }
    record
}
