//! The one owner of assignment: inventory, leases and what may be done with them. Knows nothing
//! of the bus; tells of changes through a channel. Its methods read the host and run steps, so
//! they block: the service calls them from threads that may.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use libvfio::address::PciAddress;
use libvfio::client::{DeviceRecord, Failure, GroupRecord, PlanRecord};
use libvfio::error::{Error, ErrorKind};
use libvfio::host::HostRoot;
use libvfio::inventory::Inventory;
use libvfio::pci::{Function, Identity};
use libvfio::plan::{self, Circumstances, Claim, Plan, Refusal, Request};
use libvfio::step::Step;
use libvfio::{holders, protection, vfio};
use tokio::sync::mpsc::UnboundedSender;
use tracing::{error, info, warn};

use crate::lease::{Found, Lease, Recorded, State};
use crate::ledger::Ledger;
use crate::request::{AttachOptions, ReleaseOptions, check_devices};
use crate::transition::{self, Stopped};

/// How long a device that changed under a lease is given before the lease is judged.
const SETTLING: Duration = Duration::from_millis(300);

/// What happened, for whoever watches.
#[derive(Debug)]
pub enum Change {
    /// A function appeared.
    DeviceAdded(PciAddress),
    /// A function's driver, override, group, VFs or lease changed.
    DeviceChanged(PciAddress),
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
    /// Groups came, went or changed their members.
    GroupsChanged,
    /// Everything before this was told; used to order replies after signals.
    Barrier(tokio::sync::oneshot::Sender<()>),
}

/// The owner of assignment.
#[derive(Debug)]
pub struct Broker {
    host: HostRoot,
    ledger: Ledger,
    changes: UnboundedSender<Change>,
    data: Mutex<Data>,
}

#[derive(Debug)]
struct Data {
    inventory: Arc<Inventory>,
    leases: BTreeMap<String, Lease>,
}

impl Broker {
    /// Reads the host and the ledger. Unfinished leases are left for [`recover`](Self::recover).
    pub fn open(
        host: HostRoot,
        ledger: Ledger,
        changes: UnboundedSender<Change>,
    ) -> anyhow::Result<Self> {
        let inventory = Arc::new(Inventory::scan(&host)?);
        let (leases, aside) = ledger.load()?;
        for file in aside {
            error!(path = %file.path.display(), reason = file.reason, "a lease file was set aside");
        }
        let leases = leases.into_iter().map(|lease| (lease.id.clone(), lease)).collect();
        Ok(Self { host, ledger, changes, data: Mutex::new(Data { inventory, leases }) })
    }

    fn data(&self) -> MutexGuard<'_, Data> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, change: Change) {
        // Nobody listens while the daemon shuts down.
        let _ = self.changes.send(change);
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

    /// One lease.
    pub fn lease(&self, id: &str) -> Option<Lease> {
        self.data().leases.get(id).cloned()
    }

    /// The function a name means.
    pub fn resolve(&self, name: &str) -> Result<PciAddress, Error> {
        self.inventory().resolve(name)
    }

    /// Every function's record.
    pub fn list_devices(&self, brief: bool) -> Vec<DeviceRecord> {
        let data = self.data();
        let claims = claims_by_device(&data.leases);
        data.inventory
            .functions()
            .map(|f| with_lease(device_record(&data.inventory, f, brief), claims.get(&f.address)))
            .collect()
    }

