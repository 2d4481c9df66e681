//! Brokers on a simulated host: in the test's own process, or in one of their own that can be
//! killed. Touches the simulated host and the directory of leases it is given.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libvfio::client::Failure;
use libvfio::host::HostRoot;
use tokio::sync::mpsc::unbounded_channel;
use vfiod::broker::{Asker, Broker};
use vfiod::lease::Lease;
use vfiod::ledger::Ledger;
use vfiod::request::AttachOptions;
use vfiod::transition::Walker;
use vfiod::worker::{Deadline, Deadlines, Reader, Workers};

/// What a broker is started with.
#[derive(Debug, Clone)]
pub struct Setting {
    /// The program that is also the worker: the `trial` binary.
    pub program: PathBuf,
    /// The host's root.
    pub root: PathBuf,
    /// Where leases are kept.
    pub leases: PathBuf,
    /// Deadlines of steps, as the daemon takes them.
    pub deadlines: Vec<String>,
}

impl Setting {
    /// A broker's setting, deadlines by default.
    pub fn new(program: &str, root: &Path, leases: &Path) -> Self {
        let (program, root, leases) = (program.into(), root.to_owned(), leases.to_owned());
        Self { program, root, leases, deadlines: Vec::new() }
    }

    /// A broker that has just started, where others may have run before. Tells nobody of changes.
    pub fn start(&self) -> anyhow::Result<Arc<Broker>> {
        let workers = Arc::new(Workers::new(&self.program, &self.root));
        let (loose, legible) = std::sync::mpsc::channel();
        let reader = Reader::new(workers.clone(), Duration::from_secs(2), loose);
        let deadlines: Result<Vec<Deadline>, String> =
            self.deadlines.iter().map(|text| text.parse()).collect();
        let walker = Walker {
            host: HostRoot::new(&self.root).with_patience(Arc::new(reader)),
            ledger: Ledger::open(&self.leases)?,
            workers,
            deadlines: Deadlines::with(deadlines.map_err(anyhow::Error::msg)?),
        };
        let (tell, _) = unbounded_channel();
        let broker = Arc::new(Broker::open(walker, tell)?);
        broker.recover();
        let reading = Arc::downgrade(&broker);
        std::thread::spawn(move || {
            for address in legible {
                let Some(broker) = reading.upgrade() else { return };
                broker.notice([address]);
            }
        });
        Ok(broker)
    }
}

/// Leases one device to a tenant.
pub fn attach(broker: &Arc<Broker>, device: &str, tenant: &str) -> Result<Lease, Failure> {
    let options = AttachOptions::default();
    broker.attach(&[device.to_owned()], tenant, &options, Asker::default())
}

/// Waits until something is so; whether it ever was.
pub fn eventually(mut so: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !so() {
        if start.elapsed() > Duration::from_secs(20) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}
