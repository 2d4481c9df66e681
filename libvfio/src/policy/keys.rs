//! Every key that a policy may have: what its reader knows, what `vfioctl policy schema` prints, and
//! what the document's tables are made of. Plain; touches nothing.

use std::fmt::Write;

/// What a key takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A text.
    Text,
    /// An array of texts.
    Texts,
    /// A whole number between these two.
    Number(u32, u32),
    /// `true` or `false`.
    Flag,
    /// A table with keys of its own.
    Table,
    /// An array of tables.
    Tables,
    /// A text, or a table with keys of its own.
    TextOrTable,
}

impl Kind {
    /// In words.
    pub fn describe(self) -> String {
        match self {
            Self::Text => "a text".to_owned(),
            Self::Texts => "an array of texts".to_owned(),
            Self::Number(least, most) => format!("a number from {least} to {most}"),
            Self::Flag => "true or false".to_owned(),
            Self::Table => "a table".to_owned(),
            Self::Tables => "an array of tables".to_owned(),
            Self::TextOrTable => "a text or a table".to_owned(),
        }
    }
}

/// A key.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// What it says.
    pub about: &'static str,
    /// What goes without saying.
    pub default: &'static str,
}

/// A kind of table.
#[derive(Debug, Clone, Copy)]
pub struct Section {
    /// As it is written.
    pub title: &'static str,
    /// What it is about.
    pub about: &'static str,
    /// Its keys.
    pub keys: &'static [Key],
}

const fn key(name: &'static str, kind: Kind, default: &'static str, about: &'static str) -> Key {
    Key { name, kind, about, default }
}

const DEVICE_NUMBERS: Kind = Kind::Number(1, 65_535);

/// The keys of a file.
pub const FILE: Section = Section {
    title: "file",
    about: "A file of the policy: `/etc/vfiod/vfiod.toml`, then `/etc/vfiod/vfiod.toml.d/*.toml` by \
            name. Together they are one policy.",
    keys: &[
        key("boot", Kind::Table, "", "what happens when the host boots"),
        key("pool", Kind::Table, "none", "a table `[pool.NAME]` for each pool"),
    ],
};

/// The keys of `[boot]`.
pub const BOOT: Section = Section {
    title: "[boot]",
    about: "In one file at most.",
    keys: &[key(
        "limit",
        Kind::Number(1, 600),
        "30",
        "for how many seconds at most provisioning may delay the boot",
    )],
};

/// The keys of `[pool.NAME]`.
pub const POOL: Section = Section {
    title: "[pool.NAME]",
    about: "What some functions are for. A name has 1 to 64 letters, digits and `. _ -`.",
    keys: &[
        key(
            "mode",
            Kind::Text,
            "must be given",
            "`host`: host drivers have them, and nobody may lease them; `passthrough`: on VFIO from \
             boot on; `on-lease`: on VFIO while leased",
        ),
        key(
            "select",
            Kind::Tables,
            "must be given",
            "[selectors](#selector); a function that one of them matches is in the pool",
        ),
        key("except", Kind::Tables, "none", "selectors of functions that are not, all the same"),
        key(
            "vfs",
            DEVICE_NUMBERS,
            "",
            "make so many virtual functions of each physical function selected; the pool is then of \
             these, and the physical function stays with the host",
        ),
        key("shape", Kind::Table, "", "[settings](#poolnameshape) of these virtual functions"),
        key(
            "reset-order",
            Kind::Texts,
            "the kernel's",
            "reset methods to use, the first that works: `device_specific`, `acpi`, `flr`, `af_flr`, \
             `pm`, `bus`, `cxl_bus`",
        ),
        key(
            "reset",
            Kind::Text,
            "required",
            "what a lease's end takes: `required`: a reset, or nobody but the same tenant gets it \
             again; `if-possible`: a reset where there is a way, else nothing; `none`: nothing",
        ),
        key(
            "scrub",
            Kind::TextOrTable,
            "where known",
            "what [clears their memory](guide.md#scrubbers) when a lease ends: `bar-zero`, \
             `bar-zero-sampled` (of which only samples are read back), `nvme`, `none`, or a table \
             [with a program](#poolnamescrub)",
        ),
        key(
            "d3cold",
            Kind::Flag,
            "as it is",
            "whether they may lose power when idle (`d3cold_allowed`), never while they are leased; \
             `false` for devices that do not come back",
        ),
        key(
            "users",
            Kind::Texts,
            "",
            "names of users who may lease, beside root; with `users` or `groups`, nobody else may",
        ),
        key("groups", Kind::Texts, "", "groups whose members may lease"),
        key(
            "tenants",
            Kind::Texts,
            "any",
            "tenants that may be leased to; `*` stands for any characters, `?` for one",
        ),
        key(
            "isolation",
            Kind::Text,
            "full",
            "the weakest isolation that will do: `full`, `no-interrupt-remapping` or `acs-override`",
        ),
        key(
            "keep-for-host",
            DEVICE_NUMBERS,
            "none",
            "how many devices of the pool always stay with the host: those with the lowest \
             addresses where they are on VFIO from boot on, else whichever are not leased",
        ),
        key(
            "correct-drift",
            Kind::Flag,
            "false",
            "whether what others change is changed back by itself; else it is only shown",
        ),
    ],
};

