//! Following the host: what the kernel reports, and what that means for leases.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use libvfio::address::PciAddress;
use libvfio::inventory::{self, Inventory};
use libvfio::modalias::same_driver;
use libvfio::pci::{Binding, Identity};
use libvfio::step::Step;
use tracing::error;

use super::{Broker, Change, Property};
use crate::lease::{Lease, State};

/// How long a device that changed under a lease is given before the lease is judged.
const SETTLING: Duration = Duration::from_millis(300);

/// What is wrong with an active lease.
#[derive(Debug)]
struct Broken {
    /// Why, in words.
    reason: String,
    /// The device that somebody else has changed, if it is that.
    drifted: Option<PciAddress>,
}

/// What of a function is read.
#[derive(Clone, Copy)]
enum Look<'a> {
    /// All of it.
    Anew,
    /// What changes while a device stays.
    Again,
    /// The same, after a step that has read back this override.
    After(&'a Option<String>),
}

/// What became of a function that is not there any more.
fn lost(inventory: &Inventory, address: PciAddress) -> String {
    match inventory.physical_of(address) {
        Some(physical) => format!(
            "{address} has gone with the virtual functions of {}: its driver was unloaded, or somebody \
             else removed them",
            physical.address
        ),
        None => format!("{address} was unplugged"),
    }
}

impl Broken {
    fn lost(reason: String) -> Self {
        Self { reason, drifted: None }
    }
}

impl Broker {
    /// Why an active lease no longer is what it says, if so.
    fn broken(&self, lease: &Lease) -> Option<Broken> {
        if let Some(uuid) = self.lost_mediated(lease) {
            let reason = format!("mediated device {uuid} was removed by somebody else");
            return Some(Broken::lost(reason));
        }
        let inventory = self.inventory();
        lease.devices.iter().find_map(|(address, found)| {
            let Some(f) = inventory.get(*address) else {
                return Some(Broken::lost(lost(&inventory, *address)));
            };
            if f.stuck {
                return None;
            }
            // On its way out, the kernel still has the function but nothing to say of it.
            if f.ids.vendor.is_none() || f.is_silent() {
                let reason = format!("{address} was unplugged or stopped answering");
                return Some(Broken::lost(reason));
            }
            if Identity::of(f) != found.identity {
                return Some(Broken::lost(format!("another device is at {address} now")));
            }
            let drifted = |reason| Some(Broken { reason, drifted: Some(*address) });
            if !f.on_vfio() {
                return drifted(format!(
                    "{address} was taken from VFIO by somebody else and is on {} now",
                    f.driver.as_deref().unwrap_or("no driver")
                ));
            }
            let expected = lease.expected_override(*address);
            if !same_driver(f.driver_override.as_deref(), expected.map(String::as_str)) {
                return drifted(format!(
                    "driver_override of {address} was changed by somebody else from {} to {}",
                    expected.map_or("none", String::as_str),
                    f.driver_override.as_deref().unwrap_or("none")
                ));
            }
            None
        })
    }

    /// Ends an active lease that is broken, and still is after a moment: unplugging takes a device
    /// from its driver first, so what happened is clear soon after.
    pub(super) fn judge(self: &Arc<Self>, id: &str) {
        let Some(lease) = self.lease(id).filter(|l| l.state == State::Active) else { return };
        if self.broken(&lease).is_none() || !self.data().judged.insert(lease.id) {
            return;
        }
        let (broker, id) = (self.clone(), id.to_owned());
        std::thread::spawn(move || {
            std::thread::sleep(SETTLING);
            broker.data().judged.remove(&id);
            let Some(lease) = broker.lease(&id).filter(|l| l.state == State::Active) else {
                return;
            };
            broker.refresh(lease.devices.keys().copied());
            let Some(Broken { reason, drifted }) = broker.broken(&lease) else { return };
            if let Some(device) = drifted {
                error!(lease = id, %device, reason, "a leased device was changed by somebody else");
                broker.quarantine_devices([device], &reason);
            }
            broker.fail(&id, &reason);
        });
    }

