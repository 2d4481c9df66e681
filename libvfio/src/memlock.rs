//! How much memory a process may lock: VFIO pins all of a guest's and counts it against that.
//! Looks at this machine's processes, whatever host is served: whoever starts a guest runs here.

use std::io;

use rustix::process::{Pid, Resource, Rlimit, prlimit};

/// A resource limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// None.
    None,
    /// So many bytes.
    Bytes(u64),
}

impl Limit {
    /// Whether so many bytes are within it.
    pub fn allows(self, bytes: u64) -> bool {
        match self {
            Self::None => true,
            Self::Bytes(limit) => bytes <= limit,
        }
    }
}

/// The limit in `/proc/PID/limits` that counts, and the one up to which a process may raise that
/// itself (proc(5), getrlimit(2)).
pub fn parse(limits: &str) -> Option<(Limit, Limit)> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
    let mut words = line.split_whitespace().map(|word| match word {
        "unlimited" => Some(Limit::None),
        bytes => bytes.parse().ok().map(Limit::Bytes),
    });
    words.next()?.zip(words.next()?)
}

/// Both limits of a process.
pub fn of(process: u32) -> io::Result<(Limit, Limit)> {
    let limits = std::fs::read_to_string(format!("/proc/{process}/limits"))?;
    parse(&limits).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Raises the limits of a process, the second from what it is and only if need be. For
/// [`crate::step`] alone.
pub(crate) fn raise(process: u32, bytes: u64, hard: Limit) -> io::Result<()> {
    let pid = i32::try_from(process).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::NotFound)?;
    let maximum = match hard {
        Limit::None => None,
        Limit::Bytes(hard) => Some(hard.max(bytes)),
    };
    prlimit(Some(pid), Resource::Memlock, Rlimit { current: Some(bytes), maximum })?;
    Ok(())
}

/// Lets the calling process lock so much, as far as it may by itself; whether it can now.
pub fn raise_own(bytes: u64) -> io::Result<bool> {
    let own = std::process::id();
    let (soft, hard) = of(own)?;
    if !soft.allows(bytes) && hard.allows(bytes) {
        raise(own, bytes, hard)?;
    }
    Ok(of(own)?.0.allows(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_are_read() {
        let limits =
            "Max open files   1024  4096  files\nMax locked memory   64   unlimited   bytes\n";
        assert_eq!(parse(limits), Some((Limit::Bytes(64), Limit::None)));
        for odd in ["", "Max locked memory", "Max locked memory  64", "Max locked memory  -1  1"] {
            assert_eq!(parse(odd), None, "{odd}");
        }
        assert!(Limit::Bytes(64).allows(64) && !Limit::Bytes(64).allows(65));
        assert!(of(std::process::id()).is_ok());
    }
}
