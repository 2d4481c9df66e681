//! Carrying steps out. The one place that writes to the host: nothing outside this module and those
//! below it may change a driver, an override, a number of virtual functions, a mediated device, a
//! module, a node, a limit or a device.

mod scrub;

use std::process::Command;

use super::health::Health;
use super::{Cause, Outcome, Step, Tunable};
use crate::address::PciAddress;
use crate::assigned::Assigned;
use crate::backend::{Handle, Maker, SRIOV_MANAGE};
use crate::error::Error;
use crate::holders;
use crate::host::{HostRoot, LOAD_MODULE, SIMULATED_HOT_RESET, SIMULATED_SRIOV_MANAGE};
use crate::mediated::{self, TypeName, Uuid};
use crate::modalias::same_driver;
use crate::pci::{Binding, Function};
use crate::shape::{Setting, Value};
use crate::vfio::Openable;
use crate::{acl, memlock, vfio};

type Done = Result<Outcome, Cause>;

/// Does what a step says, unless it is so already, and reads back that it is so.
pub(super) fn execute(step: &Step, host: &HostRoot) -> Done {
    match step {
        Step::LoadModule { module } => load_module(host, module),
        Step::UnbindLock { device } => unbind_lock(host, *device),
        Step::Unbind { device, driver } => unbind(host, *device, driver),
        Step::SetOverride { device, from, to } => {
            set_override(host, *device, from.as_deref(), to.as_deref())
        }
        Step::Bind { device, driver } => bind(host, *device, driver),
        Step::Reset { device, with } => reset(host, *device, with),
        Step::Scrub { device, with } => scrub::scrub(host, *device, with),
        Step::SetAutoprobe { device, from, to } => set_autoprobe(host, *device, *from, *to),
        Step::SetVirtualFunctions { device, from, to, by } => {
            set_virtual_functions(host, *device, *by, *from, *to)
        }
        Step::Shape { device, setting, from, to } => set_shape(host, *device, *setting, from, to),
        Step::NodeAccess { device, user, allowed } => node_access(host, *device, *user, *allowed),
        Step::LockMemory { process, bytes } => lock_memory(*process, *bytes),
        Step::CreateMediated { of, uuid } => create_mediated(host, of, *uuid),
        Step::RemoveMediated { of, uuid } => remove_mediated(host, of, *uuid),
        Step::Tune { device, setting, from, to } => tune(host, *device, *setting, from, to),
        Step::CheckViable { group } => check_viable(host, *group),
    }
}

impl From<Error> for Cause {
    fn from(error: Error) -> Self {
        Self::Host(error.to_string())
    }
}

/// `Ok(Done)` if what is found is what was wanted.
fn read_back(wanted: Option<&str>, found: Option<&str>) -> Done {
    if same_driver(wanted, found) {
        return Ok(Outcome::Done);
    }
    let say = |name: Option<&str>| name.unwrap_or("none").to_owned();
    Err(Cause::ReadBack { wanted: say(wanted), found: say(found) })
}

fn changed(wanted: Option<&str>, found: Option<&str>) -> Cause {
    let say = |name: Option<&str>| name.unwrap_or("none").to_owned();
    Cause::Changed { wanted: say(wanted), found: say(found) }
}

fn driver_of(host: &HostRoot, device: PciAddress) -> Option<String> {
    host.function(device).link_name("driver")
}

/// A driver's name as its directory spells it.
fn spelled(host: &HostRoot, driver: &str) -> String {
    let drivers = host.sys("bus/pci/drivers");
    let dashed = driver.replace('_', "-");
    if !drivers.has(driver) && drivers.has(&dashed) { dashed } else { driver.to_owned() }
}

fn unbind(host: &HostRoot, device: PciAddress, driver: &str) -> Done {
    let now = driver_of(host, device);
    match &now {
        None if host.function(device).path().exists() => return Ok(Outcome::AlreadySo),
        Some(now) if same_driver(Some(now), Some(driver)) => {}
        _ => return Err(changed(Some(driver), now.as_deref())),
    }
    let dir = host.function(device).sub("driver");
    dir.write("unbind", &device.to_string()).map_err(|e| Cause::kernel(&e))?;
    read_back(None, driver_of(host, device).as_deref())
}

