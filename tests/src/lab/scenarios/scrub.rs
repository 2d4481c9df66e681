//! What clears devices by the policy: disks by nvme-cli, others by a program; and that resets happen.

use std::fs::{self, OpenOptions};
use std::num::NonZeroUsize;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::lab::product::{lease as lease_record, refused, vfioctl, vfioctl_json};
use crate::lab::{Guest, Lab, command, sysfs};
use crate::machine::{GPU, GPU_AUDIO, NIC, NVME};

/// The secrets of two tenants.
const SECRETS: [u64; 2] = [0xd15c_5ec7, 0xd15c_5ec8];
/// Where a policy is.
const POLICY: &str = "/etc/vfiod/vfiod.toml";

/// Puts a pool of one device in force.
fn pool(address: &str, more: &str) -> Result<()> {
    fs::create_dir_all("/etc/vfiod")?;
    let select = format!("select = [{{ address = \"{address}\" }}]");
    fs::write(POLICY, format!("[pool.lab]\nmode = \"on-lease\"\n{select}\n{more}\n"))?;
    vfioctl(["policy", "check"])?.success()?;
    vfioctl(["policy", "reload"])?.success().map(drop)
}

fn no_pool() -> Result<()> {
    fs::remove_file(POLICY)?;
    vfioctl(["policy", "reload"])?.success().map(drop)
}

/// A disk goes from tenant to tenant: with everything on it, until the policy has it erased.
pub(super) fn disk(lab: &mut Lab) -> Result<()> {
    pool(NVME.address, "scrub = \"none\"")?;
    let (size, alice) = disk_lease("alice", |guest| guest.write_disk(SECRETS[0]))?;
    refused(&vfioctl(["certify", &alice])?, 1, &["memory left, by the policy", "NOT clean"])?;
    lab.step(format!("alice left a secret in {size} bytes of her disk, which was not scrubbed"))?;

    abilities(lab)?;
    pool(NVME.address, "scrub = \"nvme\"")?;
    let ((found, _), bob) = disk_lease("bob", |guest| {
        let found = guest.read_disk(SECRETS[0])?;
        guest.write_disk(SECRETS[1])?;
        Ok(found)
    })?;
    ensure!(found == size, "bob found {found} bytes of {size}: there was no leak to cure");
    lab.step(format!("bob read all {found} bytes of it, and left a secret of his own"))?;
    let certified = vfioctl(["certify", &bob])?.success()?;
    ensure!(certified.contains("namespaces erased") && certified.contains("clean"), "{certified}");

    let ((found, zeros), _) = disk_lease("carol", |guest| guest.read_disk(SECRETS[1]))?;
    ensure!((found, zeros) == (0, size), "carol found {found} bytes, and {zeros} zeros of {size}");
    lab.step(format!("his disk was erased: carol read zeros in all {zeros} bytes"))?;
    without_program(lab)?;
    no_pool()
}

/// What the controller can decides how it is erased, and so which ways are shown here.
fn abilities(lab: &mut Lab) -> Result<()> {
    let mut controllers = fs::read_dir(sysfs::path(NVME.address, "nvme"))?;
    let name = controllers.next().context("no controller")??.file_name();
    let node = format!("/dev/{}", name.display());
    let told = command::run(["nvme", "id-ctrl", &node, "--output-format=json"])?.success()?;
    let told: serde_json::Value = serde_json::from_str(&told)?;
    let bits = |field: &str| told[field].as_u64().with_context(|| format!("no {field} in {told}"));
    let (formats, keys) = (bits("oacs")? & 2 != 0, bits("fna")? & 4 != 0);
    ensure!((formats, keys, bits("sanicap")?) == (true, false, 0), "it can something else: {told}");
    lab.step("the controller formats, and neither throws keys away nor sanitizes")
}

