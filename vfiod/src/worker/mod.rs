//! Worker processes: whatever may sleep in the kernel for ever is done by one of them, so that the
//! daemon, its end and every other device go on. A worker is this program started again; it does
//! one thing at a time, as asked over a socket. Decides nothing.
//!
//! Why a process: a thread that sleeps uninterruptibly keeps its whole process from ending.

mod deadlines;
mod packet;
mod reader;
mod serve;
mod turns;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libvfio::address::PciAddress;
use libvfio::backend::Offer;
use libvfio::step::{Outcome, Step, StepError};
use libvfio::vfio::Interface;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde::{Deserialize, Serialize};

use turns::Turns;

use crate::crash;

pub use deadlines::{Deadline, Deadlines};
pub use reader::Reader;
pub use serve::{asked_for, serve};
pub use turns::Turn;

/// Most workers that are kept for the next request: to start one takes longer than most requests.
const MOST_IDLE: usize = 16;
/// How many of them are kept when nothing happens.
const FEW_IDLE: usize = 2;
/// Most steps that are carried out at a time. More processes than that only wait for each other, and
/// one that is late counts no more.
const MOST_STEPPING: usize = 16;
/// Most descriptors in an answer, and so in a lease that is opened: buses carry no more in a message
/// (`max_message_unix_fds`, dbus-daemon(1)).
pub const MOST_DESCRIPTORS: usize = 16;

/// What a worker is asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Request {
    /// Carry a step out. A descriptor that holds the lease's lock comes with it.
    Step(Step),
    /// Read attributes.
    Read(Vec<PathBuf>),
    /// Read what can be set on a virtual function.
    Offers(PciAddress),
    /// Open nodes below `/dev/vfio`; their descriptors come with the answer.
    Open(Vec<PathBuf>),
    /// Open what translates for devices; likewise.
    OpenIommu(Interface),
}

/// Whether nodes were opened, or which was not and the kernel's error.
type Opened = Result<(), (PathBuf, i32)>;

/// What came of a step.
pub type Carried = Result<Outcome, StepError>;

/// Why nodes were not opened.
#[derive(Debug, thiserror::Error)]
pub enum NotOpened {
    /// The kernel said no.
    #[error("cannot open {}: {}", .0.display(), .1.desc())]
    Kernel(PathBuf, Errno),
    /// It did not say anything in time.
    #[error("the kernel did not open it within {} s", .0.as_secs())]
    Late(Duration),
    /// The worker could not be asked.
    #[error("no worker could open it: {0}; see the journal of vfiod")]
    Lost(#[from] io::Error),
}

/// The workers of one host.
#[derive(Debug)]
pub struct Workers {
    program: PathBuf,
    root: PathBuf,
    idle: Mutex<Vec<Worker>>,
    stepping: Turns,
}

/// A process and the socket to it. Ends with it.
#[derive(Debug)]
struct Worker {
    socket: OwnedFd,
    child: Child,
    buffer: packet::Buffer,
}

/// A request under way. To drop it is to kill its worker and wait for that, so it is kept until it
/// is answered.
#[derive(Debug)]
pub struct Call {
    workers: Arc<Workers>,
    worker: Worker,
}

impl Workers {
    /// Workers of the host below `root`. `program worker --root ROOT` is to call [`serve`].
    pub fn new(program: impl Into<PathBuf>, root: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            root: root.into(),
            idle: Mutex::default(),
            stepping: Turns::new(MOST_STEPPING),
        }
    }

