//! What a network card's physical function decides for each of its virtual functions: address,
//! VLAN, spoof check, trust, link, rate. Reads and, for [`crate::step`] alone, writes through the
//! kernel's routing netlink (rtnetlink(7)) of this machine; described hosts have none of it.

use std::fmt;
use std::io;
use std::str::FromStr;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    LinkAttribute, LinkExtentMask, LinkMessage, LinkVfInfo, VfInfo, VfInfoLinkState, VfInfoMac,
    VfInfoRate, VfInfoSpoofCheck, VfInfoTrust, VfInfoVlan, VfLinkState,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use serde::{Deserialize, Serialize};

use crate::address::PciAddress;
use crate::host::HostRoot;

/// Settings of a virtual function; `None` where nothing is said of one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Shape {
    /// Hardware address. All zeros lets the guest choose.
    pub mac: Option<Mac>,
    /// VLAN that its packets are put in, 1 to 4094; 0 for none.
    pub vlan: Option<u16>,
    /// Whether packets from other addresses are dropped.
    pub spoof_check: Option<bool>,
    /// Whether the guest may do what only trusted ones may, such as promiscuous mode.
    pub trust: Option<bool>,
    /// Its link.
    pub link: Option<Link>,
    /// The most it may send, in Mbit/s; 0 for no limit.
    pub max_rate: Option<u32>,
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Mac([u8; 6]);

/// What the link of a virtual function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// As the card's own.
    Auto,
    /// Up, so that virtual functions reach each other without a cable.
    Up,
    /// Down.
    Down,
}

/// Why a text is no setting.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{input}' is no {what}")]
pub struct InvalidSetting {
    /// What was given.
    pub input: String,
    /// What it should be, with an example.
    pub what: &'static str,
}

fn invalid(input: &str, what: &'static str) -> InvalidSetting {
    InvalidSetting { input: input.chars().take(64).collect(), what }
}

impl FromStr for Mac {
    type Err = InvalidSetting;

