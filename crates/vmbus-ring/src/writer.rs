//! Putting packets into a ring.

use vmbus_memory::{RingPages, SharedSlice};
use vmbus_wire::packet::{
    DESCRIPTOR_SIZE, MAX_PACKET_BYTES, PacketDescriptor, PacketHeader, PacketKind, PacketTrailer,
    TRAILER_SIZE, UNIT,
};
use vmbus_wire::ring::RESERVED_BYTES;
use zerocopy::IntoBytes;

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
    let sum = ring_bytes(extension_len as u64, payload_len as u64);
    if sum > u32::MAX as u64 { u32::MAX } else { sum as u32 }
}

#[inline]
const fn ring_bytes(extension_len: u64, payload_len: u64) -> u64 {
    let unit = UNIT as u64;
    extension_len.next_multiple_of(unit)
        + payload_len.next_multiple_of(unit)
        + (DESCRIPTOR_SIZE + TRAILER_SIZE) as u64
}

/// The writing end of a ring.
///
/// Packets are put in one by one, unseen by the reader; [`Self::publish`] shows them all at once.
#[derive(Debug)]
pub struct RingWriter {
    end: WriteEnd<RingPages>,
}

impl RingWriter {
    /// Writes `pages` from where their write index says. An old request for space is withdrawn.
    ///
    /// # Errors
    /// An index that is none.
    pub fn new(pages: RingPages) -> Result<Self, RingError> {
        let size = pages.data_len();
        Ok(Self { end: WriteEnd::new(pages, size)? })
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
        (MAX_PACKET_BYTES + TRAILER_SIZE).min(self.data_len() - RESERVED_BYTES)
    }

    /// Puts a packet in. The reader sees it after [`Self::publish`].
    ///
    /// # Errors
    /// [`PushError`]; the ring is as it was.
    #[inline]
    pub fn push(&mut self, packet: &OutgoingPacket<'_>) -> Result<(), PushError> {
        let extension_len = total(packet.extension);
        let payload_len = total(packet.payload);
        let (descriptor, needed) = self.describe(packet, extension_len, payload_len)?;
        let mut free = self.end.free();
        if needed > free {
            free = self.end.refresh()?;
            if needed > free {
                return Err(PushError::Full { needed, free });
            }
        }
        let at = self.end.position();
        let frame = Frame {
            descriptor,
            trailer: PacketTrailer::new(at),
            payload_at: needed - TRAILER_SIZE - padded(payload_len),
            trailer_at: needed - TRAILER_SIZE,
            packet,
        };
        match self.pages().window(at, needed) {
            Some(window) => frame.lay_out(&window),
            None => frame.lay_out(&Wrapping { pages: self.pages(), at }),
        }
        self.end.step(needed);
        Ok(())
    }

    /// The descriptor of a packet and its bytes of ring.
    #[inline]
    fn describe(
        &self,
        packet: &OutgoingPacket<'_>,
        extension_len: u64,
        payload_len: u64,
    ) -> Result<(PacketDescriptor, u32), PushError> {
        let max = self.max_packet_bytes();
        let needed = extension_len.saturating_add(payload_len).min(u64::MAX / 2);
        if needed > u64::from(max) {
            return Err(PushError::TooLarge { needed: needed + 24, max });
        }
        let needed = ring_bytes(extension_len, payload_len);
        let too_large = PushError::TooLarge { needed, max };
        if needed > u64::from(max) {
            return Err(too_large);
        }
        let header = PacketHeader {
            kind: packet.kind,
            wants_completion: packet.wants_completion,
            transaction_id: packet.transaction_id,
            extension_len: padded(extension_len),
            payload_len: padded(payload_len),
        };
        let descriptor = header.to_descriptor().map_err(|_| too_large)?;
        Ok((descriptor, header.ring_bytes()))
    }

    /// Shows the reader every packet put in. Returns whether the reader must be signalled.
    #[inline]
    #[must_use = "true means that the reader waits for a signal"]
    pub fn publish(&mut self) -> bool {
        self.end.publish()
    }

    /// Asks the reader to signal when `bytes` are free, and looks once more. True: they are there
    /// already, nothing is asked for. False: a signal will come; call [`Self::clear_space_request`]
    /// then. Packets put in must have been published.
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

#[inline]
fn total(parts: &[&[u8]]) -> u64 {
    parts.iter().fold(0u64, |sum, part| sum.saturating_add(part.len() as u64))
}

/// `len` with padding. For lengths that have passed [`RingWriter::describe`].
#[inline]
#[allow(clippy::cast_possible_truncation, reason = "at most MAX_PACKET_BYTES")]
fn padded(len: u64) -> u32 {
    (len as u32).next_multiple_of(UNIT)
}

/// Where a packet is laid out, by byte offset from its start.
trait Canvas {
    fn word(&self, offset: u32, word: [u8; 8]);
    fn bytes(&self, offset: u32, bytes: &[u8]);
}

impl Canvas for SharedSlice<'_> {
    #[inline]
    fn word(&self, offset: u32, word: [u8; 8]) {
        let stored = self.store_u64(offset as usize, u64::from_ne_bytes(word));
        debug_assert!(stored.is_some());
    }

    #[inline]
    fn bytes(&self, offset: u32, bytes: &[u8]) {
        let written = self.write_at(offset as usize, bytes);
        debug_assert!(written.is_ok());
    }
}

/// A packet that does not lie in one piece.
struct Wrapping<'a> {
    pages: &'a RingPages,
    at: u32,
}

impl Canvas for Wrapping<'_> {
    fn word(&self, offset: u32, word: [u8; 8]) {
        self.bytes(offset, &word);
    }

    fn bytes(&self, offset: u32, bytes: &[u8]) {
        self.pages.write(self.at + offset, bytes);
    }
}

struct Frame<'a> {
    descriptor: PacketDescriptor,
    trailer: PacketTrailer,
    payload_at: u32,
    trailer_at: u32,
    packet: &'a OutgoingPacket<'a>,
}

impl Frame<'_> {
    #[inline]
    fn lay_out(&self, canvas: &impl Canvas) {
        let [head, id]: [[u8; 8]; 2] = zerocopy::transmute!(self.descriptor);
        canvas.word(0, head);
        canvas.word(8, id);
        parts(canvas, DESCRIPTOR_SIZE, self.payload_at, self.packet.extension);
        parts(canvas, self.payload_at, self.trailer_at, self.packet.payload);
        canvas.word(self.trailer_at, zerocopy::transmute!(self.trailer));
    }
}

/// Lays `parts` out in a row from `start` on, with zeros up to `end`.
#[inline]
fn parts(canvas: &impl Canvas, start: u32, end: u32, parts: &[&[u8]]) {
    let mut at = start;
    for part in parts {
        canvas.bytes(at, part);
        #[allow(clippy::cast_possible_truncation, reason = "the sum of all parts was checked")]
        let len = part.len() as u32;
        at += len;
    }
    let padding = [0u8; UNIT as usize];
    if let Some(zeros) = padding.get(..(end - at) as usize).filter(|zeros| !zeros.is_empty()) {
        canvas.bytes(at, zeros.as_bytes());
    }
}
