//! The daemon's objects, introspected over a real connection, against the contract that is
//! shipped. On a described host in a temporary directory; changes nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use libvfio::client::{ManagerProxy, ROOT_PATH, device_path, group_path, lease_path};
use libvfio::host::HostRoot;
use tokio::sync::mpsc::unbounded_channel;
use vfiod::broker::Broker;
use vfiod::lease::{Lease, State};
use vfiod::service::Service;
use vfiod::stores::Stores;
use vfiod::transition::Means;
use vfiod::worker::{Deadlines, Workers};
use zbus::connection::Builder;
use zbus::fdo::IntrospectableProxy;
use zbus_xml::{ArgDirection, Interface, Node};

/// One function in one group.
fn describe(root: &Path) -> std::io::Result<()> {
    let devices = root.join("sys/devices/pci0000:00/0000:00:02.0");
    std::fs::create_dir_all(&devices)?;
    std::fs::write(devices.join("uevent"), "PCI_CLASS=38000\nPCI_ID=1234:1111\n")?;
    std::fs::create_dir_all(root.join("sys/kernel/iommu_groups/7"))?;
    symlink("../../../kernel/iommu_groups/7", devices.join("iommu_group"))?;
    let bus = root.join("sys/bus/pci/devices");
    std::fs::create_dir_all(&bus)?;
    symlink("../../../devices/pci0000:00/0000:00:02.0", bus.join("0000:00:02.0"))
}

fn failed_lease() -> Lease {
    Lease {
        id: "0badcafe".into(),
        tenant: "a".into(),
        vm: None,
        owner: 0,
        created: 1,
        state: State::Failed,
        reason: Some("0000:09:00.0 was unplugged".into()),
        failure: None,
        bound: None,
        task: None,
        skipped: vfiod::lease::Skipped::default(),
        care: BTreeMap::new(),
        interface: None,
        devices: BTreeMap::new(),
        mediated: BTreeMap::new(),
        forward: Vec::new(),
        backward: Vec::new(),
    }
}

/// Everything a caller depends on, a line each.
fn lines(interface: &Interface<'_>) -> BTreeSet<String> {
    let name = interface.name();
    let arg = |a: &zbus_xml::Arg<'_>| {
        let out = a.direction() == Some(ArgDirection::Out);
        format!("{}{}:{}", if out { "→" } else { "" }, a.name().unwrap_or("?"), a.ty())
    };
    let args = |args: &[zbus_xml::Arg<'_>]| args.iter().map(arg).collect::<Vec<_>>().join(", ");
    let methods = interface.methods().map(|m| format!("{name}.{}({})", m.name(), args(m.args())));
    let signals = interface.signals().map(|s| format!("{name}!{}({})", s.name(), args(s.args())));
    let properties = interface.properties().map(|p| {
        let emits = p
            .annotations()
            .iter()
            .find(|a| a.name() == "org.freedesktop.DBus.Property.EmitsChangedSignal")
            .map_or("true", |a| a.value());
        format!("{name}#{}:{} {:?} emits={emits}", p.name(), p.ty(), p.access())
    });
    methods.chain(signals).chain(properties).collect()
}

fn ours(node: &Node<'_>) -> BTreeSet<String> {
    let ours = node.interfaces().iter().filter(|i| i.name().starts_with("org.vfiod1."));
    ours.flat_map(lines).collect()
}

#[tokio::test]
async fn the_service_is_what_the_contract_says() {
    let dir = tempfile::tempdir().unwrap();
    describe(dir.path()).unwrap();
    let stores = Stores::open(&dir.path().join("leases"), &dir.path().join("state")).unwrap();
    stores.ledger.write(&failed_lease()).unwrap();
    let (tell, _changes) = unbounded_channel();
    let means = Means {
        host: HostRoot::new(dir.path()),
        // Nothing is carried out here.
        workers: Arc::new(Workers::new("/bin/false", dir.path())),
        deadlines: Deadlines::default(),
    };
    let broker = Broker::open(means, stores, tell.clone()).unwrap();
    let (server, client) = UnixStream::pair().unwrap();
    for end in [&server, &client] {
        end.set_nonblocking(true).unwrap();
    }
    let server = Builder::unix_stream(server).server(zbus::Guid::generate()).p2p();
    let client = Builder::unix_stream(client).p2p().build();
    let broker = Arc::new(broker);
    let (service, client) = tokio::join!(Service::connect(server, &broker, tell), client);
    let (_service, client) = (service.unwrap(), client.unwrap());

    let mut found = BTreeSet::new();
    for path in [
        ROOT_PATH.to_owned(),
        device_path("00:02.0".parse().unwrap()),
        group_path(7),
        lease_path("0badcafe"),
    ] {
        let proxy = IntrospectableProxy::builder(&client)
            .destination("org.vfiod1")
            .path(path)
            .build()
            .await
            .unwrap();
        let xml = proxy.introspect().await.unwrap();
        found.extend(ours(&Node::from_reader(xml.as_bytes()).unwrap()));
    }
    let contract = include_bytes!("../../systemd/org.vfiod1.xml");
    let contract = ours(&Node::from_reader(&contract[..]).unwrap());
    assert!(contract.len() > 30, "the contract was not read");
    let missing: Vec<_> = contract.difference(&found).collect();
    let extra: Vec<_> = found.difference(&contract).collect();
    assert!(missing.is_empty() && extra.is_empty(), "missing {missing:#?}\nextra {extra:#?}");

    let manager = ManagerProxy::new(&client).await.unwrap();
    let devices = manager.list_devices([].into()).await.unwrap();
    assert_eq!(devices.len(), 1);
    assert_eq!(devices[0].iommu_group, Some(7));
    let leases = manager.list_leases().await.unwrap();
    assert_eq!(leases[0].state, "failed");
    let error = manager.attach(&["00:02.0"], "a b", [].into()).await.unwrap_err();
    assert!(error.to_string().contains("letters, digits"), "{error}");
}
