//! The simulated kernel as a FUSE file system: translates, and decides nothing of what a host is or
//! does.
//!
//! The real kernel caches nothing that can change, so what one process writes the next one reads.
//! Each write, and each opening of a node, runs on a thread of its own, as in a kernel it runs on
//! its caller's.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, Notifier, OpenAccMode, OpenFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite,
    ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use nix::unistd::{getegid, geteuid};

use super::inodes::Inodes;
use super::kernel::Stop;
use super::open::Opener;
use super::tree::Entry;
use super::waiting::Shared;

/// The file system.
pub(super) struct Glue {
    shared: Arc<Shared>,
    inodes: Arc<Mutex<Inodes>>,
    listings: Mutex<Listings>,
    /// Who is root on this host: whoever mounts it.
    owner: (u32, u32),
    /// Whether no write sleeps.
    lasting: bool,
}

/// Open directories by handle.
#[derive(Default)]
struct Listings {
    open: BTreeMap<u64, Vec<(String, FileType)>>,
    last: u64,
}

impl fmt::Debug for Glue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Glue").finish_non_exhaustive()
    }
}

/// The attribute that holds the access control list of a node; there are no others.
const LIST: &str = "system.posix_acl_access";
/// The size of every attribute of sysfs, whatever it holds.
const PAGE: u64 = 4096;
/// How long the real kernel may believe that something is there, if it can come and go.
const NO_TIME: Duration = Duration::ZERO;
/// How long it may believe what never changes, or what it is told the end of: the directories every
/// host has, those of functions and what is in them, which driver they are on, and everywhere the kind
/// and mode of what is there.
const ALWAYS: Duration = Duration::from_secs(1 << 30);

impl Glue {
    pub(super) fn new(shared: Arc<Shared>, lasting: bool) -> Self {
        let owner = (geteuid().as_raw(), getegid().as_raw());
        Self { shared, inodes: Arc::default(), listings: Mutex::default(), owner, lasting }
    }

    /// The numbers it gives.
    pub(super) fn numbers(&self) -> Arc<Mutex<Inodes>> {
        self.inodes.clone()
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

    /// What is in a directory when it is opened, so that changes while it is read neither hide nor
    /// repeat anything.
    fn list(&self, number: INodeNo) -> Result<Vec<(String, FileType)>, Errno> {
        let path = self.path(number)?;
        let below = |name: &str| {
            if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") }
        };
        self.shared.with(|kernel| {
            let names = kernel.names(&path).ok_or(Errno::ENOENT)?;
            let kind = |name: String| Some((kind(&kernel.entry(&below(&name))?), name));
            let listed = names.into_iter().filter_map(kind).map(|(kind, name)| (name, kind));
            let dots = [".", ".."].map(|name| (name.to_owned(), FileType::Directory));
            Ok(dots.into_iter().chain(listed).collect())
        })
    }

    fn listings(&self) -> MutexGuard<'_, Listings> {
        self.listings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node that is to be opened, if it is one; nothing waits for a file.
    fn open_at(&self, number: INodeNo, flags: OpenFlags) -> Result<Option<Arc<str>>, Errno> {
        let (path, entry) = self.entry(number)?;
        let mode = match entry {
            Entry::Directory | Entry::Link(_) => return Err(Errno::EISDIR),
            Entry::File(mode) => mode,
            Entry::Node => return Ok(Some(path)),
        };
        // `kernfs_fop_open` holds even the superuser to what a file is for.
        let allowed = match flags.acc_mode() {
            OpenAccMode::O_RDONLY => mode & 0o444 != 0,
            OpenAccMode::O_WRONLY => mode & 0o222 != 0,
            OpenAccMode::O_RDWR => mode & 0o444 != 0 && mode & 0o222 != 0,
        };
        if allowed { Ok(None) } else { Err(Errno::EACCES) }
    }
}

fn fuse_errno(errno: nix::errno::Errno) -> Errno {
    Errno::from_i32(errno as i32)
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

fn kind(entry: &Entry) -> FileType {
    match entry {
        Entry::Directory => FileType::Directory,
        Entry::Link(_) => FileType::Symlink,
        Entry::File(_) | Entry::Node => FileType::RegularFile,
    }
}

fn attributes(number: u64, entry: &Entry, (uid, gid): (u32, u32)) -> FileAttr {
    let (perm, size) = match entry {
        Entry::Directory => (0o755, 0),
        Entry::Link(target) => (0o777, target.len() as u64),
        Entry::File(mode) => (*mode, PAGE),
        Entry::Node => (0o600, PAGE),
    };
    FileAttr {
        ino: INodeNo(number),
        size,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: kind(entry),
        perm,
        nlink: 1,
        uid,
        gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// What the real kernel believes is there.
#[derive(Debug)]
pub(super) struct Cache {
    inodes: Arc<Mutex<Inodes>>,
    notifier: Notifier,
}

impl Cache {
    pub(super) fn new(inodes: Arc<Mutex<Inodes>>, notifier: Notifier) -> Self {
        Self { inodes, notifier }
    }

    /// Has the real kernel look again at what is at a path, if anything is. Waits for those who do
    /// that in the same directory now.
    pub(super) fn forget(&self, path: &str) {
        let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
        let above = {
            let mut inodes = self.inodes.lock().unwrap_or_else(PoisonError::into_inner);
            inodes.retire(path);
            inodes.number(above)
        };
        if let Some(above) = above {
            // It fails where the host is being unmounted; then nobody looks any more.
            let _ = self.notifier.inval_entry(INodeNo(above), OsStr::new(name));
        }
    }
}

impl Filesystem for Glue {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // A kernel without it asks again each time.
        let _ = config.add_capabilities(InitFlags::FUSE_CACHE_SYMLINKS);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let path = name.to_str().and_then(|name| self.inodes().child(parent.0, name));
        let Some(path) = path else { return reply.error(Errno::ENOENT) };
        let (entry, stays) = self.shared.with(|kernel| match kernel.entry(&path) {
            None => (None, kernel.stays_away(&path)),
            entry => {
                let lasts = self.lasting && kernel.is_attribute(&path);
                (entry, lasts || kernel.stays(&path))
            }
        });
        let (entry, number) = match entry {
            Some(entry) => {
                // The real kernel lets one writer at a time have an inode, and one that sleeps must
                // not keep all others out, as it does not in sysfs; and it keeps where an inode's
                // link leads.
                let fresh = match entry {
                    Entry::File(mode) => !stays && mode & 0o222 != 0,
                    Entry::Link(_) => !stays,
                    Entry::Directory | Entry::Node => false,
                };
                let number = self.inodes().remember(path, fresh);
                (entry, number)
            }
            // By this number the real kernel knows that nothing is there, and for how long.
            None if stays => (Entry::Directory, 0),
            None => return reply.error(Errno::ENOENT),
        };
        let there = if stays { ALWAYS } else { NO_TIME };
        let found = attributes(number, &entry, self.owner);
        reply.entry_with_ttls(&ALWAYS, &there, &found, Generation(0));
    }

    fn forget(&self, _: &Request, number: INodeNo, lookups: u64) {
        self.inodes().forget(number.0, lookups);
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.entry(number) {
            Ok((_, entry)) => reply.attr(&ALWAYS, &attributes(number.0, &entry, self.owner)),
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
        let path = match self.open_at(number, flags) {
            Ok(Some(path)) => path,
            Ok(None) => return reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO),
            Err(errno) => return reply.error(errno),
        };
        let (shared, caller) = (self.shared.clone(), request.pid());
        std::thread::spawn(move || {
            let opener = opener(caller);
            match shared.call(caller, |kernel| kernel.open(&path, &opener)) {
                Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO),
                Err(errno) => reply.error(fuse_errno(errno)),
            }
        });
    }

    /// `lookup_open` (`fs/namei.c`) where a directory makes no files, as none here does.
    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EACCES);
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
            self.shared.closed(handle.0);
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
        let path = match self.path(number) {
            Ok(path) => path,
            Err(errno) => return reply.error(errno),
        };
        match self.shared.with(|kernel| kernel.read(&path)) {
            Ok(mut bytes) => {
                if ![0, self.owner.0].contains(&request.uid()) && path.ends_with("/config") {
                    bytes.truncate(64);
                }
                let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                let to = from.saturating_add(size as usize).min(bytes.len());
                reply.data(&bytes[from..to]);
            }
            Err(Stop::Errno(errno)) => reply.error(fuse_errno(errno)),
            // Reads hardly ever sleep, and get a thread of their own when they do.
            Err(stop) => {
                let (shared, caller) = (self.shared.clone(), request.pid());
                std::thread::spawn(move || {
                    let mut stop = Some(stop);
                    let again = shared.call(caller, |kernel| match stop.take() {
                        Some(stop) => Err(stop),
                        None => kernel.read(&path),
                    });
                    match again {
                        Ok(bytes) => reply.data(&bytes),
                        Err(errno) => reply.error(fuse_errno(errno)),
                    }
                });
            }
        }
    }

