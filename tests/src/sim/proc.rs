//! The part of procfs that changes: processes and what they have open, routes, and the nvidia
//! driver's files. Reads the kernel's state, changes nothing.

use super::described;
use super::kernel::{Device, Kernel};
use super::open::Opener;
use super::tree::Entry;

const ROUTES: &str =
    "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";
/// The driver's own folder, with one for each card it has.
const CARDS: [&str; 3] = ["driver", "nvidia", "gpus"];

impl Kernel {
    pub(super) fn proc_entry(&self, path: &[&str]) -> Option<Entry> {
        match path {
            ["net"] => Some(Entry::Directory),
            ["net", "route"] => Some(Entry::File(0o444)),
            ["driver", rest @ ..] if path.len() <= 3 => {
                let nvidia = self.cards().next().is_some() && CARDS[1..].starts_with(rest);
                nvidia.then_some(Entry::Directory)
            }
            ["driver", "nvidia", "gpus", card, rest @ ..] => {
                let card = self.card(card)?;
                match rest {
                    [] => Some(Entry::Directory),
                    ["information"] => Some(Entry::File(0o444)),
                    ["unbindLock"] if self.has_unbind_lock(card) => Some(Entry::File(0o644)),
                    _ => None,
                }
            }
            [pid, rest @ ..] => {
                let (_, files) = self.process(pid.parse().ok()?)?;
                match rest {
                    [] | ["fd"] => Some(Entry::Directory),
                    ["comm"] => Some(Entry::File(0o444)),
                    ["fd", number] => {
                        let number: usize = number.parse().ok()?;
                        Some(Entry::Link(files.get(number.checked_sub(3)?)?.clone()))
                    }
                    _ => None,
                }
            }
            [] => None,
        }
    }

    pub(super) fn proc_names(&self, path: &[&str]) -> Vec<String> {
        match path {
            [] => {
                let mut names: Vec<String> = self.processes().map(|pid| pid.to_string()).collect();
                names.push("net".into());
                names.extend(self.cards().next().map(|_| "driver".into()));
                names
            }
            ["net"] => vec!["route".into()],
            ["driver"] => vec!["nvidia".into()],
            ["driver", "nvidia"] => vec!["gpus".into()],
            ["driver", "nvidia", "gpus"] => {
                self.cards().map(|card| card.description.address.to_string()).collect()
            }
            ["driver", "nvidia", "gpus", card] => {
                let lock = self.card(card).is_some_and(|card| self.has_unbind_lock(card));
                let names = ["information"].into_iter().chain(lock.then_some("unbindLock"));
                names.map(str::to_owned).collect()
            }
            [pid] if pid.parse::<u32>().is_ok() => vec!["comm".into(), "fd".into()],
            [pid, "fd"] => {
                let process = pid.parse().ok().and_then(|pid| self.process(pid));
                let open = process.map_or(0, |(_, files)| files.len());
                // 0 to 2 are what every process has.
                (3..open + 3).map(|number| number.to_string()).collect()
            }
            _ => Vec::new(),
        }
    }

    pub(super) fn proc_text(&self, path: &[&str]) -> Option<String> {
        match path {
            ["net", "route"] => Some(self.routes()),
            ["driver", "nvidia", "gpus", card, "information"] => {
                Some(format!("Device Minor: \t {}\n", self.minor(self.card(card)?)?))
            }
            ["driver", "nvidia", "gpus", card, "unbindLock"] => {
                Some(format!("{}\n", u8::from(self.card(card)?.unbind_lock)))
            }
            [pid, "comm"] => {
                let (command, _) = self.process(pid.parse().ok()?)?;
                Some(format!("{command}\n"))
            }
            _ => None,
        }
    }

    fn routes(&self) -> String {
        let there = |name: &&String| self.members.contains_key(&("net", (*name).clone()));
        let route =
            self.host.default_route.iter().filter(there).map(|name| {
                format!("{name}\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n")
            });
        route.fold(ROUTES.to_owned(), |all, line| all + &line)
    }

    fn cards(&self) -> impl Iterator<Item = &Device> {
        self.devices.values().filter(|d| d.driver.as_deref() == Some("nvidia"))
    }

    fn card(&self, name: &str) -> Option<&Device> {
        let device = self.devices.get(&self.find(name)?)?;
        (device.driver.as_deref() == Some("nvidia")).then_some(device)
    }

    fn has_unbind_lock(&self, card: &Device) -> bool {
        let driver = self.host.drivers.iter().find(|d| Some(&d.name) == card.driver.as_ref());
        driver.is_some_and(|driver| driver.unbind_lock)
    }

    /// The number of a card's node: the driver counts the cards that there are.
    fn minor(&self, card: &Device) -> Option<usize> {
        let ours = |d: &&Device| d.description.id.vendor == card.description.id.vendor;
        let cards = self.devices.values().filter(ours);
        let cards = cards.filter(|d| d.description.class >> 16 == 3 && d.physical.is_none());
        cards.map(|d| d.description.address).position(|at| at == card.description.address)
    }

    /// Whether somebody uses a card of NVIDIA's, so that its driver does not let it go.
    pub(super) fn is_in_use(&self, card: &Device) -> bool {
        let node = self.minor(card).map(|minor| format!("/dev/nvidia{minor}"));
        let open =
            |process: &described::Process| process.open.iter().any(|f| Some(f) == node.as_ref());
        card.description.users > 0 || self.host.processes.iter().any(open)
    }

    fn processes(&self) -> impl Iterator<Item = u32> {
        let described = self.host.processes.iter().map(|process| process.pid);
        let mut all: Vec<u32> =
            described.chain(self.open.by_process().map(|(opener, ..)| opener.pid)).collect();
        all.sort_unstable();
        all.dedup();
        all.into_iter()
    }

    /// A process's name and the files it has open, from descriptor 3 on.
    fn process(&self, pid: u32) -> Option<(String, Vec<String>)> {
        let described = self.host.processes.iter().find(|process| process.pid == pid);
        let opened = self.open.by_process().filter(|(opener, ..)| opener.pid == pid);
        let opened: Vec<(&Opener, String)> =
            opened.map(|(opener, _, path)| (opener, format!("/{path}"))).collect();
        let command = described
            .map(|process| process.command.clone())
            .or_else(|| opened.first().map(|(opener, _)| opener.command.clone()))?;
        let files = described.into_iter().flat_map(|process| process.open.clone());
        Some((command, files.chain(opened.into_iter().map(|(_, path)| path)).collect()))
    }
}
