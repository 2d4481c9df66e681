//! What leaves nothing of a tenant in functions that leave VFIO. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::address::PciAddress;
use crate::inventory::Inventory;
use crate::modalias::same_driver;
use crate::pci::Function;
use crate::policy::Resets;
use crate::quirks;
use crate::scrub::{self, ReadBack, Scrubber};
use crate::step::{Step, Tunable};

/// How a function is cleaned when its lease ends. Decided when that is made, so that who leases
/// knows, and nobody changes it meanwhile.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Care {
    /// Whether that takes a reset.
    pub reset: Resets,
    /// The method it would be reset by, `bus` with all that are on its bus; none if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub way: Option<String>,
    /// What becomes of its memory.
    pub scrub: Scrubbing,
}

/// What becomes of a function's memory when its lease ends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scrubbing {
    /// Nothing: it is not known how to clear it.
    #[default]
    Unknown,
    /// Nothing: the policy says so.
    None,
    /// It is cleared.
    With(Scrubber),
}

impl Care {
    /// The word for what becomes of its memory.
    pub fn scrub_name(&self) -> &'static str {
        match &self.scrub {
            Scrubbing::Unknown => "unknown",
            Scrubbing::None => "none",
            Scrubbing::With(scrubber) => scrubber.name(),
        }
    }

    /// Whether nobody but the same tenant may have it afterwards.
    pub fn is_kept_for_tenant(&self) -> bool {
        self.reset == Resets::Required && self.way.is_none()
    }

    /// In what it is weaker than it would be without a policy, if it is.
    pub fn weaker(&self) -> Option<String> {
        let reset = match (self.reset, &self.way) {
            (Resets::None, _) => Some("it is not reset, by the policy"),
            (Resets::IfPossible, None) => {
                Some("it cannot be reset, and goes to anybody all the same")
            }
            _ => None,
        };
        let scrub = match &self.scrub {
            Scrubbing::None => Some("its memory is not cleared, by the policy"),
            Scrubbing::With(Scrubber::BarZero { read_back: ReadBack::Sampled, .. }) => {
                Some("of its memory, once cleared, only samples are read back, by the policy")
            }
            _ => None,
        };
        let all: Vec<&str> = reset.into_iter().chain(scrub).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }
}

/// How `functions`, which are leased together, are cleaned after that. One that the policy has
/// scrubbed otherwise than can be is refused elsewhere.
pub(super) fn care<'a>(
    inventory: &Inventory,
    functions: &[&Function],
    rule: impl Fn(PciAddress) -> Option<&'a super::Rule>,
) -> BTreeMap<PciAddress, Care> {
    let devices = functions.iter().map(|f| f.address).collect();
    let resets = ways(inventory, &devices, |_| true);
    let care = |function: &&Function| {
        let address = function.address;
        let (reset, scrub) = match rule(address) {
            Some(rule) => (rule.reset, rule.scrub.clone()),
            None => (Resets::default(), scrub::Rule::default()),
        };
        let way = resets.iter().find_map(|step| match step {
            Step::Reset { with, .. } if with.contains(&address) => Some("bus"),
            Step::Reset { device, with } if *device == address && !with.is_empty() => Some("bus"),
            Step::Reset { device, .. } if *device == address => {
                quirks::methods(function).first().copied()
            }
            _ => None,
        });
        let scrub = match (scrub.for_function(function), scrub) {
            (Ok(Some(scrubber)), _) => Scrubbing::With(scrubber),
            (_, scrub::Rule::None) => Scrubbing::None,
            _ => Scrubbing::Unknown,
        };
        (address, Care { reset, way: way.map(str::to_owned), scrub })
    };
    functions.iter().map(care).collect()
}

/// What keeps the kernel, and VFIO in it, from reset methods that a function does not survive, for the
/// time of a lease. Where it has no others, nothing does.
pub(super) fn spared(function: &Function) -> Option<Step> {
    let (from, to) = (function.reset_methods.join(" "), quirks::methods(function).join(" "));
    let (device, setting) = (function.address, Tunable::ResetMethod);
    (from != to && !to.is_empty()).then_some(Step::Tune { device, setting, from, to })
}

/// The resets of those `devices` that are on VFIO, as few as do: by its own means where a function
/// has some, else by its bus if all on that are among them. One that cannot be reset has none.
pub fn resets(inventory: &Inventory, devices: &BTreeSet<PciAddress>) -> Vec<Step> {
    ways(inventory, devices, Function::on_vfio)
}

