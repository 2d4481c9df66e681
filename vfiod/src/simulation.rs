//! A simulated host for `--simulate`: starts the simulator, which mounts the host and reports its
//! events, and ends when the daemon does. Touches no device, and never the system bus.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
use tokio::sync::oneshot;
use tracing::warn;

use crate::uevent::{self, Uevents};

const PROGRAM: &str = "vfiod-sim";
/// Where it is installed, unless it is beside the daemon.
const INSTALLED: &str = "/usr/libexec";
/// Where a daemon of a real host keeps what it must remember.
const STATE: [&str; 2] = ["/run/vfiod", "/var/lib/vfiod"];

/// A host that is simulated for this daemon alone.
#[derive(Debug)]
pub struct Simulation {
    root: PathBuf,
    ended: oneshot::Receiver<io::Result<ExitStatus>>,
}

impl Simulation {
    /// Starts the simulator and waits until the host is mounted; its events are listened to from
    /// then on. `bus` is where the daemon will serve.
    pub fn start(host: &str, bus: Option<&str>) -> anyhow::Result<(Self, Uevents)> {
        if bus.is_none() {
            bail!(
                "a simulated host is not served on the system bus; start a bus for it and name it:\n\
                 \x20 export VFIOCTL_BUS=$(dbus-daemon --session --print-address --fork)\n\
                 \x20 vfiod --simulate {host} --bus \"$VFIOCTL_BUS\""
            );
        }
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let program = program()?;
        let mut command = Command::new(&program);
        command.args([host, "--report"]).stdin(Stdio::from(theirs));
        let mut child =
            command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        // Or the command's copy of the other end would keep it open for ever.
        drop(command);
        let root = root(&ours).with_context(|| format!("cannot simulate '{host}'"))?;
        let (tell, ended) = oneshot::channel();
        std::thread::spawn(move || tell.send(child.wait()));
        warn!(host, root = %root.display(), "simulated: there are no real devices here");
        Ok((Self { root, ended }, Uevents::from_simulator(ours)))
    }

    /// Where the simulated host's `/` is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A directory of the daemon's state: what would be the real host's is the simulation's own,
    /// and ends with it.
    pub fn state(&self, directory: &Path) -> PathBuf {
        let ours = STATE.iter().find_map(|state| directory.strip_prefix(state).ok());
        match ours.zip(self.root.parent()) {
            Some((below, around)) => around.join("state").join(below),
            None => directory.to_owned(),
        }
    }
}

/// Waits until the simulator has ended, which it should not; for ever if nothing is simulated.
pub async fn ended(simulation: Option<&mut Simulation>) -> anyhow::Error {
    let Some(simulation) = simulation else { return std::future::pending().await };
    match (&mut simulation.ended).await {
        Ok(Ok(status)) => anyhow::anyhow!("the simulator ended ({status}), and its host with it"),
        _ => anyhow::anyhow!("the simulator was lost, and its host with it"),
    }
}

/// The first packet: `root PATH` or `error TEXT`.
fn root(socket: &OwnedFd) -> anyhow::Result<PathBuf> {
    let mut buffer = [0; uevent::LONGEST];
    let length = loop {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    let text = String::from_utf8_lossy(&buffer[..length]);
    match text.split_once(' ') {
        Some(("root", path)) => Ok(path.into()),
        Some(("error", why)) => bail!("{why}"),
        _ => bail!("{PROGRAM} ended before the host was there; it may have said why"),
    }
}

/// The simulator's program.
fn program() -> anyhow::Result<PathBuf> {
    let ours = std::env::current_exe().context("cannot tell where this program is")?;
    let beside = ours.parent().unwrap_or(Path::new("/"));
    let found = [beside, Path::new(INSTALLED)].map(|place| place.join(PROGRAM));
    found.into_iter().find(|program| program.is_file()).with_context(|| {
        format!(
            "{PROGRAM} is neither in {} nor in {INSTALLED}; install the package, or build it: cargo \
             build -p vfiod-tests --features sim --bin {PROGRAM}",
            beside.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_of_a_simulation_is_never_that_of_the_real_host() {
        let (_tell, ended) = oneshot::channel();
        let simulation = Simulation { root: "/tmp/vfiod-sim-1/root".into(), ended };
        let place = |directory: &str| simulation.state(Path::new(directory));
        assert_eq!(place("/run/vfiod/leases"), Path::new("/tmp/vfiod-sim-1/state/leases"));
        assert_eq!(place("/var/lib/vfiod"), Path::new("/tmp/vfiod-sim-1/state"));
        assert_eq!(place("/home/me/leases"), Path::new("/home/me/leases"));
        assert_eq!(place("/run/vfiodx"), Path::new("/run/vfiodx"));
    }

    #[test]
    fn the_system_bus_is_refused_before_anything_starts() {
        let error = Simulation::start("workstation", None).unwrap_err().to_string();
        assert!(error.contains("dbus-daemon --session --print-address --fork"), "{error}");
    }
}
