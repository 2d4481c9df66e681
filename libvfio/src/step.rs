//! One change of the kernel, done, read back and undone. The one place that writes to the host:
//! nothing outside this module may change a driver, an override, a module or a device.

use std::fmt;
use std::io;
use std::process::Command;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::address::PciAddress;
use crate::error::{Error, ErrorKind};
use crate::host::{HostRoot, LOAD_MODULE};
use crate::pci::{Binding, Function};
use crate::vfio;

/// One change. What a dry run prints, what is executed, what the ledger records and, inverted,
/// what undo and release run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub enum Step {
    /// Load the module that brings a driver, so that its directory appears on the PCI bus.
    LoadModule {
        /// The module, as `modprobe` takes it.
        module: String,
    },
    /// Take NVIDIA's unbind lock, without which unbinding a card in use never returns.
    UnbindLock {
        /// The function.
        device: PciAddress,
    },
    /// Take the function from its driver.
    Unbind {
        /// The function.
        device: PciAddress,
        /// The driver that has it.
        driver: String,
    },
    /// Say which driver alone may have the function.
    SetOverride {
        /// The function.
        device: PciAddress,
        /// The override there is.
        from: Option<String>,
        /// The override there shall be.
        to: Option<String>,
    },
    /// Give the function to a driver.
    Bind {
        /// The function.
        device: PciAddress,
        /// The driver.
        driver: String,
    },
    /// Reset the function through VFIO, alone if it can, else with all that share its bus.
    Reset {
        /// The function.
        device: PciAddress,
    },
    /// Ask VFIO whether the whole group may be given to a guest. Changes nothing.
    CheckViable {
        /// The group's number.
        group: u32,
    },
}

/// What executing a step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The kernel was changed (or, for a check, asked).
    Done,
    /// It was so already.
    AlreadySo,
}

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
    fn kernel(error: &io::Error) -> Self {
        Self::Kernel { errno: Errno::from_raw(error.raw_os_error().unwrap_or(0)) }
    }
}

impl StepError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match (&self.step, &*self.cause) {
            (Step::Reset { .. }, _) => ErrorKind::ResetFailed,
            (Step::CheckViable { .. }, _) => ErrorKind::NotViable,
            (Step::LoadModule { .. }, _) => ErrorKind::Unsupported,
            (_, Cause::InUse | Cause::Kernel { errno: Errno::EBUSY }) => ErrorKind::Busy,
            _ => ErrorKind::Internal,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LoadModule { module } => write!(f, "load module {module}"),
            Self::UnbindLock { device } => write!(f, "take the unbind lock of {device}"),
            Self::Unbind { device, driver } => write!(f, "unbind {device} from {driver}"),
            Self::SetOverride { device, from, to: Some(to) } => {
                write!(
                    f,
                    "set driver_override of {device} to {to} (was {})",
                    or_none(from.as_ref())
                )
            }
            Self::SetOverride { device, from, to: None } => {
                write!(f, "clear driver_override of {device} (was {})", or_none(from.as_ref()))
            }
            Self::Bind { device, driver } => write!(f, "bind {device} to {driver}"),
            Self::Reset { device } => write!(f, "reset {device}"),
            Self::CheckViable { group } => write!(f, "check that VFIO finds group {group} viable"),
        }
    }
}

fn or_none(name: Option<&String>) -> &str {
    name.map_or("none", String::as_str)
}

impl Step {
    /// The words of all kinds of steps.
    pub const KINDS: [&str; 7] =
        ["load-module", "unbind-lock", "unbind", "set-override", "bind", "reset", "check-viable"];

