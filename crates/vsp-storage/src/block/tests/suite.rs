//! What every back end has to do.
#![allow(unsafe_code, reason = "guest memory that tells what is written to it")]

use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use vmbus_memory::{GuestMemory, GuestRam, HostRegion};

use super::harness::{DISK_BYTES, FILES, Kind, Rig, all, on_each};
use crate::block::{CacheMode, InlineIo, IoError, IoOperation, IoOutcome, QUEUE_DEPTH};

const WRITE: IoOperation = IoOperation::Write { fua: false };

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_le_bytes()[7]
    })
    .take(len)
    .collect()
}

#[test]
fn what_is_written_is_read_back_at_every_alignment() {
    on_each(&all(), |rig| {
        for (offset, segments) in [
            (0, &[(0x1_0000, 4096)][..]),
            (512, &[(0x1_0000, 512)]),
            (4096, &[(0x1_0001, 4096)]),
            (8192, &[(0x1_0200, 1024), (0x2_0000, 4096), (0x3_0003, 512)]),
            (DISK_BYTES - 512, &[(0x1_0000, 512)]),
            (3 * 512, &[(0x1_0ffe, 1), (0x2_0fff, 511)]),
            (65536, &[(0, 0x4_0000)]),
        ] {
            for fua in [false, true] {
                let len: u32 = segments.iter().map(|&(_, len)| len).sum();
                let data = pattern(offset + u64::from(fua), len as usize);
                let mut at = 0;
                for &(gpa, len) in segments {
                    rig.memory.write(gpa, &data[at..at + len as usize]).unwrap();
                    at += len as usize;
                }
                let write = IoOperation::Write { fua };
                assert_eq!(rig.run(write, offset, None, segments), Ok(()), "{offset} {segments:?}");
                for &(gpa, len) in segments {
                    rig.memory.fill(gpa, u64::from(len), 0).unwrap();
                }
                assert_eq!(rig.run(IoOperation::Read, offset, None, segments), Ok(()));
                let mut back = Vec::new();
                for &(gpa, len) in segments {
                    let mut part = vec![0; len as usize];
                    rig.memory.read(gpa, &mut part).unwrap();
                    back.extend(part);
                }
                assert!(back == data, "{offset} {segments:?}");
                let start = usize::try_from(offset).unwrap();
                assert!(rig.contents()[start..start + data.len()] == data, "{offset} {segments:?}");
            }
        }
    });
}

/// One step of a random history.
#[derive(Clone, Debug)]
struct Step {
    operation: IoOperation,
    sector: u64,
    sectors: u64,
    misalign: u64,
    seed: u64,
}

fn any_step() -> impl Strategy<Value = Step> {
    let operation = prop_oneof![
        4 => Just(WRITE),
        1 => Just(IoOperation::Write { fua: true }),
        3 => Just(IoOperation::Read),
        1 => Just(IoOperation::Flush),
        1 => Just(IoOperation::Discard),
        1 => Just(IoOperation::WriteZeroes),
        1 => Just(IoOperation::WriteSame),
        1 => Just(IoOperation::Compare),
        1 => Just(IoOperation::Verify),
    ];
    (
        operation,
        0..DISK_BYTES / 512 - 64,
        0u64..64,
        prop_oneof![Just(0u64), Just(512), Just(3)],
        any::<u64>(),
    )
        .prop_map(|(operation, sector, sectors, misalign, seed)| Step {
            operation,
            sector,
            sectors,
            misalign,
            seed,
        })
}

#[test]
fn any_history_leaves_what_a_plain_array_would_hold() {
    on_each(&all(), |rig| {
        let model = std::cell::RefCell::new(rig.contents());
        let mut runner = TestRunner::new(Config { cases: 40, ..Config::default() });
        let histories = proptest::collection::vec(any_step(), 1..12);
        runner
            .run(&histories, |history| {
                let mut model = model.borrow_mut();
                for step in history {
                    replay(rig, &mut model, &step)?;
                }
                prop_assert!(rig.contents() == *model);
                Ok(())
            })
            .unwrap();
    });
}

