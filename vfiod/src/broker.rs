//! The one owner of assignment: inventory, leases and what may be done with them. Knows nothing
//! of the bus; tells of changes through a channel. Its methods read the host and run steps, so
//! they block: the service calls them from threads that may.

mod leasing;
mod watching;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libvfio::address::PciAddress;
use libvfio::client::{DeviceRecord, Failure, GroupRecord, PlanRecord};
use libvfio::error::{Error, ErrorKind};
use libvfio::host::HostRoot;
use libvfio::inventory::Inventory;
use libvfio::pci::Function;
use libvfio::plan::{self, Circumstances, Claim, Plan, Refusal, Request};
use libvfio::protection;
use tokio::sync::mpsc::UnboundedSender;
use tracing::error;

use crate::lease::{Lease, State};
use crate::ledger::Ledger;
use crate::request::{AttachOptions, check_devices};

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
    /// Groups came, went or changed their members.
    GroupsChanged,
    /// Everything before this was told; used to order replies after signals.
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

impl Data {
    /// The lease that holds a function.
    fn holder(&self, address: PciAddress) -> Option<&Lease> {
        self.leases.values().find(|lease| lease.holds(address))
    }
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

    /// The name of the simulated host, if this is one.
    pub fn simulated(&self) -> Option<String> {
        self.host.simulated()
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
            .map(|f| {
                with_lease(
                    device_record(&data.inventory, f, brief),
                    claims.get(&f.address).copied(),
                )
            })
            .collect()
    }

    /// One function's record.
    pub fn device(&self, address: PciAddress) -> Option<DeviceRecord> {
        let data = self.data();
        let record = device_record(&data.inventory, data.inventory.get(address)?, false);
        Some(with_lease(record, data.holder(address)))
    }

    /// The id of the lease that holds a function.
    pub fn holder(&self, address: PciAddress) -> Option<String> {
        self.data().holder(address).map(|lease| lease.id.clone())
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
        let uses = protection::uses(&self.host, &self.refresh_around(&request)?)?;
        let data = self.data();
        let planned = plan_within(&data, &request, uses);
        let mut groups: Vec<u32> =
            request.devices.iter().filter_map(|d| data.inventory.get(*d)?.iommu_group).collect();
        groups.sort_unstable();
        groups.dedup();
        let groups = groups.into_iter().filter_map(|number| group_record(&data, number)).collect();
        Ok(PlanRecord { groups, ..PlanRecord::new(&planned) })
    }

    /// `driver_override` changes silently, so whatever is about to be planned is read again.
    /// Answers those of them on a host driver: only they can be of use to the host.
    fn refresh_around(&self, request: &Request) -> Result<BTreeSet<PciAddress>, Error> {
        let inventory = self.inventory();
        let mut addresses: BTreeSet<PciAddress> = request.devices.iter().copied().collect();
        for device in &request.devices {
            addresses.extend(inventory.group_of(*device).into_iter().flat_map(|g| &g.members));
            addresses.extend(inventory.get(*device).and_then(|f| f.physical()));
        }
        drop(inventory);
        self.refresh(addresses.iter().copied());
        let mut data = self.data();
        Arc::make_mut(&mut data.inventory).refresh_vfio(&self.host)?;
        let of_use = |address: &PciAddress| {
            data.inventory.get(*address).is_some_and(|f| f.driver.is_some() && !f.on_vfio())
        };
        Ok(addresses.into_iter().filter(of_use).collect())
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
    let claim = |(device, lease): (PciAddress, &Lease)| {
        (device, Claim { lease: lease.id.clone(), tenant: lease.tenant.clone() })
    };
    let claims = claims_by_device(&data.leases).into_iter().map(claim).collect();
    plan::attach(&data.inventory, &Circumstances { claims, uses }, request)
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

fn with_lease(record: DeviceRecord, lease: Option<&Lease>) -> DeviceRecord {
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

fn internal(error: impl std::fmt::Display) -> Failure {
    Failure::new(ErrorKind::Internal, error.to_string())
}
