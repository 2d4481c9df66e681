//! Who has which device nodes of the simulated host open. Reads nothing, sleeps never.

use std::collections::BTreeMap;

use nix::errno::Errno;

use super::fault::Operation;
use super::kernel::{Kernel, Stop};

/// A process that opens something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opener {
    /// Its id.
    pub pid: u32,
    /// Its name.
    pub command: String,
}

/// Open nodes by handle.
#[derive(Debug, Default)]
pub(super) struct Open {
    nodes: BTreeMap<u64, (String, Opener)>,
    last: u64,
}

impl Open {
    pub(super) fn has(&self, path: &str) -> bool {
        self.nodes.values().any(|(open, _)| open == path)
    }

    /// What each process has open.
    pub(super) fn by_process(&self) -> impl Iterator<Item = (&Opener, u64, &str)> {
        self.nodes.iter().map(|(handle, (path, opener))| (opener, *handle, path.as_str()))
    }
}

impl Kernel {
    /// Opens a node below `dev`. A group's can be open once, as `vfio_group_fops_open` has it.
    pub fn open(&mut self, path: &str, opener: &Opener) -> Result<u64, Stop> {
        let group = path.strip_prefix("dev/vfio/").and_then(|name| name.parse::<u32>().ok());
        let device = group.and_then(|group| self.groups.get(&group)?.first().copied());
        let handle = self.or_fault(Operation::Open, device, 0, |kernel| {
            if group.is_some() && kernel.open.has(path) {
                return Err(Errno::EBUSY.into());
            }
            kernel.open.last += 1;
            kernel.open.nodes.insert(kernel.open.last, (path.to_owned(), opener.clone()));
            Ok(kernel.open.last)
        });
        if handle == Err(Stop::Killed) {
            self.open.nodes.retain(|_, (_, other)| other != opener);
        }
        handle
    }

    /// Closes what was opened.
    pub fn close(&mut self, handle: u64) {
        self.open.nodes.remove(&handle);
    }
}
