//! What applying the policy came to when the host booted. A plain type with its record on disk, which
//! is in `/run` since it is about this boot.

use libvfio::client::{PolicyRecord, ReasonRecord, StepRecord, UnitRecord};
use serde::{Deserialize, Serialize};

/// The report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootReport {
    time: u64,
    milliseconds: u64,
    error: Option<String>,
    notes: Vec<String>,
    units: Vec<Unit>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Unit {
    pool: String,
    mode: String,
    device: String,
    devices: Vec<String>,
    now: String,
    wanted: String,
    standing: String,
    /// Each with its outcome.
    steps: Vec<(String, String, Option<String>)>,
    /// Kind, code, object, text and remedy of each.
    reasons: Vec<[String; 5]>,
    failure: Option<String>,
    lost_to: Option<String>,
}

impl From<&PolicyRecord> for BootReport {
    fn from(record: &PolicyRecord) -> Self {
        let unit = |unit: &UnitRecord| Unit {
            pool: unit.pool.clone(),
            mode: unit.mode.clone(),
            device: unit.device.clone(),
            devices: unit.devices.clone(),
            now: unit.now.clone(),
            wanted: unit.wanted.clone(),
            standing: unit.standing.clone(),
            steps: unit
                .steps
                .iter()
                .map(|step| (step.step.clone(), step.text.clone(), step.outcome.clone()))
                .collect(),
            reasons: unit
                .reasons
                .iter()
                .cloned()
                .map(|r| [r.kind, r.code, r.object, r.text, r.remedy])
                .collect(),
            failure: unit.failure.clone(),
            lost_to: unit.lost_to.clone(),
        };
        Self {
            time: record.time.unwrap_or_default(),
            milliseconds: record.milliseconds.unwrap_or_default(),
            error: record.error.clone(),
            notes: record.notes.clone(),
            units: record.units.iter().map(unit).collect(),
        }
    }
}

impl BootReport {
    /// As the bus is told of it.
    pub fn record(self) -> PolicyRecord {
        let unit = |unit: Unit| UnitRecord {
            pool: unit.pool,
            mode: unit.mode,
            device: unit.device,
            devices: unit.devices,
            now: unit.now,
            wanted: unit.wanted,
            standing: unit.standing,
            steps: unit
                .steps
                .into_iter()
                .map(|(step, text, outcome)| StepRecord {
                    step,
                    text,
                    outcome,
                    ..StepRecord::default()
                })
                .collect(),
            reasons: unit
                .reasons
                .into_iter()
                .map(|[kind, code, object, text, remedy]| ReasonRecord {
                    kind,
                    code,
                    object,
                    text,
                    remedy,
                })
                .collect(),
            failure: unit.failure,
            lost_to: unit.lost_to,
            ..UnitRecord::default()
        };
        PolicyRecord {
            time: Some(self.time),
            milliseconds: Some(self.milliseconds),
            error: self.error,
            notes: self.notes,
            units: self.units.into_iter().map(unit).collect(),
            ..PolicyRecord::default()
        }
    }
}
