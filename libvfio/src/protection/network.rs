//! Network interfaces in use behind functions, also below bridges, bonds and VLANs. Reads sysfs and
//! the namespace of networks its own process is in.

use std::collections::BTreeSet;

use super::{Found, Use, Weight, some};
use crate::address::PciAddress;
use crate::error::Error;
use crate::host::HostRoot;
use crate::members;

pub(super) fn uses(host: &HostRoot, functions: &BTreeSet<PciAddress>) -> Result<Vec<Use>, Error> {
    let interfaces = members::within(host, "class/net", functions)?;
    if interfaces.is_empty() {
        return Ok(Vec::new());
    }
    let network = Network::read(host)?;
    let mut uses = Vec::new();
    for (interface, function) in interfaces {
        let stack = stack(host, &interface)?;
        uses.extend(network.use_of(&stack).map(|found| found.of(function)));
    }
    Ok(uses)
}

/// An interface and all that are on top of it, itself first: `upper_*` links
/// (`netdev_adjacent_sysfs_add`, `net/core/dev.c`) and `master`.
fn stack(host: &HostRoot, interface: &str) -> Result<Vec<String>, Error> {
    let mut stack = vec![interface.to_owned()];
    let mut next = 0;
    while let Some(name) = stack.get(next) {
        let dir = host.sys("class/net").sub(name);
        let entries = dir.list()?;
        let upper =
            entries.iter().filter_map(|entry| Some(entry.strip_prefix("upper_")?.to_owned()));
        let upper: Vec<String> = upper.chain(dir.link_name("master")).collect();
        for name in upper {
            if !stack.contains(&name) {
                stack.push(name);
            }
        }
        next += 1;
    }
    Ok(stack)
}

/// What the kernel sends where.
struct Network {
    /// Interfaces that carry a default route.
    default: BTreeSet<String>,
    /// Interface, and an address it has or a network it leads to.
    addressed: Vec<(String, String)>,
}

impl Network {
    fn read(host: &HostRoot) -> Result<Self, Error> {
        let text = |file| Ok::<_, Error>(host.proc(file)?.unwrap_or_default());
        Ok(Self::parse(&text("net/route")?, &text("net/ipv6_route")?, &text("net/if_inet6")?))
    }

    /// `/proc/net/route` has interface, destination and mask in columns 1, 2 and 8
    /// (`fib_route_seq_show`, `net/ipv4/fib_trie.c`); `/proc/net/ipv6_route` destination, its prefix
    /// length, flags and interface in columns 1, 2, 9 and 10 (`rt6_info_route`, `net/ipv6/route.c`);
    /// `/proc/net/if_inet6` address, prefix length, scope and interface in columns 1, 3, 4 and 6
    /// (`if6_seq_show`, `net/ipv6/addrconf.c`).
    fn parse(routes: &str, routes6: &str, addresses6: &str) -> Self {
        /// A route that refuses (`RTF_REJECT`, `include/uapi/linux/route.h`).
        const REJECT: u32 = 0x200;
        let mut network = Self { default: BTreeSet::new(), addressed: Vec::new() };
        for line in routes.lines() {
            let Some((name, to, mask)) = route(line) else { continue };
            if to == 0 && mask == 0 {
                network.default.insert(name);
            } else {
                let octets = to.to_ne_bytes().map(|octet| octet.to_string()).join(".");
                network.addressed.push((name, format!("{octets}/{}", mask.count_ones())));
            }
        }
        for line in routes6.lines() {
            let columns: Vec<&str> = line.split_whitespace().collect();
            let [to, length, .., flags, name] = columns.as_slice() else { continue };
            let refuses = u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & REJECT != 0);
            if columns.len() == 10 && *length == "00" && to.bytes().all(|b| b == b'0') && !refuses {
                network.default.insert((*name).to_owned());
            }
        }
        network.addressed.extend(addresses6.lines().filter_map(address6));
        network
    }

    /// The weightiest use of an interface, given those on top of it. One that is merely up is not
    /// in use: virtual machines' interfaces are.
    fn use_of(&self, stack: &[String]) -> Option<Found> {
        let (own, upper) = stack.split_first()?;
        let below = |name: &String| {
            if name == own { format!("is {own}") } else { format!("is {own}, a part of {name}") }
        };
        if let Some(name) = stack.iter().find(|name| self.default.contains(*name)) {
            return Some(Found::new(
                format!("{}, which carries the default route", below(name)),
                "move the default route to another interface first".into(),
                Weight::Protected,
            ));
        }
        let addressed = self.addressed.iter().find(|(name, _)| stack.contains(name));
        if let Some((name, _)) = addressed {
            let theirs = self.addressed.iter().filter(|(other, _)| other == name);
            let what: Vec<String> = theirs.map(|(_, what)| what.clone()).collect();
            return Some(Found::new(
                format!("{}, which has addresses or routes ({})", below(name), some(&what)),
                format!("take it out of use first ('ip address flush dev {name}')"),
                Weight::InUse,
            ));
        }
        upper.first().map(|name| {
            Found::new(
                format!("{}, a bridge, bond or the like", below(name)),
                format!(
                    "take it out first ('ip link set {own} nomaster'), or remove {name} if it is \
                     on {own} alone"
                ),
                Weight::InUse,
            )
        })
    }
}

