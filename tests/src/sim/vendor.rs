//! What physical functions share out among their virtual ones: interrupt vectors (`drivers/pci/iov.c`),
//! Intel xe's time and memory (`drivers/gpu/drm/xe/xe_sriov_pf_sysfs.c`), NVIDIA's vGPU types as its
//! user guide has them. Changes the kernel's state, sleeps never.

use std::time::Duration;

use libvfio::address::PciAddress;
use nix::errno::Errno;

use super::described::{Vgpu, Xe};
use super::event::Action;
use super::kernel::{Answer, Device, Kernel, Stop};
use super::text;

const NOW: Answer = Ok(Duration::ZERO);
const PRIORITIES: [&str; 3] = ["low", "normal", "high"];
/// What xe's firmware clamps to (`abi/guc_klvs_abi.h`).
const LONGEST_QUANTUM: u32 = 100_000;
const LONGEST_TIMEOUT: u32 = 100_000_000;
const PAGE: u64 = 2 << 20;
/// The folder of a physical function on the xe driver.
const ADMIN: &str = "sriov_admin/vf";

/// What a virtual function has been given by its own files.
#[derive(Debug, Default)]
pub(super) struct Given {
    /// Interrupt vectors.
    pub(super) vectors: u16,
    vgpu: u32,
    parameters: String,
}

/// What a virtual function has been given by a file of its physical one.
#[derive(Debug, Clone, Default)]
pub(super) struct Profile {
    quantum: u32,
    timeout: u32,
    priority: usize,
    memory: u64,
}

impl Given {
    /// So many interrupt vectors, and nothing else.
    pub(super) fn with(vectors: u16) -> Self {
        Self { vectors, ..Self::default() }
    }
}

impl Profile {
    fn files(&self, xe: &Xe) -> [(&'static str, u16, String); 4] {
        let priorities = PRIORITIES.iter().enumerate().map(|(n, name)| {
            if n == self.priority { format!("[{name}]") } else { (*name).to_owned() }
        });
        let priorities: Vec<String> = priorities.take(if xe.high { 3 } else { 2 }).collect();
        let priority_mode = if xe.priorities { 0o644 } else { 0o444 };
        [
            ("exec_quantum_ms", 0o644, format!("{}\n", self.quantum)),
            ("preempt_timeout_us", 0o644, format!("{}\n", self.timeout)),
            ("sched_priority", priority_mode, format!("{}\n", priorities.join(" "))),
            ("vram_quota", 0o644, format!("{}\n", self.memory)),
        ]
    }
}

impl Kernel {
    /// Files in a function's folders that drivers add, with their texts.
    pub(super) fn vendor_files(&self, device: &Device) -> Vec<(String, u16, String)> {
        let mut files = Vec::new();
        if let Some(xe) = self.xe(device) {
            for (profile, number) in device.profiles.iter().zip(1..) {
                let add =
                    |(name, mode, text)| (format!("{ADMIN}{number}/profile/{name}"), mode, text);
                files.extend(profile.files(xe).map(add));
            }
        }
        if let Some(vgpu) = self.vgpu(device) {
            let text = format!("{}\n", self.creatable(device, vgpu));
            files.push(("nvidia/creatable_vgpu_types".to_owned(), 0o444, text));
            let text = format!("{}\n", device.given.vgpu);
            files.push(("nvidia/current_vgpu_type".to_owned(), 0o644, text));
            let text = format!("{}\n", device.given.parameters);
            files.push(("nvidia/vgpu_params".to_owned(), 0o644, text));
        }
        files
    }

    /// The virtual function that a file is about, if it is one of those.
    pub(super) fn vendor_target(&self, device: PciAddress, file: &str) -> Option<PciAddress> {
        if let Some(rest) = file.strip_prefix(ADMIN) {
            let number: u16 = rest.split('/').next()?.parse().ok()?;
            return self.virtual_at(device, number.checked_sub(1)?);
        }
        (file.starts_with("nvidia/") || file == "sriov_vf_msix_count").then_some(device)
    }

    fn virtual_at(&self, physical: PciAddress, index: u16) -> Option<PciAddress> {
        let of = |(address, d): (&PciAddress, &Device)| {
            (d.physical == Some((physical, index))).then_some(*address)
        };
        self.devices.iter().find_map(of)
    }

