//! A disk in memory.

use vmbus_memory::{GuestMemory, MemoryError, SharedSlice};

use super::{Backend, InlineIo, IoDone, IoError, IoOperation, IoRequest};

/// Bytes compared at a time.
const CHUNK_BYTES: usize = 4096;

/// A disk in memory, zero at first and gone with the value. Every request is done at once.
#[derive(Debug)]
pub struct RamBackend {
    /// Guest memory only in name: memory that several threads and the kernel may copy from and to at
    /// the same time, which is what a disk needs too.
    medium: GuestMemory,
    bytes: u64,
    read_only: bool,
}

impl RamBackend {
    /// A disk of `bytes` zeros.
    ///
    /// # Errors
    /// A size of 0, or one the system has no memory for.
    pub fn new(bytes: u64) -> Result<Self, MemoryError> {
        let medium = GuestMemory::memfd(bytes.next_multiple_of(4096))?;
        Ok(Self { medium, bytes, read_only: false })
    }

    /// The same disk, but read-only.
    #[must_use]
    pub fn read_only(self) -> Self {
        Self { read_only: true, ..self }
    }

    /// The disk's bytes, to fill it or to look at it.
    #[must_use]
    pub fn medium(&self) -> &GuestMemory {
        &self.medium
    }

    fn check(&self, operation: IoOperation, offset: u64, bytes: u64) -> Result<(), IoError> {
        if operation.is_write() && self.read_only {
            return Err(IoError::WriteProtected);
        }
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(IoError::Malformed),
        }
    }

    /// Whether the request fits the disk and its buffers.
    pub(super) fn admit(&self, request: &IoRequest) -> Result<(), IoError> {
        let IoRequest { operation, offset, bytes, ref buffers, .. } = *request;
        self.check(operation, offset, bytes)?;
        let data = buffers.bytes();
        let fits = match operation {
            IoOperation::Read | IoOperation::Write { .. } => data == bytes,
            IoOperation::WriteSame | IoOperation::Compare => data > 0 && bytes.is_multiple_of(data),
            _ => true,
        };
        if fits { Ok(()) } else { Err(IoError::Malformed) }
    }

    /// Performs the part of an admitted request that lies in bytes `from..to` of its range.
    pub(super) fn perform(&self, request: &IoRequest, from: u64, to: u64) -> Result<(), IoError> {
        let IoRequest { operation, offset, ref buffers, .. } = *request;
        match operation {
            IoOperation::Read | IoOperation::Write { .. } => {
                let mut begin = 0;
                for (memory, gpa, len) in buffers.pieces() {
                    let (first, end) = (from.max(begin), to.min(begin + u64::from(len)));
                    if first < end {
                        // Within a piece, whose length is 32 bits.
                        let part = u32::try_from(end - first).unwrap_or(len);
                        self.copy(operation, offset + first, memory, gpa + (first - begin), part)?;
                    }
                    begin += u64::from(len);
                }
                Ok(())
            }
            IoOperation::Flush | IoOperation::Verify => Ok(()),
            IoOperation::Discard | IoOperation::WriteZeroes => {
                self.medium.fill(offset + from, to - from, 0).map_err(|_| IoError::Malformed)
            }
            IoOperation::WriteSame | IoOperation::Compare => self.repeat(request, from, to),
        }
    }

    /// Writes or compares the contents of the buffers, over and over.
    fn repeat(&self, request: &IoRequest, from: u64, to: u64) -> Result<(), IoError> {
        let IoRequest { operation, offset, ref buffers, .. } = *request;
        let pattern = buffers.bytes();
        let (mut theirs, mut ours) = ([0; CHUNK_BYTES], [0; CHUNK_BYTES]);
        let mut done = from;
        while done < to {
            let from = done % pattern;
            let most = (pattern - from).min(to - done);
            let step = usize::try_from(most).map_or(CHUNK_BYTES, |n| n.min(CHUNK_BYTES));
            let (Some(theirs), Some(ours)) = (theirs.get_mut(..step), ours.get_mut(..step)) else {
                return Err(IoError::Malformed);
            };
            buffers.read_at(from, theirs).map_err(|_| IoError::Memory)?;
            let at = offset + done;
            if operation == IoOperation::WriteSame {
                self.medium.write(at, theirs).map_err(|_| IoError::Malformed)?;
            } else {
                self.medium.read(at, ours).map_err(|_| IoError::Malformed)?;
                if let Some(differs) = ours.iter().zip(theirs).position(|(a, b)| *a != *b) {
                    return Err(IoError::Miscompare { at: at + differs as u64 });
                }
            }
            done += step as u64;
        }
        Ok(())
    }

    /// Moves `len` bytes between the disk and one piece of guest memory.
    fn copy(
        &self,
        operation: IoOperation,
        at: u64,
        memory: &GuestMemory,
        gpa: u64,
        len: u32,
    ) -> Result<(), IoError> {
        let ours: SharedSlice<'_> =
            self.medium.slice(at, len as usize).map_err(|_| IoError::Malformed)?;
        let theirs = memory.slice(gpa, len as usize).map_err(|_| IoError::Memory)?;
        match operation {
            IoOperation::Read => ours.copy_to(&theirs),
            _ => theirs.copy_to(&ours),
        }
        .map_err(|_| IoError::Memory)
    }
}

impl Backend for RamBackend {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn submit(&self, requests: &mut Vec<IoRequest>, done: &mut Vec<IoDone>) {
        for request in requests.drain(..) {
            let result =
                self.admit(&request).and_then(|()| self.perform(&request, 0, request.bytes));
            done.push(IoDone::finished(request, result));
        }
    }

    fn read_now(&self, offset: u64, into: &mut [u8]) -> Option<Result<(), IoError>> {
        Some(self.medium.read(offset, into).map_err(|_| IoError::Malformed))
    }

    fn run_inline(&self, io: InlineIo<'_>) -> Option<Result<(), IoError>> {
        let InlineIo { operation, offset, bytes, memory, segments } = io;
        if let Err(error) = self.check(operation, offset, bytes) {
            return Some(Err(error));
        }
        let mut done = 0;
        for (gpa, len) in segments {
            if done == bytes {
                break;
            }
            let len = u32::try_from(bytes - done).map_or(len, |left| left.min(len));
            if let Err(error) = self.copy(operation, offset + done, memory, gpa, len) {
                return Some(Err(error));
            }
            done += u64::from(len);
        }
        Some(if done == bytes { Ok(()) } else { Err(IoError::Malformed) })
    }
}
