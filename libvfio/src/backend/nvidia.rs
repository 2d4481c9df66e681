//! What NVIDIA's vGPU driver makes of a virtual function that stays on it (the vendor's VFIO form, on
//! Linux 6.8 or later): files in `nvidia/` of the virtual function, and the program that makes those
//! ("Virtual GPU Software User Guide", "Creating an NVIDIA vGPU on a Linux with KVM Hypervisor").

use std::io;

use super::{Maker, VfBackend, Virtual, number, text, unsupported};
use crate::address::PciAddress;
use crate::host::{HostRoot, SysDir};
use crate::shape::{Capability, Choice, Limits, Setting, Value};

/// NVIDIA's vGPU driver.
pub(super) struct Nvidia;

/// The program that makes and removes virtual functions, below the host's root.
pub(crate) const SRIOV_MANAGE: &str = "usr/lib/nvidia/sriov-manage";

const CREATABLE: &str = "creatable_vgpu_types";
const CURRENT: &str = "current_vgpu_type";
const PARAMETERS: &str = "vgpu_params";

impl VfBackend for Nvidia {
    fn name(&self) -> &'static str {
        "nvidia"
    }

    fn offers(&self, host: &HostRoot, function: &Virtual) -> io::Result<Vec<Capability>> {
        let dir = host.function(function.device).sub("nvidia");
        let Some(current) = number::<u64>(&dir, CURRENT) else { return Ok(Vec::new()) };
        // Read for each function: what one takes is gone for its siblings.
        let creatable = text(&dir, CREATABLE)?.unwrap_or_default();
        let value = Value::Number(current);
        let mut offers = vec![Capability {
            setting: Setting::VgpuType,
            limits: Limits::Choices(choices(current, types(&creatable))),
            value,
        }];
        offers.extend(parameters(&dir).map(|value| Capability {
            setting: Setting::VgpuParams,
            value,
            limits: Limits::Any,
        }));
        Ok(offers)
    }

    fn write(
        &self,
        host: &HostRoot,
        function: &Virtual,
        setting: Setting,
        value: &Value,
    ) -> io::Result<()> {
        let dir = host.function(function.device).sub("nvidia");
        match (setting, value) {
            (Setting::VgpuType, _) => dir.write(CURRENT, &value.to_string()),
            // A space alone clears them.
            (Setting::VgpuParams, Value::Text(text)) if text.is_empty() => {
                dir.write(PARAMETERS, " ")
            }
            (Setting::VgpuParams, Value::Text(text)) => dir.write(PARAMETERS, text),
            _ => Err(unsupported()),
        }
    }

    fn maker(&self, host: &HostRoot, physical: PciAddress) -> Option<Maker> {
        let ours = host.function(physical).link_name("driver").as_deref() == Some("nvidia");
        (ours && host.path(SRIOV_MANAGE).exists()).then_some(Maker::SriovManage)
    }
}

/// The parameters there are; `None` where the driver knows none. Without a type there are none to
/// read (`ENXIO`).
fn parameters(dir: &SysDir) -> Option<Value> {
    let found = match text(dir, PARAMETERS) {
        Ok(found) => found?,
        Err(_) => String::new(),
    };
    Some(Value::Text(found))
}

/// One that has a type keeps it until it is cleared.
fn choices(current: u64, creatable: Vec<(u64, String)>) -> Vec<Choice> {
    let choice = |(number, name)| Choice { value: Value::Number(number), name: Some(name) };
    match current {
        0 => creatable.into_iter().map(choice).collect(),
        taken => {
            let named = creatable.into_iter().find(|(number, _)| *number == taken);
            let plain = Choice { value: Value::Number(taken), name: None };
            vec![named.map_or(plain, choice)]
        }
    }
}

/// Numbers and names of vGPU types: after a line of heads, lines like `1145  : NVIDIA L40S-1B`.
pub fn types(text: &str) -> Vec<(u64, String)> {
    let line = |line: &str| {
        let (number, name) = line.split_once(':')?;
        Some((number.trim().parse().ok()?, crate::host::plain(name.trim())))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_read_without_their_heads() {
        let text = "ID    : vGPU Name\n1145  : NVIDIA L40S-1B\n1146:NVIDIA L40S-2B\n: x\n12\n";
        let named = |(number, name): (u64, &str)| (number, name.to_owned());
        let known = [(1145, "NVIDIA L40S-1B"), (1146, "NVIDIA L40S-2B")];
        assert_eq!(types(text), known.map(named));
        assert_eq!(types(""), []);
    }

    #[test]
    fn a_type_stays_until_it_is_cleared() {
        let free = || vec![(1145, "a".to_owned()), (1146, "b".to_owned())];
        assert_eq!(choices(0, free()).len(), 2);
        let taken = choices(1150, free());
        assert_eq!((taken.len(), &taken[0].value), (1, &Value::Number(1150)));
    }
}
