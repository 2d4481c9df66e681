//! What a tenant may have left in devices is gone before others get them, or nobody gets them.

use std::path::Path;
use std::sync::Arc;

use libvfio::address::PciAddress;
use libvfio::error::ErrorKind;
use libvfio::step::Step;
use nix::errno::Errno;
use vfiod::broker::{Asker, Broker};
use vfiod::history::Event;
use vfiod::lease::State;
use vfiod::request::{AttachOptions, HistoryOptions, ReleaseOptions};
use vfiod_tests::sim::{Damage, Described, Effect, Fault, Operation, Sim};
use vfiod_tests::trial::{self, Setting};

/// The lab's machine.
const LAB: &str = include_str!("../hosts/lab.toml");
/// The lab's display, whose memory can be cleared, and its audio function: one bus, reset together.
const GPU: &str = "0000:03:00.0";
const AUDIO: &str = "0000:03:00.1";
/// A function on the root bus, without any way to reset it.
const BARE: &str = "0000:00:0a.0";
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

/// A worker that hangs at a device holds nobody up but whoever waits for that device, which nobody
/// else gets; and when it has done it after all, the device is as clean as any.
#[test]
fn a_cleaning_that_hangs_wedges_its_lease_alone() {
    for (device, on, kind) in [
        (GPU, Operation::Scrub, "scrub"),
        (GPU, Operation::Reset, "reset"),
        (NIC, Operation::Reset, "reset"),
    ] {
        let case = format!("{on:?} of {device}");
        let (sim, dir) = (host(LAB), tempfile::tempdir().unwrap());
        let setting = Setting::new(env!("CARGO_BIN_EXE_trial"), sim.root(), dir.path());
        let broker = Setting { deadlines: vec![format!("{kind}=1")], ..setting }.start().unwrap();
        let lease = trial::attach(&broker, device, "alice").unwrap();
        arm(&sim, on, device, Effect::BlockForever);
        let failure = release(&broker, &lease.id).expect_err(&case);
        assert_eq!(failure.kind(), Some(ErrorKind::Wedged), "{case}: {failure}");
        let refused = trial::attach(&broker, device, "bob").expect_err(&case);
        assert_eq!(refused.kind(), Some(ErrorKind::Wedged), "{case}: {refused}");
        let other = if device == NIC { GPU } else { NIC };
        let others = trial::attach(&broker, other, "bob").unwrap();
        release(&broker, &others.id).unwrap();
        sim.let_go();
        assert!(trial::eventually(|| broker.leases().is_empty()), "{case}: {:?}", broker.leases());
        assert!(trial::settled(&broker) && broker.quarantines().is_empty(), "{case}");
        if device == GPU {
            assert!(!soiled(&sim).contains(GPU), "{case}: something is left");
        }
        trial::attach(&broker, device, "bob").unwrap();
    }
}

/// Wherever the daemon is killed while it takes a device back, the next one ends what it was at, and
/// the history says how before anybody else gets the device.
#[test]
fn wherever_the_daemon_is_killed_in_a_release_the_next_tenant_gets_a_clean_device() {
    let (sim, dir) = (host(LAB), tempfile::tempdir().unwrap());
    let trial = |what: &[&str], crash: u32| {
        let mut broker = std::process::Command::new(env!("CARGO_BIN_EXE_trial"));
        broker.arg(sim.root()).arg(dir.path()).args(what);
        broker.env("VFIOD_CRASH_AT", crash.to_string()).stderr(std::process::Stdio::null());
        broker.status().unwrap()
    };
    let mut killed = 0;
    for crash in 1.. {
        assert!(trial(&["attach", GPU, "alice"], 0).success(), "before kill {crash}");
        let ended = trial(&["release", GPU], crash);
        if ended.success() {
            break;
        }
        assert_eq!(ended.code(), None, "kill {crash}: it was not killed");
        killed += 1;
        assert!(trial(&["recover"], 0).success(), "after kill {crash}");
        // One that had begun ends as failed; one that had not is still the tenant's.
        assert!(trial(&["release", GPU], 0).success(), "after kill {crash}");
        assert!(!soiled(&sim).contains(GPU), "kill {crash}: something is left");
    }
    assert!(killed > 30, "killed at {killed} places only");
    let history = vfiod::history::History::open(&dir.path().join("state"));
    assert_eq!(history.check().unwrap().faults, [""; 0]);
    let entries = history.read(usize::MAX, |_| true).unwrap();
    let audit = vfiod::history::Audit::of(&entries);
    assert_eq!((audit.faults(), audit.handed()), (&[][..], 2 * (killed + 1)));
}

