//! PCI functions as the kernel shows them. Reads one function's sysfs directory through
//! [`crate::host`]; never writes, and never fails: what cannot be read is listed as a problem.

pub mod aer;
pub mod class;
pub mod config;

use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::address::PciAddress;
use crate::error::Error;
use crate::host::{HostRoot, SysDir};
use config::ConfigSpace;

/// One PCI function. Fields are `None` where the kernel did not say; `problems` tells why.
#[derive(Debug, Clone, PartialEq)]
pub struct Function {
    /// Where it is.
    pub address: PciAddress,
    /// What tells it from another that was at this address before ([`SysDir::instance`]).
    pub instance: u64,
    /// The ports above it, from the root port down; empty on a root bus.
    pub upstream: Vec<PciAddress>,
    /// Vendor, device and class.
    pub ids: Ids,
    /// The driver that has it, by its directory's name under `/sys/bus/pci/drivers`.
    pub driver: Option<String>,
    /// `driver_override`, if one is set.
    pub driver_override: Option<String>,
    /// Name of its VFIO character device (`vfio0`), on kernels that have `vfio-dev/`.
    pub vfio_device: Option<String>,
    /// Number of its IOMMU group. Never stored: it changes between boots.
    pub iommu_group: Option<u32>,
    /// NUMA node; `None` on machines with one node.
    pub numa_node: Option<u32>,
    /// Memory and I/O regions, BAR 0 to 5 and the expansion ROM as number 6.
    pub bars: Vec<Bar>,
    /// Reset methods the kernel would try, in its order (`reset_method`).
    pub reset_methods: Vec<String>,
    /// Power state as the kernel names it: `D0`, `D3hot`, `unknown`.
    pub power_state: Option<String>,
    /// Whether the firmware used it as the console.
    pub boot_vga: bool,
    /// Its part in SR-IOV, if any.
    pub sriov: Sriov,
    /// Text that modules are matched against (`modalias`).
    pub modalias: Option<String>,
    /// Configuration space, as far as it could be read.
    pub config: ConfigSpace,
    /// Whether a kernel operation on it has not returned: what is read under the device's lock
    /// could not be.
    pub stuck: bool,
    /// What could not be read or makes no sense, in words.
    pub problems: Vec<String>,
}

/// What a function is, by numbers. `None` where the kernel did not say.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct Ids {
    /// Vendor.
    pub vendor: Option<u16>,
    /// Device.
    pub device: Option<u16>,
    /// Subsystem vendor.
    pub subsystem_vendor: Option<u16>,
    /// Subsystem device.
    pub subsystem_device: Option<u16>,
    /// Base class, subclass and programming interface, 24 bits.
    pub class: Option<u32>,
    /// Revision.
    pub revision: Option<u8>,
}

/// One region of a function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bar {
    /// 0 to 5, or 6 for the expansion ROM.
    pub index: u8,
    /// Bytes.
    pub size: u64,
    /// I/O ports rather than memory.
    pub io: bool,
    /// May be addressed above 4 GiB.
    pub wide: bool,
    /// Reads have no side effects.
    pub prefetchable: bool,
}

/// A function's part in SR-IOV.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Sriov {
    /// None.
    #[default]
    None,
    /// A physical function.
    Physical {
        /// VFs it can have (`sriov_totalvfs`).
        total: u16,
        /// VFs it has (`sriov_numvfs`).
        enabled: u16,
        /// Whether host drivers are offered each new VF (`sriov_drivers_autoprobe`).
        autoprobe: bool,
        /// Routing id distance from the PF to its first VF.
        offset: u16,
        /// Routing id distance from one VF to the next.
        stride: u16,
    },
    /// A virtual function of that physical function.
    Virtual {
        /// Its PF.
        physical: PciAddress,
    },
}

/// What makes a function the same one after a reboot, a replug or a renumbering of groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Vendor, device, class and revision.
    pub ids: Ids,
    /// The path of ports to it.
    pub upstream: Vec<PciAddress>,
    /// Device serial number, where there is one.
    pub serial: Option<String>,
}

impl Identity {
    /// The identity of a function as it was read.
    pub fn of(function: &Function) -> Self {
        Self {
            ids: function.ids,
            upstream: function.upstream.clone(),
            serial: function.config.serial().map(|serial| serial.to_string()),
        }
    }
}

/// Driver and override: what a transition changes and must give back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// The driver that has the function.
    pub driver: Option<String>,
    /// `driver_override`, if one is set.
    pub driver_override: Option<String>,
}

