//! `cargo xtask deb`: the Debian package, staged file by file and packed with dpkg-deb.
//!
//! The one place that says what of the repository is installed where.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{exec, host, progress};

/// Upstream's version and the package's revision.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "-1");

/// Binaries and the directories they go to.
const BINARIES: [(&str, &str); 4] = [
    ("vfiod", "usr/libexec"),
    ("vfiod-early", "usr/libexec"),
    ("vfiod-sim", "usr/libexec"),
    ("vfioctl", "usr/bin"),
];

/// Files of the repository and the directories they go to.
const FILES: [(&str, &str); 20] = [
    ("systemd/vfiod.service", "usr/lib/systemd/system"),
    ("systemd/vfiod-early.service", "usr/lib/systemd/system"),
    ("systemd/vfiod-provision.service", "usr/lib/systemd/system"),
    ("systemd/org.vfiod1.service", "usr/share/dbus-1/system-services"),
    ("systemd/org.vfiod1.conf", "usr/share/dbus-1/system.d"),
    ("systemd/org.vfiod1.xml", "usr/share/dbus-1/interfaces"),
    ("systemd/org.vfiod1.policy", "usr/share/polkit-1/actions"),
    ("udev/60-vfiod.rules", "usr/lib/udev/rules.d"),
    ("README.md", "usr/share/doc/vfiod"),
    ("docs/guide.md", "usr/share/doc/vfiod"),
    ("docs/dbus.md", "usr/share/doc/vfiod"),
    ("docs/libvirt.md", "usr/share/doc/vfiod"),
    ("docs/vfioctl-json.md", "usr/share/doc/vfiod"),
    ("docs/threat-model.md", "usr/share/doc/vfiod"),
    ("docs/policy.md", "usr/share/doc/vfiod"),
    ("docs/policy/workstation.toml", "usr/share/doc/vfiod/policy"),
    ("docs/policy/gpu-server.toml", "usr/share/doc/vfiod/policy"),
    ("docs/policy/network.toml", "usr/share/doc/vfiod/policy"),
    ("docs/policy/mixed.toml", "usr/share/doc/vfiod/policy"),
    ("CHANGELOG.md", "usr/share/doc/vfiod"),
];

/// Programs of others' that call ours, and the directories they go to. The administrator may change
/// them.
const HOOKS: [(&str, &str); 1] = [("vfiod/hooks/libvirt/50-vfiod", "etc/libvirt/hooks/qemu.d")];

/// Programs that initramfs generators call, and where they look for them.
const INITRAMFS: [(&str, &str); 3] = [
    ("vfiod/hooks/initramfs/initramfs-tools", "usr/share/initramfs-tools/hooks/vfiod"),
    ("vfiod/hooks/initramfs/module-setup.sh", "usr/lib/dracut/modules.d/90vfiod/module-setup.sh"),
    ("vfiod/hooks/initramfs/vfiod-early.sh", "usr/lib/dracut/modules.d/90vfiod/vfiod-early.sh"),
];

/// Completion scripts as vfioctl names them, and as each shell wants them.
const COMPLETIONS: [(&str, &str); 3] = [
    ("vfioctl.bash", "usr/share/bash-completion/completions/vfioctl"),
    ("_vfioctl", "usr/share/zsh/vendor-completions/_vfioctl"),
    ("vfioctl.fish", "usr/share/fish/vendor_completions.d/vfioctl.fish"),
];

const CONTROL: &str = include_str!("deb/control");
const COPYRIGHT: &str = include_str!("deb/copyright");
const CHANGELOG: &str = include_str!("deb/changelog");
const SCRIPTS: [(&str, &str); 3] = [
    ("postinst", include_str!("deb/postinst")),
    ("prerm", include_str!("deb/prerm")),
    ("postrm", include_str!("deb/postrm")),
];

/// Builds the package and returns its path.
pub(crate) fn build() -> Result<PathBuf> {
    host::require(&[("/usr/bin/dpkg-shlibdeps", "dpkg-dev")])?;
    let binaries = exec::build_product()?;
    progress::step("packing the Debian package", || {
        let output = exec::target()?.join("debian");
        let stage = output.join("vfiod");
        if output.exists() {
            fs::remove_dir_all(&output)?;
        }
        for (name, directory) in BINARIES {
            let binary = stage.join(directory).join(name);
            install(&exec::named(&binaries, name)?, &binary, 0o755)?;
            let strip = ["--strip-unneeded", "--remove-section=.comment", "--"];
            exec::quiet(Command::new("strip").args(strip).arg(binary))?;
        }
        let files = FILES.iter().map(|file| (file, 0o644));
        for ((file, directory), mode) in files.chain(HOOKS.iter().map(|hook| (hook, 0o755))) {
            let source = exec::root().join(file);
            let name = source.file_name().context("a file without a name")?;
            install(&source, &stage.join(directory).join(name), mode)?;
        }
        for (file, destination) in INITRAMFS {
            install(&exec::root().join(file), &stage.join(destination), 0o755)?;
        }
        stage_generated(&stage)?;
        stage_documents(&stage)?;
        stage_control(&stage)?;
        let package = output.join(format!("vfiod_{VERSION}_{}.deb", architecture()?));
        exec::quiet(
            Command::new("dpkg-deb")
                .args(["--root-owner-group", "-Zxz", "-z1", "--build"])
                .arg(&stage)
                .arg(&package),
        )?;
        Ok(package)
    })
}

