//! Our library and the real `lspci` against simulated hosts: both must read there what was described,
//! and the library's steps must change it as they would a real kernel.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Duration;

use libvfio::address::PciAddress;
use libvfio::error::ErrorKind;
use libvfio::inventory::Inventory;
use libvfio::iommu::Sharing;
use libvfio::pci::Binding;
use libvfio::plan::{self, Circumstances, Plan, Request};
use libvfio::protection;
use libvfio::step::{Outcome, Step};
use nix::errno::Errno;
use vfiod_tests::sim::{Described, Effect, Fault, HGX8, Operation, SCALE, Sim, WORKSTATION};

fn mount(text: &str) -> Sim {
    Sim::mount(&Described::parse(text).unwrap()).unwrap()
}

fn at(address: &str) -> PciAddress {
    address.parse().unwrap()
}

fn device(sim: &Sim, address: &str) -> PathBuf {
    sim.function(at(address))
}

fn write(path: &Path, text: &str) -> Result<(), Errno> {
    fs::write(path, text).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap()))
}

fn attach(sim: &Sim, devices: &[&str]) -> Plan {
    let inventory = Inventory::scan(&sim.host()).unwrap();
    let circumstances = Circumstances { uses: uses(sim, &inventory), ..Circumstances::default() };
    let devices = devices.iter().map(|device| at(device)).collect();
    let request = Request { devices, ..Request::default() };
    plan::attach(&inventory, &circumstances, &request).unwrap()
}

/// What the host does with any of its functions.
fn uses(sim: &Sim, inventory: &Inventory) -> Vec<protection::Use> {
    let all = inventory.functions().map(|f| f.address).collect();
    protection::uses(&sim.host(), &all).unwrap()
}

fn bindings(sim: &Sim) -> BTreeMap<PciAddress, Binding> {
    let inventory = Inventory::scan(&sim.host()).unwrap();
    inventory.functions().map(|f| (f.address, f.binding())).collect()
}

#[test]
fn every_host_is_read_without_a_problem() {
    for (text, functions, groups) in [(WORKSTATION, 12, 10), (HGX8, 83, 81)] {
        let sim = mount(text);
        let inventory = Inventory::scan(&sim.host()).unwrap();
        for function in inventory.functions() {
            assert_eq!(function.problems, Vec::<String>::new(), "{}", function.address);
        }
        let counts = (inventory.functions().len(), inventory.groups().len());
        assert_eq!(counts, (functions, groups), "{}", sim.root().display());
    }
}

#[test]
fn ten_thousand_functions_are_read_without_a_problem() {
    let sim = mount(SCALE);
    let inventory = Inventory::scan(&sim.host()).unwrap();
    assert_eq!(inventory.functions().len(), 10_000);
    assert_eq!(inventory.groups().len(), 10_000);
    assert!(inventory.functions().all(|function| function.problems.is_empty()));
    assert_eq!(Described::scaled(100).unwrap().functions.len(), 4);
}

#[test]
fn an_inventory_knows_what_was_described() {
    let sim = mount(HGX8);
    let inventory = Inventory::scan(&sim.host()).unwrap();
    let gpu = inventory.get(at("13:00.0")).unwrap();
    assert_eq!(inventory.describe(gpu), "NVIDIA Corporation GH100 [H100 SXM5 80GB]");
    assert_eq!(gpu.driver.as_deref(), Some("nvidia"));
    assert_eq!(gpu.numa_node, Some(0));
    assert_eq!(gpu.upstream, ["10:01.0", "11:00.0", "12:00.0"].map(at));
    assert_eq!(gpu.bars.iter().map(|bar| bar.size >> 20).max(), Some(128 << 10));
    assert_eq!(gpu.config.serial().unwrap().to_string(), "00-48-b0-2d-ff-ff-00-00");
    assert!(gpu.config.has_flr());
    assert_eq!(inventory.get(at("c3:00.0")).unwrap().numa_node, Some(1));
    let vf = inventory.get(at("14:00.4")).unwrap();
    assert_eq!((vf.physical(), inventory.vf_index(vf)), (Some(at("14:00.0")), Some(3)));
    assert_eq!((vf.ids.vendor, vf.ids.device), (Some(0x15b3), Some(0x101e)));
    assert_eq!(vf.config.header.as_ref().unwrap().vendor, 0xffff);
    let console = inventory.group_of(at("02:00.0")).unwrap();
    assert_eq!(inventory.sharing(console), Sharing::Conventional(at("01:00.0")));
    assert_eq!(inventory.group_of(gpu.address).unwrap().members, [gpu.address]);
}

