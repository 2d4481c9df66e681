//! The conversation with the agent in a running lab, and what of it people get to see.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use vfiod_tests::protocol::{BenchRow, FromLab, ToLab};

use super::vm::Vm;

/// The longest silence of the agent that is not a hang.
const PATIENCE: Duration = Duration::from_secs(300);

/// How a session is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Voice {
    /// Scenarios, with their steps below them.
    Steps,
    /// The steps alone, for people to read.
    Story,
}

/// What became of the scenarios.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) rows: Vec<BenchRow>,
}

impl Summary {
    pub(crate) fn exit_code(&self) -> ExitCode {
        if self.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// A lab that has booted and installed the product.
#[derive(Debug)]
pub(super) struct Session {
    vm: Vm,
    link: BufReader<UnixStream>,
}

impl Session {
    /// Waits until the lab has booted.
    pub(super) fn start(vm: Vm) -> Result<Self> {
        let link = BufReader::new(vm.agent.try_clone()?);
        link.get_ref().set_read_timeout(Some(PATIENCE))?;
        let mut session = Self { vm, link };
        session.booted()?;
        Ok(session)
    }

    /// Waits until the agent is there.
    fn booted(&mut self) -> Result<()> {
        match self.receive()? {
            FromLab::Hello { .. } => Ok(()),
            FromLab::Broken { detail } => bail!("the lab cannot serve: {detail}"),
            other => bail!("the agent began with {other:?}"),
        }
    }

    /// Runs scenarios and tells of them on standard output.
    pub(super) fn play(mut self, names: &[String], voice: Voice) -> Result<Summary> {
        self.send(&ToLab::Run { scenarios: names.to_owned() })?;
        let mut summary = Summary::default();
        let mut rebooted = false;
        loop {
            match self.receive()? {
                FromLab::Done => return Ok(summary),
                FromLab::Bench { row } => {
                    let floor = row.floor_ratio.map(|ratio| format!(", {ratio:.2} x floor"));
                    let peers = row.peer_ratios.iter();
                    let peers = peers.map(|(peer, ratio)| format!(", {ratio:.2} x {peer}"));
                    let ratios: String = floor.into_iter().chain(peers).collect();
                    println!("    {}: {:.1} {}{ratios}", row.name, row.median, row.unit);
                    summary.rows.push(row);
                }
                FromLab::Qmp { execute, arguments } => {
                    let result = self.vm.qmp.execute(&execute, &arguments);
                    let result = result.map_err(|error| format!("{error:#}"));
                    self.send(&ToLab::Qmp { result })?;
                }
                FromLab::Reboot => {
                    self.booted()?;
                    rebooted = true;
                    let left = names.get(summary.passed + summary.failed..).unwrap_or_default();
                    self.send(&ToLab::Run { scenarios: left.to_vec() })?;
                }
                FromLab::Begin { .. } if std::mem::take(&mut rebooted) => {}
                FromLab::Begin { scenario } if voice == Voice::Steps => println!("{scenario}"),
                FromLab::Begin { .. } => {}
                FromLab::Step { text } if voice == Voice::Steps => println!("    {text}"),
                FromLab::Step { text } => println!("{text}"),
                FromLab::End { scenario, seconds, failure: None } => {
                    summary.passed += 1;
                    if voice == Voice::Steps {
                        println!("  ok: {scenario} ({seconds:.1} s)");
                    }
                }
                FromLab::End { scenario, seconds, failure: Some(failure) } => {
                    summary.failed += 1;
                    println!("  FAILED: {scenario} ({seconds:.1} s)\n{failure}");
                    println!("--- the lab's console\n{}\n---", self.vm.console_tail());
                }
                other => bail!("unexpected message from the agent: {other:?}"),
            }
        }
    }

    /// Waits until the lab has powered off.
    pub(super) fn wait_for_end(self) -> Result<()> {
        self.vm.wait()
    }

    fn send(&mut self, message: &ToLab) -> Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        self.link.get_mut().write_all(&line).context("writing to the lab")
    }

    fn receive(&mut self) -> Result<FromLab> {
        let mut line = String::new();
        let outcome = self.link.read_line(&mut line);
        if !matches!(outcome, Ok(length) if length > 0) {
            bail!("the lab fell silent ({outcome:?}); its console:\n{}", self.vm.console_tail());
        }
        serde_json::from_str(&line).with_context(|| format!("the agent said {line:?}"))
    }
}
