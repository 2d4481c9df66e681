//! The simulated kernel: described hosts behind a FUSE file system that behaves like the Linux
//! driver core. Touches `/dev/fuse` and its own mount point, never the machine's sysfs or devices.

mod attributes;
mod binding;
mod config;
mod described;
mod event;
mod fault;
mod files;
mod fs;
mod group;
mod inodes;
mod kernel;
mod mediated;
mod notation;
mod open;
mod proc;
mod resource;
mod sriov;
mod store;
mod text;
mod tree;
mod vendor;
mod waiting;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use anyhow::Context;
use fuser::{BackgroundSession, Config, MountOption, SessionACL};
use libvfio::address::PciAddress;
use libvfio::host::HostRoot;
use libvfio::mediated::Uuid;
use libvfio::pci::Binding;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::unistd::{AccessFlags, access, geteuid};
use tempfile::TempDir;

pub use described::{
    Copies, Described, Disk, Driver, Express, Function, HGX8, KernelOptions, Link, MEDIATED, Mount,
    Msix, Parent, PartType, Process, SCALE, Sriov, VGPU, Vgpu, VgpuType, WORKSTATION, XE, Xe,
};
pub use event::{Action, Uevent};
pub use fault::{Damage, Effect, Fault, Operation};
pub use kernel::{Answer, Kernel, Stop, Written};
pub use notation::{BarSize, IdPair, IdPattern, Malformed};
pub use open::Opener;
pub use tree::Entry;

/// A described host, mounted. Unmounts when dropped, also while a panic unwinds; whoever still
/// waits for the simulated kernel then gets an error.
#[derive(Debug)]
pub struct Sim {
    shared: Arc<waiting::Shared>,
    root: PathBuf,
    /// Removed after unmounting, if it is ours.
    _directory: Option<TempDir>,
    session: Option<BackgroundSession>,
}

impl Sim {
    /// Boots a described host and mounts it on a new directory.
    pub fn mount(host: &Described) -> anyhow::Result<Self> {
        let directory = TempDir::with_prefix(format!("{}-", host.name))?;
        let root = directory.path().to_owned();
        Self::start(host, root, Some(directory), false)
    }

    /// The same where no fault makes a write sleep: then files that can be written are remembered
    /// too, so that all is faster.
    pub fn mount_lasting(host: &Described) -> anyhow::Result<Self> {
        let directory = TempDir::with_prefix(format!("{}-", host.name))?;
        let root = directory.path().to_owned();
        Self::start(host, root, Some(directory), true)
    }

    /// Boots a described host and mounts it on an empty directory.
    pub fn mount_at(host: &Described, root: &Path) -> anyhow::Result<Self> {
        Self::start(host, root.to_owned(), None, false)
    }

    fn start(
        host: &Described,
        root: PathBuf,
        directory: Option<TempDir>,
        lasting: bool,
    ) -> anyhow::Result<Self> {
        let shared = Arc::new(waiting::Shared::new(Kernel::boot(host)));
        let mut config = Config::default();
        config.mount_options =
            vec![MountOption::FSName(host.name.clone()), MountOption::DefaultPermissions];
        // For others to see a mount of one user takes that user's say in /etc/fuse.conf.
        config.acl = if geteuid().is_root() { SessionACL::All } else { SessionACL::Owner };
        config.n_threads = Some(2);
        let glue = fs::Glue::new(shared.clone(), lasting);
        let numbers = glue.numbers();
        let session = fuser::spawn_mount(glue, &root, &config)
            .with_context(|| format!("cannot mount on {}: {}", root.display(), remedy()))?;
        shared.cached_by(fs::Cache::new(numbers, session.notifier()));
        Ok(Self { shared, root, _directory: directory, session: Some(session) })
    }

    /// Where the host's `/` is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The host, as the library takes it.
    pub fn host(&self) -> HostRoot {
        HostRoot::new(&self.root)
    }

