//! What hangs below functions in sysfs: members of classes and their device nodes. Reads through
//! [`crate::host`]; never writes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::address::PciAddress;
use crate::error::Error;
use crate::host::{HostRoot, SysDir};

/// Members of a sysfs class (`class/net`) or bus (`bus/usb/devices`) that hang below one of these
/// functions; one with several paths is there once for each.
pub(crate) fn within(
    host: &HostRoot,
    place: &str,
    functions: &BTreeSet<PciAddress>,
) -> Result<Vec<(String, PciAddress)>, Error> {
    let dir = host.sys(place);
    let mut members = Vec::new();
    for name in dir.list()? {
        let Some(target) = dir.link(&name) else { continue };
        let owners = match nearest_function(&target) {
            Some(function) => vec![function],
            None => multipath_functions(host, &target)?,
        };
        let asked = owners.into_iter().filter(|owner| functions.contains(owner));
        members.extend(asked.map(|owner| (name.clone(), owner)));
    }
    Ok(members)
}

/// The function in whose directory a path is.
pub(crate) fn nearest_function(path: &Path) -> Option<PciAddress> {
    path.iter().rev().find_map(|part| named(part.to_str()?))
}

/// The function of that name. Others have names that would do for a person: `00:02:0.0` is a port of
/// the PNP device `00:02` (`drivers/tty/serial/serial_base_bus.c`).
fn named(name: &str) -> Option<PciAddress> {
    name.parse().ok().filter(|address: &PciAddress| address.to_string() == name)
}

/// NVMe namespaces that may have several paths hang below a subsystem instead of a function; the
/// subsystem links to its controllers (`drivers/nvme/host/multipath.c`).
fn multipath_functions(host: &HostRoot, disk: &Path) -> Result<Vec<PciAddress>, Error> {
    let subsystem = disk
        .iter()
        .filter_map(|part| part.to_str())
        .find(|part| part.strip_prefix("nvme-subsys").is_some_and(|n| n.parse::<u32>().is_ok()));
    let Some(subsystem) = subsystem else { return Ok(Vec::new()) };
    let dir = host.sys("class/nvme-subsystem").sub(subsystem);
    let links = dir.list()?.into_iter().filter_map(|name| dir.link(&name));
    Ok(links.filter_map(|target| nearest_function(&target)).collect())
}

/// Where sysfs has a function, as links to open files show it: below `/sys/devices`.
pub(crate) fn directory(host: &HostRoot, function: PciAddress) -> Option<PathBuf> {
    let target = host.link(format!("sys/bus/pci/devices/{function}"))?;
    let below: PathBuf = target.iter().skip_while(|part| *part == "..").collect();
    Some(Path::new("/sys").join(below))
}

/// Device nodes of everything below a function, other functions aside: `DEVNAME` of each `uevent`
/// (`dev_uevent`, `drivers/base/core.c`). The function itself has no node, and its own `uevent` may be
/// shown under its lock.
pub(crate) fn nodes(host: &HostRoot, function: PciAddress) -> Vec<PathBuf> {
    let below = |dir: &SysDir| {
        let names = dir.directories().into_iter().filter(|name| named(name).is_none());
        names.map(|name| dir.sub(&name)).collect::<Vec<_>>()
    };
    let mut nodes = Vec::new();
    let mut waiting = below(&host.function(function));
    while let Some(dir) = waiting.pop() {
        nodes.extend(node(&dir));
        waiting.extend(below(&dir));
    }
    nodes
}

fn node(dir: &SysDir) -> Option<PathBuf> {
    // A device that goes while it is read has no node any more.
    let uevent = dir.attr("uevent").ok().flatten()?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(Path::new("/dev").join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_functions_own_name_is_one() {
        let nearest = |path: &str| nearest_function(Path::new(path)).map(|f| f.to_string());
        let port = "../../devices/pnp0/00:02/00:02:0/00:02:0.0/tty/ttyS0";
        assert_eq!(nearest(port), None);
        let disk = "../../devices/pci0000:00/0000:00:05.0/0000:02:00.0/nvme/nvme0/nvme0n1";
        assert_eq!(nearest(disk).as_deref(), Some("0000:02:00.0"));
    }
}
