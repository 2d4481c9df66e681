//! Devices that the policy has met by their place, such as an address: who they were, so that another
//! one in that place is not taken for them. Kept for good in one file; touches nothing else.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use libvfio::address::PciAddress;
use libvfio::pci::Identity;
use tracing::warn;

use crate::durable;

/// The file.
#[derive(Debug, Clone)]
pub struct Met {
    path: PathBuf,
}

impl Met {
    /// In the directory `state`.
    pub fn open(state: &Path) -> Self {
        Self { path: state.join("policy-met.json") }
    }

    /// Whom it has met. Nobody where that cannot be read: then they are met anew.
    pub fn load(&self) -> BTreeMap<PciAddress, Identity> {
        match durable::read(&self.path) {
            Ok(None) => BTreeMap::new(),
            Ok(Some(bytes)) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                warn!(%error, path = %self.path.display(), "forgot which devices were where");
                BTreeMap::new()
            }),
            Err(error) => {
                warn!(%error, path = %self.path.display(), "cannot read which devices were where");
                BTreeMap::new()
            }
        }
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Records whom it has met.
    pub fn write(&self, met: &BTreeMap<PciAddress, Identity>) -> io::Result<()> {
        durable::replace(&self.path, &serde_json::to_vec(met)?)
    }
}
