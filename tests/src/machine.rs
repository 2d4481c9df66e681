//! The lab's machine: which devices it has, where they sit, and where its kernel finds them.
//!
//! The one place that knows addresses. It describes; it starts nothing.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// A PCI function as the lab's kernel is expected to find it.
///
/// Bus numbers are the firmware's: depth first in the order of the slots on the root bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Function {
    /// QEMU's identifier of the device, for QMP.
    pub id: &'static str,
    /// The address below `/sys/bus/pci/devices`.
    pub address: &'static str,
    /// Vendor identifier.
    pub vendor: u16,
    /// Device identifier.
    pub device: u16,
}

const fn function(id: &'static str, address: &'static str, vendor: u16, device: u16) -> Function {
    Function { id, address, vendor, device }
}

/// An SR-IOV network card (igb, 7 virtual functions) on a root port of its own.
pub const NIC: Function = function("nic", "0000:01:00.0", 0x8086, 0x10c9);
/// An SR-IOV disk controller (NVM Express) on a root port of its own.
pub const NVME: Function = function("nvme", "0000:02:00.0", 0x1b36, 0x0010);
/// The display function of the "GPU"; video memory in BAR 0, reset by its bus only.
pub const GPU: Function = function("gpu", "0000:03:00.0", 0x1234, 0x1111);
/// The audio function of the "GPU", in the display function's group.
pub const GPU_AUDIO: Function = function("gpu-audio", "0000:03:00.1", 0x8086, 0x2668);
/// A network card below a PCI Express switch; its group holds it and its downstream port.
pub const SWITCH_NIC_A: Function = function("switch-nic-a", "0000:06:00.0", 0x8086, 0x10d3);
/// Its twin below the other downstream port, in a group of its own.
pub const SWITCH_NIC_B: Function = function("switch-nic-b", "0000:07:00.0", 0x8086, 0x10d3);
/// A network card below a switch whose root port has no ACS: one group with all below that port.
pub const SHARED_NIC: Function = function("shared-nic", "0000:0a:00.0", 0x8086, 0x10d3);
/// A disk with a file system, in the group of [`SHARED_NIC`].
pub const SHARED_DISK: Function = function("shared-disk", "0000:0b:00.0", 0x1b36, 0x0010);
/// A device with a DMA engine and no driver, on the root bus.
pub const EDU: Function = function("edu", "0000:00:0a.0", 0x1234, 0x11e8);
/// A network card like [`NIC`], on NUMA node 1.
pub const FAR_NIC: Function = function("far-nic", "0000:81:00.0", 0x8086, 0x10c9);

/// A card like [`SWITCH_NIC_A`] and its twin, below a root port of its own; only where the lab is booted
/// anew.
pub const THIRD_NIC: Function = function("third-nic", "0000:0c:00.0", 0x8086, 0x10d3);

/// SR-IOV disk controllers of the machine for hundreds of virtual functions, on root ports of their
/// own.
pub const MANY: [Function; 4] = [
    function("nvme-1", "0000:01:00.0", 0x1b36, 0x0010),
    function("nvme-2", "0000:02:00.0", 0x1b36, 0x0010),
    function("nvme-3", "0000:03:00.0", 0x1b36, 0x0010),
    function("nvme-4", "0000:04:00.0", 0x1b36, 0x0010),
];

/// A root port with nothing below it, and the address of what is plugged in there.
pub const FREE_PORT: (&str, &str) = ("port-free", "0000:0d:00.0");

/// Every function of the machine that scenarios usually have.
pub const FUNCTIONS: [Function; 10] =
    [NIC, NVME, GPU, GPU_AUDIO, SWITCH_NIC_A, SWITCH_NIC_B, SHARED_NIC, SHARED_DISK, EDU, FAR_NIC];

/// Vendor and device of a virtual function of [`NIC`].
pub const NIC_VF: (u16, u16) = (0x8086, 0x10ca);

/// The label of the file system on [`SHARED_DISK`].
pub const DISK_LABEL: &str = "hostdisk";

