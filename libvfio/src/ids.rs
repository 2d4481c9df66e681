//! Names of vendors, devices, boards and classes, from the text of `pci.ids`. Keeps only the names
//! asked for; reads no file, never panics, and passes over lines it cannot make sense of.

use std::collections::{BTreeMap, BTreeSet};

/// The numbers a device is named by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Maker of the board.
    pub subsystem_vendor: u16,
    /// The board.
    pub subsystem_device: u16,
}

/// The names of the keys that were looked up, and of all classes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    vendors: BTreeMap<u16, Name>,
    devices: BTreeMap<(u16, u16), Name>,
    subsystems: BTreeMap<Key, Name>,
    /// By base class, subclass and programming interface, the latter two as far as given.
    classes: BTreeMap<(u8, Option<u8>, Option<u8>), Box<str>>,
}

/// `None` for what was asked for and has no name.
type Name = Option<Box<str>>;

/// The names of one key, as far as it has any.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceNames<'a> {
    /// Vendor.
    pub vendor: Option<&'a str>,
    /// Device.
    pub device: Option<&'a str>,
    /// Maker of the board.
    pub subsystem_vendor: Option<&'a str>,
    /// The board.
    pub subsystem: Option<&'a str>,
}

/// The names of one class, as far as it has any.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClassNames<'a> {
    /// Base class.
    pub base: Option<&'a str>,
    /// Subclass.
    pub subclass: Option<&'a str>,
    /// Programming interface.
    pub interface: Option<&'a str>,
}

/// Looks names up in the text of `pci.ids`, in one pass. Of names given twice the first counts.
///
/// The format is that of the comment at the head of the file: a line for a vendor, below it with
/// one tab its devices, below each with two tabs its boards; likewise, after a `C`, classes.
pub fn lookup(text: &str, wanted: &BTreeSet<Key>) -> Names {
    let vendors = wanted.iter().flat_map(|key| [key.vendor, key.subsystem_vendor]);
    let mut names = Names {
        vendors: vendors.map(|vendor| (vendor, None)).collect(),
        devices: wanted.iter().map(|key| ((key.vendor, key.device), None)).collect(),
        subsystems: wanted.iter().map(|key| (*key, None)).collect(),
        classes: BTreeMap::new(),
    };
    let mut place = Place::Unknown;
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        place = names.learn(place, line);
    }
    names
}

/// What the lines further in belong to.
#[derive(Debug, Clone, Copy)]
enum Place {
    Vendor(u16),
    Device(u16, u16),
    Class(u8),
    Subclass(u8, u8),
    /// Nothing wanted, or nothing known.
    Unknown,
}

