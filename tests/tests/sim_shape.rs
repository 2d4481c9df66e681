//! Settings of virtual functions against a simulated kernel: what each backend offers, what is
//! refused, what a lease sets and takes back.

use std::sync::Arc;

use libvfio::address::PciAddress;
use libvfio::client::{Failure, SettingRecord};
use libvfio::error::ErrorKind;
use libvfio::shape::{Setting, Value};
use nix::errno::Errno;
use tempfile::TempDir;
use vfiod::broker::{Asker, Broker};
use vfiod::lease::Lease;
use vfiod::request::{AttachOptions, ReleaseOptions};
use vfiod_tests::sim::{Described, Effect, Fault, Operation, Sim, VGPU, XE};
use vfiod_tests::trial::Setting as Trial;

const GPU: &str = "0000:01:00.0";
const CARD: &str = "0000:02:00.0";
const VGPU_CARD: &str = "0000:41:00.0";
const L40S_1B: u64 = 1145;
const L40S_24Q: u64 = 1157;
const L40S_48Q: u64 = 1159;

struct Host {
    sim: Sim,
    broker: Arc<Broker>,
    _records: TempDir,
}

fn number(value: u64) -> Value {
    Value::Number(value)
}

fn word(text: &str) -> Value {
    Value::Text(text.to_owned())
}

impl Host {
    fn start(host: &str) -> Self {
        let sim = Sim::mount(&Described::parse(host).unwrap()).unwrap();
        let records = tempfile::tempdir().unwrap();
        let trial = Trial::new(env!("CARGO_BIN_EXE_trial"), sim.root(), records.path());
        Self { broker: trial.start().unwrap(), sim, _records: records }
    }

    fn virtuals(&self, physical: &str) -> Vec<String> {
        let listed = self.broker.list_devices(false);
        let own = listed.iter().filter(|d| d.physical_function.as_deref() == Some(physical));
        own.map(|device| device.address.clone()).collect()
    }

    fn options(settings: &[(Setting, Value)]) -> AttachOptions {
        let mut options = AttachOptions::default();
        for (setting, value) in settings {
            options.shape.set(*setting, value.clone()).unwrap();
        }
        options
    }

    fn attach(&self, device: &str, settings: &[(Setting, Value)]) -> Result<Lease, Failure> {
        let options = Self::options(settings);
        self.broker.attach(&[device.to_owned()], "alice", &options, Asker::default())
    }

    /// The kind and the words of a refusal, after which nothing has been written.
    fn refused(&self, device: &str, settings: &[(Setting, Value)]) -> (ErrorKind, String) {
        let before = self.sim.journal().len();
        let plan = self.broker.plan(&[device.to_owned()], &Self::options(settings), 0).unwrap();
        let failure = self.attach(device, settings).unwrap_err();
        assert!(!plan.possible, "the dry run says otherwise");
        assert_eq!(self.sim.journal().len(), before, "{failure}");
        (failure.kind().unwrap(), failure.to_string())
    }

    fn release(&self, lease: &Lease) {
        self.broker.release(&lease.id, &ReleaseOptions::default()).unwrap();
        assert!(self.broker.leases().is_empty());
    }

    fn settings(&self, device: &str) -> Vec<SettingRecord> {
        self.broker.settings(device).unwrap()
    }

    fn setting(&self, device: &str, setting: Setting) -> SettingRecord {
        let all = self.settings(device).into_iter();
        all.into_iter().find(|record| record.setting == setting.name()).unwrap()
    }

    fn driver(&self, device: &str) -> Option<String> {
        let listed = self.broker.list_devices(false);
        listed.into_iter().find(|d| d.address == device).unwrap().driver
    }

    fn read(&self, device: &str, file: &str) -> String {
        let device: PciAddress = device.parse().unwrap();
        std::fs::read_to_string(self.sim.function(device).join(file)).unwrap().trim().to_owned()
    }
}

#[test]
fn each_backend_offers_what_its_files_are_for() {
    let host = Host::start(XE);
    let gpu = host.virtuals(GPU).remove(0);
    let offered = host.settings(&gpu);
    assert!(offered.iter().all(|setting| setting.backend == "xe" && setting.writable));
    let names: Vec<&str> = offered.iter().map(|setting| setting.setting.as_str()).collect();
    assert_eq!(names, ["exec_quantum", "preempt_timeout", "sched_priority", "vram_quota"]);
    let priority = host.setting(&gpu, Setting::SchedPriority);
    assert_eq!((priority.value.as_str(), priority.allowed.as_str()), ("low", "low, normal"));
    let nic = host.virtuals(CARD).remove(0);
    let vectors = host.setting(&nic, Setting::Msix);
    assert_eq!((vectors.value.as_str(), vectors.spare, vectors.most), ("12", Some(16), Some(28)));
    assert_eq!(host.settings(&nic).len(), 1, "described hosts have no rtnetlink");
    assert!(host.settings(CARD).is_empty(), "a physical function");
}

