//! Handles: what C holds in place of our objects.
//!
//! ```text
//!  63      60 59                    24 23              0
//! ┌──────────┬────────────────────────┬─────────────────┐
//! │   kind   │       generation       │      index      │
//! └──────────┴────────────────────────┴─────────────────┘
//! ```
//!
//! The highest bit of a kind is set, so that no handle is an address and no address a handle. The index
//! names a slot of a table per kind; slots are never freed, only used again under the next generation. So
//! any 64 bits can be looked up, and those that name nothing are noticed by a compare.
//!
//! # A slot's state
//!
//! One word says it all: the generation, a *phase*, and a flag. [`Phase::Busy`] is the lock: whoever moves
//! a slot from Live to Busy (by compare-and-swap, or because it just took a free slot) alone may touch the
//! content, and moves it on by a plain store. Nothing else moves a slot while it is Busy.
#![allow(unsafe_code, reason = "the content of a slot is guarded by the slot's own state word")]

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// A handle as C holds it. Any value may come from there.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Handle(pub(crate) u64);

/// What a handle names.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(crate) enum Kind {
    Channel = 0x9,
    Packet = 0xa,
    Incoming = 0xb,
    Object = 0xc,
}

impl Handle {
    pub(crate) fn from_pointer<T>(pointer: *const T) -> Self {
        Self(pointer.addr() as u64)
    }

    /// Only a number that looks like a pointer: nothing can be reached through it.
    pub(crate) fn to_pointer<T>(self) -> *mut T {
        core::ptr::without_provenance_mut(usize::try_from(self.0).unwrap_or(0))
    }

    fn new(kind: Kind, generation: u64, index: u32) -> Self {
        let generation = generation & GENERATIONS;
        Self((kind as u64) << KIND_SHIFT | generation << INDEX_BITS | u64::from(index))
    }

    /// Whether it could be an address: handles never are.
    pub(crate) fn is_address(self) -> bool {
        self.0 >> 63 == 0
    }

    pub(crate) fn is_of(self, kind: Kind) -> bool {
        self.0 >> KIND_SHIFT == kind as u64
    }
}

const KIND_SHIFT: u32 = 60;
const INDEX_BITS: u32 = 24;
const GENERATIONS: u64 = (1 << (KIND_SHIFT - INDEX_BITS)) - 1;

/// Slots of the first chunk; each further chunk has twice as many as the one before.
const FIRST_CHUNK: u32 = 64;
const CHUNKS: usize = 15;
/// Most handles of a kind that are in use at a time: far more packets than a channel may have.
pub(crate) const MAX_HANDLES: u32 = FIRST_CHUNK * ((1 << CHUNKS) - 1);
const _: () = assert!(MAX_HANDLES < 1 << INDEX_BITS);

/// What has become of a slot.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(crate) enum Phase {
    /// Its handle is over.
    Free = 0,
    /// The handle is good, and nobody has the content.
    Live = 1,
    /// Somebody has the content.
    Busy = 2,
    /// The handle is good; the content travels (an outgoing packet in flight).
    Away = 3,
    /// Over, and the callback that it was made for has not returned yet (an incoming packet).
    Done = 4,
}

const PHASES: u64 = 0xf;

/// Whether a slot in this state is in `phase`.
#[inline]
fn is_in(state: u64, phase: Phase) -> bool {
    state & PHASES == phase as u64
}

/// The callback that the slot was taken for is running.
const IN_CALLBACK: u64 = 0x10;
const GENERATION_SHIFT: u32 = 8;

/// What a table keeps: a content that one thread at a time may touch, and words that any may.
pub(crate) trait Content: Default + Send + 'static {
    type Shared: Default + Send + Sync;
}

/// One slot; see the module.
pub(crate) struct Slot<C: Content> {
    state: AtomicU64,
    /// The next slot of a list of free ones that somebody keeps: its index and 1, or 0.
    pub(crate) next: AtomicU32,
    pub(crate) shared: C::Shared,
    content: UnsafeCell<C>,
}

// SAFETY: `content` is the only part that is not `Sync` by itself. It is reached through `Claim` alone, of
// which there is at most one for a slot at a time (see the module), and `C` is `Send`.
unsafe impl<C: Content> Sync for Slot<C> {}

