//! `trial worker --root ROOT`: the worker of the brokers that tests start.
//!
//! `trial ROOT RECORDS [KIND=SECONDS...] attach DEVICE TENANT [SETTING=NUMBER...]|release TARGET|
//! number DEVICE N|heal DEVICE|apply|recover`: a broker that does one thing and ends once it is at nothing any more, if
//! it is not killed before. Exits with 1 and the reason if that is refused. A kind of mediated devices
//! stands for the lease that has one.
//!
//! `trial ROOT RECORDS serve`: a broker that does what each line of its input says, as above, and
//! answers each with `ok` or `error REASON`. `crash N` has it end at the N-th place from then on.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use libvfio::client::Failure;
use libvfio::error::ErrorKind;
use libvfio::shape::{Setting, Value};
use vfiod::broker::Broker;
use vfiod::lease::Lease;
use vfiod::request::{ApplyOptions, AttachOptions, ReleaseOptions};
use vfiod_tests::trial::{self, attach, attach_with, settled};

fn main() -> anyhow::Result<ExitCode> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    if let ["worker", "--root", root] = words[..] {
        vfiod::worker::serve(Path::new(root))?;
        return Ok(ExitCode::SUCCESS);
    }
    let [root, records, ref rest @ ..] = words[..] else {
        anyhow::bail!("trial ROOT RECORDS [KIND=SECONDS...] WHAT");
    };
    let deadlines = rest.iter().take_while(|word| word.contains('='));
    let deadlines: Vec<String> = deadlines.map(|&word| word.to_owned()).collect();
    let what = &rest[deadlines.len()..];
    let setting = trial::Setting::new("/proc/self/exe", Path::new(root), Path::new(records));
    let broker = trial::Setting { deadlines, ..setting }.start()?;
    if what == ["serve"] {
        serve(&broker)?;
        return Ok(ExitCode::SUCCESS);
    }
    let done = act(&broker, what)?;
    anyhow::ensure!(settled(&broker), "the broker does not come to rest");
    Ok(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    })
}

fn act(broker: &Arc<Broker>, what: &[&str]) -> anyhow::Result<Result<(), Failure>> {
    Ok(match what {
        ["attach", device, tenant] => attach(broker, device, tenant).map(drop),
        ["attach", device, tenant, settings @ ..] => {
            attach_with(broker, device, tenant, &options(settings)?).map(drop)
        }
        ["number", device, count] => {
            broker.set_virtual_functions(device.parse()?, count.parse()?, 0).map(drop)
        }
        ["release", target] => {
            let has = |lease: &Lease| lease.mediated.values().any(|of| of.to_string() == *target);
            let lease = broker.leases().into_iter().find(has).map(|lease| lease.id);
            let target = lease.as_deref().unwrap_or(target);
            broker.release(target, &ReleaseOptions::default()).map(drop)
        }
        ["heal", device] => broker.heal(device, 0).map(drop),
        ["apply"] => applied(broker),
        ["recover"] => Ok(()),
        _ => anyhow::bail!("{what:?} is nothing to try"),
    })
}

/// Does what the policy says; what fails is a failure.
fn applied(broker: &Arc<Broker>) -> Result<(), Failure> {
    let record = broker.apply_policy(&ApplyOptions::default(), 0)?;
    let failed = record.units.into_iter().find_map(|unit| unit.failure);
    failed.map_or(Ok(()), |why| Err(Failure::new(ErrorKind::Internal, why)))
}

fn options(settings: &[&str]) -> anyhow::Result<AttachOptions> {
    let mut options = AttachOptions::default();
    for word in settings {
        let (name, number) = word.split_once('=').context("SETTING=NUMBER")?;
        let setting = Setting::from_name(name).context("no such setting")?;
        options.shape.set(setting, Value::Number(number.parse()?))?;
    }
    Ok(options)
}

fn serve(broker: &Arc<Broker>) -> anyhow::Result<()> {
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let answer = match words[..] {
            ["crash", at] => {
                vfiod::crash::arm(at.parse()?);
                "ok".to_owned()
            }
            _ => match act(broker, &words)? {
                Ok(()) => "ok".to_owned(),
                Err(failure) => format!("error {}", failure.to_string().replace('\n', " ")),
            },
        };
        anyhow::ensure!(settled(broker), "the broker does not come to rest");
        let mut out = std::io::stdout().lock();
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}
