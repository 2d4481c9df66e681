//! `org.vfiod1.Manager`: the calls. `docs/dbus.md` describes them.

use std::collections::HashMap;
use std::sync::Arc;

use libvfio::client::{
    CheckedRecord, DeviceRecord, Failure, GroupRecord, HistoryRecord, HoldersRecord, LeaseRecord,
    MediatedRecord, PlanRecord, PolicyRecord, QuarantineRecord, SettingRecord, device_path,
    lease_path,
};
use libvfio::error::{Error, ErrorKind};
use libvfio::inventory::Inventory;
use zbus::ObjectServer;
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::wire::OwnedObjectPath;

use super::lease::LeaseObject;
use super::{Caller, no_lease};
use crate::authority::Action;
use crate::broker::{Asker, Broker, Pools};
use crate::history::Entry;
use crate::lease::Lease;
use crate::request::{
    ApplyOptions, AttachOptions, HistoryOptions, ListOptions, RawOptions, ReleaseOptions,
    check_name, check_no_options, check_reason,
};

#[derive(Debug)]
pub(super) struct ManagerObject {
    caller: Caller,
    simulated: String,
}

impl ManagerObject {
    pub(super) fn new(caller: Caller) -> Self {
        let simulated = caller.broker.simulated().unwrap_or_default();
        Self { caller, simulated }
    }

    async fn may_quarantine(&self, header: &Header<'_>, device: &str) -> Result<u32, Failure> {
        check_name("device", device)?;
        let details = HashMap::from([("device", device)]);
        self.caller.authority.check(header, Action::Quarantine, &details).await
    }
}

