//! Scrubbers on a simulated kernel: each does what it says after a lease, on the driver it needs, and
//! whatever becomes of it, nobody gets what it has not cleared.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use libvfio::address::PciAddress;
use libvfio::client::{CareRecord, Failure};
use libvfio::error::ErrorKind;
use nix::errno::Errno;
use vfiod::broker::Broker;
use vfiod::history::Event;
use vfiod::lease::State;
use vfiod::request::{ApplyOptions, AttachOptions, HistoryOptions, ReleaseOptions};
use vfiod_tests::sim::{Described, Effect, Fault, Operation, Sim};
use vfiod_tests::trial::{Setting, attach, eventually, say_policy, settled};

/// The display, whose memory is known to be reached through a region.
const DISPLAY: &str = "
[pool.displays]
mode = 'on-lease'
select = [{ address = '0000:03:00.0' }]
scrub = 'bar-zero'
";

/// The lab's machine.
const LAB: &str = include_str!("../hosts/lab.toml");
const GPU: &str = "0000:03:00.0";
const AUDIO: &str = "0000:03:00.1";
const NIC: &str = "0000:01:00.0";
const DISK: &str = "0000:02:00.0";

/// Disks on VFIO from boot on, erased after each lease.
const DISKS: &str = "
[pool.disks]
mode = 'passthrough'
select = [{ address = '0000:02:00.0' }]
scrub = 'nvme'
";

struct Stage {
    sim: Sim,
    records: tempfile::TempDir,
    broker: Arc<Broker>,
}

fn at(address: &str) -> PciAddress {
    address.parse().unwrap()
}

fn start(policy: &str) -> Stage {
    let sim = Sim::mount(&Described::parse(LAB).unwrap()).unwrap();
    let records = tempfile::tempdir().unwrap();
    let policy = policy.replace("{root}", &sim.root().display().to_string());
    say_policy(records.path(), &policy).unwrap();
    let setting = Setting::new(env!("CARGO_BIN_EXE_trial"), sim.root(), records.path());
    let broker = setting.start().unwrap();
    broker.apply_policy(&ApplyOptions::default(), 0).unwrap();
    Stage { sim, records, broker }
}

/// A pool of the card, with a program, which is told a directory and the host's root.
fn with_program(script: &str, more: &str) -> Stage {
    // Of its own, since the stage is not there yet.
    let dir = tempfile::tempdir().unwrap().keep();
    let path = dir.join("scrub");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let command = format!("['{}', '{}', '{{root}}']", path.display(), dir.display());
    start(&format!(
        "[pool.nics]\nmode = 'on-lease'\nselect = [{{ address = '{NIC}' }}]\n\
         scrub = {{ command = {command}, {more} }}\n"
    ))
}

impl Stage {
    fn release(&self, target: &str) -> Result<Vec<String>, Failure> {
        self.broker.release(target, &ReleaseOptions::default())
    }

    fn soiled(&self, device: &str) -> bool {
        let memory = std::fs::read_to_string(self.sim.root().join("sim/memory")).unwrap();
        memory.lines().any(|line| line == device)
    }

    /// How often memory was cleared.
    fn scrubbed(&self) -> usize {
        let is =
            |w: &&vfiod_tests::sim::Written| w.path == "sim/memory" && w.result == Some(Ok(()));
        self.sim.journal().iter().filter(is).count()
    }

    fn driver(&self, device: &str) -> Option<String> {
        let link = self.sim.function(at(device)).join("driver").read_link().ok()?;
        Some(link.file_name()?.to_str()?.to_owned())
    }

    /// What the newest lease's end says was done to a device.
    fn cleaned(&self, device: &str) -> (String, String, Option<String>) {
        let entries = self.broker.history(&HistoryOptions::default()).unwrap();
        let cleaned = entries.into_iter().rev().flat_map(|entry| entry.cleaned);
        let found = cleaned.into_iter().find(|cleaned| cleaned.device == at(device)).unwrap();
        let record = found.record();
        (record.reset, record.scrub, record.weaker)
    }

