//! Mediated devices come and go by the rules of `drivers/vfio/mdev`. Shows their files and changes
//! the kernel's state, sleeps never.

use std::time::Duration;

use libvfio::address::PciAddress;
use libvfio::mediated::Uuid;
use nix::errno::Errno;

use super::described::{Parent, PartType};
use super::event::{Action, Uevent};
use super::fault::Operation;
use super::kernel::{Answer, Kernel, Stop, lowest_free};
use super::text;
use super::tree::Entry;

/// In a parent's directory, that of its types.
const TYPES: &str = "mdev_supported_types";
/// The files of a type that are read.
const TOLD: [&str; 4] = ["name", "description", "available_instances", "device_api"];

/// A mediated device that was made.
#[derive(Debug)]
pub(super) struct Part {
    parent: String,
    kind: String,
    group: u32,
    /// The number of its VFIO character device.
    vfio: u32,
}

impl Kernel {
    /// The directory of a parent below `sys/devices`, while it can be one: a function is on the
    /// driver that makes it so.
    fn parent_directory(&self, parent: &Parent) -> Option<String> {
        let Ok(address) = parent.name.parse::<PciAddress>() else {
            return Some(format!("virtual/{0}/{0}", parent.name));
        };
        let device = self.devices.get(&address)?;
        (device.driver.is_some() && device.driver == parent.driver).then(|| device.path.clone())
    }

