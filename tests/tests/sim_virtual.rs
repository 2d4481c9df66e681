//! Virtual functions against a simulated kernel: their number, who keeps it, and which are free.

use std::sync::Arc;

use libvfio::address::PciAddress;
use libvfio::client::Failure;
use libvfio::error::ErrorKind;
use libvfio::inventory::Inventory;
use libvfio::pci::{Binding, Sriov};
use libvfio::shape::{Setting, Value};
use nix::errno::Errno;
use vfiod::broker::{Asker, Broker};
use vfiod::lease::Lease;
use vfiod::request::{AttachOptions, ReleaseOptions};
use vfiod_tests::sim::{Described, Effect, Fault, Operation, Sim};
use vfiod_tests::trial::{Setting as Trial, eventually};

/// A network card with seven VFs, and another whose VFs are on the same bus.
const HOST: &str = r#"
name = "cards"

[kernel]
release = "6.12.0"
command_line = ""
cpu = "GenuineIntel"
iommus = ["dmar0"]

[[driver]]
name = "pcieport"
classes = ["0604"]

[[driver]]
name = "vfio-pci"
vfio = true

[[driver]]
name = "igb"
ids = ["8086:10c9"]
sriov = true

[[driver]]
name = "igbvf"
ids = ["8086:10ca"]

[[function]]
address = "0000:00:01.0"
id = "8086:1901"
class = 0x060400
express = "root-port"
bus = 1
acs = true

[[function]]
address = "0000:01:00.0"
id = "8086:10c9"
class = 0x020000
express = "endpoint"
acs = true
sriov = { total = 7, offset = 128, stride = 2, device = 0x10ca }

[[function]]
address = "0000:01:00.1"
id = "8086:10c9"
class = 0x020000
express = "endpoint"
acs = true
sriov = { total = 7, offset = 128, stride = 2, device = 0x10ca }
"#;

const PF: &str = "0000:01:00.0";
const TWIN: &str = "0000:01:00.1";

fn at(address: &str) -> PciAddress {
    address.parse().unwrap()
}

