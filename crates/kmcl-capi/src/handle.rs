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
//! One word says it all: the generation (where a handle has it), a *phase*, and a flag. [`Phase::Busy`] is
//! the lock: whoever moves a slot from Live to Busy (by compare-and-swap, or because it just took a free slot) alone may touch the
//! content, and moves it on by a plain store. Nothing else moves a slot while it is Busy.
//!
//! # The thread that a slot is lent to
//!
//! A compare-and-swap is a tenth of what a packet costs. Nearly all calls about a packet come from the thread
//! that runs its callback, so that thread is spared it: the slot is [`Phase::Lent`] to it meanwhile. It
//! says that it is at the content by a plain store (`lender`), looks whether the slot is still lent, and takes
//! the store back when it is done. Any other thread moves the slot from Lent to Busy first, has the system
//! put a fence into every thread ([`crate::asymmetric`]), and waits until `lender` is clear: either the
//! owner has seen Busy and keeps away, or it was seen and is waited for. If it has ended the handle in the
//! meantime, Busy is overwritten, and the other finds a handle that is over.
#![allow(unsafe_code, reason = "the content of a slot is guarded by the slot's own state word")]

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::asymmetric;

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
/// One generation further, and all of them: where handles have theirs.
const GENERATION: u64 = 1 << INDEX_BITS;
const GENERATIONS: u64 = (1 << KIND_SHIFT) - GENERATION;

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
    /// The handle is good, and the thread that runs its callback has the content when it wants it.
    Lent = 5,
}

const PHASES: u64 = 0xf;

/// Whether a slot in this state is in `phase`.
#[inline]
fn is_in(state: u64, phase: Phase) -> bool {
    state & PHASES == phase as u64
}

/// The callback that the slot was taken for is running.
const IN_CALLBACK: u64 = 0x10;

/// What a table keeps: a content that one thread at a time may touch, and words that any may.
pub(crate) trait Content: Default + Send + 'static {
    const KIND: Kind;
    type Shared: Default + Send + Sync;
}

/// One slot; see the module. From the start of a cache line on: a packet's way touches all of it.
#[repr(align(64))]
pub(crate) struct Slot<C: Content> {
    state: AtomicU64,
    /// Its handle, without the generation.
    name: u64,
    /// 1 while the thread that the slot is lent to is at the content.
    lender: AtomicU32,
    /// The next of a list of free ones that somebody keeps.
    pub(crate) next: AtomicPtr<Self>,
    pub(crate) shared: C::Shared,
    content: UnsafeCell<C>,
}

// SAFETY: `content` is the only part that is not `Sync` by itself. It is reached through `Claim` alone, of
// which there is at most one for a slot at a time (see the module), and `C` is `Send`.
unsafe impl<C: Content> Sync for Slot<C> {}

impl<C: Content> Slot<C> {
    fn new(index: u32) -> Self {
        Self {
            state: AtomicU64::new(0),
            name: (C::KIND as u64) << KIND_SHIFT | u64::from(index),
            lender: AtomicU32::new(0),
            next: AtomicPtr::new(core::ptr::null_mut()),
            shared: C::Shared::default(),
            content: UnsafeCell::new(C::default()),
        }
    }

    fn index(&self) -> u32 {
        (self.name & (GENERATION - 1)) as u32
    }

    /// As a list of free slots keeps it.
    #[inline]
    pub(crate) fn as_link(&'static self) -> *mut Self {
        core::ptr::from_ref(self).cast_mut()
    }
}

/// All slots of one kind.
pub(crate) struct Table<C: Content> {
    chunks: [OnceLock<Box<[Slot<C>]>>; CHUNKS],
    free: Mutex<FreeSlots>,
}

struct FreeSlots {
    list: Vec<u32>,
    /// Slots that have been used at all.
    used: u32,
}

