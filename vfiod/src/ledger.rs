//! Leases on disk: one file each, replaced whole, so that a crash leaves the old or the new one.
//! Touches its own directory only. Kernel state dies at reboot, so the directory is in `/run`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::lease::Lease;

/// The form of the files; a file of another form is set aside.
const FORM: u32 = 1;

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

/// A file that was not understood, and where it was put.
#[derive(Debug)]
pub struct SetAside {
    /// Where it is now.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

impl Ledger {
    /// The ledger in `dir`, which is made if need be, for root alone.
    pub fn open(dir: impl Into<PathBuf>) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let dir = dir.into();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        Ok(Self { dir })
    }

    /// Writes a lease as it is now. When this returns, a crash finds it so.
    pub fn write(&self, lease: &Lease) -> io::Result<()> {
        let path = self.path(&lease.id);
        let draft = path.with_extension("new");
        let mut file = File::create(&draft)?;
        file.write_all(&record(lease)?)?;
        file.sync_data()?;
        fs::rename(&draft, &path)
    }

    /// Forgets a lease that has ended.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        match fs::remove_file(self.path(id)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Reads all leases. What is not a lease is set aside, never in the way.
    pub fn load(&self) -> io::Result<(Vec<Lease>, Vec<SetAside>)> {
        let (mut leases, mut aside) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            match path.extension().and_then(|e| e.to_str()) {
                Some("json") => match read(&path) {
                    Ok(lease) => leases.push(lease),
                    Err(reason) => {
                        let place = path.with_extension("unreadable");
                        fs::rename(&path, &place)?;
                        aside.push(SetAside { path: place, reason });
                    }
                },
                // A draft whose writing was interrupted never was the lease.
                Some("new") => fs::remove_file(&path)?,
                _ => {}
            }
        }
        leases.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        Ok((leases, aside))
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
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

fn read(path: &Path) -> Result<Lease, String> {
    let bytes = fs::read(path).map_err(|e| e.to_string())?;
    let lease = parse(&bytes)?;
    let named = path.file_stem().and_then(|stem| stem.to_str());
    if named != Some(&lease.id) {
        return Err(format!("it holds lease '{}'", lease.id));
    }
    Ok(lease)
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
            devices: std::collections::BTreeMap::new(),
            forward: Vec::new(),
            backward: Vec::new(),
        }
    }

    #[test]
    fn what_is_written_is_read_oldest_first_and_removed_once() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path().join("leases")).unwrap();
        let (old, new) = (lease("00000002", 1), lease("00000001", 2));
        ledger.write(&new).unwrap();
        ledger.write(&old).unwrap();
        let (leases, aside) = ledger.load().unwrap();
        assert_eq!(leases, [old, new]);
        assert!(aside.is_empty());
        ledger.remove("00000001").unwrap();
        ledger.remove("00000001").unwrap();
        assert_eq!(ledger.load().unwrap().0.len(), 1);
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
        put("README", "not ours");
        let (leases, aside) = ledger.load().unwrap();
        assert_eq!(leases.len(), 1);
        assert_eq!(aside.len(), 4);
        let (again, aside) = ledger.load().unwrap();
        assert_eq!((again.len(), aside.len()), (1, 0));
        assert!(dir.path().join("0000000c.unreadable").exists());
        assert!(!dir.path().join("0000000f.new").exists());
        assert!(dir.path().join("README").exists());
    }
}
