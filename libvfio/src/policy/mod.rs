//! What the host's devices are for, said once: pools of functions, chosen by selectors. Texts become
//! a [`Policy`] or a list of what is wrong with them; an inventory shows whom it means. Changes
//! nothing; [`crate::plan`] says how to get there.

mod assign;
mod facts;
mod files;
pub mod import;
pub mod keys;
mod problem;
mod read;
mod rules;
mod selector;

pub use assign::{Assignment, Clash, Member, Role};
pub use facts::Facts;
pub use files::sources;
pub use problem::{Place, Problem, Problems, Source};
pub use rules::rules;
pub use selector::{PortPath, Selector};

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::iommu::Isolation;
use crate::modalias::glob;
use crate::scrub;
use crate::shape::Shape;

/// What the host's devices are for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The files it was read from.
    pub files: Vec<String>,
    /// The pools, in the order of their names.
    pub pools: Vec<Pool>,
    /// How long provisioning may delay the boot.
    pub boot_limit: Duration,
}

/// How long provisioning may delay the boot where nothing is said of it.
pub const BOOT_LIMIT: Duration = Duration::from_secs(30);

impl Default for Policy {
    fn default() -> Self {
        Self { files: Vec::new(), pools: Vec::new(), boot_limit: BOOT_LIMIT }
    }
}

/// What some functions are for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Its name.
    pub name: String,
    /// Where it is described.
    pub place: Place,
    /// Who has its functions.
    pub mode: Mode,
    /// Functions that are in it.
    pub select: Vec<Selector>,
    /// Functions that are not, all the same.
    pub except: Vec<Selector>,
    /// How many virtual functions each physical one gets; the pool is of these.
    pub vfs: Option<u16>,
    /// Their settings.
    pub shape: Shape,
    /// Reset methods to use, in this order.
    pub reset_order: Option<Vec<String>>,
    /// Whether the end of a lease takes a reset.
    pub reset: Resets,
    /// What clears their memory then.
    pub scrub: scrub::Rule,
    /// Whether they may lose power when idle.
    pub d3cold: Option<bool>,
    /// Who may lease from it.
    pub lessees: Lessees,
    /// The weakest isolation that will do.
    pub isolation: Isolation,
    /// How many devices always stay with the host.
    pub keep_for_host: usize,
    /// Whether what others change is changed back.
    pub correct_drift: bool,
}

/// Who has a pool's functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The host, always.
    Host,
    /// VFIO, from boot on.
    Passthrough,
    /// The host, or nobody, and VFIO while they are leased.
    OnLease,
}

impl Mode {
    /// The words for all of them.
    pub const NAMES: [&str; 3] = ["host", "passthrough", "on-lease"];

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Passthrough => "passthrough",
            Self::OnLease => "on-lease",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether the end of a lease takes a reset of its functions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resets {
    /// It does: what cannot be reset goes to nobody but the same tenant again.
    #[default]
    Required,
    /// Where there is a way to.
    IfPossible,
    /// It does not.
    None,
}

impl Resets {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Required, Self::IfPossible, Self::None];

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Required => "required",
            Self::IfPossible => "if-possible",
            Self::None => "none",
        }
    }
}

/// Who may lease.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lessees {
    /// Users by name.
    pub users: Vec<String>,
    /// Groups by name.
    pub groups: Vec<String>,
    /// Patterns of tenants; any if there are none.
    pub tenants: Vec<String>,
}

impl Lessees {
    /// Whether the pool says which callers may lease from it. Else it is for polkit alone.
    pub fn names_callers(&self) -> bool {
        !self.users.is_empty() || !self.groups.is_empty()
    }

    /// Whether this tenant may have what is in the pool.
    pub fn serves(&self, tenant: &str) -> bool {
        self.tenants.is_empty() || self.tenants.iter().any(|pattern| glob(pattern, tenant))
    }
}

impl Policy {
    /// The policy that these files make up, or everything that is wrong with them.
    pub fn parse(sources: &[Source]) -> Result<Self, Problems> {
        read::read(sources)
    }

    /// The pool of that name.
    pub fn pool(&self, name: &str) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.name == name)
    }
}

#[cfg(test)]
mod tests;
