//! Thousands of leases, one after another, of several devices and tenants, while resets, clearings
//! and bindings fail at random. Then the history alone must tell that nobody was given a device that
//! was another's, not clean or not trusted. `VFIOD_CYCLES` says how many, `VFIOD_RANDOM_SEED`
//! repeats one run.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use libvfio::address::PciAddress;
use libvfio::error::ErrorKind;
use nix::errno::Errno;
use vfiod::broker::Broker;
use vfiod::cleaned::Reset;
use vfiod::history::{Audit, Entry, Event, History};
use vfiod::request::ReleaseOptions;
use vfiod_tests::dice::Dice;
use vfiod_tests::processor;
use vfiod_tests::sim::{Damage, Described, Effect, Fault, Operation, Sim};
use vfiod_tests::survival;
use vfiod_tests::trial::{Setting, attach, settled};

/// Where nobody says another, so that whoever changes something is told of that alone.
const SEED: u64 = 31654;
/// The lab's machine.
const LAB: &str = include_str!("../hosts/lab.toml");
/// Cycles where nobody says how many.
const CYCLES: u64 = 10_000;
/// Cycles that one host sees, so that its history drops none of them.
const SEASON: u64 = 1000;
/// Hosts at once, each on a processor of its own where there are so many.
const HOSTS: usize = 2;
/// Devices that are leased at a time, each with those of its group.
const DEVICES: [&str; 6] = [
    // Reset by its bus with its audio function, and cleared.
    "0000:03:00.0",
    // Reset alone: network cards and a disk controller.
    "0000:01:00.0",
    "0000:02:00.0",
    "0000:81:00.0",
    // By a bus of its own.
    "0000:06:00.0",
    "0000:07:00.0",
];
const TENANTS: [&str; 3] = ["alice", "bob", "carol"];
/// Of so many cycles, one has something go wrong.
const ONE_IN: usize = 6;
/// No device stays ill for so many attempts to heal it.
const ATTEMPTS: usize = 20;

/// Something that goes wrong with a device: at what, and how.
fn fault(dice: &mut Dice, device: PciAddress) -> Fault {
    let spoilt = [Damage::Silent, Damage::OtherIds, Damage::HalfLink, Damage::NoAddresses];
    let effects = [
        Effect::Errno(Errno::EIO),
        Effect::Errno(Errno::EBUSY),
        Effect::SucceedWithoutEffect,
        Effect::KillBefore,
        Effect::KillAfter,
    ];
    let (on, effect) = match dice.roll(8) {
        0..=1 => (Operation::Reset, Effect::Spoil(*dice.pick(&spoilt))),
        2..=3 => (Operation::Reset, dice.pick(&effects).clone()),
        4 => (Operation::Scrub, dice.pick(&effects).clone()),
        5 => (Operation::Unbind, dice.pick(&effects).clone()),
        6 => (Operation::Override, dice.pick(&effects).clone()),
        _ => (Operation::Bind, dice.pick(&effects).clone()),
    };
    let nth = if on == Operation::Reset || on == Operation::Scrub { 1 } else { 1 + dice.roll(2) };
    Fault { on, device: Some(device), nth: u32::try_from(nth).unwrap(), effect }
}

/// Leases a device so many times; how often it ended in quarantine.
fn cycles(sim: &Sim, broker: &Arc<Broker>, device: &str, count: u64, dice: &mut Dice) -> usize {
    let (address, mut ill): (PciAddress, usize) = (device.parse().unwrap(), 0);
    let (mut done, mut refused) = (0, 0);
    while done < count {
        let tenant = *dice.pick(&TENANTS);
        sim.disarm_at(address);
        if dice.roll(ONE_IN) == 0 {
            sim.arm(fault(dice, address));
        }
        match attach(broker, device, tenant) {
            Ok(lease) => {
                done += 1;
                let _ = broker.release(&lease.id, &ReleaseOptions::default());
            }
            // What failed is undone, and no cycle.
            Err(failure) => {
                refused += 1;
                assert!(refused < 9 + count, "{device} is not given to anybody: {failure}");
            }
        }
        if broker.quarantine_of(address).is_some() {
            ill += 1;
            heal(sim, broker, device, dice);
        }
        // A failed lease that holds nothing is dismissed.
        let _ = broker.release(device, &ReleaseOptions::default());
    }
    ill
}

/// Has a device that is not trusted healed, which may fail again. Nobody gets it before that.
fn heal(sim: &Sim, broker: &Arc<Broker>, device: &str, dice: &mut Dice) {
    for _ in 0..ATTEMPTS {
        let refused = attach(broker, device, TENANTS[dice.roll(TENANTS.len())])
            .expect_err("it is not trusted");
        assert_eq!(refused.kind(), Some(ErrorKind::Quarantined), "{device}: {refused}");
        sim.disarm_at(device.parse().unwrap());
        if dice.roll(4) == 0 {
            sim.arm(fault(dice, device.parse().unwrap()));
        }
        if broker.heal(device, 0).is_ok() {
            return;
        }
    }
    panic!("{device} cannot be healed: {:?}", broker.quarantines());
}