    /// Looks at functions the kernel reported a change of, and at what that means for leases.
    pub fn notice(self: &Arc<Self>, addresses: impl IntoIterator<Item = PciAddress>) {
        let mut addresses: BTreeSet<PciAddress> = addresses.into_iter().collect();
        let mut concerned = Vec::new();
        for lease in self.data().leases.values() {
            let has = |address: &PciAddress| lease.devices.contains_key(address);
            if lease.state.moves() {
                // Whoever moves a device looks at it when it has arrived.
                addresses.retain(|address| !has(address));
            } else if addresses.iter().any(has) {
                concerned.push(lease.id.clone());
            }
        }
        self.refresh(addresses.iter().copied());
        for lease in concerned {
            self.judge(&lease);
        }
    }

    /// Looks at the whole host again, after reports of changes were lost.
    pub fn resynchronise(self: &Arc<Self>) {
        let known = self.inventory();
        let now = self.host().sys("bus/pci/devices").list().unwrap_or_default();
        let now = now.iter().filter_map(|name| name.parse().ok());
        self.notice(known.functions().map(|f| f.address).chain(now).collect::<BTreeSet<_>>());
        self.notice_mediated(
            &self.leases().into_iter().flat_map(|l| l.mediated).map(|m| m.0).collect(),
        );
    }

    /// Looks at the overrides of leased devices, of whose changes the kernel does not report.
    pub fn look_at_overrides(self: &Arc<Self>) {
        let active = |lease: &Lease| lease.state == State::Active;
        for lease in self.leases().into_iter().filter(active) {
            let changed = |device: &PciAddress| {
                let now = Binding::read(self.host(), *device).ok();
                now.is_some_and(|now| {
                    let expected = lease.expected_override(*device).map(String::as_str);
                    !same_driver(now.driver_override.as_deref(), expected)
                })
            };
            let changed: Vec<PciAddress> = lease.devices.keys().copied().filter(changed).collect();
            if !changed.is_empty() {
                self.notice(changed);
            }
        }
    }

    pub(super) fn refresh(&self, addresses: impl IntoIterator<Item = PciAddress>) {
        for address in addresses {
            self.tell_all(self.look_at(address, Look::Again));
        }
    }

    /// Looks at a lease's functions after its steps, and anew at those that these made others of.
    /// What has changed is to be told with what becomes of the lease.
    #[must_use]
    pub(super) fn refresh_leased(&self, lease: &Lease) -> Vec<Change> {
        let steps = || lease.forward.iter().chain(&lease.backward).map(|recorded| &recorded.step);
        let look = |address| {
            let of_it = |step: &Step| step.device() == Some(address);
            match lease.override_read_back(address) {
                _ if steps().any(|step| of_it(step) && step.changes_configuration()) => Look::Anew,
                Some(driver_override) => Look::After(driver_override),
                None => Look::Again,
            }
        };
        let devices = lease.devices.keys();
        devices.flat_map(|address| self.look_at(*address, look(*address))).collect()
    }

    /// Looks at a function, and answers what is to be told of it.
    fn look_at(&self, address: PciAddress, kind: Look<'_>) -> Vec<Change> {
        let look = self.looks.fetch_add(1, Ordering::SeqCst);
        let anew = matches!(kind, Look::Anew);
        let driver_override = match kind {
            Look::After(driver_override) => Some(driver_override),
            Look::Anew | Look::Again => None,
        };
        let before = self.inventory().get(address).filter(|_| !anew).cloned();
        // Not under the lock: reading takes its time where the kernel does.
        let found = inventory::look(self.host(), address, before.as_deref(), driver_override);
        let mut data = self.data();
        // Somebody who looked later has told already.
        if data.looked.get(&address).is_some_and(|later| *later > look) {
            return Vec::new();
        }
        data.looked.insert(address, look);
        let before = data.inventory.get(address).cloned();
        Arc::make_mut(&mut data.inventory).put(address, found);
        let (change, regrouped) = match (&before, data.inventory.get(address)) {
            (None, None) => return Vec::new(),
            (None, Some(f)) => (Change::DeviceAdded(address), f.iommu_group.is_some()),
            (Some(f), None) => (Change::DeviceRemoved(address), f.iommu_group.is_some()),
            (Some(a), Some(b)) => {
                let changed = Property::changed(a, b);
                let regrouped = changed.contains(&Property::IommuGroup);
                if changed.is_empty() {
                    return Vec::new();
                }
                (Change::DeviceChanged(address, changed), regrouped)
            }
        };
        [change].into_iter().chain(regrouped.then_some(Change::GroupsChanged)).collect()
    }
}
