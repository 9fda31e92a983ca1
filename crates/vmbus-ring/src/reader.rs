//! Taking packets out of a ring.

use vmbus_memory::{RingPages, SharedView};
use vmbus_wire::packet::{
    DESCRIPTOR_SIZE, PacketDescriptor, PacketHeader, PacketKind, TRAILER_SIZE,
};
use zerocopy::IntoBytes;

use crate::{ReadEnd, RingError};

/// How far in front of the packet being read lines are asked for, in bytes.
///
/// A packet's place is known only when the descriptor before it has arrived. A processor that reads
/// what another one wrote would therefore wait for one line after the other, where an array's
/// elements arrive many at a time. What was published is known, though, and in the order it will be
/// read.
const AHEAD: usize = 1024;

/// Most bytes asked for per packet. Longer ones are copied in one go, which asks for itself.
const AHEAD_STEP: usize = 256;

/// The reading end of a ring.
///
/// Packets are peeked, copied out and stepped over one by one; [`Self::publish`] gives the space of
/// all of them back at once.
#[derive(Debug)]
pub struct RingReader {
    end: ReadEnd<RingPages>,
    /// Ring bytes of the packet last peeked, 0 if there is none.
    peeked: u32,
}

/// An unread packet. Its descriptor was copied and checked: nothing the peer writes from now on
/// changes what this says. The bytes of extension and payload are copied when asked for; copy them
/// once.
#[derive(Debug)]
#[non_exhaustive]
pub struct RingPacket<'a> {
    /// What the packet is for.
    pub kind: PacketKind,
    /// Whether the sender wants a completion packet.
    pub wants_completion: bool,
    /// The sender's name for the request: opaque, and not necessarily unique.
    pub transaction_id: u64,
    /// Bytes between descriptor and payload, a multiple of 8.
    pub extension_len: u32,
    /// Bytes of payload, padding included: a multiple of 8.
    pub payload_len: u32,
    pages: &'a RingPages,
    /// The packet and what was shown behind it, as far as it lies in one piece.
    view: SharedView<'a>,
    at: u32,
}

impl RingReader {
    /// Reads `pages` from where their read index says. The writer is asked not to signal until
    /// [`Self::unmask_and_check`].
    ///
    /// # Errors
    /// An index that is none.
    pub fn new(pages: RingPages) -> Result<Self, RingError> {
        let size = pages.data_len();
        Ok(Self { end: ReadEnd::new(pages, size)?, peeked: 0 })
    }

    /// Goes on at `read_index`, which this end had reached before ([`Self::read_index`]) and was kept
    /// in a saved state: the ring's own word is in the writer's reach.
    ///
    /// # Errors
    /// An index that is none. Nothing has changed then.
    pub fn resume_at(&mut self, read_index: u32) -> Result<(), RingError> {
        self.end.resume_at(read_index)?;
        self.peeked = 0;
        Ok(())
    }

    /// The next unread packet. The writer's index is loaded only when everything known has been
    /// read.
    ///
    /// # Errors
    /// What the peer did wrong, in the index or in the packet's descriptor. The ring is beyond use.
    #[inline]
    pub fn peek(&mut self) -> Result<Option<RingPacket<'_>>, RingError> {
        let mut available = self.end.available();
        if available == 0 {
            available = self.end.refresh()?;
            if available == 0 {
                self.peeked = 0;
                return Ok(None);
            }
            self.pages().view(self.end.position(), available).prefetch(0, AHEAD);
        }
        let at = self.end.position();
        let pages = self.end.words();
        // One test for all that follows: every access is to bytes that were shown to us.
        let view = pages.view(at, available);
        let descriptor = descriptor_in(&view).unwrap_or_else(|| descriptor_in_pieces(pages, at));
        let PacketHeader { kind, wants_completion, transaction_id, extension_len, payload_len } =
            descriptor.check(available).map_err(|error| RingError::Packet { at, error })?;
        let packet = RingPacket {
            kind,
            wants_completion,
            transaction_id,
            extension_len,
            payload_len,
            pages,
            view,
            at,
        };
        self.peeked = packet.ring_bytes();
        view.prefetch(AHEAD, (packet.ring_bytes() as usize).min(AHEAD_STEP));
        Ok(Some(packet))
    }

    /// Steps over the packet last peeked, if it was not stepped over yet.
    #[inline]
    pub fn advance(&mut self) {
        self.end.step(core::mem::take(&mut self.peeked));
    }

    /// Gives the space of everything stepped over back to the writer. Returns whether the writer
    /// must be signalled.
    #[inline]
    #[must_use = "true means that the writer waits for a signal"]
    pub fn publish(&mut self) -> bool {
        self.end.publish()
    }

    /// Asks the writer not to signal, because this end looks by itself.
    #[inline]
    pub fn mask(&mut self) {
        self.end.mask();
    }

    /// Asks the writer to signal and looks once more. False: nothing is there, and the next packet
    /// brings a signal. True: there is more to read, and signals are off; or something read is not
    /// published yet, and nothing has changed.
    ///
    /// # Errors
    /// An index that is none; signals are off.
    pub fn unmask_and_check(&mut self) -> Result<bool, RingError> {
        self.end.unmask_and_check()
    }

    /// Whether nothing is left to read, looking at the writer's index if need be.
    ///
    /// # Errors
    /// An index that is none.
    pub fn is_empty(&mut self) -> Result<bool, RingError> {
        Ok(self.end.available() == 0 && self.end.refresh()? == 0)
    }

    /// Bytes of the data area.
    #[must_use]
    pub fn data_len(&self) -> u32 {
        self.pages().data_len()
    }

    /// Where the next packet is read, published or not.
    #[must_use]
    pub fn read_index(&self) -> u32 {
        self.end.position()
    }

    /// What the ring lives in.
    #[must_use]
    pub fn pages(&self) -> &RingPages {
        self.end.words()
    }
}

