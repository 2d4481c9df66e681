//! Carries the steps of a lease out, one after another, with the ledger written between them.
//! Changes the kernel through workers alone. Blocks: never call it from the bus's task.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use libvfio::address::PciAddress;
use libvfio::error::ErrorKind;
use libvfio::host::HostRoot;
use libvfio::pci::Binding;
use libvfio::plan;
use libvfio::step::{Outcome, Step, StepError};
use tracing::{debug, warn};

use crate::crash;
use crate::lease::{Lease, Recorded};
use crate::ledger::{Files, Ledger};
use crate::worker::{Carried, Deadlines, Workers};

/// How long a device whose step back failed is given before it is tried again.
const AGAIN: Duration = Duration::from_millis(100);

/// Why a way was not walked to its end.
#[derive(Debug, thiserror::Error)]
pub enum Stopped {
    /// The kernel did not carry a step out.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The ledger could not be written, so nothing more was changed.
    #[error("cannot write the lease ledger: {0}; free space in /run and try again")]
    Ledger(#[from] io::Error),
    /// A step took longer than it may.
    #[error("the kernel did not {step} within {} s", limit.as_secs_f32())]
    Late {
        /// The step.
        step: Step,
        /// How long it may take.
        limit: Duration,
    },
    /// The process that was to carry a step out ended, or was never there.
    #[error("no worker could {step}: {source}; see the journal of vfiod")]
    Lost {
        /// The step.
        step: Step,
        /// What became of the worker.
        source: io::Error,
    },
    /// Another device is where the lease's was.
    #[error("another device is at {0} now, which is left as it is")]
    Stranger(PciAddress),
}

impl Stopped {
    /// The step that was not carried out, if it was one.
    pub fn step(&self) -> Option<&Step> {
        match self {
            Self::Step(error) => Some(&error.step),
            Self::Late { step, .. } | Self::Lost { step, .. } => Some(step),
            Self::Ledger(_) | Self::Stranger(_) => None,
        }
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Step(error) => error.kind(),
            Self::Ledger(_) | Self::Lost { .. } => ErrorKind::Internal,
            Self::Late { .. } => ErrorKind::Wedged,
            Self::Stranger(_) => ErrorKind::IdentityMismatch,
        }
    }
}

/// Whoever wants to know when a step does not return in time, and when it does after all.
pub trait Watcher {
    /// `step` has not returned within `limit`.
    fn late(&self, lease: &mut Lease, step: &Step, limit: Duration);
    /// It has now.
    fn loose(&self, lease: &mut Lease);
}

/// What steps are carried out with.
#[derive(Debug, Clone)]
pub struct Means {
    /// The host.
    pub host: HostRoot,
    /// Who carries them out.
    pub workers: Arc<Workers>,
    /// How long each may take.
    pub deadlines: Deadlines,
}

/// What it takes to walk.
#[derive(Debug, Clone)]
pub struct Walker {
    /// What steps are carried out with.
    pub means: Means,
    /// Where each is recorded.
    pub ledger: Ledger,
}

/// One lease's way, there or back.
#[allow(missing_debug_implementations)] // It is never kept.
pub struct Walk<'a> {
    walker: &'a Walker,
    watcher: &'a dyn Watcher,
    /// Locked until no worker is at a step of the lease any more. Without them, which only a directory
    /// that cannot be written to explains, a restart could not see that one is.
    files: Option<Files>,
}

impl Walker {
    /// To walk the way of the lease with this id. Waits for the worker of an earlier daemon that is
    /// still at a step of it.
    pub fn walk<'a>(&'a self, id: &str, watcher: &'a dyn Watcher) -> Walk<'a> {
        let files = self.ledger.lock(id);
        let files =
            files.inspect_err(|error| warn!(lease = id, %error, "cannot lock a lease")).ok();
        Walk { walker: self, watcher, files }
    }
}

