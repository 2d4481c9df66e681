//! The init, and only process, of a guest in the lab: reports what PCI functions it sees and
//! writes and reads video memory or a disk when told to. Linked statically; must not need any file.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

use vfiod_tests::machine::GPU;
use vfiod_tests::protocol::{FromGuest, GuestFunction, ToGuest};

/// The second serial port; the first is the console.
const LINK: &str = "/dev/ttyS1";

fn main() {
    if let Err(error) = serve() {
        eprintln!("guest-init: {error:#}");
    }
    // An init that returned would be a panic of the guest's kernel.
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    eprintln!("guest-init: power off: {error}");
}

fn serve() -> Result<()> {
    for (kind, target) in [("devtmpfs", "/dev"), ("sysfs", "/sys")] {
        fs::create_dir_all(target)?;
        mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting {target}"))?;
    }
    let mut link = OpenOptions::new().read(true).write(true).open(LINK).context(LINK)?;
    let mut mode = tcgetattr(&link)?;
    cfmakeraw(&mut mode);
    tcsetattr(&link, SetArg::TCSANOW, &mode)?;

    let (functions, video) = functions()?;
    send(&mut link, &FromGuest::Hello { functions })?;
    for line in BufReader::new(link.try_clone()?).lines() {
        let answer = match serde_json::from_str(&line?)? {
            ToGuest::PowerOff => break,
            ToGuest::WriteVideo { seed } => with_video(video.as_deref(), |memory| {
                write_pattern(memory, seed);
                matching_bytes(memory, seed)
            }),
            ToGuest::ZeroVideo => with_video(video.as_deref(), |memory| {
                memory.iter().filter(|word| **word == 0).count() * 8
            }),
            ToGuest::WriteDisk { seed } => write_disk(seed).and_then(|()| read_disk(seed)),
            ToGuest::ReadDisk { seed } => read_disk(seed),
            ToGuest::Network => interfaces(),
            ToGuest::ReadVideo { seed } => {
                with_video(video.as_deref(), |memory| matching_bytes(memory, seed))
            }
        };
        let failed = |error| FromGuest::Failed { detail: format!("{error:#}") };
        send(&mut link, &answer.unwrap_or_else(failed))?;
    }
    Ok(())
}

fn send(link: &mut File, message: &FromGuest) -> Result<()> {
    let mut text = serde_json::to_vec(message)?;
    text.push(b'\n');
    Ok(link.write_all(&text)?)
}

/// The driver of the lab's virtual network functions, if the guest was given it.
const NETWORK_DRIVER: &str = "/igbvf.ko";
/// How long a driver may take to find what it is for.
const DRIVER_LIMIT: Duration = Duration::from_secs(30);

