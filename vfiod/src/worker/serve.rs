//! The worker's side: steps and reads, one after another, until nobody can ask any more.
//! Changes the kernel through [`libvfio::step`] alone.

use std::env;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use libvfio::host::{HostRoot, read_page};
use libvfio::{backend, vfio};
use nix::errno::Errno;
use nix::sys::prctl;

use super::{Opened, Request, packet};

/// The host of the worker that this process is to be, if it is one. Whoever has started it waits, so
/// that it is read by hand.
pub fn asked_for() -> Option<PathBuf> {
    let words: Vec<_> = env::args_os().skip(1).collect();
    match words.as_slice() {
        [part, option, root] if part == "worker" && option == "--root" => Some(root.into()),
        _ => None,
    }
}

/// Serves the socket that is standard input until the daemon closes it or has ended.
///
/// A step that is under way when the daemon ends is finished: its lease stays locked until then.
pub fn serve(root: &Path) -> io::Result<()> {
    // Only for whoever lists processes.
    let _ = prctl::set_name(c"vfiod-worker");
    let host = HostRoot::new(root);
    let socket = io::stdin();
    let mut buffer = packet::Buffer::default();
    while let Some((request, lock)) = receive(&socket, &mut buffer)? {
        // Given away with the answer; a copy that stayed here would be one more holder.
        let mut given: Vec<OwnedFd> = Vec::new();
        let answer = match request {
            Request::Step(step) => serde_json::to_vec(&step.execute(&host))?,
            Request::Offers(device) => {
                let read = backend::offers(&host, device);
                serde_json::to_vec(&read.map_err(|e| e.to_string()))?
            }
            Request::Open(paths) => {
                let opened = vfio::open_nodes(&paths).map(|nodes| given = nodes);
                serde_json::to_vec(&opened_or_not(opened))?
            }
            Request::OpenIommu(interface) => {
                let opened = vfio::open_iommu(&host, interface).map(|iommu| given.push(iommu));
                serde_json::to_vec(&opened_or_not(opened))?
            }
            Request::Read(attributes) => {
                let read = |attribute: &PathBuf| {
                    read_page(attribute).map_err(|e| e.raw_os_error().unwrap_or_default())
                };
                serde_json::to_vec(&attributes.iter().map(read).collect::<Vec<_>>())?
            }
        };
        drop(lock);
        let descriptors: Vec<RawFd> = given.iter().map(AsRawFd::as_raw_fd).collect();
        match packet::send(&socket, &answer, &descriptors) {
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Ok(()),
            sent => sent?,
        }
    }
    Ok(())
}

fn opened_or_not(opened: Result<(), (PathBuf, io::Error)>) -> Opened {
    opened.map_err(|(path, error)| (path, error.raw_os_error().unwrap_or_default()))
}

/// The next request and the descriptor that came with it.
fn receive(
    socket: &impl AsRawFd,
    buffer: &mut packet::Buffer,
) -> io::Result<Option<(Request, Option<OwnedFd>)>> {
    let (packet, descriptors) = match packet::receive(socket, buffer) {
        Err(error) if error.raw_os_error() == Some(Errno::ECONNRESET as i32) => return Ok(None),
        received => received?,
    };
    if packet.is_empty() {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(packet)?, descriptors.into_iter().next())))
}
