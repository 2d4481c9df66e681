//! Block devices on top of others: partitions, device-mapper, MD, bcache. Reads sysfs and udev's
//! notes through [`crate::host`].

use std::collections::{BTreeSet, VecDeque};
use std::fmt;

use crate::error::Error;
use crate::host::{HostRoot, SysDir};

/// A block device on a function's storage, directly or through others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Layer {
    /// Its name in `/sys/class/block`.
    pub(super) name: String,
    /// What people call it: the name of a device-mapper device, else the same.
    pub(super) called: String,
    /// The function's own device below it; its own name if it is one itself.
    pub(super) on: String,
    /// Device number, `major:minor`.
    pub(super) number: String,
    /// Under which paths it may be mounted or swapped to.
    pub(super) sources: BTreeSet<String>,
    /// Whether others are on top of it.
    pub(super) carries_others: bool,
    /// udev's notes on it (`/run/udev/data`).
    notes: String,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_own() {
            return f.write_str(&self.called);
        }
        write!(f, "{} on {}", self.called, self.on)
    }
}

impl Layer {
    fn read(host: &HostRoot, name: &str, on: &str) -> Result<Self, Error> {
        let dir = block(host, name);
        let number = dir.attr("dev")?.unwrap_or_default();
        let mapped = dir.attr("dm/name")?;
        let notes = host.text(&format!("run/udev/data/b{number}"))?.unwrap_or_default();
        let links = notes.lines().filter_map(|line| line.strip_prefix("S:"));
        let mut sources: BTreeSet<String> = links.map(|link| format!("/dev/{link}")).collect();
        sources.insert(format!("/dev/{name}"));
        sources.extend(mapped.as_ref().map(|mapped| format!("/dev/mapper/{mapped}")));
        Ok(Self {
            name: name.to_owned(),
            called: mapped.unwrap_or_else(|| name.to_owned()),
            on: on.to_owned(),
            number,
            sources,
            carries_others: false,
            notes,
        })
    }

    /// Whether it is the function's own disk or a partition of it.
    pub(super) fn is_own(&self) -> bool {
        self.name == self.on
    }

    /// A property udev found, such as `ID_FS_TYPE`.
    pub(super) fn property(&self, key: &str) -> Option<&str> {
        let properties = self.notes.lines().filter_map(|line| line.strip_prefix("E:"));
        properties.filter_map(|p| p.split_once('=')).find_map(|(k, v)| (k == key).then_some(v))
    }

    /// How to take it apart.
    pub(super) fn remedy(&self) -> String {
        match self.name.trim_end_matches(|c: char| c.is_ascii_digit()) {
            "md" => format!("stop it first ('mdadm --stop /dev/{}')", self.name),
            "bcache" => {
                format!("stop it first ('echo 1 > /sys/block/{}/bcache/stop')", self.name)
            }
            _ => format!("take it apart first ('dmsetup remove {}')", self.called),
        }
    }
}

/// These disks and partitions, and all that is built on them.
pub(super) fn above(host: &HostRoot, own: &[&str]) -> Result<Vec<Layer>, Error> {
    let mut seen: BTreeSet<String> = own.iter().map(|name| (*name).to_owned()).collect();
    let mut waiting: VecDeque<(String, String)> =
        own.iter().map(|name| ((*name).to_owned(), (*name).to_owned())).collect();
    let mut layers = Vec::new();
    while let Some((name, on)) = waiting.pop_front() {
        let mut layer = Layer::read(host, &name, &on)?;
        let upper = upper(host, &layer)?;
        layer.carries_others = !upper.is_empty();
        layers.push(layer);
        let new = upper.into_iter().filter(|name| seen.insert(name.clone()));
        waiting.extend(new.map(|name| (name, on.clone())));
    }
    with_btrfs(host, &mut layers)?;
    Ok(layers)
}

/// What is right on top of a device: `holders` (`bd_link_disk_holder`, `block/holder.c`), its
/// partitions if it is a disk made of others, and what it is a cache of.
fn upper(host: &HostRoot, layer: &Layer) -> Result<Vec<String>, Error> {
    let dir = block(host, &layer.name);
    let mut upper = dir.sub("holders").list()?;
    if !layer.is_own() {
        let parts = dir.directories().into_iter().filter(|name| dir.sub(name).has("partition"));
        upper.extend(parts);
    }
    // `bch_cached_dev_attach` and `bch_cached_dev_run`, drivers/md/bcache/super.c.
    let cache = dir.sub("bcache/set");
    let cached = cache.list()?.into_iter().filter(|name| name.starts_with("bdev"));
    upper.extend(cached.filter_map(|name| cache.sub(&name).link_name("dev")));
    Ok(upper)
}

/// A btrfs over several devices is mounted under the name of one of them
/// (`btrfs_show_devname`, `fs/btrfs/super.c`).
fn with_btrfs(host: &HostRoot, layers: &mut [Layer]) -> Result<(), Error> {
    let dir = host.sys("fs/btrfs");
    for filesystem in dir.list()? {
        let devices = dir.sub(&filesystem).sub("devices").list()?;
        for layer in layers.iter_mut().filter(|layer| devices.contains(&layer.name)) {
            for other in devices.iter().filter(|other| **other != layer.name) {
                layer.sources.extend(Layer::read(host, other, other)?.sources);
            }
        }
    }
    Ok(())
}

fn block(host: &HostRoot, name: &str) -> SysDir {
    host.sys("class/block").sub(name)
}
