//! The tree of files a simulated kernel shows, by paths below the root. Reads the kernel's state;
//! reading changes nothing, but a fault may strike.

use std::os::fd::AsRawFd;

use libvfio::address::PciAddress;
use nix::errno::Errno;

use super::attributes::{ATTRIBUTES, Attribute};
use super::fault::Operation;
use super::kernel::{Device, Kernel, Stop};

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A directory.
    Directory,
    /// A symbolic link, and where it points.
    Link(String),
    /// A file with these permissions.
    File(u16),
    /// A device node, which others may have open. It is a plain file here.
    Node,
}

const DEVICES: &str = "sys/devices/";
const DRIVER_FILES: [&str; 2] = ["bind", "unbind"];
/// What no kernel has.
const SIMULATED: [&str; 5] = ["load-module", "sriov-manage", "hot-reset", "memory", "regions"];

impl Kernel {
    /// What is at a path; `None` if nothing is.
    pub fn entry(&self, path: &str) -> Option<Entry> {
        if self.files.names(path).is_some() {
            return Some(Entry::Directory);
        }
        if self.files.text(path).is_some() {
            // Of `/dev` only nodes can be there.
            let node = path.starts_with("dev/");
            return Some(if node { Entry::Node } else { Entry::File(0o444) });
        }
        if let Some(entry) = self.mediated_entry(path) {
            return Some(entry);
        }
        if let Some((address, device, rest)) = self.device_at(path) {
            return self.entry_of(address, device, rest);
        }
        let parts: Vec<&str> = path.split('/').collect();
        match parts.as_slice() {
            ["sys", "bus", "pci", "devices", name] => {
                let device = self.devices.get(&self.find(name)?)?;
                Some(Entry::Link(format!("../../../devices/{}", device.path)))
            }
            ["sys", "bus", "pci", "drivers_probe" | "rescan"]
            | ["sim", "load-module" | "sriov-manage" | "hot-reset"] => Some(Entry::File(0o200)),
            ["sim", "memory"] => Some(Entry::File(0o600)),
            ["sim", "regions"] => Some(Entry::Directory),
            ["sim", "regions", name] => {
                let memory = self.devices.get(&self.find(name)?)?.memory.as_ref()?;
                let process = std::process::id();
                Some(Entry::Link(format!("/proc/{process}/fd/{}", memory.as_raw_fd())))
            }
            ["sys", "bus", "pci", "drivers", name] => self.driver(name).map(|_| Entry::Directory),
            ["sys", "bus", "pci", "drivers", driver, name] => {
                if DRIVER_FILES.contains(name) && self.driver(driver).is_some() {
                    return Some(Entry::File(0o200));
                }
                let device = self.devices.get(&self.find(name)?)?;
                let bound = device.driver.as_deref() == Some(driver);
                bound.then(|| Entry::Link(format!("../../../../devices/{}", device.path)))
            }
            ["sys", "devices", root] => self.is_root(root).then_some(Entry::Directory),
            ["sys", "kernel", "iommu_groups", number, rest @ ..] => {
                let members = self.groups.get(&number.parse().ok()?)?;
                match rest {
                    [] | ["devices"] => Some(Entry::Directory),
                    ["type"] => Some(Entry::File(0o644)),
                    ["devices", name] => {
                        let address = self.find(name).filter(|a| members.contains(a))?;
                        let path = &self.devices.get(&address)?.path;
                        Some(Entry::Link(format!("../../../../devices/{path}")))
                    }
                    _ => None,
                }
            }
            ["sys", "class", "iommu", name] => {
                let there = self.host.kernel.iommus.iter().any(|iommu| iommu == name);
                there.then(|| Entry::Link(format!("../../devices/virtual/iommu/{name}")))
            }
            ["sys", "class", class, name] => {
                let member = |((c, n), path): (&(&str, String), &String)| {
                    (c == class && n == name).then(|| path.clone())
                };
                let class = CLASSES.iter().find(|known| *known == class)?;
                let path = self.members.get_key_value(&(*class, (*name).to_owned()));
                path.and_then(member).map(|path| Entry::Link(format!("../../devices/{path}")))
            }
            ["dev", "vfio", rest @ ..] => self.nodes(rest).then_some(Entry::Node),
            ["proc", rest @ ..] => self.proc_entry(rest),
            _ => None,
        }
    }

