//! Configuration space: what a function says of itself, parsed from the bytes of sysfs `config`.
//! Works on bytes alone, touches nothing, and never panics: what cannot be known is a
//! [`ConfigProblem`] beside what can. Register layouts are those of `linux/pci_regs.h`.

mod bytes;
mod capability;
mod extended;
mod list;
mod reading;

pub use reading::read;
use serde::Serialize;

use bytes::Bytes;
pub use capability::{Capability, Link, LinkSpeed, PciExpress, PortType, PowerManagement};
pub use extended::{Acs, AcsFlags, ExtendedCapability, ResizableBar, SerialNumber, SrIov};
pub use list::List;
use list::{Node, Walk};

/// Bytes of the header every function has (`PCI_STD_HEADER_SIZEOF`).
const HEADER: usize = 0x40;
/// Where conventional configuration space ends and extended begins (`PCI_CFG_SPACE_SIZE`).
const CONVENTIONAL: usize = 0x100;

/// A function's configuration space, as far as it could be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConfigSpace {
    /// The header; `None` if it was not read whole or the function does not answer.
    pub header: Option<Header>,
    /// Whether the header holds anything but ones. A function that is gone or in D3cold answers
    /// every read with ones.
    ///
    /// The vendor alone does not tell: a living VF has 0xffff there (`pci_device_is_present`,
    /// `drivers/pci/pci.c`).
    pub alive: bool,
    /// How many bytes were read. An unprivileged reader gets 64.
    pub coverage: usize,
    /// Capabilities, in the order of their list.
    pub capabilities: Vec<Capability>,
    /// Extended (PCI Express) capabilities, in the order of their list.
    pub extended: Vec<ExtendedCapability>,
    /// What is not known, and why.
    pub problems: Vec<ConfigProblem>,
}

/// The first 64 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Header {
    /// Vendor. A VF has 0xffff here; its PF has the vendor of both.
    pub vendor: u16,
    /// Device. A VF has 0xffff here; [`SrIov::vf_device`] of its PF has the number.
    pub device: u16,
    /// Command register.
    pub command: u16,
    /// Status register.
    pub status: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, subclass and programming interface, 24 bits.
    pub class: u32,
    /// Layout of the rest, with what only that layout has.
    pub header_type: HeaderType,
    /// Whether the device may have functions other than 0.
    pub multifunction: bool,
    /// Interrupt pin, 1 for INTA to 4 for INTD, 0 for none.
    pub interrupt_pin: u8,
}

/// The layout of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeaderType {
    /// Anything that is no bridge to another bus.
    Endpoint {
        /// Maker of the board.
        subsystem_vendor: u16,
        /// The board.
        subsystem_device: u16,
    },
    /// A bridge to a PCI bus.
    Bridge(Buses),
    /// A bridge to a `CardBus`.
    CardBus(Buses),
    /// A type no specification has.
    Other(u8),
}

/// The buses a bridge joins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Buses {
    /// The bus it is on.
    pub primary: u8,
    /// The bus right below it.
    pub secondary: u8,
    /// The highest bus below it.
    pub subordinate: u8,
}

/// Why something about a configuration space is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum ConfigProblem {
    /// The header reads as ones throughout.
    #[error("configuration space reads as all ones: the device is gone or without power")]
    Gone,
    /// There is more than the reader was given.
    #[error("only {coverage} bytes of configuration space could be read: what follows is unknown")]
    Truncated {
        /// Bytes read.
        coverage: usize,
    },
    /// Where the capabilities start depends on the type of the header.
    #[error("header type {0:#04x} is unknown: its capabilities cannot be found")]
    UnknownHeaderType(u8),
    /// A list points to where none of its members can be.
    #[error("the {list} list points to {pointer:#x}, where none can be")]
    PointerOutOfRange {
        /// The list, which ends here.
        list: List,
        /// Where it points.
        pointer: u16,
    },
    /// A list points back into itself.
    #[error("the {list} list loops back to {pointer:#x}")]
    PointerLoop {
        /// The list, which ends here.
        list: List,
        /// Where it points.
        pointer: u16,
    },
    /// A member of a list reads as ones.
    #[error("the {list} at {at:#x} reads as all ones")]
    Unreadable {
        /// The list, which ends here.
        list: List,
        /// The place.
        at: u16,
    },
    /// A capability does not fit between its place and the end of what was read.
    #[error("the {list} at {at:#x} is cut short")]
    CutShort {
        /// The list, which goes on.
        list: List,
        /// The place of the capability.
        at: u16,
    },
}

/// Parses what was read from sysfs `config`: 64, 256 or 4096 bytes, or any other number.
pub fn parse(bytes: &[u8]) -> ConfigSpace {
    let mut space = ConfigSpace {
        header: None,
        alive: bytes.iter().take(HEADER).any(|byte| *byte != 0xff),
        coverage: bytes.len(),
        capabilities: Vec::new(),
        extended: Vec::new(),
        problems: Vec::new(),
    };
    if !space.alive && !bytes.is_empty() {
        space.note(ConfigProblem::Gone);
        return space;
    }
    let Some(header) = Header::parse(Bytes(bytes)) else {
        space.note(ConfigProblem::Truncated { coverage: bytes.len() });
        return space;
    };
    space.read_capabilities(&header, bytes);
    space.header = Some(header);
    space
}

impl ConfigSpace {
    /// Whether reads of it return nothing but ones: its function has gone, or is out of reach in D3cold.
    pub fn is_silent(&self) -> bool {
        self.coverage > 0 && !self.alive
    }

