//! Mediated devices: what there can be, what there is and whose it is. Reads the host, changes
//! nothing: they are made and taken away by their leases' steps.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use libvfio::client::{Failure, MediatedDeviceRecord, MediatedRecord, MediatedTypeRecord};
use libvfio::error::{Error, ErrorKind};
use libvfio::mediated::{self, Device, TypeName, Types, Uuid};
use libvfio::plan::Request;

use super::{Broker, Data};
use crate::lease::{Lease, State};

/// What was found of mediated devices around a request.
#[derive(Default)]
pub(super) struct Parts {
    /// Those there are.
    pub(super) devices: BTreeMap<Uuid, Device>,
    /// What can be made into some, with the types of what was asked for.
    pub(super) parents: BTreeMap<String, Types>,
}

impl Broker {
    /// What mediated devices there can be, and which there are.
    pub fn list_mediated(&self) -> Result<MediatedRecord, Failure> {
        let mut record = MediatedRecord::default();
        for parent in mediated::parents(self.host())? {
            let types = mediated::types(self.host(), &parent)?;
            let types = types.iter().map(|(kind, t)| MediatedTypeRecord::new(&parent, kind, t));
            record.types.extend(types);
        }
        let devices = mediated::devices(self.host())?;
        let data = self.data();
        record.devices.extend(devices.iter().map(|(uuid, device)| {
            let lease = data.holder_of_mediated(*uuid);
            MediatedDeviceRecord {
                lease: lease.map(|lease| lease.id.clone()),
                tenant: lease.map(|lease| lease.tenant.clone()),
                lease_state: lease.map(|lease| lease.state.name().to_owned()),
                ..MediatedDeviceRecord::new(*uuid, device)
            }
        }));
        Ok(record)
    }

    /// Looks at what a request for mediated devices, or for what may be their parents, depends on.
    pub(super) fn look_at_mediated(&self, request: &Request) -> Result<Parts, Error> {
        let devices = mediated::devices(self.host())?;
        let mut parents = BTreeMap::new();
        if !request.mediated.is_empty() {
            let names = mediated::parents(self.host())?;
            parents.extend(names.into_iter().map(|name| (name, Types::new())));
        }
        let asked: BTreeSet<&String> = request.mediated.values().map(|of| &of.parent).collect();
        for (parent, types) in parents.iter_mut().filter(|(name, _)| asked.contains(name)) {
            *types = mediated::types(self.host(), parent)?;
        }
        Ok(Parts { devices, parents })
    }

    /// The mediated device of an active lease that somebody else has removed, if so.
    pub(super) fn lost_mediated(&self, lease: &Lease) -> Option<Uuid> {
        let lost = |uuid: &&Uuid| Device::read(self.host(), **uuid).is_none();
        lease.mediated.keys().find(lost).copied()
    }

    /// The mediated devices of a lease that are there.
    pub(super) fn mediated_of(&self, lease: &Lease) -> Vec<(Uuid, Device)> {
        let found = |uuid: &Uuid| Some((*uuid, Device::read(self.host(), *uuid)?));
        lease.mediated.keys().filter_map(found).collect()
    }

    /// Looks at mediated devices the kernel reported a change of, and at what that means for leases.
    pub fn notice_mediated(self: &Arc<Self>, uuids: &BTreeSet<Uuid>) {
        for lease in self.leases() {
            if lease.mediated.keys().any(|uuid| uuids.contains(uuid)) {
                self.judge(&lease.id);
            }
        }
    }
}

impl Data {
    /// The lease that holds a mediated device.
    fn holder_of_mediated(&self, uuid: Uuid) -> Option<&Lease> {
        let holds =
            |lease: &&Lease| lease.state != State::Failed && lease.mediated.contains_key(&uuid);
        self.leases.values().find(holds)
    }

    /// Those there are, and those that leases have claimed and may be about to make.
    pub(super) fn with_claimed(
        &self,
        mut devices: BTreeMap<Uuid, Device>,
    ) -> BTreeMap<Uuid, Device> {
        for lease in self.leases.values().filter(|lease| lease.state != State::Failed) {
            for (uuid, of) in &lease.mediated {
                let claimed = || Device { of: of.clone(), iommu_group: None, vfio_device: None };
                devices.entry(*uuid).or_insert_with(claimed);
            }
        }
        devices
    }
}

/// Parts the names of a request: those of functions, and those of kinds of mediated devices, each
/// of which is to be made under a name of its own.
pub(super) fn parted(
    names: &[String],
) -> Result<(Vec<&String>, BTreeMap<Uuid, TypeName>), Failure> {
    let (kinds, functions): (Vec<_>, Vec<_>) = names.iter().partition(|name| name.contains('/'));
    let invalid =
        |e: mediated::InvalidTypeName| Failure::new(ErrorKind::InvalidArgument, e.to_string());
    let part = |kind: &String| Ok((Uuid::new_v4(), kind.parse().map_err(invalid)?));
    Ok((functions, kinds.into_iter().map(part).collect::<Result<_, Failure>>()?))
}