/// The names and drivers of `lspci -Dnk`, by address.
fn lspci(root: &Path) -> BTreeMap<PciAddress, (String, Option<String>)> {
    let output = Command::new("lspci")
        .args(["-Dnvmmk", "-A", "linux-sysfs", "-O"])
        .arg(format!("sysfs.path={}", root.join("sys/bus/pci").display()))
        .output()
        .expect("lspci is needed: apt-get install pciutils");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.split("\n\n").filter(|record| !record.trim().is_empty()).map(record).collect()
}

fn record(text: &str) -> (PciAddress, (String, Option<String>)) {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
        line.map(str::to_owned)
    };
    let text = |name| field(name).unwrap_or_default();
    let node = field("NUMANode").unwrap_or_else(|| "none".into());
    let group = field("IOMMUGroup").unwrap_or_else(|| "none".into());
    let told = format!(
        "{} {}:{} rev {} node {node} group {group}",
        text("Class"),
        text("Vendor"),
        text("Device"),
        field("Rev").unwrap_or_else(|| "00".into()),
    );
    (field("Slot").unwrap().parse().unwrap(), (told, field("Driver")))
}

#[test]
fn the_real_lspci_agrees_with_our_inventory() {
    for text in [WORKSTATION, HGX8] {
        let sim = mount(text);
        let inventory = Inventory::scan(&sim.host()).unwrap();
        let number = |n: Option<u32>| n.map_or_else(|| "none".into(), |n| n.to_string());
        let ours: BTreeMap<_, _> = inventory
            .functions()
            .map(|f| {
                let told = format!(
                    "{:04x} {:04x}:{:04x} rev {:02x} node {} group {}",
                    f.ids.class.unwrap() >> 8,
                    f.ids.vendor.unwrap(),
                    f.ids.device.unwrap(),
                    f.ids.revision.unwrap(),
                    number(f.numa_node),
                    number(f.iommu_group),
                );
                (f.address, (told, f.driver.clone()))
            })
            .collect();
        assert_eq!(lspci(sim.root()), ours);
    }
}

#[test]
fn the_real_lspci_finds_the_same_capabilities() {
    let sim = mount(HGX8);
    let output = Command::new("lspci")
        .args(["-vvns", "14:00.0", "-A", "linux-sysfs", "-O"])
        .arg(format!("sysfs.path={}", sim.root().join("sys/bus/pci").display()))
        .output()
        .expect("lspci is needed: apt-get install pciutils");
    let text = String::from_utf8(output.stdout).unwrap();
    for expected in [
        "Express (v2) Endpoint, MSI 00",
        "LnkSta:\tSpeed 32GT/s, Width x16",
        "MSI-X: Enable- Count=64",
        "Device Serial Number 94-6d-ae-03-00-ff-00-00",
        "Single Root I/O Virtualization (SR-IOV)",
        "Total VFs: 16, Number of VFs: 4",
        "VF offset: 1, stride: 1, Device ID: 101e",
        "FLReset+",
        "[size=32M]",
    ] {
        assert!(text.contains(expected), "{expected} is not in\n{text}");
    }
}

#[test]
fn a_gpu_goes_to_a_guest_and_comes_back() {
    let sim = mount(WORKSTATION);
    let host = sim.host();
    let before = bindings(&sim);
    let plan = attach(&sim, &["01:00.0"]);
    assert_eq!(plan.devices.keys().copied().collect::<Vec<_>>(), ["01:00.0", "01:00.1"].map(at));
    for step in &plan.steps {
        assert_eq!(step.execute(&host).unwrap(), Outcome::Done, "{step}");
    }
    let inventory = Inventory::scan(&host).unwrap();
    for address in plan.devices.keys() {
        assert!(inventory.get(*address).unwrap().on_vfio(), "{address}");
    }
    assert!(host.path(format!("dev/vfio/{}", plan.groups[0])).exists());
    for step in plan::undo(plan.steps.iter()) {
        assert_eq!(step.execute(&host).unwrap(), Outcome::Done, "{step}");
    }
    assert_eq!(bindings(&sim), before);
    assert!(!host.path(format!("dev/vfio/{}", plan.groups[0])).exists());
}

#[test]
fn a_vf_gets_its_variant_driver_and_comes_back_whenever_autoprobe_was_turned_off() {
    for (there, back) in [("0", "0"), ("1", "0"), ("0", "1")] {
        let sim = mount(HGX8);
        let autoprobe = device(&sim, "14:00.0").join("sriov_drivers_autoprobe");
        write(&autoprobe, there).unwrap();
        let before = bindings(&sim);
        let plan = attach(&sim, &["14:00.1"]);
        for step in &plan.steps {
            step.execute(&sim.host()).unwrap();
        }
        let driver = Binding::read(&sim.host(), at("14:00.1")).unwrap().driver;
        assert_eq!(driver.as_deref(), Some("mlx5_vfio_pci"));
        write(&autoprobe, back).unwrap();
        for step in plan::undo(plan.steps.iter()) {
            step.execute(&sim.host()).unwrap();
        }
        assert_eq!(bindings(&sim), before);
    }
}