    /// One function's record.
    pub fn device(&self, address: PciAddress) -> Option<DeviceRecord> {
        let data = self.data();
        let function = data.inventory.get(address)?;
        let claims = claims_by_device(&data.leases);
        let record = device_record(&data.inventory, function, false);
        Some(with_lease(record, claims.get(&address)))
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

    /// What attaching would do, or why it would not.
    pub fn plan(&self, names: &[String], options: &AttachOptions) -> Result<PlanRecord, Failure> {
        let request = self.request(names, options)?;
        self.refresh_around(&request)?;
        let uses = protection::uses(&self.host)?;
        let data = self.data();
        let planned = plan_within(&data, &request, uses);
        let mut groups: Vec<u32> =
            request.devices.iter().filter_map(|d| data.inventory.get(*d)?.iommu_group).collect();
        groups.sort_unstable();
        groups.dedup();
        let groups = groups.into_iter().filter_map(|number| group_record(&data, number)).collect();
        Ok(PlanRecord { groups, ..PlanRecord::new(&planned) })
    }

    /// Leases devices: brings their groups to VFIO, all or none.
    pub fn attach(
        &self,
        names: &[String],
        tenant: &str,
        options: &AttachOptions,
        owner: u32,
    ) -> Result<Lease, Failure> {
        let request = self.request(names, options)?;
        self.refresh_around(&request)?;
        let uses = protection::uses(&self.host)?;
        let mut lease = {
            let mut data = self.data();
            let plan = plan_within(&data, &request, uses)?;
            let lease = new_lease(&data, &plan, tenant, options, owner)?;
            data.leases.insert(lease.id.clone(), lease.clone());
            lease
        };
        match transition::forward(&self.host, &self.ledger, &mut lease) {
            Ok(()) => {
                // First, since an active lease whose devices look unbound is a broken one.
                self.refresh(lease.devices.keys().copied());
                lease.state = State::Active;
                self.store(&lease)?;
                self.tell(Change::LeaseAdded(lease.id.clone()));
                info!(
                    lease = lease.id,
                    tenant,
                    vm = lease.vm,
                    devices = ?lease.devices.keys(),
                    "attached"
                );
                Ok(lease)
            }
            Err(stopped) => Err(self.abandon(lease, &stopped)),
        }
    }

    /// Undoes an attachment that stopped half way.
    fn abandon(&self, mut lease: Lease, stopped: &Stopped) -> Failure {
        lease.state = State::Releasing;
        lease.backward = lease.way_back();
        let failures = transition::backward(&self.host, &self.ledger, &mut lease);
        let kind = match stopped {
            Stopped::Step(error) => error.kind(),
            Stopped::Ledger(_) => ErrorKind::Internal,
        };
        let mut message = format!("{stopped}; everything done before was undone");
        if !failures.is_empty() {
            message =
                format!("{stopped}; undoing what was done before failed too: {}", all(&failures));
        }
        warn!(lease = lease.id, tenant = lease.tenant, message, "an attachment failed");
        self.close(lease, &failures, Some(&message));
        Failure::new(kind, message)
    }

    /// Ends every lease `target` names: by lease id, by virtual machine, or by a device of it.
    /// Nothing to end is no failure, so a caller may repeat itself.
    pub fn release(&self, target: &str, options: &ReleaseOptions) -> Result<Vec<String>, Failure> {
        let address = self.resolve(target).ok().or_else(|| target.parse().ok());
        let ids: Vec<String> = {
            let data = self.data();
            let means = |lease: &&Lease| {
                lease.id == target
                    || lease.vm.as_deref() == Some(target)
                    || address.is_some_and(|a| lease.devices.contains_key(&a))
            };
            data.leases.values().filter(means).map(|lease| lease.id.clone()).collect()
        };
        for id in &ids {
            self.release_one(id, options)?;
        }
        Ok(ids)
    }

    fn release_one(&self, id: &str, options: &ReleaseOptions) -> Result<(), Failure> {
        let mut lease = {
            let mut data = self.data();
            let Some(lease) = data.leases.get(id).cloned() else { return Ok(()) };
            match lease.state {
                State::Failed => {
                    self.dismiss(&mut data, &lease)?;
                    return Ok(());
                }
                State::Active => {}
                State::Preparing | State::Releasing => {
                    let state = lease.state.name();
                    return Err(Failure::new(
                        ErrorKind::Busy,
                        format!("lease {id} is {state}; wait until that is done"),
                    ));
                }
            }
            self.refuse_if_held(&data.inventory, &lease)?;
            let resets =
                options.reset.then(|| resets(&data.inventory, &lease)).into_iter().flatten();
            let releasing = Lease {
                state: State::Releasing,
                backward: Recorded::todo(resets).into_iter().chain(lease.way_back()).collect(),
                ..lease
            };
            data.leases.insert(id.to_owned(), releasing.clone());
            releasing
        };
        let failures = transition::backward(&self.host, &self.ledger, &mut lease);
        let message = (!failures.is_empty()).then(|| all(&failures));
        info!(lease = id, tenant = lease.tenant, devices = ?lease.devices.keys(), "released");
        self.close(lease, &failures, message.as_deref());
        match message {
            None => Ok(()),
            Some(message) => Err(Failure::new(
                ErrorKind::Internal,
                format!("lease {id} has ended, but not everything is as it was: {message}"),
            )),
        }
    }

    /// Unbinding a device that a guest still holds would block in the kernel until it lets go.
    fn refuse_if_held(&self, inventory: &Inventory, lease: &Lease) -> Result<(), Failure> {
        let functions: Vec<&Arc<Function>> =
            lease.devices.keys().filter_map(|address| inventory.get(*address)).collect();
        let groups: BTreeSet<u32> = functions.iter().filter_map(|f| f.iommu_group).collect();
        for group in groups {
            let busy = matches!(vfio::group_viable(&self.host, group),
                Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::ResourceBusy);
            if busy {
                let devices: Vec<&str> =
                    functions.iter().filter_map(|f| f.vfio_device.as_deref()).collect();
                let holders = holders::of_group(&self.host, group, &devices).unwrap_or_default();
                let names: Vec<String> = holders.iter().map(ToString::to_string).collect();
                let who = if names.is_empty() { "a process".into() } else { names.join(", ") };
                return Err(Failure::new(
                    ErrorKind::Busy,
                    format!(
                        "lease {} is in use: {who} holds IOMMU group {group} open; shut the guest \
                         down and release again",
                        lease.id
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Files a lease whose way back was walked: forgotten if all went well, else kept as failed.
    fn close(&self, mut lease: Lease, failures: &[Stopped], reason: Option<&str>) {
        let (id, devices) = (lease.id.clone(), lease.devices.keys().copied().collect::<Vec<_>>());
        let state = if failures.is_empty() {
            if let Err(error) = self.ledger.remove(&id) {
                error!(lease = id, %error, "cannot remove the lease file");
            }
            self.data().leases.remove(&id);
            "released"
        } else {
            lease.state = State::Failed;
            lease.reason = reason.map(str::to_owned);
            if let Err(failure) = self.store(&lease) {
                error!(lease = id, %failure, "cannot record that the lease failed");
            }
            State::Failed.name()
        };
        self.refresh(devices);
        self.tell(Change::LeaseChanged { id, state, reason: reason.map(str::to_owned) });
    }

    fn dismiss(&self, data: &mut Data, lease: &Lease) -> Result<(), Failure> {
        self.ledger.remove(&lease.id).map_err(Stopped::from).map_err(internal)?;
        data.leases.remove(&lease.id);
        self.tell(Change::LeaseChanged { id: lease.id.clone(), state: "released", reason: None });
        Ok(())
    }

    fn store(&self, lease: &Lease) -> Result<(), Failure> {
        self.data().leases.insert(lease.id.clone(), lease.clone());
        self.ledger.write(lease).map_err(Stopped::from).map_err(internal)
    }

    /// Brings every lease found on start to a defined end: active ones stay if their devices are
    /// still what they were, all others are undone.
    pub fn recover(&self) {
        for lease in self.leases() {
            match lease.state {
                State::Failed => {}
                State::Active => {
                    if let Some(reason) = self.broken(&lease) {
                        self.fail(&lease.id, &reason);
                    }
                }
                State::Preparing | State::Releasing => {
                    let state = lease.state.name();
                    warn!(lease = lease.id, state, "a lease was interrupted and is undone");
                    let way = lease.way_back();
                    let mut lease = Lease { state: State::Releasing, ..lease };
                    if lease.backward.is_empty() {
                        lease.backward = way;
                    }
                    let failures = transition::backward(&self.host, &self.ledger, &mut lease);
                    let reason = format!("the daemon stopped while it was {state}");
                    self.close(lease, &failures, Some(&reason));
                }
            }
        }
    }

    /// Why an active lease no longer is what it says, if so.
    fn broken(&self, lease: &Lease) -> Option<String> {
        let inventory = self.inventory();
        lease.devices.iter().find_map(|(address, found)| match inventory.get(*address) {
            None => Some(format!("{address} was unplugged")),
            // On its way out, the kernel still has the function but nothing to say of it.
            Some(f) if f.ids.vendor.is_none() || f.is_silent() => {
                Some(format!("{address} was unplugged or stopped answering"))
            }
            Some(f) if Identity::of(f) != found.identity => {
                Some(format!("another device is at {address} now"))
            }
            Some(f) if !f.on_vfio() => Some(format!(
                "{address} was taken from VFIO by somebody else and is on {} now",
                f.driver.as_deref().unwrap_or("no driver")
            )),
            Some(_) => None,
        })
    }

    /// Ends a lease that lost a device: what is left of it goes back to the host.
    fn fail(&self, id: &str, reason: &str) {
        let mut lease = {
            let mut data = self.data();
            // A release may have begun since the device was looked at; it has the lease then.
            let Some(lease) = data.leases.get_mut(id).filter(|l| l.state == State::Active) else {
                return;
            };
            lease.state = State::Releasing;
            lease.clone()
        };
        warn!(lease = id, tenant = lease.tenant, reason, "a lease failed");
        self.refresh(lease.devices.keys().copied().collect::<Vec<_>>());
        let inventory = self.inventory();
        let ours = |device: PciAddress| {
            let now = inventory.get(device);
            now.is_some_and(|f| Identity::of(f) == lease.devices[&device].identity && f.on_vfio())
        };
        let way = lease.way_back().into_iter().filter(|r| r.step.device().is_some_and(ours));
        lease.backward = way.collect();
        let failures = transition::backward(&self.host, &self.ledger, &mut lease);
        lease.state = State::Failed;
        lease.reason = Some(match failures.as_slice() {
            [] => reason.to_owned(),
            failures => format!("{reason}; {}", all(failures)),
        });
        if let Err(failure) = self.store(&lease) {
            error!(lease = id, %failure, "cannot record that the lease failed");
        }
        self.refresh(lease.devices.keys().copied().collect::<Vec<_>>());
        self.tell(Change::LeaseChanged {
            id: id.to_owned(),
            state: State::Failed.name(),
            reason: lease.reason,
        });
    }

    /// Looks at functions the kernel reported a change of, and at what that means for leases.
    /// Takes a moment where a lease may be broken, so it is for the thread that follows events.
    pub fn notice(&self, addresses: impl IntoIterator<Item = PciAddress>) {
        let addresses: BTreeSet<PciAddress> = addresses.into_iter().collect();
        self.refresh(addresses.iter().copied());
        let concerned = |lease: &Lease| {
            lease.state == State::Active
                && lease.devices.keys().any(|device| addresses.contains(device))
        };
        let leases: Vec<Lease> = self.leases().into_iter().filter(concerned).collect();
        if leases.iter().any(|lease| self.broken(lease).is_some()) {
            // Unplugging takes a device from its driver first: what happened is clear soon after.
            std::thread::sleep(SETTLING);
            self.refresh(addresses.iter().copied());
        }
        for lease in leases {
            if let Some(reason) = self.broken(&lease) {
                self.fail(&lease.id, &reason);
            }
        }
    }

    /// Looks at the whole host again, after reports of changes were lost.
    pub fn resynchronise(&self) {
        let known = self.inventory();
        let now = self.host.sys("bus/pci/devices").list().unwrap_or_default();
        let now = now.iter().filter_map(|name| name.parse().ok());
        self.notice(known.functions().map(|f| f.address).chain(now).collect::<BTreeSet<_>>());
    }

    fn refresh(&self, addresses: impl IntoIterator<Item = PciAddress>) {
        for address in addresses {
            let change = {
                let mut data = self.data();
                let before = data.inventory.get(address).cloned();
                Arc::make_mut(&mut data.inventory).refresh(&self.host, address);
                let after = data.inventory.get(address);
                match (&before, after) {
                    (None, None) => None,
                    (None, Some(f)) => {
                        Some((Change::DeviceAdded(address), f.iommu_group.is_some()))
                    }
                    (Some(f), None) => {
                        Some((Change::DeviceRemoved(address), f.iommu_group.is_some()))
                    }
                    (Some(a), Some(b)) if a == b => None,
                    (Some(a), Some(b)) => {
                        Some((Change::DeviceChanged(address), a.iommu_group != b.iommu_group))
                    }
                }
            };
            if let Some((change, regrouped)) = change {
                self.tell(change);
                if regrouped {
                    self.tell(Change::GroupsChanged);
                }
            }
        }
    }

    /// `driver_override` changes silently, so whatever is about to be planned is read again.
    fn refresh_around(&self, request: &Request) -> Result<(), Error> {
        let inventory = self.inventory();
        let mut addresses: BTreeSet<PciAddress> = request.devices.iter().copied().collect();
        for device in &request.devices {
            addresses.extend(inventory.group_of(*device).into_iter().flat_map(|g| &g.members));
            addresses.extend(inventory.get(*device).and_then(|f| f.physical()));
        }
        drop(inventory);
        self.refresh(addresses);
        Arc::make_mut(&mut self.data().inventory).refresh_vfio(&self.host)
    }

    fn request(&self, names: &[String], options: &AttachOptions) -> Result<Request, Failure> {
        check_devices(names)?;
        let inventory = self.inventory();
        let devices: Result<BTreeSet<PciAddress>, Error> =
            names.iter().map(|name| inventory.resolve(name)).collect();
        Ok(Request {
            devices: devices?.into_iter().collect(),
            whole_group: options.whole_group,
            adopt: options.adopt,
        })
    }
}

fn plan_within(
    data: &Data,
    request: &Request,
    uses: Vec<protection::Use>,
) -> Result<Plan, Refusal> {
    let held = data.leases.values().filter(|lease| lease.state != State::Failed);
    let claims = held
        .flat_map(|lease| {
            let claim = Claim { lease: lease.id.clone(), tenant: lease.tenant.clone() };
            lease.devices.keys().map(move |device| (*device, claim.clone()))
        })
        .collect();
    plan::attach(&data.inventory, &Circumstances { claims, uses }, request)
}

fn new_lease(
    data: &Data,
    plan: &Plan,
    tenant: &str,
    options: &AttachOptions,
    owner: u32,
) -> Result<Lease, Failure> {
    let found = |(address, before): (&PciAddress, &_)| {
        let function = data.inventory.get(*address)?;
        Some((*address, Found { identity: Identity::of(function), before: Clone::clone(before) }))
    };
    Ok(Lease {
        id: new_id(&data.leases).map_err(internal)?,
        tenant: tenant.to_owned(),
        vm: options.vm.clone(),
        owner,
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        state: State::Preparing,
        reason: None,
        devices: plan.devices.iter().filter_map(found).collect(),
        forward: Recorded::todo(plan.steps.iter().cloned()),
        backward: Vec::new(),
    })
}

fn new_id(taken: &BTreeMap<String, Lease>) -> std::io::Result<String> {
    let mut random = File::open("/dev/urandom")?;
    loop {
        let mut bytes = [0u8; 4];
        random.read_exact(&mut bytes)?;
        let id = format!("{:08x}", u32::from_ne_bytes(bytes));
        if !taken.contains_key(&id) {
            return Ok(id);
        }
    }
}

/// Resets for those functions of a lease that can be reset by themselves.
fn resets(inventory: &Inventory, lease: &Lease) -> Vec<Step> {
    let alone = |f: &&Arc<Function>| f.reset_methods.iter().any(|m| m != "bus" && m != "cxl_bus");
    let functions = lease.devices.keys().filter_map(|address| inventory.get(*address));
    functions.filter(alone).map(|f| Step::Reset { device: f.address }).collect()
}

fn claims_by_device(leases: &BTreeMap<String, Lease>) -> BTreeMap<PciAddress, &Lease> {
    let holding = leases.values().filter(|lease| lease.state != State::Failed);
    holding.flat_map(|lease| lease.devices.keys().map(move |device| (*device, lease))).collect()
}

fn device_record(inventory: &Inventory, function: &Function, brief: bool) -> DeviceRecord {
    if brief {
        DeviceRecord::brief(inventory, function)
    } else {
        DeviceRecord::full(inventory, function)
    }
}

fn with_lease(record: DeviceRecord, lease: Option<&&Lease>) -> DeviceRecord {
    DeviceRecord {
        lease: lease.map(|l| l.id.clone()),
        tenant: lease.map(|l| l.tenant.clone()),
        lease_state: lease.map(|l| l.state.name().to_owned()),
        ..record
    }
}

fn group_record(data: &Data, number: u32) -> Option<GroupRecord> {
    let group = data.inventory.group(number)?;
    let holding = |lease: &&Lease| group.members.iter().any(|member| lease.holds(*member));
    let leases = data.leases.values().filter(holding).map(|lease| lease.id.clone()).collect();
    Some(GroupRecord { leases, ..GroupRecord::new(&data.inventory, group) })
}

fn all(failures: &[Stopped]) -> String {
    failures.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn internal(error: impl std::fmt::Display) -> Failure {
    Failure::new(ErrorKind::Internal, error.to_string())
}
