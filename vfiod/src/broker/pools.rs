//! Pools: what the policy says of leasing their functions, who may lease from them, and which of them
//! are free. Decides on what is in force; reads and changes nothing else.

use std::collections::{BTreeMap, BTreeSet};

use libvfio::address::PciAddress;
use libvfio::client::Failure;
use libvfio::error::ErrorKind;
use libvfio::iommu::Isolation;
use libvfio::mediated::TypeName;
use libvfio::plan::{self, Plan, Rule};
use libvfio::policy::{self, Mode, Policy, Pool, Role};

use super::{Broker, Data, Pools};
use crate::authority::is_named;
use crate::request::AttachOptions;

impl Data {
    /// What the policy says of leasing functions, where `requested` are wanted at once.
    pub(super) fn rules(&self, requested: &BTreeSet<PciAddress>) -> BTreeMap<PciAddress, Rule> {
        let assignment = self.assignment();
        let claimed = || self.leases.values().flat_map(|lease| lease.devices.keys().copied());
        let rule = |(address, member): (PciAddress, policy::Member)| {
            let pool = self.in_force.policy.pools.get(member.pool)?;
            let mut rule = Rule {
                pool: pool.name.clone(),
                kept: kept(pool, member.role).map(str::to_owned),
                on_vfio: pool.mode == Mode::Passthrough && member.role != Role::Physical,
                isolation: pool.isolation,
                reset: pool.reset,
                scrub: pool.scrub.clone(),
                d3cold: pool.d3cold,
            };
            // What was not selected comes along, whatever it is.
            if member.role == Role::Companion {
                rule.scrub = libvfio::scrub::Rule::default();
            }
            if matches!(member.role, Role::Kept | Role::Physical) || pool.mode == Mode::Host {
                rule.isolation = Isolation::None;
            }
            if pool.mode == Mode::OnLease && pool.keep_for_host > 0 && requested.contains(&address)
            {
                let all = assignment.devices(member.pool, assignment.members().map(|m| m.0));
                let wanted = requested.iter().copied().chain(claimed());
                let left = all.saturating_sub(assignment.devices(member.pool, wanted));
                if left < pool.keep_for_host {
                    let keep = pool.keep_for_host;
                    rule.kept = Some(format!("would leave {left} devices, and {keep} are kept"));
                }
            }
            Some((address, rule))
        };
        assignment.members().filter_map(rule).collect()
    }

    /// The pool a function is in, and whether it is on VFIO by its doing.
    pub(super) fn pools(&self) -> BTreeMap<PciAddress, (String, bool)> {
        let rules = self.rules(&BTreeSet::new());
        rules.into_iter().map(|(address, rule)| (address, (rule.pool, rule.on_vfio))).collect()
    }
}

/// Which of the policy's pools has this name.
fn place(policy: &Policy, name: &str) -> Result<usize, Failure> {
    policy.pools.iter().position(|pool| pool.name == name).ok_or_else(|| {
        let pools: Vec<&str> = policy.pools.iter().map(|pool| pool.name.as_str()).collect();
        let why = match pools.as_slice() {
            [] => format!("there is no pool '{name}': the policy has none"),
            pools => format!("there is no pool '{name}'; there are {}", pools.join(", ")),
        };
        Failure::new(ErrorKind::NotFound, why)
    })
}

fn kept(pool: &Pool, role: Role) -> Option<&'static str> {
    match (role, pool.mode) {
        (Role::Physical, _) => Some("stays with the host, for its virtual functions"),
        (Role::Kept, _) => Some("is kept for the host"),
        (_, Mode::Host) => Some("is the host's"),
        _ => None,
    }
}

impl Data {
    /// Refuses what the pools of a plan's devices do not give to this tenant, or this caller.
    pub(super) fn refuse_lessee(
        &self,
        plan: &Plan,
        tenant: &str,
        pools: &Pools,
    ) -> Result<(), Failure> {
        let assignment = self.assignment();
        let parents = plan.mediated.values().filter_map(TypeName::function);
        for device in plan.devices.keys().copied().chain(parents) {
            let Some(pool) = assignment.pool(&self.in_force.policy, device) else { continue };
            let name = &pool.name;
            let refused = |why: String| Err(Failure::new(ErrorKind::NotAuthorized, why));
            if !pool.lessees.serves(tenant) {
                let tenants = pool.lessees.tenants.join(", ");
                return refused(format!(
                    "{device} is in pool '{name}', which is not for tenant '{tenant}'; it is for \
                     {tenants}"
                ));
            }
            let named = match pools {
                Pools::All => true,
                Pools::Named(pools) => pools.contains(name),
            };
            if pool.lessees.names_callers() && !named {
                return refused(format!(
                    "{device} is in pool '{name}', whose users and groups do not include the \
                     caller; lease from another, or have an administrator change the policy"
                ));
            }
        }
        Ok(())
    }
}