/// Binding by the driver's own `bind` file rather than `drivers_probe` takes exactly this driver
/// where several would match, and reports the probe's errno (`drivers/base/bus.c`).
fn bind(host: &HostRoot, device: PciAddress, driver: &str) -> Done {
    let now = driver_of(host, device);
    if same_driver(now.as_deref(), Some(driver)) {
        return Ok(Outcome::AlreadySo);
    }
    if now.is_some() {
        return Err(changed(None, now.as_deref()));
    }
    let dir = host.sys("bus/pci/drivers").sub(&spelled(host, driver));
    dir.write("bind", &device.to_string()).map_err(|e| Cause::kernel(&e))?;
    read_back(Some(driver), driver_of(host, device).as_deref())
}

fn set_override(host: &HostRoot, device: PciAddress, from: Option<&str>, to: Option<&str>) -> Done {
    let now = Binding::read(host, device)?.driver_override;
    if same_driver(now.as_deref(), to) {
        return Ok(Outcome::AlreadySo);
    }
    if !same_driver(now.as_deref(), from) {
        return Err(changed(from, now.as_deref()));
    }
    // A lone newline clears it; an empty write would never reach the kernel.
    let value = to.map_or_else(|| "\n".to_owned(), |driver| spelled(host, driver));
    host.function(device).write("driver_override", &value).map_err(|e| Cause::kernel(&e))?;
    let found = Binding::read(host, device)?.driver_override;
    read_back(to, found.as_deref())
}

fn load_module(host: &HostRoot, module: &str) -> Done {
    let drivers = host.sys("bus/pci/drivers");
    let there = || drivers.has(&spelled(host, module));
    if there() {
        return Ok(Outcome::AlreadySo);
    }
    if host.is_real() {
        run(Command::new("modprobe").arg(module))?;
    } else if host.path(LOAD_MODULE).exists() {
        host.write(LOAD_MODULE, module).map_err(|e| Cause::kernel(&e))?;
    } else {
        let why = "modules load on a real or a simulated host only";
        return Err(Cause::Program(why.to_owned()));
    }
    read_back(Some(module), there().then_some(module))
}

