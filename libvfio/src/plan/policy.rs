//! From what is to what the policy says, device by device: the steps, and what stands in the way.
//! Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::attach::{members, refuse, way};
use super::reasons::{leased, uses};
use super::{Circumstances, Reason, Request, home, shaping, virtual_functions};
use crate::address::PciAddress;
use crate::backend::Offer;
use crate::error::ErrorKind;
use crate::inventory::Inventory;
use crate::pci::{Binding, Function, Identity, Sriov};
use crate::policy::{Assignment, Facts, Mode, Policy, Pool, Role};
use crate::quirks;
use crate::shape::{Capability, Limits, Setting, Value};
use crate::step::{Step, Tunable};

/// What is wanted, and of whom.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    /// The policy.
    pub policy: &'a Policy,
    /// What was read for it.
    pub facts: &'a Facts,
    /// Who is in which pool.
    pub assignment: &'a Assignment,
    /// Devices that the policy has met by their place: another one there is not meant.
    pub known: &'a BTreeMap<PciAddress, Identity>,
}

/// What is planned, shown and done as one: a device, a virtual function, or the number of these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lead {
    /// The pool, by its place in the policy.
    pub pool: usize,
    /// Its first function.
    pub device: PciAddress,
    /// All its functions.
    pub members: Vec<PciAddress>,
    /// What it is about.
    pub kind: Kind,
}

/// What a unit is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Which driver has it, and its settings.
    Device,
    /// The same; it is kept for the host.
    Kept,
    /// How many virtual functions it has.
    Physical,
}

/// One device: how it is, how it shall be, and the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// The name of its pool.
    pub pool: String,
    /// The pool's mode.
    pub mode: Mode,
    /// Its first function.
    pub device: PciAddress,
    /// All its functions, and how each is bound now.
    pub devices: BTreeMap<PciAddress, Binding>,
    /// How it is, in words.
    pub now: String,
    /// How it shall be, in words.
    pub wanted: String,
    /// What there is to do.
    pub steps: Vec<Step>,
    /// Why that is not done.
    pub reasons: Vec<Reason>,
}

/// Where a unit stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is as the policy wants it.
    AsWanted,
    /// There is something to do, and nothing in the way.
    ToDo,
    /// It is done when a lease ends.
    Waits,
    /// Something stands in the way.
    Blocked,
}

impl Standing {
    /// The word for it on every surface.
    pub fn name(self) -> &'static str {
        match self {
            Self::AsWanted => "as-wanted",
            Self::ToDo => "to-do",
            Self::Waits => "waits",
            Self::Blocked => "blocked",
        }
    }
}

impl Unit {
    /// Where it stands.
    pub fn standing(&self) -> Standing {
        let waits = |reason: &Reason| reason.code == "leased" || reason.code == "changing";
        match (self.reasons.as_slice(), self.steps.as_slice()) {
            ([], []) => Standing::AsWanted,
            ([], _) => Standing::ToDo,
            (reasons, _) if reasons.iter().all(waits) => Standing::Waits,
            _ => Standing::Blocked,
        }
    }
}

/// The host as it will be once the numbers of virtual functions are those of the policy, so that
/// those to be made can be planned.
struct Ahead {
    inventory: Inventory,
    assignment: Assignment,
    /// Those that are to be made.
    made: BTreeSet<PciAddress>,
}

fn ahead(inventory: &Inventory, wish: &Wish<'_>) -> Ahead {
    let (mut then, mut made) = (inventory.clone(), BTreeSet::new());
    for (address, member) in wish.assignment.members() {
        let Some(pool) = wish.policy.pools.get(member.pool) else { continue };
        if member.role != Role::Physical {
            continue;
        }
        let new = to_be_made(inventory, pool, address);
        if !new.is_empty() {
            for (_, old) in inventory.virtual_functions(address) {
                then.put(old, None);
            }
        }
        for function in new {
            made.insert(function.address);
            then.put(function.address, Some(function));
        }
    }
    let assignment = if made.is_empty() {
        wish.assignment.clone()
    } else {
        Assignment::new(wish.policy, &then, wish.facts)
    };
    Ahead { inventory: then, assignment, made }
}

/// What there is of the policy on this host, in the order in which it is done: physical functions
/// before their virtual ones, those included that are yet to be made.
pub fn policy_leads(inventory: &Inventory, wish: &Wish<'_>) -> Vec<Lead> {
    leads(&ahead(inventory, wish))
}