/// The same of those that are `ready`.
fn ways(
    inventory: &Inventory,
    devices: &BTreeSet<PciAddress>,
    ready: impl Fn(&Function) -> bool,
) -> Vec<Step> {
    let ours = |address: &PciAddress| inventory.get(*address).filter(|f| ready(f));
    let mut steps = Vec::new();
    let mut covered: BTreeSet<PciAddress> = BTreeSet::new();
    for function in devices.iter().filter_map(ours).filter(|f| !by_itself(inventory, f)) {
        let bus = on_bus(inventory, function);
        // What is alone on its bus has that among its own means, or must not be reset by it.
        let can = bus.len() > 1
            && !function.upstream.is_empty()
            && function.physical().is_none()
            && !quirks::of(function).any(|quirk| quirk.avoid.contains(&"bus"))
            && bus.iter().all(|address| {
                devices.contains(address) && ours(address).is_some_and(|f| !f.is_bridge())
            });
        if can && !covered.contains(&function.address) {
            let with = bus.iter().copied().filter(|other| *other != function.address).collect();
            steps.push(Step::Reset { device: function.address, with });
            covered.extend(bus);
        }
    }
    let alone = devices.iter().filter_map(ours).filter(|f| by_itself(inventory, f));
    let alone = alone.filter(|f| !covered.contains(&f.address));
    steps.extend(alone.map(|f| Step::Reset { device: f.address, with: Vec::new() }));
    steps
}

/// What clears the memory of those functions that are on VFIO, as was decided: before they go to
/// where they are `at_home`, and once they are there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scrubs {
    /// First of those that stay on VFIO meanwhile, then of those that a host driver has, and VFIO
    /// again.
    pub before: Vec<Step>,
    /// Of those whose home is the host driver that it takes.
    pub after: Vec<Step>,
}

/// See [`Scrubs`].
pub fn scrubs<'a>(
    inventory: &Inventory,
    care: &BTreeMap<PciAddress, Care>,
    at_home: impl Fn(PciAddress) -> Option<&'a str>,
) -> Scrubs {
    let (mut scrubs, mut away) = (Scrubs::default(), Vec::new());
    for (address, care) in care {
        let function = inventory.get(*address).filter(|f| f.on_vfio());
        let (Some(function), Scrubbing::With(scrubber)) = (function, &care.scrub) else { continue };
        let step = Step::Scrub { device: *address, with: scrubber.clone() };
        match scrubber.driver() {
            None => scrubs.before.push(step),
            Some(driver) if same_driver(at_home(*address), Some(driver)) => scrubs.after.push(step),
            Some(driver) => away.extend(detour(function, driver, step)),
        }
    }
    scrubs.before.extend(away);
    scrubs
}

/// A step on a host driver, from VFIO and back to it.
fn detour(function: &Function, driver: &str, step: Step) -> Vec<Step> {
    let (device, vfio) = (function.address, function.driver.clone());
    let (before, meanwhile) = (function.driver_override.clone(), Some(driver.to_owned()));
    let mut steps = Vec::new();
    steps.extend(vfio.clone().map(|driver| Step::Unbind { device, driver }));
    steps.push(Step::SetOverride { device, from: before.clone(), to: meanwhile.clone() });
    steps.push(Step::Bind { device, driver: driver.to_owned() });
    steps.push(step);
    steps.extend((driver == "nvidia").then_some(Step::UnbindLock { device }));
    steps.push(Step::Unbind { device, driver: driver.to_owned() });
    steps.push(Step::SetOverride { device, from: meanwhile, to: before });
    steps.extend(vfio.map(|driver| Step::Bind { device, driver }));
    steps
}

/// Whether the kernel can reset a function and no other. By its bus it does so only where nothing
/// else is on that (`pci_parent_bus_reset`, `drivers/pci/pci.c`).
fn by_itself(inventory: &Inventory, function: &Function) -> bool {
    let by_bus = |method: &&str| matches!(*method, "bus" | "cxl_bus");
    let alone = || !function.upstream.is_empty() && on_bus(inventory, function).len() == 1;
    let methods = quirks::methods(function);
    !methods.iter().all(by_bus) || !methods.is_empty() && alone()
}

fn on_bus(inventory: &Inventory, function: &Function) -> BTreeSet<PciAddress> {
    let bus = |address: PciAddress| (address.domain(), address.bus());
    let all = inventory.functions().map(|f| f.address);
    all.filter(|other| bus(*other) == bus(function.address)).collect()
}
