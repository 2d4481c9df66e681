//! Processes that leases are bound to. Looks at this machine's processes, whatever host is served:
//! an owner runs where the daemon does.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::lease::Bound;

/// A process that can be waited for.
#[derive(Debug)]
pub struct Process {
    descriptor: OwnedFd,
    pid: u32,
    started: u64,
}

impl Process {
    /// The process that has this id now.
    pub fn open(pid: u32) -> io::Result<Self> {
        let number = libc::pid_t::try_from(pid).map_err(|_| io::Error::from(Errno::ESRCH))?;
        // SAFETY: pidfd_open takes two integers and touches no memory of ours.
        let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, number, 0) };
        let descriptor = i32::try_from(Errno::result(descriptor)?).unwrap_or(-1);
        // SAFETY: the kernel has just given us this descriptor, and nobody else knows of it.
        let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
        // Read after it was opened, so both are of one process as long as that has not ended.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let started = started(&stat).ok_or_else(|| io::Error::from(Errno::ESRCH))?;
        let process = Self { descriptor, pid, started };
        if process.ended(PollTimeout::ZERO)? { Err(Errno::ESRCH.into()) } else { Ok(process) }
    }

    /// The process a lease was bound to, if it still runs.
    pub fn find(pid: u32, started: u64) -> Option<Self> {
        Self::open(pid).ok().filter(|process| process.started == started)
    }

    /// What binds a lease to it.
    pub fn bound(&self) -> Bound {
        Bound::Process { pid: self.pid, started: self.started }
    }

    /// Returns when it has ended.
    pub fn wait(&self) {
        while !self.ended(PollTimeout::NONE).unwrap_or(true) {}
    }

    fn ended(&self, timeout: PollTimeout) -> io::Result<bool> {
        use std::os::fd::AsFd;
        let mut polled = [PollFd::new(self.descriptor.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, timeout) {
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno.into()),
            Ok(ready) => Ok(ready > 0),
        }
    }
}

/// Field 22 of `/proc/PID/stat` (proc(5)); the name in field 2 may hold anything.
fn started(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_waited_for_and_not_mistaken_for_another() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::open(child.id()).unwrap();
        let Bound::Process { pid, started } = process.bound() else { panic!("a process") };
        assert!(Process::find(pid, started).is_some());
        assert!(Process::find(pid, started + 1).is_none());
        child.kill().unwrap();
        process.wait();
        assert!(Process::find(pid, started).is_none(), "it has ended, though nobody knows yet");
        child.wait().unwrap();
    }

    #[test]
    fn the_start_is_found_behind_any_name() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(started(&format!("12 (a) b (c)) {rest}")), Some(4711));
        assert_eq!(started("12 (sleep"), None);
        assert_eq!(started(""), None);
    }
}
