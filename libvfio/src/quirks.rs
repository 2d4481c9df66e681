//! Devices that are known not to come back well from a reset, or not to be changed by it. Data alone,
//! from what others have published; touches nothing.

use crate::pci::Function;

/// What is known of a kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quirk {
    /// Vendor.
    pub vendor: u16,
    /// Devices: from the first to the last of each range.
    pub devices: &'static [(u16, u16)],
    /// Base class and subclass, where only those of one are meant.
    pub class: Option<u16>,
    /// What is so, as the second half of a sentence about the device.
    pub what: &'static str,
    /// Reset methods that are not used for it. None: it is only warned of.
    pub avoid: &'static [&'static str],
    /// Who says so.
    pub source: &'static str,
    /// Whether it is in the kernel's own table. Else nobody here has seen it.
    pub in_kernel: bool,
}

const KERNEL: &str = "Linux, drivers/pci/quirks.c";
const VENDOR_RESET: &str = "gnif/vendor-reset, src/device-db.h";

const fn one(device: u16) -> (u16, u16) {
    (device, device)
}

/// All that are known, by vendor. Newer kernels leave the methods out by themselves that are not used
/// here; older ones do not.
pub const QUIRKS: [Quirk; 17] = [
    Quirk {
        vendor: 0x1002,
        devices: &[(0x0000, 0xffff)],
        class: Some(0x0300),
        what: "may keep what is in its memory through a reset by power management (pm)",
        avoid: &["pm"],
        source: KERNEL,
        in_kernel: true,
    },
    Quirk {
        vendor: 0x1002,
        devices: &[(0x67c0, 0x67ff), one(0x6fdf), (0x6980, 0x699f)],
        class: None,
        what: "(Polaris) may not come back from a reset without the module vendor-reset",
        avoid: &[],
        source: VENDOR_RESET,
        in_kernel: false,
    },
    Quirk {
        vendor: 0x1002,
        devices: &[(0x6860, 0x687f), (0x66a0, 0x66af), one(0x738c)],
        class: None,
        what: "(Vega, Arcturus) may not come back from a reset without the module vendor-reset",
        avoid: &[],
        source: VENDOR_RESET,
        in_kernel: false,
    },
    Quirk {
        vendor: 0x1002,
        devices: &[(0x7310, 0x731f), (0x7340, 0x734f), (0x7360, 0x7362), one(0x73ff)],
        class: None,
        what: "(Navi) may not come back from a reset without the module vendor-reset",
        avoid: &[],
        source: VENDOR_RESET,
        in_kernel: false,
    },
    Quirk {
        vendor: 0x1002,
        devices: &[one(0x740f), one(0x75a3)],
        class: None,
        what: "(Instinct) may read all ones after a reset until the host is rebooted; lease its \
               virtual functions instead",
        avoid: &[],
        source: "amd/MxGPU-Virtualization, issue 25",
        in_kernel: false,
    },
    Quirk {
        vendor: 0x1022,
        devices: &[one(0x1487), one(0x148c), one(0x149c), one(0x7901), one(0x1502), one(0x17f0)],
        class: None,
        what: "may hang in a function level reset (flr)",
        avoid: &["flr"],
        source: KERNEL,
        in_kernel: true,
    },
    Quirk {
        vendor: 0x104c,
        devices: &[one(0xb005)],
        class: None,
        what: "(KeyStone) stops at a reset by its bus, and leaks state without one",
        avoid: &["bus"],
        source: KERNEL,
        in_kernel: true,
    },
    Quirk {
        vendor: 0x10de,
        devices: &[(0x2340, 0x237f)],
        class: None,
        what: "does not work with a reset by its bus",
        avoid: &["bus"],
        source: KERNEL,
        in_kernel: true,
    },
    Quirk {
        vendor: 0x10de,
        devices: &[one(0x22ce), one(0x22d0)],
        class: None,
        what: "(GB10) may lose its link in a reset by its bus",
        avoid: &["bus"],
        source: KERNEL,
        in_kernel: true,
    },
    Quirk {
        vendor: 0x14c3,
        devices: &[one(0x0616), one(0x7925)],
        class: None,
        what: "may hang in a function level reset (flr)",
        avoid: &["flr"],
        source: KERNEL,
        in_kernel: true,
    },
    Quirk {
        vendor: 0x15b3,
        devices: &[one(0xcb84), one(0xcf6c), one(0xcf70), one(0xcf80)],
        class: None,
        what: "(Spectrum) goes on as if nothing was through a reset by power management (pm)",
        avoid: &["pm"],
        source: KERNEL,
        in_kernel: true,
    },
    Quirk {
        vendor: 0x168c,
        devices: &[one(0x0030), (0x0032, 0x0034), one(0x003c), one(0x003e)],
        class: None,
        what: "is never seen again after a reset by its bus, which may take the host along",
        avoid: &["bus"],
        source: KERNEL,
        in_kernel: true,
    },
    Quirk {
        vendor: 0x177d,
        devices: &[one(0xa100)],
        class: None,
        what: "may lose the devices below it in a reset by its bus",
        avoid: &["bus"],
        source: KERNEL,
        in_kernel: true,
    },
    Quirk {
        vendor: 0x17cb,
        devices: &[one(0x0308), one(0x1103), one(0x1107)],
        class: None,
        what: "is never seen again after a reset by its bus",
        avoid: &["bus"],
        source: KERNEL,
        in_kernel: true,
    },
    Quirk {
        vendor: 0x1b21,
        devices: &[one(0x1164)],
        class: None,
        what: "may lose its link in a reset by its bus",
        avoid: &["bus"],
        source: KERNEL,
        in_kernel: true,
    },
    Quirk {
        vendor: 0x8086,
        devices: &[(0x1502, 0x1503)],
        class: None,
        what: "may hang in a function level reset (flr)",
        avoid: &["flr"],
        source: KERNEL,
        in_kernel: true,
    },
    Quirk {
        vendor: 0x8086,
        devices: &[one(0x0443)],
        class: None,
        what: "(QuickAssist's virtual function) hides its capabilities, its reset (flr) among them",
        avoid: &[],
        source: KERNEL,
        in_kernel: true,
    },
];

