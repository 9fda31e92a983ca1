//! The bounds of one guest's control plane. Whatever a guest sends, the host's state stays within
//! them; [`Host::violations`](crate::Host::violations) counts.

/// Channels at a time, withdrawn ones that the guest has not released included: a channel id is also
/// the number of an event flag, of which there are 2048, and 0 is none.
///
/// Source: vmbus-wire section 3, message 1.
pub const MAX_CHANNELS: usize = 2047;

/// Largest channel id.
pub const MAX_CHANNEL_ID: u32 = 2047;

/// GPADLs of one channel at a time. Devices known need a ring and at most four buffers.
pub const MAX_GPADLS_PER_CHANNEL: usize = 64;

/// GPADLs of one guest at a time: four for every channel id.
pub const MAX_GPADLS: usize = 4 * MAX_CHANNELS;

/// GPADLs of one guest of which the header has come and not yet all words. Each holds at most 64 KiB.
pub const MAX_INCOMPLETE_GPADLS: usize = 256;

/// Pages that the GPADLs of one guest may describe, unless told otherwise: 1280 MiB.
///
/// Source: vmbus-wire section 5, the limit of Windows Server 2019 and later.
pub const DEFAULT_GPADL_PAGES: u64 = 1280 * 1024 * 1024 / 4096;

/// hvsock connect requests of one guest that the handler has not answered.
pub const MAX_HVSOCK_REQUESTS: usize = 128;

/// As many messages as this may wait for the guest before its own messages are refused with
/// [`PostError::Busy`](crate::PostError::Busy).
///
/// Messages that devices cause may be queued on top of it: [`MAX_OUTGOING_MESSAGES`] counts them.
pub const MAX_WAITING_MESSAGES: usize = 256;

/// Most messages that can ever wait for the guest. Once [`MAX_WAITING_MESSAGES`] wait, the guest can
/// ask for nothing more, so that what is still added was owed before: per channel an offer, a
/// rescind, and the answers to an open, a close of a reserved channel and a modify; per GPADL one
/// answer; per hvsock request one answer; ALL_OFFERS_DELIVERED and the answer to the last message.
pub const MAX_OUTGOING_MESSAGES: usize = MAX_WAITING_MESSAGES
    + 5 * MAX_CHANNELS
    + MAX_GPADLS
    + MAX_INCOMPLETE_GPADLS
    + MAX_HVSOCK_REQUESTS
    + 2;

/// SINTs of one virtual processor.
pub const SINT_COUNT: u8 = 16;

/// As many effects as this may wait to be performed before a [`HostBus`](crate::HostBus) refuses
/// messages of the guest with [`PostError::Busy`](crate::PostError::Busy). They wait only while a
/// port is slow to return.
pub const MAX_WAITING_EFFECTS: usize = 1024;

/// Most runs of RAM of a guest whose bus can be saved. Machines known have fewer than ten.
pub const MAX_RAM_RUNS: usize = 4096;

/// Largest serial number, and number of an offer, in a saved state. A bus that counts one each
/// nanosecond gets there in a century.
pub const MAX_SAVED_SERIAL: u64 = 1 << 62;

/// Bytes that a restore takes at most for each byte of the state. The shortest records are short beside
/// what they stand for: a message has room for 240 bytes, a channel for what comes with an open, and
/// whatever holds them grows by doubling.
pub const RESTORED_BYTES_PER_BYTE: usize = 24;

/// Bytes that a restore takes beside those, however short the state is.
pub const RESTORED_BYTES: usize = 64 << 10;
