//! `plan`, `apply`, `status` and `verify-boot`: where the host stands with its policy, and getting
//! there.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use futures_core::Stream;
use libvfio::client::{FAILED, Options, PolicyRecord, UnitRecord};
use libvfio::error::ErrorKind;
use libvfio::host::HostRoot;
use libvfio::plan::Standing;

use crate::args::ApplyArgs;
use crate::bus::{Bus, Reply};
use crate::output::{Output, print, print_json};
use crate::table::{BAD, BOLD, Cell, DIM, GOOD, PLAIN, Table, WARN};
use crate::trouble::Trouble;

/// What the unit of provisioning may take where the daemon does not say.
const LIMIT: Duration = Duration::from_secs(30);

/// Exits as applying would.
pub(crate) async fn plan(bus: &Bus, out: &Output) -> Result<ExitCode, Trouble> {
    tell(&standing(bus, out).await?, out, to_do)
}

/// Where the host stands.
pub(crate) async fn status(bus: &Bus, out: &Output) -> Result<ExitCode, Trouble> {
    let all = |units: &[UnitRecord]| {
        if !units.is_empty() {
            out.table(&table(units), "")?;
        }
        let odd = units.iter().filter(|unit| !unit.reasons.is_empty());
        print(&odd.map(reasons).collect::<String>())
    };
    tell(&standing(bus, out).await?, out, all)
}

async fn standing(bus: &Bus, out: &Output) -> Result<Reply, Trouble> {
    let reply = bus.ask("PlanPolicy", &(Options::new(),)).await?;
    if !out.json {
        bus.note_simulation().await;
    }
    Ok(reply)
}

/// The policy: what is wrong with it, what `body` has of its units, and how many stand where.
fn tell(
    reply: &Reply,
    out: &Output,
    body: impl FnOnce(&[UnitRecord]) -> Result<(), Trouble>,
) -> Result<ExitCode, Trouble> {
    let policy: PolicyRecord = reply.read()?;
    if out.json {
        print_json(&reply.json()?)?;
    } else {
        print(&head(&policy))?;
        body(&policy.units)?;
        print(&summary(&policy))?;
    }
    Ok(status_of(&policy))
}

fn to_do(units: &[UnitRecord]) -> Result<(), Trouble> {
    let to_do = units.iter().filter(|unit| !unit.is_as_wanted());
    print(&to_do.map(story).collect::<String>())
}

pub(crate) async fn run(bus: &Bus, args: &ApplyArgs, out: &Output) -> Result<ExitCode, Trouble> {
    if args.dry_run {
        return plan(bus, out).await;
    }
    if args.boot {
        return boot(bus, out).await;
    }
    let mut options = Options::new();
    if args.accept {
        options.insert("accept", true.into());
    }
    tell(&apply(bus, options, out).await?, out, to_do)
}

/// Applies, with a line for each step as it happens.
async fn apply(bus: &Bus, options: Options<'_>, out: &Output) -> Result<Reply, Trouble> {
    let mut steps = bus.manager.receive_policy_step().await?;
    let arguments = (options,);
    let mut work = pin!(bus.ask("ApplyPolicy", &arguments));
    loop {
        let next = poll_fn(|cx| Pin::new(&mut steps).poll_next(cx));
        tokio::select! {
            biased;
            step = next => {
                let Some(step) = step else { return work.await };
                let step = step.args()?;
                if !out.json {
                    print(&format!("{DIM}{}{DIM:#} {}\n", step.pool, step.text))?;
                }
            }
            reply = &mut work => return reply,
        }
    }
}

