//! Which VFIO driver the kernel's module tables name for a device, and whether a module is there.
//! Works on the text of those tables; reads no file, never panics.

use memchr::memmem;

/// The module of the VFIO variant driver made for a device, from the text of `modules.alias` and
/// the device's `modalias`; `None` where only the generic `vfio-pci` will do.
///
/// The rule is libvirt's (`virPCIDeviceFindBestVFIOVariant`, `src/util/virpci.c`), so that it and
/// we choose alike: of the `vfio_pci:` aliases that match, the one with the fewest wildcards; of
/// equals, the first. The generic driver takes part, with seven wildcards. Patterns match as for
/// `modprobe`, which leaves them to `fnmatch(3)`.
pub fn best_vfio_driver<'a>(modules_alias: &'a str, modalias: &str) -> Option<&'a str> {
    let module = closest(modules_alias, "alias vfio_pci:", modalias)?;
    (!same_module(module, "vfio_pci")).then_some(module)
}

/// The module of the host driver made for a device, from the text of `modules.alias` and the device's
/// `modalias`: of those that match, the one with the fewest wildcards.
pub fn host_module<'a>(modules_alias: &'a str, modalias: &str) -> Option<&'a str> {
    closest(modules_alias, "alias pci:", modalias)
}

fn closest<'a>(modules_alias: &'a str, prefix: &str, modalias: &str) -> Option<&'a str> {
    let device = modalias.trim_end().strip_prefix("pci:")?;
    let matching = modules_alias.lines().filter_map(|line| {
        let (pattern, module) = line.strip_prefix(prefix)?.split_once(' ')?;
        let matching = matches(pattern.as_bytes(), device.as_bytes());
        matching.then_some((pattern, module.trim()))
    });
    Some(matching.min_by_key(|(pattern, _)| pattern.matches('*').count())?.1)
}

/// Whether a kernel has a module, to be loaded or built in, from the text of its `modules.dep` and
/// `modules.builtin`. As for `modprobe`, `-` and `_` are the same.
pub fn module_exists(modules_dep: &str, modules_builtin: &str, name: &str) -> bool {
    // The tables are long, so they are searched for what no spelling changes.
    let Some(same) = name.split(['-', '_']).next().filter(|same| !same.is_empty()) else {
        return false;
    };
    [modules_dep, modules_builtin].iter().any(|table| {
        memmem::find_iter(table.as_bytes(), same).any(|at| {
            let (before, file) = table.split_at(at);
            let path = before.rsplit('\n').next().unwrap_or_default();
            // What comes after a colon is needed by the module before it.
            let listed = !path.contains(':') && (path.is_empty() || path.ends_with('/'));
            let module = file.split_once(".ko").map(|(module, _)| module);
            listed && module.is_some_and(|module| same_module(module, name))
        })
    })
}

/// The lines of `modules.alias` that are about VFIO drivers, of which there are few.
pub(crate) fn vfio_lines(modules_alias: &str) -> String {
    let starts = memmem::find_iter(modules_alias.as_bytes(), "alias vfio_pci:");
    let starts = starts.filter(|at| modules_alias[..*at].ends_with('\n') || *at == 0);
    let lines = starts.filter_map(|at| modules_alias[at..].lines().next());
    lines.fold(String::new(), |all, line| all + line + "\n")
}

/// Whether two names mean one driver, or both none. A module is named with `_` where its driver's
/// directory may have `-`, and which of them is only seen once the module is there.
pub fn same_driver(one: Option<&str>, other: Option<&str>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => same_module(one, other),
        (one, other) => one == other,
    }
}

fn same_module(one: &str, other: &str) -> bool {
    let canonical = |byte| if byte == b'-' { b'_' } else { byte };
    one.bytes().map(canonical).eq(other.bytes().map(canonical))
}

/// Whether a pattern of `*`, `?` and `[…]` matches all of a text.
pub(crate) fn glob(pattern: &str, text: &str) -> bool {
    matches(pattern.as_bytes(), text.as_bytes())
}

/// A `*` that took too little is the only thing gone back to, and only the last one, so the time is
/// at most the product of the lengths.
fn matches(mut pattern: &[u8], mut text: &[u8]) -> bool {
    let mut retry: Option<(&[u8], &[u8])> = None;
    loop {
        if let [b'*', rest @ ..] = pattern {
            pattern = rest;
            retry = Some((rest, text));
        } else if let Some((pattern_left, text_left)) = match_one(pattern, text) {
            (pattern, text) = (pattern_left, text_left);
        } else if pattern.is_empty() && text.is_empty() {
            return true;
        } else {
            let Some((after_star, [_, longer @ ..])) = retry else { return false };
            (pattern, text) = (after_star, longer);
            retry = Some((after_star, longer));
        }
    }
}

/// What is left of pattern and text when the first element of one matches the first byte of the
/// other.
fn match_one<'p, 't>(pattern: &'p [u8], text: &'t [u8]) -> Option<(&'p [u8], &'t [u8])> {
    let (first, text_left) = text.split_first()?;
    let (element, pattern_left) = pattern.split_first()?;
    match element {
        b'?' => Some((pattern_left, text_left)),
        b'[' => {
            let (set, pattern_left) = split_set(pattern_left)?;
            in_set(set, *first).then_some((pattern_left, text_left))
        }
        byte => (byte == first).then_some((pattern_left, text_left)),
    }
}

