//! `policy`: what is wrong with one, whom it means, and which keys there are. Reads the files and the
//! host by itself, so that a policy can be tried before any daemon has it; changes nothing.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use libvfio::client::Options;
use libvfio::error::ErrorKind;
use libvfio::host::HostRoot;
use libvfio::inventory::Inventory;
use libvfio::policy::import::{self, Found};
use libvfio::policy::{self, Assignment, Facts, Policy, Pool, Problem, Role, Source, keys};
use serde_json::{Value, json};
use vfiod::initramfs::Initramfs;
use vfiod::libvirt::Domain;
use vfiod::met::Met;
use vfiod::stores::{CONFIG, STATE};

use crate::apply;
use crate::args::{PolicyAction, PolicyFiles};
use crate::bus::Bus;
use crate::output::{Output, print, print_json};
use crate::table::{BAD, BOLD, Cell, PLAIN, Table, WARN};
use crate::trouble::Trouble;

pub(crate) fn run(action: &PolicyAction, out: &Output) -> Result<ExitCode, Trouble> {
    match action {
        PolicyAction::Check(files) => check(files, out),
        PolicyAction::Show(files) => show(files, out).map(|()| ExitCode::SUCCESS),
        PolicyAction::Schema => schema(out).map(|()| ExitCode::SUCCESS),
        PolicyAction::Import { root } => {
            import(&HostRoot::new(root), out).map(|()| ExitCode::SUCCESS)
        }
        PolicyAction::Compile(files) => compile(files, out).map(|()| ExitCode::SUCCESS),
        // Asked of the daemon.
        PolicyAction::Reload => Ok(ExitCode::SUCCESS),
    }
}

/// Has the daemon read its policy anew.
pub(crate) async fn reload(bus: &Bus, out: &Output) -> Result<(), Trouble> {
    let policy = bus.manager.reload_policy(Options::new()).await?;
    if out.json {
        return print_json(&policy.files.into());
    }
    let (files, units) = (policy.files.len(), policy.units.len());
    print(&format!(
        "{files} files read, {units} devices in pools; 'vfioctl plan' shows the rest\n"
    ))?;
    print(&apply::outdated(&policy).unwrap_or_default())
}

/// Where modprobe(8) finds options, the first place that counts first.
const MODPROBE: [&str; 4] =
    ["etc/modprobe.d", "run/modprobe.d", "usr/local/lib/modprobe.d", "usr/lib/modprobe.d"];
/// Where driverctl(8) keeps overrides.
const DRIVERCTL: &str = "etc/driverctl.d";
/// Where libvirt keeps domains.
const DOMAINS: &str = "etc/libvirt/qemu";

fn import(host: &HostRoot, out: &Output) -> Result<(), Trouble> {
    let unread = |error: libvfio::error::Error| Trouble::new(error.kind(), error.to_string());
    let inventory = Inventory::scan(host).map_err(unread)?;
    let found = found(host).map_err(unread)?;
    let proposal = import::proposal(&found, &inventory);
    if out.json {
        let found = found
            .iter()
            .map(|found| json!({"place": found.place, "what": found.what, "then": found.then}));
        let found: Vec<Value> = found.collect();
        return print_json(&json!({"found": found, "policy": proposal}));
    }
    if found.is_empty() {
        anstream::eprintln!("this host has nothing that a policy would replace");
    }
    print(&proposal)
}

fn found(host: &HostRoot) -> Result<Vec<Found>, libvfio::error::Error> {
    let files = |directory: &str| -> Result<Vec<(String, String, String)>, libvfio::error::Error> {
        let mut files = Vec::new();
        for name in host.names(directory)? {
            let path = format!("{directory}/{name}");
            if host.path(&path).is_file()
                && let Some(text) = host.text(&path)?
            {
                files.push((name, format!("/{path}"), text));
            }
        }
        Ok(files)
    };
    let mut found = Vec::new();
    for directory in MODPROBE {
        for (_, path, text) in files(directory)?.into_iter().filter(|f| ends(&f.1, "conf")) {
            found.extend(import::modprobe(&path, &text));
        }
    }
    found.extend(import::command_line(&host.proc("cmdline")?.unwrap_or_default()));
    for (name, _, text) in files(DRIVERCTL)? {
        found.extend(import::driverctl("/etc/driverctl.d", &name, &text));
    }
    for (name, path, text) in files(DOMAINS)?.into_iter().filter(|f| ends(&f.1, "xml")) {
        match Domain::parse(&text) {
            Ok(domain) => {
                found.extend(import::domain(&path, &domain.name, &domain.functions));
            }
            Err(error) => anstream::eprintln!("{WARN}{name}: {error}{WARN:#}"),
        }
    }
    Ok(found)
}

fn ends(path: &str, extension: &str) -> bool {
    Path::new(path).extension().is_some_and(|own| own == extension)
}

