//! The one owner of assignment: inventory, leases and what may be done with them. Knows nothing
//! of the bus; tells of changes through a channel. Its methods read the host and wait for steps, so
//! they block: the service calls them from threads that may. Steps are walked on threads of their
//! own, one for each lease that moves, so that nobody waits for another's device.

mod applying;
mod considering;
mod ending;
mod healing;
mod holding;
mod lagging;
mod leasing;
mod mediated;
mod opening;
mod policy;
mod pools;
mod quarantining;
mod shaping;
mod virtual_functions;
mod watching;

pub use leasing::{Asker, Pools};

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libvfio::address::PciAddress;
use libvfio::backend::Offer;
use libvfio::client::{DeviceRecord, Failure, GroupRecord, PlanRecord};
use libvfio::error::{Error, ErrorKind};
use libvfio::host::HostRoot;
use libvfio::inventory::Inventory;
use libvfio::mediated::TypeName;
use libvfio::pci::Function;
use libvfio::plan::{self, Circumstances, Claim, Plan, Refusal, Request};
use libvfio::protection::Use;
use tokio::sync::mpsc::UnboundedSender;

use self::policy::InForce;
use crate::history::History;
use crate::lease::{Lease, State};
use crate::met::Met;
use crate::quarantine::{Distrusted, Quarantine};
use crate::request::{AttachOptions, check_devices};
use crate::stores::Stores;
use crate::transition::{Means, Walker};

/// What happened, for whoever watches.
#[derive(Debug)]
pub enum Change {
    /// A function appeared.
    DeviceAdded(PciAddress),
    /// Properties of a function changed.
    DeviceChanged(PciAddress, Vec<Property>),
    /// A function went away.
    DeviceRemoved(PciAddress),
    /// A lease came into being.
    LeaseAdded(String),
    /// A lease changed its state.
    LeaseChanged {
        /// Its id.
        id: String,
        /// Its state now, or `released` for one that is no more.
        state: &'static str,
        /// Why, if that is known.
        reason: Option<String>,
    },
    /// A step of applying the policy was carried out, or failed.
    PolicyStep {
        /// The pool.
        pool: String,
        /// The device.
        device: PciAddress,
        /// The step, or why it failed.
        text: String,
    },
    /// Groups came, went or changed their members.
    GroupsChanged,
    /// All objects are as everything before this says; replies wait for it.
    Barrier(tokio::sync::oneshot::Sender<()>),
}

/// What changes of a function while it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Property {
    /// Its driver.
    Driver,
    /// The override set on it.
    DriverOverride,
    /// Its IOMMU group.
    IommuGroup,
    /// How many VFs it has.
    EnabledVirtualFunctions,
    /// The lease that holds it.
    Lease,
    /// Why it is not trusted.
    Quarantine,
}

impl Property {
    /// What differs between two readings of a function.
    fn changed(before: &Function, after: &Function) -> Vec<Self> {
        let all = [
            (Self::Driver, before.driver != after.driver),
            (Self::DriverOverride, before.driver_override != after.driver_override),
            (Self::IommuGroup, before.iommu_group != after.iommu_group),
            (Self::EnabledVirtualFunctions, before.enabled_vfs() != after.enabled_vfs()),
        ];
        all.into_iter().filter_map(|(property, differs)| differs.then_some(property)).collect()
    }
}

/// The owner of assignment.
#[derive(Debug)]
pub struct Broker {
    walker: Walker,
    /// Locked before the data, and while it is written to disk, which the data never is.
    quarantine: Mutex<Quarantine>,
    history: History,
    changes: UnboundedSender<Change>,
    data: Mutex<Data>,
    /// A lease has come to its end.
    ended: Condvar,
    met: Met,
    /// Where the policy is.
    policy_in: Option<PathBuf>,
    /// Where udev's rules go that it becomes.
    rules_at: Option<PathBuf>,
    /// Held by whoever applies the policy.
    applying: Mutex<()>,
    /// Functions of the groups that somebody is being considered for.
    considered: Mutex<BTreeSet<PciAddress>>,
    /// One of those was decided on.
    decided: Condvar,
    /// Nobody opens the nodes of some lease any more.
    opened: Condvar,
    /// Counts looks at functions, so that of two at the same time the later one counts.
    looks: AtomicU64,
}

