//! The block layer: requests on bytes of a disk, and the back ends that perform them.
//!
//! A request owns the guest memory it moves data from or to, goes into a [`Backend`] and comes out
//! again, exactly once, as an [`IoDone`]. Nothing is allocated on the way: whoever makes requests
//! keeps the vectors and the [`Buffers`] for the next ones.
//!
//! ```text
//!   submit ──► held (order) ──► waiting (no slot) ──► running ──► reap: Done
//!                 │                │                     │
//!   cancel ───────┴── NeverStarted ┘                     └──────► reap: Done or Cancelled
//! ```
//!
//! A back end that finishes later has a descriptor to wait on; when it becomes readable,
//! [`Backend::reap`] takes what is finished. [`Backend::cancel`] asks for requests back before that.

mod buffers;
mod event;
mod file;
mod image;
mod job;
mod order;
mod perform;
mod ram;
mod syscalls;
#[cfg(feature = "test-utils")]
mod test_medium;
mod threads;
mod uring;
mod workers;

#[cfg(test)]
mod tests;

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

pub use buffers::{Buffers, BuffersError, MAX_SEGMENTS};
pub use file::{Engine, FileOptions, MAX_THREADS, QUEUE_DEPTH, open_file};
pub use image::{CacheMode, ImageError};
pub use ram::RamBackend;
#[cfg(feature = "test-utils")]
pub use test_medium::{
    Fate, MAX_HISTORY, MAX_REQUESTS, TestBackend, TestEvent, TestIo, TestMedium, TestStep, TestTime,
};

/// What a request does to the bytes it names.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum IoOperation {
    /// Fills the buffers from the disk.
    Read,
    /// Stores the buffers on the disk.
    Write {
        /// It is on stable storage before the request is done.
        fua: bool,
    },
    /// Everything written by requests that were submitted earlier is on stable storage before this
    /// is done.
    Flush,
    /// The bytes read as zeros afterwards, and take no space where that is possible.
    Discard,
    /// The bytes read as zeros afterwards.
    WriteZeroes,
    /// The contents of the buffers, over and over. The request's length is a multiple of theirs.
    WriteSame,
    /// The bytes can be read.
    Verify,
    /// The bytes can be read and are the contents of the buffers, over and over.
    Compare,
}

impl IoOperation {
    /// Whether the operation can change what is on the disk.
    #[must_use]
    pub fn is_write(self) -> bool {
        match self {
            Self::Write { .. } | Self::Discard | Self::WriteZeroes | Self::WriteSame => true,
            Self::Read | Self::Flush | Self::Verify | Self::Compare => false,
        }
    }
}

/// One request to a back end.
#[derive(Debug)]
pub struct IoRequest {
    /// Whose it is; means nothing to the back end.
    pub token: u64,
    /// What to do.
    pub operation: IoOperation,
    /// First byte of the disk.
    pub offset: u64,
    /// Bytes of the disk.
    pub bytes: u64,
    /// Guest memory, for operations with data.
    pub buffers: Buffers,
}

/// A request that has come out of a back end: nothing of it is under way any more, whatever the
/// outcome, and the buffers are the requester's again.
#[derive(Debug)]
pub struct IoDone {
    /// As it was submitted.
    pub request: IoRequest,
    /// What became of it.
    pub outcome: IoOutcome,
}

impl IoDone {
    /// A request that was performed, well or not.
    #[must_use]
    pub fn finished(request: IoRequest, result: Result<(), IoError>) -> Self {
        Self { request, outcome: IoOutcome::Done(result) }
    }
}

/// What became of a request. Whoever hands it to another back end later, perhaps in another process,
/// relies on this alone: with each of them the back end says that nothing can reach the medium or
/// the buffers any more.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum IoOutcome {
    /// It was performed.
    Done(Result<(), IoError>),
    /// It was asked back ([`Backend::cancel`]) before any of it was begun.
    NeverStarted,
    /// It was asked back after it was begun, and the system confirms that it goes no further.
    Cancelled {
        /// Its first bytes that are done for good; what is behind them is undefined. Performing the
        /// rest, or all of it again, performs the request.
        moved: u64,
    },
}

