//! Leases through kills: of the broker before and after every write of the ledger and every step,
//! of the worker during every step, of the one that recovers; and the last write lost.

use std::fmt;
use std::fs;

use anyhow::{Context, Result, ensure};
use libvfio::address::PciAddress;
use libvfio::step::Step;
use serde_json::Value;
use vfiod::lease::State;
use vfiod_tests::sim::Effect;
use vfiod_tests::survival::{
    self, DISK, Done, GPU, Ground, NUMBERED, OTHER_VF, Place, SERIAL, SETTINGS, SHAPED, Scrubbed,
    VF, numbering, places,
};
use vfiod_tests::trial::{Setting, eventually, settled};

const TRIAL: &str = env!("CARGO_BIN_EXE_trial");
/// More places than there are.
const NEVER: u32 = u32::MAX;

/// What is done when something is killed.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Scenario {
    /// The device.
    device: &'static str,
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum What {
    /// Attach it.
    Attach,
    /// The same, where `vfio-pci` is to be loaded first.
    LoadAndAttach,
    /// Release it.
    Release,
    /// Release it where something is cleared then.
    ReleaseScrubbed(Scrubbed),
    /// Attach it with settings.
    Shape,
    /// Release it where it was given some.
    ReleaseShaped,
    /// Go from one number of its virtual functions to another.
    Number(u16, u16),
}

const SCENARIOS: [Scenario; 13] = [
    Scenario { device: GPU[0], what: What::Attach },
    Scenario { device: GPU[1], what: What::LoadAndAttach },
    Scenario { device: GPU[0], what: What::Release },
    Scenario { device: VF, what: What::Attach },
    Scenario { device: OTHER_VF, what: What::Release },
    Scenario { device: DISK, what: What::Attach },
    Scenario { device: SERIAL, what: What::Attach },
    Scenario { device: SERIAL, what: What::Release },
    Scenario { device: SHAPED, what: What::Shape },
    Scenario { device: SHAPED, what: What::ReleaseShaped },
    Scenario { device: NUMBERED, what: What::Number(0, 2) },
    Scenario { device: NUMBERED, what: What::Number(2, 3) },
    Scenario { device: NUMBERED, what: What::Number(2, 0) },
];

impl Scenario {
    fn ground(self) -> Result<Ground> {
        match self.what {
            What::LoadAndAttach => Ground::unloaded(TRIAL),
            What::ReleaseScrubbed(scrubbed) => scrubbed.ground(TRIAL),
            _ => Ground::new(TRIAL),
        }
    }

    /// Brings the host to where it begins.
    fn begin(self, ground: &Ground) -> Result<()> {
        let before = match self.what {
            What::Release => What::Attach,
            What::ReleaseScrubbed(scrubbed) => return scrubbed.begin(ground),
            What::ReleaseShaped => What::Shape,
            What::Number(from @ 1.., _) => What::Number(0, from),
            _ => return Ok(()),
        };
        let done = Self { what: before, ..self }.run(ground, 0)?;
        ensure!(done.well, "{}", done.said);
        Ok(())
    }

    fn is_release(self) -> bool {
        matches!(self.what, What::Release | What::ReleaseScrubbed(_) | What::ReleaseShaped)
    }

    /// Whether most of it is like what others show.
    fn is_alike(self) -> bool {
        matches!(self.what, What::Shape | What::ReleaseShaped | What::Number(..))
    }

    /// Does it with a broker that is killed at its `crash`th place.
    fn run(self, ground: &Ground, crash: u32) -> Result<Done> {
        let attach = ["attach", self.device, "alice"];
        match self.what {
            What::Attach | What::LoadAndAttach => ground.run(&attach, crash),
            What::Shape => {
                let words: Vec<&str> = attach.into_iter().chain(SETTINGS).collect();
                ground.run(&words, crash)
            }
            What::Release | What::ReleaseScrubbed(_) | What::ReleaseShaped => {
                ground.run(&["release", self.device], crash)
            }
            What::Number(_, to) => ground.run(&["number", self.device, &to.to_string()], crash),
        }
    }

