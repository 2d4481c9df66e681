//! Which functions are meant. Pure: compares with what was read of a host.

use std::fmt;
use std::str::FromStr;

use super::facts::Facts;
use crate::address::PciAddress;
use crate::pci::Function;
use crate::pci::class::ClassAlias;

/// What a function must match; all that is `Some`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selector {
    /// Vendor.
    pub vendor: Option<u16>,
    /// Device.
    pub device: Option<u16>,
    /// Vendor and device of the subsystem.
    pub subsystem: Option<(u16, u16)>,
    /// Kind of device.
    pub class: Option<ClassAlias>,
    /// Address.
    pub address: Option<PciAddress>,
    /// Way through the ports.
    pub path: Option<PortPath>,
    /// Name of the slot.
    pub slot: Option<String>,
    /// Device serial number.
    pub serial: Option<String>,
    /// NUMA node.
    pub numa_node: Option<u32>,
    /// Host driver.
    pub driver: Option<String>,
}

/// A way from a root bus through ports, by device and function alone: bus numbers, which change,
/// are not in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortPath {
    /// Domain and number of the root bus.
    pub root: (u32, u8),
    /// Device and function of each port, and of the function if it ends there.
    pub hops: Vec<(u8, u8)>,
}

impl PortPath {
    /// The way to a function; `None` for one whose root bus is not known.
    pub fn to(function: &Function) -> Self {
        let first = function.upstream.first().unwrap_or(&function.address);
        let way = function.upstream.iter().chain([&function.address]);
        Self {
            root: (first.domain(), first.bus()),
            hops: way.map(|hop| (hop.device(), hop.function())).collect(),
        }
    }

    fn leads_to(&self, function: &Function) -> bool {
        let way = Self::to(function);
        way.root == self.root && way.hops.starts_with(&self.hops)
    }
}

impl FromStr for PortPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is no way through ports; write it as 0000:00/01.0/00.0");
        let mut parts = text.split('/');
        let hex = |text: &str, most: usize| {
            let plain = (1..=most).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            plain.then(|| u32::from_str_radix(text, 16).ok())?
        };
        let byte = |text: &str| u8::try_from(hex(text, 2)?).ok();
        let root = parts.next().and_then(|root| root.split_once(':'));
        let root = root.and_then(|(domain, bus)| Some((hex(domain, 8)?, byte(bus)?)));
        let hop = |text: &str| {
            let (device, function) = text.split_once('.')?;
            let (device, function) = (byte(device)?, byte(function)?);
            PciAddress::new(0, 0, device, function).map(|_| (device, function))
        };
        let hops: Option<Vec<(u8, u8)>> = parts.map(hop).collect();
        match (root, hops) {
            (Some(root), Some(hops)) if !hops.is_empty() => Ok(Self { root, hops }),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for PortPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}", self.root.0, self.root.1)?;
        self.hops.iter().try_for_each(|(device, function)| write!(f, "/{device:02x}.{function}"))
    }
}

impl Selector {
    /// Whether it says nothing, and so would match everything.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it means whatever is at this address: then who that was is remembered, so that nothing
    /// else is taken for it. A serial number says it better.
    pub fn is_by_address(&self, address: PciAddress) -> bool {
        self.address == Some(address) && self.serial.is_none()
    }

    /// Whether a function is meant.
    pub fn matches(&self, facts: &Facts, function: &Function) -> bool {
        fn so<T: PartialEq>(wanted: Option<&T>, is: Option<&T>) -> bool {
            wanted.is_none() || wanted == is
        }
        let ids = &function.ids;
        let subsystem = ids.subsystem_vendor.zip(ids.subsystem_device);
        so(self.vendor.as_ref(), ids.vendor.as_ref())
            && so(self.device.as_ref(), ids.device.as_ref())
            && so(self.subsystem.as_ref(), subsystem.as_ref())
            && self.class.is_none_or(|alias| ids.class.is_some_and(|class| alias.matches(class)))
            && so(self.address.as_ref(), Some(&function.address))
            && self.path.as_ref().is_none_or(|path| path.leads_to(function))
            && self.slot.as_ref().is_none_or(|slot| facts.is_in_slot(function.address, slot))
            && self.serial.as_ref().is_none_or(|serial| has_serial(function, serial))
            && so(self.numa_node.as_ref(), function.numa_node.as_ref())
            && self.driver.as_ref().is_none_or(|driver| facts.is_for(driver, function))
    }
}

/// However the digits of either are grouped.
fn has_serial(function: &Function, serial: &str) -> bool {
    let digits = |text: &str| -> String {
        text.chars().filter(char::is_ascii_hexdigit).map(|c| c.to_ascii_lowercase()).collect()
    };
    function.config.serial().is_some_and(|own| digits(&own.to_string()) == digits(serial))
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = [
            self.vendor.map(|id| format!("vendor {id:04x}")),
            self.device.map(|id| format!("device {id:04x}")),
            self.subsystem.map(|(vendor, device)| format!("subsystem {vendor:04x}:{device:04x}")),
            self.class.map(|class| format!("class {class}")),
            self.address.map(|address| format!("address {address}")),
            self.path.as_ref().map(|path| format!("path {path}")),
            self.slot.as_ref().map(|slot| format!("slot {slot}")),
            self.serial.as_ref().map(|serial| format!("serial {serial}")),
            self.numa_node.map(|node| format!("NUMA node {node}")),
            self.driver.as_ref().map(|driver| format!("driver {driver}")),
        ];
        f.write_str(&said.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_through_ports_are_read_back_and_others_refused() {
        for good in ["0000:00/01.0", "10000:e0/1f.7/00.0"] {
            assert_eq!(good.parse::<PortPath>().unwrap().to_string(), good);
        }
        for bad in ["", "0000:00", "0000:00/", "0000:00/20.0", "0000:00/01.8", "00/01.0", "x/1.0"] {
            assert!(bad.parse::<PortPath>().is_err(), "{bad}");
        }
    }
}
