//! From what is and what is asked to the steps that lead there, or the reasons not to.
//! Pure: reads nothing, changes nothing.

mod attach;
mod cleaning;
mod mediated;
mod policy;
mod reasons;
mod shaping;
mod virtual_functions;

pub use attach::attach;
pub(crate) use attach::full_modules;
pub use cleaning::{Care, Scrubbing, Scrubs, resets, scrubs};
pub use policy::{Kind, Lead, Standing, Unit, Wish, policy, policy_leads, policy_unit};
pub use virtual_functions::virtual_functions;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::address::PciAddress;
use crate::backend::{Maker, Offer};
use crate::error::ErrorKind;
use crate::iommu::Isolation;
use crate::mediated::{Device, TypeName, Types, Uuid};
use crate::pci::{Binding, Function};
use crate::policy::Resets;
use crate::protection::Use;
use crate::scrub;
use crate::shape::Shape;
use crate::step::Step;

/// What is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// The functions meant. Other functions of the same devices that share their groups come
    /// along by themselves.
    pub devices: Vec<PciAddress>,
    /// Mediated devices to make.
    pub mediated: BTreeMap<Uuid, TypeName>,
    /// Take every member of the groups along, also those of other devices.
    pub whole_group: bool,
    /// Accept devices that somebody else has put on a VFIO driver.
    pub adopt: bool,
    /// Take also what the host cannot live without.
    pub allow_protected: bool,
    /// Settings of the virtual functions, for the time of the lease.
    pub shape: Shape,
    /// A user who may open the nodes, for the time of the lease.
    pub node_access: Option<u32>,
    /// Who is to have them, if that is known.
    pub tenant: Option<String>,
}

/// Who holds a device already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The lease's id.
    pub lease: String,
    /// Its tenant.
    pub tenant: String,
    /// Whether a step on its devices does not return.
    pub wedged: bool,
    /// What is being done, if it is no tenant's but the daemon's own.
    pub task: Option<String>,
}

/// What planning must know beside the inventory.
#[derive(Debug, Clone, Default)]
pub struct Circumstances {
    /// Leases in force, by function.
    pub claims: BTreeMap<PciAddress, Claim>,
    /// Physical functions whose autoprobe is off because they were given virtual ones.
    pub autoprobe_off: BTreeSet<PciAddress>,
    /// What can be set on virtual functions, and how it is.
    pub offers: BTreeMap<PciAddress, Vec<Offer>>,
    /// Physical functions whose virtual ones are made by others than the kernel alone.
    pub makers: BTreeMap<PciAddress, Maker>,
    /// Modules that the kernel's tables have for functions without a driver, where that matters.
    pub host_modules: BTreeMap<PciAddress, String>,
    /// What the host does with its devices, and which processes hold them.
    pub uses: Vec<Use>,
    /// Functions that are not trusted, and why.
    pub quarantined: BTreeMap<PciAddress, String>,
    /// Mediated devices there are, and those on their way.
    pub mediated: BTreeMap<Uuid, Device>,
    /// What can be made into mediated devices, with the types of those that were asked for.
    pub parents: BTreeMap<String, Types>,
    /// What the policy says of functions that it has in a pool.
    pub rules: BTreeMap<PciAddress, Rule>,
    /// Whether functions may lose power when idle, of those the policy says it of.
    pub d3cold: BTreeMap<PciAddress, bool>,
}

/// What the policy says of leasing a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The pool it is in.
    pub pool: String,
    /// Why it stays with the host, if it does.
    pub kept: Option<String>,
    /// Whether it is on VFIO by the policy's doing.
    pub on_vfio: bool,
    /// The weakest isolation that will do.
    pub isolation: Isolation,
    /// Whether the end of a lease takes a reset.
    pub reset: Resets,
    /// What clears its memory then.
    pub scrub: scrub::Rule,
    /// Whether it may lose power when idle.
    pub d3cold: Option<bool>,
}

impl Circumstances {
    fn of<'a>(&'a self, function: &'a Function) -> impl Iterator<Item = &'a Use> {
        self.uses.iter().filter(|found| found.function == function.address)
    }
}

