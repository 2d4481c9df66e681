//! Whether a host is ready to give devices to guests: one finding per condition, each with its
//! remedy. Reads through [`crate::host`] and asks KVM; needs no privilege and changes nothing.

use std::io;

use serde::Serialize;

use crate::error::Error;
use crate::host::HostRoot;
use crate::inventory::DriverSource;
use crate::iommu::{CpuVendor, Isolation, Platform};
use crate::memlock::{self, Limit};
use crate::plan::full_modules;
use crate::{kvm, modalias};

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Neither good nor bad.
    Info,
    /// As it should be.
    Ok,
    /// Devices can be assigned, but something is worse than it could be.
    Warn,
    /// Devices cannot be assigned, or not to a KVM guest.
    Fail,
}

/// One condition and whether the host meets it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// A stable word for the condition.
    pub name: &'static str,
    /// How much it matters.
    pub verdict: Verdict,
    /// What was found.
    pub detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    /// Something to know.
    pub fn info(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Info, detail: detail.into(), remedy: None }
    }

    /// A condition that is met.
    pub fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { verdict: Verdict::Ok, ..Self::info(name, detail) }
    }

    /// A condition that is met badly.
    pub fn warn(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        let remedy = Some(remedy.into());
        Self { verdict: Verdict::Warn, remedy, ..Self::info(name, detail) }
    }

    /// A condition that is not met.
    pub fn fail(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, ..Self::warn(name, detail, remedy) }
    }
}

/// Looks at everything of the host that passthrough depends on.
pub fn check(host: &HostRoot) -> Vec<Finding> {
    let platform = match Platform::read(host) {
        Ok(platform) => platform,
        Err(error) => return vec![unreadable("host", &error)],
    };
    let mut findings = vec![
        iommu(host, &platform),
        interrupt_remapping(&platform),
        kernel_options(&platform.command_line),
    ];
    findings.extend(isolation(&platform));
    findings.extend([
        vfio(host),
        vfio_pci(host),
        vfio_node(host),
        iommufd(host),
        memlock(host),
        kvm(host, platform.cpu),
    ]);
    findings
}

fn unreadable(name: &'static str, error: &Error) -> Finding {
    Finding::fail(name, error.to_string(), "let this user read it, or check as root")
}

fn iommu(host: &HostRoot, platform: &Platform) -> Finding {
    let name = "iommu";
    let remedy = platform.cpu.iommu_remedy();
    let groups = match host.sys("kernel/iommu_groups").list() {
        Ok(groups) => groups.len(),
        Err(error) => return unreadable(name, &error),
    };
    match (platform.iommus.as_slice(), groups) {
        ([], _) if platform.noiommu => {
            Finding::fail(name, "off; VFIO's no-IOMMU mode is on, which isolates nothing", remedy)
        }
        ([], _) => Finding::fail(name, "off: the kernel drives no IOMMU", remedy),
        (iommus, 0) => {
            Finding::fail(name, format!("{}, but no IOMMU groups", iommus.join(" ")), remedy)
        }
        (iommus, groups) => Finding::ok(name, format!("{}, {groups} groups", iommus.join(" "))),
    }
}

fn interrupt_remapping(platform: &Platform) -> Finding {
    let name = "interrupt-remapping";
    match platform.interrupt_remapping {
        Some(true) => Finding::ok(name, "on"),
        Some(false) => Finding::warn(
            name,
            "off: a hostile guest could forge interrupts",
            "enable interrupt remapping (x2APIC) in the firmware and boot without 'intremap=off'",
        ),
        None => Finding::info(name, "this host does not tell"),
    }
}

