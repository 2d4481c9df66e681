use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::*;

/// A host of files and of symbolic links, the latter by their targets.
fn host(files: &[(&str, &str)], links: &[(&str, &str)]) -> (tempfile::TempDir, HostRoot) {
    let dir = tempfile::tempdir().unwrap();
    let place = |path: &str| {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    };
    for (path, text) in files {
        fs::write(place(path), text).unwrap();
    }
    for (path, target) in links {
        symlink(target, place(path)).unwrap();
    }
    let host = HostRoot::new(dir.path());
    (dir, host)
}

fn found(host: &HostRoot, functions: &[&str]) -> Vec<Use> {
    uses(host, &functions.iter().map(|address| address.parse().unwrap()).collect()).unwrap()
}

const NVME: &str = "../../devices/pci0000:00/0000:02:00.0/nvme/nvme0/nvme0n1";
const NVME_2: &str = "../../devices/pci0000:00/0000:02:00.0/nvme/nvme0/nvme0n1/nvme0n1p2";

#[test]
fn a_disk_with_several_paths_is_found_below_each_controller() {
    let (_dir, host) = host(
        &[("proc/self/mountinfo", "25 1 259:2 / / rw shared:1 - ext4 /dev/nvme0n1 rw\n")],
        &[
            (
                "sys/class/block/nvme0n1",
                "../../devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1",
            ),
            (
                "sys/class/nvme-subsystem/nvme-subsys0/nvme0",
                "../../../pci0000:00/0000:02:00.0/nvme/nvme0",
            ),
            (
                "sys/class/nvme-subsystem/nvme-subsys0/nvme1",
                "../../../pci0000:00/0000:03:00.0/nvme/nvme1",
            ),
            ("sys/class/nvme-subsystem/nvme-subsys0/subsystem", "../../../../class/nvme-subsystem"),
        ],
    );
    let uses = found(&host, &["02:00.0", "03:00.0", "04:00.0"]);
    let functions: Vec<String> = uses.iter().map(|u| u.function.to_string()).collect();
    assert_eq!(functions, ["0000:02:00.0", "0000:03:00.0"]);
    assert!(uses.iter().all(Use::is_protected));
}

/// The root file system and swap on LVM on LUKS on a partition, and a volume nobody mounts.
fn on_volumes(mounts: &str) -> (tempfile::TempDir, HostRoot) {
    const DEVICES: &str = "sys/devices/pci0000:00/0000:02:00.0/nvme/nvme0/nvme0n1/nvme0n1p2";
    host(
        &[
            (&format!("{DEVICES}/dev"), "259:2\n"),
            (&format!("{DEVICES}/partition"), "2\n"),
            (&format!("{DEVICES}/holders/dm-0/x"), ""),
            ("sys/class/block/dm-0/dev", "252:0\n"),
            ("sys/class/block/dm-0/dm/name", "luks\n"),
            ("sys/class/block/dm-0/holders/dm-1/x", ""),
            ("sys/class/block/dm-0/holders/dm-2/x", ""),
            ("sys/class/block/dm-0/holders/dm-3/x", ""),
            ("sys/class/block/dm-1/dev", "252:1\n"),
            ("sys/class/block/dm-1/dm/name", "vg-root\n"),
            ("sys/class/block/dm-2/dev", "252:2\n"),
            ("sys/class/block/dm-2/dm/name", "vg-swap\n"),
            ("sys/class/block/dm-3/dev", "252:3\n"),
            ("sys/class/block/dm-3/dm/name", "vg-spare\n"),
            ("proc/1/mountinfo", mounts),
            ("proc/swaps", "Filename\tType\n/dev/dm-2 partition 4 0 -2\n"),
        ],
        &[("sys/class/block/nvme0n1", NVME), ("sys/class/block/nvme0n1p2", NVME_2)],
    )
}

#[test]
fn what_the_host_lives_on_is_found_through_every_layer() {
    let (_dir, host) = on_volumes("25 1 252:1 / / rw - ext4 /dev/mapper/vg-root rw\n");
    let uses = found(&host, &["02:00.0"]);
    let told: Vec<(Weight, &str)> = uses.iter().map(|u| (u.weight, u.what.as_str())).collect();
    assert_eq!(
        told,
        [
            (Weight::Protected, "carries vg-root on nvme0n1p2, mounted on /"),
            (Weight::Protected, "carries swap on vg-swap on nvme0n1p2 (/dev/dm-2)"),
            (
                Weight::InUse,
                "carries vg-spare on nvme0n1p2, which is set up (device-mapper, MD or bcache)"
            ),
        ]
    );
    assert!(uses[2].remedy.contains("dmsetup remove vg-spare"));
}