impl<C: Content> Table<C> {
    pub(crate) const fn new() -> Self {
        Self {
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
                    let (first, count) = (FIRST_CHUNK * ((1 << chunk) - 1), FIRST_CHUNK << chunk);
                    slots.get_or_init(|| (first..first + count).map(Slot::new).collect());
                    free.used += 1;
                    index
                }
                None => return None,
            }
        };
        self.slot(index).map(Taken)
    }

    /// Gives a slot back that is free.
    pub(crate) fn give_back(&self, taken: &Taken<C>) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).list.push(taken.0.index());
    }

    /// What `handle` names, unless it names nothing.
    #[inline]
    pub(crate) fn find(&'static self, handle: Handle) -> Option<Found<C>> {
        if !handle.is_of(C::KIND) {
            return None;
        }
        let index = (handle.0 & (GENERATION - 1)) as u32;
        let slot = self.slot(index)?;
        let generation = handle.0 & GENERATIONS;
        let found = Found { slot, generation };
        found.is_good(slot.state.load(Ordering::Acquire)).then_some(found)
    }

    /// All handles that are good at the moment.
    pub(crate) fn all(&'static self) -> Vec<Found<C>> {
        let used = self.free.lock().unwrap_or_else(PoisonError::into_inner).used;
        let found = |index| {
            let slot = self.slot(index)?;
            let state = slot.state.load(Ordering::Acquire);
            let generation = state & GENERATIONS;
            let found = Found { slot, generation };
            found.is_good(state).then_some(found)
        };
        (0..used).filter_map(found).collect()
    }
}

/// A free slot that belongs to whoever has this.
pub(crate) struct Taken<C: Content>(&'static Slot<C>);

impl<C: Content> Taken<C> {
    /// A free slot from a list that the caller keeps; `None` for the end of the list.
    ///
    /// # Safety
    /// `link` is null or from [`Slot::as_link`]. The slot is free, and in no other list: nobody else
    /// takes it.
    #[inline]
    pub(crate) unsafe fn from_link(link: *mut Slot<C>) -> Option<Self> {
        // SAFETY: a slot by the caller's promise; slots live in statics and are never freed.
        unsafe { link.as_ref() }.map(Self)
    }

    #[inline]
    pub(crate) fn slot(&self) -> &'static Slot<C> {
        self.0
    }

    #[inline]
    pub(crate) fn content(&mut self) -> &mut C {
        // SAFETY: the slot is free, so that no `Claim` of it exists, and only the owner of this `Taken`
        // can make one (`open`, `lend`); the borrow of `self` is exclusive.
        unsafe { &mut *self.0.content.get() }
    }

    /// Makes its handle a good one.
    #[inline]
    pub(crate) fn open(self) -> Found<C> {
        self.begin(Phase::Live as u64)
    }

    /// Makes its handle a good one, for a callback that runs until [`Found::callback_returned`].
    pub(crate) fn open_in_callback(self) -> Found<C> {
        self.begin(IN_CALLBACK | Phase::Live as u64)
    }

    /// As [`Self::open_in_callback`], lent to this thread. Only where [`asymmetric::prepare`] is `true`.
    #[inline]
    pub(crate) fn lend(self) -> Found<C> {
        self.begin(IN_CALLBACK | Phase::Lent as u64)
    }

    #[inline]
    fn begin(self, phase: u64) -> Found<C> {
        let slot = self.0;
        let generation = slot.state.load(Ordering::Relaxed) & GENERATIONS;
        slot.state.store(generation | phase, Ordering::Release);
        Found { slot, generation }
    }
}

