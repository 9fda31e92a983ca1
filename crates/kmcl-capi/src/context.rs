//! What the calling thread is doing: its interrupt request level, and the callbacks it is in.
#![allow(unsafe_code, reason = "exports a function, and finds callbacks on its own stack")]

use std::cell::Cell;

use crate::handle::{Found, Handle};
use crate::incoming::Incoming;
use crate::verifier::violation;

/// PASSIVE_LEVEL: the thread may sleep.
pub(crate) const PASSIVE: u8 = 0;
/// DISPATCH_LEVEL: it must not.
pub(crate) const DISPATCH: u8 = 2;

/// One callback that this thread is in: on the stack of whoever calls it.
struct Frame {
    /// The one around it; null for the outermost.
    outer: *const Frame,
    /// What the callback is of; 0 for a completion routine.
    channel: Handle,
    in_what: Callback,
    irql: u8,
    /// The packet that the callback is about, and the handle of that.
    packet: Option<Lent>,
    handle: Handle,
}

/// A packet that is lent to this thread.
#[derive(Clone, Copy)]
pub(crate) struct Lent {
    pub(crate) packet: Found<Incoming>,
    pub(crate) payload: Place,
}

/// Where C was told that a payload is; only compared.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) address: usize,
    pub(crate) len: usize,
}

impl From<&[u8]> for Place {
    #[inline]
    fn from(bytes: &[u8]) -> Self {
        Self { address: bytes.as_ptr().addr(), len: bytes.len() }
    }
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Callback {
    StateChange,
    Packet,
    Completion,
}

thread_local! {
    /// The innermost callback of this thread.
    static INNERMOST: Cell<*const Frame> = const { Cell::new(core::ptr::null()) };
}

/// Runs `callback` in a frame of its own.
#[inline]
fn within<R>(mut frame: Frame, callback: impl FnOnce() -> R) -> R {
    /// Takes the frame off, also where the callback panics.
    struct Off(*const Frame);
    impl Drop for Off {
        #[inline]
        fn drop(&mut self) {
            INNERMOST.set(self.0);
        }
    }
    frame.outer = INNERMOST.get();
    let _off = Off(frame.outer);
    INNERMOST.set(&raw const frame);
    callback()
}

/// The frames of this thread from the innermost on, until `look` has found what it looks for.
#[inline]
fn find<R>(mut look: impl FnMut(&Frame) -> Option<R>) -> Option<R> {
    let mut next = INNERMOST.get();
    // SAFETY: `within` has frames in the list only as long as they are on this thread's stack, and nobody
    // changes them meanwhile.
    while let Some(frame) = unsafe { next.as_ref() } {
        if let Some(found) = look(frame) {
            return Some(found);
        }
        next = frame.outer;
    }
    None
}

fn is_in(what: Callback, channel: Handle) -> bool {
    find(|it| (it.in_what == what && it.channel == channel).then_some(())).is_some()
}

/// `KmclCurrentIrql`, behind KeGetCurrentIrql.
#[unsafe(no_mangle)]
pub extern "C" fn KmclCurrentIrql() -> u8 {
    find(|it| Some(it.irql)).unwrap_or(PASSIVE)
}

impl Frame {
    #[inline]
    fn new(channel: Handle, in_what: Callback, irql: u8) -> Self {
        let outer = core::ptr::null();
        Self { outer, channel, in_what, irql, packet: None, handle: Handle(0) }
    }
}

/// Runs a callback that may sleep, of `channel`.
pub(crate) fn in_state_callback<R>(channel: Handle, callback: impl FnOnce() -> R) -> R {
    within(Frame::new(channel, Callback::StateChange, PASSIVE), callback)
}

/// Runs a callback of `channel` about its packets as a whole, at `irql`.
pub(crate) fn in_packet_callback<R>(channel: Handle, irql: u8, callback: impl FnOnce() -> R) -> R {
    within(Frame::new(channel, Callback::Packet, irql), callback)
}

/// Runs the callback of one packet of `channel`, lent to this thread, at `irql`.
#[inline]
pub(crate) fn with_packet<R>(
    channel: Handle,
    irql: u8,
    packet: Found<Incoming>,
    payload: Place,
    callback: impl FnOnce(Handle) -> R,
) -> R {
    let handle = packet.handle();
    let frame = Frame::new(channel, Callback::Packet, irql);
    let packet = Some(Lent { packet, payload });
    within(Frame { packet, handle, ..frame }, || callback(handle))
}

/// The packet of this name, if it is that of the innermost callback.
#[inline(always)]
pub(crate) fn lent(handle: Handle) -> Option<Lent> {
    // SAFETY: as for `find`.
    let frame = unsafe { INNERMOST.get().as_ref() }?;
    if frame.handle == handle { frame.packet } else { None }
}

/// Runs a completion routine, which must not sleep.
#[inline]
pub(crate) fn at_dispatch<R>(callback: impl FnOnce() -> R) -> R {
    within(Frame::new(Handle(0), Callback::Completion, DISPATCH), callback)
}

/// Notices a call that may sleep on a thread that must not (D-13).
pub(crate) fn must_be_passive(function: &'static str) {
    if KmclCurrentIrql() != PASSIVE {
        violation(
            function,
            "the caller",
            "is at DISPATCH_LEVEL and must be at PASSIVE_LEVEL (D-13)",
        );
    }
}

/// Notices a call that a callback of the same channel must not make; `false` then.
pub(crate) fn outside_callbacks(function: &'static str, channel: Handle) -> bool {
    let rule = if is_in(Callback::StateChange, channel) {
        "must not be called in a state-change callback of its channel"
    } else if is_in(Callback::Packet, channel) {
        "must not be called in a packet callback of its channel"
    } else {
        return true;
    };
    violation(function, "Channel", rule);
    false
}

/// Whether this thread is in a packet callback of `channel`.
pub(crate) fn is_in_packet_callback(channel: Handle) -> bool {
    is_in(Callback::Packet, channel)
}
