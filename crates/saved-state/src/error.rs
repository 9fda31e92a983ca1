//! What can be wrong with a saved state, and with an attempt to write one.

use vmbus_wire::guid::Guid;

use crate::kind::{RecordKind, StreamKind};
use crate::text::KindName;
use crate::version::Readable;

/// Why bytes are refused as a saved state. Nothing of the chunk it is about has been used.
///
/// Chunks are counted from 0, bytes from the start of the stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The first bytes are something else's.
    #[error("not a saved state: it begins with the bytes {found:02x?}")]
    NotASavedState {
        /// The first bytes.
        found: [u8; 8],
    },
    /// A version that cannot be read here: STATUS_REVISION_MISMATCH (D-29).
    #[error(
        "format version {found}, for readers of version {needs} or later; this one reads {readable}"
    )]
    Revision {
        /// The stream's version.
        found: u16,
        /// The oldest reader that it is for.
        needs: u16,
        /// What is read here.
        readable: Readable,
    },
    /// The bytes are not those that were written, or not in that order.
    #[error("chunk {chunk} at byte {offset}: {why}")]
    Damaged {
        /// Which chunk: the one expected there, whatever it says itself.
        chunk: u32,
        /// Where it begins.
        offset: u64,
        /// What is wrong.
        why: Damage,
    },
    /// The state of something else.
    #[error("state of a {found}, not of a {expected}")]
    OtherStream {
        /// What it is of.
        found: StreamKind,
        /// What was expected.
        expected: StreamKind,
    },
    /// The state of another channel or device.
    #[error(
        "state of interface {found_type}, instance {found_instance}, not of {expected_type}, {expected_instance}"
    )]
    OtherInterface {
        /// Whose it is: type.
        found_type: Guid,
        /// Whose it is: instance.
        found_instance: Guid,
        /// Whose was expected: type.
        expected_type: Guid,
        /// Whose was expected: instance.
        expected_instance: Guid,
    },
    /// The header has flags that must not be ignored.
    #[error("header flags {bits:#010x} are unknown, and must not be ignored")]
    UnknownFlags {
        /// Those flags.
        bits: u32,
    },
    /// The stream has records that this reader does not know and must not skip.
    #[error("record {name} (kind {kind}) is unknown, and must not be skipped")]
    UnknownRecord {
        /// Its kind.
        kind: RecordKind,
        /// Its name.
        name: KindName,
    },
    /// The stream has records in a version that this reader does not know, and must not skip.
    #[error("record {name} (kind {kind}) has version {found}, this reader knows up to {newest}")]
    UnknownRecordVersion {
        /// Its kind.
        kind: RecordKind,
        /// Its name.
        name: KindName,
        /// The stream's version of it.
        found: u16,
        /// The newest known.
        newest: u16,
    },
    /// A record is not what it claims, though its chunk is undamaged.
    #[error("chunk {chunk} at byte {offset}, record {record}: {why}")]
    Record {
        /// Which chunk.
        chunk: u32,
        /// Where it begins.
        offset: u64,
        /// The record's name.
        record: &'static str,
        /// What is wrong.
        why: FieldError,
    },
    /// A chunk was decoded as another record than it has: a mistake of the caller.
    #[error("chunk {chunk} has a record {found}, decoded as {expected}")]
    OtherRecord {
        /// Which chunk.
        chunk: u32,
        /// What it has.
        found: &'static str,
        /// What was asked for.
        expected: &'static str,
    },
    /// The stream was over before.
    #[error("{bytes} bytes after the last chunk, at byte {offset}")]
    AfterEnd {
        /// Where the stream ended.
        offset: u64,
        /// What comes after it.
        bytes: u64,
    },
    /// The last chunk did not come.
    #[error("the end is missing after {chunks} chunks, {bytes} bytes")]
    Unfinished {
        /// Chunks read.
        chunks: u32,
        /// Their bytes.
        bytes: u64,
    },
}

