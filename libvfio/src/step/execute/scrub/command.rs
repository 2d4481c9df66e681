//! The administrator's own program: told by its environment which function is meant.

use std::process::Command;
use std::time::Duration;

use super::program;
use crate::host::HostRoot;
use crate::pci::Function;
use crate::step::Cause;

/// Where it is looked whether systemd runs the host (`sd_booted(3)`).
const SYSTEMD: &str = "run/systemd/system";
/// How much longer than the program systemd may take for it.
const ROOM: Duration = Duration::from_secs(20);

/// What a program may do that scrubs a device: that, and little else. It has the host's devices, and
/// sysfs to write to; neither the network, nor anybody's files, nor anything that outlives it.
const SANDBOX: [&str; 14] = [
    "KillMode=control-group",
    "TimeoutStopSec=5",
    "NoNewPrivileges=yes",
    "ProtectSystem=strict",
    "ProtectHome=yes",
    "PrivateTmp=yes",
    "PrivateNetwork=yes",
    "RestrictAddressFamilies=AF_UNIX",
    "ProtectControlGroups=yes",
    "ProtectKernelLogs=yes",
    "ProtectHostname=yes",
    "RestrictNamespaces=yes",
    "LockPersonality=yes",
    "CapabilityBoundingSet=CAP_SYS_ADMIN CAP_SYS_RAWIO CAP_IPC_LOCK CAP_DAC_OVERRIDE",
];

/// Runs it, as a transient unit where systemd runs the host.
pub(super) fn run(
    host: &HostRoot,
    function: &Function,
    command: &[String],
    limit: Duration,
) -> Result<(), Cause> {
    let Some((path, arguments)) = command.split_first() else {
        return Err(Cause::Program("there is no program to run".to_owned()));
    };
    let environment = environment(function);
    if !(host.is_real() && host.path(SYSTEMD).exists()) {
        let mut program = Command::new(path);
        program.args(arguments).env_clear().envs(environment);
        return program::run(&mut program, limit).map(drop);
    }
    let unit = format!("vfiod-scrub-{}.service", function.address);
    // One that a daemon before this one has left is not to go on beside it.
    let stop = || program::run(Command::new("systemctl").args(["stop", &unit]), ROOM);
    let _ = stop();
    let mut program = Command::new("systemd-run");
    program.args(["--wait", "--pipe", "--quiet", "--collect", "--unit", &unit]);
    program.arg(format!("--property=RuntimeMaxSec={}", limit.as_secs()));
    program.args(SANDBOX.map(|property| format!("--property={property}")));
    program.args(environment.map(|(name, value)| format!("--setenv={name}={value}")));
    program.arg("--").arg(path).args(arguments);
    let started = std::time::Instant::now();
    let ran = program::run(&mut program, limit + ROOM);
    ran.map(drop).map_err(|cause| {
        let _ = stop();
        let seconds = limit.as_secs();
        if started.elapsed() < limit {
            Cause::Program(format!("{path}: {cause}"))
        } else {
            Cause::Program(format!("{path} did not end within {seconds} s: {cause}"))
        }
    })
}

/// What it is told. Empty is what is not known.
fn environment(function: &Function) -> [(&'static str, String); 9] {
    let hex = |id: Option<u16>| id.map(|id| format!("{id:04x}")).unwrap_or_default();
    let ids = &function.ids;
    let class = ids.class.map(|class| format!("{class:06x}"));
    let group = function.iommu_group.map(|number| number.to_string());
    let serial = function.config.serial().map(|serial| serial.to_string());
    [
        ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
        ("VFIOD_DEVICE", function.address.to_string()),
        ("VFIOD_VENDOR", hex(ids.vendor)),
        ("VFIOD_DEVICE_ID", hex(ids.device)),
        ("VFIOD_SUBSYSTEM", format!("{}:{}", hex(ids.subsystem_vendor), hex(ids.subsystem_device))),
        ("VFIOD_CLASS", class.unwrap_or_default()),
        ("VFIOD_SERIAL", serial.unwrap_or_default()),
        ("VFIOD_DRIVER", function.driver.clone().unwrap_or_default()),
        ("VFIOD_GROUP", group.unwrap_or_default()),
    ]
}
