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
    /// them. For none it looks at nothing.
    pub(super) fn uses(&self, functions: &BTreeSet<PciAddress>) -> Result<Vec<Use>, Error> {
        if functions.is_empty() {
            return Ok(Vec::new());
        }
        let mut uses = protection::uses(self.host(), functions)?;
        uses.extend(holders::of_functions(self.host(), functions)?.iter().map(Use::from));
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
        let holdings = holders::of_functions(self.host(), &functions)?;
        let uses = protection::uses(self.host(), &functions)?;
        Ok(HoldersRecord {
            devices: functions.iter().map(ToString::to_string).collect(),
            holders: holdings.iter().map(HolderRecord::from).collect(),
            uses: uses.iter().map(UseRecord::from).collect(),
        })
    }
}

fn is_bridge(inventory: &Inventory, address: PciAddress) -> bool {
    inventory.get(address).is_some_and(|function| function.is_bridge())
}
