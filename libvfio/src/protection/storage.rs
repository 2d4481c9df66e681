//! Storage in use behind functions, through all that is built on it.

use std::collections::{BTreeMap, BTreeSet};

use super::layers::{self, Layer};
use super::mounts::{self, Mount, Namespace, unescaped};
use super::{Found, Use, Weight, some};
use crate::address::PciAddress;
use crate::error::Error;
use crate::host::HostRoot;
use crate::members;

/// Mount points, beside all below `/boot`, without which a host does not run or does not boot again.
const VITAL: [&str; 8] = ["/", "/boot", "/efi", "/etc", "/nix", "/sysroot", "/usr", "/var"];

pub(super) fn uses(host: &HostRoot, functions: &BTreeSet<PciAddress>) -> Result<Vec<Use>, Error> {
    let mut disks: BTreeMap<PciAddress, Vec<String>> = BTreeMap::new();
    for (disk, function) in members::within(host, "class/block", functions)? {
        disks.entry(function).or_default().push(disk);
    }
    if disks.is_empty() {
        return Ok(Vec::new());
    }
    let storage = Storage::read(host)?;
    let mut uses = Vec::new();
    for (function, own) in disks {
        let own: Vec<&str> = own.iter().map(String::as_str).collect();
        for layer in layers::above(host, &own)? {
            uses.extend(storage.uses(&layer).into_iter().map(|found| found.of(function)));
        }
    }
    Ok(uses)
}

/// What the host does with block devices.
struct Storage {
    mounts: Vec<Mount>,
    elsewhere: Vec<Namespace>,
    swaps: Vec<Swap>,
    /// ZFS pools that are imported.
    pools: Vec<String>,
}

/// A line of `/proc/swaps` (proc(5)).
struct Swap {
    path: String,
    is_file: bool,
}

impl Storage {
    fn read(host: &HostRoot) -> Result<Self, Error> {
        Ok(Self {
            mounts: mounts::of_host(host)?,
            elsewhere: mounts::elsewhere(host)?,
            swaps: swaps(&host.proc("swaps")?.unwrap_or_default()),
            pools: pools(host)?,
        })
    }

    /// What a device is used for.
    fn uses(&self, layer: &Layer) -> Vec<Found> {
        let mut uses: Vec<Found> = [self.mounted(layer), self.pool(layer)]
            .into_iter()
            .flatten()
            .chain(self.swapped(layer))
            .collect();
        if uses.is_empty() {
            uses.extend(self.mounted_elsewhere(layer));
        }
        // What is on top of it tells its own story.
        if uses.is_empty() && !layer.is_own() && !layer.carries_others {
            let what = format!("carries {layer}, which is set up (device-mapper, MD or bcache)");
            uses.push(Found::new(what, layer.remedy(), Weight::InUse));
        }
        uses
    }

    fn mounted(&self, layer: &Layer) -> Option<Found> {
        let of_it = self.mounts.iter().filter(|m| m.is_of(&layer.number, &layer.sources));
        let points = points(of_it);
        let at = some(&points);
        // Nobody unmounts what the system runs from.
        let remedy = if points.iter().any(|point| point == "/") {
            "run the host from another disk first".to_owned()
        } else {
            format!("unmount {at} first")
        };
        let what = format!("carries {layer}, mounted on {at}");
        (!points.is_empty()).then(|| Found::new(what, remedy, weight(&points)))
    }

    fn mounted_elsewhere(&self, layer: &Layer) -> Option<Found> {
        self.elsewhere.iter().find_map(|namespace| {
            let mount = namespace.mounts.iter().find(|m| m.is_of(&layer.number, &layer.sources))?;
            let (point, process) = (&mount.point, &namespace.process);
            Some(Found::new(
                format!("carries {layer}, mounted on {point} for {process} alone"),
                format!("end {process} and what shares its mounts first"),
                Weight::InUse,
            ))
        })
    }

    fn swapped(&self, layer: &Layer) -> impl Iterator<Item = Found> {
        let on_it = |swap: &&Swap| {
            if swap.is_file {
                let home = self.filesystem_of(&swap.path);
                home.is_some_and(|mount| mount.is_of(&layer.number, &layer.sources))
            } else {
                layer.sources.contains(&swap.path)
            }
        };
        self.swaps.iter().filter(on_it).map(move |swap| {
            let path = &swap.path;
            Found::new(
                format!("carries swap on {layer} ({path})"),
                format!("run 'swapoff {path}' first"),
                Weight::Protected,
            )
        })
    }

    /// The file system a file is in: of those mounted on a folder above it, the deepest.
    fn filesystem_of(&self, path: &str) -> Option<&Mount> {
        let above = self.mounts.iter().filter(|m| std::path::Path::new(path).starts_with(&m.point));
        above.max_by_key(|mount| mount.point.len())
    }

    /// A pool's members say to which pool they belong (ZFS label, as libblkid reads it), except
    /// for caches and spares.
    fn pool(&self, layer: &Layer) -> Option<Found> {
        if layer.property("ID_FS_TYPE") != Some("zfs_member") || self.pools.is_empty() {
            return None;
        }
        let label = layer.property("ID_FS_LABEL");
        if label.is_some_and(|label| !self.pools.iter().any(|pool| pool == label)) {
            return None;
        }
        let pool = label.unwrap_or("one of those imported");
        let of_pool =
            |mount: &&Mount| mount.kind == "zfs" && mount.source.split('/').next() == label;
        let points = points(self.mounts.iter().filter(of_pool));
        let mounted = match points.as_slice() {
            [] => String::new(),
            points => format!(", mounted on {}", some(points)),
        };
        Some(Found::new(
            format!("carries {layer}, a member of ZFS pool {pool}{mounted}"),
            format!("export the pool first ('zpool export {}')", label.unwrap_or("POOL")),
            weight(&points),
        ))
    }
}

fn points<'a>(mounts: impl Iterator<Item = &'a Mount>) -> Vec<String> {
    let points: BTreeSet<String> = mounts.map(|mount| mount.point.clone()).collect();
    points.into_iter().collect()
}

/// A file system that is vital at one place goes as a whole.
fn weight(points: &[String]) -> Weight {
    let vital = |point: &String| VITAL.contains(&point.as_str()) || point.starts_with("/boot/");
    if points.iter().any(vital) { Weight::Protected } else { Weight::InUse }
}

/// Each has a directory among the statistics (`module/os/linux/spl/spl-kstat.c` of `OpenZFS`).
fn pools(host: &HostRoot) -> Result<Vec<String>, Error> {
    const STATISTICS: &str = "proc/spl/kstat/zfs";
    let names = host.names(STATISTICS)?.into_iter();
    Ok(names.filter(|name| host.names(format!("{STATISTICS}/{name}")).is_ok()).collect())
}

fn swaps(text: &str) -> Vec<Swap> {
    let swap = |line: &str| {
        let mut fields = line.split_whitespace();
        let path = unescaped(fields.next()?);
        let is_file = fields.next()? == "file";
        path.starts_with('/').then_some(Swap { path, is_file })
    };
    text.lines().filter_map(swap).collect()
}
