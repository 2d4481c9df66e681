//! What KVM on this host can do for passthrough. Opens `/dev/kvm`, asks, and closes it.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;

use kvm_bindings::{kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO};
use kvm_ioctls::{Cap, Kvm};

use crate::error::Error;
use crate::host::HostRoot;

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// KVM's API version; 12 since Linux 2.6.22.
    pub api_version: i32,
    /// Device interrupts can be signalled without leaving the kernel (`KVM_CAP_IRQFD`).
    pub irqfd: bool,
    /// The pseudo device by which a VMM tells KVM about VFIO groups and devices.
    pub vfio_device: bool,
}

/// Asks KVM; an error says why it cannot be opened.
pub fn capability(host: &HostRoot) -> Result<Capability, Error> {
    let node = host.path("dev/kvm");
    let failed = |errno: kvm_ioctls::Error| {
        Error::io("open", &node)(std::io::Error::from_raw_os_error(errno.errno()))
    };
    let path = CString::new(node.as_os_str().as_bytes())
        .map_err(|e| Error::io("open", &node)(std::io::Error::other(e)))?;
    let kvm = Kvm::new_with_path(path).map_err(failed)?;
    let vm = kvm.create_vm().map_err(failed)?;
    // Created for real and dropped: the wrapper's test mode would close descriptor 0.
    let mut device = kvm_create_device {
        type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
        ..kvm_create_device::default()
    };
    Ok(Capability {
        api_version: kvm.get_api_version(),
        irqfd: kvm.check_extension(Cap::Irqfd),
        vfio_device: vm.create_device(&mut device).is_ok(),
    })
}
