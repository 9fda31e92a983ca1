//! The shared interrupt page of versions below 2.4: a bit per channel and direction.
//!
//! | bytes | bits |
//! |---|---|
//! | 0..2048 | host to guest; bit n is channel n |
//! | 2048..4096 | guest to host |
//!
//! Source: vmbus-wire section 2, "Rules for the host", 5.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kmcl::bus::Signal;
use vmbus_memory::{MemoryError, PageAllocator, PageRun};
use vmbus_wire::PAGE_SIZE;
use vmbus_wire::message::MAX_CHANNEL_ID;

const HALF: usize = PAGE_SIZE / 2;

/// Words that hold the bits of all channels.
const WORDS: usize = (MAX_CHANNEL_ID as usize + 1) / 32;

#[derive(Clone, Debug)]
pub(super) struct InterruptPage(Arc<PageRun>);

impl InterruptPage {
    pub(super) fn allocate(pages: &PageAllocator) -> Result<Self, MemoryError> {
        let mut page = pages.allocate(1)?;
        if page.gpa() == 0 {
            page = pages.allocate(1)?; // in a message, address 0 means that there is none
        }
        page.slice()?.fill(0);
        Ok(Self(Arc::new(page)))
    }

    pub(super) fn gpa(&self) -> u64 {
        self.0.gpa()
    }

    /// Takes the bits that the host has set, as channel numbers.
    pub(super) fn take_pending(&self) -> Vec<u16> {
        let Ok(page) = self.0.slice() else { return Vec::new() };
        let mut pending = Vec::new();
        for word in 0..WORDS {
            let Some(atomic) = page.atomic_u32(word * 4) else { break };
            if atomic.load(Ordering::Relaxed) == 0 {
                continue;
            }
            // Acquire: what the host wrote before it set a bit is seen by whoever the bit wakes.
            let mut bits = u32::from_le(atomic.swap(0, Ordering::AcqRel));
            while bits != 0 {
                let channel = word * 32 + bits.trailing_zeros() as usize;
                pending.extend(u16::try_from(channel)); // below 2048
                bits &= bits - 1;
            }
        }
        pending
    }

    /// Sets the guest-to-host bit of a channel.
    fn set(&self, channel_id: u32) {
        let word = HALF + channel_id as usize / 32 * 4;
        if let Ok(page) = self.0.slice()
            && let Some(atomic) = page.atomic_u32(word)
        {
            // Release: pairs with the host's taking of the bit, after which it reads the ring.
            atomic.fetch_or((1u32 << (channel_id % 32)).to_le(), Ordering::AcqRel);
            page.mark_dirty(word, 4);
        }
    }
}

/// Signals the host of an old version: sets the channel's bit, then rings the port for all
/// channels.
pub(super) struct LegacySignal {
    pub(super) page: InterruptPage,
    pub(super) channel_id: u32,
    pub(super) port: Arc<dyn Signal>,
}

impl Signal for LegacySignal {
    fn signal(&self) {
        self.page.set(self.channel_id);
        self.port.signal();
    }
}
