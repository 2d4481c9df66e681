//! Making leases and ending them on request.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use libvfio::address::PciAddress;
use libvfio::client::Failure;
use libvfio::error::{Error, ErrorKind};
use libvfio::inventory::Inventory;
use libvfio::pci::{Function, Identity};
use libvfio::plan::Plan;
use libvfio::step::Step;
use libvfio::{holders, vfio};
use tracing::{error, info, warn};

use super::{Broker, Change, Data, Property, internal, plan_within};
use crate::lease::{Found, Lease, Recorded, State};
use crate::request::{AttachOptions, ReleaseOptions};
use crate::transition::{self, Stopped};

impl Broker {
    /// Leases devices: brings their groups to VFIO, all or none.
    pub fn attach(
        &self,
        names: &[String],
        tenant: &str,
        options: &AttachOptions,
        owner: u32,
    ) -> Result<Lease, Failure> {
        let request = self.request(names, options)?;
        let uses = self.uses(&self.refresh_around(&request)?)?;
        let mut lease = {
            let mut data = self.data();
            let plan = plan_within(&data, &request, uses)?;
            let lease = new_lease(&data, &plan, tenant, options, owner)?;
            data.leases.insert(lease.id.clone(), lease.clone());
            lease
        };
        match transition::forward(&self.host, &self.ledger, &mut lease) {
            Ok(()) => {
                // First, since an active lease whose devices look unbound is a broken one.
                self.refresh(lease.devices.keys().copied());
                lease.state = State::Active;
                self.store(&lease)?;
                self.tell(Change::LeaseAdded(lease.id.clone()));
                self.tell_holder_changed(&lease);
                info!(
                    lease = lease.id,
                    tenant,
                    vm = lease.vm,
                    devices = ?lease.devices.keys(),
                    "attached: {}",
                    done(&lease.forward)
                );
                Ok(lease)
            }
            Err(stopped) => Err(self.abandon(lease, &stopped)),
        }
    }

    /// Undoes an attachment that stopped half way.
    fn abandon(&self, mut lease: Lease, stopped: &Stopped) -> Failure {
        lease.state = State::Releasing;
        lease.backward = lease.way_back();
        let failures = transition::backward(&self.host, &self.ledger, &mut lease);
        let kind = match stopped {
            Stopped::Step(error) => error.kind(),
            Stopped::Ledger(_) => ErrorKind::Internal,
        };
        let mut message = format!("{stopped}; everything done before was undone");
        if !failures.is_empty() {
            message =
                format!("{stopped}; undoing what was done before failed too: {}", all(&failures));
        }
        warn!(lease = lease.id, tenant = lease.tenant, message, "an attachment failed");
        self.close(lease, &failures, Some(&message));
        Failure::new(kind, message)
    }

    /// Ends every lease `target` names: by lease id, by virtual machine, or by a device of it.
    /// Nothing to end is no failure, so a caller may repeat itself.
    pub fn release(&self, target: &str, options: &ReleaseOptions) -> Result<Vec<String>, Failure> {
        let mut ids =
            self.leases_where(|lease| lease.id == target || lease.vm.as_deref() == Some(target));
        if ids.is_empty() {
            let address = self.resolve(target).ok().or_else(|| target.parse().ok());
            ids = self.leases_where(|lease| {
                address.is_some_and(|address| lease.devices.contains_key(&address))
            });
        }
        for id in &ids {
            self.release_one(id, options)?;
        }
        Ok(ids)
    }

    fn leases_where(&self, meant: impl Fn(&Lease) -> bool) -> Vec<String> {
        let data = self.data();
        data.leases.values().filter(|lease| meant(lease)).map(|lease| lease.id.clone()).collect()
    }

    fn release_one(&self, id: &str, options: &ReleaseOptions) -> Result<(), Failure> {
        let mut lease = {
            let mut data = self.data();
            let Some(lease) = data.leases.get(id).cloned() else { return Ok(()) };
            match lease.state {
                State::Failed => {
                    self.dismiss(&mut data, &lease)?;
                    return Ok(());
                }
                State::Active => {}
                State::Preparing | State::Releasing => {
                    let state = lease.state.name();
                    return Err(Failure::new(
                        ErrorKind::Busy,
                        format!("lease {id} is {state}; wait until that is done"),
                    ));
                }
            }
            self.refuse_if_held(&data.inventory, &lease)?;
            let resets =
                options.reset.then(|| resets(&data.inventory, &lease)).into_iter().flatten();
            let releasing = Lease {
                state: State::Releasing,
                backward: Recorded::todo(resets).into_iter().chain(lease.way_back()).collect(),
                ..lease
            };
            data.leases.insert(id.to_owned(), releasing.clone());
            releasing
        };
        let failures = transition::backward(&self.host, &self.ledger, &mut lease);
        let message = (!failures.is_empty()).then(|| all(&failures));
        info!(
            lease = id,
            tenant = lease.tenant,
            devices = ?lease.devices.keys(),
            "released: {}",
            done(&lease.backward)
        );
        self.close(lease, &failures, message.as_deref());
        match message {
            None => Ok(()),
            Some(message) => Err(Failure::new(
                ErrorKind::Internal,
                format!("lease {id} has ended, but not everything is as it was: {message}"),
            )),
        }
    }