/// Options that stand in the way of assignment, by how they begin, and what each does.
const HARMFUL_OPTIONS: [(&str, Verdict, &str); 7] = [
    ("intel_iommu=off", Verdict::Fail, "turns the IOMMU off"),
    ("amd_iommu=off", Verdict::Fail, "turns the IOMMU off"),
    ("iommu=off", Verdict::Fail, "turns the IOMMU off"),
    ("intremap=off", Verdict::Warn, "turns interrupt remapping off"),
    ("intremap=nosid", Verdict::Warn, "lets devices forge each other's interrupts"),
    ("pcie_acs_override=", Verdict::Warn, "splits groups that hardware does not isolate"),
    ("vfio-pci.ids=", Verdict::Warn, "takes devices for VFIO at boot, so they need --adopt"),
];

fn kernel_options(command_line: &str) -> Finding {
    let name = "kernel-options";
    let words = || command_line.split_whitespace();
    let found = words().flat_map(|word| {
        let begun = HARMFUL_OPTIONS.iter().filter(move |(option, ..)| word.starts_with(option));
        begun.map(move |(_, verdict, effect)| (word, *verdict, *effect))
    });
    let found: Vec<(&str, Verdict, &str)> = found.collect();
    let Some(verdict) = found.iter().map(|(_, verdict, _)| *verdict).max() else {
        let about = |word: &&str| word.contains("iommu") || word.starts_with("vfio");
        let mut told: Vec<&str> = words().filter(about).collect();
        if told.is_empty() {
            told.push("none that matter");
        }
        return Finding::ok(name, told.join(" "));
    };
    let effects: Vec<String> =
        found.iter().map(|(word, _, effect)| format!("'{word}' {effect}")).collect();
    let options: Vec<&str> = found.iter().map(|(word, ..)| *word).collect();
    let remedy = format!("remove {} from the kernel command line", options.join(" "));
    Finding { verdict, ..Finding::warn(name, effects.join("; "), remedy) }
}

/// Nothing where there is no IOMMU, which is a finding of its own.
fn isolation(platform: &Platform) -> Option<Finding> {
    let name = "isolation";
    Some(match platform.isolation {
        Isolation::None => return None,
        Isolation::Full => Finding::ok(name, "full: memory and interrupts"),
        Isolation::NoInterruptRemapping => Finding::warn(
            name,
            "memory, but not interrupts",
            "enable interrupt remapping, and load vfio_iommu_type1 without \
             'allow_unsafe_interrupts'",
        ),
        Isolation::AcsOverride => Finding::warn(
            name,
            "groups are split by pcie_acs_override: devices may reach each other's memory",
            "boot without 'pcie_acs_override' and assign whole groups",
        ),
    })
}

/// VFIO itself. Built into the kernel it may leave no trace but its driver.
fn vfio(host: &HostRoot) -> Finding {
    let name = "vfio";
    let loaded = host.sys("module").has(name) || host.sys("bus/pci/drivers").has("vfio-pci");
    let table = |file| host.modules(file).map(Option::unwrap_or_default);
    let known = table("modules.dep")
        .and_then(|dep| Ok(modalias::module_exists(&dep, &table("modules.builtin")?, name)));
    match known {
        _ if loaded => Finding::ok(name, "loaded"),
        Ok(true) => Finding::ok(name, "can be loaded"),
        Ok(false) => {
            Finding::fail(name, "this kernel does not have it", full_modules("CONFIG_VFIO"))
        }
        Err(error) => unreadable(name, &error),
    }
}

fn vfio_pci(host: &HostRoot) -> Finding {
    let name = "vfio-pci";
    match DriverSource::of(host, name) {
        Ok(DriverSource::Registered) => Finding::ok(name, "loaded"),
        Ok(DriverSource::Module) => Finding::ok(name, "can be loaded"),
        Ok(DriverSource::Missing) => {
            Finding::fail(name, "this kernel does not have it", full_modules("CONFIG_VFIO_PCI"))
        }
        Err(error) => unreadable(name, &error),
    }
}

fn vfio_node(host: &HostRoot) -> Finding {
    let name = "vfio-node";
    if host.path("dev/vfio/vfio").exists() {
        Finding::ok(name, "/dev/vfio/vfio")
    } else {
        Finding::warn(
            name,
            "/dev/vfio/vfio is not there",
            "load the module (modprobe vfio); in a container, pass /dev/vfio through",
        )
    }
}

