//! How virtual machine monitors are told of devices, and how they are told how much memory a guest
//! has. Pure.
//!
//! cloud-hypervisor's and crosvm's forms are those of their documentation (cloud-hypervisor
//! `docs/vfio.md`, crosvm `src/crosvm/cmdline.rs`), which speaks of PCI functions alone.

use std::ffi::OsStr;
use std::os::fd::RawFd;
use std::path::Path;

/// A virtual machine monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vmm {
    Qemu,
    CloudHypervisor,
    Crosvm,
}

/// What stands for the devices in a command line.
pub(crate) const PLACE: &str = "{vfio}";
/// The id of the object that QEMU makes of `/dev/iommu`.
const IOMMU: &str = "vfiod";
/// What is locked beside a guest's memory: libvirt allows as much (`qemuDomainGetMemLockLimitBytes`).
const BESIDE: u64 = 1 << 30;

/// By what a monitor gets devices.
#[derive(Debug, Clone)]
pub(crate) enum Handed {
    /// It opens them by their names, with iommufd or by groups.
    Named { devices: Vec<Device>, iommufd: bool },
    /// They are open: `/dev/iommu`, and each device.
    Descriptors { devices: Vec<(Device, RawFd)>, iommu: RawFd },
}

/// A device of a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Device {
    /// A function, by its address.
    Function(String),
    /// A mediated device, by its UUID.
    Mediated(String),
}

impl Device {
    /// Where it is in sysfs.
    fn path(&self) -> String {
        match self {
            Self::Function(address) => format!("/sys/bus/pci/devices/{address}"),
            Self::Mediated(uuid) => format!("/sys/bus/mdev/devices/{uuid}"),
        }
    }
}

impl Vmm {
    pub(crate) const NAMES: [&str; 3] = ["qemu", "cloud-hypervisor", "crosvm"];

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        match name {
            "qemu" => Some(Self::Qemu),
            "cloud-hypervisor" => Some(Self::CloudHypervisor),
            "crosvm" => Some(Self::Crosvm),
            _ => None,
        }
    }

    /// Which one a program is, by its name.
    pub(crate) fn of_program(program: &OsStr) -> Option<Self> {
        let name = Path::new(program).file_name()?.to_str()?;
        if name.starts_with("qemu-") { Some(Self::Qemu) } else { Self::from_name(name) }
    }

    /// Whether it takes descriptors of devices.
    pub(crate) fn takes_descriptors(self) -> bool {
        self == Self::Qemu
    }

    /// The arguments by which it gets these devices.
    pub(crate) fn arguments(self, handed: &Handed) -> Vec<String> {
        match (self, handed) {
            (Self::Qemu, Handed::Named { devices, iommufd }) => {
                let object = iommufd.then(|| words(["-object", &format!("iommufd,id={IOMMU}")]));
                let suffix = if *iommufd { format!(",iommufd={IOMMU}") } else { String::new() };
                let device = |device: &Device| {
                    let name = match device {
                        Device::Function(address) => format!("host={address}"),
                        Device::Mediated(_) => format!("sysfsdev={}", device.path()),
                    };
                    words(["-device", &format!("vfio-pci,{name}{suffix}")])
                };
                object.into_iter().flatten().chain(devices.iter().flat_map(device)).collect()
            }
            (Self::Qemu, Handed::Descriptors { devices, iommu }) => {
                let object = words(["-object", &format!("iommufd,id={IOMMU},fd={iommu}")]);
                let device = |(device, fd): &(Device, RawFd)| {
                    // It cannot tell from a descriptor that IOMMUFD knows no hardware behind it.
                    let name = match device {
                        Device::Function(_) => String::new(),
                        Device::Mediated(_) => format!("sysfsdev={},", device.path()),
                    };
                    words(["-device", &format!("vfio-pci,{name}fd={fd},iommufd={IOMMU}")])
                };
                object.into_iter().chain(devices.iter().flat_map(device)).collect()
            }
            (Self::CloudHypervisor, Handed::Named { devices, .. }) => {
                let devices = devices.iter().map(|device| format!("path={}", device.path()));
                ["--device".to_owned()].into_iter().chain(devices).collect()
            }
            (Self::Crosvm, Handed::Named { devices, .. }) => {
                devices.iter().flat_map(|device| words(["--vfio", &device.path()])).collect()
            }
            // Nobody hands descriptors to those that take none.
            (Self::CloudHypervisor | Self::Crosvm, Handed::Descriptors { .. }) => Vec::new(),
        }
    }

    /// What a guest started with these arguments will have locked, in bytes: its memory and what is
    /// beside it. `None` where the arguments make no sense.
    pub(crate) fn locked(self, arguments: &[impl AsRef<OsStr>]) -> Option<u64> {
        let (options, keys, unit, default): (&[&str], &[&str], _, u64) = match self {
            Self::Qemu => (&["-m", "--m"], &["maxmem", "size", ""], 1 << 20, 128 << 20),
            Self::CloudHypervisor => (&["--memory"], &["size"], 1, 512 << 20),
            Self::Crosvm => (&["--mem", "-m"], &["size", ""], 1 << 20, 256 << 20),
        };
        let given = match value(options, arguments) {
            None => default,
            Some(value) => size(keys.iter().find_map(|key| field(value, key))?, unit)?,
        };
        given.checked_add(BESIDE)
    }
}

fn words(words: [&str; 2]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}