/// Where the machine finds its files, as QEMU sees them.
#[derive(Debug, Clone, Copy)]
pub struct Files {
    /// The root file system's image; never written.
    pub root: &'static str,
    /// The product and the agent; never written.
    pub payload: &'static str,
    /// The disk of [`SHARED_DISK`]; never written.
    pub disk: &'static str,
    /// Unix socket for QMP.
    pub qmp: &'static str,
    /// Unix socket of the agent's port.
    pub agent: &'static str,
}

/// The name of the agent's virtio-serial port.
pub const AGENT_PORT: &str = "org.vfiod.lab";

/// Which kernel the machine boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kernel {
    /// The distribution's, as it is.
    Distribution,
    /// The distribution's source with options of the lab's own: IOMMUFD, a node per VFIO device,
    /// mediated devices, errors on demand.
    Own,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Distribution => "distribution",
            Self::Own => "own",
        })
    }
}

impl FromStr for Kernel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = [Self::Distribution, Self::Own];
        let found = known.into_iter().find(|kernel| kernel.to_string() == text);
        found.ok_or_else(|| format!("the kernels are {} and {}", known[0], known[1]))
    }
}

/// What a machine is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// Scenarios, some of which start guests.
    Scenarios,
    /// Benchmarks, whose guests never run.
    Benchmarks,
    /// Scenarios through boots: all of the usual devices, [`THIRD_NIC`], and a port that is free.
    Boots,
    /// Hundreds of virtual functions, of [`MANY`] alone, and no guests.
    Many,
}

impl Purpose {
    /// Processors.
    ///
    /// With two, QEMU 10 can free a memory map that the other one still uses when a BAR of a guest
    /// moves (its assertion in `iotlb_to_section` fails). Where no guest runs there are two,
    /// so that what udev and systemd make of a change runs beside what is measured, as it does on
    /// any real host.
    fn processors(self) -> u8 {
        match self {
            Self::Scenarios | Self::Boots => 1,
            Self::Benchmarks | Self::Many => 2,
        }
    }

    /// How many virtual functions [`NVME`], or each of [`MANY`], can have.
    pub fn disk_functions(self) -> u16 {
        match self {
            Self::Scenarios | Self::Boots => 4,
            Self::Benchmarks => 64,
            Self::Many => 127,
        }
    }

    /// Memory of both NUMA nodes, in MiB.
    fn memory(self) -> [u16; 2] {
        match self {
            Self::Scenarios | Self::Boots | Self::Benchmarks => [1536, 1024],
            Self::Many => [2560, 512],
        }
    }

    /// What its kernel is told beside the usual. Through boots, the lab's root is not mounted by its
    /// own initial file system alone, and `vfio-pci` is told of the device with no driver, as on hosts
    /// that have no policy; for many, the firmware leaves little room for virtual functions.
    pub fn kernel_arguments(self) -> &'static str {
        match self {
            Self::Scenarios | Self::Benchmarks => "",
            Self::Boots => " rw fsck.mode=skip vfio-pci.ids=1234:11e8",
            Self::Many => " pci=realloc",
        }
    }

    /// What can be assigned on it.
    fn devices(self) -> Vec<Value> {
        let functions = self.disk_functions();
        match self {
            Self::Scenarios | Self::Benchmarks => usual(functions),
            Self::Boots => [usual(functions), third_nic()].concat(),
            Self::Many => many(functions),
        }
    }
}

