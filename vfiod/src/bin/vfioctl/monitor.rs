//! `monitor`: what happens to leases and devices, as it happens. Listens and asks nothing, so
//! that however much happens at once, it is read.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::Pin;

use futures_core::Stream;
use libvfio::client::{BUS_NAME, ROOT_PATH};
use serde_json::{Map, Value, json};
use zbus::fdo::DBusProxy;
use zbus::message::Type;
use zbus::{MatchRule, Message, MessageStream};

use crate::bus::Bus;
use crate::json;
use crate::output::{Output, print};
use crate::table::{BOLD, Cell, PLAIN, Table};
use crate::trouble::Trouble;

const MANAGER: &str = "org.vfiod1.Manager";
const DEVICE: &str = "org.vfiod1.Device";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
const BUS: &str = "org.freedesktop.DBus";

pub(crate) async fn run(bus: &Bus, out: &Output) -> Result<(), Trouble> {
    // One stream for all, since the order between them matters.
    let mut messages = MessageStream::from(bus.connection());
    let subscriptions = DBusProxy::new(bus.connection()).await?;
    for rule in rules()? {
        subscriptions.add_match_rule(rule).await.map_err(zbus::Error::from)?;
    }
    // Has the bus start the daemon, and says so if it does not.
    bus.manager.version().await?;
    let mut watch = Watch::default();
    while let Some(message) = poll_fn(|cx| Pin::new(&mut messages).poll_next(cx)).await {
        let Some(event) = watch.see(&message?) else { continue };
        if out.json {
            print(&format!("{event}\n"))?;
        } else {
            print(&line(&event, out))?;
        }
    }
    Err(Trouble::Unavailable("the bus has gone".into()))
}

fn rules() -> zbus::Result<[MatchRule<'static>; 3]> {
    let signal = || MatchRule::builder().msg_type(Type::Signal);
    Ok([
        signal().sender(BUS_NAME).interface(MANAGER).path(ROOT_PATH).build()?,
        signal().sender(BUS_NAME).interface(PROPERTIES).add_arg(DEVICE).build()?,
        signal().sender(BUS).member("NameOwnerChanged").add_arg(BUS_NAME).build()?,
    ])
}

/// Puts together what belongs together: a device's new properties come before the word that it
/// has changed.
#[derive(Debug, Default)]
struct Watch {
    properties: BTreeMap<String, Map<String, Value>>,
}

impl Watch {
    /// The event that a message is or completes.
    fn see(&mut self, message: &Message) -> Option<Value> {
        if message.message_type() != Type::Signal {
            return None;
        }
        let header = message.header();
        let (interface, member) = (header.interface()?.as_str(), header.member()?.as_str());
        let body = message.body();
        let arguments = json::from_body(&body.deserialize().ok()?);
        match (interface, member) {
            (PROPERTIES, "PropertiesChanged") => {
                let known = self.properties.entry(header.path()?.to_string()).or_default();
                known.extend(arguments.get(1)?.as_object()?.clone());
                None
            }
            (BUS, "NameOwnerChanged") => {
                self.properties.clear();
                let stopped = arguments.get(2)?.as_str()?.is_empty();
                Some(json!({"event": if stopped { "daemon-stopped" } else { "daemon-started" }}))
            }
            (MANAGER, "LeaseChanged") => Some(json!({
                "event": "lease-changed",
                "lease": arguments.get(0)?,
                "state": arguments.get(1)?,
                "reason": arguments.get(2)?,
            })),
            (MANAGER, "DeviceAdded") => {
                Some(json!({"event": "device-added", "address": arguments}))
            }
            (MANAGER, "DeviceRemoved") => {
                Some(json!({"event": "device-removed", "address": arguments}))
            }
            (MANAGER, "DeviceChanged") => {
                let address = arguments.as_str()?.parse().ok()?;
                let path = libvfio::client::device_path(address);
                let properties = self.properties.remove(&path).unwrap_or_default();
                Some(json!({
                    "event": "device-changed",
                    "address": arguments,
                    "properties": properties,
                }))
            }
            (MANAGER, "PolicyStep") => Some(json!({
                "event": "policy-step",
                "pool": arguments.get(0)?,
                "address": arguments.get(1)?,
                "text": arguments.get(2)?,
            })),
            _ => None,
        }
    }
}

/// An event for people: what, which, and how it is now.
fn line(event: &Value, out: &Output) -> String {
    let text = |name: &str| event[name].as_str().unwrap_or_default();
    let (what, change) = text("event").split_once('-').unwrap_or_default();
    let which = if what == "lease" { text("lease") } else { text("address") };
    let news = match text("event") {
        "lease-changed" if text("reason").is_empty() => text("state").to_owned(),
        "lease-changed" => format!("{}: {}", text("state"), text("reason")),
        "policy-step" => text("text").to_owned(),
        "device-changed" => format!("changed{}", properties(&event["properties"])),
        _ => change.to_owned(),
    };
    let mut table = Table::default();
    let which = (!which.is_empty()).then(|| Cell::new(which, BOLD));
    table.push([Cell::new(what, PLAIN)].into_iter().chain(which).chain([news.into()]));
    table.render(out.screen)
}

