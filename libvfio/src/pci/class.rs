//! Class codes: short names for what a host with devices to assign has, and the aliases people
//! call devices by. Touches nothing. Codes are those of `linux/pci_ids.h` and of `pci.ids`.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// A short name for a class of 24 bits: base class, subclass, programming interface. The name of
/// the base class where the subclass has none.
pub fn name(class: u32) -> &'static str {
    match class >> 8 {
        0x0101 => "IDE controller",
        0x0104 => "RAID controller",
        0x0106 => "SATA controller",
        0x0107 => "SAS controller",
        0x0108 => "NVMe controller",
        0x0200 => "Ethernet controller",
        0x0207 => "InfiniBand controller",
        0x0208 => "fabric controller",
        0x0300 => "VGA controller",
        0x0302 => "3D controller",
        0x0401 | 0x0403 => "audio device",
        0x0502 => "CXL memory",
        0x0600 => "host bridge",
        0x0601 => "ISA bridge",
        0x0604 => "PCI bridge",
        0x0680 => "bridge",
        0x0700 => "serial port",
        0x0806 => "IOMMU",
        0x0c03 => "USB controller",
        0x0c05 => "SMBus",
        0x1200 => "processing accelerator",
        _ => base_name(class),
    }
}

fn base_name(class: u32) -> &'static str {
    match class >> 16 {
        0x00 => "unclassified device",
        0x01 => "storage controller",
        0x02 => "network controller",
        0x03 => "display controller",
        0x04 => "multimedia controller",
        0x05 => "memory controller",
        0x06 => "bridge",
        0x07 => "communication controller",
        0x08 => "system peripheral",
        0x09 => "input controller",
        0x0a => "docking station",
        0x0b => "processor",
        0x0c => "serial bus controller",
        0x0d => "wireless controller",
        0x0e => "intelligent controller",
        0x0f => "satellite controller",
        0x10 => "encryption controller",
        0x11 => "signal processing controller",
        0x12 => "processing accelerator",
        0x13 => "instrumentation",
        0x40 => "coprocessor",
        _ => "unknown class",
    }
}

/// What people call a kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClassAlias {
    /// Display controllers, with a screen (VGA) or without (3D).
    Gpu,
    /// Processing accelerators.
    Accelerator,
    /// Network controllers, InfiniBand among them.
    Nic,
    /// NVM Express controllers.
    Nvme,
    /// Storage controllers, NVM Express among them.
    Storage,
    /// Audio devices.
    Audio,
    /// USB controllers.
    Usb,
    /// Bridges.
    Bridge,
}

impl ClassAlias {
    /// Every alias.
    pub const ALL: [Self; 8] = [
        Self::Gpu,
        Self::Accelerator,
        Self::Nic,
        Self::Nvme,
        Self::Storage,
        Self::Audio,
        Self::Usb,
        Self::Bridge,
    ];

    /// The word people type.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::Accelerator => "accelerator",
            Self::Nic => "nic",
            Self::Nvme => "nvme",
            Self::Storage => "storage",
            Self::Audio => "audio",
            Self::Usb => "usb",
            Self::Bridge => "bridge",
        }
    }

    /// Whether a class of 24 bits is of this kind.
    pub fn matches(self, class: u32) -> bool {
        let (base, subclass) = (class >> 16, class >> 8);
        match self {
            Self::Gpu => base == 0x03,
            Self::Accelerator => base == 0x12,
            Self::Nic => base == 0x02,
            Self::Nvme => subclass == 0x0108,
            Self::Storage => base == 0x01,
            Self::Audio => matches!(subclass, 0x0401 | 0x0403),
            Self::Usb => subclass == 0x0c03,
            Self::Bridge => base == 0x06,
        }
    }
}

impl fmt::Display for ClassAlias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ClassAlias {
    type Err = UnknownAlias;

    fn from_str(text: &str) -> Result<Self, UnknownAlias> {
        let known = |alias: &Self| alias.name().eq_ignore_ascii_case(text);
        Self::ALL.into_iter().find(known).ok_or(UnknownAlias)
    }
}

/// A word that is no class alias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no such class; known are {}", ClassAlias::ALL.map(ClassAlias::name).join(", "))]
pub struct UnknownAlias;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subclass_without_a_name_has_that_of_its_base() {
        assert_eq!(name(0x03_0200), "3D controller");
        assert_eq!(name(0x03_8000), "display controller");
        assert_eq!(name(0x01_0802), "NVMe controller");
        assert_eq!(name(0xff_0000), "unknown class");
        assert_eq!(name(u32::MAX), "unknown class");
    }

    #[test]
    fn aliases_match_what_people_mean() {
        let aliases = |class| -> Vec<&str> {
            ClassAlias::ALL.iter().filter(|a| a.matches(class)).map(|a| a.name()).collect()
        };
        assert_eq!(aliases(0x03_0000), ["gpu"]);
        assert_eq!(aliases(0x03_0200), ["gpu"]);
        assert_eq!(aliases(0x03_8000), ["gpu"]);
        assert_eq!(aliases(0x04_0300), ["audio"]);
        assert_eq!(aliases(0x04_0000), [""; 0]);
        assert_eq!(aliases(0x01_0802), ["nvme", "storage"]);
        assert_eq!(aliases(0x01_0601), ["storage"]);
        assert_eq!(aliases(0x02_0700), ["nic"]);
        assert_eq!(aliases(0x06_0400), ["bridge"]);
        assert_eq!(aliases(0x0c_0330), ["usb"]);
        assert_eq!(aliases(0x12_0000), ["accelerator"]);
    }

    #[test]
    fn aliases_are_read_back_and_others_refused_with_the_list() {
        for alias in ClassAlias::ALL {
            assert_eq!(alias.to_string().parse(), Ok(alias));
        }
        assert_eq!("GPU".parse(), Ok(ClassAlias::Gpu));
        let error = "toaster".parse::<ClassAlias>().unwrap_err().to_string();
        assert_eq!(
            error,
            "no such class; known are gpu, accelerator, nic, nvme, storage, audio, usb, bridge"
        );
    }
}
