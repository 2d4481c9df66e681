//! `run` and `args`: a virtual machine monitor with leased devices. `run` becomes the monitor, so
//! that the lease, which is bound to this process, ends with it however it does.

use std::convert::Infallible;
use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use libvfio::client::{LeaseProxy, LeaseRecord, Options, PlanRecord, lease_path};
use libvfio::error::ErrorKind;
use libvfio::memlock;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::unistd::geteuid;
use serde_json::json;
use zbus::proxy::CacheProperties;

use crate::args::{ArgsArgs, RunArgs};
use crate::attach::{made, patiently};
use crate::bus::Bus;
use crate::explain::Story;
use crate::output::{Output, print, print_json};
use crate::release::meant;
use crate::trouble::Trouble;
use crate::vmm::{Device, Handed, PLACE, Vmm, size};

/// A command to become, and what it is to inherit.
#[derive(Debug)]
pub(crate) struct Launch {
    command: Vec<OsString>,
    inherited: Vec<OwnedFd>,
}

/// Prints what a monitor is to be told of a lease.
pub(crate) async fn args(bus: &Bus, args: &ArgsArgs, out: &Output) -> Result<(), Trouble> {
    let vmm = known(Vmm::from_name(&args.vmm))?;
    let words = vmm.arguments(&by_name(&one_lease(bus, &args.lease).await?));
    if out.json { print_json(&json!(words)) } else { print(&format!("{}\n", words.join(" "))) }
}

/// The one active lease that a name means.
pub(crate) async fn one_lease(bus: &Bus, name: &str) -> Result<LeaseRecord, Trouble> {
    let leases = bus.manager.list_leases().await?;
    match meant(bus, name, &leases).await?.as_slice() {
        [lease] if lease.state == "active" => Ok((*lease).clone()),
        [lease] => {
            let why = format!("lease {} is {}; only active ones are used", lease.id, lease.state);
            Err(Trouble::new(ErrorKind::Busy, why))
        }
        [] => {
            let why = format!("no lease is, has or is for {name}; see 'vfioctl leases'");
            Err(Trouble::new(ErrorKind::NotFound, why))
        }
        several => {
            let ids: Vec<&str> = several.iter().map(|lease| lease.id.as_str()).collect();
            let why = format!("{name} has several leases; name one: {}", ids.join(", "));
            Err(Trouble::new(ErrorKind::InvalidArgument, why))
        }
    }
}

fn by_name(lease: &LeaseRecord) -> Handed {
    let iommufd = lease.interface.as_deref() == Some("iommufd");
    Handed::Named { devices: named(&lease.devices, &lease.mediated), iommufd }
}

fn named(functions: &[String], mediated: &[String]) -> Vec<Device> {
    let functions = functions.iter().cloned().map(Device::Function);
    functions.chain(mediated.iter().cloned().map(Device::Mediated)).collect()
}

fn known(vmm: Option<Vmm>) -> Result<Vmm, Trouble> {
    vmm.ok_or_else(|| {
        let why = format!("say which monitor that is: --vmm {}", Vmm::NAMES.join("|"));
        Trouble::new(ErrorKind::InvalidArgument, why)
    })
}

/// What a dry run of `run` would do; else leases devices and answers what to become.
pub(crate) async fn run(
    address: Option<&str>,
    args: &RunArgs,
    out: &Output,
) -> Result<Result<Launch, ExitCode>, Trouble> {
    let invalid = |why: String| Trouble::new(ErrorKind::InvalidArgument, why);
    let program = args.command.first().ok_or_else(|| invalid("no command was given".into()))?;
    let vmm = match &args.vmm {
        Some(name) => Vmm::from_name(name),
        None => Vmm::of_program(program),
    };
    let vmm = known(vmm)?;
    if !args.command.iter().any(|word| word == PLACE) {
        return Err(invalid(format!(
            "say where the devices go: put {PLACE} among the command's arguments"
        )));
    }
    let locked = match &args.lock {
        Some(bytes) => size(bytes, 1)
            .ok_or_else(|| invalid(format!("--lock '{bytes}' is no size; give one such as 9G")))?,
        None => vmm.locked(&args.command).ok_or_else(|| {
            invalid("how much memory the guest has is unclear; give --lock, such as 9G".into())
        })?,
    };
    let devices: Vec<&str> = args.devices.iter().map(String::as_str).collect();
    let bus = &Bus::shortest(address).await?;
    let Some(tenant) = args.tenant.as_deref().filter(|_| !args.dry_run) else {
        return dry_run(bus, args, vmm, &devices, out).await.map(Err);
    };
    let (id, _) = patiently(bus, bus.manager.attach(&devices, tenant, options(args))).await?;
    let lease: LeaseRecord = made(bus, &id).await?.read()?;
    let (handed, inherited) =
        if vmm.takes_descriptors() && lease.interface.as_deref() == Some("iommufd") {
            opened(bus, &lease).await?
        } else {
            (by_name(&lease), Vec::new())
        };
    // Root's own memory is not limited (`vfio_lock_acct`, CAP_IPC_LOCK).
    if !geteuid().is_root() && !memlock::raise_own(locked)? {
        proxy(bus, &id).await?.lock_memory(locked).await?;
    }
    Ok(Ok(Launch { command: placed(&args.command, &vmm.arguments(&handed)), inherited }))
}

