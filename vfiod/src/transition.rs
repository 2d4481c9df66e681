//! Carries the steps of a lease out, one after another, with the ledger written between them.
//! Changes the kernel through [`libvfio::step`] alone. Blocks: never call it from the bus's task.

use std::collections::BTreeSet;
use std::io;

use libvfio::host::HostRoot;
use libvfio::step::StepError;
use tracing::{debug, warn};

use crate::lease::{Lease, Recorded};
use crate::ledger::Ledger;

/// Why a way was not walked to its end.
#[derive(Debug, thiserror::Error)]
pub enum Stopped {
    /// The kernel did not carry a step out.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The ledger could not be written, so nothing more was changed.
    #[error("cannot write the lease ledger: {0}; free space in /run and try again")]
    Ledger(#[from] io::Error),
}

/// Walks the way to the guest and stops at the first step that fails.
pub fn forward(host: &HostRoot, ledger: &Ledger, lease: &mut Lease) -> Result<(), Stopped> {
    ledger.write(lease)?;
    for at in 0..lease.forward.len() {
        let step = &lease.forward[at].step;
        let outcome = step.execute(host)?;
        debug!(lease = lease.id, step = step.name(), ?outcome, "{step}");
        lease.forward[at].outcome = Some(outcome);
        // The last outcome is written with the state that follows from it.
        if at + 1 < lease.forward.len() {
            ledger.write(lease)?;
        }
    }
    Ok(())
}

/// Walks the way back as far as it can: a function whose step fails is left where it is, the
/// others go home. Returns what failed.
pub fn backward(host: &HostRoot, ledger: &Ledger, lease: &mut Lease) -> Vec<Stopped> {
    let mut failures = Vec::new();
    let mut stuck = BTreeSet::new();
    for at in 0..lease.backward.len() {
        let Recorded { step, outcome } = &lease.backward[at];
        let device = step.device();
        let gone = device.is_some_and(|d| !host.function(d).path().exists());
        if outcome.is_some() || gone || device.is_some_and(|d| stuck.contains(&d)) {
            continue;
        }
        if let Err(error) = ledger.write(lease) {
            // Giving devices back matters more than recording it: a restart reads the kernel.
            warn!(lease = lease.id, %error, "cannot write the lease ledger");
        }
        let step = &lease.backward[at].step;
        match step.execute(host) {
            Ok(outcome) => {
                debug!(lease = lease.id, step = step.name(), ?outcome, "{step}");
                lease.backward[at].outcome = Some(outcome);
            }
            Err(error) => {
                warn!(lease = lease.id, step = step.name(), %error, "a step back failed");
                stuck.extend(device);
                failures.push(error.into());
            }
        }
    }
    failures
}
