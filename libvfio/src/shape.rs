//! Settings that a virtual function can have for the time of a lease, the values they take, and what
//! limits those. Plain types; touches nothing. [`crate::backend`] reads and writes them.

mod limits;

pub use limits::{Capability, Choice, Limits};

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What can be set on a virtual function. Steps set them in this order, and take them back in the
/// opposite one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Setting {
    /// Hardware address of a network card's. All zeros lets the guest choose.
    Mac,
    /// VLAN that its packets are put in, 1 to 4094; 0 for none.
    Vlan,
    /// Whether packets from other addresses are dropped.
    SpoofCheck,
    /// Whether the guest may do what only trusted ones may, such as promiscuous mode.
    Trust,
    /// Its link: `auto` as the card's own, `up` so that virtual functions reach each other without a
    /// cable, or `down`.
    Link,
    /// The most it may send, in Mbit/s; 0 for no limit.
    MaxRate,
    /// Interrupt vectors (MSI-X) it has.
    Msix,
    /// How long it computes before another may, in ms; 0 for no limit.
    ExecQuantum,
    /// How long another waits for it to stop before it is reset, in µs; 0 for no limit.
    PreemptTimeout,
    /// Its scheduling priority: `low`, `normal` or `high`.
    SchedPriority,
    /// Video memory it has, in bytes.
    VramQuota,
    /// NVIDIA vGPU type, by its number; 0 for none.
    VgpuType,
    /// Parameters of an NVIDIA vGPU, as the driver takes them.
    VgpuParams,
}

/// The kind of value a setting takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// On or off.
    Flag,
    /// A number.
    Number,
    /// A text.
    Text,
}

/// What a setting is, or shall be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// On or off.
    Flag(bool),
    /// A number.
    Number(u64),
    /// A text.
    Text(String),
}

/// Settings, and what they shall be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shape(BTreeMap<Setting, Value>);

/// Why a value is none for a setting.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{input}' is no {what}")]
pub struct InvalidSetting {
    /// What was given.
    pub input: String,
    /// What it should be, with an example.
    pub what: &'static str,
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub(crate) [u8; 6]);

/// Longest text of a setting, in bytes.
const LONGEST: usize = 1024;
/// The words for a link.
pub const LINKS: [&str; 3] = ["auto", "up", "down"];
/// The words for a scheduling priority.
pub const PRIORITIES: [&str; 3] = ["low", "normal", "high"];

impl Setting {
    /// Every setting.
    pub const ALL: [Self; 13] = [
        Self::Mac,
        Self::Vlan,
        Self::SpoofCheck,
        Self::Trust,
        Self::Link,
        Self::MaxRate,
        Self::Msix,
        Self::ExecQuantum,
        Self::PreemptTimeout,
        Self::SchedPriority,
        Self::VramQuota,
        Self::VgpuType,
        Self::VgpuParams,
    ];

