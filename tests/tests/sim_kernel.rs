//! The simulated kernel against our own library and the real `lspci`: what they read there must be
//! what the described host says, and must change as on a real kernel.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Duration;

use libvfio::address::PciAddress;
use libvfio::error::ErrorKind;
use libvfio::host::HostRoot;
use libvfio::inventory::Inventory;
use libvfio::iommu::Sharing;
use libvfio::pci::{Binding, Sriov};
use libvfio::plan::{self, Circumstances, Plan, Request};
use libvfio::protection;
use libvfio::step::{Outcome, Step};
use nix::errno::Errno;
use vfiod_tests::sim::{
    Action, Described, Effect, Fault, HGX8, Operation, SCALE, Sim, WORKSTATION,
};

fn mount(text: &str) -> Sim {
    Sim::mount(&Described::parse(text).unwrap()).unwrap()
}

fn at(address: &str) -> PciAddress {
    address.parse().unwrap()
}

fn host(sim: &Sim) -> HostRoot {
    HostRoot::new(sim.root())
}

fn device(sim: &Sim, address: &str) -> std::path::PathBuf {
    sim.root().join("sys/bus/pci/devices").join(at(address).to_string())
}

fn write(path: &Path, text: &str) -> Result<(), Errno> {
    fs::write(path, text).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap()))
}

fn attach(sim: &Sim, devices: &[&str]) -> Plan {
    let inventory = Inventory::scan(&host(sim)).unwrap();
    let circumstances =
        Circumstances { uses: protection::uses(&host(sim)).unwrap(), ..Circumstances::default() };
    let devices = devices.iter().map(|device| at(device)).collect();
    let request = Request { devices, ..Request::default() };
    plan::attach(&inventory, &circumstances, &request).unwrap()
}

fn bindings(sim: &Sim) -> BTreeMap<PciAddress, Binding> {
    let inventory = Inventory::scan(&host(sim)).unwrap();
    inventory.functions().map(|f| (f.address, f.binding())).collect()
}

