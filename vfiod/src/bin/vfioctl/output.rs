//! Where answers go: standard output, coloured, drawn and clipped only where it is a terminal.

use std::io::{IsTerminal, Write};

use serde_json::Value;

use crate::table::Table;
use crate::trouble::Trouble;

/// What can be seen where the answer goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Screen {
    /// Columns, if there is an edge.
    pub(crate) width: Option<usize>,
    /// Characters beyond ASCII can be used for drawing.
    pub(crate) unicode: bool,
}

/// Standard output, and the form asked for.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) json: bool,
    pub(crate) screen: Screen,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        let terminal = std::io::stdout().is_terminal();
        let width = terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
        let screen = Screen {
            width: width.filter(|width| terminal && *width > 0),
            unicode: terminal && is_utf8(|name| std::env::var(name).ok()),
        };
        Self { json, screen }
    }

    /// Writes a table, or says on standard error that there is nothing.
    pub(crate) fn table(&self, table: &Table, nothing: &str) -> Result<(), Trouble> {
        if table.is_empty() {
            anstream::eprintln!("{nothing}");
            return Ok(());
        }
        print(&table.render(self.screen))
    }
}

/// Writes text that may be styled; on anything but a terminal it becomes plain.
pub(crate) fn print(text: &str) -> Result<(), Trouble> {
    let mut out = anstream::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Writes a value over several lines.
pub(crate) fn print_json(value: &Value) -> Result<(), Trouble> {
    print(&format!("{value:#}\n"))
}

/// Whether the locale's characters are UTF-8 (locale(7): the first of these that is set decides).
fn is_utf8(variable: impl Fn(&str) -> Option<String>) -> bool {
    let mut set = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().filter_map(variable);
    let locale = set.find(|value| !value.is_empty()).unwrap_or_default().to_ascii_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_variable_set_decides_on_characters() {
        let locale = |all: &str, lang: &str| {
            is_utf8(|name| match name {
                "LC_ALL" => Some(all.to_owned()),
                "LANG" => Some(lang.to_owned()),
                _ => None,
            })
        };
        assert!(locale("", "en_GB.UTF-8"));
        assert!(locale("C.utf8", "C"));
        assert!(!locale("C", "en_GB.UTF-8"));
        assert!(!locale("", ""));
    }
}
