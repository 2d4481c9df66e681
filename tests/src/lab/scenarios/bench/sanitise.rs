//! What it costs to leave nothing of a tenant: a release with its reset, and clearing memory.

use std::fs::OpenOptions;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libvfio::client::Options;
use libvfio::host::HostRoot;
use libvfio::scrub::{ReadBack, Scrubber};
use libvfio::step::Step;
use libvfio::vfio::Memory;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::{SOME, manager, peers, timed};
use crate::lab::{Lab, command, sysfs};
use crate::machine::{GPU, GPU_AUDIO, NIC};
use crate::protocol::{BenchRow, median};

/// Of the display whose memory it is known how to clear, and of a virtual function.
pub(super) fn run(lab: &mut Lab) -> Result<()> {
    command::run(["modprobe", "vfio-pci"])?.success()?;
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "0")?;
    sysfs::write(NIC.address, "sriov_numvfs", "1")?;
    let vf = sysfs::virtual_function(NIC.address, 0)?;
    release(lab, &vf)?;
    sysfs::write(NIC.address, "sriov_numvfs", "0")?;
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "1")?;
    bar_zero(lab)
}

/// A release that resets (FLR), beside the kernel's reset and the bare writes that give back.
fn release(lab: &mut Lab, vf: &str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let manager = runtime.block_on(manager())?;
    let settle = || command::run(["udevadm", "settle"])?.success();
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for _ in 0..SOME {
        sysfs::bind(vf, Some("vfio-pci"))?;
        settle()?;
        floor.push(timed(|| {
            sysfs::write(vf, "reset", "1")?;
            sysfs::write(vf, "driver/unbind", vf)?;
            sysfs::write(vf, "driver_override", "\n")
        })?);
        runtime.block_on(manager.attach(&[vf], "bench", Options::new()))?;
        settle()?;
        ours.push(timed(|| {
            let ended = runtime.block_on(manager.release(vf, Options::new()))?;
            ensure!(ended.len() == 1, "released {ended:?}");
            Ok(())
        })?);
        settle()?;
    }
    let mut row = BenchRow::of("release-sanitise", "ms", &ours);
    row.floor_ratio = Some(row.median / median(&floor));
    lab.bench(row)
}

/// Zeroing video memory and reading samples of it back, or all of it, beside `memset` on the same
/// mapping, and `memset` and a look at each byte; then the whole step, with opening and closing by VFIO,
/// which resets.
fn bar_zero(lab: &mut Lab) -> Result<()> {
    let functions = [GPU.address, GPU_AUDIO.address];
    let drivers = functions.map(sysfs::driver);
    for function in functions {
        sysfs::write(function, "driver/unbind", function)?;
        sysfs::bind(function, Some("vfio-pci"))?;
        sysfs::write(function, "power/control", "on")?;
    }
    let host = HostRoot::new("/");
    let with = Scrubber::BarZero { bar: 0, read_back: ReadBack::Sampled };
    let step = Step::Scrub { device: GPU.address.parse()?, with };
    let (mut sampled, mut full, mut whole) = (Vec::new(), Vec::new(), Vec::new());
    let (mut set, mut both) = (Vec::new(), Vec::new());
    command::run(["setpci", "-s", GPU.address, "COMMAND=2:2"])?.success()?;
    for _ in 0..SOME {
        set.push(timed(|| with_memory(|memory| memory.fill(0)))?);
        both.push(timed(|| {
            with_memory(|memory| memory.fill(0))?;
            let mut found = None;
            with_memory(|memory| found = memory.iter().position(|byte| *byte != 0))?;
            ensure!(found.is_none(), "something is left at {found:?}");
            Ok(())
        })?);
        for (read_back, runs) in [(ReadBack::Sampled, &mut sampled), (ReadBack::Full, &mut full)] {
            runs.push(timed(|| cleared(read_back))?);
        }
    }
    for _ in 0..SOME {
        whole.push(timed(|| step.execute(&host).map(drop).map_err(Into::into))?);
    }
    for (function, driver) in functions.into_iter().zip(drivers) {
        sysfs::write(function, "power/control", "auto")?;
        sysfs::write(function, "driver/unbind", function)?;
        sysfs::write(function, "driver_override", "\n")?;
        let driver = driver.context("it had no driver")?;
        command::run([
            "sh",
            "-c",
            &format!("echo {function} > /sys/bus/pci/drivers/{driver}/bind"),
        ])?
        .success()?;
    }
    for (name, runs) in [("bar-zero", &sampled), ("bar-zero-full", &full)] {
        let mut row = BenchRow::of(name, "ms", runs);
        row.floor_ratio = Some(row.median / median(&set));
        row.peer_ratios = peers(&row, [("memset-and-look", &both)]);
        lab.bench(row)?;
    }
    lab.bench(BenchRow::of("scrub-step", "ms", &whole))
}

/// Video memory as the scrubber clears it.
fn cleared(read_back: ReadBack) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(60);
    let mut done = None;
    with_memory(|bytes| {
        let first = NonNull::from(&mut *bytes).cast();
        // SAFETY: the mapping is of whole pages of plain memory, and stays for this call.
        done = Some(unsafe { Memory::at(first, bytes.len()) }.clear(read_back, until));
    })?;
    ensure!(done == Some(Ok(())), "it is not clear: {done:?}");
    Ok(())
}

/// Video memory as sysfs has it.
fn with_memory(work: impl FnOnce(&mut [u8])) -> Result<()> {
    let path = sysfs::path(GPU.address, "resource0");
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let size = usize::try_from(file.metadata()?.len())?;
    let length = NonZeroUsize::new(size).context("there is no memory")?;
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping of a file of this length, aliasing nothing of ours.
    let mapping = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, &file, 0) }?;
    // SAFETY: the mapping is `size` bytes long and ours alone; the region is plain memory.
    work(unsafe { std::slice::from_raw_parts_mut(mapping.as_ptr().cast(), size) });
    // SAFETY: the mapping made above, which nothing refers to any more.
    Ok(unsafe { munmap(mapping, size) }?)
}