/// As a part of the boot, which it never delays by more than the policy allows, nor prevents.
async fn boot(bus: &Bus, out: &Output) -> Result<ExitCode, Trouble> {
    let started = Instant::now();
    let within = |limit: Duration| limit.saturating_sub(started.elapsed());
    let late = |what: &str, limit: Duration| {
        let seconds = limit.as_secs();
        let why = format!(
            "{what} took longer than the {seconds} s that the boot waits; it goes on by itself, see \
             'vfioctl status'"
        );
        Trouble::new(ErrorKind::Timeout, why)
    };
    let arguments = (Options::new(),);
    let planned = tokio::time::timeout(within(LIMIT), bus.ask("PlanPolicy", &arguments)).await;
    let plan: PolicyRecord = planned.map_err(|_| late("the daemon", LIMIT))??.read()?;
    let limit = Duration::from_secs(plan.boot_limit.max(1));
    if let Some(error) = &plan.error {
        return Err(Trouble::new(ErrorKind::InvalidArgument, format!("no policy: {error}")));
    }
    if plan.units.is_empty() && plan.notes.is_empty() {
        print("there is no policy\n")?;
        return Ok(ExitCode::SUCCESS);
    }
    // Whoever makes virtual functions needs its driver, which is loaded by now or on its way. Half of
    // the time is left for the policy, whatever udev is at.
    let settled = tokio::time::timeout(within(limit / 2), settle(within(limit / 2))).await;
    if settled.is_err() {
        anstream::eprintln!("{WARN}udev has not settled; going on without{WARN:#}");
    }
    let options = Options::from([("boot", true.into())]);
    let applied = tokio::time::timeout(within(limit), apply(bus, options, out)).await;
    tell(&applied.map_err(|_| late("the policy", limit))??, out, to_do)
}

/// Until udev has dealt with all devices there are.
async fn settle(limit: Duration) {
    let seconds = format!("--timeout={}", limit.as_secs());
    let settle = move || {
        // Without udev there is nothing to wait for.
        let _ = std::process::Command::new("udevadm").args(["settle", &seconds]).status();
    };
    let _ = tokio::task::spawn_blocking(settle).await;
}

/// Whether this boot did what the policy wanted; if not, what stopped it.
pub(crate) async fn verify_boot(
    bus: &Bus,
    host: &HostRoot,
    out: &Output,
) -> Result<ExitCode, Trouble> {
    let reply = bus.ask("BootReport", &(Options::new(),)).await?;
    let boot: PolicyRecord = reply.read()?;
    if out.json {
        print_json(&reply.json()?)?;
    } else {
        print(&head(&boot))?;
        for unit in &boot.units {
            print(&verdict(unit, host))?;
        }
        let milliseconds = boot.milliseconds.unwrap_or_default();
        print(&format!("provisioning took {milliseconds} ms\n"))?;
    }
    let lost = boot.units.iter().any(|unit| unit.lost_to.is_some() || !unit.is_as_wanted());
    let failed = lost || boot.error.is_some();
    Ok(if failed { ErrorKind::Internal.exit_status().into() } else { ExitCode::SUCCESS })
}

fn verdict(unit: &UnitRecord, host: &HostRoot) -> String {
    let UnitRecord { pool, device, wanted, .. } = unit;
    let line = |style: anstyle::Style, word: &str| {
        format!("{style}{word:<5}{style:#} {device} ({pool}) {wanted}")
    };
    if let Some(driver) = &unit.lost_to {
        let (why, remedy) = cause(host, driver);
        return format!(
            "{}: {driver} had it first, {why}\n      remedy: {remedy}\n{}",
            line(WARN, "late"),
            steps(unit)
        );
    }
    if !unit.is_as_wanted() {
        return format!("{}\n{}{}", line(BAD, "fail"), reasons(unit), steps(unit));
    }
    let how = match unit.steps.as_slice() {
        [] => "from the start".to_owned(),
        steps => format!("by provisioning, in {} steps", steps.len()),
    };
    format!("{}, {how}\n", line(GOOD, "ok"))
}

