//! Why functions are not given away, and what should be known of those that are. Pure.

use super::mediated::refuse_parted;
use super::{Circumstances, Claim, Reason, Request, Rule, full_modules};
use crate::address::PciAddress;
use crate::error::ErrorKind;
use crate::inventory::{DriverSource, Inventory};
use crate::iommu::Isolation;
use crate::pci::{Function, Sriov};
use crate::protection::{Use, Weight};

/// Why a function that was asked for, directly or as part of its device, cannot be given.
pub(super) fn refuse_function(
    inventory: &Inventory,
    circumstances: &Circumstances,
    request: &Request,
    function: &Function,
) -> Vec<Reason> {
    let address = function.address;
    let reason = |kind, code, text: String, remedy: String| Reason {
        kind,
        code,
        object: address.to_string(),
        text,
        remedy,
    };
    if function.is_bridge() {
        return vec![reason(
            ErrorKind::Unsupported,
            "bridge",
            "is a bridge, which carries other devices and is never given to a guest".into(),
            "name the device behind it".into(),
        )];
    }
    if let Some(claim) = circumstances.claims.get(&address) {
        return vec![leased(address, claim)];
    }
    if function.stuck {
        return vec![reason(
            ErrorKind::Wedged,
            "stuck",
            "cannot be read: a kernel operation on it has not returned".into(),
            "see 'journalctl -k' for it; if it never returns, only a reboot helps".into(),
        )];
    }
    let mut reasons = Vec::new();
    if let Some(why) = circumstances.quarantined.get(&address) {
        reasons.push(reason(
            ErrorKind::Quarantined,
            "quarantined",
            format!("is in quarantine: {why}"),
            format!("see to that, then trust it again with 'vfioctl quarantine clear {address}'"),
        ));
    }
    if function.iommu_group.is_none() || inventory.platform.isolation == Isolation::None {
        reasons.push(reason(
            ErrorKind::NotViable,
            "no-iommu",
            "is behind no IOMMU, so a guest could reach all of memory through it".into(),
            inventory.platform.cpu.iommu_remedy().into(),
        ));
    }
    if function.is_silent() {
        reasons.push(reason(
            ErrorKind::NotViable,
            "silent",
            "does not answer: its configuration space reads all ones".into(),
            "check the kernel log; the device may need its power cycled".into(),
        ));
    }
    if let Sriov::Physical { enabled: vfs @ 1.., .. } = function.sriov {
        reasons.push(reason(
            ErrorKind::Busy,
            "virtual-functions",
            format!("has {vfs} virtual functions enabled"),
            format!("remove them first ('vfioctl vf set {address} 0')"),
        ));
    }
    if inventory.vfio_pci == DriverSource::Missing && !request.shape.keeps_driver() {
        reasons.push(reason(
            ErrorKind::Unsupported,
            "no-vfio-pci",
            "needs the vfio-pci driver, which this kernel does not have".into(),
            full_modules("CONFIG_VFIO_PCI"),
        ));
    }
    let rule = circumstances.rules.get(&address);
    if let Some(rule) = rule {
        reasons.extend(refused_by_policy(inventory, function, rule));
    }
    if function.on_vfio() && !request.adopt && !rule.is_some_and(|rule| rule.on_vfio) {
        reasons.push(reason(
            ErrorKind::Busy,
            "external",
            format!(
                "is on {} already, put there by somebody else",
                function.driver.as_deref().unwrap_or("a VFIO driver")
            ),
            "release it where it was bound (driverctl, libvirt, vfio-pci ids=), or adopt it as it \
             is with --adopt"
                .into(),
        ));
    }
    reasons.extend(refuse_parted(circumstances, address));
    reasons.extend(uses(circumstances, request, function));
    reasons
}

