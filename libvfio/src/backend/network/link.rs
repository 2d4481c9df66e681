//! The part of rtnetlink(7) that is about the virtual functions of a network interface, as bytes: what
//! is asked for, and what of an answer has a meaning here. The layouts are those of
//! `include/uapi/linux/if_link.h`. Talks to nobody, never panics.

use std::convert::Infallible;

use netlink_packet_core::{
    DefaultNla, Emitable, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable, NlasIterator,
};
use nix::libc::{RTM_GETLINK, RTM_NEWLINK, RTM_SETLINK};

/// Length of `struct ifinfomsg`, which goes before the attributes, and where in it the interface is.
const HEADER: usize = 16;
const INTERFACE: usize = 4;

/// Which of what there is to an interface is asked for (`IFLA_EXT_MASK`): its virtual functions
/// (`RTEXT_FILTER_VF`).
const EXT_MASK: u16 = 29;
const FILTER_VF: u32 = 1;

/// All virtual functions (`IFLA_VFINFO_LIST`), and in it one (`IFLA_VF_INFO`).
const VFINFO_LIST: u16 = 22;
const VF_INFO: u16 = 1;

/// What is said of one (`IFLA_VF_*`); each begins with the function's index.
const MAC: u16 = 1;
const VLAN: u16 = 2;
const SPOOFCHK: u16 = 4;
const LINK_STATE: u16 = 5;
const RATE: u16 = 6;
const TRUST: u16 = 9;

/// `MAX_ADDR_LEN` without what an Ethernet address takes of it.
const REST_OF_MAC: [u8; 26] = [0; 26];

/// A message about one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LinkMessage {
    kind: u16,
    body: Vec<u8>,
}

/// One thing of a virtual function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum VfInfo {
    /// The address it has.
    Mac([u8; 6]),
    /// The VLAN it is in, 0 for none.
    Vlan(u32),
    /// Whether it may send from its own address only.
    SpoofCheck(bool),
    /// Whether it is shown its link: as it is (0), always up (1) or always down (2).
    LinkState(u32),
    /// The most it may send, in Mbit/s, 0 for no limit.
    MaxRate(u32),
    /// Whether it may do what changes the network for others.
    Trust(bool),
}

impl LinkMessage {
    /// Asks for an interface with all its virtual functions.
    pub(super) fn question(interface: u32) -> Self {
        let mask = attribute(EXT_MASK, FILTER_VF.to_ne_bytes().into());
        Self::about(interface, RTM_GETLINK, &mask)
    }

    /// Wants one thing of the virtual function with that index to become so.
    pub(super) fn change(interface: u32, index: u32, info: VfInfo) -> Self {
        let function = attribute(VF_INFO, info.bytes(index));
        Self::about(interface, RTM_SETLINK, &attribute(VFINFO_LIST, function))
    }

    fn about(interface: u32, kind: u16, attributes: &[u8]) -> Self {
        let mut body = vec![0; HEADER];
        body[INTERFACE..][..4].copy_from_slice(&interface.to_ne_bytes());
        body.extend_from_slice(attributes);
        Self { kind, body }
    }

    /// What an answer says of the virtual function with that index.
    pub(super) fn of(&self, index: u32) -> Vec<VfInfo> {
        if self.kind != RTM_NEWLINK {
            return Vec::new();
        }
        let lists = attributes(self.body.get(HEADER..).unwrap_or_default());
        let lists = lists.filter(|(kind, _)| *kind == VFINFO_LIST);
        let functions = lists.flat_map(|(_, list)| attributes(list));
        let parts = functions.flat_map(|(_, function)| attributes(function));
        let infos = parts.filter_map(|(kind, value)| VfInfo::read(kind, value));
        infos.filter(|(of, _)| *of == index).map(|(_, info)| info).collect()
    }
}

impl VfInfo {
    fn bytes(self, index: u32) -> Vec<u8> {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let (kind, value): (_, Vec<u8>) = match self {
            Self::Mac(mac) => (MAC, [&mac[..], &REST_OF_MAC].concat()),
            // The last is the priority.
            Self::Vlan(vlan) => (VLAN, words(&[vlan, 0])),
            Self::SpoofCheck(on) => (SPOOFCHK, words(&[on.into()])),
            Self::LinkState(state) => (LINK_STATE, words(&[state])),
            // The first is the least.
            Self::MaxRate(rate) => (RATE, words(&[0, rate])),
            Self::Trust(on) => (TRUST, words(&[on.into()])),
        };
        attribute(kind, [&index.to_ne_bytes()[..], &value].concat())
    }

