//! A peer without any privilege that calls everything there is to call with whatever a bus lets
//! through, without end, and leaves in mid-call: each call has its answer, others are served
//! meanwhile, and the daemon does not grow. What there is to call is asked of the daemon itself.

use std::collections::HashMap;
use std::fs::File;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libvfio::client::{BUS_NAME, ManagerProxy, ROOT_PATH};
use nix::unistd::geteuid;
use tokio::task::JoinSet;
use vfiod_tests::session::{LONG, Session};
use vfiod_tests::sim::SCALE;
use zbus::Connection;
use zbus::fdo::{IntrospectableProxy, ObjectManagerProxy};
use zbus::message::{Flags, Message};
use zbus::wire::{ObjectPath, Structure, StructureBuilder, Variant};
use zbus_xml::{ArgDirection, Node};

/// Where the peer finds the bus; nobody else sets it.
const BUS: &str = "VFIOD_HOSTILE_BUS";
const NOBODY: &str = "65534";
/// Bytes of what is large. The bus keeps away messages of 32 MiB; ours are many instead.
const HUGE: usize = 1 << 20;
const FLOOD: usize = 4000;
const DISCONNECTS: usize = 100;
/// The longest text of an error that is still for a person.
const LONGEST_TEXT: usize = 4096;
/// What may be more after a second run than after a first, in KiB: what the allocator keeps of the
/// largest messages grows for some runs, to some 50 MiB in all. And descriptors.
const MEMORY: usize = 20 << 10;
const DESCRIPTORS: usize = 16;
/// How long somebody else may wait for an answer meanwhile, whatever the build and the machine.
const SLOWEST: Duration = LONG;

/// Something to call.
#[derive(Debug, Clone)]
struct Method {
    path: String,
    interface: String,
    name: String,
    /// Signatures of what it takes.
    takes: Vec<String>,
}

impl Method {
    /// What a well-meaning caller would give.
    fn harmless(&self) -> Vec<Variant<'static>> {
        self.takes.iter().map(|signature| harmless(signature)).collect()
    }
}

/// Something to read.
#[derive(Debug, Clone)]
struct Property {
    path: String,
    interface: String,
    name: String,
}

fn deep(levels: usize) -> Variant<'static> {
    (0..levels).fold(Variant::from("deep"), |inner, _| Variant::Variant(Box::new(inner)))
}

/// Values of every shape, whatever is wanted.
fn values() -> Vec<Variant<'static>> {
    vec![
        Variant::from(0u8),
        Variant::from(true),
        Variant::from(i16::MIN),
        Variant::from(u16::MAX),
        Variant::from(i32::MIN),
        Variant::from(u32::MAX),
        Variant::from(i64::MIN),
        Variant::from(u64::MAX),
        Variant::from(f64::NAN),
        Variant::from(ObjectPath::from_static_str_unchecked("/")),
        deep(1),
        deep(30),
        Variant::from(vec![0u8; 1 << 16]),
        Variant::from(vec![u64::MAX; 1000]),
        Variant::from(("a", 1u32, vec!["b"])),
        Variant::from(HashMap::from([(1u32, "a"), (2, "b")])),
    ]
}

/// Texts that mean harm, or nothing.
fn texts() -> Vec<String> {
    let texts = [
        "",
        " ",
        "\n",
        "-",
        "--",
        "*",
        "%n%s",
        "../../../etc/shadow",
        "/dev/zero",
        "\u{1b}[2J",
        "\u{202e}",
        "0000:ff:1f.7",
        "ffffffff:ff:ff.f",
        "01:00.0\n",
        "01:00.0 ",
        "gpu",
        "nic",
        "8086:1592",
        "ffff:ffff",
        "01:02.1",
    ];
    let huge = ["x".repeat(HUGE), "01:00.0,".repeat(HUGE / 8), "\n".repeat(1 << 16)];
    texts.into_iter().map(str::to_owned).chain(huge).collect()
}

