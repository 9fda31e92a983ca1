//! Putting packets into a ring.

use vmbus_memory::{RingPages, SharedSlice};
use vmbus_wire::packet::{
    DESCRIPTOR_SIZE, MAX_PACKET_BYTES, PacketFlags, PacketHeader, PacketKind, TRAILER_SIZE, UNIT,
};
use vmbus_wire::ring::RESERVED_BYTES;

use crate::{RingError, WriteEnd};

/// A packet to be sent. Extension and payload come in parts, which are joined; each of the two is
/// padded with zeros to a multiple of 8 bytes.
#[derive(Clone, Copy, Debug)]
pub struct OutgoingPacket<'a> {
    /// What the packet is for.
    pub kind: PacketKind,
    /// Whether a completion packet is wanted.
    pub wants_completion: bool,
    /// Comes back in the completion. Of a completion: that of the request.
    pub transaction_id: u64,
    /// What the kind of packet has between descriptor and payload.
    pub extension: &'a [&'a [u8]],
    /// The payload.
    pub payload: &'a [&'a [u8]],
}

/// Why a packet was not put into the ring; the ring is as it was. All sizes are bytes of ring.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PushError {
    /// Too little is free at the moment.
    #[error("packet needs {needed} bytes of ring, {free} are free")]
    Full {
        /// What the packet needs.
        needed: u32,
        /// What is free.
        free: u32,
    },
    /// It will never fit.
    #[error("packet needs {needed} bytes of ring, more than {max}")]
    TooLarge {
        /// What the packet needs.
        needed: u64,
        /// The most any packet may take in this ring.
        max: u32,
    },
    /// The peer broke the ring.
    #[error(transparent)]
    Ring(#[from] RingError),
}

/// Bytes of ring taken by a packet with `extension_len` and `payload_len` bytes: those, each padded
/// to a multiple of 8, a descriptor and a trailer. The largest `u32` where the sum does not fit.
#[inline]
#[must_use]
pub const fn packet_ring_bytes(extension_len: u32, payload_len: u32) -> u32 {
    let (units, rest) = (u32::MAX - UNIT + 1, DESCRIPTOR_SIZE + TRAILER_SIZE);
    if extension_len > units || payload_len > units {
        return u32::MAX;
    }
    let extension_len = extension_len.next_multiple_of(UNIT);
    extension_len.saturating_add(payload_len.next_multiple_of(UNIT)).saturating_add(rest)
}

/// The writing end of a ring.
///
/// Packets are put in one by one, unseen by the reader; [`Self::publish`] shows them all at once.
#[derive(Debug)]
pub struct RingWriter {
    end: WriteEnd<RingPages>,
    max_packet_bytes: u32,
}

impl RingWriter {
    /// Writes `pages` from where their write index says. An old request for space is withdrawn.
    ///
    /// # Errors
    /// An index that is none.
    pub fn new(pages: RingPages) -> Result<Self, RingError> {
        let size = pages.data_len();
        let max_packet_bytes = (MAX_PACKET_BYTES + TRAILER_SIZE).min(size - RESERVED_BYTES);
        Ok(Self { end: WriteEnd::new(pages, size)?, max_packet_bytes })
    }

    /// Goes on at `write_index`, which this end had reached before ([`Self::write_index`]) and was
    /// kept in a saved state: the ring's own word is in the reader's reach.
    ///
    /// # Errors
    /// An index that is none. Nothing has changed then.
    pub fn resume_at(&mut self, write_index: u32) -> Result<(), RingError> {
        self.end.resume_at(write_index)
    }

    /// Bytes free for whole packets, descriptors and trailers included, looking at the reader's
    /// index. Packets put in and not published count as used.
    ///
    /// # Errors
    /// An index that is none.
    #[inline]
    pub fn free(&mut self) -> Result<u32, RingError> {
        self.end.refresh()
    }

    /// As [`Self::free`], as far as known: the truth is at least this.
    #[inline]
    #[must_use]
    pub fn free_cached(&self) -> u32 {
        self.end.free()
    }

    /// The most bytes of ring any packet may take here.
    #[must_use]
    pub fn max_packet_bytes(&self) -> u32 {
        self.max_packet_bytes
    }

