//! Domains of libvirt whose devices are leased by its hooks.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::refusals::{POOL, with_policy};
use super::survival::drivers;
use crate::lab::command::{self, Ran};
use crate::lab::product::{busctl_attach, give_to_all, lease, refused, vfioctl, vfioctl_json};
use crate::lab::{Lab, sysfs, wait_until};
use crate::machine::{EDU, GPU, GPU_AUDIO, NIC};

/// How often a domain is started and ended.
const CYCLES: u32 = 20;
const LIMIT: Duration = Duration::from_secs(60);
/// A start that cannot be must not keep anybody waiting.
const FAST: Duration = Duration::from_secs(10);
const WEB: &str = "6b3c7d5e-0d3b-4e0f-9b53-1a2c3d4e5f60";
const RIVAL: &str = "0b9d3f52-6b0d-4a3f-8b57-3a7d0e3a9c11";
const DOCUMENT: &str = include_str!("../../../../docs/libvirt.md");

/// A domain that runs and never boots: what is looked at is all around it.
pub(super) fn define(name: &str, uuid: &str, tenant: Option<&str>, devices: &str) -> Result<()> {
    let lease = tenant.map(|tenant| format!("tenant='{tenant}'"));
    define_for(name, uuid, lease.as_deref(), devices)
}

/// The same, with what its metadata says of its lease.
fn define_for(name: &str, uuid: &str, lease: Option<&str>, devices: &str) -> Result<()> {
    let metadata = lease.map_or_else(String::new, |lease| {
        format!("<metadata><vfiod:lease xmlns:vfiod='urn:vfiod:lease:1' {lease}/></metadata>")
    });
    let xml = format!(
        "<domain type='kvm'><name>{name}</name><uuid>{uuid}</uuid>{metadata}\
         <memory unit='MiB'>32</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os><cpu mode='host-passthrough'/>\
         <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>\
         <controller type='usb' model='none'/><memballoon model='none'/>{devices}</devices></domain>"
    );
    let file = format!("/run/lab-{name}.xml");
    fs::write(&file, xml)?;
    command::run(["virsh", "define", &file])?.success().map(drop)
}

pub(super) fn hostdev(address: &str, managed: &str) -> Result<String> {
    let (bus, rest) = address[5..].split_once(':').context("an address")?;
    let (slot, function) = rest.split_once('.').context("an address")?;
    Ok(format!(
        "<hostdev mode='subsystem' type='pci' managed='{managed}'><source><address domain='0x0000' \
         bus='0x{bus}' slot='0x{slot}' function='0x{function}'/></source></hostdev>"
    ))
}

fn interface(address: &str) -> Result<String> {
    let hostdev = hostdev(address, "no")?;
    let source = hostdev.split_once("<source>").context("a source")?.1;
    let source = source.split_once("</source>").context("a source")?.0;
    let source = source.replace("<address ", "<address type='pci' ");
    Ok(format!("<interface type='hostdev' managed='no'><source>{source}</source></interface>"))
}

fn gpu(managed: &str) -> Result<String> {
    Ok(hostdev(GPU.address, managed)? + &hostdev(GPU_AUDIO.address, managed)?)
}

fn virsh<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Result<Ran> {
    command::run(["virsh"].into_iter().chain(arguments))
}

pub(super) fn none_leased() -> Result<bool> {
    Ok(vfioctl_json(["leases"])?.as_array().is_some_and(Vec::is_empty))
}

/// A libvirtd that has KVM, and the domains away after.
fn with_libvirt(domains: &[&str], act: impl FnOnce() -> Result<()>) -> Result<()> {
    command::run(["modprobe", "kvm_amd"])?.success()?;
    let done = act();
    for domain in domains {
        // Not running, or not there, is as it should be.
        virsh(["destroy", domain])?;
        virsh(["undefine", domain])?;
    }
    done
}