/// QEMU's arguments for the machine: everything but the kernel and the console.
pub fn arguments(files: &Files, purpose: Purpose) -> Vec<String> {
    let processors = purpose.processors();
    let mut arguments: Vec<String> = [
        "-machine q35,kernel-irqchip=split,sata=off,vmport=off",
        "-accel tcg,thread=multi",
        "-cpu EPYC-v4,check=off",
        "-nodefaults",
        "-display none",
        "-no-reboot",
    ]
    .iter()
    .flat_map(|line| line.split(' '))
    .map(String::from)
    .collect();
    let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);

    // Two NUMA nodes, the second of memory and devices alone.
    let memory = purpose.memory();
    option("-m", format!("{}M", memory[0] + memory[1]));
    for (node, size) in memory.iter().enumerate() {
        option("-object", format!("memory-backend-ram,id=memory{node},size={size}M"));
    }
    option("-smp", processors.to_string());
    option("-numa", format!("node,nodeid=0,cpus=0-{},memdev=memory0", processors - 1));
    option("-numa", "node,nodeid=1,memdev=memory1".to_owned());
    option("-qmp", format!("unix:{},server=on,wait=off", files.qmp));
    option("-chardev", format!("socket,id=agent,path={},server=on,wait=off", files.agent));
    for (id, file) in [("root", files.root), ("payload", files.payload), ("disk", files.disk)] {
        option("-drive", format!("if=none,id={id},file={file},format=raw,snapshot=on"));
    }
    // Zeros to begin with; what is written stays until the machine ends.
    option(
        "-drive",
        "if=none,id=void,driver=null-co,size=64M,read-zeroes=on,snapshot=on".to_owned(),
    );

    let devices = own_devices().into_iter().chain(purpose.devices());
    for device in devices {
        option("-device", device.to_string());
    }
    arguments
}

/// The IOMMU and the lab's own disks and port; the IOMMU has to come first.
fn own_devices() -> Vec<Value> {
    vec![
        json!({"driver": "intel-iommu", "intremap": "on", "caching-mode": true, "device-iotlb": true}),
        json!({"driver": "virtio-blk-pci", "drive": "root", "bus": "pcie.0", "addr": "01.0"}),
        json!({"driver": "virtio-blk-pci", "drive": "payload", "bus": "pcie.0", "addr": "02.0"}),
        json!({"driver": "virtio-serial-pci", "id": "serial", "bus": "pcie.0", "addr": "03.0"}),
        json!({"driver": "virtserialport", "chardev": "agent", "bus": "serial.0", "name": AGENT_PORT}),
    ]
}

fn usual(functions: u16) -> Vec<Value> {
    [
        nic(),
        nvme(functions),
        gpu_with_port(),
        switch(),
        switch_without_acs(),
        vec![json!({"driver": "edu", "id": EDU.id, "bus": "pcie.0", "addr": "0a.0"})],
        far_node(),
    ]
    .concat()
}

fn nic() -> Vec<Value> {
    vec![
        root_port("port-nic", "pcie.0", "04.0", 1),
        json!({"driver": "igb", "id": NIC.id, "bus": "port-nic"}),
    ]
}

fn nvme(functions: u16) -> Vec<Value> {
    vec![
        root_port("port-nvme", "pcie.0", "05.0", 2),
        json!({"driver": "nvme-subsys", "id": "subsystem"}),
        json!({"driver": "nvme", "id": NVME.id, "bus": "port-nvme", "subsys": "subsystem",
            "serial": "SRIOV", "max_ioqpairs": 256, "msix_qsize": 256, "sriov_max_vfs": functions,
            "sriov_vq_flexible": functions * 2, "sriov_vi_flexible": functions}),
        json!({"driver": "nvme-ns", "drive": "void", "bus": NVME.id}),
    ]
}

/// Each in a subsystem of its own, whose virtual functions have queues to share.
fn many(functions: u16) -> Vec<Value> {
    let controller = |(at, function): (u8, &Function)| {
        let (port, subsystem) = (format!("port-{}", function.id), format!("of-{}", function.id));
        [
            root_port(&port, "pcie.0", &format!("{:02x}.0", at + 3), at),
            json!({"driver": "nvme-subsys", "id": subsystem}),
            json!({"driver": "nvme", "id": function.id, "bus": port, "subsys": subsystem,
                "serial": function.id, "max_ioqpairs": 256, "msix_qsize": 256,
                "sriov_max_vfs": functions, "sriov_vq_flexible": functions * 2,
                "sriov_vi_flexible": functions}),
        ]
    };
    (1..).zip(&MANY).flat_map(controller).collect()
}

