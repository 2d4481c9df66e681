//! What a libvirt domain takes of the host: its devices, and for whom, from the XML that libvirt
//! gives its hooks (<https://libvirt.org/formatdomain.html>). Total over text; touches nothing.

use libvfio::address::PciAddress;
use roxmltree::{Document, Node, ParsingOptions};

/// The namespace of our element in a domain's metadata:
/// `<vfiod:lease xmlns:vfiod='urn:vfiod:lease:1' tenant='alice'/>`.
pub const NAMESPACE: &str = "urn:vfiod:lease:1";
/// Most elements that a domain may have: far more than any has.
const MOST_NODES: u32 = 100_000;

/// A domain, as far as it concerns us.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Domain {
    /// Its name, which its administrator may change.
    pub name: String,
    /// Its UUID, which stays.
    pub uuid: String,
    /// Who its devices are for, if its metadata says so.
    pub tenant: Option<String>,
    /// The pool they are from, likewise.
    pub pool: Option<String>,
    /// Its PCI functions, those of its interfaces included, each once.
    pub functions: Vec<PciAddress>,
    /// UUIDs of its mediated devices.
    pub mediated: Vec<String>,
}

/// Why a text is no domain we can serve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// No XML.
    #[error("the domain's XML cannot be read: {0}")]
    Xml(String),
    /// It lacks something.
    #[error("the domain's XML has no {0}")]
    Without(&'static str),
    /// A device is not named as libvirt does.
    #[error("line {line} of the domain's XML: {what}")]
    Device {
        /// Where.
        line: u32,
        /// What is wrong.
        what: String,
    },
}

impl Domain {
    /// Reads a domain's XML.
    pub fn parse(xml: &str) -> Result<Self, Unreadable> {
        let options = ParsingOptions { nodes_limit: MOST_NODES, ..ParsingOptions::default() };
        let document = Document::parse_with_options(xml, options)
            .map_err(|e| Unreadable::Xml(e.to_string()))?;
        let root = document.root_element();
        if root.tag_name().name() != "domain" {
            return Err(Unreadable::Without("<domain>"));
        }
        let text = |name| Some(child(root, name)?.text()?.trim().to_owned());
        let mut domain = Self {
            name: text("name").ok_or(Unreadable::Without("<name>"))?,
            uuid: text("uuid").ok_or(Unreadable::Without("<uuid>"))?,
            ..Self::default()
        };
        let metadata = child(root, "metadata");
        let lease =
            metadata.and_then(|m| m.children().find(|n| n.has_tag_name((NAMESPACE, "lease"))));
        if let Some(lease) = lease {
            domain.tenant = lease.attribute("tenant").map(str::to_owned);
            domain.pool = lease.attribute("pool").map(str::to_owned);
        }
        for device in child(root, "devices").into_iter().flat_map(|devices| devices.children()) {
            domain.add(device)?;
        }
        Ok(domain)
    }

    /// Whether it takes nothing of ours.
    pub fn is_empty(&self) -> bool {
        self.functions.is_empty() && self.mediated.is_empty()
    }

    /// Who its devices are for: its own name if nobody else.
    pub fn tenant(&self) -> &str {
        self.tenant.as_deref().unwrap_or(&self.name)
    }

    /// Its devices by the names that vfiod knows them by.
    pub fn devices(&self) -> Vec<String> {
        let functions = self.functions.iter().map(ToString::to_string);
        functions.chain(self.mediated.iter().cloned()).collect()
    }

    fn add(&mut self, device: Node<'_, '_>) -> Result<(), Unreadable> {
        let kind = device.attribute("type");
        let (pci, mediated) = match device.tag_name().name() {
            "interface" => (kind == Some("hostdev"), false),
            "hostdev" if device.attribute("mode") == Some("subsystem") => {
                (kind == Some("pci"), kind == Some("mdev"))
            }
            _ => (false, false),
        };
        if !pci && !mediated {
            return Ok(());
        }
        let wrong = |what: &str| {
            let line = device.document().text_pos_at(device.range().start).row;
            Unreadable::Device { line, what: what.to_owned() }
        };
        let address = child(device, "source").and_then(|source| child(source, "address"));
        let address = address.ok_or_else(|| wrong("a device without <source><address>"))?;
        if mediated {
            let uuid = address.attribute("uuid");
            let uuid = uuid.ok_or_else(|| wrong("a mediated device without uuid"))?.to_owned();
            if !self.mediated.contains(&uuid) {
                self.mediated.push(uuid);
            }
            return Ok(());
        }
        let function = function(address).ok_or_else(|| wrong("no address of a PCI function"))?;
        if !self.functions.contains(&function) {
            self.functions.push(function);
        }
        Ok(())
    }
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

/// `domain`, `bus`, `slot` and `function`, in decimal or hexadecimal; a domain that is not given is 0.
fn function(address: Node<'_, '_>) -> Option<PciAddress> {
    let number = |name| {
        let text: &str = address.attribute(name)?;
        match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16).ok(),
            None => text.parse::<u32>().ok(),
        }
    };
    let domain = match address.attribute("domain") {
        None => 0,
        Some(_) => number("domain")?,
    };
    let byte = |name| u8::try_from(number(name)?).ok();
    PciAddress::new(domain, byte("bus")?, byte("slot")?, byte("function")?)
}

