//! Which processes hold a group or a function: descriptors and mappings of its device nodes and its
//! regions in sysfs. Reads sysfs and procfs through [`crate::host`]; opens nothing, never writes.

mod process;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use crate::address::PciAddress;
use crate::error::Error;
use crate::host::HostRoot;
use crate::members;
pub use process::{Unit, User};

/// A process that holds something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its name, as the kernel has it (`comm`, at most 15 bytes).
    pub command: String,
    /// As whom it acts.
    pub user: Option<User>,
    /// What systemd runs it in.
    pub unit: Option<Unit>,
    /// What it holds, by the paths under which it opened or mapped it.
    pub what: Vec<PathBuf>,
}

/// A function that a process holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holding {
    /// The function.
    pub function: PciAddress,
    /// The process, with what it holds of this function.
    pub holder: Holder,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.command, self.pid)
    }
}

impl Holder {
    /// How to make it let go, for people.
    pub fn remedy(&self) -> String {
        let unit = self.unit.as_ref().filter(|unit| unit.system);
        match unit.map(|unit| unit.name.as_str()) {
            // It passes devices on to the sessions that show something (`logind-session-device.c`).
            Some("systemd-logind.service") => {
                "end the login session it was opened for (see 'loginctl')".into()
            }
            Some(service) if service.ends_with(".service") => {
                format!("stop it first ('systemctl stop {service}')")
            }
            _ => match &self.user {
                Some(user) => format!("end process {} of {user} first", self.pid),
                None => format!("end process {} first", self.pid),
            },
        }
    }

    /// udev looks into what appears or changes, and is done in a moment.
    fn is_passing(&self) -> bool {
        self.unit.as_ref().is_some_and(|unit| unit.system && unit.name == "systemd-udevd.service")
    }
}

/// Numbers of the regions that sysfs has files for, some of them a second for write combining
/// (`pci_create_resource_files`, `drivers/pci/pci-sysfs.c`).
const REGIONS: std::ops::Range<u8> = 0..6;

/// Paths that show somebody holds a function, and whose they are.
type Nodes = BTreeMap<PathBuf, BTreeSet<PciAddress>>;

/// Processes with an open descriptor of a group's node or of one of these VFIO devices (`vfio0`).
pub fn of_group(host: &HostRoot, group: u32, devices: &[&str]) -> Result<Vec<Holder>, Error> {
    let mut nodes = vec![PathBuf::from(format!("/dev/vfio/{group}"))];
    nodes.extend(devices.iter().map(|device| format!("/dev/vfio/devices/{device}").into()));
    let nodes = nodes.into_iter().map(|node| (node, BTreeSet::new())).collect();
    holders(host, &nodes)
}

/// Processes that hold any of these functions, from one look at all processes. Whoever only reads
/// configuration space does not count, nor does the process that asks.
pub fn of_functions(
    host: &HostRoot,
    functions: &BTreeSet<PciAddress>,
) -> Result<Vec<Holding>, Error> {
    if functions.is_empty() {
        return Ok(Vec::new());
    }
    let nodes = nodes(host, functions)?;
    let mut holdings = Vec::new();
    for holder in holders(host, &nodes)? {
        let of = |function: &PciAddress| {
            let theirs = |path: &&PathBuf| nodes.get(*path).is_some_and(|f| f.contains(function));
            let what: Vec<PathBuf> = holder.what.iter().filter(theirs).cloned().collect();
            let holds = what.iter().any(|path| !path.ends_with("config"));
            holds
                .then(|| Holding { function: *function, holder: Holder { what, ..holder.clone() } })
        };
        holdings.extend(functions.iter().filter_map(of));
    }
    holdings.sort_by_key(|holding| holding.function);
    Ok(holdings)
}

fn nodes(host: &HostRoot, functions: &BTreeSet<PciAddress>) -> Result<Nodes, Error> {
    let mut nodes = Nodes::new();
    let mut add = |path: PathBuf, function| {
        nodes.entry(path).or_default().insert(function);
    };
    for &function in functions {
        let dir = host.function(function);
        if let Some(group) = dir.link_name("iommu_group") {
            add(Path::new("/dev/vfio").join(group), function);
        }
        if let Some(place) = members::directory(host, function) {
            add(place.join("config"), function);
            for region in REGIONS {
                add(place.join(format!("resource{region}")), function);
                add(place.join(format!("resource{region}_wc")), function);
            }
        }
        for node in members::nodes(host, function).into_iter().chain(nvidia_node(host, function)) {
            add(node, function);
        }
    }
    for (disk, function) in members::within(host, "class/block", functions)? {
        add(Path::new("/dev").join(disk), function);
    }
    Ok(nodes)
}

/// The nvidia driver is no class of its own: its nodes follow its own numbering of cards
/// (`/proc/driver/nvidia/gpus/*/information`).
fn nvidia_node(host: &HostRoot, function: PciAddress) -> Option<PathBuf> {
    let path = format!("driver/nvidia/gpus/{function}/information");
    let text = host.proc(&path).ok().flatten()?;
    let minor = text.lines().find_map(|line| line.strip_prefix("Device Minor:"))?;
    Some(format!("/dev/nvidia{}", minor.trim().parse::<u32>().ok()?).into())
}

fn holders(host: &HostRoot, nodes: &Nodes) -> Result<Vec<Holder>, Error> {
    let own = host.link("proc/self").and_then(|link| link.to_str()?.parse::<u32>().ok());
    let mut holders = Vec::new();
    for pid in host.processes()?.into_iter().filter(|pid| Some(*pid) != own) {
        let what = process::holds(host, pid, |path| nodes.contains_key(path));
        if !what.is_empty() {
            holders.push(process::describe(host, pid, what));
        }
    }
    holders.retain(|holder| !holder.is_passing());
    Ok(holders)
}

#[cfg(test)]
mod tests;
