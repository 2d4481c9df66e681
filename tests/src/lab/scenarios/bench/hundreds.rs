//! What hundreds of virtual functions cost, on a machine that has nothing else: leasing some or all
//! of them at once, listing them, and the memory for them.

use anyhow::{Result, ensure};
use libvfio::client::{ManagerProxy, Options};

use super::many::{at_once, device, lease_all};
use super::{list, manager, memory, timed};
use crate::lab::{Lab, command, sysfs};
use crate::machine::{MANY, Purpose};
use crate::protocol::{BenchRow, median};

/// How many are leased at once, what that is called, and how often it is done: the more there are,
/// the longer it takes and the less it varies.
const SIZES: [(u16, &str, usize); 4] =
    [(8, "attach-8", 5), (64, "attach-64", 3), (127, "vf-attach-127", 3), (508, "attach-508", 1)];

/// How often all are listed.
const LISTS: usize = 5;

/// Connections to ask over: each waits for 128 answers at most.
const CONNECTIONS: usize = 4;

pub(in super::super) fn run(lab: &mut Lab) -> Result<()> {
    command::run(["modprobe", "vfio-pci"])?.success()?;
    for unit in ["libvirtd.service", "vfiod.service"] {
        command::run(["systemctl", "start", unit])?.success()?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let made = runtime.block_on(set(Purpose::Many.disk_functions()))?;
    command::run(["udevadm", "settle"])?.success()?;
    let managers = runtime.block_on(managers())?;
    for (size, name, runs) in SIZES {
        lab.step(format!("leasing {size} of {} at once", made.len()))?;
        let some = &made[..usize::from(size)];
        let (mut ours, mut floor) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            floor.push(timed(|| at_once(some, |vf| sysfs::bind(vf, Some("vfio-pci"))))?);
            at_once(some, |vf| {
                sysfs::write(vf, "driver/unbind", vf)?;
                sysfs::write(vf, "driver_override", "\n")
            })?;
            command::run(["udevadm", "settle"])?.success()?;
            ours.push(timed(|| runtime.block_on(lease_all(&managers, some)))?);
            runtime.block_on(release_all(&managers, some))?;
            command::run(["udevadm", "settle"])?.success()?;
        }
        let mut row = BenchRow::of(name, "ms", &ours);
        row.floor_ratio = Some(row.median / median(&floor));
        lab.bench(row)?;
        let each: Vec<f64> = ours.iter().map(|whole| whole / f64::from(size)).collect();
        lab.bench(BenchRow::of(&format!("{name}-each"), "ms", &each))?;
    }
    lab.step("listing and memory with all of them")?;
    list(lab, "list-508", LISTS)?;
    memory(lab, "resident-memory-508")?;
    let left = runtime.block_on(set(0))?;
    ensure!(left.is_empty(), "{} are left", left.len());
    command::run(["udevadm", "settle"])?.success().map(drop)
}

/// Gives each physical function so many; all there are then.
async fn set(count: u16) -> Result<Vec<String>> {
    let mut made = Vec::new();
    for physical in MANY {
        let device = device(physical.address).await?;
        made.extend(device.set_virtual_functions(count, Options::new()).await?);
    }
    Ok(made)
}

async fn managers() -> Result<Vec<ManagerProxy<'static>>> {
    let mut managers = Vec::new();
    for _ in 0..CONNECTIONS {
        managers.push(manager().await?);
    }
    Ok(managers)
}

async fn release_all(managers: &[ManagerProxy<'static>], devices: &[String]) -> Result<()> {
    let mut calls = tokio::task::JoinSet::new();
    for (device, manager) in devices.iter().zip(managers.iter().cycle()) {
        let (manager, device) = (manager.clone(), device.clone());
        // The bare writes do not reset either.
        let options = Options::from([("no_reset", true.into())]);
        calls.spawn(async move { manager.release(&device, options).await.map(drop) });
    }
    while let Some(done) = calls.join_next().await {
        done??;
    }
    Ok(())
}
