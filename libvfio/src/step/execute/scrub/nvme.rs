//! Erasing all namespaces of an NVM Express controller with nvme-cli, and reading back that they are.
//! What is asked is asked in the form of the specification ("NVM Express Base Specification" and
//! "NVM Command Set Specification", Identify), which no version of the program prints otherwise.

use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;

use super::{not_zero, program};
use crate::address::PciAddress;
use crate::host::HostRoot;
use crate::step::Cause;

/// nvme-cli.
const NVME: &str = "nvme";
/// How long it may take to answer a question.
const SHORT: Duration = Duration::from_secs(30);
/// How long the driver may take to find the namespaces of a controller it was just given.
const FINDING: Duration = Duration::from_secs(60);
/// How often one looks.
const LOOKING: Duration = Duration::from_millis(200);
/// Of larger namespaces not all is read back, in bytes.
const WHOLE: u64 = 1 << 30;
/// Into how many places these are looked at.
const PLACES: u64 = 4096;
/// The most namespaces there are.
const MOST: usize = 1024;

/// Erases them, for `limit` at most.
pub(super) fn erase(host: &HostRoot, device: PciAddress, limit: Duration) -> Result<(), Cause> {
    let until = Instant::now() + limit;
    let controller = found(host, device)?;
    let before = Facts::read(&controller)?;
    await_nodes(host, &controller, &before)?;
    let way = Way::of(before.abilities)?;
    for arguments in way.commands(&before.namespaces) {
        let mut command = controller.command(&arguments);
        program::run(&mut command, until.saturating_duration_since(Instant::now()))?;
    }
    if way.is_sanitize() {
        await_sanitized(&controller, until)?;
    }
    let after = Facts::read(&controller)?;
    if (&after.serial, &after.model) != (&before.serial, &before.model)
        || after.namespaces != before.namespaces
    {
        return Err(Cause::ReadBack { wanted: before.told(), found: after.told() });
    }
    for namespace in &after.namespaces {
        read_back(host, &controller, namespace, until)?;
    }
    Ok(())
}

/// A controller on its driver: `nvme0`.
struct Controller {
    name: String,
    node: PathBuf,
}

impl Controller {
    fn command(&self, arguments: &[String]) -> Command {
        let mut command = Command::new(NVME);
        // The verb, then whom it is for.
        command.args(arguments.first()).arg(&self.node).args(arguments.iter().skip(1));
        command
    }

    fn ask(&self, arguments: &[&str], least: usize) -> Result<Vec<u8>, Cause> {
        let arguments: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
        let said = program::run(&mut self.command(&arguments), SHORT)?;
        if said.len() < least {
            let verb = arguments.first().map(String::as_str).unwrap_or_default();
            return Err(Cause::Program(format!("nvme {verb} answered {} bytes", said.len())));
        }
        Ok(said)
    }

    /// Namespaces by their numbers; `structure` says of which kind (CNS).
    fn list(&self, structure: &str) -> Result<Vec<u32>, Cause> {
        let said = self.ask(
            &[
                "admin-passthru",
                "--opcode=0x06",
                "--namespace-id=0",
                &format!("--cdw10={structure}"),
                "--data-len=4096",
                "--read",
                "--raw-binary",
            ],
            4096,
        )?;
        Ok(numbers(&said))
    }
}

/// The numbers in a list of them, which ends with a zero.
fn numbers(list: &[u8]) -> Vec<u32> {
    let number = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_le_bytes);
    list.chunks_exact(4).take(MOST).map(number).take_while(|number| *number != 0).collect()
}

fn found(host: &HostRoot, device: PciAddress) -> Result<Controller, Cause> {
    let dir = host.function(device).sub("nvme");
    let until = Instant::now() + FINDING;
    loop {
        if let Some(name) = dir.list()?.into_iter().find(|name| name.starts_with("nvme")) {
            let node = host.path(format!("dev/{name}"));
            // Live once its driver has talked to it.
            if dir.sub(&name).attr("state")?.as_deref() == Some("live") && node.exists() {
                return Ok(Controller { name, node });
            }
        }
        if Instant::now() >= until {
            return Err(Cause::Program(format!(
                "the driver has no working controller of {device}"
            )));
        }
        thread::sleep(LOOKING);
    }
}