    /// Nobody gets a device, not after a restart either, for a reason that has `word` in it.
    fn is_kept_from_all(&self, device: &str, word: &str) {
        for tenant in ["alice", "bob"] {
            let refused = attach(&self.broker, device, tenant).unwrap_err();
            assert_eq!(refused.kind(), Some(ErrorKind::Quarantined), "{word}: {refused}");
            assert!(refused.to_string().contains(word), "'{word}' is not in: {refused}");
        }
        let quarantined = Event::Quarantined;
        let entries = self.broker.history(&HistoryOptions::default()).unwrap();
        let told =
            |entry: &vfiod::history::Entry| entry.event == quarantined && entry.text.contains(word);
        assert!(entries.iter().any(told), "{word}: {entries:?}");
        let setting =
            Setting::new(env!("CARGO_BIN_EXE_trial"), self.sim.root(), self.records.path());
        let next = setting.start().unwrap();
        assert!(settled(&next));
        let refused = attach(&next, device, "bob").unwrap_err();
        assert_eq!(
            refused.kind(),
            Some(ErrorKind::Quarantined),
            "{word}, after a restart: {refused}"
        );
    }
}

#[test]
fn a_disk_is_erased_on_its_host_driver_and_goes_home() {
    let stage = start(DISKS);
    assert_eq!(stage.driver(DISK).as_deref(), Some("vfio-pci"));
    let lease = attach(&stage.broker, DISK, "alice").unwrap();
    let record = lease.record();
    let care =
        CareRecord { device: DISK.into(), reset: "flr".into(), scrub: "nvme".into(), weaker: None };
    assert_eq!(record.cleaning, [care]);
    assert!(stage.soiled(DISK));
    let before = stage.sim.journal().len();
    stage.release(&lease.id).unwrap();
    assert_eq!(stage.scrubbed(), 1);
    assert_eq!(stage.driver(DISK).as_deref(), Some("vfio-pci"));
    let written: Vec<String> = stage.sim.journal()[before..]
        .iter()
        .filter_map(|w| {
            w.path.rsplit_once('/').map(|(dir, name)| (dir.to_owned(), name.to_owned()))
        })
        .map(|(dir, name)| match dir.strip_prefix("sys/bus/pci/drivers/") {
            Some(driver) => format!("{driver} {name}"),
            None => name,
        })
        .collect();
    let way = [
        "reset",
        "vfio-pci unbind",
        "driver_override",
        "nvme bind",
        "memory",
        "nvme unbind",
        "driver_override",
        "vfio-pci bind",
    ];
    assert_eq!(written, way);
    assert_eq!(stage.cleaned(DISK), ("alone".into(), "erased".into(), None));
    // And once more, for somebody else.
    let lease = attach(&stage.broker, DISK, "bob").unwrap();
    stage.release(&lease.id).unwrap();
    assert!(stage.broker.quarantines().is_empty() && stage.broker.leases().is_empty());
}

#[test]
fn a_disk_that_is_the_hosts_is_erased_before_the_host_has_it() {
    let stage = start(&DISKS.replace("passthrough", "on-lease"));
    assert_eq!(stage.driver(DISK).as_deref(), Some("nvme"));
    attach(&stage.broker, DISK, "alice").unwrap();
    stage.release(DISK).unwrap();
    assert!(!stage.soiled(DISK));
    assert_eq!(stage.driver(DISK).as_deref(), Some("nvme"));
    assert_eq!(stage.cleaned(DISK).1, "erased");
}

/// Whatever goes wrong on the way to the host driver, there, and back.
#[test]
fn a_disk_that_was_not_erased_is_handed_to_nobody() {
    let cases = [
        (Operation::Scrub, 1, Effect::Errno(Errno::EIO), "EIO"),
        (Operation::Scrub, 1, Effect::SucceedWithoutEffect, "zeros"),
        (Operation::Scrub, 1, Effect::KillBefore, "worker"),
        (Operation::Scrub, 1, Effect::KillAfter, "worker"),
        (Operation::Reset, 1, Effect::Errno(Errno::EIO), "EIO"),
        (Operation::Unbind, 1, Effect::Errno(Errno::EBUSY), "EBUSY"),
        (Operation::Override, 1, Effect::Errno(Errno::ENOMEM), "ENOMEM"),
        (Operation::Bind, 1, Effect::Errno(Errno::EBUSY), "EBUSY"),
        (Operation::Bind, 1, Effect::BindOther("pci-stub".into()), "nvme was expected"),
        (Operation::Bind, 1, Effect::SucceedWithoutEffect, "nvme was expected"),
        (Operation::Bind, 1, Effect::KillBefore, "worker"),
    ];
    for (on, nth, effect, word) in cases {
        let case = format!("{effect:?} at {on:?}");
        let stage = start(DISKS);
        let lease = attach(&stage.broker, DISK, "alice").unwrap();
        if matches!(effect, Effect::BindOther(_)) {
            std::fs::write(stage.sim.root().join("sim/load-module"), "pci-stub").unwrap();
        }
        stage.sim.arm(Fault { on, device: Some(at(DISK)), nth, effect });
        let failure = stage.release(&lease.id).expect_err(&case);
        assert!(failure.to_string().contains(word), "{case}: '{word}' is not in: {failure}");
        assert_eq!(stage.broker.lease(&lease.id).unwrap().state, State::Failed, "{case}");
        stage.is_kept_from_all(DISK, word);
    }
}

