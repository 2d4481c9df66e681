//! Which devices have memory that can be cleared through a region. Data alone, touches nothing.

use crate::pci::Function;

/// What is known of a kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Profile {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// The region through which all of its memory is reached, one word after the other, without side
    /// effects.
    pub bar: u8,
    /// From where that is known.
    pub source: &'static str,
}

/// The devices that are known.
///
/// Those of NVIDIA, AMD and Intel are not among them: their drivers set up what their regions show,
/// and much of their memory (caches, registers, page tables) is behind none.
pub const PROFILES: [Profile; 1] = [Profile {
    vendor: 0x1234,
    device: 0x1111,
    bar: 0,
    source: "QEMU, docs/specs/standard-vga.rst: \"PCI Region 0: Framebuffer memory\"",
}];

/// The profile of a function, if its kind is known.
pub fn profile(function: &Function) -> Option<&'static Profile> {
    let ids = (function.ids.vendor, function.ids.device);
    const { &PROFILES }.iter().find(|known| (Some(known.vendor), Some(known.device)) == ids)
}