    /// The steps it takes, as the kernel has them.
    fn steps(self) -> Result<Vec<Place>> {
        if let What::ReleaseScrubbed(scrubbed) = self.what {
            let mut places = scrubbed.places(TRIAL)?;
            // A program is not the worker.
            let program = scrubbed == Scrubbed::Program;
            places.retain(|place| !(program && matches!(place.step, Step::Scrub { .. })));
            return Ok(places);
        }
        if let What::Number(from, to) = self.what {
            let device: PciAddress = self.device.parse()?;
            return Ok(places(&numbering(device, from, to), Some(device)));
        }
        let ground = self.ground()?;
        self.begin(&ground)?;
        if !self.is_release() {
            let _refused = self.run(&ground, 0)?;
        }
        let Some(lease) = ground.others()?.pop() else { return Ok(Vec::new()) };
        let first = lease.devices.keys().next().copied();
        let forward: Vec<Step> =
            lease.forward.iter().map(|recorded| recorded.step.clone()).collect();
        if !self.is_release() {
            return Ok(places(&forward, first));
        }
        // Whether somebody holds the group is asked as at the end of an attachment.
        let asks = |step: &&Step| matches!(step, Step::CheckViable { .. });
        let asked = forward.iter().filter(asks).cloned();
        let back: Vec<Step> = asked.chain(lease.way_back().into_iter().map(|r| r.step)).collect();
        Ok(places(&back, first))
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.what, self.device)
    }
}

/// What a power loss leaves of a record.
#[derive(Debug, Clone, Copy)]
enum Lost {
    Bytes,
    HalfTheBytes,
    File,
}

#[derive(Debug)]
enum Kill {
    /// The broker, at one of its places; then, it may be, what was written last is lost, or the
    /// next broker is killed as well.
    Broker { at: u32, place: String, lost: Option<Lost>, again: u32 },
    /// The worker, at a step.
    Worker { place: Box<Place>, effect: Effect },
}

struct Case {
    scenario: Scenario,
    kill: Kill,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kill {
            Kill::Broker { at, place, lost, again } => {
                write!(f, "{}, at {at} ({place}), lost {lost:?}, then at {again}", self.scenario)
            }
            Kill::Worker { place, effect } => {
                write!(f, "{}, {effect:?} the worker at '{place}'", self.scenario)
            }
        }
    }
}

impl Case {
    fn run(&self, ground: &Ground) -> Result<()> {
        self.scenario.begin(ground)?;
        match &self.kill {
            Kill::Broker { at, lost, again, .. } => {
                let done = self.scenario.run(ground, *at)?;
                ensure!(done.killed, "it was not killed: {}", done.said);
                if let Some(lost) = lost {
                    lose(ground, *lost)?;
                }
                if *again > 0 {
                    ground.run(&["recover"], *again)?;
                }
            }
            Kill::Worker { place, effect } => {
                ground.sim.arm(place.fault(effect.clone()));
                let done = self.scenario.run(ground, 0)?;
                ensure!(!done.killed, "the worker took the broker with it");
                let told = done.said.contains("the worker process ended");
                ensure!(done.well || told, "it does not say so: {}", done.said);
                // Without a restart all is well already.
                if !matches!(self.scenario.what, What::ReleaseScrubbed(_)) {
                    ground.check(&[])?;
                }
            }
        }
        let recovered = ground.run(&["recover"], 0)?;
        ensure!(recovered.well, "no recovery: {}", recovered.said);
        if let What::Number(from, to) = self.scenario.what {
            let number = ground.number()?;
            ensure!([from, to].map(|n| (n, n == 0)).contains(&number), "it is {number:?}");
        }
        if let What::ReleaseScrubbed(scrubbed) = self.scenario.what {
            if ground.others()?.iter().any(|lease| lease.state == State::Active) {
                // It had not begun.
                let done = self.scenario.run(ground, 0)?;
                ensure!(done.well, "it cannot be released: {}", done.said);
            }
            // It is not known how far a worker got that was killed while it cleaned.
            let may_be_kept = matches!(self.kill, Kill::Worker { .. });
            ensure!(!scrubbed.check(ground)? || may_be_kept, "it is clean, and kept from others");
            return Ok(());
        }
        ground.restore(&[])
    }
}

/// Loses what was written last. The bystander's record is the oldest.
fn lose(ground: &Ground, lost: Lost) -> Result<()> {
    let mut newest = None;
    for entry in fs::read_dir(ground.records().join("leases"))? {
        let path = entry?.path();
        let number = |record: Value| record["number"].as_u64();
        let number = serde_json::from_slice(&fs::read(&path)?).ok().and_then(number);
        newest = newest.max(Some((fs::metadata(&path)?.modified()?, number, path)));
    }
    let (.., path) = newest.context("there are no records")?;
    match lost {
        Lost::Bytes => fs::write(path, "")?,
        Lost::HalfTheBytes => {
            let bytes = fs::read(&path)?;
            fs::write(path, &bytes[..bytes.len() / 2])?;
        }
        Lost::File => fs::remove_file(path)?,
    }
    Ok(())
}

/// The places at which a power loss differs: a record was just written, a step is or was about to
/// be done since.
const DIFFERS: [&str; 3] = ["after a record was written", "before a step", "after a step"];

