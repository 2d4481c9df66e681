//! A virtual machine inside the lab, under its KVM, with devices of the lab passed to it.
//!
//! Owns the QEMU process: a guest that is dropped is killed.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{PAYLOAD, command, wait_until};
use crate::protocol::{FromGuest, GuestFunction, ToGuest};

/// Nested under emulation a guest boots in 6 to 8 s; on a busy machine it may take much longer.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const INITRD: &str = "/run/lab-guest.cpio";
/// Where guests have their sockets and consoles, whoever runs them.
const DIRECTORY: &str = "/run/lab-guests";

/// A running guest.
#[derive(Debug)]
pub struct Guest {
    qemu: Child,
    link: BufReader<UnixStream>,
    functions: Vec<GuestFunction>,
    log: String,
}

impl Guest {
    /// Starts a guest with these functions of the lab and waits until it has booted.
    ///
    /// Their ROMs are left out: the guest's firmware would run them, and write into their memory.
    pub fn start<'a>(addresses: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let device = |address| ["-device".to_owned(), format!("vfio-pci,host={address},rombar=0")];
        Self::with(addresses.into_iter().flat_map(device))
    }

    /// The same through IOMMUFD and the functions' own nodes.
    pub fn through_iommufd<'a>(addresses: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let device =
            |address| ["-device".to_owned(), format!("vfio-pci,host={address},iommufd=iommufd0")];
        let object = ["-object", "iommufd,id=iommufd0"].map(str::to_owned);
        Self::with(object.into_iter().chain(addresses.into_iter().flat_map(device)))
    }

    /// Starts a guest with a mediated device.
    pub fn mediated(uuid: &str) -> Result<Self> {
        let device = format!("vfio-pci,sysfsdev=/sys/bus/mdev/devices/{uuid}");
        Self::with(["-device".to_owned(), device])
    }

    /// Starts a guest with these arguments of QEMU's beside the usual ones.
    fn with(arguments: impl IntoIterator<Item = String>) -> Result<Self> {
        Self::launch(&[], arguments)
    }

    /// Has a launcher start a guest, which becomes its QEMU, with these arguments beside the usual
    /// ones, and waits until it has booted.
    pub fn launch(launcher: &[&str], arguments: impl IntoIterator<Item = String>) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        prepare()?;
        let base = format!("{DIRECTORY}/{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let (socket, log) = (format!("{base}.sock"), format!("{base}.log"));

        let program = [launcher, &["qemu-system-x86_64"]].concat();
        let mut qemu = Command::new(program[0]);
        qemu.args(&program[1..])
            .args(["-accel", "kvm", "-cpu", "host", "-m", "256", "-nodefaults", "-display", "none"])
            .args(["-machine", "q35", "-no-reboot", "-kernel", &kernel()?, "-initrd", INITRD])
            .args(["-append", "console=ttyS0 loglevel=3 mitigations=off nokaslr panic=-1"])
            .args(["-serial", &format!("file:{log}")])
            .args(["-serial", &format!("unix:{socket},server=on,wait=off")]);
        qemu.args(arguments);
        let stderr = std::fs::File::create(format!("{base}.err"))?;
        let mut qemu = qemu.stderr(stderr).stdin(Stdio::null()).spawn().context("starting QEMU")?;
        let link = connect(&mut qemu, &socket)
            .with_context(|| std::fs::read_to_string(format!("{base}.err")).unwrap_or_default())?;
        let mut guest = Self { qemu, link: BufReader::new(link), functions: Vec::new(), log };
        match guest.receive(BOOT_LIMIT)? {
            FromGuest::Hello { functions } => guest.functions = functions,
            other => bail!("the guest began with {other:?}"),
        }
        Ok(guest)
    }

    /// The process that is its QEMU.
    pub fn pid(&self) -> u32 {
        self.qemu.id()
    }

    /// Kills its QEMU.
    pub fn kill(mut self) -> Result<()> {
        self.qemu.kill()?;
        self.qemu.wait()?;
        Ok(())
    }

    /// The PCI functions the guest sees.
    pub fn functions(&self) -> &[GuestFunction] {
        &self.functions
    }

    /// Whether the guest sees a function of this vendor and device.
    pub fn sees(&self, vendor: u16, device: u16) -> bool {
        self.functions.iter().any(|f| (f.vendor, f.device) == (vendor, device))
    }

    /// Fills the GPU's video memory with a pattern, reads it back, and returns its size in bytes.
    pub fn write_video(&mut self, seed: u64) -> Result<usize> {
        let (size, matching) = self.video(ToGuest::WriteVideo { seed })?;
        ensure!(size == matching, "only {matching} of {size} bytes of video memory held");
        Ok(size)
    }

    /// How many bytes of video memory hold the pattern written with this seed.
    pub fn read_video(&mut self, seed: u64) -> Result<usize> {
        Ok(self.video(ToGuest::ReadVideo { seed })?.1)
    }

    /// How many bytes of video memory are zero, in words of eight.
    pub fn zero_video(&mut self) -> Result<usize> {
        Ok(self.video(ToGuest::ZeroVideo)?.1)
    }

    /// Writes a pattern to the first part of the guest's disk, reads it back, and returns its size in
    /// bytes.
    pub fn write_disk(&mut self, seed: u64) -> Result<usize> {
        let (size, matching, _) = self.disk(ToGuest::WriteDisk { seed })?;
        ensure!(size == matching, "only {matching} of {size} bytes of the disk held");
        Ok(size)
    }

    /// How many bytes there hold the pattern written with this seed, and how many are zero.
    pub fn read_disk(&mut self, seed: u64) -> Result<(usize, usize)> {
        let (_, matching, zeros) = self.disk(ToGuest::ReadDisk { seed })?;
        Ok((matching, zeros))
    }

    fn disk(&mut self, command: ToGuest) -> Result<(usize, usize, usize)> {
        self.send(command)?;
        match self.receive(ANSWER_LIMIT)? {
            FromGuest::Disk { size, matching, zeros } => Ok((size, matching, zeros)),
            other => bail!("{command:?} was answered by {other:?}"),
        }
    }

    /// Has the guest load its network driver; the addresses of its interfaces.
    pub fn network(&mut self) -> Result<Vec<String>> {
        self.send(ToGuest::Network)?;
        match self.receive(ANSWER_LIMIT)? {
            FromGuest::Interfaces { addresses } => Ok(addresses),
            other => bail!("it has no network: {other:?}"),
        }
    }

    /// Asks the guest to power off and waits until its QEMU has ended.
    pub fn power_off(mut self) -> Result<()> {
        self.send(ToGuest::PowerOff)?;
        let qemu = &mut self.qemu;
        wait_until("the guest powers off", ANSWER_LIMIT, || Ok(qemu.try_wait()?.is_some()))?;
        let status = self.qemu.wait()?;
        ensure!(status.success(), "the guest's QEMU ended with {status}");
        Ok(())
    }

    fn video(&mut self, command: ToGuest) -> Result<(usize, usize)> {
        self.send(command)?;
        match self.receive(ANSWER_LIMIT)? {
            FromGuest::Video { size, matching } => Ok((size, matching)),
            other => bail!("{command:?} was answered by {other:?}"),
        }
    }

    fn send(&mut self, command: ToGuest) -> Result<()> {
        let mut line = serde_json::to_vec(&command)?;
        line.push(b'\n');
        self.link.get_mut().write_all(&line).context("writing to the guest")
    }

    fn receive(&mut self, limit: Duration) -> Result<FromGuest> {
        self.link.get_ref().set_read_timeout(Some(limit))?;
        let mut line = String::new();
        let start = Instant::now();
        let outcome = self.link.read_line(&mut line);
        if !matches!(outcome, Ok(length) if length > 0) {
            let console = std::fs::read_to_string(&self.log).unwrap_or_default();
            bail!("no answer from the guest after {:?}; its console:\n{console}", start.elapsed());
        }
        serde_json::from_str(&line).with_context(|| format!("the guest said {line:?}"))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Already ended is as good as killed.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// The kernel that runs here: a guest has modules of it. The distribution's was decompressed on the host
/// of the lab; the lab's own lies with its modules.
fn kernel() -> Result<String> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let release = release.trim_end();
    let places = [
        format!("{PAYLOAD}/vmlinux"),
        format!("/usr/lib/modules/{release}/vmlinuz"),
        format!("/boot/vmlinuz-{release}"),
    ];
    places.into_iter().find(|file| Path::new(file).exists()).context("no kernel for a guest")
}

