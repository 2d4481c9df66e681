//! How a physical function gets another number of virtual functions. Pure.
//!
//! The kernel removes all before it makes others (`sriov_numvfs_store`,
//! `drivers/pci/pci-sysfs.c`), so any use of any of them forbids it.

use super::mediated::refuse_parted;
use super::reasons::{leased, uses};
use super::{Circumstances, Plan, Reason, Refusal, Request};
use crate::address::PciAddress;
use crate::backend::Maker;
use crate::error::ErrorKind;
use crate::inventory::Inventory;
use crate::pci::{Function, Sriov};
use crate::step::Step;

/// Plans the change of a physical function's number of virtual functions to `count`, or refuses
/// with every reason there is. Without a step where the number is that already.
pub fn virtual_functions(
    inventory: &Inventory,
    circumstances: &Circumstances,
    physical: PciAddress,
    count: u16,
) -> Result<Plan, Refusal> {
    let (plan, reasons) = consider(inventory, circumstances, physical, count);
    Refusal::new(reasons).map_or(Ok(plan), Err)
}

/// How it would be done, and every reason against it.
pub(super) fn consider(
    inventory: &Inventory,
    circumstances: &Circumstances,
    physical: PciAddress,
    count: u16,
) -> (Plan, Vec<Reason>) {
    let mut plan = Plan::default();
    let Some(function) = inventory.get(physical) else { return (plan, Vec::new()) };
    let mut reasons = refuse_physical(circumstances, function, count);
    let (enabled, autoprobe) = match function.sriov {
        Sriov::Physical { enabled, autoprobe, .. } => (enabled, autoprobe),
        _ => (0, false),
    };
    let virtuals: Vec<&Function> = inventory
        .virtual_functions(physical)
        .into_iter()
        .filter_map(|(_, address)| inventory.get(address).map(AsRef::as_ref))
        .collect();
    if enabled != count {
        reasons.extend(virtuals.iter().flat_map(|vf| refuse_virtual(circumstances, vf)));
    }
    if enabled == count {
        return (plan, reasons);
    }
    let members = virtuals.into_iter().chain([function.as_ref()]);
    plan.devices = members.map(|f| (f.address, f.binding())).collect();
    let ours = circumstances.autoprobe_off.contains(&physical);
    plan.steps = match circumstances.makers.get(&physical).copied().unwrap_or_default() {
        Maker::Kernel => steps(physical, (enabled, count), autoprobe, ours),
        by @ Maker::SriovManage => numbers(physical, (enabled, count), by),
    };
    (plan, reasons)
}

/// Host drivers are kept from the functions for as long as there are any: each would be probed, now or
/// when its module comes, and taken from its driver again for a guest. `ours` says that autoprobe is
/// off because of that.
fn steps(device: PciAddress, (from, to): (u16, u16), autoprobe: bool, ours: bool) -> Vec<Step> {
    let mut steps = Vec::new();
    if autoprobe && to > 0 {
        steps.push(Step::SetAutoprobe { device, from: true, to: false });
    }
    steps.extend(numbers(device, (from, to), Maker::Kernel));
    if !autoprobe && ours && to == 0 {
        steps.push(Step::SetAutoprobe { device, from: false, to: true });
    }
    steps
}

/// From one number to another, by way of none.
fn numbers(device: PciAddress, (from, to): (u16, u16), by: Maker) -> Vec<Step> {
    let step = |from, to| Step::SetVirtualFunctions { device, from, to, by };
    if from > 0 && to > 0 { vec![step(from, 0), step(0, to)] } else { vec![step(from, to)] }
}

