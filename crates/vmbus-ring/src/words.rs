//! The control words of a ring, and what may be put in their place.

use core::sync::atomic::{Ordering, fence};

use vmbus_memory::RingPages;
use vmbus_wire::ring::{ControlPage, FeatureBits};

/// A word of the control page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Word {
    /// `in`: the writer stores it, both load it.
    WriteIndex,
    /// `out`: the reader stores it, both load it.
    ReadIndex,
    /// The reader stores it: nonzero while it polls.
    InterruptMask,
    /// The writer stores it: bytes it waits for, or 0.
    PendingSendSize,
    /// The writer stores it: see [`FeatureBits`].
    FeatureBits,
}

/// The control words of one ring, shared with the other end.
///
/// [`RingPages`] is what this is for; models put in their own atomics.
pub trait ControlWords {
    /// Atomically loads `word`.
    fn load(&self, word: Word, order: Ordering) -> u32;
    /// Atomically stores `value` to `word`.
    fn store(&self, word: Word, value: u32, order: Ordering);
    /// A sequentially consistent fence.
    fn full_fence(&self);
}

impl ControlWords for RingPages {
    #[inline]
    fn load(&self, word: Word, order: Ordering) -> u32 {
        u32::from_le(atomic(self, word).load(order))
    }

    #[inline]
    fn store(&self, word: Word, value: u32, order: Ordering) {
        atomic(self, word).store(value.to_le(), order);
        self.mark_control_dirty();
    }

    #[inline]
    fn full_fence(&self) {
        fence(Ordering::SeqCst);
    }
}

#[inline]
fn atomic(pages: &RingPages, word: Word) -> &core::sync::atomic::AtomicU32 {
    match word {
        Word::WriteIndex => pages.control_word::<{ ControlPage::IN as usize }>(),
        Word::ReadIndex => pages.control_word::<{ ControlPage::OUT as usize }>(),
        Word::InterruptMask => pages.control_word::<{ ControlPage::INTERRUPT_MASK as usize }>(),
        Word::PendingSendSize => {
            pages.control_word::<{ ControlPage::PENDING_SEND_SIZE as usize }>()
        }
        Word::FeatureBits => pages.control_word::<{ ControlPage::FEATURE_BITS as usize }>(),
    }
}

/// Makes `words` those of an empty ring whose writer may ask for space. The client endpoint does
/// this to both of its rings before it opens a channel; nobody may use them yet.
pub fn initialize(words: &impl ControlWords) {
    for word in [Word::WriteIndex, Word::ReadIndex, Word::InterruptMask, Word::PendingSendSize] {
        words.store(word, 0, Ordering::Relaxed);
    }
    words.store(Word::FeatureBits, FeatureBits::PENDING_SEND_SIZE.bits(), Ordering::Release);
}
