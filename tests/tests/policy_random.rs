//! Random policies on simulated hosts, one after another on each: what is planned is what is done, step
//! for step; all is as wanted then; and applying again changes nothing. `VFIOD_RANDOM_POLICIES` says
//! how many, `VFIOD_RANDOM_SEED` repeats one run.

use std::fmt::Write;
use std::path::Path;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use tempfile::TempDir;
use vfiod::request::ApplyOptions;
use vfiod_tests::processor;
use vfiod_tests::sim::{Described, Sim};
use vfiod_tests::survival;
use vfiod_tests::trial::{Setting, say_policy};

/// Where nobody says another, so that whoever changes something is told of that alone.
const SEED: u32 = 10028;
const LAB: &str = include_str!("../hosts/lab.toml");
/// Policies where nobody says how many.
const POLICIES: u32 = 1000;
/// Hosts that play them side by side.
const HOSTS: u32 = 4;

/// What can be in a pool: a selector, and whether it has virtual functions.
const SUBJECTS: [(&str, bool); 7] = [
    ("{ vendor = '1234', device = '1111' }", false),
    ("{ address = '0000:01:00.0' }", true),
    ("{ address = '0000:81:00.0' }", true),
    ("{ path = '0000:00/07.0/00.0/00.0' }", false),
    ("{ address = '0000:07:00.0' }", false),
    ("{ class = 'nvme', path = '0000:00/05.0' }", false),
    ("{ vendor = '1234', device = '11e8' }", false),
];

#[derive(Debug, Clone)]
struct Wanted {
    mode: &'static str,
    vfs: Option<u16>,
    d3cold: Option<bool>,
    reset: bool,
    keep: bool,
}

fn wanted() -> impl Strategy<Value = Option<Wanted>> {
    let mode = prop::sample::select(vec!["host", "passthrough", "on-lease"]);
    let vfs = prop::option::of(1..5u16);
    let one = (mode, vfs, prop::option::of(any::<bool>()), any::<bool>(), any::<bool>())
        .prop_map(|(mode, vfs, d3cold, reset, keep)| Wanted { mode, vfs, d3cold, reset, keep });
    prop::option::weighted(0.8, one)
}

/// The text of a policy in which each subject is for something, or nothing.
fn text(policy: &[Option<Wanted>]) -> String {
    let mut text = String::new();
    for (n, (wanted, (selector, virtuals))) in policy.iter().zip(SUBJECTS).enumerate() {
        let Some(Wanted { mode, vfs, d3cold, reset, keep }) = wanted else { continue };
        let _ = writeln!(text, "[pool.p{n}]\nmode = '{mode}'\nselect = [{selector}]");
        if let Some(vfs) = vfs.filter(|_| virtuals && *mode != "host") {
            let _ = writeln!(text, "vfs = {vfs}");
        }
        if let Some(d3cold) = d3cold {
            let _ = writeln!(text, "d3cold = {d3cold}");
        }
        if *reset {
            let _ = writeln!(text, "reset-order = ['bus', 'flr']");
        }
        if *keep && *mode == "passthrough" {
            let _ = writeln!(text, "keep-for-host = 1");
        }
    }
    text
}

fn number(name: &str) -> Option<u32> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn plan_equals_apply_and_apply_twice_changes_nothing() {
    let seed = number("VFIOD_RANDOM_SEED").unwrap_or(SEED);
    println!("VFIOD_RANDOM_SEED={seed}");
    let policies = number("VFIOD_RANDOM_POLICIES").unwrap_or(POLICIES);
    let steps: usize = std::thread::scope(|scope| {
        // A host waits for itself half of the time.
        let hosts = (0..HOSTS).map(|host| {
            let share = policies / HOSTS + u32::from(host < policies % HOSTS);
            scope.spawn(move || play(seed, host, share))
        });
        let hosts: Vec<_> = hosts.collect();
        hosts.into_iter().map(|host| host.join().unwrap()).sum()
    });
    assert!(steps > 0, "no policy had anything to do");
    survival::count("random policies", policies as usize, "policies");
}

/// Plays a share of the policies on a host of its own; how many steps they took.
fn play(seed: u32, host: u32, policies: u32) -> usize {
    processor::keep_to(host as usize).unwrap();
    let sim = Sim::mount_lasting(&Described::parse(LAB).unwrap()).unwrap();
    // As the real ones are, in memory.
    let memory = Path::new("/dev/shm");
    let records = if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() }.unwrap();
    let broker = Setting::new(env!("CARGO_BIN_EXE_trial"), sim.root(), records.path());
    let broker = broker.start().unwrap();
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&seed.to_le_bytes());
    bytes[4..8].copy_from_slice(&host.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let mut steps = 0;
    for _ in 0..policies {
        let policy = prop::collection::vec(wanted(), SUBJECTS.len());
        let policy = text(&policy.new_tree(&mut runner).unwrap().current());
        say_policy(records.path(), &policy).unwrap();
        let plan = broker.reload_policy().unwrap();
        let apply = || broker.apply_policy(&ApplyOptions::default(), 0).unwrap();
        let applied = apply();
        let told = |record: &libvfio::client::PolicyRecord| -> Vec<(String, String, String)> {
            let units = record.units.iter().filter(|unit| unit.reasons.is_empty());
            let each = units.flat_map(|unit| unit.steps.iter().map(move |step| (unit, step)));
            each.map(|(u, s)| (u.pool.clone(), u.device.clone(), s.text.clone())).collect()
        };
        let units = &applied.units;
        assert_eq!(told(&plan), told(&applied), "seed {seed}, {units:#?}, policy:\n{policy}");
        steps += told(&applied).len();
        for unit in &applied.units {
            // A policy before this one may have given it virtual functions.
            let hindered = unit.reasons.iter().any(|reason| reason.code == "virtual-functions");
            let well = unit.is_as_wanted() || hindered;
            assert!(well, "seed {seed}: {unit:#?}\npolicy:\n{policy}");
        }
        let writes = sim.journal().len();
        let again = apply();
        let left: Vec<_> = again
            .units
            .iter()
            .filter(|unit| unit.reasons.is_empty() && !unit.steps.is_empty())
            .collect();
        assert!(left.is_empty(), "seed {seed}: {left:#?}\npolicy:\n{policy}");
        assert_eq!(sim.journal().len(), writes, "seed {seed}: applying again wrote something");
        assert!(broker.leases().is_empty());
    }
    steps
}
