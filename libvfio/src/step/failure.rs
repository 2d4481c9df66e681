//! Steps that did not happen: what stopped them, of which kind that is, and what to do. Words alone;
//! touches nothing.

use std::io;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::{Step, Tunable};
use crate::backend::Maker;
use crate::error::ErrorKind;
use crate::scrub::Scrubber;
use crate::shape::Setting;

/// A step that did not happen. It crosses processes with all it says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("cannot {step}: {cause}; {remedy}")]
pub struct StepError {
    /// The step.
    pub step: Step,
    /// What stopped it.
    pub cause: Box<Cause>,
    /// What to do about it.
    pub remedy: String,
}

/// What stopped a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "cause", content = "of", rename_all = "kebab-case")]
pub enum Cause {
    /// The kernel said no.
    #[error("the kernel answered {errno:?} ({})", .errno.desc())]
    Kernel {
        /// Its error.
        #[serde(with = "number")]
        errno: Errno,
    },
    /// The kernel said yes and did something else.
    #[error("the kernel reported success, but {wanted} was expected and {found} found")]
    ReadBack {
        /// What should be so.
        wanted: String,
        /// What is.
        found: String,
    },
    /// Somebody else changed it first.
    #[error("{found} was found where {wanted} was expected: somebody else changed it")]
    Changed {
        /// What should have been so before.
        wanted: String,
        /// What was.
        found: String,
    },
    /// The driver still has users.
    #[error("the driver still has users")]
    InUse,
    /// Reading the host failed.
    #[error("{0}")]
    Host(String),
    /// A program failed.
    #[error("{0}")]
    Program(String),
}

/// Errors of the kernel as numbers.
mod number {
    use nix::errno::Errno;
    use serde::{Deserialize, Deserializer, Serializer};

    #[allow(clippy::trivially_copy_pass_by_ref)] // What serde asks for.
    pub(super) fn serialize<S: Serializer>(errno: &Errno, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_i32(*errno as i32)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Errno, D::Error> {
        i32::deserialize(from).map(Errno::from_raw)
    }
}

impl Cause {
    pub(super) fn kernel(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(number) => Self::Kernel { errno: Errno::from_raw(number) },
            None => Self::Host(error.to_string()),
        }
    }
}

impl StepError {
    /// What became of a step that something stopped.
    pub(super) fn new(step: Step, cause: Cause) -> Self {
        let remedy = remedy(&step, &cause);
        Self { step, cause: Box::new(cause), remedy }
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match (&self.step, &*self.cause) {
            (Step::Reset { .. } | Step::Scrub { .. }, _) => ErrorKind::ResetFailed,
            (Step::CheckViable { .. }, _) => ErrorKind::NotViable,
            (Step::Shape { .. }, Cause::Kernel { errno: Errno::EINVAL | Errno::ERANGE }) => {
                ErrorKind::InvalidArgument
            }
            (Step::Shape { .. }, Cause::Kernel { errno: Errno::EIO | Errno::ENOSPC }) => {
                ErrorKind::Busy
            }
            (Step::LoadModule { .. }, _)
            | (
                Step::Shape { .. } | Step::NodeAccess { .. },
                Cause::Kernel { errno: Errno::EOPNOTSUPP },
            )
            | (Step::Tune { .. }, Cause::Kernel { errno: Errno::EINVAL })
            | (
                Step::SetVirtualFunctions { .. },
                Cause::ReadBack { .. } | Cause::Kernel { errno: Errno::ENOENT | Errno::ENOMEM },
            ) => ErrorKind::Unsupported,
            (_, Cause::InUse | Cause::Kernel { errno: Errno::EBUSY })
            | (
                Step::CreateMediated { .. },
                Cause::Kernel { errno: Errno::ENOSPC | Errno::EUSERS },
            ) => ErrorKind::Busy,
            _ => ErrorKind::Internal,
        }
    }
}