fn kills_of_broker(scenario: Scenario) -> Result<Vec<Kill>> {
    let ground = scenario.ground()?;
    scenario.begin(&ground)?;
    let places = scenario.run(&ground, NEVER)?.places();
    let mut kills = Vec::new();
    let mut written = 0;
    for (place, at) in places.into_iter().zip(1..) {
        let kill = |lost| Kill::Broker { at, place: place.clone(), lost, again: 0 };
        kills.push(kill(None));
        written += u32::from(place == DIFFERS[0]);
        if written > 0 && DIFFERS.contains(&place.as_str()) {
            kills
                .extend([Lost::Bytes, Lost::HalfTheBytes, Lost::File].map(|lost| kill(Some(lost))));
        }
    }
    Ok(kills)
}

/// Every place of a recovery, after the broker was killed at its `at`th place.
fn kills_of_recovery(scenario: Scenario, at: u32) -> Result<Vec<Kill>> {
    let ground = scenario.ground()?;
    scenario.begin(&ground)?;
    scenario.run(&ground, at)?;
    let places = ground.run(&["recover"], NEVER)?.places();
    let kill = |(place, again)| Kill::Broker { at, place, lost: None, again };
    Ok(places.into_iter().zip(1..).map(kill).collect())
}

fn cases(scenario: Scenario) -> Result<Vec<Case>> {
    let mut kills = kills_of_broker(scenario)?;
    if scenario.device == GPU[0] {
        let places = u32::try_from(kills.len())?;
        let last = kills.iter().filter_map(|kill| match kill {
            Kill::Broker { at, .. } => Some(*at),
            Kill::Worker { .. } => None,
        });
        let last = last.max().unwrap_or(places);
        for at in [last / 2, last - 2] {
            kills.extend(kills_of_recovery(scenario, at)?);
        }
    }
    for place in scenario.steps()? {
        for effect in [Effect::KillBefore, Effect::KillAfter] {
            kills.push(Kill::Worker { place: Box::new(place.clone()), effect });
        }
    }
    Ok(kills.into_iter().map(|kill| Case { scenario, kill }).collect())
}

/// Plays the scenarios that are alike, or all others.
fn play(alike: bool, what_for: &str) {
    let mut all = 0;
    for (scenario, number) in SCENARIOS.into_iter().zip(0..) {
        if scenario.is_alike() != alike {
            continue;
        }
        let mut cases = cases(scenario).unwrap();
        if alike {
            cases = survival::few(cases, number);
        }
        survival::each(&cases, || scenario.ground(), |ground, case| case.run(ground));
        all += cases.len();
    }
    survival::count(what_for, all, "cases");
}

#[test]
fn whatever_is_killed_no_device_and_no_lease_is_lost() {
    play(false, "crash matrix");
}

#[test]
fn numbers_and_settings_of_virtual_functions_are_as_before_or_as_asked() {
    play(true, "crash matrix of virtual functions");
}

#[test]
fn a_release_that_clears_memory_ends_clean_wherever_something_is_killed() {
    let mut all = 0;
    for (scrubbed, number) in Scrubbed::ALL.into_iter().zip(0..) {
        let scenario =
            Scenario { device: scrubbed.device(), what: What::ReleaseScrubbed(scrubbed) };
        let cases = survival::few(cases(scenario).unwrap(), number);
        survival::each(&cases, || scenario.ground(), |ground, case| case.run(ground));
        all += cases.len();
    }
    survival::count("crash matrix of scrubbers", all, "cases");
}

#[test]
fn a_step_that_outlives_its_broker_is_waited_for() {
    let ground = Ground::new(TRIAL).unwrap();
    let device: PciAddress = GPU[0].parse().unwrap();
    let unbind = Step::Unbind { device, driver: "nvidia".into() };
    let place = places(&[unbind], Some(device)).remove(0);
    ground.sim.arm(place.fault(Effect::BlockForever));
    let mut broker = ground.broker().args(["attach", GPU[0], "alice"]).spawn().unwrap();
    let at_it = || ground.sim.is_blocked();
    assert!(eventually(at_it), "nobody got there");
    broker.kill().unwrap();
    broker.wait().unwrap();
    let setting = Setting::new(TRIAL, ground.sim.root(), ground.records());
    let next = setting.start().unwrap();
    let mine = || next.holder(device).and_then(|id| next.lease(&id));
    assert_eq!(mine().unwrap().state, State::Wedged);
    ground.sim.let_go();
    assert!(eventually(|| mine().is_none()));
    assert!(settled(&next));
    drop(next);
    ground.restore(&[]).unwrap();
}