impl Names {
    /// The names of a key.
    pub fn of(&self, key: &Key) -> DeviceNames<'_> {
        fn get<'a, K: Ord>(names: &'a BTreeMap<K, Name>, key: &K) -> Option<&'a str> {
            names.get(key)?.as_deref()
        }
        DeviceNames {
            vendor: get(&self.vendors, &key.vendor),
            device: get(&self.devices, &(key.vendor, key.device)),
            subsystem_vendor: get(&self.vendors, &key.subsystem_vendor),
            subsystem: get(&self.subsystems, key),
        }
    }

    /// Whether a key was looked up, found or not.
    pub fn knows(&self, key: &Key) -> bool {
        self.subsystems.contains_key(key)
    }

    /// The names of a class of 24 bits: base class, subclass, programming interface.
    pub fn class(&self, class: u32) -> ClassNames<'_> {
        let [interface, subclass, base, _] = class.to_le_bytes();
        let get = |key| self.classes.get(&key).map(AsRef::as_ref);
        ClassNames {
            base: get((base, None, None)),
            subclass: get((base, Some(subclass), None)),
            interface: get((base, Some(subclass), Some(interface))),
        }
    }

    /// Takes what is wanted from a line; returns the place the next line is in.
    fn learn(&mut self, place: Place, line: &str) -> Place {
        let text = line.trim_start_matches('\t');
        match (line.len() - text.len(), place) {
            (0, _) => self.learn_outermost(text).unwrap_or(Place::Unknown),
            // A line that makes no sense or is not wanted still ends the device before it.
            (1, Place::Vendor(vendor) | Place::Device(vendor, _)) => {
                self.learn_device(vendor, text).unwrap_or(Place::Vendor(vendor))
            }
            (1, Place::Class(base) | Place::Subclass(base, _)) => {
                self.learn_subclass(base, text).unwrap_or(Place::Class(base))
            }
            (2, Place::Device(vendor, device)) => {
                self.learn_subsystem(vendor, device, text);
                place
            }
            (2, Place::Subclass(base, subclass)) => {
                self.learn_interface(base, subclass, text);
                place
            }
            _ => place,
        }
    }

    fn learn_outermost(&mut self, text: &str) -> Option<Place> {
        if let Some(class) = text.strip_prefix("C ") {
            let (base, name) = code(class)?;
            self.classes.entry((base, None, None)).or_insert_with(|| name.into());
            return Some(Place::Class(base));
        }
        let (vendor, name) = id(text)?;
        keep(self.vendors.get_mut(&vendor)?, name);
        Some(Place::Vendor(vendor))
    }

    fn learn_device(&mut self, vendor: u16, text: &str) -> Option<Place> {
        let (device, name) = id(text)?;
        keep(self.devices.get_mut(&(vendor, device))?, name);
        Some(Place::Device(vendor, device))
    }

    fn learn_subsystem(&mut self, vendor: u16, device: u16, text: &str) -> Option<()> {
        let (subsystem_vendor, rest) = id(text)?;
        let (subsystem_device, name) = id(rest)?;
        let key = Key { vendor, device, subsystem_vendor, subsystem_device };
        keep(self.subsystems.get_mut(&key)?, name);
        Some(())
    }

    fn learn_subclass(&mut self, base: u8, text: &str) -> Option<Place> {
        let (subclass, name) = code(text)?;
        self.classes.entry((base, Some(subclass), None)).or_insert_with(|| name.into());
        Some(Place::Subclass(base, subclass))
    }

    fn learn_interface(&mut self, base: u8, subclass: u8, text: &str) -> Option<()> {
        let (interface, name) = code(text)?;
        let key = (base, Some(subclass), Some(interface));
        self.classes.entry(key).or_insert_with(|| name.into());
        Some(())
    }
}

fn keep(slot: &mut Name, name: &str) {
    slot.get_or_insert_with(|| name.into());
}

/// Four hexadecimal digits and the text after them.
fn id(text: &str) -> Option<(u16, &str)> {
    let (digits, rest) = number(text, 4)?;
    Some((u16::from_str_radix(digits, 16).ok()?, rest))
}

/// Two hexadecimal digits and the text after them.
fn code(text: &str) -> Option<(u8, &str)> {
    let (digits, rest) = number(text, 2)?;
    Some((u8::from_str_radix(digits, 16).ok()?, rest))
}

