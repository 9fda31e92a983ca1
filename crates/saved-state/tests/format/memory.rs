//! What reading and writing a saved state allocates, counted.
#![expect(unsafe_code, reason = "an allocator that counts has to be an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use proptest::collection::vec;
use proptest::prelude::*;
use saved_state::channel::{
    CHANNEL, ChannelRecord, INCOMING_PACKET, IncomingPacketRecord, KINDS, OUTGOING_PACKET,
    OutgoingPacketRecord,
};
use saved_state::contents::{ContentsRecord, FIRST_KINDS, StreamEntryRecord};
use saved_state::file::{FileReader, check};
use saved_state::input::ChunkInput;
use saved_state::inspect::{ALL_KINDS, inspect};
use saved_state::limits::{CONTENTS_BYTES_PER_BYTE, DECODED_BYTES_PER_BYTE, INPUT_BYTES_PER_BYTE};
use saved_state::storage::{DISK_IDENTITY, DiskIdentityRecord, STORAGE_REQUEST};
use saved_state::testing::{Handmade, chunk, chunk_ranges, stream_ranges};
use saved_state::{Chunk, Decode, FormatVersion, StreamInfo, StreamKind, StreamWriter};

use crate::file::small_file;
use crate::records::{info, push, reader, save, small_state};

struct Counting;