/// By which interface leases give their devices: nodes of functions come with the driver, so it is
/// only known whether there is a place for them.
fn iommufd(host: &HostRoot) -> Finding {
    let (iommu, nodes) = (host.path("dev/iommu").exists(), host.path("dev/vfio/devices").exists());
    let detail = match (iommu, nodes) {
        (true, true) => "/dev/iommu and nodes of single devices: leases are opened by iommufd",
        (true, false) => "/dev/iommu, but no nodes of single devices yet; until then by groups",
        (false, _) => "not there: leases are opened by groups",
    };
    Finding::info("iommufd", detail)
}

/// Less than any guest has; the kernel's own default is 8 MiB.
const FEW_LOCKED_BYTES: u64 = 1 << 30;
/// `CAP_IPC_LOCK`, as a bit of `CapEff` (capabilities(7)).
const CAP_IPC_LOCK: u64 = 1 << 14;

/// VFIO pins all memory of a guest and counts it against the limit of the process that asks.
fn memlock(host: &HostRoot) -> Finding {
    let name = "memlock";
    let text = |file| host.proc(file).map(Option::unwrap_or_default);
    let (limits, status) = match (text("self/limits"), text("self/status")) {
        (Ok(limits), Ok(status)) => (limits, status),
        (Err(error), _) | (_, Err(error)) => return unreadable(name, &error),
    };
    if effective_capabilities(&status) & CAP_IPC_LOCK != 0 {
        return Finding::ok(name, "this user is not limited (CAP_IPC_LOCK)");
    }
    match memlock::parse(&limits).map(|(soft, _)| soft) {
        None => Finding::info(name, "this host does not tell"),
        Some(Limit::None) => Finding::ok(name, "unlimited"),
        Some(Limit::Bytes(bytes)) if bytes >= FEW_LOCKED_BYTES => {
            Finding::ok(name, format!("{} GiB", bytes >> 30))
        }
        Some(Limit::Bytes(bytes)) => Finding::warn(
            name,
            format!("{} KiB: guests that this user starts cannot pin their memory", bytes >> 10),
            "raise it (LimitMEMLOCK= of a unit, memlock in /etc/security/limits.conf), or start \
             guests with 'vfioctl run' or through libvirt, which do",
        ),
    }
}

/// `CapEff` in `/proc/self/status`; none if it is not told.
fn effective_capabilities(status: &str) -> u64 {
    let bits = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    bits.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
}

fn kvm(host: &HostRoot, cpu: CpuVendor) -> Finding {
    let name = "kvm";
    match kvm::capability(host) {
        Ok(found) if !found.vfio_device => Finding::warn(
            name,
            "without its VFIO device: KVM is not told of assigned devices",
            "use a kernel with CONFIG_KVM_VFIO",
        ),
        Ok(found) if !found.irqfd => Finding::warn(
            name,
            "without irqfd: every device interrupt leaves the kernel",
            "use a kernel with CONFIG_HAVE_KVM_IRQCHIP",
        ),
        Ok(_) => Finding::ok(name, "with its VFIO device and irqfd"),
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
            Finding::warn(name, "this user may not open /dev/kvm", "add the user to group kvm")
        }
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Finding::fail(name, "/dev/kvm is not there", kvm_remedy(cpu))
        }
        Err(error) => Finding::fail(name, error.to_string(), kvm_remedy(cpu)),
    }
}

fn kvm_remedy(cpu: CpuVendor) -> &'static str {
    match cpu {
        CpuVendor::Intel => "enable VT-x in the firmware and load the module (modprobe kvm_intel)",
        CpuVendor::Amd => {
            "enable AMD-V (SVM) in the firmware and load the module (modprobe kvm_amd)"
        }
        CpuVendor::Other => "use a kernel with CONFIG_KVM, started at the hypervisor's level",
    }
}

#[cfg(test)]
mod tests;
