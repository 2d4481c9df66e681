//! One process, as procfs has it. One that ends while it is read holds nothing any more.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use super::Holder;
use crate::host::{HostRoot, plain};

/// A user, by number and by the name the host's `/etc/passwd` has for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Its number.
    pub uid: u32,
    /// Its name, if it is a local user.
    pub name: Option<String>,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => f.write_str(name),
            None => write!(f, "user {}", self.uid),
        }
    }
}

/// A unit of systemd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Its name: `nvidia-persistenced.service`, `session-2.scope`.
    pub name: String,
    /// Whether the system has it, not a user's session.
    pub system: bool,
}

/// Which of the paths that `matter` a process has open or mapped.
pub(super) fn holds(host: &HostRoot, pid: u32, matters: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let maps = host.proc(&format!("{pid}/maps")).ok().flatten().unwrap_or_default();
    let there = |path: PathBuf| matters(&path).then_some(path);
    let open = host.open_files(pid).filter_map(|path| there(without_mark(&path)));
    let found: BTreeSet<PathBuf> =
        open.chain(mapped(&maps).filter_map(|path| there(without_mark(Path::new(path))))).collect();
    found.into_iter().collect()
}

/// The kernel marks names that are gone (`d_path`, `fs/d_path.c`); what they led to is not.
fn without_mark(path: &Path) -> PathBuf {
    let name = path.to_str().and_then(|path| path.strip_suffix(" (deleted)"));
    name.map_or_else(|| path.to_owned(), PathBuf::from)
}

/// Paths in `/proc/PID/maps`, the last of its columns (proc(5)); no other has a slash.
fn mapped(maps: &str) -> impl Iterator<Item = &str> {
    maps.lines().filter_map(|line| line.get(line.find('/')?..))
}

/// Who a process is.
pub(super) fn describe(host: &HostRoot, pid: u32, what: Vec<PathBuf>) -> Holder {
    let text = |file: &str| host.proc(&format!("{pid}/{file}")).ok().flatten().unwrap_or_default();
    let uid = effective_user(&text("status"));
    Holder {
        pid,
        command: plain(text("comm").trim()),
        user: uid.map(|uid| User { uid, name: user_name(host, uid) }),
        unit: unit(&text("cgroup")),
        what,
    }
}

/// The second number of `Uid:` in `/proc/PID/status` (proc(5)).
fn effective_user(status: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn user_name(host: &HostRoot, uid: u32) -> Option<String> {
    let users = host.text("etc/passwd").ok().flatten()?;
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

/// The innermost unit in `/proc/PID/cgroup` (cgroups(7)), in the hierarchy that systemd keeps.
fn unit(cgroup: &str) -> Option<Unit> {
    let line = |line: &'_ str| {
        let (hierarchy, path) = line.split_once(':')?.1.split_once(':')?;
        ["", "name=systemd"].contains(&hierarchy).then(|| path.to_owned())
    };
    let unit = |path: String| {
        let is_unit = |part: &&str| matches!(part.rsplit_once('.'), Some((_, "service" | "scope")));
        let name = path.rsplit('/').find(is_unit)?.to_owned();
        Some(Unit { name, system: !path.starts_with("/user.slice/") })
    };
    cgroup.lines().filter_map(line).find_map(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_unit_counts_and_whose_it_is() {
        let of = |text: &str| unit(text).map(|unit| (unit.name, unit.system));
        let system = "0::/system.slice/nvidia-persistenced.service\n";
        assert_eq!(of(system), Some(("nvidia-persistenced.service".into(), true)));
        let user = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-x.scope\n";
        assert_eq!(of(user), Some(("app-x.scope".into(), false)));
        let old = "5:devices:/a.service\n1:name=systemd:/system.slice/b.service/payload\n0::/\n";
        assert_eq!(of(old), Some(("b.service".into(), true)));
        for odd in ["", "0::/", "garbage", "::", "0::/system.slice"] {
            assert_eq!(of(odd), None, "{odd}");
        }
    }

    #[test]
    fn mapped_paths_are_the_last_column() {
        let maps = "7f00-7f01 rw-s fd000000 00:18 1234                 /sys/devices/x/resource0\n\
                    7f02-7f03 rw-p 00000000 00:00 0                    [heap]\n\
                    7f04-7f05 r--p 00000000 00:00 0\n\
                    7f06-7f07 rw-s 00000000 00:05 9                    /dev/a b (deleted)\n";
        let paths: Vec<PathBuf> = mapped(maps).map(|p| without_mark(Path::new(p))).collect();
        assert_eq!(paths, [Path::new("/sys/devices/x/resource0"), Path::new("/dev/a b")]);
    }

    #[test]
    fn users_are_those_a_process_acts_as() {
        assert_eq!(effective_user("Name:\tx\nUid:\t1000\t33\t0\t0\n"), Some(33));
        assert_eq!(effective_user("Uid:\t1000"), None);
    }
}