#[test]
fn a_disk_whose_erasing_failed_is_healed_where_it_is() {
    let stage = start(DISKS);
    let lease = attach(&stage.broker, DISK, "alice").unwrap();
    let fault = |effect| Fault { on: Operation::Scrub, device: Some(at(DISK)), nth: 1, effect };
    stage.sim.arm(fault(Effect::SucceedWithoutEffect));
    stage.release(&lease.id).unwrap_err();
    assert_eq!(stage.driver(DISK).as_deref(), Some("nvme"));
    stage.sim.arm(fault(Effect::Errno(Errno::EIO)));
    stage.broker.heal(DISK, 0).unwrap_err();
    let before = stage.scrubbed();
    stage.broker.heal(DISK, 0).unwrap();
    assert_eq!(stage.scrubbed(), before + 1);
    assert_eq!(stage.driver(DISK).as_deref(), Some("vfio-pci"));
    attach(&stage.broker, DISK, "bob").unwrap();
}

/// The record of the lease that failed says what is left to be done, and somebody has dismissed it.
#[test]
fn what_is_healed_without_its_lease_is_cleared_all_the_same() {
    let stage = start(&DISPLAY.replace("on-lease", "passthrough"));
    let lease = attach(&stage.broker, GPU, "alice").unwrap();
    let effect = Effect::Leave(4096, 4096);
    let fault = |effect| Fault { on: Operation::Scrub, device: Some(at(GPU)), nth: 1, effect };
    stage.sim.arm(fault(effect.clone()));
    stage.release(&lease.id).unwrap_err();
    stage.release(&lease.id).unwrap();
    assert!(stage.broker.lease(&lease.id).is_none());
    // Nor is it trusted as long as that fails.
    stage.sim.arm(fault(effect));
    let failure = stage.broker.heal(GPU, 0).unwrap_err();
    assert!(failure.to_string().contains("something else at 0x1000"), "{failure}");
    let refused = attach(&stage.broker, GPU, "bob").unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::Quarantined), "{refused}");
    let memory = stage.sim.memory(at(GPU)).unwrap();
    memory.write_all_at(b"alice", 4096 * 5).unwrap();
    stage.broker.heal(GPU, 0).unwrap();
    let mut found = [0xff; 5];
    memory.read_exact_at(&mut found, 4096 * 5).unwrap();
    assert_eq!(found, [0; 5]);
    attach(&stage.broker, GPU, "bob").unwrap();

    // A disk is erased on its host driver, to which only a lease's end takes it.
    let stage = start(DISKS);
    let lease = attach(&stage.broker, DISK, "alice").unwrap();
    stage.sim.arm(Fault {
        on: Operation::Reset,
        device: Some(at(DISK)),
        nth: 1,
        effect: Effect::Errno(Errno::EIO),
    });
    stage.release(&lease.id).unwrap_err();
    stage.release(&lease.id).unwrap();
    let failure = stage.broker.heal(DISK, 0).unwrap_err();
    assert!(failure.to_string().contains("clear it by hand"), "{failure}");
    stage.is_kept_from_all(DISK, "EIO");
}

