//! The daemon's broker against a simulated kernel: leases through faults, restarts and unplugging.

use std::collections::BTreeMap;
use std::path::Path;

use libvfio::address::PciAddress;
use libvfio::error::ErrorKind;
use libvfio::inventory::Inventory;
use libvfio::pci::Binding;
use nix::errno::Errno;
use tokio::sync::mpsc::unbounded_channel;
use vfiod::broker::Broker;
use vfiod::lease::{Lease, State};
use vfiod::ledger::Ledger;
use vfiod::request::{AttachOptions, ReleaseOptions};
use vfiod_tests::sim::{Described, Effect, Fault, Operation, Sim, WORKSTATION};

/// The GPU of the workstation and its audio function.
const GPU: &str = "0000:01:00.0";
const AUDIO: &str = "0000:01:00.1";

fn at(address: &str) -> PciAddress {
    address.parse().unwrap()
}

/// A host whose `vfio-pci` is loaded, a place for leases, and the first daemon on it.
fn start() -> (Sim, tempfile::TempDir, Broker) {
    let sim = Sim::mount(&Described::parse(WORKSTATION).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let broker = daemon(&sim, dir.path());
    (sim, dir, broker)
}

/// A daemon that has just started on a host where others may have run before.
fn daemon(sim: &Sim, leases: &Path) -> Broker {
    let (tell, _) = unbounded_channel();
    let broker = Broker::open(sim.host(), Ledger::open(leases).unwrap(), tell).unwrap();
    broker.recover();
    broker
}

fn attach(broker: &Broker, device: &str) -> Result<Lease, libvfio::client::Failure> {
    broker.attach(&[device.to_owned()], "alice", &AttachOptions::default(), 0)
}

fn bindings(sim: &Sim) -> BTreeMap<PciAddress, Binding> {
    let inventory = Inventory::scan(&sim.host()).unwrap();
    inventory.functions().map(|f| (f.address, f.binding())).collect()
}

#[test]
fn a_lease_takes_the_device_and_gives_everything_back() {
    let (sim, _dir, broker) = start();
    let before = bindings(&sim);
    let lease = attach(&broker, GPU).unwrap();
    assert_eq!(lease.devices.keys().copied().collect::<Vec<_>>(), [at(GPU), at(AUDIO)]);
    for address in [GPU, AUDIO] {
        let binding = &bindings(&sim)[&at(address)];
        assert_eq!(binding.driver.as_deref(), Some("vfio-pci"));
        assert_eq!(broker.device(at(address)).unwrap().lease.as_ref(), Some(&lease.id));
    }
    let again = attach(&broker, AUDIO).unwrap_err();
    assert_eq!(again.kind(), Some(ErrorKind::AlreadyLeased));
    assert_eq!(broker.release(AUDIO, &ReleaseOptions::default()).unwrap(), [lease.id.as_str()]);
    assert_eq!(broker.release(&lease.id, &ReleaseOptions::default()).unwrap(), [""; 0]);
    assert_eq!(bindings(&sim), before);
    assert!(broker.leases().is_empty());
}

#[test]
fn whichever_step_fails_all_before_it_is_undone_and_the_error_names_it() {
    let faults = [
        (Operation::Unbind, Errno::EBUSY, "unbind"),
        (Operation::Override, Errno::EINVAL, "set driver_override"),
        (Operation::Bind, Errno::ENODEV, "bind"),
        (Operation::Bind, Errno::EIO, "bind"),
    ];
    for device in [GPU, AUDIO] {
        for (on, errno, words) in faults {
            let (sim, dir, broker) = start();
            let before = bindings(&sim);
            let fault =
                Fault { on, device: Some(at(device)), nth: 1, effect: Effect::Errno(errno) };
            sim.arm(fault);
            let error = attach(&broker, GPU).unwrap_err().to_string();
            for word in [words, device, &format!("{errno:?}"), "; see", "was undone"] {
                assert!(error.contains(word), "{word} is not in {error}");
            }
            assert_eq!(bindings(&sim), before, "{error}");
            assert!(broker.leases().is_empty());
            assert!(Ledger::open(dir.path()).unwrap().load().unwrap().0.is_empty());
        }
    }
}

#[test]
fn a_kernel_that_says_yes_and_does_nothing_is_found_out() {
    for on in [Operation::Unbind, Operation::Override, Operation::Bind] {
        let (sim, _dir, broker) = start();
        let before = bindings(&sim);
        let effect = Effect::SucceedWithoutEffect;
        sim.arm(Fault { on, device: Some(at(AUDIO)), nth: 1, effect });
        let error = attach(&broker, GPU).unwrap_err().to_string();
        assert!(error.contains("reported success, but"), "{error}");
        assert_eq!(bindings(&sim), before, "{error}");
    }
}

#[test]
fn a_restarted_daemon_knows_its_leases() {
    let (sim, dir, broker) = start();
    let before = bindings(&sim);
    let lease = attach(&broker, GPU).unwrap();
    drop(broker);
    let broker = daemon(&sim, dir.path());
    assert_eq!(broker.lease(&lease.id).unwrap().state, State::Active);
    broker.release(&lease.id, &ReleaseOptions::default()).unwrap();
    assert_eq!(bindings(&sim), before);
}

#[test]
fn wherever_a_daemon_was_stopped_the_next_undoes_it() {
    // As the ledger has it after each number of steps known to be done.
    for known in 0.. {
        let (sim, dir, broker) = start();
        let before = bindings(&sim);
        let mut lease = attach(&broker, GPU).unwrap();
        drop(broker);
        if known >= lease.forward.len() {
            break;
        }
        // The kernel is back to where that ledger was written, once before the next step and once
        // after it.
        for happened in [known, known + 1] {
            let ledger = Ledger::open(dir.path()).unwrap();
            for step in lease.forward.iter().skip(happened).rev().filter_map(|r| r.step.inverse()) {
                step.execute(&sim.host()).unwrap();
            }
            lease.state = State::Preparing;
            for step in lease.forward.iter_mut().skip(known) {
                step.outcome = None;
            }
            ledger.write(&lease).unwrap();
            let broker = daemon(&sim, dir.path());
            assert!(broker.leases().is_empty(), "{:?}", broker.leases());
            assert_eq!(bindings(&sim), before, "{known} steps known, {happened} done");
            for step in &lease.forward {
                step.step.execute(&sim.host()).unwrap();
            }
        }
    }
}

#[test]
fn unplugging_a_leased_device_fails_its_lease_and_nothing_is_inherited() {
    let (sim, _dir, broker) = start();
    let lease = attach(&broker, GPU).unwrap();
    for address in [GPU, AUDIO] {
        sim.unplug(at(address)).unwrap();
    }
    broker.notice([at(GPU), at(AUDIO)]);
    let failed = broker.lease(&lease.id).unwrap();
    assert_eq!(failed.state, State::Failed);
    assert!(failed.reason.unwrap().contains("was unplugged"));
    for address in [GPU, AUDIO] {
        sim.plug(at(address)).unwrap();
    }
    broker.notice([at(GPU), at(AUDIO)]);
    assert_eq!(broker.device(at(GPU)).unwrap().lease, None);
    attach(&broker, GPU).unwrap();
    broker.release(&lease.id, &ReleaseOptions::default()).unwrap();
    assert_eq!(broker.leases().len(), 1);
}

#[test]
fn a_device_taken_behind_our_back_fails_its_lease() {
    let (sim, _dir, broker) = start();
    let lease = attach(&broker, GPU).unwrap();
    let unbind = sim.root().join("sys/bus/pci/drivers/vfio-pci/unbind");
    std::fs::write(unbind, AUDIO).unwrap();
    broker.notice([at(AUDIO)]);
    let failed = broker.lease(&lease.id).unwrap();
    assert_eq!(failed.state, State::Failed);
    assert!(failed.reason.unwrap().contains("by somebody else"));
    let gpu = &bindings(&sim)[&at(GPU)];
    assert_eq!(gpu.driver_override, None, "what was left was not given back");
}

#[test]
fn who_holds_a_device_on_its_host_driver_keeps_it_there() {
    let place = "/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/resource0";
    let process = format!("[[process]]\npid = 812\ncommand = \"dcgm\"\nopen = [{place:?}]\n");
    let described = Described::parse(&format!("{WORKSTATION}\n{process}")).unwrap();
    let sim = Sim::mount(&described).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let broker = daemon(&sim, dir.path());
    let refused = attach(&broker, GPU).unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::Busy));
    assert!(refused.to_string().contains("dcgm (process 812)"), "{refused}");
    let found = broker.holders(AUDIO).unwrap();
    assert_eq!(found.devices, [GPU, AUDIO]);
    let holders: Vec<_> = found.holders.iter().map(|h| (h.device.as_str(), h.pid)).collect();
    assert_eq!(holders, [(GPU, 812)]);
    assert_eq!(found.holders[0].what, [place]);
    let root = broker.holders("02:00.0").unwrap();
    assert!(root.uses.iter().any(|found| found.protected && found.hinders));
}