    /// The word for this kind of step, as it is serialised.
    pub fn name(&self) -> &'static str {
        match self {
            Self::LoadModule { .. } => "load-module",
            Self::UnbindLock { .. } => "unbind-lock",
            Self::Unbind { .. } => "unbind",
            Self::SetOverride { .. } => "set-override",
            Self::Bind { .. } => "bind",
            Self::Reset { .. } => "reset",
            Self::CheckViable { .. } => "check-viable",
        }
    }

    /// The function it changes, if it changes one.
    pub fn device(&self) -> Option<PciAddress> {
        match self {
            Self::UnbindLock { device }
            | Self::Unbind { device, .. }
            | Self::SetOverride { device, .. }
            | Self::Bind { device, .. }
            | Self::Reset { device } => Some(*device),
            Self::LoadModule { .. } | Self::CheckViable { .. } => None,
        }
    }

    /// The step that takes this one back; `None` where nothing needs to be. A loaded module stays,
    /// the unbind lock ends with the binding, a reset cannot be undone, a check changed nothing.
    pub fn inverse(&self) -> Option<Self> {
        match self {
            Self::Unbind { device, driver } => {
                Some(Self::Bind { device: *device, driver: driver.clone() })
            }
            Self::Bind { device, driver } => {
                Some(Self::Unbind { device: *device, driver: driver.clone() })
            }
            Self::SetOverride { device, from, to } => {
                Some(Self::SetOverride { device: *device, from: to.clone(), to: from.clone() })
            }
            Self::LoadModule { .. }
            | Self::UnbindLock { .. }
            | Self::Reset { .. }
            | Self::CheckViable { .. } => None,
        }
    }

    /// Carries the step out on `host` and reads back that it is so.
    pub fn execute(&self, host: &HostRoot) -> Result<Outcome, StepError> {
        let done = match self {
            Self::LoadModule { module } => load_module(host, module),
            Self::UnbindLock { device } => unbind_lock(host, *device),
            Self::Unbind { device, driver } => unbind(host, *device, driver),
            Self::SetOverride { device, from, to } => {
                set_override(host, *device, from.as_deref(), to.as_deref())
            }
            Self::Bind { device, driver } => bind(host, *device, driver),
            Self::Reset { device } => reset(host, *device),
            Self::CheckViable { group } => check_viable(host, *group),
        };
        done.map_err(|cause| {
            let remedy = self.remedy(&cause);
            StepError { step: self.clone(), cause: Box::new(cause), remedy }
        })
    }

    fn remedy(&self, cause: &Cause) -> String {
        match (self, cause) {
            (Self::LoadModule { module }, _) => format!(
                "install the kernel's extra modules (CONFIG_{}=m) and check 'modprobe {module}'",
                module.to_uppercase().replace('-', "_")
            ),
            (Self::UnbindLock { .. }, _) => {
                "stop what uses the card (nvidia-persistenced, dcgm, a display manager, CUDA jobs) \
                 and try again"
                    .to_owned()
            }
            (Self::Bind { .. }, Cause::Kernel { errno: Errno::EBUSY }) => {
                "if it is a physical function, disable its virtual functions first".to_owned()
            }
            (_, Cause::Changed { .. }) => {
                "find who else manages this device (driverctl, libvirt managed='yes', udev rules)"
                    .to_owned()
            }
            (Self::Reset { .. }, _) => {
                "the device may need its power cycled; do not give it to another tenant".to_owned()
            }
            (Self::CheckViable { .. }, Cause::Kernel { errno: Errno::EBUSY }) => {
                "another process has the group open; see 'fuser -v /dev/vfio/*'".to_owned()
            }
            _ => "see the kernel log (journalctl -k) for its reason".to_owned(),
        }
    }
}

type Done = Result<Outcome, Cause>;

impl From<Error> for Cause {
    fn from(error: Error) -> Self {
        Self::Host(error.to_string())
    }
}

/// `Ok(Done)` if what is found is what was wanted.
fn read_back(wanted: Option<&str>, found: Option<&str>) -> Done {
    if same(wanted, found) {
        return Ok(Outcome::Done);
    }
    let say = |name: Option<&str>| name.unwrap_or("none").to_owned();
    Err(Cause::ReadBack { wanted: say(wanted), found: say(found) })
}

fn changed(wanted: Option<&str>, found: Option<&str>) -> Cause {
    let say = |name: Option<&str>| name.unwrap_or("none").to_owned();
    Cause::Changed { wanted: say(wanted), found: say(found) }
}

fn driver_of(host: &HostRoot, device: PciAddress) -> Option<String> {
    host.function(device).link_name("driver")
}

/// Whether two names mean one driver. A module is named with `_` where its driver's directory may
/// have `-`, and which of them is only seen once the module is there.
fn same(a: Option<&str>, b: Option<&str>) -> bool {
    let plain = |name: &str| name.replace('-', "_");
    a.map(plain) == b.map(plain)
}

/// A driver's name as its directory spells it.
fn spelled(host: &HostRoot, driver: &str) -> String {
    let drivers = host.sys("bus/pci/drivers");
    let dashed = driver.replace('_', "-");
    if !drivers.has(driver) && drivers.has(&dashed) { dashed } else { driver.to_owned() }
}

