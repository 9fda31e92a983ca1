//! One suite over every form a ring takes: mapped as a circle, page by page, and mapped in memory
//! whose owner keeps track of writes.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test may stop at a surprise"
)]
#![allow(clippy::cast_possible_truncation, reason = "small test values")]

use std::collections::VecDeque;
use std::fs::File;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmbus_memory::{GuestMemory, MappingBudget, RingPages};
use vmbus_ring::{
    Index, OutgoingPacket, PushError, RingError, RingReader, RingWriter, initialize,
    packet_ring_bytes,
};
use vmbus_wire::packet::{PacketError, PacketKind};

const PAGE: u32 = 4096;

/// Makes a ring of `pfns`.
#[derive(Clone, Copy)]
struct Form {
    name: &'static str,
    memory: fn(pages: u64) -> GuestMemory,
    pages: fn(&GuestMemory, &[u64]) -> RingPages,
}

fn mapped_pages(memory: &GuestMemory, pfns: &[u64]) -> RingPages {
    let pages = RingPages::map(memory, pfns, &MappingBudget::default()).unwrap();
    assert!(pages.is_mapped());
    pages
}

fn plain_memory(pages: u64) -> GuestMemory {
    GuestMemory::memfd(pages * 4096).unwrap()
}

const MAPPED: Form = Form { name: "mapped", memory: plain_memory, pages: mapped_pages };

const SCATTERED: Form = Form {
    name: "scattered",
    memory: plain_memory,
    pages: |memory, pfns| RingPages::scattered(memory, pfns).unwrap(),
};

const TRACKED: Form = Form {
    name: "tracked",
    memory: |pages| {
        let file = GuestMemory::memfd(pages * 4096).unwrap();
        let (fd, offset) = file.regions()[0].backing().unwrap();
        let file = FileOffset::new(File::from(fd.try_clone_to_owned().unwrap()), offset);
        let ranges = [(GuestAddress(0), pages as usize * 4096, Some(file))];
        let ram = GuestMemoryMmap::<AtomicBitmap>::from_ranges_with_files(ranges).unwrap();
        GuestMemory::from_ram(Arc::new(ram)).unwrap()
    },
    pages: mapped_pages,
};

