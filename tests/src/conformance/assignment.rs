//! What the daemon does with devices on a kernel: leases, refusals, and what happens to leases.

use anyhow::Result;

use super::Case;
use super::stage::Stage;
use crate::machine::{EDU, GPU, GPU_AUDIO, NIC, SHARED_DISK, SHARED_NIC, SWITCH_NIC_A};

const DISPLAY: &str = GPU.address;
const AUDIO: &str = GPU_AUDIO.address;

pub(super) const CASES: &[Case] = &[
    Case {
        name: "attach and release",
        play: attach,
        outcome: &[
            "explain 0000:03:00.0: unbind, set-override, bind, unbind, set-override, bind, check-viable",
            "attach 0000:03:00.0: active with 0000:03:00.0 0000:03:00.1",
            "0000:03:00.0: vfio-pci, override vfio-pci",
            "0000:03:00.1: vfio-pci, override vfio-pci",
            "0000:03:00.1: leased, trusted",
            "group of 0000:03:00.0: 0000:03:00.0 0000:03:00.1, viable",
            "because: functions of one device",
            "attach 0000:03:00.1: refused, AlreadyLeased",
            "release 0000:03:00.1: 1 ended",
            "0000:03:00.0: its driver, no override",
            "0000:03:00.1: its driver, no override",
            "0000:03:00.1: free, trusted",
            "release 0000:03:00.1: 0 ended",
        ],
    },
    Case {
        name: "no driver",
        play: no_driver,
        outcome: &[
            "attach 0000:00:0a.0: active with 0000:00:0a.0",
            "0000:00:0a.0: vfio-pci, override vfio-pci",
            "release 0000:00:0a.0: 1 ended",
            "0000:00:0a.0: no driver, no override",
            "attach 0000:03:00.0: active with 0000:03:00.0 0000:03:00.1",
            "release 0000:03:00.0: 1 ended",
            "0000:03:00.0: no driver, no override",
            "0000:03:00.1: its driver, no override",
        ],
    },
    Case {
        name: "an override of the host's own",
        play: own_override,
        outcome: &[
            "attach 0000:03:00.0: active with 0000:03:00.0 0000:03:00.1",
            "0000:03:00.0: vfio-pci, override vfio-pci",
            "release 0000:03:00.0: 1 ended",
            "0000:03:00.0: pci-stub, override pci-stub",
        ],
    },
    Case {
        name: "somebody else's on VFIO",
        play: adopt,
        outcome: &[
            "explain 0000:03:00.0: external (Busy 0000:03:00.0)",
            "attach 0000:03:00.0: refused, Busy",
            "attach 0000:03:00.0 adopt: active with 0000:03:00.0 0000:03:00.1",
            "0000:03:00.0: vfio-pci, override vfio-pci",
            "0000:03:00.1: vfio-pci, override vfio-pci",
            "release 0000:03:00.0: 1 ended",
            "0000:03:00.0: vfio-pci, override vfio-pci",
            "0000:03:00.1: its driver, no override",
        ],
    },
    Case {
        name: "refusals",
        play: refusals,
        outcome: &[
            "attach 03:00.9: refused, InvalidArgument",
            "attach 03:00.7: refused, NotFound",
            "attach gpux: refused, InvalidArgument",
            "attach nic: refused, InvalidArgument",
            "attach 00:06.0: refused, Unsupported",
            "attach 00:00.0: refused, Unsupported",
            "attach 1af4:ffff: refused, NotFound",
            "attach : refused, InvalidArgument",
            "attach 0000:03:00.0 force: refused, InvalidArgument",
            "attach 0000:03:00.0: refused, InvalidArgument",
            "release nobody's: refused, InvalidArgument",
            "release nobody: 0 ended",
            "0000:03:00.0: its driver, no override",
            "0000:03:00.1: its driver, no override",
        ],
    },
    Case {
        name: "a shared group",
        play: shared_group,
        outcome: &[
            "explain 0000:0a:00.0: sibling (NotViable 0000:0b:00.0)",
            "attach 0000:0a:00.0: refused, NotViable",
            "0000:0a:00.0: its driver, no override",
            "0000:0b:00.0: its driver, no override",
            "attach 0000:0a:00.0 whole_group: active with 0000:0a:00.0 0000:0b:00.0",
            "0000:0a:00.0: vfio-pci, override vfio-pci",
            "0000:0b:00.0: vfio-pci, override vfio-pci",
            "release 0000:0b:00.0: 1 ended",
            "0000:0a:00.0: its driver, no override",
            "0000:0b:00.0: its driver, no override",
        ],
    },
    Case {
        name: "a bare virtual function",
        play: bare_vf,
        outcome: &[
            "group of vf1: vf1, viable",
            "because: one function",
            "attach 0000:01:00.0: refused, Busy",
            "attach vf1: active with vf1",
            "vf1: vfio-pci, override vfio-pci",
            "0000:01:00.0: its driver, no override",
            "release vf1: 1 ended",
            "vf1: no driver, no override",
        ],
    },
    Case {
        name: "a virtual function with a driver",
        play: bound_vf,
        outcome: &[
            "vf0: igbvf, no override",
            "attach vf0: active with vf0",
            "vf0: vfio-pci, override vfio-pci",
            "release vf0: 1 ended",
            "vf0: igbvf, no override",
        ],
    },
    Case {
        name: "unplugged",
        play: unplugged,
        outcome: &[
            "attach 0000:06:00.0: refused, NotFound",
            "attach 0000:06:00.0: active with 0000:06:00.0",
            "the lease failed: was unplugged",
            "0000:06:00.0: its driver, no override",
            "0000:06:00.0: free, trusted",
            "release 0000:06:00.0: 1 ended",
            "attach 0000:06:00.0: active with 0000:06:00.0",
            "release 0000:06:00.0: 1 ended",
            "0000:06:00.0: its driver, no override",
        ],
    },
    Case {
        name: "changed under a lease",
        play: drifted,
        outcome: &[
            "attach 0000:00:0a.0: active with 0000:00:0a.0",
            "0000:00:0a.0/driver_override = somebody: done",
            "the lease failed: was changed by somebody else from vfio-pci to somebody",
            "0000:00:0a.0: free, driver_override of 0000:00:0a.0 was changed by somebody else from vfio-pci to somebody",
            "0000:00:0a.0: no driver, override somebody",
            "release 0000:00:0a.0: 1 ended",
            "clear 0000:00:0a.0: done",
            "0000:00:0a.0: no driver, no override",
        ],
    },
    Case {
        name: "quarantine",
        play: quarantine,
        outcome: &[
            "0000:03:00.0: free, its firmware was changed",
            "attach 0000:03:00.0: refused, Quarantined",
            "attach 0000:03:00.1: refused, Quarantined",
            "clear 0000:03:00.0: done",
            "clear 0000:03:00.0: it was trusted",
            "attach 0000:03:00.1: active with 0000:03:00.0 0000:03:00.1",
            "release 0000:03:00.1: 1 ended",
            "0000:03:00.0: its driver, no override",
            "0000:03:00.1: its driver, no override",
        ],
    },
];

