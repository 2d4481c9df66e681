//! Handing leased devices to programs: descriptors of their nodes, and leave to lock memory. Opens
//! nothing itself, and keeps none of what workers open.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::PoisonError;
use std::time::Duration;

use libvfio::client::Failure;
use libvfio::error::ErrorKind;
use libvfio::step::{Outcome, Step};
use libvfio::vfio::{self, Interface, Openable};
use nix::errno::Errno;
use tracing::{error, info};

use super::{Broker, internal};
use crate::lease::{Lease, Recorded, State};
use crate::transition::Stopped;
use crate::worker::{MOST_DESCRIPTORS, NotOpened};

/// How long the kernel may take to open a node, which does nothing but that.
const OPENING: Duration = Duration::from_secs(10);

/// Somebody at the nodes of an active lease, which does not end meanwhile.
struct Opening<'a> {
    broker: &'a Broker,
    lease: Lease,
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        let mut data = self.broker.data();
        if let Some(count) = data.opening.get_mut(&self.lease.id) {
            *count -= 1;
            if *count == 0 {
                data.opening.remove(&self.lease.id);
            }
        }
        self.broker.opened.notify_all();
    }
}

impl Broker {
    /// By what the devices of a lease can be opened.
    pub(super) fn interface(&self, lease: &Lease) -> Option<Interface> {
        let all = self.openables(lease);
        if all.is_empty() { None } else { vfio::interface(self.host(), &all) }
    }

    /// A descriptor of each device's node, named by its address or UUID, or of each group's, named
    /// by its number.
    pub fn open_devices(&self, id: &str) -> Result<Vec<(String, OwnedFd)>, Failure> {
        let opening = self.begin_opening(id)?;
        let interface = opening.interface()?;
        let nodes = vfio::nodes(self.host(), interface, &self.openables(&opening.lease));
        let nodes = nodes.map_err(|device| no_node(&device.to_string()))?;
        if nodes.len() > MOST_DESCRIPTORS {
            let why = format!(
                "lease {id} has {} nodes, and a message carries {MOST_DESCRIPTORS} descriptors at \
                 most; lease its devices as several",
                nodes.len()
            );
            return Err(Failure::new(ErrorKind::Unsupported, why));
        }
        let paths = nodes.iter().map(|node| node.path.clone()).collect();
        let opened = self.walker.means.workers.open(paths, OPENING).map_err(|e| not_opened(&e))?;
        info!(lease = id, tenant = opening.lease.tenant, nodes = opened.len(), "opened its nodes");
        Ok(nodes.into_iter().map(|node| node.name).zip(opened).collect())
    }

    /// A descriptor of what translates for a lease's devices.
    pub fn open_iommu(&self, id: &str) -> Result<OwnedFd, Failure> {
        let interface = self.begin_opening(id)?.interface()?;
        self.walker.means.workers.open_iommu(interface, OPENING).map_err(|e| not_opened(&e))
    }

    /// Lets a process that uses a lease lock so much memory.
    pub fn lock_memory(&self, id: &str, process: u32, bytes: u64) -> Result<(), Failure> {
        let most = self.memory();
        if bytes == 0 || most.is_some_and(|most| bytes > most) {
            let why = format!(
                "{bytes} bytes cannot be locked; give 1 to {}, the memory of this host",
                most.unwrap_or(u64::MAX)
            );
            return Err(Failure::new(ErrorKind::InvalidArgument, why));
        }
        let mut opening = self.begin_opening(id)?;
        let step = Step::LockMemory { process, bytes };
        opening.record(Some(Recorded { step: step.clone(), outcome: None }))?;
        match self.carry_out(&step) {
            Ok(outcome) => opening.record(Some(Recorded { step, outcome: Some(outcome) })),
            Err(stopped) => {
                opening.record(None)?;
                Err(Failure::new(stopped.kind(), stopped.to_string()))
            }
        }
    }

    /// Has a step carried out that moves no device, so that a restart need not wait for it.
    fn carry_out(&self, step: &Step) -> Result<Outcome, Stopped> {
        let lost = |source| Stopped::Lost { step: step.clone(), source };
        let limit = self.walker.means.deadlines.of(step);
        let call = self.walker.means.workers.step(step, None).map_err(lost)?;
        match call.carried(Some(limit)).map_err(lost)? {
            Ok(carried) => Ok(carried?),
            Err(call) => {
                // Kept until it is answered, if it ever is.
                std::thread::spawn(move || call.carried(None).map(drop));
                Err(Stopped::Late { step: step.clone(), limit })
            }
        }
    }

