//! The agent: installs the product, then runs the scenarios that the host asks for.
//!
//! After each it compares the kernel's state with what it was before the first.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};

use super::link::Link;
use super::product::{self, vfioctl, vfioctl_json};
use super::sysfs::Snapshot;
use super::{Lab, PAYLOAD, command, scenarios};
use crate::protocol::{FromLab, ToLab};

/// Serves the host until it goes away.
pub fn serve() -> Result<()> {
    let mut lab = Lab { link: Link::open()? };
    match prepare() {
        Ok(hello) => lab.link.send(&hello)?,
        Err(error) => return lab.link.send(&FromLab::Broken { detail: format!("{error:#}") }),
    }
    let mut found = Snapshot::take()?;
    while let Some(message) = lab.link.receive()? {
        let ToLab::Run { scenarios } = message else { bail!("unexpected message {message:?}") };
        for name in scenarios {
            lab.link.send(&FromLab::Begin { scenario: name.clone() })?;
            let start = Instant::now();
            let outcome = run(&mut lab, &name, &found);
            let seconds = start.elapsed().as_secs_f64();
            let failure = match outcome {
                Ok(()) => None,
                Err(error) => {
                    // One failure is one: what it has left for good is where the next one starts.
                    found = Snapshot::take()?;
                    Some(format!("{error:#}\n{}", journal(seconds)?))
                }
            };
            lab.link.send(&FromLab::End { scenario: name, seconds, failure })?;
        }
        lab.link.send(&FromLab::Done)?;
    }
    Ok(())
}

fn prepare() -> Result<FromLab> {
    // After a reboot it is there already, and what has come of it is not to be disturbed.
    if !Path::new("/usr/bin/vfioctl").exists() {
        command::run(["sh", "-c", &format!("dpkg --install {PAYLOAD}/*.deb")])?
            .success()
            .context("installing the product")?;
    }
    // Drivers are still probing: what scenarios find must not depend on how fast that is.
    command::run(["udevadm", "settle"])?.success()?;
    command::run(["systemd-notify", "--ready"])?.success()?;
    let uptime = std::fs::read_to_string("/proc/uptime")?;
    Ok(FromLab::Hello {
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim_end().to_owned(),
        uptime: uptime.split(' ').next().unwrap_or_default().parse()?,
    })
}

/// What the daemon logged in the last seconds.
fn journal(seconds: f64) -> Result<String> {
    let since = format!("--since=-{}s", seconds.ceil());
    let log = ["journalctl", "--unit=vfiod", "--no-pager", "--output=cat", "--lines=60", &since];
    let log = command::run(log)?;
    Ok(format!("--- the daemon's journal\n{}", log.success()?))
}

/// A scenario that failed may have left leases, which are no concern of the next.
fn release_all() -> Result<()> {
    let leases = vfioctl_json(["leases"])?;
    for id in leases.as_array().into_iter().flatten().filter_map(|lease| lease["id"].as_str()) {
        vfioctl(["release", id])?;
    }
    Ok(())
}

fn run(lab: &mut Lab, name: &str, found: &Snapshot) -> Result<()> {
    let scenario = scenarios::find(name).ok_or_else(|| anyhow!("no scenario named {name}"))?;
    let outcome = (scenario.run)(lab);
    if outcome.is_err() {
        release_all().context("ending what leases there are")?;
    }
    product::give_to_all().context("giving what was kept to all tenants")?;
    let differences = found.differences(&Snapshot::take()?);
    if differences.is_empty() {
        return outcome;
    }
    // Later scenarios deserve a clean lab whatever this one left.
    let restored = found.restore().context("restoring the lab");
    match (outcome, restored) {
        (Err(error), Err(after)) => Err(error.context(format!("{after:#}, after"))),
        (Err(error), Ok(())) | (Ok(()), Err(error)) => Err(error),
        (Ok(()), Ok(())) => bail!("the lab was not left as found:\n{}", differences.join("\n")),
    }
}
