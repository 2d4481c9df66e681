//! Devices that are not trusted, by what makes each the same one after a reboot, a replug or a
//! renumbering. Touches its two files only; which functions are meant is decided on an inventory.
//!
//! The file is there twice, and every change is written to both: one spoilt file never makes a
//! device trusted again.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use libvfio::address::PciAddress;
use libvfio::client::QuarantineRecord;
use libvfio::inventory::Inventory;
use libvfio::pci::{Function, Identity, Ids};
use serde::{Deserialize, Serialize};

use crate::durable::{self, SetAside};
use crate::history::now;

/// The form of the file; a file of another form is set aside.
const FORM: u32 = 1;

/// A device that is not trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distrusted {
    /// Which one it is.
    pub identity: Identity,
    /// Where it was.
    pub address: PciAddress,
    /// Of a VF, its number among those of its PF.
    pub vf_index: Option<u16>,
    /// When that was decided, in seconds since 1970.
    pub since: u64,
    /// Why.
    pub reason: String,
    /// User id of who decided it; none for vfiod itself.
    pub by: Option<u32>,
    /// The tenant who may have it all the same: what is left in it is that tenant's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub but_for: Option<String>,
}

impl Distrusted {
    /// A function, from now on.
    pub fn new(inventory: &Inventory, function: &Function, reason: &str, by: Option<u32>) -> Self {
        Self {
            identity: Identity::of(function),
            address: function.address,
            vf_index: inventory.vf_index(function),
            since: now(),
            reason: reason.to_owned(),
            by,
            but_for: None,
        }
    }

    /// The function it means, if that is there: the one in its place, else one with its serial
    /// number in another.
    pub fn find<'a>(&self, inventory: &'a Inventory) -> Option<&'a Function> {
        let functions = || inventory.functions().map(AsRef::as_ref);
        let in_place = functions().find(|f| self.is(inventory, f) && self.is_in_place(f));
        in_place.or_else(|| functions().find(|f| self.is(inventory, f) && self.has_serial_of(f)))
    }

    /// Whether nothing that is known of a function says that it is another.
    fn is(&self, inventory: &Inventory, function: &Function) -> bool {
        let same_serial = || {
            let its = Identity::of(function);
            serial(&self.identity).zip(serial(&its)).is_none_or(|(ours, its)| ours == its)
        };
        ids(self.identity.ids) == ids(function.ids)
            && slot(self.address) == slot(function.address)
            && self.vf_index == inventory.vf_index(function)
            && same_serial()
    }

    fn has_serial_of(&self, function: &Function) -> bool {
        let ours = serial(&self.identity);
        ours.is_some() && ours == serial(&Identity::of(function))
    }

    /// Buses are numbered anew when a bridge comes or goes, so only the first of the path, which
    /// is on a root bus, is taken by its bus number.
    fn is_in_place(&self, function: &Function) -> bool {
        path(&self.identity.upstream, self.address) == path(&function.upstream, function.address)
    }

    /// What the bus is told of it.
    pub fn record(&self, inventory: &Inventory) -> QuarantineRecord {
        let there = self.find(inventory);
        let hex = |id: Option<u16>| id.map_or_else(|| "????".to_owned(), |id| format!("{id:04x}"));
        let Ids { vendor, device, .. } = self.identity.ids;
        QuarantineRecord {
            address: there.map_or(self.address, |f| f.address).to_string(),
            name: there.map_or_else(
                || format!("{}:{}", hex(vendor), hex(device)),
                |f| inventory.describe(f),
            ),
            since: self.since,
            reason: self.reason.clone(),
            by: self.by.map_or_else(|| "vfiod".to_owned(), |user| user.to_string()),
            present: there.is_some(),
            but_for: self.but_for.clone(),
        }
    }
}

/// What a device is, less what firmware or a device that does not answer changes of it.
fn ids(of: Ids) -> [Option<u16>; 4] {
    [of.vendor, of.device, of.subsystem_vendor, of.subsystem_device]
}