/// What to do about a step that something stopped.
fn remedy(step: &Step, cause: &Cause) -> String {
    match (step, cause) {
        (Step::LoadModule { module }, _) => format!(
            "install the kernel's extra modules (CONFIG_{}=m) and check 'modprobe {module}'",
            module.to_uppercase().replace('-', "_")
        ),
        (Step::UnbindLock { .. }, _) => {
            "stop what uses the card (nvidia-persistenced, dcgm, a display manager, CUDA jobs) \
             and try again"
                .to_owned()
        }
        (Step::Bind { .. }, Cause::Kernel { errno: Errno::EBUSY }) => {
            "if it is a physical function, disable its virtual functions first".to_owned()
        }
        (_, Cause::Changed { .. }) => {
            "find who else manages this device (driverctl, libvirt managed='yes', udev rules)"
                .to_owned()
        }
        (Step::SetVirtualFunctions { .. }, Cause::ReadBack { .. }) => {
            "ask for as many as the driver gives, or see the kernel log (journalctl -k)".to_owned()
        }
        (Step::SetVirtualFunctions { .. }, Cause::Kernel { errno: Errno::ENOMEM }) => {
            "the firmware left too little memory space or too few bus numbers: enable SR-IOV \
             there, or boot with 'pci=realloc' or 'pci=assign-busses'"
                .to_owned()
        }
        (Step::SetVirtualFunctions { .. }, Cause::Kernel { errno: Errno::ENOENT }) => {
            "its driver cannot make virtual functions; load the one that can ('lspci -k' names \
             the modules for a device)"
                .to_owned()
        }
        (Step::SetVirtualFunctions { by: Maker::SriovManage, .. }, Cause::Program(_)) => {
            "stop what uses the card (nvidia-persistenced, dcgm, vGPUs) and try again".to_owned()
        }
        (Step::Shape { .. }, Cause::Kernel { errno: Errno::EOPNOTSUPP }) => {
            "the driver of its physical function cannot do that; ask for less".to_owned()
        }
        (Step::NodeAccess { .. }, Cause::Kernel { errno: Errno::EOPNOTSUPP }) => {
            "mount devtmpfs with access control lists (CONFIG_TMPFS_POSIX_ACL), or start the \
             guest as root"
                .to_owned()
        }
        (Step::LockMemory { process, .. }, _) => {
            format!("see whether process {process} still runs")
        }
        (Step::Shape { setting: Setting::MaxRate, .. }, Cause::Kernel { errno: Errno::EINVAL }) => {
            "a rate takes a link: set the card's interface up, and give at most its speed"
                .to_owned()
        }
        (Step::Shape { device, setting, .. }, Cause::Kernel { errno }) => {
            let what = match errno {
                Errno::EIO | Errno::ENOSPC => "its physical function has no room for that now",
                Errno::EBUSY => "it is in use",
                _ => "its driver does not take that",
            };
            format!("{what}: see what {} may be with 'vfioctl vf show {device}'", setting.label())
        }
        (Step::Tune { setting: Tunable::ResetMethod, .. }, _) => {
            "name reset methods that it has ('vfioctl show')".to_owned()
        }
        (Step::Scrub { device, with: Scrubber::Command { .. } }, Cause::Program(_)) => {
            format!("see to the program; 'vfioctl heal {device}' runs it again")
        }
        (Step::Scrub { device, with: Scrubber::Nvme }, Cause::Program(_)) => format!(
            "see whether nvme-cli is installed and the disk well; 'vfioctl heal {device}' tries \
             again"
        ),
        (Step::Reset { device, .. } | Step::Scrub { device, .. }, _) => {
            format!("the device may need its power cycled; 'vfioctl heal {device}' tries again")
        }
        (Step::CreateMediated { .. }, Cause::Kernel { errno: Errno::ENOSPC | Errno::EUSERS }) => {
            "its parent has no room for another; see 'vfioctl mdev list'".to_owned()
        }
        (Step::CheckViable { .. }, Cause::Kernel { errno: Errno::EBUSY }) => {
            "another process has the group open; see 'fuser -v /dev/vfio/*'".to_owned()
        }
        _ => "see the kernel log (journalctl -k) for its reason".to_owned(),
    }
}