#[test]
fn vectors_are_given_while_no_driver_has_the_function_and_taken_back() {
    let host = Host::start(XE);
    let [first, second] = [0, 1].map(|at| host.virtuals(CARD)[at].clone());
    let lease = host.attach(&first, &[(Setting::Msix, number(28))]).unwrap();
    let steps: Vec<&str> = lease.forward.iter().map(|r| r.step.name()).collect();
    let shaped = steps.iter().position(|step| *step == "shape").unwrap();
    assert_eq!(steps[shaped - 1], "unbind", "{steps:?}");
    assert!(steps[shaped + 1..].contains(&"bind"), "{steps:?}");
    let now = host.broker.device(first.parse().unwrap()).unwrap();
    assert_eq!(now.msix_vectors, Some(28), "what is shown is what is");
    let (kind, why) = host.refused(&second, &[(Setting::Msix, number(13))]);
    assert_eq!(kind, ErrorKind::InvalidArgument);
    assert!(why.contains("1 to 12"), "{why}");
    host.release(&lease);
    assert_eq!(host.setting(&first, Setting::Msix).value, "12");
    assert_eq!(host.driver(&first).as_deref(), Some("mlx5_core"));
    assert_eq!(host.broker.device(first.parse().unwrap()).unwrap().msix_vectors, Some(12));
}

#[test]
fn several_at_once_stay_within_what_is_shared_out() {
    let host = Host::start(XE);
    let two = |vectors| AttachOptions {
        vf_of: Some(CARD.to_owned()),
        count: Some(2),
        ..Host::options(&[(Setting::Msix, number(vectors))])
    };
    let refused = host.broker.attach(&[], "alice", &two(21), Asker::default()).unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::InvalidArgument));
    assert!(refused.to_string().contains("16 interrupt vectors left"), "{refused}");
    let lease = host.broker.attach(&[], "alice", &two(20), Asker::default()).unwrap();
    host.release(&lease);
}

#[test]
fn an_adopted_function_keeps_its_vectors() {
    let host = Host::start(XE);
    let vf = host.virtuals(CARD).remove(0);
    let dir = host.sim.function(vf.parse().unwrap());
    std::fs::write(dir.join("driver/unbind"), &vf).unwrap();
    std::fs::write(dir.join("driver_override"), "vfio-pci").unwrap();
    std::fs::write(host.sim.root().join("sys/bus/pci/drivers_probe"), &vf).unwrap();
    host.broker.resynchronise();
    let adopt = AttachOptions { adopt: true, ..Host::options(&[(Setting::Msix, number(20))]) };
    let refused = host.broker.attach(&[vf], "alice", &adopt, Asker::default()).unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::Busy));
    assert!(refused.to_string().contains("adopt it without"), "{refused}");
}

#[test]
fn time_and_memory_are_shared_out_and_rounding_is_no_fault() {
    let host = Host::start(XE);
    let vf = host.virtuals(GPU).remove(0);
    let wanted = [
        (Setting::ExecQuantum, number(20)),
        (Setting::PreemptTimeout, number(50_000)),
        (Setting::SchedPriority, word("normal")),
        (Setting::VramQuota, number(1_000_000_000)),
    ];
    let plan = host.broker.plan(std::slice::from_ref(&vf), &Host::options(&wanted), 0).unwrap();
    let shaped: Vec<_> = plan.steps.iter().filter(|step| step.step == "shape").collect();
    assert_eq!(shaped.len(), 4);
    assert_eq!(shaped[0].text, format!("give {vf} execution quantum 20 ms (was 0)"));
    let undo = shaped[0].undo.as_deref();
    assert_eq!(undo, Some(format!("give {vf} execution quantum 0 ms (was 20)").as_str()));
    let lease = host.attach(&vf, &wanted).unwrap();
    assert_eq!(host.read(GPU, "sriov_admin/vf1/profile/exec_quantum_ms"), "20");
    assert_eq!(host.read(GPU, "sriov_admin/vf1/profile/sched_priority"), "low [normal]");
    let quota = host.read(GPU, "sriov_admin/vf1/profile/vram_quota");
    assert_eq!(quota, (477u64 * (2 << 20)).to_string(), "it was rounded up to pages");
    assert_eq!(host.read(GPU, "sriov_admin/vf2/profile/exec_quantum_ms"), "0");
    host.release(&lease);
    for file in ["exec_quantum_ms", "preempt_timeout_us", "vram_quota"] {
        assert_eq!(host.read(GPU, &format!("sriov_admin/vf1/profile/{file}")), "0");
    }
}