/// The way from the host's drivers to a guest, for whole groups.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Each function that changes hands, and how it is bound before.
    pub devices: BTreeMap<PciAddress, Binding>,
    /// Each mediated device that is made.
    pub mediated: BTreeMap<Uuid, TypeName>,
    /// The groups that the functions make up.
    pub groups: Vec<u32>,
    /// What will be done, in this order.
    pub steps: Vec<Step>,
    /// How each function is cleaned afterwards.
    pub care: BTreeMap<PciAddress, Care>,
    /// What should be known but forbids nothing.
    pub warnings: Vec<String>,
}

/// One reason why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// What kind of refusal it makes.
    pub kind: ErrorKind,
    /// A stable word for programs: `leased`, `quarantined`, `sibling`, `held`, `in-use`.
    pub code: &'static str,
    /// The function or thing that stands in the way.
    pub object: String,
    /// Why, for people.
    pub text: String,
    /// What to do, for people.
    pub remedy: String,
}

/// A refusal: at least one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    reasons: Vec<Reason>,
}

impl Refusal {
    /// A refusal for `reasons`, weightiest first; `None` if there are none.
    pub fn new(mut reasons: Vec<Reason>) -> Option<Self> {
        reasons.sort_by_key(|reason| weight(reason.kind));
        (!reasons.is_empty()).then_some(Self { reasons })
    }

    /// The reasons, weightiest first.
    pub fn reasons(&self) -> &[Reason] {
        &self.reasons
    }

    /// The kind of the weightiest reason.
    pub fn kind(&self) -> ErrorKind {
        self.reasons.first().map_or(ErrorKind::Internal, |reason| reason.kind)
    }
}

/// What a caller can do least about comes first.
fn weight(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Unsupported => 0,
        ErrorKind::Wedged | ErrorKind::Quarantined => 1,
        ErrorKind::AlreadyLeased => 2,
        ErrorKind::Protected => 3,
        ErrorKind::NotViable => 4,
        _ => 5,
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, reason) in self.reasons.iter().enumerate() {
            let gap = if n == 0 { "" } else { "\n" };
            write!(f, "{gap}{reason}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Refusal {}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}; {}", self.object, self.text, self.remedy)
    }
}

/// The steps that give a plan's devices back: the inverses of what was done, last first.
pub fn undo<'a>(done: impl DoubleEndedIterator<Item = &'a Step>) -> Vec<Step> {
    done.rev().filter_map(Step::inverse).collect()
}

/// The steps from wherever a device is now to how it was before; none if it is so.
pub fn home(device: PciAddress, now: &Binding, before: &Binding) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut set = now.driver_override.clone();
    let mut set_to = |steps: &mut Vec<Step>, to: &Option<String>| {
        if set != *to {
            let from = std::mem::replace(&mut set, to.clone());
            steps.push(Step::SetOverride { device, from, to: to.clone() });
        }
    };
    if now.driver != before.driver {
        if let Some(driver) = now.driver.clone() {
            steps.extend((driver == "nvidia").then_some(Step::UnbindLock { device }));
            steps.push(Step::Unbind { device, driver });
        }
        if let Some(driver) = &before.driver {
            // No driver takes a device of another override, nor a VF without one and autoprobe.
            set_to(&mut steps, &before.driver);
            steps.push(Step::Bind { device, driver: driver.clone() });
        }
    }
    set_to(&mut steps, &before.driver_override);
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_reached_from_anywhere() {
        let device: PciAddress = "01:00.0".parse().unwrap();
        let found = |driver: Option<&str>, set: Option<&str>| Binding {
            driver: driver.map(str::to_owned),
            driver_override: set.map(str::to_owned),
        };
        let places = [None, Some("nvidia"), Some("vfio-pci")];
        for (was, was_set) in places.iter().flat_map(|was| places.map(|set| (*was, set))) {
            let before = found(was, was_set);
            for (driver, set) in places.iter().flat_map(|at| places.map(|set| (*at, set))) {
                let mut now = found(driver, set);
                for step in home(device, &now.clone(), &before) {
                    match step {
                        Step::Unbind { driver, .. } => assert_eq!(now.driver.take(), Some(driver)),
                        Step::SetOverride { from, to, .. } => {
                            assert_eq!(std::mem::replace(&mut now.driver_override, to), from);
                        }
                        Step::Bind { driver, .. } => {
                            assert_eq!(now.driver_override.as_ref(), Some(&driver));
                            assert_eq!(now.driver.replace(driver), None);
                        }
                        step => assert_eq!(step, Step::UnbindLock { device }),
                    }
                }
                assert_eq!(now, before);
            }
        }
    }
}
