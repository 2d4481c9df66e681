//! From a command line to an exit status. Chooses who answers; answers nothing itself.

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind as Usage;
use libvfio::error::ErrorKind;
use libvfio::host::HostRoot;

use crate::args::{Cli, Command, PolicyAction, RunArgs};
use crate::bus::Bus;
use crate::launch::{self, Launch};
use crate::output::Output;
use crate::trouble::{Trouble, report};
use crate::{
    apply, attach, certify, check, explain, generate, groups, history, holders, hook, leases, list,
    mdev, monitor, policy, quarantine, release, show, tree, vf,
};

pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let json = cli.json;
    run(cli).unwrap_or_else(|trouble| {
        trouble.report(json);
        trouble.exit_code()
    })
}

/// Help, the version, or what is wrong with the command line.
fn usage(error: &clap::Error) -> ExitCode {
    let wrong =
        error.use_stderr() && error.kind() != Usage::DisplayHelpOnMissingArgumentOrSubcommand;
    if wrong && std::env::args_os().any(|argument| argument == "--json") {
        let text = error.render().to_string();
        let message = text.trim_start_matches("error: ").trim_end();
        report(ErrorKind::InvalidArgument.name(), message, true);
    } else {
        // Whoever asked for help may have stopped reading it.
        let _ = error.print();
    }
    if error.use_stderr() {
        ErrorKind::InvalidArgument.exit_status().into()
    } else {
        ExitCode::SUCCESS
    }
}

fn run(mut cli: Cli) -> Result<ExitCode, Trouble> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let fault = |error| Trouble::new(ErrorKind::Internal, format!("cannot begin: {error}"));
    let runtime = runtime.map_err(fault)?;
    let Command::Run(args) = &mut cli.command else { return runtime.block_on(answer(cli)) };
    let args = std::mem::take(args);
    let launch = runtime.block_on(launch(&cli, &args))?;
    // The connection to the bus goes with it: the monitor needs none.
    drop(runtime);
    match launch {
        Ok(launch) => launch.become_it().map(|never| match never {}),
        Err(done) => Ok(done),
    }
}

async fn launch(cli: &Cli, args: &RunArgs) -> Result<Result<Launch, ExitCode>, Trouble> {
    let address = address(cli.bus.clone());
    launch::run(address.as_deref(), args, &Output::new(cli.json)).await
}

/// Not an argument's default, with which a bare `vfioctl` would no longer show its help.
fn address(given: Option<String>) -> Option<String> {
    given.or_else(|| std::env::var("VFIOCTL_BUS").ok()).filter(|address| !address.is_empty())
}

async fn answer(cli: Cli) -> Result<ExitCode, Trouble> {
    let out = Output::new(cli.json);
    let address = address(cli.bus);
    let address = address.as_deref();
    let bus = || Bus::shortest(address);
    // Signals, and objects other than the Manager, are on the bus alone.
    let whole = || Bus::connect(address);
    match cli.command {
        Command::List(args) => list::run(&bus().await?, &args, &out).await?,
        Command::Show { device } => show::run(&bus().await?, &device, &out).await?,
        Command::Tree => tree::run(&bus().await?, &out).await?,
        Command::Groups => groups::run(&bus().await?, &out).await?,
        Command::Explain { device } => explain::run(&bus().await?, &device, &out).await?,
        Command::Leases(args) if args.history => {
            history::run(&bus().await?, None, args.last, &out).await?;
        }
        Command::Heal { device } => quarantine::heal(&bus().await?, &device, &out).await?,
        Command::History(args) if args.check => return certify::check(&bus().await?, &out).await,
        Command::History(args) => {
            history::run(&bus().await?, args.device.as_deref(), args.last, &out).await?;
        }
        Command::Certify { lease } => return certify::run(&bus().await?, &lease, &out).await,
        Command::Leases(_) => leases::run(&bus().await?, &out).await?,
        Command::Holders { device } => holders::run(&bus().await?, &device, &out).await?,
        Command::Quarantine { action } => {
            quarantine::run(&bus().await?, action.as_ref(), &out).await?;
        }
        Command::Vf { action } => return vf::run(&whole().await?, &action, &out).await,
        Command::Policy { action: PolicyAction::Reload } => {
            policy::reload(&bus().await?, &out).await?;
        }
        Command::Policy { action } => return policy::run(&action, &out),
        Command::Mdev { action } => mdev::run(&bus().await?, &action, &out).await?,
        Command::Plan => return apply::plan(&bus().await?, &out).await,
        Command::Apply(args) => return apply::run(&whole().await?, &args, &out).await,
        Command::Status => return apply::status(&bus().await?, &out).await,
        Command::VerifyBoot => {
            return apply::verify_boot(&bus().await?, &HostRoot::new("/"), &out).await;
        }
        Command::Monitor => monitor::run(&whole().await?, &out).await?,
        Command::Attach(args) => return attach::run(&bus().await?, &args, &out).await,
        Command::Args(args) => launch::args(&bus().await?, &args, &out).await?,
        Command::LibvirtHook(args) => return hook::run(&args, address).await,
        Command::LibvirtXml { lease } => hook::xml(&bus().await?, &lease, &out).await?,
        // Answered before, since what comes of it is no answer.
        Command::Run(_) => {}
        Command::Release(args) => return release::run(&bus().await?, &args, &out).await,
        Command::Check { root } => return check::run(&HostRoot::new(root), address, &out).await,
        Command::Completions { shell } => generate::completion(shell)?,
        Command::Generate { what } => generate::files(&what)?,
    }
    Ok(ExitCode::SUCCESS)
}
