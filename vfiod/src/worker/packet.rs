//! Packets between the daemon and a worker, with the descriptors that go along. Sends and receives;
//! knows nothing of what is asked.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recv, recvmsg, sendmsg};

use super::MOST_DESCRIPTORS;

/// Sends a packet, and copies of descriptors with it.
pub(super) fn send(socket: &impl AsRawFd, packet: &[u8], descriptors: &[RawFd]) -> nix::Result<()> {
    let rights = [ControlMessage::ScmRights(descriptors)];
    let rights = if descriptors.is_empty() { &[][..] } else { &rights };
    let socket = socket.as_raw_fd();
    sendmsg::<()>(socket, &[IoSlice::new(packet)], rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// The next packet and the descriptors that came with it; empty once the other end has gone.
pub(super) fn receive(socket: &impl AsRawFd) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let socket = socket.as_raw_fd();
    // Most have some dozen bytes, and some a page of an attribute and more.
    let look = MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC;
    let length = loop {
        match recv(socket, &mut [], look) {
            Err(Errno::EINTR) => {}
            length => break length?,
        }
    };
    let mut packet = vec![0; length];
    let mut space = cmsg_space!([RawFd; MOST_DESCRIPTORS]);
    let mut parts = [IoSliceMut::new(&mut packet)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = loop {
        match recvmsg::<()>(socket, &mut parts, Some(&mut space), flags) {
            Err(Errno::EINTR) => {}
            message => break message?,
        }
    };
    let mut descriptors = Vec::new();
    for message in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(rights) = message {
            // SAFETY: the kernel has just given us these descriptors, and nobody else knows of them.
            descriptors.extend(rights.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let length = message.bytes;
    packet.truncate(length);
    Ok((packet, descriptors))
}
