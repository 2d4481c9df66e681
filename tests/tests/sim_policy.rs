//! The policy against a simulated kernel: what is planned is what is done, what is leased waits, and
//! what is wrong changes nothing.

use std::sync::Arc;

use libvfio::address::PciAddress;
use libvfio::client::{Failure, PolicyRecord, UnitRecord};
use libvfio::error::ErrorKind;
use libvfio::pci::Binding;
use libvfio::policy::{Policy, Source};
use nix::errno::Errno;
use vfiod::broker::{Asker, Broker, Pools};
use vfiod::request::{ApplyOptions, AttachOptions, ReleaseOptions};
use vfiod_tests::sim::{Described, Effect, Fault, HGX8, Operation, Sim, WORKSTATION};
use vfiod_tests::trial::{Setting, attach, eventually, say_policy};

const LAB: &str = include_str!("../hosts/lab.toml");
const GPU: &str = "0000:03:00.0";
const AUDIO: &str = "0000:03:00.1";
const NIC: &str = "0000:01:00.0";
const DISK: &str = "0000:02:00.0";
const VF: &str = "0000:01:10.0";

const POLICY: &str = "
[pool.gpus]
mode = 'passthrough'
select = [{ vendor = '1234', class = 'gpu' }]
d3cold = false

[pool.vnics]
mode = 'passthrough'
select = [{ address = '0000:01:00.0' }]
vfs = 2

[pool.wired]
mode = 'on-lease'
select = [{ driver = 'e1000e' }]
";

/// A host with a broker, and a policy that can be changed.
struct Stage {
    sim: Sim,
    records: tempfile::TempDir,
    broker: Arc<Broker>,
}

fn at(address: &str) -> PciAddress {
    address.parse().unwrap()
}

fn start(host: &str, policy: &str) -> Stage {
    with(host, policy, tempfile::tempdir().unwrap())
}

fn with(host: &str, policy: &str, records: tempfile::TempDir) -> Stage {
    let sim = Sim::mount(&Described::parse(host).unwrap()).unwrap();
    say_policy(records.path(), policy).unwrap();
    let broker = Setting::new(env!("CARGO_BIN_EXE_trial"), sim.root(), records.path());
    Stage { broker: broker.start().unwrap(), sim, records }
}

impl Stage {
    fn apply(&self) -> PolicyRecord {
        self.broker.apply_policy(&ApplyOptions::default(), 0).unwrap()
    }

    fn reload(&self, policy: &str) -> Result<PolicyRecord, Failure> {
        say_policy(self.records.path(), policy).unwrap();
        self.broker.reload_policy()
    }

    fn binding(&self, device: &str) -> (Option<String>, Option<String>) {
        let Binding { driver, driver_override } =
            Binding::read(&self.sim.host(), at(device)).unwrap();
        (driver, driver_override)
    }

    fn driver(&self, device: &str) -> Option<String> {
        self.binding(device).0
    }

    fn unit(&self, device: &str) -> UnitRecord {
        let plan = self.broker.plan_policy().unwrap();
        plan.units.into_iter().find(|unit| unit.device == device).expect("a unit")
    }
}

fn texts(record: &PolicyRecord) -> Vec<&str> {
    record.units.iter().flat_map(|unit| &unit.steps).map(|step| step.text.as_str()).collect()
}

fn standings(record: &PolicyRecord) -> Vec<(&str, &str)> {
    record.units.iter().map(|unit| (unit.device.as_str(), unit.standing.as_str())).collect()
}

#[test]
fn what_is_planned_is_done_and_a_second_time_there_is_nothing_to_do() {
    let stage = start(LAB, POLICY);
    let plan = stage.broker.plan_policy().unwrap();
    assert_eq!(stage.driver(GPU).as_deref(), Some("bochs-drm"), "a plan changed something");
    let applied = stage.apply();
    assert_eq!(texts(&applied), texts(&plan));
    assert!(texts(&plan).len() > 8, "{:?}", texts(&plan));
    for device in [GPU, AUDIO, VF, "0000:01:10.2"] {
        assert_eq!(stage.driver(device).as_deref(), Some("vfio-pci"), "{device}");
    }
    let cold = std::fs::read_to_string(stage.sim.function(at(GPU)).join("d3cold_allowed")).unwrap();
    assert_eq!(cold.trim(), "0");
    assert_eq!(stage.driver("0000:06:00.0").as_deref(), Some("e1000e"));
    assert!(stage.broker.leases().is_empty(), "{:?}", stage.broker.leases());
    let writes = stage.sim.journal().len();
    let again = stage.apply();
    assert!(texts(&again).is_empty(), "{:?}", texts(&again));
    assert_eq!(stage.sim.journal().len(), writes, "applying again wrote something");
    assert!(again.units.iter().all(UnitRecord::is_as_wanted), "{:?}", standings(&again));
}

