//! Who has which device nodes of the simulated host open, and who else may. Reads nothing, sleeps
//! never.

use std::collections::BTreeMap;

use libvfio::address::PciAddress;
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
    /// Access control lists of nodes that have one.
    lists: BTreeMap<String, Vec<u8>>,
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
        let group = group_of(path);
        let device = self.first_of(group);
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

    fn first_of(&self, group: Option<u32>) -> Option<PciAddress> {
        self.groups.get(&group?)?.first().copied()
    }

    /// The access control list of a node, if it has one.
    pub fn list(&self, path: &str) -> Option<&[u8]> {
        self.open.lists.get(path).map(Vec::as_slice)
    }

    /// Gives a node an access control list. It has it until it goes.
    pub fn set_list(&mut self, path: &str, list: &[u8]) -> Result<(), Stop> {
        let device = self.first_of(group_of(path));
        self.or_fault(Operation::Access, device, (), |kernel| {
            kernel.open.lists.insert(path.to_owned(), list.to_vec());
            Ok(())
        })
    }

    /// Forgets the lists of nodes that have gone.
    pub(super) fn drop_lists(&mut self) {
        let mut lists = std::mem::take(&mut self.open.lists);
        lists.retain(|path, _| self.entry(path).is_some());
        self.open.lists = lists;
    }

    /// Closes what was opened.
    pub fn close(&mut self, handle: u64) {
        self.open.nodes.remove(&handle);
    }
}

fn group_of(path: &str) -> Option<u32> {
    path.strip_prefix("dev/vfio/")?.parse().ok()
}
