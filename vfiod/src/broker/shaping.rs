//! What can be set on virtual functions, as workers read it. Changes nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use libvfio::address::PciAddress;
use libvfio::backend::Offer;
use libvfio::client::{Failure, SettingRecord};
use libvfio::error::ErrorKind;
use libvfio::plan::Request;

use super::Broker;

/// How long reading the settings of one virtual function may take.
const READING: Duration = Duration::from_secs(5);

impl Broker {
    /// Everything that can be set on the virtual function a name means.
    pub fn settings(&self, name: &str) -> Result<Vec<SettingRecord>, Failure> {
        let device = self.inventory().resolve(name)?;
        Ok(self.offers(device)?.iter().map(SettingRecord::from).collect())
    }

    /// What can be set on the functions of a request, as far as that matters to it.
    pub(super) fn offers_around(
        &self,
        request: &Request,
    ) -> Result<BTreeMap<PciAddress, Vec<Offer>>, Failure> {
        let inventory = self.inventory();
        // NVIDIA's virtual functions may be no good without a setting.
        let typed = |device: &PciAddress| {
            let function = inventory.get(*device);
            function
                .is_some_and(|f| f.physical().is_some() && f.driver.as_deref() == Some("nvidia"))
        };
        let wanted = |device: &&PciAddress| !request.shape.is_empty() || typed(device);
        let devices = request.devices.iter().filter(wanted);
        devices.map(|device| Ok((*device, self.offers(*device)?))).collect()
    }

    pub(super) fn offers(&self, device: PciAddress) -> Result<Vec<Offer>, Failure> {
        self.walker.means.workers.offers(device, READING).map_err(|error| {
            let why = format!(
                "cannot read the settings of {device}: {error}; see the kernel log (journalctl -k)"
            );
            Failure::new(ErrorKind::Internal, why)
        })
    }
}
