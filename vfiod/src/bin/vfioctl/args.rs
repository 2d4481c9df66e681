//! What can be typed. Only words and their explanations; does nothing.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, RangedI64ValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use libvfio::error::ErrorKind;
use libvfio::pci::class::ClassAlias;
use vfiod::stores::CONFIG;

use crate::shaping::Shaping;
use crate::trouble::UNAVAILABLE;
use crate::vmm::Vmm;

/// Give PCI devices to virtual machines and take them back
///
/// Asks vfiod, the owner of device assignment on this host, over D-Bus. Looking is for everyone;
/// attach, release and quarantine need an administrator or a polkit rule.
///
/// A device DEV is named by its address (03:00.0 or 0000:03:00.0), or by vendor:device
/// (10de:2330) or a class (gpu, nic, nvme) where just one device answers to that.
#[derive(Debug, Parser)]
#[command(
    name = "vfioctl",
    version,
    after_help = footer(),
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
pub(crate) struct Cli {
    /// Print JSON: what vfiod answered, with its own field names
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Talk to the bus at this D-Bus address instead of the system bus (also: `VFIOCTL_BUS`)
    #[arg(long, global = true, value_name = "ADDRESS", hide = true)]
    pub(crate) bus: Option<String>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

// Of all commands only the one that is typed is described in full.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub(crate) enum Command {
    /// List devices: driver, IOMMU group, NUMA node and lease of each
    #[command(after_help = "Examples:
  vfioctl list --class gpu
  vfioctl list --driver none
  vfioctl list --lease")]
    List(ListArgs),
    /// Show all that is known of one device
    Show {
        /// The device: 03:00.0, 10de:2330 or gpu
        #[arg(value_name = "DEV")]
        device: String,
    },
    /// Show how devices are connected, with ports, NUMA nodes, groups, drivers and leases
    Tree,
    /// List IOMMU groups: their functions, and why they share a group
    Groups,
    /// Tell whether a device can be attached; if not, each reason and its remedy
    Explain {
        /// The device: 03:00.0, 10de:2330 or gpu
        #[arg(value_name = "DEV")]
        device: String,
    },
    /// List who and what holds a device's group: processes, and what the host does with it
    Holders {
        /// The device: 03:00.0, 10de:2330 or gpu
        #[arg(value_name = "DEV")]
        device: String,
    },
    /// Check that this host is ready: IOMMU, kernel, modules, KVM, limits, daemon
    ///
    /// Exits with 1 if anything fails. Looks at the host by itself, without vfiod.
    Check {
        /// Look at the host described in this directory instead of the running one
        #[arg(long, value_name = "DIR", default_value = "/", hide = true)]
        root: PathBuf,
    },
    /// Lease devices to a tenant: their groups go to VFIO, all of them or none
    #[command(after_help = "Examples:
  vfioctl attach gpu --tenant alice
  vfioctl attach 03:00.0 01:10.0 --tenant alice --vm 6b3c7d5e-0d3b-4e0f-9b53-1a2c3d4e5f60
  vfioctl attach --vf-of 01:00.0 --count 2 --tenant alice
  vfioctl attach gpu --dry-run")]
    Attach(Box<AttachArgs>),
    /// End leases: every function goes back to the driver and override it had
    ///
    /// Devices that a guest still has open go back when it lets go of them; until then the lease is
    /// 'releasing', and the exit status says busy. Nothing to end is no error, so a release may be
    /// repeated.
    #[command(after_help = "Examples:
  vfioctl release 3f9a2c81
  vfioctl release 03:00.0 --wait
  vfioctl release 6b3c7d5e-0d3b-4e0f-9b53-1a2c3d4e5f60")]
    Release(ReleaseArgs),
    /// Lease devices and start a virtual machine monitor with them; the lease ends with it
    ///
    /// Put {vfio} where the devices go among the monitor's arguments. With iommufd, QEMU gets them
    /// open; else your user may open their nodes for the time of the lease. As much memory as the
    /// guest has, and 1 GiB beside it, may be locked. The monitor takes this process's place.
    #[command(after_help = "Example:
  vfioctl run --device gpu --tenant alice -- qemu-system-x86_64 -accel kvm -m 4G {vfio}")]
    Run(RunArgs),
    /// Print the arguments by which a virtual machine monitor gets a lease's devices
    #[command(after_help = "Example:
  qemu-system-x86_64 -accel kvm -m 4G $(vfioctl args 3f9a2c81 --vmm qemu)")]
    Args(ArgsArgs),
    /// Print a lease's devices as elements of a libvirt domain, with where its memory is best
    LibvirtXml {
        /// The lease: its id, a device of it, or the virtual machine it is for
        #[arg(value_name = "LEASE|DEV|UUID")]
        lease: String,
    },
    /// Lease a libvirt domain's devices while it runs; for /etc/libvirt/hooks/qemu.d/50-vfiod
    #[command(hide = true)]
    LibvirtHook(HookArgs),
    /// List leases: who has which devices, failed ones included
    #[command(after_help = "Examples:
  vfioctl leases
  vfioctl leases --history --last 20")]
    Leases(LeasesArgs),
    /// Clean a device once more that did not come back well, and trust it again if it does now
    #[command(after_help = "Example:
  vfioctl heal 03:00.0")]
    Heal {
        /// The device
        #[arg(value_name = "DEV")]
        device: String,
    },
    /// What became of leases and devices, oldest first, and whether that is what was written
    ///
    /// Each entry has the hash of itself and of all before it. '--check' recomputes them all: what was
    /// changed, taken out or moved shows. Note what it says of the newest one elsewhere to see later
    /// that nobody has written all anew.
    #[command(after_help = "Examples:
  vfioctl history
  vfioctl history 03:00.0 --last 5
  vfioctl history --check")]
    History(HistoryArgs),
    /// What was done so that nothing of a lease's tenant is left in its devices
    ///
    /// Fails if something is not known to be clean, or the history is not what was written.
    #[command(after_help = "Example:
  vfioctl certify 3f9a2c81")]
    Certify {
        /// The lease, which has ended
        #[arg(value_name = "LEASE")]
        lease: String,
    },
    /// List the devices that are not trusted, put one there, or clear it
    ///
    /// A device in quarantine gets no new lease until it is cleared, also after a reboot or a
    /// replug. Whoever has it now keeps it.
    #[command(
        args_conflicts_with_subcommands = true,
        after_help = "Examples:
  vfioctl quarantine
  vfioctl quarantine add 03:00.0 --reason 'came back with other firmware'
  vfioctl quarantine clear 03:00.0"
    )]
    Quarantine {
        #[command(subcommand)]
        action: Option<QuarantineAction>,
    },
    /// Virtual functions: which there are, and how many there shall be
    #[command(after_help = "Examples:
  vfioctl vf list
  vfioctl vf set 01:00.0 4 --dry-run
  vfioctl vf set 01:00.0 4
  vfioctl vf list 01:00.0
  vfioctl vf show 01:10.0
  vfioctl attach --vf-of 01:00.0 --tenant alice")]
    Vf {
        #[command(subcommand)]
        action: VfAction,
    },
    /// The policy: what the host's devices are for
    ///
    /// It is read from /etc/vfiod/vfiod.toml and /etc/vfiod/vfiod.toml.d/*.toml.
    #[command(after_help = "Examples:
  vfioctl policy check
  vfioctl policy check new.toml
  vfioctl policy show
  vfioctl policy schema")]
    Policy {
        #[command(subcommand)]
        action: PolicyAction,
    },
    /// Mediated devices: which there can be, and which there are
    ///
    /// Attaching PARENT/TYPE makes one for the time of the lease.
    #[command(after_help = "Examples:
  vfioctl mdev list
  vfioctl mdev show mtty/mtty-2
  vfioctl attach mtty/mtty-2 --tenant alice")]
    Mdev {
        #[command(subcommand)]
        action: MdevAction,
    },
    /// Show what applying the policy would do, device by device, and what stands in the way
    Plan,
    /// Do what the policy says, as far as nothing stands in the way
    ///
    /// What is leased waits for the end of the lease, and is done then. What fails is as it was.
    /// Applying again changes nothing.
    #[command(after_help = "Examples:
  vfioctl apply --dry-run
  vfioctl apply")]
    Apply(ApplyArgs),
    /// Show where the host stands with its policy: what is as wanted, what drifted, what waits
    Status,
    /// Tell whether this boot did what the policy wanted, and what came first if not; exits with 1
    /// then
    VerifyBoot,
    /// Follow changes of leases and devices, a line each, until interrupted
    Monitor,
    /// Print the completion script of a shell
    #[command(after_help = "Example:
  vfioctl completions bash > ~/.local/share/bash-completion/completions/vfioctl")]
    Completions {
        /// The shell to complete in
        shell: Shell,
    },
    /// Write what packages ship
    #[command(hide = true)]
    Generate {
        #[command(subcommand)]
        what: Generated,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// List bridges too
    #[arg(long)]
    pub(crate) all: bool,
    /// List only devices of this kind
    #[arg(long, value_name = "CLASS", ignore_case = true, value_parser = classes())]
    pub(crate) class: Option<ClassAlias>,
    /// List only devices on this driver; 'none' for those on none
    #[arg(long, value_name = "DRIVER")]
    pub(crate) driver: Option<String>,
    /// List only leased devices, or only those of one lease
    #[arg(long, value_name = "LEASE")]
    #[allow(clippy::option_option)] // Absent, given alone, given with a lease.
    pub(crate) lease: Option<Option<String>>,
}

