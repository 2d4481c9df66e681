//! Files that are whole after a crash: written beside, synced, renamed. Touches only the paths it
//! is given, and never follows a link that is in their place.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

/// Most bytes that are read of a file; ours are far smaller.
const LARGEST: u64 = 16 << 20;

/// A file that was not understood, and where it was put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetAside {
    /// Where it is now.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

/// Makes a directory for root alone, if need be.
pub(crate) fn directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Replaces the file at `path`. A crash leaves the old bytes or the new ones; when this returns,
/// not even a power loss brings the old ones back.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let Draft { path: draft, on_disk } = draft(path, bytes)?;
    fs::rename(draft, path)?;
    if on_disk { sync_directory_of(path) } else { Ok(()) }
}

/// As [`replace`], for everyone to read.
pub(crate) fn replace_for_all(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let Draft { path: draft, on_disk } = draft(path, bytes)?;
    fs::set_permissions(&draft, fs::Permissions::from_mode(0o644))?;
    fs::rename(draft, path)?;
    if on_disk { sync_directory_of(path) } else { Ok(()) }
}

/// The bytes of a plain file; `None` if there is nothing at `path`.
pub(crate) fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    // Opening a pipe that somebody put there must not wait for its writer.
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = match OpenOptions::new().read(true).custom_flags(flags.bits()).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) if e.raw_os_error() == Some(Errno::ELOOP as i32) => {
            return Err(io::Error::other("it is a symbolic link"));
        }
        Err(e) => return Err(e),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no plain file"));
    }
    let mut bytes = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LARGEST {
        return Err(io::Error::other(format!("it has more than {LARGEST} bytes")));
    }
    Ok(Some(bytes))
}

/// Moves whatever is at `path` out of the way, for a person to look at.
pub(crate) fn set_aside(path: &Path, reason: impl Into<String>) -> SetAside {
    let mut place = path.as_os_str().to_owned();
    place.push(".unreadable");
    let reason = reason.into();
    match fs::rename(path, &place) {
        Ok(()) => SetAside { path: place.into(), reason },
        Err(error) => SetAside {
            path: path.to_owned(),
            reason: format!("{reason}; it stays where it is: {error}"),
        },
    }
}

/// Bytes beside the place where they belong.
struct Draft {
    path: PathBuf,
    /// Whether they are on a disk: what is in memory ends with the host, synced or not.
    on_disk: bool,
}

/// Writes the bytes beside `path`, for good.
fn draft(path: &Path, bytes: &[u8]) -> io::Result<Draft> {
    let draft = path.with_extension("new");
    let written = create(&draft).and_then(|mut file| {
        file.write_all(bytes)?;
        let on_disk = is_on_disk(&file);
        if on_disk {
            file.sync_data()?;
        }
        Ok(on_disk)
    });
    match written {
        Ok(on_disk) => Ok(Draft { path: draft, on_disk }),
        Err(error) => {
            // On a full file system half a draft only takes room from the next one.
            let _ = fs::remove_file(&draft);
            Err(error)
        }
    }
}

/// Whether a file outlives the host, unless it is known not to.
pub(crate) fn is_on_disk(file: &File) -> bool {
    fstatfs(file).map_or(true, |fs| fs.filesystem_type() != TMPFS_MAGIC)
}

/// A new file, whatever an interrupted write or somebody else left in its place.
fn create(draft: &Path) -> io::Result<File> {
    let new = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(draft);
    match new() {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_file(draft)?;
            new()
        }
        result => result,
    }
}

fn sync_directory_of(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_data())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        assert_eq!(read(&path).unwrap(), None);
        for bytes in [b"1", b"2"] {
            replace(&path, bytes).unwrap();
            assert_eq!(read(&path).unwrap().unwrap(), bytes);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn links_and_pipes_are_neither_read_nor_written_through() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::write(&outside, "theirs").unwrap();
        let path = dir.path().join("a.json");
        for link in ["a.json", "a.new"] {
            symlink(&outside, dir.path().join(link)).unwrap();
        }
        assert!(read(&path).unwrap_err().to_string().contains("symbolic link"));
        replace(&path, b"ours").unwrap();
        assert_eq!(read(&path).unwrap().unwrap(), b"ours");
        assert_eq!(fs::read(&outside).unwrap(), b"theirs");
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(read(&pipe).unwrap_err().to_string().contains("plain file"));
        assert!(read(dir.path()).is_err());
    }

    #[test]
    fn a_directory_in_the_way_is_moved_or_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        fs::create_dir(&path).unwrap();
        let aside = set_aside(&path, "it is a directory");
        assert!(aside.path.ends_with("a.json.unreadable") && aside.path.is_dir());
        fs::write(&path, "x").unwrap();
        let aside = set_aside(&path, "no lease");
        assert_eq!(aside.path, path);
        assert!(aside.reason.contains("stays where it is"), "{}", aside.reason);
    }
}
