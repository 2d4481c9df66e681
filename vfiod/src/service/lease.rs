//! `org.vfiod1.Lease`: one lease's properties, and its end.

use std::collections::HashMap;
use std::sync::Arc;

use libvfio::client::Failure;
use zbus::OwnedFd;
use zbus::message::Header;

use super::{Caller, no_lease};
use crate::authority::Action;
use crate::broker::Broker;
use crate::lease::Lease;
use crate::request::{RawOptions, ReleaseOptions};

#[derive(Debug)]
pub(super) struct LeaseObject {
    caller: Caller,
    id: String,
}

impl LeaseObject {
    pub(super) fn new(caller: Caller, id: String) -> Self {
        Self { caller, id }
    }

    /// What there is to say of the lease, while it is one.
    fn say<T: Default>(&self, say: impl FnOnce(&Lease) -> T) -> T {
        self.caller.broker.of_lease(&self.id, say).unwrap_or_default()
    }

    /// Whoever made the lease may open its devices; of others only whom polkit lets.
    async fn may_open(&self, header: &Header<'_>) -> Result<(), Failure> {
        let lease = self.caller.broker.lease(&self.id).ok_or_else(|| no_lease(&self.id))?;
        let details = HashMap::from([("lease", self.id.as_str()), ("tenant", &lease.tenant)]);
        let authority = &self.caller.authority;
        authority.check_owner(header, lease.owner, Action::Open, &details).await.map(drop)
    }
}

#[zbus::interface(name = "org.vfiod1.Lease", introspection_docs = false)]
impl LeaseObject {
    async fn release(
        &self,
        #[zbus(header)] header: Header<'_>,
        options: RawOptions,
    ) -> Result<(), Failure> {
        let options = ReleaseOptions::read(&options)?;
        let ids = [self.id.clone()];
        self.caller.may_release(&header, &self.id, &ids, &options).await?;
        let end = move |broker: &Arc<Broker>, reply| {
            broker.release_on_this_thread(&ids, &options, &reply);
        };
        self.caller.start(end).await
    }

    #[zbus(out_args("descriptors"))]
    async fn open_devices(
        &self,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<Vec<(String, OwnedFd)>, Failure> {
        self.may_open(&header).await?;
        let id = self.id.clone();
        let opened = self.caller.run(move |broker| broker.open_devices(&id)).await?;
        Ok(opened.into_iter().map(|(name, descriptor)| (name, descriptor.into())).collect())
    }

    #[zbus(out_args("descriptor"))]
    async fn open_iommu(&self, #[zbus(header)] header: Header<'_>) -> Result<OwnedFd, Failure> {
        self.may_open(&header).await?;
        let id = self.id.clone();
        let opened = self.caller.run(move |broker| broker.open_iommu(&id)).await?;
        Ok(opened.into())
    }

    async fn lock_memory(
        &self,
        #[zbus(header)] header: Header<'_>,
        bytes: u64,
    ) -> Result<(), Failure> {
        self.may_open(&header).await?;
        let number = bytes.to_string();
        let details = HashMap::from([("lease", self.id.as_str()), ("bytes", number.as_str())]);
        let authority = &self.caller.authority;
        authority.check(&header, Action::LockMemory, &details).await?;
        let process = authority.process(&header).await?;
        let id = self.id.clone();
        self.caller.run(move |broker| broker.lock_memory(&id, process, bytes)).await
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> String {
        self.id.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn tenant(&self) -> String {
        self.say(|lease| lease.tenant.clone())
    }

    #[zbus(property(emits_changed_signal = "const"), name = "VM")]
    fn vm(&self) -> String {
        self.say(|lease| lease.vm.clone().unwrap_or_default())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn devices(&self) -> Vec<String> {
        self.say(|lease| lease.devices.keys().map(ToString::to_string).collect())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn mediated(&self) -> Vec<String> {
        self.say(|lease| lease.mediated.keys().map(ToString::to_string).collect())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn owner(&self) -> u32 {
        self.say(|lease| lease.owner)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn created(&self) -> u64 {
        self.say(|lease| lease.created)
    }

    #[zbus(property)]
    pub(super) fn state(&self) -> String {
        self.say(|lease| lease.state.name().to_owned())
    }

    #[zbus(property)]
    pub(super) fn reason(&self) -> String {
        self.say(|lease| lease.reason.clone().unwrap_or_default())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn bound(&self) -> String {
        self.say(|lease| lease.bound.as_ref().map(ToString::to_string).unwrap_or_default())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn interface(&self) -> String {
        self.say(|lease| lease.interface.map(|i| i.name().to_owned()).unwrap_or_default())
    }
}
