//! `vfiod-sim HOST.toml [--at DIR]`: mounts a described host and stays until it is interrupted, so
//! that anyone can point `vfiod --root` at it.

use std::path::PathBuf;

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal};
use vfiod_tests::sim::{Described, Sim};

const USAGE: &str = "usage: vfiod-sim HOST.toml [--at DIR]";

fn main() -> anyhow::Result<()> {
    let (host, at) = arguments().context(USAGE)?;
    // Blocked before any thread starts, so that they are waited for here alone.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    let host = Described::read(&host)?;
    let sim = match at {
        Some(root) => Sim::mount_at(&host, &root)?,
        None => Sim::mount(&host)?,
    };
    println!("{} is simulated on {}; end with Ctrl-C", host.name, sim.root().display());
    signals.wait()?;
    Ok(())
}

fn arguments() -> anyhow::Result<(PathBuf, Option<PathBuf>)> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [host] => Ok((host.into(), None)),
        [host, at, root] if at == "--at" => Ok((host.into(), Some(root.into()))),
        _ => anyhow::bail!("one host is needed"),
    }
}
