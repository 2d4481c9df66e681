//! `quarantine`: devices that are not trusted, putting one there, clearing it, and healing one.

use libvfio::client::QuarantineRecord;
use serde_json::Value;

use crate::args::QuarantineAction;
use crate::attach::patiently;
use crate::bus::Bus;
use crate::history::time;
use crate::output::{Output, print, print_json};
use crate::table::{BAD, Cell, PLAIN, Table};
use crate::trouble::Trouble;

pub(crate) async fn run(
    bus: &Bus,
    action: Option<&QuarantineAction>,
    out: &Output,
) -> Result<(), Trouble> {
    match action {
        None => list(bus, out).await,
        Some(QuarantineAction::Add { device, reason }) => add(bus, device, reason, out).await,
        Some(QuarantineAction::Clear { device }) => clear(bus, device, out).await,
    }
}

async fn list(bus: &Bus, out: &Output) -> Result<(), Trouble> {
    let reply = bus.ask("ListQuarantine", &()).await?;
    if out.json {
        return print_json(&reply.json()?);
    }
    bus.note_simulation().await;
    out.table(&table(&reply.read::<Vec<QuarantineRecord>>()?), "no device is in quarantine")
}

async fn add(bus: &Bus, device: &str, reason: &str, out: &Output) -> Result<(), Trouble> {
    let address = patiently(bus, bus.manager.quarantine(device, reason)).await?;
    if !out.json {
        return print(&format!("quarantined {address}: {reason}\n"));
    }
    let reply = bus.ask("ListQuarantine", &()).await?;
    let records = reply.json_of(|record: &QuarantineRecord| record.address == address)?;
    print_json(&records.into_iter().next_back().unwrap_or_default())
}

async fn clear(bus: &Bus, device: &str, out: &Output) -> Result<(), Trouble> {
    let cleared = patiently(bus, bus.manager.clear_quarantine(device)).await?;
    if out.json {
        return print_json(&Value::Bool(cleared));
    }
    if cleared {
        return print(&format!("{device} is trusted again\n"));
    }
    anstream::eprintln!("nothing to clear: {device} is not in quarantine");
    Ok(())
}

/// Cleans once more what did not come back well.
pub(crate) async fn heal(bus: &Bus, device: &str, out: &Output) -> Result<(), Trouble> {
    let address = patiently(bus, bus.manager.heal(device)).await?;
    if out.json {
        return print_json(&Value::String(address));
    }
    print(&format!("{address} is well, and trusted again\n"))
}

fn table(devices: &[QuarantineRecord]) -> Table {
    let mut table = Table::telling(&["DEVICE", "SINCE (UTC)", "BY", "NAME", "REASON"]);
    for device in devices {
        let by = match device.by.as_str() {
            "vfiod" => "vfiod".to_owned(),
            user => format!("user {user}"),
        };
        let absent = if device.present { "" } else { " (not there)" };
        table.push([
            Cell::new(&device.address, BAD),
            time(device.since).into(),
            by.into(),
            Cell::new(format!("{}{absent}", device.name), PLAIN),
            device.reason.as_str().into(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Screen;

    #[test]
    fn a_device_is_one_line_with_who_and_why() {
        let present = QuarantineRecord {
            address: "0000:03:00.0".into(),
            name: "NVIDIA H100".into(),
            since: 1_795_790_283,
            reason: "reset failed".into(),
            by: "vfiod".into(),
            present: true,
            but_for: None,
        };
        let absent = QuarantineRecord {
            name: "10de:2330".into(),
            by: "0".into(),
            present: false,
            ..present.clone()
        };
        let text = table(&[present, absent]).render(Screen::default());
        assert_eq!(
            anstream::adapter::strip_str(&text).to_string(),
            "DEVICE        SINCE (UTC)          BY      NAME                   REASON\n\
             0000:03:00.0  2026-11-27 14:38:03  vfiod   NVIDIA H100            reset failed\n\
             0000:03:00.0  2026-11-27 14:38:03  user 0  10de:2330 (not there)  reset failed\n"
        );
    }
}