#[test]
fn a_scrubber_that_the_kernel_keeps_wedges_its_lease_and_nothing_else() {
    let stage = start(DISKS);
    drop(stage.broker);
    let mut setting =
        Setting::new(env!("CARGO_BIN_EXE_trial"), stage.sim.root(), stage.records.path());
    setting.deadlines.push("scrub=0.5".into());
    let broker = setting.start().unwrap();
    let lease = attach(&broker, DISK, "alice").unwrap();
    let effect = Effect::BlockForever;
    stage.sim.arm(Fault { on: Operation::Scrub, device: Some(at(DISK)), nth: 1, effect });
    let failure = broker.release(&lease.id, &ReleaseOptions::default()).unwrap_err();
    assert_eq!(failure.kind(), Some(ErrorKind::Wedged), "{failure}");
    let refused = attach(&broker, DISK, "bob").unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::Wedged), "{refused}");
    let other = attach(&broker, NIC, "bob").unwrap();
    broker.release(&other.id, &ReleaseOptions::default()).unwrap();
    stage.sim.let_go();
    assert!(eventually(|| broker.leases().is_empty()), "{:?}", broker.leases());
    attach(&broker, DISK, "bob").unwrap();
}

#[test]
fn a_program_is_told_which_device_and_what_it_cannot_clear_is_kept() {
    let stage = with_program("env > $1/told; cat > $1/input", "timeout = 20");
    let lease = attach(&stage.broker, NIC, "alice").unwrap();
    stage.release(&lease.id).unwrap();
    let policy = std::fs::read_to_string(stage.records.path().join("policy/vfiod.toml")).unwrap();
    let dir = PathBuf::from(policy.split('\'').nth(7).unwrap());
    let told = std::fs::read_to_string(dir.join("told")).unwrap();
    for line in [
        "VFIOD_DEVICE=0000:01:00.0",
        "VFIOD_VENDOR=8086",
        "VFIOD_DEVICE_ID=10c9",
        "VFIOD_SUBSYSTEM=8086:a03c",
        "VFIOD_CLASS=020000",
        "VFIOD_DRIVER=vfio-pci",
        "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
    ] {
        assert!(told.lines().any(|told| told == line), "{line} is not in:\n{told}");
    }
    assert!(told.contains("VFIOD_GROUP=") && !told.contains("CARGO"), "{told}");
    assert_eq!(stage.cleaned(NIC), ("alone".into(), "command".into(), None));
    attach(&stage.broker, NIC, "bob").unwrap();
}

#[test]
fn a_program_that_needs_a_host_driver_has_it() {
    let stage = with_program("echo $VFIOD_DRIVER > $1/driver", "driver = 'igb'");
    attach(&stage.broker, NIC, "alice").unwrap();
    stage.release(NIC).unwrap();
    assert_eq!(stage.cleaned(NIC).1, "command");
    assert_eq!(stage.driver(NIC).as_deref(), Some("igb"));
}

#[test]
fn a_program_that_fails_hangs_or_is_missing_leaves_the_device_to_nobody() {
    let cases = [
        ("echo no room >&2; exit 1", "timeout = 20", "failed (status 1): no room"),
        ("kill -KILL $$", "timeout = 20", "signal: 9"),
        ("sleep 60", "timeout = 1", "did not end within 1 s"),
        ("trap '' TERM INT; sleep 60 & wait", "timeout = 1", "did not end within 1 s"),
        ("rm $0; exec /nowhere/scrub", "timeout = 20", "status 127"),
    ];
    for (script, more, word) in cases {
        let stage = with_program(script, more);
        let lease = attach(&stage.broker, NIC, "alice").unwrap();
        let failure = stage.release(&lease.id).expect_err(script);
        assert!(failure.to_string().contains(word), "{script}: {failure}");
        assert_eq!(stage.driver(NIC).as_deref(), Some("vfio-pci"), "{script}");
        stage.is_kept_from_all(NIC, word);
    }
    let missing = "scrub = { command = ['/nowhere/scrub'] }";
    let stage = start(&format!(
        "[pool.nics]\nmode = 'on-lease'\nselect = [{{ address = '{NIC}' }}]\n{missing}\n"
    ));
    attach(&stage.broker, NIC, "alice").unwrap();
    let failure = stage.release(NIC).unwrap_err();
    assert!(failure.to_string().contains("cannot start /nowhere/scrub"), "{failure}");
    stage.is_kept_from_all(NIC, "cannot start /nowhere/scrub");
}

#[test]
fn a_device_that_a_program_has_spoilt_is_kept_as_well() {
    let stage =
        with_program("echo 1 > $2/sys/bus/pci/devices/$VFIOD_DEVICE/remove", "timeout = 20");
    attach(&stage.broker, NIC, "alice").unwrap();
    let failure = stage.release(NIC).unwrap_err();
    assert!(failure.to_string().contains("no device"), "{failure}");
    std::fs::write(stage.sim.root().join("sys/bus/pci/rescan"), "1").unwrap();
    stage.broker.notice([at(NIC)]);
    stage.is_kept_from_all(NIC, "no device");
}