/// What a controller can, of what matters here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // Each is a bit of its own.
struct Abilities {
    /// The Format NVM command.
    format: bool,
    /// Erasing by throwing keys away.
    crypto: bool,
    /// Namespaces that are there and not attached.
    management: bool,
    /// Sanitizing by erasing blocks.
    sanitize_blocks: bool,
    /// Sanitizing by throwing keys away.
    sanitize_keys: bool,
}

impl Abilities {
    /// From the controller's own structure: OACS, FNA and SANICAP.
    fn parse(identify: &[u8]) -> Self {
        let byte = |at: usize| identify.get(at).copied().unwrap_or(0);
        let (oacs, fna, sanitize) = (byte(256), byte(524), byte(328));
        Self {
            format: oacs & 0x2 != 0,
            crypto: fna & 0x4 != 0,
            management: oacs & 0x8 != 0,
            sanitize_keys: sanitize & 0x1 != 0,
            sanitize_blocks: sanitize & 0x2 != 0,
        }
    }
}

/// How everything is erased.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Each namespace formatted, erasing user data by throwing keys away or otherwise.
    Format { crypto: bool },
    /// The whole subsystem sanitized.
    Sanitize { crypto: bool },
}

impl Way {
    fn of(abilities: Abilities) -> Result<Self, Cause> {
        match abilities {
            Abilities { format: true, crypto, .. } => Ok(Self::Format { crypto }),
            Abilities { sanitize_blocks: true, .. } => Ok(Self::Sanitize { crypto: false }),
            Abilities { sanitize_keys: true, .. } => Ok(Self::Sanitize { crypto: true }),
            _ => Err(Cause::Program(
                "the controller can neither format nor sanitize its namespaces".to_owned(),
            )),
        }
    }

    fn is_sanitize(self) -> bool {
        matches!(self, Self::Sanitize { .. })
    }

    fn commands(self, namespaces: &[Namespace]) -> Vec<Vec<String>> {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        match self {
            Self::Format { crypto } => {
                let ses = if crypto { "--ses=2" } else { "--ses=1" };
                let one = |namespace: &Namespace| {
                    let which = format!("--namespace-id={}", namespace.number);
                    // The block format stays: without it nvme-cli asks the namespace for it.
                    words(&["format", &which, ses, "--force"])
                };
                namespaces.iter().map(one).collect()
            }
            // Block erase and crypto erase (SANACT), and what was erased is not kept allocated.
            Self::Sanitize { crypto: false } => vec![words(&["sanitize", "--sanact=0x02"])],
            Self::Sanitize { crypto: true } => vec![words(&["sanitize", "--sanact=0x04"])],
        }
    }
}

/// One namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Namespace {
    number: u32,
    /// Blocks.
    size: u64,
    /// NGUID and EUI64.
    id: [u8; 24],
    /// Bytes of a block.
    block: u64,
    /// What its erased blocks read as.
    erased: u8,
}

impl Namespace {
    fn parse(number: u32, identify: &[u8]) -> Option<Self> {
        let size = u64::from_le_bytes(identify.get(..8)?.try_into().ok()?);
        let id = identify.get(104..128)?.try_into().ok()?;
        // FLBAS: which of the formats, its high bits apart.
        let flbas = identify.get(26)?;
        let format = usize::from(flbas & 0xf | (flbas & 0x60) >> 1);
        let shift = *identify.get(128 + 4 * format + 2)?;
        // DLFEAT: what deallocated blocks read as, if that is said at all.
        let erased = if identify.get(33)? & 0x7 == 2 { 0xff } else { 0 };
        let block = 1_u64.checked_shl(shift.into())?;
        (512..=1 << 20).contains(&block).then_some(Self { number, size, id, block, erased })
    }

    fn bytes(&self) -> u64 {
        self.size.saturating_mul(self.block)
    }
}

/// A controller and its namespaces.
struct Facts {
    serial: String,
    model: String,
    abilities: Abilities,
    namespaces: Vec<Namespace>,
}