#[test]
fn a_card_that_takes_its_time_keeps_no_other_waiting_but_its_own_functions() {
    let stage = start(LAB, POLICY);
    let planned = stage.broker.plan_policy().unwrap();
    stage.sim.arm(Fault {
        on: Operation::NumVfs,
        device: Some(at(NIC)),
        nth: 1,
        effect: Effect::BlockForever,
    });
    let applied = std::thread::scope(|scope| {
        let applied = scope.spawn(|| stage.apply());
        assert!(eventually(|| stage.driver(GPU).as_deref() == Some("vfio-pci")), "it waited");
        assert!(stage.sim.is_blocked(), "the network card was done first");
        assert!(!stage.sim.function(at(VF)).exists());
        stage.sim.let_go();
        applied.join().unwrap()
    });
    let order = |record: &PolicyRecord| -> Vec<String> {
        record.units.iter().map(|unit| unit.device.clone()).collect()
    };
    assert_eq!(order(&applied), order(&planned));
    assert!(applied.units.iter().all(UnitRecord::is_as_wanted), "{:?}", standings(&applied));
    assert_eq!(stage.driver(VF).as_deref(), Some("vfio-pci"));
}

#[test]
fn what_is_on_vfio_by_the_policy_is_leased_and_goes_back_there() {
    let stage = start(LAB, POLICY);
    stage.apply();
    let lease = attach(&stage.broker, GPU, "alice").unwrap();
    let record = stage.broker.device(at(GPU)).unwrap();
    assert_eq!((record.pool.as_deref(), record.external), (Some("gpus"), None));
    stage.broker.release(&lease.id, &ReleaseOptions::default()).unwrap();
    assert_eq!(stage.driver(GPU).as_deref(), Some("vfio-pci"));
    let options = AttachOptions { vf_of: Some(NIC.into()), ..AttachOptions::default() };
    stage.broker.attach(&[], "alice", &options, Asker::default()).unwrap();
}

#[test]
fn what_is_leased_waits_for_the_end_of_the_lease() {
    let stage = start(LAB, "");
    let lease = attach(&stage.broker, GPU, "alice").unwrap();
    let before = stage.binding(GPU);
    stage
        .reload(&POLICY.replace(
            "mode = 'passthrough'\nselect = [{ vendor",
            "mode = 'host'\nselect = [{ vendor",
        ))
        .unwrap();
    let applied = stage.apply();
    let gpu = applied.units.iter().find(|unit| unit.device == GPU).unwrap();
    assert_eq!((gpu.standing.as_str(), gpu.reasons[0].code.as_str()), ("waits", "leased"));
    assert!(gpu.now.contains("alice") && gpu.reasons[0].text.contains(&lease.id));
    assert_eq!(stage.binding(GPU), before, "a leased device was disturbed");
    stage.reload(POLICY).unwrap();
    let d3cold = stage.apply();
    assert_eq!(standings(&d3cold).iter().find(|s| s.0 == GPU).unwrap().1, "waits");
    stage.broker.release(&lease.id, &ReleaseOptions::default()).unwrap();
    let done = || stage.driver(GPU).as_deref() == Some("vfio-pci");
    assert!(eventually(done), "what waited was not done: {:?}", stage.unit(GPU));
}

#[test]
fn files_that_are_wrong_leave_what_is_in_force() {
    let stage = start(LAB, POLICY);
    stage.apply();
    let bad = POLICY.replace("d3cold", "d4cold");
    let error = stage.reload(&bad).unwrap_err();
    assert_eq!(error.kind(), Some(ErrorKind::InvalidArgument));
    for words in ["vfiod.toml:5:1", "did you mean 'd3cold'?", "stays"] {
        assert!(error.to_string().contains(words), "{error}");
    }
    let plan = stage.broker.plan_policy().unwrap();
    assert!(plan.error.is_some_and(|error| error.contains("d4cold")));
    assert!(plan.units.iter().all(UnitRecord::is_as_wanted));
    let twice = POLICY.replace("driver = 'e1000e'", "class = 'gpu'");
    let error = stage.reload(&twice).unwrap_err().to_string();
    assert!(
        error.contains("'gpus'") && error.contains("'wired'") && error.contains(GPU),
        "{error}"
    );
    assert!(stage.reload(POLICY).unwrap().error.is_none());
}

