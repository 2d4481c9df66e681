//! What cases do, each time with what came of it: calls to the daemon, and files of the kernel
//! read and written bare. Shares only the interface's Rust form with the product.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use libvfio::client::{DeviceRecord, Failure, LeaseRecord, ManagerProxy, Options};
use tokio::runtime::{Builder, Runtime};

use super::Host;
use crate::machine::{FUNCTIONS, Function};

/// What the kernel and the daemon need at most to notice something, under emulation.
const LIMIT: Duration = Duration::from_secs(60);
const DEVICES: &str = "sys/bus/pci/devices";
const TENANT: &str = "conformance";

/// The daemon, as a caller on a bus sees it.
#[derive(Debug)]
pub struct Daemon {
    runtime: Runtime,
    manager: ManagerProxy<'static>,
}

impl Daemon {
    /// The daemon on the bus at this address, or on the system bus.
    pub fn on(bus: Option<&str>) -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let manager = runtime.block_on(async {
            let builder = match bus {
                Some(address) => zbus::connection::Builder::address(address),
                None => zbus::connection::Builder::system(),
            };
            anyhow::Ok(ManagerProxy::new(&builder.build().await?).await?)
        })?;
        Ok(Self { runtime, manager })
    }

    fn call<T>(&self, call: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        self.runtime.block_on(call)
    }
}

/// One case under way.
pub(super) struct Stage<'a> {
    host: &'a mut dyn Host,
    daemon: &'a Daemon,
    lines: Vec<String>,
    /// The driver that each function had in the beginning.
    home: BTreeMap<String, String>,
    /// Words for what is named otherwise on each host.
    names: Vec<(String, String)>,
}

impl<'a> Stage<'a> {
    pub(super) fn new(host: &'a mut dyn Host, daemon: &'a Daemon) -> Result<Self> {
        let (lines, names) = (Vec::new(), Vec::new());
        let mut stage = Self { host, daemon, lines, home: BTreeMap::new(), names };
        for function in FUNCTIONS {
            stage.wait("functions of the machine are there", |stage| {
                Ok(stage.file(function.address, "vendor").exists())
            })?;
            if let Some(driver) = stage.driver(function.address) {
                stage.home.insert(function.address.to_owned(), driver);
            }
        }
        Ok(stage)
    }

    /// What came of it all.
    pub(super) fn end(self) -> Vec<String> {
        self.lines
    }

    fn say(&mut self, what: &str, came: &str) {
        let line = format!("{what}: {came}");
        let named = |line: String, (from, to): &(String, String)| line.replace(from.as_str(), to);
        self.lines.push(self.names.iter().fold(line, named));
    }

    /// From now on something is called otherwise.
    pub(super) fn call_it(&mut self, name: &str, now: &str) {
        self.names.push((name.to_owned(), now.to_owned()));
    }

    fn file(&self, address: &str, name: &str) -> PathBuf {
        self.host.root().join(DEVICES).join(address).join(name)
    }

    fn link(&self, address: &str, name: &str) -> Option<String> {
        let target = std::fs::read_link(self.file(address, name)).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }

    fn driver(&self, address: &str) -> Option<String> {
        self.link(address, "driver")
    }

