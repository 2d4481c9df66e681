//! What the interface tells of the settings of virtual functions.

use zbus::wire::{DeserializeDict, SerializeDict, Type};

use crate::backend::Offer;
use crate::shape::{Choice, Limits};

/// One thing that can be set on a virtual function for the time of a lease.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct SettingRecord {
    /// The option of attaching that sets it: `vlan`.
    pub setting: String,
    /// Who offers it: `network`, `vectors`, `xe`, `nvidia`.
    pub backend: String,
    /// What it is in words: `VLAN`.
    pub label: String,
    /// What it is now, as text: `on`, `7`, `52:54:00:12:34:56`; empty for none.
    pub value: String,
    /// The unit of its numbers.
    pub unit: Option<String>,
    /// The least it may be, if it is a number.
    pub least: Option<u64>,
    /// The most it may be, if it is a number and that is known.
    pub most: Option<u64>,
    /// How much of it is left for all virtual functions of its physical one, beside what they have.
    pub spare: Option<u64>,
    /// What it may be, if there is a choice.
    pub choices: Option<Vec<ChoiceRecord>>,
    /// Whether it can be changed.
    pub writable: bool,
    /// What it may be, in words.
    pub allowed: String,
}

/// One choice of a setting.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct ChoiceRecord {
    /// The value, as text.
    pub value: String,
    /// What it is called, where the value does not say it.
    pub name: Option<String>,
}

impl From<&Offer> for SettingRecord {
    fn from(Offer { backend, capability }: &Offer) -> Self {
        let setting = capability.setting;
        let choices = match &capability.limits {
            Limits::Choices(choices) => Some(choices.iter().map(ChoiceRecord::from).collect()),
            _ => None,
        };
        let spare = match capability.limits {
            Limits::Share { spare, .. } => Some(spare),
            _ => None,
        };
        Self {
            setting: setting.name().to_owned(),
            backend: backend.clone(),
            label: setting.label().to_owned(),
            value: capability.value.to_string(),
            unit: setting.unit().map(str::to_owned),
            least: capability.least(),
            most: capability.most(),
            spare,
            choices,
            writable: capability.limits != Limits::Fixed,
            allowed: capability.allowed(),
        }
    }
}

impl From<&Choice> for ChoiceRecord {
    fn from(choice: &Choice) -> Self {
        Self { value: choice.value.to_string(), name: choice.name.clone() }
    }
}
