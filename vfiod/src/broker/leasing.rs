//! Making leases.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use libvfio::address::PciAddress;
use libvfio::client::Failure;
use libvfio::error::ErrorKind;
use libvfio::mediated::Uuid;
use libvfio::pci::Identity;
use libvfio::pci::aer::Errors;
use libvfio::plan::{Plan, Refusal, Request};
use libvfio::step::Step;
use tracing::{error, info, warn};

use super::{Around, Broker, Change, Data, Property, Reply, plan_within};
use crate::crash;
use crate::history::{self, Event};
use crate::lease::{Bound, Found, Lease, Recorded, Skipped, State};
use crate::owner::Process;
use crate::request::AttachOptions;
use crate::transition::{Stopped, Walk, Watcher};

/// Who asks for a lease.
#[derive(Debug, Clone, Default)]
pub struct Asker {
    /// User id.
    pub user: u32,
    /// The pools that name the user, or that it may do everything.
    pub pools: Pools,
    /// What the lease ends with, if the caller wants it bound to the connection that the call came
    /// over.
    pub connection: Option<Bound>,
}

/// The pools that somebody may lease from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Pools {
    /// All of them.
    #[default]
    All,
    /// Those that name nobody, and these.
    Named(BTreeSet<String>),
}

/// What a lease is to be.
struct Wanted<'a> {
    tenant: &'a str,
    options: &'a AttachOptions,
    user: u32,
    pools: Pools,
    bound: Option<Bound>,
}

impl Broker {
    /// Leases devices: brings their groups to VFIO, all or none.
    pub fn attach(
        self: &Arc<Self>,
        names: &[String],
        tenant: &str,
        options: &AttachOptions,
        asker: Asker,
    ) -> Result<Lease, Failure> {
        let (names, tenant, options) = (names.to_vec(), tenant.to_owned(), options.clone());
        self.apart(move |broker, reply| {
            broker.attach_on_this_thread(&names, &tenant, &options, asker, reply);
        })
    }

    /// The same on the thread that calls, which a step that does not return keeps after the answer.
    pub fn attach_on_this_thread(
        self: &Arc<Self>,
        names: &[String],
        tenant: &str,
        options: &AttachOptions,
        asker: Asker,
        reply: &Reply<Lease>,
    ) {
        match self.claimed(names, tenant, options, asker) {
            Ok((lease, owner)) => self.prepare(lease, owner, reply),
            Err(failure) => reply.give(Err(failure)),
        }
    }

    /// A new lease, and the process that it ends with if it is bound to one.
    fn claimed(
        &self,
        names: &[String],
        tenant: &str,
        options: &AttachOptions,
        asker: Asker,
    ) -> Result<(Lease, Option<Process>), Failure> {
        let options = &AttachOptions { tenant: Some(tenant.to_owned()), ..options.clone() };
        let (owner, bound) = bound(options, asker.connection)?;
        let wanted = Wanted { tenant, options, user: asker.user, pools: asker.pools, bound };
        let mut barred = BTreeSet::new();
        loop {
            let request = self.request(names, options, wanted.user, &barred)?;
            match self.claim(&request, &wanted)? {
                Ok(lease) => return Ok((lease, owner)),
                Err(refusal) => {
                    // Of those that may be chosen, others may do.
                    let refused = refusal.reasons().iter().map(|reason| reason.object.parse());
                    let refused: BTreeSet<PciAddress> = refused.filter_map(Result::ok).collect();
                    let chosen = request.devices.iter().any(|device| refused.contains(device));
                    let for_all = refusal.kind() == ErrorKind::Unsupported;
                    let any_will_do = options.vf_of.is_some() || options.pool.is_some();
                    if !any_will_do || !chosen || for_all {
                        return Err(refusal.into());
                    }
                    barred.extend(refused);
                }
            }
        }
    }

