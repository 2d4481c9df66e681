//! QEMU's control socket: one command at a time, events passed over.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

#[derive(Debug)]
pub(super) struct Qmp(BufReader<UnixStream>);

impl Qmp {
    /// Greets QEMU, which serves commands only after that.
    pub(super) fn new(stream: UnixStream) -> Result<Self> {
        let mut qmp = Self(BufReader::new(stream));
        let greeting = qmp.receive()?;
        ensure!(greeting.get("QMP").is_some(), "QMP began with {greeting}");
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns its value.
    pub(super) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        self.0.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.receive()?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                return Err(anyhow!("{}", error["desc"].as_str().unwrap_or("unknown error")));
            }
        }
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("QMP said {line:?}"))
    }
}
