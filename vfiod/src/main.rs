//! The daemon's process: a shim around [`vfiod::daemon`], or around [`vfiod::worker`] where it is one.

use clap::Parser;
use vfiod::daemon::{self, Args};
use vfiod::worker;

fn main() -> anyhow::Result<()> {
    match worker::asked_for() {
        Some(root) => Ok(worker::serve(&root)?),
        None => daemon::main(&Args::parse()),
    }
}
