//! `vfioctl run` and `args` with the real programs on a simulated host, whose monitor is a shell; and the
//! hook that libvirt calls.

use std::io::Write;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use vfiod_tests::session::{LONG, Running, Session, program};

const GPU: &str = "0000:01:00.0";
/// Prints its arguments, then what it has open, and stays.
const MONITOR: &str = "echo \"args $*\"; ls -l /proc/$$/fd; echo open; exec sleep 600";
/// Devices of a libvirt domain, on another host.
const CARDS: [&str; 2] = ["0000:23:00.0", "0000:43:00.0"];
const UUID: &str = "6b3c7d5e-0d3b-4e0f-9b53-1a2c3d4e5f60";

fn launch(session: &Session) -> Command {
    let mut command = program("vfioctl");
    command.env("VFIOCTL_BUS", &session.address).args(["run", "--device", GPU, "--vmm", "qemu"]);
    command.args(["--tenant", "alice", "--lock", "64K", "--"]);
    command.args(["sh", "-c", MONITOR, "monitor", "-m", "4G", "{vfio}", "-nographic"]);
    command
}

fn leases(session: &Session) -> Value {
    serde_json::from_str(&session.done("--json leases").0).unwrap()
}

fn all_back(session: &Session) {
    let started = Instant::now();
    while leases(session) != json!([]) {
        assert!(started.elapsed() < LONG, "{}", leases(session));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(session.done(&format!("show {GPU}")).0.contains("nvidia"));
}

fn end(child: &mut Child, signal: Signal) {
    kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
    child.wait().unwrap();
}

#[test]
fn a_monitor_gets_its_devices_and_its_end_gives_them_back() {
    let session = Session::start("workstation");
    let mut monitor = Running::start(&mut launch(&session), false);
    let arguments = monitor.line_with("args");
    let by_group = "-device vfio-pci,host=0000:01:00.0 -device vfio-pci,host=0000:01:00.1";
    let by_descriptor = "-object iommufd,id=vfiod,fd=";
    assert!(arguments.starts_with("args -m 4G -") && arguments.ends_with(" -nographic"));
    let lease = &leases(&session)[0];
    assert_eq!(lease["bound"], format!("process {}", monitor.child.id()));
    match lease["interface"].as_str().unwrap() {
        "group" => assert!(arguments.contains(by_group), "{arguments}"),
        _ => assert!(arguments.contains(by_descriptor), "{arguments}"),
    }
    let id = lease["id"].as_str().unwrap();
    let (printed, _) = session.done(&format!("args {id} --vmm crosvm"));
    let path = "--vfio /sys/bus/pci/devices";
    assert_eq!(printed, format!("{path}/0000:01:00.0 {path}/0000:01:00.1\n"));
    let (printed, _) = session.done(&format!("--json args {GPU} --vmm cloud-hypervisor"));
    let words: Vec<String> = serde_json::from_str(&printed).unwrap();
    assert_eq!((words[0].as_str(), words.len()), ("--device", 3));
    end(&mut monitor.child, Signal::SIGKILL);
    all_back(&session);
}

#[test]
fn with_iommufd_it_inherits_its_devices_and_nothing_else() {
    let host = vfiod_tests::sim::WORKSTATION.replace("[kernel]\n", "[kernel]\ncdev = true\n");
    assert!(host.contains("cdev = true"));
    let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    std::fs::write(file.path(), host).unwrap();
    let session = Session::start(file.path().to_str().unwrap());
    let mut monitor = Running::start(&mut launch(&session), false);
    let arguments = monitor.line_with("args");
    assert!(arguments.contains("-object iommufd,id=vfiod,fd="), "{arguments}");
    let number = |text: &str| -> u32 { text.parse().unwrap() };
    let named: Vec<u32> = arguments
        .split([' ', ','])
        .filter_map(|word| word.strip_prefix("fd=").map(number))
        .collect();
    let mut open = Vec::new();
    loop {
        let line = monitor.line_with("");
        if line == "open" {
            break;
        }
        let Some((place, target)) = line.split_once(" -> ") else { continue };
        let place = number(place.rsplit(' ').next().unwrap());
        // Whoever runs the test may have others open, but no connection to this bus.
        assert!(place <= 2 || !target.starts_with("socket:"), "{line}");
        if target.contains("/dev/vfio/devices/") || target.ends_with("/dev/iommu") {
            open.push(place);
        }
    }
    assert_eq!((open.len(), named.len()), (3, 3), "{open:?} {named:?}");
    assert!(named.iter().all(|descriptor| open.contains(descriptor)));
    end(&mut monitor.child, Signal::SIGTERM);
    all_back(&session);
}

#[test]
fn a_mediated_device_is_made_for_its_monitor_and_gone_with_it() {
    for cdev in [false, true] {
        let host = vfiod_tests::sim::MEDIATED;
        let host = if cdev {
            host.replace("[kernel]\n", "[kernel]\ncdev = true\n")
        } else {
            host.to_owned()
        };
        let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        std::fs::write(file.path(), host).unwrap();
        let session = Session::start(file.path().to_str().unwrap());
        let run = ["run", "--device", "mtty/mtty-2", "--vmm", "qemu", "--tenant", "alice"];
        let mut command = program("vfioctl");
        command.env("VFIOCTL_BUS", &session.address).args(run).args(["--lock", "64K", "--"]);
        command.args(["sh", "-c", MONITOR, "monitor", "{vfio}"]);
        let mut monitor = Running::start(&mut command, false);
        let arguments = monitor.line_with("args");
        let lease = &leases(&session)[0];
        let uuid = lease["mediated"][0].as_str().unwrap();
        let place = format!("vfio-pci,sysfsdev=/sys/bus/mdev/devices/{uuid}");
        if cdev {
            assert_eq!(lease["interface"], "iommufd");
            assert!(arguments.contains(&format!("{place},fd=")), "{arguments}");
        } else {
            assert_eq!(lease["interface"], "group");
            assert_eq!(arguments, format!("args -device {place}"));
        }
        let (printed, _) = session.done(&format!("args {uuid} --vmm cloud-hypervisor"));
        assert_eq!(printed, format!("--device path=/sys/bus/mdev/devices/{uuid}\n"));
        end(&mut monitor.child, Signal::SIGKILL);
        let started = Instant::now();
        while leases(&session) != json!([]) {
            assert!(started.elapsed() < LONG, "{}", leases(&session));
            std::thread::sleep(Duration::from_millis(20));
        }
        let devices = session.root.join("sys/bus/mdev/devices");
        assert_eq!(std::fs::read_dir(devices).unwrap().count(), 0, "it is still there");
    }
}

#[test]
fn whoever_is_killed_before_gives_everything_back_too() {
    let session = Session::start("workstation");
    for milliseconds in [0, 5, 10, 20, 40, 80] {
        let mut command = launch(&session);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        end(&mut child, Signal::SIGKILL);
        // A call under way is still carried out, and ends with whom it was for.
        std::thread::sleep(Duration::from_millis(300));
        all_back(&session);
    }
}

#[test]
fn what_cannot_be_run_is_refused_before_anything_changes() {
    let session = Session::start("workstation");
    let refused = |line: &str, status: i32, word: &str| {
        let output = session.vfioctl(line);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{line}: {said}");
        assert!(said.contains(word), "{line}: {said}");
        assert_eq!(leases(&session), json!([]));
    };
    let run = "run --device 10de:2684 --tenant alice";
    refused(&format!("{run} -- qemu-system-x86_64 -m 1G"), 2, "{vfio}");
    refused(&format!("{run} -- sh {{vfio}}"), 2, "--vmm qemu");
    refused(&format!("{run} -- qemu-kvm -m much {{vfio}}"), 2, "--lock");
    refused("args 01:00.0 --vmm qemu", 3, "vfioctl leases");
    let (shown, _) = session.done(&format!("{run} --dry-run -- qemu-kvm {{vfio}}"));
    assert!(shown.contains("node") || shown.contains("bind 0000:01:00.0"), "{shown}");
    assert!(shown.contains("qemu-kvm -device vfio-pci,host=0000:01:00.0"), "{shown}");
    assert_eq!(leases(&session), json!([]));
    // The lease was made for a command that is not there.
    let output = session.vfioctl(&format!("{run} --vmm qemu -- /nowhere {{vfio}}"));
    assert_eq!(output.status.code(), Some(3));
    all_back(&session);
}

fn hook(session: &Session, operation: &str, step: &str) -> Output {
    let hostdev = |address: &str| {
        let (bus, slot) = (&address[5..7], &address[8..10]);
        format!(
            "<hostdev mode='subsystem' type='pci'><source><address domain='0x0000' bus='0x{bus}' \
             slot='0x{slot}' function='0x0'/></source></hostdev>"
        )
    };
    let devices = CARDS.map(hostdev).concat();
    let xml =
        format!("<domain><name>web</name><uuid>{UUID}</uuid><devices>{devices}</devices></domain>");
    let mut command = program("vfioctl");
    command.env("VFIOCTL_BUS", &session.address);
    command.args(["libvirt-hook", "web", operation, step, "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(xml.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn done(session: &Session, operation: &str, step: &str) {
    let output = hook(session, operation, step);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{operation}: {said}");
    assert!(output.stdout.is_empty(), "{operation} prints what libvirt may take for a domain");
}

/// Which devices each lease has, and for whom.
fn leased(session: &Session) -> Vec<(Value, Value)> {
    let mut leases: Vec<Value> = serde_json::from_str(&session.done("--json leases").0).unwrap();
    leases.sort_by_key(|lease| lease["devices"].to_string());
    leases.into_iter().map(|lease| (lease["tenant"].clone(), lease["devices"].clone())).collect()
}

#[test]
fn a_domain_has_all_its_devices_for_its_time() {
    let session = Session::start("hgx8");
    done(&session, "prepare", "begin");
    assert_eq!(leased(&session), [(json!("web"), json!(CARDS))]);
    // libvirt may have been killed before the domain's end.
    done(&session, "prepare", "begin");
    done(&session, "started", "begin");
    assert_eq!(leased(&session), [(json!("web"), json!(CARDS))]);
    done(&session, "release", "end");
    done(&session, "release", "end");
    assert_eq!(leased(&session), []);
    let output = hook(&session, "started", "begin");
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains(&CARDS.join(", ")), "{said}");
}

#[test]
fn what_was_leased_for_it_before_is_used_and_what_is_anothers_is_not() {
    let session = Session::start("hgx8");
    session.done(&format!("attach {} --tenant alice --vm {UUID}", CARDS[0]));
    done(&session, "prepare", "begin");
    let alice = (json!("alice"), json!([CARDS[0]]));
    assert_eq!(leased(&session), [alice, (json!("web"), json!([CARDS[1]]))]);
    done(&session, "started", "begin");
    done(&session, "release", "end");
    assert_eq!(leased(&session), []);

    session.done(&format!("attach {} --tenant bob", CARDS[1]));
    let output = hook(&session, "prepare", "begin");
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(8), "{said}");
    assert!(said.contains(CARDS[1]) && said.contains("bob"), "{said}");
    assert_eq!(leased(&session), [(json!("bob"), json!([CARDS[1]]))], "all or none");
}
