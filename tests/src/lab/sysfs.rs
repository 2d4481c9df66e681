//! The kernel's PCI files, read and written bare: the measure that the product is held against.
//!
//! Deliberately shares no code with the product.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

const DEVICES: &str = "/sys/bus/pci/devices";

/// A file of a function.
pub fn path(address: &str, file: &str) -> PathBuf {
    Path::new(DEVICES).join(address).join(file)
}

/// Whether the kernel knows the function.
pub fn exists(address: &str) -> bool {
    path(address, "vendor").exists()
}

/// Reads a file of a function, without the newline at its end.
pub fn read(address: &str, file: &str) -> Result<String> {
    let path = path(address, file);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(text.trim_end().to_owned())
}

/// Writes a file of a function.
pub fn write(address: &str, file: &str, value: &str) -> Result<()> {
    let path = path(address, file);
    fs::write(&path, value).with_context(|| format!("writing {value:?} to {}", path.display()))
}

/// Reads a hexadecimal file (`vendor`, `device`).
pub fn read_hex(address: &str, file: &str) -> Result<u16> {
    let text = read(address, file)?;
    u16::from_str_radix(text.trim_start_matches("0x"), 16)
        .with_context(|| format!("{file} of {address} is {text:?}"))
}

/// The driver a function is bound to.
pub fn driver(address: &str) -> Option<String> {
    link_name(address, "driver")
}

/// The `driver_override` of a function.
pub fn driver_override(address: &str) -> Result<Option<String>> {
    Ok(Some(read(address, "driver_override")?).filter(|name| name != "(null)"))
}

/// The number of a function's IOMMU group, for this boot only.
pub fn group(address: &str) -> Option<String> {
    link_name(address, "iommu_group")
}

/// The functions in a function's IOMMU group, itself among them, in order.
pub fn group_members(address: &str) -> Result<Vec<String>> {
    names_in(&path(address, "iommu_group/devices"))
}

/// The name of a function's VFIO device (`vfio0`).
pub fn vfio_device(address: &str) -> Result<String> {
    let names = names_in(&path(address, "vfio-dev"))?;
    names.into_iter().next().with_context(|| format!("{address} has no VFIO device"))
}

/// The name of a network card's interface.
pub fn interface(address: &str) -> Result<String> {
    let names = names_in(&path(address, "net"))?;
    names.into_iter().next().with_context(|| format!("{address} has no interface"))
}

/// Every PCI function, in order.
pub fn functions() -> Result<Vec<String>> {
    names_in(Path::new(DEVICES))
}

/// The address of a physical function's virtual function.
pub fn virtual_function(address: &str, index: u32) -> Result<String> {
    let file = format!("virtfn{index}");
    link_name(address, &file).with_context(|| format!("{address} has no {file}"))
}

/// Sets the override (none clears it) and lets the kernel choose the driver again.
pub fn bind(address: &str, driver_override: Option<&str>) -> Result<()> {
    write(address, "driver_override", driver_override.unwrap_or("\n"))?;
    if driver(address).is_some() {
        write(address, "driver/unbind", address)?;
    }
    fs::write("/sys/bus/pci/drivers_probe", address).context("writing to drivers_probe")?;
    if let Some(wanted) = driver_override {
        let bound = driver(address);
        ensure!(bound.as_deref() == Some(wanted), "{address} is bound to {bound:?}, not {wanted}");
    }
    Ok(())
}

fn link_name(address: &str, file: &str) -> Option<String> {
    let target = fs::read_link(path(address, file)).ok()?;
    target.file_name().map(|name| name.to_string_lossy().into_owned())
}

fn names_in(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// What a scenario could have changed: functions, drivers, overrides, SR-IOV.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<String, State>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct State {
    driver: Option<String>,
    driver_override: Option<String>,
    autoprobe: Option<String>,
}

impl Snapshot {
    /// Reads every function's state.
    pub fn take() -> Result<Self> {
        let state = |address: String| {
            let state = State {
                driver: driver(&address),
                driver_override: driver_override(&address)?,
                autoprobe: read(&address, "sriov_drivers_autoprobe").ok(),
            };
            Ok((address, state))
        };
        functions()?.into_iter().map(state).collect::<Result<_>>().map(Self)
    }

    /// What another snapshot has differently, a line each.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let gone = self.0.keys().filter(|address| !other.0.contains_key(*address));
        let gone = gone.map(|address| format!("{address} has gone"));
        let changed = other.0.iter().filter_map(|(address, now)| match self.0.get(address) {
            None => Some(format!("{address} has appeared")),
            Some(then) if then != now => Some(format!("{address} was {then:?}, is {now:?}")),
            Some(_) => None,
        });
        gone.chain(changed).collect()
    }

    /// Puts the functions that are there back; virtual functions that were not go, and take those of
    /// their card along.
    pub fn restore(&self) -> Result<()> {
        let now = Self::take()?;
        for address in now.0.keys().filter(|address| !self.0.contains_key(*address)) {
            if path(address, "physfn/sriov_numvfs").exists() {
                write(address, "physfn/sriov_numvfs", "0")?;
            }
        }
        for (address, then) in &self.0 {
            if let Some(autoprobe) = &then.autoprobe {
                write(address, "sriov_drivers_autoprobe", autoprobe)?;
            }
            let there = path(address, "").exists();
            if there && now.0.get(address).is_some_and(|now| now != then) {
                bind(address, then.driver_override.as_deref())?;
            }
        }
        Ok(())
    }
}