    /// The word for it on the bus and in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mac => "mac",
            Self::Vlan => "vlan",
            Self::SpoofCheck => "spoof_check",
            Self::Trust => "trust",
            Self::Link => "link",
            Self::MaxRate => "max_rate",
            Self::Msix => "msix",
            Self::ExecQuantum => "exec_quantum",
            Self::PreemptTimeout => "preempt_timeout",
            Self::SchedPriority => "sched_priority",
            Self::VramQuota => "vram_quota",
            Self::VgpuType => "vgpu_type",
            Self::VgpuParams => "vgpu_params",
        }
    }

    /// The setting with that [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|setting| setting.name() == name)
    }

    /// The words for it in a sentence.
    pub fn label(self) -> &'static str {
        match self {
            Self::Mac => "address",
            Self::Vlan => "VLAN",
            Self::SpoofCheck => "spoof check",
            Self::Trust => "trust",
            Self::Link => "link",
            Self::MaxRate => "rate",
            Self::Msix => "interrupt vectors",
            Self::ExecQuantum => "execution quantum",
            Self::PreemptTimeout => "preemption timeout",
            Self::SchedPriority => "scheduling priority",
            Self::VramQuota => "video memory",
            Self::VgpuType => "vGPU type",
            Self::VgpuParams => "vGPU parameters",
        }
    }

    /// The unit of its numbers, if they have one.
    pub fn unit(self) -> Option<&'static str> {
        match self {
            Self::MaxRate => Some("Mbit/s"),
            Self::ExecQuantum => Some("ms"),
            Self::PreemptTimeout => Some("us"),
            Self::VramQuota => Some("bytes"),
            _ => None,
        }
    }

    /// The kind of value it takes.
    pub fn form(self) -> Form {
        match self {
            Self::SpoofCheck | Self::Trust => Form::Flag,
            Self::Vlan
            | Self::MaxRate
            | Self::Msix
            | Self::ExecQuantum
            | Self::PreemptTimeout
            | Self::VramQuota
            | Self::VgpuType => Form::Number,
            Self::Mac | Self::Link | Self::SchedPriority | Self::VgpuParams => Form::Text,
        }
    }

    /// The words it takes, if only some are.
    pub fn words(self) -> &'static [&'static str] {
        match self {
            Self::Link => &LINKS,
            Self::SchedPriority => &PRIORITIES,
            _ => &[],
        }
    }

    /// Whether a virtual function that has it goes to a guest with the driver it is on, which is a
    /// VFIO driver from then on.
    pub fn keeps_driver(self) -> bool {
        matches!(self, Self::VgpuType | Self::VgpuParams)
    }

    /// Whether the kernel changes it only while no driver has the function.
    pub fn needs_no_driver(self) -> bool {
        self == Self::Msix
    }

    /// Whether it makes sense on one function alone.
    pub fn is_for_one(self) -> bool {
        self == Self::Mac
    }

    /// A value as it is written everywhere, or why it is none whatever the device.
    pub fn check(self, value: Value) -> Result<Value, InvalidSetting> {
        let fits = match (self, &value) {
            (Self::Mac, Value::Text(text)) => {
                return text.parse().map(|mac: Mac| Value::Text(mac.to_string()));
            }
            (Self::Link | Self::SchedPriority, Value::Text(text)) => {
                self.words().contains(&text.as_str())
            }
            (Self::VgpuParams, Value::Text(text)) => is_line(text),
            (Self::Vlan, Value::Number(number)) => *number < 4095,
            (Self::Msix | Self::VgpuType, Value::Number(number)) => {
                (1..=u32::MAX.into()).contains(number)
            }
            (_, Value::Number(number)) => self == Self::VramQuota || *number <= u32::MAX.into(),
            (_, Value::Flag(_)) => true,
            (_, Value::Text(_)) => false,
        };
        if fits && self.form() == value.form() {
            return Ok(value);
        }
        Err(invalid(&value.to_string(), self.what()))
    }

    /// What its values are, for whoever gave another.
    fn what(self) -> &'static str {
        match self {
            Self::Mac => Mac::WHAT,
            Self::Vlan => "VLAN; give 1 to 4094, or 0 for none",
            Self::Link => "link; it is auto, up or down",
            Self::SchedPriority => "scheduling priority; it is low, normal or high",
            Self::Msix => "number of interrupt vectors; give at least 1",
            Self::VgpuType => "vGPU type; 'vfioctl vf show VF' has the numbers of those there are",
            Self::VgpuParams => "line of vGPU parameters; write it as frame_rate_limiter=0,…",
            Self::MaxRate | Self::ExecQuantum | Self::PreemptTimeout | Self::VramQuota => {
                "number of that size"
            }
            Self::SpoofCheck | Self::Trust => "boolean",
        }
    }
}

impl Value {
    fn form(&self) -> Form {
        match self {
            Self::Flag(_) => Form::Flag,
            Self::Number(_) => Form::Number,
            Self::Text(_) => Form::Text,
        }
    }
}

fn is_line(text: &str) -> bool {
    (1..=LONGEST).contains(&text.len()) && !text.chars().any(char::is_control)
}

fn invalid(input: &str, what: &'static str) -> InvalidSetting {
    InvalidSetting { input: input.chars().take(64).collect(), what }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(on) => f.write_str(if *on { "on" } else { "off" }),
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) if text.is_empty() => f.write_str("none"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

impl Shape {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Says what a setting shall be.
    pub fn set(&mut self, setting: Setting, value: Value) -> Result<(), InvalidSetting> {
        self.0.insert(setting, setting.check(value)?);
        Ok(())
    }

    /// What a setting shall be, if it says something of it.
    pub fn get(&self, setting: Setting) -> Option<&Value> {
        self.0.get(&setting)
    }

    /// Each setting and what it shall be, in the order of their steps.
    pub fn each(&self) -> impl Iterator<Item = (Setting, &Value)> {
        self.0.iter().map(|(setting, value)| (*setting, value))
    }

    /// Whether the function goes to a guest with the driver it is on.
    pub fn keeps_driver(&self) -> bool {
        self.0.keys().any(|setting| setting.keeps_driver())
    }
}

impl Mac {
    const WHAT: &str = "address of one network interface; write it as 52:54:00:12:34:56";
}

impl FromStr for Mac {
    type Err = InvalidSetting;

    fn from_str(text: &str) -> Result<Self, InvalidSetting> {
        let byte = |part: &str| {
            let plain = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            plain.then(|| u8::from_str_radix(part, 16).ok())?
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let bytes = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
        // The lowest bit of the first byte marks addresses of groups.
        bytes.filter(|bytes| bytes[0] & 1 == 0).map(Self).ok_or_else(|| invalid(text, Self::WHAT))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.map(|byte| format!("{byte:02x}")).join(":"))
    }
}

#[cfg(test)]
mod tests;
