//! Devices that report errors: the machine has them do so.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use crate::lab::product::{busctl_attach, busctl_release, refused, vfioctl, vfioctl_json};
use crate::lab::{Lab, sysfs, wait_until};
use crate::machine::FAR_NIC;

/// The kernel tells its drivers of each error before it counts the next.
const LIMIT: Duration = Duration::from_secs(30);

/// An error that nobody can correct, while a tenant has the device.
pub(super) fn uncorrectable(lab: &mut Lab) -> Result<()> {
    let device = FAR_NIC.address;
    let before = total(device)?;
    let id = busctl_attach(device, "tenant-a")?;
    let command = format!("pcie_aer_inject_error {} COMP_ABORT", FAR_NIC.id);
    let said = lab.qmp("human-monitor-command", json!({"command-line": command}))?;
    ensure!(said.as_str().is_some_and(|said| said.starts_with("OK")), "the machine said {said}");
    wait_until("the kernel counts the error", LIMIT, || Ok(total(device)? > before))?;
    lab.step("a leased device aborted a completion, which nobody can correct")?;

    ensure!(busctl_release(&id)? == [id.as_str()]);
    let ran = vfioctl(["attach", device, "--tenant", "tenant-b"])?;
    refused(&ran, 11, &[device, "CmpltAbrt (non-fatal)", "quarantine clear"])?;
    let history = vfioctl_json(["history", device])?;
    let entries = history.as_array().into_iter().flatten();
    let told =
        entries.filter(|entry| entry["text"].as_str().is_some_and(|t| t.contains("CmpltAbrt")));
    let events: Vec<_> = told.filter_map(|entry| entry["event"].as_str()).collect();
    ensure!(events == ["quarantined", "released"], "{history}");
    vfioctl(["history", "--check"])?.success()?;
    lab.step("after its lease it is in quarantine, with the cause, and the history says so")?;

    vfioctl(["quarantine", "clear", device])?.success()?;
    let next = busctl_attach(device, "tenant-b")?;
    ensure!(busctl_release(&next)? == [next.as_str()]);
    lab.step("cleared by a person, it goes to the next tenant, whom the old error does not concern")
}

/// How many non-fatal errors the kernel has counted.
fn total(device: &str) -> Result<u64> {
    let text = sysfs::read(device, "aer_dev_nonfatal")?;
    let total = text.lines().find_map(|line| line.strip_prefix("TOTAL_ERR_NONFATAL "));
    Ok(total.unwrap_or_default().trim().parse()?)
}
