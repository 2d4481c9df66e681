//! What callers may say: names, tenants and options. Plain checks; touches nothing.

use std::collections::HashMap;

use libvfio::client::Failure;
use libvfio::error::ErrorKind;
use libvfio::shape::{Form, Setting, Shape, Value};
use zbus::wire::OwnedVariant;

/// Longest name of a tenant, a virtual machine or a device, in bytes.
const LONGEST: usize = 64;
/// Longest reason, in bytes.
const LONGEST_REASON: usize = 256;
/// Things that happened, if a caller does not say how many to tell of.
const LAST: usize = 100;
/// Most devices one call may name.
const MOST_DEVICES: usize = 256;

/// Options as they come from the bus.
pub type RawOptions = HashMap<String, OwnedVariant>;

/// Options of attaching and planning.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // Each is an option of its own on the bus.
pub struct AttachOptions {
    /// The virtual machine the devices are for.
    pub vm: Option<String>,
    /// Take all members of the groups along.
    pub whole_group: bool,
    /// Accept devices somebody else has put on VFIO.
    pub adopt: bool,
    /// Settings of the virtual functions, for the time of the lease.
    pub shape: Shape,
    /// Choose free virtual functions of this physical one.
    pub vf_of: Option<String>,
    /// Choose free devices of this pool of the policy.
    pub pool: Option<String>,
    /// How many; one if not given.
    pub count: Option<u32>,
    /// End the lease when this process does.
    pub pid: Option<u32>,
    /// End the lease when the caller leaves the bus.
    pub while_connected: bool,
    /// Take also what the host cannot live without.
    pub allow_protected: bool,
    /// Let the caller's user open the functions' nodes, for the time of the lease.
    pub node_access: bool,
    /// Leave device memory as the tenant leaves it, also where it can be cleared.
    pub no_scrub: bool,
    /// Whom the devices are for, where that is only planned.
    pub tenant: Option<String>,
}

/// Options of releasing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReleaseOptions {
    /// Reset nothing: what the tenant left in the functions stays there.
    pub no_reset: bool,
    /// Answer when all has ended, however long devices are held open.
    pub wait: bool,
}

/// Options of applying the policy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ApplyOptions {
    /// Devices that are others than were in their places before are meant.
    pub accept: bool,
    /// It is for the boot: what comes of it is kept.
    pub boot: bool,
}

/// Options of listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListOptions {
    /// Only what a table shows.
    pub brief: bool,
}

/// Options of listing what happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryOptions {
    /// How many of the newest.
    pub last: usize,
    /// Only what happened to this lease.
    pub lease: Option<String>,
    /// Only what happened to the device of this name.
    pub device: Option<String>,
}

impl Default for HistoryOptions {
    fn default() -> Self {
        Self { last: LAST, lease: None, device: None }
    }
}

fn invalid(message: String) -> Failure {
    Failure::new(ErrorKind::InvalidArgument, message)
}

/// Checks the name of a tenant or a virtual machine: it ends up in file names, logs and terminals.
pub fn check_name(what: &str, name: &str) -> Result<(), Failure> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._:@+-".contains(c);
    if name.is_empty() || name.len() > LONGEST {
        return Err(invalid(format!("the {what} has {} bytes; give 1 to {LONGEST}", name.len())));
    }
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) || !name.chars().all(plain) {
        return Err(invalid(format!(
            "the {what} {name:?} has characters that are not allowed; use letters, digits and \
             . _ : @ + - and begin with a letter or digit"
        )));
    }
    Ok(())
}

/// Checks the reason of a quarantine: it ends up in logs and on terminals.
pub fn check_reason(reason: &str) -> Result<(), Failure> {
    if reason.trim().is_empty() || reason.len() > LONGEST_REASON {
        return Err(invalid(format!(
            "the reason has {} bytes; say in 1 to {LONGEST_REASON} why the device is not trusted",
            reason.len()
        )));
    }
    if reason.chars().any(char::is_control) {
        return Err(invalid("the reason has control characters; give it as one line".into()));
    }
    Ok(())
}

/// Checks the list of devices of one call.
pub fn check_devices(devices: &[String]) -> Result<(), Failure> {
    if devices.is_empty() {
        return Err(invalid("no device was named; name at least one".into()));
    }
    if devices.len() > MOST_DEVICES {
        return Err(invalid(format!(
            "{} devices were named; name at most {MOST_DEVICES}",
            devices.len()
        )));
    }
    Ok(())
}

/// Checks that there are no options, where none are known.
pub fn check_no_options(raw: &RawOptions) -> Result<(), Failure> {
    match raw.keys().next() {
        None => Ok(()),
        Some(key) => {
            let key: String = key.chars().take(LONGEST).collect();
            Err(invalid(format!("there is no option {key:?}; this call has none")))
        }
    }
}