fn unbind(host: &HostRoot, device: PciAddress, driver: &str) -> Done {
    let now = driver_of(host, device);
    match &now {
        None if host.function(device).path().exists() => return Ok(Outcome::AlreadySo),
        Some(now) if same(Some(now), Some(driver)) => {}
        _ => return Err(changed(Some(driver), now.as_deref())),
    }
    let dir = host.function(device).sub("driver");
    dir.write("unbind", &device.to_string()).map_err(|e| Cause::kernel(&e))?;
    read_back(None, driver_of(host, device).as_deref())
}

/// Binding by the driver's own `bind` file rather than `drivers_probe` takes exactly this driver
/// where several would match, and reports the probe's errno (`drivers/base/bus.c`).
fn bind(host: &HostRoot, device: PciAddress, driver: &str) -> Done {
    let now = driver_of(host, device);
    if same(now.as_deref(), Some(driver)) {
        return Ok(Outcome::AlreadySo);
    }
    if now.is_some() {
        return Err(changed(None, now.as_deref()));
    }
    let dir = host.sys("bus/pci/drivers").sub(&spelled(host, driver));
    dir.write("bind", &device.to_string()).map_err(|e| Cause::kernel(&e))?;
    read_back(Some(driver), driver_of(host, device).as_deref())
}

fn set_override(host: &HostRoot, device: PciAddress, from: Option<&str>, to: Option<&str>) -> Done {
    let now = Binding::read(host, device)?.driver_override;
    if same(now.as_deref(), to) {
        return Ok(Outcome::AlreadySo);
    }
    if !same(now.as_deref(), from) {
        return Err(changed(from, now.as_deref()));
    }
    // A lone newline clears it; an empty write would never reach the kernel.
    let value = to.map_or_else(|| "\n".to_owned(), |driver| spelled(host, driver));
    host.function(device).write("driver_override", &value).map_err(|e| Cause::kernel(&e))?;
    let found = Binding::read(host, device)?.driver_override;
    read_back(to, found.as_deref())
}

fn load_module(host: &HostRoot, module: &str) -> Done {
    let drivers = host.sys("bus/pci/drivers");
    let there = || drivers.has(&spelled(host, module));
    if there() {
        return Ok(Outcome::AlreadySo);
    }
    if host.is_real() {
        modprobe(module)?;
    } else if host.path(LOAD_MODULE).exists() {
        host.write(LOAD_MODULE, module).map_err(|e| Cause::kernel(&e))?;
    } else {
        let why = "modules load on a real or a simulated host only";
        return Err(Cause::Program(why.to_owned()));
    }
    read_back(Some(module), there().then_some(module))
}

fn modprobe(module: &str) -> Result<(), Cause> {
    let output = Command::new("modprobe").arg(module).output().map_err(|e| Cause::kernel(&e))?;
    if !output.status.success() {
        return Err(Cause::Program(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(())
}

/// The write succeeds even when the lock is refused, so it is read back.
fn unbind_lock(host: &HostRoot, device: PciAddress) -> Done {
    let file = format!("proc/driver/nvidia/gpus/{device}/unbindLock");
    let locked = |text: Option<String>| text.is_some_and(|t| t.trim() == "1");
    if locked(host.text(&file)?) {
        return Ok(Outcome::AlreadySo);
    }
    host.write(&file, "1").map_err(|e| Cause::kernel(&e))?;
    if locked(host.text(&file)?) { Ok(Outcome::Done) } else { Err(Cause::InUse) }
}

fn reset(host: &HostRoot, device: PciAddress) -> Done {
    let function = Function::read(host, device).ok_or_else(|| changed(Some("a device"), None))?;
    vfio::reset(host, &function)?;
    let after = Function::read(host, device).ok_or_else(|| changed(Some("a device"), None))?;
    if after.is_silent() {
        return read_back(Some("a device that answers"), Some("all ones in its config space"));
    }
    Ok(Outcome::Done)
}

fn check_viable(host: &HostRoot, group: u32) -> Done {
    match vfio::group_viable(host, group) {
        Ok(true) => Ok(Outcome::Done),
        Ok(false) => read_back(Some("a viable group"), Some("a member on a host driver")),
        Err(Error::Io { source, .. }) => Err(Cause::kernel(&source)),
        Err(other) => Err(other.into()),
    }
}
