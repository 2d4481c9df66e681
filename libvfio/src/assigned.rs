//! What a guest can be given: a PCI function, or a mediated device. A plain type.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::address::PciAddress;
use crate::mediated::Uuid;

/// A PCI function or a mediated device, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Assigned {
    /// A function, by its address.
    Function(PciAddress),
    /// A mediated device, by its UUID.
    Mediated(Uuid),
}

impl Assigned {
    /// The function, if it is one.
    pub fn function(self) -> Option<PciAddress> {
        match self {
            Self::Function(address) => Some(address),
            Self::Mediated(_) => None,
        }
    }

    /// The mediated device, if it is one.
    pub fn mediated(self) -> Option<Uuid> {
        match self {
            Self::Function(_) => None,
            Self::Mediated(uuid) => Some(uuid),
        }
    }
}

impl fmt::Display for Assigned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Function(address) => address.fmt(f),
            Self::Mediated(uuid) => uuid.fmt(f),
        }
    }
}

impl From<PciAddress> for Assigned {
    fn from(address: PciAddress) -> Self {
        Self::Function(address)
    }
}

impl From<Uuid> for Assigned {
    fn from(uuid: Uuid) -> Self {
        Self::Mediated(uuid)
    }
}

#[cfg(test)]
mod tests {
    use serde::de::IntoDeserializer;
    use serde::de::value::{Error, StringDeserializer};

    use super::*;

    #[test]
    fn each_is_known_by_its_name() {
        let function: PciAddress = "0000:03:00.0".parse().unwrap();
        for assigned in [Assigned::from(function), Assigned::from(Uuid::new_v4())] {
            let text: StringDeserializer<Error> = assigned.to_string().into_deserializer();
            assert_eq!(Assigned::deserialize(text).unwrap(), assigned);
            assert_ne!(assigned.function().is_some(), assigned.mediated().is_some());
        }
    }
}
