//! The way of devices to a guest: which functions it concerns, what forbids it, and by which steps
//! they get there. Pure, as all of planning.

use super::cleaning::{self, Care, Scrubbing};
use super::{Circumstances, Plan, Reason, Refusal, Request, mediated, reasons, shaping};
use crate::assigned::Assigned;
use crate::inventory::{DriverSource, Inventory};
use crate::iommu::Isolation;
use crate::modalias;
use crate::pci::Function;
use crate::quirks;
use crate::scrub::Scrubber;
use crate::step::{Step, Tunable};

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
pub(super) fn refuse(
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
pub(super) fn way(
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
pub(super) struct Members<'a> {
    /// Functions that change hands.
    pub(super) taken: Vec<&'a Function>,
    /// Other members of their groups, which do not.
    left: Vec<&'a Function>,
    /// The groups' numbers.
    groups: Vec<u32>,
}

pub(super) fn members<'a>(inventory: &'a Inventory, request: &Request) -> Members<'a> {
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
