//! Leases on disk: one file each, replaced whole, so that a crash leaves the old or the new one, and
//! the record before the newest beside it, should a full or failing disk spoil that. Touches its own
//! directory only. Kernel state dies at reboot, so the directory is in `/run`.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use libvfio::address::PciAddress;
use serde::{Deserialize, Serialize};

use crate::boot::BootReport;
use crate::crash;
use crate::durable;
pub use crate::durable::SetAside;
use crate::lease::Lease;

/// The form of the files; a file of another form is set aside.
const FORM: u32 = 1;
/// Extension of a lease's newest record.
const NEWEST: &str = "json";
/// Extension of the record before it.
const BEFORE: &str = "old";
/// The file of physical functions whose autoprobe is off.
const AUTOPROBE: &str = "autoprobe-off";
/// The file of what applying the policy came to at boot.
const BOOT: &str = "boot-report";
/// Extension of the file that is locked while a lease moves.
const LOCK: &str = "lock";

/// The directory of lease files.
#[derive(Debug, Clone)]
pub struct Ledger {
    dir: PathBuf,
}

#[derive(Serialize)]
struct Writing<'a> {
    form: u32,
    lease: &'a Lease,
}

#[derive(Deserialize)]
struct Reading {
    form: u32,
    lease: Lease,
}

/// What a ledger held.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The leases, oldest first.
    pub leases: Vec<Lease>,
    /// Ids of those whose newest record is lost: they are as they were one write before.
    pub behind: BTreeSet<String>,
    /// What was not understood.
    pub aside: Vec<SetAside>,
}

impl Ledger {
    /// The ledger in `dir`, which is made if need be, for root alone.
    pub fn open(dir: impl Into<PathBuf>) -> io::Result<Self> {
        let dir = dir.into();
        durable::directory(&dir)?;
        Ok(Self { dir })
    }

    /// Writes a lease as it is now. When this returns, a crash finds it so.
    pub fn write(&self, lease: &Lease) -> io::Result<()> {
        let bytes = record(lease)?;
        let id = lease.id.as_ref();
        durable::replace_keeping(&self.file(id, NEWEST), &self.file(id, BEFORE), &bytes)
    }