    /// Whether what is at a path was there from the start and will never go, or stays what it is
    /// until that is told of by [`take_stale`](Self::take_stale): when its function goes, or gets
    /// another driver.
    pub(super) fn stays(&self, path: &str) -> bool {
        if self.files.names(path).is_some() || self.files.text(path).is_some() {
            return true;
        }
        if let Some((_, device, rest)) = self.device_at(path) {
            return match rest {
                "" | "config" | "driver" | "iommu_group" | "subsystem" | "physfn" => true,
                name => Attribute::of(device, name).is_some_and(|known| known.mode & 0o222 == 0),
            };
        }
        let is_entry = |name: &str| !name.contains('/');
        // Drivers stay registered.
        let kept = ["sys/bus/pci/devices/", "sys/bus/pci/drivers/", DEVICES];
        kept.iter().any(|folder| path.strip_prefix(folder).is_some_and(is_entry))
    }

    /// Whether nothing comes to be at a path where nothing is, or not until that is told of by
    /// [`take_stale`](Self::take_stale): a function has the attributes it was added with.
    pub(super) fn stays_away(&self, path: &str) -> bool {
        self.device_at(path).is_some_and(|(_, _, rest)| {
            matches!(rest, "driver" | "physfn") || ATTRIBUTES.iter().any(|known| known.name == rest)
        })
    }

    /// Paths below the root at which something else is than there was when this was last asked, or
    /// nothing any more.
    pub(super) fn take_stale(&mut self) -> Vec<String> {
        std::mem::take(&mut self.stale)
    }

    /// Whether what is at a path is an attribute of a function.
    pub(super) fn is_attribute(&self, path: &str) -> bool {
        let attribute = |(_, device, rest)| Attribute::of(device, rest).is_some();
        self.device_at(path).is_some_and(attribute)
    }

    /// The names in a directory; `None` if there is no such directory.
    pub fn names(&self, path: &str) -> Option<Vec<String>> {
        let mediated = self.mediated_names(path);
        if let Some((address, device, rest)) = self.device_at(path) {
            let own = self.names_of(address, device, rest);
            // A directory may be there and have nothing in it.
            let there = own.is_some() || !mediated.is_empty();
            return there.then(|| own.into_iter().flatten().chain(mediated).collect());
        }
        let mut names: Vec<String> =
            self.files.names(path).into_iter().flatten().cloned().chain(mediated).collect();
        let parts: Vec<&str> = path.split('/').collect();
        let all = |addresses: &mut dyn Iterator<Item = &PciAddress>| {
            addresses.map(ToString::to_string).collect::<Vec<_>>()
        };
        match parts.as_slice() {
            ["sys", "bus", "pci"] => names.extend(["drivers_probe".into(), "rescan".into()]),
            ["sys", "bus", "pci", "devices"] => names.extend(all(&mut self.devices.keys())),
            ["sys", "bus", "pci", "drivers"] => {
                names.extend(self.drivers.iter().map(|driver| driver.name.clone()));
            }
            ["sys", "bus", "pci", "drivers", driver] => {
                self.driver(driver)?;
                names.extend(DRIVER_FILES.map(str::to_owned));
                let bound = |(_, d): &(&PciAddress, &Device)| d.driver.as_deref() == Some(driver);
                names.extend(all(&mut self.devices.iter().filter(bound).map(|(a, _)| a)));
            }
            ["sys", "devices"] => names.extend(self.roots()),
            ["sys", "devices", root] if self.is_root(root) => names.extend(self.below(root)),
            ["sys", "kernel", "iommu_groups"] => {
                names.extend(self.groups.keys().map(ToString::to_string));
            }
            ["sys", "kernel", "iommu_groups", number, rest @ ..] => {
                let members = self.groups.get(&number.parse().ok()?)?;
                match rest {
                    [] => names.extend(["devices".into(), "type".into()]),
                    ["devices"] => names.extend(all(&mut members.iter())),
                    _ => return None,
                }
            }
            ["sys", "class", "iommu"] => names.extend(self.host.kernel.iommus.iter().cloned()),
            ["sys", "class", class] => {
                let members = self.members.keys().filter(|(known, _)| known == class);
                names.extend(members.map(|(_, name)| name.clone()));
            }
            ["sim"] => names.extend(SIMULATED.map(str::to_owned)),
            ["sim", "regions"] => {
                let with_memory = self.devices.iter().filter(|(_, device)| device.memory.is_some());
                names.extend(all(&mut with_memory.map(|(address, _)| address)));
            }
            ["dev", "vfio"] => {
                let groups = self.vfio.values().filter_map(|a| self.devices.get(a)?.group);
                let mut groups: Vec<u32> = groups.collect();
                groups.sort_unstable();
                groups.dedup();
                names.extend(groups.iter().map(ToString::to_string));
                if self.has_vfio() {
                    names.push("vfio".into());
                }
            }
            ["dev", "vfio", "devices"] => {
                names.extend(self.vfio.keys().map(|number| format!("vfio{number}")));
            }
            ["proc", rest @ ..] => names.extend(self.proc_names(rest)),
            _ => {}
        }
        (!names.is_empty() || self.entry(path) == Some(Entry::Directory)).then_some(names)
    }