impl Binding {
    /// Reads the binding of a function from the kernel, now.
    pub fn read(host: &HostRoot, address: PciAddress) -> Result<Self, Error> {
        let dir = host.function(address);
        let [driver_override] = dir.locked_attrs(["driver_override"]);
        let driver_override = driver_override?.filter(|name| is_set(name));
        Ok(Self { driver: dir.link_name("driver"), driver_override })
    }
}

impl Function {
    /// Reads a function; `None` if the host has none at that address.
    pub fn read(host: &HostRoot, address: PciAddress) -> Option<Self> {
        let dir = host.function(address);
        let instance = dir.instance()?;
        let mut problems = Vec::new();
        let mut or_note = Noting(&mut problems);
        // Some kernels show this one under the device's lock too (`uevent_show`,
        // `drivers/base/core.c`).
        let [uevent, driver_override, numvfs] =
            dir.locked_attrs(["uevent", "driver_override", "sriov_numvfs"]);
        let uevent = or_note.default(uevent).unwrap_or_default();
        let config = config::parse(&or_note.default(read_config(&dir)));
        let mut function = Self {
            address,
            instance,
            upstream: dir.path().read_link().map(|p| upstream(&p)).unwrap_or_default(),
            ids: Ids::read(&dir, &uevent, &config, &mut or_note),
            driver: None,
            driver_override: None,
            vfio_device: None,
            iommu_group: None,
            numa_node: or_note
                .default(dir.attr("numa_node"))
                .filter(|n| n != "-1")
                .and_then(|n| or_note.parse("numa_node", &n)),
            bars: parse_resource(&or_note.default(dir.attr("resource")).unwrap_or_default()),
            reset_methods: Vec::new(),
            power_state: None,
            boot_vga: or_note.default(dir.attr("boot_vga")).as_deref() == Some("1"),
            sriov: Sriov::None,
            modalias: uevent_value(&uevent, "MODALIAS").map(str::to_owned),
            config,
            stuck: false,
            problems: Vec::new(),
        };
        problems.extend(function.config.problems.iter().map(ToString::to_string));
        function.read_changing(&dir, driver_override, numvfs, &mut problems);
        Some(Self { problems, ..function })
    }

    /// Whether it is still the one that was read: its directory is.
    pub fn is_there(&self, host: &HostRoot) -> bool {
        host.function(self.address).instance() == Some(self.instance)
    }

    /// The function as it is now, given how it was and maybe its override: where it is the same one,
    /// only what changes while a device stays is read.
    pub fn reread(
        &self,
        host: &HostRoot,
        driver_override: Option<&Option<String>>,
    ) -> Option<Self> {
        let dir = host.function(self.address);
        if dir.instance()? != self.instance || !self.problems.is_empty() {
            return Self::read(host, self.address);
        }
        let mut now = self.clone();
        let mut problems = Vec::new();
        let header = Noting(&mut problems).default(read_header(&dir));
        now.config.alive = header.iter().any(|byte| *byte != 0xff);
        let numbered = matches!(self.sriov, Sriov::Physical { .. });
        let (driver_override, numvfs) = match driver_override.filter(|_| !numbered) {
            Some(known) => (Ok(known.clone()), Ok(None)),
            None if numbered => {
                let [driver_override, numvfs] =
                    dir.locked_attrs(["driver_override", "sriov_numvfs"]);
                (driver_override, numvfs)
            }
            None => {
                let [driver_override] = dir.locked_attrs(["driver_override"]);
                (driver_override, Ok(None))
            }
        };
        now.read_changing(&dir, driver_override, numvfs, &mut problems);
        Some(Self { problems, ..now })
    }

    /// The two attributes were read together, for that takes another process where it may take long.
    fn read_changing(
        &mut self,
        dir: &SysDir,
        driver_override: Attribute,
        numvfs: Attribute,
        problems: &mut Vec<String>,
    ) {
        let mut or_note = Noting(problems);
        self.driver = dir.link_name("driver");
        self.stuck = driver_override.as_ref().is_err_and(Error::timed_out);
        self.driver_override = or_note.default(driver_override).filter(|name| is_set(name));
        self.vfio_device = vfio_device(dir, self.driver.as_deref());
        self.iommu_group = dir.link_name("iommu_group").and_then(|n| or_note.parse("group", &n));
        self.reset_methods = or_note
            .default(dir.attr("reset_method"))
            .map(|m| m.split_whitespace().map(str::to_owned).collect())
            .unwrap_or_default();
        self.power_state = or_note.default(dir.attr("power_state"));
        self.sriov = match self.sriov {
            Sriov::None => Sriov::read(dir, &self.config, numvfs, &mut or_note),
            // What the hardware has does not change, nor whose VF it is.
            Sriov::Physical { .. } => self.sriov.reread(dir, numvfs, &mut or_note),
            Sriov::Virtual { physical } => Sriov::Virtual { physical },
        };
    }

