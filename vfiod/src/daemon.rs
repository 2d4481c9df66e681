//! The daemon's life: start, one loop over what happens, end. Talks to systemd and the journal.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use libvfio::address::PciAddress;
use libvfio::client::PRIVATE_SOCKET;
use libvfio::host::HostRoot;
use nix::sys::prctl;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::unbounded_channel;
use tracing::{error, info, warn};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

use crate::broker::Broker;
use crate::memory;
use crate::service::Service;
use crate::simulation::{self, Simulation};
use crate::stores::{CONFIG, RULES, STATE, Stores};
use crate::transition::Means;
use crate::uevent::{Hint, Subject, Uevents};
use crate::worker::{Deadline, Deadlines, Reader, Workers};

/// How long reading an attribute may take before its device counts as stuck.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often one looks at overrides, which change without a report.
const LOOKING: Duration = Duration::from_secs(5);

/// Most threads for calls: each may be kept by a step that never returns, and a host has hundreds of
/// functions.
const MOST_THREADS: usize = 4096;

/// How long a thread waits for the next call: another is soon started, and until it ends what it has
/// used of its stack stays in memory.
const WAITING: Duration = Duration::from_secs(2);

/// What is below the options in `--help` and in the manual page.
const MORE: &str = "\
Files:
  /run/vfiod/private              where root asks without the bus
  /run/vfiod/leases/ID.even       a lease and, in ID.odd, as it was one step before, or the
                                  other way round: the greater number is the newer
  /var/lib/vfiod/quarantine.json  devices not trusted; the same in quarantine.json.copy
  /var/lib/vfiod/history.jsonl    what became of leases, and before that in history.jsonl.1
  /var/lib/vfiod/history.head     the newest entry of these, by which a missing one is noticed
  /var/lib/vfiod/policy-met.json  who was at the addresses that the policy names
  /var/lib/vfiod/initramfs/KERNEL what an initial file system was given of the policy
  /etc/vfiod/vfiod.toml           the policy, with vfiod.toml.d/*.toml beside it
  /etc/udev/rules.d/10-vfiod.rules  what the policy becomes for the next boot
  *.unreadable                    what was found in place of a lease or of a quarantine

Environment:
  VFIOD_LOG   what to log: error, warn, info (the default), debug, or that of parts of the program,
              as in warn,vfiod::transition=debug

Signals:
  SIGHUP            read the policy anew; one that is wrong leaves the one in force
  SIGTERM, SIGINT   end; leases stay as they are, and so do their devices

See also:
  vfioctl(1), busctl(1)";

/// The owner of PCI device assignment on this host
///
/// Serves org.vfiod1 on the system bus: brings whole IOMMU groups to VFIO for a tenant, remembers
/// who has what, and gives every function back to the driver it had. systemd starts it.
#[derive(Debug, Parser)]
#[command(version, about, after_help = MORE)]
pub struct Args {
    /// Where the host's sys, proc, dev and lib/modules are
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// Serve a simulated host instead, without any device: workstation, hgx8, scale, xe, vgpu,
    /// mediated, or the file that describes it; needs --bus
    #[arg(long, value_name = "HOST", conflicts_with = "root")]
    simulate: Option<String>,
    /// Where leases are kept through restarts
    #[arg(long, value_name = "DIR", default_value = "/run/vfiod/leases")]
    leases: PathBuf,
    /// Where what outlives the host's restart is kept: devices not trusted, and history
    #[arg(long, value_name = "DIR", default_value = STATE)]
    state: PathBuf,
    /// Where the policy is: vfiod.toml and vfiod.toml.d [default: /etc/vfiod, none with --simulate
    /// or --root]
    #[arg(long, value_name = "DIR")]
    config: Option<PathBuf>,
    /// The file of udev rules that the policy becomes [default: /etc/udev/rules.d/10-vfiod.rules,
    /// none with --simulate, --root or --config]
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,
    /// The bus to serve on, as a D-Bus address, instead of the system bus
    #[arg(long, value_name = "ADDRESS")]
    bus: Option<String>,
    /// A socket where root asks without the bus [default: /run/vfiod/private, none with --simulate,
    /// --root or --bus]
    #[arg(long, value_name = "FILE")]
    socket: Option<PathBuf>,
    /// How long a kind of step may take before its device counts as wedged, such as unbind=30; may
    /// be repeated
    #[arg(long = "deadline", value_name = "KIND=SECONDS")]
    deadlines: Vec<Deadline>,
}

impl Args {
    /// Where the policy is, and where its rules go.
    fn policy(&self) -> (Option<PathBuf>, Option<PathBuf>) {
        let real = self.simulate.is_none() && self.root == Path::new("/");
        let rules = (real && self.config.is_none()).then(|| PathBuf::from(RULES));
        let config = real.then(|| PathBuf::from(CONFIG));
        (self.config.clone().or(config), self.rules.clone().or(rules))
    }

    /// Where root asks without the bus.
    fn socket(&self) -> Option<&Path> {
        let usual = self.simulate.is_none() && self.root == Path::new("/") && self.bus.is_none();
        self.socket.as_deref().or_else(|| usual.then_some(Path::new(PRIVATE_SOCKET)))
    }
}

/// Runs the daemon until it is told to stop.
pub fn main(args: &Args) -> anyhow::Result<()> {
    // A huge page is resident as a whole, whatever of it is used. A kernel without them refuses.
    // Workers inherit it.
    let _ = prctl::set_thp_disable(true);
    start_logging();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MOST_THREADS)
        .thread_keep_alive(WAITING)
        .build()?;
    let result = runtime.block_on(run(args));
    // A step that never returns must not keep the daemon from ending.
    runtime.shutdown_background();
    result
}

async fn run(args: &Args) -> anyhow::Result<()> {
    let started = Instant::now();
    let (mut simulation, uevents) = match &args.simulate {
        Some(host) => {
            let (simulation, uevents) = Simulation::start(host, args.bus.as_deref())?;
            (Some(simulation), uevents)
        }
        None => (None, Uevents::listen().context("cannot listen for device events")?),
    };
    let root = simulation.as_ref().map_or(args.root.as_path(), Simulation::root);
    let place = |dir: &PathBuf| simulation.as_ref().map_or(dir.clone(), |s| s.state(dir));
    let stores = Stores::open(&place(&args.leases), &place(&args.state))
        .context("cannot open the records")?;
    let (config, rules) = args.policy();
    let stores = stores.with_policy(config, rules);
    let (tell, changes) = unbounded_channel();
    let (loose, legible) = std::sync::mpsc::channel();
    // Itself, also when its file has been replaced by another version.
    let workers = Arc::new(Workers::new("/proc/self/exe", root));
    let reader = Reader::new(workers.clone(), PATIENCE, loose);
    let means = Means {
        host: HostRoot::new(root).with_patience(Arc::new(reader)),
        workers: workers.clone(),
        deadlines: Deadlines::with(args.deadlines.iter().copied()),
    };
    let broker = Arc::new(Broker::open(means, stores, tell.clone())?);
    broker.recover();
    let builder = match &args.bus {
        Some(address) => zbus::connection::Builder::address(address.as_str()),
        None => zbus::connection::Builder::system(),
    };
    let service = Service::connect(builder, &broker, tell).await.context("cannot use the bus")?;
    service.serve(changes).await.context("cannot take the name org.vfiod1 on the bus")?;
    if let Some(socket) = args.socket()
        && let Err(error) = service.serve_privately(socket)
    {
        warn!(%error, socket = %socket.display(), "root can ask over the bus only");
    }
    info!(
        functions = broker.inventory().functions().len(),
        groups = broker.inventory().groups().len(),
        leases = broker.leases().len(),
        milliseconds = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "ready"
    );
    notify(&[sd_notify::NotifyState::Ready]);
    follow(&broker, workers.clone(), uevents, legible);
    // One reads while another carries out the first step.
    if let Err(error) = workers.prepare() {
        warn!(%error, "no worker could be started; it is tried again with the first step");
    }
    tokio::select! {
        ended = wait(&service, &broker) => ended,
        error = simulation::ended(simulation.as_mut()) => Err(error),
    }
}

/// Starts the threads that look at what changes, which run until the process ends.
fn follow(
    broker: &Arc<Broker>,
    workers: Arc<Workers>,
    uevents: Uevents,
    legible: Receiver<PciAddress>,
) {
    let watching = broker.clone();
    std::thread::spawn(move || watch(&watching, &uevents));
    let reading = broker.clone();
    std::thread::spawn(move || legible.iter().for_each(|address| reading.notice([address])));
    let looking = broker.clone();
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(LOOKING);
            looking.look_at_overrides();
            looking.correct_drift();
            workers.rest();
            memory::give_back();
        }
    });
}

/// In the order of the kernel's reports.
fn watch(broker: &Arc<Broker>, uevents: &Uevents) {
    loop {
        match uevents.wait() {
            Ok(Hint::Look(subjects)) => look(broker, &subjects),
            Ok(Hint::LookEverywhere) => {
                warn!("device events were lost; looking at the whole host again");
                broker.resynchronise();
            }
            // Who simulates has ended, and so will the daemon.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return,
            Err(error) => {
                error!(%error, "device events cannot be read; changes from outside go unnoticed");
                return;
            }
        }
    }
}

fn look(broker: &Arc<Broker>, subjects: &BTreeSet<Subject>) {
    let (mut functions, mut mediated) = (Vec::new(), BTreeSet::new());
    for subject in subjects {
        match subject {
            Subject::Function(address) => functions.push(*address),
            Subject::Mediated(uuid) => _ = mediated.insert(*uuid),
        }
    }
    broker.notice(functions);
    broker.notice_mediated(&mediated);
}

/// Until the daemon is told to stop, or the bus has gone.
async fn wait(service: &Service, broker: &Arc<Broker>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut alive = tokio::time::interval(watchdog_period());
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => reload(broker),
            () = service.closed() => anyhow::bail!("the bus has gone"),
            _ = alive.tick() => notify(&[sd_notify::NotifyState::Watchdog]),
        }
    }
    info!("stopping; leases stay as they are");
    notify(&[sd_notify::NotifyState::Stopping]);
    Ok(())
}

/// Whatever is wrong is told in the journal and to whoever asks.
fn reload(broker: &Arc<Broker>) {
    let broker = broker.clone();
    tokio::task::spawn_blocking(move || broker.reload_policy());
}

/// Half of what systemd allows, or idle if it does not watch.
fn watchdog_period() -> Duration {
    sd_notify::watchdog_enabled().map_or(Duration::from_secs(3600), |limit| limit / 2)
}

fn notify(state: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "systemd was not told");
    }
}

/// To the journal with fields where standard error is the journal, else to standard error.
fn start_logging() {
    let level = std::env::var("VFIOD_LOG").ok().and_then(|level| level.parse().ok());
    let level = level.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    let registry = tracing_subscriber::registry().with(level);
    match tracing_journald::layer() {
        Ok(journal) if stderr_is_journal() => {
            registry.with(journal.with_field_prefix(Some("VFIOD".to_owned()))).init();
        }
        _ => registry.with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr)).init(),
    }
}

/// `JOURNAL_STREAM` holds device and inode of the journal's stream (systemd.exec(5)); it is
/// inherited, so it is compared with what standard error really is.
fn stderr_is_journal() -> bool {
    let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let stderr = std::fs::metadata("/proc/self/fd/2");
    stderr.is_ok_and(|stderr| stream == format!("{}:{}", stderr.dev(), stderr.ino()))
}
