//! `org.freedesktop.DBus.ObjectManager`: which objects there are, and which come and go. Those that
//! are there before the daemon has its name are announced to nobody, for nobody can know it yet.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use libvfio::client::{ROOT_PATH, device_path, group_path, lease_path};
use zbus::fdo::{self, ManagedObjects};
use zbus::names::{InterfaceName, OwnedInterfaceName};
use zbus::object_server::{Interface, InterfaceRef, SignalEmitter};
use zbus::wire::{ObjectPath, OwnedObjectPath, OwnedVariant};
use zbus::{Connection, ObjectServer};

use super::device::DeviceObject;
use super::group::GroupObject;
use super::lease::LeaseObject;
use crate::broker::Broker;

#[derive(Debug)]
pub(super) struct Objects {
    broker: Arc<Broker>,
}

/// An object's interface, and its properties.
type Described = HashMap<OwnedInterfaceName, HashMap<String, OwnedVariant>>;

impl Objects {
    pub(super) fn new(broker: Arc<Broker>) -> Self {
        Self { broker }
    }

    /// Says that an object has come, unless it has gone by now.
    pub(super) async fn added<I: Interface>(
        connection: &Connection,
        path: &str,
    ) -> zbus::Result<()> {
        let Ok((path, described)) = describe::<I>(connection.object_server(), path).await else {
            return Ok(());
        };
        let emitter = SignalEmitter::new(connection, ROOT_PATH)?;
        Self::interfaces_added(&emitter, path.into_inner(), described).await
    }

    /// Says that an object has gone.
    pub(super) async fn removed<I: Interface>(
        connection: &Connection,
        path: &str,
    ) -> zbus::Result<()> {
        let emitter = SignalEmitter::new(connection, ROOT_PATH)?;
        let interfaces = [I::name()];
        Self::interfaces_removed(&emitter, ObjectPath::try_from(path)?, Cow::from(&interfaces[..]))
            .await
    }
}

#[zbus::interface(name = "org.freedesktop.DBus.ObjectManager", introspection_docs = false)]
impl Objects {
    async fn get_managed_objects(
        &self,
        #[zbus(object_server)] server: &ObjectServer,
    ) -> fdo::Result<ManagedObjects> {
        let inventory = self.broker.inventory();
        let devices: Vec<String> = inventory.functions().map(|f| device_path(f.address)).collect();
        let groups: Vec<String> = inventory.groups().map(|g| group_path(g.number)).collect();
        let mut objects = ManagedObjects::new();
        // What has just come is announced when it has its object, and what has just gone likewise.
        for path in devices {
            objects.extend(describe::<DeviceObject>(server, &path).await.ok());
        }
        for path in groups {
            objects.extend(describe::<GroupObject>(server, &path).await.ok());
        }
        for lease in self.broker.leases() {
            objects.extend(describe::<LeaseObject>(server, &lease_path(&lease.id)).await.ok());
        }
        Ok(objects)
    }

    #[zbus(signal)]
    async fn interfaces_added(
        emitter: &SignalEmitter<'_>,
        object_path: ObjectPath<'_>,
        interfaces_and_properties: Described,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    async fn interfaces_removed(
        emitter: &SignalEmitter<'_>,
        object_path: ObjectPath<'_>,
        interfaces: Cow<'_, [InterfaceName<'_>]>,
    ) -> zbus::Result<()>;
}

/// What there is to say of an object.
async fn describe<I: Interface>(
    server: &ObjectServer,
    path: &str,
) -> zbus::Result<(OwnedObjectPath, Described)> {
    let object: InterfaceRef<I> = server.interface(path).await?;
    let emitter = object.signal_emitter();
    let properties =
        object.get().await.get_all(server, emitter.connection(), None, emitter).await?;
    let path = OwnedObjectPath::try_from(path)?;
    Ok((path, [(I::name().into(), properties)].into_iter().collect()))
}