    /// Physical functions whose `sriov_drivers_autoprobe` the daemon has turned off. None where that
    /// cannot be read: then it stays off.
    pub fn autoprobe_off(&self) -> BTreeSet<PciAddress> {
        let bytes = durable::read(&self.dir.join(AUTOPROBE)).ok().flatten().unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    /// Records which these are.
    pub fn write_autoprobe_off(&self, functions: &BTreeSet<PciAddress>) -> io::Result<()> {
        durable::replace(&self.dir.join(AUTOPROBE), &serde_json::to_vec(functions)?)
    }

    /// What applying the policy came to when the host booted, if it was applied then.
    pub fn boot_report(&self) -> io::Result<Option<BootReport>> {
        let bytes = durable::read(&self.dir.join(BOOT))?;
        Ok(bytes.map(|bytes| serde_json::from_slice(&bytes)).transpose()?)
    }

    /// Records what it came to.
    pub fn write_boot_report(&self, report: &BootReport) -> io::Result<()> {
        durable::replace(&self.dir.join(BOOT), &serde_json::to_vec(report)?)
    }

    /// The lock of a lease, once nobody has it: the workers of a daemon before this one hold it
    /// until the step they are at is done. Blocks; it is given up when all its copies are closed.
    pub fn lock(&self, id: &str) -> io::Result<File> {
        let file = self.lock_file(id)?;
        file.lock()?;
        Ok(file)
    }

    /// Like [`lock`](Self::lock), but `None` if somebody has it.
    pub fn try_lock(&self, id: &str) -> io::Result<Option<File>> {
        let file = self.lock_file(id)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn lock_file(&self, id: &str) -> io::Result<File> {
        let path = self.file(id.as_ref(), LOCK);
        File::options().create(true).truncate(false).write(true).open(path)
    }

    /// Forgets a lease that has ended.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        // The newest record last, for without it the one before would be taken for the lease.
        let ends = [LOCK, BEFORE, NEWEST].map(|kind| {
            crash::point("before a file of a lease is removed");
            gone(&self.file(id.as_ref(), kind))
        });
        crash::point("after a lease's record was removed");
        ends.into_iter().collect()
    }

    /// Reads all leases. What is not a lease is set aside, never in the way.
    pub fn load(&self) -> io::Result<Loaded> {
        let mut loaded = Loaded::default();
        for stem in self.stems()? {
            self.load_one(&stem, &mut loaded);
        }
        loaded.leases.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        Ok(loaded)
    }

    /// Names of the lease files without their extensions. Removes drafts: one whose writing was
    /// interrupted never was the lease.
    fn stems(&self) -> io::Result<BTreeSet<OsString>> {
        let mut stems = BTreeSet::new();
        for entry in fs::read_dir(&self.dir)?.flatten() {
            let path = entry.path();
            match path.extension().and_then(OsStr::to_str) {
                Some(NEWEST | BEFORE) => stems.extend(path.file_stem().map(OsStr::to_owned)),
                Some("new") => {
                    // What cannot be removed is no lease all the same.
                    let _ = fs::remove_file(&path);
                }
                _ => {}
            }
        }
        Ok(stems)
    }

    fn load_one(&self, stem: &OsStr, loaded: &mut Loaded) {
        for kind in [NEWEST, BEFORE] {
            let path = self.file(stem, kind);
            match read(&path, stem) {
                Ok(Some(lease)) => {
                    if kind == BEFORE {
                        loaded.behind.insert(lease.id.clone());
                    }
                    loaded.leases.push(lease);
                    return;
                }
                Ok(None) => {}
                Err(reason) => loaded.aside.push(durable::set_aside(&path, reason)),
            }
        }
    }

    fn file(&self, stem: &OsStr, extension: &str) -> PathBuf {
        let mut name = stem.to_owned();
        name.push(".");
        name.push(extension);
        self.dir.join(name)
    }
}

fn gone(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// What is in a lease's file.
pub fn record(lease: &Lease) -> serde_json::Result<Vec<u8>> {
    serde_json::to_vec(&Writing { form: FORM, lease })
}

/// The lease that a file holds, or why it holds none.
pub fn parse(record: &[u8]) -> Result<Lease, String> {
    let Reading { form, lease } = serde_json::from_slice(record).map_err(|e| e.to_string())?;
    if form != FORM {
        return Err(format!("form {form}, this daemon reads {FORM}"));
    }
    Ok(lease)
}

fn read(path: &Path, stem: &OsStr) -> Result<Option<Lease>, String> {
    let Some(bytes) = durable::read(path).map_err(|e| e.to_string())? else { return Ok(None) };
    let lease = parse(&bytes)?;
    if stem != OsStr::new(&lease.id) {
        return Err(format!("it holds lease '{}'", lease.id));
    }
    Ok(Some(lease))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::State;

    fn lease(id: &str, created: u64) -> Lease {
        Lease {
            id: id.to_owned(),
            tenant: "alice".to_owned(),
            vm: None,
            owner: 0,
            created,
            state: State::Active,
            reason: None,
            failure: None,
            bound: None,
            task: None,
            skipped: crate::lease::Skipped::default(),
            care: std::collections::BTreeMap::new(),
            interface: None,
            devices: std::collections::BTreeMap::new(),
            mediated: std::collections::BTreeMap::new(),
            forward: Vec::new(),
            backward: Vec::new(),
        }
    }

    fn ids(loaded: &Loaded) -> Vec<&str> {
        loaded.leases.iter().map(|lease| lease.id.as_str()).collect()
    }

    #[test]
    fn what_is_written_is_read_oldest_first_and_removed_once() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path().join("leases")).unwrap();
        let (old, new) = (lease("00000002", 1), lease("00000001", 2));
        ledger.write(&new).unwrap();
        ledger.write(&new).unwrap();
        ledger.write(&old).unwrap();
        let loaded = ledger.load().unwrap();
        assert_eq!(loaded.leases, [old, new]);
        assert!(loaded.aside.is_empty() && loaded.behind.is_empty());
        ledger.remove("00000001").unwrap();
        ledger.remove("00000001").unwrap();
        assert_eq!(ids(&ledger.load().unwrap()), ["00000002"]);
    }