impl Broker {
    /// The pools that name a user, of those that name anybody. Blocks.
    pub fn pools_naming(&self, user: u32) -> BTreeSet<String> {
        let policy = self.data().in_force.policy.clone();
        let naming = policy.pools.iter().filter(|pool| is_named(user, &pool.lessees));
        naming.map(|pool| pool.name.clone()).collect()
    }

    /// The pools that a call's devices are in; an empty name for one that is in none.
    pub fn pools_of(&self, names: &[String], options: &AttachOptions) -> BTreeSet<String> {
        let data = self.data();
        let assignment = data.assignment();
        let pool = |name: &String| {
            let address = data.inventory.resolve(name).ok();
            let pool = address.and_then(|at| assignment.pool(&data.in_force.policy, at));
            pool.map(|pool| pool.name.clone()).unwrap_or_default()
        };
        // Whoever asks for a pool's may name others beside it, which are then refused or not for
        // what they are.
        let theirs = names.iter().chain(&options.vf_of).map(pool);
        options.pool.clone().into_iter().chain(theirs).collect()
    }

    /// Refuses devices that are not of the pool they are asked for from; `other` is what no pool can
    /// have.
    pub(super) fn refuse_outside(
        &self,
        name: &str,
        devices: impl Iterator<Item = PciAddress>,
        other: Option<&TypeName>,
    ) -> Result<(), Failure> {
        let data = self.data();
        let policy = &data.in_force.policy;
        place(policy, name)?;
        let assignment = data.assignment();
        let pool = |device| assignment.pool(policy, device).map(|pool| pool.name.as_str());
        let outside =
            devices.map(|device| (device, pool(device))).find(|(_, of)| *of != Some(name));
        let why = match (outside, other) {
            (None, None) => return Ok(()),
            (Some((device, None)), _) => format!("{device} is in no pool, so not in '{name}'"),
            (Some((device, Some(of))), _) => format!("{device} is in pool '{of}', not in '{name}'"),
            (None, Some(of)) => format!("{of} is of no function, so not in pool '{name}'"),
        };
        let why = format!("{why}; 'vfioctl policy show' says which device is where");
        Err(Failure::new(ErrorKind::InvalidArgument, why))
    }

    /// The first `count` devices of a pool that nothing is known to keep from a lease, but for those
    /// `barred`, with all their functions.
    pub(super) fn free_in_pool(
        &self,
        name: &str,
        count: u32,
        tenant: Option<&str>,
        barred: &BTreeSet<PciAddress>,
    ) -> Result<Vec<PciAddress>, Failure> {
        let data = self.data();
        let looked = data.looked_at();
        let at = place(&looked.policy, name)?;
        let quarantined = data.quarantined(tenant);
        let free = |address: &PciAddress| {
            !barred.contains(address)
                && !quarantined.contains_key(address)
                && data.holder(*address).is_none()
                && looked.inventory.get(*address).is_some()
        };
        let leads = plan::policy_leads(&looked.inventory, &looked.wish());
        let own = leads.iter().filter(|lead| lead.pool == at && lead.kind == plan::Kind::Device);
        let wanted = usize::try_from(count).unwrap_or(usize::MAX);
        let free: Vec<&plan::Lead> =
            own.filter(|lead| lead.members.iter().all(free)).take(wanted).collect();
        if free.len() < wanted {
            let why = format!(
                "pool '{name}' has {} devices free, and {count} were asked for; wait, or ask for \
                 fewer ('vfioctl status' shows who has them)",
                free.len()
            );
            return Err(Failure::new(ErrorKind::Busy, why));
        }
        Ok(free.into_iter().flat_map(|lead| lead.members.iter().copied()).collect())
    }
}