fn start() -> (Sim, tempfile::TempDir, Arc<Broker>) {
    let sim = Sim::mount(&Described::parse(HOST).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let broker = setting(&sim, &dir).start().unwrap();
    (sim, dir, broker)
}

fn setting(sim: &Sim, dir: &tempfile::TempDir) -> Trial {
    Trial::new(env!("CARGO_BIN_EXE_trial"), sim.root(), dir.path())
}

/// How many VFs the kernel has, whether new ones are offered, and how each is bound.
fn kernel(sim: &Sim) -> (u16, bool, Vec<Binding>) {
    let inventory = Inventory::scan(&sim.host()).unwrap();
    let Sriov::Physical { enabled, autoprobe, .. } = inventory.get(at(PF)).unwrap().sriov else {
        panic!("no SR-IOV")
    };
    let virtuals = inventory.virtual_functions(at(PF));
    let binding = |(_, vf): &(u16, PciAddress)| inventory.get(*vf).unwrap().binding();
    (enabled, autoprobe, virtuals.iter().map(binding).collect())
}

fn lease(broker: &Arc<Broker>, count: u32) -> Result<Lease, Failure> {
    let vf_of = Some(PF.to_owned());
    let options = AttachOptions { vf_of, count: Some(count), ..AttachOptions::default() };
    broker.attach(&[], "alice", &options, Asker::default())
}

#[test]
fn any_number_becomes_any_other_and_no_host_driver_gets_one() {
    let (sim, _dir, broker) = start();
    for count in [0, 7, 3, 3, 0, 1, 0] {
        let made = broker.set_virtual_functions(at(PF), count, 0).unwrap();
        assert_eq!(made.len(), usize::from(count));
        let none = vec![Binding::default(); usize::from(count)];
        assert_eq!(kernel(&sim), (count, count == 0, none));
        let listed = broker.list_devices(true);
        let virtuals = listed.iter().filter(|d| d.physical_function.as_deref() == Some(PF));
        assert_eq!(virtuals.count(), usize::from(count));
    }
    assert!(broker.leases().is_empty());
}

#[test]
fn autoprobe_is_as_it_was_when_the_last_has_gone() {
    let (sim, dir, broker) = start();
    broker.set_virtual_functions(at(PF), 2, 0).unwrap();
    drop(broker);
    let broker = setting(&sim, &dir).start().unwrap();
    broker.set_virtual_functions(at(PF), 0, 0).unwrap();
    assert_eq!(kernel(&sim), (0, true, Vec::new()), "a restart forgot who turned it off");
    std::fs::write(sim.function(at(PF)).join("sriov_drivers_autoprobe"), "0").unwrap();
    for count in [2, 0] {
        broker.set_virtual_functions(at(PF), count, 0).unwrap();
    }
    assert_eq!(kernel(&sim), (0, false, Vec::new()), "somebody else had turned it off");
}

#[test]
fn a_number_that_cannot_be_is_refused_with_the_reason() {
    let (_sim, _dir, broker) = start();
    let refused = |device: &str, count| {
        let failure = broker.set_virtual_functions(at(device), count, 0).unwrap_err();
        (failure.kind().unwrap(), failure.to_string())
    };
    let (kind, why) = refused(PF, 8);
    assert_eq!(kind, ErrorKind::InvalidArgument);
    assert!(why.contains("ask for 0 to 7"), "{why}");
    let (kind, why) = refused("0000:00:01.0", 1);
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(why.contains("SR-IOV"), "{why}");
    let made = broker.set_virtual_functions(at(PF), 1, 0).unwrap();
    let (kind, why) = refused(&made[0].to_string(), 1);
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(why.contains(PF), "{why}");
}

#[test]
fn a_leased_virtual_function_keeps_all_where_they_are() {
    let (sim, _dir, broker) = start();
    broker.set_virtual_functions(at(PF), 4, 0).unwrap();
    let lease = lease(&broker, 2).unwrap();
    let before = kernel(&sim);
    let refused = broker.set_virtual_functions(at(PF), 0, 0).unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::AlreadyLeased));
    for device in lease.devices.keys() {
        assert!(refused.to_string().contains(&device.to_string()), "{refused}");
    }
    let plan = broker.plan_virtual_functions(at(PF), 5).unwrap();
    assert!(!plan.possible);
    assert_eq!(kernel(&sim), before);
    broker.release(&lease.id, &ReleaseOptions::default()).unwrap();
    broker.set_virtual_functions(at(PF), 0, 0).unwrap();
}

#[test]
fn the_lowest_free_ones_are_chosen_and_all_or_none() {
    let (sim, _dir, broker) = start();
    let made = broker.set_virtual_functions(at(PF), 4, 0).unwrap();
    let first = lease(&broker, 1).unwrap();
    assert_eq!(first.devices.keys().copied().collect::<Vec<_>>(), made[..1]);
    let rest = lease(&broker, 3).unwrap();
    assert_eq!(rest.devices.keys().copied().collect::<Vec<_>>(), made[1..]);
    broker.release(&first.id, &ReleaseOptions::default()).unwrap();
    let before = kernel(&sim);
    let refused = lease(&broker, 2).unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::Busy));
    assert!(refused.to_string().contains("1 virtual functions free of 4"), "{refused}");
    assert_eq!(kernel(&sim), before);
}

#[test]
fn what_fails_half_way_is_as_it_was() {
    for (nth, effect) in [
        (1, Effect::Errno(Errno::ENOMEM)),
        (2, Effect::Errno(Errno::ENOMEM)),
        (2, Effect::SucceedWithoutEffect),
    ] {
        let (sim, _dir, broker) = start();
        broker.set_virtual_functions(at(PF), 2, 0).unwrap();
        let before = kernel(&sim);
        sim.arm(Fault { on: Operation::NumVfs, device: Some(at(PF)), nth, effect });
        let error = broker.set_virtual_functions(at(PF), 5, 0).unwrap_err().to_string();
        assert!(error.contains("virtual functions of 0000:01:00.0"), "{error}");
        assert_eq!(kernel(&sim), before, "{error}");
        assert!(broker.leases().is_empty(), "{:?}", broker.leases());
    }
}

