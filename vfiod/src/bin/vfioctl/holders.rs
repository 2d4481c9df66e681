//! `holders`: processes that hold a device's group, and what the host does with it.

use libvfio::client::{HoldersRecord, UseRecord};

use crate::bus::Bus;
use crate::output::{Output, Screen, print, print_json};
use crate::table::{BAD, Cell, PLAIN, Table, WARN};
use crate::trouble::Trouble;

pub(crate) async fn run(bus: &Bus, device: &str, out: &Output) -> Result<(), Trouble> {
    let reply = bus.ask("Holders", &(device,)).await?;
    if out.json {
        return print_json(&reply.json()?);
    }
    bus.note_simulation().await;
    let record: HoldersRecord = reply.read()?;
    let text = shown(&record, out.screen);
    if text.is_empty() {
        anstream::eprintln!("nothing holds {}", record.devices.join(", "));
    }
    print(&text)
}

/// What there is of the two tables, with a line between.
fn shown(record: &HoldersRecord, screen: Screen) -> String {
    let tables = [processes(record), uses(record)];
    let texts = tables.iter().filter(|table| !table.is_empty()).map(|table| table.render(screen));
    texts.collect::<Vec<_>>().join("\n")
}

fn processes(record: &HoldersRecord) -> Table {
    let mut table = Table::new(&["DEVICE", "PID", "COMMAND", "USER", "UNIT", "HOLDS"]);
    for holder in &record.holders {
        table.push([
            holder.device.as_str().into(),
            holder.pid.to_string().into(),
            holder.command.as_str().into(),
            Cell::maybe(holder.user.as_deref(), PLAIN),
            Cell::maybe(holder.unit.as_deref(), PLAIN),
            holder.what.join(" ").into(),
        ]);
    }
    table
}

fn uses(record: &HoldersRecord) -> Table {
    let mut table = Table::telling(&["DEVICE", "WEIGHT", "USE", "REMEDY"]);
    for found in &record.uses {
        table.push([
            found.device.as_str().into(),
            weight(found),
            found.what.as_str().into(),
            found.remedy.as_str().into(),
        ]);
    }
    table
}

fn weight(found: &UseRecord) -> Cell {
    match (found.protected, found.hinders) {
        (true, _) => Cell::new("protected", BAD),
        (false, true) => Cell::new("in use", WARN),
        (false, false) => Cell::new("idle", PLAIN),
    }
}

#[cfg(test)]
mod tests {
    use libvfio::client::HolderRecord;

    use super::*;

    #[test]
    fn processes_come_first_and_what_is_empty_is_left_out() {
        let holder = HolderRecord {
            device: "0000:03:00.0".into(),
            pid: 812,
            command: "dcgm".into(),
            unit: Some("dcgm.service".into()),
            what: vec!["/dev/nvidia0".into(), "/dev/dri/card1".into()],
            ..HolderRecord::default()
        };
        let found = UseRecord {
            device: "0000:03:00.0".into(),
            what: "shows the console".into(),
            remedy: "use another".into(),
            hinders: true,
            protected: true,
        };
        let mut record =
            HoldersRecord { holders: vec![holder], uses: vec![found], ..HoldersRecord::default() };
        let text = |record: &HoldersRecord| {
            anstream::adapter::strip_str(&shown(record, Screen::default())).to_string()
        };
        assert_eq!(
            text(&record),
            "DEVICE        PID  COMMAND  USER  UNIT          HOLDS\n\
             0000:03:00.0  812  dcgm     -     dcgm.service  /dev/nvidia0 /dev/dri/card1\n\
             \n\
             DEVICE        WEIGHT     USE                REMEDY\n\
             0000:03:00.0  protected  shows the console  use another\n"
        );
        record.holders.clear();
        assert!(text(&record).starts_with("DEVICE        WEIGHT"));
        record.uses.clear();
        assert_eq!(text(&record), "");
    }
}
