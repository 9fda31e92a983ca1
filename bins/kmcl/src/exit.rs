//! What the program tells its caller: exit codes, and the one line that goes with a failure.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The exit codes, all of them. `--help` and the man page print [`Exit::table`].
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub(crate) enum Exit {
    /// Everything that was asked for was done.
    Ok = 0,
    /// Data differs from what it must be.
    Mismatch = 1,
    /// The command line asks for something that cannot be.
    Usage = 2,
    /// The disk or its image is at fault.
    Disk = 3,
    /// The other side of the connection is at fault, or is not there.
    Peer = 4,
    /// This machine refuses something: a file, memory, a program that is not installed.
    System = 5,
    /// A virtual machine has ended, and its guest has not powered it off.
    Guest = 6,
}

impl Exit {
    /// Every code, ascending.
    pub(crate) const ALL: [Self; 7] =
        [Self::Ok, Self::Mismatch, Self::Usage, Self::Disk, Self::Peer, Self::System, Self::Guest];

    /// What the code means, for people.
    pub(crate) const fn meaning(self) -> &'static str {
        match self {
            Self::Ok => "done, nothing to complain about",
            Self::Mismatch => "data differs from what it must be",
            Self::Usage => "the command line asks for something that cannot be",
            Self::Disk => {
                "the disk or its image is at fault: missing, locked, read-only, full, failing"
            }
            Self::Peer => "the other side of the connection is at fault, busy, or not there",
            Self::System => "this machine refuses: a file, memory, a program that is not installed",
            Self::Guest => "a virtual machine has ended, and its guest has not powered it off",
        }
    }

    /// The table of exit codes as `--help` prints it.
    pub(crate) fn table() -> String {
        let mut text = String::from("Exit codes:");
        for exit in Self::ALL {
            text.push_str(&format!("\n  {}  {}", exit as u8, exit.meaning()));
        }
        text
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command ends early: what happened, and what the reader can do about it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub(crate) struct Failure {
    /// The kind of failure, and with it the exit code.
    #[serde(rename = "kind")]
    pub(crate) exit: Exit,
    /// What happened, with names and numbers.
    #[serde(rename = "message")]
    what: String,
    /// What to do about it; empty where the message says so itself.
    advice: String,
    /// For [`Exit::Mismatch`]: the first byte of the disk that differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    first_difference: Option<u64>,
    /// What of a saved state is not as it must be: a line each.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub(crate) differences: Vec<String>,
}

/// What a command hands back.
pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// A failure of kind `exit`: what happened, and what to do.
    pub(crate) fn new(exit: Exit, what: impl fmt::Display, advice: impl fmt::Display) -> Self {
        Self {
            exit,
            what: one_line(&what.to_string()),
            advice: one_line(&advice.to_string()),
            first_difference: None,
            differences: Vec::new(),
        }
    }

    /// The command line cannot be obeyed.
    pub(crate) fn usage(what: impl fmt::Display, advice: impl fmt::Display) -> Self {
        Self::new(Exit::Usage, what, advice)
    }

    /// The disk or its image is at fault.
    pub(crate) fn disk(what: impl fmt::Display, advice: impl fmt::Display) -> Self {
        Self::new(Exit::Disk, what, advice)
    }

    /// The other side of the connection is at fault.
    pub(crate) fn peer(what: impl fmt::Display, advice: impl fmt::Display) -> Self {
        Self::new(Exit::Peer, what, advice)
    }

    /// The system is at fault.
    pub(crate) fn system(what: impl fmt::Display, advice: impl fmt::Display) -> Self {
        Self::new(Exit::System, what, advice)
    }

    /// Something that was saved does not fit here, in each of these ways.
    pub(crate) fn differences(what: impl fmt::Display, differences: &[String]) -> Self {
        let differences = differences.iter().map(|line| one_line(line)).collect();
        Self { differences, ..Self::new(Exit::Mismatch, what, "") }
    }

    /// Byte `offset` of the disk is the first that differs.
    pub(crate) fn mismatch(offset: u64, what: impl fmt::Display) -> Self {
        let advice = "do not trust this disk until the cause is found; -v shows more";
        Self { first_difference: Some(offset), ..Self::new(Exit::Mismatch, what, advice) }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.advice.as_str() {
            "" => f.write_str(&self.what),
            advice => write!(f, "{}; {advice}", self.what),
        }
    }
}

/// `text` on one line: a failure is exactly one line, whatever a file name contains.
fn one_line(text: &str) -> String {
    let parts: Vec<&str> = text
        .split(|c: char| c.is_control())
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .collect();
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_codes_are_what_the_table_says() {
        let table = Exit::table();
        for (index, exit) in Exit::ALL.into_iter().enumerate() {
            assert_eq!(exit as usize, index, "{exit:?}");
            assert!(table.contains(&format!("\n  {index}  {}", exit.meaning())), "{exit:?}");
        }
    }

    #[test]
    fn a_failure_is_one_line_whatever_a_name_contains() {
        for (what, expected) in [
            ("no such file: a\nb", "no such file: a b; x"),
            ("tab\tand\r\nreturn", "tab and return; x"),
            ("plain", "plain; x"),
        ] {
            assert_eq!(Failure::disk(what, "x").to_string(), expected, "{what:?}");
        }
    }
}
