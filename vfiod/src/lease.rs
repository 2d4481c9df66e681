//! A lease: who has which functions, what was done for it and what undoes it. A plain type with
//! its record on disk; touches nothing by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use libvfio::address::PciAddress;
use libvfio::client::{CareRecord, LeaseRecord, StepRecord};
use libvfio::inventory::Inventory;
use libvfio::mediated::{TypeName, Uuid};
use libvfio::pci::aer::Errors;
use libvfio::pci::{Binding, Identity};
use libvfio::plan::{self, Care};
use libvfio::policy::Resets;
use libvfio::step::{Outcome, Step};
use libvfio::vfio::Interface;
use serde::{Deserialize, Serialize};

/// Devices held for a tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Its id: eight hexadecimal digits.
    pub id: String,
    /// Who has it.
    pub tenant: String,
    /// The virtual machine it is for.
    pub vm: Option<String>,
    /// User id of the caller that attached it.
    pub owner: u32,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// Where it is in its life.
    pub state: State,
    /// Why it failed, or what it waits for.
    pub reason: Option<String>,
    /// Why it will have failed once its devices are back, if it was not released.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// What it ends with, if not by release alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound: Option<Bound>,
    /// What the daemon does with the devices, if they are for no tenant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
    /// What is not to be done to its functions when it ends.
    #[serde(default, skip_serializing_if = "Skipped::is_nothing")]
    pub skipped: Skipped,
    /// How each of its functions is cleaned when it ends.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub care: BTreeMap<PciAddress, Care>,
    /// By what its functions can be opened, known once they are on VFIO.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<Interface>,
    /// Its functions, and how each was found.
    pub devices: BTreeMap<PciAddress, Found>,
    /// Its mediated devices, which are there for its time only.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub mediated: BTreeMap<Uuid, TypeName>,
    /// The way to the guest. The first step without an outcome may or may not have happened.
    pub forward: Vec<Recorded>,
    /// The way back, once it has begun; likewise.
    pub backward: Vec<Recorded>,
}

/// What is left out, by request, of what leaves nothing of a tenant.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The resets.
    pub reset: bool,
    /// Clearing device memory.
    pub scrub: bool,
}

impl Skipped {
    #[allow(clippy::trivially_copy_pass_by_ref)] // What serde asks for.
    fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// Where a lease is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Its devices are on their way to VFIO.
    Preparing,
    /// A guest may use its devices.
    Active,
    /// Its devices are on their way back, or wait for whoever still holds them open.
    Releasing,
    /// A step on its devices has not returned in time. Goes on if it ever does; else it takes a
    /// reboot.
    Wedged,
    /// It ended otherwise than by release; kept until dismissed, holds nothing.
    Failed,
}

impl State {
    /// The word for it on every surface.
    pub fn name(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Active => "active",
            Self::Releasing => "releasing",
            Self::Wedged => "wedged",
            Self::Failed => "failed",
        }
    }

    /// Whether steps are, or may be, under way.
    pub fn moves(self) -> bool {
        matches!(self, Self::Preparing | Self::Releasing | Self::Wedged)
    }
}

/// What a lease ends with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// A process.
    Process {
        /// Its id.
        pid: u32,
        /// When it started, in clock ticks since boot: ids are used again.
        started: u64,
    },
    /// A connection to the bus.
    Connection {
        /// Its unique name, which its bus never gives again.
        name: String,
        /// The id of that bus.
        bus: String,
    },
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, .. } => write!(f, "process {pid}"),
            Self::Connection { name, .. } => write!(f, "connection {name}"),
        }
    }
}

/// A function as it was before the lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Which one it is.
    pub identity: Identity,
    /// Its driver and override.
    pub before: Binding,
    /// What errors it had reported when its tenant got it.
    #[serde(default, skip_serializing_if = "Errors::is_empty")]
    pub errors: Errors,
}

/// A step and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// The step.
    pub step: Step,
    /// What came of it; `None` before it is known.
    pub outcome: Option<Outcome>,
}

impl Recorded {
    /// Steps still to be carried out.
    pub fn todo(steps: impl IntoIterator<Item = Step>) -> Vec<Self> {
        steps.into_iter().map(|step| Self { step, outcome: None }).collect()
    }
}

impl Lease {
    /// The steps that take back whatever was, or may have been, done. Every step finds out by
    /// itself whether it is already so, which settles the one that was interrupted.
    pub fn way_back(&self) -> Vec<Recorded> {
        let begun = self.forward.iter().take_while(|r| r.outcome.is_some()).count() + 1;
        Recorded::todo(plan::undo(self.forward.iter().take(begun).map(|r| &r.step)))
    }

