//! A guest that reaches its devices by their own nodes and IOMMUFD, without a group's node.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::lab::product::{lease, refused, vfioctl, vfioctl_json};
use crate::lab::{Guest, Lab, sysfs, wait_until};
use crate::machine::{GPU, GPU_AUDIO};

/// Letting go takes a guest's kernel and the host's some time under emulation.
const RELEASE_LIMIT: Duration = Duration::from_secs(30);

pub(super) fn run(lab: &mut Lab) -> Result<()> {
    let before = drivers();
    let attached = vfioctl_json(["attach", GPU.address, "--tenant", "tenant-a"])?;
    let id = attached["id"].as_str().with_context(|| format!("no lease in {attached}"))?;
    let nodes = [node(GPU.address)?, node(GPU_AUDIO.address)?];
    for node in nodes.iter().map(String::as_str).chain(["/dev/iommu"]) {
        ensure!(Path::new(node).exists(), "there is no {node}");
    }
    lab.step(format!("attached, the GPU's functions are {}", nodes.join(" and ")))?;

    let mut guest = Guest::through_iommufd([GPU.address, GPU_AUDIO.address])?;
    for function in [GPU, GPU_AUDIO] {
        ensure!(guest.sees(function.vendor, function.device), "no {} in the guest", function.id);
    }
    let size = guest.write_video(1)?;
    lab.step(format!("a guest got them by IOMMUFD and held {size} bytes of video memory"))?;

    let holders = vfioctl(["holders", GPU.address])?.success()?;
    for word in ["qemu-system-x86", nodes[0].as_str()] {
        ensure!(holders.contains(word), "the holders do not say {word}:\n{holders}");
    }
    refused(&vfioctl(["attach", GPU.address, "--tenant", "tenant-b"])?, 8, &[id])?;
    refused(&vfioctl(["release", id])?, 5, &["releasing", "qemu", "ends by itself"])?;
    guest.write_video(2)?;
    lab.step("its QEMU is found by those nodes, and a release waits for it")?;

    guest.power_off()?;
    wait_until("the release ends", RELEASE_LIMIT, || Ok(lease(id)?.is_none()))?;
    ensure!(drivers() == before, "drivers were {before:?} and are {:?}", drivers());
    lab.step("it powered off, and the GPU is back on its drivers")
}

/// The node of a function that is on VFIO.
fn node(address: &str) -> Result<String> {
    let entry = std::fs::read_dir(sysfs::path(address, "vfio-dev"))?.next();
    let name = entry.context("no VFIO device")??.file_name();
    Ok(format!("/dev/vfio/devices/{}", name.to_string_lossy()))
}

fn drivers() -> [Option<String>; 2] {
    [GPU, GPU_AUDIO].map(|function| sysfs::driver(function.address))
}
