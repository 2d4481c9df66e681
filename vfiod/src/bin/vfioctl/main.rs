//! `vfioctl`, the command line of `org.vfiod1`: a shim around [`run`].

mod apply;
mod args;
mod attach;
mod bus;
mod certify;
mod check;
mod explain;
mod generate;
mod groups;
mod history;
mod holders;
mod hook;
mod json;
mod launch;
mod leases;
mod list;
mod mdev;
mod monitor;
mod output;
mod policy;
mod quarantine;
mod release;
mod run;
mod shaping;
mod show;
mod table;
mod tree;
mod trouble;
mod vf;
mod vmm;

fn main() -> std::process::ExitCode {
    run::main()
}
