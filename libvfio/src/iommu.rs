//! IOMMU groups: who is in one, why it is as large as it is, and whether a guest may have it.
//! Works on functions already read; [`Platform`] reads a handful of host files. Never writes.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::address::PciAddress;
use crate::error::Error;
use crate::host::HostRoot;
use crate::pci::Function;
use crate::pci::config::PortType;

/// An IOMMU group: the smallest set of functions that can be isolated from all others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its number, valid for this boot only.
    pub number: u32,
    /// Its functions, in order.
    pub members: Vec<PciAddress>,
}

/// Why a group has more than one function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sharing {
    /// It has one.
    Alone,
    /// All are functions of one device that does not isolate them from each other.
    OneDevice,
    /// They are below a bridge of conventional PCI, where every device looks like the bridge.
    Conventional(PciAddress),
    /// These ports lack the access control services that would keep their traffic apart.
    NoAcs(Vec<PciAddress>),
    /// Nothing seen explains it: a quirk, an alias, or firmware tables.
    Unknown,
}

impl fmt::Display for Sharing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alone => f.write_str("one function"),
            Self::OneDevice => f.write_str("functions of one device"),
            Self::Conventional(bridge) => {
                write!(f, "behind {bridge}, a bridge to conventional PCI")
            }
            Self::NoAcs(ports) => {
                let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
                let verb = if ports.len() == 1 { "lacks" } else { "lack" };
                write!(f, "{} {verb} ACS", ports.join(", "))
            }
            Self::Unknown => f.write_str("no cause visible (a quirk or firmware tables)"),
        }
    }
}

impl Group {
    /// Why the group is larger than one function.
    ///
    /// Follows the kernel's rule (`pci_device_group`, `drivers/iommu/iommu.c`): a device shares
    /// with what is below the highest port on its path that cannot stop peer-to-peer traffic, and
    /// functions of one device share unless each has ACS itself.
    pub fn sharing(&self, functions: &BTreeMap<PciAddress, Arc<Function>>) -> Sharing {
        let members: Vec<&Function> =
            self.members.iter().filter_map(|a| functions.get(a).map(Arc::as_ref)).collect();
        let [first, others @ ..] = members.as_slice() else { return Sharing::Unknown };
        if others.is_empty() {
            return Sharing::Alone;
        }
        if others.iter().all(|f| f.address.same_slot(first.address)) {
            return Sharing::OneDevice;
        }
        let mut ports: Vec<PciAddress> = members
            .iter()
            .flat_map(|f| f.upstream.iter().copied().chain(f.is_pci_bridge().then_some(f.address)))
            .collect();
        ports.sort_unstable();
        ports.dedup();
        let port = |address: &PciAddress| functions.get(address).map(Arc::as_ref);
        let conventional = |f: &&Function| f.config.coverage >= 256 && f.config.pcie().is_none();
        if let Some(bridge) = ports.iter().filter_map(port).find(conventional) {
            return Sharing::Conventional(bridge.address);
        }
        // Only ports towards several devices need it; the upstream port of a switch does not.
        let lacking = |f: &&Function| {
            let port = f.config.pcie().map(|pcie| pcie.port_type);
            matches!(port, Some(PortType::RootPort | PortType::DownstreamSwitchPort))
                && !f.config.acs().is_some_and(|acs| acs.isolates())
        };
        let ports: Vec<PciAddress> =
            ports.iter().filter_map(port).filter(lacking).map(|f| f.address).collect();
        if ports.is_empty() { Sharing::Unknown } else { Sharing::NoAcs(ports) }
    }
}

/// How far the host keeps a guest's device from everything else. Ordered: more is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Isolation {
    /// No IOMMU in use: DMA goes anywhere.
    None,
    /// Groups were split by `pcie_acs_override`, against what the hardware promises.
    AcsOverride,
    /// DMA is contained, but a guest could forge interrupts.
    NoInterruptRemapping,
    /// DMA and interrupts are contained by hardware.
    Full,
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::AcsOverride => "acs-override",
            Self::NoInterruptRemapping => "no-interrupt-remapping",
            Self::Full => "full",
        })
    }
}

/// The maker of the processor, which decides the kernel option that turns its IOMMU on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuVendor {
    /// Intel: `intel_iommu=on`.
    Intel,
    /// AMD or Hygon: on by default, `amd_iommu=on` does not exist.
    Amd,
    /// Arm and others: described by firmware.
    Other,
}

