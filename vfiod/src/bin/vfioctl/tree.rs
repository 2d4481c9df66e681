//! `tree`: devices below the ports that lead to them, VFs below their PF.

use std::collections::BTreeMap;

use libvfio::client::{DeviceRecord, Options};

use crate::bus::Bus;
use crate::list;
use crate::output::{Output, Screen, print_json};
use crate::table::{BOLD, Cell, Table};
use crate::trouble::Trouble;

pub(crate) async fn run(bus: &Bus, out: &Output) -> Result<(), Trouble> {
    let reply = bus.ask("ListDevices", &(Options::new(),)).await?;
    if out.json {
        return print_json(&reply.json()?);
    }
    bus.note_simulation().await;
    let devices: Vec<DeviceRecord> = reply.read()?;
    out.table(&draw(&devices, out.screen), "no devices")
}

/// The lines before a name: of a child with siblings to come, of the last child, and of what is
/// below each of them.
struct Lines {
    child: &'static str,
    last: &'static str,
    below_child: &'static str,
    below_last: &'static str,
}

const ASCII: Lines = Lines { child: "|- ", last: "`- ", below_child: "|  ", below_last: "   " };
const UNICODE: Lines =
    Lines { child: "├─ ", last: "└─ ", below_child: "│  ", below_last: "   " };

struct Tree<'a> {
    children: BTreeMap<&'a str, Vec<&'a DeviceRecord>>,
    lines: &'static Lines,
    table: Table,
}

fn draw(devices: &[DeviceRecord], screen: Screen) -> Table {
    let known: BTreeMap<&str, &DeviceRecord> =
        devices.iter().map(|device| (device.address.as_str(), device)).collect();
    let mut tree = Tree {
        children: BTreeMap::new(),
        lines: if screen.unicode { &UNICODE } else { &ASCII },
        table: Table::new(&list::HEADER),
    };
    let mut roots = Vec::new();
    for device in devices {
        let parent = parent(device).filter(|parent| known.contains_key(parent));
        let parent = parent.unwrap_or_else(|| root_bus(&device.address));
        if !known.contains_key(parent) && !roots.contains(&parent) {
            roots.push(parent);
        }
        tree.children.entry(parent).or_default().push(device);
    }
    for root in roots {
        tree.table.push([Cell::new(root, BOLD)]);
        tree.below(root, "");
    }
    tree.table
}

impl Tree<'_> {
    /// Draws what is below `parent`. Every device has one parent, so this ends.
    fn below(&mut self, parent: &str, indent: &str) {
        let Some(children) = self.children.remove(parent) else { return };
        for (n, device) in children.iter().enumerate() {
            let (line, below) = if n + 1 == children.len() {
                (self.lines.last, self.lines.below_last)
            } else {
                (self.lines.child, self.lines.below_child)
            };
            let name = format!("{indent}{line}{}", device.address);
            self.table.push(list::row(name, device));
            self.below(&device.address, &format!("{indent}{below}"));
        }
    }
}

/// The PF of a VF, though both are on one bus: that is how people think of them.
fn parent(device: &DeviceRecord) -> Option<&str> {
    let port = || device.upstream.as_ref()?.last();
    device.physical_function.as_ref().or_else(port).map(String::as_str)
}

/// `0000:00` of `0000:00:1f.3`.
fn root_bus(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(bus, _)| bus)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(address: &str, upstream: &[&str], physical: Option<&str>) -> DeviceRecord {
        DeviceRecord {
            address: address.into(),
            class_name: "c".into(),
            name: "n".into(),
            numa_node: Some(1),
            upstream: Some(upstream.iter().map(|port| (*port).to_owned()).collect()),
            physical_function: physical.map(str::to_owned),
            ..DeviceRecord::default()
        }
    }

    fn drawn(devices: &[DeviceRecord], unicode: bool) -> String {
        let screen = Screen { width: None, unicode };
        let text = draw(devices, screen).render(screen);
        anstream::adapter::strip_str(&text).to_string()
    }

    #[test]
    fn ports_lead_to_devices_and_a_pf_to_its_vfs() {
        let devices = [
            device("0000:00:00.0", &[], None),
            device("0000:00:01.0", &[], None),
            device("0000:01:00.0", &["0000:00:01.0"], None),
            device("0000:01:10.0", &["0000:00:01.0"], Some("0000:01:00.0")),
            device("0000:01:00.1", &["0000:00:01.0"], None),
            device("0000:80:00.0", &[], None),
        ];
        assert_eq!(
            drawn(&devices, true),
            "DEVICE                 CLASS  DRIVER  GROUP  NODE  LEASE  NAME\n\
             0000:00\n\
             ├─ 0000:00:00.0        c      -       -      1     -      n\n\
             └─ 0000:00:01.0        c      -       -      1     -      n\n\
             \u{20}  ├─ 0000:01:00.0     c      -       -      1     -      n\n\
             \u{20}  │  └─ 0000:01:10.0  c      -       -      1     -      n\n\
             \u{20}  └─ 0000:01:00.1     c      -       -      1     -      n\n\
             0000:80\n\
             └─ 0000:80:00.0        c      -       -      1     -      n\n"
        );
        assert!(drawn(&devices, false).is_ascii());
    }

    #[test]
    fn a_device_whose_port_is_unknown_is_on_a_bus_of_its_own() {
        let orphan = [device("0000:05:00.0", &["0000:00:09.0"], None)];
        assert!(drawn(&orphan, false).contains("\n0000:05\n`- 0000:05:00.0"));
        assert!(draw(&[], Screen::default()).is_empty());
    }
}