    fn from_str(text: &str) -> Result<Self, InvalidSetting> {
        let what = "address of one network interface; write it as 52:54:00:12:34:56";
        let byte = |part: &str| {
            let plain = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            plain.then(|| u8::from_str_radix(part, 16).ok())?
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let bytes = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
        // The lowest bit of the first byte marks addresses of groups.
        bytes.filter(|bytes| bytes[0] & 1 == 0).map(Self).ok_or_else(|| invalid(text, what))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.map(|byte| format!("{byte:02x}")).join(":"))
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for Mac {
    type Error = InvalidSetting;

    fn try_from(text: String) -> Result<Self, InvalidSetting> {
        text.parse()
    }
}

impl Link {
    /// The words for all of them.
    pub const NAMES: [&str; 3] = ["auto", "up", "down"];

    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

impl FromStr for Link {
    type Err = InvalidSetting;

    fn from_str(text: &str) -> Result<Self, InvalidSetting> {
        match text {
            "auto" => Ok(Self::Auto),
            "up" => Ok(Self::Up),
            "down" => Ok(Self::Down),
            _ => Err(invalid(text, "link; it is auto, up or down")),
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = |on: bool| if on { "on" } else { "off" };
        let said = [
            self.mac.map(|mac| format!("address {mac}")),
            self.vlan.map(|vlan| format!("VLAN {vlan}")),
            self.spoof_check.map(|check| format!("spoof check {}", on(check))),
            self.trust.map(|trust| format!("trust {}", on(trust))),
            self.link.map(|link| format!("link {}", link.name())),
            self.max_rate.map(|rate| format!("rate {rate} Mbit/s")),
        ];
        f.write_str(&said.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

impl Shape {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The settings it says something of, one by one.
    pub fn each(&self) -> Vec<Self> {
        let none = Self::default;
        let all = [
            Self { mac: self.mac, ..none() },
            Self { vlan: self.vlan, ..none() },
            Self { spoof_check: self.spoof_check, ..none() },
            Self { trust: self.trust, ..none() },
            Self { link: self.link, ..none() },
            Self { max_rate: self.max_rate, ..none() },
        ];
        all.into_iter().filter(|one| !one.is_empty()).collect()
    }

    /// Of these settings, those that `wanted` says something else of, as they are here and there.
    pub fn towards(&self, wanted: &Self) -> (Self, Self) {
        fn differs<T: PartialEq + Copy>(now: Option<T>, wanted: Option<T>) -> bool {
            wanted.is_some() && now != wanted
        }
        let differing = Self {
            mac: wanted.mac.filter(|_| differs(self.mac, wanted.mac)),
            vlan: wanted.vlan.filter(|_| differs(self.vlan, wanted.vlan)),
            spoof_check: wanted
                .spoof_check
                .filter(|_| differs(self.spoof_check, wanted.spoof_check)),
            trust: wanted.trust.filter(|_| differs(self.trust, wanted.trust)),
            link: wanted.link.filter(|_| differs(self.link, wanted.link)),
            max_rate: wanted.max_rate.filter(|_| differs(self.max_rate, wanted.max_rate)),
        };
        (self.only(&differing), differing)
    }

    /// These settings, as far as `other` says something of them.
    #[must_use]
    pub fn only(&self, other: &Self) -> Self {
        Self {
            mac: self.mac.filter(|_| other.mac.is_some()),
            vlan: self.vlan.filter(|_| other.vlan.is_some()),
            spoof_check: self.spoof_check.filter(|_| other.spoof_check.is_some()),
            trust: self.trust.filter(|_| other.trust.is_some()),
            link: self.link.filter(|_| other.link.is_some()),
            max_rate: self.max_rate.filter(|_| other.max_rate.is_some()),
        }
    }
}

/// The settings of a virtual function; `None` if it is none of a network card, or its physical
/// function is on no driver that has an interface.
pub fn read(host: &HostRoot, device: PciAddress) -> io::Result<Option<Shape>> {
    let Some(place) = Place::of(host, device) else { return Ok(None) };
    let mut link = LinkMessage::default();
    link.header.index = place.interface;
    link.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::Vf]));
    let answer = ask(RouteNetlinkMessage::GetLink(link), 0)?;
    let Some(RouteNetlinkMessage::NewLink(link)) = answer else { return Ok(None) };
    let all = link.attributes.into_iter().filter_map(|attribute| match attribute {
        LinkAttribute::VfInfoList(all) => Some(all),
        _ => None,
    });
    let own = all.flatten().find(|info| info.0.iter().any(|part| is_of(part, place.index)));
    Ok(own.map(|info| shape_of(&info)))
}

/// Writes what `change` says. For [`crate::step`] alone.
pub(crate) fn write(host: &HostRoot, device: PciAddress, change: &Shape) -> io::Result<()> {
    let none = || io::Error::from_raw_os_error(nix::libc::EOPNOTSUPP);
    let Place { interface, index } = Place::of(host, device).ok_or_else(none)?;
    let state = |link| match link {
        Link::Auto => VfLinkState::Auto,
        Link::Up => VfLinkState::Enable,
        Link::Down => VfLinkState::Disable,
    };
    let parts = [
        change.mac.map(|mac| VfInfo::Mac(VfInfoMac::new(index, &mac.0))),
        change.vlan.map(|vlan| VfInfo::Vlan(VfInfoVlan::new(index, vlan.into(), 0))),
        change.spoof_check.map(|on| VfInfo::SpoofCheck(VfInfoSpoofCheck::new(index, on))),
        change.trust.map(|on| VfInfo::Trust(VfInfoTrust::new(index, on))),
        change.link.map(|link| VfInfo::LinkState(VfInfoLinkState::new(index, state(link)))),
        change.max_rate.map(|rate| VfInfo::Rate(VfInfoRate::new(index, 0, rate))),
    ];
    // One at a time, since a driver may do one and not the next.
    for part in parts.into_iter().flatten() {
        let mut link = LinkMessage::default();
        link.header.index = interface;
        link.attributes.push(LinkAttribute::VfInfoList(vec![LinkVfInfo(vec![part])]));
        ask(RouteNetlinkMessage::SetLink(link), NLM_F_ACK)?;
    }
    Ok(())
}

/// Where the kernel is told of a virtual function.
struct Place {
    /// Index of the physical function's interface.
    interface: u32,
    /// Index among the virtual functions.
    index: u32,
}

impl Place {
    fn of(host: &HostRoot, device: PciAddress) -> Option<Self> {
        if !host.is_real() {
            return None;
        }
        let physical: PciAddress = host.function(device).link_name("physfn")?.parse().ok()?;
        let dir = host.function(physical);
        let own = |name: &String| dir.link_name(name).and_then(|n| n.parse().ok()) == Some(device);
        let names = dir.list().ok()?;
        let link = names.iter().filter(|name| name.starts_with("virtfn")).find(|name| own(name))?;
        let interface = dir.sub("net").list().ok()?.into_iter().next()?;
        let interface = dir.sub("net").sub(&interface).attr("ifindex").ok()??;
        Some(Self {
            interface: interface.parse().ok()?,
            index: link.strip_prefix("virtfn")?.parse().ok()?,
        })
    }
}

/// One request and its answer, or its error.
fn ask(message: RouteNetlinkMessage, flags: u16) -> io::Result<Option<RouteNetlinkMessage>> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
    packet.finalize();
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let odd = |error| io::Error::new(io::ErrorKind::InvalidData, format!("{error}"));
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(odd)?.payload {
        NetlinkPayload::InnerMessage(message) => Ok(Some(message)),
        NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
        _ => Ok(None),
    }
}

fn is_of(part: &VfInfo, index: u32) -> bool {
    matches!(part, VfInfo::Mac(mac) if mac.vf_id == index)
}

fn shape_of(info: &LinkVfInfo) -> Shape {
    let mut shape = Shape::default();
    for part in &info.0 {
        match part {
            VfInfo::Mac(mac) => shape.mac = mac.mac.first_chunk().copied().map(Mac),
            VfInfo::Vlan(vlan) => shape.vlan = u16::try_from(vlan.vlan_id).ok(),
            VfInfo::SpoofCheck(check) => shape.spoof_check = Some(check.enabled),
            VfInfo::Trust(trust) => shape.trust = Some(trust.enabled),
            VfInfo::LinkState(link) => {
                shape.link = match link.state {
                    VfLinkState::Auto => Some(Link::Auto),
                    VfLinkState::Enable => Some(Link::Up),
                    VfLinkState::Disable => Some(Link::Down),
                    _ => None,
                };
            }
            VfInfo::Rate(rate) => shape.max_rate = Some(rate.max_tx_rate),
            _ => {}
        }
    }
    shape
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_of_one_interface_and_written_out() {
        let mac: Mac = "52:54:00:AB:cd:01".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:01");
        for bad in ["", "52:54:00:ab:cd", "52:54:00:ab:cd:1", "01:00:5e:00:00:01", "5254.00ab.cd01"]
        {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_what_differs_is_changed_and_changed_back() {
        let vlan = |vlan| Shape { vlan: Some(vlan), trust: Some(false), ..Shape::default() };
        let wanted = Shape { vlan: Some(7), trust: Some(false), ..Shape::default() };
        let (from, to) = vlan(0).towards(&wanted);
        assert_eq!(from, Shape { vlan: Some(0), ..Shape::default() });
        assert_eq!(to, Shape { vlan: Some(7), ..Shape::default() });
        assert!(vlan(7).towards(&wanted).1.is_empty());
        assert_eq!(to.to_string(), "VLAN 7");
    }
}
