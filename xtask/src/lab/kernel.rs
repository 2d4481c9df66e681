//! The lab's own kernel: the source that the lab's Debian ships, with options of the lab's own.
//!
//! The source's package is unpacked, never installed; all that is made of it lies in the cache.
//! An initial file system brings the modules along, so that every image boots every kernel.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::available_parallelism;

use anyhow::{Context, Result, ensure};

use super::{cache, image};
use crate::{exec, host, progress};

/// The kernel's source, and a shell for the initial file system that needs no library.
const PACKAGES: &str = "linux-source-6.12,busybox-static";
/// The source's archive in its package, and the directory in the archive.
const ARCHIVE: &str = "usr/src/linux-source-6.12.tar.xz";
const SOURCE: &str = "linux-source-6.12";

const OPTIONS: &str = include_str!("kernel/options");
const INIT: &str = include_str!("kernel/init");

/// What the build calls.
const TOOLS: [(&str, &str); 12] = [
    ("/usr/bin/mmdebstrap", "mmdebstrap"),
    ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
    ("/usr/bin/make", "make"),
    ("/usr/bin/gcc", "gcc"),
    ("/usr/include/stdlib.h", "libc6-dev"),
    ("/usr/bin/flex", "flex"),
    ("/usr/bin/bison", "bison"),
    ("/usr/bin/bc", "bc"),
    ("/usr/bin/xz", "xz-utils"),
    ("/usr/include/gelf.h", "libelf-dev"),
    ("/usr/sbin/depmod", "kmod"),
    ("/usr/bin/cpio", "cpio"),
];

/// A kernel that was built.
#[derive(Debug)]
pub(super) struct OwnKernel {
    directory: PathBuf,
}

impl OwnKernel {
    /// The kernel.
    pub(super) fn image(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    /// Its initial file system, with its modules.
    pub(super) fn initrd(&self) -> PathBuf {
        self.directory.join("initrd")
    }
}

/// The lab's own kernel, built first if it is not there yet.
pub(super) fn ready() -> Result<OwnKernel> {
    host::require_root()?;
    host::require(&TOOLS)?;
    let directory = cache::get(&(image::SUITE, PACKAGES, SOURCE, OPTIONS, INIT), build)?;
    Ok(OwnKernel { directory })
}

fn build(directory: &Path) -> Result<()> {
    let work = directory.join("work");
    let source = work.join(SOURCE);
    progress::step("getting the source of the lab's own kernel", || unpack(&work))?;
    progress::step("configuring it", || configure(&source))?;
    progress::step("compiling it (once; six minutes on two processors)", || {
        let jobs = available_parallelism().map_or(1, usize::from);
        make(&source, &[&format!("-j{jobs}"), "bzImage", "modules"])
    })?;
    progress::step("packing its modules", || pack(directory, &work, &source))?;
    fs::remove_dir_all(&work).with_context(|| work.display().to_string())
}

/// The packages as directories: `debian` as they are, the source beside it.
fn unpack(work: &Path) -> Result<()> {
    let debian = work.join("debian");
    fs::create_dir(work)?;
    exec::quiet(
        Command::new("mmdebstrap")
            .args(["--mode=root", "--variant=extract", "--quiet"])
            .arg("--keyring=/usr/share/keyrings/debian-archive-keyring.gpg")
            .arg(format!("--include={PACKAGES}"))
            .arg(image::SUITE)
            .arg(&debian),
    )?;
    let archive = debian.join(ARCHIVE);
    exec::quiet(Command::new("tar").arg("--extract").arg("-f").arg(archive).arg("-C").arg(work))
}

/// The kernel's smallest configuration and what the lab adds to it.
fn configure(source: &Path) -> Result<()> {
    make(source, &["tinyconfig"])?;
    let file = source.join(".config");
    let smallest = fs::read_to_string(&file)?;
    fs::write(&file, format!("{smallest}\n{OPTIONS}"))?;
    make(source, &["olddefconfig"])?;
    let configured = fs::read_to_string(&file)?;
    let missing = not_taken(OPTIONS, &configured);
    ensure!(missing.is_empty(), "this kernel does not take these options:\n{}", missing.join("\n"));
    Ok(())
}

/// The options that a configuration does not have as they were given.
fn not_taken<'a>(options: &'a str, configured: &str) -> Vec<&'a str> {
    let is_option = |line: &&str| line.starts_with("CONFIG_") || line.starts_with("# CONFIG_");
    let taken = |line: &&str| configured.lines().any(|other| other == *line);
    options.lines().filter(is_option).filter(|line| !taken(line)).collect()
}

/// The kernel, and an initial file system with a shell, the modules and the kernel for guests.
fn pack(directory: &Path, work: &Path, source: &Path) -> Result<()> {
    let (kernel, initrd) = (directory.join("vmlinuz"), directory.join("initrd"));
    fs::copy(source.join("arch/x86/boot/bzImage"), &kernel)?;
    fs::copy(source.join(".config"), directory.join("config"))?;

    let tree = work.join("tree");
    for place in ["bin", "dev", "root", "modules"] {
        fs::create_dir_all(tree.join(place))?;
    }
    let installed = work.join("installed");
    let place = format!("INSTALL_MOD_PATH={}", installed.display());
    make(source, &[&place, "INSTALL_MOD_STRIP=1", "modules_install"])?;
    for release in fs::read_dir(installed.join("lib/modules"))? {
        let release = release?;
        // It leads to the source, which does not stay.
        let _ = fs::remove_file(release.path().join("build"));
        fs::copy(&kernel, release.path().join("vmlinuz"))?;
        fs::rename(release.path(), tree.join("modules").join(release.file_name()))?;
    }

    let busybox = ["usr/bin/busybox", "bin/busybox"].map(|path| work.join("debian").join(path));
    let busybox = busybox.iter().find(|path| path.is_file()).context("no busybox was unpacked")?;
    fs::copy(busybox, tree.join("bin/busybox"))?;
    symlink("busybox", tree.join("bin/sh"))?;
    fs::write(tree.join("init"), INIT)?;
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755))?;
    let archive = "cd \"$1\" && find . | cpio --quiet -o -H newc -R 0:0 > \"$2\"";
    exec::quiet(Command::new("sh").args(["-c", archive, "sh"]).arg(&tree).arg(&initrd))
}

/// Nothing of whoever builds it gets into the kernel.
fn make(source: &Path, arguments: &[&str]) -> Result<()> {
    exec::quiet(
        Command::new("make")
            .arg("--silent")
            .arg("-C")
            .arg(source)
            .args(arguments)
            .envs([("KBUILD_BUILD_USER", "lab"), ("KBUILD_BUILD_HOST", "lab")])
            .env("KBUILD_BUILD_TIMESTAMP", "@0"),
    )
}

#[cfg(test)]
mod tests {
    use super::not_taken;

    #[test]
    fn an_option_that_came_out_otherwise_is_told() {
        let options = "# Comment.\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=m\nCONFIG_D=y\n";
        let configured = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\n";
        assert_eq!(not_taken(options, configured), ["CONFIG_C=m", "CONFIG_D=y"]);
    }
}
