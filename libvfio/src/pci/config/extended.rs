//! Capabilities of the extended list, from their registers. Works on bytes alone; a register that
//! is not there makes the capability unknown, never wrong. Offsets are relative to each
//! capability, as in `linux/pci_regs.h`.

use std::fmt;

use serde::{Serialize, Serializer};

use super::bytes::Bytes;
use super::list::Node;

/// A capability of the extended list (`PCI_EXT_CAP_ID_*`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExtendedCapability {
    /// Advanced error reporting.
    Aer,
    /// Device serial number.
    SerialNumber(SerialNumber),
    /// Access control services.
    Acs(Acs),
    /// Alternative routing ids: more than eight functions in a device.
    Ari,
    /// Address translation services.
    Ats {
        /// Whether the device may use addresses it translated itself.
        enabled: bool,
    },
    /// Single root I/O virtualisation.
    SrIov(SrIov),
    /// Page requests.
    Pri {
        /// Whether the device may make them.
        enabled: bool,
    },
    /// BARs whose size can be changed.
    ResizableBar(Vec<ResizableBar>),
    /// Process address spaces.
    Pasid {
        /// Whether the device may name them.
        enabled: bool,
    },
    /// Downstream port containment.
    Dpc,
    /// Any other.
    Other {
        /// Its number.
        id: u16,
        /// Its version.
        version: u8,
    },
}

impl fmt::Display for ExtendedCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Aer => f.write_str("aer"),
            Self::SerialNumber(_) => f.write_str("serial-number"),
            Self::Acs(_) => f.write_str("acs"),
            Self::Ari => f.write_str("ari"),
            Self::Ats { .. } => f.write_str("ats"),
            Self::SrIov(_) => f.write_str("sr-iov"),
            Self::Pri { .. } => f.write_str("pri"),
            Self::ResizableBar(_) => f.write_str("resizable-bar"),
            Self::Pasid { .. } => f.write_str("pasid"),
            Self::Dpc => f.write_str("dpc"),
            Self::Other { id, .. } => write!(f, "extended-{id:#06x}"),
        }
    }
}

/// A device serial number. Shown as `lspci` does: `00-11-22-ff-fe-33-44-55`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SerialNumber(pub u64);

impl fmt::Display for SerialNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = self.0.to_be_bytes();
        write!(f, "{first:02x}")?;
        rest.iter().try_for_each(|byte| write!(f, "-{byte:02x}"))
    }
}

impl Serialize for SerialNumber {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Access control services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Acs {
    /// What the function can control.
    pub capable: AcsFlags,
    /// What is switched on.
    pub enabled: AcsFlags,
}

impl Acs {
    /// Whether the kernel takes the function to keep traffic apart as it is set now: all of what
    /// is required and can be controlled is on. What cannot be controlled is not offered or wired
    /// to be on (`pci_acs_flags_enabled`, `drivers/pci/pci.c`).
    pub fn isolates(self) -> bool {
        let required = AcsFlags::REQUIRED.0 & self.capable.0;
        self.enabled.0 & required == required
    }
}

/// Access control services by their bits (`PCI_ACS_*`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct AcsFlags(pub u16);

impl AcsFlags {
    /// What keeps the traffic of devices apart (`REQ_ACS_FLAGS`, `drivers/iommu/iommu.c`).
    pub const REQUIRED: Self = Self(0x01 | 0x04 | 0x08 | 0x10);

    /// Requests with a requester id from elsewhere are blocked.
    pub fn source_validation(self) -> bool {
        self.0 & 0x01 != 0
    }

    /// Requests with addresses already translated are blocked.
    pub fn translation_blocking(self) -> bool {
        self.0 & 0x02 != 0
    }

    /// Requests to peers go by way of the root complex.
    pub fn p2p_request_redirect(self) -> bool {
        self.0 & 0x04 != 0
    }

    /// Completions to peers go by way of the root complex.
    pub fn p2p_completion_redirect(self) -> bool {
        self.0 & 0x08 != 0
    }

    /// What comes back from the root complex is sent on rather than dropped.
    pub fn upstream_forwarding(self) -> bool {
        self.0 & 0x10 != 0
    }

    /// Peers can be blocked one by one.
    pub fn egress_control(self) -> bool {
        self.0 & 0x20 != 0
    }

    /// Requests to peers with addresses already translated go straight.
    pub fn direct_translated_p2p(self) -> bool {
        self.0 & 0x40 != 0
    }

    /// Whether all of [`REQUIRED`](Self::REQUIRED) is among these.
    pub fn isolates(self) -> bool {
        self.0 & Self::REQUIRED.0 == Self::REQUIRED.0
    }
}

/// Single root I/O virtualisation, of a physical function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SrIov {
    /// VFs it starts with.
    pub initial_vfs: u16,
    /// VFs it can have.
    pub total_vfs: u16,
    /// VFs it has, or would have when enabled.
    pub num_vfs: u16,
    /// Routing id distance from the PF to its first VF.
    pub vf_offset: u16,
    /// Routing id distance from one VF to the next.
    pub vf_stride: u16,
    /// Device number of its VFs.
    pub vf_device: u16,
    /// Whether its VFs are there.
    pub enabled: bool,
}

