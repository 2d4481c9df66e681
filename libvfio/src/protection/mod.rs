//! What the host does with its devices: storage and network interfaces in use, the console, devices
//! behind a controller. Reads sysfs and procfs through [`crate::host`]; never writes.

mod console;
mod layers;
mod mounts;
mod network;
mod storage;
mod usb;

use std::collections::BTreeSet;

use crate::address::PciAddress;
use crate::error::Error;
use crate::holders::Holding;
use crate::host::{HostRoot, plain};

/// One use of a function by the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// The function.
    pub function: PciAddress,
    /// The use, as the second half of a sentence about the function.
    pub what: String,
    /// How to end it.
    pub remedy: String,
    /// What it means for giving the function away.
    pub weight: Weight,
}

/// What a use means for giving a function away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weight {
    /// It should be known and forbids nothing.
    Notice,
    /// A process holds the function.
    Held,
    /// The host uses it.
    InUse,
    /// The host cannot live without it.
    Protected,
}

/// A use, before it is said whose.
struct Found {
    what: String,
    remedy: String,
    weight: Weight,
}

impl Found {
    #[allow(clippy::needless_pass_by_value)] // Both are made for it.
    fn new(what: String, remedy: String, weight: Weight) -> Self {
        // Names of products, volumes and mount points are whatever somebody chose.
        Self { what: plain(&what), remedy: plain(&remedy), weight }
    }

    fn of(self, function: PciAddress) -> Use {
        let Self { what, remedy, weight } = self;
        Use { function, what, remedy, weight }
    }
}

impl Use {
    /// Whether the host cannot live without it.
    pub fn is_protected(&self) -> bool {
        self.weight == Weight::Protected
    }
}

impl From<&Holding> for Use {
    fn from(Holding { function, holder }: &Holding) -> Self {
        let what: Vec<String> = holder.what.iter().map(|p| p.display().to_string()).collect();
        let unit = holder.unit.as_ref().map(|unit| format!(" in {}", unit.name));
        Self {
            function: *function,
            what: format!(
                "is held by {holder}{}, which has {} open",
                unit.unwrap_or_default(),
                some(&what)
            ),
            remedy: holder.remedy(),
            weight: Weight::Held,
        }
    }
}

/// Finds what the host uses these functions for now. Processes are for [`crate::holders`] to find.
pub fn uses(host: &HostRoot, functions: &BTreeSet<PciAddress>) -> Result<Vec<Use>, Error> {
    let mut uses = storage::uses(host, functions)?;
    uses.extend(network::uses(host, functions)?);
    uses.extend(console::uses(host, functions)?);
    uses.extend(usb::uses(host, functions)?);
    uses.sort_by_key(|found| (found.function, std::cmp::Reverse(found.weight)));
    Ok(uses)
}

/// Where a block device is mounted by a `mountinfo` (proc(5)): by its number, or by its name in
/// `/dev` where the file system has a number of its own.
pub fn mount_points(mountinfo: &str, number: &str, disk: &str) -> Vec<String> {
    let sources = BTreeSet::from([format!("/dev/{disk}")]);
    let mounts = mounts::parse(mountinfo).into_iter();
    mounts.filter(|mount| mount.is_of(number, &sources)).map(|mount| mount.point).collect()
}

/// The first few of many, for people.
fn some(items: &[String]) -> String {
    const FEW: usize = 4;
    match items.len().checked_sub(FEW) {
        Some(more @ 1..) => format!("{} and {more} more", items[..FEW].join(", ")),
        _ => items.join(", "),
    }
}

#[cfg(test)]
mod tests;