#[test]
fn a_swap_file_protects_the_disk_it_is_on() {
    let (dir, host) = on_volumes(
        "25 1 8:1 / / rw - ext4 /dev/sda1 rw\n26 25 252:3 / /data rw - xfs /dev/dm-3 rw\n",
    );
    fs::write(dir.path().join("proc/swaps"), "/data/swap\\040file file 4 0 -2\n").unwrap();
    let uses = found(&host, &["02:00.0"]);
    let swap = uses.iter().find(|u| u.what.contains("swap on vg-spare")).unwrap();
    assert!(swap.is_protected() && swap.remedy.contains("/data/swap file"));
    let data = uses.iter().find(|u| u.what.contains("mounted on /data")).unwrap();
    assert_eq!(data.weight, Weight::InUse);
}

#[test]
fn what_only_a_container_has_mounted_is_in_use() {
    let (dir, host) = on_volumes("25 1 8:1 / / rw - ext4 /dev/sda1 rw\n");
    let link = |pid: &str, target: &str| {
        fs::create_dir_all(dir.path().join(format!("proc/{pid}/ns"))).unwrap();
        symlink(target, dir.path().join(format!("proc/{pid}/ns/mnt"))).unwrap();
    };
    link("1", "mnt:[1]");
    link("2", "mnt:[1]");
    link("77", "mnt:[2]");
    fs::write(dir.path().join("proc/77/comm"), "postgres\n").unwrap();
    let mount = "90 1 252:3 / / rw - xfs /dev/dm-3 rw\n";
    fs::write(dir.path().join("proc/77/mountinfo"), mount).unwrap();
    fs::write(dir.path().join("proc/2/mountinfo"), mount).unwrap();
    let uses = found(&host, &["02:00.0"]);
    let spare = uses.iter().find(|u| u.what.contains("vg-spare")).unwrap();
    assert_eq!(spare.weight, Weight::InUse);
    assert!(spare.what.contains("mounted on / for postgres (process 77)"), "{}", spare.what);
}

