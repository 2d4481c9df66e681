//! `vfiod-sim HOST [--at DIR]`: mounts a described host and stays until it is interrupted, so that
//! anyone can point `vfiod --root` at it.
//!
//! `vfiod-sim HOST --report` is for `vfiod --simulate`: standard input is a socket of packets. The
//! first to go out is `root PATH` or `error TEXT`, then one per uevent as the kernel words it. The
//! directory around the root is for the daemon's state, and goes with the simulation, which ends
//! when the other end of the socket does.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{MsgFlags, send};
use vfiod_tests::sim::{Described, Sim};

const USAGE: &str = "usage: vfiod-sim HOST [--at DIR | --report]";

/// What to do with the host.
enum Task {
    MountOnNew,
    MountAt(PathBuf),
    Report,
}

fn main() -> anyhow::Result<()> {
    let (host, task) = arguments().context(USAGE)?;
    // Blocked before any thread starts, so that they are waited for here alone.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    let sim = match task {
        Task::Report => return report(&host),
        Task::MountAt(root) => Sim::mount_at(&Described::named(&host)?, &root)?,
        Task::MountOnNew => Sim::mount(&Described::named(&host)?)?,
    };
    println!("{host} is simulated on {}; end with Ctrl-C", sim.root().display());
    signals.wait()?;
    Ok(())
}

fn arguments() -> anyhow::Result<(String, Task)> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let (host, task) = match arguments.as_slice() {
        [host] => (host, Task::MountOnNew),
        [host, report] if report == "--report" => (host, Task::Report),
        [host, at, root] if at == "--at" => (host, Task::MountAt(root.into())),
        _ => anyhow::bail!("one host is needed"),
    };
    Ok((host.to_str().context("the host's name is not UTF-8")?.to_owned(), task))
}

/// Simulates a host for the daemon at the other end of standard input.
fn report(host: &str) -> anyhow::Result<()> {
    let daemon = io::stdin().as_fd().try_clone_to_owned()?;
    // Removed last, after the simulation in it.
    let directory = tempfile::TempDir::with_prefix("vfiod-sim-")?;
    let sim = match mount(host, &directory.path().join("root")) {
        Ok(sim) => sim,
        Err(error) => return Ok(packet(&daemon, format!("error {error:#}").as_bytes())?),
    };
    let events = sim.subscribe();
    packet(&daemon, format!("root {}", sim.root().display()).as_bytes())?;
    let reporting = daemon.try_clone()?;
    std::thread::spawn(move || {
        for (event, sequence) in events.iter().zip(1..) {
            // A daemon that has gone is noticed by whoever waits for its end.
            if packet(&reporting, &event.report(sequence)).is_err() {
                return;
            }
        }
    });
    until_the_end(daemon.as_fd())
}

fn mount(host: &str, root: &Path) -> anyhow::Result<Sim> {
    std::fs::create_dir(root)?;
    Sim::mount_at(&Described::named(host)?, root)
}

fn packet(to: &OwnedFd, bytes: &[u8]) -> nix::Result<()> {
    // A closed socket is an error here, not a signal.
    send(to.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL).map(|_| ())
}

/// Until the daemon has gone, or SIGTERM. Ctrl-C is for the daemon, and its end for us.
fn until_the_end(daemon: BorrowedFd<'_>) -> anyhow::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    let signals = SignalFd::new(&signals)?;
    // What there is to read of the daemon is its end alone: it sends nothing.
    let mut ends = [daemon, signals.as_fd()].map(|end| PollFd::new(end, PollFlags::POLLIN));
    while let Err(errno) = poll(&mut ends, PollTimeout::NONE) {
        anyhow::ensure!(errno == Errno::EINTR, "cannot wait for the daemon: {errno}");
    }
    Ok(())
}
