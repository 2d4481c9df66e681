//! What was done so that nothing of a tenant is left in a lease's functions, told from the steps of
//! its way back. Pure.

use libvfio::address::PciAddress;
use libvfio::client::CleanedRecord;
use libvfio::plan::Scrubbing;
use libvfio::policy::Resets;
use libvfio::scrub::{ReadBack, Scrubber};
use libvfio::step::Step;
use serde::{Deserialize, Serialize};

use crate::lease::{Lease, Recorded};

/// What became of one function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cleaned {
    /// The function.
    pub device: PciAddress,
    /// Whether it was reset.
    pub reset: Reset,
    /// Whether its memory was cleared.
    pub scrub: Scrub,
    /// In what that was less than the default, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weaker: Option<String>,
}

/// Whether a function was reset. One that was is as well after it as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reset {
    /// By its own means.
    Alone,
    /// With all others on its bus.
    Bus,
    /// No, by the policy.
    None,
    /// No, by request.
    Skipped,
    /// No: there is no way to, or it was not on VFIO any more.
    Impossible,
    /// No: the function had gone, or another one is in its place.
    Gone,
    /// It failed, or the function did not come back well.
    Failed,
}

/// Whether a function's memory was cleared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scrub {
    /// All of it reads zeros.
    Zeros,
    /// All of it was overwritten with zeros, and those samples of it that were read are.
    ZerosSampled,
    /// Its controller has erased it.
    Erased,
    /// A program of the administrator's says so.
    Command,
    /// No, by the policy.
    None,
    /// No, by request.
    Skipped,
    /// No: nothing is known of such memory.
    Unknown,
    /// No: the function had gone, or another one is in its place.
    Gone,
    /// It failed, or something else than zeros was there.
    Failed,
}

impl Reset {
    /// The word for it, as it is serialised.
    pub fn name(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Bus => "bus",
            Self::None => "none",
            Self::Skipped => "skipped",
            Self::Impossible => "impossible",
            Self::Gone => "gone",
            Self::Failed => "failed",
        }
    }
}

impl Scrub {
    /// What a scrubber has done that ended well.
    fn by(scrubber: &Scrubber) -> Self {
        match scrubber {
            Scrubber::BarZero { read_back: ReadBack::Full, .. } => Self::Zeros,
            Scrubber::BarZero { read_back: ReadBack::Sampled, .. } => Self::ZerosSampled,
            Scrubber::Nvme => Self::Erased,
            Scrubber::Command { .. } => Self::Command,
        }
    }

    /// The word for it, as it is serialised.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zeros => "zeros",
            Self::ZerosSampled => "zeros-sampled",
            Self::Erased => "erased",
            Self::Command => "command",
            Self::None => "none",
            Self::Skipped => "skipped",
            Self::Unknown => "unknown",
            Self::Gone => "gone",
            Self::Failed => "failed",
        }
    }
}

impl Cleaned {
    /// What became of each function of a lease that a tenant could use and that has ended.
    pub fn of(lease: &Lease) -> Vec<Self> {
        let used = lease.forward.iter().all(|recorded| recorded.outcome.is_some());
        if !used || lease.task.is_some() || lease.backward.is_empty() {
            return Vec::new();
        }
        lease.devices.keys().map(|device| Self::one(lease, *device)).collect()
    }

    fn one(lease: &Lease, device: PciAddress) -> Self {
        let care = lease.care.get(&device);
        let about = |recorded: &&Recorded| {
            let step = &recorded.step;
            step.device() == Some(device) || step.others().contains(&device)
        };
        let steps = || lease.backward.iter().filter(about);
        let reset = match steps().find(|r| matches!(r.step, Step::Reset { .. })) {
            None if lease.skipped.reset => Reset::Skipped,
            None if care.is_some_and(|care| care.reset == Resets::None) => Reset::None,
            None => Reset::Impossible,
            Some(Recorded { outcome: None, .. }) => Reset::Failed,
            Some(recorded) if recorded.step.others().is_empty() => Reset::Alone,
            Some(_) => Reset::Bus,
        };
        let scrubber = |recorded: &Recorded| match &recorded.step {
            Step::Scrub { with, .. } => Some((with.clone(), recorded.outcome)),
            _ => None,
        };
        let scrub = match steps().find_map(scrubber) {
            None if lease.skipped.scrub => Scrub::Skipped,
            None if care.is_some_and(|care| care.scrub == Scrubbing::None) => Scrub::None,
            None => Scrub::Unknown,
            Some((_, None)) => Scrub::Failed,
            Some((scrubber, Some(_))) => Scrub::by(&scrubber),
        };
        Self { device, reset, scrub, weaker: lease.weaker(device) }
    }

    /// Whether all was done that was to be done to a function that is there.
    pub fn is_done(&self) -> bool {
        self.reset != Reset::Failed && self.scrub != Scrub::Failed
    }

    /// The same where the function has gone: what was left undone has not failed.
    #[must_use]
    pub fn of_gone(self) -> Self {
        let reset = if self.reset == Reset::Failed { Reset::Gone } else { self.reset };
        let scrub = if self.scrub == Scrub::Failed { Scrub::Gone } else { self.scrub };
        Self { reset, scrub, ..self }
    }

    /// What the bus is told of it.
    pub fn record(&self) -> CleanedRecord {
        CleanedRecord {
            device: self.device.to_string(),
            reset: self.reset.name().to_owned(),
            scrub: self.scrub.name().to_owned(),
            weaker: self.weaker.clone(),
        }
    }
}
