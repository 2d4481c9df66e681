//! From what is and what is asked to the steps that lead there, or the reasons not to.
//! Pure: reads nothing, changes nothing.

mod cleaning;
mod mediated;
mod policy;
mod reasons;
mod shaping;
mod virtual_functions;

pub use cleaning::{Care, Scrubbing, Scrubs, resets, scrubs};
pub use policy::{Kind, Lead, Standing, Unit, Wish, policy, policy_leads, policy_unit};
pub use virtual_functions::virtual_functions;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::address::PciAddress;
use crate::assigned::Assigned;
use crate::backend::{Maker, Offer};
use crate::error::ErrorKind;
use crate::inventory::{DriverSource, Inventory};
use crate::iommu::Isolation;
use crate::mediated::{Device, TypeName, Types, Uuid};
use crate::modalias;
use crate::pci::{Binding, Function};
use crate::policy::Resets;
use crate::protection::Use;
use crate::quirks;
use crate::scrub::{self, Scrubber};
use crate::shape::Shape;
use crate::step::{Step, Tunable};

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

/// Plans the attachment of a request's devices, or refuses with every reason there is.
pub fn attach(
    inventory: &Inventory,
    circumstances: &Circumstances,
    request: &Request,
) -> Result<Plan, Refusal> {
    let members = members(inventory, request);
    if let Some(refusal) = Refusal::new(refuse(inventory, circumstances, request, &members)) {
        return Err(refusal);
    }
    let mut plan = way(inventory, circumstances, request, &members);
    plan.steps.splice(0..0, for_the_time(circumstances, &members));
    Ok(plan)
}

/// Settings that functions have while they are leased: what they do not survive is not done to them,
/// and what may lose power when idle does not while a guest has it.
fn for_the_time(circumstances: &Circumstances, members: &Members<'_>) -> Vec<Step> {
    let awake = |function: &Function| {
        let device = function.address;
        let may = circumstances.rules.get(&device).is_some_and(|rule| rule.d3cold == Some(true));
        let does = circumstances.d3cold.get(&device) == Some(&true);
        let setting = Tunable::D3cold;
        let (from, to) = ("1".to_owned(), "0".to_owned());
        (may && does).then_some(Step::Tune { device, setting, from, to })
    };
    let settings = |function: &&Function| [cleaning::spared(function), awake(function)];
    members.taken.iter().flat_map(settings).flatten().collect()
}

/// Every reason there is against it.
fn refuse(
    inventory: &Inventory,
    circumstances: &Circumstances,
    request: &Request,
    members: &Members<'_>,
) -> Vec<Reason> {
    let mut found = mediated::refuse(inventory, circumstances, request);
    for function in &members.taken {
        found.extend(reasons::refuse_function(inventory, circumstances, request, function));
        found.extend(shaping::refuse(inventory, circumstances, request, function));
    }
    found.extend(shaping::refuse_all(circumstances, request, &members.taken));
    for sibling in &members.left {
        found.extend(reasons::refuse_sibling(inventory, circumstances, request, sibling));
    }
    found
}

/// How it would be done.
fn way(
    inventory: &Inventory,
    circumstances: &Circumstances,
    request: &Request,
    members: &Members<'_>,
) -> Plan {
    let shaped = |function: &Function| shaping::steps(circumstances, request, function);
    let mut plan = steps(inventory, members, request.shape.keeps_driver(), shaped);
    plan.steps.extend(mediated::steps(request));
    plan.mediated.clone_from(&request.mediated);
    // Root may open them as they are.
    if let Some(user) = request.node_access.filter(|user| *user != 0) {
        let functions = plan.devices.keys().copied().map(Assigned::from);
        let all = functions.chain(plan.mediated.keys().copied().map(Assigned::from));
        let access = |device| Step::NodeAccess { device, user, allowed: true };
        let access: Vec<Step> = all.map(access).collect();
        plan.steps.extend(access);
    }
    for function in &members.taken {
        plan.warnings.extend(reasons::warnings(circumstances, function));
        let told = |quirk: &quirks::Quirk| format!("{} {}", function.address, quirk.told());
        plan.warnings.extend(quirks::of(function).map(told));
    }
    let rule = |address| circumstances.rules.get(&address);
    plan.care = cleaning::care(inventory, &members.taken, rule);
    for (device, care) in &plan.care {
        if care.is_kept_for_tenant() {
            plan.warnings.push(format!(
                "{device} cannot be reset: after this lease only the same tenant may have it, until \
                 its quarantine is cleared"
            ));
        }
        plan.warnings
            .extend(care.weaker().map(|what| format!("after this lease of {device}, {what}")));
    }
    // A driver that there is not when the lease ends would leave what the tenant did.
    let erased = |care: &Care| care.scrub == Scrubbing::With(Scrubber::Nvme);
    if plan.care.values().any(erased) {
        plan.steps.insert(0, Step::LoadModule { module: "nvme".into() });
    }
    plan
}

