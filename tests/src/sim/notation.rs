//! How a described host writes numbers down: `10de:2684`, `16G wide prefetch`. Plain types parsed
//! from text; touches nothing.

use std::str::FromStr;

use serde::Deserialize;

/// Vendor and device, or maker and number of a board: `10de:2684`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct IdPair {
    /// Before the colon.
    pub vendor: u16,
    /// After the colon.
    pub device: u16,
}

/// Like [`IdPair`], with `*` where anything will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct IdPattern {
    /// Vendor, if it matters.
    pub vendor: Option<u16>,
    /// Device, if it matters.
    pub device: Option<u16>,
}

/// A memory or I/O region by size: `16M`, `16G wide prefetch`, `128 io`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct BarSize {
    /// Bytes, a power of two.
    pub size: u64,
    /// I/O ports rather than memory.
    pub io: bool,
    /// Takes two BARs, and may be above 4 GiB.
    pub wide: bool,
    /// Reads have no side effects.
    pub prefetch: bool,
}

/// Text that is none of these.
#[derive(Debug, thiserror::Error)]
#[error("'{text}' is not {wanted}")]
pub struct Malformed {
    text: String,
    wanted: &'static str,
}

impl IdPattern {
    /// Whether these numbers fit.
    pub fn matches(self, id: IdPair) -> bool {
        self.vendor.is_none_or(|vendor| vendor == id.vendor)
            && self.device.is_none_or(|device| device == id.device)
    }
}

impl TryFrom<String> for IdPair {
    type Error = Malformed;

    fn try_from(text: String) -> Result<Self, Malformed> {
        let parse = || {
            let (vendor, device) = text.split_once(':')?;
            Some(Self { vendor: hex(vendor)?, device: hex(device)? })
        };
        parse().ok_or(Malformed { text, wanted: "a pair of ids like 10de:2684" })
    }
}

impl TryFrom<String> for IdPattern {
    type Error = Malformed;

    fn try_from(text: String) -> Result<Self, Malformed> {
        let part = |part: &str| if part == "*" { Some(None) } else { hex(part).map(Some) };
        let parse = || {
            let (vendor, device) = text.split_once(':')?;
            Some(Self { vendor: part(vendor)?, device: part(device)? })
        };
        parse().ok_or(Malformed { text, wanted: "a pattern of ids like 10de:*" })
    }
}

impl TryFrom<String> for BarSize {
    type Error = Malformed;

    fn try_from(text: String) -> Result<Self, Malformed> {
        text.parse()
    }
}

impl FromStr for BarSize {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let parse = || {
            let mut words = text.split(' ');
            let mut bar =
                Self { size: size(words.next()?)?, io: false, wide: false, prefetch: false };
            for word in words {
                match word {
                    "io" => bar.io = true,
                    "wide" => bar.wide = true,
                    "prefetch" => bar.prefetch = true,
                    _ => return None,
                }
            }
            bar.size.is_power_of_two().then_some(bar)
        };
        parse().ok_or_else(|| Malformed { text: text.into(), wanted: "a region like 16G wide" })
    }
}

fn hex(text: &str) -> Option<u16> {
    u16::from_str_radix(text, 16).ok()
}

fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}
