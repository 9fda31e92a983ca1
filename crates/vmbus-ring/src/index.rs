//! The two ends of a ring as far as indices go: how much there is to read or write, what to show the
//! peer, when to signal it, and how to wait without missing its signal.
//!
//! Indices are positions in the data area, multiples of 8 and below its size. Each end keeps the
//! index it owns privately and never reads it back; the peer's is checked at every load.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use vmbus_wire::ring::{ALIGNMENT, FeatureBits, RESERVED_BYTES};

use crate::words::{ControlWords, Word};
use crate::{Index, RingError};

/// Bytes from `from` forward to `to`, both below `size`.
#[inline]
fn distance(from: u32, to: u32, size: u32) -> u32 {
    if to >= from { to - from } else { to + size - from }
}

/// `bytes` forward from `from`; `from` below `size`, `bytes` at most `size`.
#[inline]
fn forward(from: u32, bytes: u32, size: u32) -> u32 {
    let to = from + bytes;
    if to >= size { to - size } else { to }
}

/// `bytes` back from `from`; `from` below `size`, `bytes` at most `size`.
fn backward(from: u32, bytes: u32, size: u32) -> u32 {
    if bytes > from { from + size - bytes } else { from - bytes }
}

#[inline]
fn check(index: Index, value: u32, data_len: u32) -> Result<u32, RingError> {
    if value >= data_len {
        return Err(RingError::IndexOutOfRange { index, value, data_len });
    }
    if !value.is_multiple_of(ALIGNMENT) {
        return Err(RingError::IndexMisaligned { index, value });
    }
    Ok(value)
}

/// The reader's end.
#[derive(Debug)]
pub struct ReadEnd<W> {
    words: W,
    size: u32,
    /// Everything before this is read. Ours; the peer sees `published`.
    position: u32,
    published: u32,
    /// Bytes from `position` to the peer's write index when last loaded.
    available: u32,
}

impl<W: ControlWords> ReadEnd<W> {
    /// Goes on where the ring's read index says, masked: the writer does not signal until
    /// [`Self::unmask_and_check`]. `size` is that of the data area in bytes: a multiple of 8, at
    /// least 16.
    ///
    /// # Errors
    /// An index that is none.
    pub fn new(words: W, size: u32) -> Result<Self, RingError> {
        let position = check(Index::Read, words.load(Word::ReadIndex, Relaxed), size)?;
        check(Index::Write, words.load(Word::WriteIndex, Relaxed), size)?;
        words.store(Word::InterruptMask, 1, Relaxed);
        Ok(Self { words, size, position, published: position, available: 0 })
    }

    /// Goes on at `position`, which this end had reached before and was kept elsewhere, whatever the
    /// ring says of it: the word is in the peer's reach. Masked, like a new end.
    ///
    /// # Errors
    /// A position that is none. Nothing has changed then.
    pub fn resume_at(&mut self, position: u32) -> Result<(), RingError> {
        let position = check(Index::Read, position, self.size)?;
        self.words.store(Word::InterruptMask, 1, Relaxed);
        self.words.store(Word::ReadIndex, position, Release);
        (self.position, self.published, self.available) = (position, position, 0);
        Ok(())
    }

    /// The control words.
    #[inline]
    pub fn words(&self) -> &W {
        &self.words
    }

    /// Where the next packet is read.
    #[inline]
    pub fn position(&self) -> u32 {
        self.position
    }

    /// Bytes known to be there to read.
    #[inline]
    pub fn available(&self) -> u32 {
        self.available
    }

    /// Loads the writer's index and tells how many bytes there are to read now.
    ///
    /// # Errors
    /// An index that is none, or that says the writer went back or wrote over bytes it was not given
    /// back yet.
    #[inline]
    pub fn refresh(&mut self) -> Result<u32, RingError> {
        // Acquire: the packets below the index are seen as the writer wrote them.
        let to = check(Index::Write, self.words.load(Word::WriteIndex, Acquire), self.size)?;
        // From what we last published on, in this order: what we have read, what we have seen, the
        // new index. All of it fits the ring once.
        let read = distance(self.published, self.position, self.size);
        let shown = distance(self.published, to, self.size);
        if shown < read + self.available {
            let from = forward(self.position, self.available, self.size);
            let other = self.published;
            return Err(RingError::IndexPassed { index: Index::Write, from, to, other });
        }
        self.available = shown - read;
        Ok(self.available)
    }