/// Descriptors of a lease's devices and of what translates for them.
async fn opened(bus: &Bus, lease: &LeaseRecord) -> Result<(Handed, Vec<OwnedFd>), Trouble> {
    let proxy = proxy(bus, &lease.id).await?;
    let (opened, iommu) = tokio::try_join!(proxy.open_devices(), proxy.open_iommu())?;
    let iommu = OwnedFd::from(iommu);
    let (mut devices, mut inherited) = (Vec::new(), Vec::new());
    for (name, descriptor) in opened {
        let descriptor = OwnedFd::from(descriptor);
        let is_part = lease.mediated.contains(&name);
        let device = if is_part { Device::Mediated(name) } else { Device::Function(name) };
        devices.push((device, descriptor.as_raw_fd()));
        inherited.push(descriptor);
    }
    let handed = Handed::Descriptors { devices, iommu: iommu.as_raw_fd() };
    inherited.push(iommu);
    Ok((handed, inherited))
}

/// The lease's own object.
async fn proxy(bus: &Bus, id: &str) -> Result<LeaseProxy<'static>, Trouble> {
    let proxy = LeaseProxy::builder(bus.connection()).path(lease_path(id));
    Ok(proxy.cache_properties(CacheProperties::No).build().await?)
}

async fn dry_run(
    bus: &Bus,
    args: &RunArgs,
    vmm: Vmm,
    devices: &[&str],
    out: &Output,
) -> Result<ExitCode, Trouble> {
    let reply = bus.ask("Plan", &(devices, options(args))).await?;
    let plan: PlanRecord = reply.read()?;
    if out.json {
        print_json(&reply.json()?)?;
    } else {
        let asked = devices.join(", ");
        print(&Story { asked: &asked, can: "be attached", plan: &plan }.to_string())?;
        // By what they are opened is known once they are on VFIO.
        let devices = named(&plan.devices, &plan.mediated);
        let handed = Handed::Named { devices, iommufd: false };
        let words = placed(&args.command, &vmm.arguments(&handed));
        let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        if plan.possible {
            print(&format!("then, with iommufd by descriptors: {}\n", words.join(" ")))?;
        }
    }
    let kind = plan.reasons.first().and_then(|reason| ErrorKind::from_name(&reason.kind));
    Ok(kind.map_or(ExitCode::SUCCESS, |kind| kind.exit_status().into()))
}

/// Bound to this process, which the monitor will be.
fn options(args: &RunArgs) -> Options<'_> {
    let mut options =
        Options::from([("pid", std::process::id().into()), ("node_access", true.into())]);
    options.extend(args.vm.as_deref().map(|vm| ("vm", vm.into())));
    options.extend(args.whole_group.then(|| ("whole_group", true.into())));
    options
}

/// The command with these words in place of what stands for them.
fn placed(command: &[OsString], words: &[String]) -> Vec<OsString> {
    let word = |word: &OsString| {
        if word == PLACE { words.iter().map(OsString::from).collect() } else { vec![word.clone()] }
    };
    command.iter().flat_map(word).collect()
}

impl Launch {
    /// Becomes the command. Whatever else this process has open it does not inherit.
    pub(crate) fn become_it(self) -> Result<Infallible, Trouble> {
        for descriptor in &self.inherited {
            fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty())).map_err(std::io::Error::from)?;
        }
        let Some((program, arguments)) = self.command.split_first() else {
            return Err(Trouble::new(ErrorKind::InvalidArgument, "no command was given"));
        };
        let error = Command::new(program).args(arguments).exec();
        let why = format!("cannot start {}: {error}; the lease ends", program.to_string_lossy());
        Err(Trouble::new(ErrorKind::NotFound, why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_devices_go_where_the_command_says() {
        let command = ["qemu-system-x86_64", "-m", "1G", PLACE, "-nographic"].map(OsString::from);
        let words = ["-device", "vfio-pci,host=0000:03:00.0"].map(str::to_owned);
        assert_eq!(
            placed(&command, &words),
            [
                "qemu-system-x86_64",
                "-m",
                "1G",
                "-device",
                "vfio-pci,host=0000:03:00.0",
                "-nographic"
            ]
        );
    }
}
