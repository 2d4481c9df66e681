//! The policy in force: read, compared with the host, told of, and written as udev's rules for the
//! next boot. Changes no device; `applying` does.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::{fs, io};

use libvfio::address::PciAddress;
use libvfio::backend;
use libvfio::client::{Failure, PolicyRecord, UnitRecord};
use libvfio::error::ErrorKind;
use libvfio::pci::{Function, Identity};
use libvfio::plan::{self, Circumstances, Standing, Unit, Wish};
use libvfio::policy::{self, Assignment, Facts, Policy, Role, Selector};
use libvfio::step::Step;
use tracing::{error, info, warn};

use super::{Around, Broker, Data, circumstances, internal};
use crate::durable;
use crate::initramfs::Initramfs;

/// The policy, and what goes with it.
#[derive(Debug, Clone, Default)]
pub(super) struct InForce {
    pub(super) policy: Arc<Policy>,
    pub(super) facts: Arc<Facts>,
    /// Devices met by their place.
    pub(super) met: Arc<BTreeMap<PciAddress, Identity>>,
    /// What was wrong with the files when they were read last.
    pub(super) error: Option<String>,
    /// Units that were as wanted under this policy.
    pub(super) settled: BTreeSet<PciAddress>,
    /// Units that wait for the end of a lease, since somebody asked for them.
    pub(super) waiting: BTreeSet<PciAddress>,
    /// Units whose drift could not be corrected; they are left until somebody applies.
    pub(super) given_up: BTreeSet<PciAddress>,
}

impl InForce {
    /// No policy yet.
    pub(super) fn met(met: BTreeMap<PciAddress, Identity>) -> Self {
        Self { met: Arc::new(met), ..Self::default() }
    }
}

/// A policy and a host at one moment.
pub(super) struct Look {
    pub(super) data: LookedAt,
    pub(super) circumstances: Circumstances,
}

/// What a [`Wish`] refers to.
pub(super) struct LookedAt {
    pub(super) inventory: Arc<libvfio::inventory::Inventory>,
    pub(super) policy: Arc<Policy>,
    facts: Arc<Facts>,
    met: Arc<BTreeMap<PciAddress, Identity>>,
    pub(super) assignment: Assignment,
}

impl LookedAt {
    pub(super) fn wish(&self) -> Wish<'_> {
        Wish {
            policy: &self.policy,
            facts: &self.facts,
            assignment: &self.assignment,
            known: &self.met,
        }
    }
}

impl Data {
    pub(super) fn assignment(&self) -> Assignment {
        let InForce { policy, facts, .. } = &self.in_force;
        if policy.pools.is_empty() {
            return Assignment::default();
        }
        Assignment::new(policy, &self.inventory, facts)
    }

    pub(super) fn looked_at(&self) -> LookedAt {
        let InForce { policy, facts, met, .. } = &self.in_force;
        LookedAt {
            inventory: self.inventory.clone(),
            policy: policy.clone(),
            facts: facts.clone(),
            met: met.clone(),
            assignment: self.assignment(),
        }
    }
}

impl Broker {
    /// Reads the policy on start. One that is wrong is none, and is told of.
    pub(super) fn first_policy(&self) {
        match self.read_policy() {
            Ok(policy) => self.take(policy),
            Err(why) => {
                error!(why, "there is no policy in force: its files are wrong");
                self.data().in_force.error = Some(why);
            }
        }
    }

