//! The state of a simulated kernel: devices, drivers and groups, as the Linux driver core keeps
//! them. It sleeps never and touches nothing but what stands for devices' memory; whoever calls it does
//! the waiting.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use libvfio::address::PciAddress;
use libvfio::mediated::Uuid;
use libvfio::pci::Binding;
use libvfio::scrub::PROFILES;
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::described::{Described, Driver, Function, moved};
use super::event::{Action, Uevent};
use super::fault::{Damage, Fault, Faults};
use super::files::Files;
use super::mediated::Part;
use super::notation::IdPair;
use super::open::Open;
use super::resource::{Region, Space};
use super::vendor::{Given, Profile};

/// A simulated kernel.
#[derive(Debug)]
pub struct Kernel {
    pub(super) host: Described,
    pub(super) described: BTreeMap<PciAddress, Arc<Function>>,
    pub(super) devices: BTreeMap<PciAddress, Device>,
    /// Registered drivers, in that order.
    pub(super) drivers: Vec<Driver>,
    pub(super) groups: BTreeMap<u32, BTreeSet<PciAddress>>,
    /// Mediated devices.
    pub(super) parts: BTreeMap<Uuid, Part>,
    /// VFIO devices by number.
    pub(super) vfio: BTreeMap<u32, PciAddress>,
    /// Members of classes, by class and name, with their paths below `sys/devices`.
    pub(super) members: BTreeMap<(&'static str, String), String>,
    pub(super) files: Files,
    pub(super) open: Open,
    pub(super) faults: Faults,
    pub(super) journal: Vec<Written>,
    pub(super) events: Vec<Uevent>,
    /// Paths at which something else is now, or nothing any more, where nobody expects it.
    pub(super) stale: Vec<String>,
    space: Space,
    /// The bridge above each bus.
    bridges: BTreeMap<(u32, u8), PciAddress>,
    /// The highest bus below each bridge.
    pub(super) subordinate: BTreeMap<PciAddress, u8>,
}

/// A function that is there.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools)] // Each is a file of its own, or as good as one.
pub(super) struct Device {
    pub(super) description: Arc<Function>,
    /// The port above it; `None` on a root bus.
    pub(super) parent: Option<PciAddress>,
    /// Its directory below `sys/devices`.
    pub(super) path: String,
    pub(super) numa: Option<u32>,
    pub(super) regions: Vec<Region>,
    /// For VFs: the PF, and the index among its VFs.
    pub(super) physical: Option<(PciAddress, u16)>,
    pub(super) vfs: Vec<PciAddress>,
    pub(super) group: Option<u32>,
    pub(super) driver: Option<String>,
    pub(super) driver_override: Option<String>,
    /// Number of its VFIO device, while it has one.
    pub(super) vfio: Option<u32>,
    pub(super) autoprobe: bool,
    pub(super) reset_methods: Vec<String>,
    pub(super) d3cold_allowed: bool,
    pub(super) power_control: String,
    pub(super) unbind_lock: bool,
    /// Somebody may have left something in its memory.
    pub(super) soiled: bool,
    /// Its memory, where it is known that a region shows all of that.
    pub(super) memory: Option<Arc<File>>,
    /// How many errors it has reported that nobody could correct, fatal ones first.
    pub(super) errors: [u64; 2],
    /// What a reset has made of it.
    pub(super) damage: Option<Damage>,
    /// What it has of what its physical function shares out.
    pub(super) given: Given,
    /// What a physical function gives each virtual one by files of its own.
    pub(super) profiles: Vec<Profile>,
}

/// Why an operation on the kernel does not return success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// It fails.
    Errno(Errno),
    /// It sleeps until this node is closed by all who have it open, and is then to be tried again.
    /// Nothing has changed.
    Held(String),
    /// It sleeps for ever, or until it is let go and then to be tried again.
    Forever,
    /// Whoever wants it is killed meanwhile.
    Killed,
}

impl From<Errno> for Stop {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

/// How long the kernel keeps a writer before it reports success, or why it does not.
pub type Answer = Result<Duration, Stop>;

/// One write the kernel has seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The file, below the root.
    pub path: String,
    /// What was written.
    pub value: String,
    /// How it ended; `None` if it never will, or if its writer never heard.
    pub result: Option<Result<(), Errno>>,
}

