//! The lab's host side: builds the machine's image once, boots it, and reports what comes back.

mod cache;
mod image;
mod kernel;
mod qmp;
mod selection;
mod session;
mod vm;

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::Subcommand;
use vfiod_tests::protocol::{BenchRow, ScenarioInfo};

use crate::{deb, exec, host, progress};
use image::Image;
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

/// What a boot of the lab takes.
#[derive(Debug)]
pub(crate) struct Parts {
    image: Image,
    payload: Payload,
}

/// Builds all of it: the base image beside what is compiled, for that mostly waits.
pub(crate) fn build() -> Result<Parts> {
    host::require_root()?;
    std::thread::scope(|scope| {
        let image = scope.spawn(image::ready);
        let payload = payload();
        let image = image.join().expect("a fault of xtask");
        Ok(Parts { payload: payload?, image: image? })
    })
}

/// Makes the base image of the lab, if there is none yet.
pub(crate) fn prepare() -> Result<()> {
    host::require_root()?;
    image::ready().map(drop)
}

fn payload() -> Result<Payload> {
    let (agent, guest_init) = (exec::build_agent()?, exec::build_guest_init()?);
    let launcher = exec::build_launcher()?;
    Ok(Payload { package: deb::build()?, agent, guest_init, launcher })
}

/// Runs scenarios in one boot of the lab.
pub(crate) fn play(selection: Selection<'_>, kernel: Kernel, voice: Voice) -> Result<Summary> {
    // A name that is none is to be told before all else is built.
    selection.choose(&scenarios(&exec::build_agent()?)?, kernel)?;
    play_beside(build()?, selection, kernel, voice, || ())
}

/// The same; `begun` is called when its machine has started and this thread has a mount namespace of
/// its own. What others mount before that stays mounted there.
pub(crate) fn play_beside(
    parts: Parts,
    selection: Selection<'_>,
    kernel: Kernel,
    voice: Voice,
    begun: impl FnOnce(),
) -> Result<Summary> {
    let chosen = selection.choose(&scenarios(&parts.payload.agent)?, kernel)?;
    boot(parts, kernel, Console::Log, chosen.machine, begun)?.play(&chosen.names, voice)
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
    let (console, purpose) = (Console::Terminal, Purpose::Scenarios);
    let session = boot(build()?, Kernel::Distribution, console, purpose, || ())?;
    eprintln!("a root shell in the lab; `exit` leaves it");
    session.wait_for_end()?;
    Ok(ExitCode::SUCCESS)
}

fn boot(
    Parts { image, payload }: Parts,
    kernel: Kernel,
    console: Console,
    purpose: Purpose,
    begun: impl FnOnce(),
) -> Result<Session> {
    let own = (kernel == Kernel::Own).then(kernel::ready).transpose()?;
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
