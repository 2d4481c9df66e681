//! Who and what holds devices on the host's side. Reads the host, changes nothing.

use std::collections::BTreeSet;

use libvfio::address::PciAddress;
use libvfio::error::Error;
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
        let mut uses = protection::uses(&self.host, functions)?;
        uses.extend(holders::of_functions(&self.host, functions)?.iter().map(Use::from));
        Ok(uses)
    }
}