impl Facts {
    fn read(controller: &Controller) -> Result<Self, Cause> {
        let identify = controller.ask(&["id-ctrl", "--raw-binary"], 4096)?;
        let text = |at: std::ops::Range<usize>| {
            let bytes = identify.get(at).unwrap_or_default();
            String::from_utf8_lossy(bytes).trim().to_owned()
        };
        let abilities = Abilities::parse(&identify);
        let active = controller.list("0x02")?;
        if abilities.management {
            // What a tenant has detached would keep what is in it.
            let all = controller.list("0x10")?;
            if let Some(hidden) = all.iter().find(|number| !active.contains(number)) {
                let why = format!("namespace {hidden} is there, and attached to no controller");
                return Err(Cause::Program(format!("{why}: it cannot be erased; attach it")));
            }
        }
        let namespace = |number: u32| {
            let which = format!("--namespace-id={number}");
            let identify = controller.ask(&["id-ns", &which, "--raw-binary"], 4096)?;
            let odd = || Cause::Program(format!("namespace {number} has an odd format"));
            Namespace::parse(number, &identify).ok_or_else(odd)
        };
        let namespaces = active.into_iter().map(namespace).collect::<Result<_, Cause>>()?;
        Ok(Self { serial: text(4..24), model: text(24..64), abilities, namespaces })
    }

    fn told(&self) -> String {
        let numbers: Vec<String> = self
            .namespaces
            .iter()
            .map(|n| format!("{} of {} bytes", n.number, n.bytes()))
            .collect();
        format!("{} {} with namespaces {}", self.model, self.serial, numbers.join(", "))
    }
}

/// Waits until sanitizing is done: the log says how far it is (Sanitize Status).
fn await_sanitized(controller: &Controller, until: Instant) -> Result<(), Cause> {
    loop {
        let log =
            controller.ask(&["get-log", "--log-id=0x81", "--log-len=512", "--raw-binary"], 4)?;
        match log.get(2).copied().unwrap_or(0) & 0x7 {
            1 | 4 => return Ok(()),
            2 if Instant::now() < until => thread::sleep(LOOKING),
            2 => return Err(Cause::Program("sanitizing did not end in time".to_owned())),
            _ => {
                return Err(Cause::Program(
                    "the controller says that sanitizing failed".to_owned(),
                ));
            }
        }
    }
}

/// The block device of a namespace, if there is one yet. With several paths to it, it is of the
/// subsystem, and what is the controller's (`nvme0c0n1`) has no node (`drivers/nvme/host/multipath.c`).
fn node(host: &HostRoot, controller: &Controller, number: u32) -> Result<Option<PathBuf>, Cause> {
    let blocks = host.sys("block");
    for name in blocks.list()?.into_iter().filter(|name| name.starts_with("nvme")) {
        let dir = blocks.sub(&name);
        let owner = dir.sub("device");
        let ours = dir.link_name("device").as_deref() == Some(&controller.name)
            || owner.has(&controller.name);
        let node = host.path(format!("dev/{name}"));
        if ours && node.exists() && dir.attr("nsid")?.as_deref() == Some(&number.to_string()) {
            return Ok(Some(node));
        }
    }
    Ok(None)
}

/// The driver looks for namespaces in its own time, and does not like them to change meanwhile.
fn await_nodes(host: &HostRoot, controller: &Controller, facts: &Facts) -> Result<(), Cause> {
    let until = Instant::now() + FINDING;
    for namespace in facts.namespaces.iter().filter(|namespace| namespace.size > 0) {
        while node(host, controller, namespace.number)?.is_none() {
            if Instant::now() >= until {
                let why = format!("the driver shows no disk of namespace {}", namespace.number);
                return Err(Cause::Program(why));
            }
            thread::sleep(LOOKING);
        }
    }
    Ok(())
}

/// What is read at a time; aligned as reading past the host's cache needs it.
#[repr(align(4096))]
struct Piece([u8; PIECE]);
const PIECE: usize = 1 << 14;

