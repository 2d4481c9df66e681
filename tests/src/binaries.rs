//! The programs of this workspace, for tests that start them. Builds those that are missing;
//! starts nothing else.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Once;

/// Where cargo puts the programs of this build, those of `vfiod` and the simulator among them.
///
/// # Panics
///
/// If they are not there and cannot be built.
pub fn directory() -> PathBuf {
    static BUILT: Once = Once::new();
    let own = std::env::current_exe().expect("a program knows where it is");
    let directory = own.parent().expect("cargo's directories");
    // Tests are in `deps` in the directory of the programs.
    let above = directory.ends_with("deps").then(|| directory.parent()).flatten();
    let directory = above.unwrap_or(directory).to_owned();
    BUILT.call_once(|| {
        if !["vfiod", "vfioctl", "vfiod-sim"].iter().all(|name| directory.join(name).exists()) {
            build(directory.ends_with("release"));
        }
    });
    directory
}

fn build(release: bool) {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["build", "--quiet", "--package", "vfiod", "--package", "vfiod-tests"])
        .args(["--features", "vfiod-tests/sim", "--bins"])
        .args(release.then_some("--release"))
        .status();
    assert!(status.is_ok_and(|status| status.success()), "the programs cannot be built");
}