#[derive(Debug, Args)]
#[allow(clippy::struct_excessive_bools)] // Flags of a command line.
pub(crate) struct AttachArgs {
    /// The devices: 03:00.0, 10de:2330 or gpu; functions that share a slot and a group come along.
    /// PARENT/TYPE makes a mediated device
    #[arg(value_name = "DEV", required_unless_present_any = ["vf_of", "pool"])]
    pub(crate) devices: Vec<String>,
    /// Choose free virtual functions of this physical one, the lowest indices first
    #[arg(long, value_name = "PF", conflicts_with = "devices", group = "choosing")]
    pub(crate) vf_of: Option<String>,
    /// Choose free devices of this pool of the policy, the lowest addresses first
    #[arg(long, value_name = "POOL", conflicts_with = "devices", group = "choosing")]
    pub(crate) pool: Option<String>,
    /// How many to choose
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        requires = "choosing",
        value_parser = at_least_one()
    )]
    pub(crate) count: u32,
    /// Who gets them: 1 to 64 letters, digits and . _ : @ + -
    #[arg(long, value_name = "TENANT", required_unless_present = "dry_run")]
    pub(crate) tenant: Option<String>,
    /// The virtual machine they are for, by which they can be released
    #[arg(long, value_name = "UUID")]
    pub(crate) vm: Option<String>,
    /// Take every other device of their IOMMU groups too
    #[arg(long)]
    pub(crate) whole_group: bool,
    /// Accept devices that somebody else has put on a VFIO driver, and leave them there after
    #[arg(long)]
    pub(crate) adopt: bool,
    /// End the lease when this process ends, however it does
    #[arg(long, value_name = "PID")]
    pub(crate) pid: Option<u32>,
    /// Take them even if the host cannot live without them: root, swap, default route, console
    #[arg(long)]
    pub(crate) allow_protected: bool,
    /// Let your user open the devices' nodes in /dev/vfio, for the time of the lease
    #[arg(long)]
    pub(crate) node_access: bool,
    /// Leave device memory as the tenant leaves it, also where it is known how to clear it
    #[arg(long)]
    pub(crate) no_scrub: bool,
    /// Show the steps and change nothing; exits as attaching would
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) shaping: Shaping,
}

