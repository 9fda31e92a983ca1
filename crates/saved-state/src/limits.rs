//! Every bound of a saved state.

/// Most bytes of one chunk, header and checksum included. More than the largest record needs: a
/// packet whose payload, external data, completion, context and device state are all at their bounds.
pub const MAX_CHUNK_BYTES: u32 = 4 << 20;

/// Most chunks of one stream, the first and the last included. A channel at its bounds needs an
/// eighth of it.
pub const MAX_CHUNKS: u32 = 1 << 20;

/// Most bytes of a stream's first chunk.
pub const MAX_HEADER_BYTES: u32 = 4096;

/// Most streams of one file, beside those that tell what is in it. A bus has at most 2047 channels.
pub const MAX_STREAMS: u32 = 8192;

/// Longest name of a stream in a file, in bytes of UTF-8.
pub const MAX_STREAM_NAME_BYTES: usize = 64;

/// Most kinds of records in one stream.
pub const MAX_KINDS: usize = 64;

/// Longest name of a kind of record, in ASCII characters.
pub const MAX_NAME_BYTES: usize = 24;

/// Longest name and version of a program that saves, in ASCII characters.
pub const MAX_PRODUCER_BYTES: usize = 48;

/// Most bytes of a message, a completion's payload, or a description of external data: 16 bits of
/// 8-byte units, which is all that a packet in a ring can have.
pub const MAX_PACKET_BYTES: usize = 0xffff * 8;

/// Most bytes of the area that a channel's user asked for on each incoming packet.
pub const MAX_CONTEXT_BYTES: usize = 64 << 10;

/// Most bytes that a device, or a driver, saves with one packet.
pub const MAX_OWN_STATE_BYTES: usize = 1 << 20;

/// Bytes that a [`ChunkInput`](crate::input::ChunkInput) allocates at most, for each byte that came of the
/// chunk at hand; or 4096, if that is more.
pub const INPUT_BYTES_PER_BYTE: usize = 3;

/// Bytes that reading a file's contents stream allocates at most, for each byte of it.
pub const CONTENTS_BYTES_PER_BYTE: usize = 8;

/// Bytes that decoding one record allocates at most, for each byte of its chunk.
pub const DECODED_BYTES_PER_BYTE: usize = 2;