/// Values of one type, as bad as they can be.
fn of_type(signature: &str) -> Vec<Variant<'static>> {
    let options = |key: &str, value: Variant<'static>| {
        Variant::from(HashMap::from([(key.to_owned(), value)]))
    };
    match signature {
        "s" => texts().into_iter().map(Variant::from).collect(),
        "as" => vec![
            Variant::from(Vec::<String>::new()),
            Variant::from(texts()),
            Variant::from(vec![""; 10_000]),
            Variant::from(vec!["01:02.1"; 257]),
            Variant::from(vec!["gpu".repeat(1 << 16); 4]),
        ],
        "a{sv}" => {
            let known = [
                "vm",
                "whole_group",
                "adopt",
                "allow_protected",
                "pid",
                "while_connected",
                "reset",
                "wait",
                "brief",
                "last",
                "lease",
                "device",
                "",
            ];
            let odd = known.iter().flat_map(|key| {
                [true.into(), u32::MAX.into(), "\u{1b}".into(), deep(20)].map(|v| options(key, v))
            });
            let many = (0..5000u32).map(|n| (n.to_string(), Variant::from(n)));
            let huge = options(&"k".repeat(HUGE), "v".repeat(HUGE).into());
            let many = Variant::from(many.collect::<HashMap<_, _>>());
            odd.chain([many, huge, Variant::from(HashMap::<String, Variant<'_>>::new())]).collect()
        }
        _ => Vec::new(),
    }
}

/// What a well-meaning caller would give for a type, if it is one we know.
fn harmless(signature: &str) -> Variant<'static> {
    match signature {
        "as" => vec!["01:02.1"].into(),
        "a{sv}" => HashMap::<String, Variant<'_>>::new().into(),
        "b" => true.into(),
        "u" => 1u32.into(),
        _ => "01:02.1".into(),
    }
}

/// Every list of arguments that a method is tried with.
fn tries(method: &Method) -> Vec<Vec<Variant<'static>>> {
    let mut tries = vec![Vec::new()];
    tries.extend(values().into_iter().map(|value| vec![value]));
    for (place, signature) in method.takes.iter().enumerate() {
        for value in of_type(signature).into_iter().chain(values()) {
            let mut arguments = method.harmless();
            arguments[place] = value;
            tries.push(arguments);
        }
    }
    let mut more = method.harmless();
    more.push("one too many".into());
    tries.push(more);
    tries
}

