//! A mediated device of the kernel's sample driver: made for a lease, used by a guest, removed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libvfio::client::lease_path;
use serde_json::Value;

use super::refusals::with_rule;
use crate::lab::command::{UNPRIVILEGED, run_unprivileged};
use crate::lab::product::{lease, refused, vfioctl, vfioctl_json, vfioctl_unprivileged};
use crate::lab::{Guest, Lab, command, wait_until};

/// A serial card with two ports.
const KIND: &str = "mtty/mtty-2";
/// Vendor and device that a guest sees of it (`samples/vfio-mdev/mtty.c`).
const SEEN: (u16, u16) = (0x4348, 0x3253);
const LAUNCHER: [&str; 11] = command::launcher(KIND);
const LIMIT: Duration = Duration::from_secs(30);

pub(super) fn run(lab: &mut Lab) -> Result<()> {
    command::run(["modprobe", "mtty"])?.success()?;
    let outcome = play(lab);
    command::run(["modprobe", "--remove", "mtty"])?.success()?;
    outcome
}

fn play(lab: &mut Lab) -> Result<()> {
    let before = left()?;
    let plan = vfioctl(["attach", KIND, "--tenant", "tenant-a", "--dry-run"])?.success()?;
    ensure!(plan.contains("create mediated device"), "the dry run does not say it:\n{plan}");
    ensure!(devices()?.is_empty(), "a dry run made one");
    let (id, uuid) = attach()?;
    ensure!(left()? < before, "there are as many left as before");
    let listed = vfioctl(["mdev", "list"])?.success()?;
    for word in [KIND, &uuid, &id, "tenant-a"] {
        ensure!(listed.contains(word), "the list does not say {word}:\n{listed}");
    }
    lab.step(format!("attached, {KIND} became {uuid}, and {before} that could be are fewer now"))?;

    let guest = Guest::mediated(&uuid)?;
    ensure!(guest.sees(SEEN.0, SEEN.1), "the guest does not see it: {:?}", guest.functions());
    refused(&vfioctl(["release", &uuid])?, 5, &["releasing", "qemu", "ends by itself"])?;
    ensure!(place(&uuid).exists(), "it was taken from its guest");
    guest.power_off()?;
    wait_until("the release ends", LIMIT, || Ok(lease(&id)?.is_none()))?;
    ensure!(devices()?.is_empty() && left()? == before, "it is still there");
    lab.step("a guest saw a serial card; its release waited for it, and then removed it")?;

    run_by_a_user(lab)?;

    let (id, uuid) = attach()?;
    std::fs::write(place(&uuid).join("remove"), "1")?;
    let failed = || Ok(lease(&id)?.is_some_and(|lease| lease["state"] == "failed"));
    wait_until("the lease fails", LIMIT, failed)?;
    let reason = lease(&id)?.context("no lease")?["reason"].to_string();
    ensure!(reason.contains(&uuid) && reason.contains("somebody else"), "{reason}");
    vfioctl(["release", &id])?.success()?;
    lab.step(format!("one that somebody else removed failed its lease: {reason}"))?;

    let ran = vfioctl(["attach", "mtty/mtty-7", "--tenant", "tenant-a"])?;
    refused(&ran, 3, &["mtty has no type", "did you mean mtty-"])?;
    let ran = vfioctl(["attach", "mty/mtty-2", "--tenant", "tenant-a"])?;
    refused(&ran, 3, &["did you mean mtty?"])?;
    lab.step("what nobody can make is refused, with what was meant")
}

/// An ordinary user's guest with one, by descriptors where there are any, and the end of both.
fn run_by_a_user(lab: &mut Lab) -> Result<()> {
    command::run(["usermod", "--append", "--groups=kvm", UNPRIVILEGED])?.success()?;
    let before = left()?;
    with_rule(
        "action.lookup('tenant') == 'ours' || action.id == 'org.vfiod1.lock-memory'",
        || {
            let guest = Guest::launch(&LAUNCHER, ["{vfio}".to_owned()])?;
            ensure!(
                guest.sees(SEEN.0, SEEN.1),
                "the guest does not see it: {:?}",
                guest.functions()
            );
            let record = vfioctl_json(["leases"])?[0].clone();
            let interface = record["interface"].as_str().context("it is opened by nothing")?;
            ensure!(record["owner"] != 0 && record["mediated"][0].is_string(), "{record}");
            lab.step(format!("an ordinary user's guest has one, by {interface}"))?;
            guest.kill()?;
            let none = || Ok(vfioctl_json(["leases"])?.as_array().is_some_and(Vec::is_empty));
            wait_until("the lease ends with QEMU", LIMIT, none)?;
            ensure!(devices()?.is_empty() && left()? == before, "it is still there");

            vfioctl_unprivileged(["attach", KIND, "--tenant", "ours"])?.success()?;
            let record = vfioctl_json(["leases"])?[0].clone();
            let path = lease_path(record["id"].as_str().context("no lease")?);
            let open = ["busctl", "call", "org.vfiod1", &path, "org.vfiod1.Lease", "OpenDevices"];
            let answer = run_unprivileged(open)?.success()?;
            let uuid = record["mediated"][0].as_str().context("nothing was made")?;
            let named = record["interface"] == "group" || answer.contains(uuid);
            ensure!(answer.starts_with("a(sh) 1 ") && named, "{answer}");
            let told = vfioctl(["args", uuid, "--vmm", "qemu"])?.success()?;
            ensure!(told.contains(&format!("sysfsdev=/sys/bus/mdev/devices/{uuid}")), "{told}");
            vfioctl_unprivileged(["release", uuid])?.success().map(drop)
        },
    )?;
    ensure!(devices()?.is_empty() && left()? == before, "it is still there");
    lab.step("killed, its QEMU took it along; a descriptor of one was opened, too")
}

/// A lease of one: its id, and what it is called.
fn attach() -> Result<(String, String)> {
    let attached = vfioctl_json(["attach", KIND, "--tenant", "tenant-a"])?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let (id, uuid) = (text(&attached["id"]), text(&attached["mediated"][0]));
    Ok((id.context("no lease")?, uuid.with_context(|| format!("nothing was made: {attached}"))?))
}

/// How many more there can be, by the kernel.
fn left() -> Result<u32> {
    let file = "/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-2/available_instances";
    Ok(std::fs::read_to_string(file)?.trim().parse()?)
}

fn devices() -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir("/sys/bus/mdev/devices")?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

fn place(uuid: &str) -> PathBuf {
    Path::new("/sys/bus/mdev/devices").join(uuid)
}
