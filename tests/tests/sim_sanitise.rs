//! What a tenant may have left in devices is gone before others get them, or nobody gets them.

use std::path::Path;
use std::sync::Arc;

use libvfio::address::PciAddress;
use libvfio::error::ErrorKind;
use libvfio::step::Step;
use nix::errno::Errno;
use vfiod::broker::{Asker, Broker};
use vfiod::lease::State;
use vfiod::request::{AttachOptions, ReleaseOptions};
use vfiod_tests::sim::{Damage, Described, Effect, Fault, Operation, Sim};
use vfiod_tests::trial::{self, Setting};

/// The lab's machine.
const LAB: &str = include_str!("../hosts/lab.toml");
/// The lab's display, whose memory can be cleared, and its audio function: one bus, reset together.
const GPU: &str = "0000:03:00.0";
const AUDIO: &str = "0000:03:00.1";
/// A card with a function level reset, and a link.
const NIC: &str = "0000:01:00.0";

fn at(address: &str) -> PciAddress {
    address.parse().unwrap()
}

fn host(text: &str) -> Sim {
    Sim::mount(&Described::parse(text).unwrap()).unwrap()
}

fn daemon(sim: &Sim, dir: &Path) -> Arc<Broker> {
    Setting::new(env!("CARGO_BIN_EXE_trial"), sim.root(), dir).start().unwrap()
}

fn release(broker: &Arc<Broker>, target: &str) -> Result<Vec<String>, libvfio::client::Failure> {
    broker.release(target, &ReleaseOptions::default())
}

fn soiled(sim: &Sim) -> String {
    std::fs::read_to_string(sim.root().join("sim/memory")).unwrap()
}

fn arm(sim: &Sim, on: Operation, device: &str, effect: Effect) {
    sim.arm(Fault { on, device: Some(at(device)), nth: 1, effect });
}

/// Writes to files of this name.
fn writes(sim: &Sim, name: &str) -> usize {
    sim.journal().iter().filter(|written| written.path.ends_with(name)).count()
}

#[test]
fn functions_of_one_bus_are_reset_together_and_known_memory_is_cleared() {
    let (sim, dir) = (host(LAB), tempfile::tempdir().unwrap());
    let broker = daemon(&sim, dir.path());
    let lease = trial::attach(&broker, GPU, "alice").unwrap();
    assert_eq!(soiled(&sim), format!("{GPU}\n{AUDIO}\n"));
    release(&broker, &lease.id).unwrap();
    assert_eq!(writes(&sim, "sim/hot-reset"), 1);
    assert_eq!(writes(&sim, "/reset"), 0);
    // An audio function has no memory of its own.
    assert_eq!(soiled(&sim), format!("{AUDIO}\n"));
    assert!(broker.quarantines().is_empty());
}

#[test]
fn what_is_left_out_by_request_is_left_out() {
    let (sim, dir) = (host(LAB), tempfile::tempdir().unwrap());
    let broker = daemon(&sim, dir.path());
    let options = AttachOptions { no_scrub: true, ..AttachOptions::default() };
    broker.attach(&[GPU.to_owned()], "alice", &options, Asker::default()).unwrap();
    broker.release(GPU, &ReleaseOptions { no_reset: true, wait: false }).unwrap();
    assert_eq!(writes(&sim, "sim/hot-reset") + writes(&sim, "sim/memory"), 0);
    assert_eq!(soiled(&sim), format!("{GPU}\n{AUDIO}\n"));
}

#[test]
fn a_function_that_can_be_reset_alone_is() {
    let (sim, dir) = (host(LAB), tempfile::tempdir().unwrap());
    let broker = daemon(&sim, dir.path());
    trial::attach(&broker, NIC, "alice").unwrap();
    release(&broker, NIC).unwrap();
    assert_eq!(writes(&sim, &format!("{NIC}/reset")), 1);
}

