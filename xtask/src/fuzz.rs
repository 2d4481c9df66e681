//! `cargo xtask fuzz`: libFuzzer on the parsers. All it makes is in the target directory: inputs
//! that led somewhere new, kept from run to run, and those that a parser did not survive.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use vfiod_tests::seeds;

use crate::{exec, host, progress};

/// Seconds that one input may take.
const TIMEOUT: u32 = 10;

/// The targets, by the directories of their seeds.
fn names() -> Result<Vec<String>> {
    let directories = fs::read_dir(seeds::directory())?;
    let mut names = directories
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>>>()?;
    names.sort_unstable();
    Ok(names)
}

/// Fuzzes one target or all, each for so long.
pub(crate) fn run(target: Option<&str>, seconds: u32) -> Result<ExitCode> {
    let all = names()?;
    let targets = match target {
        Some(target) => vec![target.to_owned()],
        None => all.clone(),
    };
    let unknown = targets.iter().find(|target| !all.contains(target));
    ensure!(unknown.is_none(), "there is no such target; there are {}", all.join(", "));
    host::require(&[("/usr/bin/c++", "g++")])?;
    let place = exec::target()?.join("fuzz");
    let program = exec::build_fuzz(&place)?;
    let mut outcome = ExitCode::SUCCESS;
    for target in targets {
        let found = progress::step(&format!("fuzzing {target} for {seconds} s"), || {
            fuzz(&program, &place, &target, seconds)
        })?;
        match found {
            Ended::Well(summary) => println!("{target}: {summary}"),
            Ended::Badly(report) => {
                println!("{target}: {report}");
                outcome = ExitCode::FAILURE;
            }
        }
    }
    Ok(outcome)
}

enum Ended {
    Well(String),
    Badly(String),
}

fn fuzz(program: &Path, place: &Path, target: &str, seconds: u32) -> Result<Ended> {
    let (corpus, seeds, crashes) = (
        place.join("corpus").join(target),
        place.join("seeds").join(target),
        place.join("crashes"),
    );
    for directory in [&corpus, &seeds, &crashes] {
        fs::create_dir_all(directory)?;
    }
    for (name, bytes) in seeds::of(target)? {
        fs::write(seeds.join(name), bytes)?;
    }
    let output = Command::new(program)
        .env("VFIOD_FUZZ", target)
        .env("RUST_BACKTRACE", "0")
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={TIMEOUT}"))
        .arg(format!("-artifact_prefix={}/{target}-", crashes.display()))
        .arg("-print_final_stats=1")
        .args([&corpus, &seeds])
        .output()
        .with_context(|| format!("starting {}", program.display()))?;
    let log = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        return Ok(Ended::Well(summary(&log)));
    }
    let kept = log.lines().find_map(|line| line.split_once("Test unit written to "));
    let Some((_, kept)) = kept else { return Ok(Ended::Badly(log.into_owned())) };
    let input = fs::read(kept.trim())?;
    Ok(Ended::Badly(format!(
        "{}\n{target} did not survive \"{}\"\nto see it again: cargo run -p vfiod-tests --features \
         fuzz --bin vfiod-fuzz -- {target} {kept}",
        cause(&log),
        input.escape_ascii(),
    )))
}

/// What went wrong: the panic's words, or libFuzzer's verdict.
fn cause(log: &str) -> String {
    let panic = log.lines().skip_while(|line| !line.contains("panicked at"));
    let panic: Vec<&str> = panic.take_while(|line| !line.starts_with("note: ")).collect();
    if !panic.is_empty() {
        return panic.join("\n");
    }
    log.lines().filter(|line| line.contains("ERROR: libFuzzer")).collect::<Vec<_>>().join("\n")
}

/// How many inputs were tried, and what they reached.
fn summary(log: &str) -> String {
    let tried = log.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let reached = log.lines().rev().find_map(|line| {
        let (_, rest) = line.split_once(" cov: ")?;
        rest.split(' ').next()
    });
    let or_none = |text: Option<&str>| text.map_or("?", str::trim).to_owned();
    format!("{} inputs, {} places of the code reached", or_none(tried), or_none(reached))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_read_from_what_libfuzzer_prints() {
        let log = "#2\tINITED cov: 12 ft: 13 corp: 1/1b\n#9\tDONE   cov: 431 ft: 9 corp: 3/4b\n\
                   stat::number_of_executed_units: 90210\n";
        assert_eq!(summary(log), "90210 inputs, 431 places of the code reached");
        assert_eq!(summary(""), "? inputs, ? places of the code reached");
    }

    #[test]
    fn a_cause_is_the_panic_or_else_the_verdict() {
        let panic = "INFO: Seed: 1\n\nthread '<unnamed>' panicked at a.rs:1:2:\nno\nnote: run with\n\
                     ==7== ERROR: libFuzzer: deadly signal\n";
        assert_eq!(cause(panic), "thread '<unnamed>' panicked at a.rs:1:2:\nno");
        assert_eq!(
            cause("x\n==7== ERROR: libFuzzer: timeout\n"),
            "==7== ERROR: libFuzzer: timeout"
        );
    }
}