    /// Puts a packet in. The reader sees it after [`Self::publish`].
    ///
    /// # Errors
    /// [`PushError`]; the ring is as it was.
    // Into every caller: where the number of parts is known, the loops over them dissolve.
    #[inline(always)]
    pub fn push(&mut self, packet: &OutgoingPacket<'_>) -> Result<(), PushError> {
        let frame = Frame::of(packet, self.end.position(), self.max_packet_bytes)?;
        let needed = frame.ring_bytes();
        let mut free = self.end.free();
        if needed > free {
            free = self.end.refresh()?;
            if needed > free {
                return Err(PushError::Full { needed, free });
            }
        }
        match self.pages().window(frame.at, needed) {
            Some(window) => frame.lay_out(&window),
            None => lay_out_in_pieces(self.pages(), *packet, frame.at, self.max_packet_bytes),
        }
        self.end.step(needed);
        Ok(())
    }

    /// Shows the reader every packet put in. Returns whether the reader must be signalled.
    #[inline]
    #[must_use = "true means that the reader waits for a signal"]
    pub fn publish(&mut self) -> bool {
        self.end.publish()
    }

    /// Asks the reader to signal when `bytes` are free, and looks once more. True: they are there
    /// already, nothing is asked for. False: a signal will come; call [`Self::clear_space_request`]
    /// then.
    ///
    /// # Errors
    /// An index that is none.
    pub fn request_space(&mut self, bytes: u32) -> Result<bool, RingError> {
        self.end.request_space(bytes)
    }

    /// Withdraws a request for space.
    pub fn clear_space_request(&mut self) {
        self.end.clear_request();
    }

    /// Bytes of the data area.
    #[must_use]
    pub fn data_len(&self) -> u32 {
        self.pages().data_len()
    }

    /// Where the next packet is written, published or not.
    #[must_use]
    pub fn write_index(&self) -> u32 {
        self.end.position()
    }

    /// What the ring lives in.
    #[must_use]
    pub fn pages(&self) -> &RingPages {
        self.end.words()
    }
}

/// A packet's layout, checked. Offsets count from the packet's start.
struct Frame<'a> {
    extension: &'a [&'a [u8]],
    payload: &'a [&'a [u8]],
    /// The descriptor, as the ring's words.
    descriptor: [u64; 2],
    /// Where in the ring the packet starts.
    at: u32,
    extension_end: u32,
    payload_at: u32,
    payload_end: u32,
    trailer_at: u32,
}

impl<'a> Frame<'a> {
    #[inline(always)]
    fn of(packet: &OutgoingPacket<'a>, at: u32, max: u32) -> Result<Self, PushError> {
        let OutgoingPacket { kind, wants_completion, transaction_id, extension, payload } = *packet;
        let (Some(extension_len), Some(payload_len)) = (total(extension), total(payload)) else {
            return Err(too_large(extension, payload, max));
        };
        let extension_end = DESCRIPTOR_SIZE + extension_len;
        let payload_at = extension_end.next_multiple_of(UNIT);
        let payload_end = payload_at + payload_len;
        let trailer_at = payload_end.next_multiple_of(UNIT);
        if trailer_at + TRAILER_SIZE > max {
            return Err(too_large(extension, payload, max));
        }
        let flags =
            if wants_completion { PacketFlags::COMPLETION_REQUESTED } else { PacketFlags::empty() };
        // What `PacketHeader::to_descriptor` says, put together in registers: as a struct it takes
        // four narrow stores and a wide load of the same bytes, which make the processor wait.
        let head = u64::from(kind.to_wire())
            | u64::from(payload_at / UNIT) << 16
            | u64::from(trailer_at / UNIT) << 32
            | u64::from(flags.bits()) << 48;
        debug_assert_eq!(
            PacketHeader {
                kind,
                wants_completion,
                transaction_id,
                extension_len: payload_at - DESCRIPTOR_SIZE,
                payload_len: trailer_at - payload_at,
            }
            .to_descriptor(),
            Ok(zerocopy::transmute!([head.to_le(), transaction_id.to_le()])),
        );
        Ok(Self {
            extension,
            payload,
            descriptor: [head, transaction_id],
            at,
            extension_end,
            payload_at,
            payload_end,
            trailer_at,
        })
    }

