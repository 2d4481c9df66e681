//! Tells the bus of what changed. Objects come and go first, then whoever waits for an answer has it,
//! then the signals follow: objects, properties, and the Manager's. What changes of one function in
//! quick succession is told once; all else in its order.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use libvfio::address::PciAddress;
use libvfio::client::{ROOT_PATH, device_path, group_path, lease_path};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, timeout_at};
use tracing::warn;
use zbus::fdo::Properties;
use zbus::object_server::{Interface, InterfaceRef};

use super::Caller;
use super::device::DeviceObject;
use super::group::GroupObject;
use super::lease::LeaseObject;
use super::manager::{ManagerObject, ManagerObjectSignals};
use super::objects::Objects;
use crate::broker::{Change, Property};

/// How long the bus is told nothing after a change: to tell it takes longer than what somebody still
/// waits for, and changes in quick succession are one.
const GATHERING: Duration = Duration::from_millis(10);
/// So many changes are told at once, however quickly they come.
const MOST_UNTOLD: usize = 64;

/// Runs until the broker is gone.
pub(super) async fn run(
    connection: zbus::Connection,
    caller: Caller,
    mut changes: UnboundedReceiver<Change>,
) {
    let groups = members(&caller);
    let mut publisher =
        Publisher { connection, caller, groups, news: Vec::new(), changed: BTreeMap::new() };
    loop {
        // While it told of some, others may have come.
        if publisher.news.is_empty() {
            let Some(change) = changes.recv().await else { return };
            publisher.place(change).await;
        }
        let until = Instant::now() + GATHERING;
        while !publisher.news.is_empty() && publisher.news.len() < MOST_UNTOLD {
            match timeout_at(until, changes.recv()).await {
                Ok(Some(change)) => publisher.place(change).await,
                Ok(None) | Err(_) => break,
            }
        }
        publisher.tell(&mut changes).await;
    }
}

type Groups = BTreeMap<u32, Vec<PciAddress>>;

fn members(caller: &Caller) -> Groups {
    let inventory = caller.broker.inventory();
    inventory.groups().map(|group| (group.number, group.members.clone())).collect()
}

/// What is to be said on the bus, now that the objects are as it says.
enum News {
    DeviceAdded(PciAddress),
    DeviceChanged(PciAddress, Vec<Property>),
    DeviceRemoved(PciAddress),
    GroupAdded(u32),
    GroupChanged(u32),
    GroupRemoved(u32),
    /// Of a lease that is new to the bus, or not.
    Lease {
        id: String,
        is_new: bool,
        state: &'static str,
        reason: Option<String>,
    },
    LeaseEnded {
        id: String,
        state: &'static str,
        reason: Option<String>,
    },
    PolicyStep {
        pool: String,
        device: PciAddress,
        text: String,
    },
}

struct Publisher {
    connection: zbus::Connection,
    caller: Caller,
    /// The groups that have an object, with the members that were told.
    groups: Groups,
    /// What was not told yet.
    news: Vec<News>,
    /// What changed of functions and was not told yet: changes in quick succession are one.
    changed: BTreeMap<PciAddress, BTreeSet<Property>>,
}

impl Publisher {
    /// Has the objects come and go that a change is about, for whoever learns of it first.
    async fn place(&mut self, change: Change) {
        if let Err(error) = self.try_place(change).await {
            warn!(%error, "an object could not be put on the bus, or taken from it");
        }
    }

    async fn try_place(&mut self, change: Change) -> zbus::Result<()> {
        let server = self.connection.object_server();
        let news = match change {
            Change::Barrier(done) => {
                // Whoever waited may have gone.
                let _ = done.send(());
                return Ok(());
            }
            Change::DeviceAdded(address) => {
                let object = DeviceObject::new(
                    self.caller.broker.clone(),
                    self.caller.devices.clone(),
                    address,
                );
                server.at(device_path(address), object).await?;
                News::DeviceAdded(address)
            }
            Change::DeviceRemoved(address) => {
                server.remove::<DeviceObject, _>(device_path(address)).await?;
                News::DeviceRemoved(address)
            }
            Change::DeviceChanged(address, properties) => News::DeviceChanged(address, properties),
            Change::PolicyStep { pool, device, text } => News::PolicyStep { pool, device, text },
            Change::GroupsChanged => return self.regroup().await,
            Change::LeaseChanged { id, state, reason }
                if self.caller.broker.of_lease(&id, |_| ()).is_none() =>
            {
                server.remove::<LeaseObject, _>(lease_path(&id)).await?;
                News::LeaseEnded { id, state, reason }
            }
            // One that failed before it was active has no object yet.
            Change::LeaseChanged { id, state, reason } => {
                let is_new = self.place_lease(&id).await?;
                News::Lease { id, is_new, state, reason }
            }
            Change::LeaseAdded(id) => {
                let is_new = self.place_lease(&id).await?;
                News::Lease { id, is_new, state: "active", reason: None }
            }
        };
        self.news.push(news);
        Ok(())
    }