impl<C: Content> Slot<C> {
    fn new() -> Self {
        Self {
            state: AtomicU64::new(0),
            next: AtomicU32::new(0),
            shared: C::Shared::default(),
            content: UnsafeCell::new(C::default()),
        }
    }
}

/// All slots of one kind.
pub(crate) struct Table<C: Content> {
    kind: Kind,
    chunks: [OnceLock<Box<[Slot<C>]>>; CHUNKS],
    free: Mutex<FreeSlots>,
}

struct FreeSlots {
    list: Vec<u32>,
    /// Slots that have been used at all.
    used: u32,
}

impl<C: Content> Table<C> {
    pub(crate) const fn new(kind: Kind) -> Self {
        Self {
            kind,
            chunks: [const { OnceLock::new() }; CHUNKS],
            free: Mutex::new(FreeSlots { list: Vec::new(), used: 0 }),
        }
    }

    #[inline]
    fn slot(&self, index: u32) -> Option<&Slot<C>> {
        // Chunk n begins at 64 * (2^n - 1).
        let chunk = (index / FIRST_CHUNK + 1).ilog2();
        let first = FIRST_CHUNK * ((1 << chunk) - 1);
        self.chunks.get(chunk as usize)?.get()?.get((index - first) as usize)
    }

    /// A slot that nobody uses, as the caller's own; `None` at [`MAX_HANDLES`].
    pub(crate) fn take(&'static self) -> Option<Taken<C>> {
        let index = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            match free.list.pop() {
                Some(index) => index,
                None if free.used < MAX_HANDLES => {
                    let index = free.used;
                    let chunk = (index / FIRST_CHUNK + 1).ilog2();
                    let slots = self.chunks.get(chunk as usize)?;
                    slots.get_or_init(|| (0..FIRST_CHUNK << chunk).map(|_| Slot::new()).collect());
                    free.used += 1;
                    index
                }
                None => return None,
            }
        };
        Some(Taken { table: self, slot: self.slot(index)?, index })
    }

    /// Gives a slot back that is free.
    pub(crate) fn give_back(&self, index: u32) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).list.push(index);
    }

    /// What `handle` names, unless it names nothing.
    #[inline]
    pub(crate) fn find(&'static self, handle: Handle) -> Option<Found<C>> {
        if !handle.is_of(self.kind) {
            return None;
        }
        let index = (handle.0 & ((1 << INDEX_BITS) - 1)) as u32;
        let slot = self.slot(index)?;
        let generation = handle.0 >> INDEX_BITS & GENERATIONS;
        let found = Found { table: self, slot, index, generation };
        found.is_good(slot.state.load(Ordering::Acquire)).then_some(found)
    }

    /// All handles that are good at the moment.
    pub(crate) fn all(&'static self) -> Vec<Found<C>> {
        let used = self.free.lock().unwrap_or_else(PoisonError::into_inner).used;
        let found = |index| {
            let slot = self.slot(index)?;
            let state = slot.state.load(Ordering::Acquire);
            let generation = state >> GENERATION_SHIFT & GENERATIONS;
            let found = Found { table: self, slot, index, generation };
            found.is_good(state).then_some(found)
        };
        (0..used).filter_map(found).collect()
    }

    /// A free slot by its number, from a list that the caller keeps.
    ///
    /// # Safety
    /// The slot is free, and in no other list: nobody else takes it.
    #[inline]
    pub(crate) unsafe fn taken(&'static self, index: u32) -> Option<Taken<C>> {
        Some(Taken { table: self, slot: self.slot(index)?, index })
    }
}

/// A free slot that belongs to whoever has this.
pub(crate) struct Taken<C: Content> {
    table: &'static Table<C>,
    slot: &'static Slot<C>,
    index: u32,
}

impl<C: Content> Taken<C> {
    pub(crate) fn slot(&self) -> &'static Slot<C> {
        self.slot
    }

    #[inline]
    pub(crate) fn content(&mut self) -> &mut C {
        // SAFETY: the slot is free, so that no `Claim` of it exists, and only the owner of this `Taken`
        // can make one (`open`); the borrow of `self` is exclusive.
        unsafe { &mut *self.slot.content.get() }
    }

    /// Makes its handle a good one.
    #[inline]
    pub(crate) fn open(self, in_callback: bool) -> (Handle, Found<C>) {
        let Self { table, slot, index } = self;
        let generation = slot.state.load(Ordering::Relaxed) >> GENERATION_SHIFT & GENERATIONS;
        let flag = if in_callback { IN_CALLBACK } else { 0 };
        slot.state
            .store(generation << GENERATION_SHIFT | flag | Phase::Live as u64, Ordering::Release);
        let handle = Handle::new(table.kind, generation, index);
        (handle, Found { table, slot, index, generation })
    }

    pub(crate) fn index(&self) -> u32 {
        self.index
    }
}

