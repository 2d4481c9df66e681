//! From the host to a guest and back, by the bus and by the command line.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::lab::product::{
    busctl, busctl_attach, busctl_release, device, lease, refused, vfioctl, vfioctl_json,
};
use crate::lab::{Guest, Lab, command, sysfs, wait_until};
use crate::machine::{GPU, GPU_AUDIO, NIC, NIC_VF};

/// Letting go takes a guest's kernel and the host's some time under emulation.
const RELEASE_LIMIT: Duration = Duration::from_secs(30);

/// A tenant that no other scenario uses.
const TENANT: &str = "tenant-a";

/// Enables one virtual function of the NIC without offering it to a host driver.
fn bare_virtual_function() -> Result<String> {
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "0")?;
    sysfs::write(NIC.address, "sriov_numvfs", "1")?;
    sysfs::virtual_function(NIC.address, 0)
}

fn no_virtual_functions() -> Result<()> {
    sysfs::write(NIC.address, "sriov_numvfs", "0")?;
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "1")
}

/// The GPU by one function's address, a virtual function, a guest with both, and all back.
pub(super) fn bus(lab: &mut Lab) -> Result<()> {
    let vf = bare_virtual_function()?;
    let before = [GPU, GPU_AUDIO].map(|f| sysfs::driver(f.address));
    ensure!(before.iter().all(Option::is_some), "the GPU has no host driver: {before:?}");

    let gpu = busctl_attach(GPU.address, TENANT)?;
    let network = busctl_attach(&vf, TENANT)?;
    for address in [GPU.address, GPU_AUDIO.address, &vf] {
        ensure!(sysfs::driver(address).as_deref() == Some("vfio-pci"), "{address} is not bound");
    }
    let record = lease(&gpu)?.context("the lease is not listed")?;
    ensure!(record["devices"] == serde_json::json!([GPU.address, GPU_AUDIO.address]), "{record}");
    ensure!(record["state"] == "active" && record["tenant"] == TENANT, "{record}");
    lab.step(format!("busctl attached {} and with it {}", GPU.address, GPU_AUDIO.address))?;

    let mut guest = Guest::start([GPU.address, GPU_AUDIO.address, &vf])?;
    for (vendor, device) in [(GPU.vendor, GPU.device), (GPU_AUDIO.vendor, GPU_AUDIO.device), NIC_VF]
    {
        ensure!(guest.sees(vendor, device), "no {vendor:04x}:{device:04x} in the guest");
    }
    let size = guest.write_video(7)?;
    lab.step(format!("a guest saw all three and held a pattern in {size} bytes of video memory"))?;

    let busy = busctl("Release", ["sa{sv}", GPU_AUDIO.address, "0"])?;
    refused(&busy, 1, &["releasing", "qemu", "ends by itself"])?;
    let record = lease(&gpu)?.context("the lease has gone")?;
    ensure!(record["state"] == "releasing", "{record}");
    guest.write_video(8)?;
    lab.step("a release by the other function waits for QEMU, which it names and leaves alone")?;
    guest.power_off()?;
    wait_until("the release ends", RELEASE_LIMIT, || Ok(lease(&gpu)?.is_none()))?;
    ensure!(busctl_release(&network)? == [network.as_str()]);
    ensure!(busctl_release(&network)?.is_empty(), "a second release ended something");
    let after = [GPU, GPU_AUDIO].map(|f| sysfs::driver(f.address));
    ensure!(after == before, "drivers were {before:?} and are {after:?}");
    ensure!(sysfs::driver(&vf).is_none() && sysfs::driver_override(&vf)?.is_none());
    lab.step("released: the drivers found before are back, the function without one has none")?;
    no_virtual_functions()
}

/// The same with the command line.
pub(super) fn command_line(lab: &mut Lab) -> Result<()> {
    let vf = bare_virtual_function()?;
    let listed = vfioctl_json(["list"])?;
    ensure!(listed.as_array().is_some_and(|all| all.iter().any(|d| d["address"] == vf.as_str())));

    let plan = vfioctl(["attach", "gpu", "--tenant", TENANT, "--dry-run"])?.success()?;
    for word in [GPU.address, GPU_AUDIO.address, "vfio-pci", "driver_override"] {
        ensure!(plan.contains(word), "the dry run does not say {word}:\n{plan}");
    }
    ensure!(sysfs::driver(GPU.address).as_deref() != Some("vfio-pci"), "a dry run changed it");
    lab.step("a dry run showed the steps and changed nothing")?;

    let vm = "6b3c7d5e-0d3b-4e0f-9b53-1a2c3d4e5f60";
    vfioctl(["attach", "gpu", &vf, "--tenant", TENANT, "--vm", vm])?.success()?;
    let shown = vfioctl(["list"])?.success()?;
    ensure!(shown.contains(TENANT), "the list does not name the tenant:\n{shown}");
    for command in ["tree", "groups", "leases"] {
        let text = vfioctl([command])?.success()?;
        ensure!(text.contains("03:00.0"), "{command} does not show the GPU:\n{text}");
    }
    vfioctl(["show", GPU.address])?.success()?;
    lab.step("vfioctl attached both for a virtual machine and shows it everywhere")?;

    let mut guest = Guest::start([GPU.address, GPU_AUDIO.address, &vf])?;
    guest.write_video(8)?;
    guest.power_off()?;
    vfioctl(["release", vm])?.success()?;
    vfioctl(["release", vm])?.success()?;
    ensure!(sysfs::driver(GPU.address).as_deref() != Some("vfio-pci"));
    lab.step("a guest ran; one release by its uuid gave all back, a second found nothing to do")?;
    no_virtual_functions()
}