/// A handle that was good a moment ago.
pub(crate) struct Found<C: Content> {
    slot: &'static Slot<C>,
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
        state & GENERATIONS == self.generation
            && !is_in(state, Phase::Free)
            && !is_in(state, Phase::Done)
    }

    #[inline]
    pub(crate) fn handle(&self) -> Handle {
        Handle(self.slot.name | self.generation)
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

    /// The content of a slot that was lent to this thread; `None` where it is so no more. [`Self::claim`]
    /// knows then.
    ///
    /// # Safety
    /// This thread has [`Taken::lend`] from its own, and has no other claim of it.
    #[inline(always)]
    pub(crate) unsafe fn claim_lent(self) -> Option<Claim<C>> {
        self.slot.lender.store(1, Ordering::Relaxed);
        // We store `lender`, then load the state; whoever takes the slot from us stores the state, then
        // loads `lender`. Pairs with the `heavy` in `claim`: one of the two sees the other.
        asymmetric::light();
        let lent = self.generation | IN_CALLBACK | Phase::Lent as u64;
        if self.slot.state.load(Ordering::Acquire) == lent {
            return Some(Claim { found: self, state: lent, is_lent: true });
        }
        self.slot.lender.store(0, Ordering::Relaxed);
        None
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
                if let Some(claim) = self.make_busy(state) {
                    return Some(claim);
                }
            } else if is_in(state, Phase::Lent) {
                if let Some(claim) = self.make_busy(state) {
                    return self.after_lender(claim);
                }
            } else if is_in(state, Phase::Busy) {
                // Contents are held for moments, never across a callback.
                pause(&mut spins);
            } else {
                return None;
            }
        }
    }

    #[inline]
    fn make_busy(self, state: u64) -> Option<Claim<C>> {
        let busy = state & !PHASES | Phase::Busy as u64;
        let won =
            self.slot.state.compare_exchange(state, busy, Ordering::Acquire, Ordering::Relaxed);
        won.is_ok().then_some(Claim { found: self, state: busy, is_lent: false })
    }

    /// Waits until the thread that the slot was lent to is not at the content.
    #[cold]
    fn after_lender(self, claim: Claim<C>) -> Option<Claim<C>> {
        // Pairs with the `light` in `claim_lent`, which says how.
        if !asymmetric::heavy() {
            // Nothing is known about the other: the slot stays its own, if it has not ended it.
            let lent = claim.state & !PHASES | Phase::Lent as u64;
            let _ended = self.slot.state.compare_exchange(
                claim.state,
                lent,
                Ordering::Release,
                Ordering::Relaxed,
            );
            std::mem::forget(claim);
            return None;
        }
        let mut spins = 0;
        while self.slot.lender.load(Ordering::Acquire) != 0 {
            pause(&mut spins);
        }
        if self.slot.state.load(Ordering::Acquire) == claim.state {
            return Some(claim);
        }
        // Ended by the other, who has overwritten our Busy.
        std::mem::forget(claim);
        None
    }

    /// Ends the flight of a content that was away: it is claimed.
    pub(crate) fn back(self) -> Option<Claim<C>> {
        let state = self.slot.state.load(Ordering::Acquire);
        if !self.is_good(state) || !is_in(state, Phase::Away) {
            return None;
        }
        self.make_busy(state)
    }

    /// The callback that the slot was lent for has returned. Gives the slot back if its handle is over
    /// already; else calls `look` with the content.
    #[inline]
    pub(crate) fn callback_returned<R>(
        self,
        look: impl FnOnce(Claim<C>) -> R,
    ) -> Result<R, Taken<C>> {
        let state = self.slot.state.load(Ordering::Acquire);
        if !is_in(state, Phase::Done) {
            // This thread is not at the content, so that it need not wait for itself.
            let lent = is_in(state, Phase::Lent).then(|| self.make_busy(state)).flatten();
            if let Some(mut claim) = lent.or_else(|| self.claim()) {
                claim.state &= !IN_CALLBACK;
                return Ok(look(claim));
            }
        }
        // Done, at the latest after the wait in `claim`: whoever ended it leaves the slot to us.
        self.slot.state.store(self.generation + GENERATION, Ordering::Release);
        Err(Taken(self.slot))
    }
}