#[test]
fn what_cannot_be_is_refused_with_the_limits_before_anything_changes() {
    let host = Host::start(XE);
    let (gpu, nic) = (host.virtuals(GPU).remove(0), host.virtuals(CARD).remove(0));
    for (device, setting, value, kind, words) in [
        (&gpu, Setting::ExecQuantum, number(100_001), ErrorKind::InvalidArgument, "0 to 100000 ms"),
        (&gpu, Setting::SchedPriority, word("high"), ErrorKind::InvalidArgument, "low, normal"),
        (&nic, Setting::Msix, number(29), ErrorKind::InvalidArgument, "1 to 28"),
        (&gpu, Setting::Vlan, number(7), ErrorKind::Unsupported, "no network interface"),
        (&gpu, Setting::Msix, number(4), ErrorKind::Unsupported, "no interrupt vectors"),
        (&nic, Setting::VramQuota, number(1), ErrorKind::Unsupported, "sriov_admin"),
        (&nic, Setting::VgpuType, number(1), ErrorKind::Unsupported, "no vGPU types"),
        (&GPU.to_owned(), Setting::Vlan, number(7), ErrorKind::Unsupported, "no virtual function"),
    ] {
        let (found, why) = host.refused(device, &[(setting, value)]);
        assert!(why.contains(words), "{why}");
        assert_eq!(found, kind, "{why}");
    }
}

#[test]
fn a_priority_that_the_firmware_has_for_all_is_fixed() {
    let host = Host::start(&XE.replace(", priorities = true", ""));
    let vf = host.virtuals(GPU).remove(0);
    assert!(!host.setting(&vf, Setting::SchedPriority).writable);
    let (kind, why) = host.refused(&vf, &[(Setting::SchedPriority, word("normal"))]);
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(why.contains("cannot be changed"), "{why}");
    let lease = host.attach(&vf, &[(Setting::SchedPriority, word("low"))]).unwrap();
    host.release(&lease);
}

#[test]
fn what_the_driver_refuses_ends_the_attachment_and_all_is_as_before() {
    for (errno, kind, words) in [
        (Errno::EINVAL, ErrorKind::InvalidArgument, "vf show"),
        (Errno::ENOSPC, ErrorKind::Busy, "no room"),
        (Errno::EOPNOTSUPP, ErrorKind::Unsupported, "ask for less"),
        (Errno::EBUSY, ErrorKind::Busy, "in use"),
    ] {
        let host = Host::start(XE);
        let vf = host.virtuals(GPU).remove(0);
        let device = Some(vf.parse().unwrap());
        host.sim.arm(Fault {
            on: Operation::Setting,
            device,
            nth: 2,
            effect: Effect::Errno(errno),
        });
        let wanted = [(Setting::ExecQuantum, number(20)), (Setting::VramQuota, number(1 << 30))];
        let failure = host.attach(&vf, &wanted).unwrap_err();
        assert_eq!(failure.kind(), Some(kind), "{failure}");
        assert!(failure.to_string().contains(words), "{failure}");
        assert_eq!(host.read(GPU, "sriov_admin/vf1/profile/exec_quantum_ms"), "0");
        assert_eq!(host.driver(&vf).as_deref(), Some("xe"));
        assert!(host.broker.leases().is_empty());
    }
}

