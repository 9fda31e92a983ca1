//! What the calling thread is doing: its interrupt request level, and the callbacks it is in.
#![allow(unsafe_code, reason = "exports a function")]

use std::cell::Cell;

use crate::handle::Handle;
use crate::verifier::violation;

/// PASSIVE_LEVEL: the thread may sleep.
pub(crate) const PASSIVE: u8 = 0;
/// DISPATCH_LEVEL: it must not.
pub(crate) const DISPATCH: u8 = 2;

struct Context {
    irql: Cell<u8>,
    /// The channel whose state-change callback runs on this thread.
    state_callback: Cell<u64>,
    /// The channel whose packet callback runs on this thread.
    packet_callback: Cell<u64>,
}

thread_local! {
    static CONTEXT: Context = const {
        Context { irql: Cell::new(PASSIVE), state_callback: Cell::new(0), packet_callback: Cell::new(0) }
    };
}

/// `KmclCurrentIrql`, behind KeGetCurrentIrql.
#[unsafe(no_mangle)]
pub extern "C" fn KmclCurrentIrql() -> u8 {
    CONTEXT.with(|it| it.irql.get())
}

/// Runs a callback that may sleep, of `channel`.
pub(crate) fn in_state_callback<R>(channel: Handle, callback: impl FnOnce() -> R) -> R {
    CONTEXT.with(|it| {
        let before = (it.irql.replace(PASSIVE), it.state_callback.replace(channel.0));
        let result = callback();
        it.irql.set(before.0);
        it.state_callback.set(before.1);
        result
    })
}

/// Runs a packet callback of `channel` at `irql`.
#[inline]
pub(crate) fn in_packet_callback<R>(channel: Handle, irql: u8, callback: impl FnOnce() -> R) -> R {
    CONTEXT.with(|it| {
        let before = (it.irql.replace(irql), it.packet_callback.replace(channel.0));
        let result = callback();
        it.irql.set(before.0);
        it.packet_callback.set(before.1);
        result
    })
}

/// Runs a completion routine, which must not sleep.
#[inline]
pub(crate) fn at_dispatch<R>(callback: impl FnOnce() -> R) -> R {
    CONTEXT.with(|it| {
        let before = it.irql.replace(DISPATCH);
        let result = callback();
        it.irql.set(before);
        result
    })
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
    let (state, packet) = CONTEXT.with(|it| (it.state_callback.get(), it.packet_callback.get()));
    let rule = if state == channel.0 {
        "must not be called in a state-change callback of its channel"
    } else if packet == channel.0 {
        "must not be called in a packet callback of its channel"
    } else {
        return true;
    };
    violation(function, "Channel", rule);
    false
}

/// Whether this thread is in a packet callback of `channel`.
pub(crate) fn is_in_packet_callback(channel: Handle) -> bool {
    CONTEXT.with(|it| it.packet_callback.get()) == channel.0
}
