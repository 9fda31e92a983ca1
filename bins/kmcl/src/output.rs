//! The one place where the program writes: results to standard output, as a table or as JSON;
//! progress bars and the one line of a failure to standard error.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use serde::Serialize;

use crate::exit::{Exit, Failure, Result};
use crate::progress::{Length, Progress};
use crate::size::Size;

/// What a command has found out: serialised for programs, a table for people.
pub(crate) trait Report: Serialize {
    /// The same for people.
    fn table(&self) -> Table;
}

/// Where and how a command writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    json: bool,
    stdout_is_terminal: bool,
    stderr_is_terminal: bool,
}

impl Output {
    /// Writes JSON if `json`, and otherwise what suits the terminal or file it is connected to.
    pub(crate) fn new(json: bool) -> Self {
        Self {
            json,
            stdout_is_terminal: io::stdout().is_terminal(),
            stderr_is_terminal: io::stderr().is_terminal(),
        }
    }

    /// Whether results go to a program.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// A bar for `what`, which takes `length`; shown only if it takes a while and somebody watches.
    pub(crate) fn progress(&self, what: &'static str, length: Length) -> Progress {
        if self.json || !self.stderr_is_terminal {
            return Progress::hidden();
        }
        Progress::start(what, length)
    }

    /// Tells people, not programs, that a step is done.
    pub(crate) fn step(&self, line: impl std::fmt::Display) -> Result<()> {
        if self.json {
            return Ok(());
        }
        write_out(format_args!("{line}\n"))
    }

    /// Writes the result of a command.
    pub(crate) fn report(&self, report: &impl Report) -> Result<()> {
        if self.json {
            return self.json_line(report);
        }
        write_out(format_args!("{}", report.table().render(self.stdout_is_terminal)))
    }

    /// Writes one line of JSON with `--json`, and otherwise the text that `text` makes, which it does
    /// with rules around tables if told so.
    pub(crate) fn document(
        &self,
        value: &impl Serialize,
        text: impl FnOnce(bool) -> String,
    ) -> Result<()> {
        if self.json {
            return self.json_line(value);
        }
        write_out(format_args!("{}", text(self.stdout_is_terminal)))
    }

    /// Tells on standard error what happens meanwhile: one line of JSON with `--json`, and otherwise
    /// `line`. Nobody need listen.
    pub(crate) fn notice(&self, event: &impl Serialize, line: &str) {
        let text = if self.json {
            serde_json::to_string(event).unwrap_or_default()
        } else {
            line.to_owned()
        };
        let _nobody_listens = writeln!(io::stderr(), "{text}");
    }

    /// Writes one line of JSON with `--json`, and otherwise `line`: for what is said before the end.
    pub(crate) fn announce(&self, event: &impl Serialize, line: &str) -> Result<()> {
        if self.json { self.json_line(event) } else { write_out(format_args!("{line}\n")) }
    }

    fn json_line(&self, value: &impl Serialize) -> Result<()> {
        let json = json_of(value).map_err(|error| {
            Failure::system(format_args!("cannot write the result as JSON: {error}"), "report this")
        })?;
        write_out(format_args!("{json}\n"))
    }

    /// Writes the one line of a failure to standard error, and returns the exit code.
    pub(crate) fn fail(&self, failure: &Failure) -> Exit {
        #[derive(Serialize)]
        struct Line<'a> {
            error: Error<'a>,
        }
        #[derive(Serialize)]
        struct Error<'a> {
            exit_code: u8,
            #[serde(flatten)]
            failure: &'a Failure,
        }
        let error = Error { exit_code: failure.exit as u8, failure };
        let line = match json_of(&Line { error }) {
            Ok(json) if self.json => json,
            _ => failure.differences.iter().fold(format!("kmcl: {failure}"), |mut text, line| {
                text.push_str("\nkmcl:   ");
                text.push_str(line);
                text
            }),
        };
        // A caller who has closed standard error still gets the exit code.
        let _ = writeln!(io::stderr(), "{line}");
        failure.exit
    }
}

/// One line of JSON that people can read, too: with a space after each colon and comma.
fn json_of(value: &impl Serialize) -> serde_json::Result<String> {
    struct Spaced;
    impl serde_json::ser::Formatter for Spaced {
        fn begin_array_value<W: ?Sized + Write>(
            &mut self,
            out: &mut W,
            first: bool,
        ) -> io::Result<()> {
            if first { Ok(()) } else { out.write_all(b", ") }
        }

        fn begin_object_key<W: ?Sized + Write>(
            &mut self,
            out: &mut W,
            first: bool,
        ) -> io::Result<()> {
            self.begin_array_value(out, first)
        }

        fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
            out.write_all(b": ")
        }
    }
    let mut bytes = Vec::new();
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, Spaced))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn write_out(text: std::fmt::Arguments<'_>) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_fmt(text).and_then(|()| out.flush()).map_err(stdout_failure)
}

