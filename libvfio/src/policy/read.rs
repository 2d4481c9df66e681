//! From the text of files to a policy, or to everything that is wrong with it. Pure.

use std::ops::Range;
use std::str::FromStr;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::keys::{self, Kind, Section};
use super::problem::nearest;
use super::{BOOT_LIMIT, Lessees, Mode, Policy, Pool, Problem, Problems, Resets, Selector, Source};
use crate::address::PciAddress;
use crate::iommu::Isolation;
use crate::pci::class::ClassAlias;
use crate::scrub::{self, ReadBack};
use crate::shape::{self, Form, Setting, Shape};

/// The longest name of a pool, in bytes.
const LONGEST: usize = 64;
/// Isolation that can be demanded, by name.
const GRADES: [(&str, Isolation); 3] = [
    ("full", Isolation::Full),
    ("no-interrupt-remapping", Isolation::NoInterruptRemapping),
    ("acs-override", Isolation::AcsOverride),
];
/// Reset methods by the kernel's names (`pci_reset_fn_methods`, `drivers/pci/pci.c`).
const RESETS: [&str; 7] = ["device_specific", "acpi", "flr", "af_flr", "pm", "bus", "cxl_bus"];

type Table<'i> = DeTable<'i>;
type Value<'i> = Spanned<DeValue<'i>>;

/// What `sources` say together.
pub(super) fn read(sources: &[Source]) -> Result<Policy, Problems> {
    let mut policy = Policy::default();
    let mut limit = None;
    let mut problems = Vec::new();
    for source in sources {
        let mut reader = Reader { source, problems: Vec::new() };
        reader.file(&mut policy, &mut limit);
        reader.problems.sort_by_key(|problem| (problem.place.line, problem.place.column));
        problems.append(&mut reader.problems);
        policy.files.push(source.name.clone());
    }
    policy.boot_limit = limit.map_or(BOOT_LIMIT, |(limit, _)| limit);
    policy.pools.sort_by(|a, b| a.name.cmp(&b.name));
    if problems.is_empty() { Ok(policy) } else { Err(Problems(problems)) }
}

/// A file that is being read, and what is wrong with it.
struct Reader<'a> {
    source: &'a Source,
    problems: Vec<Problem>,
}

/// A value that was given, and where.
struct Given<T> {
    value: T,
    at: Range<usize>,
}

