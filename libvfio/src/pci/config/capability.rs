//! Capabilities of the conventional list, from their registers. Works on bytes alone; a register
//! that is not there makes the capability unknown, never wrong. Offsets are relative to each
//! capability, as in `linux/pci_regs.h`.

use std::fmt;

use serde::Serialize;

use super::bytes::Bytes;
use super::list::Node;

/// A capability of the conventional list (`PCI_CAP_ID_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Capability {
    /// Power management.
    PowerManagement(PowerManagement),
    /// Message signalled interrupts.
    Msi {
        /// Vectors the function can have.
        vectors: u8,
        /// Whether they are in use.
        enabled: bool,
    },
    /// Vendor specific.
    VendorSpecific,
    /// PCI Express.
    PciExpress(PciExpress),
    /// Message signalled interrupts in a table.
    Msix {
        /// Vectors the table has.
        vectors: u16,
        /// Whether they are in use.
        enabled: bool,
        /// The BAR the table is in.
        table_bar: u8,
    },
    /// Advanced Features: what conventional PCI has of PCI Express.
    AdvancedFeatures {
        /// Function level reset, with the pending bit it needs (`pci_af_flr`,
        /// `drivers/pci/pci.c`).
        flr: bool,
    },
    /// Any other, by its number.
    Other(u16),
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerManagement(_) => f.write_str("power-management"),
            Self::Msi { .. } => f.write_str("msi"),
            Self::VendorSpecific => f.write_str("vendor-specific"),
            Self::PciExpress(_) => f.write_str("pci-express"),
            Self::Msix { .. } => f.write_str("msi-x"),
            Self::AdvancedFeatures { .. } => f.write_str("advanced-features"),
            Self::Other(id) => write!(f, "capability-{id:#04x}"),
        }
    }
}

/// Power management.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PowerManagement {
    /// The state it is in, 0 for D0 to 3 for D3hot.
    pub state: u8,
    /// Whether it keeps its state from D3hot to D0, so that this is no reset.
    pub no_soft_reset: bool,
    /// Whether it can wake the host from D3cold.
    pub wakes_from_d3cold: bool,
}

/// PCI Express.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PciExpress {
    /// What it is on the fabric.
    pub port_type: PortType,
    /// Function level reset.
    pub flr: bool,
    /// Whether a port has a slot rather than a device soldered below it.
    pub slot_implemented: bool,
    /// Whether that slot can be filled and emptied while running.
    pub hotplug: bool,
    /// Its link; functions inside the root complex have none.
    pub link: Option<Link>,
}

/// What a function is on the PCI Express fabric (`PCI_EXP_TYPE_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortType {
    /// Endpoint.
    Endpoint,
    /// Endpoint that may need I/O ports.
    LegacyEndpoint,
    /// Port of the root complex.
    RootPort,
    /// Port of a switch, towards the root.
    UpstreamSwitchPort,
    /// Port of a switch, towards devices.
    DownstreamSwitchPort,
    /// Bridge to conventional PCI.
    PcieToPciBridge,
    /// Bridge from conventional PCI.
    PciToPcieBridge,
    /// Endpoint inside the root complex.
    RootComplexIntegratedEndpoint,
    /// Collects events of endpoints inside the root complex.
    RootComplexEventCollector,
    /// A number no specification has.
    Other(u8),
}

/// A link, at most and now. A VF has no link of its own: it repeats its PF's maximum, its current
/// fields are 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Link {
    /// Highest speed.
    pub max_speed: LinkSpeed,
    /// Highest number of lanes.
    pub max_width: u16,
    /// Speed now.
    pub current_speed: LinkSpeed,
    /// Lanes now.
    pub current_width: u16,
}

/// The code of a link speed, which is the generation of PCI Express that brought it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct LinkSpeed(pub u8);

impl LinkSpeed {
    /// Transfers per second and lane, in units of 10⁹; `None` for a code not known
    /// (`PCI_EXP_LNKCAP_SLS_*`).
    pub fn gigatransfers(self) -> Option<f32> {
        match self.0 {
            1 => Some(2.5),
            2 => Some(5.0),
            3 => Some(8.0),
            4 => Some(16.0),
            5 => Some(32.0),
            6 => Some(64.0),
            _ => None,
        }
    }
}

impl fmt::Display for LinkSpeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.gigatransfers() {
            Some(speed) => write!(f, "{speed} GT/s"),
            None => f.write_str("unknown speed"),
        }
    }
}