/// A disk that cannot be erased is nobody's until it could.
fn without_program(lab: &mut Lab) -> Result<()> {
    let nvme = command::run(["sh", "-c", "command -v nvme"])?.success()?;
    let nvme = nvme.trim();
    vfioctl(["attach", NVME.address, "--tenant", "dave"])?.success()?;
    command::run(["mount", "--bind", "/bin/false", nvme])?.success()?;
    // What the daemon sees is its own.
    let daemon = command::run(["systemctl", "show", "--value", "--property=MainPID", "vfiod"])?;
    let daemon = daemon.success()?;
    let inside = |arguments: &[&str]| {
        let enter = ["nsenter", "--mount", "--target", daemon.trim()];
        command::run(enter.into_iter().chain(arguments.iter().copied()))?.success()
    };
    inside(&["mount", "--bind", "/bin/false", nvme])?;
    let released = vfioctl(["release", NVME.address, "--wait"])?;
    refused(&released, 10, &["nvme failed (status 1)", "vfioctl heal"])?;
    let attached = vfioctl(["attach", NVME.address, "--tenant", "eve"])?;
    refused(&attached, 11, &["quarantine"])?;
    inside(&["umount", nvme])?;
    command::run(["umount", nvme])?.success()?;
    vfioctl(["heal", NVME.address])?.success()?;
    ensure!(sysfs::driver(NVME.address).as_deref() == Some("nvme"));
    ensure!(vfioctl_json(["quarantine"])?.as_array().is_some_and(Vec::is_empty));
    lab.step("without a working nvme-cli it was in quarantine, and healed when there was one")
}

fn disk_lease<T>(tenant: &str, work: impl FnOnce(&mut Guest) -> Result<T>) -> Result<(T, String)> {
    vfioctl(["attach", NVME.address, "--tenant", tenant])?.success()?;
    let mut guest = Guest::start([NVME.address])?;
    let done = work(&mut guest)?;
    guest.power_off()?;
    let ended = vfioctl_json(["release", NVME.address, "--wait"])?;
    ensure!(sysfs::driver(NVME.address).as_deref() == Some("nvme"));
    Ok((done, ended[0].as_str().with_context(|| format!("released {ended}"))?.to_owned()))
}

/// A program that scrubs, and what it may do.
const PROGRAM: &str = "/usr/local/sbin/lab-scrub";

/// The administrator's program runs in a sandbox, for its time and no longer.
pub(super) fn program(lab: &mut Lab) -> Result<()> {
    let told = Path::new("/sys/kernel/mm/ksm/sleep_millisecs");
    let before = fs::read_to_string(told)?;
    // What it may write to at all is sysfs, so that is where it leaves a trace.
    let script = format!(
        "#!/bin/sh -e\ntest \"$VFIOD_DEVICE $VFIOD_DRIVER\" = \"{} vfio-pci\"\n\
         test -c /dev/vfio/$VFIOD_GROUP\n! touch /etc/spoilt /run/spoilt 2>/dev/null\n\
         ! ls /root/* 2>/dev/null\ntest \"$(ls /sys/class/net)\" = lo\n\
         echo 4711 > {}\n",
        NIC.address,
        told.display()
    );
    fs::write(PROGRAM, script)?;
    fs::set_permissions(PROGRAM, fs::Permissions::from_mode(0o755))?;
    pool(NIC.address, &format!("scrub = {{ command = [\"{PROGRAM}\"], timeout = 30 }}"))?;
    let attached = vfioctl_json(["attach", NIC.address, "--tenant", "alice"])?;
    let id = attached["id"].as_str().or(attached[0].as_str());
    let id = id.with_context(|| format!("attached {attached}"))?.to_owned();
    let record = lease_record(&id)?.context("no such lease")?;
    ensure!(record["cleaning"][0]["scrub"] == "command", "{record}");
    vfioctl(["release", NIC.address, "--wait"])?.success()?;
    ensure!(fs::read_to_string(told)?.trim() == "4711", "the program did not run");
    fs::write(told, before)?;
    let certified = vfioctl(["certify", &id])?.success()?;
    ensure!(certified.contains("cleared by the administrator's program"), "{certified}");
    lab.step(
        "a program was told the device, had neither files nor network, and the card is clean",
    )?;

    fs::write(PROGRAM, "#!/bin/sh\ntrap '' TERM\nsleep 600 &\nsleep 600\n")?;
    pool(NIC.address, &format!("scrub = {{ command = [\"{PROGRAM}\"], timeout = 2 }}"))?;
    vfioctl(["attach", NIC.address, "--tenant", "bob"])?.success()?;
    let released = vfioctl(["release", NIC.address, "--wait"])?;
    refused(&released, 10, &[PROGRAM, "did not end within 2 s"])?;
    ensure!(!runs("sleep\x00600\0")?, "it has left something running");
    refused(&vfioctl(["attach", NIC.address, "--tenant", "eve"])?, 11, &["did not end within"])?;
    fs::write(PROGRAM, "#!/bin/sh\nexit 0\n")?;
    vfioctl(["heal", NIC.address])?.success()?;
    ensure!(sysfs::driver(NIC.address).as_deref() == Some("igb"));
    lab.step(
        "one that hung was killed with all it had started, and the card kept until it was healed",
    )?;
    fs::remove_file(PROGRAM)?;
    no_pool()
}