#[zbus::interface(name = "org.vfiod1.Manager", introspection_docs = false)]
impl ManagerObject {
    #[zbus(out_args("lease", "path"))]
    async fn attach(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(object_server)] server: &ObjectServer,
        devices: Vec<String>,
        tenant: String,
        options: RawOptions,
    ) -> Result<(String, OwnedObjectPath), Failure> {
        check_name("tenant", &tenant)?;
        let options = AttachOptions::read(&options)?;
        let authority = &self.caller.authority;
        let (user, is_root) = authority.caller(&header).await?;
        let (names, wanted) = (devices.clone(), options.clone());
        let of = move |broker: &Arc<Broker>| {
            Ok((broker.pools_naming(user), broker.pools_of(&names, &wanted)))
        };
        // Root may have all, and nobody is asked about that.
        let (naming, pools) = if is_root { <_>::default() } else { self.caller.run(of).await? };
        let listed = devices.join(" ");
        let in_pools = pools.iter().map(String::as_str).collect::<Vec<_>>().join(" ");
        let details = HashMap::from([
            ("tenant", tenant.as_str()),
            ("devices", listed.as_str()),
            ("pool", in_pools.trim()),
        ]);
        // Whoever is named by all of the devices' pools needs nobody else's consent, unless a site's
        // rules say otherwise.
        let from_pools = !pools.is_empty() && pools.is_subset(&naming);
        let action = if from_pools { Action::AttachFromPool } else { Action::Attach };
        authority.check(&header, action, &details).await?;
        let may = if is_root { Pools::All } else { Pools::Named(naming) };
        if options.allow_protected {
            authority.check(&header, Action::OverrideProtection, &details).await?;
        }
        let connections = &self.caller.connections;
        let connection = if options.while_connected {
            authority.on_bus()?;
            Some(connections.bound(&header).await?)
        } else {
            None
        };
        let asker = Asker { user, pools: may, connection: connection.clone() };
        let attach = move |broker: &Arc<Broker>, reply| {
            broker.attach_on_this_thread(&devices, &tenant, &options, asker, &reply);
        };
        let lease = self.caller.start(attach).await?;
        if let Some(bound) = connection {
            connections.watch(bound);
        }
        let path = path(lease_path(&lease.id))?;
        // Whoever has a connection of its own finds the lease there.
        if authority.on_bus().is_err() {
            let object = LeaseObject::new(self.caller.clone(), lease.id.clone());
            server.at(&path, object).await.map_err(Failure::from)?;
        }
        Ok((lease.id, path))
    }

    #[zbus(out_args("leases"))]
    async fn release(
        &self,
        #[zbus(header)] header: Header<'_>,
        target: String,
        options: RawOptions,
    ) -> Result<Vec<String>, Failure> {
        check_name("target", &target)?;
        let options = ReleaseOptions::read(&options)?;
        tell_apart(&self.caller.broker, &target)?;
        let leases = self.caller.broker.named(&target);
        self.caller.may_release(&header, &target, &leases, &options).await?;
        // Not what the name means by now, for that may be another's.
        let ended = leases.clone();
        let end = move |broker: &Arc<Broker>, reply| {
            broker.release_on_this_thread(&leases, &options, &reply);
        };
        self.caller.start(end).await.map(|()| ended)
    }

    #[zbus(out_args("plan"))]
    async fn plan(
        &self,
        #[zbus(header)] header: Header<'_>,
        devices: Vec<String>,
        options: RawOptions,
    ) -> Result<PlanRecord, Failure> {
        let options = AttachOptions::read(&options)?;
        let user = self.caller.authority.user(&header).await?;
        self.caller.ask(&header, move |broker| broker.plan(&devices, &options, user)).await
    }

    #[zbus(out_args("plan"))]
    async fn explain(
        &self,
        #[zbus(header)] header: Header<'_>,
        device: String,
    ) -> Result<PlanRecord, Failure> {
        let options = AttachOptions::default();
        self.caller.ask(&header, move |broker| broker.plan(&[device], &options, 0)).await
    }

    #[zbus(out_args("holders"))]
    async fn holders(
        &self,
        #[zbus(header)] header: Header<'_>,
        device: String,
    ) -> Result<HoldersRecord, Failure> {
        self.caller.ask(&header, move |broker| broker.holders(&device)).await
    }

    #[zbus(out_args("settings"))]
    async fn list_settings(
        &self,
        #[zbus(header)] header: Header<'_>,
        device: String,
    ) -> Result<Vec<SettingRecord>, Failure> {
        self.caller.ask(&header, move |broker| broker.settings(&device)).await
    }

    #[zbus(out_args("devices"))]
    #[allow(clippy::needless_pass_by_value)] // What comes from the bus is owned.
    fn list_devices(&self, options: RawOptions) -> Result<Vec<DeviceRecord>, Failure> {
        Ok(self.caller.broker.list_devices(ListOptions::read(&options)?.brief))
    }

    #[zbus(out_args("groups"))]
    fn list_groups(&self) -> Vec<GroupRecord> {
        self.caller.broker.list_groups()
    }

    #[zbus(out_args("mediated"))]
    async fn list_mediated(
        &self,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<MediatedRecord, Failure> {
        self.caller.ask(&header, |broker| broker.list_mediated()).await
    }

    #[zbus(out_args("leases"))]
    fn list_leases(&self) -> Vec<LeaseRecord> {
        self.caller.broker.leases().iter().map(Lease::record).collect()
    }

    #[zbus(out_args("lease"))]
    fn describe_lease(&self, id: &str) -> Result<LeaseRecord, Failure> {
        check_name("lease", id)?;
        self.caller.broker.of_lease(id, Lease::record).ok_or_else(|| no_lease(id))
    }

    #[zbus(out_args("devices"))]
    fn list_quarantine(&self) -> Vec<QuarantineRecord> {
        self.caller.broker.quarantines()
    }

    #[zbus(out_args("address"))]
    async fn quarantine(
        &self,
        #[zbus(header)] header: Header<'_>,
        device: String,
        reason: String,
    ) -> Result<String, Failure> {
        check_reason(&reason)?;
        let by = self.may_quarantine(&header, &device).await?;
        let address = self.caller.run(move |broker| broker.quarantine(&device, &reason, by));
        Ok(address.await?.to_string())
    }

    #[zbus(out_args("cleared"))]
    async fn clear_quarantine(
        &self,
        #[zbus(header)] header: Header<'_>,
        device: String,
    ) -> Result<bool, Failure> {
        let by = self.may_quarantine(&header, &device).await?;
        self.caller.run(move |broker| broker.clear_quarantine(&device, by)).await
    }

    #[zbus(out_args("address"))]
    async fn heal(
        &self,
        #[zbus(header)] header: Header<'_>,
        device: String,
    ) -> Result<String, Failure> {
        let by = self.may_quarantine(&header, &device).await?;
        let heal = move |broker: &Arc<Broker>| broker.heal(&device, by);
        Ok(self.caller.run(heal).await?.to_string())
    }

    #[zbus(out_args("entries"))]
    async fn list_history(
        &self,
        #[zbus(header)] header: Header<'_>,
        options: RawOptions,
    ) -> Result<Vec<HistoryRecord>, Failure> {
        let options = HistoryOptions::read(&options)?;
        let entries = self.caller.ask(&header, move |broker| broker.history(&options)).await?;
        Ok(entries.iter().map(Entry::record).collect())
    }

    #[zbus(out_args("checked"))]
    async fn check_history(
        &self,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<CheckedRecord, Failure> {
        self.caller.ask(&header, |broker| broker.check_history()).await
    }

    #[zbus(out_args("policy"))]
    async fn plan_policy(
        &self,
        #[zbus(header)] header: Header<'_>,
        options: RawOptions,
    ) -> Result<PolicyRecord, Failure> {
        check_no_options(&options)?;
        self.caller.ask(&header, |broker| broker.plan_policy()).await
    }

    #[zbus(out_args("policy"))]
    async fn apply_policy(
        &self,
        #[zbus(header)] header: Header<'_>,
        options: RawOptions,
    ) -> Result<PolicyRecord, Failure> {
        let options = ApplyOptions::read(&options)?;
        let authority = &self.caller.authority;
        let user = authority.check(&header, Action::Policy, &HashMap::new()).await?;
        self.caller.run(move |broker| broker.apply_policy(&options, user)).await
    }

    #[zbus(out_args("policy"))]
    async fn reload_policy(
        &self,
        #[zbus(header)] header: Header<'_>,
        options: RawOptions,
    ) -> Result<PolicyRecord, Failure> {
        check_no_options(&options)?;
        self.caller.authority.check(&header, Action::Policy, &HashMap::new()).await?;
        self.caller.run(|broker| broker.reload_policy()).await
    }

    #[zbus(out_args("policy"))]
    async fn boot_report(
        &self,
        #[zbus(header)] header: Header<'_>,
        options: RawOptions,
    ) -> Result<PolicyRecord, Failure> {
        check_no_options(&options)?;
        self.caller.ask(&header, |broker| broker.boot_report()).await
    }

    #[zbus(out_args("device"))]
    fn describe_device(&self, name: &str) -> Result<DeviceRecord, Failure> {
        let address = self.caller.broker.resolve(name).map_err(Failure::from)?;
        let gone = || Error::NotFound { name: name.to_owned(), nearest: None };
        self.caller.broker.device(address).ok_or_else(gone).map_err(Failure::from)
    }

    #[zbus(out_args("path"))]
    fn get_device(&self, name: &str) -> Result<OwnedObjectPath, Failure> {
        let address = self.caller.broker.resolve(name).map_err(Failure::from)?;
        path(device_path(address))
    }

    #[zbus(signal)]
    pub(super) async fn lease_changed(
        emitter: &SignalEmitter<'_>,
        lease: &str,
        state: &str,
        reason: &str,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    pub(super) async fn device_added(
        emitter: &SignalEmitter<'_>,
        address: &str,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    pub(super) async fn device_changed(
        emitter: &SignalEmitter<'_>,
        address: &str,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    pub(super) async fn device_removed(
        emitter: &SignalEmitter<'_>,
        address: &str,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    pub(super) async fn policy_step(
        emitter: &SignalEmitter<'_>,
        pool: &str,
        device: &str,
        text: &str,
    ) -> zbus::Result<()>;

    #[zbus(property(emits_changed_signal = "const"))]
    #[allow(clippy::unused_self)] // The bus asks the object.
    fn version(&self) -> &'static str {
        env!("CARGO_PKG_VERSION")
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn simulated(&self) -> &str {
        &self.simulated
    }
}

fn path(text: String) -> Result<OwnedObjectPath, Failure> {
    OwnedObjectPath::try_from(text)
        .map_err(|e| Failure::new(ErrorKind::Internal, format!("a fault of vfiod: {e}")))
}

/// Refuses a name that several devices have, of which some are leased: none is chosen for whoever
/// wants a lease to end.
fn tell_apart(broker: &Broker, name: &str) -> Result<(), Failure> {
    if !Inventory::is_kind(name) {
        return Ok(());
    }
    let (inventory, leases) = (broker.inventory(), broker.leases());
    let functions = inventory.answering(name)?;
    let has_one = |lease: &Lease| functions.iter().any(|f| lease.devices.contains_key(&f.address));
    let named = leases.iter().any(|lease| lease.vm.as_deref() == Some(name));
    if functions.len() > 1 && !named && leases.iter().any(has_one) {
        inventory.resolve(name)?;
    }
    Ok(())
}
