//! Whether what is on record keeps what was promised: nobody is given a function that is still
//! another's, that may have something left of the tenant before, or that is not trusted. Pure: it
//! knows nothing but the entries.

use std::collections::{BTreeMap, BTreeSet};

use libvfio::address::PciAddress;

use super::{Entry, Event};

/// What the entries say so far.
#[derive(Debug, Default)]
pub struct Audit {
    functions: BTreeMap<PciAddress, Standing>,
    ended: BTreeSet<String>,
    handed: u64,
    faults: Vec<String>,
}

/// Where a function stands. What was before the oldest entry is not known, and nobody's fault.
#[derive(Debug, Default)]
struct Standing {
    /// The lease that has it.
    held: Option<String>,
    /// The last one that had it.
    last: Option<String>,
    /// Why nothing says that it is clean.
    unclean: Option<String>,
    quarantined: Option<Quarantined>,
}

/// Why a function is not to be given, but for some.
#[derive(Debug)]
struct Quarantined {
    /// The entry since which it is in quarantine.
    since: u64,
    /// The lease that had it by then, which may have been on the way and be given it yet.
    had: Option<String>,
    /// The tenant who may have it all the same.
    but_for: Option<String>,
}

impl Audit {
    /// The audit of entries, oldest first.
    pub fn of<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> Self {
        let mut audit = Self::default();
        for entry in entries {
            audit.take(entry);
        }
        audit
    }

    /// How often a function was given to a tenant.
    pub fn handed(&self) -> u64 {
        self.handed
    }

    /// What should not have been, in words; nothing if all is well.
    pub fn faults(&self) -> &[String] {
        &self.faults
    }

    /// Takes the next entry in.
    pub fn take(&mut self, entry: &Entry) {
        match entry.event {
            Event::Attached => self.give(entry),
            Event::Released | Event::Failed | Event::Recovered => self.end(entry),
            Event::Quarantined => {
                for device in &entry.devices {
                    let quarantined = &mut self.functions.entry(*device).or_default().quarantined;
                    let since = quarantined.as_ref().map_or(entry.number, |before| before.since);
                    let (had, but_for) = (entry.lease.clone(), entry.but_for.clone());
                    *quarantined = Some(Quarantined { since, had, but_for });
                }
            }
            // By somebody who answers for it, or because it was cleaned after all.
            Event::Cleared => {
                for device in &entry.devices {
                    let standing = self.functions.entry(*device).or_default();
                    (standing.quarantined, standing.unclean) = (None, None);
                }
            }
            Event::VirtualFunctions | Event::Policy | Event::SetAside => {}
        }
    }

    fn give(&mut self, entry: &Entry) {
        let (number, lease) = (entry.number, entry.lease.clone().unwrap_or_default());
        for device in &entry.devices {
            let standing = self.functions.entry(*device).or_default();
            let mut fault = |why: String| {
                self.faults.push(format!("entry {number} gives {device} to lease {lease}, {why}"));
            };
            if let Some(other) = standing.held.as_ref().filter(|other| **other != lease) {
                fault(format!("while lease {other} has it"));
            }
            let barring = standing.quarantined.as_ref().filter(|quarantined| {
                let spared = quarantined.but_for.is_some() && quarantined.but_for == entry.tenant;
                !spared && quarantined.had.as_ref() != Some(&lease)
            });
            if let Some(Quarantined { since, .. }) = barring {
                fault(format!("though it is in quarantine since entry {since}"));
            }
            if let Some(why) = &standing.unclean {
                fault(format!("though {why}"));
            }
            self.handed += 1;
            (standing.held, standing.last) = (Some(lease.clone()), Some(lease.clone()));
        }
    }