/// Why a request failed. It says nothing about how much was done before.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum IoError {
    /// The medium ends here, although it was longer when it was opened.
    #[error("the medium ends before byte {at}")]
    EndOfMedium {
        /// First byte that is not there.
        at: u64,
    },
    /// There is no space for the data: a full file system, a quota, a limit on file sizes.
    #[error("no space for the data")]
    NoSpace,
    /// The medium cannot be written.
    #[error("the medium is read-only")]
    WriteProtected,
    /// The data on the medium is not that in the buffers.
    #[error("the data differs at byte {at}")]
    Miscompare {
        /// First byte of the disk that differs.
        at: u64,
    },
    /// A read failed.
    #[error("read error at byte {at}: {errno}")]
    Read {
        /// First byte that was not read.
        at: u64,
        /// What the system said.
        errno: Errno,
    },
    /// A write or a flush failed. After a failed flush, all later ones fail: what was lost stays
    /// lost, even if the system forgets about it.
    #[error("write error at byte {at}: {errno}")]
    Write {
        /// First byte that was not written.
        at: u64,
        /// What the system said.
        errno: Errno,
    },
    /// Guest memory of the request cannot be reached.
    #[error("guest memory of the request cannot be reached")]
    Memory,
    /// The back end holds as many requests as it can.
    #[error("the back end holds as many requests as it can")]
    Busy,
    /// The request names bytes outside the disk, or buffers that do not fit its length.
    #[error("the request does not fit the disk or its buffers")]
    Malformed,
}

/// What stores the bytes of a disk.
///
/// Calls may come from several threads. A request that was submitted is finished, or the back end is
/// dropped; dropping waits for requests that have started, so that none of them can still touch
/// guest memory or the medium.
pub trait Backend: Send + Sync {
    /// Size in bytes, fixed for the life of the back end.
    fn bytes(&self) -> u64;

    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;

    /// Bytes that are best read and written together; a power of two.
    fn granularity(&self) -> u32 {
        4096
    }

    /// Takes all `requests`, in order, and leaves the vector empty. Those that are finished already
    /// are added to `done`; the others come out of [`Backend::reap`]. Never blocks for long.
    fn submit(&self, requests: &mut Vec<IoRequest>, done: &mut Vec<IoDone>);

    /// Readable when [`Backend::reap`] has something to do; `None` if all requests are finished when
    /// `submit` returns.
    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Adds what has finished to `done`. Never blocks.
    fn reap(&self, done: &mut Vec<IoDone>) {
        let _ = done;
    }

    /// Asks for the requests back whose tokens are `wanted`. Those that were not begun are added to
    /// `done` at once, as [`IoOutcome::NeverStarted`]. Those that were are cancelled where that is
    /// possible, and come out here or of [`Backend::reap`] when it is certain what became of them:
    /// they may still turn out to be [`IoOutcome::Done`]. Never blocks for long.
    ///
    /// A back end that does not know how to cancel lets its requests finish.
    fn cancel(&self, wanted: &dyn Fn(u64) -> bool, done: &mut Vec<IoDone>) {
        let _ = (wanted, done);
    }

    /// Reads from byte `offset` on in the calling thread, past all queues, as long as it takes;
    /// `None` if this back end cannot. Only asked for while no write is in flight there.
    fn read_now(&self, offset: u64, into: &mut [u8]) -> Option<Result<(), IoError>> {
        let _ = (offset, into);
        None
    }

    /// Does a read or a write at once, if this back end is as fast as memory; `None` if it has to be
    /// submitted. A short cut around [`Buffers`] for back ends that never wait.
    fn run_inline(&self, io: InlineIo<'_>) -> Option<Result<(), IoError>> {
        let _ = io;
        None
    }
}

/// A read or a write for [`Backend::run_inline`].
pub struct InlineIo<'a> {
    /// [`IoOperation::Read`] or [`IoOperation::Write`].
    pub operation: IoOperation,
    /// First byte of the disk.
    pub offset: u64,
    /// Bytes of the disk.
    pub bytes: u64,
    /// The memory that the segments name.
    pub memory: &'a vmbus_memory::GuestMemory,
    /// Guest physical addresses and lengths; together at least `bytes`.
    pub segments: &'a mut dyn Iterator<Item = (u64, u32)>,
}