    fn read_capabilities(&mut self, header: &Header, bytes: &[u8]) {
        if let HeaderType::Other(number) = header.header_type {
            self.note(ConfigProblem::UnknownHeaderType(number));
        }
        let conventional = Bytes(bytes.get(..CONVENTIONAL).unwrap_or(bytes));
        let start = header.first_capability(conventional);
        for node in Walk::new(List::Conventional, start, conventional) {
            match node.and_then(|node| node.parse(Capability::parse)) {
                Ok(capability) => self.capabilities.push(capability),
                Err(problem) => self.note(problem),
            }
        }
        if bytes.len() > CONVENTIONAL && self.may_be_extended() {
            // One of number 0 was taken out of the list, which goes on behind it: an H100 has some.
            let taken_out = |node: &Result<Node<'_>, _>| node.as_ref().is_ok_and(|n| n.id == 0);
            let members = Walk::new(List::Extended, 0x100, Bytes(bytes));
            for node in members.filter(|node| !taken_out(node)) {
                match node.and_then(|node| node.parse(ExtendedCapability::parse)) {
                    Ok(capability) => self.extended.push(capability),
                    Err(problem) => self.note(problem),
                }
            }
        } else if self.pcie().is_some() {
            self.note(ConfigProblem::Truncated { coverage: bytes.len() });
        }
    }

    /// Whether there can be an extended list. Host bridges of conventional PCI have 4096 bytes in
    /// sysfs too (`pci_cfg_space_size`, `drivers/pci/probe.c`), with noise in them; so this asks
    /// for the capability of PCI Express or PCI-X, as `lspci` does.
    fn may_be_extended(&self) -> bool {
        let capable = |c: &_| matches!(c, Capability::PciExpress(_) | Capability::Other(0x07));
        self.capabilities.iter().any(capable)
    }

    fn note(&mut self, problem: ConfigProblem) {
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// Names of all capabilities found, in the order of their lists.
    pub fn capability_names(&self) -> Vec<String> {
        let conventional = self.capabilities.iter().map(ToString::to_string);
        conventional.chain(self.extended.iter().map(ToString::to_string)).collect()
    }

    /// The PCI Express capability; `None` for conventional PCI.
    pub fn pcie(&self) -> Option<&PciExpress> {
        self.capabilities.iter().find_map(|capability| match capability {
            Capability::PciExpress(pcie) => Some(pcie),
            _ => None,
        })
    }

    /// Access control services.
    pub fn acs(&self) -> Option<&Acs> {
        self.extended.iter().find_map(|capability| match capability {
            ExtendedCapability::Acs(acs) => Some(acs),
            _ => None,
        })
    }

    /// SR-IOV; only physical functions have it.
    pub fn sriov(&self) -> Option<&SrIov> {
        self.extended.iter().find_map(|capability| match capability {
            ExtendedCapability::SrIov(sriov) => Some(sriov),
            _ => None,
        })
    }

    /// Interrupt vectors its MSI-X table has.
    pub fn msix_vectors(&self) -> Option<u16> {
        self.capabilities.iter().find_map(|capability| match capability {
            Capability::Msix { vectors, .. } => Some(*vectors),
            _ => None,
        })
    }

    /// The device serial number.
    pub fn serial(&self) -> Option<SerialNumber> {
        self.extended.iter().find_map(|capability| match capability {
            ExtendedCapability::SerialNumber(serial) => Some(*serial),
            _ => None,
        })
    }

    /// Whether the function can be reset on its own, by PCI Express or by Advanced Features.
    pub fn has_flr(&self) -> bool {
        self.capabilities.iter().any(|capability| match capability {
            Capability::PciExpress(pcie) => pcie.flr,
            Capability::AdvancedFeatures { flr } => *flr,
            _ => false,
        })
    }
}

impl Header {
    /// `None` unless all of the header is there.
    fn parse(bytes: Bytes<'_>) -> Option<Self> {
        let header = Bytes(bytes.0.get(..HEADER)?);
        let kind = header.u8(0x0e)?;
        Some(Self {
            vendor: header.u16(0x00)?,
            device: header.u16(0x02)?,
            command: header.u16(0x04)?,
            status: header.u16(0x06)?,
            revision: header.u8(0x08)?,
            class: header.u32(0x08)? >> 8,
            header_type: HeaderType::parse(kind & 0x7f, header)?,
            multifunction: kind & 0x80 != 0,
            interrupt_pin: header.u8(0x3d)?,
        })
    }

    /// Where the list of capabilities starts, 0 if there is none (`PCI_STATUS_CAP_LIST`,
    /// `PCI_CAPABILITY_LIST`, `PCI_CB_CAPABILITY_LIST`).
    fn first_capability(&self, bytes: Bytes<'_>) -> u16 {
        if self.status & 0x10 == 0 {
            return 0;
        }
        let pointer = match self.header_type {
            HeaderType::Endpoint { .. } | HeaderType::Bridge(_) => bytes.u8(0x34),
            HeaderType::CardBus(_) => bytes.u8(0x14),
            HeaderType::Other(_) => None,
        };
        pointer.unwrap_or(0).into()
    }
}

impl HeaderType {
    fn parse(kind: u8, header: Bytes<'_>) -> Option<Self> {
        let buses = Buses {
            primary: header.u8(0x18)?,
            secondary: header.u8(0x19)?,
            subordinate: header.u8(0x1a)?,
        };
        Some(match kind {
            0 => Self::Endpoint {
                subsystem_vendor: header.u16(0x2c)?,
                subsystem_device: header.u16(0x2e)?,
            },
            1 => Self::Bridge(buses),
            2 => Self::CardBus(buses),
            other => Self::Other(other),
        })
    }
}

#[cfg(test)]
mod tests;
