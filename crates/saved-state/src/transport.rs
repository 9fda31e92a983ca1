//! Records of the transport between two processes, written by `vmbus-unix`: the connection as the
//! process knows it that serves.

use crate::kind::{KindInfo, RecordKind, SINCE_V1};
use crate::reader::Kinds;
use crate::record::{self, Record};
use crate::schema::{Field, Shape};

/// The kind of [`TransportRecord`].
pub const TRANSPORT: RecordKind = RecordKind(192);
/// The kind of [`TransportRegionRecord`].
pub const TRANSPORT_REGION: RecordKind = RecordKind(193);

/// The kinds of a transport's stream.
pub const KINDS: Kinds = &[TransportRecord::KIND, TransportRegionRecord::KIND];

/// Bytes with a bit for each event flag there is: 2048 of them.
pub const DOORBELL_BYTES: usize = 256;

/// Most regions that a guest's memory consists of.
pub const MAX_REGIONS: usize = 64;

/// The connection to a guest: which one it is, and how far each side has come. Once, before its
/// regions. Without a guest, everything else is absent.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct TransportRecord {
    /// A guest is connected.
    #[prost(bool, tag = "1")]
    pub guest: bool,
    /// What the connection was named when it began; nothing else has that name.
    #[prost(bytes = "vec", tag = "2")]
    pub connection_id: Vec<u8>,
    /// How often the connection has gone on after a save. A state is good for the epoch it was saved
    /// in.
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
    /// Posts of the guest that were taken.
    #[prost(uint64, tag = "4")]
    pub posts: u64,
    /// What the last of them was answered: a hypercall's status.
    #[prost(uint32, tag = "5")]
    pub post_status: u32,
    /// Messages that the guest was given.
    #[prost(uint64, tag = "6")]
    pub messages: u64,
    /// A bit for each event flag: set where a channel rings it. Bit `n % 8` of byte `n / 8` is flag
    /// `n`; zeros at the end are left out.
    #[prost(bytes = "vec", tag = "7")]
    pub doorbells: Vec<u8>,
    /// Regions that follow.
    #[prost(uint32, tag = "8")]
    pub regions: u32,
}

impl Record for TransportRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: TRANSPORT,
        name: "transport.connection",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "guest", Shape::Bool),
            Field::new(2, "connection_id", Shape::Guid),
            Field::new(3, "epoch", Shape::Uint64),
            Field::new(4, "posts", Shape::Uint64),
            Field::new(5, "post_status", Shape::Uint32),
            Field::new(6, "messages", Shape::Uint64),
            Field::new(7, "doorbells", Shape::Bytes { most: DOORBELL_BYTES }),
            Field::new(8, "regions", Shape::Uint32),
        ],
        check: record::check::<Self>,
    };
}

/// A region of the guest's memory: where it is, and which file it is.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct TransportRegionRecord {
    /// Guest physical address in bytes.
    #[prost(uint64, tag = "1")]
    pub gpa: u64,
    /// Length in bytes.
    #[prost(uint64, tag = "2")]
    pub len: u64,
    /// Where in the file it begins.
    #[prost(uint64, tag = "3")]
    pub file_offset: u64,
    /// The file's device, `st_dev`.
    #[prost(uint64, tag = "4")]
    pub device: u64,
    /// The file's number on it, `st_ino`.
    #[prost(uint64, tag = "5")]
    pub inode: u64,
}

impl Record for TransportRegionRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: TRANSPORT_REGION,
        name: "transport.region",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "gpa", Shape::Uint64),
            Field::new(2, "len", Shape::Uint64).required(),
            Field::new(3, "file_offset", Shape::Uint64),
            Field::new(4, "device", Shape::Uint64),
            Field::new(5, "inode", Shape::Uint64).required(),
        ],
        check: record::check::<Self>,
    };
}