/// What it means that standard output cannot be written.
pub(crate) fn stdout_failure(error: io::Error) -> Failure {
    Failure::system(
        format_args!("cannot write to standard output: {error}"),
        "check what it is connected to",
    )
}

/// Rows of cells, the first row being the heading if there is one.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Table {
    heading: Vec<&'static str>,
    rows: Vec<Vec<String>>,
    /// Columns with numbers, which end where the column does.
    right: Vec<usize>,
}

impl Table {
    /// A table of names and values, one pair a row.
    pub(crate) fn pairs() -> Self {
        Self::default()
    }

    /// A table with a heading for each column.
    pub(crate) fn with_heading(heading: &[&'static str]) -> Self {
        Self { heading: heading.to_vec(), ..Self::default() }
    }

    /// The same, with the cells of these columns moved to the right.
    pub(crate) fn right(self, columns: &[usize]) -> Self {
        Self { right: columns.to_vec(), ..self }
    }

    /// Adds the row `name`, `value`.
    pub(crate) fn pair(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        self.rows.push(vec![name.to_owned(), value.to_string()]);
        self
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The table as text; with rules around it on a terminal.
    pub(crate) fn render(&self, rules: bool) -> String {
        let heading: Vec<String> = self.heading.iter().map(|cell| (*cell).to_owned()).collect();
        let lines = || std::iter::once(&heading).filter(|h| !h.is_empty()).chain(&self.rows);
        let columns = lines().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            lines().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
        };
        let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
        let rule = "─".repeat(widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1));
        let mut text = String::new();
        let push_rule = |text: &mut String| {
            if rules {
                text.push_str(&rule);
                text.push('\n');
            }
        };
        push_rule(&mut text);
        for (index, row) in lines().enumerate() {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                if self.right.contains(&column) {
                    line.push_str(&format!("{cell:>width$}  "));
                } else {
                    line.push_str(&format!("{cell:<width$}  "));
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
            if index == 0 && !heading.is_empty() {
                push_rule(&mut text);
            }
        }
        push_rule(&mut text);
        text
    }
}

/// `bytes` in `elapsed` as people read it: `1.2 GiB/s`.
pub(crate) fn rate(bytes: u64, elapsed: Duration) -> String {
    format!("{}/s", Size(bytes_per_second(bytes, elapsed)))
}

/// `bytes` in `elapsed`, in whole bytes per second.
pub(crate) fn bytes_per_second(bytes: u64, elapsed: Duration) -> u64 {
    let nanoseconds = elapsed.as_nanos().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::with_heading(&["LUN", "size"]);
        table.row(vec!["0".into(), "64.0 MiB".into()]);
        table.row(vec!["10".into(), "x".into()]);
        assert_eq!(table.render(false), "LUN  size\n0    64.0 MiB\n10   x\n");
        let ruled = table.render(true);
        assert_eq!(ruled.lines().filter(|line| line.starts_with('─')).count(), 3);
        assert_eq!(ruled.lines().next().unwrap().chars().count(), 13);
        assert_eq!(Table::pairs().pair("a", 1).pair("bcd", 2).render(false), "a    1\nbcd  2\n");
        assert_eq!(Table::pairs().render(false), "");
        let table = Table::with_heading(&["LUN", "size"]).right(&[0]);
        let table = Table { rows: vec![vec!["0".into(), "1 B".into()]], ..table };
        assert_eq!(table.render(false), "LUN  size\n  0  1 B\n");
    }

    #[test]
    fn json_is_one_line_with_spaces() {
        let value = serde_json::json!({ "a": 1, "b": [1, 2], "c": "x\ny" });
        assert_eq!(json_of(&value).unwrap(), r#"{"a": 1, "b": [1, 2], "c": "x\ny"}"#);
    }

    #[test]
    fn rates_do_not_divide_by_zero() {
        for (bytes, elapsed, expected) in [
            (1 << 30, Duration::from_secs(1), 1 << 30),
            (0, Duration::ZERO, 0),
            (1000, Duration::from_millis(500), 2000),
        ] {
            assert_eq!(bytes_per_second(bytes, elapsed), expected, "{bytes} in {elapsed:?}");
        }
        assert_eq!(rate(3 << 20, Duration::from_secs(2)), "1.5 MiB/s");
    }
}
