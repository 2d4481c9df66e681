//! Which scenarios a run has, and what it takes to run them: one machine and one kernel. Pure.

use anyhow::{Context, Result, ensure};
use vfiod_tests::machine::{Kernel, Purpose};
use vfiod_tests::protocol::ScenarioInfo;

/// Which scenarios to run.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Selection<'a> {
    /// Those that this kernel can show, but for those that run by name only.
    All,
    /// These, in this order.
    Named(&'a [String]),
}

/// What a run has.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Chosen {
    /// The scenarios, in this order.
    pub(super) names: Vec<String>,
    /// The machine they are for.
    pub(super) machine: Purpose,
}

impl Selection<'_> {
    /// What of the `known` scenarios is meant. What this kernel or one machine cannot show is not
    /// left out but refused.
    pub(super) fn choose(self, known: &[ScenarioInfo], kernel: Kernel) -> Result<Chosen> {
        let chosen: Vec<&ScenarioInfo> = match self {
            Self::All => {
                known.iter().filter(|s| !s.by_name && s.kernels.contains(&kernel)).collect()
            }
            Self::Named(names) => {
                names.iter().map(|name| named(known, name, kernel)).collect::<Result<_>>()?
            }
        };
        let first = chosen.first().context("no scenario to run")?;
        let other = chosen.iter().find(|scenario| scenario.machine != first.machine);
        ensure!(
            other.is_none(),
            "{} and {} are for different machines: run one, then the other",
            first.name,
            other.map_or("", |scenario| &scenario.name)
        );
        let names = chosen.iter().map(|scenario| scenario.name.clone()).collect();
        Ok(Chosen { names, machine: first.machine })
    }
}

fn named<'a>(known: &'a [ScenarioInfo], name: &str, kernel: Kernel) -> Result<&'a ScenarioInfo> {
    let found = known.iter().find(|scenario| scenario.name == name).with_context(|| {
        let names: Vec<&str> = known.iter().map(|scenario| scenario.name.as_str()).collect();
        format!("no scenario named {name}: there are {}", names.join(", "))
    })?;
    ensure!(
        found.kernels.contains(&kernel),
        "the {kernel} kernel cannot show {name}: run 'cargo xtask lab run --kernel {} {name}'",
        found.kernels.first().map_or_else(String::new, ToString::to_string)
    );
    Ok(found)
}

/// A scenario in one line of a list.
pub(super) fn line(scenario: &ScenarioInfo) -> String {
    let ScenarioInfo { name, about, kernels, by_name, .. } = scenario;
    let only = match (kernels.as_slice(), by_name) {
        ([kernel], _) => format!(" (with --kernel {kernel})"),
        (_, true) => " (by name only)".to_owned(),
        _ => String::new(),
    };
    format!("{name:<17}  {about}{only}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Vec<ScenarioInfo> {
        let both = vec![Kernel::Distribution, Kernel::Own];
        let info = |name: &str, machine, kernels: &[Kernel]| ScenarioInfo {
            name: name.to_owned(),
            about: String::new(),
            machine,
            kernels: kernels.to_vec(),
            by_name: machine != Purpose::Scenarios,
        };
        vec![
            info("bus", Purpose::Scenarios, &both),
            info("device-nodes", Purpose::Scenarios, &[Kernel::Own]),
            info("bench", Purpose::Benchmarks, &both),
        ]
    }

    fn chosen(names: &[&str], kernel: Kernel) -> Result<Vec<String>> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let selection = if names.is_empty() { Selection::All } else { Selection::Named(&names) };
        Ok(selection.choose(&known(), kernel)?.names)
    }

    #[test]
    fn all_are_those_that_the_kernel_and_the_usual_machine_can_show() {
        assert_eq!(chosen(&[], Kernel::Distribution).unwrap(), ["bus"]);
        assert_eq!(chosen(&[], Kernel::Own).unwrap(), ["bus", "device-nodes"]);
    }

    #[test]
    fn what_was_named_and_cannot_be_shown_is_an_error() {
        let refused = |names: &[&str], kernel| chosen(names, kernel).unwrap_err().to_string();
        assert!(refused(&["bsu"], Kernel::Own).contains("there are bus, device-nodes"));
        let wrong = refused(&["bus", "device-nodes"], Kernel::Distribution);
        assert!(wrong.contains("--kernel own device-nodes"), "{wrong}");
        assert!(refused(&["bus", "bench"], Kernel::Own).contains("different machines"));
        assert_eq!(chosen(&["device-nodes", "bus"], Kernel::Own).unwrap()[0], "device-nodes");
    }
}
