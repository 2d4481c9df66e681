//! `cargo xtask test`: the crates' own tests, and beside them every scenario in one boot of the lab.

use std::process::ExitCode;
use std::sync::mpsc::channel;

use anyhow::Result;
use vfiod_tests::machine::Kernel;

use crate::crates::{self, Programs, Tally};
use crate::host;
use crate::lab::{self, Parts, Selection, Summary, Voice};

/// What the crates' tests start: a bus, a second opinion on PCI, another user.
const TOOLS: [(&str, &str); 3] = [
    ("/usr/bin/dbus-daemon", "dbus-daemon"),
    ("/usr/bin/lspci", "pciutils"),
    ("/usr/bin/setpriv", "util-linux"),
];

/// Runs all tests; the last line printed is `N passed, N failed`.
pub(crate) fn run() -> Result<ExitCode> {
    host::require(&TOOLS)?;
    let (programs, parts) = build()?;
    let (tally, summary) = both(programs, parts)?;
    let (tests, scenarios) = (tally.passed + tally.failed, summary.passed + summary.failed);
    print!("{}", tally.told);
    println!("{tests} tests of the crates, {scenarios} scenarios");
    println!("{} passed, {} failed", tally.passed + summary.passed, tally.failed + summary.failed);
    Ok(if tally.failed == 0 { summary.exit_code() } else { ExitCode::FAILURE })
}

/// All that is run, built beside each other: compilers seldom keep all processors at work, and linkers
/// never.
fn build() -> Result<(Programs, Parts)> {
    std::thread::scope(|scope| {
        let parts = scope.spawn(lab::build);
        let programs = crates::build();
        let parts = parts.join().expect("a fault of xtask");
        Ok((programs?, parts?))
    })
}

/// The lab's machine has one processor, and the tests take what is left of the host's.
fn both(programs: Programs, parts: Parts) -> Result<(Tally, Summary)> {
    let (begun, begins) = channel();
    std::thread::scope(|scope| {
        let lab = scope.spawn(move || {
            let (all, kernel) = (Selection::All, Kernel::Distribution);
            lab::play_beside(parts, all, kernel, Voice::Steps, || {
                let _ = begun.send(());
            })
        });
        // Where it cannot begin, the tests still do.
        let _ = begins.recv();
        let tally = programs.run();
        let summary = lab.join().expect("a fault of xtask");
        Ok((tally?, summary?))
    })
}
