//! Configuration space as a described function would have it. Makes bytes, touches nothing.
//! Register layouts are those of `linux/pci_regs.h`.

use super::described::{Express, Function, Sriov};
use super::fault::Damage;
use super::notation::IdPair;
use super::resource::Region;

/// What configuration space shows beside the description.
#[derive(Debug, Default)]
pub(super) struct State<'a> {
    /// Where its regions are.
    pub(super) regions: &'a [Region],
    /// VFs it has.
    pub(super) vfs: u16,
    /// Interrupt vectors it has.
    pub(super) vectors: u16,
    /// Whether it is a VF, which has no ids of its own.
    pub(super) is_virtual: bool,
    /// Whether other functions share its slot.
    pub(super) multifunction: bool,
    /// The highest bus below it.
    pub(super) subordinate: u8,
    /// In D3hot rather than D0.
    pub(super) asleep: bool,
}

const EXTENDED: usize = 0x100;

/// The bytes of sysfs `config`.
pub(super) fn bytes(function: &Function, state: &State<'_>) -> Vec<u8> {
    let size = if function.express.is_some() { 4096 } else { 256 };
    let mut space = Space { bytes: vec![0; size], next: 0x40, link: 0x34 };
    space.header(function, state);
    space.capabilities(function, state);
    if function.express.is_some() {
        (space.next, space.link) = (EXTENDED, 0);
        space.extended(function, state);
    }
    space.bytes
}

/// The same of a function that did not come back well.
pub(super) fn damaged(mut bytes: Vec<u8>, damage: Damage) -> Vec<u8> {
    match damage {
        Damage::Silent => bytes.fill(0xff),
        Damage::OtherIds => bytes[0x02] ^= 0xff,
        Damage::NoAddresses => bytes[0x10..0x28].fill(0),
        Damage::HalfLink => {
            let mut at = usize::from(bytes[0x34]);
            while at != 0 && bytes[at] != 0x10 {
                at = usize::from(bytes[at + 1]);
            }
            // Lanes are from bit 4 on.
            if at != 0 {
                let fields = u16::from_le_bytes([bytes[at + 0x12], bytes[at + 0x13]]);
                let halved = (fields & 0xf) | (((fields >> 4) / 2) << 4);
                bytes[at + 0x12..at + 0x14].copy_from_slice(&halved.to_le_bytes());
            }
        }
    }
    bytes
}

struct Space {
    bytes: Vec<u8>,
    /// Where the next capability goes.
    next: usize,
    /// The register that has to point to it; 0 for the first of the extended list.
    link: usize,
}

impl Space {
    fn put<const N: usize>(&mut self, at: usize, value: [u8; N]) {
        self.bytes[at..at + N].copy_from_slice(&value);
    }

    fn u16(&mut self, at: usize, value: u16) {
        self.put(at, value.to_le_bytes());
    }

    fn u32(&mut self, at: usize, value: u32) {
        self.put(at, value.to_le_bytes());
    }

    fn header(&mut self, function: &Function, state: &State<'_>) {
        let id =
            if state.is_virtual { IdPair { vendor: 0xffff, device: 0xffff } } else { function.id };
        self.u16(0x00, id.vendor);
        self.u16(0x02, id.device);
        // Memory space and bus master, which a VF has no bits for; it has capabilities.
        self.u16(0x04, if state.is_virtual { 0x0004 } else { 0x0006 });
        self.u16(0x06, 0x0010);
        self.u32(0x08, function.class << 8 | u32::from(function.revision));
        let layout = u8::from(function.bus.is_some());
        self.put(0x0e, [layout | u8::from(state.multifunction) << 7]);
        if let Some(secondary) = function.bus {
            let primary = function.address.bus();
            self.put(0x18, [primary, secondary, state.subordinate]);
        } else {
            self.u16(0x2c, function.board.vendor);
            self.u16(0x2e, function.board.device);
        }
        if !state.is_virtual {
            let bars = if function.bus.is_some() { 2 } else { 6 };
            for region in state.regions.iter().filter(|region| region.index < bars) {
                self.bar(region);
            }
            self.put(0x3d, [1]);
        }
    }

