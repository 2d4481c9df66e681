//! Brokers on a simulated host: in the test's own process, or in one of their own that can be
//! killed. Touches the simulated host and the directory of leases it is given.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libvfio::client::Failure;
use libvfio::host::HostRoot;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use vfiod::broker::{Asker, Broker, Change};
use vfiod::lease::{Lease, State};
use vfiod::ledger::Ledger;
use vfiod::request::AttachOptions;
use vfiod::stores::Stores;
use vfiod::transition::Means;
use vfiod::worker::{Deadline, Deadlines, Reader, Workers};

/// What a broker is started with.
#[derive(Debug, Clone)]
pub struct Setting {
    /// The program that is also the worker: the `trial` binary.
    pub program: PathBuf,
    /// The host's root.
    pub root: PathBuf,
    /// Where records are kept: leases in `leases`, the rest in `state`, and the policy in `policy`.
    pub records: PathBuf,
    /// Deadlines of steps, as the daemon takes them.
    pub deadlines: Vec<String>,
}

impl Setting {
    /// A broker's setting, deadlines by default.
    pub fn new(program: &str, root: &Path, records: &Path) -> Self {
        let (program, root, records) = (program.into(), root.to_owned(), records.to_owned());
        Self { program, root, records, deadlines: Vec::new() }
    }

    /// The ledger in the records.
    pub fn ledger(&self) -> io::Result<Ledger> {
        Ledger::open(self.records.join("leases"))
    }

    /// A broker that has just started, where others may have run before.
    pub fn start(&self) -> anyhow::Result<Arc<Broker>> {
        Ok(self.start_and_listen()?.0)
    }

    /// The same, with what it tells of changes.
    pub fn start_and_listen(&self) -> anyhow::Result<(Arc<Broker>, UnboundedReceiver<Change>)> {
        let workers = Arc::new(Workers::new(&self.program, &self.root));
        let (loose, legible) = std::sync::mpsc::channel();
        let reader = Reader::new(workers.clone(), Duration::from_secs(2), loose);
        let deadlines: Result<Vec<Deadline>, String> =
            self.deadlines.iter().map(|text| text.parse()).collect();
        let means = Means {
            host: HostRoot::new(&self.root).with_patience(Arc::new(reader)),
            workers,
            deadlines: Deadlines::with(deadlines.map_err(anyhow::Error::msg)?),
        };
        let stores = Stores::open(&self.records.join("leases"), &self.records.join("state"))?;
        let (policy, rules) = (self.records.join("policy"), self.records.join("rules"));
        let stores = stores.with_policy(Some(policy), Some(rules));
        let (tell, changes) = unbounded_channel();
        let broker = Arc::new(Broker::open(means, stores, tell)?);
        broker.recover();
        let reading = Arc::downgrade(&broker);
        std::thread::spawn(move || {
            for address in legible {
                let Some(broker) = reading.upgrade() else { return };
                broker.notice([address]);
            }
        });
        Ok((broker, changes))
    }
}

/// Writes the policy that a broker with these records reads.
pub fn say_policy(records: &Path, policy: &str) -> io::Result<()> {
    let directory = records.join("policy");
    fs::create_dir_all(&directory)?;
    fs::write(directory.join("vfiod.toml"), policy)
}

/// Leases one device to a tenant.
pub fn attach(broker: &Arc<Broker>, device: &str, tenant: &str) -> Result<Lease, Failure> {
    attach_with(broker, device, tenant, &AttachOptions::default())
}

/// The same, with options.
pub fn attach_with(
    broker: &Arc<Broker>,
    device: &str,
    tenant: &str,
    options: &AttachOptions,
) -> Result<Lease, Failure> {
    broker.attach(&[device.to_owned()], tenant, options, Asker::default())
}

/// Waits until the broker is at nothing any more, or at a step that does not return.
pub fn settled(broker: &Arc<Broker>) -> bool {
    let wedged = || broker.leases().iter().any(|lease| lease.state == State::Wedged);
    // Whoever is at something on a thread of its own has the broker too.
    eventually(|| Arc::strong_count(broker) == 1 || wedged())
}

/// Waits until something is so; whether it ever was.
pub fn eventually(mut so: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    // What is so at once is mostly so within microseconds.
    let mut pause = Duration::from_micros(50);
    while !so() {
        if start.elapsed() > Duration::from_secs(20) {
            return false;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
    true
}
