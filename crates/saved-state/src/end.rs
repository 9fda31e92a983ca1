//! The record that ends a stream.

use crate::kind::{KindInfo, RecordKind, SINCE_V1};
use crate::record::{self, Record};
use crate::schema::{Field, Shape};

/// Says how much came before it, so that a stream which ends with it has lost nothing. Writers add
/// it by themselves, and readers check it by themselves.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct EndRecord {
    /// Chunks before this one.
    #[prost(uint32, tag = "1")]
    pub chunks: u32,
    /// Their bytes.
    #[prost(uint64, tag = "2")]
    pub bytes: u64,
}

/// The kind of [`EndRecord`]. Every stream has it.
pub const END: RecordKind = RecordKind(1);

impl Record for EndRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: END,
        name: "stream.end",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "chunks", Shape::Uint32).required(),
            Field::new(2, "bytes", Shape::Uint64).required(),
        ],
        check: record::check::<Self>,
    };
}
