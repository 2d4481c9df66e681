//! What the daemon keeps on disk, and where: leases for this boot, all else for good.

use std::io;
use std::path::Path;

use crate::durable;
use crate::history::History;
use crate::ledger::Ledger;
use crate::quarantine::Quarantine;

/// Everything that is kept.
#[derive(Debug)]
pub struct Stores {
    /// Leases.
    pub ledger: Ledger,
    /// Devices not trusted.
    pub quarantine: Quarantine,
    /// What happened.
    pub history: History,
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
        })
    }
}
