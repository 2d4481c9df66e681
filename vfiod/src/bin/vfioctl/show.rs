//! `show`: all that is known of one device, a line each.

use libvfio::client::{BarRecord, DeviceRecord};

use crate::bus::Bus;
use crate::output::{Output, Screen, print, print_json};
use crate::table::{BAD, BOLD, Cell, LEASED, PLAIN, Table, WARN};
use crate::trouble::Trouble;

pub(crate) async fn run(bus: &Bus, device: &str, out: &Output) -> Result<(), Trouble> {
    let reply = bus.ask("DescribeDevice", &(device,)).await?;
    if out.json {
        return print_json(&reply.json()?);
    }
    bus.note_simulation().await;
    print(&lines(&reply.read()?, out))
}

/// Long lines are wrapped by the terminal rather than cut: they are why one asks.
pub(crate) fn lines(device: &DeviceRecord, out: &Output) -> String {
    table(device).render(Screen { width: None, ..out.screen })
}

fn table(device: &DeviceRecord) -> Table {
    let mut table = Table::new(&[]);
    let mut line = |name: &str, value: Option<String>, style| {
        if let Some(value) = value {
            table.push([name.into(), Cell::new(value, style)]);
        }
    };
    line("device", Some(format!("{} {}", device.address, device.name)), BOLD);
    line("class", Some(class(device)), PLAIN);
    line("ids", Some(ids(device)), PLAIN);
    line("driver", Some(device.driver.clone().unwrap_or_else(|| "none".into())), PLAIN);
    line("override", device.driver_override.clone(), PLAIN);
    line("lease", lease(device), LEASED);
    let external = "by somebody else: on a VFIO driver without a lease";
    line("used", device.external.filter(|is| *is).map(|_| external.to_owned()), LEASED);
    line("quarantine", device.quarantine.clone(), BAD);
    line("IOMMU group", device.iommu_group.map(|group| group.to_string()), PLAIN);
    line("isolation", Some(device.isolation.clone()), PLAIN);
    line("NUMA node", device.numa_node.map(|node| node.to_string()), PLAIN);
    line("behind", joined(device.upstream.as_deref()), PLAIN);
    line("link", link(device), PLAIN);
    line("SR-IOV", sriov(device), PLAIN);
    line("VFIO device", device.vfio_device.clone(), PLAIN);
    line("interrupts", device.msix_vectors.map(|vectors| format!("{vectors} (MSI-X)")), PLAIN);
    line("reset", joined(device.reset_methods.as_deref()), PLAIN);
    line("power", device.power_state.clone(), PLAIN);
    line("console", device.boot_vga.filter(|is| *is).map(|_| "the firmware's".into()), PLAIN);
    line("serial", device.serial.clone(), PLAIN);
    for bar in device.bars.iter().flatten() {
        line(&region(bar), Some(extent(bar)), PLAIN);
    }
    line("capabilities", joined(device.capabilities.as_deref()), PLAIN);
    for problem in device.problems.iter().flatten() {
        line("problem", Some(problem.clone()), WARN);
    }
    table
}

fn joined(words: Option<&[String]>) -> Option<String> {
    words.filter(|words| !words.is_empty()).map(|words| words.join(" "))
}

fn class(device: &DeviceRecord) -> String {
    let code = device.class.map(|class| format!(" ({class:06x})"));
    format!("{}{}", device.class_name, code.unwrap_or_default())
}