/// Whatever the host had set, a release brings back: no driver, or an override of its own.
pub(super) fn restore(lab: &mut Lab) -> Result<()> {
    sysfs::write(GPU.address, "driver/unbind", GPU.address)?;
    let id = busctl_attach(GPU.address, TENANT)?;
    busctl_release(&id)?;
    ensure!(sysfs::driver(GPU.address).is_none(), "a driver came from nowhere");
    ensure!(sysfs::driver_override(GPU.address)?.is_none());
    lab.step("a function without a driver has none again")?;

    command::run(["modprobe", "pci-stub"])?.success()?;
    sysfs::bind(GPU.address, Some("pci-stub"))?;
    let id = busctl_attach(GPU.address, TENANT)?;
    ensure!(sysfs::driver(GPU.address).as_deref() == Some("vfio-pci"));
    busctl_release(&id)?;
    ensure!(sysfs::driver_override(GPU.address)?.as_deref() == Some("pci-stub"));
    ensure!(sysfs::driver(GPU.address).as_deref() == Some("pci-stub"));
    lab.step("an override of the host's own is back, and its driver")?;

    sysfs::bind(GPU.address, Some("vfio-pci"))?;
    let ran = busctl("Attach", ["assa{sv}", "1", GPU.address, TENANT, "0"])?;
    refused(&ran, 1, &["somebody else", "adopt"])?;
    let adopt = ["assa{sv}", "1", GPU.address, TENANT, "1", "adopt", "b", "true"];
    busctl("Attach", adopt)?.success()?;
    busctl_release(GPU.address)?;
    ensure!(sysfs::driver(GPU.address).as_deref() == Some("vfio-pci"), "it was not ours to take");
    lab.step("a device somebody else put on VFIO is refused, or adopted and left there")?;
    sysfs::bind(GPU.address, None)
}

/// One device, two tenants: one has it.
pub(super) fn leased(lab: &mut Lab) -> Result<()> {
    let id = busctl_attach(GPU.address, TENANT)?;
    let ran = busctl("Attach", ["assa{sv}", "1", GPU_AUDIO.address, "tenant-b", "0"])?;
    refused(&ran, 1, &[&id, TENANT])?;
    // `busctl` does not print an error's name, `vfioctl` turns it into a status.
    let ran = vfioctl(["attach", GPU.address, "--tenant", "tenant-b"])?;
    refused(&ran, 8, &[&id, TENANT])?;
    let explained = vfioctl(["explain", GPU.address])?;
    ensure!(format!("{}{}", explained.stdout, explained.stderr).contains(&id));
    busctl_release(&id)?;
    lab.step("the second tenant was told who has it and by which lease")
}

/// A virtual function that a host driver took because autoprobe is on.
pub(super) fn autoprobe(lab: &mut Lab) -> Result<()> {
    command::run(["modprobe", "igbvf"])?.success()?;
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "1")?;
    sysfs::write(NIC.address, "sriov_numvfs", "2")?;
    let vf = sysfs::virtual_function(NIC.address, 1)?;
    command::run(["udevadm", "settle"])?.success()?;
    ensure!(sysfs::driver(&vf).as_deref() == Some("igbvf"), "{:?}", sysfs::driver(&vf));
    let record = device(&vf)?.context("the daemon has not noticed the virtual function")?;
    ensure!(record["driver"] == "igbvf", "{record}");
    lab.step(format!("{vf} appeared by itself and igbvf took it"))?;

    let ran = vfioctl(["attach", NIC.address, "--tenant", TENANT])?;
    refused(&ran, 5, &["2 virtual functions", "vf set"])?;
    lab.step("its physical function is refused while it has virtual ones, with the way out")?;

    busctl_attach(&vf, TENANT)?;
    ensure!(sysfs::driver(&vf).as_deref() == Some("vfio-pci"));
    busctl_release(&vf)?;
    ensure!(sysfs::driver(&vf).as_deref() == Some("igbvf"));
    ensure!(sysfs::driver_override(&vf)?.is_none());
    lab.step("it was leased and is with igbvf again")?;

    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "0")?;
    busctl_attach(&vf, TENANT)?;
    busctl_release(&vf)?;
    ensure!(sysfs::driver(&vf).as_deref() == Some("igbvf"), "autoprobe off lost its driver");
    ensure!(sysfs::driver_override(&vf)?.is_none());
    lab.step("and also with autoprobe turned off in between")?;
    no_virtual_functions()
}