#[derive(Debug)]
struct Data {
    inventory: Arc<Inventory>,
    leases: BTreeMap<String, Lease>,
    distrusted: Vec<Distrusted>,
    /// The look that told of each function.
    looked: BTreeMap<PciAddress, u64>,
    /// Physical functions whose autoprobe the daemon has turned off.
    autoprobe_off: BTreeSet<PciAddress>,
    /// How many are opening nodes of which leases.
    opening: BTreeMap<String, usize>,
    /// When the end of a lease was last asked for that was ending already.
    asked: BTreeMap<String, Instant>,
    in_force: InForce,
    /// Leases that something has happened to, until it is clear what.
    judged: BTreeSet<String>,
}

/// What was found around a request, beside the inventory.
#[derive(Default)]
struct Around {
    uses: Vec<Use>,
    offers: BTreeMap<PciAddress, Vec<Offer>>,
    parts: mediated::Parts,
    /// Whether functions may lose power when idle, where that matters.
    d3cold: BTreeMap<PciAddress, bool>,
}

/// Somebody who waits for one answer. Work may go on after it was given.
pub struct Reply<T>(Mutex<Option<Tell<T>>>);

type Tell<T> = Box<dyn FnOnce(Result<T, Failure>) + Send>;

impl<T> Reply<T> {
    /// Somebody who is told by this.
    pub fn new(tell: impl FnOnce(Result<T, Failure>) + Send + 'static) -> Self {
        Self(Mutex::new(Some(Box::new(tell))))
    }

    /// The first answer counts.
    pub fn give(&self, answer: Result<T, Failure>) {
        let tell = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(tell) = tell {
            tell(answer);
        }
    }
}

impl<T> fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").finish_non_exhaustive()
    }
}

/// The answer of work that has begun on a thread of its own, once there is one.
#[derive(Debug)]
struct Answer<T>(Receiver<Result<T, Failure>>);

impl<T> Answer<T> {
    fn wait(self) -> Result<T, Failure> {
        self.0.recv().unwrap_or_else(|_| Self::lost())
    }

    /// The answer, if there is one by then, or whoever waits for it.
    fn within(self, patience: Duration) -> Result<Result<T, Failure>, Self> {
        match self.0.recv_timeout(patience) {
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Timeout) => Err(self),
            Err(RecvTimeoutError::Disconnected) => Ok(Self::lost()),
        }
    }

    fn lost() -> Result<T, Failure> {
        Err(internal("a fault of vfiod: see its journal"))
    }
}

impl Data {
    /// The lease that holds a function.
    fn holder(&self, address: PciAddress) -> Option<&Lease> {
        self.leases.values().find(|lease| lease.holds(address))
    }
}

impl Broker {
    /// Reads the host and what is on disk. Unfinished leases are left for
    /// [`recover`](Self::recover).
    pub fn open(
        means: Means,
        stores: Stores,
        changes: UnboundedSender<Change>,
    ) -> anyhow::Result<Self> {
        let Stores { ledger, mut quarantine, history, met, policy, rules } = stores;
        let inventory = Arc::new(Inventory::scan(&means.host)?);
        let parts = libvfio::mediated::devices(&means.host)?;
        let found = ledger.load()?;
        let distrusted = quarantine.load();
        let lease = |lease: Lease| {
            let behind = found.behind.contains(&lease.id);
            let lease = if behind { lagging::caught_up(lease, &inventory, &parts) } else { lease };
            (lease.id.clone(), lease)
        };
        let data = Data {
            leases: found.leases.into_iter().map(lease).collect(),
            inventory: inventory.clone(),
            distrusted: distrusted.devices,
            looked: BTreeMap::new(),
            opening: BTreeMap::new(),
            asked: BTreeMap::new(),
            judged: BTreeSet::new(),
            autoprobe_off: ledger.autoprobe_off(),
            in_force: InForce::met(met.load()),
        };
        let broker = Self {
            walker: Walker { means, ledger },
            quarantine: Mutex::new(quarantine),
            history,
            met,
            policy_in: policy,
            rules_at: rules,
            applying: Mutex::default(),
            changes,
            data: Mutex::new(data),
            ended: Condvar::new(),
            considered: Mutex::default(),
            decided: Condvar::new(),
            opened: Condvar::new(),
            looks: AtomicU64::new(1),
        };
        broker.first_policy();
        broker.note_aside(&found.aside);
        broker.note_aside(&distrusted.aside);
        if distrusted.lost {
            broker.note_quarantine_lost();
        }
        for lease in broker.leases().iter().filter(|lease| found.behind.contains(&lease.id)) {
            broker.note_caught_up(lease);
        }
        Ok(broker)
    }