/// The keys of a selector.
pub const SELECTOR: Section = Section {
    title: "selector",
    about: "A function must match all that is given.",
    keys: &[
        key("vendor", Kind::Text, "", "vendor, four hexadecimal digits: `10de`"),
        key("device", Kind::Text, "", "device, likewise; only with `vendor`"),
        key("subsystem", Kind::Text, "", "subsystem's vendor and device: `10de:16f1`"),
        key(
            "class",
            Kind::Text,
            "",
            "`gpu`, `accelerator`, `nic`, `nvme`, `storage`, `audio`, `usb` or `bridge`",
        ),
        key(
            "address",
            Kind::Text,
            "",
            "address: `0000:03:00.0`. Changes when slots are renumbered",
        ),
        key(
            "path",
            Kind::Text,
            "",
            "way through ports, without bus numbers: root bus, then device and function of each \
             port and of the function (`0000:00/01.0/00.0`). A port's stands for all below it",
        ),
        key("slot", Kind::Text, "", "name of the slot, as in `/sys/bus/pci/slots`"),
        key("serial", Kind::Text, "", "device serial number, as `vfioctl show` has it"),
        key("numa-node", Kind::Number(0, 1023), "", "NUMA node"),
        key(
            "driver",
            Kind::Text,
            "",
            "host driver that the kernel's module tables have for it, whichever has it now",
        ),
    ],
};

/// The keys of `[pool.NAME.scrub]`.
pub const SCRUB: Section = Section {
    title: "[pool.NAME.scrub]",
    about: "A program that clears a device's memory, [told which by its \
            environment](guide.md#a-program-of-your-own).",
    keys: &[
        key("command", Kind::Texts, "must be given", "its absolute path, then its arguments"),
        key(
            "timeout",
            Kind::Number(1, 86_400),
            "600",
            "seconds after which it is killed, and has failed",
        ),
        key(
            "driver",
            Kind::Text,
            "none",
            "host driver that has the device meanwhile; without, it stays on VFIO",
        ),
    ],
};

/// The keys of `[pool.NAME.shape]`.
pub const SHAPE: Section = Section {
    title: "[pool.NAME.shape]",
    about: "[Settings](guide.md#settings-for-the-time-of-a-lease) of virtual functions, the same for \
            all. What one of them cannot be given is refused when it is leased.",
    keys: &[
        key("vlan", Kind::Number(0, 4094), "as made", "VLAN, 0 for none"),
        key(
            "spoof-check",
            Kind::Flag,
            "as made",
            "whether packets from other addresses are dropped",
        ),
        key("trust", Kind::Flag, "as made", "whether the guest may do what only trusted ones may"),
        key("link", Kind::Text, "as made", "`auto`, `up` or `down`"),
        key("max-rate", Kind::Number(0, u32::MAX), "as made", "Mbit/s it may send, 0 for no limit"),
        key("msix", Kind::Number(1, 2048), "as made", "interrupt vectors"),
        key("exec-quantum", Kind::Number(0, 100_000), "as made", "ms at a time, 0 for no limit"),
        key(
            "preempt-timeout",
            Kind::Number(0, 100_000_000),
            "as made",
            "us that others wait for it, 0 for no limit",
        ),
        key("sched-priority", Kind::Text, "as made", "`low`, `normal` or `high`"),
        key("vgpu-type", Kind::Number(1, u32::MAX), "none", "NVIDIA vGPU type, by its number"),
    ],
};

/// All there is, in the order of the document.
pub const ALL: [Section; 6] = [FILE, BOOT, POOL, SELECTOR, SCRUB, SHAPE];

/// All keys as tables in Markdown.
pub fn tables() -> String {
    let mut text = String::new();
    for Section { title, about, keys } in ALL {
        let mark = if title.starts_with('[') { "`" } else { "" };
        let head = "| key | takes | if not given | says |\n|---|---|---|---|";
        // Writing to a text does not fail.
        let _ = write!(text, "\n### {mark}{title}{mark}\n\n{about}\n\n{head}\n");
        for Key { name, kind, about, default } in keys {
            let kind = kind.describe();
            let _ = writeln!(text, "| `{name}` | {kind} | {default} | {about} |");
        }
    }
    text.trim_start().to_owned()
}
