//! The real programs on a bus of their own, and a simulated host that the daemon serves there.
//! Starts and ends processes; touches no bus and no device of the machine. For tests: whatever is
//! not as it should be is a panic.

#![allow(clippy::missing_panics_doc)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use tempfile::TempDir;

use crate::binaries;

/// How long anything may take that takes a moment.
pub const LONG: Duration = Duration::from_secs(20);
/// What tests of many calls log: a line for each would be a test of the terminal.
const QUIET: &str = "error,vfiod::daemon=info,vfiod::simulation=warn";

/// A program that ends with the test, and the lines it prints.
#[derive(Debug)]
pub struct Running {
    /// Its process.
    pub child: Child,
    /// What it prints, each line also shown.
    pub lines: Receiver<String>,
}

impl Running {
    /// Starts a program; its lines are those of standard output, or of standard error.
    pub fn start(command: &mut Command, errors: bool) -> Self {
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
        let read = |from: Box<dyn Read + Send>| {
            std::thread::spawn(move || {
                for line in BufReader::new(from).lines().map_while(Result::ok) {
                    eprintln!("{line}");
                    // Nobody may want to read on.
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
    pub fn line_with(&self, text: &str) -> String {
        let mut seen = Vec::new();
        loop {
            match self.lines.recv_timeout(LONG) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => seen.push(line),
                Err(error) => panic!("no line with '{text}' ({error}) among {seen:#?}"),
            }
        }
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A bus, and vfiod with a simulated host on it.
#[derive(Debug)]
pub struct Session {
    /// The daemon, and what it logs.
    pub vfiod: Running,
    /// The simulated host's `/`.
    pub root: PathBuf,
    /// The bus.
    pub address: String,
    /// Where root asks without it.
    pub socket: PathBuf,
    _bus: Running,
    _directory: TempDir,
}

impl Session {
    /// On a bus like a user's own; `host` is as `--simulate` takes it.
    pub fn start(host: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let bus = ["--session", "--nofork", "--print-address"].map(str::to_owned);
        Self::on(&bus, host, &mut program("vfiod"), directory)
    }

    /// On a bus like the system's, with the policy that is shipped, for every user; as root only.
    /// The host is described by a text. Logs little, and keeps its records in memory as on a real
    /// host, whose `/run` is.
    pub fn of_many_users(host: &str) -> Self {
        let directory = match TempDir::new_in("/dev/shm") {
            Ok(directory) => directory,
            Err(_) => tempfile::tempdir().unwrap(),
        };
        let (config, described) =
            (directory.path().join("bus.conf"), directory.path().join("host.toml"));
        // The socket is an abstract one, which every user reaches.
        let text = format!(
            "<busconfig>\n<listen>unix:abstract={}</listen>\n<auth>EXTERNAL</auth>\n\
             <policy context=\"default\"><allow user=\"*\"/>\
             <deny own=\"*\"/><deny send_type=\"method_call\"/><allow send_type=\"signal\"/>\
             <allow send_requested_reply=\"true\" send_type=\"method_return\"/>\
             <allow send_requested_reply=\"true\" send_type=\"error\"/><allow receive_type=\"*\"/>\
             <allow send_destination=\"org.freedesktop.DBus\"/>\
             <allow send_destination=\"org.freedesktop.PolicyKit1\"/></policy>\n\
             <policy user=\"root\"><allow own=\"org.freedesktop.PolicyKit1\"/></policy>\n\
             <include>{}/../systemd/org.vfiod1.conf</include>\n</busconfig>\n",
            directory.path().display(),
            env!("CARGO_MANIFEST_DIR"),
        );
        std::fs::write(&config, text).unwrap();
        std::fs::write(&described, host).unwrap();
        let bus = ["--nofork".to_owned(), "--print-address".to_owned()];
        let bus = bus.into_iter().chain([format!("--config-file={}", config.display())]);
        let mut vfiod = program("vfiod");
        vfiod.env("VFIOD_LOG", QUIET).env("TMPDIR", directory.path());
        Self::on(&bus.collect::<Vec<_>>(), described.to_str().unwrap(), &mut vfiod, directory)
    }

    fn on(bus: &[String], host: &str, vfiod: &mut Command, directory: TempDir) -> Self {
        // The daemon logs each message that its policy keeps back.
        let mut dbus = Command::new("dbus-daemon");
        let bus = Running::start(dbus.args(bus).stderr(Stdio::null()), false);
        let address = bus.line_with("unix:");
        let socket = directory.path().join("private");
        vfiod.args(["--simulate", host, "--bus", &address, "--socket"]).arg(&socket);
        let vfiod = Running::start(vfiod, true);
        let simulated = vfiod.line_with("simulated");
        let root = simulated.split_once("root=").expect("the root is told").1;
        let root = root.split_whitespace().next().unwrap().into();
        vfiod.line_with("ready");
        Self { vfiod, root, address, socket, _bus: bus, _directory: directory }
    }

    /// Runs `vfioctl` on the bus; the arguments are separated by spaces.
    pub fn vfioctl(&self, arguments: &str) -> Output {
        let mut vfioctl = program("vfioctl");
        vfioctl.args(arguments.split(' ')).env("VFIOCTL_BUS", &self.address);
        vfioctl.output().unwrap()
    }

    /// Runs it as another user; as root only.
    pub fn vfioctl_as(&self, user: u32, arguments: &str) -> Output {
        let user = user.to_string();
        // By its descriptor, for that user may not be let into the directory of the program.
        let program = File::open(binaries::directory().join("vfioctl")).unwrap();
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--reuid", &user, "--regid", &user, "--clear-groups", "/proc/self/fd/0"]);
        setpriv.args(arguments.split(' ')).env("VFIOCTL_BUS", &self.address);
        setpriv.stdin(Stdio::from(program)).output().unwrap()
    }

    /// What a command that succeeds prints to standard output and standard error.
    pub fn done(&self, arguments: &str) -> (String, String) {
        let output = self.vfioctl(arguments);
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let (out, errors) = (text(output.stdout), text(output.stderr));
        assert!(output.status.success(), "vfioctl {arguments}: {errors}");
        (out, errors)
    }

    /// A connection to the bus of its own.
    pub async fn connect(&self) -> zbus::Connection {
        let builder = zbus::connection::Builder::address(self.address.as_str());
        builder.build().await.expect("the bus takes connections")
    }

    /// The simulator's process.
    pub fn simulator(&self) -> Pid {
        let id = self.vfiod.child.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
        let name = |pid: &&str| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
        let simulator = children.split_whitespace().find(|pid| name(pid).trim() == "vfiod-sim");
        Pid::from_raw(simulator.expect("a simulator").parse().unwrap())
    }

    /// What the daemon uses now.
    pub fn usage(&self) -> Usage {
        let process = Path::new("/proc").join(self.vfiod.child.id().to_string());
        let status = std::fs::read_to_string(process.join("status")).unwrap();
        let number = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        Usage {
            descriptors: std::fs::read_dir(process.join("fd")).unwrap().count(),
            threads: number("Threads:"),
            memory: number("VmRSS:"),
        }
    }

    /// Waits until nothing is left of the simulated host.
    pub fn gone(&self) {
        let started = Instant::now();
        while self.is_mounted() || self.root.parent().unwrap().exists() {
            assert!(started.elapsed() < LONG, "{} is still there", self.root.display());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether the simulated host is there.
    pub fn is_mounted(&self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        mounts.contains(self.root.to_str().unwrap())
    }
}

/// What a daemon uses.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// Descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Resident memory in KiB.
    pub memory: usize,
}

/// One of this workspace's programs.
pub fn program(name: &str) -> Command {
    Command::new(binaries::directory().join(name))
}
