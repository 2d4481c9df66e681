//! Columns that line up by what is seen, cut at the edge of a terminal. Pure.

use anstyle::{AnsiColor, Style};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use crate::output::Screen;

pub(crate) const PLAIN: Style = Style::new();
pub(crate) const BOLD: Style = Style::new().bold();
pub(crate) const DIM: Style = Style::new().dimmed();
pub(crate) const GOOD: Style = AnsiColor::Green.on_default();
pub(crate) const WARN: Style = AnsiColor::Yellow.on_default();
pub(crate) const BAD: Style = AnsiColor::Red.on_default().bold();
pub(crate) const LEASED: Style = AnsiColor::Cyan.on_default();

const GAP: usize = 2;
/// Where there is no text.
const NOTHING: &str = "-";

/// A text in one style, on one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    /// Control characters, which files of the host may contain, are not for a terminal to obey.
    pub(crate) fn new(text: impl Into<String>, style: Style) -> Self {
        let text: String = text.into();
        let text = text.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        Self { text, style }
    }

    /// A text, or a dash where there is none.
    pub(crate) fn maybe(text: Option<impl Into<String>>, style: Style) -> Self {
        text.map_or_else(|| Self::new(NOTHING, PLAIN), |text| Self::new(text, style))
    }

    fn width(&self) -> usize {
        self.text.width()
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text, PLAIN)
    }
}

/// Rows of cells, with names of columns above if there are any.
#[derive(Debug, Default)]
pub(crate) struct Table {
    header: Vec<Cell>,
    rows: Vec<Vec<Cell>>,
    /// It is not cut where the last column has something to tell.
    tells: bool,
}

impl Table {
    pub(crate) fn new(header: &[&str]) -> Self {
        let header = header.iter().map(|name| Cell::new(*name, BOLD)).collect();
        Self { header, ..Self::default() }
    }

    /// One whose last column has what somebody looks for, where it has anything: then all is shown,
    /// however narrow the terminal.
    pub(crate) fn telling(header: &[&str]) -> Self {
        Self { tells: true, ..Self::new(header) }
    }

    pub(crate) fn push(&mut self, row: impl IntoIterator<Item = Cell>) {
        self.rows.push(row.into_iter().collect());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub(crate) fn render(&self, screen: Screen) -> String {
        let header = (!self.header.is_empty()).then_some(&self.header);
        let rows: Vec<&Vec<Cell>> = header.into_iter().chain(&self.rows).collect();
        let columns = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|n| rows.iter().filter_map(|row| row.get(n)).map(Cell::width).max().unwrap_or(0))
            .collect();
        let tells = |row: &Vec<Cell>| row.last().is_some_and(|cell| cell.text != NOTHING);
        let cut = !(self.tells && self.rows.iter().any(tells));
        let screen = Screen { width: screen.width.filter(|_| cut), ..screen };
        rows.iter().map(|row| line(row, &widths, screen)).collect()
    }
}

/// A row with its line end. The last cell is not padded, so that no line ends in blanks.
fn line(row: &[Cell], widths: &[usize], screen: Screen) -> String {
    let mut room = screen.width.unwrap_or(usize::MAX);
    let mut text = String::new();
    for (n, (cell, width)) in row.iter().zip(widths).enumerate() {
        let shown = clip(&cell.text, room, screen.unicode);
        if !shown.is_empty() {
            let style = cell.style;
            text.extend([style.render().to_string(), shown, style.render_reset().to_string()]);
        }
        let last = n + 1 == row.len();
        let padded = if last { cell.width() } else { width + GAP };
        if !last && room > padded {
            text.extend(std::iter::repeat_n(' ', padded - cell.width()));
        }
        room = room.saturating_sub(padded);
    }
    text + "\n"
}

/// As much of `text` as fits into `room` columns, with a sign that there is more.
fn clip(text: &str, room: usize, unicode: bool) -> String {
    if text.width() <= room {
        return text.to_owned();
    }
    let more = if unicode { "…" } else { "..." };
    let Some(mut left) = room.checked_sub(more.width()) else { return String::new() };
    let fits = text.chars().take_while(|c| {
        let width = c.width().unwrap_or(0);
        let fits = width <= left;
        left = left.saturating_sub(width);
        fits
    });
    fits.collect::<String>() + more
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    fn table() -> Table {
        let mut table = Table::new(&["DEVICE", "NAME"]);
        table.push(["0000:03:00.0".into(), "Ｈ100 accelerator".into()]);
        table.push(["Größe".into(), Cell::maybe(None::<String>, GOOD)]);
        table
    }

    #[test]
    fn columns_line_up_by_what_is_seen_and_lines_end_without_blanks() {
        assert_eq!(
            plain(&table().render(Screen::default())),
            "DEVICE        NAME\n\
             0000:03:00.0  Ｈ100 accelerator\n\
             Größe         -\n"
        );
    }

    #[test]
    fn lines_end_at_the_edge_whatever_its_place() {
        let table = table();
        for width in 0..40 {
            for unicode in [false, true] {
                let text = plain(&table.render(Screen { width: Some(width), unicode }));
                assert_eq!(text.lines().count(), 3);
                for line in text.lines() {
                    assert!(line.width() <= width, "{width}: {line:?}");
                }
            }
        }
        let narrow = plain(&table.render(Screen { width: Some(20), unicode: true }));
        assert_eq!(narrow.lines().nth(1), Some("0000:03:00.0  Ｈ100…"));
    }

    #[test]
    fn what_a_table_is_there_to_tell_is_not_cut() {
        let narrow = Screen { width: Some(16), unicode: true };
        let mut table = Table::telling(&["DEVICE", "REASON"]);
        let device = || Cell::from("0000:03:00.0 0000:03:00.1");
        table.push([device(), Cell::maybe(None::<String>, PLAIN)]);
        assert!(plain(&table.render(narrow)).contains("0000:03:00.0 00…\n"));
        table.push([device(), "its reset failed".into()]);
        let whole = plain(&table.render(narrow));
        assert!(whole.contains("0000:03:00.0 0000:03:00.1  its reset failed\n"), "{whole}");
    }

    #[test]
    fn a_terminal_gets_no_control_characters_of_others() {
        let mut table = Table::new(&[]);
        table.push(["a\u{1b}[31mb\nc\u{9b}".into()]);
        assert_eq!(table.render(Screen::default()), "a?[31mb?c?\n");
    }
}