    /// Has work done on a thread of its own, and answers as soon as the work has an answer.
    fn apart<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<Self>, &Reply<T>) + Send + 'static,
    ) -> Result<T, Failure> {
        self.begin(work).wait()
    }

    /// Has work begun on a thread of its own.
    fn begin<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<Self>, &Reply<T>) + Send + 'static,
    ) -> Answer<T> {
        let (tell, answer) = channel();
        let reply = Reply::new(move |given| {
            // Whoever asked waits for it.
            let _ = tell.send(given);
        });
        let broker = self.clone();
        std::thread::spawn(move || work(&broker, &reply));
        Answer(answer)
    }

    fn host(&self) -> &HostRoot {
        &self.walker.means.host
    }

    fn data(&self) -> MutexGuard<'_, Data> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, change: Change) {
        // Nobody listens while the daemon shuts down.
        let _ = self.changes.send(change);
    }

    fn tell_all(&self, changes: Vec<Change>) {
        for change in changes {
            self.tell(change);
        }
    }

    /// The name of the simulated host, if this is one.
    pub fn simulated(&self) -> Option<String> {
        self.host().simulated()
    }

    /// The host as it was last seen.
    pub fn inventory(&self) -> Arc<Inventory> {
        self.data().inventory.clone()
    }

    /// All leases, oldest first.
    pub fn leases(&self) -> Vec<Lease> {
        let mut leases: Vec<Lease> = self.data().leases.values().cloned().collect();
        leases.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        leases
    }

    /// What there is to say of a lease, if it is one. Not for what takes long.
    pub fn of_lease<T>(&self, id: &str, say: impl FnOnce(&Lease) -> T) -> Option<T> {
        self.data().leases.get(id).map(say)
    }

    /// One lease.
    pub fn lease(&self, id: &str) -> Option<Lease> {
        self.of_lease(id, Lease::clone)
    }

    /// The function a name means.
    pub fn resolve(&self, name: &str) -> Result<PciAddress, Error> {
        self.inventory().resolve(name)
    }

    /// Every function's record.
    pub fn list_devices(&self, brief: bool) -> Vec<DeviceRecord> {
        let data = self.data();
        let claims = claims_by_device(&data.leases);
        let mut quarantined = data.quarantined(None);
        let mut pools = data.pools();
        let record = |f: &Arc<Function>| {
            let lease = claims.get(&f.address).copied();
            let quarantine = quarantined.remove(&f.address);
            let pool = pools.remove(&f.address);
            DeviceRecord { quarantine, ..device_record(&data.inventory, f, lease, pool, brief) }
        };
        data.inventory.functions().map(record).collect()
    }

    /// One function's record.
    pub fn device(&self, address: PciAddress) -> Option<DeviceRecord> {
        let data = self.data();
        let function = data.inventory.get(address)?;
        let (holder, pool) = (data.holder(address), data.pools().remove(&address));
        let record = device_record(&data.inventory, function, holder, pool, false);
        Some(DeviceRecord { quarantine: data.quarantine_of(address), ..record })
    }

    /// The id of the lease that holds a function.
    pub fn holder(&self, address: PciAddress) -> Option<String> {
        let data = self.data();
        let lease = data.holder(address).filter(|lease| lease.task.is_none())?;
        Some(lease.id.clone())
    }

    /// Every group's record.
    pub fn list_groups(&self) -> Vec<GroupRecord> {
        let data = self.data();
        let numbers = data.inventory.groups().map(|group| group.number);
        numbers.filter_map(|number| group_record(&data, number)).collect()
    }

    /// One group's record.
    pub fn group(&self, number: u32) -> Option<GroupRecord> {
        group_record(&self.data(), number)
    }

    /// What attaching would do for a user, or why it would not.
    pub fn plan(
        &self,
        names: &[String],
        options: &AttachOptions,
        user: u32,
    ) -> Result<PlanRecord, Failure> {
        let request = self.request(names, options, user, &BTreeSet::new())?;
        let found = self.look_around(&request)?;
        let data = self.data();
        let planned = plan_within(&data, &request, found);
        let mut groups: Vec<u32> =
            request.devices.iter().filter_map(|d| data.inventory.get(*d)?.iommu_group).collect();
        groups.sort_unstable();
        groups.dedup();
        let groups = groups.into_iter().filter_map(|number| group_record(&data, number)).collect();
        Ok(PlanRecord { groups, ..PlanRecord::new(&planned) })
    }

    /// Looks at all that a request would touch.
    fn look_around(&self, request: &Request) -> Result<Around, Failure> {
        let uses = self.uses(&self.refresh_around(request)?)?;
        let (offers, parts) = (self.offers_around(request)?, self.look_at_mediated(request)?);
        Ok(Around { uses, offers, parts, d3cold: self.power_around(request) })
    }

    /// Of those whose pool lets them lose power when idle.
    fn power_around(&self, request: &Request) -> BTreeMap<PciAddress, bool> {
        let (rules, inventory) = {
            let data = self.data();
            (data.rules(&BTreeSet::new()), data.inventory.clone())
        };
        let groups = request.devices.iter().filter_map(|device| inventory.group_of(*device));
        let around = groups.flat_map(|group| &group.members);
        let may = |device: &&PciAddress| rules.get(*device).is_some_and(|r| r.d3cold == Some(true));
        let read = |device: &PciAddress| {
            let allowed = self.host().function(*device).attr("d3cold_allowed").ok()??;
            Some((*device, allowed == "1"))
        };
        around.filter(may).filter_map(read).collect()
    }

    /// `driver_override` changes silently, so whatever is about to be planned is read again.
    /// Answers those of them on a host driver: only they can be of use to the host.
    fn refresh_around(&self, request: &Request) -> Result<BTreeSet<PciAddress>, Error> {
        let inventory = self.inventory();
        let mut addresses: BTreeSet<PciAddress> = request.devices.iter().copied().collect();
        let mut physical = BTreeSet::new();
        for device in &request.devices {
            addresses.extend(inventory.group_of(*device).into_iter().flat_map(|g| &g.members));
            let function = inventory.get(*device).filter(|_| !request.shape.is_empty());
            physical.extend(function.and_then(|f| f.physical()));
        }
        drop(inventory);
        self.refresh(addresses.union(&physical).copied());
        let mut data = self.data();
        Arc::make_mut(&mut data.inventory).refresh_vfio(self.host())?;
        let of_use = |address: &PciAddress| {
            data.inventory.get(*address).is_some_and(|f| f.driver.is_some() && !f.on_vfio())
        };
        Ok(addresses.into_iter().filter(of_use).collect())
    }

    /// What the caller means, virtual functions that it leaves to choose included, but for those
    /// `barred`.
    fn request(
        &self,
        names: &[String],
        options: &AttachOptions,
        user: u32,
        barred: &BTreeSet<PciAddress>,
    ) -> Result<Request, Failure> {
        let inventory = self.inventory();
        let mut devices = BTreeSet::new();
        let tenant = options.tenant.as_deref();
        if let Some(physical) = &options.vf_of {
            let physical = inventory.resolve(physical)?;
            let count = options.count.unwrap_or(1);
            devices.extend(self.free_virtual_functions(physical, count, tenant, barred)?);
        } else if let Some(pool) = options.pool.as_ref().filter(|_| names.is_empty()) {
            let count = options.count.unwrap_or(1);
            devices.extend(self.free_in_pool(pool, count, tenant, barred)?);
        } else {
            check_devices(names)?;
        }
        let (functions, mediated) = mediated::parted(names)?;
        for name in functions {
            devices.insert(inventory.resolve(name)?);
        }
        if let Some(pool) = options.pool.as_ref().filter(|_| !names.is_empty()) {
            if options.count.is_some() {
                let why = "'count' chooses of 'pool': name devices or say how many, not both";
                return Err(Failure::new(ErrorKind::InvalidArgument, why));
            }
            let parents = mediated.values().filter_map(TypeName::function);
            let other = mediated.values().find(|of| of.function().is_none());
            self.refuse_outside(pool, devices.iter().copied().chain(parents), other)?;
        }
        if !options.shape.is_empty() && !mediated.is_empty() {
            let why = "settings are for virtual functions, not for mediated devices";
            return Err(Failure::new(ErrorKind::InvalidArgument, why));
        }
        let mut single = options.shape.each().filter(|(setting, _)| setting.is_for_one());
        if let Some((setting, _)) = single.next().filter(|_| devices.len() > 1) {
            let what = setting.label();
            let why = format!("an {what} is for one virtual function; lease them one by one");
            return Err(Failure::new(ErrorKind::InvalidArgument, why));
        }
        Ok(Request {
            devices: devices.into_iter().collect(),
            mediated,
            whole_group: options.whole_group,
            adopt: options.adopt,
            allow_protected: options.allow_protected,
            shape: options.shape.clone(),
            node_access: options.node_access.then_some(user),
            tenant: options.tenant.clone(),
        })
    }
}

