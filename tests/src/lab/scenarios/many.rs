//! Hundreds of virtual functions: made, leased to many tenants at once, listed, released, removed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::lab::product::{vfioctl, vfioctl_json};
use crate::lab::{Lab, command, sysfs};
use crate::machine::{Function, MANY, Purpose};

/// Most that any part of it may take, on a busy machine.
const LIMIT: Duration = Duration::from_secs(280);

pub(super) fn run(lab: &mut Lab) -> Result<()> {
    let each = Purpose::Many.disk_functions();
    let all = usize::from(each) * MANY.len();
    let mut made = Vec::new();
    for physical in MANY {
        let (addresses, seconds) = timed(|| set(physical, each))?;
        ensure!(addresses.len() == usize::from(each), "{} has {addresses:?}", physical.address);
        ensure!(sysfs::read(physical.address, "sriov_numvfs")? == each.to_string());
        lab.step(format!("{each} made of {} in {seconds:.1} s", physical.address))?;
        made.extend(addresses);
    }
    let taken = made.iter().find(|vf| sysfs::driver(vf).is_some());
    ensure!(taken.is_none(), "a host driver has {taken:?}");
    command::run(["udevadm", "settle"])?.success()?;

    let tenants = tenants(each);
    let ((), seconds) = timed(|| attach(&tenants))?;
    let leases = vfioctl_json(["leases"])?;
    ensure!(count(&leases)? == tenants.len(), "{leases}");
    for vf in &made {
        ensure!(sysfs::driver(vf).as_deref() == Some("vfio-pci"), "{vf} is not on VFIO");
    }
    lab.step(format!("all {all} leased to {} tenants at once in {seconds:.1} s", tenants.len()))?;

    let (listed, seconds) = timed(|| vfioctl_json(["list"]))?;
    let is_active = |device: &&Value| device["lease_state"] == "active";
    let active = listed.as_array().context("no array")?.iter().filter(is_active).count();
    ensure!(active == all, "{active} of {all} are listed as leased");
    lab.step(format!("all listed with their leases in {seconds:.1} s"))?;

    let ids: Vec<String> = leases
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|lease| Some(lease["id"].as_str()?.to_owned()))
        .collect();
    let ((), seconds) =
        timed(|| at_once(&ids, |id| vfioctl(["release", id.as_str()])?.success().map(drop)))?;
    ensure!(count(&vfioctl_json(["leases"])?)? == 0, "leases are left");
    let left = made.iter().find(|vf| sysfs::driver(vf).is_some());
    ensure!(left.is_none(), "{left:?} is on a driver, and was on none");
    lab.step(format!("all given back in {seconds:.1} s"))?;

    for physical in MANY {
        let (left, seconds) = timed(|| set(physical, 0))?;
        ensure!(left.is_empty() && sysfs::read(physical.address, "sriov_numvfs")? == "0");
        lab.step(format!("{each} removed from {} in {seconds:.1} s", physical.address))?;
    }
    command::run(["udevadm", "settle"])?.success()?;
    let failed = vfioctl(["leases", "--history"])?.success()?;
    ensure!(!failed.contains("failed"), "something failed:\n{failed}");
    lab.step("none was left, and nothing failed on the way")
}

/// Who gets how many of which: two tenants share a physical function.
fn tenants(each: u16) -> Vec<(String, Function, u16)> {
    let half = each / 2;
    let shares = |(n, physical): (usize, &Function)| {
        [
            (format!("tenant-{}", 2 * n), *physical, half),
            (format!("tenant-{}", 2 * n + 1), *physical, each - half),
        ]
    };
    MANY.iter().enumerate().flat_map(shares).collect()
}

fn attach(tenants: &[(String, Function, u16)]) -> Result<()> {
    at_once(tenants, |(tenant, physical, count)| {
        let count = count.to_string();
        let of = ["attach", "--vf-of", physical.address, "--count", &count];
        vfioctl(of.into_iter().chain(["--tenant", tenant.as_str()]))?.success().map(drop)
    })
}

fn set(physical: Function, count: u16) -> Result<Vec<String>> {
    let made = vfioctl_json(["vf", "set", physical.address, &count.to_string()])?;
    Ok(serde_json::from_value(made)?)
}

fn count(leases: &Value) -> Result<usize> {
    Ok(leases.as_array().context("no array")?.len())
}

/// Does something to each on a thread of its own.
fn at_once<T: Sync>(all: &[T], act: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let act = &act;
        let threads: Vec<_> = all.iter().map(|one| scope.spawn(move || act(one))).collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")))
        })
    })
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let start = Instant::now();
    let done = work()?;
    ensure!(start.elapsed() < LIMIT, "it took {} s", start.elapsed().as_secs());
    Ok((done, start.elapsed().as_secs_f64()))
}