impl Capability {
    /// `None` if a register it needs is not there.
    pub(super) fn parse(node: &Node<'_>) -> Option<Self> {
        let bytes = node.bytes;
        Some(match node.id {
            0x01 => {
                let (ability, control) = (bytes.u16(2)?, bytes.u8(4)?);
                Self::PowerManagement(PowerManagement {
                    state: control & 0x3,
                    no_soft_reset: control & 0x8 != 0,
                    wakes_from_d3cold: ability & 0x8000 != 0,
                })
            }
            0x05 => {
                let flags = bytes.u8(2)?;
                Self::Msi { vectors: 1 << (flags >> 1 & 0x7), enabled: flags & 0x1 != 0 }
            }
            0x09 => Self::VendorSpecific,
            0x10 => Self::PciExpress(PciExpress::parse(bytes)?),
            0x11 => {
                let flags = bytes.u16(2)?;
                Self::Msix {
                    vectors: (flags & 0x7ff) + 1,
                    enabled: flags & 0x8000 != 0,
                    table_bar: bytes.u8(4)? & 0x7,
                }
            }
            0x13 => Self::AdvancedFeatures { flr: bytes.u8(3)? & 0x3 == 0x3 },
            other => Self::Other(other),
        })
    }
}

impl PciExpress {
    fn parse(bytes: Bytes<'_>) -> Option<Self> {
        let flags = bytes.u16(2)?;
        let port_type = PortType::of(bytes.u8(2)? >> 4);
        let slot_implemented = port_type.faces_downstream() && flags & 0x100 != 0;
        Some(Self {
            port_type,
            flr: bytes.u32(0x04)? & 1 << 28 != 0,
            slot_implemented,
            hotplug: slot_implemented && bytes.u8(0x14)? & 0x40 != 0,
            link: if port_type.has_link() { Some(Link::parse(bytes)?) } else { None },
        })
    }
}

impl PortType {
    fn of(number: u8) -> Self {
        match number {
            0x0 => Self::Endpoint,
            0x1 => Self::LegacyEndpoint,
            0x4 => Self::RootPort,
            0x5 => Self::UpstreamSwitchPort,
            0x6 => Self::DownstreamSwitchPort,
            0x7 => Self::PcieToPciBridge,
            0x8 => Self::PciToPcieBridge,
            0x9 => Self::RootComplexIntegratedEndpoint,
            0xa => Self::RootComplexEventCollector,
            other => Self::Other(other),
        }
    }

    /// Whether devices are below it, so that it may have a slot (`pcie_downstream_port`,
    /// `drivers/pci/pci.h`).
    fn faces_downstream(self) -> bool {
        matches!(self, Self::RootPort | Self::DownstreamSwitchPort | Self::PciToPcieBridge)
    }

    /// Whether link registers are there (`pcie_cap_has_lnkctl`, `drivers/pci/access.c`).
    fn has_link(self) -> bool {
        !matches!(
            self,
            Self::RootComplexIntegratedEndpoint | Self::RootComplexEventCollector | Self::Other(_)
        )
    }
}

impl Link {
    fn parse(bytes: Bytes<'_>) -> Option<Self> {
        Some(Self {
            max_speed: LinkSpeed(bytes.u8(0x0c)? & 0xf),
            max_width: bytes.u16(0x0c)? >> 4 & 0x3f,
            current_speed: LinkSpeed(bytes.u8(0x12)? & 0xf),
            current_width: bytes.u16(0x12)? >> 4 & 0x3f,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_speeds_have_names() {
        let names = [1, 2, 3, 4, 5, 6, 7].map(|code| LinkSpeed(code).to_string());
        let expected =
            ["2.5 GT/s", "5 GT/s", "8 GT/s", "16 GT/s", "32 GT/s", "64 GT/s", "unknown speed"];
        assert_eq!(names, expected);
    }

    #[test]
    fn only_ports_with_something_below_have_slots() {
        let mut registers = [0; 0x3c];
        registers[3] = 0x1; // slot implemented
        registers[0x14] = 0x40; // hot-plug capable
        let hotplug = |kind: &u8| {
            registers[2] = kind << 4 | 2;
            PciExpress::parse(Bytes(&registers)).unwrap().hotplug
        };
        let with_slots: Vec<u8> = (0..16).filter(hotplug).collect();
        assert_eq!(with_slots, [0x4, 0x6, 0x8]);
    }
}