std::thread_local! {
    /// Of this thread alone: the test harness has others.
    static IN_USE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator, unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.set(IN_USE.get().wrapping_add(layout.size()));
        PEAK.set(PEAK.get().max(IN_USE.get()));
        // SAFETY: the caller keeps the promises that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        IN_USE.set(IN_USE.get().wrapping_sub(layout.size()));
        // SAFETY: `ptr` came from `System`, as `alloc` shows, with the same layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Most bytes in use at a time while `work` runs, beyond those that were before.
fn peak<T>(work: impl FnOnce() -> T) -> (usize, T) {
    // From 1 TiB on: what is freed that was there before does not wrap around.
    const BASE: usize = 1 << 40;
    IN_USE.set(BASE);
    PEAK.set(BASE);
    let result = work();
    (PEAK.get() - BASE, result)
}

#[test]
fn the_counter_counts() {
    assert_eq!(peak(|| drop(vec![0_u8; 1000])).0, 1000);
    assert_eq!(peak(|| ()).0, 0);
}

#[test]
fn writing_allocates_nothing() {
    let state = small_state();
    let mut room = vec![0; 4096];
    let (bytes, written) = peak(|| {
        let mut writer = StreamWriter::new(FormatVersion::NEWEST, info(), KINDS).unwrap();
        let mut steps = 0;
        steps += usize::from(writer.header(&mut room).is_ok());
        for record in &state {
            let _step = record.write(&mut writer, &mut room);
            steps += 1;
        }
        steps + usize::from(writer.end(&mut room).is_ok())
    });
    assert_eq!((bytes, written), (0, state.len() + 2));
}

#[test]
fn reading_a_stream_and_decoding_its_packets_allocates_nothing() {
    let stream = save(info(), &small_state());
    let (bytes, packets) = peak(|| {
        let mut reader = reader();
        let mut input = &stream[..];
        let mut packets = 0;
        while let Some(chunk) = reader.read(&mut input).unwrap() {
            packets += match chunk.kind() {
                OUTGOING_PACKET => u32::from(chunk.decode::<OutgoingPacketRecord<'_>>().is_ok()),
                INCOMING_PACKET => u32::from(chunk.decode::<IncomingPacketRecord<'_>>().is_ok()),
                _ => 0,
            };
        }
        packets
    });
    assert_eq!((bytes, packets), (0, 4));
}

/// Bytes that any decoding may take, however short the record.
const CONSTANT: usize = 64;

fn decoded<'a, R: Decode<'a>>(bytes: &'a [u8]) {
    let kinds = ALL_KINDS;
    if let Ok(chunk) = Chunk::alone(bytes, kinds) {
        drop(chunk.decode::<R>());
    }
}

proptest! {
    /// Decoding any message takes no more memory than the stated multiple of its bytes: a length that
    /// is claimed allocates nothing before there are as many bytes.
    #[test]
    fn decoding_allocates_in_proportion(
        head in vec(prop_oneof![Just(0x92_u8), Just(1), Just(0x3a), Just(0x42), Just(0x22), any::<u8>()], 0..60),
        claim in prop_oneof![Just(10_u64 << 30), 0_u64..200, any::<u64>()],
        tail in vec(any::<u8>(), 0..200),
        kind in prop_oneof![Just(CHANNEL), Just(DISK_IDENTITY), Just(STORAGE_REQUEST)],
    ) {
        let mut message = head;
        prost::encode_length_delimiter(claim as usize, &mut message).unwrap();
        message.extend(tail);
        let handmade = Handmade { sequence: 1, kind, version: 1, mandatory: true, last: false };
        let bytes = chunk(handmade, &message);
        let (peak, ()) = peak(|| match kind {
            CHANNEL => decoded::<ChannelRecord>(&bytes),
            DISK_IDENTITY => decoded::<DiskIdentityRecord>(&bytes),
            _ => decoded::<saved_state::storage::StorageRequestRecord>(&bytes),
        });
        prop_assert!(peak <= DECODED_BYTES_PER_BYTE * bytes.len() + CONSTANT, "{} for {}", peak, bytes.len());
    }
}

#[test]
fn many_short_fields_allocate_no_more_than_the_multiple() {
    // The worst there is: a field of one byte, again and again, each time in a vector of its own.
    for (kind, field) in [(CHANNEL, &[0x92_u8, 0x01, 1, 7][..]), (DISK_IDENTITY, &[0x42, 1, 7])] {
        let mut message = vec![0x08, 1, 0x20, 1, 0x28, 1];
        for _ in 0..10_000 {
            message.extend(field);
        }
        let handmade = Handmade { sequence: 1, kind, version: 1, mandatory: true, last: false };
        let bytes = chunk(handmade, &message);
        let (peak, ()) = peak(|| match kind {
            CHANNEL => decoded::<ChannelRecord>(&bytes),
            _ => decoded::<DiskIdentityRecord>(&bytes),
        });
        assert!(peak <= CONSTANT, "{peak} for {} bytes", bytes.len());
    }
}

#[test]
fn ten_gigabytes_claimed_in_ten_bytes_allocate_nothing() {
    let message = [0x2a, 0x80, 0x80, 0x80, 0x80, 0x28, 1, 2, 3, 4];
    for kind in [CHANNEL, OUTGOING_PACKET, INCOMING_PACKET, DISK_IDENTITY] {
        let handmade = Handmade { sequence: 1, kind, version: 1, mandatory: true, last: false };
        let bytes = chunk(handmade, &message);
        let (peak, error) =
            peak(|| Chunk::alone(&bytes, ALL_KINDS).and_then(|chunk| chunk.check()));
        assert_eq!(peak, 0);
        assert!(error.is_err(), "{kind}");
    }
}

#[test]
fn a_chunk_takes_memory_as_it_comes() {
    let state: Vec<_> = std::iter::repeat_n(small_state(), 20).flatten().collect();
    let stream = save(info(), &state);
    let second = chunk_ranges(&stream)[1].start;
    for (claimed, came) in [(4 << 20, 10), (4 << 20, 5_000), (4 << 20, 100_000), (60_000, 60_000)] {
        let mut cut = stream[..second].to_vec();
        cut.extend(b"CHNK");
        cut.extend((claimed as u32).to_le_bytes());
        cut.resize(second + came, 0);
        let (peak, chunks) = peak(|| {
            let mut input = ChunkInput::new(&cut[..]);
            let mut chunks = 0;
            while let Ok(Some(_)) = input.next() {
                chunks += 1;
            }
            chunks
        });
        assert_eq!(chunks, 1 + usize::from(claimed == came), "{claimed} claimed, {came} came");
        let most = (INPUT_BYTES_PER_BYTE * came).max(4096);
        assert!(peak <= most, "{peak} for {came} bytes, of {claimed} that were claimed");
    }
}

#[test]
fn a_list_of_streams_takes_memory_in_proportion() {
    for (streams, name) in [(0, ""), (1, "one"), (1000, ""), (8192, ""), (8192, "network, 1")] {
        let list = list_of(streams, name);
        let (peak, entries) = peak(|| {
            // What comes behind the list is missing: that is found later.
            FileReader::new(&list[..]).map(|file| file.entries().len())
        });
        assert_eq!(entries.unwrap(), streams);
        let most = CONTENTS_BYTES_PER_BYTE * list.len() + 4096;
        assert!(peak <= most, "{peak} for {} bytes, {streams} streams", list.len());
    }
}

/// A file's first stream, with as short entries as there can be.
fn list_of(streams: usize, name: &str) -> Vec<u8> {
    let info = StreamInfo { stream: StreamKind::CONTENTS, items: streams as u32, ..info() };
    let mut writer = StreamWriter::new(FormatVersion::NEWEST, info, FIRST_KINDS).unwrap();
    let mut list = Vec::new();
    push(&mut list, |out| writer.header(out).unwrap());
    let contents = ContentsRecord { streams: streams as u32 };
    push(&mut list, |out| writer.record(&contents, out).unwrap());
    for index in 0..streams as u32 {
        let name = name.to_owned();
        let entry = StreamEntryRecord { stream: 1, index, name, ..StreamEntryRecord::default() };
        push(&mut list, |out| writer.record(&entry, out).unwrap());
    }
    push(&mut list, |out| writer.end(out).unwrap());
    list
}

#[test]
fn a_whole_file_is_checked_in_the_memory_of_its_list_and_a_chunk() {
    let file = small_file();
    let ranges = stream_ranges(&file);
    let largest = ranges.iter().flat_map(|range| chunk_ranges(&file[range.clone()]));
    let largest = largest.map(|chunk| chunk.len()).max().unwrap();
    let (peak, checked) = peak(|| check(&file[..], ALL_KINDS).map(|entries| entries.len()));
    assert_eq!(checked.unwrap(), 3);
    let most = CONTENTS_BYTES_PER_BYTE * ranges[0].len()
        + (INPUT_BYTES_PER_BYTE * largest).max(4096)
        + 4096; // the header of the stream at hand, and the error there may be
    assert!(peak <= most, "{peak}, at most {most}");
}

#[test]
fn a_tool_holds_one_piece_at_a_time() {
    let state: Vec<_> = std::iter::repeat_n(small_state(), 100).flatten().collect();
    let stream = save(info(), &state);
    // A header is kept twice: for the caller, and to name records.
    let (peak, pieces) = peak(|| inspect(&stream, ALL_KINDS).count());
    assert_eq!(pieces, state.len() + 2);
    assert!(peak < 8192, "{peak}");
}
