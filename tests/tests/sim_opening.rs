//! Leased devices in the hands of programs, on a simulated kernel: descriptors, access to nodes and
//! memory to lock.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libvfio::acl;
use libvfio::address::PciAddress;
use libvfio::client::Failure;
use libvfio::error::ErrorKind;
use libvfio::memlock::{self, Limit};
use libvfio::vfio::Interface;
use nix::errno::Errno;
use vfiod::broker::{Asker, Broker};
use vfiod::lease::{Lease, State};
use vfiod::request::{AttachOptions, ReleaseOptions};
use vfiod_tests::sim::{Described, Effect, Fault, Operation, Sim, WORKSTATION};
use vfiod_tests::trial::{self, Setting, eventually};

const GPU: &str = "0000:01:00.0";
const AUDIO: &str = "0000:01:00.1";
const USER: u32 = 4711;

/// The workstation, whose kernel has nodes of single devices or not.
fn start(cdev: bool) -> (Sim, tempfile::TempDir, Arc<Broker>) {
    let mut host = Described::parse(WORKSTATION).unwrap();
    host.kernel.cdev = cdev;
    let sim = Sim::mount(&host).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let setting = Setting::new(env!("CARGO_BIN_EXE_trial"), sim.root(), dir.path());
    let broker = setting.start().unwrap();
    (sim, dir, broker)
}

fn attach(broker: &Arc<Broker>, options: &AttachOptions) -> Result<Lease, Failure> {
    let asker = Asker { user: USER, ..Asker::default() };
    broker.attach(&[GPU.to_owned()], "alice", options, asker)
}

/// Where a descriptor of ours leads.
fn node(descriptor: &OwnedFd) -> PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd())).unwrap()
}

/// The node of the GPU's group.
fn group_node(sim: &Sim, broker: &Broker) -> PathBuf {
    let gpu: PciAddress = GPU.parse().unwrap();
    let group = broker.device(gpu).unwrap().iommu_group.unwrap();
    sim.root().join(format!("dev/vfio/{group}"))
}

#[test]
fn a_group_is_opened_once_and_keeps_its_lease_until_it_is_closed() {
    let (sim, _dir, broker) = start(false);
    let lease = attach(&broker, &AttachOptions::default()).unwrap();
    assert_eq!(broker.lease(&lease.id).unwrap().interface, Some(Interface::Group));
    let opened = broker.open_devices(&lease.id).unwrap();
    let group = group_node(&sim, &broker);
    assert_eq!(opened.len(), 1, "both functions are of one group");
    assert_eq!(node(&opened[0].1), group);
    assert_eq!(Some(opened[0].0.as_str()), group.file_name().and_then(|name| name.to_str()));
    let again = broker.open_devices(&lease.id).unwrap_err();
    assert_eq!(again.kind(), Some(ErrorKind::Busy), "{again}");
    assert!(again.to_string().contains("once at a time"), "{again}");
    let container = broker.open_iommu(&lease.id).unwrap();
    assert_eq!(node(&container), sim.root().join("dev/vfio/vfio"));
    let refused = broker.release(&lease.id, &ReleaseOptions::default()).unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::Busy), "{refused}");
    let late = broker.open_devices(&lease.id).unwrap_err();
    assert!(late.to_string().contains("is releasing"), "{late}");
    drop(opened);
    assert!(eventually(|| broker.lease(&lease.id).is_none()));
    assert_eq!(broker.open_devices(&lease.id).unwrap_err().kind(), Some(ErrorKind::NotFound));
}

#[test]
fn whoever_runs_a_machine_is_waited_for_after_its_end() {
    let (sim, _dir, broker) = start(false);
    let options = AttachOptions { vm: Some("web".to_owned()), ..AttachOptions::default() };
    for asks in [true, false] {
        let lease = attach(&broker, &options).unwrap();
        let guest = File::open(group_node(&sim, &broker)).unwrap();
        // By somebody who looks no further than the guest.
        let busy = broker.release(&lease.id, &ReleaseOptions::default()).unwrap_err();
        assert_eq!(busy.kind(), Some(ErrorKind::Busy), "{busy}");
        drop(guest);
        std::thread::sleep(Duration::from_secs(2));
        assert_eq!(broker.lease(&lease.id).unwrap().state, State::Releasing);
        let asked = Instant::now();
        if asks {
            let options = ReleaseOptions { wait: true, ..ReleaseOptions::default() };
            broker.release("web", &options).unwrap();
            assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
        }
        assert!(eventually(|| broker.leases().is_empty()), "nobody has asked, and it stays");
    }
}

#[test]
fn with_iommufd_each_function_is_opened_by_itself() {
    let (sim, _dir, broker) = start(true);
    let lease = attach(&broker, &AttachOptions::default()).unwrap();
    assert_eq!(broker.lease(&lease.id).unwrap().interface, Some(Interface::Iommufd));
    let opened = broker.open_devices(&lease.id).unwrap();
    let names: Vec<&str> = opened.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, [GPU, AUDIO]);
    for (name, descriptor) in &opened {
        let device = broker.device(name.parse().unwrap()).unwrap().vfio_device.unwrap();
        assert_eq!(node(descriptor), sim.root().join("dev/vfio/devices").join(device));
    }
    assert_eq!(node(&broker.open_iommu(&lease.id).unwrap()), sim.root().join("dev/iommu"));
    let refused = broker.release(&lease.id, &ReleaseOptions::default()).unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::Busy), "{refused}");
    drop(opened);
    assert!(eventually(|| broker.lease(&lease.id).is_none()));
}