/// KVM, and the initial file system: the guest's init and the drivers of the lab's virtual network
/// functions and of its disks.
fn prepare() -> Result<()> {
    command::run(["modprobe", "kvm_amd"])?.success()?;
    command::run(["install", "--directory", "--mode=1777", DIRECTORY])?.success()?;
    if !Path::new(INITRD).exists() {
        let pack = format!(
            "mkdir -p /run/lab-guest/disk && cp {PAYLOAD}/guest-init /run/lab-guest/init && \
             cp \"$(modinfo --field filename igbvf)\" /run/lab-guest/igbvf.ko && \
             n=10 && modprobe --show-depends nvme | while read -r verb path rest; do \
             test \"$verb\" != insmod || cp \"$path\" /run/lab-guest/disk/$n.ko; \
             n=$((n + 1)); done && cd /run/lab-guest && find . | cpio --quiet -o -H newc > {INITRD}"
        );
        command::run(["sh", "-c", &pack])?.success()?;
    }
    Ok(())
}

fn connect(qemu: &mut Child, socket: &str) -> Result<UnixStream> {
    let start = Instant::now();
    loop {
        if let Ok(stream) = UnixStream::connect(socket) {
            return Ok(stream);
        }
        if let Some(status) = qemu.try_wait()? {
            bail!("the guest's QEMU ended with {status}");
        }
        if start.elapsed() > ANSWER_LIMIT {
            let _ = qemu.kill();
            bail!("the guest's QEMU never opened {socket}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