fn attach(stage: &mut Stage<'_>) -> Result<()> {
    stage.explain(DISPLAY)?;
    stage.attach(DISPLAY, &[])?;
    stage.look(&[DISPLAY, AUDIO])?;
    stage.view(AUDIO)?;
    stage.group(DISPLAY)?;
    stage.attach_to(AUDIO, "another", &[])?;
    stage.release(AUDIO)?;
    stage.look(&[DISPLAY, AUDIO])?;
    stage.view(AUDIO)?;
    stage.release(AUDIO)
}

fn no_driver(stage: &mut Stage<'_>) -> Result<()> {
    stage.attach(EDU.address, &[])?;
    stage.look(&[EDU.address])?;
    stage.release(EDU.address)?;
    stage.look(&[EDU.address])?;
    stage.set(DISPLAY, "driver/unbind", DISPLAY)?;
    stage.attach(DISPLAY, &[])?;
    stage.release(DISPLAY)?;
    stage.look(&[DISPLAY, AUDIO])?;
    stage.rebind(DISPLAY, None)
}

fn own_override(stage: &mut Stage<'_>) -> Result<()> {
    stage.load("pci-stub")?;
    stage.rebind(DISPLAY, Some("pci-stub"))?;
    stage.attach(DISPLAY, &[])?;
    stage.look(&[DISPLAY])?;
    stage.release(DISPLAY)?;
    stage.look(&[DISPLAY])?;
    stage.rebind(DISPLAY, None)
}

fn adopt(stage: &mut Stage<'_>) -> Result<()> {
    stage.load("vfio-pci")?;
    stage.rebind(DISPLAY, Some("vfio-pci"))?;
    stage.explain(DISPLAY)?;
    stage.attach(DISPLAY, &[])?;
    stage.attach(DISPLAY, &["adopt"])?;
    stage.look(&[DISPLAY, AUDIO])?;
    stage.release(DISPLAY)?;
    stage.look(&[DISPLAY, AUDIO])?;
    stage.rebind(DISPLAY, None)
}

