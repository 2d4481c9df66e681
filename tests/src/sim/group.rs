//! Which IOMMU group a function joins, by the kernel's rule (`pci_device_group`,
//! `drivers/iommu/iommu.c`). Reads the kernel's state, changes nothing.

use libvfio::address::PciAddress;

use super::described::{Express, Function};
use super::kernel::{Device, Kernel, lowest_free};

impl Kernel {
    /// The group for a device about to be added, a new one if it shares none; `None` without an
    /// IOMMU.
    pub(super) fn group_for(&self, address: PciAddress, device: &Device) -> Option<u32> {
        if self.host.kernel.iommus.is_empty() {
            return None;
        }
        let shared = self.unisolated_port(device).and_then(|port| port.group);
        let shared = shared.or_else(|| self.slot_group(address, device));
        Some(shared.unwrap_or_else(|| lowest_free(&self.groups)))
    }

    /// The nearest port above from which traffic may turn round before it reaches the root: all
    /// below it look like it. Ports were added before what is below them and have their groups.
    fn unisolated_port(&self, device: &Device) -> Option<&Device> {
        let port = self.devices.get(&device.parent?)?;
        (!self.path_isolates(port)).then_some(port)
    }

    /// `pci_acs_path_enabled`: this port and all above it keep traffic apart.
    fn path_isolates(&self, port: &Device) -> bool {
        let above = port.parent.and_then(|parent| self.devices.get(&parent));
        self.isolates(&port.description) && above.is_none_or(|above| self.path_isolates(above))
    }

    /// The group of another function in the slot, unless this one or that one is kept apart.
    fn slot_group(&self, address: PciAddress, device: &Device) -> Option<u32> {
        if device.physical.is_some() || self.isolates(&device.description) {
            return None;
        }
        let first = PciAddress::new(address.domain(), address.bus(), address.device(), 0)?;
        self.devices
            .range(first..)
            .take_while(|(other, _)| other.same_slot(address))
            .filter(|(_, other)| other.physical.is_none() && !self.isolates(&other.description))
            .find_map(|(_, other)| other.group)
    }

    /// `pci_acs_enabled`: a function alone in its slot with nothing below it has nobody to reach.
    fn isolates(&self, function: &Function) -> bool {
        match function.express {
            None => function.bus.is_none() && !self.multifunction(function.address),
            Some(Express::RootPort | Express::SwitchDown) => function.acs,
            Some(Express::Endpoint | Express::Integrated | Express::SwitchUp) => {
                function.acs || !self.multifunction(function.address)
            }
        }
    }
}
