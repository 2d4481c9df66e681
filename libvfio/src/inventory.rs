//! The host as it was at one moment: every function, every group, by address and by number.
//! Reads through [`crate::host`]; never writes.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::resume_unwind;
use std::sync::{Arc, OnceLock};
use std::thread;

use crate::address::PciAddress;
use crate::error::{Error, nearest};
use crate::host::{HostRoot, plain};
use crate::ids::{self, Names};
use crate::iommu::{Group, Isolation, Platform, Sharing};
use crate::modalias;
use crate::pci::class::{self, ClassAlias};
use crate::pci::{Function, Sriov};

/// A picture of a host. Cloning it shares functions and groups, so one can be kept while
/// [`refresh`](Self::refresh) turns another into the next.
#[derive(Debug, Clone)]
pub struct Inventory {
    /// What is true of the whole host.
    pub platform: Platform,
    /// The `vfio_pci:` lines of `modules.alias`, by which variant drivers are chosen.
    pub vfio_aliases: Arc<str>,
    /// Whether the generic `vfio-pci` driver is there or can be loaded.
    pub vfio_pci: DriverSource,
    functions: BTreeMap<PciAddress, Arc<Function>>,
    groups: BTreeMap<u32, Arc<Group>>,
    names: Arc<LazyNames>,
}

/// Names of vendors and devices, read when somebody first asks: the table is large.
#[derive(Debug)]
struct LazyNames {
    host: HostRoot,
    names: OnceLock<Names>,
}

impl LazyNames {
    fn new(host: &HostRoot) -> Self {
        Self { host: host.clone(), names: OnceLock::new() }
    }
}

/// Where a driver would come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverSource {
    /// It is registered with the PCI bus.
    Registered,
    /// Its module can be loaded.
    Module,
    /// This kernel does not have it.
    Missing,
}

impl Inventory {
    /// Reads the whole host.
    pub fn scan(host: &HostRoot) -> Result<Self, Error> {
        let addresses = host.sys("bus/pci/devices").list()?;
        let read = |name: &String| {
            let address = name.parse().ok()?;
            Some((address, Arc::new(Function::read(host, address)?)))
        };
        // Half of the time is waiting for the kernel, or for whoever reads what it locks.
        let (some, others) = addresses.split_at(addresses.len() / 2);
        let functions: BTreeMap<PciAddress, _> = thread::scope(|scope| {
            let others = scope.spawn(|| others.iter().filter_map(read).collect::<Vec<_>>());
            let some: Vec<_> = some.iter().filter_map(read).collect();
            let others = others.join().unwrap_or_else(|panic| resume_unwind(panic));
            some.into_iter().chain(others).collect()
        });
        let mut inventory = Self {
            platform: Platform::read(host)?,
            vfio_aliases: vfio_aliases(host)?,
            vfio_pci: DriverSource::of(host, "vfio-pci")?,
            names: Arc::new(LazyNames::new(host)),
            groups: BTreeMap::new(),
            functions,
        };
        for (&address, function) in &inventory.functions {
            join(&mut inventory.groups, function.iommu_group, address);
        }
        Ok(inventory)
    }

    /// Reads the function at `address` anew, adding or dropping it. The cost does not depend on how
    /// many others there are.
    pub fn refresh(&mut self, host: &HostRoot, address: PciAddress) {
        let now = look(host, address, self.get(address).map(AsRef::as_ref), None);
        self.put(address, now);
    }

    /// Takes what [`look`] found at `address` in, or the function there out.
    pub fn put(&mut self, address: PciAddress, function: Option<Function>) {
        if let Some(number) = self.functions.remove(&address).and_then(|f| f.iommu_group) {
            leave(&mut self.groups, number, address);
        }
        let Some(function) = function else { return };
        if self.names.names.get().is_some_and(|names| !names.knows(&key(&function))) {
            self.names = Arc::new(LazyNames::new(&self.names.host));
        }
        join(&mut self.groups, function.iommu_group, address);
        self.functions.insert(address, Arc::new(function));
    }

    /// Looks whether the generic VFIO driver is registered by now. Loading a module is no event of
    /// any function.
    pub fn refresh_vfio(&mut self, host: &HostRoot) -> Result<(), Error> {
        if self.vfio_pci != DriverSource::Registered {
            self.vfio_pci = DriverSource::of(host, "vfio-pci")?;
        }
        Ok(())
    }

    /// The function at an address.
    pub fn get(&self, address: PciAddress) -> Option<&Arc<Function>> {
        self.functions.get(&address)
    }

    /// All functions, in the order of their addresses.
    pub fn functions(&self) -> impl ExactSizeIterator<Item = &Arc<Function>> {
        self.functions.values()
    }

    /// All groups, in the order of their numbers.
    pub fn groups(&self) -> impl ExactSizeIterator<Item = &Group> {
        self.groups.values().map(Arc::as_ref)
    }