fn replay(rig: &Rig, model: &mut [u8], step: &Step) -> Result<(), TestCaseError> {
    let Step { operation, sector, sectors, misalign, seed } = *step;
    let (offset, bytes) = (sector * 512, sectors * 512);
    let range = usize::try_from(offset).unwrap()..usize::try_from(offset + bytes).unwrap();
    let data_len = match operation {
        IoOperation::WriteSame | IoOperation::Compare => 512,
        _ => bytes,
    };
    let gpa = 0x10_0000 + misalign;
    let segments = [(gpa, u32::try_from(data_len).unwrap())];
    let data = pattern(seed, usize::try_from(data_len).unwrap());
    rig.memory.write(gpa, &data).unwrap();
    let segments = if operation.is_write() || data_len > 0 { &segments[..] } else { &[] };
    let result = rig.run(operation, offset, Some(bytes), segments);
    match operation {
        IoOperation::Write { .. } => model[range].copy_from_slice(&data),
        IoOperation::Discard | IoOperation::WriteZeroes => model[range].fill(0),
        IoOperation::WriteSame => {
            for sector in model[range].chunks_exact_mut(512) {
                sector.copy_from_slice(&data);
            }
        }
        IoOperation::Compare => {
            let differs = model[range]
                .chunks_exact(512)
                .flat_map(|sector| sector.iter().zip(&data))
                .position(|(a, b)| a != b);
            let expected = match differs {
                Some(at) => Err(IoError::Miscompare { at: offset + at as u64 }),
                None => Ok(()),
            };
            prop_assert_eq!(result, expected, "{:?}", step);
            return Ok(());
        }
        IoOperation::Read => {
            let mut back = vec![0; data.len()];
            rig.memory.read(gpa, &mut back).unwrap();
            prop_assert!(back == model[range], "{:?}", step);
        }
        IoOperation::Flush | IoOperation::Verify => {}
    }
    prop_assert_eq!(result, Ok(()), "{:?}", step);
    Ok(())
}

#[test]
fn long_compares_look_at_all_of_the_data() {
    on_each(&all(), |rig| {
        let bytes = 200 << 10;
        rig.memory.write(0, &pattern(1, bytes)).unwrap();
        let segments = [(0, u32::try_from(bytes).unwrap())];
        assert_eq!(rig.run(WRITE, 0, None, &segments), Ok(()));
        assert_eq!(rig.run(IoOperation::Compare, 0, None, &segments), Ok(()));
        for at in [0u64, 65535, 65536, 199 << 10] {
            let mut byte = [0];
            rig.memory.read(at, &mut byte).unwrap();
            rig.memory.write(at, &[!byte[0]]).unwrap();
            let result = rig.run(IoOperation::Compare, 0, None, &segments);
            assert_eq!(result, Err(IoError::Miscompare { at }), "{at}");
            rig.memory.write(at, &byte).unwrap();
        }
    });
}

#[test]
fn every_one_of_many_requests_is_done_once() {
    on_each(&all(), |rig| {
        let count = u64::from(QUEUE_DEPTH) * 3;
        let kinds = [
            WRITE,
            IoOperation::Read,
            IoOperation::Flush,
            IoOperation::Discard,
            IoOperation::Verify,
        ];
        let requests = (0..count)
            .map(|token| {
                let operation = kinds[usize::try_from(token % 5).unwrap()];
                let misalign = if token % 3 == 0 { 4 } else { 0 };
                let segments = [(token * 1024 + misalign, 512)];
                let mut request = rig.request(operation, token * 512, Some(512), &segments);
                request.token = token;
                request
            })
            .collect();
        let done = rig.run_all(requests);
        let mut tokens: Vec<u64> = done.iter().map(|done| done.request.token).collect();
        tokens.sort_unstable();
        assert_eq!(tokens, (0..count).collect::<Vec<_>>());
        assert!(done.iter().all(|done| done.outcome == IoOutcome::Done(Ok(()))));
    });
}

