//! The lab's base image: Debian with what the product and its peers need, and a unit for the agent.
//!
//! Everything the image is made from is hashed into its name; nothing of the host gets in.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use vfiod_tests::machine::DISK_LABEL;

use super::cache;
use crate::{exec, host, progress};

pub(super) const SUITE: &str = "trixie";

const PACKAGES: &str = "systemd systemd-sysv dbus udev kmod polkitd linux-image-amd64 \
    libvirt-daemon-system libvirt-clients qemu-system-x86 pciutils driverctl mdevctl iproute2 \
    busybox-static cpio strace sudo nvme-cli";

/// Documentation, translations and drivers that no part of the machine has a use for.
const LEFT_OUT: [&str; 13] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
    "*/kernel/drivers/gpu/drm/amd/*",
    "*/kernel/drivers/gpu/drm/i915/*",
    "*/kernel/drivers/gpu/drm/nouveau/*",
    "*/kernel/drivers/gpu/drm/radeon/*",
    "*/kernel/drivers/gpu/drm/xe/*",
    "*/kernel/drivers/infiniband/*",
    "*/kernel/drivers/media/*",
    "*/kernel/drivers/net/wireless/*",
    "*/kernel/drivers/scsi/*",
];

/// Files put into the root file system as they are.
const FILES: [(&str, &str); 5] = [
    ("etc/systemd/system/lab-agent.service", include_str!("image/lab-agent.service")),
    ("etc/systemd/system/lab-shell.service", include_str!("image/lab-shell.service")),
    ("etc/systemd/journald.conf.d/lab.conf", include_str!("image/journald.conf")),
    ("etc/modprobe.d/lab.conf", include_str!("image/modprobe.conf")),
    ("usr/local/lib/prepare-lab", include_str!("image/prepare")),
];

/// Units that start with the lab.
const ENABLED: [&str; 2] = ["lab-agent.service", "lab-shell.service"];

/// What would only make the boot slower, or write to the console, or start later of itself.
const MASKED: [&str; 29] = [
    "serial-getty@ttyS0.service",
    "getty@tty1.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "fstrim.timer",
    "logrotate.timer",
    "systemd-tmpfiles-clean.timer",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "ldconfig.service",
    "libvirt-guests.service",
    "modprobe@drm.service",
    "proc-sys-fs-binfmt_misc.automount",
    "run-lock.mount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-binfmt.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-journal-flush.service",
    "systemd-modules-load.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-sysctl.service",
    "systemd-udev-load-credentials.service",
    "systemd-update-done.service",
];

/// Left to their sockets.
const NOT_STARTED: [&str; 2] = ["libvirtd.service", "virtlogd.service"];

const ROOT_SIZE: &str = "1200M";
const DISK_SIZE: &str = "32M";

/// The directories and images of a base image.
#[derive(Debug)]
pub(super) struct Image {
    directory: PathBuf,
}

impl Image {
    /// The root file system as a directory: QEMU runs from it.
    pub(super) fn tree(&self) -> PathBuf {
        self.directory.join("tree")
    }

    /// The root file system as a disk image.
    pub(super) fn root(&self) -> PathBuf {
        self.directory.join("root.img")
    }

    /// A small disk image with a file system.
    pub(super) fn disk(&self) -> PathBuf {
        self.directory.join("disk.img")
    }
}

/// The base image, built first if it is not there yet.
pub(super) fn ready() -> Result<Image> {
    host::require(&[
        ("/usr/bin/mmdebstrap", "mmdebstrap"),
        ("/usr/sbin/mke2fs", "e2fsprogs"),
        ("/usr/bin/zstd", "zstd"),
        ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
    ])?;
    let recipe = (
        (SUITE, PACKAGES, LEFT_OUT, FILES),
        (ENABLED, MASKED, NOT_STARTED, ROOT_SIZE, DISK_SIZE, DISK_LABEL),
    );
    let directory = cache::get(&recipe, build)?;
    Ok(Image { directory })
}

fn build(directory: &Path) -> Result<()> {
    let image = Image { directory: directory.to_owned() };
    progress::step("installing Debian for the lab (once; a minute or two)", || {
        install(&image.tree())
    })?;
    progress::step("preparing the lab's root file system", || configure(&image.tree()))?;
    progress::step("making the lab's disks", || {
        make_disk(&image.root(), ROOT_SIZE, "root", Some(&image.tree()))?;
        make_disk(&image.disk(), DISK_SIZE, DISK_LABEL, None)
    })
}

fn install(tree: &Path) -> Result<()> {
    let packages = PACKAGES.split_whitespace().collect::<Vec<_>>().join(",");
    let mut command = Command::new("mmdebstrap");
    command
        // The kernel package would make an initial file system; the lab has its own.
        .env("INITRD", "No")
        .args(["--mode=root", "--variant=minbase", "--quiet"])
        .arg("--keyring=/usr/share/keyrings/debian-archive-keyring.gpg")
        .arg(format!("--include={packages}"));
    for path in LEFT_OUT {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    exec::quiet(command.arg(SUITE).arg(tree))
}

fn configure(tree: &Path) -> Result<()> {
    for (path, text) in FILES {
        fs::create_dir_all(tree.join(path).parent().unwrap_or(tree))?;
        fs::write(tree.join(path), text).with_context(|| format!("writing {path}"))?;
    }
    let units = tree.join("etc/systemd/system");
    let wants = units.join("multi-user.target.wants");
    for unit in NOT_STARTED {
        fs::remove_file(wants.join(unit)).with_context(|| format!("disabling {unit}"))?;
    }
    for unit in MASKED {
        symlink("/dev/null", units.join(unit)).with_context(|| format!("masking {unit}"))?;
    }
    for unit in ENABLED {
        symlink(units_path(unit), wants.join(unit)).with_context(|| format!("enabling {unit}"))?;
    }
    exec::quiet(Command::new("chroot").arg(tree).args(["sh", "/usr/local/lib/prepare-lab"]))
}

fn units_path(unit: &str) -> String {
    format!("/etc/systemd/system/{unit}")
}

/// An ext4 image of a size in mke2fs's terms, filled from a directory if there is one.
pub(super) fn make_disk(
    file: &Path,
    size: &str,
    label: &str,
    content: Option<&Path>,
) -> Result<()> {
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-L", label]);
    if let Some(content) = content {
        command.arg("-d").arg(content);
    }
    exec::quiet(command.arg(file).arg(size))
}