fn leads(ahead: &Ahead) -> Vec<Lead> {
    let mut leads: BTreeMap<PciAddress, Lead> = BTreeMap::new();
    let mut slots: BTreeMap<(u32, u8, u8, bool), PciAddress> = BTreeMap::new();
    for (address, member) in ahead.assignment.members() {
        let kind = match member.role {
            Role::Physical => Kind::Physical,
            Role::Kept => Kind::Kept,
            Role::Virtual | Role::Selected | Role::Companion => Kind::Device,
        };
        let is_virtual = ahead.inventory.get(address).is_some_and(|f| f.physical().is_some());
        let first = if is_virtual || kind == Kind::Physical {
            address
        } else {
            let kept = kind == Kind::Kept;
            let slot = (address.domain(), address.bus(), address.device(), kept);
            *slots.entry(slot).or_insert(address)
        };
        let new = || Lead { pool: member.pool, device: first, members: Vec::new(), kind };
        leads.entry(first).or_insert_with(new).members.push(address);
    }
    // Each after the physical function that it is of, whatever their addresses.
    let mut leads: Vec<Lead> = leads.into_values().collect();
    leads.sort_by_key(|lead| lead.kind != Kind::Physical);
    leads
}

/// The virtual functions that a physical one will have, if it does not have as many.
fn to_be_made(inventory: &Inventory, pool: &Pool, physical: PciAddress) -> Vec<Function> {
    let Some(function) = inventory.get(physical) else { return Vec::new() };
    let Sriov::Physical { enabled, offset, stride, .. } = function.sriov else { return Vec::new() };
    let count = pool.vfs.filter(|count| *count != enabled).unwrap_or(0);
    (0..count).filter_map(|index| made(function, offset, stride, index)).collect()
}

/// Reset methods in the order in which the kernel tries them (`pci_reset_fn_methods`,
/// `drivers/pci/pci.c`).
const RESETS: [&str; 7] = ["device_specific", "acpi", "flr", "af_flr", "pm", "bus", "cxl_bus"];

/// A virtual function as the kernel will make it: same vendor and class, no driver.
fn made(physical: &Function, offset: u16, stride: u16, index: u16) -> Option<Function> {
    let distance = offset.checked_add(stride.checked_mul(index)?)?;
    let [bus, rest] = physical.address.routing_id().checked_add(distance)?.to_be_bytes();
    let address = PciAddress::new(physical.address.domain(), bus, rest >> 3, rest & 7)?;
    let mut ids = physical.ids;
    ids.device = physical.config.sriov().map(|sriov| sriov.vf_device);
    let number = |id: Option<u16>| id.unwrap_or(0);
    let [_, base, sub, interface] = ids.class.unwrap_or(0).to_be_bytes();
    let modalias = format!(
        "pci:v{:08X}d{:08X}sv{:08X}sd{:08X}bc{base:02X}sc{sub:02X}i{interface:02X}",
        number(ids.vendor),
        number(ids.device),
        number(ids.subsystem_vendor),
        number(ids.subsystem_device),
    );
    let mut reset_methods = physical.reset_methods.clone();
    reset_methods.sort_by_key(|method| RESETS.iter().position(|known| known == method));
    Some(Function {
        address,
        ids,
        reset_methods,
        modalias: Some(modalias),
        sriov: Sriov::Virtual { physical: physical.address },
        driver: None,
        driver_override: None,
        vfio_device: None,
        iommu_group: None,
        ..physical.clone()
    })
}

/// What can be set on a virtual function that is new, as far as the pool wants it: from what a
/// network card's has then.
fn new_offers(pool: &Pool) -> Vec<Offer> {
    let offer = |(setting, wanted): (Setting, &Value)| {
        let value = match setting {
            Setting::SpoofCheck => Value::Flag(true),
            Setting::Link => Value::Text("auto".to_owned()),
            _ => match wanted {
                Value::Flag(_) => Value::Flag(false),
                Value::Number(_) => Value::Number(0),
                Value::Text(_) => Value::Text(String::new()),
            },
        };
        let capability = Capability { setting, value, limits: Limits::Any };
        Offer { backend: String::new(), capability }
    };
    pool.shape.each().map(offer).collect()
}

/// All that the policy says, and where it stands.
pub fn policy(inventory: &Inventory, circumstances: &Circumstances, wish: &Wish<'_>) -> Vec<Unit> {
    let (ahead, mut then) = (ahead(inventory, wish), circumstances.clone());
    for new in &ahead.made {
        let pool = ahead.assignment.pool(wish.policy, *new);
        then.offers.extend(pool.map(|pool| (*new, new_offers(pool))));
        // As the kernel has it for every device (`pci_pm_init`, `drivers/pci/pci.c`).
        then.d3cold.insert(*new, true);
    }
    let mut units: Vec<Unit> = Vec::new();
    let mut loaded = false;
    for lead in &leads(&ahead) {
        let is_new = ahead.made.contains(&lead.device);
        let unit = if is_new {
            policy_unit(&ahead.inventory, &then, wish, lead)
        } else {
            policy_unit(inventory, circumstances, wish, lead)
        };
        let Some(mut unit) = unit else { continue };
        if is_new {
            // What will be true of it is not known yet, but for what its making waits for.
            let parent = ahead.inventory.get(lead.device).and_then(|f| f.physical());
            let parent = units.iter().find(|unit| Some(unit.device) == parent);
            unit.reasons = parent.map(|unit| unit.reasons.clone()).unwrap_or_default();
            unit.now = String::from("not made yet");
        }
        let is_load = |step: &Step| *step == Step::LoadModule { module: "vfio-pci".into() };
        if loaded {
            unit.steps.retain(|step| !is_load(step));
        } else {
            loaded = unit.reasons.is_empty() && unit.steps.iter().any(is_load);
        }
        units.push(unit);
    }
    units
}

