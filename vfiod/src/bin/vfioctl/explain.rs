//! `explain`: can a device be attached, and by which steps; if not, why and what to do. Also how
//! `attach --dry-run` shows a plan.

use std::fmt;

use libvfio::client::{GroupRecord, PlanRecord, ReasonRecord};

use crate::bus::Bus;
use crate::output::{Output, print, print_json};
use crate::table::{BAD, BOLD, GOOD, WARN};
use crate::trouble::Trouble;

pub(crate) async fn run(bus: &Bus, device: &str, out: &Output) -> Result<(), Trouble> {
    let reply = bus.ask("Explain", &(device,)).await?;
    if out.json {
        return print_json(&reply.json()?);
    }
    bus.note_simulation().await;
    print(&Story { asked: device, can: "be attached", plan: &reply.read()? }.to_string())
}

/// A plan or a refusal, for people.
pub(crate) struct Story<'a> {
    pub(crate) asked: &'a str,
    /// What can or cannot happen to it.
    pub(crate) can: &'a str,
    pub(crate) plan: &'a PlanRecord,
}

impl fmt::Display for Story<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { asked, can, plan } = self;
        if plan.possible {
            let devices = plan.devices.iter().chain(&plan.mediated).cloned().collect::<Vec<_>>();
            let devices = devices.join(", ");
            writeln!(f, "{GOOD}{asked} can {can}{GOOD:#}: {devices}")?;
        } else {
            writeln!(f, "{BAD}{asked} cannot {can}{BAD:#}")?;
        }
        for ReasonRecord { object, text, remedy, .. } in &plan.reasons {
            writeln!(f, "  {BOLD}{object}{BOLD:#} {text}")?;
            writeln!(f, "    remedy: {remedy}")?;
        }
        for GroupRecord { number, members, sharing, isolation, .. } in &plan.groups {
            let members = members.join(", ");
            writeln!(f, "  group {number}: {members} ({sharing}), isolation {isolation}")?;
        }
        for warning in &plan.warnings {
            writeln!(f, "  {WARN}warning:{WARN:#} {warning}")?;
        }
        for (step, n) in plan.steps.iter().zip(1..) {
            writeln!(f, "  {n}. {}", step.text)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use libvfio::client::StepRecord;

    use super::*;

    fn told(plan: &PlanRecord) -> String {
        anstream::adapter::strip_str(&Story { asked: "gpu", can: "be attached", plan }.to_string())
            .to_string()
    }

    fn group() -> GroupRecord {
        GroupRecord {
            number: 12,
            members: vec!["0000:03:00.0".into(), "0000:03:00.1".into()],
            sharing: "functions of one device".into(),
            isolation: "full".into(),
            ..GroupRecord::default()
        }
    }

    #[test]
    fn a_plan_is_its_steps_in_order() {
        let step = |text: &str| StepRecord { text: text.into(), ..StepRecord::default() };
        let plan = PlanRecord {
            possible: true,
            devices: vec!["0000:03:00.0".into()],
            groups: vec![group()],
            steps: vec![step("unbind it"), step("bind it")],
            warnings: vec!["take care".into()],
            ..PlanRecord::default()
        };
        assert_eq!(
            told(&plan),
            "gpu can be attached: 0000:03:00.0\n\
             \u{20} group 12: 0000:03:00.0, 0000:03:00.1 (functions of one device), isolation full\n\
             \u{20} warning: take care\n\
             \u{20} 1. unbind it\n\
             \u{20} 2. bind it\n"
        );
    }

    #[test]
    fn a_refusal_is_every_reason_with_its_remedy() {
        let reason = ReasonRecord {
            object: "0000:03:00.1".into(),
            text: "is on host driver x".into(),
            remedy: "move it".into(),
            ..ReasonRecord::default()
        };
        let plan = PlanRecord { reasons: vec![reason], ..PlanRecord::default() };
        assert_eq!(
            told(&plan),
            "gpu cannot be attached\n\
             \u{20} 0000:03:00.1 is on host driver x\n\
             \u{20}   remedy: move it\n"
        );
    }
}
