//! A policy as udev rules: which functions go to VFIO before a module loads that has a driver for
//! them, with no daemon running. Pure text; udev(7) has the notation.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::{Facts, Mode, Policy, PortPath, Selector};
use crate::address::PciAddress;
use crate::pci::class::ClassAlias;
use crate::pci::{Identity, Ids};

/// Asks of one function what no rule can: prints its pool, or nothing.
const ASK: &str = "/usr/libexec/vfiod-early %k";

/// The text of the rules, where some pool is on VFIO from boot on. `known` are the devices that the
/// policy has met by their place: another one there is not meant. `aliases` are the `vfio_pci:` lines
/// of the module table.
pub fn rules(
    policy: &Policy,
    facts: &Facts,
    known: &BTreeMap<PciAddress, Identity>,
    aliases: &str,
) -> Option<String> {
    if policy.pools.iter().all(|pool| pool.mode != Mode::Passthrough) {
        return None;
    }
    let mut text = String::from(
        "# Made from the policy in /etc/vfiod by vfiod; changes are lost. What is for guests goes to\n\
         # VFIO before a module loads that has a driver for it.\n\n\
         ACTION!=\"add\", GOTO=\"vfiod_end\"\n\
         SUBSYSTEM!=\"pci\", GOTO=\"vfiod_end\"\n\
         ATTR{class}==\"0x06*\", GOTO=\"vfiod_end\"\n",
    );
    let mut asks = false;
    for pool in policy.pools.iter().filter(|pool| pool.mode == Mode::Passthrough) {
        let name = &pool.name;
        // Virtual functions are made later, with host drivers kept from them, and what is counted,
        // named by its serial number or slot, or known by that number takes more than a rule.
        let met = |selector: &Selector| selector.address.and_then(|at| known.get(&at));
        let plain = |selector: &Selector| {
            let by_serial = selector.serial.is_some()
                || met(selector).is_some_and(|known| known.serial.is_some());
            !by_serial && selector.slot.is_none()
        };
        let all = || pool.select.iter().chain(&pool.except);
        if pool.vfs.is_some() {
            continue;
        }
        asks = true;
        if pool.keep_for_host > 0 || !all().all(plain) {
            let _ = writeln!(text, "\n# pool {name}: asked for, one by one");
            continue;
        }
        let _ = writeln!(text, "\n# pool {name}");
        for selector in &pool.select {
            let _ =
                writeln!(text, "{}, ENV{{VFIOD_POOL}}=\"{name}\"", terms(selector, facts, known));
        }
        for selector in &pool.except {
            let terms = terms(selector, facts, known);
            let _ =
                writeln!(text, "ENV{{VFIOD_POOL}}==\"{name}\", {terms}, ENV{{VFIOD_POOL}}=\"\"");
        }
    }
    if asks {
        let _ = write!(
            text,
            "\n# other functions of the same devices, and what takes more than a rule\n\
             ENV{{VFIOD_POOL}}==\"\", TEST!=\"physfn\", PROGRAM==\"{ASK}\", \
             ENV{{VFIOD_POOL}}=\"%c\"\n\
             ENV{{VFIOD_POOL}}==\"\", GOTO=\"vfiod_end\"\n\n\
             ENV{{VFIOD_DRIVER}}=\"vfio-pci\"\n",
        );
        for (pattern, module) in variants(aliases) {
            let _ = writeln!(
                text,
                "ATTR{{modalias}}==\"pci:{pattern}\", ENV{{VFIOD_DRIVER}}=\"{module}\""
            );
        }
        text.push_str(
            "ATTR{driver_override}=\"$env{VFIOD_DRIVER}\"\n\
             RUN{builtin}+=\"kmod load $env{VFIOD_DRIVER}\"\n",
        );
    }
    Some(text + "\nLABEL=\"vfiod_end\"\n")
}

/// Patterns of variant drivers, such that of those that match the last is the one to take: that
/// with the fewest wildcards, of equals the first ([`crate::modalias::best_vfio_driver`]).
fn variants(aliases: &str) -> Vec<(&str, &str)> {
    let mut found: Vec<(&str, &str)> = aliases
        .lines()
        .filter_map(|line| line.strip_prefix("alias vfio_pci:")?.split_once(' '))
        .map(|(pattern, module)| (pattern, module.trim()))
        .filter(|(_, module)| !matches!(*module, "vfio_pci" | "vfio-pci"))
        .collect();
    found.reverse();
    found.sort_by_key(|(pattern, _)| std::cmp::Reverse(pattern.matches('*').count()));
    found
}

/// A selector's terms, all of which a rule can decide on but serial number and slot.
fn terms(selector: &Selector, facts: &Facts, known: &BTreeMap<PciAddress, Identity>) -> String {
    let mut terms = Vec::new();
    let mut attribute =
        |name: &str, value: String| terms.push(format!("ATTR{{{name}}}==\"{value}\""));
    let met = selector.address.and_then(|address| known.get(&address));
    let ids = met.map(|known| known.ids).unwrap_or_default();
    let Ids { vendor, device, subsystem_vendor, subsystem_device, .. } = ids;
    let wanted_subsystem = selector.subsystem.or(subsystem_vendor.zip(subsystem_device));
    if let Some(id) = selector.vendor.or(vendor) {
        attribute("vendor", format!("0x{id:04x}"));
    }
    if let Some(id) = selector.device.or(device) {
        attribute("device", format!("0x{id:04x}"));
    }
    if let Some((vendor, device)) = wanted_subsystem {
        attribute("subsystem_vendor", format!("0x{vendor:04x}"));
        attribute("subsystem_device", format!("0x{device:04x}"));
    }
    if let Some(class) = selector.class {
        attribute("class", class_pattern(class).to_owned());
    }
    if let Some(node) = selector.numa_node {
        attribute("numa_node", node.to_string());
    }
    if let Some(driver) = &selector.driver {
        let patterns: Vec<String> =
            facts.patterns(driver).iter().map(|pattern| format!("pci:{pattern}")).collect();
        // Without any, no device: an empty alternative would match none either.
        attribute("modalias", patterns.join("|"));
    }
    if let Some(address) = selector.address {
        terms.push(format!("KERNEL==\"{address}\""));
        let ports = met.into_iter().flat_map(|known| &known.upstream).chain([&address]);
        let way: Vec<String> = ports.map(ToString::to_string).collect();
        if way.len() > 1 {
            terms.push(format!("DEVPATH==\"*/{}\"", way.join("/")));
        }
    }
    if let Some(path) = &selector.path {
        terms.push(format!("DEVPATH==\"{}\"", device_path(path)));
    }
    terms.join(", ")
}

/// The classes of [`ClassAlias::matches`] as patterns of the attribute.
fn class_pattern(class: ClassAlias) -> &'static str {
    match class {
        ClassAlias::Gpu => "0x03*",
        ClassAlias::Accelerator => "0x12*",
        ClassAlias::Nic => "0x02*",
        ClassAlias::Nvme => "0x0108*",
        ClassAlias::Storage => "0x01*",
        ClassAlias::Audio => "0x0401*|0x0403*",
        ClassAlias::Usb => "0x0c03*",
        ClassAlias::Bridge => "0x06*",
    }
}

fn device_path(path: &PortPath) -> String {
    let (domain, bus) = path.root;
    let hops = path
        .hops
        .iter()
        .map(|(device, function)| format!("/{domain:04x}:??:{device:02x}.{function}"));
    let way = format!("/devices/pci{domain:04x}:{bus:02x}{}", hops.collect::<String>());
    format!("{way}|{way}/*")
}
