//! Devices that report errors: the kernel is told of one as if its device had.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libvfio::address::PciAddress;

use crate::lab::product::{busctl_attach, busctl_release, refused, vfioctl, vfioctl_json};
use crate::lab::{Lab, command, sysfs, wait_until};
use crate::machine::NIC;

/// The kernel tells its drivers of each error before it counts the next.
const LIMIT: Duration = Duration::from_secs(30);

/// An error that nobody can correct, while a tenant has the device.
pub(super) fn uncorrectable(lab: &mut Lab) -> Result<()> {
    let device = NIC.address;
    let before = total(device)?;
    let id = busctl_attach(device, "tenant-a")?;
    command::run(["modprobe", "aer_inject"])?.success()?;
    fs::write("/dev/aer_inject", injected(device.parse()?)).context("/dev/aer_inject")?;
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

/// A completion that the device aborted, in the words of the kernel's `struct aer_error_inj`
/// (`drivers/pci/pcie/aer_inject.c`).
fn injected(device: PciAddress) -> Vec<u8> {
    const COMPLETER_ABORT: u32 = 1 << 15;
    let place = [device.bus(), device.device(), device.function(), 0];
    let words = [COMPLETER_ABORT, 0, 0, 0, 0, 0, device.domain()];
    place.into_iter().chain(words.into_iter().flat_map(u32::to_ne_bytes)).collect()
}

/// How many non-fatal errors the kernel has counted.
fn total(device: &str) -> Result<u64> {
    let text = sysfs::read(device, "aer_dev_nonfatal")?;
    let total = text.lines().find_map(|line| line.strip_prefix("TOTAL_ERR_NONFATAL "));
    Ok(total.unwrap_or_default().trim().parse()?)
}