fn properties(of: &Value) -> String {
    let text = |name: &str| of[name].as_str().filter(|text| !text.is_empty());
    let Some(properties) = of.as_object().filter(|all| !all.is_empty()) else {
        return String::new();
    };
    let driver = properties
        .contains_key("Driver")
        .then(|| format!("driver {}", text("Driver").unwrap_or("none")));
    let set = text("DriverOverride").map(|name| format!("override {name}"));
    let vfs = properties.get("EnabledVirtualFunctions").and_then(Value::as_u64);
    let vfs = vfs.filter(|vfs| *vfs > 0).map(|vfs| format!("{vfs} VFs"));
    let lease = text("Lease").and_then(|path| path.rsplit_once('/')).map(|(_, id)| id);
    let lease = lease.filter(|id| !id.is_empty()).map(|id| format!("lease {id}"));
    let quarantine = properties.contains_key("Quarantine").then(|| match text("Quarantine") {
        Some(reason) => format!("in quarantine: {reason}"),
        None => "not in quarantine".to_owned(),
    });
    let parts = [driver, set, vfs, lease, quarantine].into_iter().flatten().collect::<Vec<_>>();
    if parts.is_empty() {
        return String::new();
    }
    format!(": {}", parts.join(", "))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use serde::Serialize;
    use zbus::wire::{DynamicType, Variant};

    use super::*;
    use crate::output::Screen;

    fn signal<B: Serialize + DynamicType>(
        path: &'static str,
        interface: &'static str,
        member: &'static str,
        body: &B,
    ) -> Message {
        Message::signal(path, interface, member).build(body).unwrap()
    }

    fn told(event: &Value) -> String {
        let text = line(event, &Output { json: false, screen: Screen::default() });
        anstream::adapter::strip_str(&text).to_string()
    }

    #[test]
    fn a_changed_device_comes_with_how_it_is_now() {
        let mut watch = Watch::default();
        let path = "/org/vfiod1/device/0000_03_00_0";
        for (name, value) in [
            ("Driver", Variant::from("vfio-pci")),
            ("DriverOverride", Variant::from("")),
            ("EnabledVirtualFunctions", Variant::from(0u16)),
            ("Lease", Variant::from("/org/vfiod1/lease/3f9a2c81")),
        ] {
            let body = (DEVICE, HashMap::from([(name, value)]), Vec::<&str>::new());
            assert_eq!(watch.see(&signal(path, PROPERTIES, "PropertiesChanged", &body)), None);
        }
        let changed = signal(ROOT_PATH, MANAGER, "DeviceChanged", &("0000:03:00.0",));
        let event = watch.see(&changed).unwrap();
        assert_eq!(event["properties"]["Driver"], "vfio-pci");
        assert_eq!(
            told(&event),
            "device  0000:03:00.0  changed: driver vfio-pci, lease 3f9a2c81\n"
        );
        assert_eq!(watch.see(&changed).unwrap()["properties"], json!({}));
    }

    #[test]
    fn a_quarantine_is_told_and_its_end_too() {
        let change = |reason: &str| json!({"Quarantine": reason});
        assert_eq!(properties(&change("reset failed")), ": in quarantine: reset failed");
        assert_eq!(properties(&change("")), ": not in quarantine");
    }

    #[test]
    fn leases_devices_and_the_daemon_are_followed() {
        let mut watch = Watch::default();
        let mut see = |member: &'static str, body: &[&str]| {
            let (interface, path) =
                if member == "NameOwnerChanged" { (BUS, "/") } else { (MANAGER, ROOT_PATH) };
            let message = match *body {
                [a] => signal(path, interface, member, &(a,)),
                [a, b, c] => signal(path, interface, member, &(a, b, c)),
                _ => panic!("no such signal"),
            };
            told(&watch.see(&message).unwrap())
        };
        assert_eq!(see("LeaseChanged", &["3f9a2c81", "active", ""]), "lease  3f9a2c81  active\n");
        assert_eq!(
            see("LeaseChanged", &["3f9a2c81", "failed", "it was unplugged"]),
            "lease  3f9a2c81  failed: it was unplugged\n"
        );
        assert_eq!(see("DeviceRemoved", &["0000:03:00.0"]), "device  0000:03:00.0  removed\n");
        assert_eq!(see("DeviceAdded", &["0000:03:00.0"]), "device  0000:03:00.0  added\n");
        assert_eq!(see("NameOwnerChanged", &[BUS_NAME, ":1.7", ""]), "daemon  stopped\n");
        assert_eq!(see("NameOwnerChanged", &[BUS_NAME, "", ":1.9"]), "daemon  started\n");
    }

    #[test]
    fn signals_of_another_shape_are_no_events() {
        let mut watch = Watch::default();
        assert_eq!(watch.see(&signal(ROOT_PATH, MANAGER, "DeviceChanged", &(7u32,))), None);
        assert_eq!(watch.see(&signal(ROOT_PATH, MANAGER, "LeaseChanged", &("a",))), None);
        assert_eq!(watch.see(&signal(ROOT_PATH, MANAGER, "Other", &())), None);
    }
}
