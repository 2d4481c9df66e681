//! Running programs, cargo among them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::progress;

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Cargo's target directory, where all that is made goes.
pub(crate) fn target() -> Result<PathBuf> {
    let text = cargo().args(["metadata", "--format-version=1", "--no-deps"]).output()?.stdout;
    let metadata: Value = serde_json::from_slice(&text).context("cargo metadata")?;
    let target = metadata["target_directory"].as_str().context("cargo metadata")?;
    Ok(PathBuf::from(target))
}

/// The cargo that runs us, at the repository's root.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// Runs a program whose output only matters if it fails.
pub(crate) fn quiet(command: &mut Command) -> Result<()> {
    let output = start_error(command, Command::output)?;
    if !output.status.success() {
        let (out, err) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        bail!("{command:?} ended with {}\n{out}{err}", output.status);
    }
    Ok(())
}

/// Runs a program that speaks for itself.
pub(crate) fn loud(command: &mut Command) -> Result<()> {
    let status = start_error(command, Command::status)?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(())
}

fn start_error<T>(
    command: &mut Command,
    start: impl FnOnce(&mut Command) -> std::io::Result<T>,
) -> Result<T> {
    let program = command.get_program().to_owned();
    start(command).with_context(|| format!("starting {}", program.display()))
}

/// Builds the product's binaries: the daemon, the command line and the simulator.
pub(crate) fn build_product() -> Result<Vec<PathBuf>> {
    progress::step("building vfiod, vfioctl and vfiod-sim", || {
        let mut built =
            build(cargo().args(["build", "--release", "--package", "vfiod", "--bins"]))?;
        built.extend(build(
            cargo()
                .args(["build", "--release", "--package", "vfiod-tests", "--bin", "vfiod-sim"])
                .args(["--no-default-features", "--features", "sim"]),
        )?);
        Ok(built)
    })
}

/// Builds what measures simulated hosts.
pub(crate) fn build_measure() -> Result<PathBuf> {
    let built = progress::step("building what measures simulated hosts", || {
        let package = ["build", "--release", "--package", "vfiod-tests", "--bin", "measure"];
        build(cargo().args(package).args(["--no-default-features", "--features", "sim"]))
    })?;
    named(&built, "measure")
}

/// Builds what runs inside the lab.
pub(crate) fn build_agent() -> Result<PathBuf> {
    let built = progress::step("building the lab's agent", || {
        let package = ["build", "--release", "--package", "vfiod-tests"];
        build(cargo().args(package).args(["--bin", "lab-agent"]))
    })?;
    named(&built, "lab-agent")
}

/// Builds the example launcher, which the lab runs as a user would.
pub(crate) fn build_launcher() -> Result<PathBuf> {
    let built = progress::step("building the example launcher", || {
        let package = ["build", "--release", "--package", "libvfio", "--features", "client"];
        build(cargo().args(package).args(["--example", "launcher"]))
    })?;
    named(&built, "launcher")
}

/// Builds the init of the lab's guests, linked statically: it is all there is in a guest.
pub(crate) fn build_guest_init() -> Result<PathBuf> {
    let built = progress::step("building the guest's init", || {
        build(
            cargo()
                .env("RUSTFLAGS", "-C target-feature=+crt-static")
                .args(["build", "--release", "--target", "x86_64-unknown-linux-gnu"])
                .args(["--package", "vfiod-tests", "--bin", "guest-init"])
                .args(["--no-default-features", "--features", "guest"]),
        )
    })?;
    named(&built, "guest-init")
}

/// Builds the fuzz targets with libFuzzer and the compiler's coverage counters, which stable Rust
/// has too; the flags are those of cargo-fuzz. The target is named so that they are not for what
/// runs while building.
pub(crate) fn build_fuzz(directory: &Path) -> Result<PathBuf> {
    let flags = "--cfg fuzzing -Cdebug-assertions -Coverflow-checks -Cpasses=sancov-module \
                 -Cllvm-args=-sanitizer-coverage-level=4 \
                 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                 -Cllvm-args=-sanitizer-coverage-pc-table \
                 -Cllvm-args=-sanitizer-coverage-trace-compares";
    let built = progress::step("building the fuzz targets", || {
        build(
            cargo()
                .env("RUSTFLAGS", flags)
                .env("CARGO_PROFILE_RELEASE_LTO", "off")
                .args(["build", "--release", "--target", "x86_64-unknown-linux-gnu"])
                .args(["--package", "vfiod-tests", "--bin", "vfiod-fuzz"])
                .args(["--no-default-features", "--features", "fuzz", "--target-dir"])
                .arg(directory),
        )
    })?;
    named(&built, "vfiod-fuzz")
}

/// The executable of that name among those that [`build`] made.
pub(crate) fn named(executables: &[PathBuf], name: &str) -> Result<PathBuf> {
    let found = executables.iter().find(|path| path.file_name().is_some_and(|file| file == name));
    found.cloned().with_context(|| format!("cargo did not build {name}"))
}

/// Runs `cargo build` and returns the executables it made or found fresh.
fn build(command: &mut Command) -> Result<Vec<PathBuf>> {
    let messages = messages(command)?;
    let executables = messages.iter().filter_map(|message| message["executable"].as_str());
    Ok(executables.map(PathBuf::from).collect())
}

/// Runs a cargo that builds and returns what it says of each thing that it made or found fresh.
pub(crate) fn messages(command: &mut Command) -> Result<Vec<Value>> {
    command.arg("--quiet").arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit());
    let output = start_error(command, Command::output)?;
    ensure!(output.status.success(), "{command:?} ended with {}", output.status);
    let messages = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>();
    Ok(messages.collect::<Result<_, _>>()?)
}
