//! The crates' own tests: built by cargo, their programs run side by side, for most of them wait
//! more than they compute.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{exec, progress};

/// Programs at a time.
const AT_ONCE: usize = 3;
/// Those that take longest, in the order in which they are begun; all others come after them.
const LONGEST: [&str; 9] = [
    "random",
    "cycles",
    "crash_matrix",
    "fault_matrix",
    "race",
    "policy_random",
    "policy_crash",
    "sim_library",
    "hostile",
];
/// How much they give way to the lab, which has one processor and its own idea of time.
const NICENESS: &str = "10";
/// How much of what could go on for ever is played, where `cargo test` alone plays a part.
const MUCH: [(&str, &str); 3] =
    [("VFIOD_ALL_CASES", "1"), ("VFIOD_RANDOM_SEQUENCES", "10000"), ("VFIOD_RACE_SECONDS", "30")];

/// What came of the tests.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    /// What tests of many cases have told of them.
    pub(crate) told: String,
}

/// A test program, or all tests in the documentation.
#[derive(Debug)]
struct Program {
    name: String,
    command: Command,
}

/// Builds the crates' tests.
pub(crate) fn build() -> Result<Programs> {
    let built = progress::step("building the crates' tests", || {
        let mut cargo = exec::cargo();
        cargo.args(["test", "--no-run", "--workspace", "--all-features"]);
        exec::messages(&mut cargo)
    })?;
    let mut programs: Vec<Program> = built.iter().filter_map(program).collect();
    ensure!(!programs.is_empty(), "cargo has built no tests");
    let mut documentation = exec::cargo();
    documentation.args(["test", "--doc", "--quiet", "--workspace", "--all-features"]);
    programs
        .push(Program { name: "the documentation's examples".to_owned(), command: documentation });
    let place = |program: &Program| LONGEST.iter().position(|name| *name == program.name);
    programs.sort_by_key(|program| place(program).unwrap_or(LONGEST.len()));
    Ok(Programs(programs))
}

/// Test programs, those first that take longest.
#[derive(Debug)]
pub(crate) struct Programs(Vec<Program>);

/// As cargo would run it.
fn program(message: &Value) -> Option<Program> {
    let is_test = message["profile"]["test"].as_bool()?;
    let executable = message["executable"].as_str().filter(|_| is_test)?;
    let name = message["target"]["name"].as_str()?.to_owned();
    let directory = Path::new(message["manifest_path"].as_str()?).parent()?;
    let mut command = Command::new("nice");
    command
        .args(["-n", NICENESS, executable, "--quiet"])
        .current_dir(directory)
        .env("CARGO_MANIFEST_DIR", directory);
    Some(Program { name, command })
}

impl Programs {
    /// Runs them. Those that fail are shown.
    pub(crate) fn run(self) -> Result<Tally> {
        let counts = exec::target()?.join("test-counts");
        let _ = fs::remove_file(&counts);
        let start = Instant::now();
        let mut tally = self.run_all(&counts)?;
        eprintln!("✓ running the crates' tests ({:.1} s)", start.elapsed().as_secs_f64());
        tally.told = fs::read_to_string(&counts).unwrap_or_default();
        Ok(tally)
    }

    fn run_all(self, counts: &PathBuf) -> Result<Tally> {
        let left: Mutex<VecDeque<Program>> = Mutex::new(self.0.into());
        let next = || left.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let work = || {
            let mut tally = Tally::default();
            while let Some(Program { name, mut command }) = next() {
                command.env("VFIOD_COUNTS", counts).envs(MUCH).stdin(Stdio::null());
                let start = Instant::now();
                let output = command.output().with_context(|| format!("starting {name}"))?;
                eprintln!("  tests: {name} ({:.1} s)", start.elapsed().as_secs_f64());
                tally.add(&name, &output)?;
            }
            Ok(tally)
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
            workers.into_iter().try_fold(Tally::default(), |all, worker| {
                let part: Result<Tally> = worker.join().expect("a fault of xtask");
                let part = part?;
                let (passed, failed) = (all.passed + part.passed, all.failed + part.failed);
                Ok(Tally { passed, failed, ..all })
            })
        })
    }
}

impl Tally {
    /// Takes in what a program said, and shows it if a test failed.
    fn add(&mut self, name: &str, output: &Output) -> Result<()> {
        let text = String::from_utf8_lossy(&output.stdout);
        let failed_before = self.failed;
        for (passed, failed) in text.lines().filter_map(counts) {
            self.passed += passed;
            self.failed += failed;
        }
        let failed = self.failed > failed_before;
        if failed || !output.status.success() {
            eprintln!("--- {name}\n{text}{}", String::from_utf8_lossy(&output.stderr));
        }
        ensure!(output.status.success() || failed, "{name} ended with {}", output.status);
        Ok(())
    }
}

/// The counts in libtest's line `test result: ok. 5 passed; 0 failed; ...`.
fn counts(line: &str) -> Option<(usize, usize)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut numbers = counts.split("; ").map(|count| count.split(' ').next()?.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_from_a_result_line_only() {
        let line = "test result: FAILED. 5 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(counts(line), Some((5, 2)));
        assert_eq!(counts("test a ... ok"), None);
        assert_eq!(counts("test result: ok"), None);
    }

    #[test]
    fn of_what_cargo_has_built_the_tests_are_run() {
        let built = |test: bool, executable: Option<&str>| {
            serde_json::json!({"reason": "compiler-artifact", "manifest_path": "/w/tests/Cargo.toml",
                "target": {"name": "random"}, "profile": {"test": test}, "executable": executable})
        };
        let found = program(&built(true, Some("/w/target/random"))).unwrap();
        assert_eq!(found.name, "random");
        assert_eq!(found.command.get_current_dir(), Some(Path::new("/w/tests")));
        assert!(program(&built(false, Some("/w/target/trial"))).is_none());
        assert!(program(&built(true, None)).is_none());
        assert!(program(&serde_json::json!({"reason": "build-finished"})).is_none());
    }
}
