//! PCI addresses. A plain type: touches nothing.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize, Serializer};

/// The address of one PCI function: `domain:bus:device.function`, all in hexadecimal.
///
/// Domains above `ffff` exist (Intel VMD starts at `10000`), so the domain is 32 bits wide; the
/// text form pads it to four digits as the kernel does (`pci_name`, `drivers/pci/probe.c`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// Bytes of the longest text form, with a domain of eight digits.
const LONGEST: usize = 16;

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

    /// The text form, in `buffer`. Addresses are written so often that formatting each number would
    /// be a fifth of the daemon's work.
    fn text(self, buffer: &mut [u8; LONGEST]) -> &str {
        let mut start = LONGEST;
        let mut put = |byte| {
            start -= 1;
            buffer[start] = byte;
        };
        let digit = |number: u32, at: u32| b"0123456789abcdef"[(number >> (4 * at) & 0xf) as usize];
        put(digit(self.function.into(), 0));
        put(b'.');
        for number in [self.device, self.bus] {
            put(digit(number.into(), 0));
            put(digit(number.into(), 1));
            put(b':');
        }
        let digits = (8 - self.domain.leading_zeros() / 4).max(4);
        (0..digits).for_each(|at| put(digit(self.domain, at)));
        // It is all ASCII.
        std::str::from_utf8(&buffer[start..]).unwrap_or_default()
    }

    /// Whether both are functions of one device: same domain, bus and device number.
    pub fn same_slot(self, other: Self) -> bool {
        (self.domain, self.bus, self.device) == (other.domain, other.bus, other.device)
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text(&mut [0; LONGEST]))
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

impl Serialize for PciAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.text(&mut [0; LONGEST]))
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
        for text in ["0000:00:00.0", "00ff:0a:1f.7", "10000:e1:1f.7", "ffffffff:ff:1f.7"] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), text);
        }
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
