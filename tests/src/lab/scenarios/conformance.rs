//! The conformance cases on the lab's kernel; what they expect is what the simulation does.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use crate::conformance::{self, Daemon, Host};
use crate::lab::{Lab, command, sysfs, wait_until};
use crate::machine::{self, Function, SWITCH_NIC_A};

/// Unplugging takes the guest's kernel some seconds.
const LIMIT: Duration = Duration::from_secs(60);

impl Host for Lab {
    fn root(&self) -> &Path {
        Path::new("/")
    }

    fn load(&mut self, module: &str) -> Result<()> {
        command::run(["modprobe", module])?.success().map(drop)
    }

    fn unplug(&mut self, function: &Function) -> Result<()> {
        self.qmp("device_del", json!({"id": function.id}))?;
        wait_until("the device goes", LIMIT, || Ok(!sysfs::exists(function.address)))
    }

    fn plug(&mut self, function: &Function) -> Result<()> {
        ensure!(*function == SWITCH_NIC_A, "the machine cannot plug {} in", function.id);
        self.qmp("device_add", machine::switch_nic_a())?;
        wait_until("the device is back", LIMIT, || Ok(sysfs::exists(function.address)))
    }
}

pub(super) fn run(lab: &mut Lab) -> Result<()> {
    let daemon = Daemon::on(None)?;
    let (cases, differences) = conformance::run(lab, &daemon)?;
    ensure!(
        differences.is_empty(),
        "{} of {cases} cases came out otherwise than on the simulated kernel:\n{}",
        differences.len(),
        differences.join("\n")
    );
    lab.step(format!("{cases} cases came out on this kernel as on the simulated one"))
}
