//! The product as a user calls it: `busctl` and `vfioctl`, nothing of its code.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::command::{Ran, run, run_unprivileged};

const MANAGER: [&str; 3] = ["org.vfiod1", "/org/vfiod1", "org.vfiod1.Manager"];

/// Calls a method of the Manager with `busctl`; `arguments` are its signature and values.
pub fn busctl<'a>(method: &'a str, arguments: impl IntoIterator<Item = &'a str>) -> Result<Ran> {
    let call = ["busctl", "--json=short", "call"].into_iter().chain(MANAGER).chain([method]);
    run(call.chain(arguments))
}

/// Attaches one device with `busctl`, as a hook would; returns the lease's id.
pub fn busctl_attach(device: &str, tenant: &str) -> Result<String> {
    let answer = busctl("Attach", ["assa{sv}", "1", device, tenant, "0"])?.success()?;
    let answer: Value = serde_json::from_str(&answer)?;
    let id = answer["data"][0].as_str().with_context(|| format!("no lease in {answer}"))?;
    Ok(id.to_owned())
}

/// Releases with `busctl`; returns the ids of the leases that ended.
pub fn busctl_release(target: &str) -> Result<Vec<String>> {
    let answer = busctl("Release", ["sa{sv}", target, "0"])?.success()?;
    let answer: Value = serde_json::from_str(&answer)?;
    Ok(serde_json::from_value(answer["data"][0].clone())?)
}

/// Runs `vfioctl` as root.
pub fn vfioctl<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Result<Ran> {
    run(["vfioctl"].into_iter().chain(arguments))
}

/// Runs `vfioctl --json` as root and parses what it prints.
pub fn vfioctl_json<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Result<Value> {
    let text = vfioctl(["--json"].into_iter().chain(arguments))?.success()?;
    serde_json::from_str(&text).with_context(|| format!("vfioctl --json printed {text:?}"))
}

/// Gives what cannot be reset, and is kept for its last tenant, to all: scenarios have tenants of their
/// own.
pub fn give_to_all() -> Result<()> {
    let kept = vfioctl_json(["quarantine"])?;
    let kept = kept.as_array().into_iter().flatten().filter(|device| !device["but_for"].is_null());
    for address in kept.filter_map(|device| device["address"].as_str()) {
        vfioctl(["quarantine", "clear", address])?.success()?;
    }
    Ok(())
}

/// Runs `vfioctl` as a user without privileges.
pub fn vfioctl_unprivileged<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Result<Ran> {
    run_unprivileged(["vfioctl"].into_iter().chain(arguments))
}

/// The record of one lease.
pub fn lease(id: &str) -> Result<Option<Value>> {
    let leases = vfioctl_json(["leases"])?;
    let leases = leases.as_array().context("leases are no array")?;
    Ok(leases.iter().find(|lease| lease["id"] == id).cloned())
}

/// The record of one device.
pub fn device(address: &str) -> Result<Option<Value>> {
    let devices = vfioctl_json(["list", "--all"])?;
    let devices = devices.as_array().context("devices are no array")?;
    Ok(devices.iter().find(|device| device["address"] == address).cloned())
}

/// An error if the program succeeded, ended with another status, or did not say all of `words`.
pub fn refused(ran: &Ran, status: i32, words: &[&str]) -> Result<()> {
    let said = format!("{}{}", ran.stdout, ran.stderr);
    ensure!(ran.status == Some(status), "it ended with {:?}, not {status}:\n{said}", ran.status);
    for word in words {
        ensure!(said.contains(word), "it does not say {word:?}:\n{said}");
    }
    ensure!(!said.contains("panicked") && !said.contains("RUST_BACKTRACE"), "a panic:\n{said}");
    Ok(())
}