#[test]
fn a_broken_policy_on_start_is_none_and_is_told_of() {
    let stage = start(LAB, "[pool.x]\nmode = 'hots'\n");
    let plan = stage.broker.plan_policy().unwrap();
    assert!(plan.units.is_empty() && plan.error.unwrap().contains("did you mean 'host'?"));
    attach(&stage.broker, GPU, "alice").unwrap();
}

#[test]
fn drift_is_shown_and_corrected_where_the_pool_says_so() {
    let stage = start(LAB, POLICY);
    stage.apply();
    let take = || {
        let dir = stage.sim.function(at(GPU));
        std::fs::write(dir.join("driver/unbind"), GPU).unwrap();
        std::fs::write(dir.join("driver_override"), "\n").unwrap();
        std::fs::write(stage.sim.root().join("sys/bus/pci/drivers_probe"), GPU).unwrap();
        stage.broker.resynchronise();
        assert_eq!(stage.driver(GPU).as_deref(), Some("bochs-drm"));
    };
    take();
    stage.broker.correct_drift();
    let unit = stage.unit(GPU);
    assert_eq!((unit.drifted, unit.standing.as_str()), (Some(true), "to-do"));
    stage.reload(&POLICY.replace("d3cold = false", "correct-drift = true")).unwrap();
    stage.broker.correct_drift();
    assert_eq!(stage.driver(GPU).as_deref(), Some("bochs-drm"), "never as wanted, so no drift");
    stage.apply();
    take();
    stage.broker.correct_drift();
    assert_eq!(stage.driver(GPU).as_deref(), Some("vfio-pci"));
    take();
    stage.sim.arm(Fault {
        on: Operation::Bind,
        device: Some(at(GPU)),
        nth: 1,
        effect: Effect::Errno(Errno::EIO),
    });
    stage.broker.correct_drift();
    stage.broker.correct_drift();
    assert_eq!(stage.driver(GPU).as_deref(), Some("bochs-drm"), "it was to be given up");
}

#[test]
fn what_fails_is_as_it_was_and_the_rest_is_done() {
    let stage = start(LAB, POLICY);
    let (before, on) = (stage.binding(AUDIO), Operation::Bind);
    let (device, effect) = (Some(at(AUDIO)), Effect::Errno(Errno::EIO));
    stage.sim.arm(Fault { on, device, nth: 1, effect });
    let applied = stage.apply();
    let gpu = applied.units.iter().find(|unit| unit.device == GPU).unwrap();
    assert_eq!(gpu.standing, "failed");
    assert!(gpu.failure.as_ref().is_some_and(|why| why.contains(AUDIO)), "{gpu:?}");
    assert_eq!(stage.binding(AUDIO), before);
    assert_eq!(stage.driver(VF).as_deref(), Some("vfio-pci"));
    assert!(stage.broker.leases().is_empty(), "{:?}", stage.broker.leases());
}

#[test]
fn what_stays_with_the_host_is_not_leased() {
    let policy = "
[pool.a]
mode = 'host'
select = [{ class = 'gpu' }]
[pool.b]
mode = 'on-lease'
select = [{ driver = 'e1000e' }]
keep-for-host = 2
";
    let stage = start(LAB, policy);
    let refused = |device: &str| {
        let failure = attach(&stage.broker, device, "alice").unwrap_err();
        assert_eq!(failure.kind(), Some(ErrorKind::NotAuthorized), "{failure}");
        failure.to_string()
    };
    assert!(refused(GPU).contains("is the host's (pool 'a')"));
    attach(&stage.broker, "0000:06:00.0", "alice").unwrap();
    assert!(refused("0000:07:00.0").contains("2 are kept"), "{}", refused("0000:07:00.0"));
    assert!(refused(AUDIO).contains("pool 'a'"), "a companion is not the host's");
}

#[test]
fn isolation_that_is_too_weak_for_the_pool_is_refused_with_the_grade() {
    let host = LAB.replace("cpu = ", "interrupt_remapping = false\ncpu = ");
    let stage = start(&host, POLICY);
    let unit = stage.unit(GPU);
    assert_eq!((unit.standing.as_str(), unit.reasons[0].code.as_str()), ("blocked", "isolation"));
    let failure = attach(&stage.broker, GPU, "alice").unwrap_err();
    assert_eq!(failure.kind(), Some(ErrorKind::NotViable));
    assert!(failure.to_string().contains("pool 'gpus' demands 'full'"), "{failure}");
    let weaker = POLICY.replace("d3cold = false", "isolation = 'no-interrupt-remapping'");
    stage.reload(&weaker).unwrap();
    attach(&stage.broker, GPU, "alice").unwrap();
}