/// Why a host's driver can have been there before the rules, and what helps.
fn cause(host: &HostRoot, driver: &str) -> (&'static str, &'static str) {
    let name = driver.replace('-', "_");
    let builtin = host.modules("modules.builtin").ok().flatten().unwrap_or_default();
    let file = |line: &str| {
        let name = line.rsplit('/').next().unwrap_or_default();
        name.trim_end_matches(".ko").replace('-', "_")
    };
    if builtin.lines().any(|line| file(line) == name) {
        return (
            "since it is built into the kernel",
            "nothing in user space comes before it; provisioning takes the device from it",
        );
    }
    (
        "since its module was loaded before udev had the policy's rules",
        "if the module is in the initramfs, make that anew so that it has the rules too \
         (update-initramfs -u, or dracut --force); else the policy was changed after this boot",
    )
}

fn head(policy: &PolicyRecord) -> String {
    let mut lines = Vec::new();
    if let Some(error) = &policy.error {
        let then = "the policy's files are wrong, and what was in force before stays so";
        lines.push(format!("{BAD}{then}:{BAD:#}\n"));
        lines.extend(error.lines().map(|line| format!("  {line}\n")));
    }
    lines.extend(policy.notes.iter().map(|text| note(text)));
    lines.extend(outdated(policy));
    lines.concat()
}

fn note(text: &str) -> String {
    format!("{WARN}note:{WARN:#} {text}\n")
}

/// That the next boot begins with another policy than this, if so.
pub(crate) fn outdated(policy: &PolicyRecord) -> Option<String> {
    policy.initramfs.as_deref().map(outdated_by)
}

/// The same, where that is known by what to run.
pub(crate) fn outdated_by(command: &str) -> String {
    note(&format!(
        "the initial file system does not have this policy, and what is loaded there goes by what it \
         has; make it anew ({command})"
    ))
}

fn summary(policy: &PolicyRecord) -> String {
    let all = policy.units.len();
    if all == 0 && policy.files.is_empty() && policy.error.is_none() {
        let none = "there is no policy; write one in /etc/vfiod/vfiod.toml ('vfioctl policy schema' \
                    explains it, 'vfioctl policy import' proposes one)";
        return format!("{none}\n");
    }
    let count = |standing: &str| policy.units.iter().filter(|u| u.standing == standing).count();
    let as_wanted = policy.units.iter().filter(|unit| unit.is_as_wanted()).count();
    let mut parts = vec![format!("{as_wanted} of {all} as the policy wants it")];
    let rest = ["to-do", "waits", "blocked", FAILED].map(|standing| (count(standing), standing));
    let rest = rest.into_iter().filter(|(count, _)| *count > 0);
    parts.extend(rest.map(|(count, standing)| format!("{count} {standing}")));
    parts.join(", ") + "\n"
}

/// A unit with all there is to tell.
fn story(unit: &UnitRecord) -> String {
    let UnitRecord { pool, device, now, wanted, standing, .. } = unit;
    let style = style(unit);
    let head =
        format!("{BOLD}{device}{BOLD:#} ({pool}): {now} -> {wanted}  {style}{standing}{style:#}\n");
    head + &reasons(unit) + &steps(unit)
}

fn reasons(unit: &UnitRecord) -> String {
    let failure = unit.failure.iter().map(|failure| format!("  {BAD}{failure}{BAD:#}\n"));
    let reason = |r: &libvfio::client::ReasonRecord| {
        format!("  {BOLD}{}{BOLD:#} {}\n    remedy: {}\n", r.object, r.text, r.remedy)
    };
    failure.chain(unit.reasons.iter().map(reason)).collect()
}

fn steps(unit: &UnitRecord) -> String {
    let steps = unit.steps.iter().zip(1..);
    steps.map(|(step, n)| format!("  {n}. {}\n", step.text)).collect::<Vec<_>>().concat()
}

fn style(unit: &UnitRecord) -> anstyle::Style {
    match unit.standing.as_str() {
        "as-wanted" | "done" if unit.drifted != Some(true) => GOOD,
        "blocked" | "failed" => BAD,
        _ => WARN,
    }
}

fn table(units: &[UnitRecord]) -> Table {
    let mut table = Table::new(&["POOL", "DEVICE", "NOW", "WANTED", "STANDING"]);
    for unit in units {
        let drifted = if unit.drifted == Some(true) { " (drifted)" } else { "" };
        table.push([
            unit.pool.as_str().into(),
            unit.device.as_str().into(),
            Cell::new(unit.now.as_str(), PLAIN),
            Cell::new(unit.wanted.as_str(), PLAIN),
            Cell::new(format!("{}{drifted}", unit.standing), style(unit)),
        ]);
    }
    table
}

