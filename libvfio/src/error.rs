//! What can go wrong, in the same words on every surface: library, bus and command line.
//! A plain type: touches nothing.

use std::io;
use std::path::{Path, PathBuf};

use crate::address::{InvalidAddress, PciAddress};

/// The kinds of failure a caller can tell apart.
///
/// Each has one D-Bus error name and one exit status of `vfioctl`; both are part of the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request is malformed.
    InvalidArgument,
    /// Nothing has that name.
    NotFound,
    /// The caller may not do this.
    NotAuthorized,
    /// Something uses the device.
    Busy,
    /// The device cannot be isolated for a guest on this host as it is.
    NotViable,
    /// The host cannot live without the device.
    Protected,
    /// Another lease holds the device.
    AlreadyLeased,
    /// The device at that address is not the one that was meant.
    IdentityMismatch,
    /// A reset failed or left the device unwell.
    ResetFailed,
    /// The device is not trusted until an administrator clears it.
    Quarantined,
    /// A kernel operation on the device never returned.
    Wedged,
    /// The operation took longer than it may.
    Timeout,
    /// This device or host cannot do that.
    Unsupported,
    /// Anything else: the kernel refused a step, or a fault of ours.
    Internal,
}

impl ErrorKind {
    /// Every kind, in the order of their exit statuses.
    pub const ALL: [Self; 14] = [
        Self::Internal,
        Self::InvalidArgument,
        Self::NotFound,
        Self::NotAuthorized,
        Self::Busy,
        Self::NotViable,
        Self::Protected,
        Self::AlreadyLeased,
        Self::IdentityMismatch,
        Self::ResetFailed,
        Self::Quarantined,
        Self::Wedged,
        Self::Timeout,
        Self::Unsupported,
    ];

    /// The last part of the D-Bus error name `org.vfiod1.Error.*`.
    pub fn name(self) -> &'static str {
        match self {
            Self::InvalidArgument => "InvalidArgument",
            Self::NotFound => "NotFound",
            Self::NotAuthorized => "NotAuthorized",
            Self::Busy => "Busy",
            Self::NotViable => "NotViable",
            Self::Protected => "Protected",
            Self::AlreadyLeased => "AlreadyLeased",
            Self::IdentityMismatch => "IdentityMismatch",
            Self::ResetFailed => "ResetFailed",
            Self::Quarantined => "Quarantined",
            Self::Wedged => "Wedged",
            Self::Timeout => "Timeout",
            Self::Unsupported => "Unsupported",
            Self::Internal => "Internal",
        }
    }

    /// The kind with that [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The exit status of `vfioctl` for this kind: its place in [`ALL`](Self::ALL), from 1.
    pub fn exit_status(self) -> u8 {
        Self::ALL.iter().zip(1..).find_map(|(kind, n)| (*kind == self).then_some(n)).unwrap_or(1)
    }
}

/// An error in reading the host or in what was asked. Refusals and failed steps have types of their
/// own, [`plan::Refusal`](crate::plan::Refusal) and [`step::StepError`](crate::step::StepError).
/// Its text says what, why and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A text that is no PCI address.
    #[error(transparent)]
    Address(#[from] InvalidAddress),
    /// No function has that address or name.
    #[error("no PCI function '{name}' on this host{}", hint(nearest.as_ref()))]
    NotFound {
        /// What was asked for.
        name: String,
        /// What the caller may have meant.
        nearest: Option<String>,
    },
    /// More than one function has that name.
    #[error("'{name}' is ambiguous; name one of {}", some_of(candidates))]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// Address and description of each function that matches.
        candidates: Vec<String>,
    },
    /// A text that is neither an address, an id pair nor a class alias.
    #[error(
        "'{name}' names no device; use an address (03:00.0), vendor:device (10de:2330) or a class \
         (gpu, nic, nvme){}",
        hint(nearest.as_ref())
    )]
    BadName {
        /// What was asked for.
        name: String,
        /// What the caller may have meant.
        nearest: Option<String>,
    },
    /// A file of the host could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done: `read`, `write`, `list`, `open`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// VFIO refused a device that should be ready for a guest.
    #[error("{address} cannot be opened through VFIO: {reason}")]
    Vfio {
        /// The function.
        address: PciAddress,
        /// What VFIO said.
        reason: String,
    },
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// Whether somebody with patience lost it ([`Patience`](crate::host::Patience)).
    pub fn timed_out(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::TimedOut)
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Address(_) | Self::Ambiguous { .. } | Self::BadName { .. } => {
                ErrorKind::InvalidArgument
            }
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Io { .. } if self.timed_out() => ErrorKind::Wedged,
            Self::Io { .. } => ErrorKind::Internal,
            Self::Vfio { .. } => ErrorKind::NotViable,
        }
    }
}

fn hint(nearest: Option<&String>) -> String {
    nearest.map(|name| format!("; did you mean {name}?")).unwrap_or_default()
}

/// As many of some names as one reads, and how many more there are.
fn some_of(names: &[String]) -> String {
    const READ: usize = 8;
    match names.len().checked_sub(READ) {
        None | Some(0) => names.join(", "),
        Some(more) => {
            let (some, _) = names.split_at(READ);
            format!("{} and {more} more, which 'vfioctl list' has", some.join(", "))
        }
    }
}

/// Of some names, the one most like `name`, if any is alike at all.
pub(crate) fn nearest<T: AsRef<str>>(name: &str, known: impl IntoIterator<Item = T>) -> Option<T> {
    known
        .into_iter()
        .map(|known| (strsim::jaro_winkler(name, known.as_ref()), known))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_exit_statuses_are_distinct_and_found_again() {
        for kind in ErrorKind::ALL {
            assert_eq!(ErrorKind::from_name(kind.name()), Some(kind));
        }
        assert_eq!(ErrorKind::Internal.exit_status(), 1);
        assert_eq!(ErrorKind::InvalidArgument.exit_status(), 2);
        assert_eq!(ErrorKind::NotFound.exit_status(), 3);
        assert_eq!(ErrorKind::Unsupported.exit_status(), 14);
    }

    #[test]
    fn of_many_that_one_may_mean_some_are_named() {
        let text = |count: usize| {
            let candidates = (0..count).map(|n| n.to_string()).collect();
            Error::Ambiguous { name: "nic".into(), candidates }.to_string()
        };
        assert!(text(8).ends_with("one of 0, 1, 2, 3, 4, 5, 6, 7"), "{}", text(8));
        assert!(text(9801).ends_with("6, 7 and 9793 more, which 'vfioctl list' has"));
    }
}