/// Reads a namespace from the device itself: all of it, or of a large one many places.
fn read_back(
    host: &HostRoot,
    controller: &Controller,
    namespace: &Namespace,
    until: Instant,
) -> Result<(), Cause> {
    if namespace.size == 0 {
        return Ok(());
    }
    let missing = || Cause::Program(format!("the disk of namespace {} is gone", namespace.number));
    let node = node(host, controller, namespace.number)?.ok_or_else(missing)?;
    let mut options = OpenOptions::new();
    let opened = options.read(true).custom_flags(OFlag::O_DIRECT.bits()).open(&node);
    let file = opened.map_err(|e| Cause::kernel(&e))?;
    let mut piece = Box::new(Piece([0; PIECE]));
    for at in offsets(namespace.bytes()) {
        if Instant::now() >= until {
            return Err(Cause::Program("reading back did not end in time".to_owned()));
        }
        if let Some(left) = first_other(&file, &mut piece.0, at, namespace)? {
            return Err(not_zero(&format!(
                "something else in namespace {} at {left:#x}",
                namespace.number
            )));
        }
    }
    Ok(())
}

/// Where is looked: everywhere, or at both ends and in each of many parts somewhere, drawn anew each
/// time by the system's random numbers.
fn offsets(bytes: u64) -> impl Iterator<Item = u64> {
    let piece = PIECE as u64;
    let part = if bytes <= WHOLE { piece } else { (bytes / PLACES).next_multiple_of(piece) };
    let last = bytes.saturating_sub(1) / piece * piece;
    let keys = RandomState::new();
    let somewhere =
        move |start: u64| last.min(start + keys.hash_one(start) % (part / piece) * piece);
    let parts = (0..bytes).step_by(usize::try_from(part).unwrap_or(usize::MAX)).map(somewhere);
    [0, last].into_iter().chain(parts)
}

