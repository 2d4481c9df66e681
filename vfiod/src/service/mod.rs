//! The bus's side of the daemon: objects, signals, and calls handed to threads that may block.
//! Decides nothing and touches no file of the host.

mod connections;
mod device;
mod group;
mod lease;
mod manager;
mod objects;
mod private;
mod publisher;
mod questions;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use libvfio::client::{BUS_NAME, Failure, ROOT_PATH, device_path, group_path, lease_path};
use libvfio::error::ErrorKind;
use nix::unistd::geteuid;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use zbus::connection::Builder;
use zbus::message::Header;

use crate::authority::{Action, Authority};
use crate::broker::{Broker, Change, Reply};
use crate::request::ReleaseOptions;

use connections::Connections;
use device::DeviceObject;
use group::GroupObject;
use lease::LeaseObject;
use manager::ManagerObject;
use objects::Objects;
use questions::Questions;

/// The daemon's objects on a connection.
#[derive(Debug)]
pub struct Service {
    connection: zbus::Connection,
    caller: Caller,
}

impl Service {
    /// Makes the connection with every object on it. The daemon's name is asked for later, so
    /// that nobody calls before all is there.
    pub async fn connect(
        builder: Builder<'_>,
        broker: &Arc<Broker>,
        changes: UnboundedSender<Change>,
    ) -> zbus::Result<Self> {
        let mut builder = builder;
        let callers = Arc::new(OnceLock::new());
        for device in broker.inventory().functions().map(|f| f.address) {
            let object = DeviceObject::new(broker.clone(), callers.clone(), device);
            builder = builder.serve_at(device_path(device), object);
        }
        for group in broker.inventory().groups().map(|group| group.number) {
            let object = GroupObject::new(broker.clone(), group);
            builder = builder.serve_at(group_path(group), object);
        }
        let connection = builder.build().await?;
        let owner = broker.simulated().map_or(0, |_| geteuid().as_raw());
        let authority = Arc::new(Authority::new(connection.clone(), owner));
        let connections = Connections::new(connection.clone(), broker.clone());
        let questions = Arc::new(Questions::default());
        let caller = Caller {
            broker: broker.clone(),
            authority,
            connections,
            questions,
            changes,
            devices: callers.clone(),
        };
        let _ = callers.set(caller.clone());
        let server = connection.object_server();
        for lease in broker.leases() {
            let object = LeaseObject::new(caller.clone(), lease.id.clone());
            server.at(lease_path(&lease.id), object).await?;
        }
        server.at(ROOT_PATH, ManagerObject::new(caller.clone())).await?;
        server.at(ROOT_PATH, Objects::new(broker.clone())).await?;
        Ok(Self { connection, caller })
    }

    /// Takes the daemon's name and tells of changes from then on.
    pub async fn serve(&self, changes: UnboundedReceiver<Change>) -> zbus::Result<()> {
        self.caller.connections.find();
        self.connection.request_name(BUS_NAME).await?;
        tokio::spawn(publisher::run(self.connection.clone(), self.caller.clone(), changes));
        Ok(())
    }

    /// Answers at a socket of the daemon's own too, which root alone may use.
    pub fn serve_privately(&self, path: &Path) -> io::Result<()> {
        let listener = private::listen(path)?;
        tokio::spawn(private::serve(listener, self.caller.clone()));
        Ok(())
    }

    /// Completes when the bus has gone.
    pub async fn closed(&self) {
        self.connection.closed().await;
    }
}

fn no_lease(id: &str) -> Failure {
    Failure::new(ErrorKind::NotFound, format!("there is no lease {id}"))
}

/// What an object needs to answer a call that takes a while.
#[derive(Debug, Clone)]
struct Caller {
    broker: Arc<Broker>,
    authority: Arc<Authority>,
    connections: Arc<Connections>,
    questions: Arc<Questions>,
    /// Where the objects of devices find it.
    devices: Arc<OnceLock<Caller>>,
    changes: UnboundedSender<Change>,
}

impl Caller {
    /// Whoever made all of these leases may end them, others only if polkit lets them. So may
    /// nobody else leave their devices as the tenant leaves them, for that is the next one's risk.
    async fn may_release(
        &self,
        header: &Header<'_>,
        target: &str,
        leases: &[String],
        options: &ReleaseOptions,
    ) -> Result<(), Failure> {
        let user = self.authority.user(header).await?;
        let others =
            |id: &String| self.broker.of_lease(id, |lease| lease.owner != user) == Some(true);
        if !options.no_reset && !leases.iter().any(others) {
            return Ok(());
        }
        let details = HashMap::from([("target", target)]);
        self.authority.check(header, Action::Release, &details).await.map(drop)
    }

    /// As [`run`](Self::run), for what anyone may ask, in its turn.
    async fn ask<T: Send + 'static>(
        &self,
        header: &Header<'_>,
        work: impl FnOnce(&Arc<Broker>) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let _turn = self.questions.turn(header).await;
        self.run(work).await
    }

    /// Runs `work` where it may block, then waits until objects are as it left things, so that a
    /// caller finds those its reply names.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Broker>) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        self.start(move |broker, reply| reply.give(work(broker))).await
    }

    /// As [`run`](Self::run), for work that may go on after its answer.
    async fn start<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Broker>, Reply<T>) + Send + 'static,
    ) -> Result<T, Failure> {
        let broker = self.broker.clone();
        let (tell, answer) = tokio::sync::oneshot::channel();
        let reply = Reply::new(move |given| {
            // Whoever asked may have gone.
            let _ = tell.send(given);
        });
        tokio::task::spawn_blocking(move || work(&broker, reply));
        let result = answer.await.unwrap_or_else(|_| {
            let why = "a fault of vfiod: see its journal";
            Err(Failure::new(ErrorKind::Internal, why))
        });
        let (done, told) = tokio::sync::oneshot::channel();
        if self.changes.send(Change::Barrier(done)).is_ok() {
            // A publisher that has ended has nothing more to tell.
            let _ = told.await;
        }
        result
    }
}