    /// Makes the lease if nothing forbids it. From then on its devices are taken.
    fn claim(
        &self,
        request: &Request,
        wanted: &Wanted<'_>,
    ) -> Result<Result<Lease, Refusal>, Failure> {
        let _considering = self.consider(request);
        if let Err(refusal) = self.refuse_leased(request) {
            return Ok(Err(refusal));
        }
        let found = self.look_around(request)?;
        let mut data = self.data();
        crash::point("before a request is judged");
        let plan = plan_within(&data, request, found);
        crash::point("after a request was judged");
        let plan = match plan {
            Ok(plan) => plan,
            Err(refusal) => return Ok(Err(refusal)),
        };
        data.refuse_lessee(&plan, wanted.tenant, &wanted.pools)?;
        let lease = Lease {
            tenant: wanted.tenant.to_owned(),
            vm: wanted.options.vm.clone(),
            owner: wanted.user,
            bound: wanted.bound.clone(),
            skipped: Skipped { reset: false, scrub: wanted.options.no_scrub },
            ..new_lease(&data, &plan)
        };
        data.leases.insert(lease.id.clone(), lease.clone());
        Ok(Ok(lease))
    }

    /// Refuses what another lease has, which is known without a look at the host: of many who want
    /// one device, only those have it read who may get it.
    fn refuse_leased(&self, request: &Request) -> Result<(), Refusal> {
        match plan_within(&self.data(), request, Around::default()) {
            Err(refusal) if refusal.kind() == ErrorKind::AlreadyLeased => Err(refusal),
            _ => Ok(()),
        }
    }

    /// Walks a new lease's way to the guest, or all the way back.
    fn prepare(self: &Arc<Self>, mut lease: Lease, owner: Option<Process>, reply: &Reply<Lease>) {
        let late = Late { broker: self, tell: &|failure| reply.give(Err(failure)) };
        let walk = self.walker.walk(&lease.id, &late);
        let mut changes = Vec::new();
        let walked = walk.forward(&mut lease).and_then(|()| {
            // First, since an active lease whose devices look unbound is a broken one.
            changes = self.refresh_leased(&lease);
            self.activate(&walk, &mut lease)
        });
        if let Err(stopped) = walked {
            self.tell_all(changes);
            return reply.give(Err(self.abandon(&walk, lease, &stopped)));
        }
        self.note(&lease, Event::Attached, "");
        self.tell_all(changes);
        self.tell(Change::LeaseAdded(lease.id.clone()));
        self.tell_holder_changed(&lease);
        reply.give(Ok(lease.clone()));
        info!(
            lease = lease.id,
            tenant = lease.tenant,
            vm = lease.vm,
            devices = ?lease.devices.keys(),
            mediated = ?lease.mediated.keys(),
            "attached: {}",
            done(&lease.forward)
        );
        if let Some(process) = owner {
            self.end_with(lease.id.clone(), process);
        }
        // Whatever happened to its devices on the way was left for now.
        self.judge(&lease.id);
    }

    /// Only what is on record is active.
    fn activate(&self, walk: &Walk<'_>, lease: &mut Lease) -> Result<(), Stopped> {
        let interface = self.interface(lease);
        let mut active = Lease { state: State::Active, interface, ..lease.clone() };
        for (device, found) in &mut active.devices {
            found.errors = Errors::read(self.host(), *device);
        }
        walk.write(&active)?;
        self.data().leases.insert(active.id.clone(), active.clone());
        *lease = active;
        Ok(())
    }

    /// Undoes an attachment that stopped half way.
    pub(super) fn abandon(&self, walk: &Walk<'_>, mut lease: Lease, stopped: &Stopped) -> Failure {
        lease.state = State::Releasing;
        lease.backward = lease.way_back();
        self.data().leases.insert(lease.id.clone(), lease.clone());
        let strangers = self.strangers(&lease);
        let failures = walk.backward(&mut lease, &strangers);
        let mut message = format!("{stopped}; everything done before was undone");
        if !failures.is_empty() {
            message =
                format!("{stopped}; undoing what was done before failed too: {}", all(&failures));
        }
        warn!(lease = lease.id, tenant = lease.tenant, message, "an attachment failed");
        self.note(&lease, Event::Failed, &message);
        self.close(&mut lease, &failures, Some(&message));
        Failure::new(stopped.kind(), message)
    }