    /// The group with that number.
    pub fn group(&self, number: u32) -> Option<&Group> {
        self.groups.get(&number).map(Arc::as_ref)
    }

    /// The group a function is in; `None` where there is no IOMMU.
    pub fn group_of(&self, address: PciAddress) -> Option<&Group> {
        self.group(self.get(address)?.iommu_group?)
    }

    /// Why a group is as large as it is.
    pub fn sharing(&self, group: &Group) -> Sharing {
        group.sharing(&self.functions)
    }

    /// Members of a group that keep it from being given to a guest as things are: those on a host
    /// driver that is neither VFIO nor a port driver (`Documentation/driver-api/vfio.rst`).
    pub fn host_owned<'a>(&'a self, group: &'a Group) -> impl Iterator<Item = &'a Function> {
        group
            .members
            .iter()
            .filter_map(|address| self.functions.get(address).map(Arc::as_ref))
            .filter(|f| f.driver.is_some() && !f.on_vfio() && !f.is_pci_bridge())
    }

    /// How isolated a function would be in a guest.
    pub fn isolation(&self, function: &Function) -> Isolation {
        match function.iommu_group {
            Some(_) => self.platform.isolation,
            None => Isolation::None,
        }
    }

    /// The virtual functions of a physical one, with their index among them.
    pub fn virtual_functions(&self, physical: PciAddress) -> Vec<(u16, PciAddress)> {
        let Some(pf) = self.get(physical) else { return Vec::new() };
        let mut vfs: Vec<_> = self
            .functions
            .values()
            .filter(|f| f.physical() == Some(physical))
            .filter_map(|f| Some((pf.sriov.index_of(physical, f.address)?, f.address)))
            .collect();
        vfs.sort_unstable();
        vfs
    }

    /// The physical function that a virtual one at this address is or would be of.
    pub fn physical_of(&self, address: PciAddress) -> Option<&Function> {
        let of = |f: &Function| {
            let Sriov::Physical { total, offset, stride, .. } = f.sriov else { return false };
            let first = u32::from(f.address.routing_id()) + u32::from(offset);
            let mut all = (0..total).map(|n| first + u32::from(stride) * u32::from(n));
            let there = u32::from(address.routing_id());
            f.address.domain() == address.domain() && all.any(|other| other == there)
        };
        self.functions.values().map(AsRef::as_ref).find(|f| of(f))
    }

    /// The index of a VF among those of its PF.
    pub fn vf_index(&self, function: &Function) -> Option<u16> {
        let Sriov::Virtual { physical } = function.sriov else { return None };
        self.get(physical)?.sriov.index_of(physical, function.address)
    }

    /// Names of vendors, devices and classes, as far as the system's `pci.ids` has them.
    pub fn names(&self) -> &Names {
        let wanted = || self.functions.values().map(|f| key(f)).collect();
        // Numbers serve where the table cannot be read.
        self.names.names.get_or_init(|| look_up(&self.names.host, &wanted()).unwrap_or_default())
    }

    /// A line a person recognises the function by: names, or numbers where there are none.
    pub fn describe(&self, function: &Function) -> String {
        let hex = |id: Option<u16>| id.map_or_else(|| "????".to_owned(), |id| format!("{id:04x}"));
        let names = self.names().of(&key(function));
        let vendor = names.vendor.filter(|_| function.ids.vendor.is_some());
        match (vendor, names.device) {
            (Some(vendor), Some(device)) => format!("{vendor} {device}"),
            (Some(vendor), None) => format!("{vendor} {}", hex(function.ids.device)),
            _ => format!("{}:{}", hex(function.ids.vendor), hex(function.ids.device)),
        }
    }

