//! Output: one object of JSON, or tables for people. Nothing here panics when nobody reads standard output any more.

use crate::errors::{Kind, Outcome, stdout_failed, stop};
use serde::Serialize;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

/// Writes text to standard output, at once.
pub fn print(text: &str) -> Outcome {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|error| stdout_failed(&error))
}

/// Writes one object of JSON and a newline to standard output.
pub fn print_json(value: &impl Serialize) -> Outcome {
    let mut text =
        serde_json::to_string(value).map_err(|error| stop(Kind::Failed, format!("cannot write JSON: {error}")))?;
    text.push('\n');
    print(&text)
}

/// Lines that wait for the terminal, while a view has it.
static HELD: Mutex<Option<Vec<String>>> = Mutex::new(None);

/// Writes a line to standard error. If nobody reads that, nobody is missed.
pub fn note(text: &str) {
    let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
    match held.as_mut() {
        Some(lines) => lines.push(text.to_owned()),
        None => {
            let _ = writeln!(std::io::stderr().lock(), "{text}");
        }
    }
}

/// Keeps lines back from now on, until [`release_notes`].
pub fn hold_notes() {
    HELD.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default();
}

/// Writes the lines that were kept back.
pub fn release_notes() {
    let lines = HELD.lock().unwrap_or_else(PoisonError::into_inner).take();
    lines.into_iter().flatten().for_each(|line| note(&line));
}

/// Whether standard output is a file, which text goes to at once whatever the terminal shows.
pub fn stdout_is_file() -> bool {
    #[cfg(unix)]
    {
        let found = rustix::fs::fstat(std::io::stdout());
        found.is_ok_and(|found| rustix::fs::FileType::from_raw_mode(found.st_mode) == rustix::fs::FileType::RegularFile)
    }
    #[cfg(not(unix))]
    {
        false
    }
}

/// Whether colour is wanted on a stream: a terminal, and no `NO_COLOR` with a value.
pub fn coloured(stream: &impl IsTerminal) -> bool {
    let forbidden = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
        || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    stream.is_terminal() && !forbidden
}

/// A word in bold red (an error's mark), if the stream is coloured.
pub fn red(text: &str, coloured: bool) -> String {
    if coloured { format!("\x1b[1;31m{text}\x1b[0m") } else { text.to_owned() }
}

/// How a column is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table with a heading line; columns as wide as their widest cell.
#[derive(Debug)]
pub struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table of these columns.
    pub fn new(columns: &[(&'static str, Align)]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row, one cell for each column.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.columns.len());
        self.rows.push(cells.into());
    }

    /// As [`Self::row`], where the columns are only known at run time.
    pub fn row_of(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.columns.len());
        self.rows.push(cells);
    }

    /// The columns.
    pub fn columns(&self) -> &[(&'static str, Align)] {
        &self.columns
    }

    /// The rows.
    pub fn rows(&self) -> &[Vec<String>] {
        &self.rows
    }

    /// The table in Markdown.
    pub fn markdown(&self) -> String {
        let line = |cells: &mut dyn Iterator<Item = String>| {
            cells.fold(String::from("|"), |line, cell| format!("{line} {} |", cell.replace('|', "\\|"))) + "\n"
        };
        let mut text = line(&mut self.columns.iter().map(|(name, _)| (*name).to_owned()));
        text += &line(&mut self.columns.iter().map(|(_, align)| match align {
            Align::Left => "---".to_owned(),
            Align::Right => "---:".to_owned(),
        }));
        for row in &self.rows {
            text += &line(&mut row.iter().cloned());
        }
        text
    }

    /// Whether it has no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The table as text, indented by two; headings in bold if coloured.
    pub fn render(&self, coloured: bool) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
            cells.max().unwrap_or(0).max(self.columns[column].0.len())
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let mut text = String::new();
        let mut line = |cells: &mut dyn Iterator<Item = &str>, bold: bool| {
            let mut out = String::new();
            for ((cell, &width), &(_, align)) in cells.zip(&widths).zip(&self.columns) {
                let _ = match align {
                    Align::Left => write!(out, "  {cell:<width$}"),
                    Align::Right => write!(out, "  {cell:>width$}"),
                };
            }
            let out = out.trim_end();
            let _ = if bold { writeln!(text, "\x1b[1m{out}\x1b[0m") } else { writeln!(text, "{out}") };
        };
        line(&mut self.columns.iter().map(|(name, _)| *name), coloured);
        for row in &self.rows {
            line(&mut row.iter().map(String::as_str), false);
        }
        text
    }
}

/// `name  value` lines, the values in one column.
pub fn facts(lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    lines.iter().fold(String::new(), |mut text, (name, value)| {
        let _ = writeln!(text, "{name:<width$}  {value}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&[("name", Align::Left), ("bytes", Align::Right)]);
        table.row(["é".to_owned(), "1".to_owned()]);
        table.row(["longer".to_owned(), "1000000".to_owned()]);
        assert_eq!(table.render(false), "  name      bytes\n  é             1\n  longer  1000000\n");
        assert!(table.render(true).starts_with("\x1b[1m  name"));
        assert_eq!(facts(&[("a", "1".to_owned()), ("long", "2".to_owned())]), "a     1\nlong  2\n");
    }
}
