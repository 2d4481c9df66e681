//! Described hosts: the readable files from which simulated kernels boot. Parses text into plain
//! types; unknown keys are errors. Touches nothing, and knows nothing of how a kernel behaves.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use libvfio::address::PciAddress;
use serde::Deserialize;

use super::notation::{BarSize, IdPair, IdPattern};

/// A desktop: one GPU with its audio function, the root disk, the network, an onboard VGA.
pub const WORKSTATION: &str = include_str!("../../hosts/workstation.toml");
/// A server of eight GPUs with `NVSwitch` and RDMA network cards on two sockets.
pub const HGX8: &str = include_str!("../../hosts/hgx8.toml");
/// Network cards with virtual functions, as many as one asks for.
pub const SCALE: &str = include_str!("../../hosts/scale.toml");
/// A serial port and virtual functions of a GPU that can be made into mediated devices.
pub const MEDIATED: &str = include_str!("../../hosts/mediated.toml");
/// A server with an Intel GPU that the xe driver shares out, and a network card that shares its
/// interrupt vectors out.
pub const XE: &str = include_str!("../../hosts/xe.toml");
/// A server with an NVIDIA GPU that is shared out as vGPUs.
pub const VGPU: &str = include_str!("../../hosts/vgpu.toml");

/// The hosts that need no file, by name.
const SHIPPED: [(&str, &str); 6] = [
    ("workstation", WORKSTATION),
    ("hgx8", HGX8),
    ("scale", SCALE),
    ("xe", XE),
    ("vgpu", VGPU),
    ("mediated", MEDIATED),
];

/// A host, as its file describes it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Described {
    /// What it is called.
    pub name: String,
    /// Its kernel.
    pub kernel: KernelOptions,
    /// Drivers, in the order in which they were registered: of several that match, the first wins.
    #[serde(rename = "driver")]
    pub drivers: Vec<Driver>,
    /// PCI functions that are there or can be plugged in. VFs come from their PFs.
    #[serde(rename = "function")]
    pub functions: Vec<Function>,
    /// Mounted disks.
    #[serde(default, rename = "mount")]
    pub mounts: Vec<Mount>,
    /// Disks that are swapped to.
    #[serde(default)]
    pub swaps: Vec<String>,
    /// The network interface that carries the default route.
    pub default_route: Option<String>,
    /// Processes that run.
    #[serde(default, rename = "process")]
    pub processes: Vec<Process>,
    /// What can be made into mediated devices.
    #[serde(default, rename = "mediated")]
    pub parents: Vec<Parent>,
    /// Any other files, by their paths without a leading slash.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
}

/// What is true of the whole kernel.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelOptions {
    /// `uname -r`.
    pub release: String,
    /// `/proc/cmdline`.
    pub command_line: String,
    /// Vendor of the processor as in `/proc/cpuinfo`: `GenuineIntel`, `AuthenticAMD`.
    pub cpu: String,
    /// IOMMUs in use (`dmar0`); none, and there are no groups.
    #[serde(default)]
    pub iommus: Vec<String>,
    /// Whether interrupts are remapped.
    #[serde(default = "yes")]
    pub interrupt_remapping: bool,
    /// Whether bound functions have `vfio-dev/` (Linux 6.1 or later).
    #[serde(default = "yes")]
    pub vfio_dev: bool,
    /// Whether there are device nodes in `/dev/vfio/devices` and `/dev/iommu`.
    #[serde(default)]
    pub cdev: bool,
    /// Factor on the kernel's fixed delays: 1 as real, 0 for none.
    #[serde(default)]
    pub delays: f64,
}

/// A driver of the PCI bus.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(clippy::struct_excessive_bools)] // Keys of a readable file.
pub struct Driver {
    /// Name of its directory.
    pub name: String,
    /// Its module; the name with `_` for `-` if not given.
    pub module: Option<String>,
    /// Whether it is registered from the start, or its module has to be loaded.
    #[serde(default = "yes")]
    pub loaded: bool,
    /// Devices it is for, as `vendor:device`, either of which may be `*`. All if none is given.
    #[serde(default)]
    pub ids: Vec<IdPattern>,
    /// Classes it is for, by their first hexadecimal digits. All if none is given.
    #[serde(default)]
    pub classes: Vec<String>,
    /// Whether it enables VFs when asked through `sriov_numvfs`.
    #[serde(default)]
    pub sriov: bool,
    /// Whether it is a VFIO driver, which matches by override alone.
    #[serde(default)]
    pub vfio: bool,
    /// Whether it is NVIDIA's as built for hypervisors, whose cards can be locked against new users.
    #[serde(default)]
    pub unbind_lock: bool,
}

