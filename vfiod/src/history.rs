//! What became of leases and of devices not trusted, a JSON object a line, oldest first. Bounded:
//! a full file becomes the one before, and that one is dropped. Touches its two files only.
//!
//! A line is not synced: a power loss may take the newest ones, a crash of the daemon takes none.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use libvfio::address::PciAddress;
use libvfio::client::HistoryRecord;
use libvfio::mediated::Uuid;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::durable;
use crate::lease::Lease;

/// Bytes after which a file is full.
const FULL: u64 = 1 << 20;

/// The file of history, and the one before.
#[derive(Debug)]
pub struct History {
    path: PathBuf,
    full: u64,
    /// One writer at a time, and no reader between two files.
    lock: Mutex<()>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When, in seconds since 1970.
    pub time: u64,
    /// What.
    pub event: Event,
    /// The lease it happened to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<String>,
    /// That lease's tenant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// The virtual machine it was for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// The functions concerned.
    #[serde(default)]
    pub devices: Vec<PciAddress>,
    /// The mediated devices concerned.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mediated: Vec<Uuid>,
    /// Why or how, in words; may be empty.
    #[serde(default)]
    pub text: String,
}

/// What can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// A lease became active.
    Attached,
    /// A lease ended on request.
    Released,
    /// A lease ended otherwise.
    Failed,
    /// A lease that the daemon left unfinished was found and ended, or brought up to date.
    Recovered,
    /// A physical function has another number of virtual functions.
    VirtualFunctions,
    /// A device was brought to where the policy wants it.
    Policy,
    /// A device is not trusted any more.
    Quarantined,
    /// A device is trusted again.
    Cleared,
    /// A file of the daemon was not understood.
    SetAside,
}

impl Event {
    /// The word for it on every surface, as it is serialised.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attached => "attached",
            Self::Released => "released",
            Self::Failed => "failed",
            Self::Recovered => "recovered",
            Self::VirtualFunctions => "virtual-functions",
            Self::Policy => "policy",
            Self::Quarantined => "quarantined",
            Self::Cleared => "cleared",
            Self::SetAside => "set-aside",
        }
    }
}

impl Entry {
    /// Something that happens now.
    pub fn now(event: Event, devices: Vec<PciAddress>, text: impl Into<String>) -> Self {
        let text = text.into();
        let (time, mediated) = (now(), Vec::new());
        Self { time, event, lease: None, tenant: None, vm: None, devices, mediated, text }
    }

    /// Something that happens now to a lease.
    pub fn of(lease: &Lease, event: Event, text: impl Into<String>) -> Self {
        Self {
            lease: Some(lease.id.clone()),
            // What the daemon does for itself is no tenant's.
            tenant: lease.task.is_none().then(|| lease.tenant.clone()),
            vm: lease.vm.clone(),
            mediated: lease.mediated.keys().copied().collect(),
            ..Self::now(event, lease.devices.keys().copied().collect(), text)
        }
    }

    /// What the bus is told of it.
    pub fn record(&self) -> HistoryRecord {
        HistoryRecord {
            time: self.time,
            event: self.event.name().to_owned(),
            lease: self.lease.clone(),
            tenant: self.tenant.clone(),
            vm: self.vm.clone(),
            devices: self
                .devices
                .iter()
                .map(ToString::to_string)
                .chain(self.mediated.iter().map(ToString::to_string))
                .collect(),
            text: self.text.clone(),
        }
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl History {
    /// The history in directory `dir`. Reads nothing yet.
    pub fn open(dir: &Path) -> Self {
        Self { path: dir.join("history.jsonl"), full: FULL, lock: Mutex::default() }
    }

    /// Adds an entry, on a line of its own whatever the last one is like.
    pub fn append(&self, entry: &Entry) -> io::Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        let _lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let mut file = self.file()?;
        if file.metadata()?.len() >= self.full {
            fs::rename(&self.path, self.before())?;
            file = self.file()?;
        }
        if is_torn(&file)? {
            line.insert(0, b'\n');
        }
        file.write_all(&line)
    }

    /// The newest `most` entries that `wanted` accepts, oldest first. What is no entry is skipped.
    pub fn read(&self, most: usize, wanted: impl Fn(&Entry) -> bool) -> io::Result<Vec<Entry>> {
        let _lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let mut newest = VecDeque::new();
        for path in [self.before(), self.path.clone()] {
            let bytes = durable::read(&path)?.unwrap_or_default();
            let entries = bytes.split(|byte| *byte == b'\n').filter_map(parse);
            for entry in entries.filter(&wanted) {
                newest.push_back(entry);
                if newest.len() > most {
                    newest.pop_front();
                }
            }
        }
        Ok(newest.into())
    }

    fn before(&self) -> PathBuf {
        self.path.with_extension("jsonl.1")
    }

    fn file(&self) -> io::Result<File> {
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true).mode(0o600).custom_flags(flags.bits());
        options.open(&self.path)
    }
}

