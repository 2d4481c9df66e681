//! The lab's host side: builds the machine's image once, boots it, and reports what comes back.

mod cache;
mod image;
mod qmp;
mod session;
mod vm;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::Subcommand;
use vfiod_tests::protocol::{BenchRow, ScenarioInfo};

use crate::{deb, exec, host, progress};
use session::{Session, Summary};
use vfiod_tests::machine::Purpose;
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

/// Which scenarios to run.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Selection<'a> {
    /// Those that show something to be right: all but the benchmarks.
    All,
    /// These, in this order.
    Named(&'a [String]),
}

/// `cargo xtask lab`.
pub(crate) fn run(action: Option<&Action>) -> Result<ExitCode> {
    match action {
        None => shell(),
        Some(Action::Clean) => cache::clean().map(|()| ExitCode::SUCCESS),
        Some(Action::Run { list: true, .. }) => {
            for ScenarioInfo { name, about } in scenarios(&exec::build_agent()?)? {
                println!("{name:<16}  {about}");
            }
            Ok(ExitCode::SUCCESS)
        }
        Some(Action::Run { scenarios, all, .. }) => {
            let selection = if *all { Selection::All } else { Selection::Named(scenarios) };
            let summary = play(selection, Voice::Steps)?;
            println!("{} passed, {} failed", summary.passed, summary.failed);
            Ok(summary.exit_code())
        }
    }
}

/// Runs scenarios in one boot of the lab.
pub(crate) fn play(selection: Selection<'_>, voice: Voice) -> Result<Summary> {
    let agent = exec::build_agent()?;
    let known: Vec<String> = scenarios(&agent)?.into_iter().map(|scenario| scenario.name).collect();
    let names = match selection {
        Selection::All => known.into_iter().filter(|name| name != "bench").collect(),
        Selection::Named(names) => {
            let unknown = names.iter().find(|name| !known.contains(name));
            ensure!(
                unknown.is_none(),
                "no scenario named {}: there are {}",
                unknown.map_or("", String::as_str),
                known.join(", ")
            );
            names.to_owned()
        }
    };
    let purpose = if names == ["bench"] { Purpose::Benchmarks } else { Purpose::Scenarios };
    boot(agent, Console::Log, purpose)?.play(names, voice)
}

/// `cargo xtask demo`.
pub(crate) fn demo() -> Result<ExitCode> {
    let summary = play(Selection::Named(&["demo".to_owned()]), Voice::Story)?;
    println!("demo: {}", if summary.failed == 0 { "OK" } else { "FAILED" });
    Ok(summary.exit_code())
}

/// The rows of the `bench` scenario.
pub(crate) fn bench() -> Result<Vec<BenchRow>> {
    let summary = play(Selection::Named(&["bench".to_owned()]), Voice::Steps)?;
    ensure!(summary.failed == 0, "the benchmark failed");
    Ok(summary.rows)
}

/// A shell in the lab, on this terminal.
fn shell() -> Result<ExitCode> {
    let session = boot(exec::build_agent()?, Console::Terminal, Purpose::Scenarios)?;
    eprintln!("a root shell in the lab; `exit` leaves it");
    session.wait_for_end()?;
    Ok(ExitCode::SUCCESS)
}

fn boot(agent: PathBuf, console: Console, purpose: Purpose) -> Result<Session> {
    host::require_root()?;
    let guest_init = exec::build_guest_init()?;
    let package = deb::build()?;
    let image = image::ready()?;
    let payload = Payload { package, agent, guest_init };
    progress::step("booting the lab", || {
        Session::start(Vm::start(&image, &payload, console, purpose)?)
    })
}

/// Asks the agent, which also runs on the host for this, what scenarios it knows.
fn scenarios(agent: &Path) -> Result<Vec<ScenarioInfo>> {
    let output = Command::new(agent).arg("--list").output()?;
    ensure!(output.status.success(), "{} --list ended with {}", agent.display(), output.status);
    serde_json::from_slice(&output.stdout).context("the agent's list of scenarios")
}