impl Reader<'_> {
    fn complain(&mut self, at: usize, text: impl Into<String>, remedy: impl Into<String>) {
        let place = self.source.place(at);
        self.problems.push(Problem { place, text: text.into(), remedy: remedy.into() });
    }

    fn file(&mut self, policy: &mut Policy, limit: &mut Option<(Duration, String)>) {
        let source = self.source;
        let (table, errors) = DeTable::parse_recoverable(&source.text);
        for error in errors {
            let at = error.span().map_or(0, |span| span.start);
            self.complain(at, error.message().to_owned(), "see https://toml.io for the notation");
        }
        if !self.problems.is_empty() {
            return;
        }
        let table = table.get_ref();
        self.know(table, &keys::FILE);
        if let Some(boot) = self.get(table, &keys::FILE, "boot", as_table) {
            self.know(boot.value, &keys::BOOT);
            let seconds = self.number(boot.value, &keys::BOOT, "limit");
            match (seconds, &*limit) {
                (Some(seconds), Some((_, other))) => {
                    let text = format!("'limit' is given in {other} too");
                    self.complain(seconds.at.start, text, "give it once");
                }
                (Some(seconds), None) => {
                    let duration = Duration::from_secs(seconds.value.into());
                    *limit = Some((duration, source.name.clone()));
                }
                (None, _) => {}
            }
        }
        let Some(pools) = self.get(table, &keys::FILE, "pool", as_table) else { return };
        for (name, value) in pools.value {
            let at = name.span().start;
            let name = name.get_ref().as_ref();
            self.check_name(at, name);
            if let Some(other) = policy.pool(name) {
                let text = format!("pool '{name}' is described at {} too", other.place);
                self.complain(at, text, "describe it once, or give one of them another name");
            }
            match as_table(value) {
                Some(table) => {
                    let pool = self.pool(name, at, table);
                    policy.pools.extend(pool);
                }
                None => self.complain(
                    value.span().start,
                    format!("'{name}' is {}, and a pool is a table", value.get_ref().type_str()),
                    format!("write [pool.{name}] and its keys below"),
                ),
            }
        }
    }

    fn check_name(&mut self, at: usize, name: &str) {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if name.is_empty() || name.len() > LONGEST || !name.chars().all(plain) {
            let remedy = format!("use 1 to {LONGEST} letters, digits and . _ -");
            self.complain(at, format!("{name:?} is no name of a pool"), remedy);
        }
    }

    /// Complains of keys that nobody knows.
    fn know(&mut self, table: &Table<'_>, section: &Section) {
        for (key, _) in table {
            let name = key.get_ref().as_ref();
            if section.keys.iter().any(|known| known.name == name) {
                continue;
            }
            let known = || section.keys.iter().map(|key| key.name);
            let remedy = match nearest(name, known()) {
                Some(nearest) => format!("did you mean '{nearest}'?"),
                None => format!("known are {}", known().collect::<Vec<_>>().join(", ")),
            };
            let what = section.title;
            self.complain(key.span().start, format!("there is no key '{name}' in {what}"), remedy);
        }
    }

    /// The value of a key if it is given and `of` takes it.
    fn get<'t, T>(
        &mut self,
        table: &'t Table<'_>,
        section: &Section,
        name: &str,
        of: impl Fn(&'t Value<'t>) -> Option<T>,
    ) -> Option<Given<T>> {
        let value = table.get(name)?;
        let at = value.span();
        if let Some(value) = of(value) {
            return Some(Given { value, at });
        }
        let kind = section.keys.iter().find(|key| key.name == name)?.kind.describe();
        let is = match value.get_ref() {
            DeValue::Array(_) => "an array",
            DeValue::Table(_) => "a table",
            // As it is written.
            _ => self.source.text.get(value.span()).unwrap_or_default(),
        };
        self.complain(at.start, format!("'{name}' takes {kind}, and this is {is}"), "correct it");
        None
    }

    fn text(&mut self, table: &Table<'_>, section: &Section, name: &str) -> Option<Given<String>> {
        self.get(table, section, name, |value| value.get_ref().as_str().map(str::to_owned))
    }

    fn flag(&mut self, table: &Table<'_>, section: &Section, name: &str) -> Option<bool> {
        Some(self.get(table, section, name, |value| value.get_ref().as_bool())?.value)
    }

    fn number(&mut self, table: &Table<'_>, section: &Section, name: &str) -> Option<Given<u32>> {
        let Kind::Number(least, most) = section.keys.iter().find(|key| key.name == name)?.kind
        else {
            return None;
        };
        self.get(table, section, name, |value| {
            let number = value.get_ref().as_integer()?;
            let number = u32::from_str_radix(number.as_str(), number.radix()).ok()?;
            (least..=most).contains(&number).then_some(number)
        })
    }

    fn texts(
        &mut self,
        table: &Table<'_>,
        section: &Section,
        name: &str,
    ) -> Option<Given<Vec<Given<String>>>> {
        self.get(table, section, name, |value| {
            let each = |value: &Value<'_>| {
                let text = value.get_ref().as_str()?.to_owned();
                Some(Given { value: text, at: value.span() })
            };
            value.get_ref().as_array()?.iter().map(each).collect()
        })
    }

    /// A text that is one of these words, or whatever else can be read from one.
    fn read<T>(
        &mut self,
        given: Option<Given<String>>,
        of: impl Fn(&str) -> Result<T, String>,
        words: &[&str],
    ) -> Option<T> {
        let Given { value, at } = given?;
        let error = match of(&value) {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        let remedy = match nearest(&value, words.iter().copied()) {
            Some(nearest) => format!("did you mean '{nearest}'?"),
            None if words.is_empty() => "correct it".to_owned(),
            None => format!("known are {}", words.join(", ")),
        };
        self.complain(at.start, error, remedy);
        None
    }

    fn pool(&mut self, name: &str, at: usize, table: &Table<'_>) -> Option<Pool> {
        let section = &keys::POOL;
        let found = self.problems.len();
        self.know(table, section);
        let word = |text: &str| match text {
            "host" => Ok(Mode::Host),
            "passthrough" => Ok(Mode::Passthrough),
            "on-lease" => Ok(Mode::OnLease),
            _ => Err(format!("'{text}' is no mode")),
        };
        let mode = self.text(table, section, "mode");
        let mode = self.read(mode, word, &Mode::NAMES);
        let grade = |text: &str| {
            let found = GRADES.iter().find(|(name, _)| *name == text);
            found.map(|(_, grade)| *grade).ok_or_else(|| format!("'{text}' is no isolation"))
        };
        let isolation = self.text(table, section, "isolation");
        let isolation = self.read(isolation, grade, &GRADES.map(|(name, _)| name));
        let resets = |text: &str| {
            let found = Resets::ALL.into_iter().find(|resets| resets.name() == text);
            found.ok_or_else(|| format!("'{text}' is no kind of reset"))
        };
        let reset = self.text(table, section, "reset");
        let reset = self.read(reset, resets, &Resets::ALL.map(Resets::name));
        let count = |given: Option<Given<u32>>| given.and_then(|g| u16::try_from(g.value).ok());
        let pool = Pool {
            name: name.to_owned(),
            place: self.source.place(at),
            mode: mode.unwrap_or(Mode::Host),
            select: self.selectors(table, "select"),
            except: self.selectors(table, "except"),
            vfs: count(self.number(table, section, "vfs")),
            shape: self.shape(table),
            reset_order: self.reset_order(table),
            reset: reset.unwrap_or_default(),
            scrub: self.scrub(table).unwrap_or_default(),
            d3cold: self.flag(table, section, "d3cold"),
            lessees: Lessees {
                users: self.names(table, "users"),
                groups: self.names(table, "groups"),
                tenants: self.names(table, "tenants"),
            },
            isolation: isolation.unwrap_or(Isolation::Full),
            keep_for_host: count(self.number(table, section, "keep-for-host")).unwrap_or(0).into(),
            correct_drift: self.flag(table, section, "correct-drift").unwrap_or(false),
        };
        for key in ["mode", "select"].into_iter().filter(|key| !table.contains_key(*key)) {
            let text = format!("pool '{name}' has no '{key}'");
            self.complain(at, text, "say it; 'vfioctl policy schema' explains every key");
        }
        self.contradictions(table, &pool, mode);
        (self.problems.len() == found).then_some(pool)
    }

    /// What makes no sense together.
    fn contradictions(&mut self, table: &Table<'_>, pool: &Pool, mode: Option<Mode>) {
        let at = |key: &str| table.get_key_value(key).map_or(0, |(key, _)| key.span().start);
        if mode == Some(Mode::Host) {
            let for_guests = [
                "vfs",
                "users",
                "groups",
                "tenants",
                "isolation",
                "keep-for-host",
                "reset",
                "scrub",
            ];
            for key in for_guests.into_iter().filter(|key| table.contains_key(*key)) {
                let text = format!("'{key}' is for guests, and pool '{}' is the host's", pool.name);
                self.complain(at(key), text, format!("take '{key}' out, or choose another mode"));
            }
        }
        if pool.reset == Resets::None && table.contains_key("reset-order") {
            let text =
                "'reset-order' is of resets, and 'reset' says that there are none".to_owned();
            self.complain(at("reset-order"), text, "take one of them out");
        }
        if pool.scrub == scrub::Rule::Nvme && table.contains_key("vfs") {
            let text = "'nvme' erases namespaces, which virtual functions share".to_owned();
            self.complain(at("scrub"), text, "choose another scrubber, or lease the card whole");
        }
        if table.contains_key("shape") && !table.contains_key("vfs") {
            let text = "'shape' is of virtual functions, and the pool makes none".to_owned();
            self.complain(at("shape"), text, "say how many with 'vfs', or take it out");
        }
        if let Some(select) = table.get("select")
            && select.get_ref().as_array().is_some_and(|all| all.is_empty())
        {
            let text = format!("pool '{}' selects nothing", pool.name);
            self.complain(select.span().start, text, "give at least one selector, or take it out");
        }
    }

    fn names(&mut self, table: &Table<'_>, key: &str) -> Vec<String> {
        let given = self.texts(table, &keys::POOL, key);
        let mut names = Vec::new();
        for Given { value, at } in given.into_iter().flat_map(|given| given.value) {
            if value.is_empty() || value.chars().any(char::is_whitespace) {
                self.complain(at.start, format!("{value:?} is no name"), "correct it");
            }
            names.push(value);
        }
        names
    }

    fn reset_order(&mut self, table: &Table<'_>) -> Option<Vec<String>> {
        let given = self.texts(table, &keys::POOL, "reset-order")?;
        let known = |text: &str| {
            let known = RESETS.contains(&text).then(|| text.to_owned());
            known.ok_or_else(|| format!("'{text}' is no reset method"))
        };
        if given.value.is_empty() {
            let remedy = "name at least one method, or leave the kernel's order";
            self.complain(given.at.start, "'reset-order' is empty: no reset would be left", remedy);
        }
        let each = given.value.into_iter();
        Some(each.filter_map(|given| self.read(Some(given), known, &RESETS)).collect())
    }

    /// A word, or a table with a program.
    fn scrub(&mut self, table: &Table<'_>) -> Option<scrub::Rule> {
        let section = &keys::SCRUB;
        let value = table.get("scrub")?;
        let Some(table) = as_table(value) else {
            let word = |text: &str| match text {
                "bar-zero" => Ok(scrub::Rule::BarZero(ReadBack::Full)),
                "bar-zero-sampled" => Ok(scrub::Rule::BarZero(ReadBack::Sampled)),
                "nvme" => Ok(scrub::Rule::Nvme),
                "none" => Ok(scrub::Rule::None),
                _ => Err(format!("'{text}' is no scrubber")),
            };
            let given = self.text(table, &keys::POOL, "scrub");
            return self.read(given, word, &scrub::Rule::NAMES);
        };
        self.know(table, section);
        let at = value.span().start;
        let command = self.texts(table, section, "command");
        let timeout = self.number(table, section, "timeout").map(|given| given.value);
        let driver = self.text(table, section, "driver");
        let Some(command) = command else {
            if !table.contains_key("command") {
                let remedy = "say which program: scrub = { command = [\"/usr/local/sbin/…\"] }";
                self.complain(at, "'scrub' has no 'command'", remedy);
            }
            return None;
        };
        let absolute = |path: &String| path.starts_with('/');
        let command: Vec<String> = command.value.into_iter().map(|given| given.value).collect();
        if !command.first().is_some_and(absolute) {
            let text = "'command' names no program by its absolute path";
            self.complain(at, text, "begin it with one: command = [\"/usr/local/sbin/…\"]");
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let name = |text: &str| {
            let good = !text.is_empty() && text.len() <= LONGEST && text.chars().all(plain);
            good.then(|| text.to_owned()).ok_or_else(|| format!("{text:?} is no name of a driver"))
        };
        let driver = self.read(driver, name, &[]);
        let timeout = timeout.unwrap_or(scrub::COMMAND_TIMEOUT);
        Some(scrub::Rule::Command { command, timeout, driver })
    }

    fn selectors(&mut self, table: &Table<'_>, key: &str) -> Vec<Selector> {
        let tables = self.get(table, &keys::POOL, key, |value| {
            let each = |value: &'_ Value<'_>| value.get_ref().is_table();
            let all = value.get_ref().as_array()?;
            all.iter().all(each).then_some(all)
        });
        let mut selectors = Vec::new();
        for value in tables.iter().flat_map(|given| given.value.iter()) {
            let Some(table) = value.get_ref().as_table() else { continue };
            selectors.push(self.selector(value.span().start, table));
        }
        selectors
    }

    fn selector(&mut self, at: usize, table: &Table<'_>) -> Selector {
        let section = &keys::SELECTOR;
        self.know(table, section);
        let text = |reader: &mut Self, name| reader.text(table, section, name);
        let (vendor, device) = (text(self, "vendor"), text(self, "device"));
        let (subsystem, class) = (text(self, "subsystem"), text(self, "class"));
        let (address, path) = (text(self, "address"), text(self, "path"));
        let (slot, driver) = (text(self, "slot"), text(self, "driver"));
        let serial = text(self, "serial");
        let classes = ClassAlias::ALL.map(ClassAlias::name);
        let selector = Selector {
            vendor: self.read(vendor, id, &[]),
            device: self.read(device, id, &[]),
            subsystem: self.read(subsystem, ids, &[]),
            class: self.read(class, of_class, &classes),
            address: self.read(address, of_address, &[]),
            path: self.read(path, parse, &[]),
            slot: slot.map(|given| given.value),
            serial: self.read(serial, serial_number, &[]),
            numa_node: self.number(table, section, "numa-node").map(|given| given.value),
            driver: driver.map(|given| given.value),
        };
        if table.is_empty() {
            let remedy = "say what is selected; every device of the host would be";
            self.complain(at, "a selector without a key", remedy);
        }
        if selector.device.is_some() && !table.contains_key("vendor") {
            let remedy = "give 'vendor' too: each vendor numbers its devices by itself";
            self.complain(at, "'device' without 'vendor' means nothing", remedy);
        }
        selector
    }

    fn shape(&mut self, table: &Table<'_>) -> Shape {
        let section = &keys::SHAPE;
        let Some(given) = self.get(table, &keys::POOL, "shape", as_table) else {
            return Shape::default();
        };
        let table = given.value;
        self.know(table, section);
        let mut shape = Shape::default();
        for name in section.keys.iter().map(|key| key.name) {
            let Some(setting) = Setting::from_name(&name.replace('-', "_")) else { continue };
            let of = |text: &str| {
                setting.check(shape::Value::Text(text.to_owned())).map_err(|e| e.to_string())
            };
            let value = match setting.form() {
                Form::Flag => self.flag(table, section, name).map(shape::Value::Flag),
                Form::Number => {
                    let given = self.number(table, section, name);
                    given.map(|given| shape::Value::Number(given.value.into()))
                }
                Form::Text => {
                    let given = self.text(table, section, name);
                    self.read(given, of, setting.words())
                }
            };
            // Texts were checked, and the keys' limits are the settings' own.
            let _ = value.map(|value| shape.set(setting, value));
        }
        shape
    }
}

fn as_table<'t>(value: &'t Value<'t>) -> Option<&'t Table<'t>> {
    value.get_ref().as_table()
}