#[test]
fn nobody_but_who_asked_keeps_a_descriptor() {
    let (sim, _dir, broker) = start(true);
    let lease = attach(&broker, &AttachOptions::default()).unwrap();
    for _ in 0..3 {
        drop((broker.open_devices(&lease.id).unwrap(), broker.open_iommu(&lease.id).unwrap()));
    }
    // Workers are our children, and none may keep what it opened.
    let held = || {
        std::fs::read_dir("/proc").unwrap().flatten().any(|process| {
            let held = std::fs::read_dir(process.path().join("fd"));
            let links = held.into_iter().flatten().flatten();
            links.filter_map(|fd| std::fs::read_link(fd.path()).ok()).any(|link| {
                link.starts_with(sim.root().join("dev/vfio"))
                    || link == sim.root().join("dev/iommu")
            })
        })
    };
    assert!(!held());
    broker.release(&lease.id, &ReleaseOptions::default()).unwrap();
}

#[test]
fn a_user_may_open_the_nodes_for_the_time_of_the_lease() {
    let allowed = |node: &Path| acl::read(node).unwrap().allows(USER);
    for cdev in [false, true] {
        let (sim, _dir, broker) = start(cdev);
        let options = AttachOptions { node_access: true, ..AttachOptions::default() };
        let plan = broker.plan(&[GPU.to_owned()], &options, USER).unwrap();
        let steps = plan.steps.iter().filter(|step| step.step == "node-access");
        assert_eq!(steps.filter(|step| step.undo.is_some()).count(), 2);
        let lease = attach(&broker, &options).unwrap();
        let group = group_node(&sim, &broker);
        assert!(allowed(&group));
        // Whoever holds it would see the lease end later: it must be without access before.
        let guest = File::open(&group).unwrap();
        broker.release(&lease.id, &ReleaseOptions::default()).unwrap_err();
        assert!(allowed(&group));
        drop(guest);
        assert!(eventually(|| broker.leases().is_empty()));
        assert!(!group.exists());
        let other = attach(&broker, &AttachOptions::default()).unwrap();
        assert!(!allowed(&group), "the next lease inherited it");
        broker.release(&other.id, &ReleaseOptions::default()).unwrap();
    }
}

#[test]
fn where_access_cannot_be_given_everything_is_undone() {
    for effect in [Effect::Errno(Errno::EOPNOTSUPP), Effect::SucceedWithoutEffect] {
        let (sim, _dir, broker) = start(false);
        let device = Some(GPU.parse().unwrap());
        sim.arm(Fault { on: Operation::Access, device, nth: 1, effect: effect.clone() });
        let options = AttachOptions { node_access: true, ..AttachOptions::default() };
        let error = attach(&broker, &options).unwrap_err();
        assert!(error.to_string().contains("let user 4711 open"), "{error}");
        assert!(error.to_string().contains("was undone"), "{error}");
        if matches!(effect, Effect::Errno(_)) {
            assert_eq!(error.kind(), Some(ErrorKind::Unsupported));
        }
        assert!(broker.leases().is_empty());
    }
}

#[test]
fn a_process_may_lock_as_much_as_its_guest_has() {
    let (_sim, _dir, broker) = start(false);
    let lease = attach(&broker, &AttachOptions::default()).unwrap();
    let command = "ulimit -S -l 64; echo; exec sleep 60";
    let mut guest = Command::new("sh").args(["-c", command]).spawn().unwrap();
    let limit = || memlock::of(guest.id()).unwrap();
    assert!(eventually(|| limit().0 == Limit::Bytes(64 << 10)));
    let bytes = match limit().1 {
        Limit::None => 5 << 30,
        Limit::Bytes(most) => most,
    };
    for _ in 0..2 {
        broker.lock_memory(&lease.id, guest.id(), bytes).unwrap();
        assert_eq!(limit().0, Limit::Bytes(bytes));
    }
    let recorded = broker.lease(&lease.id).unwrap();
    assert_eq!(recorded.state, State::Active);
    let steps = recorded.record().steps;
    let locked: Vec<_> = steps.iter().filter(|step| step.step == "lock-memory").collect();
    assert_eq!(locked.len(), 1, "only the last counts");
    assert_eq!(locked[0].outcome.as_deref(), Some("already-so"));
    let none = broker.lock_memory(&lease.id, guest.id(), 0).unwrap_err();
    assert_eq!(none.kind(), Some(ErrorKind::InvalidArgument), "{none}");
    guest.kill().unwrap();
    let pid = guest.id();
    guest.wait().unwrap();
    let gone = broker.lock_memory(&lease.id, pid, bytes).unwrap_err();
    assert!(gone.to_string().contains("still runs"), "{gone}");
    broker.release(&lease.id, &ReleaseOptions::default()).unwrap();
    assert_eq!(trial::attach(&broker, GPU, "bob").unwrap().tenant, "bob");
}