#[test]
fn a_vgpu_is_a_type_on_a_function_that_stays_on_its_driver() {
    let host = Host::start(VGPU);
    let card = VGPU_CARD.parse().unwrap();
    let made = host.broker.set_virtual_functions(card, 4, 0).unwrap();
    let vfs: Vec<String> = made.iter().map(ToString::to_string).collect();
    let (kind, why) = host.refused(&vfs[0], &[]);
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(why.contains("1145 (NVIDIA L40S-1B)"), "{why}");

    let wanted = [
        (Setting::VgpuType, number(L40S_24Q)),
        (Setting::VgpuParams, word("frame_rate_limiter=0")),
    ];
    let lease = host.attach(&vfs[0], &wanted).unwrap();
    let steps: Vec<&str> = lease.forward.iter().map(|r| r.step.name()).collect();
    assert_eq!(steps, ["shape", "shape", "check-viable"]);
    assert_eq!(host.read(&vfs[0], "nvidia/current_vgpu_type"), "1157");
    assert_eq!(host.read(&vfs[0], "nvidia/vgpu_params"), "frame_rate_limiter=0");
    assert_eq!(host.driver(&vfs[0]).as_deref(), Some("nvidia"));

    // What the first one took is gone for its siblings.
    let (kind, why) = host.refused(&vfs[1], &[(Setting::VgpuType, number(L40S_48Q))]);
    assert_eq!(kind, ErrorKind::InvalidArgument);
    assert!(why.contains("1157 (NVIDIA L40S-24Q)") && !why.contains("1159 ("), "{why}");
    let second = host.attach(&vfs[1], &[(Setting::VgpuType, number(L40S_24Q))]).unwrap();
    let (_, why) = host.refused(&vfs[2], &[(Setting::VgpuType, number(L40S_1B))]);
    assert!(why.contains("none is left"), "{why}");
    let refused = host.broker.set_virtual_functions(card, 0, 0).unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::AlreadyLeased));

    host.broker.release(&second.id, &ReleaseOptions::default()).unwrap();
    host.release(&lease);
    for vf in &vfs {
        assert_eq!(host.read(vf, "nvidia/current_vgpu_type"), "0");
        assert_eq!(host.driver(vf).as_deref(), Some("nvidia"));
    }
    assert!(host.broker.set_virtual_functions(card, 0, 0).unwrap().is_empty());
}

#[test]
fn a_type_that_is_gone_by_then_is_told_and_nothing_stays() {
    let host = Host::start(VGPU);
    let made = host.broker.set_virtual_functions(VGPU_CARD.parse().unwrap(), 4, 0).unwrap();
    let effect = Effect::Errno(Errno::EIO);
    host.sim.arm(Fault { on: Operation::Setting, device: Some(made[0]), nth: 1, effect });
    let vf = made[0].to_string();
    let failure = host.attach(&vf, &[(Setting::VgpuType, number(L40S_1B))]).unwrap_err();
    assert_eq!(failure.kind(), Some(ErrorKind::Busy));
    assert!(failure.to_string().contains("no room"), "{failure}");
    assert_eq!(host.read(&vf, "nvidia/current_vgpu_type"), "0");
}

#[test]
fn a_type_that_somebody_else_clears_fails_the_lease() {
    let host = Host::start(VGPU);
    let made = host.broker.set_virtual_functions(VGPU_CARD.parse().unwrap(), 4, 0).unwrap();
    let vf = made[0].to_string();
    let lease = host.attach(&vf, &[(Setting::VgpuType, number(L40S_1B))]).unwrap();
    std::fs::write(host.sim.function(made[0]).join("nvidia/current_vgpu_type"), "0").unwrap();
    host.broker.notice([made[0]]);
    let failed = || host.broker.lease(&lease.id).is_some_and(|l| l.state.name() == "failed");
    assert!(vfiod_tests::trial::eventually(failed), "{:?}", host.broker.leases());
}

#[test]
fn nvidias_program_makes_all_or_none() {
    let host = Host::start(VGPU);
    let card = VGPU_CARD.parse().unwrap();
    let refused = host.broker.set_virtual_functions(card, 2, 0).unwrap_err();
    assert_eq!(refused.kind(), Some(ErrorKind::InvalidArgument));
    assert!(refused.to_string().contains("0 or 4"), "{refused}");
    let plan = host.broker.plan_virtual_functions(card, 4).unwrap();
    assert_eq!(plan.steps.len(), 1, "{plan:?}");
    assert!(plan.steps[0].text.contains("with sriov-manage"), "{plan:?}");
    assert_eq!(host.broker.set_virtual_functions(card, 4, 0).unwrap().len(), 4);
    let vfs = host.virtuals(VGPU_CARD);
    assert!(vfs.iter().all(|vf| host.driver(vf).as_deref() == Some("nvidia")));
    let written = host.sim.journal();
    assert!(written.iter().all(|write| !write.path.ends_with("sriov_numvfs")), "{written:?}");
    assert!(host.broker.set_virtual_functions(card, 0, 0).unwrap().is_empty());
}
