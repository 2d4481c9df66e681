//! `vfiod --simulate` as anyone would try it: the real programs on a bus of their own.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vfiod_tests::binaries;

const GPU: &str = "0000:01:00.0";
const LONG: Duration = Duration::from_secs(20);

/// A program that ends with the test, and the lines it prints.
struct Running {
    child: Child,
    lines: Receiver<String>,
}

impl Running {
    /// Starts a program; its lines are those of standard output, or of standard error.
    fn start(command: &mut Command, errors: bool) -> Self {
        if errors {
            command.stderr(Stdio::piped());
        } else {
            command.stdout(Stdio::piped());
        }
        let name = command.get_program().to_owned();
        let mut child = command.spawn().unwrap_or_else(|error| {
            panic!("{} cannot be started ({error}); is its package installed?", name.display())
        });
        let (send, lines) = channel();
        let read = |from: Box<dyn std::io::Read + Send>| {
            std::thread::spawn(move || {
                for line in BufReader::new(from).lines().map_while(Result::ok) {
                    eprintln!("{line}");
                    let _ = send.send(line);
                }
            });
        };
        match (child.stdout.take(), child.stderr.take()) {
            (Some(out), _) => read(Box::new(out)),
            (_, Some(errors)) => read(Box::new(errors)),
            _ => unreachable!(),
        }
        Self { child, lines }
    }

    /// The next line that has this in it.
    fn line_with(&self, text: &str) -> String {
        let mut seen = Vec::new();
        loop {
            match self.lines.recv_timeout(LONG) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => seen.push(line),
                Err(error) => panic!("no line with '{text}' ({error}) among {seen:#?}"),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A bus, and vfiod with a simulated workstation on it.
struct Session {
    vfiod: Running,
    root: PathBuf,
    address: String,
    _bus: Running,
}

impl Session {
    fn start() -> Self {
        let mut bus = Command::new("dbus-daemon");
        let bus = Running::start(bus.args(["--session", "--nofork", "--print-address"]), false);
        let address = bus.line_with("unix:");
        let mut vfiod = program("vfiod");
        vfiod.args(["--simulate", "workstation", "--bus", &address]);
        let vfiod = Running::start(&mut vfiod, true);
        let simulated = vfiod.line_with("simulated");
        let root = simulated.split_once("root=").expect("the root is told").1;
        let root = root.split_whitespace().next().unwrap().into();
        vfiod.line_with("ready");
        Self { vfiod, root, address, _bus: bus }
    }

    fn vfioctl(&self, arguments: &str) -> Output {
        let mut vfioctl = program("vfioctl");
        vfioctl.args(arguments.split(' ')).env("VFIOCTL_BUS", &self.address);
        vfioctl.output().unwrap()
    }

    /// What a command that succeeds prints to standard output and standard error.
    fn done(&self, arguments: &str) -> (String, String) {
        let output = self.vfioctl(arguments);
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let (out, errors) = (text(output.stdout), text(output.stderr));
        assert!(output.status.success(), "vfioctl {arguments}: {errors}");
        (out, errors)
    }

    /// The simulator's process.
    fn simulator(&self) -> Pid {
        let id = self.vfiod.child.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
        let name = |pid: &&str| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
        let simulator = children.split_whitespace().find(|pid| name(pid).trim() == "vfiod-sim");
        Pid::from_raw(simulator.expect("a simulator").parse().unwrap())
    }

    /// Waits until nothing is left of the simulated host.
    fn gone(&self) {
        let started = Instant::now();
        while is_mounted(&self.root) || self.root.parent().unwrap().exists() {
            assert!(started.elapsed() < LONG, "{} is still there", self.root.display());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn program(name: &str) -> Command {
    Command::new(binaries::directory().join(name))
}

fn is_mounted(root: &Path) -> bool {
    std::fs::read_to_string("/proc/self/mounts").unwrap().contains(root.to_str().unwrap())
}

#[test]
fn a_simulated_host_is_listed_attached_and_released_and_says_what_it_is() {
    let session = Session::start();
    assert!(is_mounted(&session.root));
    let (devices, note) = session.done("list");
    assert!(devices.contains(GPU) && devices.contains("nvidia"), "{devices}");
    assert_eq!(note, "simulated host 'workstation': no real devices\n");
    let (_, note) = session.done("--json list");
    assert_eq!(note, "");
    session.done("attach 10de:2684 --tenant alice");
    let (leases, note) = session.done("leases");
    assert!(leases.contains("alice") && leases.contains("0000:01:00.1"), "{leases}");
    assert!(note.contains("simulated host"), "{note}");
    let (shown, _) = session.done(&format!("show {GPU}"));
    assert!(shown.contains("vfio-pci"), "{shown}");
    session.done(&format!("release {GPU}"));
    let (shown, _) = session.done(&format!("show {GPU}"));
    assert!(shown.contains("nvidia"), "{shown}");
    let (protected, _) = session.done("tree");
    assert!(protected.contains("0000:02:00.0"), "{protected}");
    assert!(!session.vfioctl("attach 02:00.0 --tenant alice").status.success());
}

#[test]
fn what_happens_in_the_simulation_is_noticed_at_once() {
    let session = Session::start();
    let monitor = Running::start(
        program("vfioctl").arg("monitor").env("VFIOCTL_BUS", &session.address),
        false,
    );
    // It has subscribed when it is told of the first change; until then there is another.
    let driver = session.root.join("sys/bus/pci/drivers/snd_hda_intel");
    let started = Instant::now();
    for file in ["unbind", "bind"].into_iter().cycle() {
        std::fs::write(driver.join(file), "0000:01:00.1").unwrap();
        match monitor.lines.recv_timeout(Duration::from_millis(500)) {
            Ok(line) if line.contains("0000:01:00.1") => break,
            _ => assert!(started.elapsed() < LONG, "no change was told"),
        }
    }
}

#[test]
fn the_simulation_ends_with_its_daemon_however_that_ends() {
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGINT] {
        let mut session = Session::start();
        session.done("attach 10de:2684 --tenant alice");
        let vfiod = Pid::from_raw(session.vfiod.child.id().try_into().unwrap());
        kill(vfiod, signal).unwrap();
        let status = session.vfiod.child.wait().unwrap();
        assert_eq!(status.success(), signal != Signal::SIGKILL);
        session.gone();
    }
}

#[test]
fn a_daemon_whose_simulator_ends_says_so_and_ends() {
    let mut session = Session::start();
    kill(session.simulator(), Signal::SIGTERM).unwrap();
    session.vfiod.line_with("the simulator ended");
    assert!(!session.vfiod.child.wait().unwrap().success());
    session.gone();
}

#[test]
fn what_cannot_be_simulated_is_refused_with_a_remedy() {
    let refused = |arguments: &[&str]| {
        let output = program("vfiod").args(arguments).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let error = refused(&["--simulate", "workstation"]);
    assert!(error.contains("dbus-daemon --session --print-address --fork"), "{error}");
    let error = refused(&["--simulate", "nowhere", "--bus", "unix:path=/nowhere"]);
    assert!(error.contains("workstation, hgx8, scale"), "{error}");
    let error = refused(&["--simulate", "hgx8", "--root", "/tmp"]);
    assert!(error.contains("cannot be used with"), "{error}");
}