/// Whether a process runs with this command line.
fn runs(command: &str) -> Result<bool> {
    let processes = fs::read_dir("/proc")?.flatten();
    let lines = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    Ok(lines.into_iter().any(|line| line == command.as_bytes()))
}

/// `ICH6_REG_CORBLBASE` of the audio function: an address, kept until it is reset.
const AUDIO_REGISTER: usize = 0x40;
/// `RXDCTL` of an 82576's virtual function, and its bit for a queue that is on.
const QUEUE: usize = 0x2828;
const QUEUE_ON: u32 = 1 << 25;

/// A reset is seen in what a device has forgotten, and without one it has not.
pub(super) fn resets(lab: &mut Lab) -> Result<()> {
    command::run(["modprobe", "vfio-pci"])?.success()?;
    // At home no driver writes there.
    let driver = sysfs::driver(GPU_AUDIO.address).context("no driver has the audio function")?;
    sysfs::write(GPU_AUDIO.address, "driver/unbind", GPU_AUDIO.address)?;
    let mark = 0x1234_5680;
    let audio =
        |options: &[&str]| forgotten(GPU.address, GPU_AUDIO.address, AUDIO_REGISTER, mark, options);
    ensure!(audio(&["--no-reset"])? == mark, "it forgets by itself");
    ensure!(audio(&[])? & !1 == 0, "the audio function was not reset with its bus");
    sysfs::bind(GPU_AUDIO.address, Some(&driver))?;
    sysfs::write(GPU_AUDIO.address, "driver_override", "\n")?;
    lab.step("the group of two has forgotten what its audio function was told: reset by its bus")?;

    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "0")?;
    sysfs::write(NIC.address, "sriov_numvfs", "1")?;
    let vf = sysfs::virtual_function(NIC.address, 0)?;
    let queue =
        |options: &[&str]| anyhow::Ok(forgotten(&vf, &vf, QUEUE, QUEUE_ON, options)? & QUEUE_ON);
    ensure!(queue(&["--no-reset"])? == QUEUE_ON, "it forgets by itself");
    ensure!(queue(&[])? == 0, "the virtual function was not reset");
    sysfs::write(NIC.address, "sriov_numvfs", "0")?;
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "1")?;
    lab.step("a virtual function has forgotten that its queue was on: reset by itself (FLR)")
}

/// Leases a device, writes to a register of a function of it, releases it, and reads that. Nothing is
/// cleared, for VFIO resets what it opens for that by itself.
fn forgotten(
    device: &str,
    function: &str,
    register: usize,
    value: u32,
    options: &[&str],
) -> Result<u32> {
    vfioctl(["attach", device, "--tenant", "alice", "--no-scrub"])?.success()?;
    // Nobody has it open, so VFIO lets it sleep.
    sysfs::write(function, "power/control", "on")?;
    let written = at(function, register, |place| {
        // SAFETY: a register of the device's, aligned, which nothing else uses now.
        unsafe { place.write_volatile(value) };
        // SAFETY: likewise.
        unsafe { place.read_volatile() }
    })?;
    ensure!(written & value == value, "{function} has {written:#x} where {value:#x} was written");
    let release = ["release", device, "--wait"].into_iter().chain(options.iter().copied());
    vfioctl(release)?.success()?;
    // SAFETY: as above.
    let found = at(function, register, |place| unsafe { place.read_volatile() })?;
    sysfs::write(function, "power/control", "auto")?;
    Ok(found)
}

/// Does something at a register in a function's first region.
fn at(function: &str, register: usize, work: impl FnOnce(*mut u32) -> u32) -> Result<u32> {
    command::run(["setpci", "-s", function, "COMMAND=2:2"])?.success()?;
    let path = sysfs::path(function, "resource0");
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let length = NonZeroUsize::new(0x4000).context("nothing to map")?;
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping of the region's first pages, aliasing nothing of ours.
    let mapping = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, &file, 0) }?;
    // SAFETY: the register is within the mapping.
    let found = work(unsafe { mapping.as_ptr().byte_add(register) }.cast());
    // SAFETY: the mapping made above, which nothing refers to any more.
    unsafe { munmap(mapping, length.get()) }?;
    Ok(found)
}