fn body(arguments: Vec<Variant<'static>>) -> Option<Structure<'static>> {
    let add = |all: StructureBuilder<'static>, argument| all.append_field(argument);
    let fields = arguments.into_iter().fold(StructureBuilder::new(), add);
    fields.build().ok()
}

/// Calls, and answers what the daemon did.
async fn ask(
    connection: &Connection,
    method: &Method,
    arguments: Option<&Structure<'static>>,
) -> zbus::Result<Message> {
    let Method { path, interface, name, .. } = method;
    let (bus, path, interface, name) =
        (Some(BUS_NAME), path.as_str(), Some(interface.as_str()), name.as_str());
    match arguments {
        None => connection.call_method(bus, path, interface, name, &()).await,
        Some(body) => connection.call_method(bus, path, interface, name, body).await,
    }
}

/// Calls, and wants to know nothing.
async fn tell(connection: &Connection, method: &Method) -> zbus::Result<()> {
    let call = Message::method_call(method.path.as_str(), method.name.as_str())
        .destination(BUS_NAME)
        .interface(method.interface.as_str())
        .with_flags(Flags::NO_REPLY_EXPECTED);
    let message = match body(method.harmless()) {
        None => call.build(&()),
        Some(body) => call.build(&body),
    };
    connection.send(&message?).await
}

/// Calls, and holds the answer to what an answer has to be.
async fn call(connection: &Connection, method: &Method, arguments: Vec<Variant<'static>>) {
    let arguments = body(arguments);
    let signature = arguments.as_ref().map(|body| body.signature().to_string());
    let what = format!("{}.{} {}", method.interface, method.name, signature.unwrap_or_default());
    let answer = tokio::time::timeout(LONG, ask(connection, method, arguments.as_ref())).await;
    match answer.unwrap_or_else(|_| panic!("no answer to {what}")) {
        Ok(_) => {}
        // `Display` of both is the error's name and text.
        Err(error @ (zbus::Error::MethodError(..) | zbus::Error::FDO(_))) => {
            let text = error.to_string();
            let sound = text.len() <= LONGEST_TEXT
                && !text.contains(['\u{1b}', '\u{0}'])
                && !text.contains("panicked")
                && !text.contains("fault of vfiod");
            let start: String = text.chars().take(300).collect();
            assert!(sound, "{what}: {} bytes: {start}", text.len());
            assert!(!text.contains("Error.NoReply"), "{what}: {start}");
        }
        Err(other) => panic!("{what}: {other}"),
    }
}

/// Everything there is: of each interface on one object, for the others are like it.
async fn all(connection: &Connection) -> (Vec<Method>, Vec<Property>) {
    let objects = ObjectManagerProxy::builder(connection).destination(BUS_NAME).path(ROOT_PATH);
    let objects = objects.build().await.unwrap().get_managed_objects().await.unwrap();
    let mut places: HashMap<String, String> = HashMap::new();
    let managed = objects.iter().map(|(path, interfaces)| (path.to_string(), interfaces));
    for (path, interfaces) in managed {
        for interface in interfaces.keys() {
            let place = places.entry(interface.to_string()).or_insert(path.clone());
            // The same each time.
            *place = place.clone().min(path.clone());
        }
    }
    let mut paths: Vec<String> = places.into_values().chain([ROOT_PATH.to_owned()]).collect();
    paths.sort();
    paths.dedup();
    let (mut methods, mut properties) = (Vec::new(), Vec::new());
    for path in paths {
        let proxy = IntrospectableProxy::builder(connection).destination(BUS_NAME);
        let proxy = proxy.path(path.clone()).build().await.unwrap();
        let xml = proxy.introspect().await.unwrap();
        for interface in Node::from_reader(xml.as_bytes()).unwrap().interfaces() {
            let name = interface.name().to_string();
            // What every object of every service has is tried on one.
            if !name.starts_with(BUS_NAME) && path != ROOT_PATH {
                continue;
            }
            methods.extend(interface.methods().map(|method| {
                let input = |arg: &&zbus_xml::Arg<'_>| arg.direction() != Some(ArgDirection::Out);
                let takes = method.args().iter().filter(input).map(|arg| arg.ty().to_string());
                let (path, interface) = (path.clone(), name.clone());
                Method { path, interface, name: method.name().to_string(), takes: takes.collect() }
            }));
            properties.extend(interface.properties().map(|property| Property {
                path: path.clone(),
                interface: name.clone(),
                name: property.name().to_string(),
            }));
        }
    }
    (methods, properties)
}

/// A method of `org.freedesktop.DBus.Properties` on the object of a property.
fn on_properties(property: &Property, name: &str) -> Method {
    let interface = "org.freedesktop.DBus.Properties".to_owned();
    Method { path: property.path.clone(), interface, name: name.to_owned(), takes: Vec::new() }
}

async fn every_method_and_property(connection: &Connection) -> Vec<Method> {
    let (methods, properties) = all(connection).await;
    for interface in ["Manager", "Device", "Group", "Lease"] {
        let of = |known: &String| *known == format!("org.vfiod1.{interface}");
        assert!(properties.iter().any(|property| of(&property.interface)), "no {interface}");
    }
    let mut calls = 0;
    for method in &methods {
        for arguments in tries(method) {
            call(connection, method, arguments).await;
            calls += 1;
        }
    }
    for property in &properties {
        let (interface, name) = (property.interface.as_str(), property.name.as_str());
        let get = on_properties(property, "Get");
        call(connection, &get, vec![interface.to_owned().into(), name.to_owned().into()]).await;
        let set = on_properties(property, "Set");
        for value in values() {
            let value = Variant::Variant(Box::new(value));
            let place = [interface.to_owned().into(), name.to_owned().into()];
            call(connection, &set, place.into_iter().chain([value]).collect()).await;
            calls += 1;
        }
    }
    println!("{calls} calls of {} methods, {} properties", methods.len(), properties.len());
    methods
}

/// Thousands of calls at once, half of which nobody wants an answer to.
async fn flood(connection: &Connection, methods: &[Method]) {
    let calls = Arc::new(methods.to_vec());
    let mut under_way = JoinSet::new();
    for number in 0..FLOOD {
        let (connection, calls) = (connection.clone(), calls.clone());
        under_way.spawn(async move {
            let method = &calls[number % calls.len()];
            // The bus may refuse what is too much for it.
            if number % 2 == 0 {
                let _ = ask(&connection, method, body(method.harmless()).as_ref()).await;
            } else {
                let _ = tell(&connection, method).await;
            }
        });
    }
    let all = async { while under_way.join_next().await.is_some() {} };
    tokio::time::timeout(4 * LONG, all).await.expect("a call of the flood has no answer");
}

/// Connections that go while their calls are under way.
async fn leave(address: &str, methods: &[Method]) {
    for _ in 0..DISCONNECTS {
        let connection = zbus::connection::Builder::address(address).build().await.unwrap();
        for method in methods {
            tell(&connection, method).await.unwrap();
        }
    }
}

/// The peer, in a process of its own.
#[tokio::test]
#[ignore = "it is started by the other test, as nobody"]
async fn peer() {
    let Ok(address) = std::env::var(BUS) else { return };
    let connection = zbus::connection::Builder::address(address.as_str()).build().await.unwrap();
    let methods = every_method_and_property(&connection).await;
    flood(&connection, &methods).await;
    leave(&address, &methods).await;
    // What was sent last is answered too.
    call(&connection, &methods[0], Vec::new()).await;
}

/// Runs the peer once, asking for something oneself all the time; the longest one had to wait.
async fn endure(session: &Session, manager: &ManagerProxy<'_>) -> Duration {
    // By its descriptor, for nobody may not be let into the directory of the program.
    let program = File::open(std::env::current_exe().unwrap()).unwrap();
    let mut peer = Command::new("setpriv")
        .args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "/proc/self/fd/0"])
        .args(["--exact", "peer", "--ignored", "--nocapture"])
        .env(BUS, &session.address)
        .stdin(Stdio::from(program))
        .spawn()
        .unwrap();
    let mut slowest = Duration::ZERO;
    let status = loop {
        let asked = Instant::now();
        let device = manager.describe_device("01:02.0").await.unwrap();
        assert_eq!(device.driver.as_deref(), Some("vfio-pci"));
        manager.explain("01:02.2").await.unwrap();
        slowest = slowest.max(asked.elapsed());
        if let Some(status) = peer.try_wait().unwrap() {
            break status;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(status.success(), "the peer was not served: {status}");
    // Until what nobody waits for is done as well.
    tokio::time::sleep(Duration::from_secs(1)).await;
    slowest
}

#[tokio::test]
async fn a_hostile_peer_gets_answers_and_nothing_else() {
    if !geteuid().is_root() {
        println!("not tried: only root can start another user's process");
        return;
    }
    let mut session = Session::of_many_users(&SCALE.replace("count = 200", "count = 1"));
    let connection = session.connect().await;
    let manager = ManagerProxy::new(&connection).await.unwrap();
    let (lease, _) = manager.attach(&["01:02.0"], "alice", [].into()).await.unwrap();
    let devices = manager.list_devices([].into()).await.unwrap();

    let first = endure(&session, &manager).await;
    let warm = session.usage();
    let second = endure(&session, &manager).await;
    let after = session.usage();

    println!("others waited {first:.2?} and {second:.2?} at most; {warm:?}, then {after:?}");
    assert!(session.vfiod.runs());
    assert!(first.max(second) < SLOWEST, "others waited {first:?} and {second:?}");
    let leases = manager.list_leases().await.unwrap();
    assert_eq!(leases.iter().map(|lease| &lease.id).collect::<Vec<_>>(), [&lease]);
    assert!(manager.list_quarantine().await.unwrap().is_empty());
    assert_eq!(manager.list_devices([].into()).await.unwrap(), devices);
    assert!(after.descriptors <= warm.descriptors + DESCRIPTORS, "{warm:?}, then {after:?}");
    assert!(after.memory <= warm.memory + MEMORY, "{warm:?}, then {after:?}");
}
