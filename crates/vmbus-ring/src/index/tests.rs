use std::sync::atomic::{AtomicU32, Ordering, fence};

use super::*;
use crate::initialize;

const SIZE: u32 = 64;
const MOST: u32 = SIZE - 8;

#[derive(Default)]
struct Words([AtomicU32; 5]);

impl Words {
    fn atomic(&self, word: Word) -> &AtomicU32 {
        &self.0[word as usize]
    }

    fn set(&self, word: Word, value: u32) {
        self.atomic(word).store(value, Relaxed);
    }

    fn get(&self, word: Word) -> u32 {
        self.atomic(word).load(Relaxed)
    }
}

impl ControlWords for &Words {
    fn load(&self, word: Word, order: Ordering) -> u32 {
        self.atomic(word).load(order)
    }

    fn store(&self, word: Word, value: u32, order: Ordering) {
        self.atomic(word).store(value, order);
    }

    fn full_fence(&self) {
        fence(Ordering::SeqCst);
    }
}

/// A reader with `free` bytes of the ring free, having read nothing.
fn reader(words: &Words, start: u32, free: u32) -> ReadEnd<&Words> {
    words.set(Word::ReadIndex, start);
    words.set(Word::WriteIndex, forward(start, MOST - free, SIZE));
    words.set(Word::FeatureBits, 1);
    ReadEnd::new(words, SIZE).unwrap()
}

/// The pending size in every reading that writers are known to have of it.
#[test]
fn space_is_signalled_on_every_reading_of_the_pending_size() {
    for (pending, before, after, expected) in [
        (0, 0, 56, false),
        // A multiple of 8: reached, or (for those who want more than that) passed.
        (24, 0, 16, false),
        (24, 16, 24, true),
        (24, 0, 56, true),
        (24, 24, 32, true),
        (24, 32, 40, false),
        // Between two multiples: both.
        (12, 0, 8, true),
        (12, 8, 16, true),
        (12, 16, 24, true),
        (12, 24, 32, false),
        (4, 0, 8, true),
        (4, 8, 16, true),
        (4, 16, 24, false),
        // One less than the size, as some guests ask: an empty ring.
        (63, 0, 48, false),
        (63, 0, 56, true),
        (63, 48, 56, true),
        (56, 48, 56, true),
        (64, 48, 56, true),
        (u32::MAX, 0, 48, false),
        (u32::MAX, 48, 56, true),
    ] {
        for start in (0..SIZE).step_by(8) {
            let words = Words::default();
            let mut end = reader(&words, start, before);
            assert_eq!(end.refresh(), Ok(MOST - before));
            end.step(after - before);
            words.set(Word::PendingSendSize, pending);
            let row = format!("pending={pending} before={before} after={after} start={start}");
            assert_eq!(end.publish(), expected, "{row}");
            assert!(!end.publish(), "{row}: nothing more was freed");

            // Without the feature bit the word means nothing.
            let words = Words::default();
            let mut end = reader(&words, start, before);
            let _ = end.refresh();
            end.step(after - before);
            words.set(Word::PendingSendSize, pending);
            words.set(Word::FeatureBits, 0xffff_fffe);
            assert!(!end.publish(), "{row}: no feature bit");
        }
    }
}

/// What counts as free is what the writer has published by now, not what was known when reading.
#[test]
fn space_is_counted_with_the_writers_latest_index() {
    let words = Words::default();
    let mut end = reader(&words, 0, 40);
    assert_eq!(end.refresh(), Ok(16));
    end.step(16);
    // Meanwhile: 32 bytes more, and a request for 32. From 8 free to 24: not yet.
    words.set(Word::WriteIndex, 48);
    words.set(Word::PendingSendSize, 32);
    assert!(!end.publish());
    assert_eq!(end.refresh(), Ok(32));
    end.step(8);
    assert!(end.publish());
}

#[test]
fn in_doubt_a_signal_is_given() {
    for write in [SIZE, 3, u32::MAX] {
        let words = Words::default();
        let mut end = reader(&words, 0, 40);
        assert_eq!(end.refresh(), Ok(16));
        end.step(8);
        words.set(Word::WriteIndex, write);
        words.set(Word::PendingSendSize, 8);
        assert!(end.publish(), "{write}");
        assert!(end.refresh().is_err(), "{write}");
    }
}

