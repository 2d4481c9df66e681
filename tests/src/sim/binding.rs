//! How functions and drivers come together and part: the rules of `drivers/base/bus.c`,
//! `drivers/base/dd.c` and `drivers/pci/pci-driver.c`. Changes the kernel's state, sleeps never.

use std::time::Duration;

use libvfio::address::PciAddress;
use nix::errno::Errno;

use super::described::Driver;
use super::event::Action;
use super::kernel::{Answer, Device, Kernel, Stop};
use super::vendor::Given;

const PAGE_SIZE: usize = 4096;

impl Kernel {
    /// `bind_store`.
    pub(super) fn bind(&mut self, driver: &str, text: &str) -> Answer {
        let address = self.find(text).ok_or(Errno::ENODEV)?;
        if !self.matches(driver, &self.devices[&address]) {
            return Err(Errno::ENODEV.into());
        }
        self.attach(address, driver)?;
        Ok(Duration::ZERO)
    }

    /// `unbind_store`.
    pub(super) fn unbind(&mut self, driver: &str, text: &str) -> Answer {
        let address = self.find(text).ok_or(Errno::ENODEV)?;
        if self.devices[&address].driver.as_deref() != Some(driver) {
            return Err(Errno::ENODEV.into());
        }
        self.detach(address)
    }

    /// `drivers_probe_store`: success, whether or not a driver was found.
    pub(super) fn probe(&mut self, text: &str) -> Answer {
        let address = self.find(text).ok_or(Errno::ENODEV)?;
        self.attach_any(address);
        Ok(Duration::ZERO)
    }

    /// `driver_set_override` (`drivers/base/driver.c`).
    pub(super) fn set_override(&mut self, address: PciAddress, text: &str) -> Answer {
        if text.len() >= PAGE_SIZE - 1 {
            return Err(Errno::EINVAL.into());
        }
        let name = text.split('\0').next().and_then(|text| text.split('\n').next());
        let device = self.devices.get_mut(&address).ok_or(Errno::ENODEV)?;
        device.driver_override = name.filter(|name| !name.is_empty()).map(str::to_owned);
        Ok(Duration::ZERO)
    }

    /// The device meant by what was written to the bus, one newline forgiven (`sysfs_streq`).
    pub(super) fn find(&self, text: &str) -> Option<PciAddress> {
        let name = text.strip_suffix('\n').unwrap_or(text);
        let address: PciAddress = name.parse().ok()?;
        (name == address.to_string() && self.devices.contains_key(&address)).then_some(address)
    }

    /// `pci_match_device`: an override admits its driver alone, whatever is in the driver's table;
    /// the tables of VFIO drivers count with an override only.
    fn matches(&self, driver: &str, device: &Device) -> bool {
        let Some(driver) = self.driver(driver) else { return false };
        if let Some(name) = &device.driver_override {
            return *name == driver.name;
        }
        let function = &device.description;
        !driver.vfio && driver.is_for(function.id, function.class)
    }

    /// `device_attach`: the first driver that matches and does not fail.
    pub(super) fn attach_any(&mut self, address: PciAddress) {
        let Some(device) = self.devices.get(&address).filter(|d| d.driver.is_none()) else {
            return;
        };
        let matching = self.drivers.iter().filter(|driver| self.matches(&driver.name, device));
        let names: Vec<String> = matching.map(|driver| driver.name.clone()).collect();
        for name in names {
            // A driver that fails leaves the device to the next.
            if self.attach(address, &name).is_ok() {
                return;
            }
        }
    }

    /// `__driver_probe_device` with this driver, then what drivers themselves refuse.
    pub(super) fn attach(&mut self, address: PciAddress, driver: &str) -> Result<(), Errno> {
        let device = self.devices.get(&address).ok_or(Errno::ENODEV)?;
        let driver = self.driver(driver).ok_or(Errno::ENODEV)?;
        if device.driver.is_some() {
            return Err(Errno::EBUSY);
        }
        if !self.can_probe(device) {
            return Err(Errno::ENODEV);
        }
        self.driver_accepts(driver, device)?;
        let (name, vfio) = (driver.name.clone(), driver.vfio);
        let number = vfio.then(|| self.free_vfio());
        if let Some(number) = number {
            self.vfio.insert(number, address);
        }
        if let Some(device) = self.devices.get_mut(&address) {
            (device.driver, device.vfio) = (Some(name), number);
            // Whoever gets it now may leave something in it.
            device.soiled |= vfio;
            self.stale.push(format!("sys/devices/{}/driver", device.path));
        }
        self.announce(Action::Bind, address);
        for (class, name, path) in self.members_of(address) {
            self.announce_member(Action::Add, class, &path);
            self.members.insert((class, name), path);
        }
        Ok(())
    }