fn parse(line: &[u8]) -> Option<Entry> {
    serde_json::from_slice(line).ok()
}

/// Whether a crash or a full disk cut the last line short.
fn is_torn(file: &File) -> io::Result<bool> {
    let Some(last) = file.metadata()?.len().checked_sub(1) else { return Ok(false) };
    let mut byte = [0];
    file.read_exact_at(&mut byte, last)?;
    Ok(byte != *b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(text: &str) -> Entry {
        Entry::now(Event::Cleared, vec!["03:00.0".parse().unwrap()], text)
    }

    fn texts(history: &History, most: usize) -> Vec<String> {
        history.read(most, |_| true).unwrap().into_iter().map(|entry| entry.text).collect()
    }

    #[test]
    fn the_newest_entries_are_read_oldest_first() {
        let dir = tempfile::tempdir().unwrap();
        let history = History::open(dir.path());
        assert!(texts(&history, 9).is_empty());
        for text in ["a", "b\nb", "c"] {
            history.append(&entry(text)).unwrap();
        }
        assert_eq!(texts(&history, 9), ["a", "b\nb", "c"]);
        assert_eq!(texts(&history, 2), ["b\nb", "c"]);
        assert!(texts(&history, 0).is_empty());
        assert_eq!(history.read(1, |entry| entry.text == "a").unwrap()[0].text, "a");
    }

    #[test]
    fn wherever_the_last_line_was_torn_only_that_line_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let history = History::open(dir.path());
        history.append(&entry("a")).unwrap();
        let first = fs::read(&history.path).unwrap().len();
        history.append(&entry("b")).unwrap();
        let whole = fs::read(&history.path).unwrap();
        for length in first..whole.len() - 1 {
            fs::write(&history.path, &whole[..length]).unwrap();
            history.append(&entry("c")).unwrap();
            assert_eq!(texts(&history, 9), ["a", "c"], "{length} bytes");
        }
        // Only the end of the line is missing.
        fs::write(&history.path, &whole[..whole.len() - 1]).unwrap();
        history.append(&entry("c")).unwrap();
        assert_eq!(texts(&history, 9), ["a", "b", "c"]);
    }

    #[test]
    fn garbage_hides_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let history = History::open(dir.path());
        history.append(&entry("a")).unwrap();
        let mut bytes = fs::read(&history.path).unwrap();
        bytes.extend(b"\n\n{}\n[1]\n\xff\xfe\x00\n{\"time\":1,\"event\":\"of later versions\"}\n");
        fs::write(&history.path, bytes).unwrap();
        history.append(&entry("b")).unwrap();
        assert_eq!(texts(&history, 9), ["a", "b"]);
    }

    #[test]
    fn two_files_are_the_most_there_is() {
        let dir = tempfile::tempdir().unwrap();
        let history = History { full: 1000, ..History::open(dir.path()) };
        for n in 0..100 {
            history.append(&entry(&n.to_string())).unwrap();
        }
        let sizes: Vec<u64> = fs::read_dir(dir.path())
            .unwrap()
            .map(|f| f.unwrap().metadata().unwrap().len())
            .collect();
        assert!(sizes.len() == 2 && sizes.iter().all(|size| *size < 1200), "{sizes:?}");
        let texts = texts(&history, 100);
        assert!(texts.len() > 10, "{texts:?}");
        assert_eq!(texts.last().unwrap(), "99");
    }

    #[test]
    fn words_are_as_they_are_serialised() {
        for event in [Event::Attached, Event::SetAside, Event::Quarantined] {
            assert_eq!(serde_json::to_value(event).unwrap(), event.name());
        }
    }

    #[test]
    fn a_link_in_its_place_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let history = History::open(dir.path());
        let outside = dir.path().join("outside");
        std::os::unix::fs::symlink(&outside, &history.path).unwrap();
        assert!(history.append(&entry("a")).is_err());
        assert!(!outside.exists());
    }
}