impl Kernel {
    /// Boots a described host.
    pub fn boot(host: &Described) -> Self {
        let described: BTreeMap<_, _> =
            host.functions.iter().map(|f| (f.address, Arc::new(f.clone()))).collect();
        let mut kernel = Self {
            bridges: bridges(host),
            subordinate: BTreeMap::new(),
            drivers: host.drivers.iter().filter(|driver| driver.loaded).cloned().collect(),
            files: Files::of(host),
            described,
            devices: BTreeMap::new(),
            groups: BTreeMap::new(),
            parts: BTreeMap::new(),
            vfio: BTreeMap::new(),
            members: BTreeMap::new(),
            open: Open::default(),
            faults: Faults::default(),
            journal: Vec::new(),
            events: Vec::new(),
            stale: Vec::new(),
            space: Space::default(),
            host: host.clone(),
        };
        kernel.number_buses();
        kernel.rescan();
        kernel.events.clear();
        kernel
    }

    /// Adds all functions that should be there and are not, as at boot and by `rescan`.
    pub(super) fn rescan(&mut self) {
        let missing = |f: &&Arc<Function>| f.present && !self.devices.contains_key(&f.address);
        let missing: Vec<_> = self.described.values().filter(missing).cloned().collect();
        for function in missing {
            // Its port may be out; then it stays out too.
            let _ = self.add(&function);
        }
    }

    /// Plugs a described function in.
    pub fn plug(&mut self, address: PciAddress) -> Result<(), Errno> {
        let function = self.described.get(&address).cloned().ok_or(Errno::ENODEV)?;
        if self.devices.contains_key(&address) {
            return Err(Errno::EEXIST);
        }
        self.add(&function)
    }

    /// Takes a function out, by surprise, with all that is below it.
    pub fn unplug(&mut self, address: PciAddress) -> Result<(), Errno> {
        let device = self.devices.get(&address).ok_or(Errno::ENODEV)?;
        let below = |d: &Device| d.parent == Some(address);
        let mut gone = device.vfs.clone();
        gone.extend(self.devices.iter().filter(|(_, d)| below(d)).map(|(address, _)| *address));
        for address in gone {
            // A VF is below the port, too, and may have gone with its PF.
            let _ = self.unplug(address);
        }
        self.drop_driver(address);
        self.remove(address);
        Ok(())
    }

    /// Loads a module: its drivers register and take the functions that are free for them.
    pub fn load(&mut self, module: &str) -> Result<(), Errno> {
        let drivers: Vec<Driver> =
            self.host.drivers.iter().filter(|d| d.module() == module).cloned().collect();
        if drivers.is_empty() {
            return Err(Errno::ENOENT);
        }
        for driver in drivers {
            if self.driver(&driver.name).is_none() {
                self.drivers.push(driver);
            }
        }
        let free: Vec<_> =
            self.devices.iter().filter(|(_, d)| d.driver.is_none()).map(|(a, _)| *a).collect();
        for address in free {
            self.attach_any(address);
        }
        Ok(())
    }

    /// Arms a fault.
    pub fn arm(&mut self, fault: Fault) {
        self.faults.arm(fault);
    }

    /// Forgets the faults that have not struck.
    pub fn disarm(&mut self) {
        self.faults.disarm();
    }

    /// Forgets those of one function.
    pub fn disarm_at(&mut self, device: PciAddress) {
        self.faults.disarm_at(device);
    }

    /// Has a function report an error that nobody can correct.
    pub fn report_error(&mut self, address: PciAddress, fatal: bool) -> Result<(), Errno> {
        let device = self.devices.get_mut(&address).ok_or(Errno::ENODEV)?;
        device.errors[usize::from(!fatal)] += 1;
        Ok(())
    }

    /// Driver and override of every function.
    pub fn bindings(&self) -> BTreeMap<PciAddress, Binding> {
        let binding = |device: &Device| {
            let (driver, driver_override) = (device.driver.clone(), device.driver_override.clone());
            Binding { driver, driver_override }
        };
        self.devices.iter().map(|(address, device)| (*address, binding(device))).collect()
    }

