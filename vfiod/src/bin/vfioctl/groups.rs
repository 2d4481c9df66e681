//! `groups`: what can only be given away together, and why.

use libvfio::client::GroupRecord;

use crate::bus::Bus;
use crate::output::{Output, print_json};
use crate::table::{Cell, GOOD, LEASED, PLAIN, Table};
use crate::trouble::Trouble;

pub(crate) async fn run(bus: &Bus, out: &Output) -> Result<(), Trouble> {
    let reply = bus.ask("ListGroups", &()).await?;
    if out.json {
        return print_json(&reply.json()?);
    }
    bus.note_simulation().await;
    let groups: Vec<GroupRecord> = reply.read()?;
    let nothing = "no IOMMU groups: the IOMMU is off ('vfioctl check' says what to do)";
    out.table(&table(&groups), nothing)
}

fn table(groups: &[GroupRecord]) -> Table {
    let mut table = Table::new(&["GROUP", "VIABLE", "ISOLATION", "LEASE", "MEMBERS", "SHARING"]);
    for group in groups {
        let viable = if group.viable { Cell::new("yes", GOOD) } else { Cell::new("no", PLAIN) };
        let leases = (!group.leases.is_empty()).then(|| group.leases.join(" "));
        table.push([
            group.number.to_string().into(),
            viable,
            group.isolation.as_str().into(),
            Cell::maybe(leases, LEASED),
            group.members.join(" ").into(),
            group.sharing.as_str().into(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Screen;

    #[test]
    fn a_group_is_one_line() {
        let group = GroupRecord {
            number: 12,
            members: vec!["0000:03:00.0".into(), "0000:03:00.1".into()],
            viable: true,
            isolation: "full".into(),
            sharing: "functions of one device".into(),
            leases: vec!["3f9a2c81".into()],
            ..GroupRecord::default()
        };
        let text = table(&[group]).render(Screen::default());
        assert_eq!(
            anstream::adapter::strip_str(&text).to_string(),
            "GROUP  VIABLE  ISOLATION  LEASE     MEMBERS                    SHARING\n\
             12     yes     full       3f9a2c81  0000:03:00.0 0000:03:00.1  functions of one device\n"
        );
    }
}
