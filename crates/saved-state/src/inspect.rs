//! A walk through any bytes at all: what of a saved state is there, what of it is damaged, and where.
//! For tools; a restore uses a [`StreamReader`](crate::StreamReader).
//!
//! | | |
//! |---|---|
//! | [`inspect_file`] | what a program shows: a file of several streams, or of one |
//! | [`inspect`] | one stream |
//! | [`Piece`] | a stretch of the bytes: a header, a record with its [`fields`](SeenRecord::fields), bytes that are none of these, or an end that is missing |
//! | [`FilePiece`] | which stream a piece belongs to, what the file's list says of it, and whether it is where it should be |
//! | [`PacketRow`] | a record of a packet in flight, as a row of a table |
//! | [`Sizes`] | how many records there are of each kind, and their bytes |
//!
//! Every byte is in exactly one piece, in order; what is damaged does not hide what comes after it.
//!
//! ```
//! # use saved_state::inspect::{ALL_KINDS, FilePiece, PacketRow, Sizes, What, inspect_file};
//! # fn show(file: &[u8]) {
//! let mut sizes = Sizes::default();
//! for FilePiece { stream, piece, misplaced, .. } in inspect_file(file, ALL_KINDS) {
//!     match &piece.what {
//!         What::Header(Some(header)) => println!("stream {stream}: a {}", header.info.stream),
//!         What::Record(record) => {
//!             let name = record.name.as_deref().unwrap_or("?");
//!             println!("  chunk {}: {name}, {} bytes", record.sequence, piece.length);
//!             for field in record.fields.clone().flatten() {
//!                 println!("    {} = {}", field.field.map_or("?", |it| it.name), field.value);
//!             }
//!             if let Some(row) = PacketRow::of(record) {
//!                 println!("    {} of {} bytes", row.condition, row.message_bytes);
//!             }
//!         }
//!         What::Header(None) | What::Stray | What::Missing => {}
//!     }
//!     if let Some(damage) = &piece.damage {
//!         println!("  stream {stream}, byte {} of the file: {damage}", piece.offset);
//!     }
//!     if let Some(misplaced) = misplaced {
//!         println!("  {misplaced}");
//!     }
//!     sizes.add(&piece);
//! }
//! for row in sizes.rows() {
//!     println!("{} of {}: {} bytes", row.records, row.name, row.bytes);
//! }
//! # }
//! ```

mod file;
mod rows;

use crate::chunk::{self, CHECKSUM_BYTES, Framed};
use crate::end::{END, EndRecord};
use crate::error::{Damage, ReadError};
use crate::header::{self, StreamHeader};
use crate::kind::{KindInfo, RecordKind};
use crate::reader::Kinds;
use crate::record::Record;
use crate::schema::Fields;
use crate::version::Readable;
use crate::{bus, channel, contents, integration, machine, memory, sockets, storage, transport};

pub use file::{FilePiece, InspectFile, inspect_file};
pub use rows::{OwnRecord, PacketRow, SizeRow, Sizes};

/// Every kind of record that this crate knows.
pub const ALL_KINDS: Kinds = &[
    EndRecord::KIND,
    contents::ContentsRecord::KIND,
    contents::StreamEntryRecord::KIND,
    contents::StreamSumRecord::KIND,
    channel::ChannelRecord::KIND,
    <channel::OutgoingPacketRecord<'static> as Record>::KIND,
    <channel::IncomingPacketRecord<'static> as Record>::KIND,
    bus::BusHostRecord::KIND,
    bus::BusRamRecord::KIND,
    bus::BusConnectionRecord::KIND,
    <bus::BusChannelRecord<'static> as Record>::KIND,
    <bus::BusGpadlRecord<&'static [u8]> as Record>::KIND,
    bus::BusHvsockRecord::KIND,
    <bus::BusMessageRecord<'static> as Record>::KIND,
    storage::StorageRecord::KIND,
    storage::DiskIdentityRecord::KIND,
    storage::StorageRequestRecord::KIND,
    transport::TransportRecord::KIND,
    transport::TransportRegionRecord::KIND,
    machine::MachineRecord::KIND,
    machine::PartitionRecord::KIND,
    machine::ProcessorRecord::KIND,
    machine::SynicRecord::KIND,
    memory::MemoryFileRecord::KIND,
    memory::MemoryRegionRecord::KIND,
    memory::MemoryPartsRecord::KIND,
    integration::IntegrationServiceRecord::KIND,
    integration::HeartbeatRecord::KIND,
    integration::ShutdownRequestRecord::KIND,
    sockets::SocketsRecord::KIND,
    sockets::SocketConnectionRecord::KIND,
];

