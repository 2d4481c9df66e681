//! What the host does with its devices: storage in use and network interfaces in use.
//! Reads sysfs and procfs through [`crate::host`]; never writes.

use std::collections::BTreeSet;
use std::path::Path;

use crate::address::PciAddress;
use crate::error::Error;
use crate::host::HostRoot;

/// One use of a function by the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// The function.
    pub function: PciAddress,
    /// The use, as the second half of a sentence about the function.
    pub what: String,
    /// How to end it.
    pub remedy: String,
    /// Whether the host cannot live without it.
    pub protected: bool,
}

/// Mount points without which a host does not run or does not boot again.
const VITAL: [&str; 5] = ["/", "/boot", "/boot/efi", "/usr", "/var"];

/// Finds what the host uses these functions for now.
pub fn uses(host: &HostRoot, functions: &BTreeSet<PciAddress>) -> Result<Vec<Use>, Error> {
    let disks = class_members(host, "block", functions)?;
    let interfaces = class_members(host, "net", functions)?;
    let mut uses = storage(host, &disks)?;
    uses.extend(network(host, &interfaces)?);
    Ok(uses)
}

fn storage(host: &HostRoot, disks: &[(String, PciAddress)]) -> Result<Vec<Use>, Error> {
    if disks.is_empty() {
        return Ok(Vec::new());
    }
    let mut uses = Vec::new();
    let mounts = host.proc("self/mountinfo")?.unwrap_or_default();
    let swaps = host.proc("swaps")?.unwrap_or_default();
    for (disk, function) in disks {
        let number = host.sys(format!("class/block/{disk}")).attr("dev")?.unwrap_or_default();
        for point in mount_points(&mounts, &number, disk) {
            uses.push(Use {
                function: *function,
                what: format!("carries {disk}, mounted on {point}"),
                remedy: format!("unmount {point} first"),
                protected: VITAL.contains(&point.as_str()),
            });
        }
        if swaps.lines().any(|line| line.split_whitespace().next() == Some(&format!("/dev/{disk}")))
        {
            uses.push(Use {
                function: *function,
                what: format!("carries swap on {disk}"),
                remedy: format!("run 'swapoff /dev/{disk}' first"),
                protected: true,
            });
        }
        let holders = host.sys(format!("class/block/{disk}/holders")).list()?;
        uses.extend(holders.iter().map(|holder| Use {
            function: *function,
            what: format!("carries {disk}, a part of {holder} (device-mapper, MD or bcache)"),
            remedy: format!("stop {holder} first"),
            protected: true,
        }));
    }
    Ok(uses)
}

fn network(host: &HostRoot, interfaces: &[(String, PciAddress)]) -> Result<Vec<Use>, Error> {
    if interfaces.is_empty() {
        return Ok(Vec::new());
    }
    let mut uses = Vec::new();
    let routes = host.proc("net/route")?.unwrap_or_default();
    let routes6 = host.proc("net/ipv6_route")?.unwrap_or_default();
    for (interface, function) in interfaces {
        if carries_default_route(&routes, &routes6, interface) {
            uses.push(Use {
                function: *function,
                what: format!("is {interface}, which carries the default route"),
                remedy: "move the default route to another interface first".into(),
                protected: true,
            });
        }
    }
    Ok(uses)
}

/// Members of a sysfs class that hang below one of these functions; one with several paths is
/// there once for each.
fn class_members(
    host: &HostRoot,
    class: &str,
    functions: &BTreeSet<PciAddress>,
) -> Result<Vec<(String, PciAddress)>, Error> {
    let dir = host.sys("class").sub(class);
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

fn nearest_function(path: &Path) -> Option<PciAddress> {
    path.iter().rev().find_map(|part| part.to_str()?.parse().ok())
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

/// Mount points of a block device in `/proc/self/mountinfo` (proc(5)), by device number or, for
/// file systems with numbers of their own, by source.
pub fn mount_points(mountinfo: &str, number: &str, disk: &str) -> Vec<String> {
    let source = format!("/dev/{disk}");
    let point = |line: &str| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ');
        let device = fields.nth(2)?;
        let point = fields.nth(1)?;
        let from = filesystem.split(' ').nth(1)?;
        (device == number || from == source).then(|| point.to_owned())
    };
    let mut points: Vec<String> = mountinfo.lines().filter_map(point).collect();
    points.sort_unstable();
    points.dedup();
    points
}

/// `/proc/net/route` has destination and mask in columns 2 and 8, `/proc/net/ipv6_route`
/// destination, its prefix length and the interface in columns 1, 2 and 10.
fn carries_default_route(routes: &str, routes6: &str, interface: &str) -> bool {
    let columns = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let v4 = routes.lines().map(columns).any(|c| {
        c.first().is_some_and(|name| name == interface)
            && c.get(1).is_some_and(|to| to == "00000000")
            && c.get(7).is_some_and(|mask| mask == "00000000")
    });
    let v6 = routes6.lines().map(columns).any(|c| {
        c.get(9).is_some_and(|name| name == interface)
            && c.first().is_some_and(|to| to.bytes().all(|b| b == b'0'))
            && c.get(1).is_some_and(|length| length == "00")
    });
    v4 || v6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_number_and_by_source() {
        let info = "25 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw\n\
                    30 25 0:41 /sub /data rw - btrfs /dev/nvme1n1 rw\n\
                    garbage\n";
        assert_eq!(mount_points(info, "259:2", "nvme0n1p2"), ["/"]);
        assert_eq!(mount_points(info, "259:9", "nvme1n1"), ["/data"]);
        assert!(mount_points(info, "8:0", "sda").is_empty());
    }

    #[test]
    fn a_disk_with_several_paths_is_found_below_each_controller() {
        let dir = tempfile::tempdir().unwrap();
        let sys = dir.path().join("sys");
        let link = |at: &str, to: &str| {
            let at = sys.join(at);
            std::fs::create_dir_all(at.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(to, at).unwrap();
        };
        link("class/block/nvme0n1", "../../devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1");
        link(
            "class/nvme-subsystem/nvme-subsys0/nvme0",
            "../../../pci0000:00/0000:02:00.0/nvme/nvme0",
        );
        link(
            "class/nvme-subsystem/nvme-subsys0/nvme1",
            "../../../pci0000:00/0000:03:00.0/nvme/nvme1",
        );
        link("class/nvme-subsystem/nvme-subsys0/subsystem", "../../../../class/nvme-subsystem");
        std::fs::create_dir_all(dir.path().join("proc/self")).unwrap();
        std::fs::write(
            dir.path().join("proc/self/mountinfo"),
            "25 1 259:2 / / rw shared:1 - ext4 /dev/nvme0n1 rw\n",
        )
        .unwrap();
        let both = ["02:00.0", "03:00.0", "04:00.0"].map(|a| a.parse().unwrap()).into();
        let uses = uses(&HostRoot::new(dir.path()), &both).unwrap();
        let functions: Vec<String> = uses.iter().map(|u| u.function.to_string()).collect();
        assert_eq!(functions, ["0000:02:00.0", "0000:03:00.0"]);
        assert!(uses.iter().all(|u| u.protected));
    }

    #[test]
    fn default_routes_are_found_in_both_families() {
        let v4 = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n\
                  eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                  eth1\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        assert!(carries_default_route(v4, "", "eth0"));
        assert!(!carries_default_route(v4, "", "eth1"));
        let zero = "0".repeat(32);
        let v6 = format!("{zero} 00 {zero} 00 fe80 00000400 1 0 3 eth2\n");
        assert!(carries_default_route("", &v6, "eth2"));
    }
}
