//! Leases on disk: two files each, whose records are written in turns and numbered, so that whatever
//! becomes of the newest, by a crash or a full or failing disk, the one before is there. Touches its
//! own directory only. Kernel state dies at reboot, so the directory is in `/run`.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libvfio::address::PciAddress;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::boot::BootReport;
use crate::crash;
use crate::durable;
pub use crate::durable::SetAside;
use crate::lease::Lease;

/// The form of the files; a file of another form is set aside.
const FORM: u32 = 2;
/// Extensions of a lease's two files: where its even records are, and where its odd ones.
const FILES: [&str; 2] = ["even", "odd"];
/// Bytes that most records fit in.
const MOSTLY: usize = 2 << 10;
/// The file of physical functions whose autoprobe is off.
const AUTOPROBE: &str = "autoprobe-off";
/// The file of what applying the policy came to at boot.
const BOOT: &str = "boot-report";

/// The directory of lease files.
#[derive(Debug, Clone)]
pub struct Ledger {
    dir: PathBuf,
    on_disk: bool,
    /// The number of each lease's newest record.
    newest: Arc<Mutex<BTreeMap<String, u64>>>,
}

/// A lease's files. Its lock is held for as long as a copy of them is open anywhere, if it was taken.
#[derive(Debug)]
pub struct Files([File; 2]);

#[derive(Serialize)]
struct Writing<'a> {
    form: u32,
    number: u64,
    lease: &'a Lease,
}