    /// The parent in whose directory a path is, as far as that is about mediated devices, and the
    /// path from there.
    fn parent_at<'a>(&self, path: &'a str) -> Option<(&Parent, Vec<&'a str>)> {
        let below = path.strip_prefix("sys/devices/")?;
        self.host.parents.iter().find_map(|parent| {
            let rest = below.strip_prefix(&self.parent_directory(parent)?)?.strip_prefix('/')?;
            let rest: Vec<&str> = rest.split('/').collect();
            let part = |name: &str| name.parse::<Uuid>().is_ok();
            (rest[0] == TYPES || part(rest[0])).then_some((parent, rest))
        })
    }

    fn part(&self, parent: &Parent, name: &str) -> Option<(Uuid, &Part)> {
        let uuid = name.parse().ok()?;
        let part = self.parts.get(&uuid).filter(|part| part.parent == parent.name)?;
        Some((uuid, part))
    }

    /// How many more of a type there can be.
    fn available(&self, parent: &Parent, kind: &PartType) -> u32 {
        let takes = |part: &Part| parent.kind(&part.kind).map_or(0, |kind| kind.takes);
        let own = self.parts.values().filter(|part| part.parent == parent.name);
        parent.room.saturating_sub(own.map(takes).sum()) / kind.takes.max(1)
    }

    /// What is at a path, if it is about mediated devices.
    pub(super) fn mediated_entry(&self, path: &str) -> Option<Entry> {
        let parts: Vec<&str> = path.split('/').collect();
        match parts[..] {
            ["sys", "class", "mdev_bus", name] => {
                let parent = self.host.parents.iter().find(|parent| parent.name == name)?;
                return Some(Entry::Link(format!(
                    "../../devices/{}",
                    self.parent_directory(parent)?
                )));
            }
            ["sys", "bus", "mdev", "devices", name] => {
                let place = self.place_of_part(name.parse().ok()?)?;
                return Some(Entry::Link(format!("../../../devices/{place}")));
            }
            _ => {}
        }
        let (parent, rest) = self.parent_at(path)?;
        match rest[..] {
            [TYPES] => Some(Entry::Directory),
            [TYPES, kind] => parent.kind(kind).map(|_| Entry::Directory),
            [TYPES, kind, file] => {
                let mode = if file == "create" { 0o200 } else { 0o444 };
                let there = file == "create" || TOLD.contains(&file);
                parent.kind(kind).filter(|_| there).map(|_| Entry::File(mode))
            }
            [name] => self.part(parent, name).map(|_| Entry::Directory),
            [name, "remove"] => self.part(parent, name).map(|_| Entry::File(0o200)),
            [name, "mdev_type"] => {
                let (_, part) = self.part(parent, name)?;
                Some(Entry::Link(format!("../{TYPES}/{}", part.kind)))
            }
            [name, "iommu_group"] => {
                let (_, part) = self.part(parent, name)?;
                let up = "../".repeat(path.split('/').count() - 2);
                Some(Entry::Link(format!("{up}kernel/iommu_groups/{}", part.group)))
            }
            [name, "vfio-dev"] if self.host.kernel.vfio_dev => {
                self.part(parent, name).map(|_| Entry::Directory)
            }
            [name, "vfio-dev", device] if self.host.kernel.vfio_dev => {
                let (_, part) = self.part(parent, name)?;
                (device == format!("vfio{}", part.vfio)).then_some(Entry::Directory)
            }
            _ => None,
        }
    }

    /// The names in a directory that are about mediated devices.
    pub(super) fn mediated_names(&self, path: &str) -> Vec<String> {
        let there = self.host.parents.iter().filter_map(|p| Some((p, self.parent_directory(p)?)));
        match path {
            "sys/class/mdev_bus" => return there.map(|(parent, _)| parent.name.clone()).collect(),
            "sys/bus/mdev/devices" => return self.parts.keys().map(ToString::to_string).collect(),
            "dev/vfio" => return self.parts.values().map(|part| part.group.to_string()).collect(),
            "dev/vfio/devices" if self.host.kernel.cdev => {
                return self.parts.values().map(|part| format!("vfio{}", part.vfio)).collect();
            }
            _ => {}
        }
        if let Some((parent, _)) =
            there.into_iter().find(|(_, place)| *path == format!("sys/devices/{place}"))
        {
            let own = self.parts.iter().filter(|(_, part)| part.parent == parent.name);
            let own = own.map(|(uuid, _)| uuid.to_string());
            return own.chain([TYPES.to_owned()]).collect();
        }
        let Some((parent, rest)) = self.parent_at(path) else { return Vec::new() };
        match rest[..] {
            [TYPES] => parent.types.iter().map(|kind| kind.id.clone()).collect(),
            [TYPES, _] => TOLD.iter().chain(&["create"]).map(|name| (*name).to_owned()).collect(),
            [_] => {
                let device = self.host.kernel.vfio_dev.then_some("vfio-dev");
                let own = ["remove", "mdev_type", "iommu_group"].into_iter().chain(device);
                own.map(str::to_owned).collect()
            }
            [name, "vfio-dev"] if self.host.kernel.vfio_dev => {
                let part = self.part(parent, name);
                part.map(|(_, part)| format!("vfio{}", part.vfio)).into_iter().collect()
            }
            _ => Vec::new(),
        }
    }

    /// What a file about mediated devices reads.
    pub(super) fn mediated_text(&self, path: &str) -> Option<String> {
        let (parent, rest) = self.parent_at(path)?;
        let [TYPES, kind, file] = rest[..] else { return None };
        let kind = parent.kind(kind)?;
        let text = match file {
            "name" => kind.name.clone(),
            "description" => format!("takes {} of {}", kind.takes, parent.room),
            "available_instances" => self.available(parent, kind).to_string(),
            "device_api" => kind.api.clone(),
            _ => return None,
        };
        Some(text + "\n")
    }

    /// What a write about mediated devices amounts to, and on which function, if on one.
    pub(super) fn mediated_operation(&self, path: &str) -> Option<(Operation, Option<PciAddress>)> {
        let (parent, rest) = self.parent_at(path)?;
        let operation = match rest[..] {
            [TYPES, _, "create"] => Operation::CreateMediated,
            [_, "remove"] => Operation::RemoveMediated,
            _ => return None,
        };
        Some((operation, parent.name.parse().ok()))
    }

    /// A write to a file about mediated devices; `None` if it is about others.
    pub(super) fn store_mediated(&mut self, path: &str, text: &str) -> Option<Answer> {
        let (parent, rest) = self.parent_at(path)?;
        let parent = parent.clone();
        match rest[..] {
            [TYPES, kind, "create"] => Some(self.create_part(&parent, kind, text)),
            [name, "remove"] => Some(self.remove_part(name, text)),
            _ => None,
        }
    }

    /// `create_store` and `mdev_device_create`.
    fn create_part(&mut self, parent: &Parent, kind: &str, text: &str) -> Answer {
        let uuid: Uuid = text.trim_end_matches('\n').parse().map_err(|_| Errno::EINVAL)?;
        let kind = parent.kind(kind).ok_or(Errno::ENOENT)?;
        if self.parts.contains_key(&uuid) {
            return Err(Errno::EEXIST.into());
        }
        if self.available(parent, kind) == 0 {
            return Err(Errno::ENOSPC.into());
        }
        let (group, vfio) = (lowest_free(&self.groups), self.free_vfio());
        let part = Part { parent: parent.name.clone(), kind: kind.id.clone(), group, vfio };
        self.groups.entry(group).or_default();
        self.parts.insert(uuid, part);
        self.announce_part(Action::Add, uuid);
        Ok(Duration::ZERO)
    }

    /// `remove_store`; one that is held open is waited for (`vfio_unregister_group_dev`).
    fn remove_part(&mut self, name: &str, text: &str) -> Answer {
        if text::number::<u64>(text)? == 0 {
            return Ok(Duration::ZERO);
        }
        let uuid: Uuid = name.parse().map_err(|_| Errno::ENODEV)?;
        let part = self.parts.get(&uuid).ok_or(Errno::ENODEV)?;
        let nodes =
            [format!("dev/vfio/{}", part.group), format!("dev/vfio/devices/vfio{}", part.vfio)];
        if let Some(node) = nodes.into_iter().find(|node| self.open.has(node)) {
            return Err(Stop::Held(node));
        }
        self.drop_part(uuid);
        Ok(Duration::ZERO)
    }

    fn drop_part(&mut self, uuid: Uuid) {
        self.announce_part(Action::Remove, uuid);
        if let Some(part) = self.parts.remove(&uuid) {
            self.groups.remove(&part.group);
        }
    }

    /// `mdev_unregister_parent`: a function's parts go with its driver.
    pub(super) fn drop_parts(&mut self, parent: PciAddress) {
        let parent = parent.to_string();
        let own = self.parts.iter().filter(|(_, part)| part.parent == parent);
        let own: Vec<Uuid> = own.map(|(uuid, _)| *uuid).collect();
        for uuid in own {
            self.drop_part(uuid);
        }
    }

    /// Whether a group is that of a mediated device.
    pub(super) fn is_part(&self, group: u32) -> bool {
        self.parts.values().any(|part| part.group == group)
    }

    /// Whether a number is that of a mediated device's character device.
    pub(super) fn is_part_vfio(&self, number: u32) -> bool {
        self.parts.values().any(|part| part.vfio == number)
    }

    fn place_of_part(&self, uuid: Uuid) -> Option<String> {
        let name = &self.parts.get(&uuid)?.parent;
        let parent = self.host.parents.iter().find(|parent| parent.name == *name)?;
        Some(format!("{}/{uuid}", self.parent_directory(parent)?))
    }

    fn announce_part(&mut self, action: Action, uuid: Uuid) {
        let Some(place) = self.place_of_part(uuid) else { return };
        let path = format!("devices/{place}");
        self.events.push(Uevent { action, path, subsystem: "mdev" });
    }
}
