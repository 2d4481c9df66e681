//! The agent's side of the lab: runs scenarios as root inside the virtual machine.
//!
//! May do anything to the lab's kernel; must leave it as it found it, and must never run elsewhere.

mod agent;
pub mod command;
mod guest;
mod holder;
mod link;
pub mod product;
mod scenarios;
pub mod sysfs;

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use serde_json::Value;

pub use agent::serve;
pub use guest::Guest;
pub use holder::hold;
pub use scenarios::list;

use crate::protocol::{BenchRow, FromLab, ToLab};
use link::Link;

/// Where the payload disk is mounted.
const PAYLOAD: &str = "/lab";

/// What a scenario works with.
#[derive(Debug)]
pub struct Lab {
    link: Link,
}

impl Lab {
    /// Tells those who watch what happens.
    pub fn step(&mut self, text: impl Into<String>) -> Result<()> {
        self.link.send(&FromLab::Step { text: text.into() })
    }

    /// Hands over a benchmark's row.
    pub fn bench(&mut self, row: BenchRow) -> Result<()> {
        self.link.send(&FromLab::Bench { row })
    }

    /// Boots the lab anew. Does not return: the scenario is run again after that.
    pub fn reboot(&mut self) -> Result<()> {
        self.qmp("set-action", serde_json::json!({"reboot": "reset"}))?;
        self.link.send(&FromLab::Reboot)?;
        command::run(["systemctl", "reboot"])?.success()?;
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    }

    /// Runs a QMP command on the machine the lab runs in and returns its answer.
    pub fn qmp(&mut self, execute: &str, arguments: Value) -> Result<Value> {
        self.link.send(&FromLab::Qmp { execute: execute.to_owned(), arguments })?;
        match self.link.receive()? {
            Some(ToLab::Qmp { result }) => {
                result.map_err(|error| anyhow!("QMP {execute}: {error}"))
            }
            other => bail!("QMP {execute}: unexpected answer {other:?}"),
        }
    }
}

/// Waits until `condition` holds; an error naming `what` once `limit` has passed.
pub fn wait_until(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let start = Instant::now();
    while !condition()? {
        if start.elapsed() > limit {
            bail!("waited {} s in vain: {what}", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
