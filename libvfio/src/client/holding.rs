//! What the interface tells of who holds devices. Records are as in [`super::records`].

use zbus::wire::{DeserializeDict, SerializeDict, Type};

use crate::holders::Holding;
use crate::protection::{Use, Weight};

/// Who and what holds a device and all that share its group.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct HoldersRecord {
    /// The functions.
    pub devices: Vec<String>,
    /// Processes that hold them.
    pub holders: Vec<HolderRecord>,
    /// What the host does with them.
    pub uses: Vec<UseRecord>,
}

/// A process that holds a function.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct HolderRecord {
    /// The function.
    pub device: String,
    /// Process id.
    pub pid: u32,
    /// Its name, at most 15 bytes.
    pub command: String,
    /// As whom it acts: a name, or a number where the host has none.
    pub user: Option<String>,
    /// The systemd unit it runs in.
    pub unit: Option<String>,
    /// Paths it has open or mapped.
    pub what: Vec<String>,
    /// How to make it let go.
    pub remedy: String,
}

/// A use of a function by the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}")]
pub struct UseRecord {
    /// The function.
    pub device: String,
    /// The use, as the second half of a sentence about the function.
    pub what: String,
    /// How to end it.
    pub remedy: String,
    /// Whether attaching is refused for it.
    pub hinders: bool,
    /// Whether the host cannot live without it.
    pub protected: bool,
}

impl From<&Holding> for HolderRecord {
    fn from(Holding { function, holder }: &Holding) -> Self {
        let user = holder.user.as_ref();
        Self {
            device: function.to_string(),
            pid: holder.pid,
            command: holder.command.clone(),
            user: user.map(|user| user.name.clone().unwrap_or_else(|| user.uid.to_string())),
            unit: holder.unit.as_ref().map(|unit| unit.name.clone()),
            what: holder.what.iter().map(|path| path.display().to_string()).collect(),
            remedy: holder.remedy(),
        }
    }
}

impl From<&Use> for UseRecord {
    fn from(found: &Use) -> Self {
        Self {
            device: found.function.to_string(),
            what: found.what.clone(),
            remedy: found.remedy.clone(),
            hinders: found.weight != Weight::Notice,
            protected: found.is_protected(),
        }
    }
}