/// What brings a driver that this kernel was built or packaged without.
pub(crate) fn full_modules(option: &str) -> String {
    format!(
        "install the package with the kernel's full modules (linux-image-amd64, not -cloud; \
         linux-modules-extra on Ubuntu) or build with {option}=m"
    )
}

/// What a request touches.
struct Members<'a> {
    /// Functions that change hands.
    taken: Vec<&'a Function>,
    /// Other members of their groups, which do not.
    left: Vec<&'a Function>,
    /// The groups' numbers.
    groups: Vec<u32>,
}

fn members<'a>(inventory: &'a Inventory, request: &Request) -> Members<'a> {
    let wanted = |f: &Function| {
        let one_device = request.devices.iter().any(|d| d.same_slot(f.address));
        request.devices.contains(&f.address) || one_device && f.physical().is_none()
    };
    let mut groups: Vec<u32> =
        request.devices.iter().filter_map(|d| inventory.get(*d)?.iommu_group).collect();
    groups.sort_unstable();
    groups.dedup();
    let in_groups = groups
        .iter()
        .filter_map(|number| inventory.group(*number))
        .flat_map(|group| &group.members)
        .filter_map(|address| inventory.get(*address).map(AsRef::as_ref));
    let (mut taken, left): (Vec<&Function>, Vec<&Function>) = in_groups
        .filter(|f| !f.is_bridge() || request.devices.contains(&f.address))
        .partition(|f| request.whole_group || wanted(f));
    let ungrouped = request.devices.iter().filter_map(|d| inventory.get(*d).map(AsRef::as_ref));
    taken.extend(ungrouped.filter(|f| f.iommu_group.is_none()));
    Members { taken, left, groups }
}

fn steps(
    inventory: &Inventory,
    members: &Members<'_>,
    stay: bool,
    shaped: impl Fn(&Function) -> Vec<Step>,
) -> Plan {
    let mut plan = Plan { groups: members.groups.clone(), ..Plan::default() };
    let mut modules = Vec::new();
    for function in &members.taken {
        plan.devices.insert(function.address, function.binding());
        if stay || function.on_vfio() {
            plan.steps.extend(shaped(function));
            continue;
        }
        let driver = vfio_driver(inventory, function);
        if driver.source != DriverSource::Registered && !modules.contains(&driver.module) {
            modules.push(driver.module.clone());
        }
        plan.steps.extend(transition(function, &driver.name, shaped(function)));
    }
    let load = modules.into_iter().map(|module| Step::LoadModule { module });
    plan.steps.splice(0..0, load);
    plan.steps.extend(members.groups.iter().map(|group| Step::CheckViable { group: *group }));
    plan.warnings.extend(warnings(inventory.platform.isolation));
    plan
}

/// The driver a function gets for its time with a guest.
struct VfioDriver {
    name: String,
    module: String,
    source: DriverSource,
}

/// The generic driver, or the variant the module tables name for this device, as libvirt chooses.
fn vfio_driver(inventory: &Inventory, function: &Function) -> VfioDriver {
    let variant = function
        .modalias
        .as_deref()
        .and_then(|alias| modalias::best_vfio_driver(&inventory.vfio_aliases, alias));
    match variant {
        Some(module) => VfioDriver {
            name: module.to_owned(),
            module: module.to_owned(),
            source: DriverSource::Module,
        },
        None => VfioDriver {
            name: "vfio-pci".into(),
            module: "vfio-pci".into(),
            source: inventory.vfio_pci,
        },
    }
}

/// From the function's driver to `target`, such that the inverses in reverse order lead back.
/// It is `shaped` while no driver has it, so that no driver of the host sees what is for a tenant.
fn transition(function: &Function, target: &str, shaped: Vec<Step>) -> Vec<Step> {
    let device = function.address;
    let mut steps = Vec::new();
    let mut before = function.driver_override.clone();
    if let Some(driver) = &function.driver {
        // A VF whose PF has autoprobe off is refused by every driver unless an override names it
        // (`pci_device_can_probe`, `drivers/pci/pci-driver.c`). It may be off by the time the VF
        // goes back, so that way has an override for a moment, whatever it is now.
        if before.is_none() && function.physical().is_some() {
            let to = Some(driver.clone());
            steps.push(Step::SetOverride { device, from: before, to: to.clone() });
            before = to;
        }
        if driver == "nvidia" {
            steps.push(Step::UnbindLock { device });
        }
        steps.push(Step::Unbind { device, driver: driver.clone() });
    }
    steps.extend(shaped);
    let to = Some(target.to_owned());
    if before != to {
        steps.push(Step::SetOverride { device, from: before, to });
    }
    steps.push(Step::Bind { device, driver: target.to_owned() });
    steps
}

fn warnings(isolation: Isolation) -> Option<String> {
    match isolation {
        Isolation::Full | Isolation::None => None,
        Isolation::NoInterruptRemapping => Some(
            "interrupts are not remapped: a hostile guest could forge them (enable interrupt \
             remapping in the firmware)"
                .into(),
        ),
        Isolation::AcsOverride => Some(
            "pcie_acs_override splits groups that the hardware does not keep apart: devices may \
             reach each other's memory"
                .into(),
        ),
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
