//! The simulated kernel as a FUSE file system. Waits where a kernel would make its callers wait;
//! decides nothing of what a host is or does.
//!
//! Nothing that can change is cached by the real kernel, so what one process writes the next one
//! reads. Each write runs on a thread of its own, as in a kernel it runs on its writer's.

use std::ffi::OsStr;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::inodes::Inodes;
use super::kernel::{Kernel, Stop};
use super::open::Opener;
use super::tree::Entry;

/// A kernel and those who wait for it.
#[derive(Debug)]
pub(super) struct Shared {
    kernel: Mutex<State>,
    /// Something was closed, or the simulation ends.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    kernel: Kernel,
    ended: bool,
}

impl Shared {
    pub(super) fn new(kernel: Kernel) -> Self {
        let state = State { kernel, ended: false };
        Self { kernel: Mutex::new(state), changed: Condvar::new() }
    }

    pub(super) fn with<T>(&self, act: impl FnOnce(&mut Kernel) -> T) -> T {
        act(&mut self.lock().kernel)
    }

    /// Lets go all who wait, with an error, and everyone who would from now on.
    pub(super) fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// A test that panics while it looks at the kernel leaves it as it was.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something for as long as it sleeps.
    fn call<T>(&self, mut act: impl FnMut(&mut Kernel) -> Result<T, Stop>) -> Result<T, Errno> {
        let mut state = self.lock();
        loop {
            match act(&mut state.kernel) {
                Ok(done) => return Ok(done),
                Err(Stop::Errno(errno)) => return Err(errno_of(errno)),
                Err(Stop::Held(_)) if !state.ended => state = self.wait(state),
                Err(Stop::Forever) => {
                    while !state.ended {
                        state = self.wait(state);
                    }
                    return Err(Errno::EIO);
                }
                Err(Stop::Held(_)) => return Err(Errno::EIO),
            }
        }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

fn errno_of(errno: nix::errno::Errno) -> Errno {
    Errno::from_i32(errno as i32)
}

/// The file system.
pub(super) struct Glue {
    shared: Arc<Shared>,
    inodes: Mutex<Inodes>,
}

impl fmt::Debug for Glue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Glue").finish_non_exhaustive()
    }
}

/// The size of every attribute of sysfs, whatever it holds.
const PAGE: u64 = 4096;
/// For how long the real kernel may believe what it was told.
const NO_TIME: Duration = Duration::ZERO;

impl Glue {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, inodes: Mutex::new(Inodes::default()) }
    }

    fn inodes(&self) -> MutexGuard<'_, Inodes> {
        self.inodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, number: INodeNo) -> Result<Arc<str>, Errno> {
        self.inodes().path(number.0).ok_or(Errno::ESTALE)
    }

    /// What is at an inode now. Its path may name nothing any more.
    fn entry(&self, number: INodeNo) -> Result<(Arc<str>, Entry), Errno> {
        let path = self.path(number)?;
        let entry = self.shared.with(|kernel| kernel.entry(&path)).ok_or(Errno::ENOENT)?;
        Ok((path, entry))
    }

    fn list(&self, number: INodeNo, offset: u64, reply: &mut ReplyDirectory) -> Result<(), Errno> {
        let path = self.path(number)?;
        let names = self.shared.with(|kernel| kernel.names(&path)).ok_or(Errno::ENOENT)?;
        let dots = [".", ".."].map(str::to_owned);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (name, next) in dots.into_iter().chain(names).zip(1..).skip(from) {
            // The kernel asks for the type itself when it looks a name up.
            if reply.add(INodeNo(u64::MAX), next, FileType::RegularFile, name) {
                break;
            }
        }
        Ok(())
    }

    fn read_at(&self, request: &Request, number: INodeNo) -> Result<Vec<u8>, Errno> {
        let path = self.path(number)?;
        let mut bytes = self.shared.call(|kernel| kernel.read(&path))?;
        if request.uid() != 0 && path.ends_with("/config") {
            bytes.truncate(64);
        }
        Ok(bytes)
    }

    fn open_at(&self, request: &Request, number: INodeNo, flags: OpenFlags) -> Result<u64, Errno> {
        let (path, entry) = self.entry(number)?;
        let mode = match entry {
            Entry::Directory | Entry::Link(_) => return Err(Errno::EISDIR),
            Entry::File(mode) => mode,
            Entry::Node => {
                let opener = opener(request.pid());
                return self.shared.with(|kernel| kernel.open(&path, opener)).map_err(errno_of);
            }
        };
        // `kernfs_fop_open` holds even the superuser to what a file is for.
        let allowed = match flags.acc_mode() {
            OpenAccMode::O_RDONLY => mode & 0o444 != 0,
            OpenAccMode::O_WRONLY => mode & 0o222 != 0,
            OpenAccMode::O_RDWR => mode & 0o444 != 0 && mode & 0o222 != 0,
        };
        if allowed { Ok(0) } else { Err(Errno::EACCES) }
    }
}