/// What is wrong with a chunk.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// Fewer bytes are there than it has.
    #[error("cut: {available} bytes of {needed}")]
    Cut {
        /// Bytes of the chunk, or of what says how long it is.
        needed: u64,
        /// Bytes there.
        available: u64,
    },
    /// A length that no chunk has.
    #[error("a length of {found} bytes, not {least} to {most}")]
    Length {
        /// What it says.
        found: u32,
        /// Bytes of the shortest.
        least: u32,
        /// Bytes of the longest.
        most: u32,
    },
    /// Something changed between its first byte and its last.
    #[error("checksum {computed:#010x}, stored is {stored:#010x}")]
    Checksum {
        /// What it says.
        stored: u32,
        /// What its bytes come to.
        computed: u32,
    },
    /// No chunk begins here.
    #[error("begins with the bytes {found:02x?}")]
    Magic {
        /// What is there.
        found: [u8; 4],
    },
    /// A chunk is missing, doubled or in the wrong place.
    #[error("sequence number {found}, not {expected}")]
    Sequence {
        /// What it says.
        found: u32,
        /// Its place.
        expected: u32,
    },
    /// The chunk before it is not the one it was written after: it is from another stream.
    #[error("written after a chunk with checksum {found:#010x}, not {expected:#010x}")]
    Chain {
        /// Checksum of the chunk it was written after.
        found: u32,
        /// Checksum of the chunk it comes after.
        expected: u32,
    },
    /// Flags that no chunk has.
    #[error("flags {found:#06x}, known are {known:#06x}")]
    Flags {
        /// All flags.
        found: u16,
        /// Those that there are.
        known: u16,
    },
    /// What is kept free is not 0.
    #[error("{found:#x} in a field that is kept free")]
    Reserved {
        /// What is there.
        found: u32,
    },
    /// The header's list of kinds does not have it, or not like that.
    #[error("kind {kind}, version {version}, {}mandatory, is not in the header", if *mandatory { "" } else { "not " })]
    NotAnnounced {
        /// Its kind.
        kind: RecordKind,
        /// Its version.
        version: u16,
        /// Whether it says that it must not be skipped.
        mandatory: bool,
    },
    /// Only the record that ends the stream is the last, and it is.
    #[error("kind {kind} says that it is {}the last", if *last { "" } else { "not " })]
    Last {
        /// Its kind.
        kind: RecordKind,
        /// What it says.
        last: bool,
    },
    /// More chunks than a stream has.
    #[error("more than {most} chunks")]
    TooManyChunks {
        /// Most of them.
        most: u32,
    },
    /// A total is not what was counted.
    #[error("{counted} {what}, stated are {stated}")]
    Total {
        /// Of what.
        what: &'static str,
        /// What the stream says.
        stated: u64,
        /// What there is.
        counted: u64,
    },
    /// The header's list of kinds is not within it.
    #[error(
        "{rows} rows of {row_bytes} bytes from byte {offset} on, in a header of {length} bytes"
    )]
    Table {
        /// Rows.
        rows: u16,
        /// Bytes of each.
        row_bytes: u16,
        /// Where the first one begins.
        offset: u16,
        /// Bytes of the header.
        length: u32,
    },
    /// The header's list has a kind twice.
    #[error("kind {kind} is in the header twice")]
    Twice {
        /// That kind.
        kind: RecordKind,
    },
    /// A text of the header has other than printable characters.
    #[error("{what} is not printable ASCII, padded with zeros")]
    Text {
        /// Which text.
        what: &'static str,
    },
}

/// A field of a record is not what it may be.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{}: {problem}", FieldName { number: *number, name })]
pub struct FieldError {
    /// Its number; 0 where not even that is known.
    pub number: u32,
    /// Its name; empty where it is not known.
    pub name: &'static str,
    /// What is wrong.
    pub problem: FieldProblem,
}

struct FieldName<'a> {
    number: u32,
    name: &'a str,
}

impl std::fmt::Display for FieldName<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.number, self.name) {
            (0, _) => f.write_str("a field without a number"),
            (number, "") => write!(f, "unknown field {number}"),
            (number, name) => write!(f, "field {name} ({number})"),
        }
    }
}

