//! Who and what holds devices on the host's side. Reads the host, changes nothing.

use std::collections::BTreeSet;

use libvfio::address::PciAddress;
use libvfio::client::{Failure, HolderRecord, HoldersRecord, UseRecord};
use libvfio::error::Error;
use libvfio::inventory::Inventory;
use libvfio::protection::Use;
use libvfio::{holders, protection};

use super::Broker;

impl Broker {
    /// What keeps these functions with the host: what it does with them, and processes that hold
    /// them. For none it looks at nothing, and never at one that the kernel does not let go of: who
    /// looks at that may not come back.
    pub(super) fn uses(&self, functions: &BTreeSet<PciAddress>) -> Result<Vec<Use>, Error> {
        let inventory = self.inventory();
        let functions = legible(&inventory, functions);
        if functions.is_empty() {
            return Ok(Vec::new());
        }
        let mut uses = protection::uses(self.host(), &functions)?;
        uses.extend(holders::of_functions(self.host(), &functions)?.iter().map(Use::from));
        Ok(uses)
    }

    /// The same of the device a name means and all that share its group, on whichever driver.
    pub fn holders(&self, name: &str) -> Result<HoldersRecord, Failure> {
        let inventory = self.inventory();
        let device = inventory.resolve(name)?;
        let functions: BTreeSet<PciAddress> = match inventory.group_of(device) {
            Some(group) => group
                .members
                .iter()
                .filter(|member| **member == device || !is_bridge(&inventory, **member))
                .copied()
                .collect(),
            None => BTreeSet::from([device]),
        };
        let readable = legible(&inventory, &functions);
        let holdings = holders::of_functions(self.host(), &readable)?;
        let uses = protection::uses(self.host(), &readable)?;
        Ok(HoldersRecord {
            devices: functions.iter().map(ToString::to_string).collect(),
            holders: holdings.iter().map(HolderRecord::from).collect(),
            uses: uses.iter().map(UseRecord::from).collect(),
        })
    }
}

/// Those of the functions that can be read.
fn legible(inventory: &Inventory, functions: &BTreeSet<PciAddress>) -> BTreeSet<PciAddress> {
    let stuck = |address: &PciAddress| inventory.get(*address).is_some_and(|f| f.stuck);
    functions.iter().filter(|address| !stuck(address)).copied().collect()
}

fn is_bridge(inventory: &Inventory, address: PciAddress) -> bool {
    inventory.get(address).is_some_and(|function| function.is_bridge())
}
