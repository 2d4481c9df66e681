//! `attach`: devices to a tenant, or what that would do; and patience while vfiod is at it.

use std::io::IsTerminal;
use std::pin::pin;
use std::process::ExitCode;
use std::time::Duration;

use libvfio::client::{LeaseRecord, Options, PlanRecord};
use libvfio::error::ErrorKind;

use crate::args::AttachArgs;
use crate::bus::{Bus, Reply};
use crate::explain::Story;
use crate::output::{Output, print, print_json};
use crate::trouble::Trouble;

pub(crate) async fn run(bus: &Bus, args: &AttachArgs, out: &Output) -> Result<ExitCode, Trouble> {
    let devices: Vec<&str> = args.devices.iter().map(String::as_str).collect();
    // The command line asks for a tenant unless it is a dry run.
    match args.tenant.as_deref().filter(|_| !args.dry_run) {
        Some(tenant) => attach(bus, &devices, tenant, args, out).await,
        None => plan(bus, &devices, args, out).await,
    }
}

async fn attach(
    bus: &Bus,
    devices: &[&str],
    tenant: &str,
    args: &AttachArgs,
    out: &Output,
) -> Result<ExitCode, Trouble> {
    let (id, _) = patiently(bus, bus.manager.attach(devices, tenant, options(args))).await?;
    let reply = made(bus, &id).await?;
    let lease: LeaseRecord = reply.read()?;
    if out.json {
        print_json(&reply.json()?)?;
    } else {
        print(&format!("attached {} to {tenant}: lease {id}\n", held(&lease).join(", ")))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A lease that was just made: the caller named some functions, and got others of the same devices
/// with them.
pub(crate) async fn made(bus: &Bus, id: &str) -> Result<Reply, Trouble> {
    bus.ask("DescribeLease", &(id,)).await.map_err(|trouble| match trouble {
        Trouble::Refused { kind: ErrorKind::NotFound, .. } => {
            let ended = format!("lease {id} was made, and ended by somebody else at once");
            Trouble::new(ErrorKind::NotFound, ended)
        }
        other => other,
    })
}

/// What a lease holds: functions by address, mediated devices by UUID.
pub(crate) fn held(lease: &LeaseRecord) -> Vec<&str> {
    lease.devices.iter().chain(&lease.mediated).map(String::as_str).collect()
}

/// Exits as attaching would.
async fn plan(
    bus: &Bus,
    devices: &[&str],
    args: &AttachArgs,
    out: &Output,
) -> Result<ExitCode, Trouble> {
    let mut options = options(args);
    if let Some(tenant) = &args.tenant {
        options.insert("tenant", tenant.as_str().into());
    }
    let reply = bus.ask("Plan", &(devices, options)).await?;
    let plan: PlanRecord = reply.read()?;
    let asked = match args.vf_of.as_ref().or(args.pool.as_ref()) {
        Some(physical) => format!("{} of {physical}", args.count),
        None => devices.join(", "),
    };
    if out.json {
        print_json(&reply.json()?)?;
    } else {
        bus.note_simulation().await;
        print(&Story { asked: &asked, can: "be attached", plan: &plan }.to_string())?;
    }
    let kind = plan.reasons.first().and_then(|reason| ErrorKind::from_name(&reason.kind));
    Ok(kind.map_or(ExitCode::SUCCESS, |kind| kind.exit_status().into()))
}

fn options(args: &AttachArgs) -> Options<'_> {
    let mut options = args.shaping.options();
    if let Some(vm) = &args.vm {
        options.insert("vm", vm.as_str().into());
    }
    for (name, given) in [("vf_of", &args.vf_of), ("pool", &args.pool)] {
        let Some(given) = given else { continue };
        options.insert(name, given.as_str().into());
        options.insert("count", args.count.into());
    }
    if let Some(pid) = args.pid {
        options.insert("pid", pid.into());
    }
    for (name, given) in [
        ("whole_group", args.whole_group),
        ("adopt", args.adopt),
        ("allow_protected", args.allow_protected),
        ("node_access", args.node_access),
        ("no_scrub", args.no_scrub),
    ] {
        if given {
            options.insert(name, true.into());
        }
    }
    options
}

/// How long one waits without being told for what.
const PATIENCE: Duration = Duration::from_secs(1);

/// Awaits `work`; when that takes its time and a person watches, says what it waits for.
pub(crate) async fn patiently<T>(bus: &Bus, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    let told = async {
        tokio::time::sleep(PATIENCE).await;
        if std::io::stderr().is_terminal() {
            // Not to know what it waits for is no reason to stop waiting.
            let leases = bus.manager.list_leases().await.unwrap_or_default();
            anstream::eprintln!("{}", waiting_for(&leases));
        }
    };
    tokio::select! {
        done = &mut work => done,
        () = told => work.await,
    }
}

fn waiting_for(leases: &[LeaseRecord]) -> String {
    let under_way: Vec<String> = leases
        .iter()
        .filter(|lease| matches!(lease.state.as_str(), "preparing" | "releasing"))
        .map(|lease| format!("lease {} ({}) is {}", lease.id, held(lease).join(", "), lease.state))
        .collect();
    match under_way.as_slice() {
        [] => "waiting for vfiod, or for the authorization it asked for...".into(),
        leases => format!("waiting for the kernel: {}...", leases.join("; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_asked_for_is_sent() {
        let args = AttachArgs {
            devices: vec!["gpu".into()],
            tenant: Some("alice".into()),
            vm: Some("web".into()),
            whole_group: true,
            adopt: false,
            vf_of: None,
            pool: None,
            count: 1,
            shaping: crate::shaping::Shaping::default(),
            pid: Some(7),
            allow_protected: false,
            node_access: false,
            no_scrub: false,
            dry_run: false,
        };
        let options = options(&args);
        assert_eq!(options.len(), 3);
        assert_eq!(options["pid"], 7u32.into());
        assert_eq!(options["vm"], "web".into());
        assert_eq!(options["whole_group"], true.into());
    }

    #[test]
    fn waiting_has_a_reason() {
        let lease = |state: &str| LeaseRecord {
            id: "3f9a2c81".into(),
            state: state.into(),
            devices: vec!["0000:03:00.0".into()],
            ..LeaseRecord::default()
        };
        assert!(waiting_for(&[lease("active")]).contains("authorization"));
        assert_eq!(
            waiting_for(&[lease("active"), lease("preparing")]),
            "waiting for the kernel: lease 3f9a2c81 (0000:03:00.0) is preparing..."
        );
    }
}
