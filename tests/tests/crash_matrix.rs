//! Leases through kills: of the broker before and after every write of the ledger and every step,
//! of the worker during every step, of the one that recovers; and the last write lost.

use std::fmt;
use std::fs;

use anyhow::{Context, Result, ensure};
use libvfio::address::PciAddress;
use libvfio::step::Step;
use vfiod_tests::sim::Effect;
use vfiod_tests::survival::{self, DISK, GPU, Ground, OTHER_VF, Place, SERIAL, VF, places};

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
}

const SCENARIOS: [Scenario; 8] = [
    Scenario { device: GPU[0], what: What::Attach },
    Scenario { device: GPU[1], what: What::LoadAndAttach },
    Scenario { device: GPU[0], what: What::Release },
    Scenario { device: VF, what: What::Attach },
    Scenario { device: OTHER_VF, what: What::Release },
    Scenario { device: DISK, what: What::Attach },
    Scenario { device: SERIAL, what: What::Attach },
    Scenario { device: SERIAL, what: What::Release },
];

impl Scenario {
    fn ground(self) -> Result<Ground> {
        let load = self.what == What::LoadAndAttach;
        if load { Ground::unloaded(TRIAL) } else { Ground::new(TRIAL) }
    }

    /// Brings the host to where it begins.
    fn begin(self, ground: &Ground) -> Result<()> {
        if self.what == What::Release {
            let done = ground.run(&["attach", self.device, "alice"], 0)?;
            ensure!(done.well, "{}", done.said);
        }
        Ok(())
    }

    fn words(self) -> Vec<&'static str> {
        match self.what {
            What::Attach | What::LoadAndAttach => vec!["attach", self.device, "alice"],
            What::Release => vec!["release", self.device],
        }
    }

    /// The steps it takes, as the kernel has them.
    fn steps(self) -> Result<Vec<Place>> {
        let ground = self.ground()?;
        self.begin(&ground)?;
        if self.what != What::Release {
            let _refused = ground.run(&self.words(), 0)?;
        }
        let Some(lease) = ground.others()?.pop() else { return Ok(Vec::new()) };
        let first = lease.devices.keys().next().copied();
        let forward: Vec<Step> =
            lease.forward.iter().map(|recorded| recorded.step.clone()).collect();
        if self.what != What::Release {
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
                let done = ground.run(&self.scenario.words(), *at)?;
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
                let done = ground.run(&self.scenario.words(), 0)?;
                ensure!(!done.killed, "the worker took the broker with it");
                let told = done.said.contains("the worker process ended");
                ensure!(done.well || told, "it does not say so: {}", done.said);
                // Without a restart all is well already.
                ground.check(&[])?;
            }
        }
        let recovered = ground.run(&["recover"], 0)?;
        ensure!(recovered.well, "no recovery: {}", recovered.said);
        ground.restore(&[])
    }
}

/// Loses what was written last. The bystander's record is the oldest.
fn lose(ground: &Ground, lost: Lost) -> Result<()> {
    let mut newest = None;
    for entry in fs::read_dir(ground.records().join("leases"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            newest = newest.max(Some((fs::metadata(&path)?.modified()?, path)));
        }
    }
    let (_, path) = newest.context("there are no records")?;
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
    let places = ground.run(&scenario.words(), NEVER)?.places();
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
    ground.run(&scenario.words(), at)?;
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

#[test]
fn whatever_is_killed_no_device_and_no_lease_is_lost() {
    let mut all = 0;
    for scenario in SCENARIOS {
        let cases = cases(scenario).unwrap();
        survival::each(&cases, || scenario.ground(), |ground, case| case.run(ground));
        all += cases.len();
    }
    survival::count("crash matrix", all, "cases");
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
    assert!(vfiod_tests::trial::eventually(at_it), "nobody got there");
    broker.kill().unwrap();
    broker.wait().unwrap();
    let setting = vfiod_tests::trial::Setting::new(TRIAL, ground.sim.root(), ground.records());
    let next = setting.start().unwrap();
    let mine = || next.holder(device).and_then(|id| next.lease(&id));
    assert_eq!(mine().unwrap().state, vfiod::lease::State::Wedged);
    ground.sim.let_go();
    assert!(vfiod_tests::trial::eventually(|| mine().is_none()));
    assert!(vfiod_tests::trial::settled(&next));
    drop(next);
    ground.restore(&[]).unwrap();
}