fn first_other(
    file: &File,
    piece: &mut [u8; PIECE],
    at: u64,
    namespace: &Namespace,
) -> Result<Option<u64>, Cause> {
    let left = usize::try_from(namespace.bytes().saturating_sub(at)).unwrap_or(PIECE).min(PIECE);
    let mut read = 0;
    while read < left {
        match file.read_at(&mut piece[read..], at + read as u64).map_err(|e| Cause::kernel(&e))? {
            0 => return Err(Cause::Program("the disk ended before its namespace".to_owned())),
            more => read += more,
        }
    }
    let other = piece[..left].iter().position(|byte| *byte != namespace.erased && *byte != 0);
    Ok(other.map(|place| at + place as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controller(oacs: u8, fna: u8, sanitize: u8) -> Abilities {
        let mut identify = vec![0; 4096];
        (identify[256], identify[524], identify[328]) = (oacs, fna, sanitize);
        Abilities::parse(&identify)
    }

    fn namespace(number: u32) -> Namespace {
        let mut identify = vec![0; 4096];
        identify[..8].copy_from_slice(&131_072_u64.to_le_bytes());
        (identify[26], identify[33], identify[128 + 4 + 2]) = (1, 1, 12);
        identify[104] = 7;
        Namespace::parse(number, &identify).unwrap()
    }

    #[test]
    fn the_best_of_what_a_controller_can_is_asked_of_it() {
        let way = |oacs, fna, sanitize| Way::of(controller(oacs, fna, sanitize)).ok();
        assert_eq!(way(0x2, 0, 0x3), Some(Way::Format { crypto: false }));
        assert_eq!(way(0x2, 0x4, 0), Some(Way::Format { crypto: true }));
        assert_eq!(way(0, 0, 0x3), Some(Way::Sanitize { crypto: false }));
        assert_eq!(way(0, 0, 0x1), Some(Way::Sanitize { crypto: true }));
        assert_eq!(way(0x8, 0, 0x4), None);
        assert!(controller(0x8, 0, 0).management);
        let commands = Way::Format { crypto: false }.commands(&[namespace(1), namespace(7)]);
        assert_eq!(commands[1].join(" "), "format --namespace-id=7 --ses=1 --force");
        let commands = Way::Sanitize { crypto: true }.commands(&[namespace(1)]);
        assert_eq!(commands, [["sanitize", "--sanact=0x04"]]);
    }

    #[test]
    fn structures_are_read_as_specified_and_odd_ones_are_none() {
        let read = namespace(3);
        assert_eq!((read.number, read.block, read.erased), (3, 4096, 0));
        assert_eq!(read.bytes(), 512 << 20);
        assert_eq!(Namespace::parse(1, &[0; 64]), None);
        assert_eq!(Namespace::parse(1, &[0xff; 4096]), None);
        let mut list = vec![0; 4096];
        (list[0], list[4]) = (1, 9);
        assert_eq!(numbers(&list), [1, 9]);
        assert_eq!(numbers(&[0xff; 4096]).len(), MOST);
    }

    #[test]
    fn small_ones_are_read_whole_and_large_ones_to_their_ends() {
        let piece = PIECE as u64;
        let small: Vec<u64> = offsets(3 * piece + 512).collect();
        assert_eq!(small, [0, 3 * piece, 0, piece, 2 * piece, 3 * piece]);
        let bytes = 8 << 40;
        let large: Vec<u64> = offsets(bytes).collect();
        assert!((4000..4200).contains(&large.len()), "{}", large.len());
        assert_eq!(large[..2], [0, bytes - piece]);
        // One in each part, and not where the last one was.
        let parts =
            |all: &[u64]| all[2..].iter().map(|at| at / (bytes / PLACES)).collect::<Vec<_>>();
        assert_eq!(parts(&large), (0..PLACES).collect::<Vec<_>>());
        assert_ne!(offsets(bytes).collect::<Vec<_>>(), large);
        assert!(large.iter().all(|at| at % piece == 0 && *at < bytes));
        assert_eq!(offsets(512).collect::<Vec<u64>>(), [0, 0, 0]);
    }

    #[test]
    fn the_disk_of_a_namespace_is_found_with_one_path_and_with_several() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let put = |path: &str, text: &str| {
            std::fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
            std::fs::write(root.join(path), text).unwrap();
        };
        let link = |path: &str, to: &str| {
            std::os::unix::fs::symlink(to, root.join(path)).unwrap();
        };
        for (disk, of) in
            [("nvme0c0n1", "nvme0"), ("nvme0n1", "nvme-subsys0"), ("nvme1n1", "nvme1")]
        {
            put(&format!("sys/block/{disk}/nsid"), "1\n");
            link(&format!("sys/block/{disk}/device"), &format!("../../{of}"));
        }
        put("sys/nvme-subsys0/nvme0/state", "live\n");
        put("sys/nvme0/state", "live\n");
        put("sys/nvme1/state", "live\n");
        put("dev/nvme0n1", "");
        put("dev/nvme1n1", "");
        let host = HostRoot::new(root);
        let found = |name: &str, number| {
            let controller = Controller { name: name.into(), node: PathBuf::new() };
            let node = node(&host, &controller, number).unwrap()?;
            Some(node.strip_prefix(root).unwrap().display().to_string())
        };
        assert_eq!(found("nvme0", 1).as_deref(), Some("dev/nvme0n1"));
        assert_eq!(found("nvme1", 1).as_deref(), Some("dev/nvme1n1"));
        assert_eq!((found("nvme0", 2), found("nvme2", 1)), (None, None));
    }

    #[test]
    fn what_was_left_is_found_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let mut disk = vec![0; 3 * PIECE];
        let found = |disk: &[u8], namespace: &Namespace| {
            std::fs::write(&path, disk).unwrap();
            let file = File::open(&path).unwrap();
            let mut piece = [0; PIECE];
            let mut at = offsets(namespace.bytes());
            at.find_map(|at| first_other(&file, &mut piece, at, namespace).unwrap())
        };
        let zeros = Namespace { size: disk.len() as u64 / 4096, ..namespace(1) };
        let ones = Namespace { erased: 0xff, ..zeros.clone() };
        assert_eq!(found(&disk, &zeros), None);
        disk[2 * PIECE + 5] = 0xff;
        assert_eq!((found(&disk, &zeros), found(&disk, &ones)), (Some(2 * PIECE as u64 + 5), None));
        disk.truncate(PIECE);
        let file = || File::open(&path).unwrap();
        std::fs::write(&path, &disk).unwrap();
        let short = first_other(&file(), &mut [0; PIECE], PIECE as u64, &zeros);
        assert!(short.unwrap_err().to_string().contains("ended before"));
    }
}