/// What the policy says of one device. `None` if it is not there.
pub fn policy_unit(
    inventory: &Inventory,
    circumstances: &Circumstances,
    wish: &Wish<'_>,
    lead: &Lead,
) -> Option<Unit> {
    let pool = wish.policy.pools.get(lead.pool)?;
    inventory.get(lead.device)?;
    let functions: Vec<&Function> =
        lead.members.iter().filter_map(|at| inventory.get(*at).map(AsRef::as_ref)).collect();
    let mut unit = Unit {
        pool: pool.name.clone(),
        mode: pool.mode,
        device: lead.device,
        devices: functions.iter().map(|f| (f.address, f.binding())).collect(),
        now: now(circumstances, &functions),
        wanted: wanted(pool, lead.kind),
        steps: Vec::new(),
        reasons: Vec::new(),
    };
    match (lead.kind, pool.mode) {
        (Kind::Physical, _) => number(inventory, circumstances, wish.facts, pool, &mut unit),
        (Kind::Device, Mode::Passthrough) => {
            to_vfio(inventory, circumstances, pool, &functions, &mut unit);
        }
        _ => {
            let whose = (pool, lead.kind);
            to_host(inventory, circumstances, wish.facts, whose, &functions, &mut unit);
        }
    }
    if lead.kind != Kind::Physical {
        let tuned = functions.iter().flat_map(|f| tuning(circumstances, pool, f));
        unit.steps.splice(0..0, tuned.collect::<Vec<_>>());
    }
    let claims = lead
        .members
        .iter()
        .filter_map(|at| circumstances.claims.get(at).map(|claim| leased(*at, claim)));
    let claims: Vec<Reason> = claims.collect();
    if unit.steps.is_empty() {
        unit.reasons.clear();
    } else if !claims.is_empty() {
        // While somebody has it, nothing else matters.
        unit.reasons = claims;
    }
    let another = functions.iter().filter(|f| {
        pool.select.iter().any(|selector| selector.is_by_address(f.address))
            && wish.known.get(&f.address).is_some_and(|known| *known != Identity::of(f))
    });
    unit.reasons.extend(another.map(|f| stranger(f, pool)));
    Some(unit)
}

fn now(circumstances: &Circumstances, functions: &[&Function]) -> String {
    let claim = functions.iter().find_map(|f| circumstances.claims.get(&f.address));
    if let Some(claim) = claim.filter(|claim| claim.task.is_none()) {
        return format!("leased to '{}'", claim.tenant);
    }
    if let [Function { sriov: Sriov::Physical { enabled, .. }, driver, .. }] = functions {
        let driver = driver.as_deref().unwrap_or("no driver");
        return format!("on {driver}, {enabled} virtual functions");
    }
    let mut drivers: Vec<&str> =
        functions.iter().map(|f| f.driver.as_deref().unwrap_or("no driver")).collect();
    drivers.dedup();
    format!("on {}", drivers.join(", "))
}

fn wanted(pool: &Pool, kind: Kind) -> String {
    match (kind, pool.mode) {
        (Kind::Physical, _) => format!("{} virtual functions", pool.vfs.unwrap_or(0)),
        (Kind::Kept, _) => "kept for the host".to_owned(),
        (Kind::Device, Mode::Host) => "with the host".to_owned(),
        (Kind::Device, Mode::Passthrough) => "on VFIO".to_owned(),
        (Kind::Device, Mode::OnLease) => "on VFIO when leased".to_owned(),
    }
}