    /// Driver and override as they were when this was read.
    pub fn binding(&self) -> Binding {
        Binding { driver: self.driver.clone(), driver_override: self.driver_override.clone() }
    }

    /// Whether it is a bridge of any kind: a port, a switch, a host or ISA bridge.
    pub fn is_bridge(&self) -> bool {
        self.ids.class.is_some_and(|class| class >> 16 == 0x06)
    }

    /// Whether it forwards PCI traffic and so is part of the path of others.
    pub fn is_pci_bridge(&self) -> bool {
        self.ids.class.is_some_and(|class| class >> 8 == 0x0604)
    }

    /// Whether it is on a VFIO driver.
    pub fn on_vfio(&self) -> bool {
        is_vfio(self.driver.as_deref(), self.vfio_device.as_deref())
    }

    /// The physical function, if this is a virtual one.
    pub fn physical(&self) -> Option<PciAddress> {
        match self.sriov {
            Sriov::Virtual { physical } => Some(physical),
            _ => None,
        }
    }

    /// Virtual functions enabled on it; 0 for what is no physical function.
    pub fn enabled_vfs(&self) -> u16 {
        match self.sriov {
            Sriov::Physical { enabled, .. } => enabled,
            _ => 0,
        }
    }

    /// Whether configuration reads return nothing but ones: gone, or unreachable in D3cold.
    pub fn is_silent(&self) -> bool {
        self.config.is_silent()
    }
}

/// The name of the VFIO character device of a function that has this driver.
fn vfio_device(dir: &SysDir, driver: Option<&str>) -> Option<String> {
    driver.and_then(|_| dir.sub("vfio-dev").list().ok())?.into_iter().next()
}

/// Whether a driver is one of VFIO's: any variant on kernels with `vfio-dev/`, else `vfio-pci`.
fn is_vfio(driver: Option<&str>, vfio_device: Option<&str>) -> bool {
    vfio_device.is_some() || driver == Some("vfio-pci")
}

/// The virtual functions a physical one has now, by its links to them, in the order of their
/// addresses.
pub fn virtual_functions(host: &HostRoot, physical: PciAddress) -> Vec<PciAddress> {
    let dir = host.function(physical);
    let names = dir.list().unwrap_or_default();
    let links = names.iter().filter(|name| name.starts_with("virtfn"));
    let mut found: Vec<PciAddress> =
        links.filter_map(|name| dir.link_name(name)?.parse().ok()).collect();
    found.sort_unstable();
    found
}

/// What a reset may spoil of a function, and what tells whether it did: less than half of what there
/// is to read of it.
#[derive(Debug)]
pub(crate) struct Condition {
    /// Its numeric identity, as the kernel remembers it.
    pub(crate) ids: Ids,
    /// Whether it is a virtual function.
    pub(crate) is_virtual: bool,
    /// The driver bound to it.
    pub(crate) driver: Option<String>,
    /// Whether that is one of VFIO's.
    pub(crate) on_vfio: bool,
    /// What can be read of its configuration space.
    pub(crate) config: ConfigSpace,
    /// Its six base address registers, if it is no bridge; none where it did not answer.
    pub(crate) bars: Option<[u32; 6]>,
    /// Its power state.
    pub(crate) power_state: Option<String>,
}

impl Condition {
    /// How the function is that is at an address now; `None` if there is none.
    pub(crate) fn read(host: &HostRoot, address: PciAddress) -> Option<Self> {
        let dir = host.function(address);
        dir.instance()?;
        let bytes = read_config(&dir).unwrap_or_default();
        let config = config::parse(&bytes);
        let uevent = dir.attr("uevent").ok().flatten().unwrap_or_default();
        let driver = dir.link_name("driver");
        let (registers, _) = bytes.get(0x10..0x28).unwrap_or_default().as_chunks::<4>();
        let bars = <[[u8; 4]; 6]>::try_from(registers).ok().filter(|_| config.alive);
        Some(Self {
            ids: Ids::read(&dir, &uevent, &config, &mut Noting(&mut Vec::new())),
            is_virtual: dir.link_name("physfn").is_some(),
            on_vfio: is_vfio(driver.as_deref(), vfio_device(&dir, driver.as_deref()).as_deref()),
            driver,
            bars: bars.map(|all| all.map(u32::from_le_bytes)),
            power_state: dir.attr("power_state").ok().flatten(),
            config,
        })
    }
}