    /// What kind of device a function is, in words.
    pub fn class_name(&self, function: &Function) -> &'static str {
        function.ids.class.map_or("unknown class", class::name)
    }

    /// The function a person means: an address, `vendor:device` or a class alias, the latter two
    /// where just one function answers to them.
    pub fn resolve(&self, name: &str) -> Result<PciAddress, Error> {
        match self.answering(name)?.as_slice() {
            [] => Err(Error::NotFound { name: name.to_owned(), nearest: None }),
            [one] => Ok(one.address),
            many => Err(Error::Ambiguous {
                name: name.to_owned(),
                candidates: many
                    .iter()
                    .map(|f| format!("{} ({})", f.address, self.describe(f)))
                    .collect(),
            }),
        }
    }

    /// All functions that answer to an address, `vendor:device` or a class alias, by address. An
    /// address that nothing has is an error, as is what is none of these.
    pub fn answering(&self, name: &str) -> Result<Vec<&Function>, Error> {
        if let Ok(address) = name.parse() {
            let missing = || Error::NotFound { name: name.to_owned(), nearest: self.nearest(name) };
            return self.get(address).map(|f| vec![f.as_ref()]).ok_or_else(missing);
        }
        let matches: Box<dyn Fn(&Function) -> bool> = if let Some((vendor, device)) = id_pair(name)
        {
            Box::new(move |f| f.ids.vendor == Some(vendor) && f.ids.device == Some(device))
        } else if let Ok(alias) = name.parse::<ClassAlias>() {
            Box::new(move |f| f.ids.class.is_some_and(|class| alias.matches(class)))
        } else {
            // Whoever reads the error need not be who made the name up.
            let name = plain(&name.chars().take(64).collect::<String>());
            return Err(Error::BadName { nearest: self.nearest(&name), name });
        };
        Ok(self.functions.values().map(Arc::as_ref).filter(|f| matches(f)).collect())
    }

    /// Whether a name means devices by what they are, so that several may answer to it.
    pub fn is_kind(name: &str) -> bool {
        id_pair(name).is_some() || name.parse::<ClassAlias>().is_ok()
    }

    /// An address that is one slip of a finger away from `name`, or else the alias most like it, if
    /// any is alike at all.
    fn nearest(&self, name: &str) -> Option<String> {
        let full = name.parse::<PciAddress>().map_or_else(|_| name.to_owned(), |a| a.to_string());
        let mut addresses = self.functions.keys().map(ToString::to_string);
        let near = |address: &String| {
            full.len().abs_diff(address.len()) < 2 && strsim::osa_distance(&full, address) == 1
        };
        let slip = addresses.find(near);
        slip.or_else(|| nearest(name, ClassAlias::ALL.map(|alias| alias.name().to_owned())))
    }
}

/// What is at `address` now, given what was there: of the same function only what can change is
/// read, and the override only if nobody has just read it.
pub fn look(
    host: &HostRoot,
    address: PciAddress,
    before: Option<&Function>,
    driver_override: Option<&Option<String>>,
) -> Option<Function> {
    match before {
        Some(before) => before.reread(host, driver_override),
        None => Function::read(host, address),
    }
}

impl DriverSource {
    /// Where the driver with that directory name would come from.
    pub fn of(host: &HostRoot, driver: &str) -> Result<Self, Error> {
        if host.sys("bus/pci/drivers").has(driver) {
            return Ok(Self::Registered);
        }
        let table = |file| Ok::<_, Error>(host.modules(file)?.unwrap_or_default());
        let (dep, builtin) = (table("modules.dep")?, table("modules.builtin")?);
        let found = modalias::module_exists(&dep, &builtin, driver);
        Ok(if found { Self::Module } else { Self::Missing })
    }
}

fn join(groups: &mut BTreeMap<u32, Arc<Group>>, number: Option<u32>, address: PciAddress) {
    let Some(number) = number else { return };
    let alone = || Arc::new(Group { number, members: Vec::new() });
    let group = groups.entry(number).or_insert_with(alone);
    if let Err(place) = group.members.binary_search(&address) {
        Arc::make_mut(group).members.insert(place, address);
    }
}

fn leave(groups: &mut BTreeMap<u32, Arc<Group>>, number: u32, address: PciAddress) {
    if let Some(group) = groups.get_mut(&number).map(Arc::make_mut) {
        group.members.retain(|member| *member != address);
        if group.members.is_empty() {
            groups.remove(&number);
        }
    }
}

fn vfio_aliases(host: &HostRoot) -> Result<Arc<str>, Error> {
    let aliases = host.modules("modules.alias")?.unwrap_or_default();
    Ok(modalias::vfio_lines(&aliases).into())
}

fn key(function: &Function) -> ids::Key {
    let ids = &function.ids;
    ids::Key {
        vendor: ids.vendor.unwrap_or(0xffff),
        device: ids.device.unwrap_or(0xffff),
        subsystem_vendor: ids.subsystem_vendor.unwrap_or(0xffff),
        subsystem_device: ids.subsystem_device.unwrap_or(0xffff),
    }
}

/// Where distributions keep the table, in the order pciutils builds look for it.
const PCI_IDS: [&str; 3] =
    ["usr/share/misc/pci.ids", "usr/share/hwdata/pci.ids", "usr/share/pci.ids"];

fn look_up(host: &HostRoot, wanted: &BTreeSet<ids::Key>) -> Result<Names, Error> {
    for path in PCI_IDS {
        if let Some(text) = host.text(path)? {
            return Ok(ids::lookup(&text, wanted));
        }
    }
    Ok(Names::default())
}

fn id_pair(name: &str) -> Option<(u16, u16)> {
    let (vendor, device) = name.split_once(':')?;
    let id = |text: &str| (text.len() == 4).then(|| u16::from_str_radix(text, 16).ok())?;
    Some((id(vendor)?, id(device)?))
}