fn gpu_with_port() -> Vec<Value> {
    let mut devices = vec![root_port("port-gpu", "pcie.0", "06.0", 3)];
    devices.extend(gpu());
    devices
}

/// The "GPU", plugged in the order that hot-plug needs: function 0 makes the slot appear.
pub fn gpu() -> [Value; 2] {
    [
        json!({"driver": "intel-hda", "id": GPU_AUDIO.id, "bus": "port-gpu", "addr": "0.1"}),
        json!({"driver": "bochs-display", "id": GPU.id, "bus": "port-gpu", "addr": "0.0",
            "multifunction": true}),
    ]
}

/// Its downstream ports have no ACS, but the root port above does: a group per port.
fn switch() -> Vec<Value> {
    let mut devices = vec![root_port("port-switch", "pcie.0", "07.0", 4)];
    devices.extend(switch_below("port-switch", "switch", 5));
    devices.extend([switch_nic_a(), plugged(SWITCH_NIC_B, "switch-b")]);
    devices
}

/// The card of [`SWITCH_NIC_A`], to plug it in again.
pub fn switch_nic_a() -> Value {
    plugged(SWITCH_NIC_A, "switch-a")
}

/// A card of [`SWITCH_NIC_A`]'s kind, to plug it in below a port. Its network address, and so its serial
/// number, is the same in each.
pub fn plugged(card: Function, port: &str) -> Value {
    let last = match card.id {
        "switch-nic-a" => "0a",
        "switch-nic-b" => "0b",
        _ => "0c",
    };
    json!({"driver": "e1000e", "id": card.id, "bus": port, "mac": format!("52:54:00:00:00:{last}")})
}

/// Below a root port of its own, and the port [`FREE_PORT`]; both after all others, whose bus numbers
/// stay.
fn third_nic() -> Vec<Value> {
    vec![
        root_port("port-third", "pcie.0", "09.0", 11),
        plugged(THIRD_NIC, "port-third"),
        root_port(FREE_PORT.0, "pcie.0", "0c.0", 12),
    ]
}

/// No ACS anywhere on the way up: root port, switch and all below are one group.
fn switch_without_acs() -> Vec<Value> {
    let mut port = root_port("port-shared", "pcie.0", "08.0", 7);
    port["disable-acs"] = json!(true);
    let mut devices = vec![port];
    devices.extend(switch_below("port-shared", "shared", 8));
    devices.extend([
        json!({"driver": "e1000e", "id": SHARED_NIC.id, "bus": "shared-a"}),
        json!({"driver": "nvme", "id": SHARED_DISK.id, "bus": "shared-b", "drive": "disk",
            "serial": "DISK"}),
    ]);
    devices
}

fn far_node() -> Vec<Value> {
    vec![
        json!({"driver": "pxb-pcie", "id": "far", "bus": "pcie.0", "addr": "0b.0", "bus_nr": 128,
            "numa_node": 1}),
        root_port("port-far-nic", "far", "00.0", 10),
        json!({"driver": "igb", "id": FAR_NIC.id, "bus": "port-far-nic"}),
    ]
}

fn root_port(id: &str, bus: &str, addr: &str, slot: u8) -> Value {
    json!({"driver": "pcie-root-port", "id": id, "bus": bus, "addr": addr, "chassis": slot,
        "slot": slot})
}

/// A switch with two downstream ports, `NAME-a` and `NAME-b`.
fn switch_below(port: &str, name: &str, first_slot: u8) -> Vec<Value> {
    let downstream = |letter: char, addr: &str, slot: u8| {
        json!({"driver": "xio3130-downstream", "id": format!("{name}-{letter}"), "bus": name,
            "addr": addr, "chassis": slot, "slot": slot})
    };
    vec![
        json!({"driver": "x3130-upstream", "id": name, "bus": port}),
        downstream('a', "00.0", first_slot),
        downstream('b', "01.0", first_slot + 1),
    ]
}