    /// What a file reads.
    pub fn read(&mut self, path: &str) -> Result<Vec<u8>, Stop> {
        match self.device_at(path).map(|(address, ..)| address) {
            Some(address) => self.or_fault(Operation::Read, Some(address), Vec::new(), |kernel| {
                kernel.read_whole(path)
            }),
            None => self.read_whole(path),
        }
    }

    /// The functions whose memory may have something of somebody's in it, a line each.
    fn soiled(&self) -> String {
        let soiled = self.devices.iter().filter(|(_, device)| device.soiled);
        soiled.map(|(address, _)| address.to_string() + "\n").collect()
    }

    fn read_whole(&self, path: &str) -> Result<Vec<u8>, Stop> {
        // VFIO's nodes have no read of their own; what else is not there was when it was opened.
        let node = self.entry(path) == Some(Entry::Node);
        self.shown(path).ok_or(Stop::Errno(if node { Errno::EINVAL } else { Errno::ENODEV }))
    }

    fn shown(&self, path: &str) -> Option<Vec<u8>> {
        if let Some(text) = self.files.text(path) {
            return Some(text.into());
        }
        if let Some(text) = self.mediated_text(path) {
            return Some(text.into());
        }
        if let Some((address, device, rest)) = self.device_at(path) {
            if rest == "config" {
                return Some(self.config(device));
            }
            if let Some(attribute) = Attribute::of(device, rest) {
                return Some(self.show(device, attribute).into());
            }
            let deeper = self.deeper(address, device);
            return deeper
                .into_iter()
                .find(|(file, ..)| file == rest)
                .map(|(.., text)| text.into());
        }
        if path == "sim/memory" {
            return Some(self.soiled().into());
        }
        if path.starts_with("sys/kernel/iommu_groups/") {
            return Some("DMA-FQ\n".into());
        }
        let parts = path.strip_prefix("proc/")?.split('/').collect::<Vec<_>>();
        self.proc_text(&parts).map(String::into_bytes)
    }

