//! `cargo xtask deb`: the Debian package, staged file by file and packed with dpkg-deb.
//!
//! The one place that says what of the repository is installed where.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{exec, host, progress};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Binaries and where they go.
const BINARIES: [(&str, &str); 2] = [("vfiod", "usr/libexec"), ("vfioctl", "usr/bin")];

/// Files of the repository by directory and end of name, and where they go: first match counts.
const FILES: [(&str, &str, &str); 10] = [
    ("systemd", "org.vfiod1.service", "usr/share/dbus-1/system-services"),
    ("systemd", "org.vfiod1.conf", "usr/share/dbus-1/system.d"),
    ("systemd", ".xml", "usr/share/dbus-1/interfaces"),
    ("systemd", ".policy", "usr/share/polkit-1/actions"),
    ("systemd", ".service", "usr/lib/systemd/system"),
    ("systemd", ".socket", "usr/lib/systemd/system"),
    ("systemd", ".sysusers", "usr/lib/sysusers.d"),
    ("systemd", ".tmpfiles", "usr/lib/tmpfiles.d"),
    ("udev", ".rules", "usr/lib/udev/rules.d"),
    ("docs", ".example.toml", "usr/share/doc/vfiod/examples"),
];

/// Names that systemd wants to end differently than they do among other files.
const RENAMED: [&str; 2] = [".sysusers", ".tmpfiles"];

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
    host::require(&[("/usr/bin/dpkg-shlibdeps", "dpkg-dev"), ("/usr/bin/gzip", "gzip")])?;
    let binaries = exec::build_product()?;
    progress::step("packing the Debian package", || {
        let output = exec::output()?;
        let stage = output.join("deb");
        if stage.exists() {
            fs::remove_dir_all(&stage)?;
        }
        for (name, directory) in BINARIES {
            install(&exec::named(&binaries, name)?, &stage.join(directory).join(name), 0o755)?;
        }
        stage_files(&stage)?;
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
            Command::new("lintian")
                .args(["--fail-on", "error", "--allow-root", "--no-tag-display-limit"])
                .arg(package),
        )
    })
}

fn stage_files(stage: &Path) -> Result<()> {
    for directory in ["systemd", "udev", "docs"] {
        for entry in fs::read_dir(exec::root().join(directory))? {
            let source = entry?.path();
            let name = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let rule =
                FILES.iter().find(|(from, end, _)| *from == directory && name.ends_with(end));
            let Some((.., destination)) = rule else { continue };
            let renamed = RENAMED.iter().find_map(|end| name.strip_suffix(end));
            let name = renamed.map_or(name.clone(), |stem| format!("{stem}.conf"));
            install(&source, &stage.join(destination).join(name), 0o644)?;
        }
    }
    Ok(())
}

fn stage_documents(stage: &Path) -> Result<()> {
    let documents = stage.join("usr/share/doc/vfiod");
    fs::create_dir_all(&documents)?;
    fs::write(documents.join("copyright"), COPYRIGHT)?;
    let changelog = documents.join("changelog.gz");
    fs::write(changelog.with_extension(""), CHANGELOG.replace("@VERSION@", VERSION))?;
    exec::quiet(Command::new("gzip").args(["-9", "-n"]).arg(changelog.with_extension("")))
}

fn stage_control(stage: &Path) -> Result<()> {
    let control = CONTROL
        .replace("@VERSION@", VERSION)
        .replace("@ARCHITECTURE@", &architecture()?)
        .replace("@LIBRARIES@", &libraries(stage)?);
    let directory = stage.join("DEBIAN");
    fs::create_dir_all(&directory)?;
    fs::write(directory.join("control"), control)?;
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
    Ok(packages.context("dpkg-shlibdeps named no libraries")?.to_owned())
}

fn architecture() -> Result<String> {
    let output = Command::new("dpkg").arg("--print-architecture").output()?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
