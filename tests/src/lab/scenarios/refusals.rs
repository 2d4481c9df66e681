//! What is refused, and with which words.

use std::fs;

use anyhow::{Context, Result, ensure};

use libvfio::client::lease_path;

use crate::lab::command::{Ran, UNPRIVILEGED, run_unprivileged};
use crate::lab::product::{
    busctl_attach, lease, refused, vfioctl, vfioctl_json, vfioctl_unprivileged,
};
use crate::lab::{Lab, command, sysfs, wait_until};
use crate::machine::{DISK_LABEL, GPU, NIC, SHARED_DISK, SHARED_NIC};
use std::time::Duration;

/// A policy in which the GPU is a pool.
pub(super) const POOL: &str = "[pool.lab]\nmode = \"on-lease\"\nselect = [{ class = \"gpu\" }]\n";

/// A group with a disk that the host uses.
pub(super) fn shared_group(lab: &mut Lab) -> Result<()> {
    let ran = vfioctl(["attach", SHARED_NIC.address, "--tenant", "a"])?;
    refused(&ran, 6, &[SHARED_DISK.address, "nvme", "ACS", "--whole-group"])?;
    lab.step("a sibling on a host driver is named, with the port that lacks ACS")?;

    fs::create_dir_all("/mnt/hostdisk")?;
    let label = format!("LABEL={DISK_LABEL}");
    command::run(["mount", &label, "/mnt/hostdisk"])?.success()?;
    let ran = vfioctl(["attach", SHARED_NIC.address, "--tenant", "a", "--whole-group"])?;
    refused(&ran, 5, &[SHARED_DISK.address, "/mnt/hostdisk", "unmount"])?;
    ensure!(sysfs::driver(SHARED_NIC.address).as_deref() == Some("e1000e"), "half a group went");
    let plan = vfioctl_json(["explain", SHARED_NIC.address])?;
    ensure!(plan["possible"] == false, "{plan}");
    lab.step("with the whole group asked for, the mounted disk is the reason; nothing changed")?;

    command::run(["umount", "/mnt/hostdisk"])?.success()?;
    vfioctl(["attach", SHARED_NIC.address, "--tenant", "a", "--whole-group"])?.success()?;
    for function in [SHARED_NIC, SHARED_DISK] {
        ensure!(sysfs::driver(function.address).as_deref() == Some("vfio-pci"));
    }
    vfioctl(["release", SHARED_NIC.address])?.success()?;
    lab.step("unmounted, the whole group goes and comes back")
}

/// The lab's own disk, which carries its root file system.
const ROOT_DISK: &str = "0000:00:01.0";

/// What the host cannot live without stays with it, whoever asks.
pub(super) fn protected(lab: &mut Lab) -> Result<()> {
    let driver = sysfs::driver(ROOT_DISK);
    let ran = vfioctl(["attach", ROOT_DISK, "--tenant", "a"])?;
    refused(&ran, 7, &[ROOT_DISK, "mounted on /", "--allow-protected"])?;
    let explained = vfioctl_json(["explain", ROOT_DISK])?;
    ensure!(explained["reasons"][0]["code"] == "protected", "{explained}");
    let held = vfioctl(["holders", ROOT_DISK])?.success()?;
    ensure!(held.contains("protected") && held.contains("mounted on /"), "{held}");
    ensure!(sysfs::driver(ROOT_DISK) == driver, "the root disk lost its driver");
    lab.step("the root disk is refused, and holders says what it carries")?;

    let attach = ["attach", ROOT_DISK, "--tenant", "ours", "--allow-protected"];
    let plan = vfioctl(attach.into_iter().chain(["--dry-run"]))?;
    let said = plan.success()?;
    ensure!(said.contains("mounted on /"), "a dry run does not warn:\n{said}");
    let ours = "action.lookup('tenant') == 'ours' && action.id == 'org.vfiod1.attach'";
    with_rule(ours, || {
        refused(&vfioctl_unprivileged(attach)?, 4, &["org.vfiod1.override-protection"])
    })?;
    ensure!(sysfs::driver(ROOT_DISK) == driver, "the root disk lost its driver");
    lab.step("overriding that is shown by a dry run, and takes a permission of its own")?;

    let mut player = std::process::Command::new("sleep")
        .arg("600")
        .stdin(fs::File::open(format!("/sys/bus/pci/devices/{}/resource0", GPU.address))?)
        .spawn()?;
    let pid = player.id().to_string();
    let ran = vfioctl(["attach", GPU.address, "--tenant", "a"]);
    let held = vfioctl(["holders", GPU.address]);
    player.kill()?;
    player.wait()?;
    refused(&ran?, 5, &["sleep", &pid, "resource0"])?;
    ensure!(held?.success()?.contains(&pid), "holders does not name process {pid}");
    vfioctl(["attach", GPU.address, "--tenant", "a"])?.success()?;
    vfioctl(["release", GPU.address])?.success()?;
    lab.step("a process that has a device's memory open keeps it, and is named")
}

