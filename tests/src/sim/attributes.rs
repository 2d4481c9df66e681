//! What a function shows in its sysfs directory (`drivers/pci/pci-sysfs.c`, `drivers/pci/iov.c`).
//! Reads the kernel's state, changes nothing.

use libvfio::address::PciAddress;

use super::config::{self, State};
use super::described::Function;
use super::kernel::{Device, Kernel};
use super::resource;

/// A file in a function's directory.
#[derive(Debug)]
pub(super) struct Attribute {
    pub(super) name: &'static str,
    pub(super) mode: u16,
    /// Which functions have it, from when they are added until they go.
    pub(super) of: fn(&Device) -> bool,
    show: fn(&Kernel, &Device) -> String,
}

/// Everything but `config`, which is no text.
pub(super) const ATTRIBUTES: [Attribute; 32] = [
    read_only("vendor", all, |_, d| format!("0x{:04x}\n", d.description.id.vendor)),
    read_only("device", all, |_, d| format!("0x{:04x}\n", d.description.id.device)),
    read_only("subsystem_vendor", all, |_, d| format!("0x{:04x}\n", d.description.board.vendor)),
    read_only("subsystem_device", all, |_, d| format!("0x{:04x}\n", d.description.board.device)),
    read_only("class", all, |_, d| format!("0x{:06x}\n", d.description.class)),
    read_only("revision", all, |_, d| format!("0x{:02x}\n", d.description.revision)),
    read_only("modalias", all, |_, d| modalias(&d.description) + "\n"),
    Attribute { name: "uevent", mode: 0o644, of: all, show: |_, d| uevent(d) },
    read_only("resource", all, |_, d| resource::text(&d.regions)),
    read_only("irq", all, |_, d| if d.physical.is_some() { "0\n" } else { "16\n" }.into()),
    read_only("numa_node", all, |_, d| match d.numa {
        Some(node) => format!("{node}\n"),
        None => "-1\n".into(),
    }),
    read_only("power_state", all, |_, d| if asleep(d) { "D3hot\n" } else { "D0\n" }.into()),
    writable("driver_override", all, |_, d| {
        format!("{}\n", d.driver_override.as_deref().unwrap_or("(null)"))
    }),
    writable("d3cold_allowed", all, |_, d| format!("{}\n", u8::from(d.d3cold_allowed))),
    write_only("remove", all),
    write_only("rescan", all),
    writable("reset_method", resettable, |_, d| d.reset_methods.join(" ") + "\n"),
    write_only("reset", resettable),
    read_only(
        "boot_vga",
        |d| d.description.boot_vga.is_some(),
        |_, d| format!("{}\n", u8::from(d.description.boot_vga == Some(true))),
    ),
    read_only("secondary_bus_number", is_bridge, |_, d| {
        format!("{}\n", d.description.bus.unwrap_or(0))
    }),
    read_only("subordinate_bus_number", is_bridge, |kernel, d| {
        format!("{}\n", kernel.subordinate.get(&d.description.address).unwrap_or(&0))
    }),
    read_only("sriov_totalvfs", is_physical, |_, d| sriov(d, |sriov| sriov.total)),
    writable("sriov_numvfs", is_physical, |_, d| format!("{}\n", d.vfs.len())),
    read_only("sriov_offset", is_physical, |_, d| sriov(d, |sriov| sriov.offset)),
    read_only("sriov_stride", is_physical, |_, d| sriov(d, |sriov| sriov.stride)),
    read_only("sriov_vf_device", is_physical, |_, d| {
        format!("{:x}\n", d.description.sriov.as_ref().map_or(0, |sriov| sriov.device))
    }),
    writable("sriov_drivers_autoprobe", is_physical, |_, d| format!("{}\n", u8::from(d.autoprobe))),
    read_only("sriov_vf_total_msix", is_physical, |_, d| {
        let msix = d.description.sriov.as_ref().and_then(|sriov| sriov.msix);
        format!("{}\n", msix.filter(|_| d.driver.is_some()).map_or(0, |msix| msix.total))
    }),
    read_only("aer_dev_fatal", is_express, |_, d| errors(d.errors[0], "FATAL")),
    read_only("aer_dev_nonfatal", is_express, |_, d| errors(d.errors[1], "NONFATAL")),
    write_only("sriov_vf_msix_count", |d| d.physical.is_some()),
    read_only(
        "max_link_speed",
        |d| d.description.link.is_some(),
        |_, d| {
            let speed = match d.description.link.map_or(0, |link| link.generation) {
                1 => "2.5",
                2 => "5.0",
                3 => "8.0",
                4 => "16.0",
                5 => "32.0",
                6 => "64.0",
                _ => return "Unknown\n".into(),
            };
            format!("{speed} GT/s PCIe\n")
        },
    ),
];

const fn read_only(
    name: &'static str,
    of: fn(&Device) -> bool,
    show: fn(&Kernel, &Device) -> String,
) -> Attribute {
    Attribute { name, mode: 0o444, of, show }
}

const fn writable(
    name: &'static str,
    of: fn(&Device) -> bool,
    show: fn(&Kernel, &Device) -> String,
) -> Attribute {
    Attribute { name, mode: 0o644, of, show }
}