fn refusals(stage: &mut Stage<'_>) -> Result<()> {
    for name in ["03:00.9", "03:00.7", "gpux", "nic", "00:06.0", "00:00.0", "1af4:ffff", ""] {
        stage.attach(name, &[])?;
    }
    stage.attach(DISPLAY, &["force"])?;
    stage.attach_to(DISPLAY, "a b", &[])?;
    stage.release("nobody's")?;
    stage.release("nobody")?;
    stage.look(&[DISPLAY, AUDIO])
}

fn shared_group(stage: &mut Stage<'_>) -> Result<()> {
    stage.explain(SHARED_NIC.address)?;
    stage.attach(SHARED_NIC.address, &[])?;
    stage.look(&[SHARED_NIC.address, SHARED_DISK.address])?;
    stage.attach(SHARED_NIC.address, &["whole_group"])?;
    stage.look(&[SHARED_NIC.address, SHARED_DISK.address])?;
    stage.release(SHARED_DISK.address)?;
    stage.look(&[SHARED_NIC.address, SHARED_DISK.address])
}

fn bare_vf(stage: &mut Stage<'_>) -> Result<()> {
    let pf = NIC.address;
    stage.set(pf, "sriov_drivers_autoprobe", "0")?;
    stage.set(pf, "sriov_numvfs", "2")?;
    let vf = stage.virtual_function(pf, 1)?;
    stage.group(&vf)?;
    stage.attach(pf, &[])?;
    stage.attach(&vf, &[])?;
    stage.look(&[&vf, pf])?;
    stage.release(&vf)?;
    stage.look(&[&vf])?;
    stage.set(pf, "sriov_numvfs", "0")?;
    stage.set(pf, "sriov_drivers_autoprobe", "1")
}

fn bound_vf(stage: &mut Stage<'_>) -> Result<()> {
    let pf = NIC.address;
    stage.load("igbvf")?;
    stage.set(pf, "sriov_drivers_autoprobe", "1")?;
    stage.set(pf, "sriov_numvfs", "1")?;
    let vf = stage.virtual_function(pf, 0)?;
    stage.look(&[&vf])?;
    stage.attach(&vf, &[])?;
    stage.look(&[&vf])?;
    // Whether new ones get drivers does not decide where this one belongs.
    stage.set(pf, "sriov_drivers_autoprobe", "0")?;
    stage.release(&vf)?;
    stage.look(&[&vf])?;
    stage.set(pf, "sriov_numvfs", "0")?;
    stage.set(pf, "sriov_drivers_autoprobe", "1")
}

fn unplugged(stage: &mut Stage<'_>) -> Result<()> {
    let address = SWITCH_NIC_A.address;
    stage.unplug(&SWITCH_NIC_A)?;
    stage.attach(address, &[])?;
    stage.plug(&SWITCH_NIC_A)?;
    stage.attach(address, &[])?;
    stage.unplug(&SWITCH_NIC_A)?;
    stage.failed(address, "was unplugged")?;
    stage.plug(&SWITCH_NIC_A)?;
    stage.look(&[address])?;
    stage.view(address)?;
    stage.release(address)?;
    stage.attach(address, &[])?;
    stage.release(address)?;
    stage.look(&[address])
}

fn drifted(stage: &mut Stage<'_>) -> Result<()> {
    let address = EDU.address;
    stage.attach(address, &[])?;
    stage.write(address, "driver_override", "somebody");
    stage.failed(address, "was changed by somebody else from vfio-pci to somebody")?;
    stage.view(address)?;
    stage.look(&[address])?;
    stage.release(address)?;
    stage.clear(address)?;
    stage.rebind(address, None)?;
    stage.look(&[address])
}

fn quarantine(stage: &mut Stage<'_>) -> Result<()> {
    stage.quarantine(DISPLAY, "its firmware was changed")?;
    stage.view(DISPLAY)?;
    stage.attach(DISPLAY, &[])?;
    stage.attach(AUDIO, &[])?;
    stage.clear(DISPLAY)?;
    stage.clear(DISPLAY)?;
    stage.attach(AUDIO, &[])?;
    stage.release(AUDIO)?;
    stage.look(&[DISPLAY, AUDIO])
}
