//! Leases through faults of the kernel at every step of an attachment and of a release.

use anyhow::{Context, Result, ensure};
use libvfio::address::PciAddress;
use libvfio::step::Step;
use nix::errno::Errno;
use std::fmt;
use vfiod_tests::sim::Effect;
use vfiod_tests::survival::{self, GPU, Ground, OTHER_VF, Place, SERIAL, VF, places};
use vfiod_tests::trial::{Setting, eventually, settled};

const TRIAL: &str = env!("CARGO_BIN_EXE_trial");
/// A driver that takes anything, and that no device here is on.
const OTHER_DRIVER: &str = "i915";

/// What is done when something goes wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
enum What {
    Attach,
    LoadAndAttach,
    Release,
}

const SCENARIOS: [(What, &str); 7] = [
    (What::Attach, GPU[1]),
    (What::LoadAndAttach, GPU[0]),
    (What::Release, GPU[0]),
    (What::Attach, VF),
    (What::Release, OTHER_VF),
    (What::Attach, SERIAL),
    (What::Release, SERIAL),
];

fn effects() -> [Effect; 9] {
    [
        Effect::Errno(Errno::EBUSY),
        Effect::Errno(Errno::ENODEV),
        Effect::Errno(Errno::EIO),
        Effect::Errno(Errno::EINVAL),
        Effect::Errno(Errno::ENOMEM),
        Effect::SucceedWithoutEffect,
        Effect::BindOther(OTHER_DRIVER.to_owned()),
        Effect::BlockForever,
        Effect::Vanish,
    ]
}

struct Case {
    what: What,
    device: &'static str,
    place: Place,
    effect: Effect,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, device, place, effect } = self;
        write!(f, "{what:?} {device}, {effect:?} at '{place}'")
    }
}

fn ground(what: What) -> Result<Ground> {
    if what == What::LoadAndAttach { Ground::unloaded(TRIAL) } else { Ground::new(TRIAL) }
}

fn attached(ground: &Ground, device: &str) -> Result<()> {
    let done = ground.run(&["attach", device, "alice"], 0)?;
    ensure!(done.well, "{}", done.said);
    Ok(())
}

fn cases(what: What, device: &'static str) -> Result<Vec<Case>> {
    let ground = ground(what)?;
    attached(&ground, device)?;
    let lease = ground.others()?.pop().context("no lease")?;
    let first = lease.devices.keys().next().copied();
    let forward: Vec<Step> = lease.forward.iter().map(|recorded| recorded.step.clone()).collect();
    let places = if what == What::Release {
        let back: Vec<Step> = lease.way_back().into_iter().map(|r| r.step).collect();
        places(&back, first)
    } else {
        places(&forward, first)
    };
    let case = |(place, effect)| Case { what, device, place, effect };
    let both = places.into_iter().flat_map(|p| effects().map(|effect| (p.clone(), effect)));
    Ok(both.map(case).collect())
}

impl Case {
    fn run(&self, ground: &Ground) -> Result<()> {
        let release = self.what == What::Release;
        if release {
            attached(ground, self.device)?;
        }
        let gone: Vec<PciAddress> = match self.effect {
            Effect::Vanish => self.place.device.into_iter().collect(),
            _ => Vec::new(),
        };
        ground.sim.arm(self.place.fault(self.effect.clone()));
        let words = if release {
            vec!["release", self.device]
        } else {
            vec!["attach", self.device, "alice"]
        };
        if self.effect == Effect::BlockForever {
            return self.block(ground, &words);
        }
        let done = ground.run(&words, 0)?;
        ensure!(!done.killed, "the broker ended: {}", done.said);
        let leases = ground.check(&gone)?;
        if !done.well {
            self.is_told(&done.said)?;
        } else if !release {
            ensure!(!leases.is_empty(), "it is attached without a lease");
        }
        let recovered = ground.run(&["recover"], 0)?;
        ensure!(recovered.well, "no recovery: {}", recovered.said);
        ground.restore(&gone)
    }

    /// The step in words, as far as they are the same each time it is done.
    fn step(&self) -> String {
        match self.place.step {
            Step::CreateMediated { .. } => "create mediated device".to_owned(),
            Step::RemoveMediated { .. } => "remove mediated device".to_owned(),
            ref step => step.to_string(),
        }
    }

    /// What a person must read.
    fn is_told(&self, said: &str) -> Result<()> {
        let errno = match &self.effect {
            Effect::Errno(errno) => format!("{errno:?}"),
            Effect::Vanish | Effect::BindOther(_) => String::new(),
            _ if said.contains("still has users") => "unbind lock".to_owned(),
            _ => "found".to_owned(),
        };
        // Another driver is noticed by the step that it is in the way of.
        let other = matches!(self.effect, Effect::BindOther(_));
        let step = if other { String::new() } else { self.step() };
        let device = self.place.step.device().map(|device| device.to_string()).unwrap_or_default();
        for word in [step, device, errno, "; ".to_owned()] {
            ensure!(said.contains(&word), "'{word}' is not in: {said}");
        }
        Ok(())
    }

    /// A step that does not return: the lease is wedged and nothing else, for as long as it takes.
    fn block(&self, ground: &Ground, words: &[&str]) -> Result<()> {
        let deadline = format!("{}=0.7", self.place.step.name());
        let words: Vec<&str> =
            [deadline.as_str()].into_iter().chain(words.iter().copied()).collect();
        let done = ground.run(&words, 0)?;
        ensure!(!done.well && done.said.contains("is wedged"), "not told: {}", done.said);
        let step = self.step();
        for word in [step.as_str(), "did not", "only a reboot helps"] {
            ensure!(done.said.contains(word), "'{word}' is not in: {}", done.said);
        }
        // Another broker finds the step under way, and has the lease when it returns after all.
        let next = Setting::new(TRIAL, ground.sim.root(), ground.records()).start()?;
        ensure!(ground.sim.is_blocked(), "nobody is at the step any more");
        let wedged = next.leases().iter().any(|l| l.state == vfiod::lease::State::Wedged);
        ensure!(wedged, "the next one does not see it: {:?}", next.leases());
        ground.sim.let_go();
        let loose = || next.leases().iter().all(|l| l.state != vfiod::lease::State::Wedged);
        ensure!(eventually(loose) && settled(&next), "it does not come to rest");
        let ids: Vec<String> = next.leases().into_iter().map(|lease| lease.id).collect();
        drop(next);
        let left = ground.others()?;
        ensure!(left.is_empty(), "{} are left of {ids:?}", left.len());
        ground.restore(&[])
    }
}

#[test]
fn whatever_a_step_meets_no_device_and_no_lease_is_lost() {
    let mut all = 0;
    for (what, device) in SCENARIOS {
        let cases = cases(what, device).unwrap();
        survival::each(&cases, || ground(what), |ground, case| case.run(ground));
        all += cases.len();
    }
    survival::count("fault matrix", all, "cases");
}
