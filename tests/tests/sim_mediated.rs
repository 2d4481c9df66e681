//! Mediated devices against a simulated kernel: made for leases, taken away with them, and never
//! more than there is room for.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use libvfio::acl;
use libvfio::client::Failure;
use libvfio::error::ErrorKind;
use libvfio::mediated::{self, Device, Uuid};
use libvfio::shape;
use libvfio::vfio::Interface;
use nix::errno::Errno;
use vfiod::broker::{Asker, Broker};
use vfiod::lease::{Lease, State};
use vfiod::request::{AttachOptions, ReleaseOptions};
use vfiod_tests::sim::{Described, Effect, Fault, MEDIATED, Operation, Sim};
use vfiod_tests::trial::{Setting, eventually};

const SERIAL: &str = "mtty/mtty-2";
const PARENT: &str = "0000:41:00.4";
const GPU: &str = "41:00.4/nvidia-563";

fn start() -> (Sim, tempfile::TempDir, Arc<Broker>) {
    start_with(false)
}

/// Where the kernel has nodes of single devices or not.
fn start_with(cdev: bool) -> (Sim, tempfile::TempDir, Arc<Broker>) {
    let mut host = Described::parse(MEDIATED).unwrap();
    host.kernel.cdev = cdev;
    let sim = Sim::mount(&host).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let broker = setting(&sim, &dir).start().unwrap();
    (sim, dir, broker)
}

fn setting(sim: &Sim, dir: &tempfile::TempDir) -> Setting {
    Setting::new(env!("CARGO_BIN_EXE_trial"), sim.root(), dir.path())
}

fn attach(broker: &Arc<Broker>, names: &[&str]) -> Result<Lease, Failure> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    broker.attach(&names, "alice", &AttachOptions::default(), Asker::default())
}

fn release(broker: &Arc<Broker>, target: &str) -> Result<Vec<String>, Failure> {
    broker.release(target, &ReleaseOptions::default())
}

/// What the kernel has.
fn kernel(sim: &Sim) -> BTreeMap<Uuid, Device> {
    mediated::devices(&sim.host()).unwrap()
}

fn left(sim: &Sim, parent: &str, kind: &str) -> u32 {
    mediated::types(&sim.host(), parent).unwrap()[kind].available
}

fn remove(sim: &Sim, uuid: Uuid) {
    let device = sim.root().join(format!("sys/bus/mdev/devices/{uuid}"));
    std::fs::write(device.join("remove"), "1").unwrap();
}

#[test]
fn they_are_there_for_the_time_of_the_lease() {
    let (sim, _dir, broker) = start();
    assert_eq!(left(&sim, "mtty", "mtty-2"), 12);
    let lease = attach(&broker, &[SERIAL, SERIAL, GPU]).unwrap();
    let made = kernel(&sim);
    assert_eq!(made.keys().collect::<Vec<_>>(), lease.mediated.keys().collect::<Vec<_>>());
    assert_eq!(left(&sim, "mtty", "mtty-2"), 10);
    assert_eq!(left(&sim, PARENT, "nvidia-557"), 0, "one of any type is all there can be");
    let record = broker.list_mediated().unwrap();
    assert_eq!(record.devices.len(), 3);
    for device in &record.devices {
        assert_eq!(device.lease.as_deref(), Some(lease.id.as_str()), "{device:?}");
        assert!(device.iommu_group.is_some(), "{device:?}");
    }
    let one = lease.mediated.keys().next().unwrap().to_string();
    assert_eq!(release(&broker, &one).unwrap(), [lease.id.as_str()]);
    assert!(kernel(&sim).is_empty() && broker.leases().is_empty());
    assert_eq!(left(&sim, "mtty", "mtty-2"), 12);
    assert!(release(&broker, &one).unwrap().is_empty(), "a second release ended something");
}

#[test]
fn what_cannot_be_made_is_refused_with_what_can() {
    let (sim, _dir, broker) = start();
    attach(&broker, &["41:00.5/nvidia-557"]).unwrap();
    let before = kernel(&sim);
    let cases: [(&[&str], ErrorKind, &str); 8] = [
        (&["mtyt/mtty-2"], ErrorKind::NotFound, "did you mean mtty?"),
        (&["mtty/mtty-3"], ErrorKind::NotFound, "did you mean mtty-"),
        (&["41:00.0/nvidia-563"], ErrorKind::NotFound, "0000:41:00.0 cannot be made into"),
        (&["mtty/../mtty-2"], ErrorKind::InvalidArgument, "PARENT/TYPE"),
        (&["41:00.5/nvidia-ap"], ErrorKind::Unsupported, "vfio-ap"),
        (&["41:00.5/nvidia-563"], ErrorKind::Busy, "room for 0 more, and 1 were asked for"),
        (&[GPU, GPU], ErrorKind::Busy, "room for 1 more, and 2 were asked for"),
        (&[SERIAL, "03:00.0"], ErrorKind::NotFound, "03:00.0"),
    ];
    for (names, kind, words) in cases {
        let refused = attach(&broker, names).unwrap_err();
        assert_eq!(refused.kind(), Some(kind), "{names:?}: {refused}");
        assert!(refused.to_string().contains(words), "{names:?}: {refused}");
    }
    assert_eq!(kernel(&sim), before);
    let mut options = AttachOptions::default();
    options.shape.set(shape::Setting::Vlan, shape::Value::Number(7)).unwrap();
    let refused = broker.attach(&[SERIAL.to_owned()], "a", &options, Asker::default()).unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::InvalidArgument), "{refused}");
}

