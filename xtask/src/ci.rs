//! `cargo xtask ci`: every check there is, in the order of how soon they tell.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Result;

use crate::{exec, lab, progress, test};

/// The version of cargo-deny that the rules are written for.
const DENY: &str = "0.20.2";

/// Runs all checks and stops at the first that fails.
pub(crate) fn run() -> Result<ExitCode> {
    progress::step("checking the format", || {
        exec::loud(exec::cargo().args(["fmt", "--all", "--check"]))
    })?;
    // Made once, and beside what compiles: the one mostly waits, and neither depends on the source.
    let deny = std::thread::scope(|scope| {
        let (deny, base) = (scope.spawn(cargo_deny), scope.spawn(lab::prepare));
        look()?;
        base.join().expect("a fault of xtask")?;
        deny.join().expect("a fault of xtask")
    })?;
    // A build fetches what its own target needs; the audit reads the whole lock file.
    progress::step("fetching what the audit reads", || {
        exec::quiet(exec::cargo().args(["fetch", "--locked"]))
    })?;
    progress::step("checking the dependencies' licences and sources", || {
        exec::quiet(Command::new(deny).current_dir(exec::root()).args([
            "--offline",
            "--all-features",
            "check",
            "licenses",
            "bans",
            "sources",
        ]))
    })?;
    test::run()
}

/// What the compiler and rustdoc have to say.
fn look() -> Result<()> {
    progress::step("linting", || {
        exec::loud(
            exec::cargo()
                .args(["clippy", "--quiet", "--workspace", "--all-targets", "--all-features"])
                .args(["--", "--deny", "warnings"]),
        )
    })?;
    progress::step("building the documentation", || {
        exec::loud(exec::cargo().env("RUSTDOCFLAGS", "--deny warnings").args([
            "doc",
            "--quiet",
            "--workspace",
            "--no-deps",
        ]))
    })
}

/// cargo-deny, installed first if this version is not there yet.
fn cargo_deny() -> Result<PathBuf> {
    let directory = exec::target()?.join(format!("cargo-deny-{DENY}"));
    let program = directory.join("bin/cargo-deny");
    if !program.exists() {
        progress::step("installing cargo-deny (once; a minute or two)", || {
            exec::quiet(
                exec::cargo()
                    // It looks for two seconds, however it was compiled.
                    .env("CARGO_PROFILE_DEV_DEBUG", "0")
                    .args(["install", "--quiet", "--locked", "--debug", "cargo-deny"])
                    .args(["--version", DENY, "--root"])
                    .arg(&directory),
            )
        })?;
    }
    Ok(program)
}