/// As many hexadecimal digits, and what follows the blanks after them, which is never nothing.
fn number(text: &str, digits: usize) -> Option<(&str, &str)> {
    let (number, rest) = text.split_once(' ')?;
    let sound = number.len() == digits && number.bytes().all(|byte| byte.is_ascii_hexdigit());
    let rest = rest.trim();
    (sound && !rest.is_empty()).then_some((number, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of the real file.
    const EXCERPT: &str = "\
#
#\tList of PCI ID's
#

10de  NVIDIA Corporation
\t22ba  AD102 High Definition Audio Controller
\t2331  GH100 [H100 PCIe]
1043  ASUSTeK Computer Inc.
8086  Intel Corporation
\t10c9  82576 Gigabit Network Connection
\t\t103c 31ef  NC362i Integrated Dual port Gigabit Server Adapter
# This comment is not of the real file.
\t\t8086 a01c  Gigabit ET Dual Port Server Adapter
\t10ca  82576 Virtual Function
C 01  Mass storage controller
\t08  Non-Volatile memory controller
\t\t01  NVMHCI
\t\t02  NVM Express
C 03  Display controller
\t00  VGA compatible controller
\t\t00  VGA controller
\t02  3D controller
";

    const fn key(vendor: u16, device: u16, subsystem_vendor: u16, subsystem_device: u16) -> Key {
        Key { vendor, device, subsystem_vendor, subsystem_device }
    }

    fn names(text: &str, keys: &[Key]) -> Names {
        lookup(text, &keys.iter().copied().collect())
    }

    const IGB: Key = key(0x8086, 0x10c9, 0x8086, 0xa01c);

    #[test]
    fn a_device_has_the_names_of_vendor_device_and_board() {
        let expected = DeviceNames {
            vendor: Some("Intel Corporation"),
            device: Some("82576 Gigabit Network Connection"),
            subsystem_vendor: Some("Intel Corporation"),
            subsystem: Some("Gigabit ET Dual Port Server Adapter"),
        };
        assert_eq!(names(EXCERPT, &[IGB]).of(&IGB), expected);
    }

    #[test]
    fn a_board_not_listed_still_has_a_maker() {
        let board = key(0x10de, 0x2331, 0x1043, 0x0001);
        let names = names(EXCERPT, &[board]);
        let found = names.of(&board);
        assert_eq!(found.device, Some("GH100 [H100 PCIe]"));
        assert_eq!(found.subsystem_vendor, Some("ASUSTeK Computer Inc."));
        assert_eq!(found.subsystem, None);
    }

    #[test]
    fn only_what_was_asked_for_is_kept() {
        let names = names(EXCERPT, &[IGB]);
        assert!(names.knows(&IGB));
        let other = key(0x10de, 0x2331, 0x103c, 0x31ef);
        assert!(!names.knows(&other));
        assert_eq!(names.of(&other), DeviceNames::default());
        assert_eq!((names.vendors.len(), names.devices.len(), names.subsystems.len()), (1, 1, 1));
    }

    #[test]
    fn what_was_asked_for_in_vain_is_known_to_have_no_name() {
        let absent = key(0x1234, 0x1111, 0x1af4, 0x1100);
        let names = names(EXCERPT, &[absent]);
        assert!(names.knows(&absent));
        assert_eq!(names.of(&absent), DeviceNames::default());
    }

    #[test]
    fn classes_have_names_as_far_as_listed() {
        let names = names(EXCERPT, &[]);
        let nvme = ClassNames {
            base: Some("Mass storage controller"),
            subclass: Some("Non-Volatile memory controller"),
            interface: Some("NVM Express"),
        };
        assert_eq!(names.class(0x01_0802), nvme);
        let base = ClassNames { base: Some("Display controller"), ..ClassNames::default() };
        assert_eq!(names.class(0x03_8000), base);
        assert_eq!(names.class(0xff_ffff), ClassNames::default());
    }

    #[test]
    fn windows_line_ends_change_nothing() {
        assert_eq!(names(&EXCERPT.replace('\n', "\r\n"), &[IGB]), names(EXCERPT, &[IGB]));
    }

    #[test]
    fn garbage_is_passed_over_and_belongs_to_nothing() {
        let text = "\
\t2330  belongs to no vendor
10de
10de  
+0de  signed
10de0 five digits
10dé  not hexadecimal
10DE  NVIDIA
\t2330  H100
\t\t10de  half a board
\t\t10de 16c1
\t\t\t10de 16c1  too deep
\tnonsense
\t\t10de 16c1  belongs to no device
\t2330  a second name
S 10  unknown section
\t2330  belongs to no vendor
C zz  no class
\t00  belongs to no class
C 03  Display
\t0  no subclass
\t\t00  belongs to no subclass
";
        let h100 = key(0x10de, 0x2330, 0x10de, 0x16c1);
        let names = names(text, &[h100]);
        let found = names.of(&h100);
        assert_eq!((found.vendor, found.device), (Some("NVIDIA"), Some("H100")));
        assert_eq!(found.subsystem, None);
        assert_eq!(names.classes.len(), 1);
    }

    #[test]
    fn cut_anywhere_names_are_whole_or_the_last_is_short() {
        for end in 0..EXCERPT.len() {
            let names = names(&EXCERPT[..end], &[IGB]);
            let device = names.of(&IGB).device.unwrap_or_default();
            assert!("82576 Gigabit Network Connection".starts_with(device), "{end}: {device}");
        }
    }
}