    /// Reads the policy anew. One that is wrong changes nothing but what is told of it.
    pub fn reload_policy(&self) -> Result<PolicyRecord, Failure> {
        let read = self.read_policy().and_then(|policy| {
            let data = self.data();
            let facts = &data.in_force.facts;
            let clashes = Assignment::new(&policy, &data.inventory, facts).clashes;
            if clashes.is_empty() {
                return Ok(policy);
            }
            Err(clashes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
        });
        match read {
            Ok(policy) => self.take(policy),
            Err(why) => {
                error!(why, "the policy's files are wrong; what was in force stays so");
                let text = format!("{why}\nthe policy that was in force stays so");
                self.data().in_force.error = Some(why);
                return Err(Failure::new(ErrorKind::InvalidArgument, text));
            }
        }
        self.plan_policy()
    }

    fn read_policy(&self) -> Result<Policy, String> {
        let Some(directory) = &self.policy_in else { return Ok(Policy::default()) };
        let sources = policy::sources(directory).map_err(|error| error.to_string())?;
        Policy::parse(&sources).map_err(|problems| problems.to_string())
    }

    fn take(&self, policy: Policy) {
        info!(pools = policy.pools.len(), files = ?policy.files, "the policy is in force");
        let facts = Facts::read(self.host()).unwrap_or_else(|error| {
            warn!(%error, "slots and module tables cannot be read; selectors by them match nothing");
            Facts::default()
        });
        let mut data = self.data();
        let met = data.in_force.met.clone();
        let (policy, facts) = (Arc::new(policy), Arc::new(facts));
        data.in_force = InForce { policy, facts, met, ..InForce::default() };
        drop(data);
        self.write_rules();
    }

    /// Has udev's rules say what the policy says. They count from the next boot on.
    pub(super) fn write_rules(&self) {
        let Some(path) = &self.rules_at else { return };
        let looked = self.data().looked_at();
        let aliases = &looked.inventory.vfio_aliases;
        let text = policy::rules(&looked.policy, &looked.facts, &looked.met, aliases);
        if let Err(error) = keep_file(path, text.as_deref()) {
            warn!(%error, path = %path.display(), "udev's rules are not those of the policy");
        }
    }

    /// A look at the host for the policy: at what it would change, and what the host does with that.
    /// Of one unit alone, if it is given.
    pub(super) fn look_for_policy(&self, only: Option<&plan::Lead>) -> Result<Look, Failure> {
        let parts = self.look_at_mediated(&plan::Request::default())?;
        let (looked, mut circumstances) = {
            let data = self.data();
            (data.looked_at(), circumstances(&data, Around { parts, ..Around::default() }))
        };
        let leads = match only {
            Some(lead) => vec![lead.clone()],
            None => plan::policy_leads(&looked.inventory, &looked.wish()),
        };
        for lead in &leads {
            let Some(pool) = looked.policy.pools.get(lead.pool) else { continue };
            if lead.kind == plan::Kind::Physical {
                circumstances.makers.insert(lead.device, backend::maker(self.host(), lead.device));
            }
            for device in &lead.members {
                if pool.d3cold.is_some() && lead.kind != plan::Kind::Physical {
                    let allowed = self.host().function(*device).attr("d3cold_allowed");
                    let allowed = allowed.ok().flatten().map(|text| text == "1");
                    circumstances.d3cold.extend(allowed.map(|allowed| (*device, allowed)));
                }
                let virtual_function = looked.inventory.get(*device).is_some_and(is_virtual);
                if !pool.shape.is_empty() && virtual_function {
                    let offers = self.offers(*device).ok();
                    circumstances.offers.extend(offers.map(|offers| (*device, offers)));
                }
            }
        }
        // Only what would change hands can be of use to somebody.
        let wish = looked.wish();
        let units: Vec<Unit> = match only {
            Some(lead) => {
                let unit = plan::policy_unit(&looked.inventory, &circumstances, &wish, lead);
                unit.into_iter().collect()
            }
            None => plan::policy(&looked.inventory, &circumstances, &wish),
        };
        let moves =
            |step: &Step| step.is_binding() || matches!(step, Step::SetVirtualFunctions { .. });
        let moving = units.iter().filter(|unit| unit.steps.iter().any(moves));
        let mut functions: BTreeSet<PciAddress> = BTreeSet::new();
        for device in moving.flat_map(|unit| unit.devices.keys()) {
            let group = looked.inventory.group_of(*device);
            functions.extend(group.into_iter().flat_map(|group| &group.members));
            functions.insert(*device);
        }
        functions.retain(|address| {
            looked.inventory.get(*address).is_some_and(|f| f.driver.is_some() && !f.is_bridge())
        });
        circumstances.uses = self.uses(&functions)?;
        Ok(Look { data: looked, circumstances })
    }

    /// Where the host stands with the policy, and what applying would do.
    pub fn plan_policy(&self) -> Result<PolicyRecord, Failure> {
        let members: Vec<PciAddress> = self.data().assignment().members().map(|m| m.0).collect();
        self.refresh(members);
        let Look { data: looked, circumstances } = self.look_for_policy(None)?;
        let units = plan::policy(&looked.inventory, &circumstances, &looked.wish());
        let mut record = self.policy_record(&looked);
        record.units = self.told(&units);
        Ok(record)
    }

    /// The policy without its units.
    pub(super) fn policy_record(&self, looked: &LookedAt) -> PolicyRecord {
        let error = self.data().in_force.error.clone();
        let clashes = looked.assignment.clashes.iter().map(ToString::to_string);
        let unmet = looked.assignment.unmet.iter().map(|(pool, selector)| {
            let elsewhere = moved(looked, selector);
            format!("pool '{pool}': no device here has {selector}{elsewhere}")
        });
        PolicyRecord {
            files: looked.policy.files.clone(),
            error,
            boot_limit: looked.policy.boot_limit.as_secs(),
            notes: clashes.chain(unmet).collect(),
            initramfs: self.outdated_initramfs(),
            ..PolicyRecord::default()
        }
    }

    /// What makes the initial file systems anew, if they have another policy. What cannot be read is
    /// not told of.
    pub(super) fn outdated_initramfs(&self) -> Option<String> {
        let (rules, policy, met) = (self.rules_at.as_ref()?, self.policy_in.as_ref()?, &self.met);
        let rules = durable::read(rules).ok()?.unwrap_or_default();
        let initramfs = Initramfs { rules: &rules, policy, met };
        initramfs.outdated(self.host()).ok().flatten().map(str::to_owned)
    }

    /// Units as records; remembers which are as wanted, to know drift when it is there.
    pub(super) fn told(&self, units: &[Unit]) -> Vec<UnitRecord> {
        let mut data = self.data();
        let settled = &mut data.in_force.settled;
        let mut record = |unit: &Unit| {
            let mut record = UnitRecord::from(unit);
            if unit.standing() == Standing::AsWanted {
                settled.insert(unit.device);
            } else if settled.contains(&unit.device) {
                record.drifted = Some(true);
            }
            record
        };
        units.iter().map(&mut record).collect()
    }

    /// Remembers the devices that selectors name by their place alone. `again` also those that are
    /// others now.
    pub(super) fn meet(&self, again: bool) -> io::Result<()> {
        let data = self.data();
        let looked = data.looked_at();
        drop(data);
        let mut met = (*looked.met).clone();
        for (address, member) in looked.assignment.members() {
            let pool = looked.policy.pools.get(member.pool);
            let function = looked.inventory.get(address);
            let (Some(pool), Some(function)) = (pool, function) else { continue };
            if !pool.select.iter().any(|s| s.is_by_address(address)) {
                continue;
            }
            if member.role != Role::Virtual && (again || !met.contains_key(&address)) {
                met.insert(address, Identity::of(function));
            }
        }
        if met == *looked.met {
            return Ok(());
        }
        self.met.write(&met)?;
        self.data().in_force.met = Arc::new(met);
        self.write_rules();
        Ok(())
    }
}

fn is_virtual(function: &Arc<Function>) -> bool {
    function.physical().is_some()
}

/// Where the device is now that was in a place.
fn moved(looked: &LookedAt, selector: &Selector) -> String {
    let known = selector.address.and_then(|address| looked.met.get(&address));
    let same = |f: &&Arc<Function>| {
        known.is_some_and(|known| {
            let now = Identity::of(f);
            now.ids == known.ids && now.serial == known.serial
        })
    };
    let found = looked.inventory.functions().find(same);
    found.map(|f| format!("; the one that was there may be {}", f.address)).unwrap_or_default()
}

/// Has a file say `text`, or not be there.
fn keep_file(path: &Path, text: Option<&str>) -> io::Result<()> {
    let now = durable::read(path)?;
    match text {
        Some(text) if now.as_deref() == Some(text.as_bytes()) => Ok(()),
        Some(text) => durable::replace_for_all(path, text.as_bytes()),
        None if now.is_none() => Ok(()),
        None => fs::remove_file(path),
    }
}

/// What cannot be written holds until the daemon ends.
pub(super) fn noted(result: io::Result<()>) -> Result<(), Failure> {
    result.map_err(|error| internal(format!("cannot record which devices are where: {error}")))
}
