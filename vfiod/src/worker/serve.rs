//! The worker's side: steps and reads, one after another, until nobody can ask any more.
//! Changes the kernel through [`libvfio::step`] alone.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use libvfio::host::{HostRoot, read_page};
use libvfio::shape;
use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, send};

use super::{LONGEST, Request};

/// Serves the socket that is standard input until the daemon closes it or has ended.
///
/// A step that is under way when the daemon ends is finished: its lease stays locked until then.
pub fn serve(root: &Path) -> io::Result<()> {
    // Only for whoever lists processes.
    let _ = prctl::set_name(c"vfiod-worker");
    let host = HostRoot::new(root);
    let socket = io::stdin();
    while let Some((request, lock)) = receive(&socket)? {
        let answer = match request {
            Request::Step(step) => serde_json::to_vec(&step.execute(&host))?,
            Request::Shape(device) => {
                let read = shape::read(&host, device);
                serde_json::to_vec(&read.map_err(|e| e.raw_os_error().unwrap_or_default()))?
            }
            Request::Read(attributes) => {
                let read = |attribute: &PathBuf| {
                    read_page(attribute).map_err(|e| e.raw_os_error().unwrap_or_default())
                };
                serde_json::to_vec(&attributes.iter().map(read).collect::<Vec<_>>())?
            }
        };
        drop(lock);
        match send(socket.as_raw_fd(), &answer, MsgFlags::MSG_NOSIGNAL) {
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Ok(()),
            sent => sent?,
        };
    }
    Ok(())
}

/// The next request and the descriptor that came with it.
fn receive(socket: &impl AsRawFd) -> io::Result<Option<(Request, Option<OwnedFd>)>> {
    let mut packet = vec![0; LONGEST];
    let mut space = cmsg_space!(i32);
    let mut parts = [IoSliceMut::new(&mut packet)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Err(Errno::EINTR) => {}
            Err(Errno::ECONNRESET) => return Ok(None),
            message => break message?,
        }
    };
    let descriptors = message.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
        _ => None,
    });
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows of it.
    let lock = descriptors.map(|descriptor| unsafe { OwnedFd::from_raw_fd(descriptor) });
    let length = message.bytes;
    if length == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&packet[..length])?, lock)))
}
