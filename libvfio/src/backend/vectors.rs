//! How many interrupt vectors (MSI-X) each virtual function has of those that its physical one shares
//! out: `sriov_vf_total_msix` and `sriov_vf_msix_count` (`drivers/pci/iov.c`). The latter cannot be
//! read; configuration space tells. The kernel changes it only while no driver has the function.

use std::io;

use super::{VfBackend, Virtual, number, unsupported};
use crate::host::HostRoot;
use crate::pci;
use crate::shape::{Capability, Limits, Setting, Value};

const COUNT: &str = "sriov_vf_msix_count";
const TOTAL: &str = "sriov_vf_total_msix";

/// The kernel, for physical functions whose driver lets it.
pub(super) struct Vectors;

impl VfBackend for Vectors {
    fn name(&self) -> &'static str {
        "vectors"
    }

    fn offers(&self, host: &HostRoot, function: &Virtual) -> io::Result<Vec<Capability>> {
        // Every virtual function has the file; a driver that cannot do it has none to share out.
        let total: u64 = number(&host.function(function.physical), TOTAL).unwrap_or(0);
        let own = pci::msix_vectors(host, function.device).map(u64::from);
        let there = total > 0 && host.function(function.device).has(COUNT);
        let Some(own) = own.filter(|_| there) else { return Ok(Vec::new()) };
        let all = pci::virtual_functions(host, function.physical);
        let given: u64 =
            all.into_iter().filter_map(|vf| pci::msix_vectors(host, vf)).map(u64::from).sum();
        let limits = Limits::Share { least: 1, spare: total.saturating_sub(given) };
        Ok(vec![Capability { setting: Setting::Msix, value: Value::Number(own), limits }])
    }

    fn read(
        &self,
        host: &HostRoot,
        function: &Virtual,
        setting: Setting,
    ) -> io::Result<Option<Value>> {
        let ours = setting == Setting::Msix && host.function(function.device).has(COUNT);
        let own = ours.then(|| pci::msix_vectors(host, function.device)).flatten();
        Ok(own.map(|own| Value::Number(own.into())))
    }

    fn write(
        &self,
        host: &HostRoot,
        function: &Virtual,
        setting: Setting,
        value: &Value,
    ) -> io::Result<()> {
        if setting != Setting::Msix {
            return Err(unsupported());
        }
        host.function(function.device).write(COUNT, &value.to_string())
    }
}
