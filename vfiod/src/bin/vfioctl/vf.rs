//! `vf`: virtual functions: which there are, how many there shall be.

use std::process::ExitCode;

use libvfio::client::{DeviceProxy, DeviceRecord, Options, PlanRecord, SettingRecord};
use libvfio::error::ErrorKind;

use crate::args::VfAction;
use crate::attach::patiently;
use crate::bus::{Bus, Reply};
use crate::explain::Story;
use crate::list::lease_cell;
use crate::output::{Output, Screen, print, print_json};
use crate::table::{Cell, PLAIN, Table};
use crate::trouble::Trouble;
use crate::{shaping, show};

pub(crate) async fn run(bus: &Bus, action: &VfAction, out: &Output) -> Result<ExitCode, Trouble> {
    match action {
        VfAction::List { physical: None } => physicals(bus, out).await?,
        VfAction::List { physical: Some(physical) } => virtuals(bus, physical, out).await?,
        VfAction::Show { device } => show(bus, device, out).await?,
        VfAction::Set { physical, count, dry_run: true } => {
            return plan(bus, physical, *count, out).await;
        }
        VfAction::Set { physical, count, dry_run: false } => {
            set(bus, physical, *count, out).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Physical functions, and how many virtual ones each has.
async fn physicals(bus: &Bus, out: &Output) -> Result<(), Trouble> {
    let reply = bus.ask("ListDevices", &(Options::new(),)).await?;
    if out.json {
        let wanted = |device: &DeviceRecord| device.total_vfs.is_some();
        return print_json(&reply.json_of(wanted)?.into());
    }
    bus.note_simulation().await;
    let devices: Vec<DeviceRecord> = reply.read()?;
    out.table(&physical_table(&devices), "no device here can have virtual functions")
}

fn physical_table(devices: &[DeviceRecord]) -> Table {
    let mut table = Table::new(&["DEVICE", "DRIVER", "VFS", "OF", "LEASED", "NODE", "NAME"]);
    for device in devices {
        let (Some(enabled), Some(total)) = (device.enabled_vfs, device.total_vfs) else { continue };
        let own = |d: &&DeviceRecord| d.physical_function.as_ref() == Some(&device.address);
        let leased = devices.iter().filter(own).filter(|d| d.lease.is_some()).count();
        table.push([
            device.address.as_str().into(),
            Cell::maybe(device.driver.as_deref(), PLAIN),
            enabled.to_string().into(),
            total.to_string().into(),
            leased.to_string().into(),
            Cell::maybe(device.numa_node.map(|node| node.to_string()), PLAIN),
            device.name.as_str().into(),
        ]);
    }
    table
}

/// The virtual functions of one physical function.
async fn virtuals(bus: &Bus, physical: &str, out: &Output) -> Result<(), Trouble> {
    let asked: DeviceRecord = bus.ask("DescribeDevice", &(physical,)).await?.read()?;
    if asked.total_vfs.is_none() {
        let why = format!("{} cannot have virtual functions; see 'vfioctl vf list'", asked.address);
        return Err(Trouble::new(ErrorKind::Unsupported, why));
    }
    let reply = bus.ask("ListDevices", &(Options::new(),)).await?;
    let own = |d: &DeviceRecord| d.physical_function.as_ref() == Some(&asked.address);
    if out.json {
        return print_json(&reply.json_of(own)?.into());
    }
    let mut devices: Vec<DeviceRecord> = reply.read()?;
    devices.retain(own);
    devices.sort_by_key(|device| device.vf_index);
    out.table(&virtual_table(&devices), "it has none; 'vfioctl vf set PF N' makes some")
}

fn virtual_table(devices: &[DeviceRecord]) -> Table {
    let mut table = Table::new(&["VF", "DEVICE", "DRIVER", "GROUP", "VECTORS", "RESET", "LEASE"]);
    for device in devices {
        let index = device.vf_index.map(|index| index.to_string());
        table.push([
            Cell::maybe(index, PLAIN),
            device.address.as_str().into(),
            Cell::maybe(device.driver.as_deref(), PLAIN),
            Cell::maybe(device.iommu_group.map(|group| group.to_string()), PLAIN),
            Cell::maybe(device.msix_vectors.map(|vectors| vectors.to_string()), PLAIN),
            device.reset_methods.as_deref().unwrap_or_default().join(" ").into(),
            lease_cell(device),
        ]);
    }
    table
}

/// One virtual function: the device, then what can be set on it.
async fn show(bus: &Bus, name: &str, out: &Output) -> Result<(), Trouble> {
    let described = bus.ask("DescribeDevice", &(name,)).await?;
    let device: DeviceRecord = described.read()?;
    if device.physical_function.is_none() {
        let why = format!("{} is no virtual function; see 'vfioctl show'", device.address);
        return Err(Trouble::new(ErrorKind::Unsupported, why));
    }
    let offered = bus.ask("ListSettings", &(&device.address,)).await?;
    if out.json {
        let mut value = described.json()?;
        value["settings"] = offered.json()?;
        return print_json(&value);
    }
    bus.note_simulation().await;
    let settings: Vec<SettingRecord> = offered.read()?;
    print(&show::lines(&device, out))?;
    if settings.is_empty() {
        return print("\nnothing can be set on it\n");
    }
    let screen = Screen { width: None, ..out.screen };
    print(&format!("\n{}", shaping::table(&settings).render(screen)))
}

async fn set(bus: &Bus, physical: &str, count: u16, out: &Output) -> Result<(), Trouble> {
    let device = device(bus, physical).await?;
    let work = device.set_virtual_functions(count, Options::new());
    let addresses = patiently(bus, work).await?;
    if out.json {
        return print_json(&addresses.into());
    }
    match addresses.as_slice() {
        [] => print(&format!("{physical} has no virtual functions\n")),
        [one] => print(&format!("{physical} has 1 virtual function: {one}\n")),
        [first, .., last] => {
            let n = addresses.len();
            print(&format!("{physical} has {n} virtual functions: {first} to {last}\n"))
        }
    }
}

/// Exits as setting would.
async fn plan(bus: &Bus, physical: &str, count: u16, out: &Output) -> Result<ExitCode, Trouble> {
    let device = device(bus, physical).await?;
    let arguments = (count, Options::new());
    let reply = Reply(device.inner().call_method("PlanVirtualFunctions", &arguments).await?);
    let plan: PlanRecord = reply.read()?;
    if out.json {
        print_json(&reply.json()?)?;
    } else if plan.possible && plan.steps.is_empty() {
        print(&format!("{physical} has {count} virtual functions already\n"))?;
    } else {
        let asked = format!("{physical} with {count} virtual functions");
        print(&Story { asked: &asked, can: "be had", plan: &plan }.to_string())?;
    }
    let kind = plan.reasons.first().and_then(|reason| ErrorKind::from_name(&reason.kind));
    Ok(kind.map_or(ExitCode::SUCCESS, |kind| kind.exit_status().into()))
}

/// The object of the device a name means.
async fn device<'a>(bus: &'a Bus, name: &str) -> Result<DeviceProxy<'a>, Trouble> {
    let path = bus.manager.get_device(name).await?;
    let proxy = DeviceProxy::builder(bus.connection())
        .path(path)
        .cache_properties(zbus::proxy::CacheProperties::No);
    Ok(proxy.build().await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Screen;

    fn plain(table: &Table) -> String {
        anstream::adapter::strip_str(&table.render(Screen::default())).to_string()
    }

    #[test]
    fn a_physical_function_is_one_line_with_how_many_are_leased() {
        let pf = DeviceRecord {
            address: "0000:01:00.0".into(),
            driver: Some("igb".into()),
            enabled_vfs: Some(2),
            total_vfs: Some(7),
            name: "Intel 82576".into(),
            ..DeviceRecord::default()
        };
        let vf = |index: u16, lease: Option<&str>| DeviceRecord {
            address: format!("0000:01:10.{}", index * 2),
            physical_function: Some(pf.address.clone()),
            vf_index: Some(index),
            lease: lease.map(str::to_owned),
            tenant: lease.map(|_| "alice".to_owned()),
            msix_vectors: Some(3),
            reset_methods: Some(vec!["flr".into()]),
            ..DeviceRecord::default()
        };
        let all = [pf.clone(), vf(0, None), vf(1, Some("3f9a2c81"))];
        assert_eq!(
            plain(&physical_table(&all)),
            "DEVICE        DRIVER  VFS  OF  LEASED  NODE  NAME\n\
             0000:01:00.0  igb     2    7   1       -     Intel 82576\n"
        );
        assert_eq!(
            plain(&virtual_table(&all[1..])),
            "VF  DEVICE        DRIVER  GROUP  VECTORS  RESET  LEASE\n\
             0   0000:01:10.0  -       -      3        flr    -\n\
             1   0000:01:10.2  -       -      3        flr    alice 3f9a2c81\n"
        );
    }
}