/// Two loads, each of them once: what is checked is what is used.
#[inline]
fn descriptor_in(view: &SharedView<'_>) -> Option<PacketDescriptor> {
    Some(zerocopy::transmute!([view.load_u64(0)?, view.load_u64(8)?]))
}

#[cold]
fn descriptor_in_pieces(pages: &RingPages, at: u32) -> PacketDescriptor {
    let mut descriptor = [0; DESCRIPTOR_SIZE as usize];
    pages.read(at, &mut descriptor);
    zerocopy::transmute!(descriptor)
}

impl RingPacket<'_> {
    /// Bytes the packet takes in the ring, descriptor and trailer included.
    #[inline]
    #[must_use]
    pub fn ring_bytes(&self) -> u32 {
        DESCRIPTOR_SIZE + self.extension_len + self.payload_len + TRAILER_SIZE
    }

    /// Where the packet starts in the data area.
    #[inline]
    #[must_use]
    pub fn position(&self) -> u32 {
        self.at
    }

    /// Copies the payload's first bytes into `into`, as many as both have. Returns how many.
    #[inline]
    pub fn copy_payload(&self, into: &mut [u8]) -> usize {
        self.copy(DESCRIPTOR_SIZE + self.extension_len, self.payload_len, into)
    }

    /// Copies the extension's first bytes into `into`, as many as both have. Returns how many.
    #[inline]
    pub fn copy_extension(&self, into: &mut [u8]) -> usize {
        self.copy(DESCRIPTOR_SIZE, self.extension_len, into)
    }

    /// Copies the extension's first 64-bit words into `into`, as many as both have, in this machine's
    /// byte order. Returns how many.
    #[inline]
    pub fn copy_extension_words(&self, into: &mut [u64]) -> usize {
        let words = self.copy_extension(into.as_mut_bytes()) / size_of::<u64>();
        if cfg!(target_endian = "big") {
            into.iter_mut().take(words).for_each(|word| *word = u64::from_le(*word));
        }
        words
    }

    /// Copies extension and payload, as much of both as `into` has room for, as 64-bit words: the
    /// extension's in this machine's byte order, the payload's bytes as they are. One copy is cheaper
    /// than two. Returns how many words.
    #[inline]
    pub fn copy_words(&self, into: &mut [u64]) -> usize {
        let len = self.extension_len + self.payload_len;
        let words = self.copy(DESCRIPTOR_SIZE, len, into.as_mut_bytes()) / size_of::<u64>();
        if cfg!(target_endian = "big") {
            let extension = self.extension_len as usize / size_of::<u64>();
            into.iter_mut().take(extension).for_each(|word| *word = u64::from_le(*word));
        }
        words
    }

    #[inline]
    fn copy(&self, offset: u32, len: u32, into: &mut [u8]) -> usize {
        let len = into.len().min(len as usize);
        let Some(into) = into.get_mut(..len) else { return 0 };
        if self.view.read_at(offset as usize, into).is_err() {
            self.pages.read(self.at + offset, into);
        }
        len
    }
}
