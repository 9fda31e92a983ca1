//! The bytes of a saved state.
//!
//! A saved state is a stream of *chunks*. The first is a plain header that every later version can
//! read; each of the others carries one *record*, a protobuf message; the last one says that
//! nothing is missing. A chunk knows its length, its place, the checksum of the chunk before it, and
//! its own. `docs/saved-state.md` has the layout byte by byte, and what is promised about it;
//! `docs/saved-state.proto` has the messages.
//!
//! The crate knows bytes and nothing else: no files, no clock, no channel. Whoever owns a state makes
//! records of it and hands them to a [`StreamWriter`]; a [`StreamReader`] hands them back. What the
//! numbers in a record *mean* is checked by their owner.
//!
//! | module | what it has |
//! |---|---|
//! | [`writer`], [`reader`] | a stream chunk by chunk, into and out of the caller's buffers |
//! | [`save`] | what is saved, as whoever keeps the bytes sees it |
//! | [`input`] | whole chunks out of a [`Read`](std::io::Read) |
//! | [`file`](mod@file) | several streams in one file: what is in it, and that all of it is there |
//! | [`header`] | what the first chunk says |
//! | [`inspect`](mod@inspect) | a walk through any bytes at all, for tools |
//! | [`record`], [`schema`], [`kind`] | what a record is, its fields, its names and versions |
//! | [`bare`] | a record without a chunk, for the bytes that a device keeps with a packet |
//! | [`channel`], [`bus`], [`storage`], [`transport`], [`machine`], [`memory`], [`integration`], [`sockets`] | the records themselves, by owner |
//! | [`limits`] | every bound |
//!
//! # A stream there and back
//!
//! ```
//! use saved_state::channel::{ChannelRecord, PAUSED_KINDS, Side};
//! use saved_state::text::Producer;
//! use saved_state::*;
//! use vmbus_wire::guid::Guid;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (interface_type, interface_instance) = (Guid::from_u128(1), Guid::from_u128(2));
//! let info = StreamInfo {
//!     stream: StreamKind::CHANNEL,
//!     flags: HeaderFlags::default(),
//!     interface_type,
//!     interface_instance,
//!     producer: Producer::new("example 1.0")?,
//!     chunks: 3,
//!     bytes: 0, // not known yet
//!     items: 0,
//! };
//! let channel = ChannelRecord { side: Side::Server.into(), started: true, ..Default::default() };
//!
//! let mut writer = StreamWriter::new(FormatVersion::NEWEST, info, PAUSED_KINDS)?;
//! let mut buffer = [0; 4096];
//! let mut filled = 0;
//! while !writer.is_ended() {
//!     let room = &mut buffer[filled..];
//!     let step = match writer.chunks() {
//!         0 => writer.header(room)?,
//!         1 => writer.record(&channel, room)?,
//!         _ => writer.end(room)?,
//!     };
//!     match step {
//!         Step::Written { bytes } => filled += bytes,
//!         Step::Needs { bytes } => return Err(format!("no room for {bytes} bytes").into()),
//!     }
//! }
//!
//! let reader = StreamReader::new(StreamKind::CHANNEL, channel::KINDS);
//! let mut reader = reader.of_interface(interface_type, interface_instance);
//! let mut input = &buffer[..filled];
//! while let Some(chunk) = reader.read(&mut input)? {
//!     assert_eq!(chunk.decode::<ChannelRecord>()?, channel);
//! }
//! reader.finish()?;
//! # Ok(())
//! # }
//! ```
//!
//! # What holds, whatever the bytes
//!
//! - **A chunk is checked whole before anything in it is used**: length against the bytes given, then
//!   checksum, then place and chain, then kind and version, then each field.
//! - **Reading a stream allocates nothing.** Packets are decoded as slices of the input. Other records
//!   own copies, within a stated multiple of their chunk ([`limits::DECODED_BYTES_PER_BYTE`]).
//! - **The state alone decides the bytes.** No clock, no random number, and no buffer size has a part
//!   in them: a chunk goes whole into the caller's buffer, or not at all.
//! - **An error has the numbers**: chunk, offset, record, field, what was found and what is allowed.
//!
//! # Adding a record
//!
//! A record belongs to the module of its owner, and its kind to the owner's range of numbers
//! ([`kind::RecordKind`]). Derive [`prost::Message`], implement [`record::Record`] with the table of
//! fields, add the kind to the owner's list, and the message to `docs/saved-state.proto`; tests
//! compare the three. Records are flat: a list is a sequence of records, so that each is checked by
//! itself and no record is large. One that is written by the hundred implements [`record::Encode`]
//! and [`record::Decode`] over borrowed bytes instead, as [`channel`]'s packets do.

#![forbid(unsafe_code)]

pub mod bare;
pub mod bus;
pub mod channel;
mod chunk;
pub mod contents;
pub mod end;
pub mod error;
pub mod file;
pub mod header;
pub mod input;
pub mod inspect;
pub mod integration;
pub mod kind;
pub mod limits;
pub mod machine;
pub mod memory;
mod protobuf;
pub mod reader;
pub mod record;
pub mod save;
pub mod schema;
pub mod sockets;
pub mod storage;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
pub mod text;
pub mod transport;
pub mod version;
pub mod writer;

pub use error::{Damage, FieldError, FieldProblem, ReadError, WriteError};
pub use header::{HeaderFlags, StreamHeader, StreamInfo};
pub use inspect::inspect;
pub use kind::{KindInfo, RecordKind, StreamKind};
pub use prost;
pub use reader::{Chunk, StreamReader};
pub use record::{Decode, Encode, Record};
pub use save::{Save, SaveError, SaveStep};
pub use schema::{Field, Shape, Value};
pub use version::FormatVersion;
pub use writer::{Step, StreamWriter};
