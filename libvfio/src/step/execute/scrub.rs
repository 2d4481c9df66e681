//! Clearing the memory of functions, each by its scrubber, and seeing that it is clear.

mod command;
mod nvme;
mod program;

use super::{Done, changed};
use crate::address::PciAddress;
use crate::host::{HostRoot, SIMULATED_MEMORY};
use crate::modalias::same_driver;
use crate::pci::Function;
use crate::scrub::Scrubber;
use crate::step::health::Health;
use crate::step::{Cause, Outcome};
use crate::vfio;

/// Scrubs a function that is where its scrubber works, by that.
pub(super) fn scrub(host: &HostRoot, device: PciAddress, with: &Scrubber) -> Done {
    let before = Health::read(host, device).ok_or_else(|| changed(Some("a device"), None))?;
    let function = before.function();
    let driver = function.driver.as_deref();
    match with.driver() {
        None if !function.on_vfio() => return Err(changed(Some("VFIO"), driver)),
        Some(wanted) if !same_driver(driver, Some(wanted)) => {
            return Err(changed(Some(wanted), driver));
        }
        _ => {}
    }
    match with {
        Scrubber::BarZero { bar } => zero(host, function, *bar)?,
        Scrubber::Nvme if host.is_real() => nvme::erase(host, device, with.limit())?,
        Scrubber::Nvme => simulated(host, device)?,
        Scrubber::Command { command, .. } => {
            command::run(host, function, command, with.limit())?;
            before.compare(Health::read(host, device).as_ref())?;
        }
    }
    Ok(Outcome::Done)
}

fn zero(host: &HostRoot, function: &Function, bar: u8) -> Result<(), Cause> {
    if !host.is_real() {
        return simulated(host, function.address);
    }
    match vfio::zero(host, function, bar)? {
        None => Ok(()),
        Some(at) => Err(not_zero(&format!("something else at {at:#x}"))),
    }
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