/// A function as an element of a domain, which vfiod has on VFIO already.
pub fn element(function: PciAddress) -> String {
    format!(
        "<hostdev mode='subsystem' type='pci' managed='no'>\n  <source>\n    <address \
         domain='0x{:04x}' bus='0x{:02x}' slot='0x{:02x}' function='0x{:x}'/>\n  </source>\n\
         </hostdev>\n",
        function.domain(),
        function.bus(),
        function.device(),
        function.function()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str = "<domain type='kvm'>
  <name>web</name>
  <uuid>6b3c7d5e-0d3b-4e0f-9b53-1a2c3d4e5f60</uuid>
  <metadata>
    <other:thing xmlns:other='urn:other' tenant='eve'/>
    <vfiod:lease xmlns:vfiod='urn:vfiod:lease:1' tenant='alice' pool='train'/>
  </metadata>
  <devices>
    <hostdev mode='subsystem' type='pci' managed='yes'>
      <driver name='vfio'/>
      <source><address domain='0x0000' bus='0x03' slot='0x00' function='0x0'/></source>
      <address type='pci' domain='0x0000' bus='0x05' slot='0x00' function='0x0'/>
    </hostdev>
    <hostdev mode='subsystem' type='pci'>
      <source><address bus='3' slot='0' function='1'/></source>
    </hostdev>
    <hostdev mode='subsystem' type='usb'><source><vendor id='0x1234'/></source></hostdev>
    <interface type='hostdev' managed='no'>
      <mac address='52:54:00:12:34:56'/>
      <source><address type='pci' domain='0x0000' bus='0x01' slot='0x10' function='0x0'/></source>
    </interface>
    <interface type='network'><source network='default'/></interface>
    <hostdev mode='subsystem' type='mdev' model='vfio-pci'>
      <source><address uuid='c2177883-f1bb-47f0-914d-32a22e3a8804'/></source>
    </hostdev>
  </devices>
</domain>";

    #[test]
    fn all_that_a_domain_takes_is_found_and_whose_it_is() {
        let web = Domain::parse(WEB).unwrap();
        assert_eq!(web.uuid, "6b3c7d5e-0d3b-4e0f-9b53-1a2c3d4e5f60");
        assert_eq!((web.tenant(), web.pool.as_deref()), ("alice", Some("train")));
        assert_eq!(
            web.devices(),
            [
                "0000:03:00.0",
                "0000:03:00.1",
                "0000:01:10.0",
                "c2177883-f1bb-47f0-914d-32a22e3a8804"
            ]
        );
        let plain = "<domain><name>a</name><uuid>b</uuid></domain>";
        let plain = Domain::parse(plain).unwrap();
        assert!(plain.is_empty());
        assert_eq!(plain.tenant(), "a");
    }

    #[test]
    fn what_cannot_be_understood_is_not_passed_over() {
        let refused = |from: &str, to: &str| {
            assert!(WEB.contains(from));
            Domain::parse(&WEB.replace(from, to)).unwrap_err().to_string()
        };
        assert!(refused("bus='0x03'", "bus='0x103'").contains("line 9"));
        assert!(refused("slot='0' ", "").contains("line 14"));
        assert!(refused("uuid='c2177883", "id='c2177883").contains("without uuid"));
        assert!(refused("<uuid>", "<id>").contains("cannot be read"));
        assert!(refused("<name>web</name>", "").contains("<name>"));
        for text in
            ["", "<domain", "<network/>", "<!DOCTYPE d [<!ENTITY a 'b'>]><domain>&a;</domain>"]
        {
            Domain::parse(text).unwrap_err();
        }
        for length in 0..WEB.len() {
            Domain::parse(&WEB[..length]).unwrap_err();
        }
    }

    #[test]
    fn an_element_is_read_as_the_function_it_was_made_of() {
        let function: PciAddress = "0001:81:1f.7".parse().unwrap();
        let text = format!(
            "<domain><name>a</name><uuid>b</uuid><devices>{}</devices></domain>",
            element(function)
        );
        assert_eq!(Domain::parse(&text).unwrap().functions, [function]);
    }
}