    /// `pci_device_can_probe`.
    fn can_probe(&self, device: &Device) -> bool {
        let physical = device.physical.and_then(|(physical, _)| self.devices.get(&physical));
        physical.is_none_or(|pf| pf.autoprobe) || device.driver_override.is_some()
    }

    fn driver_accepts(&self, driver: &Driver, device: &Device) -> Result<(), Errno> {
        let bridge = device.description.bus.is_some();
        if !driver.vfio {
            // `iommu_device_use_default_domain`; port drivers manage their DMA themselves.
            let taken = device.group.is_some_and(|group| self.group_is_open(group));
            return if taken && !bridge { Err(Errno::EBUSY) } else { Ok(()) };
        }
        // `vfio_pci_core_register_device` takes neither bridges nor PFs with VFs, and
        // `vfio_group_find_or_alloc` nothing without a group.
        if bridge || device.group.is_none() {
            return Err(Errno::EINVAL);
        }
        if device.vfs.is_empty() { Ok(()) } else { Err(Errno::EBUSY) }
    }

    /// `device_driver_detach`, for as long as it takes. With a PF's driver its VFs go.
    pub(super) fn detach(&mut self, address: PciAddress) -> Answer {
        let device = self.devices.get(&address).ok_or(Errno::ENODEV)?;
        if device.driver.as_deref() == Some("nvidia")
            && self.is_in_use(device)
            && !device.unbind_lock
        {
            return Err(Stop::Forever);
        }
        if let Some(node) = self.held(device) {
            return Err(Stop::Held(node));
        }
        let pause = self.remove_vfs(address)?;
        self.drop_driver(address);
        Ok(pause)
    }

    /// Takes the driver away without asking.
    pub(super) fn drop_driver(&mut self, address: PciAddress) {
        self.drop_parts(address);
        for (class, name, path) in self.members_of(address) {
            self.announce_member(Action::Remove, class, &path);
            self.members.remove(&(class, name));
        }
        let Some(device) = self.devices.get_mut(&address) else { return };
        let had = device.driver.take().is_some();
        self.stale.push(format!("sys/devices/{}/driver", device.path));
        device.unbind_lock = false;
        device.given = Given::with(device.given.vectors);
        if let Some(number) = device.vfio.take() {
            self.vfio.remove(&number);
            self.drop_lists();
        }
        if had {
            self.announce(Action::Unbind, address);
        }
    }

    /// The node somebody has a function on a VFIO driver open by: such a function is not let go
    /// (`vfio_unregister_group_dev`).
    pub(super) fn held(&self, device: &Device) -> Option<String> {
        let number = device.vfio?;
        let nodes =
            [format!("dev/vfio/{}", device.group?), format!("dev/vfio/devices/vfio{number}")];
        nodes.into_iter().find(|node| self.open.has(node))
    }

    fn group_is_open(&self, group: u32) -> bool {
        let members = self.groups.get(&group).into_iter().flatten();
        members.filter_map(|member| self.devices.get(member)).any(|d| self.held(d).is_some())
    }

    /// The members of classes a device makes by its driver: class, name and path.
    pub(super) fn members_of(&self, address: PciAddress) -> Vec<(&'static str, String, String)> {
        let Some(device) = self.devices.get(&address) else { return Vec::new() };
        let path = &device.path;
        if let Some(number) = device.vfio {
            let name = format!("vfio{number}");
            let path = format!("{path}/vfio-dev/{name}");
            return if self.host.kernel.vfio_dev { vec![("vfio-dev", name, path)] } else { vec![] };
        }
        if device.driver.is_none() {
            return Vec::new();
        }
        let function = &device.description;
        let net =
            function.net.iter().map(|name| ("net", name.clone(), format!("{path}/net/{name}")));
        let disks = function.disk.iter().flat_map(|disk| {
            let whole = (disk.name.clone(), format!("{path}/block/{}", disk.name));
            let parts = disk.parts().map(|part| {
                let path = format!("{path}/block/{}/{part}", disk.name);
                (part, path)
            });
            std::iter::once(whole).chain(parts).map(|(name, path)| ("block", name, path))
        });
        net.chain(disks).collect()
    }
}
