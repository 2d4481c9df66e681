//! `vfiod --simulate` as anyone would try it: the real programs on a bus of their own.

use std::fs::{Permissions, set_permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use libvfio::client::{LeaseProxy, ManagerProxy, Options, lease_path};
use libvfio::error::ErrorKind;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use rustix::process::Uid;
use rustix::thread::set_thread_res_uid;
use vfiod_tests::session::{LONG, Running, Session, program};
use zbus::connection::Builder;

const GPU: &str = "0000:01:00.0";
const HOST: &str = "workstation";

#[test]
fn a_simulated_host_is_listed_attached_and_released_and_says_what_it_is() {
    let session = Session::start(HOST);
    assert!(session.is_mounted());
    let (devices, note) = session.done("list");
    assert!(devices.contains(GPU) && devices.contains("nvidia"), "{devices}");
    assert_eq!(note, "simulated host 'workstation': no real devices\n");
    let (_, note) = session.done("--json list");
    assert_eq!(note, "");
    session.done("attach 10de:2684 --tenant alice");
    let (leases, note) = session.done("leases");
    assert!(leases.contains("alice") && leases.contains("0000:01:00.1"), "{leases}");
    assert!(note.contains("simulated host"), "{note}");
    let (shown, _) = session.done(&format!("show {GPU}"));
    assert!(shown.contains("vfio-pci"), "{shown}");
    session.done(&format!("release {GPU}"));
    let (shown, _) = session.done(&format!("show {GPU}"));
    assert!(shown.contains("nvidia"), "{shown}");
    let (protected, _) = session.done("tree");
    assert!(protected.contains("0000:02:00.0"), "{protected}");
    assert!(!session.vfioctl("attach 02:00.0 --tenant alice").status.success());
}

#[test]
fn a_card_that_is_shared_out_is_shown_and_leased_with_a_type() {
    let session = Session::start("vgpu");
    let (made, _) = session.done("vf set 41:00.0 4");
    assert!(made.contains("4 virtual functions: 0000:41:00.4 to 0000:41:00.7"), "{made}");
    let (shown, _) = session.done("vf show 41:00.4");
    let line = shown.lines().find(|line| line.starts_with("--vgpu-type")).expect("its types");
    assert!(line.contains("1145 (NVIDIA L40S-1B)") && line.ends_with("nvidia"), "{line}");
    let (shown, _) = session.done("--json vf show 41:00.4");
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let types = &shown["settings"][0];
    assert_eq!((&types["setting"], &types["value"]), (&"vgpu_type".into(), &"0".into()));
    assert_eq!(types["choices"][1]["name"], "NVIDIA L40S-24Q");
    let untyped = session.vfioctl("attach 41:00.4 --tenant alice");
    assert_eq!(untyped.status.code(), Some(14), "it is no good without a type");
    let attach = "attach 41:00.4 --tenant alice --vgpu-type 1145";
    let (plan, _) = session.done(&format!("{attach} --dry-run"));
    assert!(plan.contains("1. give 0000:41:00.4 vGPU type 1145 (was 0)"), "{plan}");
    session.done(attach);
    let (shown, _) = session.done("--json vf show 41:00.4");
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!((&shown["driver"], &shown["tenant"]), (&"nvidia".into(), &"alice".into()));
    assert_eq!(shown["settings"][0]["value"], "1145");
    session.done("release 41:00.4");
    session.done("vf set 41:00.0 0");
    assert_eq!(session.vfioctl("vf show 41:00.0").status.code(), Some(14), "no virtual function");
}

#[test]
fn of_several_devices_that_a_name_means_none_is_chosen() {
    let session = Session::start("hgx8");
    session.done("release gpu");
    session.done("attach 23:00.0 --tenant alice");
    for command in ["release gpu", "release gpu --dry-run", "args gpu --vmm qemu"] {
        let refused = session.vfioctl(command);
        let why = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{command}: {why}");
        assert!(why.contains("ambiguous") && why.contains("and 1 more, which"), "{why}");
    }
    // What answers to one name that only it has is meant, and so is a machine of that name.
    session.done("attach 33:00.0 --tenant bob --vm gpu");
    let (ended, _) = session.done("release gpu");
    assert!(ended.starts_with("released lease "), "{ended}");
    let (ended, _) = session.done("release 23:00.0");
    assert!(ended.starts_with("released lease "), "{ended}");
}

#[tokio::test]
async fn root_is_answered_without_a_bus_as_on_it() {
    let session = Session::start(HOST);
    let address = format!("unix:path={}", session.socket.display());
    let connection = Builder::address(address.as_str()).p2p().build().await.unwrap();
    let manager = ManagerProxy::new(&connection).await.unwrap();
    assert_eq!(manager.simulated().await.unwrap(), HOST);
    let (lease, _) = manager.attach(&[GPU], "alice", Options::new()).await.unwrap();
    let on_the_bus = ManagerProxy::new(&session.connect().await).await.unwrap();
    assert_eq!(on_the_bus.list_leases().await.unwrap()[0].id, lease);
    let record = manager.describe_lease(&lease).await.unwrap();
    assert_eq!(record, on_the_bus.describe_lease(&lease).await.unwrap());
    let unknown = manager.describe_lease("00000000").await.unwrap_err();
    assert_eq!(unknown.kind(), Some(ErrorKind::NotFound));
    let object = LeaseProxy::builder(&connection).path(lease_path(&lease)).build().await.unwrap();
    assert_eq!(object.open_devices().await.unwrap().len(), 1, "a group");
    let refused = manager.attach(&[GPU], "bob", Options::new()).await.unwrap_err();
    assert!(refused.to_string().contains("alice"), "{refused}");
    let bound = Options::from([("while_connected", true.into())]);
    let refused = manager.attach(&["02:00.0"], "bob", bound).await.unwrap_err();
    assert!(refused.to_string().contains("over the bus"), "{refused}");
    assert_eq!(manager.release(GPU, Options::new()).await.unwrap(), [lease]);
}

#[test]
fn whoever_reaches_the_daemons_own_socket_and_is_not_root_is_refused() {
    if !geteuid().is_root() {
        eprintln!("skipped: only root can be somebody else");
        return;
    }
    let session = Session::start(HOST);
    let mode = std::fs::metadata(&session.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // Had the administrator opened all that is in the way.
    set_permissions(&session.socket, Permissions::from_mode(0o666)).unwrap();
    set_permissions(session.socket.parent().unwrap(), Permissions::from_mode(0o755)).unwrap();
    assert!(greeted(&session.socket, 0));
    assert!(!greeted(&session.socket, 65534));
    session.vfiod.line_with("refused at the daemon's own socket");
}

/// Whether a user who connects is answered at all.
fn greeted(socket: &Path, user: u32) -> bool {
    let talk = || {
        let user = Uid::from_raw(user);
        // The user of this thread alone.
        set_thread_res_uid(user, user, user).unwrap();
        let mut stream = UnixStream::connect(socket).unwrap();
        let mut answer = [0; 16];
        let asked = stream.write_all(b"\0AUTH EXTERNAL 30\r\n");
        asked.and_then(|()| stream.read(&mut answer)).is_ok_and(|length| length > 0)
    };
    std::thread::scope(|scope| scope.spawn(talk).join().unwrap())
}

#[test]
fn what_happens_in_the_simulation_is_noticed_at_once() {
    let session = Session::start(HOST);
    let monitor = Running::start(
        program("vfioctl").arg("monitor").env("VFIOCTL_BUS", &session.address),
        false,
    );
    // It has subscribed when it is told of the first change; until then there is another.
    let driver = session.root.join("sys/bus/pci/drivers/snd_hda_intel");
    let started = Instant::now();
    for file in ["unbind", "bind"].into_iter().cycle() {
        std::fs::write(driver.join(file), "0000:01:00.1").unwrap();
        match monitor.lines.recv_timeout(Duration::from_millis(500)) {
            Ok(line) if line.contains("0000:01:00.1") => break,
            _ => assert!(started.elapsed() < LONG, "no change was told"),
        }
    }
}

#[test]
fn the_simulation_ends_with_its_daemon_however_that_ends() {
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGINT] {
        let mut session = Session::start(HOST);
        session.done("attach 10de:2684 --tenant alice");
        let vfiod = Pid::from_raw(session.vfiod.child.id().try_into().unwrap());
        kill(vfiod, signal).unwrap();
        let status = session.vfiod.child.wait().unwrap();
        assert_eq!(status.success(), signal != Signal::SIGKILL);
        session.gone();
    }
}

#[test]
fn a_daemon_whose_simulator_ends_says_so_and_ends() {
    let mut session = Session::start(HOST);
    kill(session.simulator(), Signal::SIGTERM).unwrap();
    session.vfiod.line_with("the simulator ended");
    assert!(!session.vfiod.child.wait().unwrap().success());
    session.gone();
}

#[test]
fn what_cannot_be_simulated_is_refused_with_a_remedy() {
    let refused = |arguments: &[&str]| {
        let output = program("vfiod").args(arguments).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let error = refused(&["--simulate", "workstation"]);
    assert!(error.contains("dbus-daemon --session --print-address --fork"), "{error}");
    let error = refused(&["--simulate", "nowhere", "--bus", "unix:path=/nowhere"]);
    assert!(error.contains("workstation, hgx8, scale, xe, vgpu"), "{error}");
    let error = refused(&["--simulate", "hgx8", "--root", "/tmp"]);
    assert!(error.contains("cannot be used with"), "{error}");
}
