//! Starts the lab's QEMU out of the lab's own root file system.
//!
//! All mounts and files of a run live in a mount namespace of this process: when it ends, however
//! it ends, they are gone. QEMU is told to die with us.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use vfiod_tests::machine::{self, Files, Purpose};

use super::image::{Image, make_disk};
use super::kernel::OwnKernel;
use super::qmp::Qmp;
use crate::exec;

/// Where the run's files are for QEMU, below the lab's root file system.
const FILES: Files = Files {
    root: "/run/root.img",
    payload: "/run/payload.img",
    disk: "/run/disk.img",
    qmp: "/run/qmp.sock",
    agent: "/run/agent.sock",
};

/// A kernel and its initial file system, as QEMU sees them.
const OWN_KERNEL: [&str; 2] = ["/run/vmlinuz", "/run/initrd"];
const DISTRIBUTION_KERNEL: [&str; 2] = ["/vmlinuz", "/boot/lab-initrd"];

const COMMAND_LINE: &str = "console=ttyS0 root=/dev/vda intel_iommu=on mitigations=off audit=0 \
    nokaslr quiet loglevel=4 systemd.show_status=0 net.ifnames=0";

const START_LIMIT: Duration = Duration::from_secs(30);

/// What a run puts into the lab.
#[derive(Debug)]
pub(super) struct Payload {
    pub(super) package: PathBuf,
    pub(super) agent: PathBuf,
    pub(super) guest_init: PathBuf,
    pub(super) launcher: PathBuf,
}

/// Where the lab's console goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Console {
    /// To a file.
    Log,
    /// To our terminal, with a shell on it.
    Terminal,
}

/// A running lab.
#[derive(Debug)]
pub(super) struct Vm {
    qemu: Child,
    log: PathBuf,
    pub(super) qmp: Qmp,
    pub(super) agent: UnixStream,
}

impl Vm {
    pub(super) fn start(
        image: &Image,
        own_kernel: Option<&OwnKernel>,
        payload: &Payload,
        console: Console,
        purpose: Purpose,
    ) -> Result<Self> {
        let tree = image.tree();
        enter_namespace(image, own_kernel)?;
        let kernel = if own_kernel.is_some() { OWN_KERNEL } else { DISTRIBUTION_KERNEL };
        let guests = own_kernel.is_none().then(|| inside(&tree, DISTRIBUTION_KERNEL[0]));
        make_payload(&inside(&tree, FILES.payload), payload, guests.as_deref())?;

        let log = exec::target()?.join("lab-console.log");
        let mut qemu = qemu(&tree, kernel, console, purpose, &log)?;
        let agent = connect(&mut qemu, &inside(&tree, FILES.agent), &log)?;
        let qmp = Qmp::new(connect(&mut qemu, &inside(&tree, FILES.qmp), &log)?)?;
        Ok(Self { qemu, log, qmp, agent })
    }

