//! Guest memory as I/O vectors.

use std::io::IoSlice;

use vmbus_memory::{GuestMemory, MemoryError};

/// Most segments of one request; what the kernel takes in one I/O vector (`UIO_MAXIOV`).
pub const MAX_SEGMENTS: usize = 1024;

/// One element of an I/O vector, laid out as the kernel's `struct iovec`. The address is kept as a
/// number: nothing in this program reaches the memory through it, only the kernel does.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct IoVec {
    pub(super) base: usize,
    pub(super) len: usize,
}

const _: () = assert!(size_of::<IoVec>() == size_of::<IoSlice<'_>>());
const _: () = assert!(align_of::<IoVec>() == align_of::<IoSlice<'_>>());

/// Pieces of guest memory that a request moves data from or to. While it holds pieces it holds the
/// [`GuestMemory`] too, which keeps them mapped.
#[derive(Debug, Default)]
pub struct Buffers {
    memory: Option<GuestMemory>,
    /// Guest physical addresses and lengths.
    segments: Vec<(u64, u32)>,
    /// The same for the kernel; shrinks from the front as a transfer proceeds.
    vectors: Vec<IoVec>,
    /// How many of `vectors` are used up.
    used: usize,
    bytes: u64,
}

/// Why guest memory cannot be the buffers of a request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuffersError {
    /// More pieces than the kernel takes.
    #[error("the buffers have more than {MAX_SEGMENTS} pieces")]
    TooManySegments,
    /// The pieces are shorter than what is to be moved.
    #[error("the buffers have {got} bytes, {wanted} are to be moved")]
    TooShort {
        /// Bytes to move.
        wanted: u64,
        /// Bytes of all pieces.
        got: u64,
    },
    /// A piece is not in guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl Buffers {
    /// Buffers without pieces.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Buffers without pieces, but with room for `segments` of them.
    #[must_use]
    pub fn with_capacity(segments: usize) -> Self {
        Self {
            segments: Vec::with_capacity(segments),
            vectors: Vec::with_capacity(segments),
            ..Self::default()
        }
    }

    /// Replaces the pieces by the first `bytes` bytes of `segments` (guest physical addresses and
    /// lengths) in `memory`.
    ///
    /// # Errors
    /// [`BuffersError`]; there are no pieces then.
    pub fn set(
        &mut self,
        memory: &GuestMemory,
        segments: impl IntoIterator<Item = (u64, u32)>,
        bytes: u64,
    ) -> Result<(), BuffersError> {
        self.set_from(memory, segments, 0, bytes)
    }

    /// The same, without the first `skip` bytes.
    pub(crate) fn set_from(
        &mut self,
        memory: &GuestMemory,
        segments: impl IntoIterator<Item = (u64, u32)>,
        skip: u64,
        bytes: u64,
    ) -> Result<(), BuffersError> {
        self.clear();
        let filled = self.fill(memory, segments, skip, bytes);
        if filled.is_err() {
            self.clear();
        }
        filled
    }

    fn fill(
        &mut self,
        memory: &GuestMemory,
        segments: impl IntoIterator<Item = (u64, u32)>,
        skip: u64,
        bytes: u64,
    ) -> Result<(), BuffersError> {
        self.memory = Some(memory.clone());
        let (mut skip, mut left) = (skip, bytes);
        for (gpa, len) in segments {
            if left == 0 {
                break;
            }
            let skipped = u32::try_from(skip).map_or(len, |skip| skip.min(len));
            skip -= u64::from(skipped);
            if skipped == len {
                continue;
            }
            // The memory is looked up below: a sum that is too large is not in it.
            let (gpa, len) = (gpa.saturating_add(skipped.into()), len - skipped);
            if self.segments.len() == MAX_SEGMENTS {
                return Err(BuffersError::TooManySegments);
            }
            let len = u32::try_from(left).map_or(len, |left| left.min(len));
            let slice = memory.slice(gpa, len as usize)?;
            let base = slice.as_ptr().expose_provenance();
            self.segments.push((gpa, len));
            self.vectors.push(IoVec { base, len: len as usize });
            left -= u64::from(len);
        }
        if left > 0 {
            return Err(BuffersError::TooShort { wanted: bytes, got: bytes - left });
        }
        self.bytes = bytes;
        Ok(())
    }

    /// Lets go of the pieces and of the memory.
    pub fn clear(&mut self) {
        self.memory = None;
        self.segments.clear();
        self.vectors.clear();
        self.used = 0;
        self.bytes = 0;
    }

    /// Bytes of all pieces.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Copies from byte `offset` of the pieces on.
    ///
    /// # Errors
    /// A range beyond the pieces, or memory that has gone.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let mut into = into;
        self.walk(offset, into.len(), |memory, gpa, len| {
            let (part, rest) = std::mem::take(&mut into).split_at_mut(len);
            into = rest;
            memory.read(gpa, part)
        })
    }

    /// The pieces: memory, guest physical address and length.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (&GuestMemory, u64, u32)> {
        self.memory
            .iter()
            .flat_map(|memory| self.segments.iter().map(move |&(gpa, len)| (memory, gpa, len)))
    }

    /// Calls `visit` for each piece of the `len` bytes from `offset` on.
    fn walk(
        &self,
        offset: u64,
        len: usize,
        mut visit: impl FnMut(&GuestMemory, u64, usize) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let Some(memory) = &self.memory else {
            return Ok(());
        };
        let (mut skip, mut left) = (offset, len);
        for &(gpa, segment) in &self.segments {
            let segment = u64::from(segment);
            if skip >= segment {
                skip -= segment;
                continue;
            }
            let here = usize::try_from(segment - skip).unwrap_or(usize::MAX).min(left);
            if here == 0 {
                break;
            }
            visit(memory, gpa + skip, here)?;
            skip = 0;
            left -= here;
        }
        Ok(())
    }

    /// Tells the memory's owner that the kernel has written to all pieces.
    pub(super) fn mark_written(&self) {
        let Some(memory) = &self.memory else {
            return;
        };
        for &(gpa, len) in &self.segments {
            if let Ok(slice) = memory.slice(gpa, len as usize) {
                slice.mark_dirty(0, len as usize);
            }
        }
    }

    /// What is left to move.
    pub(super) fn vectors(&mut self) -> &mut [IoVec] {
        self.vectors.get_mut(self.used..).unwrap_or_default()
    }

    /// Steps over the first `bytes` bytes of what is left to move.
    pub(super) fn advance(&mut self, bytes: u64) {
        let mut left = bytes;
        while let Some(vector) = self.vectors.get_mut(self.used) {
            let len = vector.len as u64;
            if left < len {
                // Less than `len`, which is a `usize`.
                let step = usize::try_from(left).unwrap_or(0);
                vector.base += step;
                vector.len -= step;
                return;
            }
            left -= len;
            self.used += 1;
        }
    }

    /// Takes all steps back: the whole is to be moved again.
    pub(super) fn rewind(&mut self) {
        self.used = 0;
        self.vectors.clear();
        let Some(memory) = &self.memory else {
            return;
        };
        for &(gpa, len) in &self.segments {
            if let Ok(slice) = memory.slice(gpa, len as usize) {
                let base = slice.as_ptr().expose_provenance();
                self.vectors.push(IoVec { base, len: len as usize });
            }
        }
    }

    /// Whether address and length of every piece are multiples of `alignment`, a power of two.
    pub(super) fn is_aligned(&self, alignment: u32) -> bool {
        let mask = alignment as usize - 1;
        self.vectors.iter().all(|vector| (vector.base | vector.len) & mask == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_cut_to_what_is_moved() {
        let memory = GuestMemory::memfd(64 << 10).unwrap();
        let mut buffers = Buffers::new();
        buffers.set(&memory, [(0x1000, 0x1000), (0x8000, 0x1000)], 0x1800).unwrap();
        assert_eq!(buffers.bytes(), 0x1800);
        assert_eq!(buffers.vectors().iter().map(|v| v.len).collect::<Vec<_>>(), [0x1000, 0x800]);
        memory.write(0x1ffe, &[1, 2]).unwrap();
        memory.write(0x8000, &[3, 4]).unwrap();
        let mut bytes = [0; 4];
        buffers.read_at(0xffe, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 2, 3, 4]);
    }

    #[test]
    fn the_first_bytes_can_be_left_out() {
        let memory = GuestMemory::memfd(64 << 10).unwrap();
        let segments = [(0x1000, 512), (0x3000, 0), (0x3000, 512), (0x5000, 512)];
        for (skip, bytes, expected) in [
            (0, 1536, vec![(0x1000, 512), (0x3000, 512), (0x5000, 512)]),
            (100, 1436, vec![(0x1064, 412), (0x3000, 512), (0x5000, 512)]),
            (512, 600, vec![(0x3000, 512), (0x5000, 88)]),
            (1100, 1, vec![(0x504c, 1)]),
        ] {
            let mut buffers = Buffers::new();
            buffers.set_from(&memory, segments, skip, bytes).unwrap();
            let pieces: Vec<_> = buffers.pieces().map(|(_, gpa, len)| (gpa, len)).collect();
            assert_eq!(pieces, expected, "{skip} {bytes}");
        }
        let mut buffers = Buffers::new();
        let short = buffers.set_from(&memory, segments, 1000, 537);
        assert!(matches!(short, Err(BuffersError::TooShort { wanted: 537, got: 536 })));
    }

    #[test]
    fn steps_forward_and_back() {
        let memory = GuestMemory::memfd(64 << 10).unwrap();
        let mut buffers = Buffers::new();
        buffers.set(&memory, [(0x1000, 512), (0x3000, 512), (0x5000, 512)], 1536).unwrap();
        for (step, left) in [
            (0, vec![512, 512, 512]),
            (100, vec![412, 512, 512]),
            (412, vec![512, 512]),
            (600, vec![424]),
            (424, vec![]),
        ] {
            buffers.advance(step);
            assert_eq!(buffers.vectors().iter().map(|v| v.len).collect::<Vec<_>>(), left, "{step}");
        }
        buffers.rewind();
        assert_eq!(buffers.vectors().len(), 3);
        assert!(buffers.is_aligned(512) && !buffers.is_aligned(1024));
    }

    #[test]
    fn what_does_not_fit_is_refused_and_leaves_nothing() {
        let memory = GuestMemory::memfd(64 << 10).unwrap();
        let mut buffers = Buffers::new();
        assert!(matches!(
            buffers.set(&memory, [(0x1000, 512)], 513),
            Err(BuffersError::TooShort { wanted: 513, got: 512 })
        ));
        assert!(matches!(buffers.set(&memory, [(0xff00, 512)], 512), Err(BuffersError::Memory(_))));
        assert!(matches!(
            buffers.set(&memory, (0..).map(|_| (0, 1)), 1025),
            Err(BuffersError::TooManySegments)
        ));
        assert_eq!((buffers.bytes(), buffers.vectors().len()), (0, 0));
    }
}
