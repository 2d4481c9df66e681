//! Somebody who has a virtual function open, and whom no list of open files shows: the descriptors
//! are on their way through a socket that nobody reads. A kernel that is to remove the function then
//! sleeps until this process ends. Runs by itself, before the product does.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::{command, sysfs, wait_until};

const LIMIT: Duration = Duration::from_secs(60);
/// `VFIO_TYPE1v2_IOMMU`.
const TYPE1V2: i32 = 3;

/// `include/uapi/linux/vfio.h`, as far as this needs it.
mod ioctls {
    #![allow(missing_docs, clippy::undocumented_unsafe_blocks)]

    nix::ioctl_write_int_bad!(set_iommu, nix::request_code_none!(b';', 102));
    nix::ioctl_write_ptr_bad!(set_container, nix::request_code_none!(b';', 104), i32);
    nix::ioctl_write_ptr_bad!(get_device, nix::request_code_none!(b';', 106), std::ffi::c_char);
}

/// Makes one virtual function of a card, as soon as that has its driver, and has it open until killed.
pub fn hold(physical: &str) -> Result<()> {
    wait_until("the card has its driver", LIMIT, || Ok(sysfs::driver(physical).is_some()))?;
    command::run(["modprobe", "vfio-pci"])?.success()?;
    sysfs::write(physical, "sriov_drivers_autoprobe", "0")?;
    sysfs::write(physical, "sriov_numvfs", "1")?;
    let vf = sysfs::virtual_function(physical, 0)?;
    sysfs::bind(&vf, Some("vfio-pci"))?;
    let (outgoing, _unread) = UnixDatagram::pair()?;
    let held = open(&vf)?;
    let descriptors: Vec<RawFd> = held.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&descriptors)];
    let text = [IoSlice::new(b"held")];
    sendmsg::<()>(outgoing.as_raw_fd(), &text, &control, MsgFlags::empty(), None)?;
    drop(held);
    command::run(["systemd-notify", "--ready"])?.success()?;
    loop {
        std::thread::sleep(LIMIT);
    }
}

/// A function, its group and their container, open.
fn open(address: &str) -> Result<[OwnedFd; 3]> {
    let group = sysfs::group(address).with_context(|| format!("{address} has no group"))?;
    let (container, group) = (node("vfio")?, node(&group)?);
    let (name, number) = (CString::new(address)?, container.as_raw_fd());
    // SAFETY: both descriptors are open, and the request reads one number.
    unsafe { ioctls::set_container(group.as_raw_fd(), &raw const number) }?;
    // SAFETY: the descriptor is open and the request takes a number.
    unsafe { ioctls::set_iommu(number, TYPE1V2) }?;
    // SAFETY: the descriptor is open and `name` is a string that ends.
    let device = unsafe { ioctls::get_device(group.as_raw_fd(), name.as_ptr()) }?;
    // SAFETY: the kernel has just made this descriptor, and nobody else has it.
    let device = unsafe { OwnedFd::from_raw_fd(device) };
    Ok([device, group.into(), container.into()])
}

fn node(name: &str) -> Result<File> {
    let path = format!("/dev/vfio/{name}");
    OpenOptions::new().read(true).write(true).open(&path).context(path)
}
