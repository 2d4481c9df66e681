//! Virtual functions: made, counted, leased and taken away through the product.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::lab::product::{lease, refused, vfioctl, vfioctl_json};
use crate::lab::{Guest, Lab, command, sysfs, wait_until};
use crate::machine::{GPU, NIC, NIC_VF, NVME};

/// How long anything may take that the kernel reports.
const LIMIT: Duration = Duration::from_secs(30);

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
    command::run(["udevadm", "settle"])?.success()?;
    lab.step("released, all were taken away")?;
    bad_numbers()?;
    lab.step("more than there can be are refused, and any where there is no SR-IOV or no driver")
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

    let shown = vfioctl_json(["vf", "show", &made[0]])?;
    let offered = shown["settings"].as_array().context("no settings")?;
    let vlan = offered.iter().find(|setting| setting["setting"] == "vlan");
    ensure!(vlan.is_some_and(|v| v["backend"] == "network" && v["most"] == 4094), "{shown}");
    ensure!(shown["msix_vectors"].is_u64() && shown["vf_index"] == 0, "{shown}");
    let shown = vfioctl(["vf", "show", &made[0]])?.success()?;
    ensure!(shown.contains("--spoof-check") && shown.contains("0 to 4094"), "{shown}");
    lab.step("what can be set on a virtual function is shown, with what it may be")?;

    bad_settings(&made[0])?;
    for physical in [NIC, NVME] {
        set(physical.address, 0)?;
    }
    lab.step("what is no network function, and what no setting can be, is refused")
}

/// Each wrong setting, and one for what has none.
fn bad_settings(vf: &str) -> Result<()> {
    let before = settings()?;
    set(NVME.address, 1)?;
    let disk = sysfs::virtual_function(NVME.address, 0)?;
    // A rate takes a link, and no more than that has: the card's own driver knows both.
    let too_fast = ["--max-rate", "4000000"];
    let cases: [(&str, [&str; 2], i32, &[&str]); 8] = [
        (&disk, ["--vlan", "7"], 14, &[&disk, "no network interface"]),
        (&disk, ["--msix", "4"], 14, &[&disk, "no interrupt vectors"]),
        (vf, ["--vlan", "4095"], 2, &["VLAN", "4094"]),
        (vf, ["--mac", "01:00:5e:00:00:01"], 2, &["52:54:00"]),
        (vf, too_fast, 2, &["rate"]),
        (vf, ["--msix", "4"], 14, &["no interrupt vectors"]),
        (vf, ["--vram-quota", "1G"], 14, &["sriov_admin"]),
        (vf, ["--vgpu-type", "1145"], 14, &["no vGPU types"]),
    ];
    for (device, [option, value], status, words) in cases {
        let ran = vfioctl(["attach", device, "--tenant", "tenant-a", option, value])?;
        refused(&ran, status, words).with_context(|| format!("{device} {option} {value}"))?;
    }
    ensure!(settings()? == before, "something was set");
    Ok(())
}

/// The driver of the physical function goes while its virtual ones are leased.
pub(super) fn unloaded(lab: &mut Lab) -> Result<()> {
    let made = set(NIC.address, 2)?;
    let attach = ["attach", "--vf-of", NIC.address, "--count", "2", "--tenant", "tenant-a"];
    let attached = vfioctl_json(attach)?;
    let id = attached["id"].as_str().with_context(|| format!("no lease in {attached}"))?;
    command::run(["modprobe", "-r", "igb"])?.success()?;
    let start = Instant::now();
    let failed = || Ok(lease(id)?.is_some_and(|lease| lease["state"] == "failed"));
    wait_until("the lease fails", LIMIT, failed)?;
    let took = start.elapsed();
    let record = lease(id)?.context("the lease has gone")?;
    let reason = record["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains(&made[0]) && reason.contains(NIC.address), "{record}");
    lab.step(format!("reported {} ms after its driver had gone: {reason}", took.as_millis()))?;

    ensure!(command::run(["systemctl", "is-active", "vfiod"])?.success()?.trim() == "active");
    let listed = vfioctl(["vf", "list"])?.success()?;
    ensure!(listed.contains(NVME.address) && listed.contains(NIC.address), "{listed}");
    let ran = vfioctl(["vf", "set", NIC.address, "1"])?;
    refused(&ran, 14, &["no driver", "modprobe igb"])?;
    lab.step("the daemon is well, and says which driver is missing")?;

    command::run(["modprobe", "igb"])?.success()?;
    command::run(["udevadm", "settle"])?.success()?;
    let driven = || Ok(sysfs::driver(NIC.address).as_deref() == Some("igb"));
    wait_until("igb has its card", LIMIT, driven)?;
    let again = set(NIC.address, 2)?;
    ensure!(again == made, "{again:?}, not {made:?}");
    let taken = vfioctl_json(attach)?;
    vfioctl(["release", taken["id"].as_str().context("no lease")?])?.success()?;
    vfioctl(["release", id])?.success()?;
    ensure!(lease(id)?.is_none(), "the failed lease is still listed");
    set(NIC.address, 0)?;
    ensure!(sysfs::read(NIC.address, "sriov_drivers_autoprobe")? == "1", "autoprobe stayed off");
    lab.step("with its driver back, virtual functions are made and leased as before")
}

/// A number for what has no virtual functions, or nobody to make them.
fn bad_numbers() -> Result<()> {
    let ran = vfioctl(["vf", "set", NIC.address, "8"])?;
    refused(&ran, 2, &["ask for 0 to 7"])?;
    let ran = vfioctl(["vf", "set", GPU.address, "1"])?;
    refused(&ran, 14, &["SR-IOV"])?;
    sysfs::write(NVME.address, "driver/unbind", NVME.address)?;
    let ran = vfioctl(["vf", "set", NVME.address, "1"]);
    let probe = std::path::Path::new("/sys/bus/pci/drivers_probe");
    std::fs::write(probe, NVME.address)?;
    refused(&ran?, 14, &["no driver", "modprobe nvme"])?;
    let back = || Ok(sysfs::driver(NVME.address).as_deref() == Some("nvme"));
    wait_until("nvme has its controller", LIMIT, back)
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
