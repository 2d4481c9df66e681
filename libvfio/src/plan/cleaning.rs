//! What leaves nothing of a tenant in functions that leave VFIO. Pure.

use std::collections::BTreeSet;

use crate::address::PciAddress;
use crate::inventory::Inventory;
use crate::pci::Function;
use crate::scrub;
use crate::step::Step;

/// The resets of those `devices` that are on VFIO, as few as do: by its own means where a function
/// has some, else by its bus if all on that are among them. One that cannot be reset has none.
pub fn resets(inventory: &Inventory, devices: &BTreeSet<PciAddress>) -> Vec<Step> {
    let ours = |address: &PciAddress| inventory.get(*address).filter(|f| f.on_vfio());
    let mut steps = Vec::new();
    let mut covered: BTreeSet<PciAddress> = BTreeSet::new();
    for function in devices.iter().filter_map(ours).filter(|f| !by_itself(inventory, f)) {
        let bus = on_bus(inventory, function);
        let can = !function.upstream.is_empty()
            && function.physical().is_none()
            && bus.iter().all(|address| {
                devices.contains(address) && ours(address).is_some_and(|f| !f.is_bridge())
            });
        if can && !covered.contains(&function.address) {
            let with = bus.iter().copied().filter(|other| *other != function.address).collect();
            steps.push(Step::Reset { device: function.address, with });
            covered.extend(bus);
        }
    }
    let alone = devices.iter().filter_map(ours).filter(|f| by_itself(inventory, f));
    let alone = alone.filter(|f| !covered.contains(&f.address));
    steps.extend(alone.map(|f| Step::Reset { device: f.address, with: Vec::new() }));
    steps
}

/// What clears the memory of those `devices` that are on VFIO and whose memory can be cleared.
pub fn scrubs(inventory: &Inventory, devices: &BTreeSet<PciAddress>) -> Vec<Step> {
    let ours = devices.iter().filter_map(|address| inventory.get(*address));
    let scrub = |f: &Function| {
        let profile = scrub::profile(f)?;
        Some(Step::Scrub { device: f.address, bar: profile.bar })
    };
    ours.filter(|f| f.on_vfio()).filter_map(|f| scrub(f)).collect()
}

/// Whether the kernel can reset a function and no other. By its bus it does so only where nothing
/// else is on that (`pci_parent_bus_reset`, `drivers/pci/pci.c`).
fn by_itself(inventory: &Inventory, function: &Function) -> bool {
    let by_bus = |method: &String| matches!(method.as_str(), "bus" | "cxl_bus");
    let alone = || !function.upstream.is_empty() && on_bus(inventory, function).len() == 1;
    !function.reset_methods.iter().all(by_bus) || !function.reset_methods.is_empty() && alone()
}

fn on_bus(inventory: &Inventory, function: &Function) -> BTreeSet<PciAddress> {
    let bus = |address: PciAddress| (address.domain(), address.bus());
    let all = inventory.functions().map(|f| f.address);
    all.filter(|other| bus(*other) == bus(function.address)).collect()
}
