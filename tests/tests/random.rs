//! Random sequences of what tenants, kernels and killers do, against a model that knows only which
//! tenant has which group. `VFIOD_RANDOM_SEQUENCES` says how many, `VFIOD_RANDOM_SEED` repeats one
//! run; what fails is shrunk and printed with its seed.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use libvfio::address::PciAddress;
use nix::errno::Errno;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};
use vfiod_tests::processor;
use vfiod_tests::sim::{Effect, Fault, Operation};
use vfiod_tests::survival::{self, GPU, Ground, OTHER_VF, VF};

/// Where nobody says another, so that whoever changes something is told of that alone.
const SEED: u64 = 31653;
const TRIAL: &str = env!("CARGO_BIN_EXE_trial");
/// Sequences where nobody says how many.
const SEQUENCES: u32 = 200;
/// Hosts at once, each on a processor of its own where there are so many.
const THREADS: u32 = 2;
/// Most sequences of one seed, on one host: whoever is sooner done with its own has the next.
const BATCH: u32 = 250;
/// The groups, each by a function of it.
const GROUPS: [&str; 3] = [GPU[1], VF, OTHER_VF];
const TENANTS: [&str; 2] = ["alice", "carol"];

/// Something that happens.
#[derive(Debug, Clone)]
enum Event {
    Attach {
        group: usize,
        tenant: usize,
    },
    Release {
        group: usize,
    },
    /// The broker is killed while it is at nothing.
    Kill,
    /// It will be killed at one of its next places.
    KillAt(u32),
    /// The kernel will go wrong.
    Fault {
        on: Operation,
        nth: u32,
        effect: Effect,
    },
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let (group, tenant) = (0..GROUPS.len(), 0..TENANTS.len());
    let on = prop::sample::select(vec![
        Operation::Unbind,
        Operation::Override,
        Operation::Bind,
        Operation::UnbindLock,
        Operation::Open,
    ]);
    let effect = prop_oneof![
        prop::sample::select(vec![
            Errno::EBUSY,
            Errno::ENODEV,
            Errno::EIO,
            Errno::EINVAL,
            Errno::ENOMEM,
        ])
        .prop_map(Effect::Errno),
        Just(Effect::SucceedWithoutEffect),
        Just(Effect::KillBefore),
        Just(Effect::KillAfter),
    ];
    let event = prop_oneof![
        12 => (group.clone(), tenant).prop_map(|(group, tenant)| Event::Attach { group, tenant }),
        8 => group.prop_map(|group| Event::Release { group }),
        // Few, for to start a broker costs more than all else: every third sequence has a kill.
        1 => Just(Event::Kill),
        1 => (1..70u32).prop_map(Event::KillAt),
        2 => (on, 1..4u32, effect).prop_map(|(on, nth, effect)| Event::Fault { on, nth, effect }),
    ];
    prop::collection::vec(event, 1..9)
}

