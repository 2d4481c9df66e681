//! `libvirt-hook` and `libvirt-xml`: a libvirt domain's devices leased for as long as it runs. Asks
//! vfiod only, never libvirt, which waits for its hooks; whatever it asks for has its time.

use std::io::Read;
use std::process::ExitCode;
use std::time::Duration;

use libvfio::client::{DeviceRecord, LeaseRecord, Options};
use libvfio::error::ErrorKind;
use serde_json::json;
use vfiod::libvirt::{self, Domain};

use crate::args::HookArgs;
use crate::bus::Bus;
use crate::launch::one_lease;
use crate::output::{Output, print, print_json};
use crate::trouble::Trouble;

/// How long a domain's start may wait for its devices: a little more than the steps may take.
const PREPARING: Duration = Duration::from_secs(90);
/// How long its end may wait, or any other question.
const OTHERWISE: Duration = Duration::from_secs(30);
/// How often a release is tried again while the lease is still on its way.
const AGAIN: Duration = Duration::from_millis(300);

/// What libvirt calls a hook for, as far as it concerns us (<https://libvirt.org/hooks.html>).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    /// Before the domain's devices are looked at: failing keeps it from starting.
    Prepare,
    /// It runs.
    Started,
    /// It has ended, or was never started: also when `prepare` failed.
    Release,
    /// libvirt was restarted and found it running: failing would end it.
    Reconnect,
}

impl Operation {
    fn of(operation: &str, step: &str) -> Option<Self> {
        match (operation, step) {
            ("prepare", "begin") => Some(Self::Prepare),
            ("started", "begin") => Some(Self::Started),
            ("release", "end") => Some(Self::Release),
            ("reconnect", "begin") => Some(Self::Reconnect),
            // What is printed for 'migrate' and 'restore' would be taken for another domain.
            _ => None,
        }
    }
}

/// Does what an operation asks for. Prints nothing but failures.
pub(crate) async fn run(args: &HookArgs, address: Option<&str>) -> Result<ExitCode, Trouble> {
    let Some(operation) = Operation::of(&args.operation, &args.step) else {
        return Ok(ExitCode::SUCCESS);
    };
    let limit = if operation == Operation::Prepare { PREPARING } else { OTHERWISE };
    let done = tokio::time::timeout(limit, answer(operation, address)).await;
    let done = done.unwrap_or_else(|_| {
        let why = format!("vfiod did not answer within {} s (vfioctl leases)", limit.as_secs());
        Err(Trouble::new(ErrorKind::Timeout, why))
    });
    match (operation, done) {
        // Leases outlive the daemon, and a domain must outlive its absence.
        (Operation::Started, Err(trouble @ Trouble::Unavailable(_)))
        | (Operation::Reconnect, Err(trouble)) => {
            trouble.report(false);
            Ok(ExitCode::SUCCESS)
        }
        (_, done) => done.map(|()| ExitCode::SUCCESS),
    }
}

async fn answer(operation: Operation, address: Option<&str>) -> Result<(), Trouble> {
    let mut xml = String::new();
    std::io::stdin().read_to_string(&mut xml)?;
    let domain =
        Domain::parse(&xml).map_err(|e| Trouble::new(ErrorKind::InvalidArgument, e.to_string()))?;
    if domain.is_empty() {
        return Ok(());
    }
    let bus = Bus::shortest(address).await?;
    match operation {
        Operation::Prepare => prepare(&bus, &domain).await,
        Operation::Started | Operation::Reconnect => confirm(&bus, &domain).await,
        Operation::Release => release(&bus, &domain).await,
    }
}

/// Leases what the domain does not have already. Mostly that is all of it, so what it has is looked
/// at only if all of it cannot be had.
async fn prepare(bus: &Bus, domain: &Domain) -> Result<(), Trouble> {
    let all = domain.devices();
    let Err(refused) = attach(bus, domain, &all).await else { return Ok(()) };
    match missing(bus, domain).await {
        Ok(missing) if missing.is_empty() => Ok(()),
        Ok(missing) if missing != all => attach(bus, domain, &missing).await,
        _ => Err(refused),
    }
}

async fn attach(bus: &Bus, domain: &Domain, devices: &[String]) -> Result<(), Trouble> {
    let devices: Vec<&str> = devices.iter().map(String::as_str).collect();
    let mut options = Options::from([("vm", domain.uuid.as_str().into())]);
    options.extend(domain.pool.as_deref().map(|pool| ("pool", pool.into())));
    bus.manager.attach(&devices, domain.tenant(), options).await?;
    Ok(())
}