    #[test]
    fn what_is_no_lease_is_set_aside_and_never_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.write(&lease("0000000a", 1)).unwrap();
        let whole = fs::read_to_string(dir.path().join("0000000a.json")).unwrap();
        let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        put("0000000b.json", &whole);
        put("0000000c.json", &whole[..whole.len() / 2]);
        put("0000000d.json", "");
        put("0000000e.json", &whole.replace("\"form\":1", "\"form\":2"));
        put("0000000f.new", &whole);
        put("00000010.json", "\u{0}\u{0}\u{0}");
        put("00000011.old", "[]");
        put("README", "not ours");
        fs::create_dir(dir.path().join("00000012.json")).unwrap();
        fs::create_dir(dir.path().join("00000013.new")).unwrap();
        let loaded = ledger.load().unwrap();
        assert_eq!((ids(&loaded), loaded.aside.len()), (vec!["0000000a"], 7));
        let again = ledger.load().unwrap();
        assert_eq!((ids(&again), again.aside.len()), (vec!["0000000a"], 0));
        assert!(dir.path().join("0000000c.json.unreadable").exists());
        assert!(!dir.path().join("0000000f.new").exists());
        assert!(dir.path().join("README").exists());
    }

    #[test]
    fn links_are_set_aside_and_never_followed() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let elsewhere = Ledger::open(outside.path()).unwrap();
        elsewhere.write(&lease("0000000a", 1)).unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        for kind in ["json", "old", "new"] {
            let link = dir.path().join("0000000a").with_extension(kind);
            std::os::unix::fs::symlink(outside.path().join("0000000a.json"), link).unwrap();
        }
        let loaded = ledger.load().unwrap();
        assert!(loaded.leases.is_empty());
        assert_eq!(loaded.aside.len(), 2);
        assert_eq!(ids(&elsewhere.load().unwrap()), ["0000000a"]);
    }

    #[test]
    fn wherever_the_newest_record_ends_the_one_before_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        let before = Lease { state: State::Preparing, ..lease("0000000a", 1) };
        let path = dir.path().join("0000000a.json");
        ledger.write(&before).unwrap();
        ledger.write(&lease("0000000a", 1)).unwrap();
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let loaded = ledger.load().unwrap();
            assert_eq!(loaded.leases, std::slice::from_ref(&before), "{length} bytes");
            assert!(loaded.behind.contains("0000000a") && loaded.aside.len() == 1);
        }
        for byte in 0..=u8::MAX {
            fs::write(&path, vec![byte; whole.len()]).unwrap();
            assert_eq!(ledger.load().unwrap().leases, std::slice::from_ref(&before), "{byte}");
        }
        // Set aside each time, so now it is lost: as after a crash between two renames.
        let loaded = ledger.load().unwrap();
        assert!(loaded.behind.contains("0000000a") && loaded.aside.is_empty());
        ledger.write(&loaded.leases[0]).unwrap();
        assert!(ledger.load().unwrap().behind.is_empty());
        ledger.remove("0000000a").unwrap();
        assert!(ledger.load().unwrap().leases.is_empty());
    }

    #[test]
    fn a_lease_whose_records_are_both_spoilt_is_set_aside_whole() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.write(&lease("0000000a", 1)).unwrap();
        ledger.write(&lease("0000000a", 1)).unwrap();
        for name in ["0000000a.json", "0000000a.old"] {
            fs::write(dir.path().join(name), "{\"form\":1,").unwrap();
        }
        let loaded = ledger.load().unwrap();
        assert!(loaded.leases.is_empty() && loaded.behind.is_empty());
        assert_eq!(loaded.aside.len(), 2);
    }
}
