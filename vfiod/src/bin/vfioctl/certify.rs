//! `certify` and `history --check`: what was done to a lease's devices, and whether the record of it
//! is what was written.

use std::fmt;
use std::process::ExitCode;

use libvfio::client::{CheckedRecord, CleanedRecord, HistoryRecord, Options};
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
    let Some(end) = end(&entries) else {
        return Err(Trouble::new(
            ErrorKind::NotFound,
            format!(
                "no lease {lease} that somebody had is known to have ended; see 'vfioctl history', \
                 and for those that have not ended 'vfioctl leases'"
            ),
        ));
    };
    let checked = bus.ask("CheckHistory", &()).await?;
    let (entry, whole) = (&entries[end], checked.read::<CheckedRecord>()?);
    let clean = Clean::of(entry);
    if out.json {
        let entry = match reply.json()? {
            Value::Array(mut all) => all.swap_remove(end),
            other => other,
        };
        print_json(
            &json!({ "clean": clean.is_clean(), "entry": entry, "history": checked.json()? }),
        )?;
    } else {
        print(&Certificate { entry, checked: &whole, clean }.to_string())?;
    }
    Ok(exit(clean.is_clean() && whole.faults.is_empty()))
}

/// The entry by which a lease that somebody had has ended: the last that says how it was cleaned, or
/// the last there is.
fn end(entries: &[HistoryRecord]) -> Option<usize> {
    let had = entries.iter().any(|entry| entry.event == "attached");
    let cleaned = entries.iter().rposition(|entry| !entry.cleaned.is_empty());
    cleaned.or_else(|| entries.iter().rposition(|entry| had && entry.since.is_some()))
}

/// What is known of how clean a lease's devices are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clean {
    /// Each was reset, and its memory cleared.
    All,
    /// Each was reset, and of some no memory is known that one could clear.
    AsKnown,
    /// Something was left out, has failed, or is not known.
    No,
}

impl Clean {
    fn of(entry: &HistoryRecord) -> Self {
        let each = |c: &CleanedRecord| match (c.reset.as_str(), c.scrub.as_str()) {
            ("alone" | "bus", "zeros" | "zeros-sampled" | "erased" | "command") => Self::All,
            ("alone" | "bus", "unknown") => Self::AsKnown,
            _ => Self::No,
        };
        let all: Vec<Self> = entry.cleaned.iter().map(each).collect();
        match all.as_slice() {
            // Of mediated devices only their driver knows.
            all if all.len() < entry.devices.len() || all.contains(&Self::No) => Self::No,
            all if all.contains(&Self::AsKnown) => Self::AsKnown,
            _ => Self::All,
        }
    }

    fn is_clean(self) -> bool {
        self != Self::No
    }
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
            (false, _) => {
                writeln!(f, "the history is not what was written, or not as it should be")
            }
        }
    }
}

/// What is known of a lease's end.
struct Certificate<'a> {
    entry: &'a HistoryRecord,
    checked: &'a CheckedRecord,
    clean: Clean,
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
        let told = |device: &&String| self.entry.cleaned.iter().all(|c| c.device != **device);
        for device in self.entry.devices.iter().filter(told) {
            writeln!(f, "  {device} taken back, and nothing is known of its memory")?;
        }
        writeln!(f, "  entry {number} {chain}")?;
        let clean = match self.clean {
            Clean::All => "clean",
            Clean::AsKnown => "clean as far as it is known how",
            Clean::No => "NOT clean, as far as is known",
        };
        let verdict = if self.checked.faults.is_empty() {
            format!("{clean}; on record as it was written")
        } else {
            "not certain: see 'vfioctl history --check'".to_owned()
        };
        writeln!(f, "  {verdict}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cleaned(reset: &str, scrub: &str) -> CleanedRecord {
        CleanedRecord {
            device: "0000:03:00.0".into(),
            reset: reset.into(),
            scrub: scrub.into(),
            weaker: None,
        }
    }

    fn ended(cleaned: Vec<CleanedRecord>) -> HistoryRecord {
        HistoryRecord {
            event: "released".into(),
            lease: Some("3f9a2c81".into()),
            tenant: Some("alice".into()),
            devices: vec!["0000:03:00.0".into()],
            since: Some(1_795_790_183),
            time: 1_795_790_283,
            cleaned,
            number: 7,
            chain: "c0ffee".into(),
            ..HistoryRecord::default()
        }
    }

    fn told(entry: &HistoryRecord) -> String {
        let (checked, clean) = (&CheckedRecord::default(), Clean::of(entry));
        let text = Certificate { entry, checked, clean }.to_string();
        anstream::adapter::strip_str(&text).to_string()
    }

    #[test]
    fn a_certificate_says_what_was_done_and_what_that_amounts_to() {
        assert_eq!(
            told(&ended(vec![cleaned("bus", "zeros")])),
            "lease 3f9a2c81 of alice\n\
             \u{20} from 2026-11-27 14:36:23 to 2026-11-27 14:38:03 UTC, 100 s\n\
             \u{20} 0000:03:00.0 reset by its bus, memory zeroed\n\
             \u{20} entry 7 c0ffee\n\
             \u{20} clean; on record as it was written\n"
        );
        let known = |reset, scrub| Clean::of(&ended(vec![cleaned(reset, scrub)]));
        assert_eq!(known("alone", "erased"), Clean::All);
        assert_eq!(known("alone", "unknown"), Clean::AsKnown);
        // Which check it was is said all the same.
        assert_eq!(known("bus", "zeros-sampled"), Clean::All);
        let text = told(&ended(vec![cleaned("bus", "zeros-sampled")]));
        assert!(text.contains("memory zeroed, samples of it read back\n"), "{text}");
        for (reset, scrub) in
            [("none", "zeros"), ("bus", "none"), ("impossible", "zeros"), ("bus", "skipped")]
        {
            assert_eq!(known(reset, scrub), Clean::No, "{reset} {scrub}");
        }
        // A reset is not said to have cleared what nobody knows how to clear.
        let text = told(&ended(vec![cleaned("alone", "unknown")]));
        assert!(text.contains("no memory known to clear\n"), "{text}");
        assert!(text.contains("clean as far as it is known how;"), "{text}");
    }

    #[test]
    fn nothing_is_certified_of_mediated_devices() {
        let attached = HistoryRecord { event: "attached".into(), ..HistoryRecord::default() };
        let uuid = "c2177883-f1bb-47f0-914d-32a22e3a8804";
        let part = HistoryRecord { devices: vec![uuid.into()], ..ended(Vec::new()) };
        assert_eq!(end(&[attached, part.clone()]), Some(1));
        assert_eq!(Clean::of(&part), Clean::No);
        assert!(told(&part).contains("nothing is known of its memory"));
        // One that nobody had has not ended.
        assert_eq!(end(&[part]), None);
    }
}
