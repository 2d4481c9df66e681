//! The host's files: sysfs, procfs, device nodes and module tables below one explicit root.
//! The only module that reads or writes them. There is no default root: whoever wants the real
//! host says so, and no test can touch the machine it runs on.

use std::fmt::Debug;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sysfs_class::SysClass;

use crate::address::PciAddress;
use crate::error::Error;

/// What a simulation adds to the files of its host: its name, a file that loads the module whose name
/// is written to it, one that does what NVIDIA's program would, given the same arguments, one that
/// does what VFIO's hot reset would to all functions on the bus of the one whose address is written,
/// one that clears the memory of the function whose address is written and reads which functions
/// have something in theirs, and a directory of the regions of those whose memory can be mapped.
const SIMULATED: &str = "sim/name";
pub(crate) const LOAD_MODULE: &str = "sim/load-module";
pub(crate) const SIMULATED_SRIOV_MANAGE: &str = "sim/sriov-manage";
pub(crate) const SIMULATED_HOT_RESET: &str = "sim/hot-reset";
pub(crate) const SIMULATED_MEMORY: &str = "sim/memory";
pub(crate) const SIMULATED_REGIONS: &str = "sim/regions";

/// Where a host's kernel interfaces are found.
#[derive(Debug, Clone)]
pub struct HostRoot {
    root: PathBuf,
    patience: Option<Arc<dyn Patience>>,
}

/// Reads on behalf of somebody who must not sleep for ever.
///
/// Some attributes are read under their device's lock, which is held while a driver is unbound or
/// VFs are removed; where that never returns, neither does the reader, not even by a signal.
pub trait Patience: Debug + Send + Sync {
    /// The texts of attributes in one directory, or [`io::ErrorKind::TimedOut`].
    fn read(&self, directory: &Path, names: &[&str]) -> io::Result<Vec<io::Result<String>>>;
}

impl HostRoot {
    /// The host whose `/` is `root`: `/` for the machine itself, any other directory for a
    /// described or simulated one.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), patience: None }
    }

    /// The same host, with somebody to read what may take for ever.
    #[must_use]
    pub fn with_patience(self, patience: Arc<dyn Patience>) -> Self {
        Self { patience: Some(patience), ..self }
    }

    /// Whether this is the running machine, where device nodes are what they seem.
    pub fn is_real(&self) -> bool {
        self.root == Path::new("/")
    }

    /// The name of the described host that is simulated here; `None` where nothing says it is one.
    pub fn simulated(&self) -> Option<String> {
        let name = if self.is_real() { None } else { self.text(SIMULATED).ok()? };
        name.map(|name| name.trim().to_owned())
    }

    /// A path below the root; `path` is given without its leading slash.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root.join(path)
    }

    /// The directory of a file or folder of sysfs, given relative to `/sys`.
    pub fn sys(&self, path: impl AsRef<Path>) -> SysDir {
        SysDir { path: self.root.join("sys").join(path), patience: self.patience.clone() }
    }

    /// The sysfs directory of a PCI function.
    pub fn function(&self, address: PciAddress) -> SysDir {
        self.sys(format!("bus/pci/devices/{address}"))
    }

    /// A file of procfs, given relative to `/proc`; `None` if it is absent.
    pub fn proc(&self, path: &str) -> Result<Option<String>, Error> {
        read(&self.root.join("proc").join(path))
    }

    /// Where a symbolic link anywhere below the root points, as written; `None` if there is none.
    pub fn link(&self, path: impl AsRef<Path>) -> Option<PathBuf> {
        fs::read_link(self.root.join(path)).ok()
    }

    /// Names in a directory anywhere below the root, sorted; empty if it is absent.
    pub fn names(&self, path: impl AsRef<Path>) -> Result<Vec<String>, Error> {
        list(&self.root.join(path))
    }

    /// Ids of all processes.
    pub fn processes(&self) -> Result<Vec<u32>, Error> {
        let names = list(&self.root.join("proc"))?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// What a process has open, as its `fd` links say; nothing if it has ended meanwhile.
    pub fn open_files(&self, pid: u32) -> impl Iterator<Item = PathBuf> {
        let entries = fs::read_dir(self.root.join(format!("proc/{pid}/fd")));
        entries.into_iter().flatten().filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
    }

    /// A file of the running kernel's module directory, such as `modules.alias`; `None` if absent.
    pub fn modules(&self, file: &str) -> Result<Option<String>, Error> {
        let Some(release) = self.proc("sys/kernel/osrelease")? else { return Ok(None) };
        read(&self.root.join("lib/modules").join(release.trim()).join(file))
    }

    /// Writes `value` to a file below the root that is not in sysfs. For [`crate::step`] alone.
    pub(crate) fn write(&self, path: &str, value: &str) -> io::Result<()> {
        fs::OpenOptions::new().write(true).open(self.root.join(path))?.write_all(value.as_bytes())
    }

    /// A text file anywhere below the root; `None` if it is absent.
    pub fn text(&self, path: &str) -> Result<Option<String>, Error> {
        read(&self.root.join(path))
    }
}