macro_rules! suite {
    ($($test:ident)*) => {
        mod mapped { $(#[test] fn $test() { super::$test(super::MAPPED) })* }
        mod scattered { $(#[test] fn $test() { super::$test(super::SCATTERED) })* }
        mod tracked { $(#[test] fn $test() { super::$test(super::TRACKED) })* }
    };
}

suite! {
    packets_wrap_at_every_offset
    rings_of_odd_sizes_run_many_laps
    a_full_ring_takes_nothing_and_an_empty_one_gives_nothing
    parts_are_joined_and_padded_with_zeros
    extensions_are_read_as_bytes_and_as_words
    short_buffers_get_the_first_bytes
    nothing_shows_before_it_is_published
    the_longest_packet_fits_a_large_ring
    indices_left_by_others_are_adopted
    lies_about_the_write_index_are_errors
    lies_about_the_read_index_are_errors
    lies_in_a_descriptor_are_errors
    a_packet_is_what_it_was_when_it_was_checked
    signals_are_given_when_they_must_be
    space_is_asked_for_and_told
    two_threads_lose_nothing
    rings_behave_like_queues
}

/// A ring with both of its ends, and the peer's way to spoil it.
struct Rig {
    writer: RingWriter,
    reader: RingReader,
    raw: RingPages,
    form: Form,
}

impl Rig {
    /// A ring of `data_pages` pages of data, which lie in an order of their own.
    fn new(form: Form, data_pages: u32) -> Self {
        Self::starting_at(form, data_pages, 0)
    }

    fn starting_at(form: Form, data_pages: u32, index: u32) -> Self {
        let pfns: Vec<u64> = (0..=u64::from(data_pages)).map(|n| n ^ 1).collect();
        let memory = (form.memory)(u64::from(data_pages) + 2);
        let pages = || (form.pages)(&memory, &pfns);
        let raw = pages();
        initialize(&raw);
        raw.write(0, &vec![0xa5; raw.data_len() as usize]);
        set_in(&raw, index);
        set_out(&raw, index);
        let writer = RingWriter::new(pages()).unwrap();
        let reader = RingReader::new(pages()).unwrap();
        Self { writer, reader, raw, form }
    }

    fn push(&mut self, id: u64, payload: &[u8]) -> Result<(), PushError> {
        self.writer.push(&in_band(id, &[payload]))
    }

    /// The next packet's id and payload, stepped over.
    fn pop(&mut self) -> Option<(u64, Vec<u8>)> {
        let packet = self.reader.peek().unwrap()?;
        let mut payload = vec![0; packet.payload_len as usize];
        assert_eq!(packet.copy_payload(&mut payload), payload.len());
        let id = packet.transaction_id;
        self.reader.advance();
        Some((id, payload))
    }
}

fn in_band<'a>(id: u64, payload: &'a [&'a [u8]]) -> OutgoingPacket<'a> {
    OutgoingPacket {
        kind: PacketKind::InBand,
        wants_completion: true,
        transaction_id: id,
        extension: &[],
        payload,
    }
}

fn set_in(raw: &RingPages, index: u32) {
    raw.control_word::<0x0>().store(index, Relaxed);
}

fn set_out(raw: &RingPages, index: u32) {
    raw.control_word::<0x4>().store(index, Relaxed);
}

fn word<const OFFSET: usize>(raw: &RingPages) -> u32 {
    raw.control_word::<OFFSET>().load(Relaxed)
}

/// Bytes that differ from packet to packet and from place to place.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

fn packets_wrap_at_every_offset(form: Form) {
    for start in (0..2 * PAGE).step_by(8) {
        let mut rig = Rig::starting_at(form, 2, start);
        for (id, len) in [(1, 0), (2, 8), (3, 61), (4, 300)] {
            let extension = pattern(id + 10, 40);
            rig.writer
                .push(&OutgoingPacket {
                    kind: PacketKind::GpaDirect,
                    extension: &[&extension],
                    ..in_band(id, &[&pattern(id, len)])
                })
                .unwrap();
            let _ = rig.writer.publish();
            let packet = rig.reader.peek().unwrap().unwrap();
            let mut got = vec![0; packet.extension_len as usize];
            packet.copy_extension(&mut got);
            assert_eq!(got, extension, "{} start={start} len={len}", form.name);
            let (got_id, payload) = rig.pop().unwrap();
            assert_eq!(got_id, id);
            assert_eq!(payload, padded(&pattern(id, len)), "{} start={start} len={len}", form.name);
            let _ = rig.reader.publish();
        }
        assert!(rig.pop().is_none());
    }
}

/// Sizes that are no powers of two, packets that share no factor with them.
fn rings_of_odd_sizes_run_many_laps(form: Form) {
    for data_pages in [1, 2, 3, 5, 7, 16] {
        let mut rig = Rig::new(form, data_pages);
        let mut queue = VecDeque::new();
        for id in 0..3000u64 {
            let payload = pattern(id, (id * 37 % 613) as usize);
            while rig.push(id, &payload).is_err() {
                let _ = rig.writer.publish();
                let expected: (u64, Vec<u8>) = queue.pop_front().unwrap();
                assert_eq!(rig.pop().unwrap(), expected, "{} {data_pages} pages", form.name);
                let _ = rig.reader.publish();
            }
            queue.push_back((id, padded(&payload)));
        }
        let _ = rig.writer.publish();
        for expected in queue {
            assert_eq!(rig.pop().unwrap(), expected, "{} {data_pages} pages", form.name);
        }
        assert!(rig.pop().is_none());
    }
}

fn a_full_ring_takes_nothing_and_an_empty_one_gives_nothing(form: Form) {
    let mut rig = Rig::new(form, 1);
    assert!(rig.pop().is_none());
    assert!(rig.reader.is_empty().unwrap());
    assert_eq!(rig.writer.free(), Ok(PAGE - 8));
    // 88 bytes each: 46 fit into 4088 bytes, and leave 40.
    for id in 0..46 {
        rig.push(id, &[1; 64]).unwrap();
    }
    let full = |needed, free| Err(PushError::Full { needed, free });
    assert_eq!(rig.push(46, &[1; 64]), full(88, 40));
    assert_eq!(rig.push(46, &[1; 17]), full(48, 40));
    assert_eq!(rig.push(46, &[1; 16]), Ok(()));
    assert_eq!(rig.push(47, &[]), full(24, 0));
    assert_eq!(rig.writer.free_cached(), 0);
    let _ = rig.writer.publish();
    assert_eq!(word::<0x0>(&rig.raw), PAGE - 8, "the last 8 bytes stay free");
    assert!(!rig.reader.is_empty().unwrap());

    assert_eq!(rig.pop().unwrap().0, 0);
    assert_eq!(rig.push(47, &[]), full(24, 0), "read, but not given back yet");
    let _ = rig.reader.publish();
    assert_eq!(rig.push(47, &[1; 64]), Ok(()));
    assert_eq!(rig.push(48, &[]), full(24, 0));

    // What never fits is not "full".
    let too_large = |needed| Err(PushError::TooLarge { needed, max: PAGE - 8 });
    assert_eq!(rig.push(48, &[0; 4096 - 32]), full(PAGE - 8, 0));
    assert_eq!(rig.push(48, &[0; 4096 - 31]), too_large(4096));
    assert_eq!(rig.push(48, &vec![0; 1 << 20]), too_large((1 << 20) + 24));
    assert_eq!(rig.writer.max_packet_bytes(), PAGE - 8);

    let _ = rig.writer.publish();
    let ids: Vec<u64> = std::iter::from_fn(|| rig.pop()).map(|(id, _)| id).collect();
    assert_eq!(ids, (1..48).collect::<Vec<_>>());
    let _ = rig.reader.publish();
    assert_eq!(rig.writer.free(), Ok(PAGE - 8));
    assert_eq!(rig.push(49, &[0; 4096 - 32]), Ok(()), "the whole ring for one packet");
    let _ = rig.writer.publish();
    assert_eq!(rig.pop().unwrap(), (49, vec![0; 4096 - 32]));
}

fn parts_are_joined_and_padded_with_zeros(form: Form) {
    let empty: &[&[u8]] = &[];
    for (extension, payload, extension_bytes, payload_bytes) in [
        (empty, empty, &b""[..], &b""[..]),
        (empty, &[&b"a"[..], b"", b"bcdefgh", b"i"][..], b"", b"abcdefghi\0\0\0\0\0\0\0"),
        (&[b"12345"], &[b"x"], b"12345\0\0\0", b"x\0\0\0\0\0\0\0"),
        (&[b"1234", b"5678"], &[b"abcdefgh"], b"12345678", b"abcdefgh"),
        (&[b""], &[b"", b""], b"", b""),
    ] {
        let row = format!("{} {extension:?} {payload:?}", form.name);
        let mut rig = Rig::starting_at(form, 1, 4096 - 24);
        rig.writer
            .push(&OutgoingPacket {
                kind: PacketKind::InBand,
                wants_completion: false,
                transaction_id: 0xfeed_beef_0bad_cafe,
                extension,
                payload,
            })
            .unwrap();
        let _ = rig.writer.publish();
        let packet = rig.reader.peek().unwrap().unwrap();
        let (mut got_extension, mut got_payload) = ([1; 64], [1; 64]);
        let lens =
            (packet.copy_extension(&mut got_extension), packet.copy_payload(&mut got_payload));
        assert_eq!(lens, (extension_bytes.len(), payload_bytes.len()), "{row}");
        assert_eq!(&got_extension[..lens.0], extension_bytes, "{row}");
        assert_eq!(&got_payload[..lens.1], payload_bytes, "{row}");
        assert!(!packet.wants_completion);
        assert_eq!(packet.transaction_id, 0xfeed_beef_0bad_cafe);
        let bytes = 24 + lens.0 as u32 + lens.1 as u32;
        assert_eq!(packet.ring_bytes(), bytes);
        let lens = |parts: &[&[u8]]| parts.iter().map(|part| part.len() as u32).sum();
        assert_eq!(packet_ring_bytes(lens(extension), lens(payload)), bytes);
        // The trailer says where the packet starts.
        let mut trailer = [0; 8];
        rig.raw.read(4096 - 24 + bytes - 8, &mut trailer);
        assert_eq!(trailer, [0, 0, 0, 0, 0xe8, 0x0f, 0, 0], "{row}");
    }
}

fn extensions_are_read_as_bytes_and_as_words(form: Form) {
    let mut rig = Rig::starting_at(form, 1, 4096 - 32);
    let words = [0x0000_0001_dead_beef_u64, 0x0807_0605_0403_0201, 7, 8];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let packet = OutgoingPacket {
        kind: PacketKind::GpaDirect,
        extension: &[&bytes[..8], &bytes[8..]],
        ..in_band(1, &[b"payload"])
    };
    rig.writer.push(&packet).unwrap();
    let _ = rig.writer.publish();
    let packet = rig.reader.peek().unwrap().unwrap();
    assert_eq!(
        (packet.kind, packet.extension_len, packet.payload_len),
        (PacketKind::GpaDirect, 32, 8)
    );
    let mut got = [0; 5];
    assert_eq!(packet.copy_extension_words(&mut got), 4);
    assert_eq!(got, [words[0], words[1], 7, 8, 0]);
    let mut got = [0; 2];
    assert_eq!(packet.copy_extension_words(&mut got), 2);
    assert_eq!(got, words[..2]);
}

fn short_buffers_get_the_first_bytes(form: Form) {
    let mut rig = Rig::starting_at(form, 1, 4096 - 40);
    rig.push(1, b"0123456789abcdef0123456789abcdef").unwrap();
    let _ = rig.writer.publish();
    let packet = rig.reader.peek().unwrap().unwrap();
    for len in [0, 1, 8, 15, 31, 32, 40] {
        let mut got = vec![b'-'; len];
        assert_eq!(packet.copy_payload(&mut got), len.min(32), "{} {len}", form.name);
        let mut expected = b"0123456789abcdef0123456789abcdef--------".to_vec();
        expected.truncate(len);
        assert_eq!(got, expected, "{} {len}", form.name);
    }
}

/// One store of an index for a whole batch, in either direction.
fn nothing_shows_before_it_is_published(form: Form) {
    let mut rig = Rig::new(form, 1);
    for id in 0..3 {
        rig.push(id, &[0; 8]).unwrap();
    }
    assert_eq!(word::<0x0>(&rig.raw), 0);
    assert!(rig.reader.peek().unwrap().is_none());
    assert_eq!(rig.writer.write_index(), 96);
    let _ = rig.writer.publish();
    assert_eq!(word::<0x0>(&rig.raw), 96);

    assert_eq!((rig.pop().unwrap().0, rig.pop().unwrap().0), (0, 1));
    assert_eq!((rig.reader.read_index(), word::<0x4>(&rig.raw)), (64, 0));
    assert_eq!(rig.writer.free(), Ok(4088 - 96));
    let _ = rig.reader.publish();
    assert_eq!(word::<0x4>(&rig.raw), 64);
    assert_eq!(rig.writer.free(), Ok(4088 - 32));

    // Peeking twice is one packet; stepping twice is one step.
    assert_eq!(rig.reader.peek().unwrap().unwrap().transaction_id, 2);
    assert_eq!(rig.reader.peek().unwrap().unwrap().transaction_id, 2);
    rig.reader.advance();
    rig.reader.advance();
    assert_eq!(rig.reader.read_index(), 96);
    assert!(rig.pop().is_none());
    rig.reader.advance();
    assert_eq!(rig.reader.read_index(), 96);
}

fn the_longest_packet_fits_a_large_ring(form: Form) {
    const LONGEST: usize = 65535 * 8 - 16;
    let mut rig = Rig::starting_at(form, 200, 150 * PAGE);
    assert_eq!(rig.writer.max_packet_bytes(), 65535 * 8 + 8);
    let payload = pattern(1, LONGEST);
    let too_large =
        PushError::TooLarge { needed: 65536 * 8 + 8, max: rig.writer.max_packet_bytes() };
    assert_eq!(rig.writer.push(&in_band(1, &[&payload, &[0]])), Err(too_large));
    rig.push(1, &payload).unwrap();
    let _ = rig.writer.publish();
    assert!(rig.pop().unwrap() == (1, payload));
}

/// A restored channel goes on where its indices are.
fn indices_left_by_others_are_adopted(form: Form) {
    let mut rig = Rig::starting_at(form, 2, 8184);
    rig.push(1, b"before..").unwrap();
    rig.push(2, b"between.").unwrap();
    let _ = rig.writer.publish();
    assert_eq!(rig.pop().unwrap().0, 1);
    let _ = rig.reader.publish();
    let Rig { writer, reader, .. } = rig;
    assert_eq!((reader.read_index(), writer.write_index()), (24, 56));
    // Only the control page remains of the old ends.
    let again = Rig::new(form, 2);
    let all = {
        let mut bytes = vec![0; 8192];
        writer.pages().read(0, &mut bytes);
        bytes
    };
    again.raw.write(0, &all);
    set_in(&again.raw, 56);
    set_out(&again.raw, 24);
    let Rig { writer, reader, form, raw } = again;
    drop((writer, reader));
    let (writer, reader) = reopen(&raw, form, 2);
    let mut rig = Rig { writer: writer.unwrap(), reader: reader.unwrap(), raw, form };
    assert_eq!(rig.writer.free_cached(), 8184 - 32);
    assert_eq!(rig.pop().unwrap(), (2, b"between.".to_vec()));
    rig.push(3, b"after...").unwrap();
    let _ = rig.writer.publish();
    assert_eq!(rig.pop().unwrap(), (3, b"after...".to_vec()));
}

/// New ends of a ring with the data and the control words of `raw`.
fn reopen(
    raw: &RingPages,
    form: Form,
    data_pages: u32,
) -> (Result<RingWriter, RingError>, Result<RingReader, RingError>) {
    let memory = (form.memory)(u64::from(data_pages) + 1);
    let pfns: Vec<u64> = (0..=u64::from(data_pages)).collect();
    let pages = || (form.pages)(&memory, &pfns);
    let copy = pages();
    let mut bytes = vec![0; raw.data_len() as usize];
    raw.read(0, &mut bytes);
    copy.write(0, &bytes);
    set_in(&copy, word::<0x0>(raw));
    set_out(&copy, word::<0x4>(raw));
    (RingWriter::new(pages()), RingReader::new(pages()))
}

fn lies_about_the_write_index_are_errors(form: Form) {
    let index = Index::Write;
    let out_of_range = |value| RingError::IndexOutOfRange { index, value, data_len: PAGE };
    let misaligned = |value| RingError::IndexMisaligned { index, value };
    // Nothing is published: the whole ring but for 8 bytes may be claimed.
    for (value, expected) in [
        (PAGE, out_of_range(PAGE)),
        (PAGE + 8, out_of_range(PAGE + 8)),
        (u32::MAX, out_of_range(u32::MAX)),
        (1, misaligned(1)),
        (4, misaligned(4)),
        (PAGE - 1, misaligned(PAGE - 1)),
        (1008, RingError::Packet { at: 1000, error: PacketError::NoRoom { available: 8 } }),
        (1016, RingError::Packet { at: 1000, error: PacketError::NoRoom { available: 16 } }),
    ] {
        let mut rig = Rig::starting_at(form, 1, 1000);
        set_in(&rig.raw, value);
        assert_eq!(rig.reader.peek().unwrap_err(), expected, "{} {value:#x}", form.name);
        // Not once, but as often as it is asked, and through every way to ask.
        assert_eq!(rig.reader.peek().unwrap_err(), expected, "{} {value:#x}", form.name);
        if !matches!(expected, RingError::Packet { .. }) {
            assert_eq!(rig.reader.unmask_and_check(), Err(expected), "{} {value:#x}", form.name);
            assert_eq!(rig.reader.is_empty(), Err(expected), "{} {value:#x}", form.name);
            assert_eq!(word::<0x8>(&rig.raw), 1, "signals are off");
            let (_, reader) = reopen(&rig.raw, form, 1);
            assert_eq!(reader.unwrap_err(), expected, "{} {value:#x}", form.name);
        }
    }
    // 64 bytes read and not given back: the writer must not have been there.
    for (value, ok) in [(1064, true), (1000, false), (1032, false), (1056, false), (992, true)] {
        let mut rig = Rig::starting_at(form, 1, 1000);
        rig.push(1, &[0; 8]).unwrap();
        rig.push(2, &[0; 8]).unwrap();
        let _ = rig.writer.publish();
        assert_eq!((rig.pop().unwrap().0, rig.pop().unwrap().0), (1, 2));
        set_in(&rig.raw, value);
        let passed = RingError::IndexPassed { index, from: 1064, to: value, other: 1000 };
        let expected = if ok { Ok(value == 1064) } else { Err(passed) };
        assert_eq!(rig.reader.is_empty(), expected, "{} {value}", form.name);
    }
}

fn lies_about_the_read_index_are_errors(form: Form) {
    let index = Index::Read;
    let out_of_range = |value| RingError::IndexOutOfRange { index, value, data_len: PAGE };
    let misaligned = |value| RingError::IndexMisaligned { index, value };
    let passed = |to| RingError::IndexPassed { index, from: 1000, to, other: 1064 };
    // 64 bytes are published, 32 more are written.
    for (value, expected) in [
        (1000, Ok(4088 - 96)),
        (1032, Ok(4088 - 64)),
        (1064, Ok(4088 - 32)),
        (1072, Err(passed(1072))),
        (1096, Err(passed(1096))),
        (992, Err(passed(992))),
        (0, Err(passed(0))),
        (PAGE, Err(out_of_range(PAGE))),
        (u32::MAX, Err(out_of_range(u32::MAX))),
        (1001, Err(misaligned(1001))),
        (1004, Err(misaligned(1004))),
    ] {
        let mut rig = Rig::starting_at(form, 1, 1000);
        rig.push(1, &[0; 8]).unwrap();
        rig.push(2, &[0; 8]).unwrap();
        let _ = rig.writer.publish();
        rig.push(3, &[0; 8]).unwrap();
        set_out(&rig.raw, value);
        assert_eq!(rig.writer.free(), expected, "{} {value}", form.name);
        let Err(error) = expected else { continue };
        // A full ring looks at the index; the packet is not written over anything.
        let pushed = rig.push(4, &[0; 4096 - 32]);
        assert_eq!(pushed, Err(PushError::Ring(error)), "{} {value}", form.name);
        let _ = rig.writer.publish();
        assert_eq!(word::<0x0>(&rig.raw), 1096);
        if !matches!(error, RingError::IndexPassed { .. }) {
            assert_eq!(rig.writer.request_space(8), Err(error), "{} {value}", form.name);
            assert_eq!(word::<0xc>(&rig.raw), 0, "nothing is asked of such a reader");
            let (writer, _) = reopen(&rig.raw, form, 1);
            assert_eq!(writer.unwrap_err(), error, "{} {value}", form.name);
        }
    }
}

fn lies_in_a_descriptor_are_errors(form: Form) {
    // kind, data offset, length, flags; 64 bytes are there.
    let truncated = |length| PacketError::Truncated { length, available: 64 };
    let offset = |data_offset, length| PacketError::DataOffset { data_offset, length };
    for (fields, expected) in [
        ([6, 2, 7, 0], None),
        ([6, 2, 7, 1], None),
        ([6, 7, 7, 1], None),
        ([9, 5, 7, 1], None),
        ([6, 2, 8, 0], Some(truncated(64))),
        ([6, 2, 0xffff, 0], Some(truncated(65535 * 8))),
        ([6, 0, 0, 0], Some(offset(0, 0))),
        ([6, 2, 0, 0], Some(offset(16, 0))),
        ([6, 2, 1, 0], Some(offset(16, 8))),
        ([6, 1, 7, 0], Some(offset(8, 56))),
        ([6, 8, 7, 0], Some(offset(64, 56))),
        ([6, 0xffff, 7, 0], Some(offset(65535 * 8, 56))),
        ([6, 2, 7, 2], Some(PacketError::Flags { flags: 2 })),
        ([6, 2, 7, 0xffff], Some(PacketError::Flags { flags: 0xffff })),
        ([0, 2, 7, 0], Some(PacketError::Kind { kind: 0 })),
        ([14, 2, 7, 0], Some(PacketError::Kind { kind: 14 })),
        ([0xffff, 2, 7, 0], Some(PacketError::Kind { kind: 0xffff })),
        (
            [9, 2, 7, 0],
            Some(PacketError::Extension {
                kind: PacketKind::GpaDirect,
                needed: 24,
                extension_len: 0,
            }),
        ),
    ] {
        // In one piece, across the end, across a page.
        for at in [0, 4096 - 8, 8192 - 8, 8192 - 32] {
            let mut rig = Rig::starting_at(form, 2, at);
            let fields: [u16; 4] = fields;
            let descriptor: Vec<u8> = fields.iter().flat_map(|field| field.to_le_bytes()).collect();
            rig.raw.write(at, &descriptor);
            set_in(&rig.raw, (at + 64) % (2 * PAGE));
            let got = rig.reader.peek();
            let row = format!("{} {fields:?} at {at}", form.name);
            match expected {
                Some(error) => {
                    assert_eq!(got.unwrap_err(), RingError::Packet { at, error }, "{row}")
                }
                None => {
                    let packet = got.unwrap().unwrap();
                    assert_eq!(packet.ring_bytes(), 64, "{row}");
                    let mut bytes = [0; 64];
                    packet.copy_payload(&mut bytes);
                    packet.copy_extension(&mut bytes);
                    rig.reader.advance();
                    assert!(rig.reader.is_empty().unwrap(), "{row}");
                }
            }
        }
    }
}

/// What was checked is what is used, whatever the peer does to the ring meanwhile.
fn a_packet_is_what_it_was_when_it_was_checked(form: Form) {
    for at in [0, 4096 - 8] {
        let mut rig = Rig::starting_at(form, 1, at);
        rig.push(7, &pattern(1, 40)).unwrap();
        rig.push(8, &pattern(2, 8)).unwrap();
        let _ = rig.writer.publish();
        let packet = rig.reader.peek().unwrap().unwrap();
        let (len, bytes) = (packet.payload_len, packet.ring_bytes());
        rig.raw.write(at, &[0xff; 16]);
        set_in(&rig.raw, (at + 24) % PAGE);
        set_out(&rig.raw, 8);
        assert_eq!((packet.payload_len, packet.ring_bytes()), (len, bytes));
        assert_eq!((packet.kind, packet.transaction_id), (PacketKind::InBand, 7));
        let mut payload = [0; 40];
        assert_eq!(packet.copy_payload(&mut payload), 40);
        assert_eq!(payload[..], pattern(1, 40));
        rig.reader.advance();
        assert_eq!(rig.reader.read_index(), (at + bytes) % PAGE);
        assert_eq!(
            rig.pop().unwrap(),
            (8, pattern(2, 8)),
            "already shown when the index went back"
        );
        let _ = rig.reader.publish();
        assert_eq!(word::<0x4>(&rig.raw), (at + bytes + 32) % PAGE, "our index is ours");
    }
}

fn signals_are_given_when_they_must_be(form: Form) {
    let mut rig = Rig::new(form, 1);
    assert_eq!(word::<0x8>(&rig.raw), 1, "a new reader polls");
    assert!(!rig.writer.publish(), "nothing to show");
    rig.push(1, b"").unwrap();
    assert!(!rig.writer.publish(), "the reader polls");
    assert_eq!(rig.reader.unmask_and_check(), Ok(true), "a packet came before the mask was off");
    assert_eq!(word::<0x8>(&rig.raw), 1);
    rig.pop().unwrap();
    assert_eq!(rig.reader.unmask_and_check(), Ok(true), "read, but the writer does not know");
    assert!(!rig.reader.publish());
    assert_eq!(rig.reader.unmask_and_check(), Ok(false));
    assert_eq!(word::<0x8>(&rig.raw), 0);
    rig.push(2, b"").unwrap();
    rig.push(3, b"").unwrap();
    assert!(rig.writer.publish(), "the first packet in an empty ring, and the reader sleeps");
    rig.push(4, b"").unwrap();
    assert!(!rig.writer.publish(), "the ring was not empty: a signal is on its way");
    rig.reader.mask();
    while rig.pop().is_some() {}
    let _ = rig.reader.publish();
    rig.push(5, b"").unwrap();
    assert!(!rig.writer.publish(), "masked");
    // The mask is a peer's word: anything but zero is a mask.
    rig.pop().unwrap();
    let _ = rig.reader.publish();
    rig.raw.control_word::<0x8>().store(0x8000_0000, Relaxed);
    rig.push(6, b"").unwrap();
    assert!(!rig.writer.publish());
}

fn space_is_asked_for_and_told(form: Form) {
    let mut rig = Rig::new(form, 1);
    assert_eq!(word::<0x40>(&rig.raw), 1, "the writer says that it asks for space");
    for id in 0..127 {
        rig.push(id, &[0; 8]).unwrap();
    }
    let _ = rig.writer.publish();
    assert_eq!(rig.writer.free(), Ok(4088 - 127 * 32));
    assert_eq!(rig.writer.request_space(24), Ok(true), "it is there");
    assert_eq!(word::<0xc>(&rig.raw), 0);
    assert_eq!(rig.writer.request_space(100), Ok(false));
    assert_eq!(word::<0xc>(&rig.raw), 104, "a multiple of 8");
    rig.pop().unwrap();
    assert!(!rig.reader.publish(), "24 + 32 bytes are not 104");
    rig.pop().unwrap();
    assert!(!rig.reader.publish(), "nor are 88");
    rig.pop().unwrap();
    rig.pop().unwrap();
    assert!(rig.reader.publish(), "152 are");
    rig.pop().unwrap();
    assert!(!rig.reader.publish(), "told once");
    assert!(rig.writer.free().unwrap() >= 104);
    rig.writer.clear_space_request();
    assert_eq!(word::<0xc>(&rig.raw), 0);
    // What is written and not shown is not the reader's to free: it is asked for as well.
    while rig.push(200, &[0; 8]).is_ok() {}
    let free = rig.writer.free_cached();
    assert_eq!(rig.writer.request_space(free), Ok(true), "no signal would come for these");
    assert_eq!(rig.writer.request_space(free + 8), Ok(false));
    let shown_free = word::<0xc>(&rig.raw) - 8;
    rig.pop().unwrap();
    assert!(rig.reader.publish(), "from {shown_free} over {}", shown_free + 8);
    assert!(rig.writer.free().unwrap() >= free + 8);
    rig.writer.clear_space_request();
    let _ = rig.writer.publish();
    // More than there can ever be is an empty ring.
    assert_eq!(rig.writer.request_space(u32::MAX), Ok(false));
    assert_eq!(word::<0xc>(&rig.raw), 4088);
    while rig.pop().is_some() {}
    assert!(rig.reader.publish());
    assert_eq!(rig.writer.request_space(u32::MAX), Ok(true));
}

/// Both ends asleep whenever they can be, each woken only when it must be: every packet arrives, and
/// as it was sent. A signal that was not given shows as a wait that does not end.
fn two_threads_lose_nothing(form: Form) {
    const PACKETS: u64 = 20_000;
    const LOST: Duration = Duration::from_secs(60);
    let Rig { mut writer, mut reader, .. } = Rig::new(form, 1);
    let (wake_reader, reader_woken) = mpsc::channel();
    let (wake_writer, writer_woken) = mpsc::channel();
    let batch = |n: u64| 1 + n * n % 7;
    let payload = |id: u64| vec![id as u8; 8 * (id * 31 % 40) as usize];
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut sent = 0;
            while sent < PACKETS {
                for _ in 0..batch(sent).min(PACKETS - sent) {
                    let packet = payload(sent);
                    match writer.push(&in_band(sent, &[&packet])) {
                        Ok(()) => sent += 1,
                        Err(PushError::Full { needed, .. }) => {
                            if writer.publish() {
                                wake_reader.send(()).unwrap();
                            }
                            if !writer.request_space(needed).unwrap() {
                                writer_woken.recv_timeout(LOST).unwrap();
                                writer.clear_space_request();
                            }
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
                if writer.publish() {
                    wake_reader.send(()).unwrap();
                }
            }
            // The reader may still signal; somebody must be there to hear it.
            writer_woken
        });
        let mut received = 0;
        while received < PACKETS {
            for _ in 0..batch(received) {
                let Some(packet) = reader.peek().unwrap() else { break };
                assert_eq!(packet.transaction_id, received);
                let mut got = vec![0; packet.payload_len as usize];
                packet.copy_payload(&mut got);
                assert_eq!(got, payload(received));
                reader.advance();
                received += 1;
            }
            if reader.publish() {
                let _ = wake_writer.send(());
            }
            if received < PACKETS && !reader.unmask_and_check().unwrap() {
                reader_woken.recv_timeout(LOST).unwrap();
                reader.mask();
            }
        }
    });
}

#[derive(Clone, Debug)]
enum Step {
    Push { extension: usize, payload: usize },
    PublishWrites,
    Pop,
    PublishReads,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (0usize..6, prop_oneof![0usize..100, 0usize..3000])
            .prop_map(|(extension, payload)| Step::Push { extension: 8 * extension, payload }),
        2 => Just(Step::PublishWrites),
        5 => Just(Step::Pop),
        2 => Just(Step::PublishReads),
    ]
}

/// A ring is a queue of packets with two walls in it: what is published, what is given back.
fn rings_behave_like_queues(form: Form) {
    let config = ProptestConfig { cases: 96, failure_persistence: None, ..Default::default() };
    proptest!(config, |(data_pages in 1u32..4, start in 0u32..512, steps in vec(step(), 1..300))| {
        let mut rig = Rig::starting_at(form, data_pages, start * 8);
        let (mut written, mut shown): (VecDeque<_>, VecDeque<_>) = Default::default();
        let (mut used, mut read) = (0, 0);
        for (id, step) in steps.into_iter().enumerate() {
            let id = id as u64;
            match step {
                Step::Push { extension, payload } => {
                    let needed = packet_ring_bytes(extension as u32, payload as u32);
                    let (extension, payload) = (pattern(!id, extension), pattern(id, payload));
                    let split = payload.len() / 3;
                    let got = rig.writer.push(&OutgoingPacket {
                        kind: if extension.len() < 24 { PacketKind::Completion } else { PacketKind::GpaDirect },
                        wants_completion: id.is_multiple_of(2),
                        transaction_id: id,
                        extension: &[&extension],
                        payload: &[&payload[..split], &payload[split..]],
                    });
                    let free = data_pages * PAGE - 8 - used;
                    if needed <= free {
                        prop_assert_eq!(got, Ok(()));
                        used += needed;
                        written.push_back((id, extension, padded(&payload)));
                    } else {
                        prop_assert_eq!(got, Err(PushError::Full { needed, free }));
                    }
                }
                Step::PublishWrites => {
                    let _ = rig.writer.publish();
                    shown.append(&mut written);
                }
                Step::Pop => match (rig.reader.peek().unwrap(), shown.pop_front()) {
                    (None, None) => {}
                    (Some(packet), Some((id, extension, payload))) => {
                        prop_assert_eq!(packet.transaction_id, id);
                        prop_assert_eq!(packet.wants_completion, id.is_multiple_of(2));
                        let mut got = vec![0; packet.extension_len as usize];
                        packet.copy_extension(&mut got);
                        prop_assert_eq!(got, extension);
                        let mut got = vec![0; packet.payload_len as usize];
                        packet.copy_payload(&mut got);
                        prop_assert_eq!(got, payload);
                        read += packet.ring_bytes();
                        rig.reader.advance();
                    }
                    (got, expected) => prop_assert!(false, "{:?} instead of {:?}", got, expected),
                },
                Step::PublishReads => {
                    let _ = rig.reader.publish();
                    used -= std::mem::take(&mut read);
                }
            }
        }
        prop_assert!(rig.form.name == form.name);
    });
}

/// Whatever the peer does to every byte of the ring, an answer comes back, and soon.
#[test]
fn no_bytes_of_a_peer_are_more_than_an_error() {
    #[derive(Clone, Debug)]
    enum Peer {
        Control(u8, u32),
        Data(u32, Vec<u8>),
        Read,
        Write(usize),
        Publish,
        Sleep,
    }
    let index = || prop_oneof![(0u32..1024).prop_map(|n| n * 8), any::<u32>(), 0u32..9000];
    let descriptor =
        (0u16..16, 0u16..80, 0u16..80, 0u16..3).prop_map(|(kind, offset, len, flags)| {
            [kind, offset, len, flags]
                .iter()
                .flat_map(|field| field.to_le_bytes())
                .collect::<Vec<u8>>()
        });
    let peer = prop_oneof![
        3 => (0u8..5, index()).prop_map(|(word, value)| Peer::Control(word, value)),
        3 => ((0u32..1024).prop_map(|n| n * 8), descriptor).prop_map(|(at, d)| Peer::Data(at, d)),
        4 => Just(Peer::Read),
        3 => (0usize..600).prop_map(Peer::Write),
        2 => Just(Peer::Publish),
        1 => Just(Peer::Sleep),
    ];
    let config = ProptestConfig { cases: 512, failure_persistence: None, ..Default::default() };
    proptest!(config, |(actions in vec(peer, 1..200), scattered: bool)| {
        let form = if scattered { SCATTERED } else { MAPPED };
        let mut rig = Rig::new(form, 2);
        let mut buffer = vec![0; 8192];
        for action in actions {
            match action {
                Peer::Control(0, value) => set_in(&rig.raw, value),
                Peer::Control(1, value) => set_out(&rig.raw, value),
                Peer::Control(2, value) => rig.raw.control_word::<0x8>().store(value, Relaxed),
                Peer::Control(3, value) => rig.raw.control_word::<0xc>().store(value, Relaxed),
                Peer::Control(_, value) => rig.raw.control_word::<0x40>().store(value, Relaxed),
                Peer::Data(at, bytes) => rig.raw.write(at, &bytes),
                Peer::Read => {
                    if let Ok(Some(packet)) = rig.reader.peek() {
                        prop_assert!(packet.ring_bytes() <= 8192 - 8 && packet.ring_bytes() >= 24);
                        packet.copy_extension(&mut buffer);
                        packet.copy_payload(&mut buffer);
                        rig.reader.advance();
                    }
                    prop_assert!(rig.reader.read_index() < 8192);
                }
                Peer::Write(len) => {
                    let _ = rig.push(1, &buffer[..len]);
                    prop_assert!(rig.writer.write_index() < 8192);
                    prop_assert!(rig.writer.free_cached() <= 8184);
                }
                Peer::Publish => {
                    let _ = (rig.writer.publish(), rig.reader.publish());
                }
                Peer::Sleep => {
                    let _ = rig.reader.unmask_and_check();
                    if rig.writer.request_space(512).is_err() {
                        rig.writer.clear_space_request();
                    }
                }
            }
        }
    });
}

#[test]
fn the_bytes_of_a_packet_are_counted_without_overflow() {
    for (extension, payload, expected) in [
        (0, 0, 24),
        (0, 1, 32),
        (1, 0, 32),
        (24, 64, 112),
        (u32::MAX, 0, u32::MAX),
        (0, u32::MAX, u32::MAX),
        (u32::MAX - 7, u32::MAX - 7, u32::MAX),
        (0, u32::MAX - 31, u32::MAX - 7),
    ] {
        assert_eq!(packet_ring_bytes(extension, payload), expected, "{extension} {payload}");
    }
    let mut rig = Rig::new(MAPPED, 1);
    let part = vec![0u8; 1 << 20];
    let parts = vec![&part[..]; 1 << 13];
    let needed = (2u64 << 33) + 24;
    let packet = OutgoingPacket { extension: &parts, ..in_band(1, &parts) };
    assert_eq!(rig.writer.push(&packet), Err(PushError::TooLarge { needed, max: PAGE - 8 }));
}