impl AttachOptions {
    /// Reads them, refusing what it does not know.
    pub fn read(raw: &RawOptions) -> Result<Self, Failure> {
        let mut options = Self::default();
        for (key, value) in raw {
            match key.as_str() {
                "vm" => options.vm = Some(text(key, value)?),
                "tenant" => options.tenant = Some(text(key, value)?),
                "whole_group" => options.whole_group = flag(key, value)?,
                "adopt" => options.adopt = flag(key, value)?,
                "allow_protected" => options.allow_protected = flag(key, value)?,
                "node_access" => options.node_access = flag(key, value)?,
                "no_scrub" => options.no_scrub = flag(key, value)?,
                "vf_of" => options.vf_of = Some(text(key, value)?),
                "pool" => options.pool = Some(text(key, value)?),
                "count" => options.count = Some(number(key, value)?),
                "pid" => options.pid = Some(number(key, value)?),
                "while_connected" => options.while_connected = flag(key, value)?,
                name => match Setting::from_name(name) {
                    Some(setting) => options.set(setting, value)?,
                    None => return Err(unknown_to_attach(name)),
                },
            }
        }
        if options.count.is_some() && options.vf_of.is_none() && options.pool.is_none() {
            let why = "'count' says how many of 'vf_of' or 'pool'; give one of them too";
            return Err(invalid(why.to_owned()));
        }
        if options.vf_of.is_some() && options.pool.is_some() {
            return Err(invalid("give either 'vf_of' or 'pool'".to_owned()));
        }
        if options.count == Some(0) {
            return Err(invalid("'count' is at least 1".to_owned()));
        }
        if options.pid.is_some() && options.while_connected {
            return Err(invalid(
                "a lease ends with one thing: give either 'pid' or 'while_connected'".to_owned(),
            ));
        }
        if let Some(vm) = &options.vm {
            check_name("virtual machine", vm)?;
        }
        if let Some(tenant) = &options.tenant {
            check_name("tenant", tenant)?;
        }
        Ok(options)
    }

    fn set(&mut self, setting: Setting, raw: &OwnedVariant) -> Result<(), Failure> {
        let key = setting.name();
        let value = match setting.form() {
            Form::Flag => Value::Flag(flag(key, raw)?),
            Form::Number => Value::Number(size(key, raw)?),
            Form::Text => Value::Text(text(key, raw)?),
        };
        self.shape.set(setting, value).map_err(|e| invalid(format!("option '{key}': {e}")))
    }
}

fn unknown_to_attach(key: &str) -> Failure {
    const KNOWN: [&str; 12] = [
        "vm",
        "tenant",
        "whole_group",
        "adopt",
        "allow_protected",
        "node_access",
        "no_scrub",
        "vf_of",
        "pool",
        "count",
        "pid",
        "while_connected",
    ];
    let known: Vec<&str> = KNOWN.into_iter().chain(Setting::ALL.map(Setting::name)).collect();
    unknown(key, &known)
}

impl ReleaseOptions {
    /// Reads them, refusing what it does not know.
    pub fn read(raw: &RawOptions) -> Result<Self, Failure> {
        let mut options = Self::default();
        for (key, value) in raw {
            match key.as_str() {
                "no_reset" => options.no_reset = flag(key, value)?,
                "wait" => options.wait = flag(key, value)?,
                _ => return Err(unknown(key, &["no_reset", "wait"])),
            }
        }
        Ok(options)
    }
}

impl ApplyOptions {
    /// Reads them, refusing what it does not know.
    pub fn read(raw: &RawOptions) -> Result<Self, Failure> {
        let mut options = Self::default();
        for (key, value) in raw {
            match key.as_str() {
                "accept" => options.accept = flag(key, value)?,
                "boot" => options.boot = flag(key, value)?,
                _ => return Err(unknown(key, &["accept", "boot"])),
            }
        }
        Ok(options)
    }
}

impl ListOptions {
    /// Reads them, refusing what it does not know.
    pub fn read(raw: &RawOptions) -> Result<Self, Failure> {
        let mut options = Self::default();
        for (key, value) in raw {
            match key.as_str() {
                "brief" => options.brief = flag(key, value)?,
                _ => return Err(unknown(key, &["brief"])),
            }
        }
        Ok(options)
    }
}

impl HistoryOptions {
    /// Reads them, refusing what it does not know.
    pub fn read(raw: &RawOptions) -> Result<Self, Failure> {
        let mut options = Self::default();
        for (key, value) in raw {
            match key.as_str() {
                "last" => {
                    options.last = usize::try_from(number(key, value)?).unwrap_or(usize::MAX);
                }
                "lease" => options.lease = Some(text(key, value)?),
                "device" => options.device = Some(text(key, value)?),
                _ => return Err(unknown(key, &["last", "lease", "device"])),
            }
        }
        Ok(options)
    }
}