/// Why the policy does not have a function leased.
fn refused_by_policy(inventory: &Inventory, function: &Function, rule: &Rule) -> Vec<Reason> {
    let pool = &rule.pool;
    let reason = |kind, code, text, remedy: &str| Reason {
        kind,
        code,
        object: function.address.to_string(),
        text,
        remedy: remedy.to_owned(),
    };
    let mut reasons = Vec::new();
    if let Some(why) = &rule.kept {
        let text = format!("{why} (pool '{pool}')");
        let remedy = "choose another device, or change the policy";
        reasons.push(reason(ErrorKind::NotAuthorized, "kept", text, remedy));
    }
    let isolation = inventory.isolation(function);
    if isolation < rule.isolation && isolation != Isolation::None {
        let wanted = rule.isolation;
        let text = format!("has isolation '{isolation}', and pool '{pool}' demands '{wanted}'");
        let remedy = "enable what is missing ('vfioctl check' says what), or have the pool demand \
                      less";
        reasons.push(reason(ErrorKind::NotViable, "isolation", text, remedy));
    }
    if let Err(why) = rule.scrub.for_function(function) {
        let text = format!("cannot be scrubbed as pool '{pool}' has it: it {why}");
        let remedy = "take it out of the pool, or have the pool scrub otherwise";
        reasons.push(reason(ErrorKind::Unsupported, "scrub", text, remedy));
    }
    reasons
}

/// Why a group member that stays behind forbids giving away the rest.
pub(super) fn refuse_sibling(
    inventory: &Inventory,
    circumstances: &Circumstances,
    request: &Request,
    sibling: &Function,
) -> Vec<Reason> {
    let address = sibling.address;
    if let Some(claim) = circumstances.claims.get(&address) {
        return vec![leased(address, claim)];
    }
    let Some(driver) = sibling.driver.as_deref().filter(|_| !sibling.on_vfio()) else {
        return Vec::new();
    };
    let group = sibling.iommu_group.and_then(|number| inventory.group(number));
    let why = group.map(|group| inventory.sharing(group).to_string()).unwrap_or_default();
    let mut reasons = vec![Reason {
        kind: ErrorKind::NotViable,
        code: "sibling",
        object: address.to_string(),
        text: format!("shares the IOMMU group and is on host driver {driver} ({why})"),
        remedy: "name it too, take all with --whole-group, or move it to another slot".into(),
    }];
    reasons.extend(uses(circumstances, request, sibling));
    reasons
}

pub(super) fn leased(address: PciAddress, claim: &Claim) -> Reason {
    if claim.wedged {
        return Reason {
            kind: ErrorKind::Wedged,
            code: "wedged",
            object: address.to_string(),
            text: format!("is wedged: a step of lease {} has not returned", claim.lease),
            remedy: "see 'vfioctl leases'; if it never returns, only a reboot helps".to_owned(),
        };
    }
    if let Some(task) = &claim.task {
        return Reason {
            kind: ErrorKind::Busy,
            code: "changing",
            object: address.to_string(),
            text: format!("is being changed: {task}"),
            remedy: "wait until that is done".to_owned(),
        };
    }
    Reason {
        kind: ErrorKind::AlreadyLeased,
        code: "leased",
        object: address.to_string(),
        text: format!("is leased to '{}' by lease {}", claim.tenant, claim.lease),
        remedy: format!("wait, or release it with 'vfioctl release {}'", claim.lease),
    }
}

/// Uses of a function that forbid giving it away.
pub(super) fn uses<'a>(
    circumstances: &'a Circumstances,
    request: &'a Request,
    function: &'a Function,
) -> impl Iterator<Item = Reason> + 'a {
    circumstances.of(function).filter_map(|found| {
        let reason = |kind, code, remedy| {
            let (object, text) = (found.function.to_string(), found.what.clone());
            Reason { kind, code, object, text, remedy }
        };
        match found.weight {
            Weight::Notice => None,
            Weight::Held => Some(reason(ErrorKind::Busy, "held", found.remedy.clone())),
            Weight::InUse => Some(reason(ErrorKind::Busy, "in-use", found.remedy.clone())),
            Weight::Protected if request.allow_protected => None,
            Weight::Protected => {
                let remedy = format!(
                    "{}, or give it away all the same with --allow-protected",
                    found.remedy
                );
                Some(reason(ErrorKind::Protected, "protected", remedy))
            }
        }
    })
}

/// What should be known of the uses of a function that is given away.
pub(super) fn warnings<'a>(
    circumstances: &'a Circumstances,
    function: &'a Function,
) -> impl Iterator<Item = String> + 'a {
    circumstances.of(function).filter_map(|found| {
        let Use { function, what, .. } = found;
        match found.weight {
            Weight::Held | Weight::InUse => None,
            Weight::Notice => Some(format!("{function} {what}")),
            Weight::Protected => Some(format!(
                "{function} {what}: the host loses that at once, and may not survive it"
            )),
        }
    })
}
