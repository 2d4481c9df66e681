//! The product at work, for people to watch.

use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::lab::product::{busctl_attach, busctl_release, lease, vfioctl};
use crate::lab::{Guest, Lab, sysfs};
use crate::machine::{GPU, GPU_AUDIO, NIC, NIC_VF};

pub(super) fn run(lab: &mut Lab) -> Result<()> {
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "0")?;
    sysfs::write(NIC.address, "sriov_numvfs", "1")?;
    let vf = sysfs::virtual_function(NIC.address, 0)?;
    let assigned = [GPU.address, GPU_AUDIO.address, &vf];
    say_bindings(lab, "the host has a GPU with an audio function and a virtual network card", &vf)?;

    let began = Instant::now();
    let gpu = busctl_attach(GPU.address, "tenant-a")?;
    let network = busctl_attach(&vf, "tenant-a")?;
    let record = lease(&gpu)?.context("the lease is not listed")?;
    lab.step(format!(
        "busctl call … Attach {} tenant-a: lease {gpu} holds {}",
        GPU.address, record["devices"]
    ))?;
    lab.step(format!("busctl call … Attach {vf} tenant-a: lease {network}"))?;
    say_bindings(lab, &format!("in {} ms all changed hands", began.elapsed().as_millis()), &vf)?;
    for line in vfioctl(["leases"])?.success()?.lines() {
        lab.step(format!("  vfioctl leases │ {line}"))?;
    }

    let mut guest = Guest::start(assigned)?;
    for (vendor, device) in [(GPU.vendor, GPU.device), (GPU_AUDIO.vendor, GPU_AUDIO.device), NIC_VF]
    {
        ensure!(guest.sees(vendor, device), "no {vendor:04x}:{device:04x} in the guest");
        lab.step(format!("the KVM guest sees {vendor:04x}:{device:04x}"))?;
    }
    let size = guest.write_video(1)?;
    lab.step(format!("it wrote {} MiB of video memory and read the same back", size >> 20))?;
    guest.power_off()?;
    lab.step("it powered off")?;

    busctl_release(&gpu)?;
    busctl_release(&network)?;
    ensure!(sysfs::driver(&vf).is_none());
    say_bindings(lab, "busctl call … Release: everything is as it was", &vf)?;
    sysfs::write(NIC.address, "sriov_numvfs", "0")?;
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "1")
}

fn say_bindings(lab: &mut Lab, what: &str, vf: &str) -> Result<()> {
    let driver = |address| sysfs::driver(address).unwrap_or_else(|| "no driver".to_owned());
    lab.step(format!(
        "{what}: {} on {}, {} on {}, {vf} on {}",
        GPU.address,
        driver(GPU.address),
        GPU_AUDIO.address,
        driver(GPU_AUDIO.address),
        driver(vf)
    ))
}