/// Started and destroyed again and again, with libvirtd restarted beside it: the GPU, which only its
/// bus resets, and a virtual function.
pub(super) fn cycles(lab: &mut Lab) -> Result<()> {
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "0")?;
    sysfs::write(NIC.address, "sriov_numvfs", "1")?;
    let vf = sysfs::virtual_function(NIC.address, 0)?;
    // libvirt gives a virtual function its address through an interface that is up.
    let link = sysfs::interface(NIC.address)?;
    command::run(["ip", "link", "set", &link, "up"])?.success()?;
    let before = drivers();
    command::run(["dmesg", "--clear"])?.success()?;
    with_libvirt(&["web"], || {
        define("web", WEB, Some("alice"), &(gpu("no")? + &interface(&vf)?))?;
        for cycle in 0..CYCLES {
            virsh(["start", "web"])?.success()?;
            let leases = vfioctl_json(["leases"])?;
            let record = leases[0].clone();
            ensure!(record["vm"] == WEB && record["tenant"] == "alice", "{leases}");
            let all = json!([vf, GPU.address, GPU_AUDIO.address]);
            ensure!(record["devices"] == all, "not all in one: {leases}");
            if cycle == 0 {
                lab.step("virsh start leased GPU, audio function and VF in one, for the tenant")?;
                held_by_libvirt(lab, record["id"].as_str().context("no id")?)?;
            }
            virsh(["destroy", "web"])?.success()?;
            ensure!(none_leased()?, "cycle {cycle}: a lease is left");
            let back = drivers() == before && sysfs::driver(&vf).is_none();
            ensure!(back, "cycle {cycle}: {:?}, not {before:?}", drivers());
            if cycle % 5 == 4 {
                lab.step(format!("{} times started and destroyed", cycle + 1))?;
            }
        }
        hears()?;
        lab.step("each time all came back, and the host's drivers found the GPU as it was")?;

        virsh(["start", "web"])?.success()?;
        command::run(["systemctl", "restart", "libvirtd"])?.success()?;
        let state = virsh(["domstate", "web"])?.success()?;
        ensure!(state.trim() == "running", "it is {state}");
        command::run(["systemctl", "stop", "vfiod"])?.success()?;
        command::run(["systemctl", "restart", "libvirtd"])?.success()?;
        let state = virsh(["domstate", "web"])?.success()?;
        ensure!(state.trim() == "running", "it is {state}");
        command::run(["systemctl", "start", "vfiod"])?.success()?;
        virsh(["destroy", "web"])?.success()?;
        ensure!(none_leased()? && drivers() == before, "it is not all back");
        lab.step("libvirtd was restarted, once beside a stopped vfiod: the domain went on")
    })?;
    command::run(["ip", "link", "set", &link, "down"])?.success()?;
    sysfs::write(NIC.address, "sriov_numvfs", "0")?;
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "1")
}

/// Whether drivers of the host got answers from the GPU each time it came back to them.
fn hears() -> Result<()> {
    // The audio function's driver looks at it after it was bound.
    std::thread::sleep(Duration::from_secs(1));
    let log = command::run(["dmesg"])?.success()?;
    let deaf = |line: &&str| ["ID mismatch", "reset timeout"].iter().any(|why| line.contains(why));
    let deaf: Vec<&str> = log.lines().filter(deaf).collect();
    ensure!(deaf.is_empty(), "the GPU came back deaf:\n{}", deaf.join("\n"));
    Ok(())
}

/// libvirt gives the nodes to a guest's user: the daemon still knows that the guest has them.
fn held_by_libvirt(lab: &mut Lab, id: &str) -> Result<()> {
    refused(&vfioctl(["release", id])?, 5, &["releasing", "qemu"])?;
    let record = lease(id)?.context("the lease has gone")?;
    ensure!(record["state"] == "releasing", "{record}");
    lab.step("a release beside the running domain waits for its QEMU")
}

/// What keeps a domain from starting, and what is left of that: nothing.
pub(super) fn refusals(lab: &mut Lab) -> Result<()> {
    let before = drivers();
    with_libvirt(&["web", "rival"], || {
        define("web", WEB, None, &gpu("no")?)?;
        define("rival", RIVAL, None, &gpu("no")?)?;
        let id = busctl_attach(GPU.address, "somebody")?;
        refused(&virsh(["start", "web"])?, 1, &[&id, "somebody"])?;
        ensure!(vfioctl_json(["leases"])?.as_array().is_some_and(|all| all.len() == 1));
        vfioctl(["release", &id])?.success()?;
        lab.step("a domain whose device is leased does not start, and its error says by whom")?;

        let start = |domain: &str| {
            Command::new("virsh")
                .args(["start", domain])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
        };
        let mut racing = [start("web")?, start("rival")?];
        let won = [racing[0].wait()?.success(), racing[1].wait()?.success()];
        ensure!(won[0] != won[1], "of two domains that race for one GPU, {won:?} won");
        let leases = vfioctl_json(["leases"])?;
        ensure!(leases.as_array().is_some_and(|all| all.len() == 1), "{leases}");
        ensure!(leases[0]["vm"] == if won[0] { WEB } else { RIVAL }, "{leases}");
        virsh(["destroy", if won[0] { "web" } else { "rival" }])?.success()?;
        ensure!(none_leased()? && drivers() == before, "it is not all back");
        lab.step("of two domains racing for one GPU one got it, and the other nothing")?;

        command::run(["systemctl", "mask", "--runtime", "--now", "vfiod"])?.success()?;
        let begun = std::time::Instant::now();
        let ran = virsh(["start", "web"]);
        let took = begun.elapsed();
        command::run(["systemctl", "unmask", "--runtime", "vfiod"])?.success()?;
        refused(&ran?, 1, &["vfiod does not start"])?;
        ensure!(took < FAST, "it took {took:?}");
        lab.step(format!("without the daemon a start fails in {took:.1?} and says why"))?;

        virsh(["undefine", "web"])?.success()?;
        define("web", WEB, Some("a b"), &gpu("no")?)?;
        refused(&virsh(["start", "web"])?, 1, &["letters, digits"])?;
        ensure!(none_leased()? && drivers() == before, "something is left");
        lab.step("a tenant that is none is refused in the same way")?;
        pools(lab)?;
        ensure!(none_leased()? && drivers() == before, "it is not all back");
        Ok(())
    })
}

