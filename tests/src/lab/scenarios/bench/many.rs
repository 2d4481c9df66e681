//! What many virtual functions cost: making them, and leasing all of them at once.

use anyhow::{Context, Result, ensure};
use libvfio::client::{DeviceProxy, ManagerProxy, Options, device_path};
use zbus::proxy::CacheProperties;

use super::{SOME, manager, timed};
use crate::lab::{Lab, command, sysfs};
use crate::machine::{NIC, NVME, Purpose};
use crate::protocol::{BenchRow, median};

/// From none to as many as the network card has, and each one there to be leased.
pub(super) fn enable(lab: &mut Lab) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let device = runtime.block_on(device(NIC.address))?;
    let number = |count| sysfs::write(NIC.address, "sriov_numvfs", count);
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for _ in 0..SOME {
        number("0")?;
        command::run(["udevadm", "settle"])?.success()?;
        floor.push(timed(|| number("7"))?);
        number("0")?;
        command::run(["udevadm", "settle"])?.success()?;
        ours.push(timed(|| {
            let made = runtime.block_on(device.set_virtual_functions(7, Options::new()))?;
            ensure!(made.len() == 7, "made {made:?}");
            Ok(())
        })?);
    }
    number("0")?;
    let mut row = BenchRow::of("vf-enable-7", "ms", &ours);
    row.floor_ratio = Some(row.median / median(&floor));
    lab.bench(row)
}

/// A lease for each of many virtual functions, all asked for at once.
pub(super) fn attach(lab: &mut Lab) -> Result<()> {
    let count = Purpose::Benchmarks.disk_functions();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    sysfs::write(NVME.address, "sriov_drivers_autoprobe", "0")?;
    let made = runtime.block_on(async {
        let device = device(NVME.address).await?;
        anyhow::Ok(device.set_virtual_functions(count, Options::new()).await?)
    })?;
    let manager = runtime.block_on(manager())?;
    let settle = || command::run(["udevadm", "settle"])?.success();
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for _ in 0..FEW {
        settle()?;
        floor.push(timed(|| at_once(&made, |vf| sysfs::bind(vf, Some("vfio-pci"))))?);
        at_once(&made, |vf| {
            sysfs::write(vf, "driver/unbind", vf)?;
            sysfs::write(vf, "driver_override", "\n")
        })?;
        settle()?;
        ours.push(timed(|| runtime.block_on(lease_all(std::slice::from_ref(&manager), &made)))?);
        runtime.block_on(async {
            for vf in &made {
                manager.release(vf, Options::new()).await?;
            }
            anyhow::Ok(())
        })?;
    }
    sysfs::write(NVME.address, "sriov_numvfs", "0")?;
    sysfs::write(NVME.address, "sriov_drivers_autoprobe", "1")?;
    let mut row = BenchRow::of(&format!("attach-{count}"), "ms", &ours);
    row.floor_ratio = Some(row.median / median(&floor));
    lab.bench(row)
}

/// Runs of what takes seconds.
const FEW: usize = 5;

/// A lease for each, asked for at once over all the connections.
pub(super) async fn lease_all(
    managers: &[ManagerProxy<'static>],
    devices: &[String],
) -> Result<()> {
    let mut calls = tokio::task::JoinSet::new();
    for (device, manager) in devices.iter().zip(managers.iter().cycle()) {
        let (manager, device) = (manager.clone(), device.clone());
        calls.spawn(async move {
            manager.attach(&[device.as_str()], "bench", Options::new()).await.map(drop)
        });
    }
    while let Some(done) = calls.join_next().await {
        done?.context("a lease")?;
    }
    Ok(())
}

/// Does something to each on a thread of its own.
pub(super) fn at_once(devices: &[String], act: impl Fn(&str) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let act = &act;
        let threads: Vec<_> =
            devices.iter().map(|device| scope.spawn(move || act(device))).collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")))
        })
    })
}

pub(super) async fn device(address: &str) -> Result<DeviceProxy<'static>> {
    let connection = zbus::Connection::system().await?;
    let proxy = DeviceProxy::builder(&connection)
        .path(device_path(address.parse()?))
        .cache_properties(CacheProperties::No);
    Ok(proxy.build().await?)
}