    /// A lease may have ended more than once: its way back is tried once more, and later its record is
    /// dismissed, which says nothing of its functions. By then somebody else may have had its functions.
    fn end(&mut self, entry: &Entry) {
        let Some(lease) = &entry.lease else { return };
        let again = !self.ended.insert(lease.clone());
        for device in &entry.devices {
            let standing = self.functions.entry(*device).or_default();
            let mine = standing.last.as_ref() == Some(lease);
            let cleaned = entry.cleaned.iter().find(|cleaned| cleaned.device == *device);
            // One that was never given was nobody's, unless something says what was done after it.
            let told = mine && !again || cleaned.is_some() && (mine || !again);
            if !told {
                continue;
            }
            let (number, tenant) = (entry.number, entry.tenant.as_deref().unwrap_or("nobody"));
            if !mine && let Some(why) = &standing.unclean {
                // A daemon that was killed could not say that it gave it away.
                self.faults
                    .push(format!("entry {number}: lease {lease} had {device}, though {why}"));
            }
            standing.unclean = match cleaned {
                Some(cleaned) if cleaned.is_done() => None,
                Some(_) => {
                    Some(format!("entry {number} says that cleaning it after {tenant} failed"))
                }
                None => {
                    Some(format!("entry {number} does not say how it was cleaned after {tenant}"))
                }
            };
            (standing.held, standing.last) = (None, Some(lease.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cleaned::{Cleaned, Reset, Scrub};

    const DEVICE: &str = "03:00.0";

    /// Numbers entries, as a history does.
    fn faults(entries: &[Entry]) -> Vec<String> {
        let numbered = (0..).zip(entries).map(|(number, e)| Entry { number, ..e.clone() });
        Audit::of(&numbered.collect::<Vec<_>>()).faults().to_vec()
    }

    fn about(event: Event) -> Entry {
        Entry::now(event, vec![DEVICE.parse().unwrap()], "")
    }

    fn given(lease: &str) -> Entry {
        Entry { lease: Some(lease.into()), tenant: Some("alice".into()), ..about(Event::Attached) }
    }

    fn ended(lease: &str, event: Event, reset: Reset) -> Entry {
        let scrub = Scrub::Unknown;
        let cleaned = vec![Cleaned { device: DEVICE.parse().unwrap(), reset, scrub, weaker: None }];
        Entry { event, cleaned, ..given(lease) }
    }

    #[test]
    fn what_is_cleaned_between_tenants_is_well() {
        let whole = [
            given("a"),
            ended("a", Event::Released, Reset::Alone),
            given("b"),
            ended("b", Event::Recovered, Reset::Bus),
            // It stopped half way, and nobody had it.
            Entry { event: Event::Failed, ..given("c") },
            given("d"),
            ended("d", Event::Failed, Reset::Skipped),
            given("e"),
        ];
        assert_eq!(faults(&whole), [""; 0]);
        // The oldest entries were dropped.
        for from in 1..whole.len() {
            assert_eq!(faults(&whole[from..]), [""; 0], "from {from}");
        }
    }

    #[test]
    fn what_was_not_cleaned_is_nobodys_until_it_is() {
        let failed = ended("a", Event::Failed, Reset::Failed);
        let begun = [given("a"), failed.clone()];
        let then = |more: &[Entry]| faults(&[&begun, more].concat());
        let found = then(&[given("b")]);
        assert!(found.len() == 1 && found[0].contains("after alice failed"), "{found:?}");
        assert_eq!(then(&[about(Event::Cleared), given("b")]), [""; 0]);
        assert_eq!(then(&[ended("a", Event::Released, Reset::Alone), given("b")]), [""; 0]);
        // That the record of the failure is dismissed cleans nothing.
        let dismissed = Entry { event: Event::Released, ..given("a") };
        assert_eq!(then(&[dismissed, given("b")]).len(), 1);
        assert_eq!(then(&[failed.clone(), given("b")]).len(), 1);
        // Nor does it soil what others have had since.
        let since = [about(Event::Cleared), given("b"), ended("b", Event::Released, Reset::Alone)];
        assert_eq!(then(&[&since[..], &[failed, given("c")]].concat()), [""; 0]);
        // A daemon may be killed before it says that a lease was made.
        assert_eq!(then(&[ended("b", Event::Recovered, Reset::Alone)]).len(), 1);
    }

    #[test]
    fn a_lease_whose_end_says_nothing_is_not_clean() {
        let silent = Entry { event: Event::Released, ..given("a") };
        let found = faults(&[given("a"), silent, given("b")]);
        assert!(found.len() == 1 && found[0].contains("does not say how"), "{found:?}");
    }

    #[test]
    fn what_is_in_quarantine_or_anothers_is_not_given() {
        let quarantined = about(Event::Quarantined);
        let found = faults(&[quarantined.clone(), given("a")]);
        assert!(found.len() == 1 && found[0].contains("in quarantine since entry 0"), "{found:?}");
        assert_eq!(faults(&[quarantined.clone(), about(Event::Cleared), given("a")]), [""; 0]);
        // It was on its way to whom it was promised before.
        let late = Entry { lease: Some("a".into()), ..quarantined.clone() };
        assert_eq!(faults(&[late.clone(), given("a")]), [""; 0]);
        let then = ended("a", Event::Released, Reset::Alone);
        let found = faults(&[late, given("a"), then, given("b")]);
        assert!(found.len() == 1 && found[0].contains("since entry 0"), "{found:?}");
        // Only who left something in it may have it again, until somebody knows better.
        let kept = Entry { but_for: Some("alice".into()), ..quarantined.clone() };
        assert_eq!(faults(&[kept.clone(), given("a")]), [""; 0]);
        let bobs = Entry { tenant: Some("bob".into()), ..given("b") };
        let found = faults(&[kept.clone(), bobs]);
        assert!(found.len() == 1 && found[0].contains("since entry 0"), "{found:?}");
        assert_eq!(faults(&[kept, quarantined, given("a")]).len(), 1);
        let found = faults(&[given("a"), given("b")]);
        assert!(found.len() == 1 && found[0].contains("while lease a has it"), "{found:?}");
    }
}
