//! What the interface tells of the policy. Records are as in [`super::records`].

use zbus::wire::{DeserializeDict, SerializeDict, Type};

use super::records::{ReasonRecord, StepRecord};
use crate::plan::{Standing, Unit};

/// The policy in force, and where the host stands.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct PolicyRecord {
    /// The files it was read from.
    pub files: Vec<String>,
    /// What was wrong when it was read last, if so: then the one before is in force, or none.
    pub error: Option<String>,
    /// For how many seconds provisioning may delay the boot.
    pub boot_limit: u64,
    /// Its devices, in the order in which they are dealt with.
    pub units: Vec<UnitRecord>,
    /// What is odd about it on this host: devices that two pools claim, selectors that match none.
    pub notes: Vec<String>,
    /// What makes the initial file systems anew, where one of them has another policy than this.
    pub initramfs: Option<String>,
    /// When it was applied at boot, in seconds since 1970; of a boot's report alone.
    pub time: Option<u64>,
    /// How long that took, in milliseconds.
    pub milliseconds: Option<u64>,
}

/// A device of the policy, a virtual function of it, or how many of these there are.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct UnitRecord {
    /// Its pool.
    pub pool: String,
    /// That pool's mode: `host`, `passthrough` or `on-lease`.
    pub mode: String,
    /// Its first function.
    pub device: String,
    /// All functions concerned.
    pub devices: Vec<String>,
    /// How it is, in words.
    pub now: String,
    /// How it shall be, in words.
    pub wanted: String,
    /// `as-wanted`, `to-do`, `waits` or `blocked`; after applying also `done` or `failed`.
    pub standing: String,
    /// What there is to do, or what was done.
    pub steps: Vec<StepRecord>,
    /// What stands in the way.
    pub reasons: Vec<ReasonRecord>,
    /// Whether it was as wanted, and somebody else has changed it since.
    pub drifted: Option<bool>,
    /// Why it could not be done.
    pub failure: Option<String>,
    /// The host driver that had it when the policy was applied at boot, and should not have.
    pub lost_to: Option<String>,
}

impl From<&Unit> for UnitRecord {
    fn from(unit: &Unit) -> Self {
        Self {
            pool: unit.pool.clone(),
            mode: unit.mode.name().to_owned(),
            device: unit.device.to_string(),
            devices: unit.devices.keys().map(ToString::to_string).collect(),
            now: unit.now.clone(),
            wanted: unit.wanted.clone(),
            standing: unit.standing().name().to_owned(),
            steps: unit.steps.iter().map(|step| StepRecord::new(step, None)).collect(),
            reasons: unit.reasons.iter().map(ReasonRecord::from).collect(),
            ..Self::default()
        }
    }
}

impl UnitRecord {
    /// Whether nothing is left to do.
    pub fn is_as_wanted(&self) -> bool {
        self.standing == Standing::AsWanted.name() || self.standing == DONE
    }
}

/// Where a unit stands that was dealt with.
pub const DONE: &str = "done";
/// Where one stands that could not be.
pub const FAILED: &str = "failed";
