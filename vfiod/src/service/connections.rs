//! Connections to the bus that leases are bound to. Talks to the bus daemon only.

use std::sync::Arc;

use futures_core::Stream;
use libvfio::client::Failure;
use libvfio::error::ErrorKind;
use tracing::warn;
use zbus::fdo::DBusProxy;
use zbus::message::Header;
use zbus::names::BusName;

use crate::broker::Broker;
use crate::lease::Bound;

/// Waits for connections to go.
#[derive(Debug)]
pub(super) struct Connections {
    connection: zbus::Connection,
    broker: Arc<Broker>,
}

impl Connections {
    pub(super) fn new(connection: zbus::Connection, broker: Arc<Broker>) -> Arc<Self> {
        Arc::new(Self { connection, broker })
    }

    /// What binds a lease to the connection that a call came over.
    pub(super) async fn bound(&self, header: &Header<'_>) -> Result<Bound, Failure> {
        let unknown = || {
            let why = "the bus does not say who calls, so nothing can be bound to that; call again";
            Failure::new(ErrorKind::InvalidArgument, why)
        };
        let name = header.sender().ok_or_else(unknown)?.to_string();
        let bus = self.bus().await.map_err(|_| unknown())?;
        Ok(Bound::Connection { name, bus })
    }

    /// Tells this bus from one before it, which gave the same names to others.
    async fn bus(&self) -> zbus::Result<String> {
        Ok(DBusProxy::new(&self.connection).await?.get_id().await?.to_string())
    }

    /// Watches all connections that leases found on start are bound to.
    pub(super) fn find(self: &Arc<Self>) {
        for lease in self.broker.leases() {
            if let Some(bound @ Bound::Connection { .. }) = lease.bound {
                self.watch(bound);
            }
        }
    }

    /// Ends the leases bound to a connection when it goes, at once if it has gone.
    pub(super) fn watch(self: &Arc<Self>, bound: Bound) {
        let connections = self.clone();
        tokio::spawn(async move {
            let Bound::Connection { name, bus } = &bound else { return };
            if let Err(error) = connections.wait(name, bus).await {
                warn!(%error, name, "a connection cannot be watched, which is taken as its end");
            }
            let broker = connections.broker.clone();
            tokio::task::spawn_blocking(move || broker.connection_gone(&bound));
        });
    }

    /// Returns when nobody has this unique name of this bus any more.
    async fn wait(&self, name: &str, of: &str) -> zbus::Result<()> {
        if self.bus().await? != of {
            return Ok(());
        }
        let bus = DBusProxy::new(&self.connection).await?;
        let changes = bus.receive_name_owner_changed_with_args(&[(0, name)]).await?;
        let mut changes = std::pin::pin!(changes);
        // Asked after subscribing, or it could go in between.
        while bus.name_has_owner(BusName::try_from(name)?).await? {
            if std::future::poll_fn(|context| changes.as_mut().poll_next(context)).await.is_none() {
                return Ok(());
            }
        }
        Ok(())
    }
}
