//! Who may end whose lease: the real programs as several users on a bus of their own, where the test
//! plays polkit.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::process::Output;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use nix::unistd::geteuid;
use serde_json::Value;
use vfiod_tests::session::{LONG, Session};
use vfiod_tests::sim::SCALE;
use zbus::wire::OwnedVariant;

/// Users that every Debian has: a bus takes none that it does not know (bin and daemon).
const ALICE: u32 = 2;
const BOB: u32 = 1;
/// What ends with this was not for that user to do.
const NOT_AUTHORIZED: i32 = 4;

/// What polkit allows anybody.
type Allowed = Arc<Mutex<BTreeSet<&'static str>>>;

/// As much of polkit as the daemon asks.
struct Polkit(Allowed);

#[zbus::interface(name = "org.freedesktop.PolicyKit1.Authority", introspection_docs = false)]
impl Polkit {
    fn check_authorization(
        &self,
        subject: (String, HashMap<String, OwnedVariant>),
        action: &str,
        details: HashMap<String, String>,
        flags: u32,
        cancellation: &str,
    ) -> ((bool, bool, HashMap<String, String>),) {
        // Whoever asks, and for what: it is all the same.
        drop((subject, details, flags, cancellation));
        let allowed = self.0.lock().unwrap().contains(action);
        ((allowed, false, HashMap::new()),)
    }
}

/// Polkit on the session's bus, on a thread of its own until the test ends.
fn polkit(session: &Session) -> Allowed {
    let allowed = Allowed::default();
    let (polkit, address) = (Polkit(allowed.clone()), session.address.clone());
    let (ready, is_ready) = channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let place = "/org/freedesktop/PolicyKit1/Authority";
            let builder = zbus::connection::Builder::address(address.as_str());
            let builder = builder.name("org.freedesktop.PolicyKit1");
            let connection = builder.serve_at(place, polkit).build().await.unwrap();
            ready.send(()).unwrap();
            connection.closed().await;
        });
    });
    is_ready.recv_timeout(LONG).unwrap();
    allowed
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// All leases and their owners, the highest first.
fn leases(session: &Session) -> Vec<(String, u64)> {
    let listed: Value = serde_json::from_str(&session.done("--json leases").0).unwrap();
    let lease = |lease: &Value| {
        (lease["id"].as_str().unwrap().to_owned(), lease["owner"].as_u64().unwrap())
    };
    let mut all: Vec<(String, u64)> = listed.as_array().unwrap().iter().map(lease).collect();
    all.sort_by_key(|(_, owner)| Reverse(*owner));
    all
}

#[test]
fn whoever_made_a_lease_ends_it_and_nobody_else() {
    if !geteuid().is_root() {
        println!("not tried: only root can start another user's process");
        return;
    }
    let session = Session::of_many_users(&SCALE.replace("count = 200", "count = 1"));
    let allowed = polkit(&session);
    let done = |user: u32, line: &str| {
        let output = session.vfioctl_as(user, line);
        assert!(output.status.success(), "{line}: {}", said(&output));
    };
    let refused = |user: u32, line: &str| {
        let before = leases(&session);
        let output = session.vfioctl_as(user, line);
        assert_eq!(output.status.code(), Some(NOT_AUTHORIZED), "{line}: {}", said(&output));
        assert!(said(&output).contains("org.vfiod1.release"), "{line}: {}", said(&output));
        assert_eq!(leases(&session), before, "{line}");
    };

    let output = session.vfioctl_as(ALICE, "attach 01:02.1 --tenant a");
    assert_eq!(output.status.code(), Some(NOT_AUTHORIZED), "{}", said(&output));
    allowed.lock().unwrap().insert("org.vfiod1.attach");
    done(ALICE, "attach 01:02.1 --tenant a --vm web");
    done(BOB, "attach 01:02.2 --tenant b --vm web");
    session.done("attach 01:02.3 --tenant c --vm own");
    allowed.lock().unwrap().clear();
    let made = leases(&session);
    let owners: Vec<u64> = made.iter().map(|(_, owner)| *owner).collect();
    assert_eq!(owners, [ALICE.into(), BOB.into(), 0]);

    // By device, by lease, and by a virtual machine in which another has a device, too.
    refused(BOB, "release 01:02.1");
    refused(BOB, &format!("release {}", made[0].0));
    refused(BOB, "release web");
    refused(ALICE, "release own");
    // What would be the next tenant's risk is not the owner's to take.
    refused(ALICE, "release 01:02.1 --no-reset");

    done(ALICE, "release 01:02.1");
    assert_eq!(leases(&session), made[1..]);
    done(ALICE, "release 01:02.1");
    done(BOB, "release web");
    assert_eq!(leases(&session), made[2..]);
    allowed.lock().unwrap().insert("org.vfiod1.release");
    done(ALICE, "release own --no-reset");
    assert!(leases(&session).is_empty());
}