    fn wait(&mut self, what: &str, mut so: impl FnMut(&mut Self) -> Result<bool>) -> Result<()> {
        let started = Instant::now();
        while !so(self)? {
            if started.elapsed() > LIMIT {
                bail!("waited in vain: {what}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Driver and override of functions, as the kernel has them.
    pub(super) fn look(&mut self, addresses: &[&str]) -> Result<()> {
        for address in addresses {
            let driver = match self.driver(address) {
                None => "no driver".to_owned(),
                Some(driver) if self.home.get(*address) == Some(&driver) => "its driver".to_owned(),
                Some(driver) => driver,
            };
            let set = std::fs::read_to_string(self.file(address, "driver_override"))?;
            let set = match set.trim() {
                "(null)" => "no override".to_owned(),
                name => format!("override {name}"),
            };
            self.say(address, &format!("{driver}, {set}"));
        }
        Ok(())
    }

    /// Writes a file of a function, for what comes of it.
    pub(super) fn write(&mut self, address: &str, name: &str, value: &str) {
        let path = self.file(address, name);
        self.write_at(&format!("{address}/{name} = {}", value.escape_debug()), path, value);
    }

    /// The same of a file of the bus.
    pub(super) fn write_bus(&mut self, name: &str, value: &str) {
        let path = self.host.root().join("sys/bus/pci").join(name);
        self.write_at(&format!("{name} = {}", value.escape_debug()), path, value);
    }

    fn write_at(&mut self, what: &str, path: PathBuf, value: &str) {
        let short: String = what.chars().take(60).collect();
        let came = match std::fs::write(path, value) {
            Ok(()) => "done".to_owned(),
            Err(error) => errno(&error),
        };
        self.say(&short, &came);
    }

    /// Sets up a function's files where nothing may go wrong.
    pub(super) fn set(&mut self, address: &str, name: &str, value: &str) -> Result<()> {
        let path = self.file(address, name);
        std::fs::write(&path, value).with_context(|| format!("{value:?} to {}", path.display()))
    }

    /// Sets the override, none to clear it, and has the kernel choose the driver again.
    pub(super) fn rebind(&mut self, address: &str, driver: Option<&str>) -> Result<()> {
        self.set(address, "driver_override", driver.unwrap_or("\n"))?;
        if self.driver(address).is_some() {
            self.set(address, "driver/unbind", address)?;
        }
        std::fs::write(self.host.root().join("sys/bus/pci/drivers_probe"), address)?;
        let now = self.driver(address);
        if driver.is_some() && now.as_deref() != driver {
            bail!("{address} is on {now:?}, not on {driver:?}");
        }
        Ok(())
    }

    /// A VF once the daemon knows it, called by its index from then on.
    pub(super) fn virtual_function(&mut self, physical: &str, index: usize) -> Result<String> {
        let link = format!("virtfn{index}");
        let address = self.link(physical, &link).context("no such virtual function")?;
        self.call_it(&address, &format!("vf{index}"));
        self.known(&address)?;
        Ok(address)
    }

    /// Waits until the daemon lists what the kernel has of a function.
    pub(super) fn known(&mut self, address: &str) -> Result<()> {
        self.wait("the daemon notices a function", |stage| {
            let known = stage.device(address);
            Ok(known.is_some_and(|known| known.driver == stage.driver(address)))
        })
    }

    fn device(&self, address: &str) -> Option<DeviceRecord> {
        self.daemon.call(self.daemon.manager.describe_device(address)).ok()
    }

    pub(super) fn load(&mut self, module: &str) -> Result<()> {
        self.host.load(module)
    }

    /// Takes a function out, and waits until the daemon has noticed.
    pub(super) fn unplug(&mut self, function: &Function) -> Result<()> {
        self.host.unplug(function)?;
        self.wait("the daemon notices that it went", |stage| {
            Ok(stage.device(function.address).is_none())
        })
    }

    /// Puts it in again, and waits until it has its driver and the daemon has noticed.
    pub(super) fn plug(&mut self, function: &Function) -> Result<()> {
        self.host.plug(function)?;
        self.wait("it has a driver", |stage| Ok(stage.driver(function.address).is_some()))?;
        self.known(function.address)
    }

    /// Leases a device to the tenant of the cases; with flags as options.
    pub(super) fn attach(&mut self, device: &str, flags: &[&str]) -> Result<()> {
        self.attach_to(device, TENANT, flags)
    }

    pub(super) fn attach_to(&mut self, device: &str, tenant: &str, flags: &[&str]) -> Result<()> {
        let options: Options<'_> = flags.iter().map(|flag| (*flag, true.into())).collect();
        let manager = &self.daemon.manager;
        let attached = self.daemon.call(manager.attach(&[device], tenant, options));
        let what = [&["attach", device], flags].concat().join(" ");
        let came = match attached {
            Ok((id, _)) => {
                let lease = self.lease(&id)?.context("the lease is not listed")?;
                self.call_it(&id, "the lease");
                format!("{} with {}", lease.state, lease.devices.join(" "))
            }
            Err(failure) => refused(&failure)?,
        };
        self.say(&what, &came);
        Ok(())
    }

    fn lease(&self, id: &str) -> Result<Option<LeaseRecord>> {
        let leases = self.daemon.call(self.daemon.manager.list_leases())?;
        Ok(leases.into_iter().find(|lease| lease.id == id))
    }

    pub(super) fn release(&mut self, target: &str) -> Result<()> {
        let released = self.daemon.call(self.daemon.manager.release(target, Options::new()));
        let came = match released {
            Ok(ended) => format!("{} ended", ended.len()),
            Err(failure) => refused(&failure)?,
        };
        self.say(&format!("release {target}"), &came);
        Ok(())
    }

    /// Waits until the lease of a device has failed; the reason is to have these words in it.
    pub(super) fn failed(&mut self, device: &str, words: &str) -> Result<()> {
        let mut why = None;
        self.wait("the lease fails", |stage| {
            let leases = stage.daemon.call(stage.daemon.manager.list_leases())?;
            let failed = leases.into_iter().find(|lease| {
                lease.state == "failed" && lease.devices.iter().any(|held| held == device)
            });
            why = failed.map(|lease| lease.reason.unwrap_or_default());
            Ok(why.is_some())
        })?;
        let why = why.unwrap_or_default();
        self.say("the lease failed", if why.contains(words) { words } else { &why });
        Ok(())
    }

    /// Whether a device could be attached, and the codes of all reasons why not.
    pub(super) fn explain(&mut self, device: &str) -> Result<()> {
        let plan = self.daemon.call(self.daemon.manager.explain(device))?;
        let steps = plan.steps.iter().map(|step| step.step.as_str());
        let reasons = plan.reasons.iter();
        let reasons = reasons.map(|r| format!("{} ({} {})", r.code, r.kind, r.object));
        let said: Vec<String> =
            if plan.possible { steps.map(str::to_owned).collect() } else { reasons.collect() };
        self.say(&format!("explain {device}"), &said.join(", "));
        Ok(())
    }

    /// Who is in the group of a function, and why.
    pub(super) fn group(&mut self, address: &str) -> Result<()> {
        let device = self.device(address).context("no such device")?;
        let groups = self.daemon.call(self.daemon.manager.list_groups())?;
        let group = groups.into_iter().find(|group| Some(group.number) == device.iommu_group);
        let group = group.context("it has no group")?;
        let viable = if group.viable { "viable" } else { "not viable" };
        self.say(&format!("group of {address}"), &format!("{}, {viable}", group.members.join(" ")));
        self.say("because", &group.sharing);
        Ok(())
    }

    /// The daemon's view of a device: its lease and why it is not trusted.
    pub(super) fn view(&mut self, address: &str) -> Result<()> {
        let device = self.device(address).context("no such device")?;
        let lease = if device.lease.is_some() { "leased" } else { "free" };
        let trust = device.quarantine.unwrap_or_else(|| "trusted".to_owned());
        self.say(address, &format!("{lease}, {trust}"));
        Ok(())
    }

    pub(super) fn quarantine(&mut self, device: &str, reason: &str) -> Result<()> {
        self.daemon.call(self.daemon.manager.quarantine(device, reason))?;
        Ok(())
    }

    pub(super) fn clear(&mut self, device: &str) -> Result<()> {
        let cleared = self.daemon.call(self.daemon.manager.clear_quarantine(device))?;
        self.say(&format!("clear {device}"), if cleared { "done" } else { "it was trusted" });
        Ok(())
    }
}

/// The name of the error, which is what callers tell apart.
fn refused(failure: &Failure) -> Result<String> {
    let kind = failure.kind().with_context(|| failure.to_string())?;
    Ok(format!("refused, {}", kind.name()))
}

fn errno(error: &io::Error) -> String {
    let number = error.raw_os_error().unwrap_or_default();
    // As `errno(3)` has them, those that the cases are about.
    let known = [
        (2, "ENOENT"),
        (5, "EIO"),
        (13, "EACCES"),
        (16, "EBUSY"),
        (19, "ENODEV"),
        (22, "EINVAL"),
        (34, "ERANGE"),
    ];
    let name = known.iter().find(|(known, _)| *known == number).map(|(_, name)| *name);
    name.map_or_else(|| error.to_string(), str::to_owned)
}