#[test]
fn neighbouring_sectors_written_past_and_through_the_cache_both_stay() {
    // Sector by sector, memory aligned and misaligned in turn: half of the writes go past the page
    // cache, half through it, and eight share a page.
    on_each(&all(), |rig| {
        for round in 0..8u64 {
            let sectors = 512u64;
            let data = pattern(round, usize::try_from(sectors * 512).unwrap());
            let requests = (0..sectors)
                .map(|sector| {
                    let gpa = sector * 1024 + if (sector + round) % 2 == 0 { 0 } else { 1 };
                    let start = usize::try_from(sector * 512).unwrap();
                    rig.memory.write(gpa, &data[start..start + 512]).unwrap();
                    rig.request(WRITE, sector * 512, None, &[(gpa, 512)])
                })
                .collect();
            rig.forget_cache();
            assert!(
                rig.run_all(requests).iter().all(|done| done.outcome == IoOutcome::Done(Ok(())))
            );
            let contents = rig.contents();
            for (sector, (got, expected)) in
                contents.chunks_exact(512).zip(data.chunks_exact(512)).enumerate()
            {
                assert!(got == expected, "round {round}, sector {sector}");
            }
        }
    });
}

#[test]
fn a_discard_gives_space_back() {
    use std::os::unix::fs::MetadataExt;
    on_each(&FILES, |rig| {
        rig.memory.write(0, &pattern(7, 0x4_0000)).unwrap();
        assert_eq!(rig.run(WRITE, 0, None, &[(0, 0x4_0000)]), Ok(()));
        assert_eq!(rig.run(IoOperation::Flush, 0, Some(0), &[]), Ok(()));
        let before = rig.image().metadata().unwrap().blocks();
        assert_eq!(rig.run(IoOperation::Discard, 0, Some(0x4_0000), &[]), Ok(()));
        let after = rig.image().metadata().unwrap();
        assert_eq!(after.len(), DISK_BYTES);
        assert!(after.blocks() < before, "{} blocks, were {before}", after.blocks());
    });
}

#[test]
fn requests_that_do_not_fit_are_refused_and_change_nothing() {
    on_each(&all(), |rig| {
        rig.memory.fill(0, 8192, 0xff).unwrap();
        for (operation, offset, bytes, segments) in [
            (WRITE, DISK_BYTES, Some(512), &[(0, 512)][..]),
            (WRITE, DISK_BYTES - 512, Some(1024), &[(0, 1024)]),
            (WRITE, u64::MAX - 511, Some(1024), &[(0, 1024)]),
            (WRITE, 0, Some(1024), &[(0, 512)]),
            (WRITE, 0, Some(512), &[(0, 1024)]),
            (IoOperation::Read, 0, Some(512), &[]),
            (IoOperation::Discard, u64::MAX, Some(512), &[]),
            (IoOperation::WriteSame, 0, Some(512), &[]),
            (IoOperation::WriteSame, 0, Some(1000), &[(0, 512)]),
            (IoOperation::Compare, 0, Some(1000), &[(0, 512)]),
        ] {
            let result = rig.run(operation, offset, bytes, segments);
            assert_eq!(result, Err(IoError::Malformed), "{operation:?} {offset} {bytes:?}");
        }
        assert!(rig.contents().iter().all(|&byte| byte == 0));
        // Nothing to do is done.
        for operation in [WRITE, IoOperation::Read, IoOperation::Discard, IoOperation::Verify] {
            assert_eq!(rig.run(operation, 0, Some(0), &[]), Ok(()), "{operation:?}");
        }
    });
}

#[test]
fn a_file_that_shrinks_fails_where_it_ends_and_nowhere_else() {
    on_each(&FILES, |rig| {
        let half = DISK_BYTES / 2;
        std::fs::File::options().write(true).open(rig.image()).unwrap().set_len(half).unwrap();
        let read = |offset, len| rig.run(IoOperation::Read, offset, None, &[(0, len)]);
        assert_eq!(read(half, 4096), Err(IoError::EndOfMedium { at: half }));
        assert_eq!(read(half - 4096, 8192), Err(IoError::EndOfMedium { at: half }));
        assert_eq!(read(half - 4096, 4096), Ok(()));
        let verify = rig.run(IoOperation::Verify, half - 512, Some(1024), &[]);
        assert_eq!(verify, Err(IoError::EndOfMedium { at: half }));
        let flush = rig.run(IoOperation::Flush, 0, Some(0), &[]);
        assert_eq!(flush, Err(IoError::EndOfMedium { at: half }));
    });
}

