//! Errors that a function reported and nobody could correct, as the kernel counts them from boot on
//! (Advanced Error Reporting; `Documentation/ABI/testing/sysfs-bus-pci-devices-aer_stats`). Reads two
//! files, changes nothing.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::address::PciAddress;
use crate::host::HostRoot;

/// How often each kind of uncorrectable error was reported, by the kernel's names for them. Nothing
/// where the kernel does not count them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Errors {
    /// Those after which the link itself is not to be relied on.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    fatal: BTreeMap<String, u64>,
    /// Those that cost a transaction.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    nonfatal: BTreeMap<String, u64>,
}

impl Errors {
    /// What a function has reported until now.
    pub fn read(host: &HostRoot, device: PciAddress) -> Self {
        let read = |name| {
            let text = host.function(device).attr(name);
            text.ok().flatten().map(|text| parse(&text)).unwrap_or_default()
        };
        Self { fatal: read("aer_dev_fatal"), nonfatal: read("aer_dev_nonfatal") }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.fatal.is_empty() && self.nonfatal.is_empty()
    }

    /// What was reported since it was like `before`, in words: `2 CmpltAbrt (non-fatal)`.
    pub fn since(&self, before: &Self) -> Vec<String> {
        let more = |now: &BTreeMap<String, u64>, then: &BTreeMap<String, u64>, how: &str| {
            let each = now.iter().filter_map(|(kind, count)| {
                let more = count.saturating_sub(then.get(kind).copied().unwrap_or(0));
                (more > 0).then(|| format!("{more} {kind} ({how})"))
            });
            each.collect::<Vec<_>>()
        };
        let fatal = more(&self.fatal, &before.fatal, "fatal");
        fatal.into_iter().chain(more(&self.nonfatal, &before.nonfatal, "non-fatal")).collect()
    }
}

/// Lines of `KIND COUNT`; those of kinds that never happened, and the total, say nothing more.
fn parse(text: &str) -> BTreeMap<String, u64> {
    let line = |line: &str| {
        let (kind, count) = line.rsplit_once(' ')?;
        let count = count.parse().ok().filter(|count| *count > 0)?;
        (!kind.starts_with("TOTAL_")).then(|| (kind.trim().to_owned(), count))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONFATAL: &str = "Undefined 0\nDLP 0\nTLP 1\nCmpltAbrt 3\nTOTAL_ERR_NONFATAL 4\n";

    #[test]
    fn only_what_came_since_counts() {
        let before = Errors { nonfatal: parse(NONFATAL), ..Errors::default() };
        assert_eq!(before.since(&before), [""; 0]);
        assert_eq!(
            before.since(&Errors::default()),
            ["3 CmpltAbrt (non-fatal)", "1 TLP (non-fatal)"]
        );
        let fatal = parse("DLP 1\nTOTAL_ERR_FATAL 1\n");
        let now = Errors { fatal, nonfatal: parse(&NONFATAL.replace("Abrt 3", "Abrt 5")) };
        assert_eq!(now.since(&before), ["1 DLP (fatal)", "2 CmpltAbrt (non-fatal)"]);
        // Counting began anew, as where a device was plugged in again.
        assert_eq!(Errors::default().since(&now), [""; 0]);
    }

    #[test]
    fn what_is_no_count_is_passed_over() {
        for text in ["", "\n", "TLP", "TLP x", " 1 2 3 -1", "TLP 99999999999999999999999"] {
            assert!(parse(text).is_empty(), "{text:?}");
        }
    }
}
