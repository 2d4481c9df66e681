//! Whether the initial file systems have the policy as it is. The hooks of their generators leave
//! what they took for each kernel with the daemon's records; nothing calls them when the policy
//! changes, and since that takes minutes, an administrator is told instead. Reads files alone.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use libvfio::host::HostRoot;
use libvfio::policy;

use crate::durable;

/// Programs that make them, and what makes all of them anew.
const GENERATORS: [(&str, &str); 2] = [
    ("usr/sbin/update-initramfs", "update-initramfs -u -k all"),
    ("usr/bin/dracut", "dracut --force --regenerate-all"),
];

/// What is taken into an initial file system, and what was.
#[derive(Debug, Clone)]
pub(crate) struct Initramfs<'a> {
    /// The file of udev's rules. Without any nothing is taken.
    pub(crate) rules: &'a Path,
    /// The directory of the policy.
    pub(crate) policy: &'a Path,
    /// The file of devices met.
    pub(crate) met: &'a Path,
    /// The directory with what was taken, in a file for each kernel.
    pub(crate) taken: PathBuf,
}

impl Initramfs<'_> {
    /// What to run where a kernel's has something else than it would be given now. `None` too where
    /// no program is known that makes them.
    pub(crate) fn outdated(&self, host: &HostRoot) -> io::Result<Option<&'static str>> {
        let there = |(program, _): &&(&str, &str)| host.path(program).exists();
        let Some((_, command)) = GENERATORS.iter().find(there) else { return Ok(None) };
        let now = self.now()?;
        for kernel in self.kernels(host)? {
            let taken = durable::read(&self.taken.join(kernel))?.unwrap_or_default();
            if taken != now {
                return Ok(Some(command));
            }
        }
        Ok(None)
    }

    /// What a hook would take now, one file after another.
    fn now(&self) -> io::Result<Vec<u8>> {
        let mut now = durable::read(self.rules)?.unwrap_or_default();
        if !now.is_empty() {
            let sources = policy::sources(self.policy)?;
            now.extend(sources.into_iter().flat_map(|source| source.text.into_bytes()));
            now.extend(durable::read(self.met)?.unwrap_or_default());
        }
        Ok(now)
    }

    /// The kernel that runs, and all others for which something was taken.
    fn kernels(&self, host: &HostRoot) -> io::Result<BTreeSet<String>> {
        let running = host.proc("sys/kernel/osrelease").map_err(io::Error::other)?;
        let mut kernels: BTreeSet<String> =
            running.into_iter().map(|text| text.trim().to_owned()).collect();
        let entries = match std::fs::read_dir(&self.taken) {
            Ok(entries) => entries.collect::<io::Result<Vec<_>>>()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let names = entries.iter().filter_map(|entry| entry.file_name().into_string().ok());
        kernels.extend(names.filter(|name| host.path("lib/modules").join(name).is_dir()));
        Ok(kernels)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_a_kernel_has_is_compared_with_what_it_would_be_given() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        for path in ["proc/sys/kernel", "lib/modules/6.12", "usr/sbin", "vfiod.toml.d", "taken"] {
            fs::create_dir_all(at(path)).unwrap();
        }
        fs::write(at("proc/sys/kernel/osrelease"), "6.12\n").unwrap();
        let (host, rules, met) = (HostRoot::new(dir.path()), at("rules"), at("met"));
        let initramfs =
            Initramfs { rules: &rules, policy: dir.path(), met: &met, taken: at("taken") };
        let outdated = || initramfs.outdated(&host).unwrap();

        fs::write(&rules, "R").unwrap();
        assert_eq!(outdated(), None, "nobody makes any here");
        fs::write(at("usr/sbin/update-initramfs"), "").unwrap();
        assert_eq!(outdated(), Some("update-initramfs -u -k all"), "it has no rules yet");
        for (path, text) in
            [("vfiod.toml", "a"), ("vfiod.toml.d/2.toml", "c"), ("vfiod.toml.d/1.toml", "b")]
        {
            fs::write(at(path), text).unwrap();
        }
        fs::write(&met, "M").unwrap();
        fs::write(at("taken/6.12"), "RabcM").unwrap();
        assert_eq!(outdated(), None);
        fs::write(&met, "N").unwrap();
        assert!(outdated().is_some(), "devices were met");
        fs::remove_file(&rules).unwrap();
        assert!(outdated().is_some(), "it has rules of a policy that is no more");
        fs::remove_file(at("taken/6.12")).unwrap();
        fs::write(at("taken/6.1"), "old").unwrap();
        assert_eq!(outdated(), None, "a kernel that is no more counts");
        fs::create_dir(at("lib/modules/6.1")).unwrap();
        assert!(outdated().is_some(), "another kernel does not count");
    }
}
