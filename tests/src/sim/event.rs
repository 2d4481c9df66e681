//! The events a kernel would have sent. Plain types; touches nothing, sends nothing.

use libvfio::address::PciAddress;

use super::kernel::Kernel;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It is there.
    Add,
    /// It is gone.
    Remove,
    /// A driver has it.
    Bind,
    /// Its driver has it no more.
    Unbind,
}

impl Action {
    fn name(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Bind => "bind",
            Self::Unbind => "unbind",
        }
    }
}

/// One event (`kobject_uevent`, `lib/kobject_uevent.c`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uevent {
    /// What happened.
    pub action: Action,
    /// To what: a path below `/sys`.
    pub path: String,
    /// What that is: `pci`, `vfio-dev`, `mdev`.
    pub subsystem: &'static str,
}

impl Uevent {
    /// As it comes from the kernel's socket.
    pub fn report(&self, sequence: u64) -> Vec<u8> {
        let Self { action, path, subsystem } = self;
        let action = action.name();
        format!(
            "{action}@/{path}\0ACTION={action}\0DEVPATH=/{path}\0SUBSYSTEM={subsystem}\0\
             SEQNUM={sequence}\0"
        )
        .into_bytes()
    }
}

impl Kernel {
    pub(super) fn announce(&mut self, action: Action, address: PciAddress) {
        let Some(device) = self.devices.get(&address) else { return };
        let path = format!("devices/{}", device.path);
        self.events.push(Uevent { action, path, subsystem: "pci" });
    }

    /// Of a member of a class, by its path below `sys/devices`.
    pub(super) fn announce_member(&mut self, action: Action, subsystem: &'static str, path: &str) {
        let path = format!("devices/{path}");
        self.events.push(Uevent { action, path, subsystem });
    }
}
