//! Why a channel was not restored.

use saved_state::input::InputError;
use saved_state::{ReadError, Record as _, channel as records};
use vmbus_ring::RingError;
use vmbus_wire::packet::ExtensionError;
use vmbus_wire::status::NtStatus;

use crate::lifecycle::ChannelState;

/// Why a channel was not restored. It is as it was before the first chunk.
///
/// Chunks are counted from 0, the header; fields have the names of `docs/saved-state.proto`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The channel cannot be restored in its present state (D-5).
    #[error("a channel that is {state:?}, frozen, saved, or has packets in use cannot be restored")]
    State {
        /// Where it is.
        state: ChannelState,
    },
    /// The bytes are not a channel's saved state, or damaged, or another channel's.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The channel was set up otherwise than the one that was saved.
    #[error("{}, field {setting}: was {saved}, and is {here} here", At(*chunk, CHANNEL))]
    Setting {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// What was set, as the record calls it.
        setting: &'static str,
        /// What it was.
        saved: u64,
        /// What it is.
        here: u64,
    },
    /// There are more or fewer packets than the channel's record says, or more than a channel has.
    #[error("chunk {chunk}: {found} records {record}, {stated} stated, {most} at most")]
    Count {
        /// Place in the stream of the chunk with which that was seen.
        chunk: u32,
        /// Of what.
        record: &'static str,
        /// How many there are, or how many at least.
        found: u32,
        /// How many the channel's record states.
        stated: u32,
        /// The bound.
        most: u32,
    },
    /// A packet, or the end, comes before the channel's record, or that record comes twice.
    #[error("{}: out of order", At(*chunk, record))]
    Order {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// Its record.
        record: &'static str,
    },
    /// A transaction id that cannot be, or comes twice.
    #[error("{}, field transaction_id: {transaction_id:#x} is none, or there twice", At(*chunk, OUTGOING))]
    Transaction {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// The id.
        transaction_id: u64,
    },
    /// Something is larger than this channel's rings or settings allow, or of an odd length.
    #[error("{}, field {field}: {bytes} bytes, at most {most}, in steps of {step}", At(*chunk, record))]
    Size {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// Its record.
        record: &'static str,
        /// Field of the record.
        field: &'static str,
        /// Bytes.
        bytes: u64,
        /// Most bytes.
        most: u64,
        /// What the length is a multiple of.
        step: u32,
    },
    /// Two fields that cannot both be.
    #[error("{}, field {field}: contradicts field {other}", At(*chunk, record))]
    Contradiction {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// Its record.
        record: &'static str,
        /// Field of the record.
        field: &'static str,
        /// The other field, of this record or the channel's.
        other: &'static str,
    },
    /// External data that is described wrongly.
    #[error("{}, field extension: {why}", At(*chunk, INCOMING))]
    Extension {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// What is wrong.
        why: ExtensionError,
    },
    /// There are packets of the driver's, and no callbacks to restore them with (D-24).
    #[error("{}: no restore callback is set", At(*chunk, OUTGOING))]
    NoCallback {
        /// Place of the chunk in the stream.
        chunk: u32,
    },
    /// The driver's callback failed (D-26).
    #[error("{}: the driver cannot restore its packet: {status}", At(*chunk, OUTGOING))]
    Driver {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// What it said.
        status: NtStatus,
    },
    /// An index that is none in these rings, of the saved state's or the peer's.
    #[error("{}, field {field}: {why}", At(*chunk, CHANNEL))]
    Ring {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// Field of the channel's record.
        field: &'static str,
        /// What is wrong.
        why: RingError,
    },
    /// The ring has less free room than the packets had promised to them: its peer has changed what it
    /// says of it.
    #[error("{}, field incoming_packets: {promised} bytes promised to completions, {free} free in the ring", At(*chunk, CHANNEL))]
    Room {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// Bytes.
        promised: u64,
        /// Bytes.
        free: u32,
    },
    /// There is no packet object left.
    #[error("out of resources: {0}")]
    Resources(&'static str),
}

pub(super) const CHANNEL: &str = records::ChannelRecord::KIND.name;
pub(super) const OUTGOING: &str = records::OutgoingPacketRecord::<'static>::KIND.name;
pub(super) const INCOMING: &str = records::IncomingPacketRecord::<'static>::KIND.name;

/// How messages name a place.
struct At<'a>(u32, &'a str);

impl std::fmt::Display for At<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "chunk {}, record {}", self.0, self.1)
    }
}

impl RestoreError {
    /// What VmbChannelRestoreFromBuffer returns for it (D-5, D-19, D-24, D-26, D-29).
    #[must_use]
    pub fn status(&self) -> NtStatus {
        match self {
            Self::State { .. } | Self::NoCallback { .. } => NtStatus::INVALID_DEVICE_STATE,
            Self::Read(
                ReadError::Revision { .. }
                | ReadError::UnknownFlags { .. }
                | ReadError::UnknownRecordVersion { .. },
            ) => NtStatus::REVISION_MISMATCH,
            Self::Driver { status, .. } => *status,
            Self::Resources(_) => NtStatus::INSUFFICIENT_RESOURCES,
            _ => NtStatus::INVALID_PARAMETER_2,
        }
    }
}

/// Why a channel was not restored from a [`Read`](std::io::Read).
#[derive(Debug, thiserror::Error)]
pub enum RestoreFromError {
    /// The state does not fit the channel, or is none.
    #[error(transparent)]
    State(#[from] RestoreError),
    /// The bytes cannot be read.
    #[error(transparent)]
    Input(#[from] InputError),
}