    /// The device in whose directory a path is, and the path from there. Devices may be named by
    /// their place in `sys/devices` or, for callers that follow no links, in `sys/bus/pci/devices`.
    fn device_at<'a>(&self, path: &'a str) -> Option<(PciAddress, &Device, &'a str)> {
        if let Some(below) = path.strip_prefix("sys/bus/pci/devices/") {
            let (name, rest) = below.split_once('/')?;
            let address = self.find(name)?;
            return Some((address, self.devices.get(&address)?, rest));
        }
        let below = path.strip_prefix(DEVICES)?;
        let ports = below.split('/').skip(1).map_while(|part| part.parse::<PciAddress>().ok());
        let address = ports.last()?;
        let device = self.devices.get(&address)?;
        let rest = below.strip_prefix(&device.path)?;
        let rest = if rest.is_empty() { rest } else { rest.strip_prefix('/')? };
        Some((address, device, rest))
    }

    /// The device and attribute a path names.
    pub(super) fn attribute_at<'a>(&self, path: &'a str) -> Option<(PciAddress, &'a str)> {
        self.device_at(path)
            .map(|(address, _, rest)| (address, rest))
            .filter(|(_, a)| !a.is_empty())
    }

    fn entry_of(&self, address: PciAddress, device: &Device, rest: &str) -> Option<Entry> {
        let up = "../".repeat(device.path.split('/').count() + 1);
        if rest.is_empty() {
            return Some(Entry::Directory);
        }
        if rest == "config" {
            return Some(Entry::File(0o644));
        }
        if let Some(attribute) = Attribute::of(device, rest) {
            return Some(Entry::File(attribute.mode));
        }
        if let Some(target) = self.links(device).into_iter().find(|(name, _)| name == rest) {
            return Some(Entry::Link(up + &target.1));
        }
        let folder = format!("{rest}/");
        self.deeper(address, device).iter().find_map(|(file, mode, _)| {
            if file == rest {
                return Some(Entry::File(*mode));
            }
            file.starts_with(&folder).then_some(Entry::Directory)
        })
    }

    fn names_of(&self, address: PciAddress, device: &Device, rest: &str) -> Option<Vec<String>> {
        let folder = if rest.is_empty() { String::new() } else { format!("{rest}/") };
        let deeper = self.deeper(address, device);
        let within = deeper.iter().filter_map(|(file, ..)| file.strip_prefix(&folder));
        let first = |file: &str| file.split('/').next().unwrap_or_default().to_owned();
        let mut names: Vec<String> = within.map(first).filter(|name| !name.is_empty()).collect();
        if rest.is_empty() {
            names.push("config".into());
            names.extend(ATTRIBUTES.iter().filter(|a| (a.of)(device)).map(|a| a.name.into()));
            names.extend(self.links(device).into_iter().map(|(name, _)| name));
            names.extend(self.below(&device.path));
        }
        names.sort_unstable();
        names.dedup();
        (self.entry_of(address, device, rest) == Some(Entry::Directory)).then_some(names)
    }

    /// Links of a function's directory, with their targets below `sys`.
    fn links(&self, device: &Device) -> Vec<(String, String)> {
        let place = |address: &PciAddress| {
            self.devices.get(address).map(|other| format!("devices/{}", other.path))
        };
        let mut links = vec![("subsystem".to_owned(), "bus/pci".to_owned())];
        links.extend(device.driver.iter().map(|name| {
            let target = format!("bus/pci/drivers/{name}");
            ("driver".to_owned(), target)
        }));
        links.extend(device.group.iter().map(|number| {
            let target = format!("kernel/iommu_groups/{number}");
            ("iommu_group".to_owned(), target)
        }));
        let physical = device.physical.and_then(|(physical, _)| place(&physical));
        links.extend(physical.map(|target| ("physfn".to_owned(), target)));
        for vf in &device.vfs {
            let index = self.devices.get(vf).and_then(|vf| vf.physical).map_or(0, |(_, n)| n);
            links.extend(place(vf).map(|target| (format!("virtfn{index}"), target)));
        }
        links
    }

    /// Names of the functions right below a bus or a port.
    fn below(&self, path: &str) -> impl Iterator<Item = String> {
        let right_below =
            |d: &&Device| d.path.rsplit_once('/').is_some_and(|(above, _)| above == path);
        let names: Vec<String> = self
            .devices
            .values()
            .filter(right_below)
            .map(|device| device.description.address.to_string())
            .collect();
        names.into_iter()
    }

    fn roots(&self) -> impl Iterator<Item = String> {
        let mut roots: Vec<String> = self
            .devices
            .values()
            .filter(|device| device.parent.is_none())
            .filter_map(|device| Some(device.path.split_once('/')?.0.to_owned()))
            .collect();
        roots.sort_unstable();
        roots.dedup();
        roots.into_iter()
    }

    pub(super) fn is_root(&self, name: &str) -> bool {
        let bus = |d: &Device| d.path.split_once('/').is_some_and(|(root, _)| root == name);
        self.devices.values().any(bus)
    }

    /// Whether there is such a node in `dev/vfio`.
    fn nodes(&self, rest: &[&str]) -> bool {
        match rest {
            ["vfio"] => self.has_vfio(),
            ["devices", name] => {
                let number = name.strip_prefix("vfio").and_then(|number| number.parse().ok());
                let there = |n: u32| self.vfio.contains_key(&n) || self.is_part_vfio(n);
                self.host.kernel.cdev && number.is_some_and(there)
            }
            [number] => {
                let Ok(number) = number.parse() else { return false };
                let members = self.groups.get(&number);
                if self.is_part(number) {
                    return true;
                }
                let mut members = members.into_iter().flatten();
                members.any(|a| self.devices.get(a).is_some_and(|d| d.vfio.is_some()))
            }
            _ => false,
        }
    }

    /// Whether VFIO's own module is there, which drivers of mediated devices bring along.
    fn has_vfio(&self) -> bool {
        self.drivers.iter().any(|driver| driver.vfio) || !self.host.parents.is_empty()
    }
}

const CLASSES: [&str; 3] = ["block", "net", "vfio-dev"];
