//! What a write to a file of the simulated host does. The one entrance to changes; faults strike
//! here. Sleeps never.

use std::time::Duration;

use libvfio::address::PciAddress;
use nix::errno::Errno;

use super::fault::Operation;
use super::kernel::{Answer, Kernel, Stop, Written};
use super::text;

const NOW: Answer = Ok(Duration::ZERO);
/// `reset_fn` of each method (`pci_reset_fn_methods`, `drivers/pci/pci.c`).
const RESET_METHODS: [&str; 7] =
    ["device_specific", "acpi", "flr", "af_flr", "pm", "bus", "cxl_bus"];

impl Kernel {
    /// Writes to a file, named by its path below the root with links resolved.
    pub fn write(&mut self, path: &str, data: &[u8]) -> Answer {
        let value = String::from_utf8_lossy(data).into_owned();
        let answer = self.faulty_store(path, &value);
        let result = match &answer {
            Ok(_) => Some(Ok(())),
            Err(Stop::Errno(errno)) => Some(Err(*errno)),
            Err(Stop::Forever | Stop::Killed) => None,
            Err(Stop::Held(_)) => return answer,
        };
        self.journal.push(Written { path: path.to_owned(), value, result });
        answer
    }

    fn faulty_store(&mut self, path: &str, text: &str) -> Answer {
        let Some((operation, device)) = self.operation(path, text) else {
            return self.store(path, text);
        };
        self.or_fault(operation, device, Duration::ZERO, |kernel| kernel.store(path, text))
    }

    /// What a write amounts to, and on which function, if on one.
    fn operation(&self, path: &str, text: &str) -> Option<(Operation, Option<PciAddress>)> {
        if let Some(operation) = self.mediated_operation(path) {
            return Some(operation);
        }
        if let Some((device, attribute)) = self.attribute_at(path) {
            let operation = match attribute {
                "driver_override" => Operation::Override,
                "sriov_numvfs" => Operation::NumVfs,
                "sriov_drivers_autoprobe" => Operation::Autoprobe,
                "reset" => Operation::Reset,
                "remove" => Operation::Remove,
                _ => {
                    return Some((
                        Operation::Setting,
                        Some(self.vendor_target(device, attribute)?),
                    ));
                }
            };
            return Some((operation, Some(device)));
        }
        let parts: Vec<&str> = path.split('/').collect();
        match parts.as_slice() {
            ["proc", "driver", "nvidia", "gpus", device, "unbindLock"] => {
                Some((Operation::UnbindLock, Some(self.find(device)?)))
            }
            ["sys", "bus", "pci", "drivers_probe"] => {
                Some((Operation::Probe, Some(self.find(text)?)))
            }
            ["sys", "bus", "pci", "drivers", _, "bind"] => {
                Some((Operation::Bind, Some(self.find(text)?)))
            }
            ["sys", "bus", "pci", "drivers", _, "unbind"] => {
                Some((Operation::Unbind, Some(self.find(text)?)))
            }
            ["sim", "hot-reset"] => Some((Operation::Reset, Some(self.find(text)?))),
            ["sim", "memory"] => Some((Operation::Scrub, Some(self.find(text)?))),
            ["sim", "load-module"] => Some((Operation::LoadModule, None)),
            ["sim", "sriov-manage"] => {
                Some((Operation::NumVfs, Some(self.find(text.split(' ').nth(1)?)?)))
            }
            _ => None,
        }
    }

    fn store(&mut self, path: &str, text: &str) -> Answer {
        if let Some(answer) = self.store_mediated(path, text) {
            return answer;
        }
        if let Some((device, attribute)) = self.attribute_at(path) {
            return self.store_attribute(device, attribute, text);
        }
        let parts: Vec<&str> = path.split('/').collect();
        match parts.as_slice() {
            ["sys", "bus", "pci", "drivers_probe"] => self.probe(text),
            ["sys", "bus", "pci", "drivers", driver, "bind"] => self.bind(driver, text),
            ["sys", "bus", "pci", "drivers", driver, "unbind"] => self.unbind(driver, text),
            ["sys", "bus", "pci", "rescan"] => {
                if text::number::<u64>(text)? != 0 {
                    self.rescan();
                }
                NOW
            }
            // No file of a kernel: what modprobe would do.
            ["sim", "load-module"] => {
                self.load(&text.trim_end_matches('\n').replace('-', "_"))?;
                NOW
            }
            // Nor these: what VFIO does on a device that somebody opens.
            ["sim", "hot-reset"] => self.hot_reset(text),
            ["sim", "memory"] => {
                let address = self.find(text).ok_or(Errno::ENODEV)?;
                self.devices.get_mut(&address).ok_or(Errno::ENODEV)?.soiled = false;
                NOW
            }
            // Nor this: what NVIDIA's program would do.
            ["sim", "sriov-manage"] => self.sriov_manage(text),
            ["proc", "driver", "nvidia", "gpus", device, "unbindLock"] => {
                self.lock_unbind(device, text)
            }
            _ => Err(Errno::EACCES.into()),
        }
    }

