//! Records of a storage controller, written by `vsp-storage`: the controller and its disks as the state
//! of a device, a request as the state that goes with a packet.

use crate::kind::{KindInfo, RecordKind, SINCE_V1};
use crate::reader::Kinds;
use crate::record::{self, Record};
use crate::schema::{Field, Shape};

/// The kind of [`StorageRecord`].
pub const STORAGE: RecordKind = RecordKind(128);
/// The kind of [`DiskIdentityRecord`].
pub const DISK_IDENTITY: RecordKind = RecordKind(129);
/// The kind of [`StorageRequestRecord`].
pub const STORAGE_REQUEST: RecordKind = RecordKind(130);

/// The kinds of a controller's stream. Requests travel with their packets ([`crate::bare`]).
pub const KINDS: Kinds = &[StorageRecord::KIND, DiskIdentityRecord::KIND];

/// Most characters of a serial number.
pub const MAX_SERIAL_BYTES: usize = 64;
/// Most bytes of a fingerprint.
pub const MAX_FINGERPRINT_BYTES: usize = 64;
/// Most unit attention conditions that wait on one disk.
pub const MAX_UNIT_ATTENTIONS: usize = 16;
/// Most bytes of a command descriptor block.
pub const MAX_CDB_BYTES: usize = 64;

/// How far the initialisation of a controller's channel has come: the last step that was answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq, prost::Enumeration)]
#[repr(i32)]
pub enum InitStep {
    /// Not said; never written.
    Unspecified = 0,
    /// None yet.
    Idle = 1,
    /// BEGIN_INITIALIZATION.
    Begun = 2,
    /// QUERY_PROTOCOL_VERSION, with a version that was accepted.
    Version = 3,
    /// QUERY_PROPERTIES.
    Properties = 4,
    /// END_INITIALIZATION: it takes requests.
    Ready = 5,
}

/// A controller: what it and the guest agreed on. Once, before its disks.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct StorageRecord {
    /// How far initialisation has come.
    #[prost(enumeration = "InitStep", tag = "1")]
    pub step: i32,
    /// The version of the storage protocol, as on the wire; 0 before one is agreed on.
    #[prost(uint32, tag = "2")]
    pub protocol_version: u32,
    /// Subchannels that the guest was told it may ask for.
    #[prost(uint32, tag = "3")]
    pub max_sub_channels: u32,
    /// Subchannels that it asked for, and was given.
    #[prost(uint32, tag = "4")]
    pub sub_channels: u32,
    /// Largest transfer that the guest was told of, in bytes.
    #[prost(uint32, tag = "5")]
    pub max_transfer_bytes: u32,
    /// Disks that follow.
    #[prost(uint32, tag = "6")]
    pub disks: u32,
    /// Disks that were ever attached.
    #[prost(uint64, tag = "7")]
    pub attachments: u64,
}

impl Record for StorageRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: STORAGE,
        name: "storage.controller",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "step", Shape::Enum(&INIT_STEPS)).required(),
            Field::new(2, "protocol_version", Shape::Uint32),
            Field::new(3, "max_sub_channels", Shape::Uint32),
            Field::new(4, "sub_channels", Shape::Uint32),
            Field::new(5, "max_transfer_bytes", Shape::Uint32),
            Field::new(6, "disks", Shape::Uint32),
            Field::new(7, "attachments", Shape::Uint64),
        ],
        check: record::check::<Self>,
    };
}

const INIT_STEPS: [&str; 6] = ["unspecified", "idle", "begun", "version", "properties", "ready"];

