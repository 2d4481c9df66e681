//! What became of leases and of devices not trusted, a JSON object a line, oldest first. Bounded:
//! a full file becomes the one before, and that one is dropped. Lines are chained (`chain`), and what
//! the newest one is stands in a file beside them. Touches its three files only.
//!
//! A line is not synced: a power loss may take the newest ones, which then shows as if somebody had
//! taken them out. A crash of the daemon takes none.

mod audit;
mod chain;

pub use audit::Audit;
pub use chain::Checked;

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

use crate::cleaned::Cleaned;
use crate::durable;
use crate::lease::Lease;
use chain::Head;

/// Bytes after which a file is full.
const FULL: u64 = 1 << 20;
/// More bytes than a line has.
const LONGEST: u64 = 1 << 18;

/// The file of history, and the one before.
#[derive(Debug)]
pub struct History {
    path: PathBuf,
    full: u64,
    /// One writer at a time, and no reader between two files. The newest line, once that is known.
    head: Mutex<Option<Head>>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When, in seconds since 1970.
    pub time: u64,
    /// What.
    pub event: Event,
    /// The lease it happened to, or which had the devices that are not trusted any more, and goes on.
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
    /// When the lease that ended was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
    /// The tenant who may have devices all the same that are not trusted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub but_for: Option<String>,
    /// What was done so that nothing of the lease's tenant is left.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cleaned: Vec<Cleaned>,
    /// Which it is, counted from 0; given when it is added.
    #[serde(default)]
    pub number: u64,
    /// The hash of it and of all before, once it is added.
    #[serde(default, skip_serializing)]
    pub chain: String,
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
        Self {
            time,
            event,
            lease: None,
            tenant: None,
            vm: None,
            devices,
            mediated,
            text,
            since: None,
            but_for: None,
            cleaned: Vec::new(),
            number: 0,
            chain: String::new(),
        }
    }

    /// Something that happens now to a lease.
    pub fn of(lease: &Lease, event: Event, text: impl Into<String>) -> Self {
        Self {
            lease: Some(lease.id.clone()),
            // What the daemon does for itself is no tenant's.
            tenant: lease.task.is_none().then(|| lease.tenant.clone()),
            vm: lease.vm.clone(),
            mediated: lease.mediated.keys().copied().collect(),
            since: (!lease.backward.is_empty()).then_some(lease.created),
            cleaned: Cleaned::of(lease),
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
            since: self.since,
            cleaned: self.cleaned.iter().map(Cleaned::record).collect(),
            number: self.number,
            chain: self.chain.clone(),
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
        Self { path: dir.join("history.jsonl"), full: FULL, head: Mutex::default() }
    }

    /// Adds an entry. What a crash has left of another one is no entry and goes.
    pub fn append(&self, entry: &Entry) -> io::Result<()> {
        let mut known = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        let mut file = self.file()?;
        let mut head = match known.take() {
            Some(head) => head,
            None => self.newest()?,
        };
        if file.metadata()?.len() >= self.full {
            // What was before is dropped with this.
            head.first = first(&durable::read(&self.path)?.unwrap_or_default(), &head);
            fs::rename(&self.path, self.before())?;
            file = self.file()?;
        }
        let object = serde_json::to_string(&Entry { number: head.next, ..entry.clone() })?;
        let mut line = head.add(&object);
        line.push('\n');
        mend(&mut file)?;
        file.write_all(line.as_bytes())?;
        self.keep(&head)?;
        *known = Some(head);
        Ok(())
    }

    /// Checks that all entries are there, as they were written.
    pub fn check(&self) -> io::Result<Checked> {
        let _head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        let files = self.files()?;
        let lines = files.iter().flat_map(|bytes| bytes.split(|byte| *byte == b'\n'));
        Ok(chain::check(lines.filter(|line| !line.is_empty()), self.kept()?.as_ref()))
    }

    /// What the next entry comes after. Where the newest on record is not there, the next one says
    /// so for ever.
    fn newest(&self) -> io::Result<Head> {
        let kept = self.kept()?;
        let files = self.files()?;
        let lines = || files.iter().flat_map(|bytes| bytes.split(|byte| *byte == b'\n'));
        let newest = lines().filter_map(Head::of).next_back();
        let first = lines().find_map(Head::of).map_or(0, |head| head.first);
        Ok(match (kept, newest) {
            (Some(kept), Some(newest)) if newest.next > kept.next => {
                Head { first: kept.first, ..newest }
            }
            (Some(kept), _) => kept,
            (None, newest) => Head { first, ..newest.unwrap_or_default() },
        })
    }

    fn kept(&self) -> io::Result<Option<Head>> {
        let text = durable::read(&self.path.with_extension("head"))?;
        Ok(text.and_then(|text| Head::parse(&String::from_utf8_lossy(&text))))
    }

    fn keep(&self, head: &Head) -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        options.custom_flags(OFlag::O_NOFOLLOW.bits());
        let file = options.open(self.path.with_extension("head"))?;
        file.write_all_at(head.text().as_bytes(), 0)
    }

    /// What is in the files, the one before first.
    fn files(&self) -> io::Result<[Vec<u8>; 2]> {
        let read = |path: &Path| io::Result::Ok(durable::read(path)?.unwrap_or_default());
        Ok([read(&self.before())?, read(&self.path)?])
    }

    /// The newest `most` entries that `wanted` accepts, oldest first. What is no entry is skipped.
    pub fn read(&self, most: usize, wanted: impl Fn(&Entry) -> bool) -> io::Result<Vec<Entry>> {
        let _head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        let mut newest = VecDeque::new();
        for bytes in self.files()? {
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

/// Takes away what a crash or a full disk has left of a line, or ends it if only its end is missing.
fn mend(file: &mut File) -> io::Result<()> {
    let length = file.metadata()?.len();
    let mut last = [b'\n'];
    if length > 0 {
        file.read_exact_at(&mut last, length - 1)?;
    }
    if last == *b"\n" {
        return Ok(());
    }
    let mut bytes = vec![0; usize::try_from(length.min(LONGEST)).unwrap_or(0)];
    let start = length - bytes.len() as u64;
    file.read_exact_at(&mut bytes, start)?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    match &bytes[whole..] {
        rest if Head::of(rest).is_some() => file.write_all(b"\n"),
        _ => file.set_len(start + whole as u64),
    }
}

/// The number of the first line in a file that is about to be the oldest.
fn first(bytes: &[u8], head: &Head) -> u64 {
    let first = bytes.split(|byte| *byte == b'\n').find_map(Head::of);
    first.map_or(head.next, |head| head.first)
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
    fn two_files_and_the_newest_are_the_most_there_is() {
        let dir = tempfile::tempdir().unwrap();
        let history = History { full: 1000, ..History::open(dir.path()) };
        for n in 0..100 {
            history.append(&entry(&n.to_string())).unwrap();
        }
        let sizes: Vec<u64> = fs::read_dir(dir.path())
            .unwrap()
            .map(|f| f.unwrap().metadata().unwrap().len())
            .collect();
        assert!(sizes.len() == 3 && sizes.iter().all(|size| *size < 1400), "{sizes:?}");
        assert_eq!(history.check().unwrap().faults, [""; 0]);
        let texts = texts(&history, 100);
        assert!(texts.len() > 5, "{texts:?}");
        assert_eq!(texts.last().unwrap(), "99");
    }

    #[test]
    fn a_later_daemon_goes_on_where_the_one_before_ended_and_sees_what_was_taken() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["a", "b", "c"] {
            History::open(dir.path()).append(&entry(text)).unwrap();
        }
        let history = History::open(dir.path());
        let checked = history.check().unwrap();
        assert_eq!((checked.entries, checked.faults), (3, Vec::new()));
        let all = history.read(9, |_| true).unwrap();
        assert_eq!(all.iter().map(|entry| entry.number).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(all[2].chain, checked.head.chain);
        // The newest is taken out, and the daemon goes on.
        let whole = fs::read_to_string(&history.path).unwrap();
        let (cut, _) = whole.trim_end().rsplit_once('\n').unwrap();
        fs::write(&history.path, format!("{cut}\n")).unwrap();
        let history = History::open(dir.path());
        assert_eq!(history.check().unwrap().faults, ["entries 2 to 2 are missing"]);
        history.append(&entry("d")).unwrap();
        assert_eq!(history.check().unwrap().faults, ["entry 2 is missing"]);
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