/// Why a function cannot have that many.
fn refuse_physical(circumstances: &Circumstances, function: &Function, count: u16) -> Vec<Reason> {
    let address = function.address;
    let reason = |kind, code, text: String, remedy: &str| Reason {
        kind,
        code,
        object: address.to_string(),
        text,
        remedy: remedy.to_owned(),
    };
    let total = match function.sriov {
        Sriov::Physical { total, .. } => total,
        Sriov::Virtual { physical } => {
            let text = format!("is a virtual function of {physical} itself");
            let remedy = format!("name {physical}");
            return vec![reason(ErrorKind::Unsupported, "no-sriov", text, &remedy)];
        }
        Sriov::None => {
            let text = "cannot have virtual functions".to_owned();
            let remedy = "name a function with SR-IOV; 'vfioctl vf list' has them";
            return vec![reason(ErrorKind::Unsupported, "no-sriov", text, remedy)];
        }
    };
    if let Some(claim) = circumstances.claims.get(&address) {
        return vec![leased(address, claim)];
    }
    let mut reasons = Vec::new();
    if function.stuck {
        let text = "cannot be read: a kernel operation on it has not returned".to_owned();
        let remedy = "see 'journalctl -k' for it; if it never returns, only a reboot helps";
        reasons.push(reason(ErrorKind::Wedged, "stuck", text, remedy));
    }
    if count > total {
        let text = format!("can have {total} virtual functions, not {count}");
        let remedy = format!("ask for 0 to {total}");
        reasons.push(reason(ErrorKind::InvalidArgument, "too-many", text, &remedy));
    }
    let all_or_none = circumstances.makers.get(&address) == Some(&Maker::SriovManage);
    if all_or_none && (1..total).contains(&count) {
        let text = format!("can have {total} virtual functions or none, not {count}");
        let remedy = format!("ask for 0 or {total}: NVIDIA's sriov-manage knows no other number");
        reasons.push(reason(ErrorKind::InvalidArgument, "too-few", text, &remedy));
    }
    if count > 0
        && let Some(why) = circumstances.quarantined.get(&address)
    {
        let text = format!("is in quarantine: {why}");
        let remedy = format!("see to that, then 'vfioctl quarantine clear {address}'");
        reasons.push(reason(ErrorKind::Quarantined, "quarantined", text, &remedy));
    }
    if function.on_vfio() {
        let text = "is on VFIO itself, put there by somebody else".to_owned();
        let remedy = "release it where it was bound";
        reasons.push(reason(ErrorKind::Busy, "external", text, remedy));
    } else if function.driver.is_none() {
        let text = "is on no driver, and only its driver makes virtual functions".to_owned();
        let module = circumstances.host_modules.get(&address);
        let load = module.map_or_else(
            || "load the module of its driver".to_owned(),
            |module| format!("load its driver ('modprobe {module}')"),
        );
        let remedy =
            format!("{load}; if that is there, 'echo {address} > /sys/bus/pci/drivers_probe'");
        reasons.push(reason(ErrorKind::Unsupported, "no-driver", text, &remedy));
    }
    reasons
}

/// Why a virtual function has to stay.
fn refuse_virtual(circumstances: &Circumstances, function: &Function) -> Vec<Reason> {
    let address = function.address;
    if let Some(claim) = circumstances.claims.get(&address) {
        return vec![leased(address, claim)];
    }
    let mut reasons: Vec<Reason> = uses(circumstances, &Request::default(), function).collect();
    reasons.extend(refuse_parted(circumstances, address));
    let ours = circumstances.rules.get(&address).is_some_and(|rule| rule.on_vfio);
    if function.on_vfio() && !ours {
        reasons.push(Reason {
            kind: ErrorKind::Busy,
            code: "external",
            object: address.to_string(),
            text: "is on VFIO, put there by somebody else: a guest may be using it".to_owned(),
            remedy: "release it where it was bound (driverctl, libvirt)".to_owned(),
        });
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(from: u16, to: u16, autoprobe: bool, ours: bool) -> Vec<String> {
        let steps = steps("01:00.0".parse().unwrap(), (from, to), autoprobe, ours);
        let undone: Vec<Option<Step>> = steps.iter().map(Step::inverse).collect();
        assert!(undone.iter().all(Option::is_some), "every step has a way back");
        steps.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn host_drivers_are_kept_away_until_the_last_has_gone() {
        let steps = said(0, 4, true, false);
        assert!(steps.len() == 2 && steps[0].starts_with("keep"), "{steps:?}");
        assert_eq!(said(0, 4, false, true).len(), 1);
        let steps = said(4, 0, false, true);
        assert!(steps.len() == 2 && steps[1].starts_with("offer"), "{steps:?}");
        assert_eq!(said(4, 0, false, false).len(), 1, "who turned it off may want it so");
        assert_eq!(said(4, 0, true, false).len(), 1);
    }

    #[test]
    fn another_number_takes_all_away_first() {
        let steps = said(7, 3, false, true);
        assert!(steps[0].contains("remove all") && steps[1].contains("make 3"), "{steps:?}");
    }
}