/// Anyone may look; changing takes an administrator.
pub(super) fn unprivileged(lab: &mut Lab) -> Result<()> {
    let listed = vfioctl_unprivileged(["list"])?.success()?;
    ensure!(listed.contains("03:00.0"), "{listed}");
    vfioctl_unprivileged(["explain", GPU.address])?.success()?;
    let attach = vfioctl_unprivileged(["attach", GPU.address, "--tenant", "a"])?;
    refused(&attach, 4, &["org.vfiod1.attach"])?;
    ensure!(sysfs::driver(GPU.address).as_deref() != Some("vfio-pci"));
    let id = busctl_attach(GPU.address, "a")?;
    for target in [GPU.address, &id] {
        refused(&vfioctl_unprivileged(["release", target])?, 4, &["org.vfiod1.release"])?;
    }
    let path = lease_path(&id);
    let call = ["busctl", "call", "org.vfiod1", &path, "org.vfiod1.Lease", "Release", "a{sv}", "0"];
    refused(&run_unprivileged(call)?, 1, &["org.vfiod1.release"])?;
    ensure!(lease(&id)?.is_some_and(|lease| lease["state"] == "active"), "the lease was touched");
    vfioctl(["release", &id])?.success()?;
    lab.step("an ordinary user lists and explains, and is refused attach and others' releases")?;

    let attach = ["attach", GPU.address, "--tenant", "ours"];
    with_rule("action.lookup('tenant') == 'ours'", || {
        let other = vfioctl_unprivileged(["attach", NIC.address, "--tenant", "theirs"])?;
        refused(&other, 4, &["org.vfiod1.attach"])?;
        vfioctl_unprivileged(attach)?.success()?;
        let unclean = vfioctl_unprivileged(["release", GPU.address, "--no-reset"])?;
        refused(&unclean, 4, &["org.vfiod1.release"])?;
        vfioctl_unprivileged(["release", GPU.address])?.success().map(drop)
    })?;
    ensure!(sysfs::driver(GPU.address).as_deref() != Some("vfio-pci"), "it is not back");
    lab.step("a polkit rule lets that user lease for one tenant, and its own leases it may end")?;

    with_policy(&format!("{POOL}users = [\"{UNPRIVILEGED}\"]\n"), || {
        vfioctl_unprivileged(["attach", "--pool", "lab", "--tenant", "ours"])?.success()?;
        ensure!(sysfs::driver(GPU.address).as_deref() == Some("vfio-pci"), "it is not leased");
        vfioctl_unprivileged(["release", GPU.address])?.success().map(drop)
    })?;
    lab.step("from a pool that names that user it leases and releases without any rule")
}

/// Does something while polkit lets the ordinary user do what `condition` says of an action.
pub(super) fn with_rule(condition: &str, act: impl FnOnce() -> Result<()>) -> Result<()> {
    let rule = "/etc/polkit-1/rules.d/10-lab.rules";
    fs::write(
        rule,
        format!(
            "polkit.addRule(function(action, subject) {{\n\
               if (action.id.indexOf('org.vfiod1.') == 0 && subject.user == 'tester' &&\n\
                   ({condition})) {{\n\
                 return polkit.Result.YES;\n\
               }}\n\
             }});\n"
        ),
    )?;
    // polkit reads its rules again some time after they change. What is asked for does not exist,
    // so that it is refused for that, once it is not for want of permission.
    let known = wait_until("the polkit rule takes effect", Duration::from_secs(20), || {
        let ran = vfioctl_unprivileged(["attach", "ff:1f.7", "--tenant", "ours"])?;
        Ok(ran.status == Some(3))
    });
    let done = known.and_then(|()| act());
    fs::remove_file(rule)?;
    done
}

/// Does something while a policy is in force.
pub(super) fn with_policy(policy: &str, act: impl FnOnce() -> Result<()>) -> Result<()> {
    const FILE: &str = "/etc/vfiod/vfiod.toml";
    fs::create_dir_all("/etc/vfiod")?;
    fs::write(FILE, policy)?;
    let done = vfioctl(["policy", "reload"]).and_then(Ran::success).and_then(|_| act());
    fs::remove_file(FILE)?;
    vfioctl(["policy", "reload"])?.success()?;
    done
}

/// Every wrong input has its answer.
pub(super) fn bad_input(lab: &mut Lab) -> Result<()> {
    let long = "x".repeat(65);
    let bridge = parent(GPU.address)?;
    let cases: [(&[&str], i32, &[&str]); 9] = [
        (&["attach", "03:00.9", "--tenant", "a"], 2, &["03:00.9"]),
        (&["attach", "03:00.7", "--tenant", "a"], 3, &["03:00.7", "did you mean 0000:03:00"]),
        (&["attach", "gpux", "--tenant", "a"], 2, &["gpux", "did you mean gpu"]),
        (&["attach", "nic", "--tenant", "a"], 2, &["ambiguous", NIC.address]),
        (&["attach", &bridge, "--tenant", "a"], 14, &["bridge"]),
        (&["attach", "00:00.0", "--tenant", "a"], 14, &["bridge"]),
        (&["attach", GPU.address, "--tenant", "a b"], 2, &["letters, digits"]),
        (&["attach", GPU.address, "--tenant", &long], 2, &["65 bytes"]),
        (&["attach", GPU.address, "--tenant", "a", "--vm", "../x"], 2, &["virtual machine"]),
    ];
    for (arguments, status, words) in cases {
        let ran = vfioctl(arguments.iter().copied())?;
        refused(&ran, status, words).with_context(|| format!("vfioctl {}", arguments.join(" ")))?;
    }
    lab.step("malformed, unknown, ambiguous and unfit names are told apart, with the nearest")?;

    command::run(["systemctl", "mask", "--runtime", "--now", "vfiod"])?.success()?;
    let ran = vfioctl(["list"]);
    command::run(["systemctl", "unmask", "--runtime", "vfiod"])?.success()?;
    let ran = ran?;
    refused(&ran, 69, &["vfiod"])?;
    ensure!(ran.stderr.trim().lines().count() == 1, "more than one line:\n{}", ran.stderr);
    vfioctl(["list"])?.success()?;
    lab.step("without the daemon there is one line and status 69; the next call starts it")
}

/// The port above a function.
fn parent(address: &str) -> Result<String> {
    let target = fs::canonicalize(sysfs::path(address, ""))?;
    let parent = target.parent().and_then(|p| p.file_name()).context("no parent")?;
    Ok(parent.to_string_lossy().into_owned())
}