#[test]
fn what_the_host_lives_on_is_protected() {
    let sim = mount(WORKSTATION);
    let inventory = Inventory::scan(&sim.host()).unwrap();
    let found = uses(&sim, &inventory);
    let protected = |address| found.iter().any(|u| u.function == at(address) && u.is_protected());
    assert!(protected("02:00.0"), "root and swap");
    assert!(protected("06:00.0"), "default route");
    assert!(!protected("01:00.0"), "the spare GPU");
    // The interface goes with its driver, and the route with the interface.
    write(&device(&sim, "06:00.0").join("driver/unbind"), "0000:06:00.0").unwrap();
    let found = uses(&sim, &inventory);
    assert!(found.iter().all(|u| u.function != at("06:00.0")));
}

#[test]
fn steps_report_what_a_fault_did() {
    let sim = mount(WORKSTATION);
    let gpu = at("01:00.0");
    let bind = Step::Bind { device: gpu, driver: "vfio-pci".into() };
    let unbind = Step::Unbind { device: gpu, driver: "nvidia".into() };
    let to = Some("vfio-pci".to_owned());
    let set = Step::SetOverride { device: gpu, from: None, to };
    let arm = |on, effect| sim.arm(Fault { on, device: Some(gpu), nth: 1, effect });
    let fails = |step: &Step| step.execute(&sim.host()).unwrap_err();

    arm(Operation::Unbind, Effect::Errno(Errno::EIO));
    assert!(fails(&unbind).to_string().contains("EIO"));
    arm(Operation::Unbind, Effect::SucceedWithoutEffect);
    assert!(fails(&unbind).to_string().contains("nvidia found"));
    unbind.execute(&sim.host()).unwrap();
    set.execute(&sim.host()).unwrap();
    arm(Operation::Bind, Effect::Errno(Errno::EBUSY));
    assert_eq!(fails(&bind).kind(), ErrorKind::Busy);
    arm(Operation::Bind, Effect::BindOther("nvidia".into()));
    assert!(fails(&bind).to_string().contains("nvidia found"));
    arm(Operation::Override, Effect::Vanish);
    let clear = set.inverse().unwrap();
    assert!(fails(&clear).to_string().contains("ENODEV"));
    assert!(!device(&sim, "01:00.0").exists());
}

#[test]
fn a_group_held_open_is_let_go_when_it_is_closed() {
    let sim = mount(WORKSTATION);
    let plan = attach(&sim, &["01:00.0"]);
    for step in &plan.steps {
        step.execute(&sim.host()).unwrap();
    }
    let node = sim.root().join(format!("dev/vfio/{}", plan.groups[0]));
    let held = fs::File::open(&node).unwrap();
    let again = fs::File::open(&node).unwrap_err();
    assert_eq!(again.raw_os_error(), Some(Errno::EBUSY as i32));
    let holders = libvfio::holders::of_group(&sim.host(), plan.groups[0], &[]).unwrap();
    assert_eq!(holders.iter().map(|h| h.pid).collect::<Vec<_>>(), [std::process::id()]);
    let (tell, told) = channel();
    let unbind = device(&sim, "01:00.0").join("driver/unbind");
    let writer = std::thread::spawn(move || tell.send(write(&unbind, "0000:01:00.0")).unwrap());
    assert!(told.recv_timeout(Duration::from_millis(50)).is_err());
    drop(held);
    assert_eq!(told.recv_timeout(Duration::from_secs(5)), Ok(Ok(())));
    writer.join().unwrap();
}

#[test]
fn cards_in_use_keep_their_lock() {
    let text = WORKSTATION.replace(r#"board = "10de:16f1""#, "board = \"10de:16f1\"\nusers = 1");
    let sim = mount(&text);
    let lock = Step::UnbindLock { device: at("01:00.0") };
    let refused = lock.execute(&sim.host()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    let sim = mount(WORKSTATION);
    assert_eq!(lock.execute(&sim.host()).unwrap(), Outcome::Done);
    assert_eq!(lock.execute(&sim.host()).unwrap(), Outcome::AlreadySo);
}

/// As on a real H100 with the ordinary driver, which has no `unbindLock`.
#[test]
fn where_the_driver_has_no_lock_nobody_may_use_the_card() {
    let sim = mount(HGX8);
    let lock = |device: &str| Step::UnbindLock { device: at(device) }.execute(&sim.host());
    assert_eq!(lock("13:00.0").unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(lock("23:00.0").unwrap(), Outcome::Done);
}