/// The inside of a set and what follows its end. A `]` right after the start or the negation is a
/// member.
fn split_set(pattern: &[u8]) -> Option<(&[u8], &[u8])> {
    let members = usize::from(matches!(pattern.first(), Some(b'!' | b'^')));
    let end = pattern.iter().skip(members + 1).position(|byte| *byte == b']')? + members + 1;
    Some((pattern.get(..end)?, pattern.get(end + 1..)?))
}

fn in_set(set: &[u8], byte: u8) -> bool {
    let (negated, mut members) = match set {
        [b'!' | b'^', rest @ ..] => (true, rest),
        all => (false, all),
    };
    let mut found = false;
    loop {
        match members {
            [low, b'-', high, rest @ ..] => {
                found |= (low..=high).contains(&&byte);
                members = rest;
            }
            [member, rest @ ..] => {
                found |= *member == byte;
                members = rest;
            }
            [] => return found != negated,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALIASES: &str = "\
# Aliases extracted from modules themselves.
alias pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_core
alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci
alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci
alias vfio_pci:v00001AF4d00001000sv*sd*bc*sc*i* virtio_vfio_pci
alias vfio_pci:v00001AF4d00001000sv00001AF4sd*bc*sc*i* subsystem_vfio_pci
alias vfio_pci:v00001AF4d00001000sv*sd*bc02sc*i* late_vfio_pci
alias vfio_pci:v00008086d000056[Cc][01]sv*sd*bc*sc*i* set_vfio_pci
alias vfio_pci:no_module
alias vfio_pci:
alias
";

    fn best(modalias: &str) -> Option<&'static str> {
        best_vfio_driver(ALIASES, modalias)
    }

    #[test]
    fn a_variant_driver_is_preferred_to_the_generic_one() {
        let modalias = "pci:v000015B3d0000101Esv000015B3sd00000001bc02sc00i00\n";
        assert_eq!(best(modalias), Some("mlx5_vfio_pci"));
    }

    #[test]
    fn the_generic_driver_is_no_variant() {
        assert_eq!(best("pci:v000010DEd00002330sv000010DEsd000016C1bc03sc02i00"), None);
        let dashed = "alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio-pci\n";
        assert_eq!(best_vfio_driver(dashed, "pci:v1d2sv3sd4bc5sc6i7"), None);
    }

    #[test]
    fn fewest_wildcards_win_and_then_the_first() {
        let modalias = "pci:v00001AF4d00001000sv00001AF4sd00000001bc02sc00i00";
        assert_eq!(best(modalias), Some("subsystem_vfio_pci"));
        let modalias = "pci:v00001AF4d00001000sv0000FFFFsd00000001bc01sc00i00";
        assert_eq!(best(modalias), Some("virtio_vfio_pci"));
        let modalias = "pci:v00001AF4d00001000sv0000FFFFsd00000001bc02sc00i00";
        assert_eq!(best(modalias), Some("late_vfio_pci"));
    }

    #[test]
    fn sets_match_and_are_no_wildcards() {
        let modalias = "pci:v00008086d000056C1sv00008086sd00000001bc03sc80i00";
        assert_eq!(best(modalias), Some("set_vfio_pci"));
        assert_eq!(best("pci:v00008086d000056C2sv00008086sd00000001bc03sc80i00"), None);
    }

    #[test]
    fn what_is_no_pci_modalias_has_no_driver() {
        for modalias in ["", "pci:", "usb:v1D6Bp0002", "vfio_pci:v000015B3d0000101E"] {
            assert_eq!(best(modalias), None, "{modalias}");
        }
        assert_eq!(best_vfio_driver("", "pci:v000015B3d0000101E"), None);
    }

    #[test]
    fn patterns_match_as_fnmatch_does() {
        let cases = [
            ("", "", true),
            ("", "a", false),
            ("*", "", true),
            ("a*c", "abbbc", true),
            ("a*c", "abbbcd", false),
            ("*ab*ab", "abaabab", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("[a-c]", "b", true),
            ("[a-c]", "d", false),
            ("[!a-c]", "d", true),
            ("[^a-c]", "b", false),
            ("[]x]", "]", true),
            ("[!]x]", "]", false),
            ("[a-]", "-", true),
            ("[z-a]", "m", false),
            ("[abc", "a", false),
            ("[", "[", false),
            ("[!", "a", false),
            ("*[0-9]", "x1y2", true),
        ];
        for (pattern, text, expected) in cases {
            assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn hostile_patterns_take_no_longer_than_the_product_of_lengths() {
        let (pattern, text) = ("*a".repeat(1000) + "b", "a".repeat(1000));
        assert!(!matches(pattern.as_bytes(), text.as_bytes()));
    }

    #[test]
    fn modules_are_found_by_either_spelling_compressed_or_built_in() {
        let dep = "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz\n\
                   kernel/drivers/net/mlx5_core.ko:\ngarbage\n:\n";
        let builtin = "kernel/drivers/pci/pcie/pcieport.ko\n";
        for name in ["vfio-pci", "vfio_pci", "mlx5-core", "pcieport"] {
            assert!(module_exists(dep, builtin, name), "{name}");
        }
        // `vfio` is named only as what another module needs.
        for name in ["vfio", "vfio-pc", "garbage", "", "vfio-pci.ko"] {
            assert!(!module_exists(dep, builtin, name), "{name}");
        }
    }
}
