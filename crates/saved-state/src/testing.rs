//! For tests and fuzzing: streams put right after a change, chunks made by hand, and versions of the
//! format that do not exist.

use std::ops::Range;

use crate::chunk::{self, Label};
use crate::header;
use crate::kind::RecordKind;
use crate::reader::StreamReader;
use crate::version::{FormatVersion, Readable};

/// A version of the format, as a later release will have it.
#[must_use]
pub fn format_version(number: u16, oldest_reader: u16) -> FormatVersion {
    FormatVersion { number, oldest_reader }
}

/// The reader as a release would have it that knows those versions.
#[must_use]
pub fn reads(mut reader: StreamReader, oldest: u16, newest: u16) -> StreamReader {
    reader.readable = Readable { oldest, newest };
    reader
}

/// Where the streams of a file are, going by the lengths of their chunks alone; ends at what is no
/// stream.
#[must_use]
pub fn stream_ranges(file: &[u8]) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while let Some(rest) = file.get(at..)
        && let Some(last) = chunk_ranges(rest).last()
    {
        ranges.push(at..at + last.end);
        at += last.end;
    }
    ranges
}

/// [`rechain`] for each stream of a file.
pub fn rechain_file(file: &mut [u8]) {
    for range in stream_ranges(file) {
        if let Some(stream) = file.get_mut(range) {
            rechain(stream);
        }
    }
}

/// Where the chunks of `stream` are, going by their lengths alone; ends at what is no chunk.
#[must_use]
pub fn chunk_ranges(stream: &[u8]) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let Some(first) = header_length(stream) else { return ranges };
    ranges.push(0..first);
    let mut at = first;
    while let Some(Ok((_, chunk))) = stream.get(at..).map(chunk::measure) {
        ranges.push(at..at + chunk.len());
        at += chunk.len();
    }
    ranges
}

fn header_length(stream: &[u8]) -> Option<usize> {
    let length = u32::from_le_bytes(*stream.get(8..)?.first_chunk()?) as usize;
    (stream.starts_with(&header::MAGIC) && (32..=stream.len()).contains(&length)).then_some(length)
}

/// Puts every chunk's checksum right, and the checksum of the chunk before that each one carries:
/// whatever was changed is valid as far as checksums can tell.
pub fn rechain(stream: &mut [u8]) {
    let mut previous = 0_u32;
    for range in chunk_ranges(stream) {
        let is_header = range.start == 0;
        let Some(chunk) = stream.get_mut(range) else { return };
        if !is_header {
            let _there_is_room = chunk::set_previous(chunk, previous);
        }
        let Some(checksum) = chunk::seal(chunk) else { return };
        previous = checksum;
    }
}

/// What a chunk made by hand says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Handmade {
    /// Its place.
    pub sequence: u32,
    /// Its kind.
    pub kind: RecordKind,
    /// Its version.
    pub version: u16,
    /// Whether it must not be skipped.
    pub mandatory: bool,
    /// Whether it is the last.
    pub last: bool,
}

/// A chunk with any message at all; [`rechain`] puts it in its place.
#[must_use]
pub fn chunk(handmade: Handmade, message: &[u8]) -> Vec<u8> {
    let Handmade { sequence, kind, version, mandatory, last } = handmade;
    let mut bytes = vec![0; chunk::OVERHEAD_BYTES as usize + message.len()];
    if let Some(room) = chunk::payload_mut(&mut bytes) {
        room.copy_from_slice(message);
    }
    let label = Label { sequence, previous: 0, kind, version, mandatory, last };
    let _checksum = chunk::finish(&mut bytes, &label);
    bytes
}
