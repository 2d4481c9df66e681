//! What Intel's xe driver shares out of a GPU among its virtual functions: time, priority, memory, by
//! files below `sriov_admin` of the physical function
//! (`Documentation/ABI/testing/sysfs-driver-intel-xe-sriov`). It numbers them from 1.

use std::io;
use std::os::unix::fs::PermissionsExt;

use super::{VfBackend, Virtual, text, unsupported};
use crate::host::{HostRoot, SysDir};
use crate::shape::{Capability, Choice, Limits, Setting, Value};

/// The xe driver.
pub(super) struct Xe;

const FILES: [(Setting, &str); 4] = [
    (Setting::ExecQuantum, "exec_quantum_ms"),
    (Setting::PreemptTimeout, "preempt_timeout_us"),
    (Setting::SchedPriority, "sched_priority"),
    (Setting::VramQuota, "vram_quota"),
];

/// The driver rounds memory up to its pages, of 2 MiB or little more (`pf_get_lmem_alignment`,
/// `drivers/gpu/drm/xe/xe_gt_sriov_pf_config.c`).
const MOST_ROUNDING: u64 = 16 << 20;

/// In ms and in us (`GUC_KLV_VF_CFG_*_MAX_VALUE`, `drivers/gpu/drm/xe/abi/guc_klvs_abi.h`).
const LONGEST_QUANTUM: u64 = 100_000;
const LONGEST_TIMEOUT: u64 = 100_000_000;

impl VfBackend for Xe {
    fn name(&self) -> &'static str {
        "xe"
    }

    fn offers(&self, host: &HostRoot, function: &Virtual) -> io::Result<Vec<Capability>> {
        let dir = profile(host, function);
        // Some fail to read where parts of the card disagree, or it has no memory of its own.
        let read = |(setting, file): (Setting, &str)| {
            let found = capability(setting, &text(&dir, file).ok()??)?;
            let limits = if is_writable(&dir, file) { found.limits } else { Limits::Fixed };
            Some(Capability { limits, ..found })
        };
        Ok(FILES.into_iter().filter_map(read).collect())
    }

    fn write(
        &self,
        host: &HostRoot,
        function: &Virtual,
        setting: Setting,
        value: &Value,
    ) -> io::Result<()> {
        let file = FILES.iter().find(|(of, _)| *of == setting).ok_or_else(unsupported)?.1;
        profile(host, function).write(file, &value.to_string())
    }

    fn is(&self, setting: Setting, wanted: &Value, found: &Value) -> bool {
        let rounded = match (setting, wanted, found) {
            // None at all is no rounding of some.
            (Setting::VramQuota, Value::Number(wanted @ 1..), Value::Number(found)) => {
                found.checked_sub(*wanted).is_some_and(|more| more < MOST_ROUNDING)
            }
            _ => false,
        };
        rounded || wanted == found
    }
}

fn profile(host: &HostRoot, function: &Virtual) -> SysDir {
    let number = function.index + 1;
    host.function(function.physical).sub(&format!("sriov_admin/vf{number}/profile"))
}

/// Priorities of single functions can only be read where the firmware has one for all.
fn is_writable(dir: &SysDir, file: &str) -> bool {
    let found = dir.path().join(file).metadata();
    found.is_ok_and(|found| found.permissions().mode() & 0o200 != 0)
}

/// What a file's text says of its setting.
fn capability(setting: Setting, text: &str) -> Option<Capability> {
    if setting == Setting::SchedPriority {
        let (value, choices) = choices(text)?;
        return Some(Capability { setting, value, limits: Limits::Choices(choices) });
    }
    // The driver clamps to these without a word.
    let most = match setting {
        Setting::ExecQuantum => Some(LONGEST_QUANTUM),
        Setting::PreemptTimeout => Some(LONGEST_TIMEOUT),
        _ => None,
    };
    let value = Value::Number(text.parse().ok()?);
    Some(Capability { setting, value, limits: Limits::Range { least: 0, most } })
}

/// The choice that is made, and all there are, of a text like `[low] normal high`.
pub fn choices(text: &str) -> Option<(Value, Vec<Choice>)> {
    let chosen = |word: &str| Some(word.strip_prefix('[')?.strip_suffix(']')?.to_owned());
    let value = Value::Text(text.split_whitespace().find_map(chosen)?);
    let plain = |word: &str| Choice::plain(&chosen(word).unwrap_or_else(|| word.to_owned()));
    Some((value, text.split_whitespace().map(plain).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_priority_in_brackets_is_the_one_there_is() {
        let (value, all) = choices("low [normal] high").unwrap();
        assert_eq!(value, Value::Text("normal".to_owned()));
        assert_eq!(all, ["low", "normal", "high"].map(Choice::plain));
        for odd in ["", "low normal", "[", "]", "[]x", "["] {
            assert_eq!(choices(odd), None, "{odd}");
        }
    }

    #[test]
    fn memory_may_be_rounded_up_and_nothing_else() {
        let is =
            |setting, wanted, found| Xe.is(setting, &Value::Number(wanted), &Value::Number(found));
        assert!(is(Setting::VramQuota, 1_000_000, 2 << 20));
        assert!(!is(Setting::VramQuota, 1_000_000, 1 << 30));
        assert!(!is(Setting::VramQuota, 4 << 20, 2 << 20));
        assert!(!is(Setting::VramQuota, 0, 2 << 20));
        assert!(!is(Setting::ExecQuantum, 10, 11));
    }
}
