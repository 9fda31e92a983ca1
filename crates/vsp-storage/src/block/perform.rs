//! Performing a request in the calling thread.

use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use rustix::io::{Errno, ReadWriteFlags, pread, pwrite};

use super::image::Image;
use super::job::{Job, Way, failure};
use super::{IoError, IoOperation, syscalls};

/// Bytes that go through a thread's own memory at a time.
const SCRATCH_BYTES: usize = 64 << 10;

/// A thread's own memory, for data that is not moved straight between file and guest.
pub(super) struct Scratch {
    medium: Vec<u8>,
    pattern: Vec<u8>,
}

impl Scratch {
    pub(super) fn new() -> Self {
        Self { medium: vec![0; SCRATCH_BYTES], pattern: vec![0; SCRATCH_BYTES] }
    }
}

/// How performing a request ended.
pub(super) enum Performed {
    /// It is finished.
    Finished(Result<(), IoError>),
    /// The system refused the way; perhaps there is another.
    Refused(Errno),
    /// It was wanted back in between: its first bytes are done, the others are not and will not be.
    Interrupted,
}

/// What `fallocate` has to do for an operation.
pub(super) fn allocate_mode(operation: IoOperation) -> FallocateFlags {
    let mode = if operation == IoOperation::Discard {
        FallocateFlags::PUNCH_HOLE
    } else {
        FallocateFlags::ZERO_RANGE
    };
    mode | FallocateFlags::KEEP_SIZE
}

/// Performs `job`; blocks until it is finished, or until the next step after `interrupt` is set.
pub(super) fn perform(
    image: &Image,
    job: &mut Job,
    scratch: &mut Scratch,
    interrupt: &AtomicBool,
) -> Performed {
    let request = &job.request;
    let (operation, offset, bytes) = (request.operation, request.offset, request.bytes);
    match job.way {
        Way::Direct | Way::Buffered => transfer(image, job, interrupt),
        Way::Sync => Performed::Finished(image.judge_flush(fdatasync(image.file()))),
        Way::Allocate => match fallocate(image.file(), allocate_mode(operation), offset, bytes) {
            Ok(()) => Performed::Finished(Ok(())),
            Err(errno) => Performed::Refused(errno),
        },
        Way::ByHand => match by_hand(image, job, scratch, interrupt) {
            Ok(()) if job.progress < bytes => Performed::Interrupted,
            result => Performed::Finished(result),
        },
    }
}

fn transfer(image: &Image, job: &mut Job, interrupt: &AtomicBool) -> Performed {
    let request = &mut job.request;
    let file = match job.way {
        Way::Direct => image.direct_file().unwrap_or(image.file()),
        _ => image.file(),
    };
    while job.progress < request.bytes {
        if job.progress > 0 && interrupt.load(Ordering::Relaxed) {
            return Performed::Interrupted;
        }
        let at = request.offset + job.progress;
        let moved = match request.operation {
            IoOperation::Write { fua } => {
                syscalls::write(file, &mut request.buffers, at, write_flags(fua))
            }
            _ => syscalls::read(file, &mut request.buffers, at),
        };
        match moved {
            Ok(0) => return Performed::Finished(Err(nothing_moved(request.operation, at))),
            Ok(moved) => {
                job.progress += moved as u64;
                request.buffers.advance(moved as u64);
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Performed::Refused(errno),
        }
    }
    Performed::Finished(Ok(()))
}

/// Flags of a write.
pub(super) fn write_flags(fua: bool) -> ReadWriteFlags {
    if fua { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() }
}

/// Why a transfer moves nothing although there is something to move.
pub(super) fn nothing_moved(operation: IoOperation, at: u64) -> IoError {
    if operation.is_write() {
        IoError::Write { at, errno: Errno::IO }
    } else {
        IoError::EndOfMedium { at }
    }
}

/// Goes through the range step by step; [`Job::progress`] says how far it came.
fn by_hand(
    image: &Image,
    job: &mut Job,
    scratch: &mut Scratch,
    interrupt: &AtomicBool,
) -> Result<(), IoError> {
    let repeat = prepare_pattern(job, scratch)?;
    let request = &job.request;
    let operation = request.operation;
    let mut at = request.offset;
    let end = request.offset + request.bytes;
    while at < end && !interrupt.load(Ordering::Relaxed) {
        let step = usize::try_from(end - at).map_or(repeat, |left| left.min(repeat));
        let (Some(pattern), Some(medium)) =
            (scratch.pattern.get_mut(..step), scratch.medium.get_mut(..step))
        else {
            return Err(IoError::Malformed);
        };
        match operation {
            IoOperation::Verify => read_all(image, medium, at)?,
            IoOperation::Compare => {
                read_all(image, medium, at)?;
                if request.buffers.bytes() > SCRATCH_BYTES as u64 {
                    let from = (at - request.offset) % request.buffers.bytes();
                    request.buffers.read_at(from, pattern).map_err(|_| IoError::Memory)?;
                }
                if let Some(differs) = medium.iter().zip(pattern).position(|(a, b)| a != b) {
                    return Err(IoError::Miscompare { at: at + differs as u64 });
                }
            }
            _ => write_all(image, pattern, at)?,
        }
        at += step as u64;
        job.progress += step as u64;
    }
    Ok(())
}

/// Fills the pattern with what is written or compared with; returns how many bytes of it repeat.
/// A pattern longer than the scratch memory is read piece by piece, later.
fn prepare_pattern(job: &Job, scratch: &mut Scratch) -> Result<usize, IoError> {
    let request = &job.request;
    match request.operation {
        IoOperation::WriteSame | IoOperation::Compare => {
            let Ok(length @ 1..=SCRATCH_BYTES) = usize::try_from(request.buffers.bytes()) else {
                // Pieces must not straddle the end of the buffers, where they start over. Sectors
                // divide both.
                return match request.operation {
                    IoOperation::Compare if request.buffers.bytes() == request.bytes => {
                        Ok(SCRATCH_BYTES)
                    }
                    _ => Err(IoError::Malformed),
                };
            };
            let (first, rest) =
                scratch.pattern.split_at_mut_checked(length).ok_or(IoError::Malformed)?;
            request.buffers.read_at(0, first).map_err(|_| IoError::Memory)?;
            for copy in rest.chunks_exact_mut(length) {
                copy.copy_from_slice(first);
            }
            Ok(SCRATCH_BYTES - SCRATCH_BYTES % length)
        }
        _ => {
            scratch.pattern.fill(0);
            Ok(SCRATCH_BYTES)
        }
    }
}

/// Reads through the page cache.
pub(super) fn read_all(image: &Image, into: &mut [u8], at: u64) -> Result<(), IoError> {
    let (mut into, mut at) = (into, at);
    while !into.is_empty() {
        match pread(image.file(), &mut *into, at) {
            Ok(0) => return Err(IoError::EndOfMedium { at }),
            Ok(moved) => {
                into = into.get_mut(moved..).unwrap_or_default();
                at += moved as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(failure(IoOperation::Read, at, errno)),
        }
    }
    Ok(())
}

fn write_all(image: &Image, from: &[u8], at: u64) -> Result<(), IoError> {
    let (mut from, mut at) = (from, at);
    while !from.is_empty() {
        match pwrite(image.file(), from, at) {
            Ok(0) => return Err(nothing_moved(IoOperation::WriteZeroes, at)),
            Ok(moved) => {
                from = from.get(moved..).unwrap_or_default();
                at += moved as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(failure(IoOperation::WriteZeroes, at, errno)),
        }
    }
    Ok(())
}
