//! `release`: the end of leases, or what that would take back.

use std::fmt;
use std::process::ExitCode;

use libvfio::address::PciAddress;
use libvfio::client::{LeaseRecord, Options, device_path};
use libvfio::error::ErrorKind;
use libvfio::inventory::Inventory;
use serde_json::Value;

use crate::args::ReleaseArgs;
use crate::attach::{held, patiently};
use crate::bus::Bus;
use crate::output::{Output, print, print_json};
use crate::table::BOLD;
use crate::trouble::Trouble;

pub(crate) async fn run(bus: &Bus, args: &ReleaseArgs, out: &Output) -> Result<ExitCode, Trouble> {
    if args.dry_run {
        return dry_run(bus, args, out).await;
    }
    let mut ended: Vec<String> = Vec::new();
    let mut failed = None;
    for target in &args.targets {
        match release(bus, target, args).await {
            Ok(ids) if ids.is_empty() && !out.json => nothing(target),
            Ok(ids) => ended.extend(ids),
            // The others are no worse off for it.
            Err(trouble) => {
                trouble.report(out.json);
                failed.get_or_insert(trouble);
            }
        }
    }
    if out.json {
        print_json(&ended.into())?;
    } else {
        for id in ended {
            print(&format!("released lease {id}\n"))?;
        }
    }
    Ok(failed.map_or(ExitCode::SUCCESS, |trouble| trouble.exit_code()))
}

async fn release(bus: &Bus, target: &str, args: &ReleaseArgs) -> Result<Vec<String>, Trouble> {
    let mut options = Options::new();
    for (name, given) in [("no_reset", args.no_reset), ("wait", args.wait)] {
        if given {
            options.insert(name, true.into());
        }
    }
    Ok(patiently(bus, bus.manager.release(target, options)).await?)
}

fn nothing(target: &str) {
    anstream::eprintln!("nothing to release: no lease is, has or is for {target}");
}

async fn dry_run(bus: &Bus, args: &ReleaseArgs, out: &Output) -> Result<ExitCode, Trouble> {
    let reply = bus.ask("ListLeases", &()).await?;
    let leases: Vec<LeaseRecord> = reply.read()?;
    let mut ends: Vec<&LeaseRecord> = Vec::new();
    for target in &args.targets {
        let meant = meant(bus, target, &leases).await?;
        if meant.is_empty() && !out.json {
            nothing(target);
        }
        ends.extend(meant.into_iter().filter(|lease| !ends.contains(lease)).collect::<Vec<_>>());
    }
    if out.json {
        print_json(&Value::Array(reply.json_of(|lease| ends.contains(&lease))?))?;
    } else {
        for lease in ends {
            print(&WayBack { lease, reset: !args.no_reset }.to_string())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The leases that a name means, as vfiod finds them: by lease and machine, else by device.
pub(crate) async fn meant<'a>(
    bus: &Bus,
    name: &str,
    leases: &'a [LeaseRecord],
) -> Result<Vec<&'a LeaseRecord>, Trouble> {
    let with = |device: Option<&str>| -> Vec<&LeaseRecord> {
        leases.iter().filter(|lease| means(name, device, lease)).collect()
    };
    let meant = with(None);
    Ok(if meant.is_empty() { with(device(bus, name).await?.as_deref()) } else { meant })
}

/// The path of the device a name means, if it means one. Several are not told apart here.
async fn device(bus: &Bus, name: &str) -> Result<Option<String>, Trouble> {
    if let Ok(address) = name.parse::<PciAddress>() {
        return Ok(Some(device_path(address)));
    }
    match bus.manager.get_device(name).await {
        Ok(path) => Ok(Some(path.to_string())),
        // What is a lease's, a machine's or a mediated device's name is none of a device.
        Err(_) if !Inventory::is_kind(name) => Ok(None),
        Err(failure) if failure.kind() == Some(ErrorKind::NotFound) => Ok(None),
        Err(failure) => Err(failure.into()),
    }
}

fn means(target: &str, device: Option<&str>, lease: &LeaseRecord) -> bool {
    let path = |address: &String| Some(device_path(address.parse().ok()?));
    lease.id == target
        || lease.vm.as_deref() == Some(target)
        || lease.mediated.iter().any(|uuid| uuid.eq_ignore_ascii_case(target))
        || device.is_some() && lease.devices.iter().any(|has| path(has).as_deref() == device)
}

/// The way back of a lease: what takes back each thing done, last first.
struct WayBack<'a> {
    lease: &'a LeaseRecord,
    reset: bool,
}

impl fmt::Display for WayBack<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LeaseRecord { id, tenant, state, steps, .. } = self.lease;
        let devices = held(self.lease).join(", ");
        writeln!(f, "{BOLD}lease {id}{BOLD:#} of {tenant} ({state}) would end: {devices}")?;
        if state == "failed" {
            return writeln!(f, "  it holds nothing any more; its record would be dismissed");
        }
        if self.reset {
            writeln!(
                f,
                "  what can be reset would be reset first, and its memory cleared if known how"
            )?;
        }
        let done = steps.iter().rev().filter(|step| step.outcome.is_some());
        for (undo, n) in done.filter_map(|step| step.undo.as_deref()).zip(1..) {
            writeln!(f, "  {n}. {undo}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use libvfio::client::StepRecord;

    use super::*;

    fn lease() -> LeaseRecord {
        let step = |undo: Option<&str>, outcome: Option<&str>| StepRecord {
            undo: undo.map(str::to_owned),
            outcome: outcome.map(str::to_owned),
            ..StepRecord::default()
        };
        LeaseRecord {
            id: "3f9a2c81".into(),
            tenant: "alice".into(),
            vm: Some("web".into()),
            state: "active".into(),
            devices: vec!["0000:03:00.0".into()],
            steps: vec![
                step(None, Some("already-so")),
                step(Some("bind it again"), Some("done")),
                step(Some("unbind it again"), Some("done")),
                step(Some("what was never done"), None),
            ],
            ..LeaseRecord::default()
        }
    }

    fn told(lease: &LeaseRecord, reset: bool) -> String {
        anstream::adapter::strip_str(&WayBack { lease, reset }.to_string()).to_string()
    }

    #[test]
    fn the_way_back_begins_with_what_was_done_last() {
        assert_eq!(
            told(&lease(), false),
            "lease 3f9a2c81 of alice (active) would end: 0000:03:00.0\n\
             \u{20} 1. unbind it again\n\
             \u{20} 2. bind it again\n"
        );
        assert!(told(&lease(), true).contains("would be reset"));
        let failed = LeaseRecord { state: "failed".into(), ..lease() };
        assert!(!told(&failed, false).contains("again"));
    }

    #[test]
    fn a_lease_answers_to_its_id_its_machine_and_its_devices() {
        let path = "/org/vfiod1/device/0000_03_00_0";
        for (target, device) in [("3f9a2c81", None), ("web", None), ("gpu", Some(path))] {
            assert!(means(target, device, &lease()), "{target}");
        }
        assert!(!means("gpu", None, &lease()));
        assert!(!means("03:00.1", Some("/org/vfiod1/device/0000_03_00_1"), &lease()));
    }
}