    /// All that a virtual function was given of what its physical one shares out, in words.
    pub fn given(&self, address: PciAddress) -> Option<String> {
        let device = self.devices.get(&address)?;
        let (physical, index) = device.physical?;
        let profile = self.devices.get(&physical)?.profiles.get(usize::from(index));
        Some(format!("{:?}, {profile:?}", device.given))
    }

    /// The memory of a function, where it is known that a region shows all of that.
    pub fn memory(&self, address: PciAddress) -> Option<Arc<File>> {
        self.devices.get(&address)?.memory.clone()
    }

    /// The mediated devices there are.
    pub fn mediated(&self) -> BTreeSet<Uuid> {
        self.parts.keys().copied().collect()
    }

    /// The writes seen so far.
    pub fn journal(&self) -> &[Written] {
        &self.journal
    }

    /// The events sent since this was last asked.
    pub fn take_events(&mut self) -> Vec<Uevent> {
        std::mem::take(&mut self.events)
    }

    fn add(&mut self, function: &Arc<Function>) -> Result<(), Errno> {
        let address = function.address;
        let (domain, bus) = (address.domain(), address.bus());
        let parent = self.bridges.get(&(domain, bus)).copied();
        let (above, numa) = match parent {
            Some(port) => {
                let port = self.devices.get(&port).ok_or(Errno::ENODEV)?;
                (port.path.clone(), port.numa)
            }
            None => (format!("pci{domain:04x}:{bus:02x}"), None),
        };
        let device = Device {
            parent,
            path: format!("{above}/{address}"),
            numa: function.numa.or(numa),
            ..self.device(function.clone())
        };
        self.join(address, device);
        if let Some(sriov) = &function.sriov {
            self.add_vfs(address, sriov.enabled);
        }
        Ok(())
    }

    /// Adds the first `count` VFs of a PF.
    pub(super) fn add_vfs(&mut self, physical: PciAddress, count: u16) {
        let pf = &self.devices[&physical];
        let Some(sriov) = pf.description.sriov.clone() else { return };
        let function = pf.description.clone();
        let (parent, numa) = (pf.parent, pf.numa);
        let above = pf.path.rsplit_once('/').map_or("", |(above, _)| above).to_owned();
        for index in 0..count {
            let Some(address) = moved(physical, sriov.offset + sriov.stride * index) else {
                return;
            };
            let virtual_function = Arc::new(Function {
                address,
                id: IdPair { vendor: function.id.vendor, device: sriov.device },
                bars: sriov.bars.clone(),
                sriov: None,
                acs: false,
                serial: None,
                disk: None,
                net: function.net.as_ref().map(|name| format!("{name}v{index}")),
                ..function.as_ref().clone()
            });
            let vectors = sriov.msix.map_or(function.vectors, |msix| msix.each);
            let device = Device {
                parent,
                numa,
                path: format!("{above}/{address}"),
                physical: Some((physical, index)),
                given: Given::with(vectors),
                ..self.device(virtual_function)
            };
            if let Some(pf) = self.devices.get_mut(&physical) {
                pf.vfs.push(address);
            }
            self.join(address, device);
        }
    }

    /// A device on its own, nowhere yet.
    fn device(&mut self, description: Arc<Function>) -> Device {
        let regions = self.space.place(&description.bars);
        Device {
            parent: None,
            path: String::new(),
            numa: None,
            memory: memory(description.id, &regions),
            regions,
            physical: None,
            vfs: Vec::new(),
            group: None,
            driver: None,
            driver_override: None,
            vfio: None,
            autoprobe: true,
            reset_methods: description.reset.clone(),
            d3cold_allowed: true,
            power_control: "on".into(),
            unbind_lock: false,
            soiled: false,
            errors: [0; 2],
            damage: None,
            given: Given::with(description.vectors),
            profiles: vec![
                Profile::default();
                description.sriov.as_ref().map_or(0, |sriov| sriov.total.into())
            ],
            description,
        }
    }

