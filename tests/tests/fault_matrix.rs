//! Leases through faults of the kernel at every step of an attachment and of a release.

use anyhow::{Context, Result, ensure};
use libvfio::address::PciAddress;
use libvfio::step::Step;
use nix::errno::Errno;
use std::fmt;
use vfiod_tests::sim::Effect;
use vfiod_tests::survival::{
    self, GPU, Ground, NUMBERED, OTHER_VF, Place, SERIAL, SETTINGS, SHAPED, VF, numbering, places,
};
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
    /// With settings.
    Shape,
    /// Where it was given some.
    ReleaseShaped,
    /// From one number of virtual functions to another.
    Number(u16, u16),
}

const SCENARIOS: [(What, &str); 12] = [
    (What::Attach, GPU[1]),
    (What::LoadAndAttach, GPU[0]),
    (What::Release, GPU[0]),
    (What::Attach, VF),
    (What::Release, OTHER_VF),
    (What::Attach, SERIAL),
    (What::Release, SERIAL),
    (What::Shape, SHAPED),
    (What::ReleaseShaped, SHAPED),
    (What::Number(0, 2), NUMBERED),
    (What::Number(2, 3), NUMBERED),
    (What::Number(2, 0), NUMBERED),
];

impl What {
    fn is_release(self) -> bool {
        matches!(self, Self::Release | Self::ReleaseShaped)
    }

    /// Whether most of it is like what others show.
    fn is_alike(self) -> bool {
        matches!(self, Self::Shape | Self::ReleaseShaped | Self::Number(..))
    }

    /// Brings the host to where it begins.
    fn begin(self, ground: &Ground, device: &str) -> Result<()> {
        match self {
            Self::Release => attached(ground, device, &[]),
            Self::ReleaseShaped => attached(ground, device, &SETTINGS),
            Self::Number(from @ 1.., _) => {
                let done = ground.run(&["number", device, &from.to_string()], 0)?;
                ensure!(done.well, "{}", done.said);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn words(self, device: &str) -> Vec<String> {
        let number;
        let words = match self {
            Self::Release | Self::ReleaseShaped => vec!["release", device],
            Self::Attach | Self::LoadAndAttach => vec!["attach", device, "alice"],
            Self::Shape => ["attach", device, "alice"].into_iter().chain(SETTINGS).collect(),
            Self::Number(_, to) => {
                number = to.to_string();
                vec!["number", device, number.as_str()]
            }
        };
        words.into_iter().map(str::to_owned).collect()
    }
}

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

fn attached(ground: &Ground, device: &str, settings: &[&str]) -> Result<()> {
    let words: Vec<&str> =
        ["attach", device, "alice"].into_iter().chain(settings.iter().copied()).collect();
    let done = ground.run(&words, 0)?;
    ensure!(done.well, "{}", done.said);
    Ok(())
}

fn cases(what: What, device: &'static str) -> Result<Vec<Case>> {
    let places = match what {
        What::Number(from, to) => {
            let device: PciAddress = device.parse()?;
            places(&numbering(device, from, to), Some(device))
        }
        _ => places_of_lease(what, device)?,
    };
    let case = |(place, effect)| Case { what, device, place, effect };
    let both = places.into_iter().flat_map(|p| effects().map(|effect| (p.clone(), effect)));
    Ok(both.filter(|(place, effect)| strikes(place, effect)).map(case).collect())
}

/// Drivers come and go where functions are bound, not where they are counted or given something.
fn strikes(place: &Place, effect: &Effect) -> bool {
    let plain = matches!(
        place.step,
        Step::SetVirtualFunctions { .. } | Step::SetAutoprobe { .. } | Step::Shape { .. }
    );
    !plain || !matches!(effect, Effect::BindOther(_))
}

fn places_of_lease(what: What, device: &str) -> Result<Vec<Place>> {
    let ground = ground(what)?;
    let settings: &[&str] = if what.is_alike() { &SETTINGS } else { &[] };
    attached(&ground, device, settings)?;
    let lease = ground.others()?.pop().context("no lease")?;
    let first = lease.devices.keys().next().copied();
    let forward: Vec<Step> = lease.forward.iter().map(|recorded| recorded.step.clone()).collect();
    Ok(if what.is_release() {
        let back: Vec<Step> = lease.way_back().into_iter().map(|r| r.step).collect();
        places(&back, first)
    } else {
        places(&forward, first)
    })
}

impl Case {
    fn run(&self, ground: &Ground) -> Result<()> {
        self.what.begin(ground, self.device)?;
        let gone: Vec<PciAddress> = match self.effect {
            Effect::Vanish => self.place.device.into_iter().collect(),
            _ => Vec::new(),
        };
        ground.sim.arm(self.place.fault(self.effect.clone()));
        let words = self.what.words(self.device);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        if self.effect == Effect::BlockForever {
            return self.block(ground, &words);
        }
        let done = ground.run(&words, 0)?;
        ensure!(!done.killed, "the broker ended: {}", done.said);
        let leases = ground.check(&gone)?;
        if !done.well {
            self.is_told(&done.said)?;
        } else if matches!(self.what, What::Attach | What::LoadAndAttach | What::Shape) {
            ensure!(!leases.is_empty(), "it is attached without a lease");
        }
        if let (What::Number(from, to), []) = (self.what, gone.as_slice()) {
            let number = ground.number()?;
            let wanted = if done.well { to } else { from };
            ensure!(number == (wanted, wanted == 0), "it is {number:?}: {}", done.said);
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

/// Plays the scenarios that are alike, or all others.
fn play(alike: bool, what_for: &str) {
    let mut all = 0;
    for ((what, device), number) in SCENARIOS.into_iter().zip(0..) {
        if what.is_alike() != alike {
            continue;
        }
        let mut cases = cases(what, device).unwrap();
        if alike {
            cases = survival::few(cases, number);
        }
        survival::each(&cases, || ground(what), |ground, case| case.run(ground));
        all += cases.len();
    }
    survival::count(what_for, all, "cases");
}

#[test]
fn whatever_a_step_meets_no_device_and_no_lease_is_lost() {
    play(false, "fault matrix");
}

#[test]
fn numbers_and_settings_of_virtual_functions_are_as_before_or_as_asked() {
    play(true, "fault matrix of virtual functions");
}
