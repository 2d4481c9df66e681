//! Hosts whose files are missing, cut short or full of nonsense: what is known is listed, what is
//! not is said, and nothing else suffers. Works in a temporary directory.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use libvfio::host::HostRoot;
use libvfio::inventory::Inventory;

/// A function at `address` on the root bus with these files.
fn function(root: &Path, address: &str, files: &[(&str, &[u8])]) {
    let device = root.join("sys/devices/pci0000:00").join(address);
    fs::create_dir_all(&device).unwrap();
    for (name, bytes) in files {
        fs::write(device.join(name), bytes).unwrap();
    }
    let bus = root.join("sys/bus/pci/devices");
    fs::create_dir_all(&bus).unwrap();
    symlink(format!("../../../devices/pci0000:00/{address}"), bus.join(address)).unwrap();
}

const GOOD: &[u8] = b"PCI_CLASS=30000\nPCI_ID=10DE:2330\nPCI_SUBSYS_ID=10DE:16C1\n";

#[test]
fn nonsense_in_one_function_hides_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    function(root, "0000:00:02.0", &[("uevent", GOOD)]);
    function(root, "0000:00:03.0", &[]);
    function(
        root,
        "0000:00:04.0",
        &[
            ("uevent", b"PCI_ID=\xff\xfe:::\nPCI_CLASS=zz\n"),
            ("vendor", b"0xnothing\n"),
            ("config", b"\x86\x80"),
            ("resource", b"one two three\n0x5 0x1 0x200\n"),
            ("numa_node", b"many\n"),
            ("sriov_totalvfs", b"99999999\n"),
            ("reset_method", b"\n"),
        ],
    );
    symlink(
        "../../../kernel/iommu_groups/x",
        root.join("sys/devices/pci0000:00/0000:00:04.0/iommu_group"),
    )
    .unwrap();
    fs::create_dir_all(root.join("sys/bus/pci/devices/not-an-address")).unwrap();

    let inventory = Inventory::scan(&HostRoot::new(root)).unwrap();
    let listed: Vec<String> = inventory.functions().map(|f| f.address.to_string()).collect();
    assert_eq!(listed, ["0000:00:02.0", "0000:00:03.0", "0000:00:04.0"]);
    let functions: Vec<_> = inventory.functions().collect();
    assert_eq!(functions[0].problems.len(), 1, "{:?}", functions[0].problems);
    assert!(functions[0].problems[0].contains("configuration space"));
    assert_eq!(inventory.describe(functions[0]), "10de:2330");
    assert!(functions[1].problems.iter().any(|p| p.contains("vendor is missing")));
    assert_eq!(inventory.describe(functions[1]), "????:????");
    let said = functions[2].problems.join("\n");
    for word in ["vendor reads '0xnothing'", "group reads 'x'", "numa_node reads 'many'"] {
        assert!(said.contains(word), "{word} is not in\n{said}");
    }
    assert!(functions[2].bars.is_empty() && functions[2].iommu_group.is_none());
}

#[test]
fn a_directory_in_place_of_a_file_is_a_problem_of_that_function_alone() {
    let dir = tempfile::tempdir().unwrap();
    function(dir.path(), "0000:00:02.0", &[("uevent", GOOD)]);
    fs::create_dir(dir.path().join("sys/devices/pci0000:00/0000:00:02.0/config")).unwrap();
    let inventory = Inventory::scan(&HostRoot::new(dir.path())).unwrap();
    let function = inventory.functions().next().unwrap();
    assert_eq!(function.ids.device, Some(0x2330));
    assert!(function.problems[0].contains("cannot read"), "{:?}", function.problems);
}

#[test]
fn a_host_without_anything_is_empty() {
    let dir = tempfile::tempdir().unwrap();
    let inventory = Inventory::scan(&HostRoot::new(dir.path())).unwrap();
    assert_eq!((inventory.functions().len(), inventory.groups().len()), (0, 0));
    let error = inventory.resolve("03:00.0").unwrap_err();
    assert!(error.to_string().contains("no PCI function '03:00.0'"), "{error}");
}