    /// Takes a lease's state in and tells of it, on record if that can be.
    pub(super) fn file(&self, lease: &Lease) {
        self.data().leases.insert(lease.id.clone(), lease.clone());
        if let Err(error) = self.walker.ledger.write(lease) {
            error!(lease = lease.id, %error, "cannot write the lease ledger");
        }
        self.tell(Change::LeaseChanged {
            id: lease.id.clone(),
            state: lease.state.name(),
            reason: lease.reason.clone(),
        });
        self.tell_holder_changed(lease);
    }

    pub(super) fn tell_holder_changed(&self, lease: &Lease) {
        let inventory = self.inventory();
        for device in lease.devices.keys().filter(|device| inventory.get(**device).is_some()) {
            self.tell(Change::DeviceChanged(*device, vec![Property::Lease]));
        }
    }
}

/// Says of a lease that one of its steps does not return, for as long as it does not.
pub(super) struct Late<'a> {
    pub(super) broker: &'a Broker,
    /// Tells whoever waits for the lease.
    pub(super) tell: &'a dyn Fn(Failure),
}

impl Watcher for Late<'_> {
    fn late(&self, lease: &mut Lease, step: &Step, limit: std::time::Duration) {
        let reason = format!(
            "the kernel did not {step} within {} s; if it never does, only a reboot helps (see \
             journalctl -k)",
            limit.as_secs_f32()
        );
        error!(lease = lease.id, step = step.name(), reason, "a lease is wedged");
        lease.state = State::Wedged;
        lease.reason = Some(reason.clone());
        self.broker.file(lease);
        // Who waits for its end has waited long enough.
        self.broker.ended.notify_all();
        (self.tell)(Failure::new(
            ErrorKind::Wedged,
            format!("lease {} is wedged: {reason}", lease.id),
        ));
    }

    fn loose(&self, lease: &mut Lease) {
        info!(lease = lease.id, "the step has returned after all");
        lease.state = if lease.backward.is_empty() { State::Preparing } else { State::Releasing };
        lease.reason = None;
        self.broker.file(lease);
    }
}

/// What binds the lease, and the process to wait for if it is one.
fn bound(
    options: &AttachOptions,
    connection: Option<Bound>,
) -> Result<(Option<Process>, Option<Bound>), Failure> {
    let Some(pid) = options.pid else { return Ok((None, connection)) };
    let process = Process::open(pid).map_err(|e| {
        let why = format!("process {pid} cannot be waited for: {e}; name one that runs");
        Failure::new(ErrorKind::InvalidArgument, why)
    })?;
    let bound = process.bound();
    Ok((Some(process), Some(bound)))
}

pub(super) fn new_lease(data: &Data, plan: &Plan) -> Lease {
    let found = |(address, before): (&PciAddress, &_)| {
        let function = data.inventory.get(*address)?;
        let (identity, before) = (Identity::of(function), Clone::clone(before));
        Some((*address, Found { identity, before, errors: Errors::default() }))
    };
    Lease {
        id: new_id(&data.leases),
        tenant: String::new(),
        vm: None,
        owner: 0,
        created: history::now(),
        state: State::Preparing,
        reason: None,
        failure: None,
        bound: None,
        task: None,
        skipped: Skipped::default(),
        care: plan.care.clone(),
        interface: None,
        devices: plan.devices.iter().filter_map(found).collect(),
        mediated: plan.mediated.clone(),
        forward: Recorded::todo(plan.steps.iter().cloned()),
        backward: Vec::new(),
    }
}

fn new_id(taken: &BTreeMap<String, Lease>) -> String {
    loop {
        let (random, ..) = Uuid::new_v4().as_fields();
        let id = format!("{random:08x}");
        if !taken.contains_key(&id) {
            return id;
        }
    }
}

/// The steps carried out, in one line of the log.
pub(super) fn done(steps: &[Recorded]) -> String {
    let done = steps.iter().filter(|recorded| recorded.outcome.is_some());
    done.map(|recorded| recorded.step.to_string()).collect::<Vec<_>>().join(", ")
}

/// Several failures in one sentence.
pub(super) fn all(failures: &[Stopped]) -> String {
    failures.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