    /// With the index of the function that it is of.
    fn read(kind: u16, value: &[u8]) -> Option<(u32, Self)> {
        let word = |n: usize| Some(u32::from_ne_bytes(*value.get(4 * n..)?.first_chunk()?));
        // A driver that does not say has the kernel say -1 (`rtnl_fill_vfinfo`, `net/core/rtnetlink.c`).
        let flag = |n| Some(!matches!(word(n)?, 0 | u32::MAX));
        let info = match kind {
            MAC => Self::Mac(*value.get(4..)?.first_chunk()?),
            VLAN => Self::Vlan(word(1)?),
            SPOOFCHK => Self::SpoofCheck(flag(1)?),
            LINK_STATE => Self::LinkState(word(1)?),
            RATE => Self::MaxRate(word(2)?),
            TRUST => Self::Trust(flag(1)?),
            _ => return None,
        };
        Some((word(0)?, info))
    }
}

impl NetlinkSerializable for LinkMessage {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.body.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.body);
    }
}

impl NetlinkDeserializable for LinkMessage {
    type Error = Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Self::Error> {
        Ok(Self { kind: header.message_type, body: payload.into() })
    }
}

fn attribute(kind: u16, value: Vec<u8>) -> Vec<u8> {
    let attribute = DefaultNla::new(kind, value);
    let mut bytes = vec![0; attribute.buffer_len()];
    attribute.emit(&mut bytes);
    bytes
}

/// Kind and value of each, up to one that makes no sense.
fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let all = NlasIterator::new(bytes).map_while(Result::ok);
    all.map(|attribute| {
        let length = attribute.value_length();
        (attribute.kind(), attribute.into_inner().get(4..4 + length).unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer of an interface with two virtual functions.
    fn answer() -> LinkMessage {
        let function = |index, mac, vlan| {
            let parts = [VfInfo::Mac(mac), VfInfo::Vlan(vlan), VfInfo::MaxRate(100)];
            let of = |part: VfInfo| part.bytes(index);
            attribute(VF_INFO, parts.map(of).concat())
        };
        let list = [function(0, [2, 0, 0, 0, 0, 1], 0), function(1, [2, 0, 0, 0, 0, 2], 7)];
        // Its name first, which is of no interest.
        let attributes = [attribute(3, b"eth0\0".into()), attribute(VFINFO_LIST, list.concat())];
        LinkMessage::about(2, RTM_NEWLINK, &attributes.concat())
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn the_bytes_are_those_of_the_kernels_header_files() {
        let header = [0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let question = LinkMessage::question(2);
        assert_eq!(question.kind, RTM_GETLINK);
        assert_eq!(question.body, [&header[..], &[8, 0, 29, 0, 1, 0, 0, 0]].concat());
        let change = LinkMessage::change(2, 3, VfInfo::Vlan(7));
        assert_eq!(change.kind, RTM_SETLINK);
        let vlan = [16, 0, 2, 0, 3, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0];
        let around = [24, 0, 22, 0, 20, 0, 1, 0];
        assert_eq!(change.body, [&header[..], &around, &vlan].concat());
        let mac = VfInfo::Mac([2, 0, 0, 0, 0, 1]).bytes(3);
        assert_eq!(mac[..14], [40, 0, 1, 0, 3, 0, 0, 0, 2, 0, 0, 0, 0, 1]);
        assert_eq!(mac[14..], REST_OF_MAC);
    }

    #[test]
    fn each_function_has_its_own() {
        let of_second = [VfInfo::Mac([2, 0, 0, 0, 0, 2]), VfInfo::Vlan(7), VfInfo::MaxRate(100)];
        assert_eq!(answer().of(1), of_second);
        assert_eq!(answer().of(0)[1], VfInfo::Vlan(0));
        assert_eq!(answer().of(2), []);
        let other = LinkMessage { kind: RTM_GETLINK, ..answer() };
        assert_eq!(other.of(1), []);
    }

    #[test]
    fn what_a_driver_does_not_say_is_off() {
        let unsaid = [0u32.to_ne_bytes(), u32::MAX.to_ne_bytes()].concat();
        assert_eq!(VfInfo::read(TRUST, &unsaid), Some((0, VfInfo::Trust(false))));
    }

    #[test]
    fn cut_anywhere_an_answer_says_less_and_nothing_else() {
        let whole = answer();
        for end in 0..whole.body.len() {
            let cut = LinkMessage { body: whole.body[..end].into(), ..whole.clone() };
            assert!(whole.of(1).starts_with(&cut.of(1)), "{end}");
        }
    }
}
