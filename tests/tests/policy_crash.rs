//! Applying a policy through kills of the broker before and after every write and every step: each
//! device is as it was or as wanted, and applying once more does the rest.

use std::fmt;

use anyhow::{Result, ensure};
use libvfio::address::PciAddress;
use libvfio::pci::Binding;
use vfiod_tests::survival::{self, GPU, Ground};
use vfiod_tests::trial::say_policy;

const TRIAL: &str = env!("CARGO_BIN_EXE_trial");
/// More places than there are.
const NEVER: u32 = u32::MAX;
/// The physical function of the card whose virtual functions are renumbered.
const PHYSICAL: &str = "0000:07:00.0";

const POLICY: &str = "
[pool.gpu]
mode = 'passthrough'
select = [{ class = 'gpu', vendor = '10de' }]
reset-order = ['bus']
d3cold = false

[pool.vnics]
mode = 'passthrough'
select = [{ address = '0000:07:00.0' }]
vfs = 3
";

struct Case {
    at: u32,
    place: String,
    again: u32,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "killed at {} ({}), then at {}", self.at, self.place, self.again)
    }
}

fn ground() -> Result<Ground> {
    let ground = Ground::lasting(TRIAL)?;
    say_policy(ground.records(), POLICY)?;
    Ok(ground)
}

fn binding(ground: &Ground, device: &str) -> Result<Option<Binding>> {
    let device: PciAddress = device.parse()?;
    let host = ground.sim.host();
    let there = host.function(device).path().exists();
    Ok(there.then(|| Binding::read(&host, device)).transpose()?)
}

fn number(ground: &Ground) -> Result<String> {
    let path = ground.sim.function(PHYSICAL.parse()?).join("sriov_numvfs");
    Ok(std::fs::read_to_string(path)?.trim().to_owned())
}

/// Every device of the policy is wholly on VFIO or wholly as it was.
fn whole(ground: &Ground, before: &[Option<Binding>]) -> Result<()> {
    let now: Vec<_> = GPU.iter().map(|device| binding(ground, device)).collect::<Result<_>>()?;
    let on_vfio = |found: &Option<Binding>| {
        let Some(Binding { driver, driver_override }) = found else { return false };
        [driver, driver_override].iter().all(|name| name.as_deref() == Some("vfio-pci"))
    };
    ensure!(now == before || now.iter().all(on_vfio), "the card is half way: {now:?}");
    let number = number(ground)?;
    ensure!(number == "2" || number == "3", "{number} virtual functions");
    let left = ground.others()?;
    ensure!(left.is_empty(), "left over: {left:?}");
    Ok(())
}

fn play(ground: &Ground, case: &Case) -> Result<()> {
    let before: Vec<_> = GPU.iter().map(|device| binding(ground, device)).collect::<Result<_>>()?;
    let done = ground.run(&["apply"], case.at)?;
    ensure!(done.killed, "it was not killed: {}", done.said);
    if case.again > 0 {
        ground.run(&["recover"], case.again)?;
    }
    let recovered = ground.run(&["recover"], 0)?;
    ensure!(recovered.well, "cannot recover: {}", recovered.said);
    whole(ground, &before)?;
    let applied = ground.run(&["apply"], 0)?;
    ensure!(applied.well, "cannot apply: {}", applied.said);
    for device in [GPU[0], GPU[1], "0000:07:10.0", "0000:07:10.2", "0000:07:10.4"] {
        let driver = binding(ground, device)?.and_then(|found| found.driver);
        ensure!(driver.as_deref() == Some("vfio-pci"), "{device} is on {driver:?}");
    }
    Ok(())
}

#[test]
fn wherever_the_broker_is_killed_each_device_is_as_it_was_or_as_wanted() {
    let places = ground().unwrap().run(&["apply"], NEVER).unwrap();
    assert!(places.well, "{}", places.said);
    let places = places.places();
    assert!(places.len() > 60, "few places: {places:?}");
    let cases: Vec<Case> = places
        .into_iter()
        .zip(1..)
        .map(|(place, at)| Case { at, place, again: if at % 4 == 0 { 3 } else { 0 } })
        .collect();
    survival::each(&cases, ground, play);
    survival::count("policy crash matrix", cases.len(), "cases");
}
