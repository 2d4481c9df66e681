//! Mounts of the host and of mount namespaces beside its own. Reads procfs through [`crate::host`].

use std::collections::BTreeSet;

use crate::error::Error;
use crate::host::HostRoot;

/// A mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// Device number, `major:minor`; some file systems have numbers of their own.
    number: String,
    /// Where.
    pub(super) point: String,
    /// File system.
    pub(super) kind: String,
    /// From what.
    pub(super) source: String,
}

/// Mounts that only some processes see.
#[derive(Debug)]
pub(super) struct Namespace {
    /// One of those processes, for people.
    pub(super) process: String,
    /// The mounts.
    pub(super) mounts: Vec<Mount>,
}

impl Mount {
    /// Whether it is of a device of that number or under one of these names. File systems on
    /// several devices may name them all, with colons between (bcachefs).
    pub(super) fn is_of(&self, number: &str, sources: &BTreeSet<String>) -> bool {
        self.number == number
            || sources.contains(&self.source)
            || self.source.split(':').any(|part| sources.contains(part))
    }

    fn parse(line: &str) -> Option<Self> {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ');
        let number = fields.nth(2)?.to_owned();
        let point = unescaped(fields.nth(1)?);
        let (kind, rest) = filesystem.split_once(' ')?;
        let source = unescaped(rest.split(' ').next()?);
        Some(Self { number, point, kind: kind.to_owned(), source })
    }
}

/// What a `mountinfo` (proc(5)) says; lines that make no sense are left out.
pub(super) fn parse(mountinfo: &str) -> Vec<Mount> {
    mountinfo.lines().filter_map(Mount::parse).collect()
}

/// The host's mounts: those of its first process, since a daemon may have a namespace of its own.
pub(super) fn of_host(host: &HostRoot) -> Result<Vec<Mount>, Error> {
    let first = host.proc("1/mountinfo").ok().flatten();
    let text = match first {
        Some(text) => text,
        None => host.proc("self/mountinfo")?.unwrap_or_default(),
    };
    Ok(parse(&text))
}

/// The mounts of every other namespace that a process is in. One that ends meanwhile has none.
pub(super) fn elsewhere(host: &HostRoot) -> Result<Vec<Namespace>, Error> {
    let mut seen = BTreeSet::from([host.link("proc/1/ns/mnt"), host.link("proc/self/ns/mnt")]);
    seen.insert(None);
    let mut namespaces = Vec::new();
    for pid in host.processes()? {
        if seen.insert(host.link(format!("proc/{pid}/ns/mnt"))) {
            let text = |file: &str| host.proc(&format!("{pid}/{file}")).ok().flatten();
            let command = text("comm").unwrap_or_default();
            namespaces.push(Namespace {
                process: format!("{} (process {pid})", command.trim()),
                mounts: parse(&text("mountinfo").unwrap_or_default()),
            });
        }
    }
    Ok(namespaces)
}

/// Blanks and the like are in octal (`mangle_path`, `fs/seq_file.c`).
pub(super) fn unescaped(text: &str) -> String {
    let mut plain = Vec::new();
    let mut rest = text.as_bytes();
    while let [byte, after @ ..] = rest {
        let octal = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(code) if *byte == b'\\' => {
                plain.push(code);
                rest = &after[3..];
            }
            _ => {
                plain.push(*byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_number_and_by_source() {
        let info = "25 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw\n\
                    30 25 0:41 /sub /my\\040data rw - btrfs /dev/nvme1n1 rw\n\
                    31 25 0:42 / /pool rw - bcachefs /dev/sda:/dev/sdb rw\n\
                    garbage\n1 2 3\n - \n1 2 3 4 5 - ext4\n";
        let mounts = parse(info);
        assert_eq!(mounts.len(), 3);
        let found = |number: &str, source: &str| {
            let sources = BTreeSet::from([source.to_owned()]);
            let found = mounts.iter().filter(|mount| mount.is_of(number, &sources));
            found.map(|mount| mount.point.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(found("259:2", "/dev/x"), ["/"]);
        assert_eq!(found("259:9", "/dev/nvme1n1"), ["/my data"]);
        assert_eq!(found("8:16", "/dev/sdb"), ["/pool"]);
        assert!(found("8:0", "/dev/sdc").is_empty());
    }

    #[test]
    fn escapes_are_octal_and_anything_else_is_as_it_is() {
        assert_eq!(unescaped(r"a\040b\134c"), r"a b\c");
        for odd in [r"\", r"\0", r"\04", r"\999", r"\é1"] {
            assert_eq!(unescaped(odd), odd);
        }
    }
}
