//! Which processes hold a group's or a device's VFIO node open. Reads procfs through
//! [`crate::host`]; opens nothing, never writes.

use std::fmt;
use std::path::PathBuf;

use crate::error::Error;
use crate::host::HostRoot;

/// A process that holds a node open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its name, as the kernel has it (`comm`, at most 15 bytes).
    pub command: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.command, self.pid)
    }
}

/// Processes with an open descriptor of a group's node or of one of these VFIO devices (`vfio0`).
pub fn of_group(host: &HostRoot, group: u32, devices: &[&str]) -> Result<Vec<Holder>, Error> {
    let mut nodes: Vec<PathBuf> = vec![format!("/dev/vfio/{group}").into()];
    nodes.extend(devices.iter().map(|device| format!("/dev/vfio/devices/{device}").into()));
    let mut holders = Vec::new();
    for pid in host.processes()? {
        if host.open_files(pid).any(|target| nodes.contains(&target)) {
            let command = host.proc(&format!("{pid}/comm")).ok().flatten().unwrap_or_default();
            holders.push(Holder { pid, command: command.trim().to_owned() });
        }
    }
    Ok(holders)
}