    fn store_attribute(&mut self, device: PciAddress, attribute: &str, text: &str) -> Answer {
        match attribute {
            "driver_override" => self.set_override(device, text),
            "sriov_numvfs" => self.set_numvfs(device, text),
            "sriov_drivers_autoprobe" => self.set_autoprobe(device, text),
            "reset" => self.reset(device, text),
            "reset_method" => self.set_reset_methods(device, text),
            "remove" => self.remove_by_hand(device, text),
            "rescan" => {
                if text::number::<u64>(text)? != 0 {
                    self.rescan();
                }
                NOW
            }
            "d3cold_allowed" => {
                let allowed = text::number::<u64>(text)? != 0;
                self.devices.get_mut(&device).ok_or(Errno::ENODEV)?.d3cold_allowed = allowed;
                NOW
            }
            "power/control" => {
                let control = text.trim_end_matches('\n');
                if !matches!(control, "on" | "auto") {
                    return Err(Errno::EINVAL.into());
                }
                let device = self.devices.get_mut(&device).ok_or(Errno::ENODEV)?;
                control.clone_into(&mut device.power_control);
                NOW
            }
            _ => self.store_vendor(device, attribute, text),
        }
    }

    /// `reset_store`.
    fn reset(&mut self, address: PciAddress, text: &str) -> Answer {
        if text::number::<u64>(text)? != 1 {
            return Err(Errno::EINVAL.into());
        }
        let device = self.devices.get(&address).ok_or(Errno::ENODEV)?;
        // A bus that others are on is not reset for one (`pci_parent_bus_reset`).
        let by_bus = |method: &String| matches!(method.as_str(), "bus" | "cxl_bus");
        let alone = device.parent.is_some() && self.on_bus(address).len() == 1;
        if !device.reset_methods.iter().any(|method| !by_bus(method) || alone) {
            return Err(Errno::ENOTTY.into());
        }
        self.heal(&[address]);
        Ok(self.delay(100))
    }

    /// `vfio_pci_ioctl_pci_hot_reset`: whoever asks must have the groups of all that is reset.
    fn hot_reset(&mut self, text: &str) -> Answer {
        let address = self.find(text).ok_or(Errno::ENODEV)?;
        let device = &self.devices[&address];
        if device.parent.is_none() || device.physical.is_some() || device.vfio.is_none() {
            return Err(Errno::ENODEV.into());
        }
        let all = self.on_bus(address);
        let foreign = |other: &PciAddress| {
            let other = &self.devices[other];
            other.driver.is_some() && other.vfio.is_none()
        };
        if all.iter().any(foreign) {
            return Err(Errno::EPERM.into());
        }
        self.heal(&all);
        Ok(self.delay(100))
    }

    fn on_bus(&self, address: PciAddress) -> Vec<PciAddress> {
        let bus = |address: &PciAddress| (address.domain(), address.bus());
        self.devices.keys().copied().filter(|other| bus(other) == bus(&address)).collect()
    }

    /// A reset brings back what an earlier one has spoilt.
    fn heal(&mut self, functions: &[PciAddress]) {
        for address in functions {
            if let Some(device) = self.devices.get_mut(address) {
                device.damage = None;
            }
        }
    }

    /// `reset_method_store`: a subset of what the device can, `default` for all, nothing for none.
    fn set_reset_methods(&mut self, address: PciAddress, text: &str) -> Answer {
        let device = self.devices.get_mut(&address).ok_or(Errno::ENODEV)?;
        let can = &device.description.reset;
        let text = text.trim_end_matches('\n');
        device.reset_methods = if text == "default" {
            can.clone()
        } else {
            let wanted: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
            let known = |m: &String| RESET_METHODS.contains(&m.as_str()) && can.contains(m);
            if !wanted.iter().all(known) {
                return Err(Errno::EINVAL.into());
            }
            wanted
        };
        NOW
    }

    /// `remove_store`: not by surprise, so what is held is waited for.
    fn remove_by_hand(&mut self, address: PciAddress, text: &str) -> Answer {
        if text::number::<u64>(text)? == 0 {
            return NOW;
        }
        let pause = self.detach(address)?;
        self.unplug(address)?;
        Ok(pause)
    }

    /// The nvidia driver's `unbindLock`: it takes any write, and grants the lock only without users.
    fn lock_unbind(&mut self, device: &str, text: &str) -> Answer {
        let address = self.find(device).ok_or(Errno::ENODEV)?;
        let wanted = text::number::<u64>(text)? == 1;
        let device = self.devices.get_mut(&address).ok_or(Errno::ENODEV)?;
        device.unbind_lock = wanted && device.description.users == 0;
        NOW
    }
}
