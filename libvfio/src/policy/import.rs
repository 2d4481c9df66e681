//! What a host has instead of a policy: options of `vfio-pci`, overrides of driverctl, devices of
//! libvirt's domains. Total functions over texts; a proposal is a text, too. Pure.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::{Mode, Selector};
use crate::address::PciAddress;
use crate::inventory::Inventory;

/// Something that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The file, and the line if it has more.
    pub place: String,
    /// What it says.
    pub what: String,
    /// What to do about it once the policy is in force.
    pub then: &'static str,
    /// What it is for.
    pub mode: Mode,
    /// Whom it means.
    pub select: Vec<Selector>,
}

/// `options vfio-pci ids=…` in a file of modprobe.d(5).
pub fn modprobe(file: &str, text: &str) -> Vec<Found> {
    let found = text.lines().zip(1..).filter_map(|(line, number): (&str, usize)| {
        let mut words = line.split_whitespace();
        let option = words.next() == Some("options");
        let module = words.next().is_some_and(|name| name.replace('-', "_") == "vfio_pci");
        let ids = words.find_map(|word| word.strip_prefix("ids="));
        let select = ids.filter(|_| option && module).map(selectors)?;
        Some(Found {
            place: format!("{file}:{number}"),
            what: line.trim().to_owned(),
            then: "remove the line, and make the initramfs anew",
            mode: Mode::Passthrough,
            select,
        })
    });
    found.filter(|found| !found.select.is_empty()).collect()
}

/// `vfio-pci.ids=…` on the kernel's command line.
pub fn command_line(text: &str) -> Vec<Found> {
    let found = text.split_whitespace().filter_map(|word| {
        let (name, ids) = word.split_once('=')?;
        let select = (name.replace('-', "_") == "vfio_pci.ids").then(|| selectors(ids))?;
        Some(Found {
            place: "/proc/cmdline".to_owned(),
            what: word.to_owned(),
            then: "take it out of the boot loader's configuration",
            mode: Mode::Passthrough,
            select,
        })
    });
    found.filter(|found| !found.select.is_empty()).collect()
}

/// An override of driverctl: a file named by bus and address, which holds a driver's name.
pub fn driverctl(directory: &str, name: &str, text: &str) -> Option<Found> {
    let address: PciAddress = name.strip_prefix("pci-")?.parse().ok()?;
    let driver = text.trim();
    let vfio = driver.replace('_', "-").contains("vfio-pci");
    vfio.then(|| Found {
        place: format!("{directory}/{name}"),
        what: format!("{address} on {driver}"),
        then: "driverctl unset-override, once vfiod has the device",
        mode: Mode::Passthrough,
        select: vec![Selector { address: Some(address), ..Selector::default() }],
    })
}

/// Functions that a libvirt domain has.
pub fn domain(file: &str, name: &str, functions: &[PciAddress]) -> Option<Found> {
    let select = |address: &PciAddress| Selector { address: Some(*address), ..Selector::default() };
    (!functions.is_empty()).then(|| Found {
        place: file.to_owned(),
        what: format!("domain {name} has {} functions", functions.len()),
        then: "say managed='no' there, and let vfiod's hook lease them (vfioctl libvirt-xml)",
        mode: Mode::OnLease,
        select: functions.iter().map(select).collect(),
    })
}

/// `10de:2684,10de:22ba:10de:16f1`, as vfio-pci takes them (`vfio_pci_fill_ids`,
/// `drivers/vfio/pci/vfio_pci.c`); a class after that is not looked at.
fn selectors(ids: &str) -> Vec<Selector> {
    let selector = |id: &str| {
        let mut parts = id.split(':').map(|part| u16::from_str_radix(part, 16).ok());
        let (vendor, device) = (parts.next()??, parts.next()??);
        let subsystem = parts.next().flatten().zip(parts.next().flatten());
        let (vendor, device) = (Some(vendor), Some(device));
        let subsystem = subsystem.filter(|(vendor, device)| (*vendor, *device) != (0xffff, 0xffff));
        Some(Selector { vendor, device, subsystem, ..Selector::default() })
    };
    ids.split(',').filter_map(selector).collect()
}

/// A policy that says what was found, with comments that say what it replaces. Devices of this host
/// that are meant twice are in the first pool that means them.
pub fn proposal(found: &[Found], inventory: &Inventory) -> String {
    let mut text = String::from("# Proposed by 'vfioctl policy import' from what this host has.\n");
    let facts = super::Facts::default();
    let mut taken: BTreeSet<(u32, u8, u8)> = BTreeSet::new();
    for mode in [Mode::Passthrough, Mode::OnLease] {
        let mut select: Vec<String> = Vec::new();
        let mut now = BTreeSet::new();
        let mut lines = Vec::new();
        for one in found.iter().filter(|one| one.mode == mode) {
            lines.push(format!("# {}: {}; then {}\n", one.place, one.what, one.then));
            for selector in &one.select {
                let functions = inventory.functions().filter(|f| selector.matches(&facts, f));
                let slots: Vec<(u32, u8, u8)> = functions
                    .map(|f| (f.address.domain(), f.address.bus(), f.address.device()))
                    .collect();
                let known = !slots.is_empty() && slots.iter().all(|slot| taken.contains(slot));
                let line = written(selector);
                if !known && !select.contains(&line) {
                    select.push(line);
                }
                now.extend(slots);
            }
        }
        taken.extend(now);
        if select.is_empty() {
            continue;
        }
        let name = if mode == Mode::Passthrough { "passthrough" } else { "guests" };
        let (lines, select) = (lines.concat(), select.join(",\n    "));
        // Writing to a text does not fail.
        let _ = write!(
            text,
            "\n{lines}[pool.{name}]\nmode = \"{mode}\"\nselect = [\n    {select},\n]\n"
        );
    }
    text
}

/// A selector as it is written, of those that are found.
fn written(selector: &Selector) -> String {
    let parts = [
        selector.vendor.map(|id| format!("vendor = \"{id:04x}\"")),
        selector.device.map(|id| format!("device = \"{id:04x}\"")),
        selector
            .subsystem
            .map(|(vendor, device)| format!("subsystem = \"{vendor:04x}:{device:04x}\"")),
        selector.address.map(|address| format!("address = \"{address}\"")),
    ];
    format!("{{ {} }}", parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_found_wherever_they_are_and_nothing_else_is() {
        let text = "# options vfio-pci ids=1:2\noptions vfio_pci disable_vga=1 ids=10de:2684,10de:22ba\n\
                    options kvm ids=1:2\noptions vfio-pci ids=\n";
        let found = modprobe("/etc/modprobe.d/a.conf", text);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].place, "/etc/modprobe.d/a.conf:2");
        assert_eq!(found[0].select.len(), 2);
        let found = command_line("quiet vfio-pci.ids=1234:1111:1af4:1100,8086:2668 x");
        let [Found { select, .. }] = &found[..] else { panic!("{found:?}") };
        assert_eq!(select[0].subsystem, Some((0x1af4, 0x1100)));
        assert_eq!(select[1].device, Some(0x2668));
        assert!(command_line("vfio-pci.disable_vga=1 vfio-pci.ids=zz").is_empty());
    }

    #[test]
    fn overrides_are_those_of_pci_devices_for_vfio() {
        let found = driverctl("/etc/driverctl.d", "pci-0000:03:00.0", "vfio-pci\n").unwrap();
        assert_eq!(found.select[0].address, "03:00.0".parse().ok());
        assert!(driverctl("d", "pci-0000:03:00.0", "pci-stub").is_none());
        assert!(driverctl("d", "vmbus-x", "vfio-pci").is_none());
    }
}
