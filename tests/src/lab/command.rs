//! Running programs in the lab and keeping all they said.

use std::process::Command;

use anyhow::{Context, Result, bail};

/// An account without any privilege.
pub const UNPRIVILEGED: &str = "tester";

/// What a program did.
#[derive(Debug, Clone)]
pub struct Ran {
    command: String,
    /// Exit status; none if a signal ended it.
    pub status: Option<i32>,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl Ran {
    /// The standard output of a program that succeeded; an error with all it said otherwise.
    pub fn success(self) -> Result<String> {
        if self.status == Some(0) {
            return Ok(self.stdout);
        }
        let status = self.status.map_or_else(|| "a signal".to_owned(), |code| code.to_string());
        bail!("{} ended with {status}\n{}{}", self.command, self.stdout, self.stderr)
    }
}

/// Runs a program as root.
pub fn run<'a>(command: impl IntoIterator<Item = &'a str>) -> Result<Ran> {
    let words: Vec<&str> = command.into_iter().collect();
    let (program, arguments) = words.split_first().context("no program named")?;
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("starting {program}"))?;
    Ok(Ran {
        command: words.join(" "),
        status: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Runs a program as [`UNPRIVILEGED`].
pub fn run_unprivileged<'a>(command: impl IntoIterator<Item = &'a str>) -> Result<Ran> {
    run(["runuser", "--user", UNPRIVILEGED, "--"].into_iter().chain(command))
}

/// An ordinary user's `vfioctl run` with one device, without a process in between; the monitor's words
/// follow.
pub const fn launcher(device: &str) -> [&str; 11] {
    [
        "setpriv",
        "--reuid=tester",
        "--regid=tester",
        "--init-groups",
        "--",
        "vfioctl",
        "run",
        "--device",
        device,
        "--tenant=ours",
        "--",
    ]
}
