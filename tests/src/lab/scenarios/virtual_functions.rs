//! Virtual functions: made, counted, leased and taken away through the product.

use anyhow::{Context, Result, ensure};

use crate::lab::product::{lease, refused, vfioctl, vfioctl_json};
use crate::lab::{Guest, Lab, command, sysfs};
use crate::machine::{NIC, NIC_VF, NVME};

/// From none to seven, to three, to none, and back; leased ones stay.
pub(super) fn number(lab: &mut Lab) -> Result<()> {
    for count in [7, 3, 0] {
        let plan = vfioctl(["vf", "set", NIC.address, &count.to_string(), "--dry-run"])?;
        ensure!(plan.success()?.contains("virtual functions of"), "no steps to {count}");
        let made = set(NIC.address, count)?;
        ensure!(made.len() == usize::from(count), "{count} asked for, {made:?} made");
        ensure!(sysfs::read(NIC.address, "sriov_numvfs")? == count.to_string());
        ensure!(made.iter().all(|vf| sysfs::driver(vf).is_none()), "a host driver has one");
        let listed = vfioctl_json(["vf", "list", NIC.address])?;
        let listed = listed.as_array().context("no array")?;
        ensure!(listed.len() == usize::from(count), "{listed:?}");
        lab.step(format!("{} has {count}, the kernel and vfioctl agree", NIC.address))?;
    }
    ensure!(sysfs::read(NIC.address, "sriov_drivers_autoprobe")? == "1", "autoprobe stayed off");

    let nvme = set(NVME.address, 4)?;
    ensure!(nvme.iter().all(|vf| sysfs::driver(vf).is_none()), "nvme has one of {nvme:?}");
    let made = set(NIC.address, 2)?;
    let all = vfioctl(["vf", "list"])?.success()?;
    ensure!(all.contains(NIC.address) && all.contains(NVME.address), "{all}");
    set(NVME.address, 0)?;
    lab.step("disk controllers have virtual functions of their own, which no host driver takes")?;

    let attach = ["attach", "--vf-of", NIC.address, "--count", "2", "--tenant", "tenant-a"];
    let attached = vfioctl_json(attach)?;
    let id = attached["id"].as_str().with_context(|| format!("no lease in {attached}"))?;
    ensure!(attached["devices"] == serde_json::json!(made), "{attached}");
    let again = vfioctl(["attach", "--vf-of", NIC.address, "--tenant", "tenant-b"])?;
    refused(&again, 5, &["0 virtual functions free of 2"])?;
    let guest = Guest::start([made[0].as_str()])?;
    ensure!(guest.sees(NIC_VF.0, NIC_VF.1), "the guest does not see its virtual function");
    lab.step("a tenant got the two lowest that were free, and a guest sees its own")?;

    for number in ["0", "5"] {
        let ran = vfioctl(["vf", "set", NIC.address, number])?;
        refused(&ran, 8, &[&made[0], &made[1], id])?;
    }
    let whole = vfioctl(["attach", NIC.address, "--tenant", "tenant-b"])?;
    refused(&whole, 5, &["2 virtual functions enabled", "vf set"])?;
    ensure!(sysfs::read(NIC.address, "sriov_numvfs")? == "2");
    ensure!(lease(id)?.is_some_and(|lease| lease["state"] == "active"), "the lease is not active");
    guest.power_off()?;
    lab.step("their number stayed while they were leased, and the guest was not disturbed")?;

    vfioctl(["release", id])?.success()?;
    set(NIC.address, 0)?;
    let history = vfioctl(["leases", "--history", "--last", "1"])?.success()?;
    ensure!(history.contains("from 2 to 0 virtual functions"), "{history}");
    let refusal = vfioctl(["vf", "set", NIC.address, "8"])?;
    refused(&refusal, 2, &["ask for 0 to 7"])?;
    command::run(["udevadm", "settle"])?.success()?;
    lab.step("released, all were taken away; more than the card has are refused")
}

/// Has the product set a number; the addresses it answers.
fn set(physical: &str, count: u16) -> Result<Vec<String>> {
    let made = vfioctl_json(["vf", "set", physical, &count.to_string()])?;
    Ok(serde_json::from_value(made)?)
}