impl CpuVendor {
    /// What turns the IOMMU on.
    pub fn iommu_remedy(self) -> &'static str {
        match self {
            Self::Intel => {
                "enable VT-d in the firmware and boot with 'intel_iommu=on' on the kernel command \
                 line"
            }
            Self::Amd => {
                "enable IOMMU (AMD-Vi) in the firmware, and remove 'amd_iommu=off' or 'iommu=off' \
                 from the kernel command line"
            }
            Self::Other => "enable the IOMMU (SMMU) in the firmware",
        }
    }
}

/// What is true of the whole host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// The processor's maker.
    pub cpu: CpuVendor,
    /// The kernel command line.
    pub command_line: String,
    /// Names of the IOMMUs the kernel drives (`/sys/class/iommu`).
    pub iommus: Vec<String>,
    /// Whether interrupts are remapped. `None` if the host does not tell.
    pub interrupt_remapping: Option<bool>,
    /// VFIO's no-IOMMU mode is on.
    pub noiommu: bool,
    /// How isolated a group of this host can be at best.
    pub isolation: Isolation,
}

impl Platform {
    /// Reads the host.
    pub fn read(host: &HostRoot) -> Result<Self, Error> {
        let command_line = host.proc("cmdline")?.unwrap_or_default().trim().to_owned();
        let iommus = host.sys("class/iommu").list()?;
        let interrupts = host.proc("interrupts")?.unwrap_or_default();
        let parameter = |path| {
            let text = host.sys("module").attr(path)?;
            Ok::<_, Error>(text.is_some_and(|t| t.starts_with(['Y', 'y', '1'])))
        };
        let noiommu = parameter("vfio/parameters/enable_unsafe_noiommu_mode")?;
        let unsafe_interrupts = parameter("vfio_iommu_type1/parameters/allow_unsafe_interrupts")?;
        let interrupt_remapping = remapping(&interrupts);
        let isolation = if iommus.is_empty() {
            Isolation::None
        } else if command_line.contains("pcie_acs_override=") {
            Isolation::AcsOverride
        } else if interrupt_remapping == Some(false) || unsafe_interrupts {
            Isolation::NoInterruptRemapping
        } else {
            Isolation::Full
        };
        let cpu = cpu_vendor(&host.proc("cpuinfo")?.unwrap_or_default());
        Ok(Self { cpu, command_line, iommus, interrupt_remapping, noiommu, isolation })
    }
}

/// From `/proc/interrupts`: on x86 remapped chips are named with an `IR-` prefix
/// (`arch/x86/kernel/apic`), others are plain; other machines do not tell.
fn remapping(interrupts: &str) -> Option<bool> {
    if interrupts.contains(" IR-") {
        return Some(true);
    }
    interrupts.contains("IO-APIC").then_some(false)
}

fn cpu_vendor(cpuinfo: &str) -> CpuVendor {
    let id = cpuinfo.lines().find_map(|line| line.strip_prefix("vendor_id")?.split(':').nth(1));
    match id.map(str::trim) {
        Some("GenuineIntel") => CpuVendor::Intel,
        Some("AuthenticAMD" | "HygonGenuine") => CpuVendor::Amd,
        _ => CpuVendor::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remapped_interrupts_are_recognised() {
        let plain = "  0:  36   0   IO-APIC   2-edge      timer\n";
        let remapped = "  0:  36   0   IR-IO-APIC   2-edge      timer\n";
        assert_eq!(remapping(plain), Some(false));
        assert_eq!(remapping(remapped), Some(true));
        assert_eq!(remapping(" 12: 0 0 GICv3 27 Level arch_timer\n"), None);
    }

    #[test]
    fn the_remedy_names_the_option_of_the_cpu() {
        assert_eq!(cpu_vendor("vendor_id\t: GenuineIntel\n"), CpuVendor::Intel);
        assert!(CpuVendor::Intel.iommu_remedy().contains("intel_iommu=on"));
        assert_eq!(cpu_vendor("vendor_id\t: AuthenticAMD\n"), CpuVendor::Amd);
        assert_eq!(cpu_vendor("garbage"), CpuVendor::Other);
    }

    #[test]
    fn grades_are_ordered() {
        assert!(Isolation::Full > Isolation::NoInterruptRemapping);
        assert!(Isolation::AcsOverride > Isolation::None);
    }
}