/// A serial number that tells devices apart: some have nothing but zeros or ones.
fn serial(identity: &Identity) -> Option<&str> {
    let serial = identity.serial.as_deref()?;
    let digits = || serial.chars().filter(char::is_ascii_hexdigit);
    (!digits().all(|c| c == '0') && !digits().all(|c| c == 'f')).then_some(serial)
}

/// Device and function number: functions of one device may have one serial number.
fn slot(address: PciAddress) -> (u8, u8) {
    (address.device(), address.function())
}

fn path(upstream: &[PciAddress], address: PciAddress) -> (PciAddress, Vec<(u8, u8)>) {
    let first = upstream.first().copied().unwrap_or(address);
    (first, upstream.iter().copied().map(slot).collect())
}

/// The functions that are not trusted, and why, but for what `tenant` may have all the same.
pub fn reasons(
    entries: &[Distrusted],
    inventory: &Inventory,
    tenant: Option<&str>,
) -> BTreeMap<PciAddress, String> {
    let keeps = |entry: &&Distrusted| entry.but_for.is_none() || entry.but_for.as_deref() != tenant;
    let found = |entry: &Distrusted| Some((entry.find(inventory)?.address, entry.reason.clone()));
    entries.iter().filter(keeps).filter_map(found).collect()
}

/// Why a function is not trusted, if so.
pub fn reason(
    entries: &[Distrusted],
    inventory: &Inventory,
    function: &Function,
) -> Option<String> {
    let means = |entry: &&Distrusted| {
        entry.is(inventory, function)
            && entry.find(inventory).is_some_and(|f| f.address == function.address)
    };
    entries.iter().rfind(means).map(|entry| entry.reason.clone())
}

/// The file of devices not trusted, twice.
#[derive(Debug)]
pub struct Quarantine {
    paths: [PathBuf; 2],
    /// The last writing failed.
    unwritten: bool,
}

#[derive(Serialize)]
struct Writing<'a> {
    form: u32,
    devices: &'a [Distrusted],
}

#[derive(Deserialize)]
struct Reading {
    form: u32,
    devices: Vec<Distrusted>,
}

/// What was found on disk.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The devices.
    pub devices: Vec<Distrusted>,
    /// What was not understood.
    pub aside: Vec<SetAside>,
    /// Something was not understood and nothing else had the devices: they are not known.
    pub lost: bool,
}

impl Quarantine {
    /// The quarantine in directory `dir`. Reads nothing yet.
    pub fn open(dir: &Path) -> Self {
        let paths = ["quarantine.json", "quarantine.json.copy"].map(|name| dir.join(name));
        Self { paths, unwritten: false }
    }

    /// Reads the devices. A file that is spoilt or missing is made good from the other.
    pub fn load(&mut self) -> Loaded {
        let mut loaded = Loaded::default();
        let mut found = None;
        for path in &self.paths {
            match read(path) {
                Ok(devices) => found = found.or(devices),
                Err(reason) => loaded.aside.push(durable::set_aside(path, reason)),
            }
        }
        loaded.lost = found.is_none() && !loaded.aside.is_empty();
        if let Some(devices) = found {
            if !loaded.aside.is_empty() {
                // Where it fails, the next change is written with it, or fails too and is told.
                let _ = self.write(&devices);
            }
            loaded.devices = devices;
        }
        loaded
    }

    /// Writes the devices. When this returns, a power loss finds them so.
    pub fn write(&mut self, devices: &[Distrusted]) -> io::Result<()> {
        let bytes = serde_json::to_vec(&Writing { form: FORM, devices })?;
        let written = self.paths.iter().try_for_each(|path| durable::replace(path, &bytes));
        self.unwritten = written.is_err();
        written
    }

    /// Whether the disk may not have what was last to be written.
    pub fn is_unwritten(&self) -> bool {
        self.unwritten
    }
}

