//! What everything that can be saved looks like to whoever keeps the bytes.
//!
//! A channel, a bus and a device are saved by different crates, and each into one stream. To a program
//! they are all the same: something that is stepped with buffers until it is done.

use std::error::Error;
use std::io::{self, Write};

use crate::limits::MAX_CHUNK_BYTES;

/// What one step of a save has done.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[must_use]
pub struct SaveStep {
    /// Bytes at the start of the buffer that are part of the stream now: whole chunks.
    pub written: usize,
    /// Bytes of room with which the next step makes progress; 0 when nothing is left.
    pub needed: usize,
    /// The last chunk is written.
    pub done: bool,
}

/// A save that is under way. The stream that it gives does not depend on the buffers it is given.
pub trait Save {
    /// What can go wrong.
    type Error: Error + Send + Sync + 'static;

    /// Goes on: writes as many whole chunks as `buffer` holds. A buffer too small for the next chunk
    /// gets nothing, and nothing changes but that [`SaveStep::needed`] says how much it takes.
    ///
    /// # Errors
    /// Nothing that was written by this step counts; the save is over, and what was saved goes on as
    /// if it had not begun.
    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, Self::Error>;

    /// Writes all that is left to `out`, through a buffer that grows to the largest chunk
    /// ([`MAX_CHUNK_BYTES`] at most). Returns the bytes written.
    ///
    /// # Errors
    /// [`SaveError`]: the state's, or `out`'s.
    fn write_to(&mut self, out: &mut (impl Write + ?Sized)) -> Result<u64, SaveError<Self::Error>>
    where
        Self: Sized,
    {
        const FIRST: usize = 64 << 10;
        let mut buffer = vec![0; FIRST];
        let mut bytes = 0;
        loop {
            let step = self.step(&mut buffer).map_err(SaveError::State)?;
            let written = buffer.get(..step.written).unwrap_or_default();
            out.write_all(written).map_err(SaveError::Output)?;
            bytes += step.written as u64;
            if step.done {
                return Ok(bytes);
            }
            if step.needed > buffer.len() {
                buffer.resize(step.needed.min(MAX_CHUNK_BYTES as usize), 0);
            }
        }
    }
}

/// A save that is lent.
impl<S: Save + ?Sized> Save for &mut S {
    type Error = S::Error;

    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, S::Error> {
        S::step(self, buffer)
    }
}

/// Why a save into a [`Write`] has failed.
#[derive(Debug, thiserror::Error)]
pub enum SaveError<E: Error + 'static> {
    /// The state cannot be saved.
    #[error(transparent)]
    State(E),
    /// The bytes cannot be kept.
    #[error("the saved state cannot be written: {0}")]
    Output(#[source] io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chunks of these lengths, each full of its number.
    struct Chunks(Vec<usize>, usize);

    impl Save for Chunks {
        type Error = std::fmt::Error;

        fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, Self::Error> {
            let mut written = 0;
            while let Some(&len) = self.0.get(self.1) {
                let Some(room) = buffer.get_mut(written..written + len) else { break };
                room.fill(u8::try_from(self.1).unwrap());
                written += len;
                self.1 += 1;
            }
            let needed = self.0.get(self.1).copied().unwrap_or(0);
            Ok(SaveStep { written, needed, done: needed == 0 })
        }
    }

    #[test]
    fn everything_is_written_however_large_a_chunk_is() {
        let lengths = vec![3, 70_000, 1, 64 << 10, 200_000];
        let mut out = Vec::new();
        let bytes = Chunks(lengths.clone(), 0).write_to(&mut out).unwrap();
        let expected: Vec<u8> = (0..).zip(&lengths).flat_map(|(n, &len)| vec![n; len]).collect();
        assert_eq!((bytes, &out), (expected.len() as u64, &expected));
    }

    #[test]
    fn an_output_that_fails_is_told_apart_from_a_state_that_does() {
        let mut room = [0; 100];
        let mut out = &mut room[..];
        let failed = Chunks(vec![60, 60], 0).write_to(&mut out);
        assert!(matches!(failed, Err(SaveError::Output(_))), "{failed:?}");
    }
}
