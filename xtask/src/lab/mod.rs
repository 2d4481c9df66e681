//! The lab's host side: builds the machine's image once, boots it, and reports what comes back.

mod cache;
mod image;
mod kernel;
mod qmp;
mod selection;
mod session;
mod vm;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::Subcommand;
use vfiod_tests::protocol::{BenchRow, ScenarioInfo};

use crate::{deb, exec, host, progress};
use session::Session;
use vfiod_tests::machine::{Kernel, Purpose};
use vm::{Console, Payload, Vm};

pub(crate) use selection::Selection;
pub(crate) use session::{Summary, Voice};

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
        /// The kernel to boot: the distribution's, or the lab's own, which is built first
        #[arg(long, value_name = "own|distribution", default_value_t = Kernel::Distribution)]
        kernel: Kernel,
    },
    /// Build the lab's own kernel, from the distribution's source and options of the lab's own
    Kernel,
    /// Remove what the lab has cached
    Clean,
}

/// `cargo xtask lab`.
pub(crate) fn run(action: Option<&Action>) -> Result<ExitCode> {
    match action {
        None => shell(),
        Some(Action::Clean) => cache::clean().map(|()| ExitCode::SUCCESS),
        Some(Action::Kernel) => {
            let kernel = kernel::ready()?;
            println!("{}", kernel.image().display());
            Ok(ExitCode::SUCCESS)
        }
        Some(Action::Run { list: true, .. }) => {
            for scenario in scenarios(&exec::build_agent()?)? {
                println!("{}", selection::line(&scenario));
            }
            Ok(ExitCode::SUCCESS)
        }
        Some(Action::Run { scenarios, all, kernel, .. }) => {
            let selection = if *all { Selection::All } else { Selection::Named(scenarios) };
            let summary = play(selection, *kernel, Voice::Steps)?;
            println!("{} passed, {} failed", summary.passed, summary.failed);
            Ok(summary.exit_code())
        }
    }
}

/// Runs scenarios in one boot of the lab.
pub(crate) fn play(selection: Selection<'_>, kernel: Kernel, voice: Voice) -> Result<Summary> {
    play_beside(selection, kernel, voice, || ())
}

/// The same; `begun` is called when its machine has started and this thread has a mount namespace of
/// its own. What others mount before that stays mounted there.
pub(crate) fn play_beside(
    selection: Selection<'_>,
    kernel: Kernel,
    voice: Voice,
    begun: impl FnOnce(),
) -> Result<Summary> {
    let agent = exec::build_agent()?;
    let chosen = selection.choose(&scenarios(&agent)?, kernel)?;
    boot(agent, kernel, Console::Log, chosen.machine, begun)?.play(&chosen.names, voice)
}

/// `cargo xtask demo`.
pub(crate) fn demo() -> Result<ExitCode> {
    let summary = play(Selection::Named(&["demo".to_owned()]), Kernel::Distribution, Voice::Story)?;
    println!("demo: {}", if summary.failed == 0 { "OK" } else { "FAILED" });
    Ok(summary.exit_code())
}

/// The rows of scenarios that measure, each on its machine.
pub(crate) fn bench(names: &[&str]) -> Result<Vec<BenchRow>> {
    let mut rows = Vec::new();
    for name in names {
        let bench = Selection::Named(&[(*name).to_owned()]);
        let summary = play(bench, Kernel::Distribution, Voice::Steps)?;
        ensure!(summary.failed == 0, "the benchmark failed");
        rows.extend(summary.rows);
    }
    Ok(rows)
}

/// A shell in the lab, on this terminal.
fn shell() -> Result<ExitCode> {
    let agent = exec::build_agent()?;
    let (console, purpose) = (Console::Terminal, Purpose::Scenarios);
    let session = boot(agent, Kernel::Distribution, console, purpose, || ())?;
    eprintln!("a root shell in the lab; `exit` leaves it");
    session.wait_for_end()?;
    Ok(ExitCode::SUCCESS)
}

fn boot(
    agent: PathBuf,
    kernel: Kernel,
    console: Console,
    purpose: Purpose,
    begun: impl FnOnce(),
) -> Result<Session> {
    host::require_root()?;
    let guest_init = exec::build_guest_init()?;
    let launcher = exec::build_launcher()?;
    let package = deb::build()?;
    let image = image::ready()?;
    let own = (kernel == Kernel::Own).then(kernel::ready).transpose()?;
    let payload = Payload { package, agent, guest_init, launcher };
    progress::step(&format!("booting the lab ({kernel} kernel)"), || {
        let vm = Vm::start(&image, own.as_ref(), &payload, console, purpose)?;
        begun();
        Session::start(vm)
    })
}

/// Asks the agent, which also runs on the host for this, what scenarios it knows.
fn scenarios(agent: &Path) -> Result<Vec<ScenarioInfo>> {
    let output = Command::new(agent).arg("--list").output()?;
    ensure!(output.status.success(), "{} --list ended with {}", agent.display(), output.status);
    serde_json::from_slice(&output.stdout).context("the agent's list of scenarios")
}