    /// The way back from a guest: nobody may open its functions any more, nothing of its tenant is
    /// left in them, and then whatever was done is taken back.
    pub fn way_home(&self, inventory: &Inventory) -> Vec<Recorded> {
        let (closing, back): (Vec<Recorded>, Vec<Recorded>) =
            self.way_back().into_iter().partition(|r| matches!(r.step, Step::NodeAccess { .. }));
        // One that was never whole was nobody's.
        let used = self.forward.iter().all(|recorded| recorded.outcome.is_some());
        let left_alone =
            |device: &&PciAddress| self.care.get(*device).is_some_and(|c| c.reset == Resets::None);
        let devices: BTreeSet<PciAddress> =
            self.devices.keys().filter(|device| !left_alone(device)).copied().collect();
        let (mut cleaning, mut after) = (Vec::new(), Vec::new());
        if used && self.task.is_none() && !self.skipped.reset {
            cleaning.extend(plan::resets(inventory, &devices));
        }
        if used && self.task.is_none() && !self.skipped.scrub {
            let home = |device| self.devices.get(&device)?.before.driver.as_deref();
            let scrubs = plan::scrubs(inventory, &self.care, home);
            cleaning.extend(scrubs.before);
            after = scrubs.after;
        }
        closing
            .into_iter()
            .chain(Recorded::todo(cleaning))
            .chain(back)
            .chain(Recorded::todo(after))
            .collect()
    }

    /// The functions that a step to the guest was, or may have been, done to.
    pub fn touched(&self) -> BTreeSet<PciAddress> {
        let begun = self.forward.iter().take_while(|r| r.outcome.is_some()).count() + 1;
        self.forward.iter().take(begun).filter_map(|recorded| recorded.step.device()).collect()
    }

    /// The override a function has while the lease is active.
    pub fn expected_override(&self, device: PciAddress) -> Option<&String> {
        let set = self.forward.iter().rev().find_map(|recorded| match &recorded.step {
            Step::SetOverride { device: of, to, .. } if *of == device => Some(to.as_ref()),
            _ => None,
        });
        set.unwrap_or_else(|| self.devices.get(&device)?.before.driver_override.as_ref())
    }

    /// Functions that a tenant has used, and that cannot be reset though that is required.
    pub fn unresettable(&self) -> impl Iterator<Item = PciAddress> {
        let used = self.forward.iter().all(|recorded| recorded.outcome.is_some())
            && self.task.is_none()
            && !self.skipped.reset;
        let left = self.care.iter().filter(move |(_, care)| used && care.is_kept_for_tenant());
        left.map(|(device, _)| *device)
    }

    /// Whether something that is there to clean a function is still to be done.
    pub fn is_unclean(&self, device: PciAddress) -> bool {
        let cleans = |step: &Step| {
            step.is_cleaning() && (step.device() == Some(device) || step.others().contains(&device))
        };
        self.backward.iter().any(|r| r.outcome.is_none() && cleans(&r.step))
    }

    /// The override that its last step on a function has set and read back. `None` if that is not
    /// known: there was none, it may or may not have happened, or the driver's directory may spell
    /// the name otherwise.
    pub fn override_read_back(&self, device: PciAddress) -> Option<&Option<String>> {
        let mut last = None;
        for Recorded { step, outcome } in self.forward.iter().chain(&self.backward) {
            let Step::SetOverride { device: of, to, .. } = step else { continue };
            if *of == device {
                outcome.as_ref()?;
                last = Some(to);
            }
        }
        last.filter(|to| !to.as_ref().is_some_and(|name| name.contains('_')))
    }

    /// Whether it keeps its devices from others.
    pub fn holds(&self, device: PciAddress) -> bool {
        self.state != State::Failed && self.devices.contains_key(&device)
    }

    /// In what a function is cleaned less than it would be by default, if it is.
    pub fn weaker(&self, device: PciAddress) -> Option<String> {
        let reset = self.skipped.reset.then(|| "it is not reset, by request".to_owned());
        let scrub = self.skipped.scrub.then(|| "its memory is not cleared, by request".to_owned());
        let policy = self.care.get(&device).and_then(Care::weaker);
        let all: Vec<String> = policy.into_iter().chain(reset).chain(scrub).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    fn care_record(&self, device: PciAddress, care: &Care) -> CareRecord {
        let reset = match (&care.way, care.reset) {
            _ if self.skipped.reset => "skipped",
            (_, Resets::None) => "none",
            (None, _) => "impossible",
            (Some(way), _) => way,
        };
        CareRecord {
            device: device.to_string(),
            reset: reset.to_owned(),
            scrub: if self.skipped.scrub { "skipped" } else { care.scrub_name() }.to_owned(),
            weaker: self.weaker(device),
        }
    }

    /// What the bus is told of it.
    pub fn record(&self) -> LeaseRecord {
        let steps = self.forward.iter().chain(&self.backward);
        LeaseRecord {
            id: self.id.clone(),
            tenant: self.tenant.clone(),
            vm: self.vm.clone(),
            state: self.state.name().to_owned(),
            reason: self.reason.clone(),
            bound: self.bound.as_ref().map(ToString::to_string),
            task: self.task.clone(),
            interface: self.interface.map(|interface| interface.name().to_owned()),
            devices: self.devices.keys().map(ToString::to_string).collect(),
            mediated: self.mediated.keys().map(ToString::to_string).collect(),
            owner: self.owner,
            created: self.created,
            cleaning: self
                .care
                .iter()
                .map(|(device, care)| self.care_record(*device, care))
                .collect(),
            steps: steps.map(|r| StepRecord::new(&r.step, r.outcome)).collect(),
        }
    }
}