/// A disk: enough to know it again, and to refuse another one in its place.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DiskIdentityRecord {
    /// Path, target and logical unit under which the guest knows it.
    #[prost(uint32, tag = "1")]
    pub path: u32,
    /// See [`Self::path`].
    #[prost(uint32, tag = "2")]
    pub target: u32,
    /// See [`Self::path`].
    #[prost(uint32, tag = "3")]
    pub lun: u32,
    /// Size in bytes.
    #[prost(uint64, tag = "4")]
    pub size_bytes: u64,
    /// Bytes of a sector.
    #[prost(uint32, tag = "5")]
    pub sector_bytes: u32,
    /// Bytes that are best read and written together.
    #[prost(uint32, tag = "6")]
    pub physical_sector_bytes: u32,
    /// Serial number.
    #[prost(string, tag = "7")]
    pub serial: String,
    /// A fingerprint of the first [`Self::fingerprinted_bytes`] of its content: 16 bytes, the 128-bit
    /// FNV-1a hash of them, most significant byte first. Empty if none was taken.
    #[prost(bytes = "vec", tag = "8")]
    pub fingerprint: Vec<u8>,
    /// See [`Self::fingerprint`].
    #[prost(uint64, tag = "9")]
    pub fingerprinted_bytes: u64,
    /// Writes are refused.
    #[prost(bool, tag = "10")]
    pub read_only: bool,
    /// Unit attention conditions that the guest has not been told of, oldest first: two bytes each,
    /// additional sense code and its qualifier.
    #[prost(bytes = "vec", tag = "11")]
    pub unit_attentions: Vec<u8>,
    /// Which attachment of a disk to the controller this is, counted from 1. Requests name it: an
    /// address may have got another disk meanwhile.
    #[prost(uint64, tag = "12")]
    pub attachment: u64,
}

impl Record for DiskIdentityRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: DISK_IDENTITY,
        name: "storage.disk",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "path", Shape::Uint32),
            Field::new(2, "target", Shape::Uint32),
            Field::new(3, "lun", Shape::Uint32),
            Field::new(4, "size_bytes", Shape::Uint64).required(),
            Field::new(5, "sector_bytes", Shape::Uint32).required(),
            Field::new(6, "physical_sector_bytes", Shape::Uint32),
            Field::new(7, "serial", Shape::Text { most: MAX_SERIAL_BYTES }),
            Field::new(8, "fingerprint", Shape::Bytes { most: MAX_FINGERPRINT_BYTES }),
            Field::new(9, "fingerprinted_bytes", Shape::Uint64),
            Field::new(10, "read_only", Shape::Bool),
            Field::new(11, "unit_attentions", Shape::Bytes { most: 2 * MAX_UNIT_ATTENTIONS }),
            Field::new(12, "attachment", Shape::Uint64),
        ],
        check: record::check::<Self>,
    };
}

/// A request in flight, as far as its packet does not tell: what was taken from the guest's bytes, and
/// how much of it is done.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct StorageRequestRecord {
    /// Path, target and logical unit that it is for.
    #[prost(uint32, tag = "1")]
    pub path: u32,
    /// See [`Self::path`].
    #[prost(uint32, tag = "2")]
    pub target: u32,
    /// See [`Self::path`].
    #[prost(uint32, tag = "3")]
    pub lun: u32,
    /// The command descriptor block.
    #[prost(bytes = "vec", tag = "4")]
    pub cdb: Vec<u8>,
    /// Bytes of the transfer.
    #[prost(uint32, tag = "5")]
    pub transfer_bytes: u32,
    /// Bytes moved for good, of its present range if it has several: a replay may begin behind them.
    #[prost(uint32, tag = "6")]
    pub moved_bytes: u32,
    /// Ranges discarded for good, of a command that has several.
    #[prost(uint32, tag = "7")]
    pub discarded_ranges: u32,
    /// The attachment of the disk that it is for.
    #[prost(uint64, tag = "8")]
    pub attachment: u64,
}

impl Record for StorageRequestRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: STORAGE_REQUEST,
        name: "storage.request",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "path", Shape::Uint32),
            Field::new(2, "target", Shape::Uint32),
            Field::new(3, "lun", Shape::Uint32),
            Field::new(4, "cdb", Shape::Bytes { most: MAX_CDB_BYTES }).required(),
            Field::new(5, "transfer_bytes", Shape::Uint32),
            Field::new(6, "moved_bytes", Shape::Uint32),
            Field::new(7, "discarded_ranges", Shape::Uint32),
            Field::new(8, "attachment", Shape::Uint64),
        ],
        check: record::check::<Self>,
    };
}
