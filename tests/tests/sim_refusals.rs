//! What planning refuses on hosts that cannot, or should not, give a device away.

use std::collections::BTreeMap;

use libvfio::address::PciAddress;
use libvfio::error::ErrorKind;
use libvfio::inventory::Inventory;
use libvfio::plan::{self, Circumstances, Claim, Refusal, Request};
use libvfio::protection;
use vfiod_tests::sim::{Described, HGX8, Sim, WORKSTATION};

/// The GPU of the workstation.
const GPU: &str = "01:00.0";

fn at(address: &str) -> PciAddress {
    address.parse().unwrap()
}

/// What the host does with any of its functions.
fn uses(sim: &Sim, inventory: &Inventory) -> Vec<protection::Use> {
    let all = inventory.functions().map(|f| f.address).collect();
    protection::uses(&sim.host(), &all).unwrap()
}

/// Why attaching `device` is refused on the host `text` describes.
fn refusal(text: &str, device: &str, claims: BTreeMap<PciAddress, Claim>) -> Refusal {
    let sim = Sim::mount(&Described::parse(text).unwrap()).unwrap();
    let inventory = Inventory::scan(&sim.host()).unwrap();
    let circumstances =
        Circumstances { claims, uses: uses(&sim, &inventory), ..Circumstances::default() };
    let request = Request { devices: vec![at(device)], ..Request::default() };
    plan::attach(&inventory, &circumstances, &request).unwrap_err()
}

fn assert_refused(refusal: &Refusal, kind: ErrorKind, words: &[&str]) {
    assert_eq!(refusal.kind(), kind, "{refusal}");
    for word in words {
        assert!(refusal.to_string().contains(word), "{word} is not in\n{refusal}");
    }
}

#[test]
fn without_an_iommu_the_option_of_this_cpu_is_named() {
    let none = WORKSTATION.replace(r#"iommus = ["dmar0", "dmar1"]"#, "iommus = []");
    assert_ne!(none, WORKSTATION);
    let intel = refusal(&none, GPU, BTreeMap::new());
    assert_refused(&intel, ErrorKind::NotViable, &["no IOMMU", "intel_iommu=on"]);
    let amd = none.replace("GenuineIntel", "AuthenticAMD");
    let amd = refusal(&amd, GPU, BTreeMap::new());
    assert_refused(&amd, ErrorKind::NotViable, &["AMD-Vi", "amd_iommu=off"]);
    assert!(!amd.to_string().contains("intel_iommu"));
}

#[test]
fn without_vfio_pci_the_package_is_named() {
    let driver = "[[driver]]\nname = \"vfio-pci\"\nvfio = true\n";
    let without = WORKSTATION.replace(driver, "");
    assert_ne!(without, WORKSTATION);
    let refusal = refusal(&without, GPU, BTreeMap::new());
    assert_refused(&refusal, ErrorKind::Unsupported, &["linux-modules-extra", "CONFIG_VFIO_PCI"]);
}

#[test]
fn bridges_are_never_given() {
    let host_bridge = refusal(WORKSTATION, "00:00.0", BTreeMap::new());
    assert_refused(&host_bridge, ErrorKind::Unsupported, &["bridge", "device behind it"]);
}

#[test]
fn a_physical_function_with_virtual_ones_is_busy() {
    let refusal = refusal(HGX8, "14:00.0", BTreeMap::new());
    assert_refused(&refusal, ErrorKind::Busy, &["virtual functions enabled", "vf set"]);
}

#[test]
fn one_leased_function_holds_its_whole_device() {
    let claim =
        Claim { lease: "3f9a2c81".into(), tenant: "alice".into(), wedged: false, task: None };
    let refusal = refusal(WORKSTATION, GPU, BTreeMap::from([(at("01:00.1"), claim)]));
    assert_refused(&refusal, ErrorKind::AlreadyLeased, &["0000:01:00.1", "alice", "3f9a2c81"]);
}

#[test]
fn what_the_host_cannot_live_without_takes_an_option_and_says_what_is_lost() {
    let sim = Sim::mount(&Described::parse(WORKSTATION).unwrap()).unwrap();
    let inventory = Inventory::scan(&sim.host()).unwrap();
    let circumstances = Circumstances { uses: uses(&sim, &inventory), ..Circumstances::default() };
    let mut request = Request { devices: vec![at("02:00.0")], ..Request::default() };
    let refusal = plan::attach(&inventory, &circumstances, &request).unwrap_err();
    let words = ["mounted on /", "swap", "--allow-protected"];
    assert_refused(&refusal, ErrorKind::Protected, &words);
    request.allow_protected = true;
    let plan = plan::attach(&inventory, &circumstances, &request).unwrap();
    let warnings = plan.warnings.join("\n");
    assert!(warnings.contains("mounted on /") && warnings.contains("swap"), "{warnings}");
}
