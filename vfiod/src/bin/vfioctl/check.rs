//! `check`: whether this host is ready. Looks at the host through libvfio, and at the bus as any
//! caller would; changes nothing, though the bus may start vfiod.

use std::process::ExitCode;

use libvfio::client::{BUS_NAME, Failure};
use libvfio::error::ErrorKind;
use libvfio::host::HostRoot;
use libvfio::readiness::{self, Finding, Verdict};
use serde_json::json;
use zbus::fdo::DBusProxy;

use crate::bus::Bus;
use crate::output::{Output, Screen, print, print_json};
use crate::table::{BAD, Cell, GOOD, PLAIN, Table, WARN};
use crate::trouble::Trouble;

pub(crate) async fn run(
    host: &HostRoot,
    address: Option<&str>,
    out: &Output,
) -> Result<ExitCode, Trouble> {
    let mut findings = readiness::check(host);
    match Bus::connect(address).await {
        Ok(bus) => {
            findings.push(Finding::ok("bus", "connected"));
            findings.push(activation(&bus).await);
            findings.push(daemon(&bus).await);
        }
        Err(trouble) => findings.push(Finding::fail(
            "bus",
            trouble.to_string(),
            "start the system bus (systemctl start dbus)",
        )),
    }
    if out.json {
        print_json(&json!(findings))?;
    } else {
        // Remedies are to be read in full.
        print(&table(&findings).render(Screen { width: None, ..out.screen }))?;
    }
    let failed = findings.iter().any(|finding| finding.verdict == Verdict::Fail);
    Ok(if failed { ErrorKind::Internal.exit_status().into() } else { ExitCode::SUCCESS })
}

/// Whether the bus would start vfiod for a caller. Asked before anything that makes it do so.
async fn activation(bus: &Bus) -> Finding {
    let name = "activation";
    match can_be_started(bus).await {
        Ok(true) => Finding::ok(name, "the bus starts vfiod when it is called"),
        Ok(false) => Finding::warn(
            name,
            "the bus cannot start vfiod",
            "install the package's D-Bus service file, or start vfiod yourself (systemctl enable \
             --now vfiod)",
        ),
        Err(error) => Finding::warn(
            name,
            format!("the bus does not tell: {error}"),
            "look at the log of the bus (journalctl -u dbus)",
        ),
    }
}

async fn can_be_started(bus: &Bus) -> zbus::Result<bool> {
    let bus = DBusProxy::new(bus.connection()).await?;
    let names = bus.list_activatable_names().await?;
    Ok(names.iter().any(|name| name.as_str() == BUS_NAME))
}

async fn daemon(bus: &Bus) -> Finding {
    let name = "daemon";
    match bus.manager.version().await.map_err(Failure::into) {
        Ok(version) => Finding::ok(name, format!("vfiod {version} answers this user")),
        Err(trouble @ Trouble::Refused { kind: ErrorKind::NotAuthorized, .. }) => Finding::fail(
            name,
            trouble.to_string(),
            "install the package's D-Bus policy (org.vfiod1.conf) and reload the bus (systemctl \
             reload dbus)",
        ),
        Err(trouble) => Finding::fail(
            name,
            trouble.to_string(),
            "see why it does not run (journalctl -u vfiod)",
        ),
    }
}

fn table(findings: &[Finding]) -> Table {
    let mut table = Table::new(&[]);
    for finding in findings {
        let (word, style) = match finding.verdict {
            Verdict::Ok => ("ok", GOOD),
            Verdict::Info => ("info", PLAIN),
            Verdict::Warn => ("warn", WARN),
            Verdict::Fail => ("FAIL", BAD),
        };
        table.push([Cell::new(word, style), finding.name.into(), finding.detail.as_str().into()]);
        if let Some(remedy) = &finding.remedy {
            table.push(["".into(), "".into(), format!("-> {remedy}").into()]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remedy_is_below_what_it_remedies() {
        let findings = [Finding::ok("vfio", "loaded"), Finding::fail("iommu", "off", "turn it on")];
        let text = table(&findings).render(Screen::default());
        assert_eq!(
            anstream::adapter::strip_str(&text).to_string(),
            "ok    vfio   loaded\n\
             FAIL  iommu  off\n\
             \u{20}            -> turn it on\n"
        );
    }
}
