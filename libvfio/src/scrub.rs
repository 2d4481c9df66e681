//! What clears a device's memory after a tenant: one contract for all that can. Data and decisions
//! alone, touches nothing; [`crate::step`] does it.

mod profile;

pub use profile::{PROFILES, Profile, profile};

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::pci::Function;
use crate::pci::class::ClassAlias;

/// The host driver of NVM Express.
const NVME: &str = "nvme";
/// How long a command may take where nothing is said of it, in seconds.
pub const COMMAND_TIMEOUT: u32 = 600;

/// How much of memory that was overwritten is read back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReadBack {
    /// Every word.
    #[default]
    Full,
    /// The first word, the last one, and of each 4 KiB one, where nobody can foresee.
    Sampled,
}

impl ReadBack {
    #[allow(clippy::trivially_copy_pass_by_ref)] // What serde asks for.
    fn is_full(&self) -> bool {
        *self == Self::Full
    }
}

/// What clears the memory of one function.
///
/// Whatever it is, the contract is the same: it says for which functions it is
/// ([`for_function`](Rule::for_function)), on which driver it works ([`driver`](Self::driver)) and how
/// long it may take ([`limit`](Self::limit)), and it has failed unless it has seen afterwards what is
/// said of each. A function whose scrubber failed is given to nobody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "kebab-case")]
pub enum Scrubber {
    /// Zeros through a region that shows all of the memory; every word of it that is looked at reads
    /// zero.
    BarZero {
        /// The region.
        bar: u8,
        /// How much of it is looked at.
        #[serde(default, skip_serializing_if = "ReadBack::is_full")]
        read_back: ReadBack,
    },
    /// The controller's own erasing of all its namespaces, asked for with nvme-cli. The same ones are
    /// there, under the same serial number, and what was read of each is zeros, or what the controller
    /// says erased blocks read as.
    Nvme,
    /// A program of the administrator's. It ended with status 0, and the device is the one it was, as
    /// well as it was.
    Command {
        /// Its path and arguments.
        command: Vec<String>,
        /// How long it may take, in seconds.
        timeout: u32,
        /// The host driver it needs; none: it works beside VFIO.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        driver: Option<String>,
    },
}

impl Scrubber {
    /// The word for it on every surface.
    pub fn name(&self) -> &'static str {
        match self {
            Self::BarZero { read_back: ReadBack::Full, .. } => "bar-zero",
            Self::BarZero { read_back: ReadBack::Sampled, .. } => "bar-zero-sampled",
            Self::Nvme => NVME,
            Self::Command { .. } => "command",
        }
    }

    /// The host driver that has the function meanwhile; none: it stays on VFIO.
    pub fn driver(&self) -> Option<&str> {
        match self {
            Self::BarZero { .. } => None,
            Self::Nvme => Some(NVME),
            Self::Command { driver, .. } => driver.as_deref(),
        }
    }

    /// How long it may take.
    pub fn limit(&self) -> Duration {
        match self {
            // Reading device memory back over PCI Express is slow: tens of MB a second.
            Self::BarZero { .. } => Duration::from_secs(600),
            // Large disks that have to overwrite take hours.
            Self::Nvme => Duration::from_secs(2 * 3600),
            Self::Command { timeout, .. } => Duration::from_secs((*timeout).into()),
        }
    }
}

impl fmt::Display for Scrubber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BarZero { bar, read_back: ReadBack::Full } => {
                write!(f, "zeros through BAR {bar}")
            }
            Self::BarZero { bar, read_back: ReadBack::Sampled } => {
                write!(f, "zeros through BAR {bar}, read back in samples")
            }
            Self::Nvme => write!(f, "nvme-cli"),
            Self::Command { command, .. } => {
                write!(f, "{}", command.first().map_or("a program", String::as_str))
            }
        }
    }
}

/// How functions are to be scrubbed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Rule {
    /// Where it is known how to reach all of its memory, that way.
    #[default]
    Known,
    /// Not at all.
    None,
    /// By zeros through a region, which has to be known, and by reading back so much of it.
    BarZero(ReadBack),
    /// By NVM Express's means.
    Nvme,
    /// By a program.
    Command {
        /// Its path and arguments.
        command: Vec<String>,
        /// How long it may take, in seconds.
        timeout: u32,
        /// The host driver it needs.
        driver: Option<String>,
    },
}

impl Rule {
    /// The words that stand for a rule by themselves.
    pub const NAMES: [&str; 4] = ["bar-zero", "bar-zero-sampled", NVME, "none"];

    /// What scrubs a function under this rule: nothing, where nothing is to; or why what is to
    /// cannot.
    pub fn for_function(&self, function: &Function) -> Result<Option<Scrubber>, String> {
        let known = |read_back| {
            profile(function).map(|known| Scrubber::BarZero { bar: known.bar, read_back })
        };
        match self {
            Self::None => Ok(None),
            Self::Known => Ok(known(ReadBack::Full)),
            Self::BarZero(read_back) => known(*read_back).map(Some).ok_or_else(|| {
                "is of a kind whose memory nobody is known to reach through a region".to_owned()
            }),
            Self::Nvme => {
                let class = function.ids.class;
                if !class.is_some_and(|class| ClassAlias::Nvme.matches(class)) {
                    return Err("is no NVM Express controller".to_owned());
                }
                if function.physical().is_some() {
                    let why = "is a virtual function, whose namespaces others may have too";
                    return Err(why.to_owned());
                }
                Ok(Some(Scrubber::Nvme))
            }
            Self::Command { command, timeout, driver } => Ok(Some(Scrubber::Command {
                command: command.clone(),
                timeout: *timeout,
                driver: driver.clone(),
            })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_on_disk_says_which_it_is() {
        let scrubbers = [
            (
                Scrubber::BarZero { bar: 0, read_back: ReadBack::Full },
                r#"{"by":"bar-zero","bar":0}"#,
            ),
            (
                Scrubber::BarZero { bar: 0, read_back: ReadBack::Sampled },
                r#"{"by":"bar-zero","bar":0,"read_back":"sampled"}"#,
            ),
            (Scrubber::Nvme, r#"{"by":"nvme"}"#),
            (
                Scrubber::Command { command: vec!["/a".into()], timeout: 7, driver: None },
                r#"{"by":"command","command":["/a"],"timeout":7}"#,
            ),
        ];
        for (scrubber, text) in scrubbers {
            assert_eq!(serde_json::to_string(&scrubber).unwrap(), text);
            assert_eq!(serde_json::from_str::<Scrubber>(text).unwrap(), scrubber);
        }
    }
}
