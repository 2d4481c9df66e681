//! Packets between the daemon and a worker, with the descriptors that go along. Sends and receives;
//! knows nothing of what is asked.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use super::MOST_DESCRIPTORS;

/// Longest request or answer, in bytes. A page of an attribute as JSON, or a step and what became of
/// it, is half of that; but so much the allocator has mapped by itself, and clears none of it.
const LONGEST: usize = 128 << 10;

/// Where packets are received, one after another. Of most only the first of its pages is ever used,
/// and there.
#[derive(Debug)]
pub(super) struct Buffer(Box<[u8]>);

impl Default for Buffer {
    fn default() -> Self {
        Self(vec![0; LONGEST].into())
    }
}

/// Sends a packet, and copies of descriptors with it.
pub(super) fn send(socket: &impl AsRawFd, packet: &[u8], descriptors: &[RawFd]) -> nix::Result<()> {
    let rights = [ControlMessage::ScmRights(descriptors)];
    let rights = if descriptors.is_empty() { &[][..] } else { &rights };
    let socket = socket.as_raw_fd();
    sendmsg::<()>(socket, &[IoSlice::new(packet)], rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// The next packet and the descriptors that came with it; empty once the other end has gone.
pub(super) fn receive<'a>(
    socket: &impl AsRawFd,
    buffer: &'a mut Buffer,
) -> io::Result<(&'a [u8], Vec<OwnedFd>)> {
    let mut space = cmsg_space!([RawFd; MOST_DESCRIPTORS]);
    let mut parts = [IoSliceMut::new(&mut buffer.0)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
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
    Ok((&buffer.0[..length], descriptors))
}