#[test]
fn a_device_that_reports_uncorrectable_errors_goes_to_nobody_else_and_it_is_known_why() {
    for (fatal, word) in [(true, "2 CmpltAbrt (fatal)"), (false, "2 CmpltAbrt (non-fatal)")] {
        let (sim, dir) = (host(LAB), tempfile::tempdir().unwrap());
        let broker = daemon(&sim, dir.path());
        // What was before a lease is nothing of its tenant's.
        sim.report_error(at(NIC), fatal).unwrap();
        trial::attach(&broker, NIC, "alice").unwrap();
        drop(broker);
        let broker = daemon(&sim, dir.path());
        release(&broker, NIC).unwrap();
        assert!(broker.quarantines().is_empty());
        trial::attach(&broker, NIC, "alice").unwrap();
        sim.report_error(at(NIC), fatal).unwrap();
        sim.report_error(at(NIC), fatal).unwrap();
        drop(broker);
        let broker = daemon(&sim, dir.path());
        release(&broker, NIC).unwrap();
        let reason = broker.quarantine_of(at(NIC)).expect("it is in quarantine");
        assert!(reason.contains(word) && reason.contains("alice"), "{reason}");
        let refused = trial::attach(&broker, NIC, "bob").unwrap_err();
        assert_eq!(refused.kind(), Some(ErrorKind::Quarantined), "{refused}");
        let history = broker.history(&HistoryOptions { last: 9, ..Default::default() }).unwrap();
        let told = |event| history.iter().any(|e| e.event == event && e.text.contains(word));
        assert!(told(Event::Quarantined) && told(Event::Released), "{history:#?}");
        assert_eq!(broker.check_history().unwrap().faults, [""; 0]);
        assert!(broker.clear_quarantine(NIC, 0).unwrap());
        trial::attach(&broker, NIC, "bob").unwrap();
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

/// Leases it to a tenant and ends that; what it was refused for.
fn has_had(broker: &Arc<Broker>, tenant: &str) -> Result<(), String> {
    trial::attach(broker, BARE, tenant).map_err(|failure| failure.to_string())?;
    release(broker, BARE).map(drop).map_err(|failure| failure.to_string())
}

#[test]
fn what_cannot_be_reset_goes_to_nobody_but_the_same_tenant() {
    let (sim, dir) = (host(LAB), tempfile::tempdir().unwrap());
    let broker = daemon(&sim, dir.path());
    let plan = |tenant: &str| {
        let options = AttachOptions { tenant: Some(tenant.into()), ..AttachOptions::default() };
        broker.plan(&[BARE.to_owned()], &options, 0).unwrap()
    };
    let warned = plan("alice").warnings.join("; ");
    assert!(warned.contains("only the same tenant"), "{warned}");
    has_had(&broker, "alice").unwrap();
    let refused = trial::attach(&broker, BARE, "bob").unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::Quarantined));
    let refused = refused.to_string();
    assert!(refused.contains("only 'alice' may have it") && refused.contains("clear"), "{refused}");
    // What is shown is what happens.
    assert!(plan("alice").possible && !plan("bob").possible);
    has_had(&broker, "alice").unwrap();
    drop(broker);
    let broker = daemon(&sim, dir.path());
    has_had(&broker, "bob").unwrap_err();
    let [kept] = &broker.quarantines()[..] else { panic!("{:?}", broker.quarantines()) };
    assert_eq!((kept.address.as_str(), kept.but_for.as_deref()), (BARE, Some("alice")));
    has_had(&broker, "alice").unwrap();
    // An administrator says that nothing is left, having cycled its power.
    broker.clear_quarantine(BARE, 0).unwrap();
    has_had(&broker, "bob").unwrap();
    has_had(&broker, "alice").unwrap_err();
    // Who distrusts it altogether is not overruled by its tenant's next end.
    broker.quarantine(BARE, "it smokes", 0).unwrap();
    assert!(has_had(&broker, "bob").unwrap_err().contains("smokes"));
}

#[test]
fn whose_lease_is_under_way_when_it_is_distrusted_does_not_get_it_back() {
    let (sim, dir) = (host(LAB), tempfile::tempdir().unwrap());
    let broker = daemon(&sim, dir.path());
    trial::attach(&broker, BARE, "alice").unwrap();
    broker.quarantine(BARE, "it smokes", 0).unwrap();
    release(&broker, BARE).unwrap();
    assert!(has_had(&broker, "alice").unwrap_err().contains("smokes"));
}

#[test]
fn who_takes_the_risk_has_it_on_record() {
    let (sim, dir) = (host(LAB), tempfile::tempdir().unwrap());
    let broker = daemon(&sim, dir.path());
    trial::attach(&broker, BARE, "alice").unwrap();
    broker.release(BARE, &ReleaseOptions { no_reset: true, wait: false }).unwrap();
    assert!(broker.quarantines().is_empty());
    let select = format!("select = [{{ address = '{BARE}' }}]");
    let pool = format!("[pool.a]\nmode = 'on-lease'\n{select}\nreset = 'if-possible'\n");
    trial::say_policy(dir.path(), &pool).unwrap();
    broker.reload_policy().unwrap();
    for tenant in ["bob", "carol"] {
        has_had(&broker, tenant).unwrap();
    }
    assert!(broker.quarantines().is_empty());
    let entries = broker.history(&HistoryOptions::default()).unwrap();
    let weaker = |entry: &vfiod::history::Entry| entry.cleaned.first()?.weaker.clone();
    let weaker: Vec<String> = entries.iter().filter_map(weaker).collect();
    assert_eq!(weaker.len(), 3, "{weaker:?}");
    assert!(weaker[0].contains("by request") && weaker[2].contains("goes to anybody"));
}