    /// Writes to one of them.
    pub(super) fn store_vendor(&mut self, device: PciAddress, file: &str, text: &str) -> Answer {
        match file {
            "sriov_vf_msix_count" => self.set_vectors(device, text),
            "nvidia/current_vgpu_type" => self.set_vgpu(device, text),
            "nvidia/vgpu_params" => {
                let device = self.devices.get_mut(&device).ok_or(Errno::ENODEV)?;
                if device.given.vgpu == 0 {
                    return Err(Errno::EINVAL.into());
                }
                text.trim().clone_into(&mut device.given.parameters);
                NOW
            }
            _ => self.set_profile(device, file, text),
        }
    }

    /// `sriov_vf_msix_count_store`.
    fn set_vectors(&mut self, address: PciAddress, text: &str) -> Answer {
        let wanted: u16 = text::number(text).map_err(|_| Errno::EINVAL)?;
        let device = self.devices.get(&address).ok_or(Errno::ENODEV)?;
        let (physical, _) = device.physical.ok_or(Errno::ENOENT)?;
        let pf = self.devices.get(&physical).ok_or(Errno::ENODEV)?;
        let sriov = pf.description.sriov.as_ref().ok_or(Errno::ENODEV)?;
        let (Some(msix), Some(_)) = (sriov.msix, pf.driver.as_ref()) else {
            return Err(Errno::EOPNOTSUPP.into());
        };
        if device.driver.is_some() {
            return Err(Errno::EBUSY.into());
        }
        let others = pf.vfs.iter().filter(|vf| **vf != address);
        let others: u16 = others.filter_map(|vf| Some(self.devices.get(vf)?.given.vectors)).sum();
        let wanted = if wanted == 0 { msix.each } else { wanted };
        if others.saturating_add(wanted) > msix.total {
            return Err(Errno::ENOSPC.into());
        }
        self.devices.get_mut(&address).ok_or(Errno::ENODEV)?.given.vectors = wanted;
        NOW
    }

    /// `xe_sriov_vf_attr_*_store`.
    fn set_profile(&mut self, physical: PciAddress, file: &str, text: &str) -> Answer {
        let device = self.devices.get(&physical).ok_or(Errno::ENODEV)?;
        let xe = *self.xe(device).ok_or(Errno::ENOENT)?;
        let rest = file.strip_prefix(ADMIN).and_then(|rest| rest.split_once("/profile/"));
        let (number, name) = rest.ok_or(Errno::EACCES)?;
        let at = number.parse::<usize>().ok().and_then(|number| number.checked_sub(1));
        let at = at.filter(|at| *at < device.profiles.len()).ok_or(Errno::ENOENT)?;
        let mut profile = device.profiles[at].clone();
        match name {
            "exec_quantum_ms" => {
                profile.quantum = text::number::<u32>(text)?.min(LONGEST_QUANTUM);
            }
            "preempt_timeout_us" => {
                profile.timeout = text::number::<u32>(text)?.min(LONGEST_TIMEOUT);
            }
            "sched_priority" => {
                if !xe.priorities {
                    return Err(Errno::EOPNOTSUPP.into());
                }
                let known = &PRIORITIES[..if xe.high { 3 } else { 2 }];
                let wanted = text.trim_end_matches('\n');
                let at = known.iter().position(|name| *name == wanted).ok_or(Errno::EINVAL)?;
                profile.priority = at;
            }
            "vram_quota" => {
                profile.memory = text::number::<u64>(text)?.next_multiple_of(PAGE);
                let others = device.profiles.iter().enumerate().filter(|(n, _)| *n != at);
                let others: u64 = others.map(|(_, other)| other.memory).sum();
                if others.saturating_add(profile.memory) > xe.memory.size {
                    return Err(Errno::ENOSPC.into());
                }
            }
            _ => return Err(Errno::EACCES.into()),
        }
        self.devices.get_mut(&physical).ok_or(Errno::ENODEV)?.profiles[at] = profile;
        NOW
    }

