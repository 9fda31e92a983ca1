//! Whole chunks out of a [`Read`].
//!
//! A file, a socket or a pipe gives bytes in pieces of any length; a restore takes whole chunks. What
//! stands between them knows where a chunk ends, and where a stream does: it never asks its source for
//! a byte that is not part of the stream, so that several streams can follow each other in one source.

use std::io::{self, ErrorKind, Read};

use crate::chunk::{self, OVERHEAD_BYTES};
use crate::error::{Damage, ReadError};
use crate::header::{self, LEAST_BYTES};

/// Bytes of room for the first piece of a chunk, whatever it claims. From there the room doubles as
/// bytes really come.
const FIRST_BYTES: usize = 4096;

/// Why there is no next chunk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InputError {
    /// The source failed. The same call goes on where it stopped, should the source recover.
    #[error("the saved state cannot be read: {0}")]
    Source(#[from] io::Error),
    /// No chunk begins here, or it is cut. Offsets count from the start of the stream.
    #[error(transparent)]
    Stream(#[from] ReadError),
}

/// A source, taken chunk by chunk.
///
/// Only where chunks begin and end is looked at: that a chunk is undamaged and in its place is for the
/// [`StreamReader`](crate::StreamReader) to see that gets it.
///
/// Its memory is one chunk: [`INPUT_BYTES_PER_BYTE`](crate::limits::INPUT_BYTES_PER_BYTE) for each byte that
/// came of it, or 4096, and never more than [`MAX_CHUNK_BYTES`](crate::limits::MAX_CHUNK_BYTES). A length
/// that is only claimed allocates nothing.
#[derive(Debug)]
pub struct ChunkInput<R> {
    source: R,
    /// Its length is what was ever needed; zeros behind what has come.
    buffer: Vec<u8>,
    /// Bytes of the chunk that have come.
    filled: usize,
    /// The chunk in the buffer is whole, and was handed out.
    whole: bool,
    /// Where the stream begins in the source.
    start: u64,
    /// Chunks of the stream handed out, and their bytes.
    chunks: u32,
    bytes: u64,
    /// The stream's last chunk was handed out.
    complete: bool,
}

impl<R: Read> ChunkInput<R> {
    /// Takes a stream from `source`, from where that stands.
    ///
    /// Each chunk takes two reads at least: a file wants a [`BufReader`](std::io::BufReader) around it.
    pub fn new(source: R) -> Self {
        Self {
            source,
            buffer: Vec::new(),
            filled: 0,
            whole: false,
            start: 0,
            chunks: 0,
            bytes: 0,
            complete: false,
        }
    }

    /// The next chunk, all of it; `None` after the stream's last one, or where the source is over
    /// between two chunks ([`Self::is_complete`] tells which).
    ///
    /// # Errors
    /// [`InputError`]. One about the bytes comes again with each further call.
    #[expect(clippy::should_implement_trait, reason = "an iterator cannot lend what it gives")]
    pub fn next(&mut self) -> Result<Option<&[u8]>, InputError> {
        if self.complete {
            return Ok(None);
        }
        if std::mem::take(&mut self.whole) {
            self.filled = 0;
        }
        let least = if self.chunks == 0 { LEAST_BYTES } else { OVERHEAD_BYTES };
        self.fill(least as usize)?;
        if self.filled == 0 {
            return Ok(None);
        }
        let (length, last) = self.measure()?;
        self.fill(length)?;
        if self.filled < length {
            let (needed, available) = (length as u64, self.filled as u64);
            return Err(self.damaged(Damage::Cut { needed, available }).into());
        }
        self.whole = true;
        self.complete = last;
        self.chunks = self.chunks.saturating_add(1);
        self.bytes += length as u64;
        Ok(Some(self.chunk()))
    }

    /// The chunk that [`Self::next`] gave last; empty before the first one.
    #[must_use]
    pub fn chunk(&self) -> &[u8] {
        let chunk = if self.whole { self.buffer.get(..self.filled) } else { None };
        chunk.unwrap_or_default()
    }

    /// Goes on to the stream behind this one, whose header is the next chunk.
    ///
    /// For after the last chunk of this one; what comes earlier begins a stream in the middle of it.
    pub fn begin_stream(&mut self) {
        self.start += self.bytes;
        self.whole = false;
        self.filled = 0;
        self.chunks = 0;
        self.bytes = 0;
        self.complete = false;
    }

    /// Whether the last chunk of the stream was given.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Where the stream begins, counted from where the source stood at first.
    #[must_use]
    pub fn stream_start(&self) -> u64 {
        self.start
    }

    /// Chunks of the stream given.
    #[must_use]
    pub fn chunks(&self) -> u32 {
        self.chunks
    }

    /// Bytes of the stream given.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The source, which stands behind the last chunk that was given.
    pub fn into_source(self) -> R {
        self.source
    }

    /// How long the chunk is whose first bytes have come, and whether it says that it is the last.
    fn measure(&self) -> Result<(usize, bool), ReadError> {
        let came = self.buffer.get(..self.filled).unwrap_or_default();
        if self.chunks == 0 {
            header::head(came).map(|fixed| (fixed.length() as usize, false))
        } else {
            let head = chunk::head(came).map_err(|why| self.damaged(why))?;
            Ok((head.length(), head.is_last()))
        }
    }

    #[cold]
    fn damaged(&self, why: Damage) -> ReadError {
        ReadError::Damaged { chunk: self.chunks, offset: self.bytes, why }
    }

    /// Reads on until `target` bytes of the chunk are there, or the source is over.
    fn fill(&mut self, target: usize) -> io::Result<()> {
        while self.filled < target {
            let full = self.filled == self.buffer.len();
            let room = if full { FIRST_BYTES.max(2 * self.filled) } else { self.buffer.len() };
            let goal = target.min(room);
            if self.buffer.len() < goal {
                self.buffer.reserve_exact(goal - self.buffer.len());
                self.buffer.resize(goal, 0);
            }
            let room = self.buffer.get_mut(self.filled..goal).unwrap_or_default();
            match self.source.read(room) {
                Ok(0) => break,
                // A source that says it gave more than there was room for is wrong, and not believed.
                Ok(came) => self.filled = goal.min(self.filled + came),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
