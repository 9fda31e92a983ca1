//! What saving and restoring guest memory costs, beside what no way of doing it can do without: the bytes
//! written to a file of the same file system, or read from one into a new memfd, in pieces of 2 MiB.
//!
//! Memory of two kinds: *full*, every page of it different; and *idle*, as a booted guest that does nothing
//! has it, where seven pages of eight were never touched and the rest compresses well.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use kmcl_vmm::memory::{Compression, Load, MemoryIndex, PART_BYTES, Ram, ZSTD_LEVEL, save_memory};
use rustix::fs::{MemfdFlags, memfd_create};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// How often each thing is done; the best counts, which nobody else on the machine has disturbed.
const ROUNDS: usize = 5;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Every page of it different: nothing can be left out, and nothing compressed.
fn full(bytes: u64) -> Outcome<Ram> {
    let ram = Ram::new(bytes)?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for page in 0..bytes / PAGE {
        let words: Vec<u8> = (0..PAGE / 8).flat_map(|_| random.next().to_le_bytes()).collect();
        ram.memory().write(page * PAGE, &words)?;
    }
    Ok(ram)
}

/// An eighth of it in use, in runs of a few pages, of words most of whose bytes are zeros or repeat.
fn idle(bytes: u64) -> Outcome<Ram> {
    let ram = Ram::new(bytes)?;
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let mut used = 0;
    while used < bytes / 8 {
        let pages = 1 + random.next() % 32;
        let first = random.next() % (bytes / PAGE - pages);
        for page in first..first + pages {
            let base = random.next() & 0xffff_ff00;
            let words = (0..PAGE / 8).flat_map(|n| (base + n / 4 * 16).to_le_bytes());
            ram.memory().write(page * PAGE, &words.collect::<Vec<u8>>())?;
        }
        used += pages * PAGE;
    }
    Ok(ram)
}

/// Writes `bytes` into a new file, as `dd bs=2M` does.
fn write_file(path: &Path, bytes: u64) -> Outcome<Duration> {
    let piece = vec![0x5a; usize::try_from(PART_BYTES)?];
    let begun = Instant::now();
    let file = File::create_new(path)?;
    for at in (0..bytes).step_by(piece.len()) {
        file.write_all_at(&piece, at)?;
    }
    Ok(begun.elapsed())
}

/// Reads a file of `bytes` into a new memfd, as `dd bs=2M of=/dev/shm/…` does.
fn read_file(path: &Path, bytes: u64, piece: &mut [u8]) -> Outcome<Duration> {
    let begun = Instant::now();
    let file = File::open(path)?;
    let memfd = File::from(memfd_create("bench", MemfdFlags::CLOEXEC)?);
    for at in (0..bytes).step_by(piece.len()) {
        file.read_exact_at(piece, at)?;
        memfd.write_all_at(piece, at)?;
    }
    Ok(begun.elapsed())
}

/// Copies `bytes` from memory to memory that is not in any cache.
fn copy_memory(bytes: u64) -> Outcome<Duration> {
    let bytes = usize::try_from(bytes)?;
    let (from, mut to) = (vec![1_u8; bytes], vec![2_u8; bytes]);
    let begun = Instant::now();
    black_box(&mut to).copy_from_slice(black_box(&from));
    Ok(begun.elapsed())
}

fn best(times: impl Iterator<Item = Outcome<Duration>>) -> Outcome<Duration> {
    let times = times.collect::<Outcome<Vec<_>>>()?;
    Ok(times.into_iter().min().unwrap_or_default())
}

fn per_second(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / (1 << 30) as f64 / took.as_secs_f64()
}

fn ratio(name: &str, ours: Duration, peer: Duration, limit: f64) {
    let (ours, peer) = (ours.as_nanos() as f64, peer.as_nanos() as f64);
    let ratio = ours / peer;
    println!("RATIO {name} ours={ours:.0} peer={peer:.0} ratio={ratio:.2} limit={limit}");
}

fn restore(from: &Path, index: &MemoryIndex, load: Load) -> Outcome<Ram> {
    Ok(Ram::restore(from, index, load, false, &mut |_| {})?)
}

