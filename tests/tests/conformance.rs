//! The conformance cases on the simulated kernel: the lab's machine as `tests/hosts/lab.toml`
//! describes it, served by the real daemon. The lab plays the same ones on a real kernel.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use vfiod_tests::conformance::{self, Daemon, Host};
use vfiod_tests::machine::Function;
use vfiod_tests::session::Session;

const LAB: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/hosts/lab.toml");

struct Simulated(Session);

impl Simulated {
    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.0.root.join(file);
        fs::write(&path, value).with_context(|| format!("{value:?} to {}", path.display()))
    }
}

impl Host for Simulated {
    fn root(&self) -> &Path {
        &self.0.root
    }

    fn load(&mut self, module: &str) -> Result<()> {
        self.write("sim/load-module", module)
    }

    fn unplug(&mut self, function: &Function) -> Result<()> {
        self.write(&format!("sys/bus/pci/devices/{}/remove", function.address), "1")
    }

    fn plug(&mut self, _: &Function) -> Result<()> {
        self.write("sys/bus/pci/rescan", "1")
    }
}

#[test]
fn the_simulated_kernel_and_the_daemon_on_it_behave_as_in_the_lab() {
    let mut host = Simulated(Session::start(LAB));
    let daemon = Daemon::on(Some(&host.0.address)).unwrap();
    let (cases, differences) = conformance::run(&mut host, &daemon).unwrap();
    assert!(
        differences.is_empty(),
        "{} of {cases}:\n{}",
        differences.len(),
        differences.join("\n")
    );
}