/// What each answer of `sriov_numvfs` (`drivers/pci/iov.c`) means, and what helps.
#[test]
fn each_refusal_of_the_kernel_comes_with_what_helps() {
    let cases: [(Effect, ErrorKind, &[&str]); 4] = [
        // Neither bus numbers nor memory space that the firmware left are told apart by it.
        (
            Effect::Errno(Errno::ENOMEM),
            ErrorKind::Unsupported,
            &["memory space", "bus numbers", "'pci=realloc'", "'pci=assign-busses'"],
        ),
        (Effect::Errno(Errno::ENOENT), ErrorKind::Unsupported, &["cannot make", "lspci -k"]),
        (Effect::Errno(Errno::EBUSY), ErrorKind::Busy, &["journalctl -k"]),
        (Effect::SucceedWithoutEffect, ErrorKind::Unsupported, &["as many as the driver gives"]),
    ];
    for (effect, kind, words) in cases {
        let (sim, _dir, broker) = start();
        let before = kernel(&sim);
        let on = Operation::NumVfs;
        sim.arm(Fault { on, device: Some(at(PF)), nth: 1, effect: effect.clone() });
        let refused = broker.set_virtual_functions(at(PF), 5, 0).unwrap_err();
        assert_eq!(refused.kind(), Some(kind), "{effect:?}: {refused}");
        for word in words {
            assert!(refused.to_string().contains(word), "{effect:?} without {word:?}: {refused}");
        }
        assert_eq!(kernel(&sim), before, "{refused}");
        assert!(broker.leases().is_empty(), "{:?}", broker.leases());
        assert_eq!(broker.set_virtual_functions(at(PF), 5, 0).unwrap().len(), 5);
    }
}

#[test]
fn cards_that_share_a_bus_wait_for_each_other_and_both_get_theirs() {
    let (sim, _dir, broker) = start();
    let twin = broker.clone();
    let other = std::thread::spawn(move || twin.set_virtual_functions(at(TWIN), 3, 0));
    let made = broker.set_virtual_functions(at(PF), 3, 0).unwrap();
    let others = other.join().unwrap().unwrap();
    assert_eq!((made.len(), others.len()), (3, 3));
    let writes = sim.journal();
    let numbers = writes.iter().filter(|write| write.path.ends_with("sriov_numvfs"));
    assert_eq!(numbers.count(), 2);
}

#[test]
fn those_that_others_make_are_picked_up_and_not_ours() {
    let (sim, _dir, broker) = start();
    std::fs::write(sim.function(at(PF)).join("sriov_numvfs"), "2").unwrap();
    broker.resynchronise();
    let listed = broker.list_devices(true);
    let virtuals = listed.iter().filter(|d| d.physical_function.as_deref() == Some(PF));
    assert!(virtuals.clone().count() == 2 && virtuals.clone().all(|d| d.lease.is_none()));
    let lease = lease(&broker, 1).unwrap();
    std::fs::write(sim.function(at(PF)).join("sriov_numvfs"), "0").unwrap();
    broker.resynchronise();
    let failed = || broker.lease(&lease.id).unwrap().reason.unwrap_or_default();
    assert!(
        eventually(|| failed().contains("with the virtual functions of 0000:01:00.0")),
        "{:?}",
        broker.leases()
    );
}

#[test]
fn network_settings_are_for_virtual_functions_with_an_interface_above() {
    let (sim, _dir, broker) = start();
    broker.set_virtual_functions(at(PF), 1, 0).unwrap();
    let before = kernel(&sim);
    let mut options = AttachOptions { vf_of: Some(PF.to_owned()), ..AttachOptions::default() };
    options.shape.set(Setting::Vlan, Value::Number(7)).unwrap();
    let refused = broker.attach(&[], "alice", &options, Asker::default()).unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::Unsupported));
    assert!(refused.to_string().contains("no network interface"), "{refused}");
    assert_eq!(kernel(&sim), before);
}
