//! Mediated devices that are made for a lease, and functions that are not given away because of
//! some. Pure.

use super::reasons::leased;
use super::{Circumstances, Reason, Request};
use crate::address::PciAddress;
use crate::error::{ErrorKind, nearest};
use crate::inventory::Inventory;
use crate::mediated::{TypeName, Types};
use crate::step::Step;

/// What a guest can be given here.
const API: &str = "vfio-pci";

/// Why the mediated devices that were asked for cannot be made.
pub(super) fn refuse(
    inventory: &Inventory,
    circumstances: &Circumstances,
    request: &Request,
) -> Vec<Reason> {
    let mut kinds: Vec<&TypeName> = request.mediated.values().collect();
    kinds.sort_unstable();
    let refused = |same: &[&TypeName]| {
        refuse_parent(inventory, circumstances, same[0])
            .or_else(|| refuse_type(circumstances, same[0], same.len()))
    };
    kinds.chunk_by(PartialEq::eq).filter_map(refused).collect()
}

/// Makes them.
pub(super) fn steps(request: &Request) -> impl Iterator<Item = Step> {
    let make = |(uuid, of): (&_, &TypeName)| Step::CreateMediated { of: of.clone(), uuid: *uuid };
    request.mediated.iter().map(make)
}

fn reason(
    object: String,
    (kind, code): (ErrorKind, &'static str),
    text: &str,
    to_do: &str,
) -> Reason {
    Reason { kind, code, object, text: text.to_owned(), remedy: to_do.to_owned() }
}

fn refuse_parent(
    inventory: &Inventory,
    circumstances: &Circumstances,
    of: &TypeName,
) -> Option<Reason> {
    let object = || of.parent.clone();
    if let Some(address) = of.function() {
        if let Some(claim) = circumstances.claims.get(&address) {
            return Some(leased(address, claim));
        }
        if let Some(why) = circumstances.quarantined.get(&address) {
            let text = format!("is in quarantine: {why}");
            let to_do = format!("see to that, then 'vfioctl quarantine clear {address}'");
            return Some(reason(object(), (ErrorKind::Quarantined, "quarantined"), &text, &to_do));
        }
        if inventory.get(address).is_some_and(|function| function.stuck) {
            let text = "cannot be read: a kernel operation on it has not returned";
            let to_do = "see 'journalctl -k' for it; if it never returns, only a reboot helps";
            return Some(reason(object(), (ErrorKind::Wedged, "stuck"), text, to_do));
        }
    }
    if circumstances.parents.contains_key(&of.parent) {
        return None;
    }
    let to_do = "load the driver that does that; 'vfioctl mdev list' shows what can be";
    let to_do = meant(&of.parent, circumstances.parents.keys(), to_do);
    let text = "cannot be made into mediated devices";
    Some(reason(object(), (ErrorKind::NotFound, "no-parent"), text, &to_do))
}

fn refuse_type(circumstances: &Circumstances, of: &TypeName, count: usize) -> Option<Reason> {
    let types: &Types = circumstances.parents.get(&of.parent)?;
    let Some(kind) = types.get(&of.kind) else {
        let to_do = meant(&of.kind, types.keys(), "'vfioctl mdev list' shows its types");
        let text = format!("has no type of mediated devices {}", of.kind);
        return Some(reason(of.parent.clone(), (ErrorKind::NotFound, "no-type"), &text, &to_do));
    };
    if let Some(api) = kind.api.as_deref().filter(|api| *api != API) {
        let text = format!("makes devices for {api}, which no guest here can be given");
        let why = (ErrorKind::Unsupported, "no-pci");
        return Some(reason(of.to_string(), why, &text, "name a type for vfio-pci"));
    }
    let left = usize::try_from(kind.available).unwrap_or(usize::MAX);
    (left < count).then(|| {
        let text = format!("has room for {left} more, and {count} were asked for");
        let to_do = "ask for fewer, or wait until some are released ('vfioctl mdev list')";
        reason(of.to_string(), (ErrorKind::Busy, "no-instance"), &text, to_do)
    })
}

/// What to do, with what may have been meant.
fn meant<'a>(name: &str, known: impl Iterator<Item = &'a String>, to_do: &str) -> String {
    match nearest(name, known) {
        Some(known) => format!("did you mean {known}? {to_do}"),
        None => to_do.to_owned(),
    }
}

/// Why a function that was made into mediated devices stays with its driver.
pub(super) fn refuse_parted(circumstances: &Circumstances, address: PciAddress) -> Option<Reason> {
    let own = |of: &TypeName| of.function() == Some(address);
    let parts: Vec<String> = circumstances
        .mediated
        .iter()
        .filter(|(_, device)| own(&device.of))
        .map(|(uuid, _)| uuid.to_string())
        .collect();
    (!parts.is_empty()).then(|| {
        let text = format!("is the parent of mediated devices: {}", parts.join(", "));
        let to_do = "release them first ('vfioctl mdev list'), or remove those of no lease";
        reason(address.to_string(), (ErrorKind::Busy, "mediated"), &text, to_do)
    })
}