/// Interface, destination and mask of a line, as in memory.
fn route(line: &str) -> Option<(String, u32, u32)> {
    let mut columns = line.split_whitespace();
    let name = columns.next()?.to_owned();
    let to = u32::from_str_radix(columns.next()?, 16).ok()?;
    Some((name, to, u32::from_str_radix(columns.nth(5)?, 16).ok()?))
}

/// Every interface that is up has an address for its link.
fn address6(line: &str) -> Option<(String, String)> {
    /// `IFA_LINK`, `net/ipv6/addrconf.c`.
    const LINK: &str = "20";
    let columns: Vec<&str> = line.split_whitespace().collect();
    let [address, _, length, scope, _, name] = columns.as_slice() else { return None };
    let address = std::net::Ipv6Addr::from(u128::from_str_radix(address, 16).ok()?);
    let length = u8::from_str_radix(length, 16).ok()?;
    (*scope != LINK).then(|| ((*name).to_owned(), format!("{address}/{length}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: &str = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n\
                      eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                      eth1\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
                      garbage\neth9\tzz\n";

    fn found(network: &Network, stack: &[&str]) -> Option<(Weight, String)> {
        let stack: Vec<String> = stack.iter().map(|name| (*name).to_owned()).collect();
        network.use_of(&stack).map(|found| (found.weight, found.what))
    }

    #[test]
    fn default_routes_are_found_in_both_families_and_above() {
        let zero = "0".repeat(32);
        let v6 = format!(
            "{zero} 00 {zero} 00 {zero} 00000400 1 0 00000003     eth2\n\
             {zero} 00 {zero} 00 {zero} ffffffff 1 0 00200200       lo\n"
        );
        let network = Network::parse(V4, &v6, "");
        let protected = |stack: &[&str]| {
            found(&network, stack).is_some_and(|(weight, _)| weight == Weight::Protected)
        };
        assert!(protected(&["eth0"]) && protected(&["eth2"]));
        assert!(protected(&["eth5", "bond0", "eth0"]));
        assert!(!protected(&["eth1"]) && !protected(&["lo"]));
    }

    #[test]
    fn addresses_and_masters_are_uses_and_being_up_is_none() {
        let v6 = "fe800000000000005054 02 40 20 80 eth3\n\
                  20010db8000000000000000000000001 04 40 00 80     eth4\n";
        let network = Network::parse(V4, "", v6);
        let (weight, what) = found(&network, &["eth1"]).unwrap();
        assert_eq!(weight, Weight::InUse);
        assert!(what.contains("192.168.1.0/24"), "{what}");
        assert!(found(&network, &["eth4"]).unwrap().1.contains("2001:db8::1/64"));
        assert_eq!(found(&network, &["eth3"]), None);
        let (weight, what) = found(&network, &["eth3", "br0"]).unwrap();
        assert_eq!(weight, Weight::InUse);
        assert!(what.contains("part of br0"), "{what}");
    }
}
