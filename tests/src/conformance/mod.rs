//! What the daemon does on a kernel, written once: the lab's kernel and the simulated one have to
//! give the same. Where they differ, the simulation is corrected.
//!
//! Works on the functions of [`machine`](crate::machine) alone and leaves them as it found them.

mod assignment;
mod kernel;
mod stage;

use std::path::Path;

use anyhow::{Context, Result};

use crate::machine::Function;
use stage::Stage;

pub use stage::Daemon;

/// A host that the cases are played on, and what is done to it beside its files.
pub trait Host {
    /// Where its `/` is.
    fn root(&self) -> &Path;
    /// Loads a module.
    fn load(&mut self, module: &str) -> Result<()>;
    /// Takes a function out; returns when it is gone.
    fn unplug(&mut self, function: &Function) -> Result<()>;
    /// Puts it in again; returns when the kernel has found it.
    fn plug(&mut self, function: &Function) -> Result<()>;
}

/// A case: what is done, and what comes of it, a line each.
struct Case {
    name: &'static str,
    play: fn(&mut Stage<'_>) -> Result<()>,
    outcome: &'static [&'static str],
}

/// Plays every case; how many there are, and those that came out otherwise, in words.
pub fn run(host: &mut dyn Host, daemon: &Daemon) -> Result<(usize, Vec<String>)> {
    let cases = || kernel::CASES.iter().chain(assignment::CASES);
    let mut differences = Vec::new();
    for case in cases() {
        let mut stage = Stage::new(host, daemon).with_context(|| case.name)?;
        let played = (case.play)(&mut stage);
        let mut lines = stage.end();
        lines.extend(played.err().map(|error| format!("could not go on: {error:#}")));
        if lines != case.outcome {
            let (wanted, found) = (case.outcome.join("\n  "), lines.join("\n  "));
            differences.push(format!("{}: expected\n  {wanted}\nfound\n  {found}", case.name));
        }
    }
    Ok((cases().count(), differences))
}
