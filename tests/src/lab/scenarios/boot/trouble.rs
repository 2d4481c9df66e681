//! What a policy meets on the way: host drivers in the initial file system, identical cards, cards
//! that move to other slots, one that is not there and one that the kernel sleeps on.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{
    FILE, LIMIT, PHASE, RULES, UNIT, is_up, kernel_log, next, provisioned, show, what_it_said,
};
use crate::lab::product::{vfioctl, vfioctl_json};
use crate::lab::{Lab, command, sysfs, wait_until};
use crate::machine::{
    self, EDU, FAR_NIC, FREE_PORT, Function, GPU, GPU_AUDIO, SWITCH_NIC_A, SWITCH_NIC_B, THIRD_NIC,
};

/// Drivers of the host that live in the initial file system, as `/etc/initramfs-tools/modules` has
/// them.
const FORCED: &str = "virtio_blk\next4\nbochs\nsnd_hda_intel\nigbvf\ne1000e\n";
/// Nothing but those, and packed as fast as can be, for the sake of the emulated processor.
const INITRAMFS: &str = "MODULES=list\nCOMPRESS=gzip\nCOMPRESSLEVEL=1\n";
const MODPROBE: &str = "/etc/modprobe.d/vfio.conf";
/// For how long provisioning may delay the boot.
const BOOT_LIMIT: u64 = 60;
/// The unit of somebody who has a virtual function of [`FAR_NIC`] open.
const HOLDER: &str = "lab-holder.service";
/// What the daemon may take beyond what it is given, on an emulated processor.
const SLACK: Duration = Duration::from_secs(10);

pub(in super::super) fn run(lab: &mut Lab) -> Result<()> {
    let phase = fs::read_to_string(PHASE).unwrap_or_default();
    match phase.as_str() {
        "" => prepare(lab),
        "initramfs" => initramfs(lab),
        "moved" => moved(lab),
        other => bail!("no phase '{other}'"),
    }
}

/// One card by its serial number, its twin by its address, and the third, by the way to it, stays
/// with the host.
fn policy() -> Result<String> {
    let serial = vfioctl_json(["show", SWITCH_NIC_A.address])?["serial"].clone();
    let serial = serial.as_str().context("the card has no serial number")?;
    let place = SWITCH_NIC_B.address;
    Ok(format!(
        "boot.limit = {BOOT_LIMIT}\n\
         [pool.gpus]\nmode = \"passthrough\"\nselect = [{{ vendor = \"1234\", class = \"gpu\" }}]\n\
         [pool.followed]\nmode = \"passthrough\"\nselect = [{{ serial = \"{serial}\" }}]\n\
         [pool.placed]\nmode = \"passthrough\"\nselect = [{{ address = \"{place}\" }}]\n\
         [pool.own]\nmode = \"host\"\nselect = [{{ path = \"0000:00/09.0\" }}]\n"
    ))
}

fn say(policy: &str) -> Result<()> {
    fs::create_dir_all("/etc/vfiod")?;
    fs::write(FILE, policy)?;
    vfioctl(["policy", "check"])?.success()?;
    vfioctl(["policy", "reload"])?.success().map(drop)
}

fn prepare(lab: &mut Lab) -> Result<()> {
    import(lab)?;
    say(&policy()?)?;
    vfioctl(["apply"])?.success()?;
    fs::write("/etc/initramfs-tools/modules", FORCED)?;
    fs::write("/etc/initramfs-tools/conf.d/lab", INITRAMFS)?;
    // The lab has none so far, and only those that are there are updated.
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    fs::write(format!("/boot/initrd.img-{}", release.trim()), "")?;
    let status = standing()?;
    let remedy = status["initramfs"].as_str().with_context(|| format!("up to date? {status}"))?;
    let reloaded = vfioctl(["policy", "reload"])?.success()?;
    ensure!(reloaded.contains(remedy), "{reloaded}");
    lab.step(format!("the initial file system does not have the policy; vfioctl says: {remedy}"))?;
    command::run(["sh", "-c", remedy])?.success()?;
    let status = standing()?;
    ensure!(status["initramfs"].is_null(), "{status}");
    lab.step("it was made anew, with the host's drivers forced into it; booting with it")?;
    next(lab, "initramfs")
}

/// A host that has all of the old ways becomes one with a policy.
fn import(lab: &mut Lab) -> Result<()> {
    let (a, b) = (SWITCH_NIC_A.address, SWITCH_NIC_B.address);
    fs::write(MODPROBE, "options vfio-pci ids=1234:1111,8086:2668\n")?;
    command::run(["driverctl", "set-override", b, "vfio-pci"])?.success()?;
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    ensure!(cmdline.contains("vfio-pci.ids="), "{cmdline}");
    let proposal = vfioctl(["policy", "import"])?.success()?;
    say(&proposal).with_context(|| proposal.clone())?;
    let pools = vfioctl_json(["policy", "show"])?;
    let inside = pools.to_string();
    for function in [GPU, GPU_AUDIO, EDU, SWITCH_NIC_B] {
        ensure!(inside.contains(function.address), "{} is not in {inside}", function.address);
    }
    ensure!(!inside.contains(a), "{inside}");
    for place in [MODPROBE, "/proc/cmdline", "/etc/driverctl.d"] {
        ensure!(proposal.contains(place), "{place} is not named:\n{proposal}");
    }
    vfioctl(["plan"])?.success()?;
    fs::remove_file(MODPROBE)?;
    command::run(["driverctl", "unset-override", b])?.success()?;
    let left = vfioctl(["policy", "import"])?.success()?;
    ensure!(!left.contains(MODPROBE) && !left.contains("driverctl.d"), "{left}");
    lab.step("modprobe.d, driverctl and the kernel's command line became a policy, which is right")
}

