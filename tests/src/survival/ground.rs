//! A simulated host with another tenant's lease on it, brokers that come and go, and what must be
//! so between them, as the simulated kernel has it. Starts processes; touches its own host and records.

use std::collections::BTreeMap;
use std::io::{self, Seek};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use libvfio::address::PciAddress;
use libvfio::pci::{Binding, Function, Sriov};
use tempfile::TempDir;
use vfiod::lease::{Lease, State};
use vfiod::ledger::Ledger;

use super::{BYSTANDER, GPU, NUMBERED, SHAPED};
use crate::sim::{Described, Sim, WORKSTATION};
use crate::trial::say_policy;

/// A card with virtual functions.
const CARD: &str = include_str!("card.toml");

/// What [`Ground::small`] has, beside virtual functions.
const SMALL: [&str; 7] =
    ["0000:00:00.0", "0000:00:01.0", "0000:00:1d.0", "0000:07:00.0", GPU[0], GPU[1], BYSTANDER];

/// A host, its records, and how it was booted.
#[derive(Debug)]
pub struct Ground {
    /// The host.
    pub sim: Sim,
    program: PathBuf,
    records: TempDir,
    before: BTreeMap<PciAddress, Binding>,
    /// How [`SHAPED`] was given things.
    shape: Option<String>,
    /// The other tenant's lease, which nothing may touch.
    bystander: Option<Lease>,
}

/// What became of a broker.
#[derive(Debug)]
pub struct Done {
    /// Whether it was killed.
    pub killed: bool,
    /// Whether it did what it was to do.
    pub well: bool,
    /// What it said.
    pub said: String,
}

impl Done {
    /// The places at which it could have been killed, in their order.
    pub fn places(&self) -> Vec<String> {
        let place =
            |line: &str| Some(line.strip_prefix("crash point ")?.split_once(": ")?.1.into());
        self.said.lines().filter_map(place).collect()
    }
}

impl Ground {
    /// A host where another tenant has a lease, so `vfio-pci` is loaded. `program` is `trial`.
    pub fn new(program: &str) -> Result<Self> {
        Self::with_bystander(Self::unloaded(program)?)
    }

    /// The same where devices stay, and no write is to sleep ([`Sim::mount_lasting`]).
    pub fn lasting(program: &str) -> Result<Self> {
        Self::with_bystander(Self::booted(program, Sim::mount_lasting(&Self::described()?)?)?)
    }

    /// The same with no more functions than it takes for [`GPU`](super::GPU), [`VF`](super::VF) and
    /// [`OTHER_VF`](super::OTHER_VF), and where no write is to sleep: brokers have less to read there.
    pub fn small(program: &str) -> Result<Self> {
        let mut host = Self::described()?;
        host.functions.retain(|function| SMALL.contains(&function.address.to_string().as_str()));
        Self::with_bystander(Self::booted(program, Sim::mount_lasting(&host)?)?)
    }

    /// The same as [`new`](Self::new) where a policy is in force and its passthrough devices are on VFIO.
    /// In the policy, `{root}` stands for the host's root and `{records}` for the records.
    pub fn with_policy(program: &str, policy: &str) -> Result<Self> {
        let ground = Self::unloaded(program)?;
        let policy = policy.replace("{root}", &ground.sim.root().display().to_string());
        let policy = policy.replace("{records}", &ground.records().display().to_string());
        say_policy(ground.records(), &policy)?;
        let applied = ground.run(&["apply"], 0)?;
        ensure!(applied.well, "the policy cannot be applied: {}", applied.said);
        Self::with_bystander(ground)
    }

    fn with_bystander(mut ground: Self) -> Result<Self> {
        ensure!(ground.run(&["attach", BYSTANDER, "bob"], 0)?.well, "the bystander has no lease");
        ground.bystander = ground.leases()?.pop();
        // What its attachment has changed stays so.
        ground.before = ground.sim.bindings();
        Ok(ground)
    }

    /// A host without any lease, where `vfio-pci` is yet to be loaded.
    pub fn unloaded(program: &str) -> Result<Self> {
        Self::booted(program, Sim::mount(&Self::described()?)?)
    }

    fn described() -> Result<Described> {
        let loaded = "name = \"vfio-pci\"\n";
        ensure!(WORKSTATION.contains(loaded), "the workstation has no vfio-pci");
        let host = WORKSTATION.replace(loaded, &format!("{loaded}loaded = false\n"));
        Described::parse(&format!("{host}\n{CARD}"))
    }

    fn booted(program: &str, sim: Sim) -> Result<Self> {
        let autoprobe = sim.function("0000:07:00.0".parse()?).join("sriov_drivers_autoprobe");
        std::fs::write(autoprobe, "0")?;
        // As the real ones are, in memory.
        let memory = Path::new("/dev/shm");
        let records = if memory.is_dir() { TempDir::new_in(memory)? } else { TempDir::new()? };
        let (program, before) = (program.into(), BTreeMap::new());
        let shape = sim.given(SHAPED.parse()?);
        let mut ground = Self { sim, program, records, before, shape, bystander: None };
        ground.before = ground.sim.bindings();
        Ok(ground)
    }