    /// Gives a lease its object; whether it had none.
    async fn place_lease(&self, id: &str) -> zbus::Result<bool> {
        let object = LeaseObject::new(self.caller.clone(), id.to_owned());
        Ok(self.connection.object_server().at(lease_path(id), object).await?.is_none())
    }

    async fn regroup(&mut self) -> zbus::Result<()> {
        let server = self.connection.object_server();
        let now = members(&self.caller);
        for gone in self.groups.keys().filter(|number| !now.contains_key(number)) {
            server.remove::<GroupObject, _>(group_path(*gone)).await?;
            self.news.push(News::GroupRemoved(*gone));
        }
        for (number, members) in &now {
            match self.groups.get(number) {
                None => {
                    let object = GroupObject::new(self.caller.broker.clone(), *number);
                    server.at(group_path(*number), object).await?;
                    self.news.push(News::GroupAdded(*number));
                }
                Some(told) if told != members => self.news.push(News::GroupChanged(*number)),
                Some(_) => {}
            }
        }
        self.groups = now;
        Ok(())
    }

    /// Tells all there is to be told. Whoever waits meanwhile for what comes after it does not wait for
    /// all of that.
    async fn tell(&mut self, changes: &mut UnboundedReceiver<Change>) {
        for news in std::mem::take(&mut self.news) {
            // What happens to leases changes their devices too, which is told once for both.
            if !matches!(
                news,
                News::DeviceChanged(..) | News::Lease { .. } | News::LeaseEnded { .. }
            ) {
                self.flush().await;
            }
            if let Err(error) = self.publish(news).await {
                warn!(%error, "a change could not be told on the bus");
            }
            while let Ok(change) = changes.try_recv() {
                self.place(change).await;
            }
        }
        self.flush().await;
    }

    async fn flush(&mut self) {
        for (address, properties) in std::mem::take(&mut self.changed) {
            if let Err(error) = self.publish_device(address, &properties).await {
                warn!(%error, %address, "a device's change could not be told on the bus");
            }
        }
    }

    async fn publish_device(
        &self,
        address: PciAddress,
        properties: &BTreeSet<Property>,
    ) -> zbus::Result<()> {
        let Some(object) = self.object::<DeviceObject>(device_path(address)).await else {
            return Ok(());
        };
        let device = object.get().await;
        let values = properties.iter().map(|property| device.value(*property)).collect();
        let interface = DeviceObject::name();
        Properties::properties_changed(object.signal_emitter(), interface, values, [][..].into())
            .await?;
        self.manager().await?.device_changed(&address.to_string()).await
    }

    async fn publish(&mut self, news: News) -> zbus::Result<()> {
        match news {
            News::DeviceAdded(address) => {
                Objects::added::<DeviceObject>(&self.connection, &device_path(address)).await?;
                self.manager().await?.device_added(&address.to_string()).await
            }
            News::DeviceChanged(address, properties) => {
                self.changed.entry(address).or_default().extend(properties);
                Ok(())
            }
            News::DeviceRemoved(address) => {
                Objects::removed::<DeviceObject>(&self.connection, &device_path(address)).await?;
                self.manager().await?.device_removed(&address.to_string()).await
            }
            News::GroupAdded(number) => {
                Objects::added::<GroupObject>(&self.connection, &group_path(number)).await
            }
            News::GroupChanged(number) => {
                let Some(group) = self.object::<GroupObject>(group_path(number)).await else {
                    return Ok(());
                };
                group.get().await.members_changed(group.signal_emitter()).await
            }
            News::GroupRemoved(number) => {
                Objects::removed::<GroupObject>(&self.connection, &group_path(number)).await
            }
            News::Lease { id, is_new, state, reason } => {
                let path = lease_path(&id);
                if is_new {
                    Objects::added::<LeaseObject>(&self.connection, &path).await?;
                } else if let Some(lease) = self.object::<LeaseObject>(path).await {
                    let emitter = lease.signal_emitter();
                    lease.get().await.state_changed(emitter).await?;
                    lease.get().await.reason_changed(emitter).await?;
                }
                let reason = reason.unwrap_or_default();
                self.manager().await?.lease_changed(&id, state, &reason).await
            }
            News::LeaseEnded { id, state, reason } => {
                Objects::removed::<LeaseObject>(&self.connection, &lease_path(&id)).await?;
                let reason = reason.unwrap_or_default();
                self.manager().await?.lease_changed(&id, state, &reason).await
            }
            News::PolicyStep { pool, device, text } => {
                self.manager().await?.policy_step(&pool, &device.to_string(), &text).await
            }
        }
    }

    /// An object, unless it has gone since there was something to say of it.
    async fn object<I: Interface>(&self, path: String) -> Option<InterfaceRef<I>> {
        self.connection.object_server().interface(path).await.ok()
    }

    async fn manager(&self) -> zbus::Result<InterfaceRef<ManagerObject>> {
        self.connection.object_server().interface(ROOT_PATH).await
    }
}