/// A handle that was good a moment ago.
pub(crate) struct Found<C: Content> {
    table: &'static Table<C>,
    slot: &'static Slot<C>,
    index: u32,
    generation: u64,
}

impl<C: Content> Clone for Found<C> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<C: Content> Copy for Found<C> {}

impl<C: Content> Found<C> {
    #[inline]
    fn is_good(&self, state: u64) -> bool {
        state >> GENERATION_SHIFT & GENERATIONS == self.generation
            && !is_in(state, Phase::Free)
            && !is_in(state, Phase::Done)
    }

    pub(crate) fn handle(&self) -> Handle {
        Handle::new(self.table.kind, self.generation, self.index)
    }

    /// The words that any thread may look at while the handle is good.
    #[inline]
    pub(crate) fn shared(&self) -> &'static C::Shared {
        &self.slot.shared
    }

    pub(crate) fn is_away(&self) -> bool {
        let state = self.slot.state.load(Ordering::Acquire);
        self.is_good(state) && is_in(state, Phase::Away)
    }

    /// The content, for this thread alone; `None` once the handle is over, and while its content is away.
    #[inline]
    pub(crate) fn claim(self) -> Option<Claim<C>> {
        let mut spins = 0_u32;
        loop {
            let state = self.slot.state.load(Ordering::Acquire);
            if !self.is_good(state) {
                return None;
            }
            if is_in(state, Phase::Live) {
                let busy = state & !PHASES | Phase::Busy as u64;
                let won = self.slot.state.compare_exchange_weak(
                    state,
                    busy,
                    Ordering::Acquire,
                    Ordering::Relaxed,
                );
                if won.is_ok() {
                    return Some(Claim { found: self, state: busy });
                }
            } else if is_in(state, Phase::Busy) {
                // Contents are held for moments, never across a callback.
                spins += 1;
                if spins.is_multiple_of(64) {
                    std::thread::yield_now();
                } else {
                    std::hint::spin_loop();
                }
            } else {
                return None;
            }
        }
    }

    /// Ends the flight of a content that was away: it is claimed.
    pub(crate) fn back(self) -> Option<Claim<C>> {
        let state = self.slot.state.load(Ordering::Acquire);
        if !self.is_good(state) || !is_in(state, Phase::Away) {
            return None;
        }
        let busy = state & !PHASES | Phase::Busy as u64;
        let won =
            self.slot.state.compare_exchange(state, busy, Ordering::Acquire, Ordering::Relaxed);
        won.is_ok().then_some(Claim { found: self, state: busy })
    }

    /// The callback that the slot was opened for has returned. Gives the slot back if its handle is over
    /// already; else calls `look` with the content.
    #[inline]
    pub(crate) fn callback_returned<R>(
        self,
        look: impl FnOnce(Claim<C>) -> R,
    ) -> Result<R, Taken<C>> {
        let Self { table, slot, index, .. } = self;
        if !is_in(slot.state.load(Ordering::Acquire), Phase::Done)
            && let Some(mut claim) = self.claim()
        {
            claim.state &= !IN_CALLBACK;
            return Ok(look(claim));
        }
        // Done, at the latest after the wait in `claim`: whoever ended it leaves the slot to us.
        slot.state.store((self.generation + 1) << GENERATION_SHIFT, Ordering::Release);
        Err(Taken { table, slot, index })
    }
}

/// The content of a slot, for one thread.
pub(crate) struct Claim<C: Content> {
    found: Found<C>,
    /// The slot's state, Busy.
    state: u64,
}

impl<C: Content> Claim<C> {
    pub(crate) fn handle(&self) -> Handle {
        self.found.handle()
    }

    pub(crate) fn is_in_callback(&self) -> bool {
        self.state & IN_CALLBACK != 0
    }