/// A domain whose devices are to be of a pool.
fn pools(lab: &mut Lab) -> Result<()> {
    let again = |devices: &str| {
        virsh(["undefine", "web"])?.success()?;
        define_for("web", WEB, Some("tenant='alice' pool='lab'"), devices)
    };
    again(&gpu("no")?)?;
    refused(&virsh(["start", "web"])?, 1, &["no pool 'lab'"])?;
    with_policy(&format!("{POOL}tenants = [\"alice\"]\n"), || {
        virsh(["start", "web"])?.success()?;
        let leases = vfioctl_json(["leases"])?;
        ensure!(leases[0]["devices"] == json!([GPU.address, GPU_AUDIO.address]), "{leases}");
        virsh(["destroy", "web"])?.success()?;
        again(&(gpu("no")? + &hostdev(EDU.address, "no")?))?;
        refused(&virsh(["start", "web"])?, 1, &[EDU.address, "not in 'lab'"])
    })?;
    lab.step("a domain's devices are those of the pool it names, or it does not start")
}

/// Devices that libvirt is to manage, and a hook that is not ours.
pub(super) fn managed(lab: &mut Lab) -> Result<()> {
    let before = drivers();
    with_libvirt(&["web"], || {
        define("web", WEB, None, &gpu("yes")?)?;
        for _ in 0..2 {
            virsh(["start", "web"])?.success()?;
            let leases = vfioctl_json(["leases"])?;
            ensure!(leases[0]["vm"] == WEB && leases[0]["tenant"] == "web", "{leases}");
            virsh(["destroy", "web"])?.success()?;
            wait_until("the lease ends", LIMIT, none_leased)?;
            ensure!(drivers() == before, "drivers are {:?}, were {before:?}", drivers());
            ensure!(vfioctl_json(["quarantine"])? == json!([]), "libvirt was taken for a stranger");
        }
        lab.step("managed='yes': libvirt leaves what it finds on VFIO, and release gives it back")?;

        let id = busctl_attach(EDU.address, "tenant-a")?;
        let printed = vfioctl(["libvirt-xml", &id])?.success()?;
        vfioctl(["release", &id])?.success()?;
        give_to_all()?;
        let elements = printed.split("<!--").next().context("no elements")?;
        virsh(["undefine", "web"])?.success()?;
        define("web", WEB, None, elements)?;
        virsh(["start", "web"])?.success()?;
        ensure!(vfioctl_json(["leases"])?[0]["devices"] == json!([EDU.address]));
        virsh(["destroy", "web"])?.success()?;
        lab.step("what libvirt-xml prints makes a domain")?;
        plain(lab)
    })
}

/// The documented hook that only needs `busctl`, in place of ours.
fn plain(lab: &mut Lab) -> Result<()> {
    let (ours, theirs) = ("/etc/libvirt/hooks/qemu.d/50-vfiod", "/etc/libvirt/hooks/qemu.d/60-gpu");
    let script = DOCUMENT.split_once("```sh\n").and_then(|(_, rest)| rest.split_once("```"));
    let script = script.context("the document has no hook")?.0;
    fs::write(theirs, script)?;
    fs::set_permissions(theirs, fs::Permissions::from_mode(0o755))?;
    fs::set_permissions(ours, fs::Permissions::from_mode(0o644))?;
    virsh(["undefine", "web"])?.success()?;
    let tried = define("web", WEB, None, &gpu("no")?).and_then(|()| {
        virsh(["start", "web"])?.success()?;
        let leases = vfioctl_json(["leases"])?;
        ensure!(leases[0]["vm"] == "web" && leases[0]["tenant"] == "alice", "{leases}");
        virsh(["destroy", "web"])?.success()?;
        ensure!(none_leased()?, "the lease is left");
        Ok(())
    });
    fs::set_permissions(ours, fs::Permissions::from_mode(0o755))?;
    fs::remove_file(theirs)?;
    tried?;
    lab.step("the documented hook with busctl alone does the same")
}
