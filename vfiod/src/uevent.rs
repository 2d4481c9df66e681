//! What the kernel reports of PCI functions and mediated devices, or the simulator in its place. Listens to one socket;
//! its reports are hints to look again, never facts.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use libvfio::address::PciAddress;
use libvfio::mediated::Uuid;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt,
    socket, sockopt,
};

/// The multicast group of the kernel's own reports (`kobject_uevent`, `lib/kobject_uevent.c`).
const KERNEL_GROUP: u32 = 1;
/// Room for a burst such as 508 VFs appearing at once.
const RECEIVE_BUFFER: usize = 8 << 20;
/// Longest report (`UEVENT_BUFFER_SIZE` is 2048 plus the header).
pub(crate) const LONGEST: usize = 8192;

/// What a batch of reports amounts to.
#[derive(Debug, PartialEq, Eq)]
pub enum Hint {
    /// Look at these again.
    Look(BTreeSet<Subject>),
    /// Reports were lost: look at everything again.
    LookEverywhere,
}

/// What a report is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// A PCI function.
    Function(PciAddress),
    /// A mediated device.
    Mediated(Uuid),
}

/// The kernel's reports, or a simulator's in the same words.
#[derive(Debug)]
pub struct Uevents {
    /// Netlink or `SOCK_SEQPACKET`: either keeps reports apart, and only the second can end.
    socket: OwnedFd,
}

impl Uevents {
    /// Begins to listen. Must happen before the host is first read, or a change in between is lost.
    pub fn listen() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        // Needs CAP_NET_ADMIN; without it the default size serves until a burst overruns it, and
        // that is noticed.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER);
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
        Ok(Self { socket })
    }

    /// The reports that a simulator sends over a packet socket.
    pub(crate) fn from_simulator(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Waits for reports of what devices there are and gathers all there are. Blocks. A simulator's end is
    /// [`UnexpectedEof`](io::ErrorKind::UnexpectedEof).
    pub fn wait(&self) -> io::Result<Hint> {
        let mut subjects = BTreeSet::new();
        loop {
            let wait = if subjects.is_empty() { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
            let mut buffer = [0u8; LONGEST];
            match recv(self.socket.as_raw_fd(), &mut buffer, wait) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => subjects.extend(subject(&buffer[..length])),
                Err(Errno::EAGAIN) => return Ok(Hint::Look(subjects)),
                Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => return Ok(Hint::LookEverywhere),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// What a report is about: `action@devpath`, then `KEY=value`, separated by zero bytes
/// (`Documentation/ABI/testing/sysfs-uevent`). Reports about what is below a function, such as its
/// VFIO device, are about the function too.
pub fn subject(report: &[u8]) -> Option<Subject> {
    let mut fields = report.split(|byte| *byte == 0).filter_map(|f| std::str::from_utf8(f).ok());
    let (_, path) = fields.next()?.split_once('@')?;
    let subsystem = fields.find_map(|field| field.strip_prefix("SUBSYSTEM="))?;
    match subsystem {
        "mdev" => path.rsplit('/').next()?.parse().ok().map(Subject::Mediated),
        "pci" | "vfio-dev" => {
            path.rsplit('/').find_map(|part| part.parse().ok()).map(Subject::Function)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_name_their_subject() {
        let function = "03:00.0".parse().ok().map(Subject::Function);
        let bind = b"bind@/devices/pci0000:00/0000:00:03.0/0000:03:00.0\0ACTION=bind\0\
                     DEVPATH=/devices/pci0000:00/0000:00:03.0/0000:03:00.0\0SUBSYSTEM=pci\0SEQNUM=9\0";
        assert_eq!(subject(bind), function);
        let below = b"add@/devices/pci0000:00/0000:03:00.0/vfio-dev/vfio0\0SUBSYSTEM=vfio-dev\0";
        assert_eq!(subject(below), function);
        let uuid = "b3a1f3c6-3a04-4d4e-8a4e-0f6b1f3c63a0";
        let part = format!("remove@/devices/virtual/mtty/mtty/{uuid}\0SUBSYSTEM=mdev\0");
        assert_eq!(subject(part.as_bytes()), uuid.parse().ok().map(Subject::Mediated));
    }

    #[test]
    fn other_reports_and_garbage_name_none() {
        for report in [
            &b"add@/devices/virtual/net/lo\0SUBSYSTEM=net\0"[..],
            b"",
            b"\0\0\0",
            b"add",
            b"libudev\0\xfe\xed\xca\xfe",
            b"add@/devices/pci0000:00\0SUBSYSTEM=pci\0",
            b"add@/devices/0000:03:00.0\0SUBSYSTEM=\xff\0",
        ] {
            assert_eq!(subject(report), None);
        }
    }
}
