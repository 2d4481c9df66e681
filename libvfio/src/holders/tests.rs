use std::fs;
use std::os::unix::fs::symlink;

use super::*;

const GPU: &str = "sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0";

/// A GPU with a render node and its audio function, on a host without processes.
struct Described(tempfile::TempDir);

impl Described {
    fn new() -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        this.file(&format!("{GPU}/drm/renderD128/uevent"), "MAJOR=226\nDEVNAME=dri/renderD128\n");
        let place = "sys/devices/pci0000:00/0000:00:01.0";
        this.file(&format!("{place}/0000:01:00.1/sound/card0/uevent"), "DEVNAME=snd/controlC0\n");
        this.file(
            "proc/driver/nvidia/gpus/0000:01:00.0/information",
            "Model: \t\t NVIDIA H100\nDevice Minor: \t 3\n",
        );
        for (name, below) in [
            ("0000:00:01.0", ""),
            ("0000:01:00.0", "/0000:01:00.0"),
            ("0000:01:00.1", "/0000:01:00.1"),
        ] {
            let target = format!("../../../devices/pci0000:00/0000:00:01.0{below}");
            this.link(&format!("sys/bus/pci/devices/{name}"), &target);
        }
        this.file("etc/passwd", "root:x:0:0::/root:/bin/sh\ngarbage\nalice:x:1000:1000:::\n");
        this
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn link(&self, path: &str, target: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    fn process(&self, pid: u32, command: &str, open: &[&str]) {
        self.file(&format!("proc/{pid}/comm"), &format!("{command}\n"));
        for (path, number) in open.iter().zip(3..) {
            self.link(&format!("proc/{pid}/fd/{number}"), path);
        }
    }

    fn of(&self, functions: &[&str]) -> Vec<(u32, String)> {
        let functions = functions.iter().map(|address| address.parse().unwrap()).collect();
        let holdings = of_functions(&HostRoot::new(self.0.path()), &functions).unwrap();
        let what = |path: &PathBuf| path.display().to_string();
        let told = holdings.iter().map(|Holding { holder, .. }| {
            (holder.pid, holder.what.iter().map(what).collect::<Vec<_>>().join(" "))
        });
        told.collect()
    }
}

#[test]
fn descriptors_and_mappings_of_every_kind_of_node_count() {
    let host = Described::new();
    host.process(10, "python3", &["/dev/nvidia3", "/dev/nvidiactl", "socket:[1]"]);
    host.process(11, "Xorg", &["/dev/dri/renderD128", "/dev/dri/renderD128 (deleted)"]);
    host.process(12, "wireplumber", &["/dev/snd/controlC0"]);
    host.process(13, "dpdk", &[]);
    host.file("proc/13/maps", &format!("7f-80 rw-s 0 00:18 7    /{GPU}/resource0\n"));
    host.process(14, "bash", &["/dev/null"]);
    assert_eq!(
        host.of(&["01:00.0"]),
        [
            (10, "/dev/nvidia3".into()),
            (11, "/dev/dri/renderD128".into()),
            (13, format!("/{GPU}/resource0")),
        ]
    );
    assert_eq!(host.of(&["01:00.1"]), [(12, "/dev/snd/controlC0".into())]);
    assert_eq!(host.of(&["00:01.0"]), [], "a port does not have what is below its children");
    assert_eq!(host.of(&[]), []);
}

#[test]
fn readers_of_configuration_space_udev_and_oneself_do_not_count() {
    let host = Described::new();
    let config = format!("/{GPU}/config");
    host.process(20, "lspci", &[&config]);
    host.process(21, "setpci", &[&config, &format!("/{GPU}/resource0")]);
    host.process(22, "(udev-worker)", &["/dev/dri/renderD128"]);
    host.file("proc/22/cgroup", "0::/system.slice/systemd-udevd.service/udev\n");
    host.process(23, "vfiod", &["/dev/dri/renderD128"]);
    host.link("proc/self", "23");
    assert_eq!(host.of(&["01:00.0"]), [(21, format!("{config} /{GPU}/resource0"))]);
}

#[test]
fn a_vfio_device_is_held_by_its_group_or_by_itself() {
    let host = Described::new();
    host.link(&format!("{GPU}/iommu_group"), "../../../kernel/iommu_groups/12");
    host.file(&format!("{GPU}/vfio-dev/vfio0/uevent"), "DEVNAME=vfio/devices/vfio0\n");
    host.process(30, "qemu", &["/dev/vfio/12"]);
    host.process(31, "qemu", &["/dev/vfio/devices/vfio0"]);
    host.process(32, "qemu", &["/dev/vfio/1", "/dev/vfio/vfio"]);
    let pids: Vec<u32> = host.of(&["01:00.0"]).into_iter().map(|(pid, _)| pid).collect();
    assert_eq!(pids, [30, 31]);
    let root = HostRoot::new(host.0.path());
    assert_eq!(of_group(&root, 12, &["vfio0"]).unwrap().len(), 2);
}

#[test]
fn whom_to_ask_depends_on_who_runs_it() {
    let host = Described::new();
    let remedy = |command: &str, cgroup: &str, uid: &str| {
        host.process(40, command, &[]);
        host.file("proc/40/cgroup", &format!("0::{cgroup}\n"));
        host.file("proc/40/status", &format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}\n"));
        process::describe(&HostRoot::new(host.0.path()), 40, Vec::new()).remedy()
    };
    let service = remedy("dcgm", "/system.slice/dcgm.service", "0");
    assert_eq!(service, "stop it first ('systemctl stop dcgm.service')");
    let logind = remedy("systemd-logind", "/system.slice/systemd-logind.service", "0");
    assert!(logind.contains("loginctl") && !logind.contains("systemctl"), "{logind}");
    let session = "/user.slice/user-1000.slice/user@1000.service/session.slice/pipewire.service";
    assert_eq!(remedy("pipewire", session, "1000"), "end process 40 of alice first");
    assert_eq!(remedy("x", "/", "1001"), "end process 40 of user 1001 first");
    assert_eq!(remedy("x", "/machine.slice/x.scope", "x"), "end process 40 first");
}
