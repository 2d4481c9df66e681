use std::fs;
use std::path::Path;

use super::*;

/// A host of the given files.
fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, HostRoot) {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let host = HostRoot::new(dir.path());
    (dir, host)
}

fn found(host: &HostRoot, name: &str) -> Finding {
    check(host).into_iter().find(|finding| finding.name == name).unwrap()
}

const INTEL: (&str, &str) = ("proc/cpuinfo", "vendor_id\t: GenuineIntel\n");
const READY: [(&str, &str); 11] = [
    INTEL,
    ("proc/cmdline", "root=/dev/vda intel_iommu=on iommu=pt\n"),
    ("proc/interrupts", "  0:  36   IR-IO-APIC   2-edge      timer\n"),
    ("proc/sys/kernel/osrelease", "6.12.1\n"),
    (
        "proc/self/limits",
        "Limit  Soft  Hard  Units\nMax locked memory   8388608   8388608   bytes\n",
    ),
    ("proc/self/status", "Name:\tvfioctl\nCapEff:\t0000000000004000\n"),
    ("sys/class/iommu/dmar0/uevent", ""),
    ("sys/kernel/iommu_groups/0/type", "DMA\n"),
    ("sys/bus/pci/drivers/vfio-pci/bind", ""),
    ("lib/modules/6.12.1/modules.builtin", "kernel/drivers/vfio/vfio.ko\n"),
    ("dev/vfio/vfio", ""),
];

#[test]
fn a_ready_host_fails_in_nothing_but_the_kvm_no_description_has() {
    let (_dir, host) = host(&READY);
    let bad: Vec<Finding> = check(&host).into_iter().filter(|f| f.verdict > Verdict::Ok).collect();
    assert_eq!(bad.iter().map(|f| f.name).collect::<Vec<_>>(), ["kvm"], "{bad:?}");
    assert!(bad[0].remedy.as_deref().unwrap().contains("kvm_intel"));
    assert_eq!(found(&host, "iommu").detail, "dmar0, 1 groups");
    assert_eq!(found(&host, "kernel-options").detail, "intel_iommu=on iommu=pt");
}

#[test]
fn an_empty_host_fails_with_the_remedy_of_its_cpu() {
    let (_dir, host) = host(&[INTEL]);
    for name in ["iommu", "vfio", "vfio-pci", "kvm"] {
        assert_eq!(found(&host, name).verdict, Verdict::Fail, "{name}");
    }
    assert!(found(&host, "iommu").remedy.unwrap().contains("intel_iommu=on"));
    assert!(found(&host, "vfio-pci").remedy.unwrap().contains("CONFIG_VFIO_PCI=m"));
    assert!(check(&host).iter().all(|finding| finding.name != "isolation"));
}

#[test]
fn whatever_is_worse_than_ok_has_a_remedy() {
    for files in [&READY[..], &READY[..2], &[INTEL], &[]] {
        let (_dir, host) = host(files);
        for finding in check(&host) {
            assert_eq!(finding.remedy.is_some(), finding.verdict > Verdict::Ok, "{finding:?}");
        }
    }
}

#[test]
fn an_iommu_without_groups_is_not_in_use() {
    let (dir, host) = host(&READY);
    fs::remove_dir_all(dir.path().join("sys/kernel/iommu_groups/0")).unwrap();
    assert_eq!(found(&host, "iommu").verdict, Verdict::Fail);
}

#[test]
fn modules_that_are_there_but_not_loaded_are_enough() {
    let (dir, host) = host(&READY);
    fs::remove_dir_all(dir.path().join("sys/bus/pci/drivers/vfio-pci")).unwrap();
    let modules = "kernel/drivers/vfio/vfio.ko:\nkernel/drivers/vfio/pci/vfio-pci.ko.xz: x.ko\n";
    fs::write(dir.path().join("lib/modules/6.12.1/modules.dep"), modules).unwrap();
    for name in ["vfio", "vfio-pci"] {
        assert_eq!(found(&host, name), Finding::ok(name, "can be loaded"));
    }
}

#[test]
fn no_iommu_mode_is_named() {
    let (_dir, host) = host(&[("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n")]);
    let iommu = found(&host, "iommu");
    assert_eq!(iommu.verdict, Verdict::Fail);
    assert!(iommu.detail.contains("no-IOMMU mode"), "{}", iommu.detail);
}

#[test]
fn options_in_the_way_are_named_and_the_worst_counts() {
    let options = kernel_options("quiet vfio-pci.ids=10de:2330 amd_iommu=off");
    assert_eq!(options.verdict, Verdict::Fail);
    assert_eq!(
        options.remedy.unwrap(),
        "remove vfio-pci.ids=10de:2330 amd_iommu=off from the kernel command line"
    );
    assert_eq!(kernel_options("pcie_acs_override=downstream").verdict, Verdict::Warn);
    assert_eq!(kernel_options("quiet").detail, "none that matter");
}

#[test]
fn a_low_limit_of_locked_memory_matters_to_users_without_the_capability() {
    let (dir, host) = host(&READY);
    let set = |path: &str, text: &str| fs::write(Path::new(dir.path()).join(path), text).unwrap();
    set("proc/self/status", "CapEff:\t0000000000000000\n");
    assert_eq!(found(&host, "memlock").verdict, Verdict::Warn);
    set("proc/self/limits", "Max locked memory   unlimited   unlimited   bytes\n");
    assert_eq!(found(&host, "memlock").verdict, Verdict::Ok);
    set("proc/self/limits", "garbage");
    assert_eq!(found(&host, "memlock").verdict, Verdict::Info);
}

#[test]
fn capabilities_are_read_whatever_the_text() {
    assert_eq!(effective_capabilities("CapEff:\tffffffffffffffff"), u64::MAX);
    assert_eq!(effective_capabilities("CapEff:\tx"), 0);
}
