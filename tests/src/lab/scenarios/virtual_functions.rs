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

/// What a tenant is given for its time: an address, a VLAN, no spoof check. Then it is as before.
pub(super) fn shape(lab: &mut Lab) -> Result<()> {
    const MAC: &str = "52:54:00:12:34:56";
    let made = set(NIC.address, 2)?;
    let before = settings()?;
    let attach = ["attach", &made[0], "--tenant", "tenant-a", "--mac", MAC, "--vlan", "7"];
    let attach: Vec<&str> = attach.into_iter().chain(["--spoof-check", "off"]).collect();
    let plan = vfioctl(attach.iter().copied().chain(["--dry-run"]))?.success()?;
    for word in [MAC, "VLAN 7", "spoof check off"] {
        ensure!(plan.contains(word), "the dry run does not say {word}:\n{plan}");
    }
    ensure!(settings()? == before, "a dry run changed something");
    vfioctl(attach)?.success()?;
    let shaped = settings()?;
    for word in [MAC, "vlan 7", "spoof checking off"] {
        ensure!(shaped[0].contains(word), "ip does not say {word}: {}", shaped[0]);
    }
    ensure!(shaped[1] == before[1], "the other virtual function changed: {}", shaped[1]);
    lab.step(format!("ip says of it what was asked for: {}", shaped[0].trim()))?;

    // A guest asks the card's own driver for its address, and that answers while the card is up.
    let interface = interface()?;
    command::run(["ip", "link", "set", "dev", &interface, "up"])?.success()?;
    let mut guest = Guest::start([made[0].as_str()])?;
    let seen = guest.network()?;
    ensure!(seen == [MAC], "the guest has {seen:?}");
    lab.step("the guest's interface has that address")?;
    guest.power_off()?;
    command::run(["ip", "link", "set", "dev", &interface, "down"])?.success()?;
    vfioctl(["release", &made[0]])?.success()?;
    ensure!(settings()? == before, "they are {:?}, were {before:?}", settings()?);
    lab.step("released, nothing of it is left")?;

    set(NVME.address, 1)?;
    let disk = sysfs::virtual_function(NVME.address, 0)?;
    let ran = vfioctl(["attach", &disk, "--tenant", "tenant-a", "--vlan", "7"])?;
    refused(&ran, 14, &[&disk, "no network interface"])?;
    let ran = vfioctl(["attach", &made[0], "--tenant", "tenant-a", "--vlan", "4095"])?;
    refused(&ran, 2, &["VLAN", "4094"])?;
    let ran = vfioctl(["attach", &made[0], "--tenant", "tenant-a", "--mac", "01:00:5e:00:00:01"])?;
    refused(&ran, 2, &["52:54:00"])?;
    for physical in [NIC, NVME] {
        set(physical.address, 0)?;
    }
    lab.step("what is no network function, and what is no address or VLAN, is refused")
}

/// The network card's own interface.
fn interface() -> Result<String> {
    let net = sysfs::path(NIC.address, "net");
    let interface = std::fs::read_dir(net)?.next().context("no interface")??.file_name();
    Ok(interface.to_string_lossy().into_owned())
}

/// What `ip` says of each virtual function of the network card, a line each.
fn settings() -> Result<Vec<String>> {
    let shown = command::run(["ip", "link", "show", "dev", &interface()?])?.success()?;
    let of_virtual = |line: &&str| line.trim().starts_with("vf ");
    Ok(shown.lines().filter(of_virtual).map(str::to_owned).collect())
}

/// Has the product set a number; the addresses it answers.
fn set(physical: &str, count: u16) -> Result<Vec<String>> {
    let made = vfioctl_json(["vf", "set", physical, &count.to_string()])?;
    Ok(serde_json::from_value(made)?)
}
