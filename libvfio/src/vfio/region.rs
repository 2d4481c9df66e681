//! Regions of functions that are plain memory, mapped through VFIO. Opens a function and closes it;
//! touches nothing else of it but its memory decoding.

use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use nix::libc::off_t;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vfio_ioctls::{VfioDevice, VfioRegionInfoCap};

use super::memory::{Memory, PAGE};
use super::{open_device, refused};
use crate::error::Error;
use crate::host::{HostRoot, SIMULATED_REGIONS};
use crate::pci::Function;

/// `VFIO_REGION_INFO_FLAG_WRITE` and `_MMAP`.
const WRITABLE_AND_MAPPABLE: u32 = 0x2 | 0x4;
/// `VFIO_PCI_CONFIG_REGION_INDEX`.
const CONFIG: u32 = 7;
/// `PCI_COMMAND`, and its bit for memory decoding.
const COMMAND: u64 = 0x04;
const MEMORY: u16 = 0x2;

/// A region that is mapped for as long as this is there.
pub(crate) struct Region {
    mapping: NonNull<c_void>,
    size: NonZeroUsize,
    /// Closed after the mapping is gone.
    _device: Option<VfioDevice>,
}

impl Region {
    /// Region `bar` of a function that is on VFIO, all of it.
    pub(crate) fn open(host: &HostRoot, function: &Function, bar: u8) -> Result<Self, Error> {
        if !host.is_real() {
            return Self::simulated(host, function);
        }
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

        let (size, offset) = (device.get_region_size(index), device.get_region_offset(index));
        // SAFETY: the descriptor is that of `device`, which outlives this use of it.
        let descriptor = unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) };
        let (mapping, size) = map(function, bar, descriptor, (size, offset))?;
        Ok(Self { mapping, size, _device: Some(device) })
    }

    /// Ordinary memory that stands for the only region of a simulated function.
    fn simulated(host: &HostRoot, function: &Function) -> Result<Self, Error> {
        let path = host.path(SIMULATED_REGIONS).join(function.address.to_string());
        let opened = OpenOptions::new().read(true).write(true).open(&path);
        let file: File = opened.map_err(Error::io("open", &path))?;
        let size = file.metadata().map_err(Error::io("ask the size of", &path))?.len();
        let (mapping, size) = map(function, 0, file.as_fd(), (size, 0))?;
        Ok(Self { mapping, size, _device: None })
    }

    /// What is mapped.
    pub(crate) fn memory(&mut self) -> Memory {
        // SAFETY: the mapping is page aligned, of this size and ours alone; the region is plain memory,
        // without side effects of reading or writing it, or its profile would not name it. Whoever has
        // this does not outlive the call that asked for it.
        unsafe { Memory::at(self.mapping, self.size.get()) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping made above, which nothing refers to any more. It cannot fail.
        let _ = unsafe { munmap(self.mapping, self.size.get()) };
    }
}

/// Maps what `descriptor` has at a place, given by size and offset.
fn map(
    function: &Function,
    bar: u8,
    descriptor: BorrowedFd<'_>,
    (size, offset): (u64, u64),
) -> Result<(NonNull<c_void>, NonZeroUsize), Error> {
    let length = usize::try_from(size).ok().filter(|size| size % PAGE == 0);
    let place = off_t::try_from(offset).ok();
    let (Some(length), Some(place)) = (length.and_then(NonZeroUsize::new), place) else {
        let why = format!("BAR {bar} is empty, no whole number of pages, or beyond reach");
        return Err(refused(function, &why));
    };
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping of what is as large as its owner says, aliasing nothing of ours.
    let mapping = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, descriptor, place) };
    let unmapped = |errno| refused(function, &format!("mmap answered {errno}"));
    Ok((mapping.map_err(unmapped)?, length))
}
