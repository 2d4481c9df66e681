//! `measure`: what numbers of functions cost, on simulated hosts: of a hundred and of ten thousand to
//! know, of one and of eight to clean, and of a thousand to name in a policy. Prints benchmark rows as
//! JSON: all, or that of `inventory`, `memory`, `cleaning` or `compile`. Starts daemons on buses of
//! their own; touches no device.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use libvfio::client::ManagerProxy;
use libvfio::inventory::Inventory;
use libvfio::pci::Identity;
use libvfio::policy::{self, Assignment, Facts, Policy, Source};
use vfiod_tests::protocol::{BenchRow, median};
use vfiod_tests::session::Session;
use vfiod_tests::sim::{Described, SCALE, Sim};

/// Functions of the two hosts.
const FEW: u16 = 100;
const MANY: u16 = 10_000;
/// Looks at one function.
const LOOKS: usize = 500;
/// Functions that are cleaned at once.
const AT_ONCE: usize = 8;
/// Times that they are.
const CLEANINGS: usize = 15;
/// Functions of the host whose policy is compiled, and how often that is done.
const NAMED: u16 = 1000;
const COMPILATIONS: usize = 20;

fn main() -> Result<()> {
    let rows = match std::env::args().nth(1).as_deref() {
        None => vec![refresh()?, memory()?, cleaning()?, compile()?],
        Some("inventory") => vec![refresh()?],
        Some("memory") => vec![memory()?],
        Some("cleaning") => vec![cleaning()?],
        Some("compile") => vec![compile()?],
        Some(other) => bail!("there are inventory, memory, cleaning and compile, and no {other}"),
    };
    println!("{}", serde_json::to_string(&rows)?);
    Ok(())
}

/// Looking at one function again, whose cost must not depend on how many others there are.
fn refresh() -> Result<BenchRow> {
    let (few, many) = (looks(FEW)?, looks(MANY)?);
    let mut row = BenchRow::of("inventory-10000", "us", &many);
    row.peer_ratios.insert("inventory-100".to_owned(), row.median / median(&few));
    Ok(row)
}

fn looks(functions: u16) -> Result<Vec<f64>> {
    let sim = Sim::mount(&Described::scaled(functions)?)?;
    let mut inventory = Inventory::scan(&sim.host())?;
    let address = inventory.functions().nth(10).context("no functions")?.address;
    let mut look = || {
        let start = Instant::now();
        inventory.refresh(&sim.host(), address);
        start.elapsed().as_secs_f64() * 1e6
    };
    Ok((0..LOOKS).map(|_| look()).collect())
}

/// A policy that names each of a thousand functions by its address, from its text to udev's rules:
/// our own work, beside the look at the host that it takes.
fn compile() -> Result<BenchRow> {
    let sim = Sim::mount(&Described::scaled(NAMED)?)?;
    let (mut scans, mut own) = (Vec::new(), Vec::new());
    for _ in 0..COMPILATIONS {
        let start = Instant::now();
        let inventory = Inventory::scan(&sim.host())?;
        let facts = Facts::read(&sim.host())?;
        scans.push(start.elapsed().as_secs_f64() * 1e3);
        let functions = || inventory.functions().filter(|f| !f.is_bridge());
        // What has a serial number is asked for by the rules, which are short then.
        let met = |f| Identity { serial: None, ..Identity::of(f) };
        let known: BTreeMap<_, _> = functions().map(|f| (f.address, met(f))).collect();
        let mut text = String::from("[pool.all]\nmode = 'passthrough'\nselect = [\n");
        functions().try_for_each(|f| writeln!(text, "    {{ address = '{}' }},", f.address))?;
        let source = Source { name: "measured".to_owned(), text: text + "]\n" };
        let start = Instant::now();
        let policy = Policy::parse(&[source]).map_err(|problems| anyhow!("{problems}"))?;
        let assignment = Assignment::new(&policy, &inventory, &facts);
        let rules = policy::rules(&policy, &facts, &known, &inventory.vfio_aliases);
        let rules = rules.context("a pool is on VFIO, and there are no rules")?;
        own.push(start.elapsed().as_secs_f64() * 1e3);
        ensure!(assignment.members().count() == known.len(), "not all are in the pool");
        ensure!(rules.matches("KERNEL==").count() == known.len(), "not all are in the rules");
    }
    let mut row = BenchRow::of("compile-1000", "ms", &own);
    row.peer_ratios.insert("inventory".to_owned(), row.median / median(&scans));
    Ok(row)
}

/// What a thousand functions take of the daemon's memory, all their objects on the bus included.
fn memory() -> Result<BenchRow> {
    let few = resident(FEW)?;
    let many = resident(MANY)?;
    let thousands = f64::from(MANY - FEW) / 1000.0;
    Ok(BenchRow::of("resident-per-1000", "MiB", &[(many - few) / thousands]))
}

/// The end of eight leases at once beside that of one, where the kernel takes as long for a reset as
/// a real one, a tenth of a second each.
fn cleaning() -> Result<BenchRow> {
    let few = SCALE.replace("count = 200", "count = 1");
    let session = Session::of_many_users(&few.replace("[kernel]\n", "[kernel]\ndelays = 1.0\n"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let connection = session.connect().await;
        let manager = ManagerProxy::new(&connection).await?;
        let devices = manager.list_devices([].into()).await?;
        let mut devices = devices.into_iter().filter(|device| device.physical_function.is_some());
        let devices: Vec<String> = devices.by_ref().take(AT_ONCE).map(|d| d.address).collect();
        let (mut one, mut all) = (Vec::new(), Vec::new());
        for _ in 0..CLEANINGS {
            one.push(released(&manager, &devices[..1]).await?);
            all.push(released(&manager, &devices).await?);
        }
        let mut row = BenchRow::of("release-8-at-once", "ms", &all);
        row.peer_ratios.insert("release-1".to_owned(), row.median / median(&one));
        Ok(row)
    })
}

/// How many milliseconds the ends of leases take that are asked for at once, one for each device.
async fn released(manager: &ManagerProxy<'_>, devices: &[String]) -> Result<f64> {
    for device in devices {
        manager.attach(&[device], "tenant", [].into()).await?;
    }
    let start = Instant::now();
    let mut ends = tokio::task::JoinSet::new();
    for device in devices {
        let (connection, device) = (manager.inner().connection().clone(), device.clone());
        ends.spawn(async move {
            let manager = ManagerProxy::new(&connection).await?;
            manager.release(&device, [].into()).await
        });
    }
    while let Some(end) = ends.join_next().await {
        ensure!(end??.len() == 1, "a device had no lease");
    }
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

fn resident(functions: u16) -> Result<f64> {
    let text = SCALE.replace("count = 200", &format!("count = {}", functions / 50));
    let session = Session::of_many_users(&text);
    let status = std::fs::read_to_string(format!("/proc/{}/status", session.vfiod.child.id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.split_whitespace().next().context("no number")?.parse()?;
    Ok(kib / 1024.0)
}