/// Its memory is a real file here, which the worker maps, overwrites and reads.
#[test]
fn memory_is_overwritten_and_read_back_as_the_policy_says() {
    for (scrub, done) in [("bar-zero", "zeros"), ("bar-zero-sampled", "zeros-sampled")] {
        let stage = start(&DISPLAY.replace("bar-zero", scrub));
        let weaker = (done == "zeros-sampled").then(|| {
            "of its memory, once cleared, only samples are read back, by the policy".to_owned()
        });
        let plan = stage.broker.plan(&[GPU.into()], &AttachOptions::default(), 0).unwrap();
        let warned = plan.warnings.iter().any(|warning| warning.contains("only samples"));
        assert_eq!(warned, weaker.is_some(), "{plan:?}");
        let lease = attach(&stage.broker, GPU, "alice").unwrap();
        let care = lease.record().cleaning.remove(0);
        assert_eq!((care.scrub.as_str(), &care.weaker), (scrub, &weaker));
        let memory = stage.sim.memory(at(GPU)).unwrap();
        let size = memory.metadata().unwrap().len();
        for place in [0, 4096 * 77 + 5, size - 1] {
            memory.write_all_at(b"!", place).unwrap();
        }
        stage.release(&lease.id).unwrap();
        let mut found = vec![0xff; usize::try_from(size).unwrap()];
        memory.read_exact_at(&mut found, 0).unwrap();
        assert!(found.iter().all(|byte| *byte == 0), "{scrub}");
        assert_eq!(stage.cleaned(GPU), ("bus".into(), done.into(), weaker));
        attach(&stage.broker, GPU, "bob").unwrap();
    }
}

/// A kernel that takes the zeros and leaves something in memory all the same.
#[test]
fn memory_that_is_not_zeros_afterwards_is_nobodys() {
    const SIZE: usize = 16 << 20;
    let page = Effect::Leave(4096 * 77, 4096);
    // What a device reads as that does not answer.
    let ones = Effect::Leave(0, SIZE);
    let sampled = [page, Effect::Leave(0, 1), Effect::Leave((SIZE - 1) as u64, 1), ones];
    let full = sampled.clone().into_iter().chain([Effect::Leave(4096 * 77 + 5, 1)]);
    let full = full.map(|effect| ("bar-zero", effect));
    let sampled = sampled.into_iter().map(|effect| ("bar-zero-sampled", effect));
    for (scrub, effect) in full.chain(sampled) {
        let case = format!("{scrub}, {effect:?}");
        let stage = start(&DISPLAY.replace("bar-zero", scrub));
        let lease = attach(&stage.broker, GPU, "alice").unwrap();
        let size = stage.sim.memory(at(GPU)).unwrap().metadata().unwrap().len();
        assert_eq!(size, SIZE as u64);
        let fault = Fault { on: Operation::Scrub, device: Some(at(GPU)), nth: 1, effect };
        stage.sim.arm(fault);
        let failure = stage.release(&lease.id).expect_err(&case);
        assert!(failure.to_string().contains("something else at 0x"), "{case}: {failure}");
        assert_eq!(stage.cleaned(GPU).1, "failed", "{case}");
        stage.is_kept_from_all(GPU, "zeros throughout");
        // What was in the way has gone, and then it is anybody's.
        stage.broker.heal(GPU, 0).unwrap();
        attach(&stage.broker, GPU, "bob").unwrap();
    }
}

#[test]
fn what_the_policy_leaves_out_is_left_out_and_told() {
    let policy = "
[pool.gpus]
mode = 'on-lease'
select = [{ address = '0000:03:00.0' }]
reset = 'none'
scrub = 'none'
";
    let stage = start(policy);
    let plan = stage.broker.plan(&[GPU.into()], &AttachOptions::default(), 0).unwrap();
    let warned = |word: &str| plan.warnings.iter().any(|w| w.contains(GPU) && w.contains(word));
    assert!(warned("not reset, by the policy") && warned("not cleared, by the policy"), "{plan:?}");
    let lease = attach(&stage.broker, GPU, "alice").unwrap();
    let care = lease.record().cleaning;
    let words: Vec<(&str, &str)> =
        care.iter().map(|c| (c.reset.as_str(), c.scrub.as_str())).collect();
    assert_eq!(words, [("none", "none"), ("none", "unknown")]);
    assert!(care[0].weaker.is_some() && care[1].weaker.is_some());
    stage.release(&lease.id).unwrap();
    assert!(stage.soiled(GPU) && stage.soiled(AUDIO));
    let weaker = "it is not reset, by the policy; its memory is not cleared, by the policy";
    assert_eq!(stage.cleaned(GPU), ("none".into(), "none".into(), Some(weaker.into())));
}

