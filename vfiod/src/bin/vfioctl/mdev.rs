//! `mdev`: mediated devices: which there can be, and which there are.

use libvfio::client::{MediatedDeviceRecord, MediatedRecord, MediatedTypeRecord};
use libvfio::error::ErrorKind;

use crate::args::MdevAction;
use crate::bus::Bus;
use crate::output::{Output, Screen, print, print_json};
use crate::table::{Cell, LEASED, PLAIN, Table};
use crate::trouble::Trouble;

pub(crate) async fn run(bus: &Bus, action: &MdevAction, out: &Output) -> Result<(), Trouble> {
    let reply = bus.ask("ListMediated", &()).await?;
    let MdevAction::Show { name } = action else {
        if out.json {
            return print_json(&reply.json()?);
        }
        bus.note_simulation().await;
        let record: MediatedRecord = reply.read()?;
        if record.types.is_empty() && record.devices.is_empty() {
            anstream::eprintln!("no device here can be made into mediated devices");
        }
        return print(&listed(&record, out.screen));
    };
    let mut record = reply.json()?;
    let all: MediatedRecord = reply.read()?;
    let meant = about(&all, name);
    if meant.types.is_empty() && meant.devices.is_empty() {
        let why =
            format!("no mediated device and no type of any is {name}; see 'vfioctl mdev list'");
        return Err(Trouble::new(ErrorKind::NotFound, why));
    }
    if out.json {
        for (part, key) in [("types", "name"), ("devices", "name")] {
            let is_meant = |entry: &serde_json::Value| {
                entry[key] == *name || (part == "devices" && entry["uuid"] == *name)
            };
            if let Some(entries) = record[part].as_array_mut() {
                entries.retain(is_meant);
            }
        }
        return print_json(&record);
    }
    print(&shown(&meant, out.screen))
}

/// What of all a name means: a type with its devices, or one device.
fn about(all: &MediatedRecord, name: &str) -> MediatedRecord {
    let mut meant = all.clone();
    meant.types.retain(|found| found.name == name);
    meant.devices.retain(|found| found.name == name || found.uuid == name);
    meant
}

/// What there is of the two tables, with a line between.
fn listed(record: &MediatedRecord, screen: Screen) -> String {
    let tables = [types(record), devices(&record.devices)];
    let texts = tables.iter().filter(|table| !table.is_empty()).map(|table| table.render(screen));
    texts.collect::<Vec<_>>().join("\n")
}

/// The same with what there is to say of each type.
fn shown(record: &MediatedRecord, screen: Screen) -> String {
    let said = |found: &MediatedTypeRecord| {
        let description = found.description.as_deref()?;
        Some(format!("{}: {description}\n", found.name))
    };
    let said: String = record.types.iter().filter_map(said).collect();
    let gap = if said.is_empty() { "" } else { "\n" };
    format!("{}{gap}{said}", listed(record, screen))
}

fn types(record: &MediatedRecord) -> Table {
    let mut table = Table::new(&["TYPE", "LEFT", "DEVICES", "FOR", "NAME"]);
    for found in &record.types {
        let devices = record.devices.iter().filter(|device| device.name == found.name).count();
        table.push([
            found.name.as_str().into(),
            found.available.to_string().into(),
            devices.to_string().into(),
            Cell::maybe(found.api.as_deref(), PLAIN),
            Cell::maybe(found.label.as_deref(), PLAIN),
        ]);
    }
    table
}

fn devices(devices: &[MediatedDeviceRecord]) -> Table {
    let mut table = Table::new(&["DEVICE", "TYPE", "GROUP", "LEASE", "TENANT"]);
    for found in devices {
        table.push([
            found.uuid.as_str().into(),
            found.name.as_str().into(),
            Cell::maybe(found.iommu_group.map(|group| group.to_string()), PLAIN),
            Cell::maybe(found.lease.as_deref(), LEASED),
            Cell::maybe(found.tenant.as_deref(), LEASED),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_comes_before_what_is_and_a_name_means_either() {
        let uuid = "b3a1f3c6-3a04-4d4e-8a4e-0f6b1f3c63a0";
        let kind = |name: &str| MediatedTypeRecord {
            name: name.into(),
            label: Some("Serial".into()),
            description: Some("two ports".into()),
            available: 11,
            api: Some("vfio-pci".into()),
        };
        let device = MediatedDeviceRecord {
            uuid: uuid.into(),
            name: "mtty/mtty-2".into(),
            iommu_group: Some(7),
            lease: Some("3f9a2c81".into()),
            tenant: Some("alice".into()),
            ..MediatedDeviceRecord::default()
        };
        let all = MediatedRecord {
            types: vec![kind("mtty/mtty-1"), kind("mtty/mtty-2")],
            devices: vec![device],
        };
        let plain = |text: String| anstream::adapter::strip_str(&text).to_string();
        assert_eq!(
            plain(listed(&all, Screen::default())),
            "TYPE         LEFT  DEVICES  FOR       NAME\n\
             mtty/mtty-1  11    0        vfio-pci  Serial\n\
             mtty/mtty-2  11    1        vfio-pci  Serial\n\
             \n\
             DEVICE                                TYPE         GROUP  LEASE     TENANT\n\
             b3a1f3c6-3a04-4d4e-8a4e-0f6b1f3c63a0  mtty/mtty-2  7      3f9a2c81  alice\n"
        );
        assert!(about(&all, uuid).types.is_empty());
        let meant = about(&all, "mtty/mtty-2");
        assert_eq!((meant.types.len(), meant.devices.len()), (1, 1));
        assert!(plain(shown(&meant, Screen::default())).ends_with("mtty/mtty-2: two ports\n"));
        assert!(about(&all, "mtty").devices.is_empty());
    }
}
