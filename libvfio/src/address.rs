//! PCI addresses. A plain type: touches nothing.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The address of one PCI function: `domain:bus:device.function`, all in hexadecimal.
///
/// Domains above `ffff` exist (Intel VMD starts at `10000`), so the domain is 32 bits wide; the
/// text form pads it to four digits as the kernel does (`pci_name`, `drivers/pci/probe.c`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// Why a text is no PCI address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{input}' is not a PCI address; write it as 03:00.0 or 0000:03:00.0")]
pub struct InvalidAddress {
    /// What was given.
    pub input: String,
}

impl PciAddress {
    /// An address from its parts, or `None` if `device` is above 31 or `function` above 7.
    pub fn new(domain: u32, bus: u8, device: u8, function: u8) -> Option<Self> {
        (device < 32 && function < 8).then_some(Self { domain, bus, device, function })
    }

    /// The PCI domain (segment).
    pub fn domain(self) -> u32 {
        self.domain
    }

    /// The bus number within the domain.
    pub fn bus(self) -> u8 {
        self.bus
    }

    /// The device number, 0 to 31.
    pub fn device(self) -> u8 {
        self.device
    }

    /// The function number, 0 to 7.
    pub fn function(self) -> u8 {
        self.function
    }

    /// The 16-bit routing id, in which SR-IOV counts its offset and stride.
    pub fn routing_id(self) -> u16 {
        u16::from(self.bus) << 8 | u16::from(self.device) << 3 | u16::from(self.function)
    }

    /// Whether both are functions of one device: same domain, bus and device number.
    pub fn same_slot(self, other: Self) -> bool {
        (self.domain, self.bus, self.device) == (other.domain, other.bus, other.device)
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, bus, device, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

impl fmt::Debug for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PciAddress {
    type Err = InvalidAddress;

    fn from_str(input: &str) -> Result<Self, InvalidAddress> {
        parse(input).ok_or_else(|| InvalidAddress { input: input.chars().take(64).collect() })
    }
}

impl From<PciAddress> for String {
    fn from(address: PciAddress) -> Self {
        address.to_string()
    }
}

impl TryFrom<String> for PciAddress {
    type Error = InvalidAddress;

    fn try_from(text: String) -> Result<Self, InvalidAddress> {
        text.parse()
    }
}

fn parse(input: &str) -> Option<PciAddress> {
    let (rest, function) = input.rsplit_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
    PciAddress::new(
        hex(domain, 8)?,
        u8::try_from(hex(bus, 2)?).ok()?,
        u8::try_from(hex(device, 2)?).ok()?,
        u8::try_from(hex(function, 1)?).ok()?,
    )
}

/// `from_str_radix` alone would accept a sign.
fn hex(text: &str, most: usize) -> Option<u32> {
    let plain = (1..=most).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u32::from_str_radix(text, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_forms_are_one_address() {
        let short: PciAddress = "03:00.1".parse().unwrap();
        assert_eq!(short, "0000:03:00.1".parse().unwrap());
        assert_eq!(short.to_string(), "0000:03:00.1");
        assert_eq!("10000:e1:1f.7".parse::<PciAddress>().unwrap().to_string(), "10000:e1:1f.7");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for bad in [
            "",
            "03",
            "03:00",
            "03:20.0",
            "03:00.8",
            "+3:00.0",
            "0000:03:00.0.0",
            "gpu",
            "x:03:00.0",
            "03:00.",
            ":00.0",
            "000000000:03:00.0",
            "03:00.00",
        ] {
            assert!(bad.parse::<PciAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_routing_id_is_bus_device_function() {
        assert_eq!("01:10.2".parse::<PciAddress>().unwrap().routing_id(), 0x0182);
    }
}
