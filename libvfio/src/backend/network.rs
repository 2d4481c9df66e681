//! What a network card's physical function decides for each of its virtual ones. Talks to the
//! kernel's routing netlink (rtnetlink(7)) of this machine; described hosts have none of it.

mod link;

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use link::{LinkMessage, VfInfo};

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
        let answer = ask(LinkMessage::question(interface), 0)?;
        // Unknown (-1) where there is no link.
        let speed = number::<u64>(&net, "speed").filter(|speed| *speed > 0);
        let parts = answer.iter().flat_map(|link| link.of(function.index));
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
        let part = part(setting, value).ok_or_else(unsupported)?;
        ask(LinkMessage::change(interface, function.index, part), NLM_F_ACK).map(drop)
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
fn part(setting: Setting, value: &Value) -> Option<VfInfo> {
    Some(match (setting, value) {
        (Setting::Mac, Value::Text(mac)) => VfInfo::Mac(mac.parse::<Mac>().ok()?.0),
        (Setting::Vlan, Value::Number(vlan)) => VfInfo::Vlan(u32::try_from(*vlan).ok()?),
        (Setting::SpoofCheck, Value::Flag(on)) => VfInfo::SpoofCheck(*on),
        (Setting::Trust, Value::Flag(on)) => VfInfo::Trust(*on),
        (Setting::Link, Value::Text(link)) => {
            let state = LINKS.iter().position(|word| word == link)?;
            VfInfo::LinkState(u32::try_from(state).ok()?)
        }
        (Setting::MaxRate, Value::Number(rate)) => VfInfo::MaxRate(u32::try_from(*rate).ok()?),
        _ => return None,
    })
}

/// The setting that the kernel tells of in a part of its answer. `speed` is that of the link.
fn capability(part: VfInfo, speed: Option<u64>) -> Option<Capability> {
    let (setting, value, limits) = match part {
        VfInfo::Mac(mac) => (Setting::Mac, Value::Text(Mac(mac).to_string()), Limits::Any),
        VfInfo::Vlan(vlan) => {
            let limits = Limits::Range { least: 0, most: Some(4094) };
            (Setting::Vlan, Value::Number(vlan.into()), limits)
        }
        VfInfo::SpoofCheck(on) => (Setting::SpoofCheck, Value::Flag(on), Limits::Any),
        VfInfo::Trust(on) => (Setting::Trust, Value::Flag(on), Limits::Any),
        VfInfo::LinkState(state) => {
            let word = *LINKS.get(usize::try_from(state).ok()?)?;
            let limits = Limits::Choices(LINKS.map(Choice::plain).to_vec());
            (Setting::Link, Value::Text(word.to_owned()), limits)
        }
        VfInfo::MaxRate(rate) => {
            let limits = Limits::Range { least: 0, most: speed };
            (Setting::MaxRate, Value::Number(rate.into()), limits)
        }
    };
    Some(Capability { setting, value, limits })
}

/// One request and its answer, or its error.
fn ask(message: LinkMessage, flags: u16) -> io::Result<Option<LinkMessage>> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut packet = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    packet.finalize();
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let odd = |error| io::Error::new(io::ErrorKind::InvalidData, format!("{error}"));
    match NetlinkMessage::<LinkMessage>::deserialize(&answer).map_err(odd)?.payload {
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
            let told = capability(part(setting, &value).unwrap(), Some(1000)).unwrap();
            assert_eq!((told.setting, &told.value), (setting, &value));
            assert!(told.admits(&value));
        }
        assert_eq!(part(Setting::Vlan, &Value::Number(1 << 32)), None);
        assert_eq!(part(Setting::Msix, &Value::Number(1)), None);
    }

    #[test]
    fn no_rate_is_beyond_the_link() {
        let rate = VfInfo::MaxRate(0);
        let told = capability(rate, Some(1000)).unwrap();
        assert!(!told.admits(&Value::Number(1001)));
        assert!(capability(rate, None).unwrap().admits(&Value::Number(1001)));
    }
}
