//! How the host signals a channel's guest.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};

use kmcl::bus::Signal;
use vmbus_memory::GuestMemory;

use crate::effect::Interrupt;
use crate::port::GuestPort;

/// Bytes of the host-to-guest half of the shared interrupt page; the other half follows.
///
/// Source: vmbus-wire section 2, rule 5.
pub(crate) const INTERRUPT_PAGE_HALF: u64 = 2048;

/// The signal that a device gets with its rings. Where it leads can change while the device uses it.
pub(crate) struct ChannelSignal {
    target: RwLock<Option<Arc<dyn Signal>>>,
}

impl ChannelSignal {
    pub(crate) fn new(target: Option<Arc<dyn Signal>>) -> Self {
        Self { target: RwLock::new(target) }
    }

    /// Leads elsewhere, or nowhere. Once this returns, no signal goes where they went before.
    pub(crate) fn set_target(&self, target: Option<Arc<dyn Signal>>) {
        *self.target.write().unwrap_or_else(PoisonError::into_inner) = target;
    }
}

impl Signal for ChannelSignal {
    fn signal(&self) {
        // The lock is held across the call, so that `set_target` waits for signals on their way.
        // It is contended only then.
        if let Some(target) = &*self.target.read().unwrap_or_else(PoisonError::into_inner) {
            target.signal();
        }
    }
}

/// What to signal for an interrupt of this kind; `None` for none.
pub(crate) fn target(
    port: &dyn GuestPort,
    memory: &GuestMemory,
    interrupt: Interrupt,
) -> io::Result<Option<Arc<dyn Signal>>> {
    Ok(match interrupt {
        Interrupt::None => None,
        Interrupt::EventFlag { vp, sint, flag } => Some(port.event_flag(vp, sint, flag)?),
        Interrupt::SharedPage { gpa, bit, vp, sint } => {
            let attention = port.event_flag(vp, sint, 0)?;
            let memory = memory.clone();
            Some(Arc::new(SharedPageSignal { memory, gpa, bit, attention }))
        }
    })
}

/// A bit in the shared interrupt page, and the event flag that tells the guest to look at the page.
struct SharedPageSignal {
    memory: GuestMemory,
    gpa: u64,
    bit: u16,
    attention: Arc<dyn Signal>,
}

impl Signal for SharedPageSignal {
    fn signal(&self) {
        let gpa = self.gpa + u64::from(self.bit / 32) * 4; // within the page: the bit is below 2048
        if let Ok(slice) = self.memory.slice(gpa, size_of::<u32>())
            && let Some(word) = slice.atomic_u32(0)
        {
            // Release: the guest that sees the bit sees the packets.
            word.fetch_or(1 << (self.bit % 32), Ordering::Release);
            slice.mark_dirty(0, size_of::<u32>());
        }
        self.attention.signal();
    }
}

/// Takes the bits that the guest has set in its half of the shared interrupt page: channel ids.
pub(crate) fn take_guest_bits(memory: &GuestMemory, gpa: u64) -> Vec<u32> {
    let mut channels = Vec::new();
    // Only the bits of channel ids: 2048 of them.
    let Ok(bits) = memory.slice(gpa.saturating_add(INTERRUPT_PAGE_HALF), 2048 / 8) else {
        return channels;
    };
    for (offset, first) in (0..bits.len()).step_by(4).zip((0u32..).step_by(32)) {
        let Some(word) = bits.atomic_u32(offset) else { break };
        if word.load(Ordering::Relaxed) == 0 {
            continue; // leaves the page clean where it can
        }
        let set = word.swap(0, Ordering::Acquire);
        bits.mark_dirty(offset, size_of::<u32>());
        channels.extend((0..32).filter(|bit| set & 1 << bit != 0).map(|bit| first + bit));
    }
    channels
}
