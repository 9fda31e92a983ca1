//! Versions of the format.

use std::fmt;

/// A version of the format that can be written: the layout of chunks, and which records there are.
///
/// It is raised for a change that a reader has to know of before it reads on. A new field, or a
/// record that may be skipped, needs no new format version.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct FormatVersion {
    pub(crate) number: u16,
    /// The oldest version whose readers can read this one.
    pub(crate) oldest_reader: u16,
}

impl FormatVersion {
    /// The first one.
    pub const V1: Self = Self { number: 1, oldest_reader: 1 };
    /// The newest one: what is written unless an older one is asked for.
    pub const NEWEST: Self = Self::V1;
    /// All of them, oldest first.
    pub const ALL: &'static [Self] = &[Self::V1];

    /// The number in the header.
    #[must_use]
    pub const fn number(self) -> u16 {
        self.number
    }
}

impl fmt::Display for FormatVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.number)
    }
}

impl TryFrom<u16> for FormatVersion {
    type Error = UnknownVersion;

    fn try_from(number: u16) -> Result<Self, UnknownVersion> {
        let found = Self::ALL.iter().copied().find(|version| version.number == number);
        found.ok_or(UnknownVersion { number, readable: Readable::ALL })
    }
}

/// A format version that cannot be written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("format version {number} is not one of {readable}")]
pub struct UnknownVersion {
    /// What was asked for.
    pub number: u16,
    /// What there is.
    pub readable: Readable,
}

/// The versions that a reader reads.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Readable {
    /// The oldest.
    pub oldest: u16,
    /// The newest. Later versions are read too if they say that this one may.
    pub newest: u16,
}

impl Readable {
    /// All that this crate knows.
    pub const ALL: Self = Self { oldest: 1, newest: FormatVersion::NEWEST.number };

    /// Whether a stream of version `found`, which says that readers from `oldest_reader` on can read
    /// it, can be read.
    pub(crate) fn covers(self, found: u16, oldest_reader: u16) -> bool {
        found >= self.oldest && oldest_reader <= self.newest
    }
}

impl fmt::Display for Readable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.oldest, self.newest)
    }
}
