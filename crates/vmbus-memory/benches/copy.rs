//! Copies to and from shared memory, beside `memcpy` of the same bytes between the same places.
//!
//! `RATIO memory/<direction>/<size> ours=<ns> peer=<ns> ratio=<r> limit=<l>`, nanoseconds per copy,
//! medians of rounds run in turns. No limit is set: this is what the choices in `src/copy.rs` rest on.

#![allow(clippy::unwrap_used, reason = "a bench may stop at a surprise")]

use std::hint::black_box;
use std::time::Instant;

use vmbus_memory::GuestMemory;

const ROUNDS: usize = 15;

fn main() {
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    for size in [8, 16, 64, 256, 1024, 2048, 4096, 16384, 65536] {
        for read in [true, false] {
            let name = format!("memory/{}/{size}B", if read { "read" } else { "write" });
            if wanted.is_empty() || wanted.iter().any(|part| name.contains(part)) {
                compare(&name, size, read);
            }
        }
    }
}

fn compare(name: &str, size: usize, read: bool) {
    let memory = GuestMemory::memfd(size.next_multiple_of(4096) as u64 + 4096).unwrap();
    // Eight bytes past a page: where the payload of a packet may lie.
    let shared = memory.slice(8, size).unwrap();
    let mut private = vec![1u8; size];
    let mut other = vec![2u8; size + 8];
    let count = 4_000_000 / (size + 60);
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        ours.push(time(count, || {
            if read {
                black_box(&shared).read_at(0, black_box(&mut private)).unwrap();
            } else {
                black_box(&shared).write_at(0, black_box(&private)).unwrap();
            }
        }));
        let other = other.get_mut(8..).unwrap_or_default();
        peers.push(time(count, || {
            if read {
                black_box(&mut private).copy_from_slice(black_box(other));
            } else {
                black_box(&mut *other).copy_from_slice(black_box(&private));
            }
        }));
    }
    let (ours, peer) = (median(ours), median(peers));
    println!("RATIO {name} ours={ours:.1} peer={peer:.1} ratio={:.2} limit=inf", ours / peer);
}

/// Nanoseconds per call.
fn time(count: usize, mut call: impl FnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..count {
        call();
    }
    start.elapsed().as_nanos() as f64 / count as f64
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}
