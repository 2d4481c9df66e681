//! `cargo xtask`: every chore of the project, from one entry.
//!
//! Uses the host for compiling, packaging and starting QEMU; assigns no device of it.

mod bench;
mod ci;
mod crates;
mod deb;
mod exec;
mod fuzz;
mod host;
mod lab;
mod progress;
mod test;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about, disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Build the release binaries
    Build,
    /// Build the Debian package and check it with lintian
    Deb,
    /// A virtual machine with a real kernel, an IOMMU and devices to assign: without a
    /// subcommand, a shell in it
    Lab {
        #[command(subcommand)]
        action: Option<lab::Action>,
    },
    /// The product at work, told as a story
    Demo,
    /// Measure the product and its peers in the lab
    Bench {
        /// On a machine with hundreds of virtual functions instead, and only what that is for
        #[arg(long)]
        many: bool,
        /// Also write the rows to this file
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Look for inputs that a parser does not survive
    Fuzz {
        /// One of tests/fuzz/corpus; all of them one after another if none is given
        target: Option<String>,
        /// For how long, each
        #[arg(long, value_name = "N", default_value_t = 20)]
        seconds: u32,
    },
    /// All tests: those of the crates, and beside them every scenario of the lab
    Test,
    /// What continuous integration runs: format, lints, docs, dependencies, all tests
    Ci,
}

fn main() -> ExitCode {
    let outcome = run(&Arguments::parse().chore);
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(chore: &Chore) -> Result<ExitCode> {
    match chore {
        Chore::Build => exec::build_product().map(|_| ExitCode::SUCCESS),
        Chore::Deb => {
            let package = deb::build()?;
            deb::lint(&package)?;
            println!("{}", package.display());
            Ok(ExitCode::SUCCESS)
        }
        Chore::Lab { action } => lab::run(action.as_ref()),
        Chore::Demo => lab::demo(),
        Chore::Bench { many, json } => bench::run(*many, json.as_deref()),
        Chore::Fuzz { target, seconds } => fuzz::run(target.as_deref(), *seconds),
        Chore::Test => test::run(),
        Chore::Ci => ci::run(),
    }
}
