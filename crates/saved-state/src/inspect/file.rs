//! The walk through a file of several streams: each piece, and whether its stream is where the list has
//! it.

use std::collections::VecDeque;

use crate::contents::{STREAM_ENTRY, STREAM_SUM, StreamEntry, StreamEntryRecord, StreamSumRecord};
use crate::error::ReadError;
use crate::file::FileError;
use crate::header::StreamHeader;
use crate::inspect::{Inspect, Piece, SeenRecord, Span, What, stored};
use crate::kind::StreamKind;
use crate::limits::MAX_STREAMS;
use crate::reader::Kinds;
use crate::record::Decode;

/// A piece of a file.
#[derive(Debug)]
pub struct FilePiece<'a> {
    /// Which stream of the bytes it is in, counted from 0 as they come, whatever is listed.
    pub stream: u32,
    /// What the file's list says of that stream; `None` for the first and the last, and where no list was
    /// read or none of its entries fits.
    pub listed: Option<StreamEntry>,
    /// The piece. Its offset counts from the start of the file; those in its damage from that of the
    /// stream.
    pub piece: Piece<'a>,
    /// The stream is not where it should be, not of this save, or missing; with the first piece that
    /// shows it.
    pub misplaced: Option<FileError>,
}

/// Walks through `bytes`, to their end whatever they are: a file of several streams, or one stream.
/// `kinds` as for [`inspect`](super::inspect).
#[must_use]
pub fn inspect_file(bytes: &[u8], kinds: Kinds) -> InspectFile<'_> {
    InspectFile {
        walk: Inspect::new(bytes, kinds, Span::File),
        bytes,
        stream: 0,
        place: Place::First,
        entries: Vec::new(),
        arrived: Vec::new(),
        sums: Vec::new(),
        current: Sum::default(),
        waiting: VecDeque::new(),
    }
}

/// What the stream is that the walk is in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    /// None has begun.
    First,
    /// The list.
    List,
    /// The one with this entry.
    Listed(usize),
    /// One that is not listed, or not here.
    Stranger,
    /// The sums.
    Sums,
    /// All there is, in a file without a list.
    Alone,
}

/// What a stream has come to so far.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    bytes: u64,
    checksum: u32,
    damaged: bool,
}

/// See [`inspect_file`].
#[derive(Debug)]
pub struct InspectFile<'a> {
    walk: Inspect<'a>,
    bytes: &'a [u8],
    stream: u32,
    place: Place,
    entries: Vec<StreamEntry>,
    /// Whether the stream of each entry has come.
    arrived: Vec<bool>,
    /// Of the list and of each entry's stream, those that have come to their end.
    sums: Vec<Option<Sum>>,
    current: Sum,
    waiting: VecDeque<FilePiece<'a>>,
}

impl<'a> Iterator for InspectFile<'a> {
    type Item = FilePiece<'a>;

    fn next(&mut self) -> Option<FilePiece<'a>> {
        if let Some(piece) = self.waiting.pop_front() {
            return Some(piece);
        }
        match self.walk.next() {
            Some(piece) => {
                self.take(piece);
                self.waiting.pop_front()
            }
            None => {
                self.end_stream();
                let at = self.bytes.len() as u64;
                // Without a list nothing is missing; after the sums it has been said already.
                let unfinished =
                    matches!(self.place, Place::List | Place::Listed(_) | Place::Stranger);
                if unfinished && (self.list_is_whole() || !self.entries.is_empty()) {
                    self.report_missing(self.entries.len(), at);
                    self.report_missing_sums(at);
                }
                self.place = Place::Alone;
                self.waiting.pop_front()
            }
        }
    }
}

impl<'a> InspectFile<'a> {
    /// The list, as far as it was read.
    #[must_use]
    pub fn entries(&self) -> &[StreamEntry] {
        &self.entries
    }

    fn take(&mut self, piece: Piece<'a>) {
        let begins = piece.offset == self.walk.start as u64 && !matches!(piece.what, What::Missing);
        let mut misplaced = None;
        if begins {
            self.end_stream();
            if self.place != Place::First {
                self.stream = self.stream.saturating_add(1);
            }
            let header = match &piece.what {
                What::Header(header) => header.as_deref(),
                _ => None,
            };
            misplaced = self.begin_stream(header, piece.offset);
        }
        self.count(&piece);
        if let What::Record(record) = &piece.what
            && piece.damage.is_none()
        {
            match self.place {
                Place::List => self.add_entry(record),
                Place::Sums => misplaced = misplaced.or(self.compare_sum(record)),
                _ => {}
            }
        }
        let listed = match self.place {
            Place::Listed(at) => self.entries.get(at).cloned(),
            _ => None,
        };
        self.waiting.push_back(FilePiece { stream: self.stream, listed, piece, misplaced });
    }

    // ---- Which stream it is -----------------------------------------------------------------------

    /// Finds the place of a stream that begins at `offset`, and says what is wrong with it.
    fn begin_stream(&mut self, header: Option<&StreamHeader>, offset: u64) -> Option<FileError> {
        let is_contents = header.map(|header| header.info.stream == StreamKind::CONTENTS);
        let due = self.arrived.iter().rposition(|arrived| *arrived).map_or(0, |last| last + 1);
        let (place, wrong) = match self.place {
            Place::First if is_contents == Some(false) => (Place::Alone, None),
            // One that has lost its header is still where the list should be.
            Place::First => (Place::List, None),
            Place::Alone | Place::Sums => (self.place, Some(FileError::AfterEnd { offset })),
            _ if is_contents == Some(true) => {
                self.report_missing(self.entries.len(), offset);
                (Place::Sums, None)
            }
            _ => self.find(header, due, offset),
        };
        self.place = place;
        if let Place::Listed(at) = place
            && let Some(arrived) = self.arrived.get_mut(at)
        {
            *arrived = true;
        }
        wrong
    }

