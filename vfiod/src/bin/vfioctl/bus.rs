//! One connection to the bus, on which vfiod is asked. Asks only what a command needs: no
//! introspection, no property cache.

use std::os::unix::net::UnixStream;

use libvfio::client::{BUS_NAME, ManagerProxy, PRIVATE_SOCKET};
use libvfio::error::ErrorKind;
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use zbus::connection::Builder;
use zbus::proxy::CacheProperties;
use zbus::wire::{DynamicType, Structure, Type};
use zbus::{Connection, Message};

use crate::json;
use crate::table::DIM;
use crate::trouble::Trouble;

/// The bus, and vfiod on it.
#[derive(Debug)]
pub(crate) struct Bus {
    pub(crate) manager: ManagerProxy<'static>,
    /// Whether it is no bus, but the socket of the host's own daemon.
    private: bool,
}

impl Bus {
    /// Connects to the bus at `address`, or to the system's. Does not ask vfiod anything yet.
    pub(crate) async fn connect(address: Option<&str>) -> Result<Self, Trouble> {
        let connection = match address {
            Some(address) => Builder::address(address),
            None => Builder::system(),
        };
        Self::on(connection.build().await.map_err(|error| Trouble::no_bus(&error))?, false).await
    }

    /// As [`connect`](Self::connect), or for root straight to the system's daemon if it runs: for
    /// what only calls the Manager.
    pub(crate) async fn shortest(address: Option<&str>) -> Result<Self, Trouble> {
        // Only root can make the socket, so whoever answers there is no stranger.
        if address.is_none()
            && geteuid().is_root()
            && let Ok(stream) = UnixStream::connect(PRIVATE_SOCKET)
            && let Ok(connection) = Builder::unix_stream(stream).p2p().build().await
        {
            return Self::on(connection, true).await;
        }
        Self::connect(address).await
    }

    async fn on(connection: Connection, private: bool) -> Result<Self, Trouble> {
        let manager = ManagerProxy::builder(&connection)
            .destination(BUS_NAME)
            .cache_properties(CacheProperties::No)
            .build()
            .await?;
        Ok(Self { manager, private })
    }

    pub(crate) fn connection(&self) -> &Connection {
        self.manager.inner().connection()
    }

    /// Says on standard error if the devices shown are no real ones, which are served on a bus alone.
    pub(crate) async fn note_simulation(&self) {
        if self.private {
            return;
        }
        // A daemon that does not know the property is older than simulations.
        let name = self.manager.simulated().await.unwrap_or_default();
        if !name.is_empty() {
            anstream::eprintln!("{DIM}simulated host '{name}': no real devices{DIM:#}");
        }
    }

    /// Calls a method of the Manager that changes nothing.
    pub(crate) async fn ask<B: Serialize + DynamicType>(
        &self,
        method: &'static str,
        arguments: &B,
    ) -> Result<Reply, Trouble> {
        Ok(Reply(self.manager.inner().call_method(method, arguments).await?))
    }
}

/// What vfiod answered: records for people's tables, or whatever it is as JSON.
#[derive(Debug)]
pub(crate) struct Reply(pub(crate) Message);

impl Reply {
    pub(crate) fn read<T: for<'de> Deserialize<'de> + Type>(&self) -> Result<T, Trouble> {
        Ok(self.0.body().deserialize()?)
    }

    pub(crate) fn json(&self) -> Result<Value, Trouble> {
        let body = self.0.body();
        let arguments: Structure<'_> = body.deserialize()?;
        Ok(json::from_body(&arguments))
    }

    /// Records that `keep` accepts, each as JSON.
    pub(crate) fn json_of<T: for<'de> Deserialize<'de> + Type>(
        &self,
        keep: impl Fn(&T) -> bool,
    ) -> Result<Vec<Value>, Trouble> {
        let Value::Array(values) = self.json()? else {
            return Err(Trouble::new(ErrorKind::Internal, "vfiod answered with no list"));
        };
        let records: Vec<T> = self.read()?;
        let pairs = values.into_iter().zip(&records);
        Ok(pairs.filter(|(_, record)| keep(record)).map(|(value, _)| value).collect())
    }
}