fn run(program: &mut Command) -> Result<(), Cause> {
    let output = program.output().map_err(|e| Cause::kernel(&e))?;
    if !output.status.success() {
        return Err(Cause::Program(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(())
}

/// The write succeeds even when the lock is refused, so it is read back.
///
/// NVIDIA's driver has the file only where it is built for hypervisors. The ordinary one waits in
/// its `remove` for whoever has the card open, for ever if need be; so nobody may.
fn unbind_lock(host: &HostRoot, device: PciAddress) -> Done {
    let file = format!("proc/driver/nvidia/gpus/{device}/unbindLock");
    let Some(now) = host.text(&file)? else { return nobody_uses(host, device) };
    if now.trim() == "1" {
        return Ok(Outcome::AlreadySo);
    }
    host.write(&file, "1").map_err(|e| Cause::kernel(&e))?;
    let locked = host.text(&file)?.is_some_and(|now| now.trim() == "1");
    if locked { Ok(Outcome::Done) } else { Err(Cause::InUse) }
}

fn nobody_uses(host: &HostRoot, device: PciAddress) -> Done {
    match holders::of_functions(host, &[device].into())?.as_slice() {
        [] => Ok(Outcome::Done),
        _ => Err(Cause::InUse),
    }
}

/// By `reset`, which tries the function's own methods in the kernel's order (`reset_store`,
/// `drivers/pci/pci-sysfs.c`) and knows none that would reset others too; those VFIO resets. Never
/// under a driver of the host, which would be left with a device that has forgotten all.
fn reset(host: &HostRoot, device: PciAddress, with: &[PciAddress]) -> Done {
    let read = |address: &PciAddress| {
        let health = Health::read(host, *address);
        health.ok_or_else(|| changed(Some(&address.to_string()), None))
    };
    let all: Vec<PciAddress> = [device].iter().chain(with).copied().collect();
    let before = all.iter().map(read).collect::<Result<Vec<Health>, Cause>>()?;
    if let Some(driver) = before.iter().find_map(Health::stranger) {
        return Err(changed(Some("VFIO"), Some(driver)));
    }
    let done = match with {
        [] => host.function(device).write("reset", "1"),
        _ if host.is_real() => vfio::hot_reset(host, &all),
        _ => host.write(SIMULATED_HOT_RESET, &device.to_string()),
    };
    done.map_err(|e| Cause::kernel(&e))?;
    for (address, health) in all.iter().zip(before) {
        health.compare(Health::read(host, *address).as_ref())?;
    }
    Ok(Outcome::Done)
}

fn set_autoprobe(host: &HostRoot, device: PciAddress, from: bool, to: bool) -> Done {
    let dir = host.function(device);
    let word = |on| if on { "1" } else { "0" };
    let now = dir.attr("sriov_drivers_autoprobe")?;
    if now.as_deref() == Some(word(to)) {
        return Ok(Outcome::AlreadySo);
    }
    if now.as_deref() != Some(word(from)) {
        return Err(changed(Some(word(from)), now.as_deref()));
    }
    dir.write("sriov_drivers_autoprobe", word(to)).map_err(|e| Cause::kernel(&e))?;
    read_back(Some(word(to)), dir.attr("sriov_drivers_autoprobe")?.as_deref())
}

/// A driver may make fewer than it was asked for and report success (`sriov_numvfs_store`,
/// `drivers/pci/pci-sysfs.c`); then none are left.
fn set_virtual_functions(
    host: &HostRoot,
    device: PciAddress,
    by: Maker,
    from: u16,
    to: u16,
) -> Done {
    let dir = host.function(device);
    let (from, wanted) = (from.to_string(), to.to_string());
    let now = dir.attr("sriov_numvfs")?;
    if now.as_deref() == Some(wanted.as_str()) {
        return Ok(Outcome::AlreadySo);
    }
    if now.as_deref() != Some(from.as_str()) {
        return Err(changed(Some(&from), now.as_deref()));
    }
    let make = |number: &str| match by {
        Maker::Kernel => dir.write("sriov_numvfs", number).map_err(|e| Cause::kernel(&e)),
        Maker::SriovManage => sriov_manage(host, device, number != "0"),
    };
    make(&wanted)?;
    let found = dir.attr("sriov_numvfs")?;
    if found.as_deref() != Some(wanted.as_str()) && from == "0" {
        make(&from)?;
    }
    read_back(Some(&wanted), found.as_deref())
}

/// NVIDIA's program makes all virtual functions there can be, or removes them.
fn sriov_manage(host: &HostRoot, device: PciAddress, make: bool) -> Result<(), Cause> {
    let option = if make { "-e" } else { "-d" };
    if host.is_real() {
        let device = device.to_string();
        return run(Command::new(host.path(SRIOV_MANAGE)).args([option, &device]));
    }
    host.write(SIMULATED_SRIOV_MANAGE, &format!("{option} {device}")).map_err(|e| Cause::kernel(&e))
}

fn set_shape(
    host: &HostRoot,
    device: PciAddress,
    setting: Setting,
    from: &Value,
    to: &Value,
) -> Done {
    let failed = |error: std::io::Error| Cause::kernel(&error);
    let gone = || changed(Some(&format!("a setting: {}", setting.label())), None);
    let (handle, now) = Handle::find(host, device, setting).map_err(failed)?.ok_or_else(gone)?;
    if handle.is(to, &now) {
        return Ok(Outcome::AlreadySo);
    }
    if !handle.is(from, &now) {
        return Err(changed(Some(&from.to_string()), Some(&now.to_string())));
    }
    handle.write(to).map_err(failed)?;
    let found = handle.read().map_err(failed)?.ok_or_else(gone)?;
    if handle.is(to, &found) {
        return Ok(Outcome::Done);
    }
    Err(Cause::ReadBack { wanted: to.to_string(), found: found.to_string() })
}

/// Where there are no nodes any more, nobody may open them.
fn node_access(host: &HostRoot, device: Assigned, user: u32, allowed: bool) -> Done {
    let nodes = match device {
        Assigned::Function(address) => {
            let function = Function::read(host, address);
            let function = function.ok_or_else(|| changed(Some("a device"), None))?;
            vfio::nodes_of(host, &Openable::from(&function))
        }
        Assigned::Mediated(uuid) => mediated::Device::read(host, uuid)
            .map(|part| vfio::nodes_of(host, &Openable::of_part(uuid, &part)))
            .unwrap_or_default(),
    };
    if nodes.is_empty() && allowed {
        return Err(changed(Some("a node of it in /dev/vfio"), None));
    }
    let mut outcome = Outcome::AlreadySo;
    for node in nodes {
        let acl = acl::read(&node).map_err(|e| Cause::kernel(&e))?;
        if acl.allows(user) == allowed {
            continue;
        }
        acl::write(&node, &acl.with(user, allowed)).map_err(|e| Cause::kernel(&e))?;
        let found = acl::read(&node).map_err(|e| Cause::kernel(&e))?.allows(user);
        let say = |so| Some(if so { "an entry for the user" } else { "no entry for the user" });
        outcome = read_back(say(allowed), say(found))?;
    }
    Ok(outcome)
}

fn lock_memory(process: u32, bytes: u64) -> Done {
    let now = || memlock::of(process).map_err(|e| Cause::kernel(&e));
    let allows = || now().map(|(soft, _)| soft.allows(bytes));
    if allows()? {
        return Ok(Outcome::AlreadySo);
    }
    let (_, hard) = now()?;
    memlock::raise(process, bytes, hard).map_err(|e| Cause::kernel(&e))?;
    let say = |so| Some(if so { "as much" } else { "less" });
    read_back(say(true), say(allows()?))
}

/// Without a group it could not be given to a guest: its driver did not take it (`mdev_device_create`,
/// `drivers/vfio/mdev/mdev_core.c`).
fn create_mediated(host: &HostRoot, of: &TypeName, uuid: Uuid) -> Done {
    let now = || mediated::Device::read(host, uuid);
    match now() {
        Some(found) if found.of == *of => return Ok(Outcome::AlreadySo),
        Some(found) => return Err(changed(None, Some(&found.of.to_string()))),
        None => {}
    }
    let kind = host.sys(mediated::PARENTS).sub(&of.parent).sub(mediated::TYPES).sub(&of.kind);
    kind.write("create", &uuid.to_string()).map_err(|e| Cause::kernel(&e))?;
    match now() {
        Some(found) if found.of == *of && found.iommu_group.is_some() => Ok(Outcome::Done),
        Some(found) if found.of == *of => read_back(Some("an IOMMU group"), None),
        found => {
            read_back(Some(&of.to_string()), found.map(|found| found.of.to_string()).as_deref())
        }
    }
}

fn remove_mediated(host: &HostRoot, of: &TypeName, uuid: Uuid) -> Done {
    let now = || mediated::Device::read(host, uuid).map(|found| found.of);
    match now() {
        None => return Ok(Outcome::AlreadySo),
        Some(found) if found != *of => {
            return Err(changed(Some(&of.to_string()), Some(&found.to_string())));
        }
        Some(_) => {}
    }
    let dir = host.sys(mediated::DEVICES).sub(&uuid.to_string());
    dir.write("remove", "1").map_err(|e| Cause::kernel(&e))?;
    read_back(None, now().map(|found| found.to_string()).as_deref())
}

fn tune(host: &HostRoot, device: PciAddress, setting: Tunable, from: &str, to: &str) -> Done {
    let (dir, name) = (host.function(device), setting.attribute());
    let now = dir.attr(name)?;
    if now.as_deref() == Some(to) {
        return Ok(Outcome::AlreadySo);
    }
    if now.as_deref() != Some(from) {
        return Err(changed(Some(from), now.as_deref()));
    }
    dir.write(name, to).map_err(|e| Cause::kernel(&e))?;
    read_back(Some(to), dir.attr(name)?.as_deref())
}

fn check_viable(host: &HostRoot, group: u32) -> Done {
    match vfio::group_viable(host, group) {
        Ok(true) => Ok(Outcome::Done),
        Ok(false) => read_back(Some("a viable group"), Some("a member on a host driver")),
        Err(Error::Io { source, .. }) => Err(Cause::kernel(&source)),
        Err(other) => Err(other.into()),
    }
}
