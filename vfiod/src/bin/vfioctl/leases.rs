//! `leases`: who has what.

use std::time::{SystemTime, UNIX_EPOCH};

use anstyle::Style;
use libvfio::client::LeaseRecord;

use crate::attach::held;
use crate::bus::Bus;
use crate::output::{Output, print_json};
use crate::table::{BAD, Cell, GOOD, LEASED, PLAIN, Table, WARN};
use crate::trouble::Trouble;

pub(crate) async fn run(bus: &Bus, out: &Output) -> Result<(), Trouble> {
    let reply = bus.ask("ListLeases", &()).await?;
    if out.json {
        return print_json(&reply.json()?);
    }
    bus.note_simulation().await;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    out.table(&table(&reply.read::<Vec<LeaseRecord>>()?, now), "no leases")
}

fn table(leases: &[LeaseRecord], now: u64) -> Table {
    let mut table = Table::telling(&[
        "LEASE",
        "STATE",
        "TENANT",
        "AGE",
        "DEVICES",
        "INTERFACE",
        "VM",
        "REASON",
    ]);
    for lease in leases {
        table.push([
            lease.id.as_str().into(),
            Cell::new(&lease.state, style(&lease.state)),
            tenant(lease),
            age(now.saturating_sub(lease.created)).into(),
            held(lease).join(" ").into(),
            Cell::maybe(lease.interface.as_deref(), PLAIN),
            Cell::maybe(lease.vm.as_deref(), PLAIN),
            Cell::maybe(lease.reason.as_deref(), PLAIN),
        ]);
    }
    table
}

/// Who has it; nobody has what the daemon does for itself.
fn tenant(lease: &LeaseRecord) -> Cell {
    match &lease.task {
        Some(task) => Cell::new(format!("({task})"), PLAIN),
        None => Cell::new(&lease.tenant, LEASED),
    }
}

fn style(state: &str) -> Style {
    match state {
        "active" => GOOD,
        "failed" => BAD,
        _ => WARN,
    }
}

/// A time in its largest two units.
fn age(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{:02}s", seconds % 60),
        (0, _, _) => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Screen;

    #[test]
    fn a_lease_is_one_line_with_why_it_failed() {
        let active = LeaseRecord {
            id: "3f9a2c81".into(),
            tenant: "alice".into(),
            state: "active".into(),
            devices: vec!["0000:03:00.0".into()],
            interface: Some("group".into()),
            created: 1000,
            ..LeaseRecord::default()
        };
        let failed = LeaseRecord {
            state: "failed".into(),
            reason: Some("0000:03:00.0 was unplugged".into()),
            vm: Some("web".into()),
            interface: None,
            ..active.clone()
        };
        let text = table(&[active, failed], 1075).render(Screen::default());
        assert_eq!(
            anstream::adapter::strip_str(&text).to_string(),
            "LEASE     STATE   TENANT  AGE    DEVICES       INTERFACE  VM   REASON\n\
             3f9a2c81  active  alice   1m15s  0000:03:00.0  group      -    -\n\
             3f9a2c81  failed  alice   1m15s  0000:03:00.0  -          web  0000:03:00.0 was unplugged\n"
        );
    }

    #[test]
    fn an_age_is_in_the_units_that_matter() {
        assert_eq!([0, 59, 61, 3_660, 90_000].map(age), ["0s", "59s", "1m01s", "1h01m", "1d01h"]);
    }
}