    #[inline]
    fn ring_bytes(&self) -> u32 {
        self.trailer_at + TRAILER_SIZE
    }

    #[inline(always)]
    fn lay_out(&self, canvas: &impl Canvas) {
        let [head, id] = self.descriptor;
        canvas.word(0, head);
        canvas.word(8, id);
        // Padding first, as a whole word: the bytes in front of it are written next.
        if self.extension_end < self.payload_at {
            canvas.word(self.payload_at - UNIT, 0);
        }
        join(canvas, DESCRIPTOR_SIZE, self.extension);
        if self.payload_end < self.trailer_at {
            canvas.word(self.trailer_at - UNIT, 0);
        }
        join(canvas, self.payload_at, self.payload);
        // `PacketTrailer`: nothing, then where the descriptor starts.
        canvas.word(self.trailer_at, u64::from(self.at) << 32);
    }
}

/// Lays `parts` out in a row from `at` on.
#[inline(always)]
fn join(canvas: &impl Canvas, mut at: u32, parts: &[&[u8]]) {
    for part in parts {
        canvas.bytes(at, part);
        #[allow(clippy::cast_possible_truncation, reason = "the sum of all parts was checked")]
        let len = part.len() as u32;
        at += len;
    }
}

/// For rings that are not mapped, and memory that keeps track of writes.
// Starts again from a copy of the packet: references would keep the caller's packet and frame in
// memory, where it builds them field by field.
#[cold]
#[inline(never)]
fn lay_out_in_pieces(pages: &RingPages, packet: OutgoingPacket<'_>, at: u32, max: u32) {
    let Ok(frame) = Frame::of(&packet, at, max) else { return };
    let piece = pages.piece(at, frame.ring_bytes());
    if piece.len() == frame.ring_bytes() as usize {
        frame.lay_out(&piece);
    } else {
        frame.lay_out(&Pieces { pages, at });
    }
}

/// Length of all parts together; `None` if no packet is as long, so that sums of a few of these fit.
#[inline]
fn total(parts: &[&[u8]]) -> Option<u32> {
    let sum = parts.iter().fold(0usize, |sum, part| sum.saturating_add(part.len()));
    u32::try_from(sum).ok().filter(|sum| *sum <= MAX_PACKET_BYTES)
}

#[cold]
fn too_large(extension: &[&[u8]], payload: &[&[u8]], max: u32) -> PushError {
    let padded = |parts: &[&[u8]]| {
        let sum = parts.iter().fold(0u64, |sum, part| sum.saturating_add(part.len() as u64));
        sum.checked_next_multiple_of(u64::from(UNIT)).unwrap_or(u64::MAX)
    };
    let needed = padded(extension)
        .saturating_add(padded(payload))
        .saturating_add(u64::from(DESCRIPTOR_SIZE + TRAILER_SIZE));
    PushError::TooLarge { needed, max }
}

/// Where a packet is laid out, by byte offset from its start.
trait Canvas {
    /// Eight aligned bytes, least significant first.
    fn word(&self, offset: u32, word: u64);
    fn bytes(&self, offset: u32, bytes: &[u8]);
}

impl Canvas for SharedSlice<'_> {
    #[inline]
    fn word(&self, offset: u32, word: u64) {
        let stored = self.store_u64(offset as usize, word.to_le());
        debug_assert!(stored.is_some());
    }

    #[inline]
    fn bytes(&self, offset: u32, bytes: &[u8]) {
        let written = self.write_at(offset as usize, bytes);
        debug_assert!(written.is_ok());
    }
}

struct Pieces<'a> {
    pages: &'a RingPages,
    at: u32,
}

impl Canvas for Pieces<'_> {
    fn word(&self, offset: u32, word: u64) {
        self.bytes(offset, &word.to_le_bytes());
    }

    fn bytes(&self, offset: u32, bytes: &[u8]) {
        self.pages.write(self.at + offset, bytes);
    }
}