/// All devices at once, by two daemons one after the other; how often one ended in quarantine.
fn season(records: &Path, count: u64, seed: u64) -> usize {
    let sim = Sim::mount_lasting(&Described::parse(LAB).unwrap()).unwrap();
    let setting = Setting::new(env!("CARGO_BIN_EXE_trial"), sim.root(), records);
    let mut ill = 0;
    for half in 0..2 {
        let broker = setting.start().unwrap();
        let each = count.div_ceil(2 * DEVICES.len() as u64);
        ill += std::thread::scope(|scope| {
            let play = |(device, number): (&'static str, u64)| {
                let (sim, broker) = (&sim, &broker);
                let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (number << 32) | 1);
                scope.spawn(move || cycles(sim, broker, device, each, &mut dice))
            };
            let plays: Vec<_> = DEVICES.into_iter().zip(half * 16 + 1..).map(play).collect();
            plays.into_iter().map(|play| play.join().expect("a cycle went wrong")).sum::<usize>()
        });
        assert!(settled(&broker) && broker.leases().is_empty(), "{:?}", broker.leases());
    }
    ill
}

fn history(records: &Path) -> (History, Vec<Entry>) {
    let history = History::open(&records.join("state"));
    let entries = history.read(usize::MAX, |_| true).unwrap();
    (history, entries)
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// What somebody writes who wants it to look well.
fn faults_of(doctored: &[Entry]) -> Vec<String> {
    let records = tempfile::tempdir().unwrap();
    let history = History::open(records.path());
    for entry in doctored {
        history.append(entry).unwrap();
    }
    assert_eq!(history.check().unwrap().faults, [""; 0], "the chain is new, and holds");
    let entries = history.read(usize::MAX, |_| true).unwrap();
    Audit::of(&entries).faults().to_vec()
}

/// A season, and what its history tells: how often a device was handed to somebody, and how often one
/// ended in quarantine.
fn audited_season(count: u64, seed: u64) -> (u64, usize) {
    let records = tempfile::TempDir::new_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let ill = season(records.path(), count, seed);
    let (history, entries) = history(records.path());
    let checked = history.check().unwrap();
    assert_eq!((checked.faults, checked.head.first), (Vec::new(), 0));
    let audit = Audit::of(&entries);
    assert_eq!(audit.faults(), [""; 0], "VFIOD_RANDOM_SEED={seed}");
    let quarantined = entries.iter().filter(|entry| entry.event == Event::Quarantined).count();
    assert!(audit.handed() >= count && quarantined > 0, "{}, {quarantined}", audit.handed());
    (audit.handed(), ill)
}

#[test]
fn whatever_fails_nobody_is_given_what_is_not_clean() {
    let cycles = number("VFIOD_CYCLES").unwrap_or(CYCLES);
    let seed = number("VFIOD_RANDOM_SEED").unwrap_or(SEED);
    println!("VFIOD_RANDOM_SEED={seed}");
    let begun = AtomicU64::new(0);
    let play = |host| {
        processor::keep_to(host).expect("no processor is left");
        let next = || Some(begun.fetch_add(1, Ordering::SeqCst)).filter(|n| n * SEASON < cycles);
        let seasons = std::iter::from_fn(next);
        let audited = seasons.map(|n| audited_season(SEASON.min(cycles - n * SEASON), seed + n));
        audited.fold((0, 0), |(handed, ill), (more, worse)| (handed + more, ill + worse))
    };
    let (handed, ill) = std::thread::scope(|scope| {
        let play = &play;
        let hosts: Vec<_> = (0..HOSTS).map(|host| scope.spawn(move || play(host))).collect();
        hosts.into_iter().fold((0, 0), |(handed, ill), host| {
            let (more, worse) = host.join().expect("a season went wrong");
            (handed + more, ill + worse)
        })
    });
    assert!(ill > 0, "nothing went wrong");
    survival::told(&format!(
        "lease cycles: {cycles} with {ill} quarantines passed, by the history of {handed} grants"
    ));
}

#[test]
fn a_history_that_was_made_to_look_well_is_found_out() {
    let records = tempfile::tempdir().unwrap();
    season(records.path(), 120, 7);
    let (_, entries) = history(records.path());
    assert_eq!(faults_of(&entries), [""; 0]);
    let given_later = |at: usize| {
        let device = entries[at].devices[0];
        let later = &entries[at..];
        later.iter().any(|e| e.event == Event::Attached && e.devices.contains(&device))
    };
    let cleared = |at: &usize| entries[*at].event == Event::Cleared && given_later(*at);
    let cleared = (0..entries.len()).find(cleared).expect("something was healed");
    let mut doctored = entries.clone();
    doctored.remove(cleared);
    assert!(faults_of(&doctored)[0].contains("in quarantine"), "a clearing was taken out");
    let released = |at: &usize| entries[*at].event == Event::Released && given_later(*at);
    let released = (0..entries.len()).filter(released).find(|at| !entries[*at].cleaned.is_empty());
    let released = released.expect("something was released");
    let mut doctored = entries.clone();
    doctored[released].cleaned[0].reset = Reset::Failed;
    assert!(faults_of(&doctored)[0].contains("failed"), "a reset was made a failure");
    let mut doctored = entries.clone();
    doctored[released].cleaned.clear();
    assert!(faults_of(&doctored)[0].contains("does not say"), "the cleaning was taken out");
    let mut doctored = entries.clone();
    doctored.remove(released);
    assert!(faults_of(&doctored)[0].contains("has it"), "the end was taken out");
}
