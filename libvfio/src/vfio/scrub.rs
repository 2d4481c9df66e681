//! Device memory through VFIO: zeros over all of it, and whether they are there. Maps a region for
//! as long as that takes; touches nothing else of the device but its memory decoding.

use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
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
    let memory = unsafe { std::slice::from_raw_parts_mut(mapping.cast().as_ptr(), size.get() / 8) };
    let left = clear(memory);
    // SAFETY: the mapping made above, which nothing refers to any more.
    unsafe { munmap(mapping, size.get()) }.map_err(unmapped)?;
    Ok(left.map(|word| word as u64 * 8))
}

/// Zeros all words of device memory that is mapped, then finds the first that is not zero: its place.
/// Word by word, since what sets ordinary memory may use instructions that a device's does not take,
/// and since what is read has to come from the device.
pub fn clear(memory: &mut [u64]) -> Option<usize> {
    for word in memory.iter_mut() {
        // SAFETY: a reference is valid for writing.
        unsafe { std::ptr::from_mut(word).write_volatile(0) };
    }
    fence(Ordering::SeqCst);
    // SAFETY: a reference is valid for reading.
    memory.iter().position(|word| unsafe { std::ptr::from_ref(word).read_volatile() } != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_cleared() {
        let mut memory = vec![u64::MAX; 1000];
        assert_eq!(clear(&mut memory), None);
        assert!(memory.iter().all(|word| *word == 0));
    }
}