#[test]
fn a_parent_and_its_parts_are_not_given_to_two() {
    let (sim, _dir, broker) = start();
    let part = attach(&broker, &[GPU]).unwrap();
    let refused = attach(&broker, &[PARENT]).unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::Busy));
    let uuid = part.mediated.keys().next().unwrap().to_string();
    assert!(refused.to_string().contains(&uuid), "{refused}");
    let refused = broker.set_virtual_functions("41:00.0".parse().unwrap(), 0, 0).unwrap_err();
    assert!(refused.to_string().contains(&uuid), "{refused}");
    release(&broker, &part.id).unwrap();

    let whole = attach(&broker, &[PARENT]).unwrap();
    let refused = attach(&broker, &[GPU]).unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::AlreadyLeased));
    assert!(refused.to_string().contains(&whole.id), "{refused}");
    release(&broker, &whole.id).unwrap();
    broker.quarantine(PARENT, "came back odd", 0).unwrap();
    assert_eq!(attach(&broker, &[GPU]).unwrap_err().kind(), Some(ErrorKind::Quarantined));
    assert!(kernel(&sim).is_empty());
}

#[test]
fn all_or_none_of_several_are_made() {
    for effect in [
        Effect::Errno(Errno::ENOSPC),
        Effect::Errno(Errno::EIO),
        Effect::SucceedWithoutEffect,
        Effect::Vanish,
    ] {
        let (sim, _dir, broker) = start();
        sim.arm(Fault { on: Operation::CreateMediated, device: None, nth: 2, effect });
        let failed = attach(&broker, &[SERIAL, SERIAL]).unwrap_err().to_string();
        assert!(failed.contains("create mediated device") && failed.contains("undone"), "{failed}");
        assert!(kernel(&sim).is_empty() && broker.leases().is_empty(), "{failed}");
    }
}

#[test]
fn one_that_will_not_go_is_tried_again_and_then_told() {
    let (sim, _dir, broker) = start();
    let fault = |nth, effect| Fault { on: Operation::RemoveMediated, device: None, nth, effect };
    let lease = attach(&broker, &[SERIAL]).unwrap();
    sim.arm(fault(1, Effect::Errno(Errno::EBUSY)));
    release(&broker, &lease.id).unwrap();
    assert!(kernel(&sim).is_empty());

    let lease = attach(&broker, &[SERIAL]).unwrap();
    sim.arm(fault(1, Effect::SucceedWithoutEffect));
    sim.arm(fault(2, Effect::Errno(Errno::EIO)));
    let failed = release(&broker, &lease.id).unwrap_err().to_string();
    assert!(failed.contains("remove mediated device") && failed.contains("EIO"), "{failed}");
    assert_eq!(broker.lease(&lease.id).unwrap().state, State::Failed);
}

#[test]
fn one_that_is_held_open_keeps_its_lease_until_it_is_closed() {
    let (sim, _dir, broker) = start();
    let lease = attach(&broker, &[SERIAL]).unwrap();
    let group = kernel(&sim).values().next().unwrap().iommu_group.unwrap();
    let guest = File::open(sim.root().join(format!("dev/vfio/{group}"))).unwrap();
    let busy = release(&broker, &lease.id).unwrap_err();
    assert_eq!(busy.kind(), Some(ErrorKind::Busy), "{busy}");
    assert_eq!(broker.lease(&lease.id).unwrap().state, State::Releasing);
    assert_eq!(kernel(&sim).len(), 1, "it was taken from its holder");
    drop(guest);
    assert!(eventually(|| broker.leases().is_empty()));
    assert!(kernel(&sim).is_empty());
}