#[test]
fn every_host_is_read_without_a_problem() {
    for (text, functions, groups) in [(WORKSTATION, 12, 10), (HGX8, 83, 81)] {
        let sim = mount(text);
        let inventory = Inventory::scan(&host(&sim)).unwrap();
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
    let inventory = Inventory::scan(&host(&sim)).unwrap();
    assert_eq!(inventory.functions().len(), 10_000);
    assert_eq!(inventory.groups().len(), 10_000);
    assert!(inventory.functions().all(|function| function.problems.is_empty()));
    assert_eq!(Described::scaled(100).unwrap().functions.len(), 4);
}

#[test]
fn an_inventory_knows_what_was_described() {
    let sim = mount(HGX8);
    let inventory = Inventory::scan(&host(&sim)).unwrap();
    let gpu = inventory.get(at("13:00.0")).unwrap();
    assert_eq!(inventory.describe(gpu), "NVIDIA Corporation GH100[H100 SXM5 80GB]");
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
        let inventory = Inventory::scan(&host(&sim)).unwrap();
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
    let host = host(&sim);
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
fn a_vf_gets_its_variant_driver_and_comes_back_without_autoprobe() {
    let sim = mount(HGX8);
    write(&device(&sim, "14:00.0").join("sriov_drivers_autoprobe"), "0").unwrap();
    let before = bindings(&sim);
    let plan = attach(&sim, &["14:00.1"]);
    for step in &plan.steps {
        step.execute(&host(&sim)).unwrap();
    }
    let driver = Binding::read(&host(&sim), at("14:00.1")).unwrap().driver;
    assert_eq!(driver.as_deref(), Some("mlx5_vfio_pci"));
    for step in plan::undo(plan.steps.iter()) {
        step.execute(&host(&sim)).unwrap();
    }
    assert_eq!(bindings(&sim), before);
}

#[test]
fn what_the_host_lives_on_is_protected() {
    let sim = mount(WORKSTATION);
    let uses = protection::uses(&host(&sim)).unwrap();
    let protected = |address| uses.iter().any(|u| u.function == at(address) && u.protected);
    assert!(protected("02:00.0"), "root and swap");
    assert!(protected("06:00.0"), "default route");
    assert!(!protected("01:00.0"), "the spare GPU");
    // The interface goes with its driver, and the route with the interface.
    write(&device(&sim, "06:00.0").join("driver/unbind"), "0000:06:00.0").unwrap();
    let uses = protection::uses(&host(&sim)).unwrap();
    assert!(uses.iter().all(|u| u.function != at("06:00.0")));
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
    let fails = |step: &Step| step.execute(&host(&sim)).unwrap_err();

    arm(Operation::Unbind, Effect::Errno(Errno::EIO));
    assert!(fails(&unbind).to_string().contains("EIO"));
    arm(Operation::Unbind, Effect::SucceedWithoutEffect);
    assert!(fails(&unbind).to_string().contains("nvidia found"));
    unbind.execute(&host(&sim)).unwrap();
    set.execute(&host(&sim)).unwrap();
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
fn the_second_time_is_not_the_first() {
    let sim = mount(WORKSTATION);
    let file = device(&sim, "01:00.0").join("driver_override");
    let effect = Effect::Errno(Errno::ENOMEM);
    sim.arm(Fault { on: Operation::Override, device: None, nth: 2, effect });
    assert_eq!(write(&file, "a"), Ok(()));
    assert_eq!(write(&file, "b"), Err(Errno::ENOMEM));
    assert_eq!(write(&file, "c"), Ok(()));
    let journal = sim.journal();
    let seen: Vec<_> = journal.iter().map(|w| (w.value.as_str(), w.result)).collect();
    let expected = [("a", Some(Ok(()))), ("b", Some(Err(Errno::ENOMEM))), ("c", Some(Ok(())))];
    assert_eq!(seen, expected);
}

#[test]
fn a_blocked_write_blocks_nobody_else_and_ends_with_the_simulation() {
    let sim = mount(WORKSTATION);
    let drivers = sim.root().join("sys/bus/pci/drivers");
    let unbind = drivers.join("nvidia/unbind");
    let effect = Effect::BlockForever;
    sim.arm(Fault { on: Operation::Unbind, device: Some(at("01:00.0")), nth: 1, effect });
    let (tell, told) = channel();
    let blocked = unbind.clone();
    let writer = std::thread::spawn(move || tell.send(write(&blocked, "0000:01:00.0")).unwrap());
    while sim.journal().iter().all(|written| written.result.is_some()) {
        std::thread::sleep(Duration::from_millis(1));
    }
    // The very same file, and everything else, goes on.
    assert_eq!(write(&unbind, "0000:06:00.0"), Err(Errno::ENODEV));
    assert_eq!(write(&drivers.join("igc/unbind"), "0000:06:00.0"), Ok(()));
    assert!(told.recv_timeout(Duration::from_millis(50)).is_err());
    drop(sim);
    assert_eq!(told.recv_timeout(Duration::from_secs(5)), Ok(Err(Errno::EIO)));
    writer.join().unwrap();
}

#[test]
fn a_group_held_open_is_let_go_when_it_is_closed() {
    let sim = mount(WORKSTATION);
    let plan = attach(&sim, &["01:00.0"]);
    for step in &plan.steps {
        step.execute(&host(&sim)).unwrap();
    }
    let node = sim.root().join(format!("dev/vfio/{}", plan.groups[0]));
    let held = fs::File::open(&node).unwrap();
    let again = fs::File::open(&node).unwrap_err();
    assert_eq!(again.raw_os_error(), Some(Errno::EBUSY as i32));
    let holders = libvfio::holders::of_group(&host(&sim), plan.groups[0], &[]).unwrap();
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
fn vfs_come_and_go_by_the_rules() {
    let sim = mount(HGX8);
    let pf = device(&sim, "94:00.0");
    let numvfs = |count: &str| write(&pf.join("sriov_numvfs"), count);
    assert_eq!(numvfs("17"), Err(Errno::ERANGE));
    assert_eq!(numvfs("many"), Err(Errno::EINVAL));
    write(&pf.join("sriov_drivers_autoprobe"), "0").unwrap();
    sim.events();
    assert_eq!(numvfs("3"), Ok(()));
    let added = sim.events();
    assert!(added.iter().all(|event| event.action == Action::Add && event.subsystem == "pci"));
    assert_eq!(added.len(), 3);
    assert_eq!(numvfs("3"), Ok(()));
    assert_eq!(numvfs("2"), Err(Errno::EBUSY));
    let inventory = Inventory::scan(&host(&sim)).unwrap();
    let vfs = inventory.virtual_functions(at("94:00.0"));
    assert_eq!(vfs, [(0, at("94:00.1")), (1, at("94:00.2")), (2, at("94:00.3"))]);
    assert!(vfs.iter().all(|(_, vf)| inventory.get(*vf).unwrap().driver.is_none()));
    assert!(matches!(
        inventory.get(at("94:00.0")).unwrap().sriov,
        Sriov::Physical { total: 16, enabled: 3, autoprobe: false, offset: 1, stride: 1 }
    ));
    // A VF whose PF has autoprobe off takes no driver without an override.
    let bind = sim.root().join("sys/bus/pci/drivers/mlx5_core/bind");
    assert_eq!(write(&bind, "0000:94:00.1"), Err(Errno::ENODEV));
    write(&device(&sim, "94:00.1").join("driver_override"), "mlx5_core").unwrap();
    assert_eq!(write(&bind, "0000:94:00.1"), Ok(()));
    assert_eq!(write(&bind, "0000:94:00.1"), Err(Errno::EBUSY));
    // Neither the nvidia driver nor none at all enables VFs.
    assert_eq!(write(&device(&sim, "93:00.0").join("sriov_numvfs"), "1"), Err(Errno::ENOENT));
    assert_eq!(numvfs("0"), Ok(()));
    assert!(!device(&sim, "94:00.1").exists());
    write(&pf.join("driver/unbind"), "0000:94:00.0").unwrap();
    assert_eq!(numvfs("1"), Err(Errno::ENOENT));
}

#[test]
fn a_pf_with_vfs_is_refused_by_vfio() {
    let sim = mount(HGX8);
    let bind = sim.root().join("sys/bus/pci/drivers/vfio-pci/bind");
    let pf = device(&sim, "14:00.0");
    write(&pf.join("driver_override"), "vfio-pci").unwrap();
    assert_eq!(write(&bind, "0000:14:00.0"), Err(Errno::EBUSY));
    // Its driver takes the VFs along.
    write(&pf.join("driver/unbind"), "0000:14:00.0").unwrap();
    assert!(!device(&sim, "14:00.1").exists());
    assert_eq!(write(&bind, "0000:14:00.0"), Ok(()));
}

#[test]
fn binding_follows_tables_and_overrides() {
    let sim = mount(WORKSTATION);
    let drivers = sim.root().join("sys/bus/pci/drivers");
    let gpu = device(&sim, "01:00.0");
    let shown = |name: &str| fs::read_to_string(gpu.join(name)).unwrap();
    let address = "0000:01:00.0";
    assert_eq!(shown("driver_override"), "(null)\n");
    assert_eq!(write(&drivers.join("vfio-pci/bind"), address), Err(Errno::ENODEV));
    assert_eq!(write(&drivers.join("igc/unbind"), address), Err(Errno::ENODEV));
    assert_eq!(write(&gpu.join("driver_override"), "vfio-pci\n"), Ok(()));
    assert_eq!(shown("driver_override"), "vfio-pci\n");
    assert_eq!(write(&drivers.join("vfio-pci/bind"), address), Err(Errno::EBUSY));
    assert_eq!(write(&drivers.join("nvidia/unbind"), address), Ok(()));
    // An override admits its driver alone, and a probe that finds none succeeds.
    assert_eq!(write(&drivers.join("nvidia/bind"), address), Err(Errno::ENODEV));
    write(&gpu.join("driver_override"), "no-such-driver").unwrap();
    let probe = sim.root().join("sys/bus/pci/drivers_probe");
    assert_eq!(write(&probe, address), Ok(()));
    assert!(!gpu.join("driver").exists());
    assert_eq!(write(&gpu.join("driver_override"), "\n"), Ok(()));
    assert_eq!(shown("driver_override"), "(null)\n");
    assert_eq!(write(&gpu.join("driver_override"), &"x".repeat(4095)), Err(Errno::EINVAL));
    assert_eq!(write(&probe, address), Ok(()));
    assert!(shown("uevent").starts_with("DRIVER=nvidia\n"));
    assert_eq!(write(&probe, "0000:77:00.0"), Err(Errno::ENODEV));
}

#[test]
fn cards_in_use_keep_their_lock() {
    let text = WORKSTATION.replace(r#"board = "10de:16f1""#, "board = \"10de:16f1\"\nusers = 1");
    let sim = mount(&text);
    let lock = Step::UnbindLock { device: at("01:00.0") };
    let refused = lock.execute(&host(&sim)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    let sim = mount(WORKSTATION);
    assert_eq!(lock.execute(&host(&sim)).unwrap(), Outcome::Done);
    assert_eq!(lock.execute(&host(&sim)).unwrap(), Outcome::AlreadySo);
}

#[test]
fn functions_come_and_go() {
    let sim = mount(HGX8);
    let mut inventory = Inventory::scan(&host(&sim)).unwrap();
    let gpu = at("13:00.0");
    sim.unplug(gpu).unwrap();
    inventory.refresh(&host(&sim), gpu);
    assert!(inventory.get(gpu).is_none());
    assert_eq!(sim.unplug(gpu), Err(Errno::ENODEV));
    sim.events();
    sim.plug(gpu).unwrap();
    let actions: Vec<Action> = sim.events().iter().map(|event| event.action).collect();
    assert_eq!(actions, [Action::Add, Action::Bind]);
    inventory.refresh(&host(&sim), gpu);
    assert_eq!(inventory.get(gpu).unwrap().driver.as_deref(), Some("nvidia"));
    // A port goes with all that is below it, and a rescan brings it back.
    let all = inventory.functions().len();
    write(&device(&sim, "14:00.0").join("sriov_numvfs"), "0").unwrap();
    write(&device(&sim, "11:00.0").join("remove"), "1").unwrap();
    assert_eq!(Inventory::scan(&host(&sim)).unwrap().functions().len(), all - 4 - 5);
    write(&sim.root().join("sys/bus/pci/rescan"), "1").unwrap();
    assert_eq!(Inventory::scan(&host(&sim)).unwrap().functions().len(), all);
}

#[test]
fn an_unprivileged_reader_sees_a_header_only() {
    let sim = mount(WORKSTATION);
    let config = device(&sim, "01:00.0").join("config");
    let bytes = |program: &mut Command| {
        let output = program.arg(&config).output().expect("cat and setpriv are parts of Debian");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout.len()
    };
    assert_eq!(bytes(&mut Command::new("cat")), 4096);
    // The temporary directory is its owner's alone, as it should be.
    fs::set_permissions(sim.root(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "cat"];
    assert_eq!(bytes(Command::new("setpriv").args(nobody)), 64);
}

#[test]
fn unknown_keys_and_doubled_functions_are_errors() {
    let unknown = WORKSTATION.replacen("acs = true", "acs = true\nasc = true", 1);
    let error = Described::parse(&unknown).unwrap_err().to_string();
    assert!(error.contains("unknown field `asc`"), "{error}");
    let doubled = WORKSTATION.replacen(r#""0000:00:1f.3""#, r#""0000:00:1f.0""#, 1);
    let error = Described::parse(&doubled).unwrap_err().to_string();
    assert!(error.contains("0000:00:1f.0 is described twice"), "{error}");
}

#[test]
fn a_panic_leaves_no_mount_behind() {
    let sim = mount(WORKSTATION);
    let root = sim.root().to_owned();
    let open = fs::File::open(root.join("sys")).unwrap();
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let panicked = std::thread::spawn(move || {
        let _sim = sim;
        panic!("as a failing test would");
    });
    assert!(panicked.join().is_err());
    std::panic::set_hook(hook);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(root.to_str().unwrap()));
    assert!(!root.exists());
    drop(open);
}
