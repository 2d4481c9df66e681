//! Tells the bus of what changed: objects come and go, properties and the Manager's signals follow.
//! What changes of one function in quick succession is told once; all else in its order.

use std::collections::{BTreeMap, BTreeSet};

use libvfio::address::PciAddress;
use libvfio::client::{ROOT_PATH, device_path, group_path, lease_path};
use tokio::sync::mpsc::UnboundedReceiver;
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

/// Runs until the broker is gone.
pub(super) async fn run(
    connection: zbus::Connection,
    caller: Caller,
    mut changes: UnboundedReceiver<Change>,
) {
    let groups = members(&caller);
    let mut publisher = Publisher { connection, caller, groups, changed: BTreeMap::new() };
    while let Some(change) = changes.recv().await {
        publisher.take(change).await;
        while let Ok(change) = changes.try_recv() {
            publisher.take(change).await;
        }
        publisher.flush().await;
    }
}

type Groups = BTreeMap<u32, Vec<PciAddress>>;

fn members(caller: &Caller) -> Groups {
    let inventory = caller.broker.inventory();
    inventory.groups().map(|group| (group.number, group.members.clone())).collect()
}

struct Publisher {
    connection: zbus::Connection,
    caller: Caller,
    /// The groups that have an object, with the members that were told.
    groups: Groups,
    /// What changed of functions and was not told yet: changes in quick succession are one.
    changed: BTreeMap<PciAddress, BTreeSet<Property>>,
}

impl Publisher {
    async fn take(&mut self, change: Change) {
        // What happens to leases changes their devices too, which is told once for both.
        let gathers = matches!(
            change,
            Change::DeviceChanged(..) | Change::LeaseAdded(_) | Change::LeaseChanged { .. }
        );
        if !gathers {
            self.flush().await;
        }
        if let Err(error) = self.publish(change).await {
            warn!(%error, "a change could not be told on the bus");
        }
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
        let server = self.connection.object_server();
        let object: InterfaceRef<DeviceObject> = server.interface(device_path(address)).await?;
        let device = object.get().await;
        let values = properties.iter().map(|property| device.value(*property)).collect();
        let interface = DeviceObject::name();
        Properties::properties_changed(object.signal_emitter(), interface, values, [][..].into())
            .await?;
        self.manager().await?.device_changed(&address.to_string()).await
    }

    async fn publish(&mut self, change: Change) -> zbus::Result<()> {
        let server = self.connection.object_server();
        match change {
            Change::Barrier(done) => {
                // Whoever waited may have gone.
                let _ = done.send(());
            }
            Change::DeviceAdded(address) => {
                let object = DeviceObject::new(
                    self.caller.broker.clone(),
                    self.caller.devices.clone(),
                    address,
                );
                Objects::add(&self.connection, &device_path(address), object).await?;
                self.manager().await?.device_added(&address.to_string()).await?;
            }
            Change::DeviceRemoved(address) => {
                Objects::remove::<DeviceObject>(&self.connection, &device_path(address)).await?;
                self.manager().await?.device_removed(&address.to_string()).await?;
            }
            Change::DeviceChanged(address, properties) => {
                self.changed.entry(address).or_default().extend(properties);
            }
            Change::PolicyStep { pool, device, text } => {
                self.manager().await?.policy_step(&pool, &device.to_string(), &text).await?;
            }
            Change::GroupsChanged => self.regroup().await?,
            Change::LeaseAdded(id) => {
                let object = LeaseObject::new(self.caller.clone(), id.clone());
                Objects::add(&self.connection, &lease_path(&id), object).await?;
                self.manager().await?.lease_changed(&id, "active", "").await?;
            }
            Change::LeaseChanged { id, state, reason } => {
                let path = lease_path(&id);
                if self.caller.broker.lease(&id).is_none() {
                    Objects::remove::<LeaseObject>(&self.connection, &path).await?;
                } else {
                    // A lease that failed before it was active has no object yet.
                    let object = LeaseObject::new(self.caller.clone(), id.clone());
                    Objects::add(&self.connection, &path, object).await?;
                    let object: InterfaceRef<LeaseObject> = server.interface(path).await?;
                    let emitter = object.signal_emitter();
                    object.get().await.state_changed(emitter).await?;
                    object.get().await.reason_changed(emitter).await?;
                }
                let reason = reason.unwrap_or_default();
                self.manager().await?.lease_changed(&id, state, &reason).await?;
            }
        }
        Ok(())
    }

    async fn manager(&self) -> zbus::Result<InterfaceRef<ManagerObject>> {
        self.connection.object_server().interface(ROOT_PATH).await
    }

    async fn regroup(&mut self) -> zbus::Result<()> {
        let server = self.connection.object_server();
        let now = members(&self.caller);
        for gone in self.groups.keys().filter(|number| !now.contains_key(number)) {
            Objects::remove::<GroupObject>(&self.connection, &group_path(*gone)).await?;
        }
        for new in now.keys().filter(|number| !self.groups.contains_key(number)) {
            let object = GroupObject::new(self.caller.broker.clone(), *new);
            Objects::add(&self.connection, &group_path(*new), object).await?;
        }
        let other = |(number, members): &(&u32, &Vec<PciAddress>)| {
            self.groups.get(number).is_some_and(|told| told != *members)
        };
        for (kept, _) in now.iter().filter(other) {
            let object: InterfaceRef<GroupObject> = server.interface(group_path(*kept)).await?;
            object.get().await.members_changed(object.signal_emitter()).await?;
        }
        self.groups = now;
        Ok(())
    }
}
