//! The daemon's life: start, one loop over what happens, end. Talks to systemd and the journal.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use libvfio::host::HostRoot;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::unbounded_channel;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::prelude::*;

use crate::broker::Broker;
use crate::ledger::Ledger;
use crate::service::Service;
use crate::simulation::{self, Simulation};
use crate::uevent::{Hint, Uevents};

/// What is below the options in `--help` and in the manual page.
const MORE: &str = "\
Files:
  /run/vfiod/leases/ID.json   a lease; what is none is set aside as *.unreadable

Environment:
  VFIOD_LOG   what to log: error, warn, info (the default), debug, or tracing's filters

Signals:
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
    /// Serve a simulated host instead, without any device: workstation, hgx8, scale, or the file
    /// that describes it; needs --bus
    #[arg(long, value_name = "HOST", conflicts_with = "root")]
    simulate: Option<String>,
    /// Where leases are kept through restarts
    #[arg(long, value_name = "DIR", default_value = "/run/vfiod/leases")]
    leases: PathBuf,
    /// The bus to serve on, as a D-Bus address, instead of the system bus
    #[arg(long, value_name = "ADDRESS")]
    bus: Option<String>,
}

/// Runs the daemon until it is told to stop.
pub fn main(args: &Args) -> anyhow::Result<()> {
    start_logging();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
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
    let leases = simulation.as_ref().map_or(args.leases.clone(), |s| s.state(&args.leases));
    let ledger = Ledger::open(&leases)
        .with_context(|| format!("cannot open the lease ledger in {}", leases.display()))?;
    let (tell, changes) = unbounded_channel();
    let host = HostRoot::new(simulation.as_ref().map_or(args.root.as_path(), Simulation::root));
    let broker = Arc::new(Broker::open(host, ledger, tell.clone())?);
    broker.recover();
    let builder = match &args.bus {
        Some(address) => zbus::connection::Builder::address(address.as_str()),
        None => zbus::connection::Builder::system(),
    };
    let service = Service::connect(builder, &broker, tell).await.context("cannot use the bus")?;
    service.serve(changes).await.context("cannot take the name org.vfiod1 on the bus")?;
    info!(
        functions = broker.inventory().functions().len(),
        groups = broker.inventory().groups().len(),
        leases = broker.leases().len(),
        milliseconds = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "ready"
    );
    notify(&[sd_notify::NotifyState::Ready]);
    std::thread::spawn(move || watch(&broker, &uevents));
    tokio::select! {
        ended = wait(&service) => ended,
        error = simulation::ended(simulation.as_mut()) => Err(error),
    }
}

/// Runs on a thread of its own, in the order of the kernel's reports, until the process ends.
fn watch(broker: &Broker, uevents: &Uevents) {
    loop {
        match uevents.wait() {
            Ok(Hint::Look(addresses)) => broker.notice(addresses),
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

/// Until the daemon is told to stop, or the bus has gone.
async fn wait(service: &Service) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut alive = tokio::time::interval(watchdog_period());
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = service.closed() => anyhow::bail!("the bus has gone"),
            _ = alive.tick() => notify(&[sd_notify::NotifyState::Watchdog]),
        }
    }
    info!("stopping; leases stay as they are");
    notify(&[sd_notify::NotifyState::Stopping]);
    Ok(())
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
    let level =
        EnvFilter::try_from_env("VFIOD_LOG").unwrap_or_else(|_| EnvFilter::new("info,zbus=warn"));
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
