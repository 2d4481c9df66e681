//! The scenarios, in the order they run.

mod attach;
mod bench;
mod conformance;
mod demo;
mod descriptors;
mod life;
mod refusals;
mod selftest;
mod survival;
mod virtual_functions;

use anyhow::Result;

use super::Lab;
use crate::protocol::ScenarioInfo;

type Scenario = fn(&mut Lab) -> Result<()>;

const SCENARIOS: &[(&str, &str, Scenario)] = &[
    (
        "selftest",
        "the lab itself: devices, groups, VFIO and a guest, by bare sysfs writes",
        selftest::run,
    ),
    ("bus", "busctl attaches GPU and VF, a guest uses them, release restores", attach::bus),
    ("command-line", "the same with vfioctl", attach::command_line),
    ("restore", "no driver, an own override, an adopted device: all come back", attach::restore),
    ("leased", "a second tenant is refused, naming the lease", attach::leased),
    ("autoprobe", "a VF that a host driver took by itself", attach::autoprobe),
    ("shared-group", "a group with a disk of the host", refusals::shared_group),
    (
        "protected",
        "what the host cannot live without, and what somebody holds",
        refusals::protected,
    ),
    ("unprivileged", "who may look and who may change", refusals::unprivileged),
    ("bad-input", "every wrong input has its answer", refusals::bad_input),
    ("restart", "the daemon restarts while a guest has its devices", life::restart),
    ("host", "what journal, systemd and the readiness check see", life::host),
    ("hotplug", "devices go and come, leased and not", life::hotplug),
    ("virtual-functions", "made, leased and taken away", virtual_functions::number),
    ("shape", "a tenant's own address and VLAN, for its time", virtual_functions::shape),
    ("owners", "leases end with their process or connection", survival::owners),
    ("drift", "others change what a lease holds", survival::drift),
    ("killed", "the daemon is killed in attaching, and beside a guest", survival::killed),
    ("deadlock", "a kernel that sleeps on a card for ever", survival::deadlock),
    ("descriptors", "who may open what is leased, and for how long", descriptors::run),
    ("conformance", "the simulated kernel's cases, on a real one", conformance::run),
    ("demo", "the product at work, told as a story", demo::run),
    ("bench", "what it costs beside the kernel and its peers", bench::run),
];

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