    /// Steps over `bytes`, at most [`Self::available`]. The writer learns of it by
    /// [`Self::publish`].
    #[inline]
    pub fn step(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.available && bytes.is_multiple_of(ALIGNMENT));
        self.position = forward(self.position, bytes, self.size);
        self.available -= bytes;
    }

    /// Gives everything read back to the writer, with one store. Returns whether the writer must be
    /// signalled: it waits for space, and this is what it waits for.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.position == self.published {
            return false;
        }
        let freed = distance(self.published, self.position, self.size);
        self.published = self.position;
        // Release: we are done reading before the writer may write there.
        self.words.store(Word::ReadIndex, self.position, Release);
        // We store the read index, then load the pending size; a writer about to wait stores the
        // pending size, then loads the read index (`WriteEnd::request_space`). Without a full fence
        // on both sides each may miss the other's store: the writer waits and nobody signals it.
        self.words.full_fence();
        // Acquire: if it is set, the write index loaded below is not older than the request.
        match self.words.load(Word::PendingSendSize, Acquire) {
            0 => false,
            pending => self.fulfils(pending, freed),
        }
    }

    /// Whether the `freed` bytes just given back carried free space over `pending`.
    #[cold]
    fn fulfils(&self, pending: u32, freed: u32) -> bool {
        let features = self.words.load(Word::FeatureBits, Relaxed);
        if features & FeatureBits::PENDING_SEND_SIZE.bits() == 0 {
            return false;
        }
        let Ok(write) = check(Index::Write, self.words.load(Word::WriteIndex, Relaxed), self.size)
        else {
            return true; // the next refresh tells; a signal cannot hurt
        };
        let most = self.size - RESERVED_BYTES;
        let free_after = most.saturating_sub(distance(self.position, write, self.size));
        let free_before = free_after.saturating_sub(freed);
        // Peers differ in whether reaching the size suffices or it must be exceeded, and some ask for
        // sizes that are no multiple of 8 or more than a ring ever has free. Signal on every reading.
        let low = (pending & !(ALIGNMENT - 1)).min(most);
        let high = pending.checked_next_multiple_of(ALIGNMENT).unwrap_or(most);
        free_before <= high && low <= free_after
    }

    /// Asks the writer not to signal, because this end will look by itself.
    #[inline]
    pub fn mask(&mut self) {
        self.words.store(Word::InterruptMask, 1, Relaxed);
    }

    /// Asks the writer to signal and looks once more. False: the ring is empty and the next packet
    /// brings a signal, so this end may sleep. True: there is more to read, and signals are off
    /// again.
    ///
    /// To be called with everything published; otherwise the ring does not look empty to the writer,
    /// and the answer is true, with nothing changed.
    ///
    /// # Errors
    /// As [`Self::refresh`]; signals are then off.
    pub fn unmask_and_check(&mut self) -> Result<bool, RingError> {
        if self.position != self.published {
            return Ok(true);
        }
        self.words.store(Word::InterruptMask, 0, Relaxed);
        // We store the mask, then load the write index; a writer stores the index, then loads mask
        // and read index (`WriteEnd::publish`). Without a full fence on both sides each may miss the
        // other's store: the packet waits, and so do we. It also puts our read index, stored before,
        // in front of our load: a writer that we do not see will find the ring empty.
        self.words.full_fence();
        let more = self.refresh().map(|available| available > 0);
        if more != Ok(false) {
            self.mask();
        }
        more
    }
}

/// The writer's end.
#[derive(Debug)]
pub struct WriteEnd<W> {
    words: W,
    size: u32,
    /// Everything before this is written. Ours; the peer sees `published`.
    position: u32,
    published: u32,
    /// Bytes from `position` to the peer's read index when last loaded, less the reserve.
    free: u32,
}

impl<W: ControlWords> WriteEnd<W> {
    /// Goes on where the ring's write index says. `size` is that of the data area in bytes: a
    /// multiple of 8, at least 16.
    ///
    /// # Errors
    /// An index that is none.
    pub fn new(words: W, size: u32) -> Result<Self, RingError> {
        let position = check(Index::Write, words.load(Word::WriteIndex, Relaxed), size)?;
        let read = check(Index::Read, words.load(Word::ReadIndex, Acquire), size)?;
        let features = words.load(Word::FeatureBits, Relaxed);
        words.store(Word::PendingSendSize, 0, Relaxed);
        // The writer owns the bits. A reader that heeds the pending size does so only if told.
        let features = features | FeatureBits::PENDING_SEND_SIZE.bits();
        words.store(Word::FeatureBits, features, Relaxed);
        // The indices would be equal if the ring were filled up, so some bytes stay free.
        let free = size - RESERVED_BYTES - distance(read, position, size);
        Ok(Self { words, size, position, published: position, free })
    }

