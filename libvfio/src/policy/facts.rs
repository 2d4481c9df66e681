//! What selectors ask beyond an inventory: names of slots, and the host drivers of devices by the
//! kernel's module tables. Reads through [`crate::host`]; never writes.

use std::collections::BTreeMap;

use crate::address::PciAddress;
use crate::error::Error;
use crate::host::HostRoot;
use crate::modalias::{glob, same_driver};
use crate::pci::Function;

/// What was found.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// By name, domain, bus and device of what is in the slot.
    slots: BTreeMap<String, (u32, u8, u8)>,
    /// What modules are for: patterns of `pci:` aliases, by module.
    modules: BTreeMap<String, Vec<String>>,
    /// Registered drivers, and the modules they come from: of their name where nothing is said.
    drivers: Vec<(String, String)>,
}

impl Facts {
    /// Reads what can be asked. Of the module tables only what is for PCI devices.
    pub fn read(host: &HostRoot) -> Result<Self, Error> {
        let aliases = host.modules("modules.alias")?.unwrap_or_default();
        let mut modules: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in aliases.lines() {
            let Some(rest) = line.strip_prefix("alias pci:") else { continue };
            let Some((pattern, module)) = rest.split_once(' ') else { continue };
            modules.entry(module.trim().to_owned()).or_default().push(pattern.to_owned());
        }
        let dir = host.sys("bus/pci/drivers");
        let with_module = |driver: String| {
            let module = dir.sub(&driver).link_name("module").unwrap_or_else(|| driver.clone());
            (driver, module)
        };
        let drivers = dir.list()?.into_iter().map(with_module).collect();
        Ok(Self { slots: slots(host)?, modules, drivers })
    }

    /// Whether a function is in the slot of that name.
    pub(super) fn is_in_slot(&self, address: PciAddress, slot: &str) -> bool {
        let place = (address.domain(), address.bus(), address.device());
        self.slots.get(slot) == Some(&place)
    }

    /// The name of the slot a function is in.
    pub fn slot(&self, address: PciAddress) -> Option<&str> {
        let place = (address.domain(), address.bus(), address.device());
        self.slots.iter().find(|(_, at)| **at == place).map(|(name, _)| name.as_str())
    }

    /// Whether a driver of the host, or the module of that name, is for a function.
    pub(super) fn is_for(&self, driver: &str, function: &Function) -> bool {
        // A built-in driver has no aliases in the table.
        same_driver(function.driver.as_deref(), Some(driver))
            || self.patterns(driver).iter().any(|pattern| covers(pattern, function))
    }

    /// The patterns that a driver's module has for devices.
    pub(super) fn patterns(&self, driver: &str) -> &[String] {
        let own = self.drivers.iter().find(|(name, _)| same_driver(Some(name), Some(driver)));
        let module = own.map_or(driver, |(_, module)| module.as_str());
        let found = self.modules.iter().find(|(name, _)| same_driver(Some(name), Some(module)));
        found.map(|(_, patterns)| patterns.as_slice()).unwrap_or_default()
    }

    /// The registered driver that the host has for a function, by the module tables: the one made
    /// for it most closely.
    pub fn host_driver(&self, function: &Function) -> Option<&str> {
        let for_it = |(module, patterns): (&String, &Vec<String>)| {
            let fitting = patterns.iter().filter(|pattern| covers(pattern, function));
            let wildcards = fitting.map(|pattern| pattern.matches('*').count()).min()?;
            let from_it = |(_, from): &&(String, String)| same_driver(Some(from), Some(module));
            let driver = self.drivers.iter().find(from_it)?;
            Some((wildcards, driver.0.as_str()))
        };
        self.modules.iter().filter_map(for_it).min().map(|(_, driver)| driver)
    }
}

fn covers(pattern: &str, function: &Function) -> bool {
    let alias = function.modalias.as_deref().and_then(|alias| alias.strip_prefix("pci:"));
    alias.is_some_and(|alias| glob(pattern, alias.trim_end()))
}

fn slots(host: &HostRoot) -> Result<BTreeMap<String, (u32, u8, u8)>, Error> {
    let dir = host.sys("bus/pci/slots");
    let place = |name: String| {
        let text = dir.sub(&name).attr("address").ok()??;
        // Without a function: `0000:03:00`. An empty slot of a hotplug controller has none.
        let at: PciAddress = format!("{text}.0").parse().ok()?;
        Some((name, (at.domain(), at.bus(), at.device())))
    };
    Ok(dir.list()?.into_iter().filter_map(place).collect())
}