    /// The entry that a stream fits, of those that have not come.
    fn find(
        &mut self,
        header: Option<&StreamHeader>,
        due: usize,
        offset: u64,
    ) -> (Place, Option<FileError>) {
        let Some(header) = header else {
            // What has lost its header is taken for the one that is due.
            let place = match self.entries.get(due) {
                Some(_) => Place::Listed(due),
                None if self.list_is_whole() => Place::Sums,
                None => Place::Stranger,
            };
            return (place, None);
        };
        let fits = |entry: &StreamEntry| entry.differs(&header.info).is_none();
        let later = self.entries.iter().skip(due).position(fits).map(|ahead| due + ahead);
        if let Some(at) = later {
            self.report_missing(at, offset);
            return (Place::Listed(at), None);
        }
        if !self.list_is_whole() {
            // It may have been listed.
            return (Place::Stranger, None);
        }
        let found = Box::new(StreamEntry::of(&header.info, 0, ""));
        let elsewhere = self.entries.iter().position(fits);
        let streams = number(self.entries.len());
        let wrong = match self.entries.get(due) {
            None => FileError::Extra { streams, offset, found },
            Some(listed) => FileError::NotAsListed {
                stream: number(due + 1),
                offset,
                field: listed.differs(&header.info).unwrap_or("stream"),
                found,
                listed: Box::new(listed.clone()),
                elsewhere: elsewhere.map(|at| number(at + 1)),
            },
        };
        // One that was passed over has come after all.
        let late = elsewhere.filter(|&at| self.arrived.get(at) == Some(&false));
        (late.map_or(Place::Stranger, Place::Listed), Some(wrong))
    }

    fn list_is_whole(&self) -> bool {
        self.sums.first().copied().flatten().is_some_and(|list| !list.damaged)
    }

    /// Adds a piece for each entry before `until` that has neither come nor been missed.
    fn report_missing(&mut self, until: usize, offset: u64) {
        let due = self.arrived.iter().rposition(|arrived| *arrived).map_or(0, |last| last + 1);
        for at in due..until {
            let Some(listed) = self.entries.get(at).cloned() else { return };
            let what = What::Missing;
            let missing = FileError::Missing {
                stream: number(at + 1),
                offset,
                listed: listed.clone().into(),
            };
            self.waiting.push_back(FilePiece {
                stream: self.stream,
                listed: Some(listed),
                piece: Piece { offset, length: 0, what, damage: None },
                misplaced: Some(missing),
            });
        }
    }

    fn report_missing_sums(&mut self, offset: u64) {
        let why = ReadError::Unfinished { chunks: 0, bytes: 0 };
        let stream = number(self.entries.len() + 1);
        self.waiting.push_back(FilePiece {
            stream: self.stream,
            listed: None,
            piece: Piece { offset, length: 0, what: What::Missing, damage: Some(why) },
            misplaced: Some(FileError::Stream { stream, name: "sums".into(), why }),
        });
    }

    // ---- What is in the list, and in the sums -------------------------------------------------------

    fn add_entry(&mut self, record: &SeenRecord<'a>) {
        if record.kind == STREAM_ENTRY
            && self.entries.len() < MAX_STREAMS as usize
            && let Ok(entry) = StreamEntryRecord::decode(record.payload)
        {
            self.entries.push(entry.into());
            self.arrived.push(false);
        }
    }

    fn count(&mut self, piece: &Piece<'a>) {
        self.current.bytes += piece.length;
        self.current.damaged |= piece.damage.is_some();
        let range = usize::try_from(piece.offset).ok().zip(usize::try_from(piece.length).ok());
        if let Some((offset, length)) = range
            && length != 0
        {
            let bytes = self.bytes.get(offset..).unwrap_or_default();
            self.current.checksum = stored(bytes, length);
        }
    }

    /// Keeps what the stream has come to.
    fn end_stream(&mut self) {
        let sum = std::mem::take(&mut self.current);
        let at = match self.place {
            Place::List => 0,
            Place::Listed(at) => at + 1,
            _ => return,
        };
        self.sums.resize(self.entries.len() + 1, None);
        if let Some(room) = self.sums.get_mut(at) {
            *room = Some(sum);
        }
    }

    /// Holds a sum against the stream that it is of.
    fn compare_sum(&self, record: &SeenRecord<'a>) -> Option<FileError> {
        if record.kind != STREAM_SUM || !self.list_is_whole() {
            return None;
        }
        // Behind the header, in the order of the streams.
        let at = usize::try_from(record.sequence).ok()?.checked_sub(1)?;
        let stated = StreamSumRecord::decode(record.payload).ok()?;
        // What is damaged, or has not come, has been told.
        let sum = self.sums.get(at).copied().flatten().filter(|sum| !sum.damaged)?;
        let name = at.checked_sub(1).and_then(|at| self.entries.get(at));
        let name = name.map_or_else(|| "contents".into(), |entry| entry.name.clone());
        let (field, found, stated) = if sum.bytes != stated.bytes {
            ("bytes", sum.bytes, stated.bytes)
        } else if sum.checksum != stated.checksum {
            ("checksum", u64::from(sum.checksum), u64::from(stated.checksum))
        } else {
            return None;
        };
        Some(FileError::Exchanged { stream: number(at), name, field, found, stated })
    }
}

/// At most [`MAX_STREAMS`] and some.
fn number(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}