fn plan_within(data: &Data, request: &Request, found: Around) -> Result<Plan, Refusal> {
    let rules = data.rules(&request.devices.iter().copied().collect());
    let quarantined = data.quarantined(request.tenant.as_deref());
    let circumstances = Circumstances { rules, quarantined, ..circumstances(data, found) };
    plan::attach(&data.inventory, &circumstances, request)
}

fn circumstances(data: &Data, found: Around) -> Circumstances {
    let Around { uses, offers, parts: mediated::Parts { devices, parents }, d3cold } = found;
    let claim = |(device, lease): (PciAddress, &Lease)| {
        let claim = Claim {
            lease: lease.id.clone(),
            tenant: lease.tenant.clone(),
            wedged: lease.state == State::Wedged,
            task: lease.task.clone(),
        };
        (device, claim)
    };
    let claims = claims_by_device(&data.leases).into_iter().map(claim).collect();
    Circumstances {
        claims,
        uses,
        offers,
        quarantined: data.quarantined(None),
        autoprobe_off: data.autoprobe_off.clone(),
        mediated: data.with_claimed(devices),
        parents,
        rules: data.rules(&BTreeSet::new()),
        d3cold,
        ..Circumstances::default()
    }
}

fn claims_by_device(leases: &BTreeMap<String, Lease>) -> BTreeMap<PciAddress, &Lease> {
    let holding = leases.values().filter(|lease| lease.state != State::Failed);
    holding.flat_map(|lease| lease.devices.keys().map(move |device| (*device, lease))).collect()
}