    /// The records' directory.
    pub fn records(&self) -> &Path {
        self.records.path()
    }

    /// Runs a broker that does one thing, and is killed at the `crash`th place if it gets there.
    pub fn run(&self, what: &[&str], crash: u32) -> Result<Done> {
        // Not a pipe: a worker that outlives its broker keeps that open.
        let mut said = tempfile::tempfile()?;
        let mut broker = self.broker();
        broker.args(what).env("VFIOD_CRASH_AT", crash.to_string()).stderr(said.try_clone()?);
        let status = broker.status()?;
        said.rewind()?;
        let said = io::read_to_string(said)?;
        Ok(Done { killed: status.code().is_none(), well: status.success(), said })
    }

    /// The command that starts a broker, without what it is to do.
    pub fn broker(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(self.sim.root()).arg(self.records.path());
        command
    }

    /// How many virtual functions [`NUMBERED`] has, and whether host drivers are offered new ones.
    pub fn number(&self) -> Result<(u16, bool)> {
        let function =
            Function::read(&self.sim.host(), NUMBERED.parse()?).context("it has gone")?;
        let Sriov::Physical { enabled, autoprobe, .. } = function.sriov else {
            bail!("{NUMBERED} has no SR-IOV")
        };
        Ok((enabled, autoprobe))
    }

    /// The ledger.
    pub fn ledger(&self) -> Result<Ledger> {
        Ok(Ledger::open(self.records.path().join("leases"))?)
    }

    fn leases(&self) -> Result<Vec<Lease>> {
        Ok(self.ledger()?.load()?.leases)
    }

    /// The leases on record, but for the bystander's, which must be as it was.
    pub fn others(&self) -> Result<Vec<Lease>> {
        let mut leases = self.leases()?;
        if let Some(bystander) = &self.bystander {
            let place = leases.iter().position(|lease| lease.id == bystander.id);
            let found = leases.remove(place.context("the bystander's lease is lost")?);
            ensure!(found == *bystander, "the bystander's lease changed: {found:?}");
        }
        Ok(leases)
    }

    /// What must be so when no broker is at anything: every device is as before or fully leased and
    /// on record; no lease is double, none on its way; all else is untouched. Functions `gone` may
    /// have gone. The leases, but for the bystander's.
    pub fn check(&self, gone: &[PciAddress]) -> Result<Vec<Lease>> {
        let (leases, now) = (self.others()?, self.sim.bindings());
        let mut holders: BTreeMap<PciAddress, &Lease> = BTreeMap::new();
        let mut made = self.sim.mediated();
        for lease in &leases {
            match lease.state {
                State::Active => {}
                State::Failed => continue,
                _ => bail!("lease {} is {}", lease.id, lease.state.name()),
            }
            for device in lease.devices.keys() {
                ensure!(holders.insert(*device, lease).is_none(), "{device} is leased twice");
            }
            for uuid in lease.mediated.keys() {
                ensure!(made.remove(uuid), "mediated device {uuid} was never made");
            }
        }
        ensure!(made.is_empty(), "mediated devices are left: {made:?}");
        for (device, before) in &self.before {
            match (now.get(device), holders.get(device)) {
                (None, _) => ensure!(gone.contains(device), "{device} has gone"),
                (Some(now), None) => {
                    ensure!(now == before, "{device} was {before:?} and is {now:?}");
                }
                (Some(now), Some(lease)) => {
                    let full = lease.forward.iter().all(|step| step.outcome.is_some());
                    let vfio = Some("vfio-pci");
                    let ready = (now.driver.as_deref(), now.driver_override.as_deref());
                    ensure!(full && ready == (vfio, vfio), "{device} is leased and {now:?}");
                    ensure!(lease.devices[device].before == *before, "its way home is lost");
                }
            }
        }
        let shaped = SHAPED.parse()?;
        if !holders.contains_key(&shaped) && now.contains_key(&shaped) {
            let shape = self.sim.given(shaped);
            ensure!(shape == self.shape, "{SHAPED} is {shape:?}, was {:?}", self.shape);
        }
        Ok(leases)
    }

    /// Ends all leases but the bystander's. Then everything must be as it was.
    pub fn restore(&self, gone: &[PciAddress]) -> Result<()> {
        for lease in self.check(gone)? {
            let done = self.run(&["release", &lease.id], 0)?;
            ensure!(done.well, "cannot release: {}", done.said);
        }
        let left = self.check(gone)?;
        ensure!(left.is_empty(), "{} leases are left", left.len());
        if !gone.contains(&NUMBERED.parse()?) {
            let done = self.run(&["number", NUMBERED, "0"], 0)?;
            ensure!(done.well, "cannot remove what there is: {}", done.said);
            ensure!(self.number()? == (0, true), "it is {:?}", self.number()?);
        }
        let more = self.sim.bindings().into_keys().find(|device| !self.before.contains_key(device));
        ensure!(more.is_none(), "{more:?} is left");
        Ok(())
    }

    /// Whether another case may have it. A loaded module stays, and what has gone stays away.
    pub fn is_as_booted(&self) -> bool {
        let same = self.sim.bindings() == self.before;
        self.sim.disarm();
        self.bystander.is_some() && same
    }
}