/// Interrupt vectors (MSI-X) a function has now: the one thing in configuration space that a physical
/// function may change for a virtual one.
pub(crate) fn msix_vectors(host: &HostRoot, address: PciAddress) -> Option<u16> {
    config::parse(&read_config(&host.function(address)).ok()?).msix_vectors()
}

impl Ids {
    /// From `uevent`, which has them all in one read; what it lacks from the attributes, the
    /// revision from configuration space.
    fn read(dir: &SysDir, uevent: &str, config: &ConfigSpace, note: &mut Noting<'_>) -> Self {
        let (vendor, device) = pair(uevent_value(uevent, "PCI_ID"));
        let (subsystem_vendor, subsystem_device) = pair(uevent_value(uevent, "PCI_SUBSYS_ID"));
        let class = uevent_value(uevent, "PCI_CLASS").and_then(hex);
        let narrow = |n: Option<u32>| n.and_then(|n| u16::try_from(n).ok());
        Self {
            vendor: narrow(vendor.or_else(|| note.hex_attr(dir, "vendor"))),
            device: narrow(device.or_else(|| note.hex_attr(dir, "device"))),
            subsystem_vendor: narrow(subsystem_vendor),
            subsystem_device: narrow(subsystem_device),
            class: class.or_else(|| note.hex_attr(dir, "class")),
            revision: config.header.as_ref().map(|header| header.revision),
        }
    }
}

impl Sriov {
    fn read(dir: &SysDir, config: &ConfigSpace, numvfs: Attribute, note: &mut Noting<'_>) -> Self {
        if let Some(physical) = dir.link_name("physfn").and_then(|name| name.parse().ok()) {
            return Self::Virtual { physical };
        }
        // An unprivileged reader sees only 64 bytes of configuration space: ask sysfs then.
        if config.coverage > 256 && config.sriov().is_none() {
            return Self::None;
        }
        let enabled = note.default(numvfs);
        let enabled = enabled.and_then(|text| note.parse("sriov_numvfs", &text));
        let mut number = |name| {
            let text = note.default(dir.attr(name))?;
            note.parse::<u16>(name, &text)
        };
        let Some(total) = number("sriov_totalvfs") else { return Self::None };
        Self::Physical {
            total,
            enabled: enabled.unwrap_or(0),
            offset: number("sriov_offset").unwrap_or(0),
            stride: number("sriov_stride").unwrap_or(0),
            autoprobe: sriov_autoprobe(dir, note),
        }
    }

    /// A physical function as it is now, given how it was.
    fn reread(&self, dir: &SysDir, numvfs: Attribute, note: &mut Noting<'_>) -> Self {
        let mut now = self.clone();
        if let Self::Physical { enabled, autoprobe, .. } = &mut now {
            let text = note.default(numvfs);
            *enabled = text.and_then(|text| note.parse("sriov_numvfs", &text)).unwrap_or(0);
            *autoprobe = sriov_autoprobe(dir, note);
        }
        now
    }

    /// The index of the VF at `address` among those of the PF at `physical`, from its routing id
    /// (PCIe base specification, "VF Routing ID Determination").
    pub fn index_of(&self, physical: PciAddress, address: PciAddress) -> Option<u16> {
        let Self::Physical { offset, stride, .. } = *self else { return None };
        let distance = address.routing_id().checked_sub(physical.routing_id())?;
        distance.checked_sub(offset)?.checked_div(stride.max(1))
    }
}

/// Turns failures into notes, so that one bad file never hides the rest of a function.
struct Noting<'a>(&'a mut Vec<String>);

impl Noting<'_> {
    fn default<T: Default>(&mut self, result: Result<T, Error>) -> T {
        result.unwrap_or_else(|error| {
            self.0.push(error.to_string());
            T::default()
        })
    }

    fn parse<T: std::str::FromStr>(&mut self, name: &str, text: &str) -> Option<T> {
        let value = text.parse().ok();
        if value.is_none() {
            self.0.push(format!("{name} reads '{}'", text.chars().take(32).collect::<String>()));
        }
        value
    }

    fn hex_attr(&mut self, dir: &SysDir, name: &str) -> Option<u32> {
        let text = self.default(dir.attr(name));
        let value = text.as_deref().and_then(hex);
        if value.is_none() {
            let found = text.map_or("is missing".to_owned(), |t| format!("reads '{t:.32}'"));
            self.0.push(format!("{name} {found}"));
        }
        value
    }
}

