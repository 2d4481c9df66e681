//! Whether the initial file systems have the policy as it is. The hooks of their generators leave
//! what they took for each kernel with the daemon's records, before there is a file system to have it:
//! one that is older was not finished since. Nothing calls the hooks when the policy changes, and
//! since that takes minutes, an administrator is told instead. Reads files alone.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use libvfio::host::HostRoot;
use libvfio::policy;

use crate::durable;
use crate::met::Met;

/// Programs that make them, and what makes all of them anew.
const GENERATORS: [(&str, &str); 2] = [
    ("usr/sbin/update-initramfs", "update-initramfs -u -k all"),
    ("usr/bin/dracut", "dracut --force --regenerate-all"),
];

/// Where a kernel's may be: of initramfs-tools and of dracut in Debian, and of dracut elsewhere.
const PLACES: [(&str, &str); 2] = [("boot/initrd.img-", ""), ("boot/initramfs-", ".img")];

/// What is taken into an initial file system, and what was.
#[derive(Debug, Clone)]
pub struct Initramfs<'a> {
    /// udev's rules as they are, or shall be. Without any nothing is taken.
    pub rules: &'a [u8],
    /// The directory of the policy.
    pub policy: &'a Path,
    /// The devices met, and beside them what was taken.
    pub met: &'a Met,
}

impl Initramfs<'_> {
    /// What to run where a kernel's has something else than it would be given with these rules. `None`
    /// too where no program is known that makes them. An error is one of reading the files.
    pub fn outdated(&self, host: &HostRoot) -> io::Result<Option<&'static str>> {
        let there = |(program, _): &&(&str, &str)| host.path(program).exists();
        let Some((_, command)) = GENERATORS.iter().find(there) else { return Ok(None) };
        let now = self.now()?;
        for kernel in self.kernels(host)? {
            let path = self.taken().join(&kernel);
            let taken = durable::read(&path)?;
            if taken.as_deref().unwrap_or_default() != now
                || taken.is_some() && is_unfinished(host, &kernel, &path)?
            {
                return Ok(Some(command));
            }
        }
        Ok(None)
    }

    /// The directory with what was taken, in a file for each kernel.
    fn taken(&self) -> PathBuf {
        self.met.path().with_file_name("initramfs")
    }

    /// What a hook would take now, one file after another.
    fn now(&self) -> io::Result<Vec<u8>> {
        let mut now = self.rules.to_vec();
        if !now.is_empty() {
            let sources = policy::sources(self.policy)?;
            now.extend(sources.into_iter().flat_map(|source| source.text.into_bytes()));
            now.extend(durable::read(self.met.path())?.unwrap_or_default());
        }
        Ok(now)
    }

    /// The kernel that runs, and all others for which something was taken.
    fn kernels(&self, host: &HostRoot) -> io::Result<BTreeSet<String>> {
        let running = host.proc("sys/kernel/osrelease").map_err(io::Error::other)?;
        let mut kernels: BTreeSet<String> =
            running.into_iter().map(|text| text.trim().to_owned()).collect();
        let entries = match std::fs::read_dir(self.taken()) {
            Ok(entries) => entries.collect::<io::Result<Vec<_>>>()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let names = entries.iter().filter_map(|entry| entry.file_name().into_string().ok());
        kernels.extend(names.filter(|name| host.path("lib/modules").join(name).is_dir()));
        Ok(kernels)
    }
}

/// Whether a kernel's was not made since something was taken for it. One that is elsewhere is
/// believed to have been.
fn is_unfinished(host: &HostRoot, kernel: &str, taken: &Path) -> io::Result<bool> {
    let made = PLACES.iter().find_map(|(before, after)| {
        std::fs::metadata(host.path(format!("{before}{kernel}{after}"))).ok()
    });
    let Some(made) = made else { return Ok(false) };
    Ok(made.modified()? < std::fs::metadata(taken)?.modified()?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::{Duration, SystemTime};

    use super::*;

    #[test]
    fn what_a_kernel_has_is_compared_with_what_it_would_be_given() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        for path in ["proc/sys/kernel", "lib/modules/6.12", "usr/sbin", "vfiod.toml.d", "initramfs"]
        {
            fs::create_dir_all(at(path)).unwrap();
        }
        fs::write(at("proc/sys/kernel/osrelease"), "6.12\n").unwrap();
        let (host, met) = (HostRoot::new(dir.path()), Met::open(dir.path()));
        let with = |rules: &str| {
            let initramfs = Initramfs { rules: rules.as_bytes(), policy: dir.path(), met: &met };
            initramfs.outdated(&host).unwrap()
        };

        assert_eq!(with("R"), None, "nobody makes any here");
        fs::write(at("usr/sbin/update-initramfs"), "").unwrap();
        assert_eq!(with("R"), Some("update-initramfs -u -k all"), "it has no rules yet");
        for (path, text) in
            [("vfiod.toml", "a"), ("vfiod.toml.d/2.toml", "c"), ("vfiod.toml.d/1.toml", "b")]
        {
            fs::write(at(path), text).unwrap();
        }
        fs::write(met.path(), "M").unwrap();
        fs::write(at("initramfs/6.12"), "RabcM").unwrap();
        assert_eq!(with("R"), None);
        fs::create_dir(at("boot")).unwrap();
        for image in ["boot/initrd.img-6.12", "boot/initramfs-6.12.img"] {
            let file = fs::File::create(at(image)).unwrap();
            assert_eq!(with("R"), None, "{image}");
            let before = SystemTime::now() - Duration::from_secs(60);
            file.set_modified(before).unwrap();
            assert!(with("R").is_some(), "{image} was not made since");
            fs::remove_file(at(image)).unwrap();
        }
        fs::write(met.path(), "N").unwrap();
        assert!(with("R").is_some(), "devices were met");
        assert!(with("").is_some(), "it has rules of a policy that is no more");
        fs::remove_file(at("initramfs/6.12")).unwrap();
        fs::write(at("initramfs/6.1"), "old").unwrap();
        assert_eq!(with(""), None, "a kernel that is no more counts");
        fs::create_dir(at("lib/modules/6.1")).unwrap();
        assert!(with("").is_some(), "another kernel does not count");
    }
}
