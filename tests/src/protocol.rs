//! What the lab, its host and the guests in it say to each other: JSON, one message a line.
//!
//! Types only; who sends them over which port is for the ends to know.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::machine::{Kernel, Purpose};

/// From the agent in the lab to its host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum FromLab {
    /// The lab has booted and the product is installed.
    Hello {
        /// The kernel's release.
        kernel: String,
        /// Seconds since the kernel started.
        uptime: f64,
    },
    /// The lab cannot serve; it is useless from here on.
    Broken {
        /// What went wrong.
        detail: String,
    },
    /// A scenario starts; all until its `End` belongs to it.
    Begin {
        /// The scenario's name.
        scenario: String,
    },
    /// Narration: what was just shown or is about to be.
    Step {
        /// One line for people.
        text: String,
    },
    /// A benchmark's row.
    Bench {
        /// The figures.
        row: BenchRow,
    },
    /// A command for the machine's QMP socket; answered by [`ToLab::Qmp`].
    Qmp {
        /// The QMP command.
        execute: String,
        /// Its arguments.
        arguments: Value,
    },
    /// The lab boots anew, and says `Hello` after that. What was not ended is to be run again, which
    /// then goes on where it was.
    Reboot,
    /// A scenario has ended.
    End {
        /// The scenario's name.
        scenario: String,
        /// Seconds it took.
        seconds: f64,
        /// Why it failed; nothing if it passed.
        failure: Option<String>,
    },
    /// All that was asked for has run.
    Done,
}

/// From the host to the agent in the lab.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum ToLab {
    /// Run these scenarios in this order.
    Run {
        /// Their names.
        scenarios: Vec<String>,
    },
    /// The answer to [`FromLab::Qmp`].
    Qmp {
        /// QMP's return value or its error's description.
        result: Result<Value, String>,
    },
}

/// A scenario's name, what it shows and what it takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScenarioInfo {
    /// What one types to run it.
    pub name: String,
    /// One line.
    pub about: String,
    /// The machine it is for.
    pub machine: Purpose,
    /// The kernels that can do what it shows.
    pub kernels: Vec<Kernel>,
    /// Whether it runs when it is named only, not with all others.
    pub by_name: bool,
}

/// The median of a benchmark's runs, its spread, and what it is compared with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BenchRow {
    /// The benchmark's name.
    pub name: String,
    /// What the figures are in.
    pub unit: String,
    /// How many runs.
    pub n: usize,
    /// Median of the runs.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
    /// Our median over that of the bare floor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub floor_ratio: Option<f64>,
    /// Our median over each peer's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub peer_ratios: BTreeMap<String, f64>,
}

impl BenchRow {
    /// The row of some runs, beside nothing yet.
    pub fn of(name: &str, unit: &str, runs: &[f64]) -> Self {
        Self {
            name: name.to_owned(),
            unit: unit.to_owned(),
            n: runs.len(),
            median: median(runs),
            min: runs.iter().copied().fold(f64::INFINITY, f64::min),
            max: runs.iter().copied().fold(0.0, f64::max),
            floor_ratio: None,
            peer_ratios: BTreeMap::new(),
        }
    }
}

/// The median of at least one run.
pub fn median(runs: &[f64]) -> f64 {
    let mut sorted = runs.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.get(middle) {
        None => 0.0,
        Some(one) if sorted.len() % 2 == 1 => *one,
        Some(upper) => f64::midpoint(sorted[middle - 1], *upper),
    }
}

/// From the init of a guest in the lab to the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum FromGuest {
    /// The guest has booted.
    Hello {
        /// Its PCI functions.
        functions: Vec<GuestFunction>,
    },
    /// A command was carried out.
    Video {
        /// The video memory's size in bytes.
        size: usize,
        /// How many bytes held what was asked for.
        matching: usize,
    },
    /// What was found on the first part of its disk.
    Disk {
        /// That part's size in bytes.
        size: usize,
        /// How many bytes held what was asked for.
        matching: usize,
        /// How many were zero.
        zeros: usize,
    },
    /// Its network interfaces.
    Interfaces {
        /// The address of each.
        addresses: Vec<String>,
    },
    /// A command could not be carried out.
    Failed {
        /// Why.
        detail: String,
    },
}

/// From the agent to the init of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum ToGuest {
    /// Fill the GPU's video memory with the pattern of a seed; answered by `Video`.
    WriteVideo {
        /// Distinguishes one pattern from another.
        seed: u64,
    },
    /// Count the bytes of video memory that hold the pattern of a seed; answered by `Video`.
    ReadVideo {
        /// The seed it was written with.
        seed: u64,
    },
    /// Count the bytes of video memory that are zero; answered by `Video`.
    ZeroVideo,
    /// Load the disk driver, and write the pattern of a seed to the first part of the disk; answered
    /// by `Disk`.
    WriteDisk {
        /// Distinguishes one pattern from another.
        seed: u64,
    },
    /// Count the bytes there that hold the pattern of a seed, and those that are zero; answered by
    /// `Disk`.
    ReadDisk {
        /// The seed it was written with.
        seed: u64,
    },
    /// Load the network driver and wait for an interface; answered by `Interfaces`.
    Network,
    /// Power off.
    PowerOff,
}

/// A PCI function as a guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFunction {
    /// Its address in the guest.
    pub address: String,
    /// Vendor identifier.
    pub vendor: u16,
    /// Device identifier.
    pub device: u16,
    /// Class, subclass and programming interface.
    pub class: u32,
    /// Sizes of its BARs in bytes, 0 where there is none.
    pub bars: Vec<u64>,
}
