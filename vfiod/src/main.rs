//! The daemon's process: a shim around [`vfiod::daemon`].

use clap::Parser;
use vfiod::daemon::{self, Args};

fn main() -> anyhow::Result<()> {
    daemon::main(&Args::parse())
}