impl Walk<'_> {
    /// Walks the way to the guest and stops at the first step that fails or is late.
    pub fn forward(&self, lease: &mut Lease) -> Result<(), Stopped> {
        self.write(lease)?;
        for at in 0..lease.forward.len() {
            let step = lease.forward[at].step.clone();
            let Done { outcome, late } = self.carry_out(lease, &step)?;
            lease.forward[at].outcome = Some(outcome);
            if let Some(limit) = late {
                return Err(Stopped::Late { step, limit });
            }
            // The last outcome is written with the state that follows from it.
            if at + 1 < lease.forward.len() {
                self.write(lease)?;
            }
        }
        Ok(())
    }

    /// Walks the way back as far as it can, all functions but `strangers`, whom it leaves where they
    /// are. One whose step fails is tried once more, from where it is then; the others go home.
    /// Returns what failed.
    pub fn backward(&self, lease: &mut Lease, strangers: &BTreeSet<PciAddress>) -> Vec<Stopped> {
        let mut failures: Vec<Stopped> = strangers.iter().copied().map(Stopped::Stranger).collect();
        failures.extend(self.remove_mediated(lease));
        let mut failed = self.back(lease, strangers);
        let mut again: BTreeSet<PciAddress> =
            failed.iter().filter(|(_, why)| is_worth_more(lease, why)).map(|f| f.0).collect();
        // The kernel may have done other than it was asked for, where there was nothing to undo.
        let left = |device: &PciAddress| {
            strangers.contains(device) || failed.iter().any(|failed| concerns(failed, *device))
        };
        if lease.failure.is_none() {
            let touched = lease.touched().into_iter().filter(|device| !left(device));
            again.extend(touched.filter(|device| self.has_strayed(lease, *device)));
        }
        if !again.is_empty() {
            std::thread::sleep(AGAIN);
            for device in &again {
                self.turn_home(lease, *device);
            }
            let kept = lease.devices.keys().copied().chain(failed.iter().map(|f| f.0));
            let kept = kept.filter(|device| failed.iter().any(|failed| concerns(failed, *device)));
            let kept = kept.filter(|device| !again.contains(device));
            let left: BTreeSet<PciAddress> = kept.chain(strangers.iter().copied()).collect();
            let still = self.back(lease, &left);
            failed.retain(|(device, _)| left.contains(device) || self.has_strayed(lease, *device));
            failed.extend(still);
        }
        failures.extend(failed.into_iter().map(|(_, why)| why));
        failures
    }

    /// Has the lease's mediated devices removed, each tried once more where that fails.
    fn remove_mediated(&self, lease: &mut Lease) -> Vec<Stopped> {
        let mut failures = Vec::new();
        for at in 0..lease.backward.len() {
            let Recorded { step, outcome } = lease.backward[at].clone();
            if step.mediated().is_none() || outcome.is_some() {
                continue;
            }
            if let Err(error) = self.write(lease) {
                warn!(lease = lease.id, %error, "cannot write the lease ledger");
            }
            let done = self.carry_out(lease, &step).or_else(|error| {
                warn!(lease = lease.id, step = step.name(), %error, "a step back failed");
                std::thread::sleep(AGAIN);
                self.carry_out(lease, &step)
            });
            match done {
                Ok(Done { outcome, .. }) => lease.backward[at].outcome = Some(outcome),
                Err(error) => failures.push(error),
            }
        }
        failures
    }

    /// Replaces what is left of a device's way back to its driver by the way from where it is.
    fn turn_home(&self, lease: &mut Lease, device: PciAddress) {
        let Ok(now) = Binding::read(&self.walker.means.host, device) else { return };
        let Some(found) = lease.devices.get(&device) else { return };
        let mut way = Recorded::todo(plan::home(device, &now, &found.before));
        // Where its settings are taken back is on the way: after its driver has let go.
        let shapes = |r: &Recorded| matches!(r.step, Step::Shape { .. });
        let left = |r: &Recorded| r.outcome.is_none() && r.step.device() == Some(device);
        let unshaped: Vec<Recorded> =
            lease.backward.iter().filter(|r| left(r) && shapes(r)).cloned().collect();
        let unbound = way.iter().rposition(|r| matches!(r.step, Step::Unbind { .. }));
        let place = unbound.map_or(0, |at| at + 1);
        way.splice(place..place, unshaped);
        // A step that was cut short may have been carried out; what is so now is on record then.
        let is_so = |step: &Step| matches!(step, Step::SetOverride { to, .. } if *to == now.driver_override);
        for recorded in lease.backward.iter_mut().filter(|r| left(r) && is_so(&r.step)) {
            recorded.outcome = Some(Outcome::AlreadySo);
        }
        lease.backward.retain(|r| !left(r) || !(r.step.is_binding() || shapes(r)));
        lease.backward.extend(way);
    }

    /// Whether a device is there, and not as it was before the lease.
    fn has_strayed(&self, lease: &Lease, device: PciAddress) -> bool {
        let dir = self.walker.means.host.function(device);
        let now = match lease.override_read_back(device) {
            Some(driver_override) => Some(Binding {
                driver: dir.link_name("driver"),
                driver_override: driver_override.clone(),
            }),
            None => Binding::read(&self.walker.means.host, device).ok(),
        };
        dir.path().exists() && now.as_ref() != lease.devices.get(&device).map(|found| &found.before)
    }

    /// Walks the way back once, without the functions that are `left`; which failed, and why.
    fn back(&self, lease: &mut Lease, left: &BTreeSet<PciAddress>) -> Vec<(PciAddress, Stopped)> {
        let mut failures = Vec::new();
        let mut stuck = left.clone();
        for at in 0..lease.backward.len() {
            let step = lease.backward[at].step.clone();
            // A step of no device changes none.
            let Some(device) = step.device() else { continue };
            let gone = !self.walker.means.host.function(device).path().exists();
            if lease.backward[at].outcome.is_some() || gone || stuck.contains(&device) {
                continue;
            }
            if let Err(error) = self.write(lease) {
                // Giving devices back matters more than recording it: a restart reads the kernel.
                warn!(lease = lease.id, %error, "cannot write the lease ledger");
            }
            match self.carry_out(lease, &step) {
                Ok(Done { outcome, .. }) => lease.backward[at].outcome = Some(outcome),
                Err(error) => {
                    warn!(lease = lease.id, step = step.name(), %error, "a step back failed");
                    stuck.insert(device);
                    stuck.extend(step.others());
                    failures.push((device, error));
                }
            }
        }
        failures
    }

    /// Has one step carried out, however long that takes.
    pub fn carry_out(&self, lease: &mut Lease, step: &Step) -> Result<Done, Stopped> {
        let lost = |source| Stopped::Lost { step: step.clone(), source };
        let limit = self.walker.means.deadlines.of(step);
        let turn = self.walker.means.workers.turn();
        crash::point("before a step");
        let lock = self.files.as_ref().map(Files::lock_on);
        let call = self.walker.means.workers.step(step, lock).map_err(lost)?;
        let (carried, late): (Carried, _) = match call.carried(Some(limit)).map_err(lost)? {
            Ok(carried) => (carried, None),
            Err(call) => {
                drop(turn);
                self.watcher.late(lease, step, limit);
                let carried = call.carried(None);
                self.watcher.loose(lease);
                let Ok(carried) = carried.map_err(lost)? else { return Err(lost(ended())) };
                (carried, Some(limit))
            }
        };
        crash::point("after a step");
        let outcome = carried?;
        debug!(lease = lease.id, step = step.name(), ?outcome, "{step}");
        Ok(Done { outcome, late })
    }

    /// Puts the lease on record as it is now.
    pub fn write(&self, lease: &Lease) -> io::Result<()> {
        match &self.files {
            Some(files) => self.walker.ledger.write_to(files, lease),
            None => self.walker.ledger.write(lease),
        }
    }
}

/// Whether a step back that failed is also this device's.
fn concerns((device, why): &(PciAddress, Stopped), other: PciAddress) -> bool {
    *device == other || why.step().is_some_and(|step| step.others().contains(&other))
}

/// Whether a device whose step back failed like this may go home another way. One that was taken
/// from the lease, or may not be clean, is for a person to look at.
fn is_worth_more(lease: &Lease, why: &Stopped) -> bool {
    let step = match why {
        Stopped::Step(error) => &error.step,
        Stopped::Lost { step, .. } => step,
        Stopped::Ledger(_) | Stopped::Late { .. } | Stopped::Stranger(_) => return false,
    };
    // On its way to where it is scrubbed it must not go home instead.
    let unclean = step.is_binding() && step.device().is_some_and(|device| lease.is_unclean(device));
    lease.failure.is_none() && !step.is_cleaning() && !unclean
}

/// A step that was carried out.
#[derive(Debug)]
pub struct Done {
    /// What it did.
    pub outcome: Outcome,
    /// The deadline it passed, if it did.
    pub late: Option<Duration>,
}

/// To wait without a limit ends with an answer or an error.
fn ended() -> io::Error {
    io::Error::other("the worker did not answer")
}
