//! What is set on virtual functions while they are leased. Pure.

use std::collections::BTreeMap;

use super::{Circumstances, Reason, Request};
use crate::backend::Offer;
use crate::error::ErrorKind;
use crate::inventory::Inventory;
use crate::pci::Function;
use crate::shape::{Capability, Limits, Setting, Value};
use crate::step::Step;

/// Why a function cannot be given the settings that were asked for.
pub(super) fn refuse(
    inventory: &Inventory,
    circumstances: &Circumstances,
    request: &Request,
    function: &Function,
) -> Vec<Reason> {
    let reason = |kind, code, text, remedy| Reason {
        kind,
        code,
        object: function.address.to_string(),
        text,
        remedy,
    };
    let mut reasons = Vec::new();
    for (setting, wanted) in request.shape.each() {
        let label = setting.label();
        let Some(offer) = offer(circumstances, function, setting) else {
            let (text, remedy) = lacking(inventory, function, setting);
            reasons.push(reason(ErrorKind::Unsupported, "no-shape", text, remedy));
            continue;
        };
        if !offer.admits(wanted) {
            let text = format!("cannot have {label} {wanted}");
            let remedy = match offer.allowed() {
                none if none.is_empty() => "none is left to be had: see its siblings".to_owned(),
                allowed => format!("its {label} may be {allowed}"),
            };
            let kind = match offer.limits {
                Limits::Fixed => ErrorKind::Unsupported,
                _ => ErrorKind::InvalidArgument,
            };
            reasons.push(reason(kind, "shape-limits", text, remedy));
        } else if setting.needs_no_driver() && function.on_vfio() && offer.value != *wanted {
            let text = format!("is on a driver, and its {label} change without one only");
            let remedy = format!("adopt it without {label}, or release it where it was bound");
            reasons.push(reason(ErrorKind::Busy, "bound", text, remedy));
        }
    }
    let typed = Setting::VgpuType;
    if let Some(offer) = offer(circumstances, function, typed)
        && request.shape.get(typed).is_none()
        && !function.on_vfio()
    {
        let text = "goes to a guest with a vGPU type only".to_owned();
        let remedy = format!("choose one with --vgpu-type: {}", offer.allowed());
        reasons.push(reason(ErrorKind::Unsupported, "no-vgpu-type", text, remedy));
    }
    reasons
}

/// Why together they ask for more than their physical functions have to share out.
pub(super) fn refuse_all(
    circumstances: &Circumstances,
    request: &Request,
    functions: &[&Function],
) -> Vec<Reason> {
    let mut reasons = Vec::new();
    for (setting, wanted) in request.shape.each() {
        let Value::Number(wanted) = wanted else { continue };
        // By physical function: how much more they want, and what there is.
        let mut wishes = BTreeMap::new();
        for function in functions {
            let offer = offer(circumstances, function, setting);
            let physical = function.physical();
            let (Some(Capability { value: Value::Number(now), limits, .. }), Some(physical)) =
                (offer, physical)
            else {
                continue;
            };
            let Limits::Share { spare, .. } = limits else { continue };
            let wish = wishes.entry(physical).or_insert((0u64, *spare));
            wish.0 = wish.0.saturating_add(wanted.saturating_sub(*now));
        }
        for (physical, (more, spare)) in
            wishes.into_iter().filter(|(_, (more, spare))| more > spare)
        {
            let label = setting.label();
            reasons.push(Reason {
                kind: ErrorKind::InvalidArgument,
                code: "shape-limits",
                object: physical.to_string(),
                text: format!(
                    "has {spare} {label} left to share out, and {more} more were asked for"
                ),
                remedy: "ask for fewer, or for fewer virtual functions".to_owned(),
            });
        }
    }
    reasons
}

fn offer<'a>(
    circumstances: &'a Circumstances,
    function: &Function,
    setting: Setting,
) -> Option<&'a Capability> {
    let offers: &[Offer] = circumstances.offers.get(&function.address)?;
    offers.iter().map(|offer| &offer.capability).find(|offer| offer.setting == setting)
}

/// Why nobody offers a setting for a function, and what to do.
fn lacking(inventory: &Inventory, function: &Function, setting: Setting) -> (String, String) {
    let label = setting.label();
    let Some(physical) = function.physical() else {
        let text = format!("is no virtual function, which alone can be given {label}");
        return (text, "lease it without, or name a virtual function".to_owned());
    };
    let driver = inventory.get(physical).and_then(|f| f.driver.clone());
    let driver = driver.unwrap_or_else(|| "no driver".to_owned());
    let why = match setting {
        Setting::Mac
        | Setting::Vlan
        | Setting::SpoofCheck
        | Setting::Trust
        | Setting::Link
        | Setting::MaxRate => format!("{physical} has no network interface"),
        Setting::Msix => format!("{physical}, on {driver}, shares no interrupt vectors out"),
        Setting::ExecQuantum
        | Setting::PreemptTimeout
        | Setting::SchedPriority
        | Setting::VramQuota => {
            format!("{physical}, on {driver}, has no such file in sriov_admin, as xe's have")
        }
        Setting::VgpuType | Setting::VgpuParams => {
            "it has no vGPU types, as those on NVIDIA's vGPU driver have".to_owned()
        }
    };
    let text = format!("cannot be given {label}: {why}");
    let remedy = "lease it without; 'vfioctl vf show' has what a virtual function can be given";
    (text, remedy.to_owned())
}

/// A step for each setting that is otherwise now.
pub(super) fn steps(
    circumstances: &Circumstances,
    request: &Request,
    function: &Function,
) -> Vec<Step> {
    let device = function.address;
    let step = |(setting, wanted): (Setting, &Value)| {
        let now = &offer(circumstances, function, setting)?.value;
        let (from, to) = (now.clone(), wanted.clone());
        (from != to).then_some(Step::Shape { device, setting, from, to })
    };
    request.shape.each().filter_map(step).collect()
}