#[derive(Deserialize)]
struct Reading {
    form: u32,
    number: u64,
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
        let on_disk = durable::is_on_disk(&File::open(&dir)?);
        Ok(Self { dir, on_disk, newest: Arc::default() })
    }

    /// Writes a lease as it is now. When this returns, a crash finds it so.
    pub fn write(&self, lease: &Lease) -> io::Result<()> {
        self.write_to(&self.files(&lease.id)?, lease)
    }

    /// The same, to files that are open.
    pub fn write_to(&self, Files(files): &Files, lease: &Lease) -> io::Result<()> {
        crash::point("before a record is written");
        let before = self.newest().get(&lease.id).copied();
        let number = before.map_or(0, |before| before + 1);
        let bytes = record(number, lease)?;
        let place = usize::from(number % 2 == 1);
        if before.is_none() {
            self.put(&files[1 - place], &bytes)?;
            crash::point("after the first record's spare was written");
        }
        self.put(&files[place], &bytes)?;
        self.newest().insert(lease.id.clone(), number);
        crash::point("after a record was written");
        Ok(())
    }

    fn put(&self, file: &File, bytes: &[u8]) -> io::Result<()> {
        file.set_len(0)?;
        crash::point("while a record is written");
        let written = file.write_all_at(bytes, 0);
        if written.is_err() {
            // On a full file system half a record only takes room from the next one.
            let _ = file.set_len(0);
        }
        written.and_then(|()| if self.on_disk { file.sync_data() } else { Ok(()) })
    }

    fn newest(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// The files of a lease, locked, once nobody else has them so: the workers of a daemon before this
    /// one do until the step they are at is done. Blocks.
    pub fn lock(&self, id: &str) -> io::Result<Files> {
        let files = self.files(id)?;
        files.lock_on().lock()?;
        Ok(files)
    }

    /// Like [`lock`](Self::lock), but `None` if somebody has it.
    pub fn try_lock(&self, id: &str) -> io::Result<Option<Files>> {
        let files = self.files(id)?;
        match files.lock_on().try_lock() {
            Ok(()) => Ok(Some(files)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Opens a lease's files, and makes those that are not there.
    fn files(&self, id: &str) -> io::Result<Files> {
        let open = |extension| {
            File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .custom_flags(OFlag::O_NOFOLLOW.bits())
                .open(self.file(id.as_ref(), extension))
        };
        let files = Files([open(FILES[0])?, open(FILES[1])?]);
        if self.on_disk && !self.newest().contains_key(id) {
            File::open(&self.dir)?.sync_data()?;
        }
        Ok(files)
    }

    /// Forgets a lease that has ended.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        let newest = self.newest().remove(id).unwrap_or_default();
        // The newest record last, for without it the one before would be taken for the lease.
        let ends = [newest + 1, newest].map(|number| {
            crash::point("before a file of a lease is removed");
            gone(&self.file(id.as_ref(), FILES[usize::from(number % 2 == 1)]))
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

    /// Names of the lease files without their extensions.
    fn stems(&self) -> io::Result<BTreeSet<OsString>> {
        let mut stems = BTreeSet::new();
        for entry in fs::read_dir(&self.dir)?.flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|kind| FILES.iter().any(|file| kind == *file)) {
                stems.extend(path.file_stem().map(OsStr::to_owned));
            }
        }
        Ok(stems)
    }

    fn load_one(&self, stem: &OsStr, loaded: &mut Loaded) {
        let mut records = Vec::new();
        let mut aside = Vec::new();
        for kind in FILES {
            let path = self.file(stem, kind);
            match read(&path, stem) {
                Ok(record) => records.extend(record),
                Err(reason) => aside.push(durable::set_aside(&path, reason)),
            }
        }
        let is_behind = records.len() < FILES.len();
        match records.into_iter().max_by_key(|record| record.number) {
            Some(Reading { number, lease, .. }) => {
                if is_behind {
                    loaded.behind.insert(lease.id.clone());
                }
                self.newest().insert(lease.id.clone(), number);
                loaded.leases.push(lease);
            }
            // Without a record it never was a lease.
            None if aside.is_empty() => {
                for kind in FILES {
                    // What cannot be removed is no lease all the same.
                    let _ = gone(&self.file(stem, kind));
                }
            }
            None => {}
        }
        loaded.aside.extend(aside);
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

impl Files {
    /// What is locked of them.
    pub fn lock_on(&self) -> &File {
        &self.0[0]
    }
}

/// What is in a lease's file.
pub fn record(number: u64, lease: &Lease) -> serde_json::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(MOSTLY);
    serde_json::to_writer(&mut bytes, &Writing { form: FORM, number, lease })?;
    Ok(bytes)
}

/// The lease that a file holds, or why it holds none.
pub fn parse(record: &[u8]) -> Result<Lease, String> {
    Ok(parsed(record)?.lease)
}

fn parsed(record: &[u8]) -> Result<Reading, String> {
    let reading: Reading = serde_json::from_slice(record).map_err(|e| e.to_string())?;
    if reading.form != FORM {
        return Err(format!("form {}, this daemon reads {FORM}", reading.form));
    }
    Ok(reading)
}

/// The record in a file; none in one that is empty, for it was being written.
fn read(path: &Path, stem: &OsStr) -> Result<Option<Reading>, String> {
    let bytes = durable::read(path).map_err(|e| e.to_string())?;
    let Some(bytes) = bytes.filter(|bytes| !bytes.is_empty()) else { return Ok(None) };
    let reading = parsed(&bytes)?;
    if stem != OsStr::new(&reading.lease.id) {
        return Err(format!("it holds lease '{}'", reading.lease.id));
    }
    Ok(Some(reading))
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
            care: BTreeMap::new(),
            interface: None,
            devices: BTreeMap::new(),
            mediated: BTreeMap::new(),
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
        let whole = fs::read_to_string(dir.path().join("0000000a.even")).unwrap();
        let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        put("0000000b.even", &whole);
        put("0000000c.odd", &whole[..whole.len() / 2]);
        put("0000000d.even", "");
        put("0000000e.odd", &whole.replace("\"form\":2", "\"form\":1"));
        put("00000010.even", "\u{0}\u{0}\u{0}");
        put("00000011.odd", "[]");
        put("README", "not ours");
        fs::create_dir(dir.path().join("00000012.even")).unwrap();
        let loaded = ledger.load().unwrap();
        assert_eq!((ids(&loaded), loaded.aside.len()), (vec!["0000000a"], 6));
        let again = ledger.load().unwrap();
        assert_eq!((ids(&again), again.aside.len()), (vec!["0000000a"], 0));
        assert!(dir.path().join("0000000c.odd.unreadable").exists());
        assert!(!dir.path().join("0000000d.even").exists());
        assert!(dir.path().join("README").exists());
    }

    #[test]
    fn links_are_set_aside_and_never_followed() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let elsewhere = Ledger::open(outside.path()).unwrap();
        elsewhere.write(&lease("0000000a", 1)).unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        for kind in FILES {
            let link = dir.path().join("0000000a").with_extension(kind);
            std::os::unix::fs::symlink(outside.path().join("0000000a.even"), link).unwrap();
        }
        assert!(ledger.write(&lease("0000000a", 2)).is_err());
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
        ledger.write(&before).unwrap();
        ledger.write(&lease("0000000a", 1)).unwrap();
        let path = dir.path().join("0000000a.odd");
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let loaded = ledger.load().unwrap();
            assert_eq!(loaded.leases, std::slice::from_ref(&before), "{length} bytes");
            assert!(loaded.behind.contains("0000000a"), "{length} bytes");
            assert_eq!(loaded.aside.len(), usize::from(length > 0), "{length} bytes");
        }
        for byte in 0..=u8::MAX {
            fs::write(&path, vec![byte; whole.len()]).unwrap();
            assert_eq!(ledger.load().unwrap().leases, std::slice::from_ref(&before), "{byte}");
        }
        // Set aside each time, so now it is lost.
        let loaded = ledger.load().unwrap();
        assert!(loaded.behind.contains("0000000a") && loaded.aside.is_empty());
        ledger.write(&loaded.leases[0]).unwrap();
        assert!(ledger.load().unwrap().behind.is_empty());
        ledger.remove("0000000a").unwrap();
        assert!(ledger.load().unwrap().leases.is_empty());
    }

    #[test]
    fn records_are_written_in_turns_also_by_the_next_daemon() {
        let dir = tempfile::tempdir().unwrap();
        for owner in 0..5_u32 {
            let ledger = Ledger::open(dir.path()).unwrap();
            let loaded = ledger.load().unwrap();
            assert!(loaded.behind.is_empty(), "{loaded:?}");
            let last = loaded.leases.last().map(|lease| lease.owner);
            assert_eq!(last, owner.checked_sub(1));
            let files = ledger.lock("0000000a").unwrap();
            ledger.write_to(&files, &Lease { owner, ..lease("0000000a", 1) }).unwrap();
            assert!(ledger.try_lock("0000000a").unwrap().is_none());
        }
    }

    #[test]
    fn a_lease_whose_records_are_both_spoilt_is_set_aside_whole() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.write(&lease("0000000a", 1)).unwrap();
        ledger.write(&lease("0000000a", 1)).unwrap();
        for kind in FILES {
            let path = dir.path().join("0000000a").with_extension(kind);
            fs::write(path, "{\"form\":2,").unwrap();
        }
        let loaded = ledger.load().unwrap();
        assert!(loaded.leases.is_empty() && loaded.behind.is_empty());
        assert_eq!(loaded.aside.len(), 2);
    }
}
