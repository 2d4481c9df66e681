//! Leases whose newest record is lost. Pure: from the record before it and the kernel as it is to
//! the lease that the lost record must have been about.

use std::collections::BTreeMap;

use libvfio::inventory::Inventory;
use libvfio::mediated::{Device, Uuid};
use libvfio::modalias::same_driver;
use libvfio::pci::{Function, Identity};
use libvfio::step::{Outcome, Step};

use crate::lease::{Lease, Recorded, State};

/// Brings a lease up to date by the kernel. Between two writes there is one step, so one that may
/// have been recorded as done and the one after it that may have begun. When in doubt a lease
/// stays, for a guest may be using its devices.
pub(super) fn caught_up(
    mut lease: Lease,
    inventory: &Inventory,
    mediated: &BTreeMap<Uuid, Device>,
) -> Lease {
    let function = |address| inventory.get(address).map(AsRef::as_ref);
    let ready = |f: &Function| f.on_vfio() && Identity::of(f) == lease.devices[&f.address].identity;
    let all_made = lease.mediated.keys().all(|uuid| mediated.contains_key(uuid));
    let all_ready =
        all_made && lease.devices.keys().all(|address| function(*address).is_some_and(ready));
    let unknown: Vec<usize> =
        (0..lease.forward.len()).filter(|at| lease.forward[*at].outcome.is_none()).collect();
    match (lease.state, unknown.as_slice()) {
        // A task of the daemon's own is never active: it is undone, and done again if it is wanted.
        (State::Preparing, [] | [_]) if all_ready && lease.task.is_none() => {
            for at in unknown {
                lease.forward[at].outcome = Some(Outcome::AlreadySo);
            }
            lease.state = State::Active;
        }
        (State::Preparing, [at, rest @ ..]) => {
            // Taking a device from VFIO that never came there would be a failure.
            let next = rest.first().map(|next| &lease.forward[*next].step);
            let begun = match (&lease.forward[*at].step, next) {
                (_, Some(Step::Bind { device, .. })) => {
                    function(*device).is_some_and(Function::on_vfio)
                }
                (step @ Step::SetVirtualFunctions { .. }, next) => {
                    next.is_some() && numbered(inventory, step, next)
                }
                (_, next) => next.is_some(),
            };
            if begun {
                lease.forward[*at].outcome = Some(Outcome::AlreadySo);
            }
        }
        // Without a device that is gone, only a release takes others from VFIO.
        (State::Active, _) if !all_ready && all_there(&lease, inventory) => {
            lease.state = State::Releasing;
        }
        (State::Releasing, _) => {
            let next = lease.backward.iter().position(|recorded| recorded.outcome.is_none());
            let after = |at: usize| lease.backward.get(at + 1).map(|recorded| &recorded.step);
            let home = |at: &usize| match &lease.backward[*at].step {
                // It may be on its way through a host driver, and back.
                Step::Unbind { device, driver } => function(*device)
                    .is_some_and(|f| !same_driver(f.driver.as_deref(), Some(driver))),
                step => numbered(inventory, step, after(*at)),
            };
            // One that has left the driver it was cleared on may not be clear, for all that is known: it
            // goes back there, to be cleared once more.
            let return_to = |at: usize| match (&lease.backward[at].step, after(at)?) {
                (Step::Scrub { device, .. }, left @ Step::Unbind { device: of, driver })
                    if device == of =>
                {
                    let now = function(*device)?.driver.as_deref();
                    let has_left = !same_driver(now, Some(driver));
                    has_left.then(|| left.inverse()).flatten().map(|bind| (at, bind))
                }
                _ => None,
            };
            if let Some((at, bind)) = next.and_then(return_to) {
                lease.backward.splice(at..at, Recorded::todo([bind]));
            } else if let Some(at) = next.filter(home) {
                lease.backward[at].outcome = Some(Outcome::AlreadySo);
            }
        }
        _ => {}
    }
    lease
}

/// Whether a change of a number of virtual functions, or the one after it, has happened: from where the
/// second leads, there is no way back to before the first but by both.
fn numbered(inventory: &Inventory, step: &Step, next: Option<&Step>) -> bool {
    let Step::SetVirtualFunctions { device, to, .. } = step else { return false };
    let now = inventory.get(*device).map(|f| f.enabled_vfs());
    let later = match next {
        Some(Step::SetVirtualFunctions { to, .. }) => Some(*to),
        _ => None,
    };
    now.is_some() && (now == Some(*to) || now == later)
}

fn all_there(lease: &Lease, inventory: &Inventory) -> bool {
    lease.devices.iter().all(|(address, found)| {
        inventory.get(*address).is_some_and(|f| Identity::of(f) == found.identity)
    })
}