fn sriov_autoprobe(dir: &SysDir, note: &mut Noting<'_>) -> bool {
    note.default(dir.attr("sriov_drivers_autoprobe")).as_deref() != Some("0")
}

fn read_config(dir: &SysDir) -> Result<Vec<u8>, Error> {
    let read = |file| config::read(&file).map_err(Error::io("read", &dir.path().join("config")));
    dir.open("config")?.map_or_else(|| Ok(Vec::new()), read)
}

/// Vendor, device, command and status: enough to see whether anybody answers.
fn read_header(dir: &SysDir) -> Result<[u8; 8], Error> {
    let mut header = [0; 8];
    if let Some(file) = dir.open("config")? {
        let path = dir.path().join("config");
        file.read_at(&mut header, 0).map_err(Error::io("read", &path))?;
    }
    Ok(header)
}

/// What an attribute reads; none if the kernel does not offer it.
type Attribute = Result<Option<String>, Error>;

/// Whether `driver_override` reads a name. It is shown under the device's lock, and as `(null)` if
/// there is none (`driver_override_show`, `drivers/pci/pci-sysfs.c`).
fn is_set(text: &str) -> bool {
    !text.is_empty() && text != "(null)"
}

fn uevent_value<'a>(uevent: &'a str, key: &str) -> Option<&'a str> {
    uevent.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
}

fn pair(text: Option<&str>) -> (Option<u32>, Option<u32>) {
    let parts = text.and_then(|text| text.split_once(':'));
    parts.map_or((None, None), |(a, b)| (hex(a), hex(b)))
}

fn hex(text: &str) -> Option<u32> {
    u32::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
}

/// The PCI addresses in `../../../devices/pci0000:00/0000:00:01.0/0000:01:00.0`, less the last.
fn upstream(target: &Path) -> Vec<PciAddress> {
    let mut ports: Vec<PciAddress> =
        target.iter().filter_map(|part| part.to_str()?.parse().ok()).collect();
    ports.pop();
    ports
}

/// Parses sysfs `resource`: a line of `start end flags` in hexadecimal per region. Flags are the
/// kernel's `IORESOURCE_*` (`include/linux/ioport.h`).
pub fn parse_resource(text: &str) -> Vec<Bar> {
    const IO: u64 = 0x100;
    const MEMORY: u64 = 0x200;
    const PREFETCH: u64 = 0x2000;
    const WIDE: u64 = 0x10_0000;
    let region = |(index, line): (u8, &str)| {
        let mut numbers =
            line.split_whitespace().map(|n| u64::from_str_radix(n.trim_start_matches("0x"), 16));
        let (start, end) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        let flags = numbers.next()?.ok()?;
        let size = end.checked_sub(start)?.checked_add(1)?;
        let known = flags & (IO | MEMORY) != 0;
        known.then_some(Bar {
            index,
            size,
            io: flags & IO != 0,
            wide: flags & WIDE != 0,
            prefetchable: flags & PREFETCH != 0,
        })
    };
    (0..7).zip(text.lines()).filter_map(region).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resource_lines_become_bars() {
        let text = "0x00000000fd000000 0x00000000fdffffff 0x0000000000042208\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x00000000febf0000 0x00000000febf0fff 0x0000000000140204\n\
                    garbage\n0x5 0x1 0x200\n";
        let bars = parse_resource(text);
        assert_eq!(bars.len(), 2);
        assert_eq!((bars[0].index, bars[0].size, bars[0].prefetchable), (0, 16 << 20, true));
        assert_eq!((bars[1].index, bars[1].size, bars[1].wide), (2, 4096, true));
    }

    #[test]
    fn ports_above_come_from_the_device_path() {
        let path = Path::new("../../../devices/pci0000:00/0000:00:01.0/0000:01:00.0");
        assert_eq!(upstream(path), ["00:01.0".parse().unwrap()]);
    }

    #[test]
    fn a_vf_index_follows_offset_and_stride() {
        let pf: PciAddress = "01:00.0".parse().unwrap();
        let sriov =
            Sriov::Physical { total: 7, enabled: 7, autoprobe: true, offset: 128, stride: 2 };
        assert_eq!(sriov.index_of(pf, "01:10.0".parse().unwrap()), Some(0));
        assert_eq!(sriov.index_of(pf, "01:10.2".parse().unwrap()), Some(1));
        assert_eq!(sriov.index_of(pf, "00:00.0".parse().unwrap()), None);
    }
}