    /// Unbinding a device that a guest still holds would block in the kernel until it lets go.
    fn refuse_if_held(&self, inventory: &Inventory, lease: &Lease) -> Result<(), Failure> {
        let functions: Vec<&Arc<Function>> =
            lease.devices.keys().filter_map(|address| inventory.get(*address)).collect();
        let groups: BTreeSet<u32> = functions.iter().filter_map(|f| f.iommu_group).collect();
        for group in groups {
            let busy = matches!(vfio::group_viable(&self.host, group),
                Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::ResourceBusy);
            if busy {
                let devices: Vec<&str> =
                    functions.iter().filter_map(|f| f.vfio_device.as_deref()).collect();
                let holders = holders::of_group(&self.host, group, &devices).unwrap_or_default();
                let names: Vec<String> = holders.iter().map(ToString::to_string).collect();
                let who = if names.is_empty() { "a process".into() } else { names.join(", ") };
                return Err(Failure::new(
                    ErrorKind::Busy,
                    format!(
                        "lease {} is in use: {who} holds IOMMU group {group} open; shut the guest \
                         down and release again",
                        lease.id
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Files a lease whose way back was walked: forgotten if all went well, else kept as failed.
    pub(super) fn close(&self, mut lease: Lease, failures: &[Stopped], reason: Option<&str>) {
        lease.reason = reason.map(str::to_owned);
        if failures.is_empty() {
            if let Err(error) = self.ledger.remove(&lease.id) {
                error!(lease = lease.id, %error, "cannot remove the lease file");
            }
            self.data().leases.remove(&lease.id);
            self.tell_end(&lease, "released");
        } else {
            self.record_failure(lease);
        }
    }

    /// Files a lease that ended otherwise than by release, for its reason.
    pub(super) fn record_failure(&self, mut lease: Lease) {
        lease.state = State::Failed;
        if let Err(failure) = self.store(&lease) {
            error!(lease = lease.id, %failure, "cannot record that the lease failed");
        }
        self.tell_end(&lease, State::Failed.name());
    }

    fn tell_end(&self, lease: &Lease, state: &'static str) {
        self.refresh(lease.devices.keys().copied());
        let reason = lease.reason.clone();
        self.tell(Change::LeaseChanged { id: lease.id.clone(), state, reason });
        self.tell_holder_changed(lease);
    }

    fn tell_holder_changed(&self, lease: &Lease) {
        let inventory = self.inventory();
        for device in lease.devices.keys().filter(|device| inventory.get(**device).is_some()) {
            self.tell(Change::DeviceChanged(*device, vec![Property::Lease]));
        }
    }

    fn dismiss(&self, data: &mut Data, lease: &Lease) -> Result<(), Failure> {
        self.ledger.remove(&lease.id).map_err(Stopped::from).map_err(internal)?;
        data.leases.remove(&lease.id);
        self.tell(Change::LeaseChanged { id: lease.id.clone(), state: "released", reason: None });
        Ok(())
    }

    pub(super) fn store(&self, lease: &Lease) -> Result<(), Failure> {
        self.data().leases.insert(lease.id.clone(), lease.clone());
        self.ledger.write(lease).map_err(Stopped::from).map_err(internal)
    }
}

fn new_lease(
    data: &Data,
    plan: &Plan,
    tenant: &str,
    options: &AttachOptions,
    owner: u32,
) -> Result<Lease, Failure> {
    let found = |(address, before): (&PciAddress, &_)| {
        let function = data.inventory.get(*address)?;
        Some((*address, Found { identity: Identity::of(function), before: Clone::clone(before) }))
    };
    Ok(Lease {
        id: new_id(&data.leases).map_err(internal)?,
        tenant: tenant.to_owned(),
        vm: options.vm.clone(),
        owner,
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        state: State::Preparing,
        reason: None,
        devices: plan.devices.iter().filter_map(found).collect(),
        forward: Recorded::todo(plan.steps.iter().cloned()),
        backward: Vec::new(),
    })
}

fn new_id(taken: &BTreeMap<String, Lease>) -> std::io::Result<String> {
    let mut random = File::open("/dev/urandom")?;
    loop {
        let mut bytes = [0u8; 4];
        random.read_exact(&mut bytes)?;
        let id = format!("{:08x}", u32::from_ne_bytes(bytes));
        if !taken.contains_key(&id) {
            return Ok(id);
        }
    }
}

/// Resets for those functions of a lease that can be reset by themselves.
fn resets(inventory: &Inventory, lease: &Lease) -> Vec<Step> {
    let alone = |f: &&Arc<Function>| f.reset_methods.iter().any(|m| m != "bus" && m != "cxl_bus");
    let functions = lease.devices.keys().filter_map(|address| inventory.get(*address));
    functions.filter(alone).map(|f| Step::Reset { device: f.address }).collect()
}

/// The steps carried out, in one line of the log.
fn done(steps: &[Recorded]) -> String {
    let done = steps.iter().filter(|recorded| recorded.outcome.is_some());
    done.map(|recorded| recorded.step.to_string()).collect::<Vec<_>>().join(", ")
}

/// Several failures in one sentence.
pub(super) fn all(failures: &[Stopped]) -> String {
    failures.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