/// Every way in which a device may not come back well: nobody gets it, and it is known why.
#[test]
fn a_device_that_does_not_come_back_well_is_handed_to_nobody() {
    let spoilt = |damage| Effect::Spoil(damage);
    let cases = [
        (NIC, Operation::Reset, Effect::Errno(Errno::EIO), "EIO"),
        (NIC, Operation::Reset, spoilt(Damage::Silent), "all ones"),
        (NIC, Operation::Reset, spoilt(Damage::OtherIds), "class"),
        (NIC, Operation::Reset, spoilt(Damage::HalfLink), "link"),
        (NIC, Operation::Reset, spoilt(Damage::NoAddresses), "base addresses"),
        (NIC, Operation::Reset, Effect::KillBefore, "worker"),
        (GPU, Operation::Reset, Effect::Errno(Errno::EIO), "EIO"),
        (GPU, Operation::Reset, spoilt(Damage::Silent), "all ones"),
        (GPU, Operation::Scrub, Effect::Errno(Errno::EIO), "EIO"),
        (GPU, Operation::Scrub, Effect::SucceedWithoutEffect, "zeros"),
        (GPU, Operation::Scrub, Effect::KillAfter, "worker"),
    ];
    for (device, on, effect, word) in cases {
        let case = format!("{device}: {effect:?} at {on:?}");
        let (sim, dir) = (host(LAB), tempfile::tempdir().unwrap());
        let broker = daemon(&sim, dir.path());
        let lease = trial::attach(&broker, device, "alice").unwrap();
        arm(&sim, on, device, effect);
        let failure = release(&broker, &lease.id).expect_err(&case);
        assert!(failure.to_string().contains(word), "{case}: '{word}' is not in: {failure}");
        assert_eq!(broker.lease(&lease.id).unwrap().state, State::Failed, "{case}");
        // No driver of the host gets it either.
        let with = if (device, on) == (GPU, Operation::Reset) { AUDIO } else { device };
        for device in [device, with] {
            let driver = sim.function(at(device)).join("driver").read_link().unwrap();
            assert!(driver.ends_with("vfio-pci"), "{case}");
        }
        for tenant in ["alice", "bob"] {
            let refused = trial::attach(&broker, device, tenant).expect_err(&case);
            assert_eq!(refused.kind(), Some(ErrorKind::Quarantined), "{case}: {refused}");
        }
        drop(broker);
        let broker = daemon(&sim, dir.path());
        let refused = trial::attach(&broker, device, "bob").expect_err(&case);
        assert_eq!(refused.kind(), Some(ErrorKind::Quarantined), "{case}, after a restart");
        // Healing fails as long as it fails, and ends the quarantine when it does not.
        arm(&sim, on, device, Effect::Errno(Errno::EIO));
        broker.heal(device, 0).expect_err(&case);
        let refused = trial::attach(&broker, device, "bob").expect_err(&case);
        assert_eq!(refused.kind(), Some(ErrorKind::Quarantined), "{case}, not healed");
        broker.heal(device, 0).unwrap_or_else(|failure| panic!("{case}: {failure}"));
        assert!(broker.quarantines().is_empty(), "{case}");
        assert_eq!(broker.leases(), [], "{case}");
        trial::attach(&broker, device, "bob").unwrap();
        assert!(broker.heal(device, 0).is_err(), "{case}: somebody has it");
    }
}

#[test]
fn a_lease_that_was_cut_short_while_cleaning_is_cleaned_by_the_next_daemon() {
    let (sim, dir) = (host(LAB), tempfile::tempdir().unwrap());
    let setting = Setting::new(env!("CARGO_BIN_EXE_trial"), sim.root(), dir.path());
    let broker = setting.start().unwrap();
    let lease = trial::attach(&broker, GPU, "alice").unwrap();
    drop(broker);
    // As a daemon leaves it that is killed at its first step back, and one that was not even there.
    let ledger = setting.ledger().unwrap();
    let inventory = libvfio::inventory::Inventory::scan(&sim.host()).unwrap();
    let mut cut = lease.clone();
    cut.state = State::Releasing;
    cut.backward = cut.way_home(&inventory);
    assert!(matches!(cut.backward[0].step, Step::Reset { .. }), "{:?}", cut.backward);
    for backward in [cut.backward.clone(), Vec::new()] {
        ledger.write(&vfiod::lease::Lease { backward, ..cut.clone() }).unwrap();
        let before = writes(&sim, "sim/hot-reset");
        let broker = setting.start().unwrap();
        assert!(trial::settled(&broker));
        assert_eq!(writes(&sim, "sim/hot-reset"), before + 1);
        assert_eq!(soiled(&sim), format!("{AUDIO}\n"));
        for lease in broker.leases() {
            release(&broker, &lease.id).unwrap();
        }
        let again = trial::attach(&broker, GPU, "bob").unwrap();
        cut.id.clone_from(&again.id);
        cut.forward.clone_from(&again.forward);
        drop(broker);
    }
}