fn compile(files: &PolicyFiles, out: &Output) -> Result<(), Trouble> {
    let Tried { policy, inventory, facts, .. } = on_host(files)?;
    let host = HostRoot::new(&files.root);
    // Whom the host's own policy has met, and what was taken of it, root alone can read.
    let met = Met::open(&below(&host, STATE));
    let own = files.files.is_empty() && files.config == below(&host, CONFIG);
    let known = if own { met.load() } else { BTreeMap::new() };
    let rules = policy::rules(&policy, &facts, &known, &inventory.vfio_aliases);
    let taken = rules.as_deref().unwrap_or_default().as_bytes();
    let initramfs = Initramfs { rules: taken, policy: &files.config, met: &met };
    let outdated = if own { initramfs.outdated(&host).ok().flatten() } else { None };
    if out.json {
        let mut object = json!({"rules": rules.unwrap_or_default()});
        if let Some(command) = outdated {
            object["initramfs"] = command.into();
        }
        return print_json(&object);
    }
    if rules.is_none() {
        anstream::eprintln!("no pool is on VFIO from boot on, so there are no rules");
    }
    if let Some(command) = outdated {
        anstream::eprint!("{}", apply::outdated_by(command));
    }
    print(&rules.unwrap_or_default())
}

/// A path of the daemon's on a host that may be elsewhere.
fn below(host: &HostRoot, path: &str) -> PathBuf {
    host.path(path.trim_start_matches('/'))
}

/// A policy on a host.
struct Tried {
    policy: Policy,
    inventory: Inventory,
    facts: Facts,
    assignment: Assignment,
}

fn sources(files: &PolicyFiles) -> Result<Vec<Source>, Trouble> {
    let unread = |error: String| Trouble::new(ErrorKind::NotFound, error);
    if files.files.is_empty() {
        return policy::sources(&files.config).map_err(|error| unread(error.to_string()));
    }
    let read = |path: &PathBuf| {
        let text = fs::read_to_string(path);
        let text = text.map_err(|e| unread(format!("cannot read {}: {e}", path.display())))?;
        Ok(Source { name: path.display().to_string(), text })
    };
    files.files.iter().map(read).collect()
}

fn tried(policy: Policy, files: &PolicyFiles) -> Result<Tried, Trouble> {
    let host = HostRoot::new(&files.root);
    let unread = |error: libvfio::error::Error| Trouble::new(error.kind(), error.to_string());
    let inventory = Inventory::scan(&host).map_err(unread)?;
    let facts = Facts::read(&host).map_err(unread)?;
    let assignment = Assignment::new(&policy, &inventory, &facts);
    Ok(Tried { policy, inventory, facts, assignment })
}

fn check(files: &PolicyFiles, out: &Output) -> Result<ExitCode, Trouble> {
    let sources = sources(files)?;
    let wrong = ErrorKind::InvalidArgument.exit_status().into();
    let tried = match Policy::parse(&sources) {
        Ok(policy) => tried(policy, files)?,
        Err(problems) => {
            if out.json {
                let problems: Vec<Value> = problems.0.iter().map(problem).collect();
                print_json(&json!({"problems": problems, "clashes": [], "unmet": []}))?;
            } else {
                let lines = problems.0.iter().map(|problem| format!("{BAD}{problem}{BAD:#}\n"));
                print(&lines.collect::<String>())?;
            }
            return Ok(wrong);
        }
    };
    let Tried { policy, assignment, .. } = &tried;
    let clashes: Vec<String> = assignment.clashes.iter().map(ToString::to_string).collect();
    let unmet = assignment.unmet.iter();
    let unmet: Vec<String> = unmet.map(|(pool, s)| format!("pool '{pool}': {s}")).collect();
    if out.json {
        print_json(&json!({"problems": [], "clashes": clashes, "unmet": unmet}))?;
    } else {
        let bad = clashes.iter().map(|c| format!("{BAD}{c}; narrow one of them{BAD:#}\n"));
        let odd = unmet.iter().map(|u| format!("{WARN}{u}: no such device here{WARN:#}\n"));
        let count = assignment.members().count();
        let pools = policy.pools.len();
        let good = format!("nothing is wrong; pools: {pools}, functions in them: {count}\n");
        let good = clashes.is_empty().then_some(good);
        print(&bad.chain(odd).chain(good).collect::<String>())?;
    }
    Ok(if clashes.is_empty() { ExitCode::SUCCESS } else { wrong })
}

fn problem(problem: &Problem) -> Value {
    let Problem { place, text, remedy } = problem;
    json!({
        "file": place.file, "line": place.line, "column": place.column, "text": text,
        "remedy": remedy,
    })
}

/// A policy that is right, on the host.
fn on_host(files: &PolicyFiles) -> Result<Tried, Trouble> {
    let policy = Policy::parse(&sources(files)?);
    let wrong = |problems| Trouble::new(ErrorKind::InvalidArgument, format!("{problems}"));
    tried(policy.map_err(wrong)?, files)
}