#[test]
fn a_pool_is_leased_from_by_those_it_names_and_for_its_tenants() {
    let policy = POLICY.replace("d3cold = false", "groups = ['vmops']\ntenants = ['ops-*']");
    let stage = start(LAB, &policy);
    stage.apply();
    let ask = |pools: Pools, tenant: &str| {
        let options = AttachOptions { pool: Some("gpus".into()), ..AttachOptions::default() };
        let asker = Asker { user: 1000, pools, ..Asker::default() };
        stage.broker.attach(&[], tenant, &options, asker)
    };
    let named = |name: &str| Pools::Named([name.to_owned()].into());
    let refused = ask(named("vnics"), "ops-7").unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::NotAuthorized));
    assert!(refused.to_string().contains("pool 'gpus'"), "{refused}");
    let refused = ask(Pools::All, "alice").unwrap_err();
    assert!(refused.to_string().contains("it is for ops-*"), "{refused}");
    let lease = ask(named("gpus"), "ops-7").unwrap();
    let devices: Vec<String> = lease.devices.keys().map(ToString::to_string).collect();
    assert_eq!(devices, [GPU, AUDIO]);
    let refused = ask(named("gpus"), "ops-8").unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::Busy));
    assert!(refused.to_string().contains("has 0 devices free"), "{refused}");
    let options = AttachOptions { pool: Some("gpu".into()), ..AttachOptions::default() };
    let missing = stage.broker.attach(&[], "ops-7", &options, Asker::default()).unwrap_err();
    assert!(missing.to_string().contains("there are gpus, vnics, wired"), "{missing}");
}

#[test]
fn devices_that_are_asked_for_from_a_pool_are_of_that_pool() {
    let stage = start(LAB, POLICY);
    stage.apply();
    let ask = |names: &[&str], count: Option<u32>| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let options =
            AttachOptions { pool: Some("gpus".into()), count, ..AttachOptions::default() };
        let pools = stage.broker.pools_of(&names, &options);
        (pools, stage.broker.attach(&names, "alice", &options, Asker::default()))
    };
    // Nobody gets at others by the name of a pool that is his.
    for (other, of) in [("0000:06:00.0", "is in pool 'wired', not in 'gpus'"), (DISK, "in no pool")]
    {
        let (pools, refused) = ask(&[GPU, other], None);
        assert!(pools.len() == 2 && pools.contains("gpus"), "{pools:?}");
        let refused = refused.unwrap_err();
        assert_eq!(refused.kind(), Some(ErrorKind::InvalidArgument), "{refused}");
        assert!(refused.to_string().contains(of), "{refused}");
    }
    let (_, refused) = ask(&["mtty/mtty-2"], None);
    assert!(refused.unwrap_err().to_string().contains("of no function"));
    let (_, refused) = ask(&[GPU], Some(1));
    assert!(refused.unwrap_err().to_string().contains("not both"));
    let (pools, lease) = ask(&[GPU], None);
    assert_eq!(pools, ["gpus".to_owned()].into());
    // It and what goes with it, and no other of the pool beside it.
    let devices: Vec<String> = lease.unwrap().devices.keys().map(ToString::to_string).collect();
    assert_eq!(devices, [GPU, AUDIO]);
}

/// Two cards of one kind, told apart by serial number.
fn cards(first: u64, second: u64) -> String {
    let numbered = |text: &str, id: &str, serial: u64| {
        let line = format!("address = \"{id}\"\n");
        assert!(text.contains(&line));
        text.replace(&line, &format!("{line}serial = {serial}\n"))
    };
    let host = numbered(LAB, "0000:06:00.0", first);
    numbered(&host, "0000:07:00.0", second)
}

const BY_SERIAL: &str = "
[pool.guest]
mode = 'passthrough'
select = [{ serial = '00-00-00-00-00-00-00-07' }]
[pool.host]
mode = 'host'
select = [{ serial = '00-00-00-00-00-00-00-08' }]
";