    /// Ends the handle. The slot is the caller's, unless the callback that it was opened for still runs:
    /// that one has it then.
    #[inline]
    pub(crate) fn end(self) -> Option<Taken<C>> {
        let Found { table, slot, index, generation } = self.found;
        if self.is_in_callback() {
            self.leave(Phase::Done);
            return None;
        }
        slot.state.store((generation + 1) << GENERATION_SHIFT, Ordering::Release);
        std::mem::forget(self);
        Some(Taken { table, slot, index })
    }

    /// The content travels: the handle stays good, nobody can claim it.
    pub(crate) fn away(self) {
        self.leave(Phase::Away);
    }

    #[inline]
    fn leave(self, phase: Phase) {
        let state = self.state & !PHASES | phase as u64;
        self.found.slot.state.store(state, Ordering::Release);
        std::mem::forget(self);
    }
}

impl<C: Content> Deref for Claim<C> {
    type Target = C;

    #[inline]
    fn deref(&self) -> &C {
        // SAFETY: the slot is Busy, and this is the claim that made it so: nobody else reaches the content.
        unsafe { &*self.found.slot.content.get() }
    }
}

impl<C: Content> DerefMut for Claim<C> {
    #[inline]
    fn deref_mut(&mut self) -> &mut C {
        // SAFETY: as for `deref`; the borrow of `self` is exclusive.
        unsafe { &mut *self.found.slot.content.get() }
    }
}

impl<C: Content> Drop for Claim<C> {
    #[inline]
    fn drop(&mut self) {
        let state = self.state & !PHASES | Phase::Live as u64;
        self.found.slot.state.store(state, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Number(u32);
    impl Content for Number {
        type Shared = ();
    }
    static NUMBERS: Table<Number> = Table::new(Kind::Object);

    fn handle(number: u32) -> Handle {
        let mut taken = NUMBERS.take().unwrap();
        taken.content().0 = number;
        taken.open(false).0
    }

    #[test]
    fn a_handle_names_its_content_until_it_ends_and_nothing_after() {
        let first = handle(7);
        assert!(!first.is_address());
        assert_eq!(NUMBERS.find(first).unwrap().claim().unwrap().0, 7);
        let taken = NUMBERS.find(first).unwrap().claim().unwrap().end().unwrap();
        assert!(NUMBERS.find(first).is_none());
        // The next generation of the same slot is another handle.
        let (second, _) = taken.open(false);
        assert_ne!(first, second);
        assert!(NUMBERS.find(first).is_none());
        assert!(NUMBERS.find(second).is_some());
    }

    #[test]
    fn any_64_bits_can_be_looked_up() {
        let good = handle(1);
        for bad in [
            0,
            1,
            u64::MAX,
            1 << 63,
            good.0 ^ 1 << KIND_SHIFT,
            good.0 ^ 1 << INDEX_BITS,
            good.0 ^ 0xff_ffff,
            good.0 | 0xff_ffff,
            0x7fff_ffff_f000,
        ] {
            assert!(NUMBERS.find(Handle(bad)).is_none(), "{bad:#x}");
        }
    }

    #[test]
    fn slots_beyond_the_first_chunk_are_found() {
        let handles: Vec<_> = (0..1000).map(handle).collect();
        for (number, handle) in (0..).zip(handles) {
            assert_eq!(NUMBERS.find(handle).unwrap().claim().unwrap().0, number);
        }
    }

    #[test]
    fn the_callback_that_is_running_keeps_the_slot() {
        let (handle, found) = NUMBERS.take().unwrap().open(true);
        assert!(NUMBERS.find(handle).unwrap().claim().unwrap().end().is_none());
        assert!(NUMBERS.find(handle).is_none());
        let taken = found.callback_returned(|_| ()).unwrap_err();
        let (handle, found) = taken.open(true);
        assert!(found.callback_returned(|claim| claim.is_in_callback()).is_ok());
        assert!(NUMBERS.find(handle).unwrap().claim().unwrap().end().is_some());
    }

    #[test]
    fn two_threads_that_end_the_same_handle_do_it_once() {
        for _ in 0..1000 {
            let handle = handle(0);
            let ended = AtomicU32::new(0);
            let end = || {
                if NUMBERS.find(handle).and_then(Found::claim).and_then(Claim::end).is_some() {
                    ended.fetch_add(1, Ordering::Relaxed);
                }
            };
            std::thread::scope(|scope| {
                scope.spawn(end);
                end();
            });
            assert_eq!(ended.load(Ordering::Relaxed), 1);
        }
    }
}