/// One directory of a host's sysfs.
#[derive(Debug, Clone)]
pub struct SysDir {
    path: PathBuf,
    patience: Option<Arc<dyn Patience>>,
}

impl SysClass for SysDir {
    fn base() -> &'static str {
        "bus"
    }

    fn class() -> &'static str {
        "pci/devices"
    }

    unsafe fn from_path_unchecked(path: PathBuf) -> Self {
        Self { path, patience: None }
    }

    fn path(&self) -> &Path {
        &self.path
    }

    /// An attribute is a page at most and comes in one read, so nobody has to ask for its size.
    fn read_file<P: AsRef<Path>>(&self, name: P) -> io::Result<String> {
        read_page(&self.path.join(name))
    }
}

/// Reads an attribute, however long it takes. For whoever has [`Patience`].
pub fn read_page(attribute: &Path) -> io::Result<String> {
    let mut page = [0; PAGE];
    let length = fs::File::open(attribute)?.read(&mut page)?;
    Ok(String::from_utf8_lossy(&page[..length]).into_owned())
}

/// The most an attribute has (`sysfs_kf_seq_show`, `fs/sysfs/file.c`).
const PAGE: usize = 4096;

impl SysDir {
    /// The path of this directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A directory below this one.
    #[must_use]
    pub fn sub(&self, name: &str) -> Self {
        Self { path: self.path.join(name), patience: self.patience.clone() }
    }

    /// Whether the directory, or the entry `name` in it, exists.
    pub fn has(&self, name: &str) -> bool {
        self.path.join(name).symlink_metadata().is_ok()
    }

    /// The trimmed text of an attribute; `None` if the kernel does not offer it.
    pub fn attr(&self, name: &str) -> Result<Option<String>, Error> {
        match self.trim_file(name) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("read", &self.path.join(name))(e)),
        }
    }

    /// Like [`attr`](Self::attr), for attributes that are read under their device's lock.
    pub fn locked_attrs<const N: usize>(
        &self,
        names: [&str; N],
    ) -> [Result<Option<String>, Error>; N] {
        let Some(patience) = &self.patience else { return names.map(|name| self.attr(name)) };
        let mut texts = match patience.read(&self.path, &names) {
            Ok(texts) => texts.into_iter(),
            Err(e) => {
                let lost = |name: &str| Error::io("read", &self.path.join(name))(same(&e));
                return names.map(|name| Err(lost(name)));
            }
        };
        names.map(|name| match texts.next() {
            Some(Ok(text)) => Ok(Some(text.trim().to_owned())),
            Some(Err(e)) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Some(Err(e)) => Err(Error::io("read", &self.path.join(name))(e)),
            None => Ok(None),
        })
    }

    /// Opens a binary attribute that is read in parts; `None` if the kernel does not offer it.
    pub fn open(&self, name: &str) -> Result<Option<fs::File>, Error> {
        let path = self.path.join(name);
        match fs::File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("open", &path)(e)),
        }
    }

    /// A number that another directory at the same path does not have: sysfs gives each new one a
    /// new inode (`kernfs_new_node`, `fs/kernfs/dir.c`). `None` if there is no directory.
    pub fn instance(&self) -> Option<u64> {
        fs::metadata(&self.path).ok().map(|found| found.ino())
    }

    /// Where the symbolic link `name` points, as written; `None` if there is none.
    pub fn link(&self, name: &str) -> Option<PathBuf> {
        fs::read_link(self.path.join(name)).ok()
    }

    /// The last component of the target of link `name`: a driver, a group number, an address.
    pub fn link_name(&self, name: &str) -> Option<String> {
        Some(self.link(name)?.file_name()?.to_str()?.to_owned())
    }

    /// The names of the entries, sorted; empty if the directory is absent.
    pub fn list(&self) -> Result<Vec<String>, Error> {
        list(&self.path)
    }

    /// The names of the directories in it, without links to others, sorted; empty if it is absent.
    pub fn directories(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let mut names: Vec<String> =
            directories.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort_unstable();
        names
    }

    /// Writes `value` to the attribute `name` in one write, as the kernel expects.
    ///
    /// For [`crate::step`] alone: nothing else changes the kernel.
    pub(crate) fn write(&self, name: &str, value: &str) -> io::Result<()> {
        self.write_file(name, value)
    }
}

/// A text somebody else chose, without what a terminal would obey.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// An error once more, for another file.
fn same(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

fn read(path: &Path) -> Result<Option<String>, Error> {
    match fs::read(path) {
        // What is text already, as long tables are, is not copied.
        Ok(bytes) => Ok(Some(
            String::from_utf8(bytes)
                .unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()),
        )),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("read", path)(e)),
    }
}

fn list(path: &Path) -> Result<Vec<String>, Error> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("list", path)(e)),
    };
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort_unstable();
    Ok(names)
}
