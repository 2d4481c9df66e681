//! Settings of virtual functions: how they are typed, and how those of one are shown.

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use libvfio::client::{Options, SettingRecord};
use libvfio::shape::{LINKS, PRIORITIES};

use crate::table::{Cell, DIM, PLAIN, Table};

#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Settings of virtual functions, for the time of the lease")]
pub(crate) struct Shaping {
    /// Network address
    #[arg(long, value_name = "MAC")]
    mac: Option<String>,
    /// VLAN: 1 to 4094, or 0 for none
    #[arg(long, value_name = "VLAN")]
    vlan: Option<u32>,
    /// Whether packets from addresses that are not its own are dropped
    #[arg(long, value_name = "ON|OFF", value_parser = on_off())]
    spoof_check: Option<bool>,
    /// Whether the guest may do what only trusted ones may, such as promiscuous mode
    #[arg(long, value_name = "ON|OFF", value_parser = on_off())]
    trust: Option<bool>,
    /// Link: auto, up or down
    #[arg(long, value_name = "LINK", value_parser = PossibleValuesParser::new(LINKS))]
    link: Option<String>,
    /// The most it may send, in Mbit/s; 0 for no limit
    #[arg(long, value_name = "MBIT")]
    max_rate: Option<u32>,
    /// Interrupt vectors (MSI-X)
    #[arg(long, value_name = "N")]
    msix: Option<u32>,
    /// How long it computes before another may (Intel xe), in ms; 0 for no limit
    #[arg(long, value_name = "MS")]
    exec_quantum: Option<u32>,
    /// How long another waits for it before it is reset (Intel xe), in us; 0 for no limit
    #[arg(long, value_name = "US")]
    preempt_timeout: Option<u32>,
    /// Scheduling priority (Intel xe): low, normal or high
    #[arg(long, value_name = "PRIORITY", value_parser = PossibleValuesParser::new(PRIORITIES))]
    sched_priority: Option<String>,
    /// Video memory (Intel xe) in bytes, or with K, M or G: 2G
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    vram_quota: Option<u64>,
    /// NVIDIA vGPU type by number; 'vf show' lists those that can be had
    #[arg(long, value_name = "N")]
    vgpu_type: Option<u32>,
    /// Parameters of the NVIDIA vGPU: `frame_rate_limiter=0`
    #[arg(long, value_name = "TEXT", requires = "vgpu_type")]
    vgpu_params: Option<String>,
}

impl Shaping {
    /// What was typed, as the bus takes it.
    pub(crate) fn options(&self) -> Options<'_> {
        let mut options = Options::new();
        for (name, given) in [
            ("mac", &self.mac),
            ("link", &self.link),
            ("sched_priority", &self.sched_priority),
            ("vgpu_params", &self.vgpu_params),
        ] {
            options.extend(given.as_deref().map(|given| (name, given.into())));
        }
        for (name, given) in [
            ("vlan", self.vlan),
            ("max_rate", self.max_rate),
            ("msix", self.msix),
            ("exec_quantum", self.exec_quantum),
            ("preempt_timeout", self.preempt_timeout),
            ("vgpu_type", self.vgpu_type),
        ] {
            options.extend(given.map(|given| (name, given.into())));
        }
        for (name, given) in [("spoof_check", self.spoof_check), ("trust", self.trust)] {
            options.extend(given.map(|given| (name, given.into())));
        }
        options.extend(self.vram_quota.map(|given| ("vram_quota", given.into())));
        options
    }
}

fn on_off() -> impl TypedValueParser<Value = bool> {
    PossibleValuesParser::new(["on", "off"]).map(|word| word == "on")
}

/// A number of bytes: `4096`, `512M`, `2G`.
fn bytes(text: &str) -> Result<u64, String> {
    let shift = match text.bytes().last() {
        Some(b'K' | b'k') => 10,
        Some(b'M' | b'm') => 20,
        Some(b'G' | b'g') => 30,
        _ => 0,
    };
    let digits = if shift == 0 { text } else { &text[..text.len() - 1] };
    let number = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    number.ok_or_else(|| "write it as 4096, 512M or 2G".to_owned())
}

/// The option of `attach` that sets it.
fn option(setting: &str) -> String {
    format!("--{}", setting.replace('_', "-"))
}

/// What can be set on one virtual function, a line each.
pub(crate) fn table(settings: &[SettingRecord]) -> Table {
    let mut table = Table::new(&["SETTING", "NOW", "MAY BE", "BY"]);
    for setting in settings {
        let unit = setting.unit.as_deref().map(|unit| format!(" {unit}")).unwrap_or_default();
        let unit = if setting.value == "none" { String::new() } else { unit };
        table.push([
            option(&setting.setting).as_str().into(),
            format!("{}{unit}", setting.value).into(),
            Cell::new(setting.allowed.clone(), if setting.writable { PLAIN } else { DIM }),
            setting.backend.as_str().into(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use libvfio::shape::Setting;

    use super::*;
    use crate::output::Screen;

    #[test]
    fn every_setting_can_be_typed() {
        let command = Shaping::augment_args(clap::Command::new("attach"));
        for setting in Setting::ALL {
            let name = setting.name();
            assert!(command.get_arguments().any(|argument| argument.get_id() == name), "{name}");
        }
        let given = Shaping {
            vram_quota: Some(1 << 30),
            trust: Some(false),
            vlan: Some(7),
            ..Shaping::default()
        };
        let options = given.options();
        assert_eq!(options.len(), 3);
        assert_eq!(options["vlan"], 7u32.into());
        assert_eq!(options["vram_quota"], (1u64 << 30).into());
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(bytes("512M"), Ok(512 << 20));
        assert_eq!(bytes("2g"), Ok(2 << 30));
        for odd in ["", "G", "-1", "2T", "1.5G", "99999999999G"] {
            assert!(bytes(odd).is_err(), "{odd}");
        }
    }

    #[test]
    fn a_setting_is_one_line_with_what_it_may_be() {
        let rate = SettingRecord {
            setting: "max_rate".into(),
            backend: "network".into(),
            value: "0".into(),
            unit: Some("Mbit/s".into()),
            writable: true,
            allowed: "0 to 1000 Mbit/s".into(),
            ..SettingRecord::default()
        };
        let shown = table(&[rate]).render(Screen::default());
        assert_eq!(
            anstream::adapter::strip_str(&shown).to_string(),
            "SETTING     NOW       MAY BE            BY\n\
             --max-rate  0 Mbit/s  0 to 1000 Mbit/s  network\n"
        );
    }
}