#[test]
fn a_serial_number_is_followed_and_an_address_is_not_trusted() {
    let (here, there) = ("0000:06:00.0", "0000:07:00.0");
    let stage = start(&cards(7, 8), BY_SERIAL);
    stage.apply();
    assert_eq!(stage.driver(here).as_deref(), Some("vfio-pci"));
    assert_eq!(stage.driver(there).as_deref(), Some("e1000e"));
    let Stage { records, .. } = stage;
    let stage = with(&cards(8, 7), BY_SERIAL, records);
    stage.apply();
    assert_eq!(stage.driver(here).as_deref(), Some("e1000e"));
    assert_eq!(stage.driver(there).as_deref(), Some("vfio-pci"));

    let by_address = "[pool.guest]\nmode = 'passthrough'\nselect = [{ address = '06:00.0' }]\n";
    let stage = start(&cards(7, 8), by_address);
    stage.apply();
    assert_eq!(stage.driver(here).as_deref(), Some("vfio-pci"));
    let Stage { records, .. } = stage;
    let stage = with(&cards(8, 7), by_address, records);
    let applied = stage.apply();
    assert_eq!(stage.driver(here).as_deref(), Some("e1000e"), "another card was taken for it");
    let unit = &applied.units[0];
    assert_eq!(
        (unit.standing.as_str(), unit.reasons[0].code.as_str()),
        ("blocked", "another-device")
    );
    let boot = ApplyOptions { boot: true, ..ApplyOptions::default() };
    let booted = stage.broker.apply_policy(&boot, 0).unwrap();
    assert_eq!(booted.units[0].lost_to, None, "no race was lost for what is not meant");
    let accept = ApplyOptions { accept: true, ..ApplyOptions::default() };
    stage.broker.apply_policy(&accept, 0).unwrap();
    assert_eq!(stage.driver(here).as_deref(), Some("vfio-pci"));
    let Stage { records, .. } = stage;
    let gone = LAB
        .replace("address = \"0000:06:00.0\"\n", "address = \"0000:06:00.0\"\npresent = false\n");
    let stage = with(&gone, by_address, records);
    let applied = stage.apply();
    assert!(applied.units.is_empty());
    assert!(applied.notes[0].contains("no device here has address 0000:06:00.0"), "{applied:?}");
}

#[test]
fn rules_say_for_the_next_boot_what_the_policy_says() {
    let stage = start(LAB, POLICY);
    let rules = || std::fs::read_to_string(stage.records.path().join("rules")).unwrap_or_default();
    for line in [
        r#"ATTR{vendor}=="0x1234", ATTR{class}=="0x03*", ENV{VFIOD_POOL}="gpus""#,
        r#"ATTR{driver_override}="$env{VFIOD_DRIVER}""#,
        r#"ACTION!="add", GOTO="vfiod_end""#,
    ] {
        assert!(rules().contains(line), "{line} is not in\n{}", rules());
    }
    assert!(!rules().contains("wired") && !rules().contains("vnics"), "{}", rules());
    let by_address = "[pool.a]\nmode = 'passthrough'\nselect = [{ address = '06:00.0' }]\n";
    stage.reload(by_address).unwrap();
    assert!(!rules().contains("ATTR{device}"), "{}", rules());
    stage.apply();
    let known = r#"ATTR{vendor}=="0x8086", ATTR{device}=="0x10d3""#;
    assert!(rules().contains(known), "{}", rules());
    assert!(rules().contains(r#"/0000:06:00.0""#) && rules().contains("DEVPATH"), "{}", rules());
    stage.reload("").unwrap();
    assert!(rules().is_empty(), "{}", rules());
    // No rule reads a serial number, and the card there may be another one by the next boot.
    let stage = start(&cards(7, 8), by_address);
    stage.apply();
    let rules = std::fs::read_to_string(stage.records.path().join("rules")).unwrap();
    assert!(rules.contains("pool a: asked for") && !rules.contains("KERNEL"), "{rules}");
}

#[test]
fn every_shipped_example_can_be_planned_on_a_host_it_is_for() {
    let example = |name: &str| {
        let path = format!("{}/../docs/policy/{name}.toml", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(path).unwrap()
    };
    for (name, host, units) in
        [("workstation", WORKSTATION, 2), ("gpu-server", HGX8, 33), ("network", LAB, 6)]
    {
        let text = example(name);
        Policy::parse(&[Source { name: name.into(), text: text.clone() }]).unwrap();
        let stage = start(host, &text);
        let plan = stage.broker.plan_policy().unwrap();
        assert_eq!(plan.units.len(), units, "{name}: {:?} {:?}", standings(&plan), plan.notes);
    }
}