    /// The last lines of the console, and of what QEMU had to say.
    pub(super) fn console_tail(&self) -> String {
        let text = String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// Waits until the lab has powered off.
    pub(super) fn wait(mut self) -> Result<()> {
        self.qemu.wait()?;
        Ok(())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Ended already is as good as killed.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn inside(tree: &Path, path: &str) -> PathBuf {
    tree.join(path.trim_start_matches('/'))
}

/// A private view of the file systems with the run's files in the lab's root file system.
fn enter_namespace(image: &Image, own_kernel: Option<&OwnKernel>) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("making a mount namespace")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let tree = image.tree();
    for (source, kind, target) in [("run", "tmpfs", "run"), ("proc", "proc", "proc")] {
        mount(Some(source), &tree.join(target), Some(kind), MsFlags::empty(), none)
            .with_context(|| format!("mounting the lab's /{target}"))?;
    }
    let bind = |source: &Path, target: &Path| {
        mount(Some(source), target, none, MsFlags::MS_BIND, none)
            .with_context(|| format!("binding {}", source.display()))
    };
    bind(Path::new("/dev"), &tree.join("dev"))?;
    let mut files = vec![(image.root(), FILES.root), (image.disk(), FILES.disk)];
    if let Some(kernel) = own_kernel {
        files.extend([kernel.image(), kernel.initrd()].into_iter().zip(OWN_KERNEL));
    }
    for (file, target) in files {
        let target = inside(&tree, target);
        File::create(&target)?;
        bind(&file, &target)?;
    }
    Ok(())
}

/// The disk with what is put into the lab, the kernel of its guests among it, if it is not the lab's own.
fn make_payload(disk: &Path, payload: &Payload, kernel: Option<&Path>) -> Result<()> {
    let staging = disk.with_extension("d");
    fs::create_dir(&staging)?;
    for (file, name) in [
        (&payload.package, "vfiod.deb"),
        (&payload.agent, "lab-agent"),
        (&payload.guest_init, "guest-init"),
        (&payload.launcher, "launcher"),
    ] {
        fs::copy(file, staging.join(name)).with_context(|| file.display().to_string())?;
    }
    if let Some(kernel) = kernel {
        unpack(kernel, &staging.join("vmlinux"))?;
    }
    make_disk(disk, "128M", "payload", Some(&staging))?;
    fs::remove_dir_all(&staging).with_context(|| staging.display().to_string())
}

/// Decompresses a kernel, which takes each guest half of its boot on an emulated processor.
fn unpack(kernel: &Path, to: &Path) -> Result<()> {
    let image = fs::read(kernel).with_context(|| kernel.display().to_string())?;
    let packed = to.with_extension("zst");
    fs::write(&packed, compressed(&image).context("the lab's kernel is no bzImage")?)?;
    exec::quiet(
        Command::new("zstd").args(["--quiet", "--decompress", "--rm", "-o"]).arg(to).arg(&packed),
    )
}

/// The compressed kernel in a bzImage: `setup_sects`, `payload_offset` and `payload_length`
/// (`Documentation/arch/x86/boot.rst`), without its size, which the kernel's build puts behind it.
fn compressed(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let start = (usize::from(*image.get(0x1f1)?) + 1) * 512 + word(0x248)?;
    image.get(start..)?.get(..word(0x24c)?.checked_sub(4)?)
}

fn qemu(
    tree: &Path,
    [kernel, initrd]: [&str; 2],
    console: Console,
    purpose: Purpose,
    log: &Path,
) -> Result<Child> {
    let log = File::create(log).with_context(|| log.display().to_string())?;
    let command_line = format!("{COMMAND_LINE}{}", purpose.kernel_arguments());
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "chroot"])
        .arg(tree)
        .arg("qemu-system-x86_64")
        .args(machine::arguments(&FILES, purpose))
        .args(["-kernel", kernel, "-initrd", initrd])
        .stderr(log.try_clone()?);
    match console {
        Console::Log => command
            .args(["-serial", "stdio", "-append", &command_line])
            .stdin(Stdio::null())
            .stdout(log),
        Console::Terminal => command
            .args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
            .args(["-append", &format!("{command_line} lab.shell")]),
    };
    command.spawn().context("starting QEMU")
}

fn connect(qemu: &mut Child, socket: &Path, log: &Path) -> Result<UnixStream> {
    let start = Instant::now();
    loop {
        if let Ok(stream) = UnixStream::connect(socket) {
            return Ok(stream);
        }
        if let Some(status) = qemu.try_wait()? {
            let said = fs::read_to_string(log).unwrap_or_default();
            bail!("QEMU ended with {status}\n{said}");
        }
        if start.elapsed() > START_LIMIT {
            bail!("QEMU did not open {}", socket.display());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::compressed;

    #[test]
    fn the_compressed_kernel_is_found_in_its_image() {
        let mut image = vec![0; 1024 + 16];
        image[0x1f1] = 1;
        image[0x248] = 8;
        image[0x24c] = 7;
        image[1032..].copy_from_slice(b"abcSIZE.");
        assert_eq!(compressed(&image), Some(b"abc".as_slice()));
        image[0x24c] = 200;
        assert_eq!(compressed(&image), None, "it is cut short");
        image[0x24c] = 3;
        assert_eq!(compressed(&image), None, "it has no size");
        assert_eq!(compressed(&image[..0x248]), None);
    }
}
