//! Who may be leased a group is decided for one caller at a time: the others wait, and then mostly
//! learn without a look at the host that somebody has it. Groups do not wait for each other.

use std::collections::BTreeSet;
use std::sync::PoisonError;

use libvfio::address::PciAddress;
use libvfio::mediated::TypeName;
use libvfio::plan::Request;

use super::Broker;

/// One caller's turn at the groups of a request, until it is dropped.
pub(super) struct Considering<'a> {
    broker: &'a Broker,
    functions: BTreeSet<PciAddress>,
}

impl Broker {
    /// Waits until nobody else is considered for any function of the request's groups.
    pub(super) fn consider(&self, request: &Request) -> Considering<'_> {
        let mut functions: BTreeSet<PciAddress> = request.devices.iter().copied().collect();
        // What becomes of a parent and of its parts is decided together.
        functions.extend(request.mediated.values().filter_map(TypeName::function));
        let inventory = self.inventory();
        let groups = request.devices.iter().filter_map(|device| inventory.group_of(*device));
        functions.extend(groups.flat_map(|group| &group.members));
        // All at once, so that two who want the same groups do not each wait for the other.
        let taken = |considered: &mut BTreeSet<PciAddress>| !considered.is_disjoint(&functions);
        let considered = self.considered.lock().unwrap_or_else(PoisonError::into_inner);
        let mut considered =
            self.decided.wait_while(considered, taken).unwrap_or_else(PoisonError::into_inner);
        considered.extend(&functions);
        drop(considered);
        Considering { broker: self, functions }
    }
}

impl Drop for Considering<'_> {
    fn drop(&mut self) {
        let mut considered = self.broker.considered.lock().unwrap_or_else(PoisonError::into_inner);
        considered.retain(|function| !self.functions.contains(function));
        self.broker.decided.notify_all();
    }
}