    /// One that has no type gets one if there is room; only clearing it makes room again.
    fn set_vgpu(&mut self, address: PciAddress, text: &str) -> Answer {
        let wanted: u32 = text::number(text)?;
        let device = self.devices.get(&address).ok_or(Errno::ENODEV)?;
        let vgpu = self.vgpu(device).ok_or(Errno::ENOENT)?;
        if wanted == device.given.vgpu {
            return NOW;
        }
        if wanted == 0 {
            if let Some(node) = self.held(device) {
                return Err(Stop::Held(node));
            }
        } else {
            let free = self.room(device, vgpu);
            let known = vgpu.types.iter().find(|t| t.number == wanted && t.size <= free);
            if device.given.vgpu != 0 || known.is_none() {
                return Err(Errno::EIO.into());
            }
        }
        self.expose(address, wanted);
        NOW
    }

    /// A function with a type is a VFIO device; one without is none.
    fn expose(&mut self, address: PciAddress, vgpu: u32) {
        for (class, name, path) in self.members_of(address) {
            self.announce_member(Action::Remove, class, &path);
            self.members.remove(&(class, name));
        }
        let number = (vgpu != 0).then(|| self.free_vfio());
        if let Some(old) = self.devices.get(&address).and_then(|device| device.vfio) {
            self.vfio.remove(&old);
        }
        if let Some(number) = number {
            self.vfio.insert(number, address);
        }
        if let Some(device) = self.devices.get_mut(&address) {
            device.vfio = number;
            device.given = Given { vgpu, vectors: device.given.vectors, ..Given::default() };
        }
        for (class, name, path) in self.members_of(address) {
            self.announce_member(Action::Add, class, &path);
            self.members.insert((class, name), path);
        }
    }

    /// NVIDIA's `sriov-manage -e|-d ADDRESS`, on a host that has the program.
    pub(super) fn sriov_manage(&mut self, arguments: &str) -> Answer {
        let (option, address) = arguments.trim().split_once(' ').ok_or(Errno::EINVAL)?;
        let address = self.find(address).ok_or(Errno::ENODEV)?;
        let pf = self.devices.get(&address).ok_or(Errno::ENODEV)?;
        let total = pf.description.sriov.as_ref().map_or(0, |sriov| sriov.total);
        if pf.driver.as_deref() != Some("nvidia") || pf.description.users > 0 {
            return Err(Errno::EBUSY.into());
        }
        match option {
            "-e" if pf.vfs.is_empty() => {
                self.add_vfs(address, total);
                Ok(self.delay(100))
            }
            "-e" => NOW,
            "-d" => self.remove_vfs(address),
            _ => Err(Errno::EINVAL.into()),
        }
    }

    /// What the xe driver shares out of a physical function it has.
    fn xe(&self, device: &Device) -> Option<&Xe> {
        let described = device.driver.as_deref() == Some("xe");
        // From the description that stays, which the borrow outlives.
        let function = described.then(|| self.described.get(&device.description.address))??;
        function.sriov.as_ref()?.xe.as_ref()
    }

    /// The vGPU types of the card that a virtual function is of, while the nvidia driver has it.
    fn vgpu(&self, device: &Device) -> Option<&Vgpu> {
        let (physical, _) =
            device.physical.filter(|_| device.driver.as_deref() == Some("nvidia"))?;
        self.described.get(&physical)?.sriov.as_ref()?.vgpu.as_ref()
    }

    /// How much of a card its virtual functions have left.
    fn room(&self, device: &Device, vgpu: &Vgpu) -> u32 {
        let physical = device.physical.map(|(physical, _)| physical);
        let siblings = physical.and_then(|physical| self.devices.get(&physical));
        let siblings = siblings.into_iter().flat_map(|pf| &pf.vfs);
        let taken = siblings.filter_map(|vf| {
            let taken = self.devices.get(vf)?.given.vgpu;
            Some(vgpu.types.iter().find(|known| known.number == taken)?.size)
        });
        vgpu.room.saturating_sub(taken.sum())
    }

    fn creatable(&self, device: &Device, vgpu: &Vgpu) -> String {
        let free = self.room(device, vgpu);
        let fits = vgpu.types.iter().filter(|known| known.size <= free);
        let head = "ID    : vGPU Name".to_owned();
        fits.fold(head, |all, known| format!("{all}\n{}  : {}", known.number, known.name))
    }
}