fn on_vfio(address: &str) -> Result<()> {
    let driver = sysfs::driver(address);
    ensure!(driver.as_deref() == Some("vfio-pci"), "{address} is on {driver:?}");
    Ok(())
}

/// No line of the kernel's log has a driver at an address.
fn never(driver: &str, address: &str) -> Result<()> {
    let log = kernel_log()?;
    let lines: Vec<&str> =
        log.lines().filter(|line| line.contains(driver) && line.contains(address)).collect();
    ensure!(lines.is_empty(), "{driver} had {address}: {lines:?}");
    Ok(())
}

fn initramfs(lab: &mut Lab) -> Result<()> {
    let result = provisioned()?;
    ensure!(result == "success", "provisioning: {result}\n{}", what_it_said()?);
    ensure!(Path::new("/run/initramfs").exists(), "the lab did not boot with what was made");
    let modules = fs::read_to_string("/proc/modules")?;
    for module in ["bochs", "snd_hda_intel", "igbvf", "e1000e"] {
        let there = modules.lines().any(|line| line.split(' ').next() == Some(module));
        ensure!(there, "{module} was not loaded");
    }
    for (driver, function) in [("bochs", GPU), ("snd_hda_intel", GPU_AUDIO)] {
        on_vfio(function.address)?;
        never(driver, function.address)?;
    }
    lab.step("host drivers loaded in the initial file system, and none of them ever had the GPU")?;
    for card in [SWITCH_NIC_A, SWITCH_NIC_B] {
        on_vfio(card.address)?;
        never("e1000e", card.address)?;
    }
    let own = sysfs::driver(THIRD_NIC.address);
    ensure!(own.as_deref() == Some("e1000e"), "the host's card is on {own:?}");
    lab.step("of three identical cards, by serial number, address and way, one is the host's")?;
    let verified = vfioctl(["verify-boot"])?.success()?;
    ensure!(verified.matches("from the start").count() == 4, "{verified}");
    ensure!(!verified.contains("initial file system"), "{verified}");
    lab.step("verify-boot says of all four that they were there from the start")?;

    for (pool, rest) in [
        ("far", format!("{{ address = \"{}\" }}]\nvfs = 2\n", FAR_NIC.address)),
        ("absent", "{ vendor = \"10de\" }]\n".to_owned()),
    ] {
        let more = format!("[pool.{pool}]\nmode = \"passthrough\"\nselect = [{rest}");
        fs::write(FILE, fs::read_to_string(FILE)? + &more)?;
    }
    vfioctl(["policy", "reload"])?.success()?;
    hold()?;
    // The first to a free port, its twin to where it was, the third to where that was.
    let moves = [(SWITCH_NIC_A, FREE_PORT.0), (SWITCH_NIC_B, "switch-a"), (THIRD_NIC, "switch-b")];
    for (card, _) in moves {
        lab.qmp("device_del", serde_json::json!({"id": card.id}))?;
        wait_until("the card goes", LIMIT, || Ok(!sysfs::exists(card.address)))?;
    }
    for (card, port) in moves {
        plug(lab, card, port)?;
    }
    lab.step("the cards were plugged into other slots; somebody will hold a virtual function")?;
    next(lab, "moved")
}

fn plug(lab: &mut Lab, card: Function, port: &str) -> Result<()> {
    // The machine lets go of a card somewhat later than its kernel.
    wait_until("the card can be plugged in", LIMIT, || {
        Ok(lab.qmp("device_add", machine::plugged(card, port)).is_ok())
    })
}

/// From the next boot on, before provisioning.
fn hold() -> Result<()> {
    let agent = "/usr/local/bin/lab-holder";
    fs::copy("/lab/lab-agent", agent)?;
    let unit = format!(
        "[Unit]\nAfter=systemd-udev-trigger.service\nBefore={UNIT} lab-agent.service\n\
         [Service]\nType=notify\nNotifyAccess=all\nExecStart={agent} --hold {}\n\
         [Install]\nWantedBy=multi-user.target\n",
        FAR_NIC.address
    );
    fs::write(format!("/etc/systemd/system/{HOLDER}"), unit)?;
    command::run(["systemctl", "enable", HOLDER])?.success().map(drop)
}

