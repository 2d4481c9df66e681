//! What a network card's physical function decides for each of its virtual ones. Talks to the
//! kernel's routing netlink (rtnetlink(7)) of this machine; described hosts have none of it.

use std::io;

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

use super::{VfBackend, Virtual, number, unsupported};
use crate::host::{HostRoot, SysDir};
use crate::shape::{Capability, Choice, LINKS, Limits, Mac, Setting, Value};

/// The interface of the physical function.
pub(super) struct Network;

impl VfBackend for Network {
    fn name(&self) -> &'static str {
        "network"
    }

    fn offers(&self, host: &HostRoot, function: &Virtual) -> io::Result<Vec<Capability>> {
        let Some((interface, net)) = interface(host, function) else { return Ok(Vec::new()) };
        let mut link = LinkMessage::default();
        link.header.index = interface;
        link.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::Vf]));
        let answer = ask(RouteNetlinkMessage::GetLink(link), 0)?;
        let Some(RouteNetlinkMessage::NewLink(link)) = answer else { return Ok(Vec::new()) };
        let all = link.attributes.into_iter().filter_map(|attribute| match attribute {
            LinkAttribute::VfInfoList(all) => Some(all),
            _ => None,
        });
        let own = |info: &LinkVfInfo| info.0.iter().any(|part| is_of(part, function.index));
        let own = all.flatten().find(own);
        let parts = own.iter().flat_map(|info| &info.0);
        // Unknown (-1) where there is no link.
        let speed = number::<u64>(&net, "speed").filter(|speed| *speed > 0);
        Ok(parts.filter_map(|part| capability(part, speed)).collect())
    }

    fn write(
        &self,
        host: &HostRoot,
        function: &Virtual,
        setting: Setting,
        value: &Value,
    ) -> io::Result<()> {
        let (interface, _) = interface(host, function).ok_or_else(unsupported)?;
        let part = part(function.index, setting, value).ok_or_else(unsupported)?;
        let mut link = LinkMessage::default();
        link.header.index = interface;
        link.attributes.push(LinkAttribute::VfInfoList(vec![LinkVfInfo(vec![part])]));
        ask(RouteNetlinkMessage::SetLink(link), NLM_F_ACK).map(drop)
    }
}

/// Index and directory of the physical function's interface.
fn interface(host: &HostRoot, function: &Virtual) -> Option<(u32, SysDir)> {
    if !host.is_real() {
        return None;
    }
    let net = host.function(function.physical).sub("net");
    let net = net.sub(net.list().ok()?.first()?);
    Some((number(&net, "ifindex")?, net))
}

/// What the kernel is told so that a setting becomes that.
fn part(index: u32, setting: Setting, value: &Value) -> Option<VfInfo> {
    Some(match (setting, value) {
        (Setting::Mac, Value::Text(mac)) => {
            VfInfo::Mac(VfInfoMac::new(index, &mac.parse::<Mac>().ok()?.0))
        }
        (Setting::Vlan, Value::Number(vlan)) => {
            VfInfo::Vlan(VfInfoVlan::new(index, u32::try_from(*vlan).ok()?, 0))
        }
        (Setting::SpoofCheck, Value::Flag(on)) => {
            VfInfo::SpoofCheck(VfInfoSpoofCheck::new(index, *on))
        }
        (Setting::Trust, Value::Flag(on)) => VfInfo::Trust(VfInfoTrust::new(index, *on)),
        (Setting::Link, Value::Text(link)) => {
            let state = match link.as_str() {
                "auto" => VfLinkState::Auto,
                "up" => VfLinkState::Enable,
                "down" => VfLinkState::Disable,
                _ => return None,
            };
            VfInfo::LinkState(VfInfoLinkState::new(index, state))
        }
        (Setting::MaxRate, Value::Number(rate)) => {
            VfInfo::Rate(VfInfoRate::new(index, 0, u32::try_from(*rate).ok()?))
        }
        _ => return None,
    })
}

/// The setting that the kernel tells of in a part of its answer. `speed` is that of the link.
fn capability(part: &VfInfo, speed: Option<u64>) -> Option<Capability> {
    let (setting, value, limits) = match part {
        VfInfo::Mac(mac) => {
            let mac = Mac(*mac.mac.first_chunk()?);
            (Setting::Mac, Value::Text(mac.to_string()), Limits::Any)
        }
        VfInfo::Vlan(vlan) => {
            let limits = Limits::Range { least: 0, most: Some(4094) };
            (Setting::Vlan, Value::Number(vlan.vlan_id.into()), limits)
        }
        VfInfo::SpoofCheck(check) => (Setting::SpoofCheck, Value::Flag(check.enabled), Limits::Any),
        VfInfo::Trust(trust) => (Setting::Trust, Value::Flag(trust.enabled), Limits::Any),
        VfInfo::LinkState(link) => {
            let word = match link.state {
                VfLinkState::Auto => "auto",
                VfLinkState::Enable => "up",
                VfLinkState::Disable => "down",
                _ => return None,
            };
            let limits = Limits::Choices(LINKS.map(Choice::plain).to_vec());
            (Setting::Link, Value::Text(word.to_owned()), limits)
        }
        VfInfo::Rate(rate) => {
            let limits = Limits::Range { least: 0, most: speed };
            (Setting::MaxRate, Value::Number(rate.max_tx_rate.into()), limits)
        }
        _ => return None,
    };
    Some(Capability { setting, value, limits })
}

fn is_of(part: &VfInfo, index: u32) -> bool {
    matches!(part, VfInfo::Mac(mac) if mac.vf_id == index)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_what_was_asked_for() {
        let text = |text: &str| Value::Text(text.to_owned());
        for (setting, value) in [
            (Setting::Mac, text("52:54:00:12:34:56")),
            (Setting::Vlan, Value::Number(7)),
            (Setting::SpoofCheck, Value::Flag(true)),
            (Setting::Trust, Value::Flag(false)),
            (Setting::Link, text("down")),
            (Setting::MaxRate, Value::Number(100)),
        ] {
            let told = capability(&part(3, setting, &value).unwrap(), Some(1000)).unwrap();
            assert_eq!((told.setting, &told.value), (setting, &value));
            assert!(told.admits(&value));
        }
        assert_eq!(part(3, Setting::Vlan, &Value::Number(1 << 32)), None);
        assert_eq!(part(3, Setting::Msix, &Value::Number(1)), None);
    }

    #[test]
    fn no_rate_is_beyond_the_link() {
        let rate = VfInfo::Rate(VfInfoRate::new(0, 0, 0));
        let told = capability(&rate, Some(1000)).unwrap();
        assert!(!told.admits(&Value::Number(1001)));
        assert!(capability(&rate, None).unwrap().admits(&Value::Number(1001)));
    }
}
