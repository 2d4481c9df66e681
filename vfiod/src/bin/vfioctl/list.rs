//! `list`: the devices of a host, and the columns in which devices are shown.

use libvfio::client::{DeviceRecord, Options};

use crate::args::ListArgs;
use crate::bus::Bus;
use crate::output::{Output, print_json};
use crate::table::{BAD, Cell, LEASED, PLAIN, Table, WARN};
use crate::trouble::Trouble;

/// Base class of bridges, the top byte of a class code.
const BRIDGE: u32 = 0x06;

pub(crate) async fn run(bus: &Bus, args: &ListArgs, out: &Output) -> Result<(), Trouble> {
    if out.json {
        let reply = bus.ask("ListDevices", &(Options::new(),)).await?;
        return print_json(&reply.json_of(|device| wanted(args, device))?.into());
    }
    bus.note_simulation().await;
    let brief = Options::from([("brief", true.into())]);
    let devices: Vec<DeviceRecord> = bus.ask("ListDevices", &(brief,)).await?.read()?;
    let mut table = Table::new(&HEADER);
    for device in devices.iter().filter(|device| wanted(args, device)) {
        table.push(row(device.address.as_str(), device));
    }
    out.table(&table, if devices.is_empty() { "no devices" } else { "no such devices" })
}

/// The columns of [`row`].
pub(crate) const HEADER: [&str; 7] =
    ["DEVICE", "CLASS", "DRIVER", "GROUP", "NODE", "LEASE", "NAME"];

/// A device in one line, `first` being what it is called there.
pub(crate) fn row(first: impl Into<Cell>, device: &DeviceRecord) -> [Cell; 7] {
    let name = match device.problems.as_deref().map_or(0, <[String]>::len) {
        0 => Cell::new(&device.name, PLAIN),
        1 => Cell::new(format!("{} (1 problem)", device.name), WARN),
        n => Cell::new(format!("{} ({n} problems)", device.name), WARN),
    };
    [
        first.into(),
        device.class_name.as_str().into(),
        Cell::maybe(device.driver.as_deref(), PLAIN),
        Cell::maybe(device.iommu_group.map(|group| group.to_string()), PLAIN),
        Cell::maybe(device.numa_node.map(|node| node.to_string()), PLAIN),
        lease_cell(device),
        name,
    ]
}

/// The lease, and in its place or beside it that there shall be no other.
pub(crate) fn lease_cell(device: &DeviceRecord) -> Cell {
    match (lease(device), &device.quarantine) {
        (Some(lease), Some(_)) => Cell::new(format!("{lease}, quarantined"), BAD),
        (None, Some(_)) => Cell::new("quarantined", BAD),
        (lease, None) => Cell::maybe(lease, LEASED),
    }
}

/// Tenant, lease and, where it is under way, its state; or that somebody else has the device.
fn lease(device: &DeviceRecord) -> Option<String> {
    if device.external == Some(true) {
        return Some("(external)".to_owned());
    }
    let (id, tenant) = (device.lease.as_deref()?, device.tenant.as_deref()?);
    Some(match device.lease_state.as_deref() {
        None | Some("active") => format!("{tenant} {id}"),
        Some(state) => format!("{tenant} {id} {state}"),
    })
}

fn wanted(args: &ListArgs, device: &DeviceRecord) -> bool {
    let kind = match (args.class, device.class) {
        (Some(alias), class) => class.is_some_and(|class| alias.matches(class)),
        (None, Some(class)) => args.all || class >> 16 != BRIDGE,
        (None, None) => true,
    };
    let driver = match args.driver.as_deref() {
        Some("none") => device.driver.is_none(),
        Some(driver) => device.driver.as_deref() == Some(driver),
        None => true,
    };
    let lease = match &args.lease {
        Some(Some(lease)) => device.lease.as_ref() == Some(lease),
        Some(None) => device.lease.is_some(),
        None => true,
    };
    kind && driver && lease
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn device(class: u32, driver: Option<&str>, lease: Option<&str>) -> DeviceRecord {
        DeviceRecord {
            class: Some(class),
            driver: driver.map(str::to_owned),
            lease: lease.map(str::to_owned),
            tenant: lease.map(|_| "alice".to_owned()),
            ..DeviceRecord::default()
        }
    }

    /// Which of a bridge, a GPU, a leased NIC and a device without class or driver are listed.
    fn listed(arguments: &str) -> String {
        let line = ["vfioctl", "list"].into_iter().chain(arguments.split_whitespace());
        let Command::List(args) = Cli::try_parse_from(line).unwrap().command else { panic!() };
        let devices = [
            ('b', device(0x06_0400, Some("pcieport"), None)),
            ('g', device(0x03_0200, Some("nvidia"), None)),
            ('n', device(0x02_0000, Some("vfio-pci"), Some("3f9a2c81"))),
            ('?', DeviceRecord::default()),
        ];
        devices.iter().filter(|(_, d)| wanted(&args, d)).map(|(name, _)| name).collect()
    }

    #[test]
    fn filters_narrow_and_bridges_are_asked_for() {
        assert_eq!(listed(""), "gn?");
        assert_eq!(listed("--all"), "bgn?");
        assert_eq!(listed("--class GPU"), "g");
        assert_eq!(listed("--class bridge"), "b");
        assert_eq!(listed("--driver nvidia"), "g");
        assert_eq!(listed("--driver none"), "?");
        assert_eq!(listed("--lease"), "n");
        assert_eq!(listed("--lease 3f9a2c81 --class nic"), "n");
        assert_eq!(listed("--lease 00000000"), "");
    }

    #[test]
    fn a_lease_shows_its_state_only_while_that_is_news() {
        let with = |state: &str| DeviceRecord {
            lease_state: Some(state.into()),
            ..device(0x02_0000, None, Some("3f9a2c81"))
        };
        assert_eq!(lease(&with("active")).unwrap(), "alice 3f9a2c81");
        assert_eq!(lease(&with("releasing")).unwrap(), "alice 3f9a2c81 releasing");
        assert_eq!(lease(&device(0x02_0000, None, None)), None);
    }

    #[test]
    fn a_quarantine_is_seen_with_a_lease_and_without() {
        let with = |lease| DeviceRecord {
            quarantine: Some("its reset failed".into()),
            ..device(0x02_0000, None, lease)
        };
        assert_eq!(lease_cell(&with(None)), Cell::new("quarantined", BAD));
        let leased = lease_cell(&with(Some("3f9a2c81")));
        assert_eq!(leased, Cell::new("alice 3f9a2c81, quarantined", BAD));
    }
}