fn read(path: &Path) -> Result<Option<Vec<Distrusted>>, String> {
    let Some(bytes) = durable::read(path).map_err(|e| e.to_string())? else { return Ok(None) };
    let Reading { form, devices } = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
    if form == FORM {
        Ok(Some(devices))
    } else {
        Err(format!("form {form}, this daemon reads {FORM}"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn distrusted(serial: Option<&str>) -> Distrusted {
        Distrusted {
            identity: Identity {
                ids: Ids { vendor: Some(0x10de), device: Some(0x2684), ..Ids::default() },
                upstream: vec!["00:01.0".parse().unwrap()],
                serial: serial.map(str::to_owned),
            },
            address: "01:00.0".parse().unwrap(),
            vf_index: None,
            since: 1,
            reason: "its firmware was changed".into(),
            by: Some(0),
            but_for: None,
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut quarantine = Quarantine::open(dir.path());
        let loaded = quarantine.load();
        assert!(loaded.devices.is_empty() && !loaded.lost);
        let devices = [distrusted(None), distrusted(Some("00-11"))];
        quarantine.write(&devices).unwrap();
        assert_eq!(quarantine.load().devices, devices);
        quarantine.write(&[]).unwrap();
        assert!(quarantine.load().devices.is_empty());
    }

    #[test]
    fn one_spoilt_or_missing_file_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut quarantine = Quarantine::open(dir.path());
        let devices = [distrusted(None)];
        quarantine.write(&devices).unwrap();
        let whole = fs::read(&quarantine.paths[0]).unwrap();
        for path in &quarantine.paths.clone() {
            for length in 0..whole.len() {
                fs::write(path, &whole[..length]).unwrap();
                assert!(read(path).is_err(), "{length} bytes");
            }
            let loaded = quarantine.load();
            assert_eq!(loaded.devices, devices);
            assert_eq!((loaded.aside.len(), loaded.lost), (1, false));
            assert_eq!(fs::read(path).unwrap(), whole, "it was not made good");
            fs::remove_file(path).unwrap();
            assert_eq!(quarantine.load().devices, devices);
            quarantine.write(&devices).unwrap();
        }
    }

    #[test]
    fn two_spoilt_files_are_said_to_be_lost() {
        let dir = tempfile::tempdir().unwrap();
        let mut quarantine = Quarantine::open(dir.path());
        for (path, text) in quarantine.paths.iter().zip(["", "{\"form\":2,\"devices\":[]}"]) {
            fs::write(path, text).unwrap();
        }
        let loaded = quarantine.load();
        assert!(loaded.lost && loaded.devices.is_empty());
        assert_eq!(loaded.aside.len(), 2);
        assert!(!quarantine.load().lost);
    }

    #[test]
    fn a_path_survives_renumbered_buses_and_nothing_else() {
        let at = |upstream: &[&str], address: &str| {
            let upstream: Vec<PciAddress> = upstream.iter().map(|a| a.parse().unwrap()).collect();
            path(&upstream, address.parse().unwrap())
        };
        let known = at(&["00:01.0", "01:02.0"], "02:00.0");
        assert_eq!(at(&["00:01.0", "05:02.0"], "06:00.0"), known);
        assert_ne!(at(&["00:01.0", "01:03.0"], "02:00.0"), known);
        assert_ne!(at(&["80:01.0", "01:02.0"], "02:00.0"), known);
        assert_ne!(at(&["00:02.0"], "02:00.0"), known);
        assert_ne!(at(&[], "02:00.0"), at(&[], "03:00.0"));
    }

    #[test]
    fn a_serial_number_of_zeros_or_ones_is_none() {
        for none in [None, Some("00-00-00"), Some("ff-ff-ff")] {
            assert_eq!(serial(&distrusted(none).identity), None);
        }
        assert_eq!(serial(&distrusted(Some("00-01")).identity), Some("00-01"));
    }
}