/// A stretch of the bytes.
#[derive(Clone, Debug)]
pub struct Piece<'a> {
    /// Where it begins.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// What it is.
    pub what: What<'a>,
    /// What is wrong with it; only the first thing. `None`: nothing.
    pub damage: Option<ReadError>,
}

/// What a stretch of bytes is.
#[derive(Clone, Debug)]
pub enum What<'a> {
    /// The first chunk. `None` where not even that much of it can be read.
    Header(Option<Box<StreamHeader>>),
    /// A chunk with a record.
    Record(Box<SeenRecord<'a>>),
    /// No chunk.
    Stray,
    /// Nothing: the bytes are over, and the last chunk did not come.
    Missing,
}

/// A chunk with a record, as it describes itself.
#[derive(Clone, Debug)]
pub struct SeenRecord<'a> {
    /// Its place.
    pub sequence: u32,
    /// Its kind.
    pub kind: RecordKind,
    /// Its name: the header's, or else that of the known kind.
    pub name: Option<String>,
    /// Its version.
    pub version: u16,
    /// Whether it must not be skipped.
    pub mandatory: bool,
    /// Whether it says that it is the last.
    pub last: bool,
    /// Whether its kind and version are known here.
    pub known: bool,
    /// Its message.
    pub payload: &'a [u8],
    /// Its fields, with names as far as they are known.
    pub fields: Fields<'a>,
}

/// Walks through `bytes`, to their end whatever they are. `kinds` are those whose fields are to be
/// checked and named: [`ALL_KINDS`], or more.
///
/// Work is in proportion to `bytes`, also for bytes made to be searched in vain.
#[must_use]
pub fn inspect(bytes: &[u8], kinds: Kinds) -> Inspect<'_> {
    Inspect::new(bytes, kinds, Span::Stream)
}

/// Bytes whose checksum may be computed in vain while the next good chunk is searched for, for each
/// byte of input.
const SEARCH_FACTOR: usize = 4;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Header,
    Chunks,
    /// The last chunk was seen.
    Ended,
    Over,
}

/// How much the bytes may hold.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Span {
    /// One stream. What comes after it is too much.
    Stream,
    /// One stream after the other.
    File,
}

/// What the next chunk must look like.
#[derive(Clone, Copy, Debug)]
struct Place {
    sequence: u32,
    previous: u32,
}

/// See [`inspect`].
#[derive(Clone, Debug)]
pub struct Inspect<'a> {
    bytes: &'a [u8],
    kinds: Kinds,
    span: Span,
    at: usize,
    /// Where the stream begins.
    start: usize,
    header: Option<Box<StreamHeader>>,
    /// `None` behind a stretch that was no chunk.
    place: Option<Place>,
    chunks: u32,
    state: State,
    /// What may still be spent on searching.
    search_bytes: usize,
}

impl<'a> Iterator for Inspect<'a> {
    type Item = Piece<'a>;

    fn next(&mut self) -> Option<Piece<'a>> {
        let over = self.at >= self.bytes.len();
        match self.state {
            State::Header if !over => {
                self.state = State::Chunks;
                Some(self.header_piece())
            }
            State::Chunks if !over => {
                if self.begins_stream(self.rest()) {
                    self.state = State::Ended;
                    return Some(self.missing_end());
                }
                Some(self.chunk_piece())
            }
            State::Ended if !over && self.span == Span::File => {
                self.start = self.at;
                (self.header, self.place, self.chunks) = (None, None, 0);
                self.state = State::Chunks;
                Some(self.header_piece())
            }
            State::Ended if !over => {
                self.state = State::Over;
                let (offset, bytes) = (self.at as u64, self.rest().len() as u64);
                Some(self.piece(
                    self.rest().len(),
                    What::Stray,
                    Some(ReadError::AfterEnd { offset, bytes }),
                ))
            }
            State::Header | State::Chunks => {
                self.state = State::Over;
                Some(self.missing_end())
            }
            State::Ended | State::Over => None,
        }
    }
}

impl std::iter::FusedIterator for Inspect<'_> {}

impl<'a> Inspect<'a> {
    fn new(bytes: &'a [u8], kinds: Kinds, span: Span) -> Self {
        Self {
            bytes,
            kinds,
            span,
            at: 0,
            start: 0,
            header: None,
            place: None,
            chunks: 0,
            state: State::Header,
            search_bytes: SEARCH_FACTOR.saturating_mul(bytes.len()),
        }
    }

