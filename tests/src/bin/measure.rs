//! `measure`: what numbers of functions cost, on simulated hosts of a hundred and of ten thousand.
//! Prints benchmark rows as JSON. Starts daemons on buses of their own; touches no device.

use std::time::Instant;

use anyhow::{Context, Result};
use libvfio::inventory::Inventory;
use vfiod_tests::protocol::{BenchRow, median};
use vfiod_tests::session::Session;
use vfiod_tests::sim::{Described, SCALE, Sim};

/// Functions of the two hosts.
const FEW: u16 = 100;
const MANY: u16 = 10_000;
/// Looks at one function.
const LOOKS: usize = 500;

fn main() -> Result<()> {
    let rows = [refresh()?, memory()?];
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

/// What a thousand functions take of the daemon's memory, all their objects on the bus included.
fn memory() -> Result<BenchRow> {
    let few = resident(FEW)?;
    let many = resident(MANY)?;
    let thousands = f64::from(MANY - FEW) / 1000.0;
    Ok(BenchRow::of("resident-per-1000", "MiB", &[(many - few) / thousands]))
}

fn resident(functions: u16) -> Result<f64> {
    let text = SCALE.replace("count = 200", &format!("count = {}", functions / 50));
    let session = Session::of_many_users(&text);
    let status = std::fs::read_to_string(format!("/proc/{}/status", session.vfiod.child.id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.split_whitespace().next().context("no number")?.parse()?;
    Ok(kib / 1024.0)
}
