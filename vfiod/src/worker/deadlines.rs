//! How long each kind of step may take before its device counts as wedged. Plain types.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use libvfio::step::Step;

/// Seconds per kind of step: what the kernel needs at most, with room for a busy machine.
///
/// A function may take 60 s to be ready after a reset (`PCIE_RESET_READY_POLL_MS`,
/// `drivers/pci/pci.h`), and VFIO resets when it binds, opens and lets go.
///
/// Of clearing memory it is only the least: what does it has a limit of its own.
///
/// Removing virtual functions takes a second and each one's driver (`sriov_disable`,
/// `drivers/pci/iov.c`), and a card may have hundreds.
const DEFAULTS: [(&str, u64); 16] = [
    ("load-module", 60),
    ("unbind-lock", 10),
    ("unbind", 70),
    ("set-override", 10),
    ("bind", 70),
    ("reset", 70),
    ("scrub", 600),
    ("set-autoprobe", 10),
    ("set-virtual-functions", 300),
    ("shape", 20),
    ("node-access", 10),
    ("lock-memory", 10),
    ("create-mediated", 70),
    ("remove-mediated", 70),
    ("tune", 10),
    ("check-viable", 70),
];

/// How much longer than a program a step may take that runs it.
const ROOM: Duration = Duration::from_secs(30);

/// A deadline for each kind of step: those that were given.
#[derive(Debug, Clone, Default)]
pub struct Deadlines(BTreeMap<&'static str, Duration>);

/// A deadline as it is given: `unbind=30`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline {
    kind: &'static str,
    limit: Duration,
}

impl Deadlines {
    /// The defaults, but for those given.
    pub fn with(given: impl IntoIterator<Item = Deadline>) -> Self {
        Self(given.into_iter().map(|deadline| (deadline.kind, deadline.limit)).collect())
    }

    /// How long this step may take.
    pub fn of(&self, step: &Step) -> Duration {
        if let Some(given) = self.0.get(step.name()) {
            return *given;
        }
        let of_kind = DEFAULTS.iter().find(|(kind, _)| *kind == step.name());
        let of_kind = Duration::from_secs(of_kind.map_or(70, |(_, seconds)| *seconds));
        match step {
            // It ends by itself at its own limit; only where the kernel keeps it does it not.
            Step::Scrub { with, .. } => of_kind.max(with.limit() + ROOM),
            _ => of_kind,
        }
    }
}

impl FromStr for Deadline {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = || DEFAULTS.map(|(kind, _)| kind).join(", ");
        let (kind, seconds) =
            text.split_once('=').ok_or("write it as KIND=SECONDS, such as unbind=30")?;
        let kind = DEFAULTS.into_iter().map(|(kind, _)| kind).find(|known| *known == kind);
        let kind = kind.ok_or_else(|| format!("the kinds of step are {}", known()))?;
        let seconds: f64 = seconds.parse().map_err(|_| "the seconds are a number")?;
        let limit = Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())?;
        Ok(Self { kind, limit })
    }
}

#[cfg(test)]
mod tests {
    use libvfio::scrub::Scrubber;

    use super::*;

    fn reset() -> Step {
        Step::Reset { device: "03:00.0".parse().unwrap(), with: Vec::new() }
    }

    #[test]
    fn a_given_deadline_replaces_the_default() {
        assert_eq!(Deadlines::default().of(&reset()), Duration::from_secs(70));
        let short = Deadlines::with(["reset=0.5".parse().unwrap()]);
        assert_eq!(short.of(&reset()), Duration::from_millis(500));
    }

    #[test]
    fn what_clears_memory_has_as_long_as_it_says() {
        let with = Scrubber::Command { command: vec!["/a".into()], timeout: 7200, driver: None };
        let scrub = Step::Scrub { device: "03:00.0".parse().unwrap(), with };
        assert_eq!(Deadlines::default().of(&scrub), Duration::from_secs(7230));
        let short = Deadlines::with(["scrub=1".parse().unwrap()]);
        assert_eq!(short.of(&scrub), Duration::from_secs(1));
    }

    #[test]
    fn what_is_no_deadline_is_refused_with_the_form() {
        let error = |text: &str| text.parse::<Deadline>().unwrap_err();
        assert!(error("unbind").contains("KIND=SECONDS"));
        assert!(error("unbnd=3").contains("unbind"));
        assert!(error("unbind=soon").contains("number"));
        assert!(error("unbind=-1").contains("negative"));
    }

    #[test]
    fn every_kind_of_step_has_a_default() {
        assert_eq!(DEFAULTS.map(|(kind, _)| kind), Step::KINDS);
    }
}
