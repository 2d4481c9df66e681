//! The virtio-serial port to the lab's host: JSON, one message a line.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};

use anyhow::{Context, Result};

use crate::machine::AGENT_PORT;
use crate::protocol::{FromLab, ToLab};

#[derive(Debug)]
pub(super) struct Link {
    reader: BufReader<File>,
    writer: File,
}

impl Link {
    pub(super) fn open() -> Result<Self> {
        let device = device_of_port().context("the lab's port is not there")?;
        let writer = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&device)
            .with_context(|| format!("opening {device}"))?;
        Ok(Self { reader: BufReader::new(writer.try_clone()?), writer })
    }

    pub(super) fn send(&mut self, message: &FromLab) -> Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        self.writer.write_all(&line).context("writing to the lab's port")
    }

    /// The next message; nothing once the host has gone.
    pub(super) fn receive(&mut self) -> Result<Option<ToLab>> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).context("reading from the lab's port")? == 0 {
            return Ok(None);
        }
        serde_json::from_str(&line).map(Some).with_context(|| format!("message {line:?}"))
    }
}

/// The port's node, found by name in sysfs: udev's link may not be there yet.
fn device_of_port() -> Result<String> {
    for port in fs::read_dir("/sys/class/virtio-ports")? {
        let port = port?;
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if name.trim_end() == AGENT_PORT {
            return Ok(format!("/dev/{}", port.file_name().to_string_lossy()));
        }
    }
    anyhow::bail!("no port named {AGENT_PORT} in /sys/class/virtio-ports")
}