fn ids(device: &DeviceRecord) -> String {
    let hex = |id: Option<u16>| id.map_or_else(|| "????".to_owned(), |id| format!("{id:04x}"));
    let pair = |vendor, device| format!("{}:{}", hex(vendor), hex(device));
    let own = pair(device.vendor, device.device);
    let subsystem = device
        .subsystem_vendor
        .map(|vendor| format!("subsystem {}", pair(Some(vendor), device.subsystem_device)));
    let revision = device.revision.map(|revision| format!("revision {revision:02x}"));
    [Some(own), subsystem, revision].into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn lease(device: &DeviceRecord) -> Option<String> {
    let id = device.lease.as_deref()?;
    let tenant = device.tenant.as_deref().unwrap_or("nobody");
    Some(format!("{id} of {tenant}, {}", device.lease_state.as_deref().unwrap_or("unknown")))
}

/// Speed and width now, and at most if that is more.
fn link(device: &DeviceRecord) -> Option<String> {
    let text = |speed: f64, width: u16| format!("{speed} GT/s x{width}");
    let most = device.link_speed_max.zip(device.link_width_max).map(|(s, w)| text(s, w));
    match (device.link_speed.zip(device.link_width).map(|(s, w)| text(s, w)), most) {
        (Some(now), Some(most)) if now != most => Some(format!("{now}, at most {most}")),
        (Some(now), _) => Some(now),
        (None, most) => most.map(|most| format!("down, at most {most}")),
    }
}

fn sriov(device: &DeviceRecord) -> Option<String> {
    if let Some(physical) = &device.physical_function {
        let index = device.vf_index.map_or_else(|| "?".to_owned(), |index| index.to_string());
        return Some(format!("VF {index} of {physical}"));
    }
    let (enabled, total) = (device.enabled_vfs?, device.total_vfs?);
    let offered = match device.vf_autoprobe {
        Some(false) => "not offered to host drivers",
        _ => "offered to host drivers",
    };
    let places = device.vf_offset.zip(device.vf_stride);
    let places = places.map(|(offset, stride)| format!(", from +{offset} every {stride}"));
    let places = places.unwrap_or_default();
    Some(format!("PF with {enabled} of {total} VFs{places}, new ones {offered}"))
}

fn region(bar: &BarRecord) -> String {
    if bar.index > 5 { "ROM".into() } else { format!("BAR {}", bar.index) }
}

fn extent(bar: &BarRecord) -> String {
    let prefetchable = if bar.prefetchable { ", prefetchable" } else { "" };
    format!("{} {}{prefetchable}", size(bar.size), bar.kind)
}

/// Bytes in the largest unit that divides them.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut number, mut unit) = (bytes, 0);
    while number > 0 && number % 1024 == 0 && unit + 1 < UNITS.len() {
        (number, unit) = (number / 1024, unit + 1);
    }
    format!("{number} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(device: &DeviceRecord) -> String {
        anstream::adapter::strip_str(&table(device).render(Screen::default())).to_string()
    }

    #[test]
    fn what_is_known_is_shown_and_nothing_else() {
        let device = DeviceRecord {
            address: "0000:03:00.0".into(),
            name: "NVIDIA H100".into(),
            class: Some(0x03_0200),
            class_name: "3D controller".into(),
            vendor: Some(0x10de),
            device: Some(0x2330),
            isolation: "full".into(),
            iommu_group: Some(12),
            link_speed: Some(16.0),
            link_width: Some(16),
            link_speed_max: Some(32.0),
            link_width_max: Some(16),
            boot_vga: Some(false),
            quarantine: Some("its reset failed".into()),
            bars: Some(vec![
                BarRecord { index: 0, size: 1 << 24, kind: "memory".into(), prefetchable: true },
                BarRecord { index: 6, size: 1536, kind: "memory".into(), prefetchable: false },
            ]),
            problems: Some(vec!["numa_node reads 'x'".into()]),
            ..DeviceRecord::default()
        };
        assert_eq!(
            shown(&device),
            "device       0000:03:00.0 NVIDIA H100\n\
             class        3D controller (030200)\n\
             ids          10de:2330\n\
             driver       none\n\
             quarantine   its reset failed\n\
             IOMMU group  12\n\
             isolation    full\n\
             link         16 GT/s x16, at most 32 GT/s x16\n\
             BAR 0        16 MiB memory, prefetchable\n\
             ROM          1536 B memory\n\
             problem      numa_node reads 'x'\n"
        );
    }

    #[test]
    fn both_sides_of_sriov_are_told() {
        let physical = DeviceRecord {
            enabled_vfs: Some(2),
            total_vfs: Some(7),
            vf_autoprobe: Some(false),
            ..DeviceRecord::default()
        };
        assert_eq!(
            sriov(&physical).unwrap(),
            "PF with 2 of 7 VFs, new ones not offered to host drivers"
        );
        let virtual_one = DeviceRecord {
            physical_function: Some("0000:01:00.0".into()),
            vf_index: Some(3),
            ..DeviceRecord::default()
        };
        assert_eq!(sriov(&virtual_one).unwrap(), "VF 3 of 0000:01:00.0");
        assert_eq!(sriov(&DeviceRecord::default()), None);
    }
}