fn parse<T: FromStr<Err: ToString>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: T::Err| error.to_string())
}

fn of_address(text: &str) -> Result<PciAddress, String> {
    parse(text)
}

fn of_class(text: &str) -> Result<ClassAlias, String> {
    parse(text).map_err(|_| format!("'{text}' is no class"))
}

fn id(text: &str) -> Result<u16, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    let number = (digits.len() == 4).then(|| u16::from_str_radix(digits, 16).ok()).flatten();
    number.ok_or_else(|| format!("'{text}' is no id of four hexadecimal digits"))
}

fn ids(text: &str) -> Result<(u16, u16), String> {
    let wrong = || format!("'{text}' is no subsystem; write it as 10de:16f1");
    let (vendor, device) = text.split_once(':').ok_or_else(wrong)?;
    Ok((id(vendor).map_err(|_| wrong())?, id(device).map_err(|_| wrong())?))
}

fn serial_number(text: &str) -> Result<String, String> {
    let digits = text.chars().filter(char::is_ascii_hexdigit).count();
    let plain = text.chars().all(|c| c.is_ascii_hexdigit() || c == '-');
    let right = digits == 16 && plain;
    let wrong = || format!("'{text}' is no serial number; write it as 00-11-22-33-44-55-66-77");
    right.then(|| text.to_owned()).ok_or_else(wrong)
}