    /// Makes a device part of the host and offers it to the drivers.
    fn join(&mut self, address: PciAddress, mut device: Device) {
        device.group = self.group_for(address, &device);
        if let Some(number) = device.group {
            self.groups.entry(number).or_default().insert(address);
        }
        self.devices.insert(address, device);
        self.announce(Action::Add, address);
        self.attach_any(address);
    }

    /// The opposite of joining. The device has no driver any more.
    pub(super) fn remove(&mut self, address: PciAddress) {
        self.announce(Action::Remove, address);
        let Some(device) = self.devices.remove(&address) else { return };
        self.stale.push(format!("sys/bus/pci/devices/{address}"));
        self.stale.push(format!("sys/devices/{}", device.path));
        let root = device.path.split('/').next().unwrap_or_default();
        if !self.is_root(root) {
            self.stale.push(format!("sys/devices/{root}"));
        }
        if let Some(number) = device.group
            && let Some(members) = self.groups.get_mut(&number)
        {
            members.remove(&address);
            if members.is_empty() {
                self.groups.remove(&number);
            }
        }
        if let Some((physical, _)) = device.physical
            && let Some(pf) = self.devices.get_mut(&physical)
        {
            pf.vfs.retain(|vf| *vf != address);
        }
    }

    pub(super) fn driver(&self, name: &str) -> Option<&Driver> {
        self.drivers.iter().find(|driver| driver.name == name)
    }

    /// A fixed delay of the kernel, scaled.
    pub(super) fn delay(&self, milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds).mul_f64(self.host.kernel.delays)
    }

    /// Whether other functions are described for the same slot.
    pub(super) fn multifunction(&self, address: PciAddress) -> bool {
        let (domain, bus, device) = (address.domain(), address.bus(), address.device());
        (0..8)
            .filter_map(|function| PciAddress::new(domain, bus, device, function))
            .any(|other| other != address && self.described.contains_key(&other))
    }

    /// Gives each bridge room for all buses below it, those of VFs that may come included.
    fn number_buses(&mut self) {
        for function in self.described.values() {
            let last = function.sriov.as_ref().and_then(|sriov| {
                moved(function.address, sriov.offset + sriov.stride * sriov.total.saturating_sub(1))
            });
            let mut highest = last.unwrap_or(function.address).bus().max(function.bus.unwrap_or(0));
            let mut at = Some(function.address);
            while let Some(address) = at {
                let place = self.subordinate.entry(address).or_default();
                highest = highest.max(*place);
                *place = highest;
                at = self.bridges.get(&(address.domain(), address.bus())).copied();
            }
        }
    }
}

/// As large as the region that shows it. Without any, where the machine has no more to spare.
fn memory(id: IdPair, regions: &[Region]) -> Option<Arc<File>> {
    let IdPair { vendor, device } = id;
    let known = PROFILES.iter().find(|known| (known.vendor, known.device) == (vendor, device))?;
    let size = regions.iter().find(|region| region.index == known.bar)?.size;
    let file = File::from(memfd_create("memory", MFdFlags::MFD_CLOEXEC).ok()?);
    file.set_len(size).ok()?;
    Some(Arc::new(file))
}

fn bridges(host: &Described) -> BTreeMap<(u32, u8), PciAddress> {
    let below = |f: &Function| Some(((f.address.domain(), f.bus?), f.address));
    host.functions.iter().filter_map(below).collect()
}

impl Kernel {
    /// The lowest number that no VFIO character device has.
    pub(super) fn free_vfio(&self) -> u32 {
        let free = lowest_free(&self.vfio);
        let taken = |n: &u32| self.vfio.contains_key(n) || self.is_part_vfio(*n);
        (free..u32::MAX).find(|n| !taken(n)).unwrap_or(free)
    }
}

/// The lowest number not in use, as the kernel's `ida_alloc` gives it.
pub(super) fn lowest_free<V>(used: &BTreeMap<u32, V>) -> u32 {
    let next = used.last_key_value().map_or(0, |(last, _)| last + 1);
    // Without a gap, which is the rule, there is no need to look for one.
    if usize::try_from(next) == Ok(used.len()) {
        return next;
    }
    (0..next).find(|number| !used.contains_key(number)).unwrap_or(next)
}