/// Loads the network driver; the addresses of all interfaces once there is one.
fn interfaces() -> Result<FromGuest> {
    let module = File::open(NETWORK_DRIVER).context(NETWORK_DRIVER)?;
    finit_module(&module, c"", ModuleInitFlags::empty()).context("loading the driver")?;
    let start = Instant::now();
    loop {
        let addresses: Vec<String> = fs::read_dir("/sys/class/net")?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|interface| !interface.ends_with("lo"))
            .filter_map(|interface| fs::read_to_string(interface.join("address")).ok())
            .map(|address| address.trim().to_owned())
            .collect();
        if !addresses.is_empty() {
            return Ok(FromGuest::Interfaces { addresses });
        }
        ensure!(start.elapsed() < DRIVER_LIMIT, "the driver found no interface");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The modules of the disk driver, by their order.
const DISK_DRIVER: &str = "/disk";
/// The disk.
const DISK: &str = "/dev/nvme0n1";
/// How much of it is written and read.
const PART: usize = 4 << 20;

/// The disk, its driver loaded.
fn disk() -> Result<File> {
    if !Path::new(DISK).exists() {
        let mut modules: Vec<PathBuf> = fs::read_dir(DISK_DRIVER)
            .context(DISK_DRIVER)?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?;
        modules.sort_unstable();
        for path in modules {
            let module = File::open(&path)?;
            let loaded = finit_module(&module, c"", ModuleInitFlags::empty());
            loaded.with_context(|| format!("loading {}", path.display()))?;
        }
    }
    let start = Instant::now();
    while !Path::new(DISK).exists() {
        ensure!(start.elapsed() < DRIVER_LIMIT, "the driver found no disk");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(OpenOptions::new().read(true).write(true).open(DISK)?)
}

fn write_disk(seed: u64) -> Result<()> {
    let mut disk = disk()?;
    let words = (0..PART / 8).flat_map(|index| word(seed, index).to_le_bytes());
    disk.write_all(&words.collect::<Vec<u8>>())?;
    Ok(disk.sync_all()?)
}

fn read_disk(seed: u64) -> Result<FromGuest> {
    let mut bytes = vec![0; PART];
    disk()?.read_exact(&mut bytes)?;
    let words = || bytes.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
    let matching = words().enumerate().filter(|(index, value)| *value == word(seed, *index));
    let zeros = words().filter(|value| *value == 0);
    Ok(FromGuest::Disk { size: PART, matching: matching.count() * 8, zeros: zeros.count() * 8 })
}

/// All PCI functions, and the directory of the one with video memory.
fn functions() -> Result<(Vec<GuestFunction>, Option<PathBuf>)> {
    let (mut functions, mut video) = (Vec::new(), None);
    for entry in fs::read_dir("/sys/bus/pci/devices")? {
        let entry = entry?;
        let directory = entry.path();
        let number = |file: &str| -> Result<u32> {
            let text = fs::read_to_string(directory.join(file))?;
            Ok(u32::from_str_radix(text.trim().trim_start_matches("0x"), 16)?)
        };
        let function = GuestFunction {
            address: entry.file_name().to_string_lossy().into_owned(),
            vendor: u16::try_from(number("vendor")?)?,
            device: u16::try_from(number("device")?)?,
            class: number("class")?,
            bars: bars(&fs::read_to_string(directory.join("resource"))?),
        };
        if (function.vendor, function.device) == (GPU.vendor, GPU.device) {
            video = Some(directory);
        }
        functions.push(function);
    }
    functions.sort_by(|a, b| a.address.cmp(&b.address));
    Ok((functions, video))
}

/// Sizes of the six BARs from the lines `start end flags` of sysfs's `resource`.
fn bars(resource: &str) -> Vec<u64> {
    let size = |line: &str| {
        let mut fields = line
            .split_whitespace()
            .map(|field| u64::from_str_radix(field.trim_start_matches("0x"), 16).unwrap_or(0));
        match (fields.next(), fields.next()) {
            (Some(start), Some(end)) if end > start => end - start + 1,
            _ => 0,
        }
    };
    resource.lines().take(6).map(size).collect()
}

/// Maps BAR 0 and answers with what `work` counts in it.
fn with_video(device: Option<&Path>, work: impl FnOnce(&mut [u64]) -> usize) -> Result<FromGuest> {
    let device = device.context("no video memory in this guest")?;
    // Memory decoding is off in a device without a driver.
    fs::write(device.join("enable"), "1").context("enabling the device")?;
    let file = OpenOptions::new().read(true).write(true).open(device.join("resource0"))?;
    let size = usize::try_from(file.metadata()?.len())?;
    let length = NonZeroUsize::new(size).context("BAR 0 is empty")?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping of a file of this length, aliasing nothing of ours.
    let mapping = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &file, 0) }?;
    // SAFETY: the mapping is page aligned, `size` bytes long, and used by this thread alone;
    // the BAR is plain memory, without side effects of reading or writing it.
    let memory = unsafe { std::slice::from_raw_parts_mut(mapping.as_ptr().cast(), size / 8) };
    let matching = work(memory);
    // SAFETY: the mapping made above; `memory` is not used any more.
    unsafe { munmap(mapping, size) }?;
    Ok(FromGuest::Video { size, matching })
}

/// A different word at each place, so that neither a constant nor a shift passes for it.
fn word(seed: u64, index: usize) -> u64 {
    (seed ^ index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn write_pattern(memory: &mut [u64], seed: u64) {
    for (index, place) in memory.iter_mut().enumerate() {
        *place = word(seed, index);
    }
    // What is read back must come from the device.
    std::hint::black_box(memory);
}

fn matching_bytes(memory: &[u64], seed: u64) -> usize {
    let same = |(index, value): &(usize, &u64)| **value == word(seed, *index);
    memory.iter().enumerate().filter(same).count() * 8
}
