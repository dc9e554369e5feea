//! What the program prints: results on standard output, progress and remarks on standard error.
//!
//! Standard output may be closed by its reader at any time; that ends the command quietly
//! ([`Failure::OutputClosed`](crate::failure::Failure)). Progress bars appear only on a terminal and never with JSON.

use std::fmt::Display;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::failure::{Failure, Result};

/// Standard output, buffered, with its errors told apart.
pub(crate) struct Out {
    stream: BufWriter<Box<dyn Write>>,
    json: bool,
}

impl Out {
    /// Output of a command; with `json` only [`Out::json`] prints anything.
    pub(crate) fn new(json: bool) -> Out {
        Out { stream: BufWriter::new(Box::new(io::stdout())), json }
    }

    /// Output into a file instead.
    pub(crate) fn to(stream: Box<dyn Write>, json: bool) -> Out {
        Out { stream: BufWriter::new(stream), json }
    }

    /// True when the caller wants JSON.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Prints a line for people; nothing with JSON.
    pub(crate) fn line(&mut self, line: impl Display) -> Result<()> {
        if self.json { Ok(()) } else { told(writeln!(self.stream, "{line}")) }
    }

    /// Like [`Out::line`], and at once: for lines that tell how far a long command is.
    pub(crate) fn line_now(&mut self, line: impl Display) -> Result<()> {
        self.line(line)?;
        self.flush()
    }

    /// Writes bytes as they are.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        told(self.stream.write_all(bytes))
    }

    /// Prints one JSON document.
    pub(crate) fn json(&mut self, value: &impl Serialize) -> Result<()> {
        // Going through a string keeps serde's errors (a bug) apart from those of the stream.
        let text = serde_json::to_string_pretty(value)
            .map_err(|error| Failure::new(format!("cannot write JSON: {error}")))?;
        told(writeln!(self.stream, "{text}"))
    }

    /// Hands everything to the system.
    pub(crate) fn flush(&mut self) -> Result<()> {
        told(self.stream.flush())
    }
}

fn told(result: io::Result<()>) -> Result<()> {
    result.map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::OutputClosed,
        _ => Failure::new(format!("cannot write the output: {error}")),
    })
}

/// A remark for people, on standard error. Never fails: nobody may be listening.
pub(crate) fn remark(text: impl Display) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Makes progress bars, or invisible ones.
#[derive(Clone, Copy)]
pub(crate) struct Bars {
    visible: bool,
}

impl Bars {
    /// Visible on a terminal, unless the output is JSON.
    pub(crate) fn new(json: bool) -> Bars {
        Bars { visible: !json && io::stderr().is_terminal() }
    }

    /// A bar over `total` steps.
    pub(crate) fn steps(self, what: &str, total: u64) -> ProgressBar {
        self.bar(what, total, "{msg:<22} [{bar:40}] {human_pos}/{human_len} {per_sec} {eta}")
    }

    /// A bar over `total` bytes.
    pub(crate) fn bytes(self, what: &str, total: u64) -> ProgressBar {
        self.bar(
            what,
            total,
            "{msg:<22} [{bar:40}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
        )
    }

    /// A sign of life for something whose length is not known.
    pub(crate) fn spinner(self, what: &str) -> ProgressBar {
        if !self.visible {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::new_spinner().with_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    }

    fn bar(self, what: &str, total: u64, template: &str) -> ProgressBar {
        if !self.visible {
            return ProgressBar::hidden();
        }
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::new(total).with_style(style.progress_chars("=> ")).with_message(what.to_owned())
    }
}

/// A table of text columns. The first column is left-aligned, the others as asked.
pub(crate) struct Table {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table whose columns are right-aligned where `right` says so.
    pub(crate) fn new(right: &[bool]) -> Table {
        Table { right: right.to_vec(), rows: Vec::new() }
    }

    /// Adds a row.
    pub(crate) fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// Prints the table.
    pub(crate) fn print(&self, out: &mut Out) -> Result<()> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                if column > 0 {
                    line.push_str("  ");
                }
                let pad = " ".repeat(widths[column] - cell.chars().count());
                let right = self.right.get(column).copied().unwrap_or(false);
                line.push_str(&if right { format!("{pad}{cell}") } else { format!("{cell}{pad}") });
            }
            out.line(line.trim_end())?;
        }
        Ok(())
    }
}