/// A PCI function.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Function {
    /// Where it is.
    pub address: PciAddress,
    /// Vendor and device.
    pub id: IdPair,
    /// Maker and number of the board.
    #[serde(default)]
    pub board: IdPair,
    /// Base class, subclass and programming interface.
    pub class: u32,
    /// Revision.
    #[serde(default)]
    pub revision: u8,
    /// What it is on the PCI Express fabric; conventional PCI if not given.
    pub express: Option<Express>,
    /// Generation and lanes of its link, at most and now.
    #[serde(default)]
    pub link: Option<Link>,
    /// The bus below it, if it is a bridge.
    pub bus: Option<u8>,
    /// Whether it has access control services, switched on.
    #[serde(default)]
    pub acs: bool,
    /// Device serial number.
    pub serial: Option<u64>,
    /// NUMA node; that of the port above if not given.
    pub numa: Option<u32>,
    /// Memory and I/O regions, from BAR 0 on.
    #[serde(default)]
    pub bars: Vec<BarSize>,
    /// MSI-X vectors.
    #[serde(default)]
    pub vectors: u16,
    /// Reset methods, in the kernel's order.
    #[serde(default)]
    pub reset: Vec<String>,
    /// For VGA devices: whether the firmware used it as the console.
    pub boot_vga: Option<bool>,
    /// Virtual functions.
    pub sriov: Option<Sriov>,
    /// Network interface it has while on a host driver. Its VFs have one each, with `v` and their
    /// index appended.
    pub net: Option<String>,
    /// Disk it has while on a host driver.
    pub disk: Option<Disk>,
    /// Users the nvidia driver counts; unbinding it from them never returns.
    #[serde(default)]
    pub users: u32,
    /// Whether it is there from the start, or waits to be plugged in.
    #[serde(default = "yes")]
    pub present: bool,
    /// More of the same. In names, `{}` stands for the number of the copy.
    pub copies: Option<Copies>,
}

/// What a function is on the PCI Express fabric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Express {
    /// Endpoint.
    Endpoint,
    /// Endpoint inside the root complex.
    Integrated,
    /// Port of the root complex.
    RootPort,
    /// Port of a switch, towards the root.
    SwitchUp,
    /// Port of a switch, towards devices.
    SwitchDown,
}

/// A link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Generation of PCI Express.
    pub generation: u8,
    /// Lanes.
    pub lanes: u8,
}

/// A function's virtual functions.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sriov {
    /// How many there can be.
    pub total: u16,
    /// How many there are from the start.
    #[serde(default)]
    pub enabled: u16,
    /// Routing id distance from the PF to its first VF.
    pub offset: u16,
    /// Routing id distance from one VF to the next.
    pub stride: u16,
    /// Their device number.
    pub device: u16,
    /// Regions of each.
    #[serde(default)]
    pub bars: Vec<BarSize>,
    /// Interrupt vectors that the driver shares out among them, if it does.
    pub msix: Option<Msix>,
    /// What the xe driver shares out among them.
    pub xe: Option<Xe>,
    /// The vGPU types that the nvidia driver knows for them.
    pub vgpu: Option<Vgpu>,
}

/// Interrupt vectors shared out among virtual functions.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Msix {
    /// How many there are.
    pub total: u16,
    /// How many each has at first.
    pub each: u16,
}

/// What the xe driver shares out among virtual functions.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Xe {
    /// Video memory for all of them.
    pub memory: BarSize,
    /// Whether each has a priority of its own, or the firmware one for all.
    #[serde(default)]
    pub priorities: bool,
    /// Whether that may be high.
    #[serde(default)]
    pub high: bool,
}

/// vGPU types.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vgpu {
    /// How much there is for all virtual functions.
    pub room: u32,
    /// The types.
    pub types: Vec<VgpuType>,
}

/// A vGPU type.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VgpuType {
    /// Its number.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// How much of the room it takes.
    pub size: u32,
}

/// A disk.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its name in `/dev`.
    pub name: String,
    /// How many partitions it has, named as the kernel does.
    #[serde(default)]
    pub partitions: u8,
}

/// A mounted disk.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    /// Name of the disk or partition in `/dev`.
    pub disk: String,
    /// Where it is mounted.
    pub at: String,
    /// File system.
    pub kind: String,
}

/// What can be made into mediated devices.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// A function's address, or any name for what is none.
    #[serde(rename = "parent")]
    pub name: String,
    /// For a function: the driver that can do it.
    pub driver: Option<String>,
    /// How much there is to give away.
    pub room: u32,
    /// Into what.
    #[serde(rename = "type")]
    pub types: Vec<PartType>,
}

