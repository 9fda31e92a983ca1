//! Kinds of streams and kinds of records.

use std::fmt;

use crate::error::FieldError;
use crate::schema::Field;
use crate::version::FormatVersion;

/// What a stream is the state of. Any number can stand in a header; these are known.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct StreamKind(pub u16);

impl StreamKind {
    /// One channel, at one of its endpoints.
    pub const CHANNEL: Self = Self(1);
    /// A bus: a control plane with all it knows of its channels.
    pub const BUS: Self = Self(2);
    /// A device, apart from its channels.
    pub const DEVICE: Self = Self(3);
    /// A file of several streams: what is in it ([`crate::contents`]).
    pub const CONTENTS: Self = Self(4);
    /// A transport: a connection between two processes, as the one that serves knows it.
    pub const TRANSPORT: Self = Self(5);
    /// A machine: its processors, and what Hyper-V gives them.
    pub const MACHINE: Self = Self(6);
    /// A guest's memory: what is where in the file that has it.
    pub const MEMORY: Self = Self(7);

    /// Its name, if it is known.
    #[must_use]
    pub const fn name(self) -> Option<&'static str> {
        Some(match self {
            Self::CHANNEL => "channel",
            Self::BUS => "bus",
            Self::DEVICE => "device",
            Self::CONTENTS => "contents",
            Self::TRANSPORT => "transport",
            Self::MACHINE => "machine",
            Self::MEMORY => "memory",
            _ => return None,
        })
    }
}

impl fmt::Display for StreamKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.pad(name),
            None => write!(f, "stream of kind {}", self.0),
        }
    }
}

/// The number of a kind of record. A number is never given to another kind.
///
/// | numbers | whose |
/// |---|---|
/// | 0 | never used |
/// | 1 to 15 | of this crate: [`crate::end`], [`crate::contents`] |
/// | 16 to 63 | `kmcl`: [`crate::channel`] |
/// | 64 to 127 | `vmbus-host`: the bus |
/// | 128 to 1023 | devices of this project; 128 to 143 is [`crate::storage`], 192 to 255 [`crate::transport`], 256 to 319 [`crate::machine`], 320 to 335 [`crate::memory`], 336 to 351 [`crate::integration`], 352 to 367 [`crate::sockets`] |
/// | 1024 to 32767 | kept free |
/// | 32768 to 65535 | devices of others: each needs to differ only within its own streams |
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct RecordKind(pub u16);

impl RecordKind {
    /// The first number that this project never gives to a kind of its own.
    pub const FIRST_FOREIGN: Self = Self(0x8000);
}

impl fmt::Display for RecordKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// All that is known of a kind of record.
#[derive(Debug)]
pub struct KindInfo {
    /// Its number.
    pub kind: RecordKind,
    /// Its name, `"owner.record"`: at most [`MAX_NAME_BYTES`](crate::limits::MAX_NAME_BYTES)
    /// printable ASCII characters.
    pub name: &'static str,
    /// Whether a reader that does not know it has to refuse the stream instead of skipping it.
    pub mandatory: bool,
    /// Its versions: which one is written in which version of the format. Ascending.
    pub versions: &'static [RecordVersion],
    /// Its fields, in ascending order of their numbers.
    pub fields: &'static [Field],
    /// Checks a message as its decoder does: each field, and what they say together.
    pub check: fn(&[u8]) -> Result<(), FieldError>,
}

/// The version of a record that belongs to a version of the format, and to those after it up to the
/// next entry.
///
/// A record's version is raised when it gets a field that an older reader must not skip; a field
/// that may be skipped needs no new version.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RecordVersion {
    /// The number of the format version.
    pub format: u16,
    /// The version of the record.
    pub record: u16,
}

/// Known since the first format, never changed: what most kinds have as
/// [`KindInfo::versions`].
pub const SINCE_V1: &[RecordVersion] = &[RecordVersion { format: 1, record: 1 }];

impl KindInfo {
    /// The version of the record to write in a version of the format, or `None` where that had no
    /// such record.
    #[must_use]
    pub fn version_in(&self, format: FormatVersion) -> Option<u16> {
        let known = self.versions.iter().rev().find(|entry| entry.format <= format.number());
        known.map(|entry| entry.record)
    }

    /// The newest version of the record that can be read. All before it can be too.
    #[must_use]
    pub fn newest(&self) -> u16 {
        self.versions.last().map_or(0, |entry| entry.record)
    }
}
