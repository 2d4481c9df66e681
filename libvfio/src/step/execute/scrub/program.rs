//! Programs that are given some time, and no more. Starts processes and ends them.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_process_group, set_parent_process_death_signal, waitid,
};

use crate::step::Cause;

/// How often one looks whether it has ended.
const LOOKING: Duration = Duration::from_millis(10);
/// How long one that is killed may take to end.
const DYING: Duration = Duration::from_secs(5);
/// The most that is kept of what it says, in bytes.
const MOST: u64 = 1 << 20;
/// The most of it that is told when it fails, in characters.
const TOLD: usize = 300;

/// Runs a program and whatever it starts in its process group, for `limit` at most; what it printed.
/// It is killed at the limit, and with whoever has it run.
pub(super) fn run(command: &mut Command, limit: Duration) -> Result<Vec<u8>, Cause> {
    let name = command.get_program().to_string_lossy().into_owned();
    // SAFETY: what runs between fork and exec is one system call.
    unsafe { command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?)) };
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn();
    let mut child = child.map_err(|e| Cause::Program(format!("cannot start {name}: {e}")))?;
    let (said, complained) = (kept(child.stdout.take()), kept(child.stderr.take()));
    let lost = |e: io::Error| Cause::Program(format!("cannot wait for {name}: {e}"));
    let group = Pid::from_child(&child);
    let in_time = ended(group, limit).map_err(lost)?;
    // Also what has outlived it, which would go on. It is not waited for yet, so the group is its own.
    let _ = kill_process_group(group, Signal::KILL);
    if !in_time && !ended(group, DYING).map_err(lost)? {
        let why =
            format!("{name} did not end within {} s, nor when it was killed", limit.as_secs());
        return Err(Cause::Program(why));
    }
    let status = child.wait().map_err(lost)?;
    if !in_time {
        let why = format!("{name} did not end within {} s and was killed", limit.as_secs());
        return Err(Cause::Program(why));
    }
    let (said, complained) = (text(&said), text(&complained));
    if status.success() {
        return Ok(said);
    }
    let why = told(if complained.is_empty() { &said } else { &complained });
    Err(Cause::Program(format!("{name} failed ({}){why}", how(status))))
}

/// Whether it ends within a time. It is left to be waited for.
fn ended(process: Pid, limit: Duration) -> io::Result<bool> {
    let until = Instant::now() + limit;
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    while waitid(WaitId::Pid(process), look)?.is_none() {
        if Instant::now() >= until {
            return Ok(false);
        }
        thread::sleep(LOOKING);
    }
    Ok(true)
}

/// Reads on its own thread, so that a full pipe stops nobody; more than is kept is let go.
fn kept(pipe: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (read, reader) = channel();
    thread::spawn(move || {
        let Some(mut pipe) = pipe else { return };
        let mut bytes = Vec::new();
        let _ = pipe.by_ref().take(MOST).read_to_end(&mut bytes);
        let _ = io::copy(&mut pipe, &mut io::sink());
        // Nobody may want it any more.
        let _ = read.send(bytes);
    });
    reader
}

/// Nothing, where somebody keeps the pipe open who has got away.
fn text(reader: &Receiver<Vec<u8>>) -> Vec<u8> {
    reader.recv_timeout(DYING).unwrap_or_default()
}

/// The end of what a program said, fit for a line.
fn told(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    let plain: String = said.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let skipped = plain.chars().count().saturating_sub(TOLD);
    let end: String = plain.chars().skip(skipped).collect();
    if end.is_empty() { end } else { format!(": {end}") }
}

fn how(status: ExitStatus) -> String {
    status.code().map_or_else(|| status.to_string(), |code| format!("status {code}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: u64) -> Result<Vec<u8>, String> {
        let mut command = Command::new("sh");
        let ran = run(command.args(["-c", script]), Duration::from_millis(limit));
        ran.map_err(|cause| cause.to_string())
    }

    #[test]
    fn what_it_prints_is_kept_and_what_it_complains_of_is_told() {
        assert_eq!(shell("echo a", 5000).unwrap(), b"a\n");
        let error = shell("echo a; printf 'no\\033 room' >&2; exit 3", 5000).unwrap_err();
        assert_eq!(error, "sh failed (status 3): no  room");
        assert_eq!(shell("exit 1", 5000).unwrap_err(), "sh failed (status 1)");
        assert!(shell("kill -9 $$", 5000).unwrap_err().contains("signal: 9"));
        assert_eq!(shell("head -c 3000000 /dev/zero", 5000).unwrap().len(), 1 << 20);
    }

    #[test]
    fn one_that_is_not_there_is_named() {
        let ran = run(&mut Command::new("/nowhere/scrub"), Duration::from_secs(1));
        let error = ran.unwrap_err().to_string();
        assert!(error.contains("cannot start /nowhere/scrub: No such file"), "{error}");
    }

    #[test]
    fn one_that_does_not_end_is_killed_with_all_that_it_has_started() {
        let dir = tempfile::tempdir().unwrap();
        let left = dir.path().join("left");
        let script = format!("(sleep 1; touch {}) & trap '' TERM; sleep 60", left.display());
        let start = Instant::now();
        let error = shell(&script, 100).unwrap_err();
        assert_eq!(error, "sh did not end within 0 s and was killed");
        assert!(start.elapsed() < Duration::from_secs(5));
        // Nor does anything go on that one leaves behind, or keeps it from being read.
        assert_eq!(shell(&format!("(sleep 1; touch {}) &", left.display()), 5000).unwrap(), b"");
        thread::sleep(Duration::from_millis(1200));
        assert!(!left.exists());
    }
}