    fn bar(&mut self, region: &Region) {
        let at = 0x10 + usize::from(region.index) * 4;
        let kind =
            u64::from(region.io) | u64::from(region.wide) << 2 | u64::from(region.prefetch) << 3;
        let [a, b, c, d, upper @ ..] = (region.start | kind).to_le_bytes();
        self.put(at, [a, b, c, d]);
        if region.wide {
            self.put(at + 4, upper);
        }
    }

    /// Appends a capability of `length` bytes to the conventional list; where it is.
    fn capability(&mut self, id: u8, length: usize) -> usize {
        let at = self.next;
        let pointer = u8::try_from(at).unwrap_or(0);
        self.put(self.link, [pointer]);
        self.put(at, [id]);
        (self.link, self.next) = (at + 1, at + length.next_multiple_of(4));
        at
    }

    fn capabilities(&mut self, function: &Function, state: &State<'_>) {
        if !state.is_virtual {
            let power = self.capability(0x01, 8);
            self.u16(power + 2, 0x0003);
            self.u16(power + 4, if state.asleep { 0x000b } else { 0x0008 });
        }
        if let Some(last) = state.vectors.checked_sub(1) {
            let msix = self.capability(0x11, 12);
            self.u16(msix + 2, last);
        }
        if let Some(express) = function.express {
            self.express(function, express, state);
        }
    }

    fn express(&mut self, function: &Function, express: Express, state: &State<'_>) {
        let at = self.capability(0x10, 0x3c);
        let port: u16 = match express {
            Express::Endpoint => 0x0,
            Express::RootPort => 0x4,
            Express::SwitchUp => 0x5,
            Express::SwitchDown => 0x6,
            Express::Integrated => 0x9,
        };
        let slot = u16::from(matches!(express, Express::RootPort | Express::SwitchDown)) << 8;
        self.u16(at + 0x02, slot | port << 4 | 2);
        let flr = function.reset.iter().any(|method| method == "flr");
        self.u32(at + 0x04, u32::from(flr) << 28);
        if let Some(link) = function.link {
            let fields = u16::from(link.lanes) << 4 | u16::from(link.generation);
            self.u32(at + 0x0c, u32::from(fields));
            // A VF has no link of its own: its current fields are 0.
            self.u16(at + 0x12, if state.is_virtual { 0 } else { fields });
        }
    }

    /// Appends a capability of `length` bytes to the extended list; where it is.
    fn extended_capability(&mut self, id: u16, version: u8, length: usize) -> usize {
        let at = self.next;
        let offset = u16::try_from(at).unwrap_or(0);
        if self.link != 0 {
            let [low, high] = (offset << 4).to_le_bytes();
            self.bytes[self.link + 2] |= low;
            self.bytes[self.link + 3] = high;
        }
        self.u16(at, id);
        self.put(at + 2, [version]);
        (self.link, self.next) = (at, at + length.next_multiple_of(4));
        at
    }

    fn extended(&mut self, function: &Function, state: &State<'_>) {
        self.extended_capability(0x01, 2, 0x48);
        if let Some(serial) = function.serial {
            let at = self.extended_capability(0x03, 1, 12);
            self.put(at + 4, serial.to_le_bytes());
        }
        if function.acs {
            let at = self.extended_capability(0x0d, 1, 8);
            self.u16(at + 4, 0x001d);
            self.u16(at + 6, 0x001d);
        }
        if let Some(sriov) = function.sriov.as_ref().filter(|_| !state.is_virtual) {
            self.extended_capability(0x0e, 1, 8);
            self.sriov(sriov, state.vfs);
        }
    }

    fn sriov(&mut self, sriov: &Sriov, vfs: u16) {
        let at = self.extended_capability(0x10, 1, 0x40);
        // VF enable and VF memory space.
        self.u16(at + 0x08, if vfs > 0 { 0x0009 } else { 0 });
        self.u16(at + 0x0c, sriov.total);
        self.u16(at + 0x0e, sriov.total);
        self.u16(at + 0x10, vfs);
        self.u16(at + 0x14, sriov.offset);
        self.u16(at + 0x16, sriov.stride);
        self.u16(at + 0x1a, sriov.device);
    }
}
