//! The scenarios, in the order they run.

mod selftest;

use anyhow::Result;

use super::Lab;
use crate::protocol::ScenarioInfo;

type Scenario = fn(&mut Lab) -> Result<()>;

const SCENARIOS: [(&str, &str, Scenario); 1] = [(
    "selftest",
    "the lab itself: devices, groups, VFIO and a guest, by bare sysfs writes",
    selftest::run,
)];

/// Every scenario's name and what it shows.
pub fn list() -> Vec<ScenarioInfo> {
    let info = |(name, about, _): &(&str, &str, Scenario)| ScenarioInfo {
        name: (*name).to_owned(),
        about: (*about).to_owned(),
    };
    SCENARIOS.iter().map(info).collect()
}

pub(super) fn find(name: &str) -> Option<Scenario> {
    SCENARIOS.iter().find(|(known, ..)| *known == name).map(|(.., scenario)| *scenario)
}
