//! The lab's host side: builds the machine's image once, boots it, and reports what comes back.

mod cache;
mod image;
mod qmp;
mod session;
mod vm;

use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Subcommand;
use vfiod_tests::protocol::{BenchRow, ScenarioInfo};

use crate::{deb, exec, host, progress};
use session::{Session, Summary};
use vm::{Console, Payload, Vm};

pub(crate) use session::Voice;

#[derive(Debug, Subcommand)]
pub(crate) enum Action {
    /// Run scenarios in one boot of the lab
    Run {
        /// The scenarios, in this order
        #[arg(required_unless_present_any = ["all", "list"])]
        scenarios: Vec<String>,
        /// Run all of them
        #[arg(long, conflicts_with = "scenarios")]
        all: bool,
        /// Name them all and run none
        #[arg(long)]
        list: bool,
    },
    /// Remove what the lab has cached
    Clean,
}

/// `cargo xtask lab`.
pub(crate) fn run(action: Option<&Action>) -> Result<ExitCode> {
    match action {
        None => shell(),
        Some(Action::Clean) => cache::clean().map(|()| ExitCode::SUCCESS),
        Some(Action::Run { list: true, .. }) => {
            for ScenarioInfo { name, about } in scenarios()? {
                println!("{name:<24}  {about}");
            }
            Ok(ExitCode::SUCCESS)
        }
        Some(Action::Run { scenarios, all, .. }) => {
            let names = if *all { suite()? } else { scenarios.clone() };
            let summary = play(&names, Voice::Steps)?;
            println!("{} passed, {} failed", summary.passed, summary.failed);
            Ok(summary.exit_code())
        }
    }
}

/// Every scenario that shows something to be right: all but the benchmarks.
pub(crate) fn suite() -> Result<Vec<String>> {
    let names = scenarios()?.into_iter().map(|scenario| scenario.name);
    Ok(names.filter(|name| name != "bench").collect())
}

/// Runs scenarios in one boot of the lab.
pub(crate) fn play(names: &[String], voice: Voice) -> Result<Summary> {
    let known = scenarios()?;
    for name in names {
        ensure!(
            known.iter().any(|scenario| scenario.name == *name),
            "no scenario named {name}: `cargo xtask lab run --list` names them"
        );
    }
    let mut session = boot(Console::Log)?;
    session.play(names, voice)
}

/// `cargo xtask demo`.
pub(crate) fn demo() -> Result<ExitCode> {
    let summary = play(&["demo".to_owned()], Voice::Story)?;
    println!("demo: {}", if summary.failed == 0 { "OK" } else { "FAILED" });
    Ok(summary.exit_code())
}

/// The rows of the `bench` scenario.
pub(crate) fn bench() -> Result<Vec<BenchRow>> {
    let summary = play(&["bench".to_owned()], Voice::Steps)?;
    if summary.failed > 0 {
        bail!("the benchmark failed");
    }
    Ok(summary.rows)
}

/// A shell in the lab, on this terminal.
fn shell() -> Result<ExitCode> {
    let session = boot(Console::Terminal)?;
    eprintln!("a root shell in the lab; `exit` leaves it");
    session.wait_for_end()?;
    Ok(ExitCode::SUCCESS)
}

fn boot(console: Console) -> Result<Session> {
    host::require_root()?;
    let image = image::ready()?;
    let payload = Payload {
        package: deb::build()?,
        agent: exec::build_agent()?,
        guest_init: exec::build_guest_init()?,
    };
    progress::step("booting the lab", || Session::start(Vm::start(&image, &payload, console)?))
}

/// Asks the agent, which also runs on the host for this, what scenarios it knows.
fn scenarios() -> Result<Vec<ScenarioInfo>> {
    let agent = exec::build_agent()?;
    let output = std::process::Command::new(&agent).arg("--list").output()?;
    ensure!(output.status.success(), "{} --list ended with {}", agent.display(), output.status);
    serde_json::from_slice(&output.stdout).context("the agent's list of scenarios")
}
