//! Proves the lab without the product: whatever fails later is the product's doing.

use anyhow::{Result, ensure};

use crate::lab::{Guest, Lab, command, sysfs};
use crate::machine::{
    FAR_NIC, FUNCTIONS, GPU, GPU_AUDIO, NIC, NIC_VF, SHARED_DISK, SHARED_NIC, SWITCH_NIC_A,
    SWITCH_NIC_B,
};

pub(super) fn run(lab: &mut Lab) -> Result<()> {
    for function in FUNCTIONS {
        let found = (
            sysfs::read_hex(function.address, "vendor")?,
            sysfs::read_hex(function.address, "device")?,
        );
        let wanted = (function.vendor, function.device);
        ensure!(found == wanted, "{} at {} is {found:x?}", function.id, function.address);
    }
    lab.step("every device is where it should be")?;

    ensure!(sysfs::group_members(GPU.address)? == [GPU.address, GPU_AUDIO.address]);
    ensure!(sysfs::group(SHARED_NIC.address) == sysfs::group(SHARED_DISK.address));
    ensure!(sysfs::group(SWITCH_NIC_A.address) != sysfs::group(SWITCH_NIC_B.address));
    ensure!(sysfs::read(FAR_NIC.address, "numa_node")? == "1");
    lab.step("groups are shared where ACS is missing and only there; the far node is node 1")?;

    command::run(["modprobe", "vfio-pci"])?.success()?;
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "0")?;
    sysfs::write(NIC.address, "sriov_numvfs", "1")?;
    let vf = sysfs::virtual_function(NIC.address, 0)?;
    let assigned = [GPU.address, GPU_AUDIO.address, &vf];
    for address in assigned {
        sysfs::bind(address, Some("vfio-pci"))?;
    }
    lab.step(format!("{} are bound to vfio-pci", assigned.join(", ")))?;

    let mut guest = Guest::start(assigned)?;
    for (vendor, device) in [(GPU.vendor, GPU.device), (GPU_AUDIO.vendor, GPU_AUDIO.device), NIC_VF]
    {
        ensure!(guest.sees(vendor, device), "no {vendor:04x}:{device:04x} in the guest");
    }
    lab.step("a KVM guest sees the GPU's two functions and the virtual function")?;

    let size = guest.write_video(1)?;
    ensure!(guest.read_video(2)? < size / 2, "another pattern is found as well");
    lab.step(format!("it wrote {size} bytes of video memory and read them back"))?;
    guest.power_off()?;

    for address in [GPU.address, GPU_AUDIO.address] {
        sysfs::bind(address, None)?;
    }
    sysfs::write(NIC.address, "sriov_numvfs", "0")?;
    sysfs::write(NIC.address, "sriov_drivers_autoprobe", "1")?;
    lab.step("it powered off and all is given back")
}
