//! The simulated kernel's own rules: what the real one answers to each write, who waits for whom,
//! and that nothing of it is left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Duration;

use libvfio::address::PciAddress;
use libvfio::inventory::Inventory;
use libvfio::pci::Sriov;
use libvfio::step::{Outcome, Step};
use nix::errno::Errno;
use vfiod_tests::sim::{Action, Described, Effect, Fault, HGX8, Operation, Sim, WORKSTATION};

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

/// Every name in every directory is there, no link dangles, and every file that everybody may read
/// can be read.
fn walk(directory: &Path) -> usize {
    let mut seen = 0;
    let entries = fs::read_dir(directory);
    for entry in entries.unwrap_or_else(|e| panic!("{}: {e}", directory.display())) {
        let entry = entry.unwrap();
        let path = entry.path();
        let kind =
            fs::symlink_metadata(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(entry.file_type().unwrap(), kind.file_type(), "{}", path.display());
        if kind.is_symlink() {
            assert!(path.exists() || path.parent().unwrap().ends_with("fd"), "{}", path.display());
        } else if kind.is_dir() {
            seen += walk(&path);
        } else if kind.permissions().mode() & 0o044 != 0 {
            fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
        seen += 1;
    }
    seen
}

#[test]
fn the_tree_holds_together() {
    for text in [WORKSTATION, HGX8] {
        let sim = mount(text);
        let functions = sim.root().join("sys/bus/pci/devices");
        for function in fs::read_dir(&functions).unwrap() {
            let file = function.unwrap().path().join("driver_override");
            write(&file, "vfio-pci").unwrap();
        }
        // With some on VFIO, so that what only they have is seen too.
        for address in ["0000:01:00.1", "0000:14:00.2", "0000:23:00.0"] {
            let function = functions.join(address);
            if function.exists() {
                write(&function.join("driver/unbind"), address).unwrap();
                write(&sim.root().join("sys/bus/pci/drivers_probe"), address).unwrap();
            }
        }
        assert!(fs::read_dir(sim.root().join("dev/vfio")).unwrap().count() > 1);
        assert!(walk(sim.root()) > 300);
    }
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
fn any_number_of_blocked_reads_blocks_nobody_else() {
    let sim = mount(WORKSTATION);
    let (tell, told) = channel();
    let readers = ["00:14.0", "01:00.0", "02:00.0", "06:00.0"].map(|address| {
        let effect = Effect::BlockForever;
        sim.arm(Fault { on: Operation::Read, device: Some(at(address)), nth: 1, effect });
        let (tell, file) = (tell.clone(), device(&sim, address).join("vendor"));
        std::thread::spawn(move || tell.send(fs::read(file).unwrap_err().raw_os_error()).unwrap())
    });
    assert!(told.recv_timeout(Duration::from_millis(100)).is_err());
    assert_eq!(fs::read(device(&sim, "00:00.0").join("vendor")).unwrap(), b"0x8086\n");
    drop(sim);
    for reader in readers {
        assert_eq!(told.recv_timeout(Duration::from_secs(5)), Ok(Some(Errno::EIO as i32)));
        reader.join().unwrap();
    }
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
    let inventory = Inventory::scan(&sim.host()).unwrap();
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
fn functions_come_and_go() {
    let sim = mount(HGX8);
    let mut inventory = Inventory::scan(&sim.host()).unwrap();
    let gpu = at("23:00.0");
    sim.unplug(gpu).unwrap();
    inventory.refresh(&sim.host(), gpu);
    assert!(inventory.get(gpu).is_none());
    assert_eq!(sim.unplug(gpu), Err(Errno::ENODEV));
    sim.events();
    sim.plug(gpu).unwrap();
    let actions: Vec<Action> = sim.events().iter().map(|event| event.action).collect();
    assert_eq!(actions, [Action::Add, Action::Bind]);
    inventory.refresh(&sim.host(), gpu);
    assert_eq!(inventory.get(gpu).unwrap().driver.as_deref(), Some("nvidia"));
    // A port goes with all that is below it, and a rescan brings it back.
    let all = inventory.functions().len();
    write(&device(&sim, "24:00.0").join("sriov_numvfs"), "0").unwrap();
    write(&device(&sim, "21:00.0").join("remove"), "1").unwrap();
    assert_eq!(Inventory::scan(&sim.host()).unwrap().functions().len(), all - 4 - 5);
    write(&sim.root().join("sys/bus/pci/rescan"), "1").unwrap();
    assert_eq!(Inventory::scan(&sim.host()).unwrap().functions().len(), all);
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
    fs::set_permissions(sim.root(), fs::Permissions::from_mode(0o755)).unwrap();
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

#[test]
fn modules_load_by_a_file_that_no_kernel_has() {
    let text = WORKSTATION.replace(
        "name = \"vfio-pci\"\nvfio = true",
        "name = \"vfio-pci\"\nvfio = true\nloaded = false",
    );
    let sim = mount(&text);
    assert_eq!(sim.host().simulated().as_deref(), Some("workstation"));
    let driver = sim.root().join("sys/bus/pci/drivers/vfio-pci");
    let step = |module: &str| Step::LoadModule { module: module.into() }.execute(&sim.host());
    assert!(!driver.exists());
    assert_eq!(step("vfio_pci").unwrap(), Outcome::Done);
    assert!(driver.exists());
    assert_eq!(step("vfio_pci").unwrap(), Outcome::AlreadySo);
    assert!(step("no_such_module").is_err());
}

#[test]
fn a_subscriber_gets_each_event_when_it_happens() {
    let sim = mount(WORKSTATION);
    let events = sim.subscribe();
    let gpu = "0000:01:00.0";
    write(&sim.root().join("sys/bus/pci/drivers/nvidia/unbind"), gpu).unwrap();
    let event = events.try_recv().expect("the event is later than the write");
    assert_eq!(event.action, Action::Unbind);
    assert!(event.path.ends_with(gpu), "{}", event.path);
    assert!(sim.events().is_empty());
    drop(sim);
    assert!(events.recv().is_err());
}