/// The process of a thread. Both are of this machine, where whoever opens a node runs.
fn opener(thread: u32) -> Opener {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
        line.unwrap_or_default().to_owned()
    };
    Opener { pid: field("Tgid").parse().unwrap_or(thread), command: field("Name") }
}

fn attributes(number: u64, entry: &Entry) -> FileAttr {
    let (kind, perm, size) = match entry {
        Entry::Directory => (FileType::Directory, 0o755, 0),
        Entry::Link(target) => (FileType::Symlink, 0o777, target.len() as u64),
        Entry::File(mode) => (FileType::RegularFile, *mode, PAGE),
        Entry::Node => (FileType::RegularFile, 0o600, PAGE),
    };
    FileAttr {
        ino: INodeNo(number),
        size,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for Glue {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = (|| {
            let path = self.inodes().child(parent.0, name.to_str()?)?;
            let entry = self.shared.with(|kernel| kernel.entry(&path))?;
            let writable = matches!(entry, Entry::File(mode) if mode & 0o222 != 0);
            Some((self.inodes().remember(path, writable), entry))
        })();
        match found {
            Some((number, entry)) => {
                reply.entry(&NO_TIME, &attributes(number, &entry), Generation(0));
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn forget(&self, _: &Request, number: INodeNo, lookups: u64) {
        self.inodes().forget(number.0, lookups);
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.entry(number) {
            Ok((_, entry)) => reply.attr(&NO_TIME, &attributes(number.0, &entry)),
            Err(errno) => reply.error(errno),
        }
    }

    /// Truncation before a write means nothing to sysfs, and modes and times do not last.
    fn setattr(
        &self,
        request: &Request,
        number: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<std::time::SystemTime>,
        handle: Option<FileHandle>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.getattr(request, number, handle, reply);
    }

    fn readlink(&self, _: &Request, number: INodeNo, reply: ReplyData) {
        match self.entry(number) {
            Ok((_, Entry::Link(target))) => reply.data(target.as_bytes()),
            Ok(_) => reply.error(Errno::EINVAL),
            Err(errno) => reply.error(errno),
        }
    }

    fn open(&self, request: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.open_at(request, number, flags) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO),
            Err(errno) => reply.error(errno),
        }
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        if handle.0 != 0 {
            self.shared.with(|kernel| kernel.close(handle.0));
            self.shared.changed.notify_all();
        }
        reply.ok();
    }

    fn read(
        &self,
        request: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.read_at(request, number) {
            Ok(bytes) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                let to = from.saturating_add(size as usize).min(bytes.len());
                reply.data(&bytes[from..to]);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        _: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let path = match self.path(number) {
            Ok(path) => path,
            Err(errno) => return reply.error(errno),
        };
        let (shared, data) = (self.shared.clone(), data.to_vec());
        std::thread::spawn(move || match shared.call(|kernel| kernel.write(&path, &data)) {
            Ok(pause) => {
                std::thread::sleep(pause);
                reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX));
            }
            Err(errno) => reply.error(errno),
        });
    }

    fn readdir(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        match self.list(number, offset, &mut reply) {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }
}
