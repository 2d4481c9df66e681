//! Who else may open a node: entries for single users in its access control list, as Linux keeps it
//! (`include/uapi/linux/posix_acl_xattr.h`). Touches the node it is given; [`crate::step`] alone has
//! anything written.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{XattrFlags, getxattr, setxattr};
use rustix::io::Errno;

const ATTRIBUTE: &str = "system.posix_acl_access";
/// `POSIX_ACL_XATTR_VERSION`.
const VERSION: u32 = 2;
/// The longest list that is read: some five hundred users.
const LONGEST: usize = 4096;
/// To read and write.
const READ_WRITE: u16 = 6;
/// The id of an entry that is not of one user or group (`ACL_UNDEFINED_ID`).
const NOBODY: u32 = u32::MAX;

const OWNER: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP: u16 = 0x04;
const NAMED_GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHERS: u16 = 0x20;

/// An access control list, in the kernel's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acl(Vec<Entry>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    tag: u16,
    id: u32,
    permissions: u16,
}

impl Acl {
    /// What the mode of a file without a list says.
    pub fn of_mode(mode: u32) -> Self {
        let entry = |tag, shift: u32| Entry {
            tag,
            id: NOBODY,
            permissions: u16::try_from(mode >> shift & 7).unwrap_or(0),
        };
        Self(vec![entry(OWNER, 6), entry(GROUP, 3), entry(OTHERS, 0)])
    }

    /// The list in an attribute's value; `None` if it is none.
    pub fn parse(value: &[u8]) -> Option<Self> {
        let (version, entries) = value.split_first_chunk::<4>()?;
        if u32::from_le_bytes(*version) != VERSION || entries.len() % 8 != 0 {
            return None;
        }
        let entry = |bytes: &[u8]| {
            let number =
                |at: usize| Some(u16::from_le_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
            let id = u32::from(number(4)?) | u32::from(number(6)?) << 16;
            Some(Entry { tag: number(0)?, permissions: number(2)?, id })
        };
        entries.chunks(8).map(entry).collect::<Option<_>>().map(Self)
    }

    /// The value of an attribute with this list.
    pub fn value(&self) -> Vec<u8> {
        let mut value = VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            value.extend(entry.tag.to_le_bytes());
            value.extend(entry.permissions.to_le_bytes());
            value.extend(entry.id.to_le_bytes());
        }
        value
    }

    /// Whether an entry of its own lets this user read and write, and the mask does not forbid it.
    pub fn allows(&self, user: u32) -> bool {
        let both = |entry: &Entry| entry.permissions & READ_WRITE == READ_WRITE;
        let own = self.0.iter().any(|e| e.tag == USER && e.id == user && both(e));
        own && self.0.iter().all(|entry| entry.tag != MASK || both(entry))
    }

    /// The list with an entry for this user, or without one.
    #[must_use]
    pub fn with(mut self, user: u32, allowed: bool) -> Self {
        self.0.retain(|entry| entry.tag != MASK && !(entry.tag == USER && entry.id == user));
        if allowed {
            self.0.push(Entry { tag: USER, id: user, permissions: READ_WRITE });
        }
        // A list without users or groups is the mode, and has no mask (`posix_acl_equiv_mode`).
        if self.0.iter().any(|entry| [USER, NAMED_GROUP].contains(&entry.tag)) {
            let masked = |entry: &&Entry| [USER, GROUP, NAMED_GROUP].contains(&entry.tag);
            let permissions = self.0.iter().filter(masked).fold(0, |all, e| all | e.permissions);
            self.0.push(Entry { tag: MASK, id: NOBODY, permissions });
        }
        self.0.sort_unstable();
        self
    }
}

/// The list of a node.
pub fn read(node: &Path) -> io::Result<Acl> {
    let mut value = [0; LONGEST];
    match getxattr(node, ATTRIBUTE, &mut value[..]) {
        Ok(length) => Acl::parse(value.get(..length).unwrap_or_default())
            .ok_or_else(|| io::Error::other("its access control list makes no sense")),
        Err(Errno::NODATA) => Ok(Acl::of_mode(fs::metadata(node)?.mode())),
        Err(errno) => Err(errno.into()),
    }
}

/// Gives a node this list. For [`crate::step`] alone.
pub(crate) fn write(node: &Path, acl: &Acl) -> io::Result<()> {
    Ok(setxattr(node, ATTRIBUTE, &acl.value(), XattrFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_let_in_and_out_and_the_mode_is_as_before() {
        for mode in [0o600, 0o660, 0o666, 0o640] {
            let before = Acl::of_mode(mode);
            assert!(!before.allows(1000));
            let with = before.clone().with(1000, true);
            assert!(with.allows(1000) && !with.allows(1001));
            assert_eq!(with.clone().with(1000, true), with);
            let both = with.clone().with(7, true);
            assert!(both.allows(1000) && both.allows(7));
            assert_eq!(both.with(7, false), with);
            // A group that could only read does so still.
            assert_eq!(with.with(1000, false), before);
        }
    }

    #[test]
    fn what_is_written_is_read_and_is_as_setfacl_writes_it() {
        // setfacl -m u:1000:rw on a file of mode 0600.
        let theirs = "02000000 01000600ffffffff 02000600e8030000 04000000ffffffff \
                      10000600ffffffff 20000000ffffffff";
        let digits: String = theirs.split_whitespace().collect();
        let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
        let value: Vec<u8> = (0..digits.len()).step_by(2).map(byte).collect();
        let acl = Acl::of_mode(0o600).with(1000, true);
        assert_eq!(acl.value(), value);
        assert_eq!(Acl::parse(&value), Some(acl));
        for length in (0..value.len()).filter(|length| length % 8 != 4) {
            assert_eq!(Acl::parse(&value[..length]), None, "{length}");
        }
        assert_eq!(Acl::parse(&[1, 0, 0, 0]), None);
    }

    #[test]
    fn what_the_mask_forbids_is_not_allowed() {
        let mut acl = Acl::of_mode(0o600).with(1000, true);
        acl.0.iter_mut().filter(|entry| entry.tag == MASK).for_each(|mask| mask.permissions = 4);
        assert!(!acl.allows(1000));
        assert!(acl.with(1000, true).allows(1000));
    }

    #[test]
    fn a_node_of_a_real_file_system_keeps_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let before = read(file.path()).unwrap();
        match write(file.path(), &before.clone().with(1000, true)) {
            // Where temporary files are, there may be no such lists.
            Err(e) if e.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => return,
            written => written.unwrap(),
        }
        assert!(read(file.path()).unwrap().allows(1000));
        write(file.path(), &before).unwrap();
        assert_eq!(read(file.path()).unwrap(), before);
    }
}