/// A card behind a switch, which can be made another.
const CARD: &str = "0000:06:00.0";

/// The lab's machine with another card there, of these ids and reset methods.
fn with_card(id: &str, methods: &str) -> Sim {
    let (before, rest) = LAB.split_once(&format!("address = \"{CARD}\"")).unwrap();
    let card = rest.replacen("8086:10d3", id, 1);
    let (own, after) = card.split_once("reset = [\"bus\"]").unwrap();
    host(&format!("{before}address = \"{CARD}\"{own}reset = {methods}{after}"))
}

fn attribute(sim: &Sim, device: &str, name: &str) -> String {
    std::fs::read_to_string(sim.function(at(device)).join(name)).unwrap().trim().to_owned()
}

#[test]
fn what_a_device_does_not_survive_is_not_done_to_it_and_told() {
    let (sim, dir) = (with_card("8086:1503", "[\"flr\", \"bus\"]"), tempfile::tempdir().unwrap());
    let broker = daemon(&sim, dir.path());
    let plan = broker.plan(&[CARD.to_owned()], &AttachOptions::default(), 0).unwrap();
    let warned = plan.warnings.join("; ");
    assert!(warned.contains("may hang in a function level reset (flr) (Linux"), "{warned}");
    let lease = trial::attach(&broker, CARD, "alice").unwrap();
    assert_eq!(lease.record().cleaning[0].reset, "bus");
    assert_eq!(attribute(&sim, CARD, "reset_method"), "bus");
    release(&broker, CARD).unwrap();
    assert_eq!(attribute(&sim, CARD, "reset_method"), "flr bus");
    assert_eq!(writes(&sim, &format!("{CARD}/reset")), 1);
    // What others have published is told, and that nobody here has seen it.
    let sim = with_card("1002:67df", "[\"bus\"]");
    let broker = daemon(&sim, tempfile::tempdir().unwrap().path());
    let plan = broker.plan(&[CARD.to_owned()], &AttachOptions::default(), 0).unwrap();
    let warned = plan.warnings.join("; ");
    assert!(warned.contains("vendor-reset") && warned.contains("not verified"), "{warned}");
}

#[test]
fn a_device_that_survives_none_of_its_resets_is_not_reset() {
    let (sim, dir) = (with_card("104c:b005", "[\"bus\"]"), tempfile::tempdir().unwrap());
    let broker = daemon(&sim, dir.path());
    let lease = trial::attach(&broker, CARD, "alice").unwrap();
    assert_eq!(lease.record().cleaning[0].reset, "impossible");
    release(&broker, CARD).unwrap();
    assert_eq!(writes(&sim, "/reset") + writes(&sim, "hot-reset"), 0);
    let refused = trial::attach(&broker, CARD, "bob").unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::Quarantined), "{refused}");
}

#[test]
fn what_may_lose_its_power_when_idle_keeps_it_while_it_is_leased() {
    let (sim, dir) = (host(LAB), tempfile::tempdir().unwrap());
    let pool = |power: &str| {
        let select = format!("select = [{{ address = '{NIC}' }}]");
        let pool = format!("[pool.a]\nmode = 'passthrough'\n{select}\nd3cold = {power}\n");
        trial::say_policy(dir.path(), &pool).unwrap();
    };
    pool("true");
    std::fs::write(sim.function(at(NIC)).join("d3cold_allowed"), "0").unwrap();
    let broker = daemon(&sim, dir.path());
    let apply = || broker.apply_policy(&vfiod::request::ApplyOptions::default(), 0).unwrap();
    apply();
    let power = || attribute(&sim, NIC, "d3cold_allowed");
    assert_eq!(power(), "1", "between leases");
    for _ in 0..2 {
        let lease = trial::attach(&broker, NIC, "alice").unwrap();
        assert_eq!(power(), "0", "while it is leased");
        let unit = broker.plan_policy().unwrap().units.remove(0);
        assert_eq!(unit.standing, "as-wanted", "{unit:?}");
        release(&broker, &lease.id).unwrap();
        assert_eq!(power(), "1", "between leases");
    }
    // A daemon that is killed beside a lease finds the way back on record.
    let lease = trial::attach(&broker, NIC, "alice").unwrap();
    drop(broker);
    let broker = daemon(&sim, dir.path());
    release(&broker, &lease.id).unwrap();
    assert_eq!(power(), "1");
    // What does not come back from it never loses it.
    pool("false");
    broker.reload_policy().unwrap();
    broker.apply_policy(&vfiod::request::ApplyOptions::default(), 0).unwrap();
    assert_eq!(power(), "0");
    trial::attach(&broker, NIC, "alice").unwrap();
    release(&broker, NIC).unwrap();
    assert_eq!(power(), "0");
}