const fn write_only(name: &'static str, of: fn(&Device) -> bool) -> Attribute {
    Attribute { name, mode: 0o200, of, show: |_, _| String::new() }
}

fn all(_: &Device) -> bool {
    true
}

fn is_bridge(device: &Device) -> bool {
    device.description.bus.is_some()
}

/// Whoever speaks PCI Express has Advanced Error Reporting here.
fn is_express(device: &Device) -> bool {
    device.description.express.is_some()
}

/// `aer_dev_fatal_show` and its like (`drivers/pci/pcie/aer.c`), of the kinds that are known here.
fn errors(count: u64, total: &str) -> String {
    format!("Undefined 0\nTLP 0\nCmpltAbrt {count}\nUnsupReq 0\nTOTAL_ERR_{total} {count}\n")
}

fn is_physical(device: &Device) -> bool {
    device.description.sriov.is_some()
}

/// The files are made when the function is added, and stay if all methods are disabled later.
fn resettable(device: &Device) -> bool {
    !device.description.reset.is_empty()
}

/// vfio-pci puts what nobody uses into D3hot, by the power capability that a VF does not have.
fn asleep(device: &Device) -> bool {
    device.vfio.is_some() && device.physical.is_none()
}

fn sriov(device: &Device, field: fn(&super::described::Sriov) -> u16) -> String {
    format!("{}\n", device.description.sriov.as_ref().map_or(0, field))
}

/// `pci_uevent` and the driver the core adds.
fn uevent(device: &Device) -> String {
    let function = &device.description;
    let driver = device.driver.as_ref().map(|name| format!("DRIVER={name}\n")).unwrap_or_default();
    let (id, board) = (function.id, function.board);
    format!(
        "{driver}PCI_CLASS={:04X}\nPCI_ID={:04X}:{:04X}\nPCI_SUBSYS_ID={:04X}:{:04X}\n\
         PCI_SLOT_NAME={}\nMODALIAS={}\n",
        function.class,
        id.vendor,
        id.device,
        board.vendor,
        board.device,
        function.address,
        modalias(function),
    )
}

fn modalias(function: &Function) -> String {
    let (id, board) = (function.id, function.board);
    let [_, base, sub, interface] = function.class.to_be_bytes();
    format!(
        "pci:v{:08X}d{:08X}sv{:08X}sd{:08X}bc{base:02X}sc{sub:02X}i{interface:02x}",
        id.vendor, id.device, board.vendor, board.device
    )
}

impl Attribute {
    /// The attribute of that name, if the device has it.
    pub(super) fn of(device: &Device, name: &str) -> Option<&'static Self> {
        const { &ATTRIBUTES }.iter().find(|a| a.name == name && (a.of)(device))
    }
}

impl Kernel {
    /// What an attribute reads.
    pub(super) fn show(&self, device: &Device, attribute: &Attribute) -> String {
        (attribute.show)(self, device)
    }

    /// The bytes of `config`.
    pub(super) fn config(&self, device: &Device) -> Vec<u8> {
        let function = &device.description;
        let state = State {
            regions: &device.regions,
            vfs: u16::try_from(device.vfs.len()).unwrap_or(u16::MAX),
            vectors: device.given.vectors,
            is_virtual: device.physical.is_some(),
            multifunction: device.physical.is_none() && self.multifunction(function.address),
            subordinate: self.subordinate.get(&function.address).copied().unwrap_or(0),
            asleep: asleep(device) && self.held(device).is_none(),
        };
        let bytes = config::bytes(function, &state);
        match device.damage {
            None => bytes,
            Some(damage) => config::damaged(bytes, damage),
        }
    }

    /// Files in folders of a function's directory, with their texts. A path that ends in `/` is an
    /// empty folder.
    pub(super) fn deeper(
        &self,
        address: PciAddress,
        device: &Device,
    ) -> Vec<(String, u16, String)> {
        let mut files = vec![
            ("power/control".to_owned(), 0o644, format!("{}\n", device.power_control)),
            ("power/runtime_status".to_owned(), 0o444, "active\n".to_owned()),
        ];
        files.extend(self.vendor_files(device));
        for (class, name, path) in self.members_of(address) {
            let below = path.strip_prefix(&device.path).unwrap_or_default().trim_start_matches('/');
            let mut add = |file: &str, text: String| {
                files.push((format!("{below}/{file}"), 0o444, text));
            };
            match class {
                "net" => {
                    add("operstate", "up\n".into());
                    add("address", format!("{}\n", mac(address)));
                }
                "block" => {
                    let minor = self.files.minors.get(&name).copied().unwrap_or(0);
                    add("dev", format!("259:{minor}\n"));
                    add("holders/", String::new());
                }
                _ => add("dev", format!("511:{}\n", device.vfio.unwrap_or(0))),
            }
        }
        files
    }
}

/// A locally administered address that nobody else has.
fn mac(address: PciAddress) -> String {
    let [_, _, high, low] = address.domain().to_be_bytes();
    let [bus, rest] = address.routing_id().to_be_bytes();
    format!("02:00:{high:02x}:{low:02x}:{bus:02x}:{rest:02x}")
}
