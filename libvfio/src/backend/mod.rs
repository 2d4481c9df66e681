//! What can be set on virtual functions, and by whom: the kernel's own means and those of vendors'
//! drivers, behind one trait. Each looks for its files and offers what they are for. Reads the host;
//! writes for [`crate::step`] alone.
//!
//! A virtual function that no backend offers anything for is the generic one: made through
//! `sriov_numvfs`, and leased as it is on a VFIO driver.

mod network;
mod nvidia;
mod vectors;
mod xe;

pub(crate) use nvidia::SRIOV_MANAGE;
pub use nvidia::types as vgpu_types;
pub use xe::choices as priorities;

use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::address::PciAddress;
use crate::error::Error;
use crate::host::{HostRoot, SysDir};
use crate::shape::{Capability, Setting, Value};

/// Somebody who sets things on virtual functions.
pub(crate) trait VfBackend: Sync {
    /// The word for it.
    fn name(&self) -> &'static str;

    /// What it can set on a virtual function now; nothing where its files are absent. What cannot be
    /// read is not offered, for it could not be given back.
    fn offers(&self, host: &HostRoot, function: &Virtual) -> io::Result<Vec<Capability>>;

    /// Sets one of what it offers. For [`crate::step`] alone.
    fn write(
        &self,
        host: &HostRoot,
        function: &Virtual,
        setting: Setting,
        value: &Value,
    ) -> io::Result<()>;

    /// What a setting is now, if it offers that.
    fn read(
        &self,
        host: &HostRoot,
        function: &Virtual,
        setting: Setting,
    ) -> io::Result<Option<Value>> {
        let offers = self.offers(host, function)?;
        Ok(offers.into_iter().find(|offer| offer.setting == setting).map(|offer| offer.value))
    }

    /// Whether what is found is what was asked for: a driver may round.
    fn is(&self, _: Setting, wanted: &Value, found: &Value) -> bool {
        wanted == found
    }

    /// By whom this physical function's virtual ones are made, if not by the kernel alone.
    fn maker(&self, _: &HostRoot, _physical: PciAddress) -> Option<Maker> {
        None
    }
}

/// All backends.
const BACKENDS: [&dyn VfBackend; 4] =
    [&network::Network, &vectors::Vectors, &xe::Xe, &nvidia::Nvidia];

/// Who makes virtual functions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Maker {
    /// The kernel, when `sriov_numvfs` is written.
    #[default]
    Kernel,
    /// NVIDIA's program, which makes all or none and leaves each on the nvidia driver; that driver
    /// rejects a write to `sriov_numvfs`.
    SriovManage,
}

/// What somebody offers for a virtual function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The word for who does.
    pub backend: String,
    /// The setting.
    pub capability: Capability,
}

/// A virtual function, and its place among those of its physical one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Virtual {
    device: PciAddress,
    physical: PciAddress,
    /// From 0, as the kernel numbers its links.
    index: u32,
}

impl Virtual {
    fn of(host: &HostRoot, device: PciAddress) -> Option<Self> {
        let physical: PciAddress = host.function(device).link_name("physfn")?.parse().ok()?;
        let dir = host.function(physical);
        let own = |name: &String| dir.link_name(name).and_then(|n| n.parse().ok()) == Some(device);
        let names = dir.list().ok()?;
        let link = names.iter().filter(|name| name.starts_with("virtfn")).find(|name| own(name))?;
        Some(Self { device, physical, index: link.strip_prefix("virtfn")?.parse().ok()? })
    }
}

/// All that can be set on a function now; nothing for one that is no virtual function. What it reads
/// may be read under locks that a driver which hangs holds for ever.
pub fn offers(host: &HostRoot, device: PciAddress) -> io::Result<Vec<Offer>> {
    let Some(function) = Virtual::of(host, device) else { return Ok(Vec::new()) };
    let mut all = Vec::new();
    for backend in BACKENDS {
        let offers = backend.offers(host, &function)?.into_iter();
        let name = backend.name();
        all.extend(offers.map(|capability| Offer { backend: name.to_owned(), capability }));
    }
    Ok(all)
}

/// By whom a physical function's virtual ones are made.
pub fn maker(host: &HostRoot, physical: PciAddress) -> Maker {
    let maker = BACKENDS.iter().find_map(|backend| backend.maker(host, physical));
    maker.unwrap_or_default()
}

/// One setting of one virtual function, for [`crate::step`] to change.
pub(crate) struct Handle<'a> {
    host: &'a HostRoot,
    function: Virtual,
    setting: Setting,
    backend: &'static dyn VfBackend,
}

impl<'a> Handle<'a> {
    /// The setting and what it is now; `None` if nobody offers it.
    pub(crate) fn find(
        host: &'a HostRoot,
        device: PciAddress,
        setting: Setting,
    ) -> io::Result<Option<(Self, Value)>> {
        let Some(function) = Virtual::of(host, device) else { return Ok(None) };
        for backend in BACKENDS {
            if let Some(value) = backend.read(host, &function, setting)? {
                return Ok(Some((Self { host, function, setting, backend }, value)));
            }
        }
        Ok(None)
    }

    /// What it is now.
    pub(crate) fn read(&self) -> io::Result<Option<Value>> {
        self.backend.read(self.host, &self.function, self.setting)
    }

    /// Whether what was found is what was wanted.
    pub(crate) fn is(&self, wanted: &Value, found: &Value) -> bool {
        self.backend.is(self.setting, wanted, found)
    }

    /// Sets it.
    pub(crate) fn write(&self, value: &Value) -> io::Result<()> {
        self.backend.write(self.host, &self.function, self.setting, value)
    }
}

/// The text of an attribute; `None` if the kernel does not offer it.
fn text(dir: &SysDir, name: &str) -> io::Result<Option<String>> {
    dir.attr(name).map_err(|error| match error {
        Error::Io { source, .. } => source,
        other => io::Error::other(other),
    })
}

/// A number that an attribute reads; `None` where there is none.
fn number<T: FromStr>(dir: &SysDir, name: &str) -> Option<T> {
    text(dir, name).ok().flatten()?.parse().ok()
}

/// What nobody can do.
fn unsupported() -> io::Error {
    io::Error::from_raw_os_error(nix::libc::EOPNOTSUPP)
}