#[test]
fn a_back_end_may_be_dropped_in_the_middle_of_its_work() {
    on_each(&all(), |rig| {
        let mut requests: Vec<_> = (0..QUEUE_DEPTH * 2)
            .map(|i| {
                let operation = if i % 7 == 0 { IoOperation::Verify } else { WRITE };
                let segments = [(u64::from(i) * 4096 + u64::from(i % 2), 2048)];
                rig.request(operation, u64::from(i) * 2048, None, &segments)
            })
            .collect();
        rig.backend.submit(&mut requests, &mut Vec::new());
        // The rig goes, and the back end with it; `tests/leaks.rs` counts what is left.
    });
}

/// Memory whose owner wants to know what is written to it.
struct Watched {
    memory: GuestMemory,
    dirty: Arc<Mutex<Vec<(u64, u64)>>>,
}

// SAFETY: R1 and R3 hold because `memory` keeps the region mapped, shared and unshrinkable as long as
// the value lives; R2 because nobody reaches it but through `GuestMemory`.
unsafe impl GuestRam for Watched {
    fn regions(&self) -> Vec<HostRegion<'_>> {
        let region = &self.memory.regions()[0];
        let all = self.memory.slice(0, usize::try_from(region.len()).unwrap()).unwrap();
        let base = NonNull::new(all.as_ptr()).unwrap();
        vec![HostRegion { gpa: 0, len: region.len(), base, backing: region.backing() }]
    }

    fn tracks_writes(&self) -> bool {
        true
    }

    fn mark_dirty(&self, gpa: u64, len: u64) {
        self.dirty.lock().unwrap().push((gpa, len));
    }
}

#[test]
fn what_is_read_into_memory_is_told_to_its_owner() {
    for kind in all() {
        eprintln!("--- {kind:?}");
        let Some(mut rig) = Rig::new(kind) else { continue };
        let dirty = Arc::default();
        let watched = Watched { memory: rig.memory.clone(), dirty: Arc::clone(&dirty) };
        rig.memory = GuestMemory::from_ram(Arc::new(watched)).unwrap();
        let segments = [(0x1000, 4096), (0x8001, 512)];
        assert_eq!(rig.run(WRITE, 0, None, &segments), Ok(()));
        assert_eq!(*dirty.lock().unwrap(), []);
        assert_eq!(rig.run(IoOperation::Read, 0, None, &segments), Ok(()));
        let mut told = dirty.lock().unwrap().clone();
        // Whether in one piece or in several.
        told.dedup_by(|(gpa, len), before| {
            let follows = before.0 + before.1 == *gpa;
            before.1 += if follows { *len } else { 0 };
            follows
        });
        assert_eq!(told, [(0x1000, 4096), (0x8001, 512)]);
    }
}

#[test]
fn memory_like_back_ends_run_inline() {
    let rig = Rig::new(Kind::Ram).unwrap();
    rig.memory.write(0x1000, &pattern(3, 4096)).unwrap();
    let run = |operation, offset, bytes, segments: &[(u64, u32)]| {
        let memory = &rig.memory;
        let segments = &mut segments.iter().copied();
        rig.backend.run_inline(InlineIo { operation, offset, bytes, memory, segments })
    };
    assert_eq!(run(WRITE, 512, 2048, &[(0x1000, 1024), (0x1400, 4096)]), Some(Ok(())));
    assert!(rig.contents()[512..2560] == pattern(3, 4096)[..2048]);
    assert_eq!(run(IoOperation::Read, 512, 2048, &[(0x3000, 2048)]), Some(Ok(())));
    let mut back = vec![0; 2048];
    rig.memory.read(0x3000, &mut back).unwrap();
    assert!(back == pattern(3, 4096)[..2048]);
    assert_eq!(run(WRITE, DISK_BYTES, 512, &[(0, 512)]), Some(Err(IoError::Malformed)));
    assert_eq!(run(WRITE, 0, 512, &[(0, 511)]), Some(Err(IoError::Malformed)));

    let file = Rig::new(Kind::File(crate::block::Engine::Threads(1), CacheMode::Direct)).unwrap();
    let memory = &file.memory;
    let segments = &mut std::iter::empty();
    let io = InlineIo { operation: IoOperation::Read, offset: 0, bytes: 512, memory, segments };
    assert_eq!(file.backend.run_inline(io), None);
}
