//! What of the policy has to be done before any daemon: tells udev's rules which pool a function is
//! in where no rule can say it, and keeps host drivers from what is for guests before the first
//! module loads. In the initramfs, too, so it is small. Changes overrides alone, by steps.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use libvfio::address::PciAddress;
use libvfio::host::HostRoot;
use libvfio::inventory::Inventory;
use libvfio::pci::Identity;
use libvfio::plan::{self, Circumstances, Kind, Wish};
use libvfio::policy::{self, Assignment, Facts, Mode, Policy};
use libvfio::step::Step;

/// Where the policy is.
const CONFIG: &str = "/etc/vfiod";
/// Who was at the addresses that the policy names, as the daemon has it.
const MET: &str = "/var/lib/vfiod/policy-met.json";
const USAGE: &str = "vfiod-early [ADDRESS]: print the pool of a function that is to be on VFIO, or \
                     keep host drivers from all that are";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&HostRoot::new("/"), &words) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vfiod-early: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(host: &HostRoot, words: &[String]) -> anyhow::Result<ExitCode> {
    let policy = Policy::parse(&policy::sources(Path::new(CONFIG))?)?;
    let inventory = Inventory::scan(host)?;
    let facts = Facts::read(host)?;
    let assignment = Assignment::new(&policy, &inventory, &facts);
    let known = met(host)?;
    let wish = Wish { policy: &policy, facts: &facts, assignment: &assignment, known: &known };
    match words {
        [] => Ok(keep_drivers_away(host, &inventory, &wish)),
        [address] => Ok(tell_pool(address.parse()?, &inventory, &wish)),
        _ => Err(anyhow!("{USAGE}")),
    }
}

fn met(host: &HostRoot) -> anyhow::Result<BTreeMap<PciAddress, Identity>> {
    let text = host.text(MET.trim_start_matches('/'))?;
    let parsed = text.map(|text| serde_json::from_str(&text)).transpose();
    Ok(parsed.with_context(|| format!("reading {MET}"))?.unwrap_or_default())
}

/// Prints a function's pool if it is to be on VFIO from boot on, with success then.
fn tell_pool(address: PciAddress, inventory: &Inventory, wish: &Wish<'_>) -> ExitCode {
    let leads = plan::policy_leads(inventory, wish);
    let lead = leads.iter().find(|lead| lead.members.contains(&address));
    let pool = lead.filter(|lead| lead.kind == Kind::Device).and_then(|lead| {
        let unit = plan::policy_unit(inventory, &Circumstances::default(), wish, lead)?;
        let strange = unit.reasons.iter().any(|reason| reason.code == "another-device");
        (unit.mode == Mode::Passthrough && !strange).then_some(unit.pool)
    });
    match pool {
        Some(pool) => {
            println!("{pool}");
            ExitCode::SUCCESS
        }
        None => ExitCode::FAILURE,
    }
}

/// Sets the overrides of all that no driver has yet. One that cannot be set is told of, and left for
/// provisioning.
fn keep_drivers_away(host: &HostRoot, inventory: &Inventory, wish: &Wish<'_>) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for unit in plan::policy(inventory, &Circumstances::default(), wish) {
        let strange = unit.reasons.iter().any(|reason| reason.code == "another-device");
        if unit.mode != Mode::Passthrough || strange {
            continue;
        }
        for step in &unit.steps {
            let Step::SetOverride { device, to: Some(_), .. } = step else { continue };
            if inventory.get(*device).is_none_or(|f| f.driver.is_some() || f.physical().is_some()) {
                continue;
            }
            match step.execute(host) {
                Ok(_) => println!("{step}"),
                Err(error) => {
                    eprintln!("vfiod-early: {error}");
                    code = ExitCode::FAILURE;
                }
            }
        }
    }
    code
}
