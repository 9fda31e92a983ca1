//! A request to a file, and the ways to perform it.

use rustix::io::Errno;

use super::image::Image;
use super::order::{Class, Sharing, Ticket};
use super::{IoDone, IoError, IoOperation, IoOutcome, IoRequest};

/// How a request is performed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Way {
    /// Read or write past the page cache.
    Direct,
    /// Read or write through the page cache.
    Buffered,
    /// `fdatasync`.
    Sync,
    /// `fallocate`: punch a hole or zero a range.
    Allocate,
    /// Piece by piece through the page cache, in a thread.
    ByHand,
}

/// A request that waits for its turn.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) request: IoRequest,
    pub(super) way: Way,
    /// It was tried before, another way: something of it may have happened.
    pub(super) was_tried: bool,
}

impl Waiting {
    /// A request that is new.
    pub(super) fn new(request: IoRequest, way: Way) -> Self {
        Self { request, way, was_tried: false }
    }

    /// Lets it come out as what it is when it is taken out of the queue.
    pub(super) fn withdrawn(self) -> IoDone {
        let Self { request, was_tried, .. } = self;
        come_out(request, was_tried, withdrawn(was_tried, 0))
    }
}

/// A request that may start or has started.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) request: IoRequest,
    pub(super) way: Way,
    pub(super) ticket: Ticket,
    /// Bytes that are done.
    pub(super) progress: u64,
    /// It was given to the system at least once: something of it may have happened.
    pub(super) was_tried: bool,
    /// It is wanted back: it does not go on once the system lets go of it.
    pub(super) is_cancelled: bool,
}

impl Job {
    pub(super) fn new((waiting, ticket): (Waiting, Ticket)) -> Self {
        let Waiting { request, way, was_tried } = waiting;
        Self { request, way, ticket, progress: 0, was_tried, is_cancelled: false }
    }

    /// What it comes back as while the system does not have it.
    pub(super) fn withdrawn(&self) -> IoOutcome {
        withdrawn(self.was_tried, self.progress)
    }

    /// Lets it come out, while the system does not have it.
    pub(super) fn come_out(self, outcome: IoOutcome) -> IoDone {
        come_out(self.request, self.was_tried, outcome)
    }
}

fn come_out(request: IoRequest, was_tried: bool, outcome: IoOutcome) -> IoDone {
    if was_tried && request.operation == IoOperation::Read {
        // However it ended: the system may have written to all of them.
        request.buffers.mark_written();
    }
    IoDone { request, outcome }
}

/// The outcome of a request that nobody works on, and nobody will.
fn withdrawn(was_tried: bool, moved: u64) -> IoOutcome {
    if was_tried { IoOutcome::Cancelled { moved } } else { IoOutcome::NeverStarted }
}

/// Checks a request against the image and chooses the way; `None` if there is nothing to do.
pub(super) fn plan(image: &Image, request: &IoRequest) -> Result<Option<(Way, Class)>, IoError> {
    let operation = request.operation;
    let end = request.offset.checked_add(request.bytes).ok_or(IoError::Malformed)?;
    if end > image.bytes() {
        return Err(IoError::Malformed);
    }
    if operation.is_write() && image.is_read_only() {
        return Err(IoError::WriteProtected);
    }
    let data = request.buffers.bytes();
    let fits = match operation {
        IoOperation::Read | IoOperation::Write { .. } => data == request.bytes,
        IoOperation::WriteSame | IoOperation::Compare => {
            data > 0 && request.bytes.is_multiple_of(data)
        }
        _ => true,
    };
    if !fits {
        return Err(IoError::Malformed);
    }
    if request.bytes == 0 && operation != IoOperation::Flush {
        return Ok(None);
    }
    let way = match operation {
        IoOperation::Read | IoOperation::Write { .. } => match image.direct_alignments() {
            Some((memory, offset))
                if (request.offset | request.bytes).is_multiple_of(u64::from(offset))
                    && request.buffers.is_aligned(memory) =>
            {
                Way::Direct
            }
            _ => Way::Buffered,
        },
        IoOperation::Flush => Way::Sync,
        IoOperation::Discard if image.can_punch() => Way::Allocate,
        IoOperation::WriteZeroes if image.can_zero_range() => Way::Allocate,
        _ => Way::ByHand,
    };
    let class = match operation {
        IoOperation::Flush => Class::Flush,
        _ if operation.is_write() => Class::Write(sharing(image, way)),
        _ => Class::Read,
    };
    Ok(Some((way, class)))
}

/// What a write that goes `way` excludes.
pub(super) fn sharing(image: &Image, way: Way) -> Sharing {
    match way {
        _ if !image.has_two_paths() => Sharing::Any,
        Way::Direct => Sharing::Direct,
        Way::Buffered | Way::ByHand => Sharing::Buffered,
        Way::Sync | Way::Allocate => Sharing::Any,
    }
}

/// The way to try after `way` has failed with `errno` because the file system does not have it.
pub(super) fn other_way(
    image: &Image,
    operation: IoOperation,
    way: Way,
    errno: Errno,
) -> Option<Way> {
    match (way, errno) {
        (Way::Direct, Errno::INVAL) => {
            image.give_up_direct();
            Some(Way::Buffered)
        }
        (Way::Allocate, Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV) => {
            if operation == IoOperation::Discard {
                image.give_up_punch();
            } else {
                image.give_up_zero_range();
            }
            Some(Way::ByHand)
        }
        _ => None,
    }
}

/// What `errno`, met at byte `at` of the disk, means to the guest.
pub(super) fn failure(operation: IoOperation, at: u64, errno: Errno) -> IoError {
    if !operation.is_write() && operation != IoOperation::Flush {
        return IoError::Read { at, errno };
    }
    match errno {
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG => IoError::NoSpace,
        Errno::ROFS | Errno::PERM | Errno::ACCESS | Errno::BADF => IoError::WriteProtected,
        errno => IoError::Write { at, errno },
    }
}