    /// Goes on at `position`, which this end had reached before and was kept elsewhere, whatever the
    /// ring says of it: the word is in the peer's reach.
    ///
    /// # Errors
    /// A position that is none, or a reader's index that is none. Nothing has changed then.
    pub fn resume_at(&mut self, position: u32) -> Result<(), RingError> {
        let position = check(Index::Write, position, self.size)?;
        let read = check(Index::Read, self.words.load(Word::ReadIndex, Acquire), self.size)?;
        self.words.store(Word::WriteIndex, position, Release);
        (self.position, self.published) = (position, position);
        self.free = self.size - RESERVED_BYTES - distance(read, position, self.size);
        Ok(())
    }

    /// The control words.
    #[inline]
    pub fn words(&self) -> &W {
        &self.words
    }

    /// Where the next packet is written.
    #[inline]
    pub fn position(&self) -> u32 {
        self.position
    }

    /// Bytes known to be free.
    #[inline]
    pub fn free(&self) -> u32 {
        self.free
    }

    /// Loads the reader's index and tells how many bytes are free now.
    ///
    /// # Errors
    /// An index that is none, or that says the reader went back or read what it was not shown yet.
    #[inline]
    pub fn refresh(&mut self) -> Result<u32, RingError> {
        // Acquire: the reader is done with the bytes before we write there again.
        let to = check(Index::Read, self.words.load(Word::ReadIndex, Acquire), self.size)?;
        // From the new index on, in this order: what is published, what is only written. It is no
        // more than was used before.
        let used = distance(to, self.published, self.size)
            + distance(self.published, self.position, self.size);
        let most = self.size - RESERVED_BYTES;
        if used > most - self.free {
            let from = backward(self.position, most - self.free, self.size);
            let other = self.published;
            return Err(RingError::IndexPassed { index: Index::Read, from, to, other });
        }
        self.free = most - used;
        Ok(self.free)
    }

    /// Steps over `bytes` just written, at most [`Self::free`]. The reader learns of it by
    /// [`Self::publish`].
    #[inline]
    pub fn step(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.free && bytes.is_multiple_of(ALIGNMENT));
        self.position = forward(self.position, bytes, self.size);
        self.free -= bytes;
    }

    /// Shows the reader everything written, with one store. Returns whether the reader must be
    /// signalled: it does not poll, and the ring was empty before this batch.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.position == self.published {
            return false;
        }
        let before = self.published;
        self.published = self.position;
        // Release: the packets first, then the index that shows them.
        self.words.store(Word::WriteIndex, self.position, Release);
        // We store the write index, then load mask and read index; a reader going to sleep stores
        // those, then loads the write index (`ReadEnd::unmask_and_check`). Without a full fence on
        // both sides each may miss the other's store: the packet waits, and so does the reader.
        self.words.full_fence();
        self.words.load(Word::InterruptMask, Relaxed) == 0
            && self.words.load(Word::ReadIndex, Relaxed) == before
    }

    /// Asks the reader to signal when `bytes` are free, and looks once more. True: they are there
    /// already, and the request is withdrawn. False: a signal will come; [`Self::clear_request`]
    /// then. Asking for more than the ring can ever have free is asking for an empty ring.
    ///
    /// # Errors
    /// As [`Self::refresh`]; the request is then withdrawn.
    pub fn request_space(&mut self, bytes: u32) -> Result<bool, RingError> {
        let most = self.size - RESERVED_BYTES;
        // Bytes that are only written count as used for us and as free for the reader.
        let hidden = distance(self.published, self.position, self.size);
        let wanted = bytes.saturating_add(hidden).checked_next_multiple_of(ALIGNMENT);
        let wanted = wanted.unwrap_or(most).min(most);
        // Release: a reader that sees the request sees the write index it was made at.
        self.words.store(Word::PendingSendSize, wanted, Release);
        // We store the pending size, then load the read index; a reader stores the read index, then
        // loads the pending size (`ReadEnd::publish`, which tells what goes wrong without).
        self.words.full_fence();
        let there = self.refresh().map(|free| free + hidden >= wanted);
        if there != Ok(false) {
            self.clear_request();
        }
        there
    }

    /// Withdraws what [`Self::request_space`] asked for.
    #[inline]
    pub fn clear_request(&mut self) {
        self.words.store(Word::PendingSendSize, 0, Relaxed);
    }
}

#[cfg(test)]
mod tests;
