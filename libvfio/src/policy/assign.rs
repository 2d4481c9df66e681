//! Which function is in which pool. Pure: compares a policy with an inventory.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::{Facts, Mode, Policy, Pool, Selector};
use crate::address::PciAddress;
use crate::inventory::Inventory;
use crate::pci::{Function, Sriov};

/// Who is where.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Assignment {
    members: BTreeMap<PciAddress, Member>,
    /// Functions that more than one pool claims. They are in none.
    pub clashes: Vec<Clash>,
    /// Selectors that no function of this host matches, by the name of their pool.
    pub unmet: Vec<(String, Selector)>,
}

/// A function's place in a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// The pool, by its place in [`Policy::pools`].
    pub pool: usize,
    /// Why it is in there.
    pub role: Role,
}

/// Why a function is in a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A selector matches it.
    Selected,
    /// It is of one device and one group with a function that is selected.
    Companion,
    /// Its virtual functions are in the pool; it stays with the host.
    Physical,
    /// It is a virtual function of such a one.
    Virtual,
    /// It would be in the pool, but is kept for the host.
    Kept,
}

/// A function that more than one pool claims.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clash {
    /// The function.
    pub device: PciAddress,
    /// The pools, and where each is described.
    pub pools: Vec<(String, String)>,
}

impl fmt::Display for Clash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pools: Vec<String> =
            self.pools.iter().map(|(name, place)| format!("'{name}' ({place})")).collect();
        write!(f, "{} is claimed by pools {}", self.device, pools.join(" and "))
    }
}

impl Assignment {
    /// Finds every function's pool.
    pub fn new(policy: &Policy, inventory: &Inventory, facts: &Facts) -> Self {
        let mut assignment = Self::default();
        let mut met = vec![BTreeSet::new(); policy.pools.len()];
        let physical_first = |f: &&Function| f.physical().is_some();
        let mut functions: Vec<&Function> =
            inventory.functions().map(AsRef::as_ref).filter(|f| !f.is_bridge()).collect();
        functions.sort_by_key(physical_first);
        for function in functions {
            let parent = function.physical().and_then(|pf| assignment.members.get(&pf)).copied();
            if let Some(Member { pool, role: Role::Physical }) = parent {
                let member = Member { pool, role: Role::Virtual };
                assignment.members.insert(function.address, member);
                continue;
            }
            let claims = policy.pools.iter().enumerate().filter(|(at, pool)| {
                let hits =
                    pool.select.iter().enumerate().filter(|(_, s)| s.matches(facts, function));
                let hits: Vec<usize> = hits.map(|(at, _)| at).collect();
                met[*at].extend(hits.iter().copied());
                !hits.is_empty() && !pool.except.iter().any(|s| s.matches(facts, function))
            });
            let claims: Vec<usize> = claims.map(|(at, _)| at).collect();
            assignment.claim(policy, function, &claims);
        }
        assignment.add_companions(policy, inventory);
        assignment.keep_for_host(policy);
        for (pool, met) in policy.pools.iter().zip(met) {
            let unmet = pool.select.iter().enumerate().filter(|(at, _)| !met.contains(at));
            assignment.unmet.extend(unmet.map(|(_, s)| (pool.name.clone(), s.clone())));
        }
        assignment
    }

    fn claim(&mut self, policy: &Policy, function: &Function, claims: &[usize]) {
        match claims {
            [] => {}
            [pool] => {
                let has_own = policy.pools.get(*pool).is_some_and(|pool| pool.vfs.is_some());
                let physical = matches!(function.sriov, Sriov::Physical { .. });
                let role = if has_own && physical { Role::Physical } else { Role::Selected };
                self.members.insert(function.address, Member { pool: *pool, role });
            }
            many => self.clashes.push(clash(policy, function.address, many)),
        }
    }

    /// Functions of one device that share its group go together, wherever they go.
    fn add_companions(&mut self, policy: &Policy, inventory: &Inventory) {
        let selected: Vec<(PciAddress, usize)> = self
            .members
            .iter()
            .filter(|(_, member)| member.role == Role::Selected)
            .map(|(address, member)| (*address, member.pool))
            .collect();
        for (address, pool) in selected {
            let virtual_function = inventory.get(address).is_some_and(|f| f.physical().is_some());
            let group = inventory.group_of(address).filter(|_| !virtual_function);
            let others = group.into_iter().flat_map(|group| &group.members).copied();
            for other in others.filter(|other| *other != address && other.same_slot(address)) {
                let Some(function) = inventory.get(other) else { continue };
                if function.is_bridge() || function.physical().is_some() {
                    continue;
                }
                match self.members.get(&other) {
                    None => {
                        let member = Member { pool, role: Role::Companion };
                        self.members.insert(other, member);
                    }
                    Some(member) if member.pool != pool => {
                        let pools = [member.pool, pool];
                        self.members.remove(&other);
                        self.clashes.push(clash(policy, other, &pools));
                    }
                    Some(_) => {}
                }
            }
        }
    }

    /// Those with the lowest addresses stay, where all would be on VFIO from boot on.
    fn keep_for_host(&mut self, policy: &Policy) {
        for (at, pool) in policy.pools.iter().enumerate() {
            if pool.mode != Mode::Passthrough || pool.keep_for_host == 0 {
                continue;
            }
            let own = |member: &Member| member.pool == at && member.role != Role::Physical;
            let members = self.members.iter().filter(|(_, member)| own(member));
            let mut devices: Vec<Device> =
                members.map(|(address, member)| Device::of(*address, member.role)).collect();
            devices.dedup();
            devices.truncate(pool.keep_for_host);
            for (address, member) in self.members.iter_mut().filter(|(_, m)| own(m)) {
                if devices.contains(&Device::of(*address, member.role)) {
                    member.role = Role::Kept;
                }
            }
        }
    }

    /// A function's place, if it has one.
    pub fn member(&self, address: PciAddress) -> Option<Member> {
        self.members.get(&address).copied()
    }

    /// The pool that a function is in.
    pub fn pool<'p>(&self, policy: &'p Policy, address: PciAddress) -> Option<&'p Pool> {
        policy.pools.get(self.member(address)?.pool)
    }

    /// All functions that have a place, in the order of their addresses.
    pub fn members(&self) -> impl Iterator<Item = (PciAddress, Member)> + '_ {
        self.members.iter().map(|(address, member)| (*address, *member))
    }

    /// How many devices of a pool there are among `functions`: those of one slot are one, virtual
    /// functions are one each.
    pub fn devices(&self, pool: usize, functions: impl Iterator<Item = PciAddress>) -> usize {
        let own = functions.filter_map(|address| {
            let member = self.member(address).filter(|member| member.pool == pool)?;
            (member.role != Role::Physical).then(|| Device::of(address, member.role))
        });
        own.collect::<BTreeSet<Device>>().len()
    }
}

/// What counts as one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Device(u32, u8, u8, Option<u8>);

impl Device {
    fn of(address: PciAddress, role: Role) -> Self {
        let function = (role == Role::Virtual).then(|| address.function());
        Self(address.domain(), address.bus(), address.device(), function)
    }
}

fn clash(policy: &Policy, device: PciAddress, pools: &[usize]) -> Clash {
    let pools = pools.iter().filter_map(|at| policy.pools.get(*at));
    Clash { device, pools: pools.map(|p| (p.name.clone(), p.place.to_string())).collect() }
}