#[test]
fn file_systems_over_several_devices_are_found_by_each() {
    let (dir, host) = on_volumes("25 1 0:41 / / rw - btrfs /dev/disk/by-id/other rw\n");
    let write = |path: &str, text: &str| {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("sys/fs/btrfs/uuid/devices/dm-3/x", "");
    write("sys/fs/btrfs/uuid/devices/sdb/x", "");
    write("sys/fs/btrfs/features/x", "");
    write("sys/class/block/sdb/dev", "8:16\n");
    write("run/udev/data/b8:16", "S:disk/by-id/other\nE:ID_FS_TYPE=btrfs\n");
    let btrfs = found(&host, &["02:00.0"]);
    let root = btrfs.iter().find(|u| u.what.contains("vg-spare")).unwrap();
    assert!(root.is_protected() && root.what.ends_with("mounted on /"), "{}", root.what);

    write("run/udev/data/b259:2", "E:ID_FS_TYPE=zfs_member\nE:ID_FS_LABEL=tank\n");
    let member = |host: &HostRoot| {
        let found = found(host, &["02:00.0"]);
        found.into_iter().find(|u| u.what.contains("ZFS pool")).map(|u| (u.weight, u.what))
    };
    write("proc/spl/kstat/zfs/arcstats", "");
    assert_eq!(member(&host), None, "a pool that is not imported");
    write("proc/spl/kstat/zfs/tank/state", "ONLINE\n");
    assert_eq!(member(&host).unwrap().0, Weight::InUse);
    write("proc/1/mountinfo", "25 1 0:41 / /usr rw - zfs tank/usr rw\n");
    let (weight, what) = member(&host).unwrap();
    assert_eq!(weight, Weight::Protected);
    assert!(what.contains("nvme0n1p2, a member of ZFS pool tank, mounted on /usr"), "{what}");
}

#[test]
fn an_interface_below_a_bridge_carries_what_the_bridge_does() {
    let net = "sys/devices/pci0000:00/0000:06:00.0/net/eth0";
    let (_dir, host) = host(
        &[
            (&format!("{net}/ifindex"), "2\n"),
            (
                "proc/net/route",
                "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n\
                 br0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n",
            ),
        ],
        &[
            ("sys/class/net/eth0", "../../devices/pci0000:00/0000:06:00.0/net/eth0"),
            (&format!("{net}/master"), "../../../../virtual/net/bond0"),
            ("sys/class/net/bond0/upper_br0", "../br0"),
        ],
    );
    let uses = found(&host, &["06:00.0"]);
    assert!(uses[0].is_protected());
    assert_eq!(uses[0].what, "is eth0, a part of br0, which carries the default route");
}

/// A display with a framebuffer of its own; the console is on framebuffers.
fn display(boot_vga: &str) -> (tempfile::TempDir, HostRoot) {
    host(
        &[
            ("sys/bus/pci/devices/0000:00:02.0/class", "0x030000\n"),
            ("sys/bus/pci/devices/0000:00:02.0/boot_vga", boot_vga),
            ("sys/class/vtconsole/vtcon0/name", "(S) dummy device\n"),
            ("sys/class/vtconsole/vtcon0/bind", "0\n"),
            ("sys/class/vtconsole/vtcon1/name", "(M) frame buffer device\n"),
            ("sys/class/vtconsole/vtcon1/bind", "1\n"),
        ],
        &[(
            "sys/class/graphics/fb0",
            "../../devices/pci0000:00/0000:00:02.0/drm/card0/graphics/fb0",
        )],
    )
}

#[test]
fn the_display_with_the_console_is_protected_only_if_the_firmware_chose_it() {
    let (dir, boot) = display("1\n");
    let uses = found(&boot, &["00:02.0"]);
    assert!(uses[0].is_protected() && uses[0].what.contains("fb0"), "{uses:?}");
    let console = dir.path().join("sys/class/vtconsole/vtcon1");
    fs::write(console.join("bind"), "0\n").unwrap();
    assert_eq!(found(&boot, &["00:02.0"]), []);
    fs::write(console.join("bind"), "1\n").unwrap();
    fs::write(console.join("name"), "(S) VGA+\n").unwrap();
    assert!(found(&boot, &["00:02.0"])[0].what.contains("text mode"));

    let (dir, other) = display("0\n");
    assert_eq!(found(&other, &["00:02.0"]), []);
    fs::create_dir(dir.path().join("proc")).unwrap();
    let iomem = "c0-cf : 0000:00:02.0\n  c0-c7 : BOOTFB\n";
    fs::write(dir.path().join("proc/iomem"), iomem).unwrap();
    assert!(found(&other, &["00:02.0"])[0].is_protected());
}

#[test]
fn a_serial_port_is_protected_while_the_kernel_writes_to_it() {
    let (dir, host) = host(
        &[("sys/class/tty/console/active", "tty0 ttyS4\n")],
        &[
            ("sys/class/tty/ttyS4", "../../devices/pci0000:00/0000:00:16.3/tty/ttyS4"),
            ("sys/class/tty/ttyS5", "../../devices/pci0000:00/0000:00:16.4/tty/ttyS5"),
        ],
    );
    let uses = found(&host, &["00:16.3", "00:16.4"]);
    assert_eq!(uses.len(), 1);
    assert_eq!(uses[0].what, "is ttyS4, a console of the kernel");
    fs::write(dir.path().join("sys/class/tty/console/active"), "tty0\n").unwrap();
    assert_eq!(found(&host, &["00:16.3"]), []);
}

#[test]
fn usb_devices_are_told_and_the_consoles_keyboard_is_in_use() {
    let usb = "../../../devices/pci0000:00/0000:00:14.0/usb1";
    let here = |path: &Path, product: &str| {
        fs::create_dir_all(path).unwrap();
        fs::write(path.join("product"), product).unwrap();
    };
    let links: Vec<(String, String)> = ["usb1", "1-2", "1-2:1.0", "1-3"]
        .iter()
        .map(|name| {
            let target = if *name == "usb1" { usb.into() } else { format!("{usb}/{name}") };
            (format!("sys/bus/usb/devices/{name}"), target)
        })
        .collect();
    let links: Vec<(&str, &str)> = links.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    let input = "S: Sysfs=/devices/pci0000:00/0000:00:14.0/usb1/1-2/1-2:1.0/input/input3\n\
                 H: Handlers=sysrq kbd leds event3\nB: KEY=fffffffffffffffe\n";
    let (dir, host) = host(&[("proc/bus/input/devices", input)], &links);
    let root = dir.path().join("sys/devices/pci0000:00/0000:00:14.0/usb1");
    here(&root.join("1-2"), "Keys\n");
    here(&root.join("1-3"), "Cam\u{1b}era\n");
    let uses = found(&host, &["00:14.0"]);
    assert_eq!(uses.len(), 2);
    assert_eq!(uses[0].weight, Weight::InUse);
    assert!(uses[0].what.contains("Keys (1-2)") && uses[0].remedy.contains("1-2/authorized"));
    assert_eq!(uses[1].weight, Weight::Notice);
    assert!(uses[1].what.contains("Cam?era (1-3)"));
}
