//! Releases at whose end something is cleared, each scrubber on the driver it needs, and what must be
//! so of the device whatever went wrong. Looks from outside, as all of this.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use libvfio::inventory::Inventory;
use libvfio::step::Step;

use super::{GPU, Ground, Place, places};
use crate::sim::Written;

/// A release that clears memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scrubbed {
    /// Zeros through a region, all read back.
    Zeros,
    /// Zeros through a region, samples of it read back.
    Samples,
    /// A disk erased on its way home.
    Disk,
    /// A disk that is on VFIO by the policy, erased on its way through the host driver and back.
    DiskOnVfio,
    /// A program, on the host driver that is the device's home.
    Program,
}

/// A display whose memory is known to be reached through a region, and a disk.
const DISPLAY: &str = "0000:0a:00.0";
const DISK: &str = "0000:0b:00.0";
/// What the program of the policy does beforehand, if there is such a file in the records.
const BEHAVIOUR: &str = "behaviour";
/// What the simulated kernel had seen when the tenant got the device, in the records.
const BEGUN: &str = "begun";

impl Scrubbed {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Zeros, Self::Samples, Self::Disk, Self::DiskOnVfio, Self::Program];

    /// The device.
    pub fn device(self) -> &'static str {
        match self {
            Self::Zeros | Self::Samples => DISPLAY,
            Self::Disk | Self::DiskOnVfio => DISK,
            Self::Program => GPU[0],
        }
    }

    fn policy(self) -> String {
        let scrub = match self {
            Self::Zeros => "'bar-zero'",
            Self::Samples => "'bar-zero-sampled'",
            Self::Disk | Self::DiskOnVfio => "'nvme'",
            // It clears by the file that is the memory of all that is simulated.
            Self::Program => {
                "{ command = ['/bin/sh', '-c', 'test ! -e {records}/behaviour || . \
                 {records}/behaviour; printf %s \"$VFIOD_DEVICE\" > {root}/sim/memory'], \
                 driver = 'nvidia', timeout = 3 }"
            }
        };
        let mode = if self == Self::DiskOnVfio { "passthrough" } else { "on-lease" };
        let select = format!("select = [{{ address = '{}' }}]", self.device());
        format!("[pool.scrubbed]\nmode = '{mode}'\n{select}\nscrub = {scrub}\n")
    }

    /// A host with that policy in force.
    pub fn ground(self, program: &str) -> Result<Ground> {
        Ground::with_policy(program, &self.policy())
    }

    /// Gives the device to a tenant, who leaves something in it.
    pub fn begin(self, ground: &Ground) -> Result<()> {
        let done = ground.run(&["attach", self.device(), "alice"], 0)?;
        ensure!(done.well, "{}", done.said);
        fs::write(ground.records().join(BEGUN), ground.sim.journal().len().to_string())?;
        ensure!(self.is_soiled(ground)?, "nothing is left in it");
        Ok(())
    }

    /// The steps of its release, as the kernel has them.
    pub fn places(self, program: &str) -> Result<Vec<Place>> {
        let ground = self.ground(program)?;
        self.begin(&ground)?;
        let lease = ground.others()?.pop().context("no lease")?;
        let first = lease.devices.keys().next().copied();
        let inventory = Inventory::scan(&ground.sim.host())?;
        let back: Vec<Step> = lease.way_home(&inventory).into_iter().map(|r| r.step).collect();
        let scrubs = back.iter().filter(|step| matches!(step, Step::Scrub { .. })).count();
        ensure!(scrubs == 1, "it is not scrubbed once: {back:?}");
        Ok(places(&back, first))
    }

    /// Has the program do something before it clears.
    pub fn behave(ground: &Ground, script: &str) -> Result<()> {
        Ok(fs::write(behaviour(ground), script)?)
    }

    /// Whether something may be left in it.
    pub fn is_soiled(self, ground: &Ground) -> Result<bool> {
        if self == Self::DiskOnVfio {
            // The simulated kernel takes whatever is bound to VFIO for used, so it is asked what it did.
            let begun = fs::read_to_string(ground.records().join(BEGUN))?.parse()?;
            let cleared = |w: &Written| {
                (&*w.path, &*w.value) == ("sim/memory", DISK) && w.result == Some(Ok(()))
            };
            return Ok(!ground.sim.journal().iter().skip(begun).any(cleared));
        }
        let soiled = fs::read_to_string(ground.sim.root().join("sim/memory"))?;
        Ok(soiled.lines().any(|line| line == self.device()))
    }

    /// Whether the next tenant is refused the device. If not, nothing is left in it, and he has it.
    pub fn is_kept(self, ground: &Ground) -> Result<bool> {
        let soiled = self.is_soiled(ground)?;
        let next = ground.run(&["attach", self.device(), "bob"], 0)?;
        if next.well {
            ensure!(!soiled, "bob has what alice left");
        } else {
            ensure!(next.said.contains("quarantine"), "refused otherwise: {}", next.said);
        }
        Ok(!next.well)
    }

    /// The same, where it is to be well once it is healed. Everything is as it was afterwards.
    pub fn check(self, ground: &Ground) -> Result<bool> {
        let kept = self.is_kept(ground)?;
        if kept {
            // Nothing goes wrong any more.
            ground.sim.disarm();
            if behaviour(ground).exists() {
                fs::remove_file(behaviour(ground))?;
            }
            let healed = ground.run(&["heal", self.device()], 0)?;
            ensure!(healed.well, "it cannot be healed: {}", healed.said);
            ensure!(!self.is_kept(ground)?, "healed, and refused all the same");
        }
        ground.restore(&[])?;
        ensure!(!self.is_soiled(ground)?, "after all something is left in it");
        Ok(kept)
    }

    /// Whether most of it is like what others show.
    pub fn is_alike(self) -> bool {
        matches!(self, Self::Samples | Self::DiskOnVfio)
    }
}

fn behaviour(ground: &Ground) -> PathBuf {
    ground.records().join(BEHAVIOUR)
}