#[test]
fn a_lease_is_cleaned_as_was_said_when_it_was_made() {
    let stage = start(DISKS);
    let lease = attach(&stage.broker, DISK, "alice").unwrap();
    let path = stage.records.path().join("policy/vfiod.toml");
    std::fs::write(path, DISKS.replace("'nvme'", "'none'")).unwrap();
    stage.broker.reload_policy().unwrap();
    stage.release(&lease.id).unwrap();
    assert_eq!((stage.scrubbed(), stage.cleaned(DISK).1.as_str()), (1, "erased"));
    let lease = attach(&stage.broker, DISK, "bob").unwrap();
    stage.release(&lease.id).unwrap();
    assert_eq!((stage.scrubbed(), stage.cleaned(DISK).1.as_str()), (1, "none"));
}

#[test]
fn what_cannot_be_scrubbed_as_it_is_to_be_is_not_leased() {
    for (scrub, device, why) in [
        ("'nvme'", NIC, "is no NVM Express controller"),
        ("'bar-zero'", NIC, "nobody is known to reach"),
        ("'bar-zero'", DISK, "nobody is known to reach"),
    ] {
        let policy = format!(
            "[pool.a]\nmode = 'on-lease'\nselect = [{{ address = '{device}' }}]\nscrub = {scrub}\n"
        );
        let stage = start(&policy);
        let refused = attach(&stage.broker, device, "alice").unwrap_err();
        assert_eq!(refused.kind(), Some(ErrorKind::Unsupported), "{refused}");
        assert!(refused.to_string().contains(why), "{refused}");
    }
    // What comes along with a device is not what the pool is about.
    let policy = "[pool.a]\nmode = 'on-lease'\nselect = [{ address = '0000:03:00.0' }]\n\
                  scrub = 'bar-zero'\n";
    let stage = start(policy);
    let lease = attach(&stage.broker, GPU, "alice").unwrap();
    stage.release(&lease.id).unwrap();
    assert_eq!((stage.soiled(GPU), stage.soiled(AUDIO)), (false, true));
}

/// Wherever the daemon is killed on the way through the host driver, and where it is the home.
#[test]
fn a_lease_cut_short_anywhere_on_its_way_through_the_host_driver_ends_clean() {
    for policy in [DISKS.to_owned(), DISKS.replace("passthrough", "on-lease")] {
        let Stage { sim, records, broker } = start(&policy);
        let setting = Setting::new(env!("CARGO_BIN_EXE_trial"), sim.root(), records.path());
        let mut lease = attach(&broker, DISK, "alice").unwrap();
        let inventory = broker.inventory();
        drop(broker);
        let scrubs = || sim.journal().iter().filter(|w| w.path == "sim/memory").count();
        for cut in 0..lease.way_home(&inventory).len() {
            // As a daemon leaves it that was killed before it could record the step at `cut`.
            let (mut left, before) = (lease.clone(), scrubs());
            left.state = State::Releasing;
            left.backward = left.way_home(&inventory);
            for recorded in &mut left.backward[..=cut] {
                recorded.outcome = Some(recorded.step.execute(&sim.host()).unwrap());
            }
            left.backward[cut].outcome = None;
            let step = left.backward[cut].step.to_string();
            setting.ledger().unwrap().write(&left).unwrap();
            let broker = setting.start().unwrap();
            assert!(settled(&broker), "{step}");
            let quarantines = broker.quarantines();
            assert!(quarantines.is_empty(), "{step}: {quarantines:?}");
            assert!(scrubs() > before, "{step}");
            for left in broker.leases() {
                broker.release(&left.id, &ReleaseOptions::default()).unwrap();
            }
            lease = attach(&broker, DISK, "bob").unwrap_or_else(|why| panic!("{step}: {why}"));
        }
    }
}
