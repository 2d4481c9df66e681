//! Clearing the memory of functions, each by its scrubber, and seeing that it is clear.

mod command;
mod nvme;
mod program;

use std::time::{Duration, Instant};

use super::{Done, changed};
use crate::address::PciAddress;
use crate::host::{HostRoot, SIMULATED_MEMORY};
use crate::modalias::same_driver;
use crate::pci::Function;
use crate::scrub::{ReadBack, Scrubber};
use crate::step::health::Health;
use crate::step::{Cause, Outcome};
use crate::vfio::{Region, Wrong};

/// Scrubs a function that is where its scrubber works, by that.
pub(super) fn scrub(host: &HostRoot, device: PciAddress, with: &Scrubber) -> Done {
    let none = || changed(Some("a device"), None);
    let function = &Function::read(host, device).ok_or_else(none)?;
    let driver = function.driver.as_deref();
    match with.driver() {
        None if !function.on_vfio() => return Err(changed(Some("VFIO"), driver)),
        Some(wanted) if !same_driver(driver, Some(wanted)) => {
            return Err(changed(Some(wanted), driver));
        }
        _ => {}
    }
    match with {
        Scrubber::BarZero { bar, read_back } => {
            zero(host, function, (*bar, *read_back), with.limit())?;
        }
        Scrubber::Nvme if host.is_real() => nvme::erase(host, device, with.limit())?,
        Scrubber::Nvme => simulated(host, device)?,
        Scrubber::Command { command, .. } => {
            let before = Health::read(host, device).ok_or_else(none)?;
            command::run(host, function, command, with.limit())?;
            before.compare(Health::read(host, device).as_ref())?;
        }
    }
    Ok(Outcome::Done)
}

/// Overwrites a region and reads it back, for `limit` at most.
fn zero(
    host: &HostRoot,
    function: &Function,
    (bar, read_back): (u8, ReadBack),
    limit: Duration,
) -> Result<(), Cause> {
    let until = Instant::now() + limit;
    let wrong = |wrong| match wrong {
        Wrong::Forgets(at) => Cause::ReadBack {
            wanted: format!("what was written through BAR {bar} at {at:#x}"),
            found: "something else".to_owned(),
        },
        Wrong::Left(at) => not_zero(&format!("something else at {at:#x}")),
        Wrong::Late => {
            Cause::Program(format!("clearing BAR {bar} did not end within {} s", limit.as_secs()))
        }
    };
    let mut region = Region::open(host, function, bar)?;
    region.memory().overwrite(until).map_err(wrong)?;
    if !host.is_real() {
        simulated(host, function.address)?;
    }
    region.memory().look(read_back, until).map_err(wrong)
}

/// A simulated host has one kind of memory, whatever clears it.
fn simulated(host: &HostRoot, device: PciAddress) -> Result<(), Cause> {
    host.write(SIMULATED_MEMORY, &device.to_string()).map_err(|e| Cause::kernel(&e))?;
    let soiled = host.text(SIMULATED_MEMORY)?.unwrap_or_default();
    if soiled.lines().any(|line| line == device.to_string()) {
        return Err(not_zero("something else"));
    }
    Ok(())
}

fn not_zero(found: &str) -> Cause {
    Cause::ReadBack { wanted: "zeros throughout".to_owned(), found: found.to_owned() }
}
