//! What the broker keeps beside leases, against a simulated kernel: devices not trusted, what
//! happened, and leases whose newest record is lost.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use libvfio::address::PciAddress;
use libvfio::error::ErrorKind;
use tokio::sync::mpsc::UnboundedReceiver;
use vfiod::broker::{Broker, Change, Property};
use vfiod::history::Event;
use vfiod::lease::{Lease, State};
use vfiod::ledger::Ledger;
use vfiod::request::{AttachOptions, HistoryOptions, ReleaseOptions};
use vfiod_tests::sim::{Described, Effect, Fault, Operation, Sim, WORKSTATION};
use vfiod_tests::trial::{self, Setting, eventually};

/// The GPU of the workstation and its audio function, neither with a serial number.
const GPU: &str = "0000:01:00.0";
const AUDIO: &str = "0000:01:00.1";
/// Its own sound, which cannot be reset.
const SOUND: &str = "0000:00:1f.3";
/// Its network card, with a serial number, and the root port above that.
const NIC: &str = "0000:06:00.0";
const SERIAL: &str = "serial = 0x00e0_4cff_ff68_0001";

fn at(address: &str) -> PciAddress {
    address.parse().unwrap()
}

/// The workstation with parts of its description replaced.
fn host(replaced: &[(&str, &str)]) -> Sim {
    let mut text = WORKSTATION.to_owned();
    for (from, to) in replaced {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    Sim::mount(&Described::parse(&text).unwrap()).unwrap()
}

/// A daemon on a host, with the records that others before it left in `dir`.
fn daemon(sim: &Sim, dir: &Path) -> (Arc<Broker>, UnboundedReceiver<Change>) {
    let setting = Setting::new(env!("CARGO_BIN_EXE_trial"), sim.root(), dir);
    setting.start_and_listen().unwrap()
}

fn attach(broker: &Arc<Broker>, device: &str) -> Result<Lease, libvfio::client::Failure> {
    trial::attach(broker, device, "alice")
}

fn events(broker: &Broker) -> Vec<Event> {
    let entries = broker.history(&HistoryOptions::default()).unwrap();
    entries.into_iter().map(|entry| entry.event).collect()
}

/// Addresses of the devices in quarantine, those that are there.
fn quarantined(broker: &Broker) -> Vec<String> {
    let records = broker.quarantines().into_iter();
    records.filter(|record| record.present).map(|record| record.address).collect()
}

#[test]
fn a_device_in_quarantine_is_refused_until_it_is_cleared() {
    let (sim, dir) = (host(&[]), tempfile::tempdir().unwrap());
    let (broker, mut changes) = daemon(&sim, dir.path());
    broker.quarantine(AUDIO, "it came back with other firmware", 7).unwrap();
    let told = changes.try_recv().unwrap();
    let Change::DeviceChanged(address, what) = told else { panic!("{told:?}") };
    assert_eq!((address, what), (at(AUDIO), vec![Property::Quarantine]));
    // The audio function would come along with the GPU.
    for device in [GPU, AUDIO] {
        let refusal = attach(&broker, device).unwrap_err();
        assert_eq!(refusal.kind(), Some(ErrorKind::Quarantined));
        for words in [AUDIO, "other firmware", "vfioctl quarantine clear 0000:01:00.1"] {
            assert!(refusal.to_string().contains(words), "{words} is not in {refusal}");
        }
    }
    let plan = broker.plan(&[GPU.to_owned()], &AttachOptions::default(), 0).unwrap();
    assert_eq!(plan.reasons[0].code, "quarantined");
    let shown = broker.device(at(AUDIO)).unwrap().quarantine;
    assert_eq!(shown.as_deref(), Some("it came back with other firmware"));
    assert_eq!(broker.list_devices(true).iter().filter(|d| d.quarantine.is_some()).count(), 1);
    let record = broker.quarantines().remove(0);
    assert_eq!((record.address.as_str(), record.by.as_str(), record.present), (AUDIO, "7", true));

    assert!(broker.clear_quarantine("01:00.1", 0).unwrap());
    assert!(!broker.clear_quarantine(AUDIO, 0).unwrap());
    assert!(!broker.clear_quarantine("09:00.0", 0).unwrap());
    assert!(broker.clear_quarantine("no-such-device", 0).is_err());
    attach(&broker, GPU).unwrap();
    assert_eq!(events(&broker), [Event::Quarantined, Event::Cleared, Event::Attached]);
}

#[test]
fn a_lease_goes_on_when_its_device_is_quarantined() {
    let (sim, dir) = (host(&[]), tempfile::tempdir().unwrap());
    let (broker, _changes) = daemon(&sim, dir.path());
    let lease = attach(&broker, GPU).unwrap();
    broker.quarantine_devices([at(GPU), at(AUDIO)], "its configuration drifted");
    broker.quarantine_devices([at(GPU)], "its configuration drifted");
    assert_eq!(broker.quarantines().len(), 2);
    assert_eq!(broker.quarantines()[0].by, "vfiod");
    assert_eq!(broker.lease(&lease.id).unwrap().state, State::Active);
    broker.release(&lease.id, &ReleaseOptions::default()).unwrap();
    assert_eq!(attach(&broker, GPU).unwrap_err().kind(), Some(ErrorKind::Quarantined));
}

#[test]
fn who_was_promised_a_device_before_its_quarantine_is_no_fault_of_the_history() {
    let (sim, dir) = (host(&[]), tempfile::tempdir().unwrap());
    let (broker, _changes) = daemon(&sim, dir.path());
    sim.arm(Fault {
        on: Operation::Bind,
        device: Some(at(GPU)),
        nth: 1,
        effect: Effect::BlockForever,
    });
    let lease = std::thread::scope(|scope| {
        let attached = scope.spawn(|| attach(&broker, GPU));
        assert!(eventually(|| sim.is_blocked()), "it never began");
        broker.quarantine(GPU, "it smells", 7).unwrap();
        sim.let_go();
        attached.join().unwrap().unwrap()
    });
    let entries = broker.history(&HistoryOptions::default()).unwrap();
    let told: Vec<_> = entries.iter().map(|entry| (entry.event, entry.lease.as_ref())).collect();
    let lease = Some(&lease.id);
    assert_eq!(told, [(Event::Quarantined, lease), (Event::Attached, lease)]);
    assert_eq!(broker.check_history().unwrap().faults, [""; 0]);
}

#[test]
fn what_only_one_tenant_may_have_is_no_fault_when_it_has_it_again() {
    let (sim, dir) = (host(&[]), tempfile::tempdir().unwrap());
    let (broker, _changes) = daemon(&sim, dir.path());
    for _ in 0..2 {
        let lease = attach(&broker, SOUND).unwrap();
        broker.release(&lease.id, &ReleaseOptions::default()).unwrap();
        assert_eq!(quarantined(&broker), [SOUND], "it can be reset");
    }
    assert_eq!(broker.check_history().unwrap().faults, [""; 0]);
}

#[test]
fn a_quarantine_survives_a_replug_and_a_restart_of_the_host() {
    let (sim, dir) = (host(&[]), tempfile::tempdir().unwrap());
    let (broker, _changes) = daemon(&sim, dir.path());
    broker.quarantine(GPU, "its reset failed", 0).unwrap();
    sim.unplug(at(GPU)).unwrap();
    broker.notice([at(GPU)]);
    assert_eq!(quarantined(&broker), [""; 0]);
    assert_eq!(broker.quarantines()[0].address, GPU);
    sim.plug(at(GPU)).unwrap();
    broker.notice([at(GPU)]);
    assert_eq!(quarantined(&broker), [GPU]);
    drop((broker, sim));

    // Another bridge has taken bus 1, so the GPU is on bus 9 now.
    let sim = host(&[("0000:01:00.", "0000:09:00."), ("bus = 0x01", "bus = 0x09")]);
    let (broker, _changes) = daemon(&sim, dir.path());
    assert_eq!(quarantined(&broker), ["0000:09:00.0"]);
    assert!(!broker.clear_quarantine(GPU, 0).unwrap());
    assert!(broker.clear_quarantine("09:00.0", 0).unwrap());
}

#[test]
fn another_device_in_its_place_does_not_inherit() {
    let other_serial = (SERIAL, "serial = 0x00e0_4cff_ff68_0002");
    let other_device = ("8086:15f3", "8086:125c");
    for other in [other_serial, other_device] {
        let dir = tempfile::tempdir().unwrap();
        let sim = host(&[]);
        let (broker, _changes) = daemon(&sim, dir.path());
        broker.quarantine(NIC, "its reset failed", 0).unwrap();
        drop((broker, sim));
        let sim = host(&[other]);
        let (broker, _changes) = daemon(&sim, dir.path());
        assert_eq!(quarantined(&broker), [""; 0], "{other:?}");
        drop((broker, sim));
        let sim = host(&[]);
        let (broker, _changes) = daemon(&sim, dir.path());
        assert_eq!(quarantined(&broker), [NIC], "it lost its own");
        drop(broker);
        // Absent, it is cleared by the address it had.
        sim.unplug(at(NIC)).unwrap();
        let (broker, _changes) = daemon(&sim, dir.path());
        assert!(broker.clear_quarantine(NIC, 0).unwrap());
    }
}

#[test]
fn a_device_with_a_serial_number_is_known_in_another_slot() {
    let (sim, dir) = (host(&[]), tempfile::tempdir().unwrap());
    let (broker, _changes) = daemon(&sim, dir.path());
    broker.quarantine(NIC, "its reset failed", 0).unwrap();
    drop((broker, sim));
    let moved = [("0000:00:1c.0", "0000:00:1d.0"), ("0000:06:00.0", "0000:07:00.0")];
    let sim = host(&[moved[0], moved[1], ("bus = 0x06", "bus = 0x07")]);
    let (broker, _changes) = daemon(&sim, dir.path());
    assert_eq!(quarantined(&broker), ["0000:07:00.0"]);
}

#[test]
fn spoilt_files_stop_nobody_and_are_told() {
    let (sim, dir) = (host(&[]), tempfile::tempdir().unwrap());
    let (broker, _changes) = daemon(&sim, dir.path());
    broker.quarantine(GPU, "its reset failed", 0).unwrap();
    drop(broker);
    let spoil = |name: &str| std::fs::write(dir.path().join(name), "{").unwrap();
    spoil("state/quarantine.json");
    spoil("leases/0badcafe.even");
    let (broker, _changes) = daemon(&sim, dir.path());
    assert_eq!(quarantined(&broker), [GPU]);
    assert_eq!(events(&broker), [Event::Quarantined, Event::SetAside, Event::SetAside]);
    drop(broker);
    for name in ["history.jsonl", "quarantine.json", "quarantine.json.copy"] {
        spoil(&format!("state/{name}"));
    }
    let (broker, _changes) = daemon(&sim, dir.path());
    attach(&broker, GPU).unwrap();
    let lost = Event::SetAside;
    assert_eq!(events(&broker), [Event::SetAside, Event::SetAside, lost, Event::Attached]);
}

#[test]
fn a_lease_is_told_of_from_its_beginning_to_its_end() {
    let (sim, dir) = (host(&[]), tempfile::tempdir().unwrap());
    let (broker, _changes) = daemon(&sim, dir.path());
    let first = attach(&broker, GPU).unwrap();
    broker.release(&first.id, &ReleaseOptions::default()).unwrap();
    let second = attach(&broker, GPU).unwrap();
    sim.unplug(at(AUDIO)).unwrap();
    broker.notice([at(AUDIO)]);
    let of = |lease: &Lease| {
        let options = HistoryOptions { lease: Some(lease.id.clone()), ..HistoryOptions::default() };
        broker.history(&options).unwrap()
    };
    let told: Vec<Event> = of(&first).into_iter().map(|entry| entry.event).collect();
    assert_eq!(told, [Event::Attached, Event::Released]);
    assert!(eventually(|| of(&second).last().is_some_and(|end| end.event == Event::Failed)));
    let end = of(&second).pop().unwrap();
    assert!(end.text.contains("was unplugged"), "{}", end.text);
    let options = HistoryOptions { last: 1, device: Some(GPU.into()), ..Default::default() };
    assert_eq!(broker.history(&options).unwrap(), [end]);
}

/// Spoils the newest record of a lease, as a full file system or a power loss may.
fn spoil(dir: &Path, lease: &Lease) {
    let files = ["even", "odd"].map(|kind| dir.join("leases").join(&lease.id).with_extension(kind));
    let read = |path: PathBuf| {
        let whole = std::fs::read(&path).unwrap();
        let record: serde_json::Value = serde_json::from_slice(&whole).unwrap();
        (record["number"].as_u64(), whole, path)
    };
    let (_, whole, path) = files.map(read).into_iter().max().unwrap();
    std::fs::write(path, &whole[..whole.len() / 2]).unwrap();
}

#[test]
fn an_active_lease_whose_newest_record_is_lost_stays() {
    let (sim, dir) = (host(&[]), tempfile::tempdir().unwrap());
    let (broker, _changes) = daemon(&sim, dir.path());
    let lease = attach(&broker, GPU).unwrap();
    drop(broker);
    spoil(dir.path(), &lease);
    let (broker, _changes) = daemon(&sim, dir.path());
    let found = broker.lease(&lease.id).unwrap();
    assert_eq!(found.state, State::Active);
    assert!(events(&broker).contains(&Event::Recovered));
    let loaded = Ledger::open(dir.path().join("leases")).unwrap().load().unwrap();
    assert!(loaded.behind.is_empty() && loaded.leases[0].state == State::Active);
    broker.release(&lease.id, &ReleaseOptions::default()).unwrap();
    assert_eq!(broker.device(at(GPU)).unwrap().driver.as_deref(), Some("nvidia"));
}

#[test]
fn wherever_a_daemon_was_stopped_the_record_before_the_newest_will_do() {
    let dir = tempfile::tempdir().unwrap();
    let sim = host(&[]);
    let (broker, _changes) = daemon(&sim, dir.path());
    let lease = attach(&broker, GPU).unwrap();
    drop(broker);
    let ledger = Ledger::open(dir.path().join("leases")).unwrap();
    let known = |known: usize| {
        let mut lease = Lease { state: State::Preparing, ..lease.clone() };
        lease.forward.iter_mut().skip(known).for_each(|step| step.outcome = None);
        lease
    };
    for newest in 1..lease.forward.len() {
        for happened in [newest, newest + 1] {
            for step in lease.forward.iter().skip(happened).rev() {
                step.step.inverse().map(|step| step.execute(&sim.host()).unwrap());
            }
            ledger.write(&known(newest - 1)).unwrap();
            ledger.write(&known(newest)).unwrap();
            spoil(dir.path(), &lease);
            let (broker, _changes) = daemon(&sim, dir.path());
            let at_end = broker.leases();
            if at_end.is_empty() {
                let gpu = broker.device(at(GPU)).unwrap();
                assert_eq!(
                    gpu.driver.as_deref(),
                    Some("nvidia"),
                    "{newest} known, {happened} done"
                );
                assert_eq!(gpu.driver_override, None);
            } else {
                // All is on VFIO, so a guest may be there.
                assert!(happened + 1 >= lease.forward.len());
                assert_eq!(at_end[0].state, State::Active);
                broker.release(&lease.id, &ReleaseOptions::default()).unwrap();
            }
            for step in &lease.forward {
                step.step.execute(&sim.host()).unwrap();
            }
        }
    }
}
