//! Following the host: what the kernel reports, what a restart finds, and what both mean for
//! leases.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use libvfio::address::PciAddress;
use libvfio::pci::Identity;
use tracing::warn;

use super::leasing::all;
use super::{Broker, Change, Property};
use crate::history::Event;
use crate::lease::{Lease, State};
use crate::transition;

/// How long a device that changed under a lease is given before the lease is judged.
const SETTLING: Duration = Duration::from_millis(300);

impl Broker {
    /// Brings every lease found on start to a defined end: active ones stay if their devices are
    /// still what they were, all others are undone.
    pub fn recover(&self) {
        for lease in self.leases() {
            match lease.state {
                State::Failed => {}
                State::Active => {
                    if let Some(reason) = self.broken(&lease) {
                        self.fail(&lease.id, &reason);
                    }
                }
                State::Preparing | State::Releasing => {
                    let state = lease.state.name();
                    warn!(lease = lease.id, state, "a lease was interrupted and is undone");
                    let way = lease.way_back();
                    let mut lease = Lease { state: State::Releasing, ..lease };
                    if lease.backward.is_empty() {
                        lease.backward = way;
                    }
                    let failures = transition::backward(&self.host, &self.ledger, &mut lease);
                    let reason = format!("the daemon stopped while it was {state}");
                    self.note(&lease, Event::Recovered, &reason);
                    self.close(lease, &failures, Some(&reason));
                }
            }
        }
    }

    /// Why an active lease no longer is what it says, if so.
    fn broken(&self, lease: &Lease) -> Option<String> {
        let inventory = self.inventory();
        lease.devices.iter().find_map(|(address, found)| match inventory.get(*address) {
            None => Some(format!("{address} was unplugged")),
            // On its way out, the kernel still has the function but nothing to say of it.
            Some(f) if f.ids.vendor.is_none() || f.is_silent() => {
                Some(format!("{address} was unplugged or stopped answering"))
            }
            Some(f) if Identity::of(f) != found.identity => {
                Some(format!("another device is at {address} now"))
            }
            Some(f) if !f.on_vfio() => Some(format!(
                "{address} was taken from VFIO by somebody else and is on {} now",
                f.driver.as_deref().unwrap_or("no driver")
            )),
            Some(_) => None,
        })
    }

    /// Ends a lease that lost a device: what is left of it goes back to the host.
    fn fail(&self, id: &str, reason: &str) {
        let mut lease = {
            let mut data = self.data();
            // A release may have begun since the device was looked at; it has the lease then.
            let Some(lease) = data.leases.get_mut(id).filter(|l| l.state == State::Active) else {
                return;
            };
            lease.state = State::Releasing;
            lease.clone()
        };
        warn!(lease = id, tenant = lease.tenant, reason, "a lease failed");
        self.refresh(lease.devices.keys().copied());
        let inventory = self.inventory();
        let ours = |device: PciAddress| {
            let now = inventory.get(device);
            now.is_some_and(|f| Identity::of(f) == lease.devices[&device].identity && f.on_vfio())
        };
        let way = lease.way_back().into_iter().filter(|r| r.step.device().is_some_and(ours));
        lease.backward = way.collect();
        let failures = transition::backward(&self.host, &self.ledger, &mut lease);
        lease.reason = Some(match failures.as_slice() {
            [] => reason.to_owned(),
            failures => format!("{reason}; {}", all(failures)),
        });
        self.note(&lease, Event::Failed, lease.reason.as_deref().unwrap_or(reason));
        self.record_failure(lease);
    }

    /// Looks at functions the kernel reported a change of, and at what that means for leases.
    /// Takes a moment where a lease may be broken, so it is for the thread that follows events.
    pub fn notice(&self, addresses: impl IntoIterator<Item = PciAddress>) {
        let mut addresses: BTreeSet<PciAddress> = addresses.into_iter().collect();
        // Whoever moves a device looks at it when it has arrived.
        for lease in self.leases() {
            if matches!(lease.state, State::Preparing | State::Releasing) {
                addresses.retain(|address| !lease.devices.contains_key(address));
            }
        }
        self.refresh(addresses.iter().copied());
        let concerned = |lease: &Lease| {
            lease.state == State::Active
                && lease.devices.keys().any(|device| addresses.contains(device))
        };
        let leases: Vec<Lease> = self.leases().into_iter().filter(concerned).collect();
        if leases.iter().any(|lease| self.broken(lease).is_some()) {
            // Unplugging takes a device from its driver first: what happened is clear soon after.
            std::thread::sleep(SETTLING);
            self.refresh(addresses.iter().copied());
        }
        for lease in leases {
            if let Some(reason) = self.broken(&lease) {
                self.fail(&lease.id, &reason);
            }
        }
    }

    /// Looks at the whole host again, after reports of changes were lost.
    pub fn resynchronise(&self) {
        let known = self.inventory();
        let now = self.host.sys("bus/pci/devices").list().unwrap_or_default();
        let now = now.iter().filter_map(|name| name.parse().ok());
        self.notice(known.functions().map(|f| f.address).chain(now).collect::<BTreeSet<_>>());
    }

    pub(super) fn refresh(&self, addresses: impl IntoIterator<Item = PciAddress>) {
        for address in addresses {
            let change = {
                let mut data = self.data();
                let before = data.inventory.get(address).cloned();
                Arc::make_mut(&mut data.inventory).refresh(&self.host, address);
                let after = data.inventory.get(address);
                match (&before, after) {
                    (None, None) => None,
                    (None, Some(f)) => {
                        Some((Change::DeviceAdded(address), f.iommu_group.is_some()))
                    }
                    (Some(f), None) => {
                        Some((Change::DeviceRemoved(address), f.iommu_group.is_some()))
                    }
                    (Some(a), Some(b)) => {
                        let changed = Property::changed(a, b);
                        let regrouped = changed.contains(&Property::IommuGroup);
                        (!changed.is_empty())
                            .then_some((Change::DeviceChanged(address, changed), regrouped))
                    }
                }
            };
            if let Some((change, regrouped)) = change {
                self.tell(change);
                if regrouped {
                    self.tell(Change::GroupsChanged);
                }
            }
        }
    }
}