/// What is wrong with a field.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FieldProblem {
    /// It goes on after the end of the record.
    #[error("cut: needs {needed} bytes, {left} are left")]
    Cut {
        /// Bytes it needs.
        needed: u64,
        /// Bytes left.
        left: u64,
    },
    /// A number of more than 64 bits.
    #[error("a number of more than 64 bits")]
    Varint,
    /// A number that no field has.
    #[error("field number {found}")]
    Number {
        /// What is there.
        found: u64,
    },
    /// Encoded in another way than the field, or than any.
    #[error("wire type {found}{}", Expected(*expected))]
    WireType {
        /// What is there.
        found: u8,
        /// That of the field; `None` where there is none that it could be.
        expected: Option<u8>,
    },
    /// A number out of range.
    #[error("{found}, at most {most}")]
    Range {
        /// What is there.
        found: u64,
        /// The largest.
        most: u64,
    },
    /// Too many bytes.
    #[error("{found} bytes, at most {most}")]
    Length {
        /// What is there.
        found: u64,
        /// The most.
        most: u64,
    },
    /// A value that the enumeration does not have.
    #[error("unknown value {found}")]
    Enumeration {
        /// What is there.
        found: u64,
    },
    /// Not UTF-8.
    #[error("not UTF-8")]
    Text,
    /// A text that would not be safe to show.
    #[error("control character U+{:04X}", u32::from(*found))]
    Control {
        /// The first one.
        found: char,
    },
    /// Not as long as a GUID.
    #[error("{found} bytes, a GUID has 16")]
    Guid {
        /// Bytes there.
        found: u64,
    },
    /// Required, and not there.
    #[error("missing")]
    Missing,
    /// It is there, and another field says that it is not.
    #[error("contradicts field {other}")]
    Contradiction {
        /// That field.
        other: &'static str,
    },
    /// The decoder refused what the table of fields allows: they do not agree.
    #[error("not decodable")]
    Undecodable,
}

struct Expected(Option<u8>);

impl std::fmt::Display for Expected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |expected| write!(f, ", not {expected}"))
    }
}

/// Why a chunk cannot be written. Nothing was written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// A header has room for [`MAX_KINDS`](crate::limits::MAX_KINDS), each once.
    #[error("{found} kinds of records, each once and at most {most} with the stream's own")]
    Kinds {
        /// Kinds asked for.
        found: usize,
        /// The most.
        most: usize,
    },
    /// The name of a kind does not fit the header.
    #[error("{name:?} is no name for a record")]
    Name {
        /// That name.
        name: &'static str,
    },
    /// The header comes first and once, the end last.
    #[error("{asked} asked for after {chunks} chunks{}", if *ended { ", the last included" } else { "" })]
    Order {
        /// What was asked for.
        asked: &'static str,
        /// Chunks written.
        chunks: u32,
        /// Whether the end is among them.
        ended: bool,
    },
    /// The header did not announce records of that kind.
    #[error("record {record} was not announced")]
    NotAnnounced {
        /// Its name.
        record: &'static str,
    },
    /// The version of the format to be written has no such record, and a reader must not skip it.
    #[error("format version {format} has no record {record}")]
    NoSuchRecord {
        /// Its name.
        record: &'static str,
        /// That version.
        format: u16,
    },
    /// The version of the record to be written has no such field, and a reader must not skip it.
    #[error("version {version} of record {record} has no field {field}, which is in use")]
    NoSuchField {
        /// The record's name.
        record: &'static str,
        /// The field's name.
        field: &'static str,
        /// That version.
        version: u16,
    },
    /// A field that no reader would take.
    #[error("record {record}: {why}")]
    Field {
        /// The record's name.
        record: &'static str,
        /// What is wrong.
        why: FieldError,
    },
    /// The chunk would be too long.
    #[error("record {record} takes {bytes} bytes, at most {most}")]
    TooLarge {
        /// Its name.
        record: &'static str,
        /// Bytes of the chunk.
        bytes: u64,
        /// The most.
        most: u32,
    },
    /// The stream would be too long.
    #[error("more than {most} chunks")]
    TooManyChunks {
        /// The most.
        most: u32,
    },
    /// A record did not encode into the length that it stated: a mistake in its
    /// [`Encode`](crate::record::Encode).
    #[error("record {record} did not encode into the {stated} bytes it stated")]
    Length {
        /// Its name.
        record: &'static str,
        /// Bytes it stated.
        stated: usize,
    },
}