/// Another number of virtual functions.
fn number(
    inventory: &Inventory,
    circumstances: &Circumstances,
    facts: &Facts,
    pool: &Pool,
    unit: &mut Unit,
) {
    let count = pool.vfs.unwrap_or(0);
    let (plan, reasons) = virtual_functions::consider(inventory, circumstances, unit.device, count);
    unit.steps = plan.steps;
    // Its virtual functions are the policy's, whoever put them on VFIO; if a guest has one, that is
    // a reason of its own.
    unit.reasons = reasons.into_iter().filter(|reason| reason.code != "external").collect();
    // Only the host's driver makes them.
    if let Some(function) = inventory.get(unit.device).filter(|f| f.on_vfio())
        && !unit.steps.is_empty()
    {
        let driver = facts.host_driver(function).map(str::to_owned);
        let before = Binding { driver, driver_override: None };
        let way = home(unit.device, &function.binding(), &before);
        unit.steps.splice(0..0, way);
        unit.reasons.extend(uses(circumstances, &Request::default(), function));
    }
    unit.devices.extend(plan.devices);
}

/// Onto VFIO, like for a lease of it that adopts what is there already.
fn to_vfio(
    inventory: &Inventory,
    circumstances: &Circumstances,
    pool: &Pool,
    functions: &[&Function],
    unit: &mut Unit,
) {
    let request = Request {
        devices: functions.iter().map(|f| f.address).collect(),
        adopt: true,
        shape: pool.shape.clone(),
        ..Request::default()
    };
    let taken = members(inventory, &request);
    let plan = way(inventory, circumstances, &request, &taken);
    let viable = |step: &Step| matches!(step, Step::CheckViable { .. });
    let loads = |step: &Step| matches!(step, Step::LoadModule { .. });
    unit.steps = plan.steps.into_iter().filter(|step| !viable(step)).collect();
    // A module is loaded for a device alone.
    if unit.steps.iter().all(loads) {
        unit.steps.clear();
    }
    unit.devices.extend(plan.devices);
    unit.reasons = refuse(inventory, circumstances, &request, &taken);
}

/// To the host's driver where a VFIO driver has it, or is the only one that may; what has no driver
/// for other reasons is left so.
fn to_host(
    inventory: &Inventory,
    circumstances: &Circumstances,
    facts: &Facts,
    (pool, kind): (&Pool, Kind),
    functions: &[&Function],
    unit: &mut Unit,
) {
    let leased = |f: &&&Function| circumstances.claims.contains_key(&f.address);
    let on_lease = kind == Kind::Device && pool.mode == Mode::OnLease;
    for function in functions.iter().filter(|f| !(on_lease && leased(f))) {
        let vfio = |name: &str| name.replace('_', "-").contains("vfio-pci");
        let kept = function.driver_override.as_deref().is_some_and(vfio);
        let only_vfio = function.on_vfio() || kept && function.driver.is_none();
        if !only_vfio {
            continue;
        }
        // Virtual functions are made for guests, without a driver.
        let driver = facts.host_driver(function).filter(|_| function.physical().is_none());
        let before = Binding { driver: driver.map(str::to_owned), driver_override: None };
        unit.steps.extend(home(function.address, &function.binding(), &before));
        let request = Request::default();
        unit.reasons.extend(uses(circumstances, &request, function));
    }
    let request = Request { shape: pool.shape.clone(), ..Request::default() };
    for function in functions.iter().filter(|f| f.physical().is_some()) {
        unit.steps.extend(shaping::steps(circumstances, &request, function));
        unit.reasons.extend(shaping::refuse(inventory, circumstances, &request, function));
    }
}

/// Steps for the settings that are otherwise. Of the reset methods those that the kernel has for it.
fn tuning(circumstances: &Circumstances, pool: &Pool, function: &Function) -> Vec<Step> {
    let device = function.address;
    let mut steps = Vec::new();
    if let Some(order) = &pool.reset_order {
        let (now, can) = (function.reset_methods.join(" "), quirks::methods(function));
        let fitting: Vec<&str> =
            order.iter().map(String::as_str).filter(|method| can.contains(method)).collect();
        let to = fitting.join(" ");
        if !to.is_empty() && to != now {
            let setting = Tunable::ResetMethod;
            steps.push(Step::Tune { device, setting, from: now, to });
        }
    }
    let word = |on| if on { "1" } else { "0" }.to_owned();
    // While it is leased it keeps its power, whatever it may do when nobody has it.
    let leased = circumstances.claims.get(&device).is_some_and(|claim| claim.task.is_none());
    if let (Some(wanted), Some(now)) = (pool.d3cold, circumstances.d3cold.get(&device))
        && wanted != *now
        && !(leased && wanted)
    {
        let setting = Tunable::D3cold;
        steps.push(Step::Tune { device, setting, from: word(*now), to: word(wanted) });
    }
    steps
}

fn stranger(function: &Function, pool: &Pool) -> Reason {
    Reason {
        kind: ErrorKind::IdentityMismatch,
        code: "another-device",
        object: function.address.to_string(),
        text: format!("is another device than pool '{}' had there", pool.name),
        remedy: "if this one is meant, 'vfioctl apply --accept'; else select by serial number"
            .to_owned(),
    }
}
