//! What a ring costs, beside what it cannot be faster than.
//!
//! Each subject and its peer run in the same process, round by round in turns, and their lower
//! quartiles are compared. The last lines are for a program to read:
//! `RATIO <name> ours=<ns> peer=<ns> ratio=<r> limit=<l>`, nanoseconds per packet.
//!
//! | name | ours | peer |
//! |---|---|---|
//! | `ring/one-core/batch32/64B`, `.../4KiB` | 32 in-band packets written and published, then read, copied out and published | one memcpy of each payload, from the same source to the same destination |
//! | `ring/two-cores/64B` | a writer and a reader thread, batches of up to 32 | `rtrb`, chunks of up to 32 elements of the 88 bytes such a packet takes in the ring |

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a bench may stop at a surprise"
)]
#![allow(clippy::cast_possible_truncation, clippy::missing_panics_doc, reason = "small constants")]

use std::hint::{black_box, spin_loop};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use vmbus_memory::{GuestMemory, MappingBudget, RingPages};
use vmbus_ring::{
    OutgoingPacket, PushError, RingReader, RingWriter, initialize, packet_ring_bytes,
};
use vmbus_wire::packet::PacketKind;

const BATCH: usize = 32;
const ROUNDS: usize = 21;
/// Data pages of the rings that cross cores.
const TWO_CORE_DATA_PAGES: u64 = 16;
const TWO_CORE_PACKETS: u64 = 1_000_000;
const TWO_CORE_ROUNDS: usize = 31;

struct Ratio {
    name: &'static str,
    ours: f64,
    peer: f64,
    limit: f64,
}

fn main() {
    // `cargo bench -- <part of a name>` runs what matches; cargo's own flags are none of ours.
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let chosen = |name: &str| wanted.is_empty() || wanted.iter().any(|part| name.contains(part));
    let mut ratios = Vec::new();
    for (name, payload, limit) in [
        ("ring/one-core/batch32/64B", 64, f64::INFINITY),
        ("ring/one-core/batch32/4KiB", 4096, 3.0),
    ] {
        if chosen(name) {
            ratios.push(one_core(name, payload, limit));
        }
    }
    if chosen("ring/two-cores/64B") {
        ratios.push(two_cores("ring/two-cores/64B", 1.5));
    }
    for Ratio { name, ours, peer, limit } in ratios {
        println!(
            "RATIO {name} ours={ours:.1} peer={peer:.1} ratio={:.2} limit={limit}",
            ours / peer
        );
    }
}

/// Both ends of a fresh ring with `data_pages` pages of data.
fn ring(data_pages: u64) -> (RingWriter, RingReader) {
    let memory = GuestMemory::memfd((1 + data_pages) * 4096).unwrap();
    let pfns: Vec<u64> = (0..=data_pages).collect();
    let budget = MappingBudget::default();
    let pages = || RingPages::map(&memory, &pfns, &budget).unwrap();
    initialize(&pages());
    let ends = (RingWriter::new(pages()).unwrap(), RingReader::new(pages()).unwrap());
    assert!(ends.0.pages().is_mapped());
    ends
}

/// The lower quartile: whatever else the machine does in a round only adds to it.
fn typical(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 4]
}

fn one_core(name: &'static str, payload: usize, limit: f64) -> Ratio {
    let batch_bytes = packet_ring_bytes(0, u32::try_from(payload).unwrap()) as usize * BATCH;
    let (mut writer, mut reader) = ring((batch_bytes as u64 + 8).div_ceil(4096));
    let source = vec![7u8; payload * BATCH];
    let mut target = vec![0u8; payload * BATCH];
    // About 4 ms a round.
    let batches = (200_000_000 / (batch_bytes * 16 + 40_000)).max(16);

    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..batches {
            for (id, payload) in black_box(&source).chunks_exact(payload).enumerate() {
                let packet = OutgoingPacket {
                    kind: PacketKind::InBand,
                    wants_completion: true,
                    transaction_id: id as u64,
                    extension: &[],
                    payload: &[payload],
                };
                writer.push(&packet).unwrap();
            }
            black_box(writer.publish());
            for payload in black_box(&mut target).chunks_exact_mut(payload) {
                let packet = reader.peek().unwrap().unwrap();
                black_box(packet.transaction_id);
                packet.copy_payload(payload);
                reader.advance();
            }
            black_box(reader.publish());
        }
        ours.push(per_packet(start.elapsed(), batches));

        let start = Instant::now();
        for _ in 0..batches {
            let pairs = black_box(&source).chunks_exact(payload);
            for (from, to) in pairs.zip(black_box(&mut target).chunks_exact_mut(payload)) {
                to.copy_from_slice(black_box(from));
            }
        }
        peers.push(per_packet(start.elapsed(), batches));
    }
    Ratio { name, ours: typical(ours), peer: typical(peers), limit }
}