fn device_record(
    inventory: &Inventory,
    function: &Function,
    lease: Option<&Lease>,
    pool: Option<(String, bool)>,
    brief: bool,
) -> DeviceRecord {
    let record = if brief {
        DeviceRecord::brief(inventory, function)
    } else {
        DeviceRecord::full(inventory, function)
    };
    // What the daemon does itself is no tenant's.
    let holder = lease;
    let ours = pool.as_ref().is_some_and(|(_, on_vfio)| *on_vfio);
    let lease = lease.filter(|lease| lease.task.is_none());
    DeviceRecord {
        lease: lease.map(|l| l.id.clone()),
        tenant: lease.map(|l| l.tenant.clone()),
        lease_state: lease.map(|l| l.state.name().to_owned()),
        external: (function.on_vfio() && holder.is_none() && !ours).then_some(true),
        pool: pool.map(|(name, _)| name),
        ..record
    }
}

fn group_record(data: &Data, number: u32) -> Option<GroupRecord> {
    let group = data.inventory.group(number)?;
    let holding = |lease: &&Lease| group.members.iter().any(|member| lease.holds(*member));
    let leases = data.leases.values().filter(holding).map(|lease| lease.id.clone()).collect();
    Some(GroupRecord { leases, ..GroupRecord::new(&data.inventory, group) })
}

fn internal(error: impl fmt::Display) -> Failure {
    Failure::new(ErrorKind::Internal, error.to_string())
}
