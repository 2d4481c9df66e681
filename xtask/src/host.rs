//! What the host must offer beside Rust: root, and a few Debian packages, installed when missing.

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, ensure};

use crate::{exec, progress};

/// Fails with a remedy unless we are root: the lab needs mounts and chroot.
pub(crate) fn require_root() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the lab is set up with mounts and chroot: run this as root"
    );
    Ok(())
}

/// Installs those packages of `(file, package)` whose file is missing. What is built beside each other
/// may call it at a time; `apt-get` is run by one.
pub(crate) fn require(files: &[(&str, &str)]) -> Result<()> {
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _one = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    let missing: Vec<&str> = files
        .iter()
        .filter(|(file, _)| !Path::new(file).exists())
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    progress::step(&format!("installing {} on this machine", missing.join(", ")), || {
        exec::quiet(Command::new("apt-get").args(["--quiet", "update"]))?;
        exec::quiet(
            Command::new("apt-get")
                .env("DEBIAN_FRONTEND", "noninteractive")
                .args(["--quiet", "--yes", "--no-install-recommends", "install"])
                .args(&missing),
        )
    })
}