    /// Waits until a step may be carried out.
    pub fn turn(&self) -> Turn<'_> {
        self.stepping.take()
    }

    /// Has a step carried out by a process that keeps `lock` open until it is.
    pub fn step(self: &Arc<Self>, step: &Step, lock: Option<&File>) -> io::Result<Call> {
        let lock = lock.map(AsRawFd::as_raw_fd);
        self.ask(&Request::Step(step.clone()), lock.as_slice())
    }

    fn read(self: &Arc<Self>, attributes: Vec<PathBuf>) -> io::Result<Call> {
        self.ask(&Request::Read(attributes), &[])
    }

    /// Reads what can be set on a virtual function, for `limit` at most. The kernel holds locks
    /// meanwhile, that of all network interfaces among them, and a driver that hangs may hold them
    /// for ever.
    pub fn offers(self: &Arc<Self>, device: PciAddress, limit: Duration) -> io::Result<Vec<Offer>> {
        let call = self.ask(&Request::Offers(device), &[])?;
        match call.answer::<Result<Vec<Offer>, String>>(Some(limit))? {
            Ok(read) => read.map_err(io::Error::other),
            Err(call) => {
                // Kept until it is answered, if it ever is.
                std::thread::spawn(move || call.answer::<serde_json::Value>(None).map(drop));
                Err(io::ErrorKind::TimedOut.into())
            }
        }
    }

    /// Opens nodes, each in its place.
    pub fn open(
        self: &Arc<Self>,
        paths: Vec<PathBuf>,
        limit: Duration,
    ) -> Result<Vec<OwnedFd>, NotOpened> {
        self.opened(&Request::Open(paths), limit)
    }

    /// Opens what translates for devices that are opened by this interface.
    pub fn open_iommu(
        self: &Arc<Self>,
        interface: Interface,
        limit: Duration,
    ) -> Result<OwnedFd, NotOpened> {
        let opened = self.opened(&Request::OpenIommu(interface), limit)?;
        let missing = || io::Error::other("the worker sent no descriptor");
        Ok(opened.into_iter().next().ok_or_else(missing)?)
    }

    fn opened(
        self: &Arc<Self>,
        request: &Request,
        limit: Duration,
    ) -> Result<Vec<OwnedFd>, NotOpened> {
        let call = self.ask(request, &[])?;
        match call.answer_with::<Opened>(Some(limit))? {
            Ok((opened, descriptors)) => {
                let refused = |(path, errno)| NotOpened::Kernel(path, Errno::from_raw(errno));
                opened.map(|()| descriptors).map_err(refused)
            }
            Err(call) => {
                // Whatever is opened after all is closed again.
                std::thread::spawn(move || call.answer::<serde_json::Value>(None).map(drop));
                Err(NotOpened::Late(limit))
            }
        }
    }

    fn ask(self: &Arc<Self>, request: &Request, descriptors: &[RawFd]) -> io::Result<Call> {
        let packet = serde_json::to_vec(request)?;
        while let Some(worker) = self.idle().pop() {
            // One that has ended since it was last asked has done nothing.
            if worker.send(&packet, descriptors).is_ok() {
                return Ok(Call { workers: self.clone(), worker });
            }
        }
        let worker = Worker::start(&self.program, &self.root)?;
        worker.send(&packet, descriptors)?;
        Ok(Call { workers: self.clone(), worker })
    }

    /// Starts a worker for the next request if few wait for one, so that it does not wait for that.
    pub fn prepare(&self) -> io::Result<()> {
        if self.idle().len() >= FEW_IDLE {
            return Ok(());
        }
        let worker = Worker::start(&self.program, &self.root)?;
        self.idle().push(worker);
        Ok(())
    }

    /// Ends most of the workers that have nothing to do; to be called now and then.
    pub fn rest(&self) {
        let mut idle = self.idle();
        let kept = idle.len().min(FEW_IDLE);
        let ended = idle.split_off(kept);
        drop(idle);
        drop(ended);
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Worker>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put_back(&self, worker: Worker) {
        let mut idle = self.idle();
        if idle.len() < MOST_IDLE {
            idle.push(worker);
        }
    }
}

impl Call {
    /// Waits for what came of a step, for `limit` at most; the call itself if nothing did by then.
    /// A worker that ended is an error: the step may or may not have happened.
    pub fn carried(self, limit: Option<Duration>) -> io::Result<Result<Carried, Self>> {
        self.answer(limit)
    }

    fn answer<T: for<'de> Deserialize<'de>>(
        self,
        limit: Option<Duration>,
    ) -> io::Result<Result<T, Self>> {
        Ok(self.answer_with(limit)?.map(|(answer, _)| answer))
    }

    /// The same, with the descriptors that come along.
    fn answer_with<T: for<'de> Deserialize<'de>>(
        mut self,
        limit: Option<Duration>,
    ) -> io::Result<Result<(T, Vec<OwnedFd>), Self>> {
        let Some((packet, descriptors)) = self.worker.receive(limit)? else {
            return Ok(Err(self));
        };
        let answer = serde_json::from_slice(packet)?;
        self.workers.put_back(self.worker);
        Ok(Ok((answer, descriptors)))
    }
}

impl Worker {
    fn start(program: &Path, root: &Path) -> io::Result<Self> {
        let (socket, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let child = Command::new(program)
            .arg0("vfiod")
            .arg("worker")
            .arg("--root")
            .arg(root)
            .stdin(theirs)
            .stdout(Stdio::null())
            .env_remove(crash::VARIABLE)
            // Whoever interrupts the daemon at a terminal does not mean a step half done.
            .process_group(0)
            .spawn()
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", program.display())))?;
        Ok(Self { socket, child, buffer: packet::Buffer::default() })
    }

    fn send(&self, packet: &[u8], descriptors: &[RawFd]) -> io::Result<()> {
        Ok(packet::send(&self.socket, packet, descriptors)?)
    }

    /// Its answer; `None` after `limit`.
    fn receive(&mut self, limit: Option<Duration>) -> io::Result<Option<(&[u8], Vec<OwnedFd>)>> {
        let until = limit.map(|limit| Instant::now() + limit);
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let timeout = match left {
                // Rounded up, or the last millisecond would be spent in a busy loop.
                Some(left) => PollTimeout::try_from(left + Duration::from_millis(1))
                    .unwrap_or(PollTimeout::MAX),
                None => PollTimeout::NONE,
            };
            let mut polled =
                [PollFd::new(std::os::fd::AsFd::as_fd(&self.socket), PollFlags::POLLIN)];
            match poll(&mut polled, timeout) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok(0) if left.is_some_and(|left| left.is_zero()) => return Ok(None),
                Ok(0) => {}
                Ok(_) => break,
            }
        }
        let (packet, descriptors) = packet::receive(&self.socket, &mut self.buffer)?;
        if packet.is_empty() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the worker process ended"));
        }
        Ok(Some((packet, descriptors)))
    }
}

impl Drop for Worker {
    /// Only those are dropped that do nothing or have ended.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