/// A BAR whose size can be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ResizableBar {
    /// Which BAR, 0 to 5.
    pub bar: u8,
    /// Sizes it can have: bit n for 2ⁿ MiB, as in sysfs `resourceN_resize`.
    pub sizes: u32,
    /// Its size, as the power of two in MiB.
    pub current: u8,
}

impl ExtendedCapability {
    /// `None` if a register it needs is not there.
    pub(super) fn parse(node: &Node<'_>) -> Option<Self> {
        let bytes = node.bytes;
        Some(match node.id {
            0x01 => Self::Aer,
            0x03 => {
                let (low, high) = (bytes.u32(0x04)?, bytes.u32(0x08)?);
                Self::SerialNumber(SerialNumber(u64::from(high) << 32 | u64::from(low)))
            }
            0x0d => Self::Acs(Acs {
                capable: AcsFlags(bytes.u16(0x04)?),
                enabled: AcsFlags(bytes.u16(0x06)?),
            }),
            0x0e => Self::Ari,
            0x0f => Self::Ats { enabled: bytes.u16(0x06)? & 0x8000 != 0 },
            0x10 => Self::SrIov(SrIov {
                initial_vfs: bytes.u16(0x0c)?,
                total_vfs: bytes.u16(0x0e)?,
                num_vfs: bytes.u16(0x10)?,
                vf_offset: bytes.u16(0x14)?,
                vf_stride: bytes.u16(0x16)?,
                vf_device: bytes.u16(0x1a)?,
                enabled: bytes.u16(0x08)? & 0x1 != 0,
            }),
            0x13 => Self::Pri { enabled: bytes.u16(0x04)? & 0x1 != 0 },
            0x15 => Self::ResizableBar(resizable_bars(bytes)?),
            0x1b => Self::Pasid { enabled: bytes.u16(0x06)? & 0x1 != 0 },
            0x1d => Self::Dpc,
            id => Self::Other { id, version: node.version },
        })
    }
}

/// A pair of registers for each BAR; the first pair also says how many there are. The size field
/// has six bits (PCI Express base specification 4.0), one more than `PCI_REBAR_CTRL_BAR_SIZE`
/// gives it.
fn resizable_bars(bytes: Bytes<'_>) -> Option<Vec<ResizableBar>> {
    let count = bytes.u8(0x08)? >> 5;
    (0..count)
        .map(|index| {
            let at = usize::from(index) * 8;
            let (sizes, control) = (bytes.u32(at + 0x04)? >> 4, bytes.u32(at + 0x08)?);
            let [bar, current, ..] = control.to_le_bytes();
            Some(ResizableBar { bar: bar & 0x7, sizes, current: current & 0x3f })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_read_as_lspci_shows_them() {
        let serial = SerialNumber(0x0011_22ff_fe33_4455);
        assert_eq!(serial.to_string(), "00-11-22-ff-fe-33-44-55");
    }

    #[test]
    fn isolation_needs_each_required_service() {
        assert!(AcsFlags(0x1d).isolates());
        assert!(AcsFlags(0xff).isolates());
        for bit in [0x01, 0x04, 0x08, 0x10] {
            assert!(!AcsFlags(0xff & !bit).isolates());
        }
    }

    #[test]
    fn services_that_cannot_be_controlled_are_not_missed() {
        let acs = |capable, enabled| Acs { capable: AcsFlags(capable), enabled: AcsFlags(enabled) };
        assert!(acs(0x1d, 0x1d).isolates());
        assert!(acs(0x0c, 0x0c).isolates());
        assert!(acs(0x00, 0x00).isolates());
        assert!(!acs(0x1d, 0x0d).isolates());
        assert!(!acs(0x5f, 0x00).isolates());
    }

    #[test]
    fn each_service_has_its_own_bit() {
        let tests = [
            AcsFlags::source_validation,
            AcsFlags::translation_blocking,
            AcsFlags::p2p_request_redirect,
            AcsFlags::p2p_completion_redirect,
            AcsFlags::upstream_forwarding,
            AcsFlags::egress_control,
            AcsFlags::direct_translated_p2p,
        ];
        for (bit, test) in tests.iter().enumerate() {
            assert!(test(AcsFlags(1 << bit)));
            assert!(!test(AcsFlags(!(1 << bit))));
        }
    }

    #[test]
    fn resizable_bars_come_in_pairs_of_registers() {
        let mut registers = [0; 0x14];
        registers[0x04..0x08].copy_from_slice(&0x0000_7000_u32.to_le_bytes());
        registers[0x08..0x0c].copy_from_slice(&0x0000_0840_u32.to_le_bytes());
        registers[0x0c..0x10].copy_from_slice(&0x0007_fff0_u32.to_le_bytes());
        registers[0x10..0x14].copy_from_slice(&0x0000_0f02_u32.to_le_bytes());
        let bars = resizable_bars(Bytes(&registers)).unwrap();
        let expected = [
            ResizableBar { bar: 0, sizes: 0x700, current: 8 },
            ResizableBar { bar: 2, sizes: 0x7fff, current: 15 },
        ];
        assert_eq!(bars, expected);
        for length in 0..registers.len() {
            assert!(resizable_bars(Bytes(&registers[..length])).is_none(), "{length}");
        }
    }
}
