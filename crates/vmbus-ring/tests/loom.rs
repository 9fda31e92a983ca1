//! Models of the two index protocols, run by loom through every order in which two threads can meet
//! and every value a load may see:
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p vmbus-ring --test loom --release
//! ```
//!
//! The code is that of [`ReadEnd`] and [`WriteEnd`]; only the control words are loom's. A lost
//! wake-up ends in a deadlock, a byte reached too early in a causality violation: loom reports both.
//! The tests that must fail show that the models can: without any one of the fences, or with an
//! index stored relaxed, loom finds the fault.
#![cfg(loom)]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may stop at a surprise")]
#![allow(clippy::cast_possible_truncation, reason = "small test values")]
#![allow(clippy::arc_with_non_send_sync, reason = "loom's threads take turns on one of ours")]

use loom::cell::UnsafeCell;
use loom::sync::Notify;
use loom::sync::atomic::{AtomicU32, fence};
use loom::thread;
use std::sync::Arc;
use std::sync::atomic::Ordering::{self, Relaxed, SeqCst};

use vmbus_ring::{ControlWords, ReadEnd, Word, WriteEnd, initialize};

/// What one side leaves out.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Fault {
    None,
    Fence,
    Release,
}

/// Data area: four slots of 8 bytes, three of which may be full.
const SIZE: u32 = 32;
const SLOTS: usize = SIZE as usize / 8;

/// A packet's bytes. Only the indices order access to them: the cell, which is never looked into, lets
/// loom report an access that another thread's may meet; the value tells whether it is the right
/// packet.
struct Slot {
    access: UnsafeCell<()>,
    value: AtomicU32,
}

struct Shared {
    words: [AtomicU32; 5],
    slots: [Slot; SLOTS],
    to_reader: Notify,
    to_writer: Notify,
}

impl Shared {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            words: std::array::from_fn(|_| AtomicU32::new(0)),
            slots: std::array::from_fn(|_| Slot {
                access: UnsafeCell::new(()),
                value: AtomicU32::new(0),
            }),
            to_reader: Notify::new(),
            to_writer: Notify::new(),
        })
    }
}

/// One side's way to the control words.
struct Side(Arc<Shared>, Fault);

impl Side {
    fn atomic(&self, word: Word) -> &AtomicU32 {
        let [write, read, mask, pending, features] = &self.0.words;
        match word {
            Word::WriteIndex => write,
            Word::ReadIndex => read,
            Word::InterruptMask => mask,
            Word::PendingSendSize => pending,
            Word::FeatureBits => features,
        }
    }
}

impl ControlWords for Side {
    fn load(&self, word: Word, order: Ordering) -> u32 {
        self.atomic(word).load(order)
    }

    fn store(&self, word: Word, value: u32, order: Ordering) {
        let order = if self.1 == Fault::Release { Relaxed } else { order };
        self.atomic(word).store(value, order);
    }

    fn full_fence(&self) {
        if self.1 != Fault::Fence {
            fence(SeqCst);
        }
    }
}

struct Writer {
    end: WriteEnd<Side>,
    shared: Arc<Shared>,
    next: u32,
}

impl Writer {
    fn new(shared: &Arc<Shared>, fault: Fault) -> Self {
        let end = WriteEnd::new(Side(Arc::clone(shared), fault), SIZE).unwrap();
        Self { end, shared: Arc::clone(shared), next: 1 }
    }

    /// Writes `count` packets of 8 bytes and publishes them at once.
    fn send(&mut self, count: u32) {
        for _ in 0..count {
            let slot = &self.shared.slots[self.end.position() as usize / 8];
            slot.access.with_mut(|_| slot.value.store(self.next, Relaxed));
            self.next += 1;
            self.end.step(8);
        }
        if self.end.publish() {
            self.shared.to_reader.notify();
        }
    }

    /// Waits until `bytes` are free.
    fn wait_for(&mut self, bytes: u32) {
        while !self.end.request_space(bytes).unwrap() {
            self.shared.to_writer.wait();
            self.end.clear_request();
        }
        assert!(self.end.free() >= bytes);
    }
}

struct Reader {
    end: ReadEnd<Side>,
    shared: Arc<Shared>,
    next: u32,
}

impl Reader {
    fn new(shared: &Arc<Shared>, fault: Fault) -> Self {
        let end = ReadEnd::new(Side(Arc::clone(shared), fault), SIZE).unwrap();
        Self { end, shared: Arc::clone(shared), next: 1 }
    }

    /// Reads at most `count` packets that are there and gives their space back at once.
    fn receive(&mut self, count: u32) {
        for _ in 0..count {
            if self.end.available() == 0 && self.end.refresh().unwrap() == 0 {
                break;
            }
            let slot = &self.shared.slots[self.end.position() as usize / 8];
            slot.access.with(|_| assert_eq!(slot.value.load(Relaxed), self.next));
            self.next += 1;
            self.end.step(8);
        }
        if self.end.publish() {
            self.shared.to_writer.notify();
        }
    }

