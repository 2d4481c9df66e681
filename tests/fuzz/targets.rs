//! One function for each parser of what others wrote: it must return, and what it returns must make
//! sense. Touches nothing.

use std::collections::BTreeSet;
use std::hint::black_box;

use libvfio::backend;
use libvfio::ids::{self, Key};
use libvfio::modalias;
use libvfio::pci::config;
use libvfio::protection;
use vfiod::libvirt::{self, Domain};
use vfiod::uevent::Subject;
use vfiod::{ledger, uevent};

/// A parser and what must be true of it.
#[derive(Debug)]
pub(crate) struct Target {
    /// Its name, also that of the directory of its seeds.
    pub(crate) name: &'static str,
    /// Panics where there is a fault.
    pub(crate) run: fn(&[u8]),
}

/// All of them.
pub(crate) const TARGETS: [Target; 8] = [
    Target { name: "config", run: config_space },
    Target { name: "ids", run: pci_ids },
    Target { name: "ledger", run: lease },
    Target { name: "libvirt", run: domain },
    Target { name: "modalias", run: aliases },
    Target { name: "mountinfo", run: mounts },
    Target { name: "settings", run: settings },
    Target { name: "uevent", run: report },
];

/// The target of that name.
#[allow(dead_code)] // The test runs them all.
pub(crate) fn named(name: &str) -> &'static Target {
    let target = const { &TARGETS }.iter().find(|target| target.name == name);
    target.unwrap_or_else(|| panic!("no target '{name}'; there are {}", names().join(", ")))
}

fn names() -> Vec<&'static str> {
    TARGETS.iter().map(|target| target.name).collect()
}

/// sysfs `config`.
fn config_space(bytes: &[u8]) {
    let space = config::parse(bytes);
    assert_eq!(space.coverage, bytes.len());
    assert!(space.capabilities.len() + space.extended.len() <= bytes.len() / 2);
    black_box((space.capability_names(), space.has_flr(), space.acs().map(|acs| acs.isolates())));
    black_box((space.pcie(), space.sriov(), space.serial().map(|serial| serial.to_string())));
    for problem in &space.problems {
        assert!(!problem.to_string().is_empty());
    }
    serde_json::to_string(&space).expect("configuration space has words for all of it");
}

/// `pci.ids`, in which the names of a few devices are looked up.
fn pci_ids(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let key = |vendor, device, subsystem_vendor, subsystem_device| Key {
        vendor,
        device,
        subsystem_vendor,
        subsystem_device,
    };
    let wanted = BTreeSet::from([
        key(0x10de, 0x2684, 0x10de, 0x16f1),
        key(0x10de, 0x22ba, 0, 0),
        key(0, 0, 0xffff, 0xffff),
    ]);
    let names = ids::lookup(&text, &wanted);
    for key in &wanted {
        assert!(names.knows(key));
        let found = names.of(key);
        let all = [found.vendor, found.device, found.subsystem_vendor, found.subsystem];
        for name in all.into_iter().flatten() {
            assert!(text.contains(name) && !name.contains('\n'), "{name:?}");
        }
    }
    for class in [0, 0x01_0802, 0x03_0000, 0xff_ffff, u32::MAX] {
        black_box(names.class(class));
    }
}

/// A lease's file, and what a daemon that finds it does first.
fn lease(bytes: &[u8]) {
    let Ok(lease) = ledger::parse(bytes) else { return };
    let record = ledger::record(0, &lease).expect("what was read can be written");
    assert_eq!(ledger::parse(&record).as_ref(), Ok(&lease));
    black_box((lease.way_back(), lease.record()));
}

/// A libvirt domain, as its hooks get it.
fn domain(bytes: &[u8]) {
    let Ok(domain) = Domain::parse(&String::from_utf8_lossy(bytes)) else { return };
    assert_eq!(domain.is_empty(), domain.devices().is_empty());
    let elements: String = domain.functions.iter().copied().map(libvirt::element).collect();
    let text =
        format!("<domain><name>a</name><uuid>b</uuid><devices>{elements}</devices></domain>");
    let again = Domain::parse(&text).expect("what we write is a domain");
    assert_eq!(again.functions, domain.functions);
}

/// A device's alias on the first line, `modules.alias` below it.
fn aliases(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (device, table) = text.split_once('\n').unwrap_or_default();
    if let Some(module) = modalias::best_vfio_driver(table, device) {
        assert!(table.contains(module));
    }
}

/// A disk's number and name on the first line, `mountinfo` below it.
fn mounts(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (disk, mountinfo) = text.split_once('\n').unwrap_or_default();
    let (number, disk) = disk.split_once(' ').unwrap_or_default();
    let points = protection::mount_points(mountinfo, number, disk);
    assert!(points.len() <= mountinfo.lines().count());
}

/// A report of the kernel.
fn report(bytes: &[u8]) {
    match uevent::subject(bytes) {
        Some(Subject::Function(function)) => assert_eq!(function.to_string().parse(), Ok(function)),
        Some(Subject::Mediated(uuid)) => assert_eq!(uuid.to_string().parse(), Ok(uuid)),
        None => {}
    }
}

/// Files of virtual functions' settings: vGPU types and scheduling priorities.
fn settings(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for (_, name) in backend::vgpu_types(&text) {
        assert!(!name.chars().any(char::is_control));
    }
    if let Some((value, choices)) = backend::priorities(&text) {
        assert!(choices.iter().any(|choice| choice.value == value));
    }
}
