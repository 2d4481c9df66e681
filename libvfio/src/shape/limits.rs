//! What a setting of one virtual function is and may be. Plain types; touches nothing.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Form, Setting, Value};

/// What one setting of a virtual function is now, and what it may be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capability {
    /// The setting.
    pub setting: Setting,
    /// What it is.
    pub value: Value,
    /// What it may be.
    pub limits: Limits,
}

/// What a setting may be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limits {
    /// Whatever has its form.
    Any,
    /// What it is, and nothing else.
    Fixed,
    /// A number in this range.
    Range {
        /// The least.
        least: u64,
        /// The most; only the driver knows where there is none.
        most: Option<u64>,
    },
    /// A number of what the physical function shares out.
    Share {
        /// The least.
        least: u64,
        /// How much is left to give to any of its virtual functions, beside what they have.
        spare: u64,
    },
    /// One of these.
    Choices(Vec<Choice>),
}

/// One choice of a setting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// The value.
    pub value: Value,
    /// What it is called, where the value does not say it.
    pub name: Option<String>,
}

impl Choice {
    /// A choice whose value says what it is.
    pub(crate) fn plain(word: &str) -> Self {
        Self { value: Value::Text(word.to_owned()), name: None }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{} ({name})", self.value),
            None => self.value.fmt(f),
        }
    }
}

impl Capability {
    /// The most that a number may be, if that is known.
    pub fn most(&self) -> Option<u64> {
        match (&self.limits, &self.value) {
            (Limits::Range { most, .. }, _) => *most,
            (Limits::Share { spare, .. }, Value::Number(now)) => Some(now.saturating_add(*spare)),
            _ => None,
        }
    }

    /// The least that a number may be.
    pub fn least(&self) -> Option<u64> {
        match self.limits {
            Limits::Range { least, .. } | Limits::Share { least, .. } => Some(least),
            _ => None,
        }
    }

    /// Whether it may be that.
    pub fn admits(&self, wanted: &Value) -> bool {
        match (&self.limits, wanted) {
            (Limits::Any, _) => true,
            (Limits::Fixed, _) => *wanted == self.value,
            (Limits::Choices(choices), _) => choices.iter().any(|choice| choice.value == *wanted),
            (Limits::Range { least, .. } | Limits::Share { least, .. }, Value::Number(number)) => {
                number >= least && self.most().is_none_or(|most| *number <= most)
            }
            (Limits::Range { .. } | Limits::Share { .. }, _) => false,
        }
    }

    /// What it may be, in words.
    pub fn allowed(&self) -> String {
        let unit = self.setting.unit().map(|unit| format!(" {unit}")).unwrap_or_default();
        match &self.limits {
            Limits::Any if self.setting.form() == Form::Flag => "on or off".to_owned(),
            Limits::Any => "any".to_owned(),
            Limits::Fixed => format!("{}, which cannot be changed", self.value),
            Limits::Choices(choices) => {
                let choices: Vec<String> = choices.iter().map(ToString::to_string).collect();
                choices.join(", ")
            }
            Limits::Range { .. } | Limits::Share { .. } => {
                let least = self.least().unwrap_or_default();
                match self.most() {
                    Some(most) => format!("{least} to {most}{unit}"),
                    None => format!("from {least}{unit}"),
                }
            }
        }
    }
}
