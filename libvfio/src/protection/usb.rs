//! Devices behind USB controllers: all go along; a keyboard the console listens to is in use. Their
//! disks and interfaces are found as such. Reads sysfs and procfs through [`crate::host`].

use std::collections::BTreeSet;
use std::path::Path;

use super::{Found, Use, Weight};
use crate::address::PciAddress;
use crate::error::Error;
use crate::host::HostRoot;
use crate::members;

pub(super) fn uses(host: &HostRoot, functions: &BTreeSet<PciAddress>) -> Result<Vec<Use>, Error> {
    let mut devices = members::within(host, "bus/usb/devices", functions)?;
    // Interfaces have a colon in their names, root hubs are called by their bus: `usb1`.
    devices.retain(|(name, _)| !name.contains(':') && !name.starts_with("usb"));
    if devices.is_empty() {
        return Ok(Vec::new());
    }
    let keyboards = keyboards(&host.proc("bus/input/devices")?.unwrap_or_default());
    let dir = host.sys("bus/usb/devices");
    let mut uses = Vec::new();
    for (name, function) in devices {
        let product = dir.sub(&name).attr("product")?.unwrap_or_else(|| "a device".into());
        let here = |place: &&String| Path::new(place).iter().any(|part| part == name.as_str());
        // Not those below a hub: they are devices of their own.
        let deepest = |place: &&String| !below_another(place, &name);
        let found = if keyboards.iter().filter(here).any(|place| deepest(&place)) {
            Found::new(
                format!("has {product} ({name}) behind it, a keyboard of the console"),
                format!(
                    "plug it in elsewhere, or detach it ('echo 0 > /sys/bus/usb/devices/{name}/\
                     authorized')"
                ),
                Weight::InUse,
            )
        } else {
            Found::new(
                format!("takes along {product} ({name}), which is plugged in behind it"),
                "plug it in elsewhere if the host is to keep it".into(),
                Weight::Notice,
            )
        };
        uses.push(found.of(function));
    }
    Ok(uses)
}

/// Whether the device a path leads to is plugged in below the one of that name: USB names a device
/// after the hub it is on, with a dot and the port (`usb_alloc_dev`, `drivers/usb/core/usb.c`).
fn below_another(place: &str, name: &str) -> bool {
    let mut below = Path::new(place).iter().skip_while(|part| *part != name).skip(1);
    below.any(|part| {
        let part = part.to_str().unwrap_or_default();
        !part.contains(':')
            && part.strip_prefix(name).is_some_and(|rest| rest.starts_with(['.', '-']))
    })
}

/// Where in sysfs the keyboards are that virtual terminals listen to, as `/proc/bus/input/devices`
/// tells (`input_devices_seq_show`, `drivers/input/input.c`): `kbd` handles also power buttons and
/// the like, so what has none of the first keys is none (`udev-builtin-input_id.c` of systemd).
fn keyboards(devices: &str) -> Vec<String> {
    /// Keys 1 (escape) to 31 (S), of the least word.
    const FIRST: u64 = 0xffff_fffe;
    let keyboard = |block: &str| {
        let field = |key: &str| block.lines().find_map(|line| line.strip_prefix(key));
        let handled = field("H: Handlers=")?.split_whitespace().any(|handler| handler == "kbd");
        let word = field("B: KEY=")?.split_whitespace().last()?;
        let keys = u64::from_str_radix(word, 16).ok()?;
        (handled && keys & FIRST == FIRST).then(|| field("S: Sysfs=").map(str::to_owned))?
    };
    devices.split("\n\n").filter_map(keyboard).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyboards_are_told_from_buttons() {
        let devices = "I: Bus=0019\nN: Name=\"Power Button\"\nS: Sysfs=/devices/LNXSYSTM:00/input/input0\n\
            H: Handlers=kbd event0 \nB: EV=3\nB: KEY=10000000000000 0\n\n\
            I: Bus=0003\nN: Name=\"Keys\"\nS: Sysfs=/devices/pci0000:00/0000:00:14.0/usb1/1-2/1-2:1.0/input/input3\n\
            H: Handlers=sysrq kbd leds event3 \n\
            B: KEY=1000000000007 ff9f207ac14057ff febeffdfffefffff fffffffffffffffe\n\n\
            I: Bus=0003\nS: Sysfs=/devices/x\nH: Handlers=event4\nB: KEY=fffffffffffffffe\n\ngarbage\n";
        let found = keyboards(devices);
        assert_eq!(found, ["/devices/pci0000:00/0000:00:14.0/usb1/1-2/1-2:1.0/input/input3"]);
    }

    #[test]
    fn a_hub_is_not_what_is_plugged_into_it() {
        let place = "/devices/pci0000:00/0000:00:14.0/usb1/1-2/1-2.3/1-2.3:1.0/input/input3";
        assert!(below_another(place, "1-2"));
        assert!(!below_another(place, "1-2.3"));
    }
}