fn per_packet(elapsed: Duration, batches: usize) -> f64 {
    elapsed.as_nanos() as f64 / (batches * BATCH) as f64
}

fn two_cores(name: &'static str, limit: f64) -> Ratio {
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for _ in 0..TWO_CORE_ROUNDS {
        ours.push(two_cores_ring());
        peers.push(two_cores_rtrb());
    }
    Ratio { name, ours: typical(ours), peer: typical(peers), limit }
}

/// How both sides of both subjects wait: a few polls, then the processor to whoever needs it.
#[derive(Default)]
struct Patience(u32);

impl Patience {
    fn wait(&mut self) {
        self.0 += 1;
        if self.0.is_multiple_of(64) { thread::yield_now() } else { spin_loop() }
    }
}

/// Runs both closures at once and gives nanoseconds per packet.
fn race(send: impl FnOnce() + Send, receive: impl FnOnce() + Send) -> f64 {
    let barrier = Barrier::new(2);
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            barrier.wait();
            send();
        });
        barrier.wait();
        let start = Instant::now();
        receive();
        let elapsed = start.elapsed();
        sender.join().unwrap();
        elapsed.as_nanos() as f64 / TWO_CORE_PACKETS as f64
    })
}

fn two_cores_ring() -> f64 {
    let (mut writer, mut reader) = ring(TWO_CORE_DATA_PAGES);
    race(
        move || {
            // Not touched between packets: a fresh store under a wide load would stall for as long as
            // the stores before it, which miss, and that is what would be measured.
            let payload = [7u8; 64];
            let mut patience = Patience::default();
            let mut sent = 0;
            while sent < TWO_CORE_PACKETS {
                let end = TWO_CORE_PACKETS.min(sent + BATCH as u64);
                while sent < end {
                    let packet = OutgoingPacket {
                        kind: PacketKind::InBand,
                        wants_completion: true,
                        transaction_id: sent,
                        extension: &[],
                        payload: &[black_box(&payload)],
                    };
                    match writer.push(&packet) {
                        Ok(()) => sent += 1,
                        Err(PushError::Full { .. }) => break,
                        Err(error) => panic!("{error}"),
                    }
                }
                // The reader polls, so it is never signalled.
                assert!(!writer.publish());
                if sent < end {
                    patience.wait();
                }
            }
        },
        move || {
            let mut payload = [0u8; 64];
            let mut patience = Patience::default();
            let mut received = 0;
            while received < TWO_CORE_PACKETS {
                let before = received;
                while received < before + BATCH as u64 {
                    let Some(packet) = reader.peek().unwrap() else { break };
                    assert_eq!(packet.transaction_id, received);
                    packet.copy_payload(&mut payload);
                    black_box(&payload);
                    reader.advance();
                    received += 1;
                }
                assert!(!reader.publish());
                if received == before {
                    patience.wait();
                }
            }
        },
    )
}

fn two_cores_rtrb() -> f64 {
    const BYTES: usize = 88;
    let capacity = TWO_CORE_DATA_PAGES as usize * 4096 / BYTES;
    let (mut producer, mut consumer) = rtrb::RingBuffer::<[u8; BYTES]>::new(capacity);
    race(
        move || {
            let element = [7u8; BYTES];
            let mut patience = Patience::default();
            let mut sent = 0u64;
            while sent < TWO_CORE_PACKETS {
                let wanted = BATCH.min((TWO_CORE_PACKETS - sent) as usize);
                let slots = match producer.write_chunk_uninit(wanted) {
                    Ok(chunk) => Ok(chunk),
                    Err(rtrb::chunks::ChunkError::TooFewSlots(0)) => Err(()),
                    Err(rtrb::chunks::ChunkError::TooFewSlots(some)) => {
                        producer.write_chunk_uninit(some).map_err(drop)
                    }
                };
                match slots {
                    Ok(chunk) => {
                        let elements = std::iter::repeat_with(|| *black_box(&element));
                        sent += chunk.fill_from_iter(elements) as u64;
                    }
                    Err(()) => patience.wait(),
                }
            }
        },
        move || {
            let mut element = [0u8; BYTES];
            let mut patience = Patience::default();
            let mut received = 0u64;
            while received < TWO_CORE_PACKETS {
                let wanted = BATCH.min((TWO_CORE_PACKETS - received) as usize);
                let chunk = match consumer.read_chunk(wanted) {
                    Ok(chunk) => Ok(chunk),
                    Err(rtrb::chunks::ChunkError::TooFewSlots(0)) => Err(()),
                    Err(rtrb::chunks::ChunkError::TooFewSlots(some)) => {
                        consumer.read_chunk(some).map_err(drop)
                    }
                };
                match chunk {
                    Ok(chunk) => {
                        for got in chunk {
                            element = got;
                            black_box(&element);
                            received += 1;
                        }
                    }
                    Err(()) => patience.wait(),
                }
            }
            black_box(&element);
        },
    )
}
