//! What the daemon keeps on disk, and where: leases for this boot, all else for good.

use std::io;
use std::path::{Path, PathBuf};

use crate::durable;
use crate::history::History;
use crate::ledger::Ledger;
use crate::met::Met;
use crate::quarantine::Quarantine;

/// Where the policy is.
pub const CONFIG: &str = "/etc/vfiod";
/// What it becomes: before the rules that load modules (`80-drivers.rules`).
pub const RULES: &str = "/etc/udev/rules.d/10-vfiod.rules";
/// Where what outlives the host's restart is kept.
pub const STATE: &str = "/var/lib/vfiod";

/// Everything that is kept.
#[derive(Debug)]
pub struct Stores {
    /// Leases.
    pub ledger: Ledger,
    /// Devices not trusted.
    pub quarantine: Quarantine,
    /// What happened.
    pub history: History,
    /// Devices that the policy has met by their place.
    pub met: Met,
    /// The directory of the policy; none, and there is none.
    pub policy: Option<PathBuf>,
    /// The file of udev's rules that the policy becomes, if it does.
    pub rules: Option<PathBuf>,
}

impl Stores {
    /// Leases in `leases`, the rest in `state`. Both are made if need be, for root alone.
    pub fn open(leases: &Path, state: &Path) -> io::Result<Self> {
        let within = |dir: &Path, error: io::Error| {
            io::Error::new(error.kind(), format!("{}: {error}", dir.display()))
        };
        durable::directory(state).map_err(|error| within(state, error))?;
        Ok(Self {
            ledger: Ledger::open(leases).map_err(|error| within(leases, error))?,
            quarantine: Quarantine::open(state),
            history: History::open(state),
            met: Met::open(state),
            policy: None,
            rules: None,
        })
    }

    /// With the policy in this directory, which becomes udev's rules in that file.
    #[must_use]
    pub fn with_policy(self, policy: Option<PathBuf>, rules: Option<PathBuf>) -> Self {
        Self { policy, rules, ..self }
    }
}
