//! A ready-made thread that drives many KMCL channels.
//!
//! `kmcl` brings no event loop: a channel hands out what to wait on and does its work in
//! [`Channel::process`](kmcl::Channel::process). A [`Worker`] is such a loop, for whoever has none of
//! his own: one thread, many channels, and beside them other descriptors that the devices wait for
//! ([`Source`]), such as the completions of their disk I/O.
//!
//! # One turn
//!
//! A *turn* takes everything that is ready at its start and runs each once, in the order in which it
//! became ready: a channel for at most [`PACKETS_PER_TURN`] packets, a source for one call. Whatever
//! has more to do joins the end of the queue. So the wait of a channel is bounded by the number of its
//! neighbours, not by how much these have to do. Between two turns the worker looks for new doorbells
//! without sleeping, and sleeps only when nothing is ready.
//!
//! # No wake-up is lost
//!
//! A channel is to be run for two reasons, and each holds until the run has begun:
//!
//! - *Its doorbell rang.* Descriptors are watched by level, not by edge, so a doorbell is reported by
//!   every look until it is acknowledged; and that is done just before `process` looks at the rings.
//! - *It was woken* ([`Waker`](std::task::Waker)). The waker queues the channel under the lock of the
//!   ready queue, and the worker takes it off the queue under the same lock before it runs it. A
//!   wake-up before that moment is answered by this run; one after it queues the channel again.
//!
//! The worker decides to sleep under that lock too, and leaves a mark there; whoever queues
//! something and finds the mark rings the worker's own descriptor. Either the worker sees what was
//! queued, or the other side sees the mark.
//!
//! # Panics in a callback
//!
//! A device that panics takes its own channel down and no other: the worker catches the panic, logs
//! it, and lets go of the channel as [`Worker::remove`] does, so that [`Worker::drives`] says
//! `false`. What the device remembers is not to be trusted after a panic, so nothing is delivered to
//! it any more; the peer sees a device that no longer answers, until the channel's owner disables it,
//! which works as ever.

#![forbid(unsafe_code)]

mod error;
mod roster;
mod shared;
mod task;
mod turn;
mod worker;

pub use error::WorkerError;
pub use task::Source;
pub use worker::{SourceId, Worker};

/// Most packets that one channel receives before its neighbours have their turn.
///
/// Large enough that what a turn costs (one system call, one look at the queue) is little per
/// packet; small enough that a neighbour waits for microseconds.
pub const PACKETS_PER_TURN: u32 = 64;

/// Most channels and sources that one worker drives.
pub const MAX_TASKS: usize = 4096;

/// Holds the README's code to the crates: it is compiled with the documentation's examples.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
