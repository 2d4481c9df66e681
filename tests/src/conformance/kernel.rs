//! What the kernel answers by itself: groups, and bare writes that are right or wrong.

use anyhow::Result;

use super::Case;
use super::stage::Stage;
use crate::machine::{EDU, FAR_NIC, GPU, GPU_AUDIO, NIC, SHARED_NIC, SWITCH_NIC_A};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "groups",
        play: groups,
        outcome: &[
            "group of 0000:01:00.0: 0000:01:00.0, not viable",
            "because: one function",
            "group of 0000:03:00.0: 0000:03:00.0 0000:03:00.1, not viable",
            "because: functions of one device",
            "group of 0000:06:00.0: 0000:05:00.0 0000:06:00.0, not viable",
            "because: 0000:05:00.0 lacks ACS",
            "group of 0000:0a:00.0: 0000:00:08.0 0000:08:00.0 0000:09:00.0 0000:09:01.0 0000:0a:00.0 0000:0b:00.0, not viable",
            "because: 0000:00:08.0, 0000:09:00.0, 0000:09:01.0 lack ACS",
            "group of 0000:00:0a.0: 0000:00:0a.0, viable",
            "because: one function",
            "group of 0000:81:00.0: 0000:81:00.0, not viable",
            "because: one function",
        ],
    },
    Case {
        name: "errors of binding",
        play: binding,
        outcome: &[
            "drivers/e1000e/unbind = 0000:03:00.1: ENODEV",
            "drivers/e1000e/bind = 0000:03:00.1: ENODEV",
            "drivers/vfio-pci/bind = 0000:03:00.1: ENODEV",
            "drivers/vfio-pci/bind = 0000:03:00.7: ENODEV",
            "drivers_probe = 03:00.1: ENODEV",
            "drivers_probe = 0000:03:00.1: done",
            "0000:03:00.1/driver/unbind = 0000:03:00.1: done",
            "0000:03:00.1: no driver, no override",
            "0000:03:00.1/driver_override = nobody: done",
            "drivers_probe = 0000:03:00.1: done",
            "0000:03:00.1: no driver, override nobody",
            "0000:03:00.1/driver_override = vfio-pci: done",
            "drivers/vfio-pci/bind = 0000:03:00.1: done",
            "drivers/vfio-pci/bind = 0000:03:00.1: EBUSY",
            "0000:03:00.1: vfio-pci, override vfio-pci",
            "0000:03:00.1: its driver, no override",
        ],
    },
    Case {
        name: "errors of overrides",
        play: overrides,
        outcome: &[
            "0000:00:0a.0/driver_override = a: done",
            "0000:00:0a.0: no driver, override a",
            "0000:00:0a.0/driver_override = a\\n: done",
            "0000:00:0a.0: no driver, override a",
            "0000:00:0a.0/driver_override = a\\nb: done",
            "0000:00:0a.0: no driver, override a",
            "0000:00:0a.0/driver_override = \\n: done",
            "0000:00:0a.0: no driver, no override",
            "0000:00:0a.0/driver_override = xxxxxxxxxxxxxxxxxxxxxxxxxxxxx: done",
            "0000:00:0a.0/driver_override = xxxxxxxxxxxxxxxxxxxxxxxxxxxxx: EINVAL",
            "0000:00:0a.0/driver_override = \\n: done",
            "0000:00:0a.0/vendor = 1: EACCES",
            "0000:00:0a.0: no driver, no override",
        ],
    },
    Case {
        name: "errors of virtual functions",
        play: virtual_functions,
        outcome: &[
            "0000:81:00.0/sriov_numvfs = 65535: ERANGE",
            "0000:81:00.0/sriov_numvfs = 64: ERANGE",
            "0000:81:00.0/sriov_numvfs = many: EINVAL",
            "0000:81:00.0/sriov_numvfs = -1: EINVAL",
            "0000:81:00.0/sriov_numvfs = 0: done",
            "0000:81:00.0/sriov_numvfs = 1: done",
            "0000:81:00.0/sriov_numvfs = 1: done",
            "0000:81:00.0/sriov_numvfs = 2: EBUSY",
            "0000:81:00.0/sriov_drivers_autoprobe = maybe: EINVAL",
            "vf0: no driver, no override",
            "drivers_probe = vf0: done",
            "vf0: no driver, no override",
            "0000:81:00.0/sriov_numvfs = 0: done",
            "0000:0a:00.0/sriov_numvfs = 1: EACCES",
        ],
    },
];

fn groups(stage: &mut Stage<'_>) -> Result<()> {
    for function in [NIC, GPU, SWITCH_NIC_A, SHARED_NIC, EDU, FAR_NIC] {
        stage.group(function.address)?;
    }
    Ok(())
}

fn binding(stage: &mut Stage<'_>) -> Result<()> {
    let address = GPU_AUDIO.address;
    stage.load("vfio-pci")?;
    // Not its driver, already bound, no such function, not even an address.
    stage.write_bus("drivers/e1000e/unbind", address);
    stage.write_bus("drivers/e1000e/bind", address);
    stage.write_bus("drivers/vfio-pci/bind", address);
    stage.write_bus("drivers/vfio-pci/bind", "0000:03:00.7");
    stage.write_bus("drivers_probe", "03:00.1");
    stage.write_bus("drivers_probe", address);
    stage.write(address, "driver/unbind", address);
    stage.look(&[address])?;
    // The override admits one driver, and a probe that finds none is none the less done.
    stage.write(address, "driver_override", "nobody");
    stage.write_bus("drivers_probe", address);
    stage.look(&[address])?;
    stage.write(address, "driver_override", "vfio-pci");
    stage.write_bus("drivers/vfio-pci/bind", address);
    stage.write_bus("drivers/vfio-pci/bind", address);
    stage.look(&[address])?;
    stage.rebind(address, None)?;
    stage.look(&[address])
}

fn overrides(stage: &mut Stage<'_>) -> Result<()> {
    let address = EDU.address;
    for value in ["a", "a\n", "a\nb", "\n", &"x".repeat(4000), &"x".repeat(4096)] {
        stage.write(address, "driver_override", value);
        // A long one would be the whole outcome.
        if value.len() < 10 {
            stage.look(&[address])?;
        }
    }
    stage.write(address, "driver_override", "\n");
    stage.write(address, "vendor", "1");
    stage.look(&[address])
}

fn virtual_functions(stage: &mut Stage<'_>) -> Result<()> {
    let address = FAR_NIC.address;
    stage.set(address, "sriov_drivers_autoprobe", "0")?;
    for value in ["65535", "64", "many", "-1", "0", "1", "1", "2"] {
        stage.write(address, "sriov_numvfs", value);
    }
    stage.write(address, "sriov_drivers_autoprobe", "maybe");
    let vf = stage.virtual_function(address, 0)?;
    stage.look(&[&vf])?;
    stage.write_bus("drivers_probe", &vf);
    stage.look(&[&vf])?;
    stage.write(address, "sriov_numvfs", "0");
    stage.set(address, "sriov_drivers_autoprobe", "1")?;
    stage.write(SHARED_NIC.address, "sriov_numvfs", "1");
    Ok(())
}
