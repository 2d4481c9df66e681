//! `cargo xtask test`: the crates' own tests, then every scenario in one boot of the lab.

use std::fs;
use std::path::Path;
use std::process::{ExitCode, Stdio};

use anyhow::{Result, ensure};
use vfiod_tests::machine::Kernel;

use crate::lab::{self, Selection, Voice};
use crate::{exec, host, progress};

/// What the crates' tests start: a bus, a second opinion on PCI, another user.
const TOOLS: [(&str, &str); 3] = [
    ("/usr/bin/dbus-daemon", "dbus-daemon"),
    ("/usr/bin/lspci", "pciutils"),
    ("/usr/bin/setpriv", "util-linux"),
];

/// Runs all tests; the last line printed is `N passed, N failed`.
pub(crate) fn run() -> Result<ExitCode> {
    host::require(&TOOLS)?;
    let counts = exec::target()?.join("test-counts");
    let _ = fs::remove_file(&counts);
    let unit_tests = || unit_tests(&counts);
    let (unit_passed, unit_failed) = progress::step("running the crates' tests", unit_tests)?;
    let summary = lab::play(Selection::All, Kernel::Distribution, Voice::Steps)?;
    let scenarios = summary.passed + summary.failed;
    // What tests of many cases have told.
    print!("{}", fs::read_to_string(&counts).unwrap_or_default());
    println!("{} tests of the crates, {scenarios} scenarios", unit_passed + unit_failed);
    println!("{} passed, {} failed", unit_passed + summary.passed, unit_failed + summary.failed);
    Ok(if unit_failed == 0 { summary.exit_code() } else { ExitCode::FAILURE })
}

/// Runs `cargo test`; how many passed and failed. Those that fail are shown.
///
/// Tests of many cases append how many there were to the file `told`.
fn unit_tests(told: &Path) -> Result<(usize, usize)> {
    let output = exec::cargo()
        .args(["test", "--quiet", "--workspace", "--all-features", "--no-fail-fast"])
        .env("VFIOD_COUNTS", told)
        .stderr(Stdio::inherit())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let (passed, failed) = text
        .lines()
        .filter_map(counts)
        .fold((0, 0), |(passed, failed), (p, f)| (passed + p, failed + f));
    if failed > 0 {
        eprintln!("{text}");
    }
    ensure!(output.status.success() || failed > 0, "cargo test ended with {}", output.status);
    Ok((passed, failed))
}

/// The counts in libtest's line `test result: ok. 5 passed; 0 failed; ...`.
fn counts(line: &str) -> Option<(usize, usize)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut numbers = counts.split("; ").map(|count| count.split(' ').next()?.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::counts;

    #[test]
    fn counts_are_read_from_a_result_line_only() {
        let line = "test result: FAILED. 5 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(counts(line), Some((5, 2)));
        assert_eq!(counts("test a ... ok"), None);
        assert_eq!(counts("test result: ok"), None);
    }
}