    /// Reads until `packets` in all have come, `batch` at a time, and sleeps whenever the ring is
    /// empty.
    fn receive_all(&mut self, packets: u32, batch: u32) {
        while self.next <= packets {
            self.receive(batch);
            if self.next <= packets && !self.end.unmask_and_check().unwrap() {
                self.shared.to_reader.wait();
                self.end.mask();
            }
        }
    }
}

/// Explores all orders with at most so many preemptions; switches at a wait come on top. The faults
/// below all show with two. (Without a bound the single protocols pass as well, in a minute each.)
fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// A reader that sleeps when the ring is empty gets every packet: no publication goes unnoticed.
fn packets_wake_the_reader(batches: &'static [u32], read_batch: u32, writer: Fault, reader: Fault) {
    explore(5, move || {
        let shared = Shared::new();
        initialize(&Side(Arc::clone(&shared), Fault::None));
        let mut write = Writer::new(&shared, writer);
        let mut read = Reader::new(&shared, reader);
        let sender = thread::spawn(move || batches.iter().for_each(|count| write.send(*count)));
        read.receive_all(batches.iter().sum(), read_batch);
        sender.join().unwrap();
    });
}

#[test]
fn packets_wake_the_reader_one_by_one() {
    packets_wake_the_reader(&[1, 1], 1, Fault::None, Fault::None);
}

#[test]
fn packets_wake_the_reader_in_batches() {
    packets_wake_the_reader(&[2, 1], 2, Fault::None, Fault::None);
}

#[test]
fn packets_wake_the_reader_in_growing_batches() {
    packets_wake_the_reader(&[1, 2], 3, Fault::None, Fault::None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_writers_fence_a_packet_wakes_nobody() {
    packets_wake_the_reader(&[1], 1, Fault::Fence, Fault::None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_readers_fence_a_packet_wakes_nobody() {
    packets_wake_the_reader(&[1], 1, Fault::None, Fault::Fence);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_release_the_reader_is_shown_unwritten_bytes() {
    packets_wake_the_reader(&[1], 1, Fault::Release, Fault::None);
}

/// A writer that sleeps when the ring is full gets the space it asked for, and may use it.
fn space_wakes_the_writer(reads: &'static [u32], wanted: u32, writer: Fault, reader: Fault) {
    explore(5, move || {
        let shared = Shared::new();
        initialize(&Side(Arc::clone(&shared), Fault::None));
        let mut write = Writer::new(&shared, writer);
        let mut read = Reader::new(&shared, reader);
        write.send(3); // full
        let sender = thread::spawn(move || {
            write.wait_for(wanted * 8);
            write.send(wanted);
        });
        reads.iter().for_each(|count| read.receive(*count));
        sender.join().unwrap();
        // The bytes that were there before the writer slept, then those it wrote over them.
        read.receive(3 + wanted);
        assert_eq!(read.next, 3 + wanted + 1);
    });
}

#[test]
fn space_wakes_the_writer_packet_by_packet() {
    space_wakes_the_writer(&[1, 1, 1], 1, Fault::None, Fault::None);
    space_wakes_the_writer(&[1, 1], 2, Fault::None, Fault::None);
}

#[test]
fn space_wakes_the_writer_in_batches() {
    space_wakes_the_writer(&[2, 1], 2, Fault::None, Fault::None);
    space_wakes_the_writer(&[1, 2], 3, Fault::None, Fault::None);
    space_wakes_the_writer(&[3], 3, Fault::None, Fault::None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_writers_fence_space_wakes_nobody() {
    space_wakes_the_writer(&[1], 1, Fault::Fence, Fault::None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_readers_fence_space_wakes_nobody() {
    space_wakes_the_writer(&[1], 1, Fault::None, Fault::Fence);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_release_the_writer_is_given_bytes_still_read() {
    // Two packets: the first goes where nothing was, the second over the first one read.
    space_wakes_the_writer(&[2], 2, Fault::None, Fault::Release);
}

/// Both at once: more packets than the ring holds, both ends asleep whenever they can be.
#[test]
fn both_ends_sleep_and_all_packets_arrive() {
    explore(3, || {
        let shared = Shared::new();
        initialize(&Side(Arc::clone(&shared), Fault::None));
        let mut write = Writer::new(&shared, Fault::None);
        let mut read = Reader::new(&shared, Fault::None);
        let sender = thread::spawn(move || {
            for batch in [2, 2, 1] {
                write.wait_for(batch * 8);
                write.send(batch);
            }
        });
        read.receive_all(5, 2);
        sender.join().unwrap();
    });
}