/// Waits a moment for another thread.
fn pause(spins: &mut u32) {
    *spins += 1;
    if spins.is_multiple_of(64) {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

/// The content of a slot, for one thread.
pub(crate) struct Claim<C: Content> {
    found: Found<C>,
    /// The slot's state: Busy, or Lent to this very thread.
    state: u64,
    /// Which of the two. By itself, so that the compiler knows it where the claim was made.
    is_lent: bool,
}

impl<C: Content> Claim<C> {
    #[inline]
    pub(crate) fn is_in_callback(&self) -> bool {
        self.state & IN_CALLBACK != 0
    }

    /// Ends the handle. The slot is the caller's, unless the callback that it was lent for still runs:
    /// that one has it then.
    #[inline]
    pub(crate) fn end(self) -> Option<Taken<C>> {
        let Found { slot, generation } = self.found;
        if self.is_in_callback() {
            let was_lent = self.is_lent;
            self.leave(Phase::Done);
            if was_lent {
                slot.lender.store(0, Ordering::Release);
            }
            return None;
        }
        slot.state.store(generation + GENERATION, Ordering::Release);
        std::mem::forget(self);
        Some(Taken(slot))
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
        // SAFETY: the slot is Busy, and this is the claim that made it so; or it was Lent to this thread
        // when `lender` said already that this claim is at the content. Nobody else reaches it (see the
        // module).
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
        if self.is_lent {
            self.found.slot.lender.store(0, Ordering::Release);
            return;
        }
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
        const KIND: Kind = Kind::Object;
        type Shared = ();
    }
    static NUMBERS: Table<Number> = Table::new();

    fn handle(number: u32) -> Handle {
        let mut taken = NUMBERS.take().unwrap();
        taken.content().0 = number;
        taken.open().handle()
    }

    #[test]
    fn a_handle_names_its_content_until_it_ends_and_nothing_after() {
        let first = handle(7);
        assert!(!first.is_address());
        assert_eq!(NUMBERS.find(first).unwrap().claim().unwrap().0, 7);
        let taken = NUMBERS.find(first).unwrap().claim().unwrap().end().unwrap();
        assert!(NUMBERS.find(first).is_none());
        // The next generation of the same slot is another handle.
        let second = taken.open().handle();
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
        if !asymmetric::prepare() {
            return;
        }
        let found = NUMBERS.take().unwrap().lend();
        let handle = found.handle();
        assert!(NUMBERS.find(handle).unwrap().claim().unwrap().end().is_none());
        assert!(NUMBERS.find(handle).is_none());
        let found = found.callback_returned(|_| ()).unwrap_err().lend();
        let handle = found.handle();
        // SAFETY: lent to this thread, which has no claim of it.
        unsafe { assert!(found.claim_lent().unwrap().is_in_callback()) };
        assert!(matches!(found.callback_returned(|claim| claim.is_in_callback()), Ok(false)));
        // SAFETY: as above; it is not lent any more, which is looked at.
        unsafe { assert!(found.claim_lent().is_none()) };
        assert!(NUMBERS.find(handle).unwrap().claim().unwrap().end().is_some());
    }

    /// The thread that a slot is lent to and another one add to the same number; then both end it.
    #[test]
    fn a_lent_slot_is_taken_from_its_thread_between_two_looks_of_it() {
        if !asymmetric::prepare() {
            return;
        }
        let (to_other, handles) = std::sync::mpsc::sync_channel::<Handle>(0);
        let (to_us, dones) = std::sync::mpsc::channel::<bool>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for handle in handles {
                    let found = NUMBERS.find(handle);
                    for _ in 0..2 {
                        if let Some(mut claim) = found.and_then(Found::claim) {
                            claim.0 += 1;
                        }
                    }
                    let ended = found.and_then(Found::claim).map(|claim| (claim.0, claim.end()));
                    to_us.send(ended.is_some()).unwrap();
                }
            });
            let mut taken = NUMBERS.take().unwrap();
            let mut by_other = 0;
            for round in 0..2000 {
                taken.content().0 = 0;
                let found = taken.lend();
                to_other.send(found.handle()).unwrap();
                let mut added = 0;
                for _ in 0..round % 50 {
                    // SAFETY: lent to this thread, which has no claim of it.
                    let claim = unsafe { found.claim_lent() };
                    let Some(mut claim) = claim.or_else(|| found.claim()) else { break };
                    claim.0 += 1;
                    added += 1;
                    assert!((added..=added + 2).contains(&claim.0), "an addition was lost");
                }
                // SAFETY: as above.
                let claim = unsafe { found.claim_lent() }.or_else(|| found.claim());
                let ended_here = claim.map(Claim::end).is_some();
                let ended_there = dones.recv().unwrap();
                assert!(ended_here != ended_there, "ended by both or by none");
                by_other += u32::from(ended_there);
                taken = found.callback_returned(|_| ()).unwrap_err();
            }
            drop(to_other);
            println!("{by_other} of 2000 were ended by the other");
        });
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
