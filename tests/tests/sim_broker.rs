//! The daemon's broker against a simulated kernel: leases through faults, restarts and unplugging.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use libvfio::address::PciAddress;
use libvfio::client::Failure;
use libvfio::error::ErrorKind;
use libvfio::inventory::Inventory;
use libvfio::pci::Binding;
use nix::errno::Errno;
use vfiod::broker::{Asker, Broker};
use vfiod::lease::{Lease, State};
use vfiod::request::ReleaseOptions;
use vfiod_tests::sim::{Described, Effect, Fault, Operation, Sim, WORKSTATION};
use vfiod_tests::trial::{self, Setting, eventually};

/// The GPU of the workstation and its audio function.
const GPU: &str = "0000:01:00.0";
const AUDIO: &str = "0000:01:00.1";

fn at(address: &str) -> PciAddress {
    address.parse().unwrap()
}

/// A host whose `vfio-pci` is loaded, a place for leases, and the first daemon on it.
fn start() -> (Sim, tempfile::TempDir, Arc<Broker>) {
    let sim = Sim::mount(&Described::parse(WORKSTATION).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let broker = daemon(&sim, dir.path());
    (sim, dir, broker)
}

/// A daemon that has just started on a host where others may have run before.
fn daemon(sim: &Sim, leases: &Path) -> Arc<Broker> {
    setting(sim, leases).start().unwrap()
}

fn setting(sim: &Sim, leases: &Path) -> Setting {
    Setting::new(env!("CARGO_BIN_EXE_trial"), sim.root(), leases)
}

fn attach(broker: &Arc<Broker>, device: &str) -> Result<Lease, Failure> {
    trial::attach(broker, device, "alice")
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
            assert!(setting(&sim, dir.path()).ledger().unwrap().load().unwrap().leases.is_empty());
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
            let ledger = setting(&sim, dir.path()).ledger().unwrap();
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

/// Why a lease failed, once it has.
fn failed(broker: &Broker, lease: &Lease) -> String {
    let now = || broker.lease(&lease.id).unwrap();
    assert!(eventually(|| now().state == State::Failed), "{:?}", now());
    now().reason.unwrap()
}

#[test]
fn unplugging_a_leased_device_fails_its_lease_and_nothing_is_inherited() {
    let (sim, _dir, broker) = start();
    let lease = attach(&broker, GPU).unwrap();
    for address in [GPU, AUDIO] {
        sim.unplug(at(address)).unwrap();
    }
    broker.notice([at(GPU), at(AUDIO)]);
    let failed = failed(&broker, &lease);
    assert!(failed.contains("was unplugged"), "{failed}");
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
    let failed = failed(&broker, &lease);
    assert!(failed.contains("by somebody else"), "{failed}");
    let gpu = &bindings(&sim)[&at(GPU)];
    assert_eq!(gpu.driver_override, None, "what was left was not given back");
}

#[test]
fn an_override_changed_behind_our_back_fails_the_lease() {
    let (sim, _dir, broker) = start();
    let lease = attach(&broker, GPU).unwrap();
    std::fs::write(sim.function(at(GPU)).join("driver_override"), "pci-stub").unwrap();
    broker.look_at_overrides();
    let failed = failed(&broker, &lease);
    assert!(failed.contains("from vfio-pci to pci-stub"), "{failed}");
}

#[test]
fn a_held_device_is_waited_for_and_goes_back_by_itself() {
    let (sim, _dir, broker) = start();
    let before = bindings(&sim);
    let lease = attach(&broker, GPU).unwrap();
    let group = broker.device(at(GPU)).unwrap().iommu_group.unwrap();
    let guest = std::fs::File::open(sim.root().join(format!("dev/vfio/{group}"))).unwrap();
    let refused = broker.release(&lease.id, &ReleaseOptions::default()).unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::Busy), "{refused}");
    assert!(refused.to_string().contains(&std::process::id().to_string()), "{refused}");
    let waiting = broker.lease(&lease.id).unwrap();
    assert_eq!(waiting.state, State::Releasing);
    assert!(attach(&broker, GPU).is_err());
    drop(guest);
    let wait = ReleaseOptions { wait: true, ..ReleaseOptions::default() };
    broker.release(&lease.id, &wait).unwrap();
    assert_eq!(bindings(&sim), before);
}

#[test]
fn a_step_that_does_not_return_wedges_its_lease_alone() {
    let (sim, dir, _) = start();
    let deadlines = vec!["unbind=0.2".to_owned()];
    let setting = Setting { deadlines, ..setting(&sim, &dir.path().join("short")) };
    let broker = setting.start().unwrap();
    let effect = Effect::BlockForever;
    sim.arm(Fault { on: Operation::Unbind, device: Some(at(GPU)), nth: 1, effect });
    let error = attach(&broker, GPU).unwrap_err();
    assert_eq!(error.kind(), Some(ErrorKind::Wedged), "{error}");
    assert!(error.to_string().contains("unbind"), "{error}");
    let again = attach(&broker, GPU).unwrap_err();
    assert_eq!(again.kind(), Some(ErrorKind::Wedged), "{again}");
    let other = attach(&broker, "0000:00:14.0").unwrap();
    broker.release(&other.id, &ReleaseOptions::default()).unwrap();
    // Another daemon finds the old worker at it, and leaves it alone as well.
    let next = setting.start().unwrap();
    let found = next.leases();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].state, State::Wedged);
}

#[test]
fn a_lease_ends_with_its_process() {
    let (sim, _dir, broker) = start();
    let before = bindings(&sim);
    let mut owner = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let options = vfiod::request::AttachOptions { pid: Some(owner.id()), ..Default::default() };
    broker.attach(&[GPU.to_owned()], "alice", &options, Asker::default()).unwrap();
    owner.kill().unwrap();
    assert!(eventually(|| broker.leases().is_empty()));
    owner.wait().unwrap();
    assert_eq!(bindings(&sim), before);
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
