//! The example launcher: a device's DMA with descriptors it was handed, inside its mappings and out.

use anyhow::{Result, ensure};

use super::refusals::with_rule;
use crate::lab::command::run_unprivileged;
use crate::lab::product::vfioctl_json;
use crate::lab::{Lab, PAYLOAD, command, sysfs};
use crate::machine::EDU;

pub(super) fn run(lab: &mut Lab) -> Result<()> {
    command::run(["modprobe", "kvm_amd"])?.success()?;
    command::run(["usermod", "--append", "--groups=kvm", "tester"])?.success()?;
    command::run(["dmesg", "--clear"])?.success()?;
    let launcher = format!("{PAYLOAD}/launcher");
    with_rule("action.lookup('tenant') == 'ours'", || {
        let said = run_unprivileged([launcher.as_str(), EDU.address, "ours"])?.success()?;
        for words in ["KVM knows", "it is 010000ed", "round trip: 4096 bytes", "bytes unchanged"] {
            ensure!(said.contains(words), "it does not say {words:?}:\n{said}");
        }
        for line in said.lines() {
            lab.step(format!("  launcher │ {line}"))?;
        }
        Ok(())
    })?;
    let log = command::run(["dmesg"])?.success()?;
    let (device, address) = (&EDU.address[5..], "0x200000");
    let fault = |line: &&str| line.contains("DMA Write") && line.contains(device);
    let fault = log.lines().find(|line| fault(line) && line.contains(address));
    let fault = fault.map(str::to_owned);
    ensure!(fault.is_some(), "the kernel tells of no fault at {address}:\n{log}");
    lab.step(format!("the IOMMU stopped the other: {}", fault.unwrap_or_default().trim()))?;
    ensure!(vfioctl_json(["leases"])?.as_array().is_some_and(Vec::is_empty), "a lease is left");
    ensure!(sysfs::driver(EDU.address).is_none(), "it is not back");
    lab.step("an ordinary user did that; the lease ended with the launcher")
}