fn show(files: &PolicyFiles, out: &Output) -> Result<(), Trouble> {
    let tried = on_host(files)?;
    if out.json {
        let pools: Vec<Value> = tried.policy.pools.iter().map(|pool| tried.json(pool)).collect();
        return print_json(&pools.into());
    }
    out.table(&tried.table(), "there is no pool; 'vfioctl policy schema' explains what one is")
}

impl Tried {
    fn members<'a>(&'a self, pool: &'a Pool) -> impl Iterator<Item = (Role, String)> + 'a {
        let own = |member: &policy::Member| self.policy.pools.get(member.pool) == Some(pool);
        let members = self.assignment.members().filter(move |(_, member)| own(member));
        members.map(|(address, member)| (member.role, address.to_string()))
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&["POOL", "MODE", "DEVICE", "IN IT", "DRIVER", "NAME"]);
        for pool in &self.policy.pools {
            let mut empty = true;
            for (role, address) in self.members(pool) {
                empty = false;
                let function = address.parse().ok().and_then(|at| self.inventory.get(at));
                table.push([
                    pool.name.as_str().into(),
                    pool.mode.name().into(),
                    address.into(),
                    name(role).into(),
                    Cell::maybe(function.and_then(|f| f.driver.as_deref()), PLAIN),
                    Cell::maybe(function.map(|f| self.inventory.describe(f)), PLAIN),
                ]);
            }
            if empty {
                let none = || Cell::new("-", PLAIN);
                let mode = pool.mode.name().into();
                table.push([pool.name.as_str().into(), mode, none(), none(), none(), none()]);
            }
        }
        table
    }

    fn json(&self, pool: &Pool) -> Value {
        let member =
            |(role, address): (Role, String)| json!({"address": address, "as": name(role)});
        let texts = |all: &[policy::Selector]| -> Vec<String> {
            all.iter().map(ToString::to_string).collect()
        };
        json!({
            "name": pool.name,
            "mode": pool.mode.name(),
            "place": pool.place.to_string(),
            "select": texts(&pool.select),
            "except": texts(&pool.except),
            "devices": self.members(pool).map(member).collect::<Vec<_>>(),
        })
    }
}

fn name(role: Role) -> &'static str {
    match role {
        Role::Selected => "selected",
        Role::Companion => "companion",
        Role::Physical => "physical",
        Role::Virtual => "virtual",
        Role::Kept => "kept",
    }
}

fn schema(out: &Output) -> Result<(), Trouble> {
    if !out.json {
        return print(&explained(&keys::ALL));
    }
    let key = |key: &keys::Key| {
        json!({"name": key.name, "takes": key.kind.describe(), "default": key.default,
            "about": key.about})
    };
    let section = |section: &keys::Section| {
        let keys: Vec<Value> = section.keys.iter().map(key).collect();
        json!({"title": section.title, "about": section.about, "keys": keys})
    };
    print_json(&keys::ALL.iter().map(section).collect::<Vec<_>>().into())
}

/// The keys for people, a paragraph each.
fn explained(sections: &[keys::Section]) -> String {
    let key = |key: &keys::Key| {
        let keys::Key { name, about, .. } = key;
        let (takes, about) = (key.kind.describe(), unmarked(about));
        let default = match key.default {
            "" => String::new(),
            "must be given" => ", which must be given".to_owned(),
            default => format!("; if not given: {default}"),
        };
        format!("\n  {BOLD}{name}{BOLD:#}  {takes}{default}\n      {about}\n")
    };
    let section = |section: &keys::Section| {
        let keys = section.keys.iter().map(key).collect::<Vec<_>>().concat();
        format!("{BOLD}{}{BOLD:#}\n{}\n{keys}", section.title, unmarked(section.about))
    };
    sections.iter().map(section).collect::<Vec<_>>().join("\n")
}

/// Without what only documents show: links, and the marks of code.
fn unmarked(about: &str) -> String {
    let mut text = String::new();
    let mut rest = about;
    while let Some((before, after)) = rest.split_once("](") {
        let (lead, label) = before.rsplit_once('[').unwrap_or((before, ""));
        text.extend([lead, label]);
        rest = after.split_once(')').map_or("", |(_, after)| after);
    }
    (text + rest).replace('`', "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_explained_in_plain_words() {
        let text = anstream::adapter::strip_str(&explained(&keys::ALL)).to_string();
        for key in keys::ALL.iter().flat_map(|section| section.keys) {
            assert!(text.contains(&format!("\n  {}  {}", key.name, key.kind.describe())), "{text}");
        }
        assert!(text.contains("\n[pool.NAME]\n"), "{text}");
        assert!(!text.contains("](") && !text.contains("guide.md"), "{text}");
        assert_eq!(unmarked("see [`a`](b.md) and [c](d) of `[e]`."), "see a and c of [e].");
    }
}