#[derive(Debug, Default, Args)]
pub(crate) struct RunArgs {
    /// A device to lease: 03:00.0, 10de:2330 or gpu; may be repeated
    #[arg(long = "device", value_name = "DEV", required = true)]
    pub(crate) devices: Vec<String>,
    /// Who gets them: 1 to 64 letters, digits and . _ : @ + -
    #[arg(long, value_name = "TENANT", required_unless_present = "dry_run")]
    pub(crate) tenant: Option<String>,
    /// The virtual machine they are for
    #[arg(long, value_name = "UUID")]
    pub(crate) vm: Option<String>,
    /// Take every other device of their IOMMU groups too
    #[arg(long)]
    pub(crate) whole_group: bool,
    /// Which monitor it is, if its program's name does not say
    #[arg(long, value_name = "VMM", value_parser = PossibleValuesParser::new(Vmm::NAMES))]
    pub(crate) vmm: Option<String>,
    /// How much memory it may lock, instead of what its arguments say, such as 9G
    #[arg(long, value_name = "SIZE")]
    pub(crate) lock: Option<String>,
    /// Show the steps and the command, and change nothing; exits as attaching would
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// The monitor and its arguments, {vfio} among them
    #[arg(value_name = "COMMAND", last = true, required = true)]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct HookArgs {
    /// The domain's name
    #[arg(value_name = "DOMAIN")]
    pub(crate) domain: String,
    /// What libvirt is at: prepare, started, release, reconnect
    #[arg(value_name = "OPERATION")]
    pub(crate) operation: String,
    /// Where in it: begin, end
    #[arg(value_name = "STEP")]
    pub(crate) step: String,
    /// Whatever else libvirt says
    #[arg(value_name = "EXTRA")]
    pub(crate) extra: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ArgsArgs {
    /// The lease: its id, a device of it, or the virtual machine it is for
    #[arg(value_name = "LEASE|DEV|UUID")]
    pub(crate) lease: String,
    /// The monitor
    #[arg(long, value_name = "VMM", value_parser = PossibleValuesParser::new(Vmm::NAMES))]
    pub(crate) vmm: String,
}

#[derive(Debug, Args)]
pub(crate) struct ReleaseArgs {
    /// What to release: a lease's id, a device of it, or the virtual machine it is for
    #[arg(value_name = "LEASE|DEV|UUID", required = true)]
    pub(crate) targets: Vec<String>,
    /// Reset nothing, so that what the tenant left in the functions stays there
    #[arg(long)]
    pub(crate) no_reset: bool,
    /// Wait for guests that still run, instead of leaving the release to end with them
    #[arg(long)]
    pub(crate) wait: bool,
    /// Show which leases would end and what would be taken back, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LeasesArgs {
    /// List what became of leases and of devices in quarantine instead, oldest first
    #[arg(long)]
    pub(crate) history: bool,
    /// How many of the newest things that happened to list [default: 100]
    #[arg(long, value_name = "N", requires = "history", value_parser = at_least_one())]
    pub(crate) last: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct HistoryArgs {
    /// Only what happened to this device
    #[arg(value_name = "DEV", conflicts_with = "check")]
    pub(crate) device: Option<String>,
    /// How many of the newest [default: 100]
    #[arg(long, value_name = "N", conflicts_with = "check", value_parser = at_least_one())]
    pub(crate) last: Option<u32>,
    /// Check that all entries are there, as they were written
    #[arg(long)]
    pub(crate) check: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VfAction {
    /// List physical functions, or the virtual functions of one
    List {
        /// The physical function whose virtual ones to list
        #[arg(value_name = "PF")]
        physical: Option<String>,
    },
    /// Show all that is known of a virtual function, and what can be set on it for a lease
    Show {
        /// The virtual function
        #[arg(value_name = "VF")]
        device: String,
    },
    /// Set how many virtual functions a physical one has; 0 removes all
    ///
    /// The kernel removes all before it makes others, so this is refused while any of them is
    /// leased, held or used. Host drivers are kept from them until the last has gone.
    Set {
        /// The physical function
        #[arg(value_name = "PF")]
        physical: String,
        /// How many there shall be
        #[arg(value_name = "N", allow_negative_numbers = true)]
        count: u16,
        /// Show the steps and change nothing; exits as setting would
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    /// Show the steps and change nothing, as 'vfioctl plan' does
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Devices that are others than were at their addresses before are meant
    #[arg(long)]
    pub(crate) accept: bool,
    /// As a part of the boot: once udev has settled, and in the time that the policy gives
    #[arg(long, conflicts_with_all = ["dry_run", "accept"])]
    pub(crate) boot: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyAction {
    /// Say what is wrong with a policy, with file, line and column; exits with 2 if anything is
    ///
    /// Looks at this host by itself: devices that two pools claim are wrong, selectors that match
    /// nothing are told.
    Check(PolicyFiles),
    /// Show which device is in which pool, by the files as they are
    Show(PolicyFiles),
    /// Explain every key
    Schema,
    /// Have vfiod read the policy anew; one that is wrong leaves the one in force
    Reload,
    /// Propose a policy from what this host has: options of vfio-pci, overrides of driverctl, devices
    /// of libvirt's domains
    ///
    /// Prints it, with a comment for each thing that it would replace. Changes nothing.
    Import {
        /// Look at the host described in this directory instead of the running one
        #[arg(long, value_name = "DIR", default_value = "/", hide = true)]
        root: PathBuf,
    },
    /// Print the udev rules that a policy becomes for the next boot
    ///
    /// Of the host's own policy it says, too, where an initial file system has another one.
    Compile(PolicyFiles),
}

/// Where a policy is, and of which host.
#[derive(Debug, Args)]
pub(crate) struct PolicyFiles {
    /// Files to read instead of those in /etc/vfiod; together they are one policy
    #[arg(value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Read the policy in this directory instead
    #[arg(long, value_name = "DIR", default_value = CONFIG, conflicts_with = "files")]
    pub(crate) config: PathBuf,
    /// Look at the host described in this directory instead of the running one
    #[arg(long, value_name = "DIR", default_value = "/", hide = true)]
    pub(crate) root: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum MdevAction {
    /// List the types of mediated devices that can be made, and the devices that were
    List,
    /// Show a type with its devices, or one device
    Show {
        /// A type (mtty/mtty-2), or the UUID of a device
        #[arg(value_name = "PARENT/TYPE|UUID")]
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum QuarantineAction {
    /// Keep a device from new leases until it is cleared
    Add {
        /// The device: 03:00.0, 10de:2330 or gpu
        #[arg(value_name = "DEV")]
        device: String,
        /// Why it is not trusted, on one line
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
    /// Trust a device again
    ///
    /// Clearing a device that is not in quarantine is no error, so it may be repeated.
    Clear {
        /// The device, or the address it had if it is not there
        #[arg(value_name = "DEV")]
        device: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Generated {
    /// Manual pages of all commands
    Man {
        /// Where to write them
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Completion scripts of all shells
    Completions {
        /// Where to write them
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
}

fn at_least_one() -> RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..)
}

fn classes() -> impl TypedValueParser<Value = ClassAlias> {
    PossibleValuesParser::new(ClassAlias::ALL.map(ClassAlias::name))
        .try_map(|name| name.parse::<ClassAlias>())
}

fn footer() -> String {
    let lines = ErrorKind::ALL.map(|kind| status(kind.exit_status(), meaning(kind)));
    let unavailable = status(UNAVAILABLE, "vfiod is not running, or the bus cannot be reached");
    format!(
        "Examples:
  vfioctl check
  vfioctl list --class gpu
  vfioctl explain gpu
  vfioctl attach gpu --tenant alice
  vfioctl release gpu

Exit status:
{}
{}
{unavailable}",
        status(0, "done"),
        lines.join("\n")
    )
}

fn status(number: u8, meaning: &str) -> String {
    format!("  {number:<3} {meaning}")
}

/// What an exit status says, for people.
fn meaning(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Internal => "a step failed, or vfiod did; for check: something fails",
        ErrorKind::InvalidArgument => "the request is malformed or ambiguous",
        ErrorKind::NotFound => "nothing has that name",
        ErrorKind::NotAuthorized => "polkit or the bus does not allow it",
        ErrorKind::Busy => "something uses the device",
        ErrorKind::NotViable => "the device cannot be isolated as things are",
        ErrorKind::Protected => "the host cannot live without the device",
        ErrorKind::AlreadyLeased => "another lease holds the device",
        ErrorKind::IdentityMismatch => "another device is at that address now",
        ErrorKind::ResetFailed => "a reset failed",
        ErrorKind::Quarantined => "the device is not trusted until an administrator clears it",
        ErrorKind::Wedged => "a kernel operation on the device never returned",
        ErrorKind::Timeout => "it took longer than it may",
        ErrorKind::Unsupported => "this device or host cannot do that",
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_and_argument_is_explained() {
        fn walk(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {argument}", command.get_name());
            }
            command.get_subcommands().for_each(walk);
        }
        walk(&Cli::command());
    }

    #[test]
    fn a_tenant_is_needed_but_for_a_dry_run() {
        assert!(Cli::try_parse_from(["vfioctl", "attach", "gpu"]).is_err());
        assert!(Cli::try_parse_from(["vfioctl", "attach", "gpu", "--dry-run"]).is_ok());
        assert!(Cli::try_parse_from(["vfioctl", "attach", "--tenant", "a"]).is_err());
    }

    #[test]
    fn a_mistyped_command_or_class_gets_a_suggestion() {
        let error = |line: &[&str]| Cli::try_parse_from(line).unwrap_err().to_string();
        assert!(error(&["vfioctl", "atach"]).contains("'attach'"));
        assert!(error(&["vfioctl", "list", "--class", "gpus"]).contains("'gpu'"));
    }
}
