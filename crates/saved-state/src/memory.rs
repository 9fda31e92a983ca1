//! Records of a guest's memory, written by `kmcl-vmm`: what is where in the file that has the memory
//! itself, and with which checksums.
//!
//! Memory is cut into *parts* of one size. The file has those that are not all zeros, either at their own
//! offsets or compressed, one behind the other in the order of the parts.

use crate::kind::{KindInfo, RecordKind, SINCE_V1};
use crate::reader::Kinds;
use crate::record::{self, Record};
use crate::schema::{Field, Shape};

/// The kind of [`MemoryFileRecord`].
pub const MEMORY_FILE: RecordKind = RecordKind(320);
/// The kind of [`MemoryRegionRecord`].
pub const MEMORY_REGION: RecordKind = RecordKind(321);
/// The kind of [`MemoryPartsRecord`].
pub const MEMORY_PARTS: RecordKind = RecordKind(322);

/// The kinds of a memory's stream.
pub const KINDS: Kinds =
    &[MemoryFileRecord::KIND, MemoryRegionRecord::KIND, MemoryPartsRecord::KIND];

/// Most regions that a guest's memory is saved with.
pub const MAX_REGIONS: u32 = 8;
/// Most parts that one record tells of.
pub const MAX_PARTS_PER_RECORD: usize = 4096;
/// Bytes of a part's row in each of the lists of [`MemoryPartsRecord`].
pub const ROW_BYTES: usize = 4;

/// In which form the parts are in the file.
#[derive(Clone, Copy, Debug, Eq, PartialEq, prost::Enumeration)]
#[repr(i32)]
pub enum MemoryForm {
    /// Not said; never written.
    Unspecified = 0,
    /// As they are, each at its own offset; what is not there is zeros.
    Plain = 1,
    /// Each a frame of Zstandard, one behind the other; parts that are all zeros have none.
    Zstd = 2,
}

const MEMORY_FORMS: [&str; 3] = ["unspecified", "plain", "zstd"];

/// The file that has the memory. Once, before its regions and parts.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct MemoryFileRecord {
    /// Bytes of memory.
    #[prost(uint64, tag = "1")]
    pub memory_bytes: u64,
    /// Bytes of each part.
    #[prost(uint64, tag = "2")]
    pub part_bytes: u64,
    /// In which form the parts are in the file.
    #[prost(enumeration = "MemoryForm", tag = "3")]
    pub form: i32,
    /// Bytes of the file, those of its holes included.
    #[prost(uint64, tag = "4")]
    pub file_bytes: u64,
    /// Regions that follow.
    #[prost(uint32, tag = "5")]
    pub regions: u32,
}

impl Record for MemoryFileRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: MEMORY_FILE,
        name: "memory.file",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "memory_bytes", Shape::Uint64).required(),
            Field::new(2, "part_bytes", Shape::Uint64).required(),
            Field::new(3, "form", Shape::Enum(&MEMORY_FORMS)).required(),
            Field::new(4, "file_bytes", Shape::Uint64),
            Field::new(5, "regions", Shape::Uint32).required(),
        ],
        check: record::check::<Self>,
    };
}

/// A region of the memory: where the guest has it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct MemoryRegionRecord {
    /// Guest physical address.
    #[prost(uint64, tag = "1")]
    pub gpa: u64,
    /// Where in the memory it begins, in bytes.
    #[prost(uint64, tag = "2")]
    pub offset: u64,
    /// Length in bytes.
    #[prost(uint64, tag = "3")]
    pub len: u64,
}

impl Record for MemoryRegionRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: MEMORY_REGION,
        name: "memory.region",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "gpa", Shape::Uint64),
            Field::new(2, "offset", Shape::Uint64),
            Field::new(3, "len", Shape::Uint64).required(),
        ],
        check: record::check::<Self>,
    };
}

/// Some parts in a row. Numbers in its lists are little-endian.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct MemoryPartsRecord {
    /// The number of the first one, counted from 0.
    #[prost(uint32, tag = "1")]
    pub first: u32,
    /// Of each the bytes that it has in the file, 4 bytes each: 0 where it is all zeros. In the plain
    /// form, bytes of those pages that are not zeros.
    #[prost(bytes = "vec", tag = "2")]
    pub lengths: Vec<u8>,
    /// Of each the CRC-32C of its content in memory, 4 bytes each; 0 where it is all zeros.
    #[prost(bytes = "vec", tag = "3")]
    pub checksums: Vec<u8>,
}

impl Record for MemoryPartsRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: MEMORY_PARTS,
        name: "memory.parts",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "first", Shape::Uint32),
            Field::new(2, "lengths", Shape::Bytes { most: ROW_BYTES * MAX_PARTS_PER_RECORD })
                .required(),
            Field::new(3, "checksums", Shape::Bytes { most: ROW_BYTES * MAX_PARTS_PER_RECORD })
                .required(),
        ],
        check: record::check::<Self>,
    };
}
