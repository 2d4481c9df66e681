//! The console in use: the display the firmware left to the kernel, and serial ports the kernel
//! writes to. Reads sysfs and procfs through [`crate::host`].
//!
//! A display is the console's only if the firmware chose it: it is the default VGA device
//! (`boot_vga_show`, `drivers/pci/pci-sysfs.c`) or has the firmware's framebuffer in a region. Then
//! it is protected while something is shown there: by the firmware's framebuffer (simpledrm, efifb),
//! by the VGA text console, or by a framebuffer console on a framebuffer of its own driver.

use std::collections::BTreeSet;

use super::{Found, Use, Weight};
use crate::address::PciAddress;
use crate::error::Error;
use crate::host::HostRoot;
use crate::members;

pub(super) fn uses(host: &HostRoot, functions: &BTreeSet<PciAddress>) -> Result<Vec<Use>, Error> {
    let mut uses = Vec::new();
    for &function in functions {
        let class = host.function(function).attr("class")?.unwrap_or_default();
        if class.starts_with("0x03") {
            uses.extend(display(host, function)?.map(|found| found.of(function)));
        }
    }
    uses.extend(serial(host, functions)?);
    Ok(uses)
}

fn display(host: &HostRoot, function: PciAddress) -> Result<Option<Found>, Error> {
    let found = |what: &str| {
        Found::new(
            format!("shows the console: {what}"),
            "let the firmware or the kernel (video=, a driver) use another display".into(),
            Weight::Protected,
        )
    };
    if has_firmware_framebuffer(&host.proc("iomem")?.unwrap_or_default(), function) {
        return Ok(Some(found("the firmware's framebuffer is in its memory")));
    }
    if host.function(function).attr("boot_vga")?.as_deref() != Some("1") {
        return Ok(None);
    }
    let consoles = consoles(host)?;
    let bound = |name: &str| consoles.iter().any(|console| console.contains(name));
    // Names of `vga_con` and `fb_con` (`drivers/video/console/vgacon.c`,
    // `drivers/video/fbdev/core/fbcon.c`).
    if bound("VGA+") {
        return Ok(Some(found("it is the VGA device in text mode")));
    }
    let framebuffers = members::within(host, "class/graphics", &BTreeSet::from([function]))?;
    let own = framebuffers.first().filter(|_| bound("frame buffer"));
    Ok(own.map(|(name, _)| found(&format!("it is on its framebuffer {name}"))))
}

/// Names of the consoles that virtual terminals are bound to (`drivers/tty/vt/vt.c`).
fn consoles(host: &HostRoot) -> Result<Vec<String>, Error> {
    let dir = host.sys("class/vtconsole");
    let mut names = Vec::new();
    for console in dir.list()? {
        let console = dir.sub(&console);
        if console.attr("bind")?.as_deref() == Some("1") {
            names.extend(console.attr("name")?);
        }
    }
    Ok(names)
}

/// Whether `/proc/iomem` has the firmware's framebuffer, which `drivers/firmware/sysfb_simplefb.c`
/// and its drivers name so, inside a region of a function. Deeper lines are indented further
/// (`r_show`, `kernel/resource.c`); a native driver makes the framebuffer go
/// (`drivers/video/aperture.c`).
fn has_firmware_framebuffer(iomem: &str, function: PciAddress) -> bool {
    const NAMES: [&str; 4] = ["BOOTFB", "efifb", "simplefb", "vesafb"];
    let function = function.to_string();
    let mut region = None;
    for line in iomem.lines() {
        let depth = line.len() - line.trim_start().len();
        let name = line.split_once(" : ").map_or("", |(_, name)| name.trim());
        region = region.filter(|region| depth > *region);
        if name == function {
            region = Some(depth);
        }
        if region.is_some() && NAMES.contains(&name) {
            return true;
        }
    }
    false
}

/// Ports the kernel writes its messages to (`Documentation/ABI/testing/sysfs-tty`).
fn serial(host: &HostRoot, functions: &BTreeSet<PciAddress>) -> Result<Vec<Use>, Error> {
    let active = host.sys("class/tty/console").attr("active")?.unwrap_or_default();
    let active: Vec<&str> = active.split_whitespace().filter(|name| *name != "tty0").collect();
    if active.is_empty() {
        return Ok(Vec::new());
    }
    let ports = members::within(host, "class/tty", functions)?.into_iter();
    let consoles = ports.filter(|(port, _)| active.contains(&port.as_str()));
    let found = |port: &str| {
        Found::new(
            format!("is {port}, a console of the kernel"),
            format!("remove console={port} from the kernel command line"),
            Weight::Protected,
        )
    };
    Ok(consoles.map(|(port, function)| found(&port).of(function)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_firmwares_framebuffer_is_found_in_whose_region_it_is() {
        let iomem = "00000000-00000fff : Reserved\n\
                     c0000000-dfffffff : PCI Bus 0000:01\n\
                     \u{20} c0000000-cfffffff : 0000:01:00.0\n\
                     \u{20}   c0000000-c07e8fff : BOOTFB\n\
                     \u{20} d0000000-d0ffffff : 0000:02:00.0\n\
                     e0000000-e00fffff : BOOTFB\ngarbage\n";
        let owns = |address: &str| has_firmware_framebuffer(iomem, address.parse().unwrap());
        assert!(owns("01:00.0"));
        assert!(!owns("02:00.0"));
        assert!(!owns("03:00.0"));
    }
}
