//! The two pages of a VP's SynIC: sixteen message slots, sixteen blocks of event flags.
//!
//! Both are guest memory: the guest empties slots and takes flags while we fill and set them. What is
//! read from them decides nothing but whether a slot is free.
//!
//! Source: hyperv-host section 4.

use std::sync::atomic::Ordering;

use vmbus_memory::{GuestMemory, SharedSlice};
use vmbus_wire::message::MAX_MESSAGE_SIZE;
use vmbus_wire::synic::{SLOT_SIZE, VMBUS_MESSAGE_TYPE};

/// Bytes of the flags of one SINT: 2048 of them.
const FLAGS_SIZE: u64 = 256;

/// What became of a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Put {
    /// It is in its slot: the guest is to be interrupted.
    Done,
    /// The slot is full, and the guest was asked to say when it is not.
    Full,
    /// The page is not memory.
    NoPage,
}

/// Puts a VMBus message into the slot of `sint` in the message page at `page`.
pub(crate) fn put_message(memory: &GuestMemory, page: u64, sint: u8, message: &[u8]) -> Put {
    let at = page.saturating_add(u64::from(sint) * SLOT_SIZE as u64);
    let Ok(slot) = memory.slice(at, SLOT_SIZE) else { return Put::NoPage };
    match put_in_slot(&slot, message) {
        Some(true) => Put::Done,
        Some(false) => Put::Full,
        None => Put::NoPage,
    }
}

fn put_in_slot(slot: &SharedSlice<'_>, message: &[u8]) -> Option<bool> {
    const PENDING: u32 = 1 << 8; // flags are the second byte of the second word
    let message_type = slot.atomic_u32(0)?;
    let size_and_flags = slot.atomic_u32(4)?;
    if message_type.load(Ordering::Acquire) != 0 {
        // The guest that empties the slot after this sees the flag, and writes EOM. One that emptied
        // it before may not have: so the slot is looked at again.
        size_and_flags.fetch_or(PENDING, Ordering::SeqCst);
        slot.mark_dirty(4, 4);
        if message_type.load(Ordering::SeqCst) != 0 {
            return Some(false);
        }
    }
    let len = message.len().min(MAX_MESSAGE_SIZE);
    let message = message.get(..len)?;
    size_and_flags.store(u32::try_from(len).ok()?, Ordering::Relaxed);
    slot.write_at(8, &[0; 8]).ok()?; // sender
    slot.write_at(16, message).ok()?;
    // Release: the guest that sees the type sees the rest.
    message_type.store(VMBUS_MESSAGE_TYPE, Ordering::Release);
    slot.mark_dirty(0, SLOT_SIZE);
    Some(true)
}

/// Sets an event flag in the page at `page`. `true`: it was clear, so the guest is to be interrupted.
pub(crate) fn set_flag(memory: &GuestMemory, page: u64, sint: u8, flag: u16) -> bool {
    let word = u64::from(flag / 32) * 4;
    let at = page.saturating_add(u64::from(sint) * FLAGS_SIZE).saturating_add(word);
    if word >= FLAGS_SIZE {
        return false;
    }
    let Ok(slice) = memory.slice(at, 4) else { return false };
    let Some(word) = slice.atomic_u32(0) else { return false };
    let bit = 1 << (flag % 32);
    // Release: the guest that sees the flag sees what is in the ring.
    let before = word.fetch_or(bit, Ordering::Release);
    slice.mark_dirty(0, 4);
    before & bit == 0
}

/// Clears a page that comes into use: there are no overlays here, and what a guest left in it would
/// look like messages.
pub(crate) fn clear(memory: &GuestMemory, page: u64) {
    if let Err(error) = memory.fill(page, 4096, 0) {
        tracing::debug!(%error, "a SynIC page of the guest is not memory");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_holds_one_message_and_asks_for_its_end() {
        let memory = GuestMemory::memfd(0x4000).unwrap();
        assert_eq!(put_message(&memory, 0x1000, 2, b"first"), Put::Done);
        let mut slot = [0; SLOT_SIZE];
        memory.read(0x1200, &mut slot).unwrap();
        assert_eq!(slot[..6], [1, 0, 0, 0, 5, 0]);
        assert_eq!(&slot[16..21], b"first");

        assert_eq!(put_message(&memory, 0x1000, 2, b"second"), Put::Full);
        memory.read(0x1200, &mut slot).unwrap();
        assert_eq!((slot[5], &slot[16..21]), (1, &b"first"[..]), "pending, and nothing lost");
        assert_eq!(put_message(&memory, 0x1000, 3, b"other"), Put::Done, "slots are apart");

        memory.write(0x1200, &[0; 4]).unwrap(); // the guest is done with it
        assert_eq!(put_message(&memory, 0x1000, 2, b"second"), Put::Done);
        memory.read(0x1200, &mut slot).unwrap();
        assert_eq!(slot[4..6], [6, 0], "the flag is gone with the message it was about");
    }

    #[test]
    fn a_flag_interrupts_once() {
        let memory = GuestMemory::memfd(0x4000).unwrap();
        assert!(set_flag(&memory, 0x2000, 2, 41));
        assert!(!set_flag(&memory, 0x2000, 2, 41));
        let mut byte = [0];
        memory.read(0x2000 + 0x200 + 5, &mut byte).unwrap();
        assert_eq!(byte, [1 << 1]);
        assert!(!set_flag(&memory, 0x2000, 2, 2048), "there is no such flag");
    }

    #[test]
    fn pages_that_are_not_memory_are_left_alone() {
        let memory = GuestMemory::memfd(0x4000).unwrap();
        for page in [0x4000, !0xfff] {
            assert_eq!(put_message(&memory, page, 15, b"x"), Put::NoPage);
            assert!(!set_flag(&memory, page, 15, 2047));
            clear(&memory, page);
        }
    }
}
