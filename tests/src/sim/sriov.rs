//! Virtual functions come and go by the rules of `drivers/pci/iov.c` and `drivers/pci/pci-sysfs.c`.
//! Changes the kernel's state, sleeps never.

use std::time::Duration;

use libvfio::address::PciAddress;
use nix::errno::Errno;

use super::kernel::{Answer, Kernel, Stop};
use super::text;
use super::vendor::Profile;

impl Kernel {
    /// `sriov_numvfs_store`.
    pub(super) fn set_numvfs(&mut self, address: PciAddress, text: &str) -> Answer {
        let count: u16 = text::number(text).map_err(|_| Errno::EINVAL)?;
        let pf = self.devices.get(&address).ok_or(Errno::ENODEV)?;
        let sriov = pf.description.sriov.as_ref().ok_or(Errno::ENOENT)?;
        if count > sriov.total {
            return Err(Errno::ERANGE.into());
        }
        if usize::from(count) == pf.vfs.len() {
            return Ok(Duration::ZERO);
        }
        let driver = pf.driver.as_deref().and_then(|name| self.driver(name));
        if !driver.is_some_and(|driver| driver.sriov) {
            return Err(Errno::ENOENT.into());
        }
        if count == 0 {
            return self.remove_vfs(address);
        }
        if !pf.vfs.is_empty() {
            return Err(Errno::EBUSY.into());
        }
        self.add_vfs(address, count);
        Ok(self.delay(100))
    }

    /// `sriov_disable`: each VF leaves its driver first, which one that is held open does not.
    pub(super) fn remove_vfs(&mut self, physical: PciAddress) -> Answer {
        let Some(pf) = self.devices.get(&physical) else { return Err(Errno::ENODEV.into()) };
        if pf.vfs.is_empty() {
            return Ok(Duration::ZERO);
        }
        let vfs = pf.vfs.clone();
        if let Some(node) = vfs.iter().find_map(|vf| self.held(self.devices.get(vf)?)) {
            return Err(Stop::Held(node));
        }
        for vf in vfs {
            self.drop_driver(vf);
            self.remove(vf);
        }
        if let Some(pf) = self.devices.get_mut(&physical) {
            pf.profiles.fill(Profile::default());
        }
        Ok(self.delay(1000))
    }

    /// `sriov_drivers_autoprobe_store`.
    pub(super) fn set_autoprobe(&mut self, address: PciAddress, text: &str) -> Answer {
        let on = text::boolean(text)?;
        self.devices.get_mut(&address).ok_or(Errno::ENODEV)?.autoprobe = on;
        Ok(Duration::ZERO)
    }
}