/// The value of the last of these options: the next argument, or what is behind a `=`.
fn value<'a>(options: &[&str], arguments: &'a [impl AsRef<OsStr>]) -> Option<&'a str> {
    let texts: Vec<&str> =
        arguments.iter().map(|argument| argument.as_ref().to_str().unwrap_or("")).collect();
    let at = |n: usize| {
        let (option, behind) = match texts[n].split_once('=') {
            Some((option, behind)) => (option, Some(behind)),
            None => (texts[n], texts.get(n + 1).copied()),
        };
        behind.filter(|_| options.contains(&option))
    };
    (0..texts.len()).rev().find_map(at)
}

/// The value of a key in `key=value,…`; that of no key is the first of all.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let mut fields = text.split(',');
    if key.is_empty() {
        return fields.next().filter(|first| !first.contains('='));
    }
    fields.find_map(|field| field.strip_prefix(key)?.strip_prefix('='))
}

/// A size with a suffix; a bare number counts in units.
pub(crate) fn size(text: &str, unit: u64) -> Option<u64> {
    let text = text.trim_end_matches("iB").trim_end_matches('B');
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" => unit,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        "t" | "T" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "c2177883-f1bb-47f0-914d-32a22e3a8804";

    fn function(address: &str) -> Device {
        Device::Function(address.to_owned())
    }

    fn gpu(iommufd: bool) -> Handed {
        let devices = ["0000:03:00.0", "0000:03:00.1"].map(function).to_vec();
        Handed::Named { devices, iommufd }
    }

    fn part(iommufd: bool) -> Handed {
        Handed::Named { devices: vec![Device::Mediated(UUID.to_owned())], iommufd }
    }

    #[test]
    fn each_monitor_is_told_in_its_own_words() {
        let told = |vmm: Vmm, handed| vmm.arguments(&handed).join(" ");
        assert_eq!(
            told(Vmm::Qemu, gpu(false)),
            "-device vfio-pci,host=0000:03:00.0 -device vfio-pci,host=0000:03:00.1"
        );
        assert_eq!(
            told(Vmm::Qemu, gpu(true)),
            "-object iommufd,id=vfiod -device vfio-pci,host=0000:03:00.0,iommufd=vfiod \
             -device vfio-pci,host=0000:03:00.1,iommufd=vfiod"
        );
        assert_eq!(
            told(
                Vmm::Qemu,
                Handed::Descriptors {
                    devices: vec![
                        (function("0000:03:00.0"), 7),
                        (Device::Mediated(UUID.to_owned()), 8)
                    ],
                    iommu: 9
                }
            ),
            format!(
                "-object iommufd,id=vfiod,fd=9 -device vfio-pci,fd=7,iommufd=vfiod \
                 -device vfio-pci,sysfsdev=/sys/bus/mdev/devices/{UUID},fd=8,iommufd=vfiod"
            )
        );
        let place = format!("/sys/bus/mdev/devices/{UUID}");
        assert_eq!(told(Vmm::Qemu, part(false)), format!("-device vfio-pci,sysfsdev={place}"));
        assert_eq!(
            told(Vmm::Qemu, part(true)),
            format!("-object iommufd,id=vfiod -device vfio-pci,sysfsdev={place},iommufd=vfiod")
        );
        assert_eq!(told(Vmm::CloudHypervisor, part(false)), format!("--device path={place}"));
        assert_eq!(told(Vmm::Crosvm, part(false)), format!("--vfio {place}"));
        assert_eq!(
            told(Vmm::CloudHypervisor, gpu(true)),
            "--device path=/sys/bus/pci/devices/0000:03:00.0 \
             path=/sys/bus/pci/devices/0000:03:00.1"
        );
        assert_eq!(
            told(Vmm::Crosvm, gpu(false)),
            "--vfio /sys/bus/pci/devices/0000:03:00.0 --vfio /sys/bus/pci/devices/0000:03:00.1"
        );
    }

    #[test]
    fn a_program_is_known_by_its_name() {
        let of = |program: &str| Vmm::of_program(OsStr::new(program));
        assert_eq!(of("/usr/bin/qemu-system-x86_64"), Some(Vmm::Qemu));
        assert_eq!(of("qemu-kvm"), Some(Vmm::Qemu));
        assert_eq!(of("./cloud-hypervisor"), Some(Vmm::CloudHypervisor));
        assert_eq!(of("crosvm"), Some(Vmm::Crosvm));
        assert_eq!(of("sh"), None);
        assert!(Vmm::NAMES.iter().all(|name| Vmm::from_name(name).is_some()));
    }

    #[test]
    fn what_is_locked_is_the_memory_and_some() {
        let locked = |vmm: Vmm, line: &str| {
            let words: Vec<&str> = line.split(' ').collect();
            vmm.locked(&words).map(|bytes| (bytes - BESIDE) >> 20)
        };
        let qemu = |line| locked(Vmm::Qemu, line);
        assert_eq!(qemu("-machine q35"), Some(128));
        assert_eq!(qemu("-m 4G -smp 2"), Some(4096));
        assert_eq!(qemu("-m 256"), Some(256));
        assert_eq!(qemu("-m 1G -m size=2G,slots=2,maxmem=8G"), Some(8192));
        assert_eq!(qemu("-m 512M,slots=2"), Some(512));
        assert_eq!(qemu("-m much"), None);
        assert_eq!(locked(Vmm::CloudHypervisor, "--memory size=2G,shared=on"), Some(2048));
        assert_eq!(locked(Vmm::CloudHypervisor, "--memory=size=1073741824"), Some(1024));
        assert_eq!(locked(Vmm::Crosvm, "run --mem 8192"), Some(8192));
        assert_eq!(locked(Vmm::Crosvm, "run --mem size=100,base=1"), Some(100));
        assert_eq!(size("18446744073709551615G", 1), None);
    }
}