    /// The host's memory, in bytes.
    fn memory(&self) -> Option<u64> {
        let text = self.host().proc("meminfo").ok()??;
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib << 10)
    }

    /// What a lease has, functions first.
    fn openables(&self, lease: &Lease) -> Vec<Openable> {
        let inventory = self.inventory();
        let functions = lease.devices.keys().filter_map(|address| inventory.get(*address));
        let functions = functions.map(|function| Openable::from(function.as_ref()));
        let mediated = self.mediated_of(lease).into_iter();
        functions.chain(mediated.map(|(uuid, part)| Openable::of_part(uuid, &part))).collect()
    }

    /// From here on the lease ends only once this is dropped.
    fn begin_opening(&self, id: &str) -> Result<Opening<'_>, Failure> {
        let mut data = self.data();
        let state = data.leases.get(id).map(|lease| lease.state);
        let lease = data.leases.get(id).filter(|lease| lease.state == State::Active).cloned();
        let lease = lease.ok_or_else(|| match state {
            None => Failure::new(ErrorKind::NotFound, format!("there is no lease {id}")),
            Some(state) => {
                let why = format!("lease {id} is {}; only active ones are opened", state.name());
                Failure::new(ErrorKind::Busy, why)
            }
        })?;
        *data.opening.entry(id.to_owned()).or_default() += 1;
        Ok(Opening { broker: self, lease })
    }

    /// Returns when nobody is at a lease's nodes; there will be nobody any more once it ends.
    pub(super) fn await_openings(&self, id: &str) {
        let under_way = |data: &mut super::Data| data.opening.contains_key(id);
        drop(
            self.opened.wait_while(self.data(), under_way).unwrap_or_else(PoisonError::into_inner),
        );
    }
}

impl Opening<'_> {
    fn interface(&self) -> Result<Interface, Failure> {
        let found = self.lease.interface.or_else(|| self.broker.interface(&self.lease));
        found.ok_or_else(|| no_node(&format!("lease {}", self.lease.id)))
    }

    /// Records a step of the lease that is none of its way to the guest, in place of the one before:
    /// only the last limit counts.
    fn record(&mut self, step: Option<Recorded>) -> Result<(), Failure> {
        let mut data = self.broker.data();
        if let Some(lease) = data.leases.get_mut(&self.lease.id) {
            lease.forward.retain(|r| !matches!(r.step, Step::LockMemory { .. }));
            lease.forward.extend(step);
            self.lease = lease.clone();
        }
        drop(data);
        self.broker.walker.ledger.write(&self.lease).map_err(Stopped::from).map_err(|e| {
            error!(lease = self.lease.id, error = %e, "cannot write the lease ledger");
            internal(e)
        })
    }
}

fn no_node(what: &str) -> Failure {
    let why = format!(
        "{what} has no node in /dev/vfio; see the kernel log (journalctl -k), and in a container pass \
         /dev/vfio through"
    );
    Failure::new(ErrorKind::Unsupported, why)
}

fn not_opened(error: &NotOpened) -> Failure {
    match error {
        NotOpened::Kernel(path, Errno::EBUSY) => {
            Failure::new(ErrorKind::Busy, held(path, &error.to_string()))
        }
        NotOpened::Kernel(_, Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => {
            Failure::new(ErrorKind::Unsupported, format!("{error}; see the kernel log"))
        }
        NotOpened::Late(_) => Failure::new(ErrorKind::Wedged, error.to_string()),
        NotOpened::Kernel(..) => Failure::new(
            ErrorKind::Internal,
            format!("{error}; see who changed its owner or mode (udev rules, libvirt)"),
        ),
        NotOpened::Lost(_) => Failure::new(ErrorKind::Internal, error.to_string()),
    }
}

fn held(path: &Path, error: &str) -> String {
    format!(
        "{error}: a group is open once at a time; close it, or see who has it ('fuser -v {}')",
        path.display()
    )
}
