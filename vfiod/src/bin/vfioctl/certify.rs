//! `certify` and `history --check`: what was done to a lease's devices, and whether the record of it
//! is what was written.

use std::fmt;
use std::process::ExitCode;

use libvfio::client::{CheckedRecord, HistoryRecord, Options};
use libvfio::error::ErrorKind;
use serde_json::{Value, json};

use crate::bus::Bus;
use crate::history::{cleaning, time};
use crate::output::{Output, print, print_json};
use crate::table::BOLD;
use crate::trouble::Trouble;

pub(crate) async fn check(bus: &Bus, out: &Output) -> Result<ExitCode, Trouble> {
    let reply = bus.ask("CheckHistory", &()).await?;
    let checked: CheckedRecord = reply.read()?;
    if out.json {
        print_json(&reply.json()?)?;
    } else {
        print(&Checked(&checked).to_string())?;
    }
    Ok(exit(checked.faults.is_empty()))
}

pub(crate) async fn run(bus: &Bus, lease: &str, out: &Output) -> Result<ExitCode, Trouble> {
    let options = Options::from([("lease", lease.into()), ("last", u32::MAX.into())]);
    let reply = bus.ask("ListHistory", &(options,)).await?;
    let entries: Vec<HistoryRecord> = reply.read()?;
    let end = entries.iter().rposition(|entry| !entry.cleaned.is_empty());
    let Some(end) = end else {
        return Err(Trouble::new(
            ErrorKind::NotFound,
            format!(
                "no lease {lease} that somebody had is known to have ended; see 'vfioctl leases'"
            ),
        ));
    };
    let checked = bus.ask("CheckHistory", &()).await?;
    let (entry, whole) = (&entries[end], checked.read::<CheckedRecord>()?);
    let clean = entry.cleaned.iter().all(|c| is_clean(&c.reset, &c.scrub));
    if out.json {
        let entry = match reply.json()? {
            Value::Array(mut all) => all.swap_remove(end),
            other => other,
        };
        print_json(&json!({ "clean": clean, "entry": entry, "history": checked.json()? }))?;
    } else {
        print(&Certificate { entry, checked: &whole, clean }.to_string())?;
    }
    Ok(exit(clean && whole.faults.is_empty()))
}

/// Whether a function was reset and nothing known of it was left.
fn is_clean(reset: &str, scrub: &str) -> bool {
    matches!(reset, "alone" | "bus") && matches!(scrub, "zeros" | "erased" | "command" | "unknown")
}

fn exit(well: bool) -> ExitCode {
    if well { ExitCode::SUCCESS } else { ErrorKind::Internal.exit_status().into() }
}

struct Checked<'a>(&'a CheckedRecord);

impl fmt::Display for Checked<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CheckedRecord { entries, next, chain, faults, .. } = self.0;
        for fault in faults {
            writeln!(f, "{fault}")?;
        }
        match (faults.is_empty(), next.checked_sub(1)) {
            (true, None) => writeln!(f, "the history is empty"),
            (true, Some(newest)) => {
                writeln!(
                    f,
                    "all {entries} entries are as they were written; newest {newest} {chain}"
                )
            }
            (false, _) => writeln!(f, "the history is not what was written"),
        }
    }
}

/// What is known of a lease's end.
struct Certificate<'a> {
    entry: &'a HistoryRecord,
    checked: &'a CheckedRecord,
    clean: bool,
}

impl fmt::Display for Certificate<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HistoryRecord { lease, tenant, since, time: ended, number, chain, .. } = self.entry;
        let name = |name: &Option<String>| name.clone().unwrap_or_default();
        writeln!(f, "{BOLD}lease {}{BOLD:#} of {}", name(lease), name(tenant))?;
        let since = since.unwrap_or(*ended);
        writeln!(
            f,
            "  from {} to {} UTC, {} s",
            time(since),
            time(*ended),
            ended - since.min(*ended)
        )?;
        for cleaned in &self.entry.cleaned {
            writeln!(f, "  {}", cleaning(cleaned))?;
            if let Some(weaker) = &cleaned.weaker {
                writeln!(f, "  less than the default: {weaker}")?;
            }
        }
        writeln!(f, "  entry {number} {chain}")?;
        let verdict = match (self.clean, self.checked.faults.is_empty()) {
            (true, true) => "clean, and on record as it was written",
            (false, true) => "NOT clean, and on record as it was written",
            (_, false) => "not certain: the history is not what was written",
        };
        writeln!(f, "  {verdict}")
    }
}

#[cfg(test)]
mod tests {
    use libvfio::client::CleanedRecord;

    use super::*;

    #[test]
    fn a_certificate_says_what_was_done_and_what_that_amounts_to() {
        let cleaned = |reset: &str, scrub: &str| CleanedRecord {
            device: "0000:03:00.0".into(),
            reset: reset.into(),
            scrub: scrub.into(),
            weaker: None,
        };
        let entry = HistoryRecord {
            lease: Some("3f9a2c81".into()),
            tenant: Some("alice".into()),
            since: Some(1_795_790_183),
            time: 1_795_790_283,
            cleaned: vec![cleaned("bus", "zeros")],
            number: 7,
            chain: "c0ffee".into(),
            ..HistoryRecord::default()
        };
        let checked = CheckedRecord::default();
        let text = Certificate { entry: &entry, checked: &checked, clean: true }.to_string();
        assert_eq!(
            anstream::adapter::strip_str(&text).to_string(),
            "lease 3f9a2c81 of alice\n\
             \u{20} from 2026-11-27 14:36:23 to 2026-11-27 14:38:03 UTC, 100 s\n\
             \u{20} 0000:03:00.0 reset by its bus, memory zeroed\n\
             \u{20} entry 7 c0ffee\n\
             \u{20} clean, and on record as it was written\n"
        );
        assert!(is_clean("alone", "unknown") && is_clean("alone", "erased"));
        assert!(!is_clean("none", "zeros") && !is_clean("bus", "none"));
        assert!(!is_clean("impossible", "zeros") && !is_clean("bus", "skipped"));
    }
}
