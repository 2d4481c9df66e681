//! Whether a function came back from a reset as it went in: what can be told from outside. Reads the
//! function's sysfs files, changes nothing.

use super::Cause;
use crate::address::PciAddress;
use crate::host::HostRoot;
use crate::pci::Condition;
use crate::pci::config::Link;

/// What must be so of a function after a reset.
#[derive(Debug)]
pub(super) struct Health {
    address: PciAddress,
    found: Condition,
}

impl Health {
    /// How a function is now; `None` if there is none.
    pub(super) fn read(host: &HostRoot, device: PciAddress) -> Option<Self> {
        Condition::read(host, device).map(|found| Self { address: device, found })
    }

    /// The driver that has the function where that is none of VFIO's.
    pub(super) fn stranger(&self) -> Option<&str> {
        self.found.driver.as_deref().filter(|_| !self.found.on_vfio)
    }

    fn link(&self) -> Option<Link> {
        self.found.config.pcie().and_then(|express| express.link)
    }

    /// What is wrong with a function now that was like this before its reset: what was expected and
    /// what is found. One that did not answer before has nothing to compare but what the kernel
    /// remembers of it.
    pub(super) fn compare(&self, now: Option<&Self>) -> Result<(), Cause> {
        let wrong = |wanted: String, found: String| Err(Cause::ReadBack { wanted, found });
        let name = self.address;
        let Some(now) = now else {
            return wrong(format!("{name}"), "no device".into());
        };
        if now.found.config.is_silent() {
            return wrong(
                format!("an answer of {name}"),
                "all ones in its configuration space".into(),
            );
        }
        let ids = |health: &Self| {
            let ids = health.found.ids;
            format!("{name} as {}:{}, class {}", hex(ids.vendor), hex(ids.device), hex(ids.class))
        };
        let asleep = |health: &Self| {
            let state = health.found.power_state.as_deref();
            matches!(state, Some("D3cold" | "error" | "unknown"))
        };
        // The kernel remembers ids; the function itself says them too, unless it is a virtual one.
        if let Some(header) = now.found.config.header.as_ref()
            && !now.found.is_virtual
        {
            let its = (Some(header.vendor), Some(header.device), Some(header.class));
            let ours = self.found.ids;
            if its != (ours.vendor, ours.device, ours.class) {
                let (vendor, device, class) = its;
                let found = format!("{}:{}, class {}", hex(vendor), hex(device), hex(class));
                return wrong(ids(self), found);
            }
        }
        let serial = |health: &Self| health.found.config.serial().map(|s| s.to_string());
        if !self.found.config.is_silent() && serial(self) != serial(now) {
            let say = |serial: Option<String>| serial.unwrap_or_else(|| "none".into());
            return wrong(format!("serial number {}", say(serial(self))), say(serial(now)));
        }
        // One that had lost its addresses may have them again.
        let lost = |before: [u32; 6]| {
            let now = now.found.bars.unwrap_or_default();
            before.iter().zip(now).any(|(before, now)| *before != 0 && *before != now)
        };
        if self.found.bars.is_some_and(lost) {
            return wrong(
                format!("the base addresses of {name} as before"),
                "others, or none".into(),
            );
        }
        if let (Some(before), Some(after)) = (self.link(), now.link())
            && !self.found.config.is_silent()
            && (after.current_speed < before.current_speed
                || after.current_width < before.current_width)
        {
            let say = |link: Link| format!("{} x{}", link.current_speed, link.current_width);
            return wrong(format!("a link of {name} at {}", say(before)), say(after));
        }
        if asleep(now) && !asleep(self) {
            let state = now.found.power_state.clone().unwrap_or_default();
            return wrong(format!("{name} with power"), format!("power state {state}"));
        }
        Ok(())
    }
}

fn hex(number: Option<impl std::fmt::LowerHex>) -> String {
    number.map_or_else(|| "?".to_owned(), |number| format!("{number:04x}"))
}