/// A broker that does what it is told.
struct Broker {
    child: Child,
    tell: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Broker {
    fn start(ground: &Ground) -> Result<Self> {
        let mut command = ground.broker();
        command.arg("serve").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        let tell = child.stdin.take().context("no input")?;
        let answers = BufReader::new(child.stdout.take().context("no output")?);
        Ok(Self { child, tell, answers })
    }

    /// What it answers; `None` if it was killed meanwhile.
    fn ask(&mut self, words: &str) -> Result<Option<String>> {
        let mut answer = String::new();
        writeln!(self.tell, "{words}")?;
        self.answers.read_line(&mut answer)?;
        Ok(answer.ends_with('\n').then_some(answer))
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A host, its broker, and what must be so.
struct Play {
    ground: Ground,
    broker: Broker,
    /// The tenant of each group that is leased.
    leased: BTreeMap<usize, usize>,
}

impl Play {
    fn new() -> Result<Self> {
        let ground = Ground::small(TRIAL)?;
        let broker = Broker::start(&ground)?;
        Ok(Self { ground, broker, leased: BTreeMap::new() })
    }

    /// A whole sequence, and back to where it began.
    fn play(&mut self, events: &[Event]) -> Result<()> {
        for event in events {
            self.happen(event).with_context(|| format!("at {event:?}"))?;
        }
        self.ground.sim.disarm();
        self.ask("crash 0")?;
        for group in 0..GROUPS.len() {
            self.happen(&Event::Release { group }).context("at the end")?;
        }
        ensure!(self.leased.is_empty(), "{:?} are left", self.leased);
        Ok(())
    }

    fn happen(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Kill => self.restart()?,
            Event::KillAt(at) => {
                self.ask(&format!("crash {at}"))?;
            }
            Event::Fault { on, nth, effect } => {
                let (on, nth, effect) = (*on, *nth, effect.clone());
                // One at a time: what fails on the way back is tried twice.
                self.ground.sim.disarm();
                self.ground.sim.arm(Fault { on, device: None, nth, effect });
            }
            Event::Attach { group, tenant } => {
                let words = format!("attach {} {}", GROUPS[*group], TENANTS[*tenant]);
                let answer = self.ask(&words)?;
                match (&answer, self.leased.get(group)) {
                    (None, _) => {}
                    (Some(answer), Some(_)) => {
                        ensure!(answer.contains("is leased"), "it was leased already: {answer}");
                    }
                    (Some(answer), None) if answer == "ok\n" => {
                        self.leased.insert(*group, *tenant);
                    }
                    (Some(answer), None) => ensure!(answer.contains("; "), "no remedy: {answer}"),
                }
                self.look(answer.is_none().then_some((*group, Some(*tenant))))?;
            }
            Event::Release { group } => {
                let answer = self.ask(&format!("release {}", GROUPS[*group]))?;
                if let Some(answer) = &answer {
                    ensure!(answer == "ok\n", "not released: {answer}");
                    self.leased.remove(group);
                }
                self.look(answer.is_none().then_some((*group, None)))?;
            }
        }
        Ok(())
    }

    /// Whether all is as the model has it. A group whose broker was killed on the way to a tenant,
    /// or to none, may be as before as well.
    fn look(&mut self, between: Option<(usize, Option<usize>)>) -> Result<()> {
        let mut found = BTreeMap::new();
        for lease in self.ground.check(&[])? {
            let has = |name: &&str| name.parse().is_ok_and(|at: PciAddress| lease.holds(at));
            let group = GROUPS.iter().position(has).context("another's lease")?;
            let tenant = TENANTS.iter().position(|name| **name == lease.tenant);
            found.insert(group, tenant.context("nobody's lease")?);
        }
        if let Some((group, tenant)) = between {
            let now = found.get(&group).copied();
            let before = self.leased.get(&group).copied();
            ensure!(now == tenant || now == before, "{group} was {before:?} and is {now:?}");
            self.leased.remove(&group);
            self.leased.extend(now.map(|tenant| (group, tenant)));
        }
        ensure!(found == self.leased, "{found:?} are leased, {:?} should be", self.leased);
        Ok(())
    }

    fn ask(&mut self, words: &str) -> Result<Option<String>> {
        let answer = self.broker.ask(words)?;
        if answer.is_none() {
            self.restart()?;
        }
        Ok(answer)
    }

    fn restart(&mut self) -> Result<()> {
        self.broker.child.kill()?;
        self.broker.child.wait()?;
        self.broker = Broker::start(&self.ground)?;
        // It answers when it has recovered.
        ensure!(self.broker.ask("recover")?.is_some(), "the next broker ended");
        Ok(())
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Plays sequences of one seed; what failed, if one did.
fn sequences(seed: u64, cases: u32, played: &AtomicU32) -> Result<(), String> {
    let config =
        Config { cases, failure_persistence: None, max_shrink_iters: 60, ..Config::default() };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let kept: RefCell<Option<Play>> = RefCell::new(None);
    let result = TestRunner::new_with_rng(config, random).run(&events(), |events| {
        let fail = |error: anyhow::Error| TestCaseError::fail(format!("{error:#}"));
        // One that has failed is no host for the next.
        let play = kept.take();
        let mut play = play.map_or_else(Play::new, Ok).map_err(fail)?;
        play.play(&events).map_err(fail)?;
        kept.replace(Some(play));
        played.fetch_add(1, Ordering::SeqCst);
        Ok(())
    });
    result.map_err(|error| {
        let repeat = format!("VFIOD_RANDOM_SEED={seed}");
        match error {
            TestError::Fail(why, least) => format!("{repeat}: {why}, at least by {least:#?}"),
            TestError::Abort(why) => format!("{repeat}: {why}"),
        }
    })
}

#[test]
fn random_sequences_agree_with_the_model() {
    let all = number("VFIOD_RANDOM_SEQUENCES").and_then(|n| n.try_into().ok()).unwrap_or(SEQUENCES);
    let seed = number("VFIOD_RANDOM_SEED").unwrap_or(SEED);
    let batch = all.div_ceil(THREADS).clamp(1, BATCH);
    let (begun, played) = (AtomicU32::new(0), AtomicU32::new(0));
    let play = |thread| {
        processor::keep_to(thread).expect("no processor is left");
        let next = || Some(begun.fetch_add(1, Ordering::SeqCst)).filter(|n| n * batch < all);
        let batches = std::iter::from_fn(next);
        let failed = batches.filter_map(|n| sequences(seed + u64::from(n), batch, &played).err());
        failed.collect::<Vec<String>>()
    };
    let failed: Vec<String> = std::thread::scope(|scope| {
        let play = &play;
        let plays = (0..THREADS as usize).map(|thread| scope.spawn(move || play(thread)));
        let plays: Vec<_> = plays.collect();
        plays.into_iter().flat_map(|play| play.join().expect("a panic")).collect()
    });
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    survival::count("random", played.into_inner() as usize, "sequences");
}

/// The kernel's work is done and its word of it lost: with the last step back a lease has ended.
#[test]
fn a_worker_that_ends_after_the_last_step_back_is_no_failure() {
    let mut play = Play::new().unwrap();
    let effect = Effect::KillAfter;
    let events = [
        Event::Attach { group: 1, tenant: 0 },
        Event::Fault { on: Operation::Override, nth: 2, effect },
        Event::Release { group: 1 },
    ];
    play.play(&events).unwrap();
}
