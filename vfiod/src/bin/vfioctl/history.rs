//! `history` and `leases --history`: what became of leases and of devices not trusted.

use anstyle::Style;
use libvfio::client::{CleanedRecord, HistoryRecord, Options};

use crate::bus::Bus;
use crate::output::{Output, print_json};
use crate::table::{BAD, Cell, GOOD, LEASED, PLAIN, Table, WARN};
use crate::trouble::Trouble;

pub(crate) async fn run(
    bus: &Bus,
    device: Option<&str>,
    last: Option<u32>,
    out: &Output,
) -> Result<(), Trouble> {
    let mut options = Options::new();
    if let Some(device) = device {
        options.insert("device", device.into());
    }
    if let Some(last) = last {
        options.insert("last", last.into());
    }
    let reply = bus.ask("ListHistory", &(options,)).await?;
    if out.json {
        return print_json(&reply.json()?);
    }
    bus.note_simulation().await;
    out.table(&table(&reply.read::<Vec<HistoryRecord>>()?), "nothing has happened")
}

fn table(entries: &[HistoryRecord]) -> Table {
    let mut table =
        Table::telling(&["TIME (UTC)", "EVENT", "LEASE", "TENANT", "DEVICES", "VM", "TEXT"]);
    for entry in entries {
        let devices = Some(entry.devices.join(" ")).filter(|devices| !devices.is_empty());
        table.push([
            time(entry.time).into(),
            Cell::new(&entry.event, style(&entry.event)),
            Cell::maybe(entry.lease.as_deref(), PLAIN),
            Cell::maybe(entry.tenant.as_deref(), LEASED),
            Cell::maybe(devices, PLAIN),
            Cell::maybe(entry.vm.as_deref(), PLAIN),
            Cell::maybe(Some(text(entry)).filter(|text| !text.is_empty()), PLAIN),
        ]);
    }
    table
}

/// Why or how, and what was done so that nothing is left of a tenant.
fn text(entry: &HistoryRecord) -> String {
    let mut text = entry.text.clone();
    for cleaned in &entry.cleaned {
        let gap = if text.is_empty() { "" } else { "; " };
        text = format!("{text}{gap}{}", cleaning(cleaned));
    }
    text
}

/// What was done to a function, in words.
pub(crate) fn cleaning(cleaned: &CleanedRecord) -> String {
    let reset = match cleaned.reset.as_str() {
        "alone" => "reset",
        "bus" => "reset by its bus",
        "skipped" => "not reset, by request",
        "none" => "not reset, by the policy",
        "impossible" => "not reset, for want of a way",
        "gone" => "not reset, for it had gone",
        _ => "its reset failed",
    };
    let scrub = match cleaned.scrub.as_str() {
        "zeros" => "memory zeroed",
        "zeros-sampled" => "memory zeroed, samples of it read back",
        "erased" => "namespaces erased",
        "command" => "memory cleared by the administrator's program",
        "none" => "memory left, by the policy",
        "skipped" => "memory left, by request",
        "unknown" => "no memory known to clear",
        "gone" => "memory gone with it",
        _ => "clearing its memory failed",
    };
    format!("{} {reset}, {scrub}", cleaned.device)
}

fn style(event: &str) -> Style {
    match event {
        "attached" | "released" | "cleared" => GOOD,
        "recovered" => WARN,
        _ => BAD,
    }
}

/// Seconds since 1970 as date and time (Hinnant, "chrono-Compatible Low-Level Date Algorithms",
/// `civil_from_days`).
pub(crate) fn time(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Months from March on, so that the leap day is the year's last.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year + carry;
    let (hour, minute) = (second / 3_600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{:02}", second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Screen;

    #[test]
    fn what_happened_is_one_line() {
        let released = HistoryRecord {
            time: 1_795_790_283,
            event: "released".into(),
            lease: Some("3f9a2c81".into()),
            tenant: Some("alice".into()),
            devices: vec!["0000:03:00.0".into()],
            ..HistoryRecord::default()
        };
        let cleared = HistoryRecord {
            event: "cleared".into(),
            lease: None,
            tenant: None,
            text: "by user 0".into(),
            ..released.clone()
        };
        let text = table(&[released, cleared]).render(Screen::default());
        assert_eq!(
            anstream::adapter::strip_str(&text).to_string(),
            "TIME (UTC)           EVENT     LEASE     TENANT  DEVICES       VM  TEXT\n\
             2026-11-27 14:38:03  released  3f9a2c81  alice   0000:03:00.0  -   -\n\
             2026-11-27 14:38:03  cleared   -         -       0000:03:00.0  -   by user 0\n"
        );
    }

    #[test]
    fn dates_are_right_around_leap_days() {
        let seconds = [0, 951_782_399, 951_782_400, 951_868_800, 4_107_542_400];
        assert_eq!(
            seconds.map(time),
            [
                "1970-01-01 00:00:00",
                "2000-02-28 23:59:59",
                "2000-02-29 00:00:00",
                "2000-03-01 00:00:00",
                "2100-03-01 00:00:00"
            ]
        );
    }
}
