//! The scenarios, in the order they run.

mod attach;
mod bench;
mod boot;
mod conformance;
mod demo;
mod descriptors;
mod device_nodes;
mod dma;
mod errors;
mod leak;
mod libvirt;
mod life;
mod many;
mod mediated;
mod pools;
mod refusals;
mod run;
mod scrub;
mod selftest;
mod survival;
mod virtual_functions;

use anyhow::Result;

use super::Lab;
use crate::machine::{Kernel, Purpose};
use crate::protocol::ScenarioInfo;

/// Something to show in the lab, and what it takes.
pub(super) struct Scenario {
    name: &'static str,
    about: &'static str,
    /// Shows it.
    pub(super) run: fn(&mut Lab) -> Result<()>,
    machine: Purpose,
    kernels: &'static [Kernel],
    by_name: bool,
}

/// A scenario for any kernel, on the machine that most are for, run with all others.
const fn scenario(
    name: &'static str,
    about: &'static str,
    run: fn(&mut Lab) -> Result<()>,
) -> Scenario {
    let kernels = &[Kernel::Distribution, Kernel::Own];
    Scenario { name, about, run, machine: Purpose::Scenarios, kernels, by_name: false }
}

impl Scenario {
    /// On another machine than most, and so by name only: a run has one machine.
    const fn on(self, machine: Purpose) -> Self {
        Self { machine, by_name: true, ..self }
    }

    /// It is run for itself.
    const fn by_name(self) -> Self {
        Self { by_name: true, ..self }
    }

    /// It boots the lab anew, with the distribution's initial programs, and so by name only.
    const fn with_boots(self) -> Self {
        Self { kernels: &[Kernel::Distribution], by_name: true, ..self }
    }

    /// It shows what only the lab's own kernel can do.
    const fn on_own_kernel(self) -> Self {
        Self { kernels: &[Kernel::Own], ..self }
    }
}

const SCENARIOS: &[Scenario] = &[
    scenario(
        "selftest",
        "the lab itself: devices, groups, VFIO and a guest, by bare sysfs writes",
        selftest::run,
    ),
    scenario("bus", "busctl attaches GPU and VF, a guest uses them, release restores", attach::bus),
    scenario("command-line", "the same with vfioctl", attach::command_line),
    scenario(
        "restore",
        "no driver, an own override, an adopted device: all come back",
        attach::restore,
    ),
    scenario("leased", "a second tenant is refused, naming the lease", attach::leased),
    scenario("autoprobe", "a VF that a host driver took by itself", attach::autoprobe),
    scenario("shared-group", "a group with a disk of the host", refusals::shared_group),
    scenario(
        "protected",
        "what the host cannot live without, and what somebody holds",
        refusals::protected,
    ),
    scenario("unprivileged", "who may look and who may change", refusals::unprivileged),
    scenario("pools", "who may lease from which pool of the policy", pools::run).by_name(),
    scenario("bad-input", "every wrong input has its answer", refusals::bad_input),
    scenario("restart", "the daemon restarts while a guest has its devices", life::restart),
    scenario("host", "what journal, systemd and the readiness check see", life::host),
    scenario("hotplug", "devices go and come, leased and not", life::hotplug),
    scenario("virtual-functions", "made, leased and taken away", virtual_functions::number),
    scenario("shape", "a tenant's own address and VLAN, for its time", virtual_functions::shape),
    scenario(
        "unloaded",
        "a card's driver goes while its virtual functions are leased",
        virtual_functions::unloaded,
    ),
    scenario("leak", "what a tenant leaves in device memory, and its cure", leak::run),
    scenario("disk-leak", "what a tenant leaves on a disk, and its cure", scrub::disk),
    scenario("scrub-program", "the administrator's own program, in its sandbox", scrub::program),
    scenario("resets", "what devices have forgotten after a lease", scrub::resets),
    scenario("owners", "leases end with their process or connection", survival::owners),
    scenario("drift", "others change what a lease holds", survival::drift),
    scenario("killed", "the daemon is killed in attaching, and beside a guest", survival::killed),
    scenario(
        "uncorrectable",
        "a leased device reports an error that nobody can correct",
        errors::uncorrectable,
    )
    .on_own_kernel(),
    scenario("deadlock", "a kernel that sleeps on a card for ever", survival::deadlock),
    scenario("descriptors", "who may open what is leased, and for how long", descriptors::run),
    scenario("run", "an ordinary user's guest with a GPU, and all that can be killed", run::run),
    scenario("dma", "the example launcher moves data, in its mappings and out of them", dma::run),
    scenario("libvirt", "domains started, destroyed, and found again", libvirt::cycles),
    scenario("libvirt-refused", "domains that may not have what they want", libvirt::refusals),
    scenario("libvirt-managed", "devices libvirt manages, and hooks of others", libvirt::managed),
    scenario("conformance", "the simulated kernel's cases, on a real one", conformance::run),
    scenario(
        "device-nodes",
        "a guest through IOMMUFD, found by its devices' nodes",
        device_nodes::run,
    )
    .on_own_kernel(),
    scenario("mediated", "a part of a device, made for a lease and gone with it", mediated::run)
        .on_own_kernel(),
    scenario("boot-policy", "the policy through cold boots, a broken one among them", boot::policy)
        .with_boots(),
    scenario(
        "boot-trouble",
        "drivers in the initial file system, like cards, moved cards, a stuck one",
        boot::trouble,
    )
    .with_boots()
    .on(Purpose::Boots),
    scenario("demo", "the product at work, told as a story", demo::run),
    scenario("bench-guests", "what starting guests costs beside libvirt and QEMU", bench::guests)
        .on(Purpose::Benchmarks),
    scenario("many", "508 virtual functions for eight tenants", many::run).on(Purpose::Many),
    scenario("bench", "what it costs beside the kernel and its peers", bench::run)
        .on(Purpose::Benchmarks),
    scenario("bench-attach", "what attaching and releasing cost", bench::attaching)
        .on(Purpose::Benchmarks),
    scenario("bench-sanitise", "what a reset and cleared memory cost", bench::sanitising)
        .on(Purpose::Benchmarks),
    scenario("bench-many", "what hundreds of virtual functions cost", bench::hundreds)
        .on(Purpose::Many),
];

/// Every scenario's name, what it shows and what it takes.
pub fn list() -> Vec<ScenarioInfo> {
    let info = |scenario: &Scenario| ScenarioInfo {
        name: scenario.name.to_owned(),
        about: scenario.about.to_owned(),
        machine: scenario.machine,
        kernels: scenario.kernels.to_vec(),
        by_name: scenario.by_name,
    };
    SCENARIOS.iter().map(info).collect()
}

pub(super) fn find(name: &str) -> Option<&'static Scenario> {
    SCENARIOS.iter().find(|scenario| scenario.name == name)
}