/// The reader signals a blocked writer for every size and start, and not before it has to.
#[test]
fn whoever_waits_for_space_is_told() {
    for start in (0..SIZE).step_by(8) {
        for wanted in 1..=MOST {
            let words = Words::default();
            words.set(Word::WriteIndex, start);
            words.set(Word::ReadIndex, start);
            let mut write = WriteEnd::new(&words, SIZE).unwrap();
            let mut read = ReadEnd::new(&words, SIZE).unwrap();
            write.step(MOST);
            assert!(!write.publish());
            assert_eq!(write.request_space(wanted), Ok(false));
            let mut signals = 0;
            for freed in (8..=MOST).step_by(8) {
                let _ = read.refresh();
                read.step(8);
                let signal = read.publish();
                let first = freed >= wanted && freed < wanted + 8;
                assert!(signal || !first, "start={start} wanted={wanted} freed={freed}");
                assert!(!signal || freed >= wanted, "start={start} wanted={wanted} freed={freed}");
                signals += u32::from(signal);
            }
            assert!(signals <= 2, "start={start} wanted={wanted}: {signals} signals");
        }
    }
}

#[test]
fn distances_go_around() {
    for (from, to, expected) in [(0, 0, 0), (0, 56, 56), (56, 0, 8), (8, 0, 56), (56, 56, 0)] {
        assert_eq!(distance(from, to, SIZE), expected, "{from} {to}");
        assert_eq!(forward(from, expected, SIZE), to, "{from} {to}");
        assert_eq!(backward(to, expected, SIZE), from, "{from} {to}");
    }
}

#[test]
fn a_fresh_ring_is_empty_and_says_what_it_can() {
    let words = Words(std::array::from_fn(|_| AtomicU32::new(0xdead_beef)));
    initialize(&&words);
    let all = [
        Word::WriteIndex,
        Word::ReadIndex,
        Word::InterruptMask,
        Word::PendingSendSize,
        Word::FeatureBits,
    ];
    assert_eq!(all.map(|word| words.get(word)), [0, 0, 0, 0, 1]);
    // A host sets the bit on its own ring, whatever the guest wrote there, and keeps the others.
    words.set(Word::FeatureBits, 0x10);
    words.set(Word::PendingSendSize, 99);
    let _ = WriteEnd::new(&words, SIZE).unwrap();
    assert_eq!(all.map(|word| words.get(word)), [0, 0, 0, 0, 0x11]);
    let _ = ReadEnd::new(&words, SIZE).unwrap();
    assert_eq!(words.get(Word::InterruptMask), 1);
}

/// Both ends go on where they were kept, whatever the ring's own words say by then, and show it.
#[test]
fn an_end_goes_on_where_it_was_kept() {
    let words = Words::default();
    for (read, write, lie) in [(0, 0, 8), (8, 32, 56), (56, 40, 0), (48, 8, 24)] {
        words.set(Word::ReadIndex, read);
        words.set(Word::WriteIndex, write);
        words.set(Word::InterruptMask, 0);
        let mut reader = ReadEnd::new(&words, SIZE).unwrap();
        words.set(Word::ReadIndex, lie);
        reader.resume_at(read).unwrap();
        assert_eq!((reader.position(), words.get(Word::ReadIndex)), (read, read));
        assert_eq!(words.get(Word::InterruptMask), 1, "masked, like a new end");
        assert_eq!(reader.refresh(), Ok(distance(read, write, SIZE)), "{read} {write}");

        let mut writer = WriteEnd::new(&words, SIZE).unwrap();
        words.set(Word::WriteIndex, lie);
        writer.resume_at(write).unwrap();
        assert_eq!((writer.position(), words.get(Word::WriteIndex)), (write, write));
        assert_eq!(writer.free(), MOST - distance(read, write, SIZE), "{read} {write}");
        assert!(!writer.publish(), "nothing is new");
    }
}

/// What is no position leaves an end, and the ring, as they were.
#[test]
fn an_end_does_not_go_on_where_no_packet_can_be() {
    let words = Words::default();
    words.set(Word::ReadIndex, 8);
    words.set(Word::WriteIndex, 24);
    let mut reader = ReadEnd::new(&words, SIZE).unwrap();
    let mut writer = WriteEnd::new(&words, SIZE).unwrap();
    words.set(Word::InterruptMask, 0);
    for none in [4, 7, SIZE, SIZE + 8, u32::MAX - 7] {
        assert!(reader.resume_at(none).is_err(), "{none}");
        assert!(writer.resume_at(none).is_err(), "{none}");
        assert_eq!((reader.position(), writer.position()), (8, 24), "{none}");
        assert_eq!((words.get(Word::ReadIndex), words.get(Word::WriteIndex)), (8, 24), "{none}");
        assert_eq!(words.get(Word::InterruptMask), 0, "{none}");
    }
    // A writer looks at the reader's index as well: where that is none nothing is free.
    words.set(Word::ReadIndex, 5);
    assert!(writer.resume_at(32).is_err());
    assert_eq!((writer.position(), words.get(Word::WriteIndex)), (24, 24));
}