/// Has lintian look for errors.
pub(crate) fn lint(package: &Path) -> Result<()> {
    host::require(&[("/usr/bin/lintian", "lintian")])?;
    progress::step("checking the package with lintian", || {
        exec::loud(
            Command::new("lintian").args(["--fail-on", "error", "--allow-root"]).arg(package),
        )
    })
}

/// What vfioctl says of itself: manual pages and completion scripts.
fn stage_generated(stage: &Path) -> Result<()> {
    let vfioctl = stage.join("usr/bin/vfioctl");
    let pages = stage.join("usr/share/man");
    exec::quiet(Command::new(&vfioctl).args(["generate", "man"]).arg(&pages))?;
    for section in fs::read_dir(&pages)? {
        for page in fs::read_dir(section?.path())? {
            compress(&page?.path())?;
        }
    }
    let scripts = stage.with_extension("completions");
    exec::quiet(Command::new(&vfioctl).args(["generate", "completions"]).arg(&scripts))?;
    for (name, destination) in COMPLETIONS {
        install(&scripts.join(name), &stage.join(destination), 0o644)?;
    }
    Ok(())
}

fn stage_documents(stage: &Path) -> Result<()> {
    let documents = stage.join("usr/share/doc/vfiod");
    fs::write(documents.join("copyright"), COPYRIGHT)?;
    fs::write(documents.join("changelog.Debian"), CHANGELOG.replace("@VERSION@", VERSION))?;
    fs::rename(documents.join("CHANGELOG.md"), documents.join("changelog"))?;
    compress(&documents.join("changelog.Debian"))?;
    compress(&documents.join("changelog"))
}

/// Compresses a file in its place, without a date: the same input makes the same package.
fn compress(file: &Path) -> Result<()> {
    exec::quiet(Command::new("gzip").args(["-9", "-n", "--"]).arg(file))
}

fn stage_control(stage: &Path) -> Result<()> {
    let control = CONTROL
        .replace("@VERSION@", VERSION)
        .replace("@ARCHITECTURE@", &architecture()?)
        .replace("@LIBRARIES@", &libraries(stage)?);
    let directory = stage.join("DEBIAN");
    fs::create_dir_all(&directory)?;
    fs::write(directory.join("control"), control)?;
    let kept = HOOKS.iter().filter_map(|(file, directory)| {
        Some(format!("/{directory}/{}\n", Path::new(file).file_name()?.to_str()?))
    });
    fs::write(directory.join("conffiles"), kept.collect::<String>())?;
    // By these dpkg --verify sees what was changed; whose changes are expected has no part in it.
    let sums = "find usr -type f -print0 | sort -z | xargs -0 md5sum > DEBIAN/md5sums";
    exec::quiet(Command::new("sh").args(["-ec", sums]).current_dir(stage))?;
    for (name, text) in SCRIPTS {
        let path = directory.join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

fn install(source: &Path, destination: &Path, mode: u32) -> Result<()> {
    fs::create_dir_all(destination.parent().context("no directory to install to")?)?;
    fs::copy(source, destination).with_context(|| format!("installing {}", source.display()))?;
    Ok(fs::set_permissions(destination, fs::Permissions::from_mode(mode))?)
}

/// The packages of the shared libraries that the binaries are linked with.
fn libraries(stage: &Path) -> Result<String> {
    // dpkg-shlibdeps wants to be in a source package.
    let source = stage.with_extension("source");
    fs::create_dir_all(source.join("debian"))?;
    fs::write(
        source.join("debian/control"),
        "Source: vfiod\n\nPackage: vfiod\nArchitecture: any\n",
    )?;
    let mut command = Command::new("dpkg-shlibdeps");
    command.current_dir(&source).arg("-O");
    for (name, directory) in BINARIES {
        command.arg(format!("-e{}", stage.join(directory).join(name).display()));
    }
    let output = command.output().context("starting dpkg-shlibdeps")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    let packages = text.trim().strip_prefix("shlibs:Depends=");
    let packages = packages.context("dpkg-shlibdeps named no libraries")?;
    // Packed relocations are no symbol, and so not among what dpkg-shlibdeps looks for.
    Ok(if packed(stage)? { format!("{packages}, libc6 (>= 2.36)") } else { packages.to_owned() })
}

/// Whether a binary has packed relocations (see `vfiod/build.rs`).
fn packed(stage: &Path) -> Result<bool> {
    let binaries = BINARIES.map(|(name, directory)| stage.join(directory).join(name));
    let output = Command::new("readelf").args(["--version-info", "--wide"]).args(binaries).output();
    let output = output.context("starting readelf")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).contains("GLIBC_ABI_DT_RELR"))
}

fn architecture() -> Result<String> {
    let output = Command::new("dpkg").arg("--print-architecture").output()?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
