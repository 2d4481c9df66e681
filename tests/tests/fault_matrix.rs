//! Leases through faults of the kernel at every step of an attachment and of a release.

use anyhow::{Context, Result, ensure};
use libvfio::address::PciAddress;
use libvfio::step::Step;
use nix::errno::Errno;
use std::fmt;
use vfiod_tests::sim::Effect;
use vfiod_tests::survival::{
    self, GPU, Ground, NUMBERED, OTHER_VF, Place, SERIAL, SETTINGS, SHAPED, Scrubbed, VF,
    numbering, places,
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

/// What a release meets that clears what a tenant has left.
#[derive(Debug, Clone)]
enum Met {
    Fault(Place, Effect),
    /// What its program does.
    Program(&'static str),
}

struct ScrubCase {
    scrubbed: Scrubbed,
    met: Met,
}

impl fmt::Display for ScrubCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.met {
            Met::Fault(place, effect) => write!(f, "{:?}, {effect:?} at '{place}'", self.scrubbed),
            Met::Program(script) => write!(f, "{:?}, '{script}'", self.scrubbed),
        }
    }
}

/// What programs do that do not clear, and what is said of it.
const PROGRAMS: [(&str, &str); 4] = [
    ("echo no room >&2; exit 3", "failed (status 3): no room"),
    ("kill -KILL $$", "signal: 9"),
    ("sleep 60", "did not end within 3 s"),
    ("exec /nowhere/scrub", "status 127"),
];

impl ScrubCase {
    fn all(scrubbed: Scrubbed) -> Result<Vec<Self>> {
        let mut met = Vec::new();
        for place in scrubbed.places(TRIAL)? {
            let scrubs = matches!(place.step, Step::Scrub { .. });
            // What a program answers for itself is believed, and it is at no step of the kernel's.
            let all = if scrubs && scrubbed == Scrubbed::Program {
                vec![Effect::Errno(Errno::EIO), Effect::Vanish]
            } else {
                effects().to_vec()
            };
            met.extend(all.into_iter().map(|effect| Met::Fault(place.clone(), effect)));
            if scrubs && matches!(scrubbed, Scrubbed::Zeros | Scrubbed::Samples) {
                let left = [Effect::Leave(0, 1 << 16), Effect::Leave(3 << 12, 1 << 12)];
                met.extend(left.map(|effect| Met::Fault(place.clone(), effect)));
            }
        }
        if scrubbed == Scrubbed::Program {
            met.extend(PROGRAMS.map(|(script, _)| Met::Program(script)));
        }
        Ok(met.into_iter().map(|met| Self { scrubbed, met }).collect())
    }

    fn run(&self, ground: &Ground) -> Result<()> {
        self.scrubbed.begin(ground)?;
        let release = ["release", self.scrubbed.device()];
        let (place, effect) = match &self.met {
            Met::Program(script) => {
                Scrubbed::behave(ground, script)?;
                let done = ground.run(&release, 0)?;
                let why = PROGRAMS.iter().find(|(known, _)| known == script).context("unknown")?.1;
                ensure!(!done.well && done.said.contains(why), "'{why}' is not in: {}", done.said);
                ensure!(self.scrubbed.check(ground)?, "it is not kept from others");
                return Ok(());
            }
            Met::Fault(place, effect) => (place, effect),
        };
        ground.sim.arm(place.fault(effect.clone()));
        let (what, device) = (What::Release, self.scrubbed.device());
        let case = Case { what, device, place: place.clone(), effect: effect.clone() };
        if *effect == Effect::BlockForever {
            case.block(ground, &release)?;
            ensure!(!self.scrubbed.check(ground)?, "it was cleaned, and is kept from others");
            return Ok(());
        }
        let done = ground.run(&release, 0)?;
        ensure!(!done.killed, "the broker ended: {}", done.said);
        let cleans = place.step.is_cleaning();
        if !(done.well || cleans && self.scrubbed == Scrubbed::Program) {
            case.is_told(&done.said)?;
        }
        if *effect == Effect::Vanish {
            let gone = place.device.into_iter().collect::<Vec<_>>();
            let recovered = ground.run(&["recover"], 0)?;
            ensure!(recovered.well, "no recovery: {}", recovered.said);
            // What was to be reset with it was not.
            let Some(other) = place.step.others().first() else { return ground.restore(&gone) };
            let refused = ground.run(&["attach", &other.to_string(), "bob"], 0)?;
            ensure!(!refused.well && refused.said.contains("quarantine"), "{}", refused.said);
            return Ok(());
        }
        if matches!(effect, Effect::BindOther(_))
            && !done.well
            && self.scrubbed.is_soiled(ground)?
        {
            // Whoever has taken it has to give it back first.
            ensure!(self.scrubbed.is_kept(ground)?, "it is not kept from others");
            return Ok(());
        }
        let kept = self.scrubbed.check(ground)?;
        // A reset that says it was done is believed, as far as the device is well.
        let fails = cleans
            && (matches!(effect, Effect::Errno(_) | Effect::Leave(..))
                || *effect == Effect::SucceedWithoutEffect && place.step.name() == "scrub");
        ensure!(kept || !fails, "it was not cleaned, and is anybody's: {}", done.said);
        ensure!(!(kept && done.well), "it was cleaned, and is kept from others: {}", done.said);
        Ok(())
    }
}

#[test]
fn whatever_a_scrubber_meets_nobody_gets_what_it_has_not_cleared() {
    let mut all = 0;
    for scrubbed in Scrubbed::ALL {
        let mut cases = ScrubCase::all(scrubbed).unwrap();
        if scrubbed.is_alike() {
            cases = survival::few(cases, all);
        }
        survival::each(&cases, || scrubbed.ground(TRIAL), |ground, case| case.run(ground));
        all += cases.len();
    }
    survival::count("fault matrix of scrubbers", all, "cases");
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
