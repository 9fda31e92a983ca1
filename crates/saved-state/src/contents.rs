//! Records of a file that holds several streams: what is in it, in its first stream, and what it all came
//! to, in its last ([`crate::file`]).

use std::fmt;

use vmbus_wire::guid::Guid;

use crate::error::{FieldError, FieldProblem};
use crate::header::StreamInfo;
use crate::kind::{KindInfo, RecordKind, SINCE_V1, StreamKind};
use crate::limits::MAX_STREAM_NAME_BYTES;
use crate::reader::Kinds;
use crate::record::{self, Record};
use crate::schema::{Field, Fields, Shape, Value};

/// The kind of [`ContentsRecord`].
pub const CONTENTS: RecordKind = RecordKind(2);
/// The kind of [`StreamEntryRecord`].
pub const STREAM_ENTRY: RecordKind = RecordKind(3);
/// The kind of [`StreamSumRecord`].
pub const STREAM_SUM: RecordKind = RecordKind(4);

/// The kinds of a file's first stream.
pub const FIRST_KINDS: Kinds = &[ContentsRecord::KIND, StreamEntryRecord::KIND];
/// The kinds of a file's last stream.
pub const LAST_KINDS: Kinds = &[StreamSumRecord::KIND];

/// What a file has. Once, before the entries.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ContentsRecord {
    /// Streams between this one and the last, and so entries that follow.
    #[prost(uint32, tag = "1")]
    pub streams: u32,
}

impl Record for ContentsRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: CONTENTS,
        name: "file.contents",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[Field::new(1, "streams", Shape::Uint32)],
        check: record::check::<Self>,
    };
}

/// One stream of the file. Entries are in the order of the streams.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct StreamEntryRecord {
    /// What it is the state of: the number in its header.
    #[prost(uint32, tag = "1")]
    pub stream: u32,
    /// Interface type in its header, 16 bytes; empty for zeros.
    #[prost(bytes = "vec", tag = "2")]
    pub interface_type: Vec<u8>,
    /// Interface instance in its header, 16 bytes; empty for zeros.
    #[prost(bytes = "vec", tag = "3")]
    pub interface_instance: Vec<u8>,
    /// 0, or which subchannel it is.
    #[prost(uint32, tag = "4")]
    pub index: u32,
    /// Items in its header.
    #[prost(uint32, tag = "5")]
    pub items: u32,
    /// What it is, for people.
    #[prost(string, tag = "6")]
    pub name: String,
}

impl Record for StreamEntryRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: STREAM_ENTRY,
        name: "file.stream",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "stream", Shape::Uint32).required(),
            Field::new(2, "interface_type", Shape::Guid),
            Field::new(3, "interface_instance", Shape::Guid),
            Field::new(4, "index", Shape::Uint32),
            Field::new(5, "items", Shape::Uint32),
            Field::new(6, "name", Shape::Text { most: MAX_STREAM_NAME_BYTES }),
        ],
        check: check_entry,
    };
}

/// A header has 16 bits for the kind of a stream.
fn check_entry(payload: &[u8]) -> Result<(), FieldError> {
    for found in Fields::new(payload, StreamEntryRecord::KIND.fields) {
        let found = found?;
        if let (1, Value::Uint32(number)) = (found.number, found.value)
            && number > u32::from(u16::MAX)
        {
            let problem =
                FieldProblem::Range { found: u64::from(number), most: u64::from(u16::MAX) };
            return Err(FieldError { number: 1, name: "stream", problem });
        }
    }
    Ok(())
}

/// What a stream came to. One for each stream before the last, the first one included, in their order.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct StreamSumRecord {
    /// Bytes of the stream.
    #[prost(uint64, tag = "1")]
    pub bytes: u64,
    /// Checksum of its last chunk: by the chain, of all of it.
    #[prost(uint32, tag = "2")]
    pub checksum: u32,
}

impl Record for StreamSumRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: STREAM_SUM,
        name: "file.sum",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "bytes", Shape::Uint64).required(),
            Field::new(2, "checksum", Shape::Uint32),
        ],
        check: record::check::<Self>,
    };
}

/// One stream of a file, as the file's first stream lists it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StreamEntry {
    /// What it is the state of.
    pub stream: StreamKind,
    /// Interface type of the channel or device; zeros for a bus.
    pub interface_type: Guid,
    /// Its instance.
    pub interface_instance: Guid,
    /// 0, or which subchannel it is.
    pub index: u32,
    /// How much is saved: packets in flight of a channel, offers of a bus, requests of a device.
    pub items: u32,
    /// What it is, for people: at most [`MAX_STREAM_NAME_BYTES`], no control characters.
    pub name: Box<str>,
}

impl StreamEntry {
    /// The entry for a stream with such a header.
    pub(crate) fn of(info: &StreamInfo, index: u32, name: &str) -> Self {
        Self {
            stream: info.stream,
            interface_type: info.interface_type,
            interface_instance: info.interface_instance,
            index,
            items: info.items,
            name: name.into(),
        }
    }

    /// What no two streams of a file have in common.
    pub(crate) fn identity(&self) -> (u16, Guid, Guid, u32) {
        (self.stream.0, self.interface_type, self.interface_instance, self.index)
    }

    /// The first field in which a header is not as listed.
    pub(crate) fn differs(&self, info: &StreamInfo) -> Option<&'static str> {
        let fields = [
            ("stream", self.stream == info.stream),
            ("interface_type", self.interface_type == info.interface_type),
            ("interface_instance", self.interface_instance == info.interface_instance),
            ("items", self.items == info.items),
        ];
        fields.iter().find(|(_, same)| !same).map(|(name, _)| *name)
    }
}

/// Kind, interface, subchannel and items; without the name.
impl fmt::Display for StreamEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.stream)?;
        if (self.interface_type, self.interface_instance) != (Guid::ZERO, Guid::ZERO) {
            write!(f, " of {}, instance {}", self.interface_type, self.interface_instance)?;
        }
        if self.index != 0 {
            write!(f, ", subchannel {}", self.index)?;
        }
        write!(f, ", {} items", self.items)
    }
}

impl From<&StreamEntry> for StreamEntryRecord {
    fn from(entry: &StreamEntry) -> Self {
        let StreamEntry { stream, interface_type, interface_instance, index, items, name } = entry;
        let stored = |guid: &Guid| match *guid {
            Guid::ZERO => Vec::new(),
            guid => guid.to_bytes().to_vec(),
        };
        Self {
            stream: u32::from(stream.0),
            interface_type: stored(interface_type),
            interface_instance: stored(interface_instance),
            index: *index,
            items: *items,
            name: name.to_string(),
        }
    }
}

impl From<StreamEntryRecord> for StreamEntry {
    /// Of a record that was decoded: its fields are within their bounds.
    fn from(record: StreamEntryRecord) -> Self {
        let StreamEntryRecord { stream, interface_type, interface_instance, index, items, name } =
            record;
        let guid = |bytes: Vec<u8>| bytes.try_into().map_or(Guid::ZERO, Guid::from_bytes);
        Self {
            stream: StreamKind(u16::try_from(stream).unwrap_or(0)),
            interface_type: guid(interface_type),
            interface_instance: guid(interface_instance),
            index,
            items,
            name: name.into(),
        }
    }
}
