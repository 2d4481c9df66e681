//! Device memory through VFIO: zeros over all of it, and whether they are there. Maps a region for
//! as long as that takes; touches nothing else of the device but its memory decoding.

use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};

use nix::libc::off_t;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vfio_ioctls::VfioRegionInfoCap;

use super::{open_device, refused};
use crate::error::Error;
use crate::host::HostRoot;
use crate::pci::Function;

/// `VFIO_REGION_INFO_FLAG_WRITE` and `_MMAP`.
const WRITABLE_AND_MAPPABLE: u32 = 0x2 | 0x4;
/// `VFIO_PCI_CONFIG_REGION_INDEX`.
const CONFIG: u32 = 7;
/// `PCI_COMMAND`, and its bit for memory decoding.
const COMMAND: u64 = 0x04;
const MEMORY: u16 = 0x2;

/// Writes zeros over region `bar` of a function, then reads all of it back; the offset of the first
/// word that is none, if one is not.
pub(crate) fn zero(host: &HostRoot, function: &Function, bar: u8) -> Result<Option<u64>, Error> {
    let device = open_device(host, function)?;
    let index = u32::from(bar);
    let sparse = |cap: &VfioRegionInfoCap| matches!(cap, VfioRegionInfoCap::SparseMmap(_));
    if device.get_region_flags(index) & WRITABLE_AND_MAPPABLE != WRITABLE_AND_MAPPABLE
        || device.get_region_caps(index).iter().any(sparse)
    {
        return Err(refused(function, &format!("BAR {bar} cannot be mapped whole")));
    }
    let mut command = [0; 2];
    device.region_read(CONFIG, &mut command, COMMAND);
    let command = u16::from_le_bytes(command) | MEMORY;
    device.region_write(CONFIG, &command.to_le_bytes(), COMMAND);

    let size = usize::try_from(device.get_region_size(index)).ok().and_then(NonZeroUsize::new);
    let offset = off_t::try_from(device.get_region_offset(index)).ok();
    let (Some(size), Some(offset)) = (size, offset) else {
        return Err(refused(function, &format!("BAR {bar} is empty or beyond reach")));
    };
    let unmapped = |errno: nix::Error| refused(function, &format!("mmap answered {errno}"));
    // SAFETY: the descriptor is that of `device`, which outlives this use of it.
    let descriptor = unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) };
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping of a region of the size VFIO says, aliasing nothing of ours.
    let mapping = unsafe { mmap(None, size, access, MapFlags::MAP_SHARED, descriptor, offset) }
        .map_err(unmapped)?;
    // SAFETY: the mapping is page aligned, `size` bytes long and ours alone; the region is plain
    // memory, without side effects of reading or writing it, or its profile would not name it.
    let left = unsafe { clear(mapping.cast(), size.get() / 8) };
    // SAFETY: the mapping made above, which nothing refers to any more.
    unsafe { munmap(mapping, size.get()) }.map_err(unmapped)?;
    Ok(left.map(|word| word as u64 * 8))
}

/// Zeros `words` words, then finds the first that is not zero.
///
/// # Safety
///
/// All of them are memory of the caller's own.
unsafe fn clear(memory: NonNull<u64>, words: usize) -> Option<usize> {
    for word in 0..words {
        // SAFETY: within what the caller vouches for.
        unsafe { memory.add(word).write_volatile(0) };
    }
    fence(Ordering::SeqCst);
    // SAFETY: likewise.
    (0..words).find(|word| unsafe { memory.add(*word).read_volatile() } != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_cleared() {
        let mut memory = vec![u64::MAX; 1000];
        let start = NonNull::new(memory.as_mut_ptr()).unwrap();
        // SAFETY: the vector's own words.
        assert_eq!(unsafe { clear(start, memory.len()) }, None);
        assert!(memory.iter().all(|word| *word == 0));
    }
}
