//! A store and a later load in order, on two threads, for nothing on one of them.
//!
//! The one that is there for every packet ([`light`]) keeps only the compiler from exchanging the two. The
//! other, which comes rarely ([`heavy`]), has the system interrupt every running thread of the process, and
//! so puts a full fence wherever the first may be. Where the system has no such call, whoever would need
//! [`light`] has to do without what it orders.

use std::sync::OnceLock;
use std::sync::atomic::{Ordering, compiler_fence, fence};

use rustix::thread::{MembarrierCommand, MembarrierQuery, membarrier, membarrier_query};

/// Whether the system has such a call; asked once.
pub(crate) fn prepare() -> bool {
    static PREPARED: OnceLock<bool> = OnceLock::new();
    *PREPARED.get_or_init(|| {
        membarrier_query().contains(MembarrierQuery::PRIVATE_EXPEDITED)
            && membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok()
    })
}

/// Orders the store before it and the load behind it against those around a [`heavy`] elsewhere. Only
/// where [`prepare`] has said that there is one.
#[inline]
pub(crate) fn light() {
    compiler_fence(Ordering::SeqCst);
}

/// See [`light`]. `false` if the system refuses what it has promised: nothing is in order then.
#[cold]
pub(crate) fn heavy() -> bool {
    fence(Ordering::SeqCst);
    membarrier(MembarrierCommand::PrivateExpedited).is_ok()
}
