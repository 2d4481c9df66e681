//! Who may lease from a pool: whom it names, with nobody else's consent, and nobody else.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::refusals::with_rule;
use crate::lab::command::UNPRIVILEGED;
use crate::lab::product::{device, lease, refused, vfioctl, vfioctl_json, vfioctl_unprivileged};
use crate::lab::{Lab, command, sysfs};
use crate::machine::{GPU, SWITCH_NIC_A, SWITCH_NIC_B};

const FILE: &str = "/etc/vfiod/vfiod.toml";

fn policy() -> String {
    let pool = |name: &str, whom: &str, selector: &str| {
        format!("[pool.{name}]\nmode = \"on-lease\"\n{whom}\nselect = [{{ {selector} }}]\n")
    };
    [
        pool(
            "gpus",
            "groups = [\"vmops\"]\ntenants = [\"ops-*\"]",
            "vendor = \"1234\", class = \"gpu\"",
        ),
        pool("cards", "users = [\"nobody\"]", &format!("address = \"{}\"", SWITCH_NIC_A.address)),
    ]
    .concat()
}

pub(super) fn run(lab: &mut Lab) -> Result<()> {
    command::run(["groupadd", "vmops"])?.success()?;
    command::run(["usermod", "--append", "--groups=vmops", UNPRIVILEGED])?.success()?;
    fs::create_dir_all("/etc/vfiod")?;
    fs::write(FILE, policy())?;
    vfioctl(["policy", "reload"])?.success()?;
    let shown = leases(lab);
    fs::remove_file(FILE)?;
    vfioctl(["policy", "reload"])?.success()?;
    command::run(["groupdel", "vmops"])?.success()?;
    shown?;
    ensure!(!Path::new("/etc/udev/rules.d/10-vfiod.rules").exists(), "rules without a policy");
    Ok(())
}

fn leases(lab: &mut Lab) -> Result<()> {
    let before = sysfs::driver(GPU.address);
    let attach = |pool: &[&str], tenant: &str| {
        let words = ["attach"].into_iter().chain(pool.iter().copied());
        vfioctl_unprivileged(words.chain(["--tenant", tenant]))
    };
    attach(&["--pool", "gpus"], "ops-7")?.success()?;
    let id = device(GPU.address)?.context("no GPU")?["lease"].clone();
    let id = id.as_str().context("the GPU is not leased")?;
    let record = lease(id)?.context("no lease")?;
    ensure!(record["owner"] != 0 && record["tenant"] == "ops-7", "{record}");
    ensure!(sysfs::driver(GPU.address).as_deref() == Some("vfio-pci"), "it is not on VFIO");
    lab.step("a member of its group leased from a pool, with no rule of polkit")?;

    for asked in [&["--pool", "cards"][..], &[SWITCH_NIC_A.address], &[SWITCH_NIC_B.address]] {
        refused(&attach(asked, "ops-7")?, 4, &["org.vfiod1.attach"])?;
    }
    with_rule("true", || {
        let named = ["pool 'cards'", "users and groups do not include"];
        refused(&attach(&["--pool", "cards"], "ops-7")?, 4, &named)?;
        refused(&attach(&[SWITCH_NIC_A.address], "ops-7")?, 4, &named)
    })?;
    let card = sysfs::driver(SWITCH_NIC_A.address);
    ensure!(card.as_deref() == Some("e1000e"), "the card is on {card:?}");
    lab.step("from another pool it is refused, by pool and by address, whatever polkit says")?;

    refused(&attach(&["--pool", "gpus"], "ops-8")?, 5, &["has 0 devices free"])?;
    vfioctl_unprivileged(["release", id])?.success()?;
    ensure!(sysfs::driver(GPU.address) == before, "the GPU is not back");
    refused(&attach(&["--pool", "gpus"], "alice")?, 4, &["it is for ops-*"])?;
    let status = vfioctl_json(["status"])?;
    ensure!(status["units"].as_array().is_some_and(|units| units.len() == 2), "{status}");
    lab.step("one device is leased once, and to tenants of its pool alone")
}