    /// The directory of a function in sysfs.
    pub fn function(&self, address: PciAddress) -> PathBuf {
        self.root.join(format!("sys/bus/pci/devices/{address}"))
    }

    /// Makes something go wrong.
    pub fn arm(&self, fault: Fault) {
        self.shared.with(|kernel| kernel.arm(fault));
    }

    /// Forgets the faults that have not struck.
    pub fn disarm(&self) {
        self.shared.with(Kernel::disarm);
    }

    /// Forgets those of one function.
    pub fn disarm_at(&self, device: PciAddress) {
        self.shared.with(|kernel| kernel.disarm_at(device));
    }

    /// Whether somebody is blocked for ever.
    pub fn is_blocked(&self) -> bool {
        self.shared.is_blocked()
    }

    /// Has done, now, what would have blocked for ever.
    pub fn let_go(&self) {
        self.shared.let_go();
    }

    /// Plugs a described function in.
    pub fn plug(&self, address: PciAddress) -> Result<(), Errno> {
        self.shared.with(|kernel| kernel.plug(address))
    }

    /// Takes a function out by surprise, with all that is below it.
    pub fn unplug(&self, address: PciAddress) -> Result<(), Errno> {
        self.shared.with(|kernel| kernel.unplug(address))
    }

    /// Has a function report an error that nobody can correct.
    pub fn report_error(&self, address: PciAddress, fatal: bool) -> Result<(), Errno> {
        self.shared.with(|kernel| kernel.report_error(address, fatal))
    }

    /// Loads a module, as `modprobe` would.
    pub fn load(&self, module: &str) -> Result<(), Errno> {
        self.shared.with(|kernel| kernel.load(module))
    }

    /// Driver and override of every function, as their files would show them.
    pub fn bindings(&self) -> BTreeMap<PciAddress, Binding> {
        self.shared.with(|kernel| kernel.bindings())
    }

    /// All that a virtual function was given of what its physical one shares out, in words.
    pub fn given(&self, address: PciAddress) -> Option<String> {
        self.shared.with(|kernel| kernel.given(address))
    }

    /// The memory of a function, where it is known that a region shows all of that.
    pub fn memory(&self, address: PciAddress) -> Option<Arc<File>> {
        self.shared.with(|kernel| kernel.memory(address))
    }

    /// The mediated devices there are.
    pub fn mediated(&self) -> BTreeSet<Uuid> {
        self.shared.with(|kernel| kernel.mediated())
    }

    /// The writes seen so far.
    pub fn journal(&self) -> Vec<Written> {
        self.shared.with(|kernel| kernel.journal().to_vec())
    }

    /// The events from now on, each as it happens, until the simulation ends. There is one
    /// subscriber at a time, and nothing left for [`events`](Self::events).
    pub fn subscribe(&self) -> Receiver<Uevent> {
        self.shared.subscribe()
    }

    /// The events the kernel would have sent since this was last asked.
    pub fn events(&self) -> Vec<Uevent> {
        self.shared.with(Kernel::take_events)
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        self.shared.end();
        // Lazily, for somebody may still be in there. Who is not root unmounts by fusermount3.
        if geteuid().is_root()
            && let Err(errno) = umount2(&self.root, MntFlags::MNT_DETACH)
            && errno != Errno::EINVAL
        {
            eprintln!("cannot unmount {}: {}", self.root.display(), io::Error::from(errno));
        }
        drop(self.session.take());
    }
}

fn remedy() -> &'static str {
    let device = Path::new("/dev/fuse");
    if !device.exists() {
        "there is no /dev/fuse; run 'modprobe fuse', and in a container pass --device /dev/fuse"
    } else if access(device, AccessFlags::R_OK | AccessFlags::W_OK).is_err() {
        "/dev/fuse is not for this user; run as root, or give it the mode udev does, 0666"
    } else {
        "run as root, or install fuse3 for its fusermount3"
    }
}