/// Where the host stands, well or not.
fn standing() -> Result<Value> {
    let told = vfioctl(["--json", "status"])?;
    serde_json::from_str(&told.stdout).with_context(|| format!("{}{}", told.stdout, told.stderr))
}

fn unit<'a>(status: &'a Value, device: &str) -> Result<&'a Value> {
    let units = status["units"].as_array().context("no units")?;
    units.iter().find(|unit| unit["device"] == device).with_context(|| format!("{status}"))
}

fn moved(lab: &mut Lab) -> Result<()> {
    fs::remove_file(PHASE)?;
    let result = provisioned()?;
    ensure!(result != "success", "provisioning came to its end");
    wait_until("the host is up", LIMIT, is_up)?;
    let at = |property| Ok::<u64, anyhow::Error>(show(UNIT, property)?.parse()?);
    let began = at("ExecMainStartTimestampMonotonic")?;
    let took = Duration::from_micros(at("ExecMainExitTimestampMonotonic")?.saturating_sub(began));
    let limit = Duration::from_secs(BOOT_LIMIT);
    ensure!(took < limit + SLACK, "provisioning took {took:?}");
    let told = what_it_said()?;
    ensure!(told.contains(&format!("longer than the {BOOT_LIMIT} s")), "{told}");
    lab.step(format!("a card the kernel sleeps on kept the boot {took:.1?}; systemctl says why"))?;

    let status = standing()?;
    let far = unit(&status, FAR_NIC.address)?;
    ensure!(far["standing"] != "as-wanted", "{far}");
    let reason = far["reasons"][0]["text"].as_str().with_context(|| format!("{far}"))?;
    lab.step(format!("vfioctl status says of the card: {} {reason}", FAR_NIC.address))?;

    on_vfio(FREE_PORT.1)?;
    never("e1000e", FREE_PORT.1)?;
    let followed = unit(&status, FREE_PORT.1)?;
    ensure!(followed["pool"] == "followed" && followed["standing"] == "as-wanted", "{followed}");
    lab.step("the policy by serial number followed its card to another slot, from the start")?;

    for address in [SWITCH_NIC_A.address, SWITCH_NIC_B.address] {
        let driver = sysfs::driver(address);
        ensure!(driver.as_deref() == Some("e1000e"), "{address} is on {driver:?}");
        never("vfio", address)?;
    }
    let placed = unit(&status, SWITCH_NIC_B.address)?;
    ensure!(placed["standing"] == "blocked", "{placed}");
    ensure!(placed["reasons"].to_string().contains("another device"), "{placed}");
    let text = vfioctl(["status"])?.stdout;
    for words in ["is another device than pool 'placed' had there", "--accept", "vendor 10de"] {
        ensure!(text.contains(words), "{words} is not in\n{text}");
    }
    lab.step("what is now in the place of another card stays with the host, and status says so")?;
    ensure!(text.contains("update-initramfs"), "{text}");
    let verified = vfioctl(["verify-boot"])?;
    ensure!(verified.status != Some(0), "verify-boot is content:\n{}", verified.stdout);

    command::run(["systemctl", "disable", "--now", HOLDER])?.success()?;
    let done = || {
        let status = standing()?;
        let units = status["units"].as_array().context("no units")?;
        let mut far = units.iter().filter(|unit| unit["pool"] == "far");
        Ok(far.all(|unit| unit["standing"] == "as-wanted"))
    };
    wait_until("the card is as wanted", LIMIT, done)?;
    for index in 0..2 {
        on_vfio(&sysfs::virtual_function(FAR_NIC.address, index)?)?;
    }
    wait_until("there is a report of the boot", LIMIT, || {
        let verified = vfioctl(["verify-boot"])?;
        let text = format!("{}{}", verified.stdout, verified.stderr);
        let fails = text.lines().any(|l| l.contains("fail") && l.contains(SWITCH_NIC_B.address));
        Ok(fails && verified.status == Some(1))
    })?;
    lab.step("once nobody held it the card came to be as wanted, and verify-boot tells of it all")?;
    restore()
}

/// As the last boot began.
fn restore() -> Result<()> {
    fs::remove_file(FILE)?;
    vfioctl(["policy", "reload"])?.success()?;
    ensure!(!Path::new(RULES).exists(), "there are rules of a policy that is no more");
    let status = standing()?;
    ensure!(status["initramfs"].is_string(), "the initial file system has rules: {status}");
    for file in fs::read_dir("/boot")? {
        let file = file?.path();
        if file.to_string_lossy().contains("initrd.img") {
            fs::remove_file(file)?;
        }
    }
    sysfs::write(FAR_NIC.address, "sriov_numvfs", "0")?;
    sysfs::write(FAR_NIC.address, "sriov_drivers_autoprobe", "0")?;
    sysfs::write(FAR_NIC.address, "sriov_numvfs", "1")?;
    // The kernel was taking it from its driver.
    let held = sysfs::virtual_function(FAR_NIC.address, 0)?;
    sysfs::write(&held, "driver_override", "vfio-pci")
}
