//! Reading with patience: attributes that are read under a device's lock are read by a worker,
//! which is left alone when it does not come back. Never reads them itself.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use libvfio::address::PciAddress;
use libvfio::host::Patience;

use super::turns::Turns;
use super::{Call, Workers};

/// Most workers that read at a time. Without a bound, whoever calls often enough has the daemon
/// start processes without end.
const MOST_READING: usize = 8;

/// Reads through workers.
#[derive(Debug, Clone)]
pub struct Reader {
    workers: Arc<Workers>,
    patience: Duration,
    /// Directories that a worker still tries to read in.
    stuck: Arc<Mutex<BTreeSet<PathBuf>>>,
    turns: Arc<Turns>,
    loose: Sender<PciAddress>,
}

impl Reader {
    /// A reader that waits for `patience` at most. A function that can be read again after it could
    /// not be is told to `loose`.
    pub fn new(workers: Arc<Workers>, patience: Duration, loose: Sender<PciAddress>) -> Self {
        Self {
            workers,
            patience,
            stuck: Arc::default(),
            turns: Arc::new(Turns::new(MOST_READING)),
            loose,
        }
    }

    fn stuck(&self) -> MutexGuard<'_, BTreeSet<PathBuf>> {
        self.stuck.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Texts = Vec<Result<String, i32>>;

impl Patience for Reader {
    fn read(&self, directory: &Path, names: &[&str]) -> io::Result<Vec<io::Result<String>>> {
        // For as long as patience lasts at most: whoever is stuck is left alone and counts no more.
        let _turn = self.turns.take();
        if self.stuck().contains(directory) {
            return Err(lost());
        }
        let attributes = names.iter().map(|name| directory.join(name)).collect();
        match self.workers.read(attributes)?.answer::<Texts>(Some(self.patience))? {
            Ok(texts) => {
                let texts = texts.into_iter();
                Ok(texts.map(|text| text.map_err(io::Error::from_raw_os_error)).collect())
            }
            Err(call) => {
                self.stuck().insert(directory.to_owned());
                let (reader, directory) = (self.clone(), directory.to_owned());
                std::thread::spawn(move || reader.persist(call, &directory));
                Err(lost())
            }
        }
    }
}

impl Reader {
    /// Waits however long it takes, and tells when the function can be read again.
    fn persist(&self, call: Call, directory: &Path) {
        // What was read is old by now.
        let _ = call.answer::<Texts>(None);
        self.stuck().remove(directory);
        if let Some(address) = directory.file_name().and_then(|n| n.to_str()?.parse().ok()) {
            // Nobody listens while the daemon shuts down.
            let _ = self.loose.send(address);
        }
    }
}

fn lost() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "a kernel operation on the device has not returned")
}