fn unknown(key: &str, known: &[&str]) -> Failure {
    let key: String = key.chars().take(LONGEST).collect();
    invalid(format!("there is no option {key:?}; the options are {}", known.join(", ")))
}

fn flag(key: &str, value: &OwnedVariant) -> Result<bool, Failure> {
    bool::try_from(value.try_clone().map_err(|_| wrong(key, "a boolean"))?)
        .map_err(|_| wrong(key, "a boolean"))
}

fn number(key: &str, value: &OwnedVariant) -> Result<u32, Failure> {
    u32::try_from(value.try_clone().map_err(|_| wrong(key, "a number of type u"))?)
        .map_err(|_| wrong(key, "a number of type u"))
}

/// A number that may be larger than most.
fn size(key: &str, value: &OwnedVariant) -> Result<u64, Failure> {
    let wrong = || wrong(key, "a number of type u or t");
    match number(key, value) {
        Ok(small) => Ok(small.into()),
        Err(_) => u64::try_from(value.try_clone().map_err(|_| wrong())?).map_err(|_| wrong()),
    }
}

fn text(key: &str, value: &OwnedVariant) -> Result<String, Failure> {
    String::try_from(value.try_clone().map_err(|_| wrong(key, "a string"))?)
        .map_err(|_| wrong(key, "a string"))
}

fn wrong(key: &str, wanted: &str) -> Failure {
    invalid(format!("option '{key}' takes {wanted}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use zbus::wire::Variant;

    fn raw(key: &str, value: impl Into<Variant<'static>>) -> RawOptions {
        HashMap::from([(key.to_owned(), value.into().try_into().unwrap())])
    }

    #[test]
    fn odd_names_are_refused_with_the_rule() {
        for good in ["tenant-a", "b3a1f3c6-3a04-4d4e-8a4e-0f6b1f3c63a0", "user@site", "A"] {
            check_name("tenant", good).unwrap();
        }
        let long = "x".repeat(65);
        for bad in ["", "a b", "a/b", "../x", "-x", "a\n", "ü", "a\u{1b}[31m", long.as_str()] {
            assert_eq!(
                check_name("tenant", bad).unwrap_err().kind(),
                Some(ErrorKind::InvalidArgument)
            );
        }
    }

    #[test]
    fn a_reason_is_one_line_that_says_something() {
        check_reason("its firmware was changed, see https://…").unwrap();
        for bad in ["", "  ", "a\nb", "a\u{1b}[31m", "x".repeat(257).as_str()] {
            assert!(check_reason(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn settings_are_called_the_same_on_the_bus_and_on_disk() {
        for setting in Setting::ALL {
            let stored = serde_json::to_value(setting).unwrap();
            assert_eq!(stored, setting.name());
        }
    }

    #[test]
    fn options_are_typed_and_known() {
        assert!(AttachOptions::read(&raw("whole_group", true)).unwrap().whole_group);
        assert_eq!(AttachOptions::read(&raw("vm", "a")).unwrap().vm.as_deref(), Some("a"));
        assert!(AttachOptions::read(&raw("vm", 1u32)).is_err());
        assert_eq!(HistoryOptions::read(&raw("last", 3u32)).unwrap().last, 3);
        assert!(HistoryOptions::read(&raw("last", "3")).is_err());
        assert!(AttachOptions::read(&raw("vm", "a b")).is_err());
        assert_eq!(AttachOptions::read(&raw("pid", 7u32)).unwrap().pid, Some(7));
        assert!(AttachOptions::read(&raw("pid", "7")).is_err());
        let mut both = raw("pid", 7u32);
        both.extend(raw("while_connected", true));
        assert!(AttachOptions::read(&both).is_err());
        let shape = AttachOptions::read(&raw("vram_quota", 1u64 << 40)).unwrap().shape;
        assert_eq!(shape.get(Setting::VramQuota), Some(&Value::Number(1 << 40)));
        assert!(AttachOptions::read(&raw("vlan", 4095u32)).is_err());
        assert!(AttachOptions::read(&raw("vlan", "7")).is_err());
        assert!(AttachOptions::read(&raw("trust", 1u32)).is_err());
        let error = AttachOptions::read(&raw("vlam", 7u32)).unwrap_err().to_string();
        assert!(error.contains("vlan") && error.contains("while_connected"), "{error}");
        let error = ReleaseOptions::read(&raw("rest", true)).unwrap_err().to_string();
        assert!(error.contains("reset"), "{error}");
    }
}