/// A type of mediated devices.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartType {
    /// Name of its directory.
    pub id: String,
    /// What its driver calls it.
    pub name: String,
    /// What a guest sees.
    #[serde(default = "vfio_pci")]
    pub api: String,
    /// How much of the parent's room one takes.
    pub takes: u32,
}

fn vfio_pci() -> String {
    "vfio-pci".to_owned()
}

impl Parent {
    /// The type of that name.
    pub fn kind(&self, id: &str) -> Option<&PartType> {
        self.types.iter().find(|kind| kind.id == id)
    }
}

/// A process.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its name (`comm`).
    pub command: String,
    /// Files it has open, as its `fd` links show them.
    #[serde(default)]
    pub open: Vec<String>,
}

/// Copies of a function at regular distances.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Copies {
    /// How many there are in all.
    pub count: u16,
    /// Routing id distance from one to the next.
    pub every: u16,
    /// Distance from the bus below one to the bus below the next, if they are bridges.
    #[serde(default)]
    pub buses: u8,
    /// The number of the first.
    #[serde(default)]
    pub first: u16,
}

fn yes() -> bool {
    true
}

impl Described {
    /// Parses the text of a described host.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        toml::from_str::<Self>(text)?.expanded()
    }

    /// The host that ships under this name, or that a file of this path describes.
    pub fn named(name: &str) -> anyhow::Result<Self> {
        match SHIPPED.iter().find(|(shipped, _)| *shipped == name) {
            Some((_, text)) => Self::parse(text),
            None if Path::new(name).exists() => Self::read(Path::new(name)),
            None => {
                let shipped = SHIPPED.map(|(name, _)| name).join(", ");
                anyhow::bail!("no host '{name}': name a file, or one of {shipped}")
            }
        }
    }

    /// Reads a described host from a file.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{} describes no host", path.display()))
    }

    /// The host of [`SCALE`] with this many functions, a multiple of 50 up to 10,000.
    pub fn scaled(functions: u16) -> anyhow::Result<Self> {
        let mut host: Self = toml::from_str(SCALE)?;
        for copies in host.functions.iter_mut().filter_map(|f| f.copies.as_mut()) {
            copies.count = functions / 50;
        }
        host.expanded()
    }

    fn expanded(mut self) -> anyhow::Result<Self> {
        self.functions = self.functions.iter().flat_map(Function::expand).collect();
        self.functions.sort_by_key(|function| function.address);
        for pair in self.functions.windows(2) {
            let address = pair[0].address;
            anyhow::ensure!(address != pair[1].address, "{address} is described twice");
        }
        Ok(self)
    }
}

impl Driver {
    /// Its module's name.
    pub fn module(&self) -> String {
        self.module.clone().unwrap_or_else(|| self.name.replace('-', "_"))
    }

    /// Whether its table has a function of these numbers.
    pub fn is_for(&self, id: IdPair, class: u32) -> bool {
        let class = format!("{class:06x}");
        (self.ids.is_empty() || self.ids.iter().any(|pattern| pattern.matches(id)))
            && (self.classes.is_empty() || self.classes.iter().any(|c| class.starts_with(c)))
    }
}

impl Disk {
    /// Names of its partitions: a `p` between if the disk's name ends in a digit.
    pub fn parts(&self) -> impl Iterator<Item = String> {
        let between = if self.name.ends_with(|c: char| c.is_ascii_digit()) { "p" } else { "" };
        (1..=self.partitions).map(move |number| format!("{}{between}{number}", self.name))
    }
}

impl Function {
    /// The function and its copies.
    fn expand(&self) -> Vec<Self> {
        let copies = self.copies.unwrap_or(Copies { count: 1, every: 0, buses: 0, first: 0 });
        (0..copies.count).filter_map(|n| self.copy(copies, n)).collect()
    }

    fn copy(&self, copies: Copies, n: u16) -> Option<Self> {
        let named = |name: &String| name.replacen("{}", &(copies.first + n).to_string(), 1);
        let bus = match self.bus {
            Some(bus) => Some(bus.checked_add(copies.buses.checked_mul(u8::try_from(n).ok()?)?)?),
            None => None,
        };
        Some(Self {
            address: moved(self.address, copies.every.checked_mul(n)?)?,
            bus,
            serial: self.serial.map(|serial| serial + u64::from(n)),
            net: self.net.as_ref().map(named),
            disk: self.disk.as_ref().map(|d| Disk { name: named(&d.name), ..d.clone() }),
            copies: None,
            ..self.clone()
        })
    }
}

/// The address at a routing id distance within the same domain.
pub(super) fn moved(address: PciAddress, distance: u16) -> Option<PciAddress> {
    let [bus, rest] = address.routing_id().checked_add(distance)?.to_be_bytes();
    PciAddress::new(address.domain(), bus, rest >> 3, rest & 7)
}