    /// Where the next piece is in its stream.
    fn offset(&self) -> u64 {
        (self.at - self.start) as u64
    }

    fn missing_end(&mut self) -> Piece<'a> {
        let (chunks, bytes) = (self.chunks, self.offset());
        self.piece(0, What::Missing, Some(ReadError::Unfinished { chunks, bytes }))
    }

    /// Whether another stream begins there: its header is undamaged.
    fn begins_stream(&self, bytes: &[u8]) -> bool {
        self.span == Span::File
            && bytes.starts_with(&header::MAGIC)
            && header::check_fixed(bytes).is_ok()
    }

    fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    /// Steps over `length` bytes, which are `what`.
    fn piece(&mut self, length: usize, what: What<'a>, damage: Option<ReadError>) -> Piece<'a> {
        let offset = self.at as u64;
        self.at += length;
        Piece { offset, length: length as u64, what, damage }
    }

    fn damaged(&self, why: Damage) -> ReadError {
        let chunk = self.place.map_or(self.chunks, |place| place.sequence);
        ReadError::Damaged { chunk, offset: self.offset(), why }
    }

    // ---- The first chunk --------------------------------------------------------------------------

    fn header_piece(&mut self) -> Piece<'a> {
        let rest = self.rest();
        let (fixed, mut damage) = match header::check_fixed(rest) {
            Ok(fixed) => (fixed, None),
            Err(error) => match header::fixed_despite(rest) {
                Some(fixed) if self.is_boundary(fixed.length() as usize) => (fixed, Some(error)),
                _ => return self.stray(error),
            },
        };
        let header = match StreamHeader::read_checked(rest, &fixed) {
            Ok(header) => Some(Box::new(header)),
            Err(error) => {
                damage = damage.or(Some(error));
                None
            }
        };
        let (found, needs) = fixed.versions();
        if !Readable::ALL.covers(found, needs) {
            let revision = ReadError::Revision { found, needs, readable: Readable::ALL };
            damage = damage.or(Some(revision));
        }
        let length = fixed.length() as usize;
        self.chunks = 1;
        self.place = Some(Place { sequence: 1, previous: stored(rest, length) });
        self.header.clone_from(&header);
        self.piece(length, What::Header(header), damage)
    }

    // ---- The others -------------------------------------------------------------------------------

    fn chunk_piece(&mut self) -> Piece<'a> {
        let rest = self.rest();
        let (head, whole) = match chunk::measure(rest) {
            Ok(measured) => measured,
            Err(why) => return self.stray(self.damaged(why)),
        };
        // Where another chunk follows, the length can be trusted even if something else is damaged.
        let boundary = self.is_boundary(whole.len());
        if !boundary && !self.spend(whole.len()) {
            return self.stray(self.damaged(Damage::Magic { found: chunk::MAGIC }));
        }
        match chunk::check_sum(whole) {
            Ok(checksum) => self.good_chunk(&chunk::take_apart(&head, whole, checksum)),
            Err(why) if boundary => {
                let framed = chunk::take_apart(&head, whole, stored(whole, whole.len()));
                let damage = self.damaged(why);
                // Its place is taken for granted: the next one then stands or falls by itself.
                let sequence = self.place.map_or(framed.label.sequence, |place| place.sequence);
                self.step(&framed, sequence, Some(damage))
            }
            Err(why) => self.stray(self.damaged(why)),
        }
    }

    fn good_chunk(&mut self, framed: &Framed<'a>) -> Piece<'a> {
        let damage = self.judge(framed);
        if framed.label.last {
            self.state = State::Ended;
        }
        self.step(framed, framed.label.sequence, damage)
    }

    /// What is wrong with a chunk whose bytes are right.
    fn judge(&self, framed: &Framed<'a>) -> Option<ReadError> {
        let label = framed.label;
        let place = self.place.map_or(Ok(()), |Place { sequence, previous }| {
            if label.sequence != sequence {
                Err(Damage::Sequence { found: label.sequence, expected: sequence })
            } else if label.previous != previous {
                Err(Damage::Chain { found: label.previous, expected: previous })
            } else {
                Ok(())
            }
        });
        let announced = self.header.as_ref().map(|header| header.kind(label.kind));
        let as_announced = announced.is_none_or(|announced| {
            announced.is_some_and(|announced| {
                announced.version == label.version && announced.mandatory == label.mandatory
            })
        });
        let (kind, version, mandatory) = (label.kind, label.version, label.mandatory);
        if let Some(why) = framed.strange {
            return Some(self.damaged(why));
        }
        if let Err(why) = place {
            return Some(self.damaged(why));
        }
        if !as_announced {
            return Some(self.damaged(Damage::NotAnnounced { kind, version, mandatory }));
        }
        if label.last != (kind == END) {
            return Some(self.damaged(Damage::Last { kind, last: label.last }));
        }
        let name = announced.flatten().map(|announced| announced.name).unwrap_or_default();
        match self.info(kind) {
            Some(info) if version <= info.newest() => {
                (info.check)(framed.payload).err().map(|why| ReadError::Record {
                    chunk: label.sequence,
                    offset: self.offset(),
                    record: info.name,
                    why,
                })
            }
            _ if !mandatory => None,
            Some(info) => {
                let newest = info.newest();
                Some(ReadError::UnknownRecordVersion { kind, name, found: version, newest })
            }
            None => Some(ReadError::UnknownRecord { kind, name }),
        }
    }

    fn info(&self, kind: RecordKind) -> Option<&'static KindInfo> {
        self.kinds.iter().copied().find(|info| info.kind == kind)
    }

    /// Steps over a chunk; `sequence` is its place.
    fn step(&mut self, framed: &Framed<'a>, sequence: u32, damage: Option<ReadError>) -> Piece<'a> {
        let label = framed.label;
        let info = self.info(label.kind);
        let announced = self.header.as_ref().and_then(|header| header.kind(label.kind));
        let name = announced.map(|announced| announced.name.as_str().to_owned());
        let known = info.filter(|info| label.version <= info.newest());
        let seen = SeenRecord {
            sequence: label.sequence,
            kind: label.kind,
            name: name.or_else(|| info.map(|info| info.name.to_owned())),
            version: label.version,
            mandatory: label.mandatory,
            last: label.last,
            known: known.is_some(),
            payload: framed.payload,
            fields: Fields::new(framed.payload, known.map_or(&[], |info| info.fields)),
        };
        self.chunks = self.chunks.saturating_add(1);
        self.place = Some(Place { sequence: sequence.wrapping_add(1), previous: framed.checksum });
        self.piece(framed.bytes.len(), What::Record(Box::new(seen)), damage)
    }

    // ---- Finding the way back ---------------------------------------------------------------------

    /// Whether the input is over, or another chunk begins, `length` bytes from here.
    fn is_boundary(&self, length: usize) -> bool {
        let after = self.rest().get(length..);
        after.is_some_and(|after| {
            after.is_empty() || after.starts_with(&chunk::MAGIC) || self.begins_stream(after)
        })
    }

    /// Whether four bytes are the first ones of a chunk, or of a stream where one may follow.
    fn may_begin(&self, four: &[u8]) -> bool {
        four == chunk::MAGIC || (self.span == Span::File && header::MAGIC.starts_with(four))
    }

    fn spend(&mut self, bytes: usize) -> bool {
        let left = self.search_bytes.checked_sub(bytes);
        self.search_bytes = left.unwrap_or(0);
        left.is_some()
    }

    /// Steps over what is no chunk, up to the next good one.
    fn stray(&mut self, damage: ReadError) -> Piece<'a> {
        let rest = self.rest();
        let mut from = 1;
        let length = loop {
            let candidates = rest.get(from..).unwrap_or_default().windows(chunk::MAGIC.len());
            let Some(next) = candidates.enumerate().find(|(_, four)| self.may_begin(four)) else {
                break rest.len();
            };
            from += next.0;
            let candidate = rest.get(from..).unwrap_or_default();
            if self.begins_stream(candidate) {
                break from;
            }
            if let Ok((_, whole)) = chunk::measure(candidate) {
                if !self.spend(whole.len()) {
                    break rest.len();
                }
                if chunk::check_sum(whole).is_ok() {
                    break from;
                }
            }
            from += 1;
        };
        self.place = None;
        self.piece(length, What::Stray, Some(damage))
    }
}

/// The checksum that stands at the end of a chunk of `length` bytes.
fn stored(bytes: &[u8], length: usize) -> u32 {
    let at = length.checked_sub(CHECKSUM_BYTES as usize);
    let stored = at.and_then(|at| bytes.get(at..)).and_then(<[u8]>::first_chunk);
    stored.copied().map_or(0, u32::from_le_bytes)
}