impl Quirk {
    /// What is to be known of a device that has it.
    pub fn told(&self) -> String {
        let doubt = if self.in_kernel { "" } else { "; not verified" };
        format!("{} ({}{doubt})", self.what, self.source)
    }

    fn is_of(&self, function: &Function) -> bool {
        let ids = &function.ids;
        let class = ids.class.map(|class| class >> 8);
        let meant = |device: u16| self.devices.iter().any(|(a, b)| (*a..=*b).contains(&device));
        ids.vendor == Some(self.vendor)
            && ids.device.is_some_and(meant)
            && self.class.is_none_or(|wanted| class == Some(wanted.into()))
    }
}

/// What is known of a function.
pub fn of(function: &Function) -> impl Iterator<Item = &'static Quirk> {
    const { &QUIRKS }.iter().filter(|quirk| quirk.is_of(function))
}

/// Those of a function's reset methods that may be used, in the kernel's order.
pub fn methods(function: &Function) -> Vec<&str> {
    let avoided = |method: &str| of(function).any(|quirk| quirk.avoid.contains(&method));
    function.reset_methods.iter().map(String::as_str).filter(|method| !avoided(method)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_by_vendor_say_who_says_so_and_avoid_methods_there_are() {
        assert!(QUIRKS.is_sorted_by_key(|quirk| quirk.vendor));
        for quirk in QUIRKS {
            assert!(!quirk.devices.is_empty() && !quirk.source.is_empty(), "{quirk:?}");
            assert!(quirk.devices.iter().all(|(a, b)| a <= b), "{quirk:?}");
            assert!(quirk.avoid.iter().all(|method| ["flr", "bus", "pm"].contains(method)));
            // What is only said somewhere changes nothing but what is told.
            assert!(quirk.in_kernel || quirk.avoid.is_empty(), "{quirk:?}");
            assert_eq!(quirk.told().contains("not verified"), !quirk.in_kernel);
        }
    }
}