#[test]
fn each_is_opened_like_a_function_by_its_group_or_by_itself() {
    for cdev in [false, true] {
        let (sim, _dir, broker) = start_with(cdev);
        let lease = attach(&broker, &[SERIAL, GPU]).unwrap();
        let interface = if cdev { Interface::Iommufd } else { Interface::Group };
        assert_eq!(broker.lease(&lease.id).unwrap().interface, Some(interface));
        let opened = broker.open_devices(&lease.id).unwrap();
        let made = kernel(&sim);
        let nodes = made.iter().map(|(uuid, part)| match interface {
            Interface::Group => {
                let group = part.iommu_group.unwrap().to_string();
                (group.clone(), sim.root().join("dev/vfio").join(group))
            }
            Interface::Iommufd => {
                let name = part.vfio_device.as_ref().unwrap();
                (uuid.to_string(), sim.root().join("dev/vfio/devices").join(name))
            }
        });
        let node =
            |fd: &OwnedFd| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
        let found = opened.iter().map(|(name, fd)| (name.clone(), node(fd)));
        assert_eq!(found.collect::<Vec<_>>(), nodes.collect::<Vec<_>>());
        broker.open_iommu(&lease.id).unwrap();
        let busy = release(&broker, &lease.id).unwrap_err();
        assert_eq!(busy.kind(), Some(ErrorKind::Busy), "{busy}");
        assert_eq!(kernel(&sim).len(), 2, "they were taken from their holder");
        drop(opened);
        assert!(eventually(|| broker.leases().is_empty()));
        assert!(kernel(&sim).is_empty());
    }
}

#[test]
fn a_user_may_open_its_nodes_for_the_time_of_the_lease() {
    const USER: u32 = 4711;
    let allowed = |node: &Path| acl::read(node).unwrap().allows(USER);
    for cdev in [false, true] {
        let (sim, _dir, broker) = start_with(cdev);
        let options = AttachOptions { node_access: true, ..AttachOptions::default() };
        let asker = Asker { user: USER, ..Asker::default() };
        let lease = broker.attach(&[SERIAL.to_owned()], "alice", &options, asker).unwrap();
        let part = kernel(&sim).into_values().next().unwrap();
        let group = sim.root().join(format!("dev/vfio/{}", part.iommu_group.unwrap()));
        assert!(allowed(&group));
        if cdev {
            let own = sim.root().join("dev/vfio/devices").join(part.vfio_device.unwrap());
            assert!(allowed(&own));
        }
        release(&broker, &lease.id).unwrap();
        let other = attach(&broker, &[SERIAL]).unwrap();
        assert!(group.exists() && !allowed(&group), "the next lease inherited it");
        release(&broker, &other.id).unwrap();
    }
}

#[test]
fn where_access_cannot_be_given_what_was_made_is_removed() {
    let (sim, _dir, broker) = start();
    let effect = Effect::Errno(Errno::EOPNOTSUPP);
    sim.arm(Fault { on: Operation::Access, device: None, nth: 1, effect });
    let options = AttachOptions { node_access: true, ..AttachOptions::default() };
    let asker = Asker { user: 4711, ..Asker::default() };
    let refused = broker.attach(&[SERIAL.to_owned()], "alice", &options, asker).unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::Unsupported), "{refused}");
    assert!(kernel(&sim).is_empty() && broker.leases().is_empty(), "{refused}");
}

#[test]
fn leases_outlive_the_daemon_and_those_half_made_do_not() {
    let (sim, dir, broker) = start();
    let lease = attach(&broker, &[SERIAL]).unwrap();
    drop(broker);
    let broker = setting(&sim, &dir).start().unwrap();
    assert_eq!(broker.lease(&lease.id).unwrap().state, State::Active);
    drop(broker);
    // As if the daemon had ended before it could say that the device was made.
    let ledger = setting(&sim, &dir).ledger().unwrap();
    let mut half = Lease { state: State::Preparing, ..lease };
    half.forward[0].outcome = None;
    ledger.write(&half).unwrap();
    let broker = setting(&sim, &dir).start().unwrap();
    assert!(eventually(|| kernel(&sim).is_empty()), "{:?}", broker.leases());
}

#[test]
fn one_that_somebody_else_removes_fails_its_lease() {
    let (sim, dir, broker) = start();
    let lease = attach(&broker, &[SERIAL, GPU]).unwrap();
    let (uuid, _) = lease.mediated.iter().find(|(_, of)| of.parent == "mtty").unwrap();
    remove(&sim, *uuid);
    broker.notice_mediated(&[*uuid].into());
    let failed = |broker: &Arc<Broker>, id: &str| {
        broker.lease(id).is_some_and(|lease| lease.state == State::Failed)
    };
    assert!(eventually(|| failed(&broker, &lease.id)));
    let reason = broker.lease(&lease.id).unwrap().reason.unwrap();
    assert!(reason.contains(&uuid.to_string()) && reason.contains("somebody else"), "{reason}");
    assert!(kernel(&sim).is_empty(), "the rest of it was not removed");

    let lease = attach(&broker, &[SERIAL]).unwrap();
    drop(broker);
    remove(&sim, *lease.mediated.keys().next().unwrap());
    let broker = setting(&sim, &dir).start().unwrap();
    assert!(eventually(|| failed(&broker, &lease.id)), "not noticed on start");
}