    fn write(
        &self,
        request: &Request,
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
        let (shared, data, caller) = (self.shared.clone(), data.to_vec(), request.pid());
        std::thread::spawn(move || {
            match shared.call(caller, |kernel| kernel.write(&path, &data)) {
                Ok(pause) => {
                    std::thread::sleep(pause);
                    reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX));
                }
                Err(errno) => reply.error(fuse_errno(errno)),
            }
        });
    }

    fn getxattr(&self, _: &Request, number: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let found = self.entry(number).and_then(|(path, entry)| match entry {
            Entry::Node if name == LIST => {
                let list = self.shared.with(|kernel| kernel.list(&path).map(<[u8]>::to_vec));
                list.ok_or(Errno::ENODATA)
            }
            _ => Err(Errno::EOPNOTSUPP),
        });
        match found {
            Ok(list) if size == 0 => reply.size(u32::try_from(list.len()).unwrap_or(u32::MAX)),
            Ok(list) if list.len() > size as usize => reply.error(Errno::ERANGE),
            Ok(list) => reply.data(&list),
            Err(errno) => reply.error(errno),
        }
    }

    fn setxattr(
        &self,
        request: &Request,
        number: INodeNo,
        name: &OsStr,
        value: &[u8],
        _: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        let path = match self.entry(number) {
            Ok((path, Entry::Node)) if name == LIST => path,
            Ok(_) => return reply.error(Errno::EOPNOTSUPP),
            Err(errno) => return reply.error(errno),
        };
        let (shared, value, caller) = (self.shared.clone(), value.to_vec(), request.pid());
        std::thread::spawn(move || {
            match shared.call(caller, |kernel| kernel.set_list(&path, &value)) {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(fuse_errno(errno)),
            }
        });
    }

    fn opendir(&self, _: &Request, number: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.list(number) {
            Ok(names) => {
                let mut listings = self.listings();
                listings.last += 1;
                let handle = listings.last;
                listings.open.insert(handle, names);
                reply.opened(FileHandle(handle), FopenFlags::empty());
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let listings = self.listings();
        let names = listings.open.get(&handle.0).into_iter().flatten();
        for ((name, kind), next) in names.zip(1..).skip(from) {
            // Numbers are given by lookups; none is known here.
            if reply.add(INodeNo(u64::MAX), next, *kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.listings().open.remove(&handle.0);
        reply.ok();
    }
}
