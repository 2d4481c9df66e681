//! What is set on virtual functions of network cards while they are leased. Pure.

use super::{Circumstances, Reason, Request};
use crate::error::ErrorKind;
use crate::pci::Function;
use crate::step::Step;

/// Why a function cannot be given the settings that were asked for.
pub(super) fn refuse(
    circumstances: &Circumstances,
    request: &Request,
    function: &Function,
) -> Option<Reason> {
    let address = function.address;
    if request.shape.is_empty() || circumstances.shapes.contains_key(&address) {
        return None;
    }
    let text = match function.physical() {
        None => "is no virtual function, which alone can be given network settings".to_owned(),
        Some(physical) => {
            format!("cannot be given network settings: {physical} has no network interface")
        }
    };
    Some(Reason {
        kind: ErrorKind::Unsupported,
        code: "no-shape",
        object: address.to_string(),
        text,
        remedy: "lease it without them, or name a virtual function of a network card whose driver \
                 is loaded"
            .to_owned(),
    })
}

/// A step for each setting that is otherwise now: a driver may do one and not the next.
pub(super) fn steps(
    circumstances: &Circumstances,
    request: &Request,
    function: &Function,
) -> Vec<Step> {
    let Some(now) = circumstances.shapes.get(&function.address) else { return Vec::new() };
    let step = |wanted| {
        let (from, to) = now.towards(&wanted);
        let device = function.address;
        (!to.is_empty()).then_some(Step::Shape { device, from, to })
    };
    request.shape.each().into_iter().filter_map(step).collect()
}