fn main() -> Outcome<()> {
    let bytes = if std::env::args().any(|arg| arg == "--short") { 128 * MIB } else { 512 * MIB };
    // In memory, where there is such a file system: a disk that is busy says nothing about us.
    let dir = tempfile::tempdir_in("/dev/shm");
    let dir = dir.or_else(|_| tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")))?;
    let (path, plain_file) = (dir.path().join("memory"), dir.path().join("plain"));
    let mut room = vec![1; usize::try_from(PART_BYTES)?];

    let write = best((0..ROUNDS).map(|_| {
        let took = write_file(&plain_file, bytes);
        std::fs::remove_file(&plain_file)?;
        took
    }))?;
    write_file(&plain_file, bytes)?;
    let read = best((0..ROUNDS).map(|_| read_file(&plain_file, bytes, &mut room)))?;
    std::fs::remove_file(&plain_file)?;
    let copy = best((0..ROUNDS).map(|_| copy_memory(bytes / 4)))?;
    println!("FIGURE memory/memcpy {:.2} GiB/s", per_second(bytes / 4, copy));
    println!("FIGURE memory/write-of-a-file/2MiB {:.2} GiB/s", per_second(bytes, write));
    println!("FIGURE memory/read-of-a-file-into-a-memfd/2MiB {:.2} GiB/s", per_second(bytes, read));

    for (kind, ram) in [("full", full(bytes)?), ("idle", idle(bytes)?)] {
        for (form, compression) in
            [("plain", Compression::None), ("zstd", Compression::Zstd { level: ZSTD_LEVEL })]
        {
            let mut index = None;
            let saved = best((0..ROUNDS).map(|_| {
                if index.is_some() {
                    std::fs::remove_file(&path)?;
                }
                let begun = Instant::now();
                index = Some(save_memory(&ram, &path, compression, &mut |_| {})?);
                Ok(begun.elapsed())
            }))?;
            let index = index.ok_or("no round")?;
            let eager = best((0..ROUNDS).map(|_| {
                let begun = Instant::now();
                let restored = restore(&path, &index, Load::Eager)?;
                let took = begun.elapsed();
                assert_eq!(restored.loaded_bytes(), bytes);
                Ok(took)
            }))?;
            let mut loaded = Vec::new();
            let lazy = best((0..ROUNDS).map(|_| {
                let begun = Instant::now();
                let failed = Box::new(|error| eprintln!("{error}"));
                let restored = restore(&path, &index, Load::Lazy { failed })?;
                // What a guest's first instruction waits for.
                black_box(restored.memory().read_obj::<u64>(bytes - PAGE)?);
                let took = begun.elapsed();
                restored.wait_until_loaded()?;
                loaded.push(begun.elapsed());
                Ok(took)
            }))?;
            let loaded = loaded.into_iter().min().unwrap_or_default();
            let name = format!("{kind}/{form}");
            let on_disk = std::fs::metadata(&path)?.blocks() * 512;
            let per_gib = |part: u64| part as f64 / bytes as f64 * 1024.0;
            let written = per_gib(index.stored_bytes());
            println!("FIGURE memory/written-per-GiB/{name} {written:.1} MiB");
            println!("FIGURE memory/on-disk-per-GiB/{name} {:.1} MiB", per_gib(on_disk));
            println!("FIGURE memory/save/{name} {:.2} GiB/s", per_second(bytes, saved));
            println!("FIGURE memory/restore/{name} {:.2} GiB/s", per_second(bytes, eager));
            println!("FIGURE memory/lazy-all-there/{name} {:.2} GiB/s", per_second(bytes, loaded));
            println!("FIGURE memory/lazy-first-touch/{name} {:.2} ms", lazy.as_secs_f64() * 1e3);
            let limit = if form == "plain" { 3.0 } else { f64::INFINITY };
            ratio(&format!("memory/save/{name}"), saved, write, limit);
            ratio(&format!("memory/restore/{name}"), eager, read, limit);
            std::fs::remove_file(&path)?;
        }
    }
    Ok(())
}