/// 0 if nothing is in the way; else by what is.
fn status_of(policy: &PolicyRecord) -> ExitCode {
    if policy.error.is_some() {
        return ErrorKind::InvalidArgument.exit_status().into();
    }
    if policy.units.iter().any(|unit| unit.standing == FAILED) {
        return ErrorKind::Internal.exit_status().into();
    }
    let with = |standing: Standing| {
        let stands = move |unit: &&UnitRecord| unit.standing == standing.name();
        policy.units.iter().find(stands).and_then(|unit| unit.reasons.first())
    };
    let reason = with(Standing::Blocked).or_else(|| with(Standing::Waits));
    let kind = reason.and_then(|reason| ErrorKind::from_name(&reason.kind));
    kind.map_or(ExitCode::SUCCESS, |kind| kind.exit_status().into())
}

#[cfg(test)]
mod tests {
    use libvfio::client::{ReasonRecord, StepRecord};

    use super::*;

    fn unit(standing: &str) -> UnitRecord {
        UnitRecord {
            pool: "gpus".into(),
            device: "0000:03:00.0".into(),
            now: "on bochs".into(),
            wanted: "on VFIO".into(),
            standing: standing.into(),
            steps: vec![StepRecord { text: "unbind it".into(), ..StepRecord::default() }],
            ..UnitRecord::default()
        }
    }

    fn plain(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    #[test]
    fn a_unit_tells_where_it_stands_what_is_in_the_way_and_the_steps() {
        let reason = ReasonRecord {
            kind: "AlreadyLeased".into(),
            object: "0000:03:00.0".into(),
            text: "is leased".into(),
            remedy: "wait".into(),
            ..ReasonRecord::default()
        };
        let waits = UnitRecord { reasons: vec![reason], ..unit("waits") };
        assert_eq!(
            plain(&story(&waits)),
            "0000:03:00.0 (gpus): on bochs -> on VFIO  waits\n\
             \u{20} 0000:03:00.0 is leased\n    remedy: wait\n  1. unbind it\n"
        );
        let policy = PolicyRecord { units: vec![waits, unit("done")], ..PolicyRecord::default() };
        assert_eq!(plain(&summary(&policy)), "1 of 2 as the policy wants it, 1 waits\n");
        assert_eq!(status_of(&policy), ErrorKind::AlreadyLeased.exit_status().into());
        let none = PolicyRecord::default();
        assert!(plain(&summary(&none)).starts_with("there is no policy; write one"));
        let broken = PolicyRecord { error: Some("vfiod.toml:1:1: no".into()), ..none };
        assert!(!plain(&summary(&broken)).contains("there is no policy"));
    }

    #[test]
    fn a_host_driver_that_came_first_is_named_with_the_cause() {
        let dir = tempfile::tempdir().unwrap();
        let modules = dir.path().join("lib/modules/6.12");
        std::fs::create_dir_all(&modules).unwrap();
        std::fs::create_dir_all(dir.path().join("proc/sys/kernel")).unwrap();
        std::fs::write(dir.path().join("proc/sys/kernel/osrelease"), "6.12\n").unwrap();
        std::fs::write(modules.join("modules.builtin"), "kernel/drivers/nvme/host/nvme.ko\n")
            .unwrap();
        let host = HostRoot::new(dir.path());
        let lost = |to: &str| UnitRecord { lost_to: Some(to.into()), ..unit("done") };
        assert!(plain(&verdict(&lost("nvme"), &host)).contains("built into the kernel"));
        assert!(plain(&verdict(&lost("bochs"), &host)).contains("update-initramfs"));
        assert!(plain(&verdict(&unit("done"), &host)).starts_with("ok    0000:03:00.0 (gpus)"));
    }
}