async fn confirm(bus: &Bus, domain: &Domain) -> Result<(), Trouble> {
    let missing = missing(bus, domain).await?;
    if missing.is_empty() {
        return Ok(());
    }
    let why = format!(
        "domain {} runs with {}, which is not leased for it; see 'vfioctl leases'",
        domain.name,
        missing.join(", ")
    );
    Err(Trouble::new(ErrorKind::NotFound, why))
}

async fn release(bus: &Bus, domain: &Domain) -> Result<(), Trouble> {
    loop {
        let options = Options::from([("wait", true.into())]);
        match bus.manager.release(&domain.uuid, options).await.map_err(Trouble::from) {
            Err(Trouble::Refused { kind: ErrorKind::Busy, .. }) => {
                tokio::time::sleep(AGAIN).await;
            }
            done => return done.map(drop),
        }
    }
}

/// Devices of a domain that no active lease has for it.
async fn missing(bus: &Bus, domain: &Domain) -> Result<Vec<String>, Trouble> {
    let leases = bus.manager.list_leases().await?;
    Ok(not_leased(domain, &leases))
}

fn not_leased(domain: &Domain, leases: &[LeaseRecord]) -> Vec<String> {
    let ours = |lease: &&LeaseRecord| {
        lease.vm.as_deref() == Some(domain.uuid.as_str()) && lease.state == "active"
    };
    let held = leases.iter().filter(ours).flat_map(|l| l.devices.iter().chain(&l.mediated));
    let held: Vec<&String> = held.collect();
    domain.devices().into_iter().filter(|device| !held.contains(&device)).collect()
}

/// Prints a lease as elements of a domain, with where its memory is best.
pub(crate) async fn xml(bus: &Bus, lease: &str, out: &Output) -> Result<(), Trouble> {
    let lease = one_lease(bus, lease).await?;
    let devices: Vec<DeviceRecord> = bus.manager.list_devices(Options::new()).await?;
    let nodes = devices
        .iter()
        .filter(|device| lease.devices.contains(&device.address))
        .filter_map(|device| device.numa_node);
    let mut nodes: Vec<u32> = nodes.collect();
    nodes.sort_unstable();
    nodes.dedup();
    let elements: String =
        lease.devices.iter().filter_map(|d| d.parse().ok()).map(libvirt::element).collect();
    if out.json {
        return print_json(&json!({"devices": elements, "numa_nodes": nodes}));
    }
    print(&format!("{elements}{}", placement(&nodes)))
}

/// Beside `<devices>`, where the host has several nodes.
fn placement(nodes: &[u32]) -> String {
    if nodes.is_empty() {
        return String::new();
    }
    let nodes: Vec<String> = nodes.iter().map(ToString::to_string).collect();
    format!(
        "<!-- beside <devices>: memory on the devices' node -->\n<numatune>\n  <memory \
         mode='preferred' nodeset='{}'/>\n</numatune>\n",
        nodes.join(",")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_operations_that_concern_us_are_answered() {
        let of = Operation::of;
        assert_eq!(of("prepare", "begin"), Some(Operation::Prepare));
        assert_eq!(of("release", "end"), Some(Operation::Release));
        for (operation, step) in [
            ("migrate", "begin"),
            ("restore", "begin"),
            ("start", "begin"),
            ("stopped", "end"),
            ("", ""),
        ] {
            assert_eq!(of(operation, step), None, "{operation}");
        }
    }

    #[test]
    fn what_was_leased_for_the_domain_before_is_not_leased_again() {
        let domain = Domain {
            uuid: "web".into(),
            functions: vec!["03:00.0".parse().unwrap(), "03:00.1".parse().unwrap()],
            ..Domain::default()
        };
        let lease = |vm: &str, state: &str| LeaseRecord {
            vm: Some(vm.into()),
            state: state.into(),
            devices: vec!["0000:03:00.0".into()],
            ..LeaseRecord::default()
        };
        let both = ["0000:03:00.0", "0000:03:00.1"];
        assert_eq!(not_leased(&domain, &[]), both);
        assert_eq!(not_leased(&domain, &[lease("web", "active")]), both[1..]);
        assert_eq!(not_leased(&domain, &[lease("web", "releasing")]), both);
        assert_eq!(not_leased(&domain, &[lease("db", "active")]), both);
        let uuid = "c2177883-f1bb-47f0-914d-32a22e3a8804".to_owned();
        let domain = Domain { functions: Vec::new(), mediated: vec![uuid.clone()], ..domain };
        assert_eq!(not_leased(&domain, &[lease("web", "active")]), [uuid.as_str()]);
        let made = LeaseRecord { mediated: vec![uuid], ..lease("web", "active") };
        assert_eq!(not_leased(&domain, &[made]), [""; 0]);
    }

    #[test]
    fn memory_is_placed_where_there_are_nodes() {
        assert_eq!(placement(&[]), "");
        assert!(placement(&[0, 1]).contains("nodeset='0,1'"));
    }
}
