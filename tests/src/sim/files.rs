//! The files of a described host that no operation changes: procfs, module tables, names, and all
//! directories there are in any host. Makes text, touches nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use libvfio::address::PciAddress;

use super::described::{Described, Driver, KernelOptions};

/// An excerpt of the system's `pci.ids`: the devices of our described hosts.
const PCI_IDS: &str = include_str!("../../hosts/pci.ids");

/// Directories that are there whatever the host.
const DIRECTORIES: [&str; 9] = [
    "sys/bus/pci/devices",
    "sys/bus/pci/drivers",
    "sys/class/block",
    "sys/class/iommu",
    "sys/class/net",
    "sys/class/vfio-dev",
    "sys/devices",
    "sys/kernel/iommu_groups",
    "dev/vfio",
];

/// Files and directories by their paths below the root.
#[derive(Debug, Default)]
pub(super) struct Files {
    texts: BTreeMap<String, String>,
    /// Names in each directory.
    directories: BTreeMap<String, BTreeSet<String>>,
    /// Device numbers of disks and their partitions.
    pub(super) minors: BTreeMap<String, u32>,
}

impl Files {
    pub(super) fn of(host: &Described) -> Self {
        let mut files = Self { minors: minors(host), ..Self::default() };
        for directory in DIRECTORIES {
            files.directory(directory);
        }
        let kernel = &host.kernel;
        let modules = format!("lib/modules/{}", kernel.release);
        files.add("proc/cmdline", format!("{}\n", kernel.command_line));
        files.add("proc/cpuinfo", format!("processor\t: 0\nvendor_id\t: {}\n", kernel.cpu));
        files.add("proc/interrupts", interrupts(kernel));
        files.add("proc/sys/kernel/osrelease", format!("{}\n", kernel.release));
        files.add("proc/self/mountinfo", files.mountinfo(host));
        files.add("proc/swaps", swaps(host));
        files.add(&format!("{modules}/modules.alias"), aliases(&host.drivers));
        files.add(&format!("{modules}/modules.dep"), dependencies(&host.drivers));
        files.add(&format!("{modules}/modules.builtin"), String::new());
        files.add("sim/name", format!("{}\n", host.name));
        files.add("usr/share/misc/pci.ids", PCI_IDS.to_owned());
        for iommu in &kernel.iommus {
            files.directory(&format!("sys/devices/virtual/iommu/{iommu}"));
        }
        if kernel.cdev {
            files.directory("dev/vfio/devices");
            files.add("dev/iommu", String::new());
        }
        for parent in &host.parents {
            files.directory("sys/class/mdev_bus");
            files.directory("sys/bus/mdev/devices");
            if parent.name.parse::<PciAddress>().is_err() {
                files.directory(&format!("sys/devices/virtual/{0}/{0}", parent.name));
            }
        }
        for (path, text) in &host.files {
            files.add(path, text.clone());
        }
        files
    }

    fn add(&mut self, path: &str, text: String) {
        if let Some((directory, name)) = path.rsplit_once('/') {
            self.directory(directory).insert(name.to_owned());
        }
        self.texts.insert(path.to_owned(), text);
    }

    /// The names in a directory, which is made with all above it if need be.
    fn directory(&mut self, path: &str) -> &mut BTreeSet<String> {
        if !self.directories.contains_key(path) && !path.is_empty() {
            let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
            self.directory(above).insert(name.to_owned());
        }
        self.directories.entry(path.to_owned()).or_default()
    }

    pub(super) fn text(&self, path: &str) -> Option<&str> {
        self.texts.get(path).map(String::as_str)
    }

    pub(super) fn names(&self, directory: &str) -> Option<&BTreeSet<String>> {
        self.directories.get(directory)
    }

    fn mountinfo(&self, host: &Described) -> String {
        let mut text = String::new();
        for (mount, id) in host.mounts.iter().zip(21..) {
            let minor = self.minors.get(&mount.disk).copied().unwrap_or(0);
            // Writing to a string never fails.
            let _ = writeln!(
                text,
                "{id} 1 259:{minor} / {} rw,relatime shared:1 - {} /dev/{} rw",
                mount.at, mount.kind, mount.disk
            );
        }
        text
    }
}

/// Numbers under the block major for extended numbers, 259, in the order of addresses.
fn minors(host: &Described) -> BTreeMap<String, u32> {
    let disks = host.functions.iter().filter_map(|function| function.disk.as_ref());
    disks.flat_map(|disk| std::iter::once(disk.name.clone()).chain(disk.parts())).zip(0..).collect()
}

fn interrupts(kernel: &KernelOptions) -> String {
    let chip = if kernel.interrupt_remapping { "IR-IO-APIC" } else { "IO-APIC" };
    format!("            CPU0\n   0:         36   {chip}    2-edge      timer\n")
}

fn swaps(host: &Described) -> String {
    let head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n".to_owned();
    let line = |disk| format!("/dev/{disk}                          partition\t4194304\t0\t-2\n");
    host.swaps.iter().map(line).fold(head, |all, line| all + &line)
}

/// A line for each id and class of each driver, as `depmod` makes them.
fn aliases(drivers: &[Driver]) -> String {
    let any = |number: Option<u16>| number.map_or_else(|| "*".into(), |n| format!("{n:08X}"));
    let mut text = String::new();
    for driver in drivers {
        let bus = if driver.vfio { "vfio_pci" } else { "pci" };
        let ids: Vec<String> = match driver.ids.as_slice() {
            [] => vec!["v*d*".into()],
            ids => ids.iter().map(|i| format!("v{}d{}", any(i.vendor), any(i.device))).collect(),
        };
        let classes: Vec<String> = match driver.classes.as_slice() {
            [] => vec!["bc*sc*i*".into()],
            classes => classes.iter().map(|class| class_pattern(class)).collect(),
        };
        for id in &ids {
            for class in &classes {
                // Writing to a string never fails.
                let _ = writeln!(text, "alias {bus}:{id}sv*sd*{class} {}", driver.module());
            }
        }
    }
    text
}

fn class_pattern(class: &str) -> String {
    let part = |at: usize| class.get(at..at + 2).map_or_else(|| "*".into(), str::to_uppercase);
    format!(
        "bc{}sc{}i{}",
        part(0),
        part(2),
        if class.len() < 6 { "*".into() } else { part(4) + "*" }
    )
}

fn dependencies(drivers: &[Driver]) -> String {
    let modules: BTreeSet<String> = drivers.iter().map(Driver::module).collect();
    let line = |module: &String| format!("kernel/drivers/{}.ko.xz:\n", module.replace('_', "-"));
    modules.iter().map(line).collect()
}
