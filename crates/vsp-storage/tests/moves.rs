//! Requests in flight across a freeze: thawed here, and restored elsewhere.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod common;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use vsp_storage::block::{
    Backend, Fate, IoDone, IoOperation, IoOutcome, IoRequest, TestIo, TestStep, TestTime,
};
use vstor_wire::scsi::cdb::{ByteCheck, CdbForm, Command, Extent};
use vstor_wire::srb::{DataDirection, ScsiRequest, SrbStatus};

use common::PATIENCE;
use common::world::{BUFFER_BYTES, World, disk, save};

const MS: Duration = Duration::from_millis(1);

/// What ends a freeze.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Thaw,
    Move,
}

impl End {
    const BOTH: [Self; 2] = [Self::Thaw, Self::Move];

    fn apply(self, world: &mut World, frozen: vsp_storage::FrozenController) {
        match self {
            Self::Thaw => frozen.thaw(),
            Self::Move => drop(world.go_elsewhere(frozen)),
        }
    }
}

fn succeeded(answers: &[(usize, ScsiRequest)], moved: &[u32], row: &str) {
    let found: Vec<_> =
        answers.iter().map(|(_, srb)| (srb.srb_status, srb.data_transfer_length.get())).collect();
    let expected: Vec<_> = moved.iter().map(|&moved| (SrbStatus::SUCCESS, moved)).collect();
    assert_eq!(found, expected, "{row}");
}

/// Three ranges, of 4, 4 and 4 sectors.
fn unmap_list() -> (u16, Vec<u8>) {
    let mut list = vec![0, 54, 0, 48, 0, 0, 0, 0];
    for (lba, blocks) in [(8u64, 4u32), (0, 4), (100, 4)] {
        list.extend(lba.to_be_bytes());
        list.extend(blocks.to_be_bytes());
        list.extend([0; 4]);
    }
    (u16::try_from(list.len()).unwrap(), list)
}

/// A request, how it goes, and what the disk and the guest have afterwards.
struct Row {
    name: &'static str,
    ask: fn(&mut World) -> usize,
    operation: IoOperation,
    /// Bytes that the answer says were moved.
    moved: u32,
    check: fn(&World, usize),
}

const WRITE: IoOperation = IoOperation::Write { fua: false };

fn full(world: &World, block: usize, blocks: usize, value: u8) {
    let contents = world.contents();
    let bytes = &contents[block * 512..(block + blocks) * 512];
    assert!(bytes.iter().all(|&byte| byte == value), "block {block}");
}

const ROWS: &[Row] = &[
    Row {
        name: "write",
        ask: |world| world.write(160, 8, 0x11),
        operation: WRITE,
        moved: 4096,
        check: |world, _| full(world, 160, 8, 0x11),
    },
    Row {
        name: "fua write",
        ask: |world| {
            let command = Command::write(160, 8, true);
            world.ask(command, DataDirection::Out, 4096, &[0x12; 4096])
        },
        operation: IoOperation::Write { fua: true },
        moved: 4096,
        check: |world, _| full(world, 160, 8, 0x12),
    },
    Row {
        name: "read",
        ask: |world| {
            world.medium.contents().fill(160 * 512, 4096, 0x13).unwrap();
            world.ask(Command::read(160, 8), DataDirection::In, 4096, &[0; 4096])
        },
        operation: IoOperation::Read,
        moved: 4096,
        check: |world, number| assert_eq!(world.buffer_bytes(number, 4096), [0x13; 4096]),
    },
    Row {
        name: "write same",
        ask: |world| {
            let extent = Extent::new(160, 64);
            let same = Command::WriteSame { extent, unmap: false, no_data: false };
            world.ask(same, DataDirection::Out, 512, &[0x14; 512])
        },
        operation: IoOperation::WriteSame,
        moved: 512,
        check: |world, _| full(world, 160, 64, 0x14),
    },
    Row {
        name: "write zeroes",
        ask: |world| {
            let extent = Extent { form: CdbForm::Sixteen, lba: 160, blocks: 64 };
            let same = Command::WriteSame { extent, unmap: false, no_data: true };
            world.ask(same, DataDirection::None, 0, &[])
        },
        operation: IoOperation::WriteZeroes,
        moved: 0,
        check: |world, _| full(world, 160, 64, 0),
    },
    Row {
        name: "compare",
        ask: |world| {
            world.medium.contents().fill(160 * 512, 4096, 0x15).unwrap();
            let verify =
                Command::Verify { extent: Extent::new(160, 8), compare: ByteCheck::Blocks };
            world.ask(verify, DataDirection::Out, 4096, &[0x15; 4096])
        },
        operation: IoOperation::Compare,
        moved: 4096,
        check: |_, _| {},
    },
    Row {
        name: "compare with one block",
        ask: |world| {
            world.medium.contents().fill(160 * 512, 4096, 0x16).unwrap();
            let verify =
                Command::Verify { extent: Extent::new(160, 8), compare: ByteCheck::OneBlock };
            world.ask(verify, DataDirection::Out, 512, &[0x16; 512])
        },
        operation: IoOperation::Compare,
        moved: 512,
        check: |_, _| {},
    },
    Row {
        name: "verify",
        ask: |world| {
            let verify =
                Command::Verify { extent: Extent::new(160, 8), compare: ByteCheck::Medium };
            world.ask(verify, DataDirection::None, 0, &[])
        },
        operation: IoOperation::Verify,
        moved: 0,
        check: |_, _| {},
    },
    Row {
        name: "flush",
        ask: World::flush,
        operation: IoOperation::Flush,
        moved: 0,
        check: |_, _| {},
    },
    Row {
        name: "unmap of several ranges",
        ask: |world| {
            let (parameter_bytes, list) = unmap_list();
            let unmap = Command::Unmap { parameter_bytes };
            world.ask(unmap, DataDirection::Out, parameter_bytes.into(), &list)
        },
        operation: IoOperation::Discard,
        moved: 0,
        check: |world, _| {
            full(world, 8, 4, 0);
            full(world, 0, 4, 0);
            full(world, 100, 4, 0);
            full(world, 4, 4, 0xff);
        },
    },
];

/// Where a request is when it is frozen.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    /// Its back end has no slot for it.
    NoSlot,
    /// It runs, and nothing of it has landed.
    Begun,
    /// It runs, and a part of it has landed.
    Half,
    /// As [`Self::Half`], but the parts land from the end on.
    HalfBackwards,
    /// It runs and cannot be cancelled.
    Stubborn,
}

impl Stage {
    const ALL: [Self; 5] =
        [Self::NoSlot, Self::Begun, Self::Half, Self::HalfBackwards, Self::Stubborn];
}

#[test]
fn every_request_at_every_stage_ends_once_and_well() {
    for row in ROWS {
        for stage in Stage::ALL {
            for end in End::BOTH {
                let name = format!("{}, {stage:?}, {end:?}", row.name);
                let mut world = World::new();
                let fate = Fate {
                    parts: 4,
                    backwards: stage == Stage::HalfBackwards,
                    can_cancel: stage != Stage::Stubborn,
                    ..Fate::after(40 * MS)
                };
                world.medium.set_fate(fate);
                world.medium.set_slots(if stage == Stage::NoSlot { 0 } else { 256 });
                let number = (row.ask)(&mut world);
                match stage {
                    Stage::NoSlot => world.until_held(1, 0),
                    _ => world.until_held(0, 1),
                }
                if matches!(stage, Stage::Half | Stage::HalfBackwards | Stage::Stubborn) {
                    world.medium.advance(25 * MS);
                }
                world.medium.clear_history();
                let frozen = world.controller().freeze().unwrap();
                assert_eq!(frozen.unfinished(), 1, "{name}");
                if stage == Stage::Stubborn {
                    assert_eq!(frozen.running(), 1, "{name}");
                    assert!(frozen.streams(&kmcl::SaveOptions::default()).is_err(), "{name}");
                    world.medium.advance(40 * MS);
                }
                assert!(frozen.wait(Some(PATIENCE)), "{name}");
                let outcomes: Vec<_> = outs(&world).map(|(_, outcome)| outcome).collect();
                match (stage, outcomes.as_slice()) {
                    (Stage::NoSlot, [IoOutcome::NeverStarted]) => {}
                    (Stage::Stubborn, [IoOutcome::Done(Ok(()))]) => {}
                    (_, [IoOutcome::Cancelled { .. }]) => {}
                    other => panic!("{name}: {other:?}"),
                }
                assert_eq!(world.answered().len(), 0, "{name}: no answer leaves");
                let landed = landed(&world).count();
                world.medium.advance(100 * MS);
                assert_eq!(self::landed(&world).count(), landed, "{name}: nothing lands any more");
                world.medium.set_slots(256);
                world.medium.set_fate(Fate::after(MS));
                end.apply(&mut world, frozen);
                succeeded(&world.finish(), &[row.moved], &name);
                (row.check)(&world, number);
                assert_eq!(world.medium.overlaps(), 0, "{name}");
                assert!(outs(&world).any(|(io, _)| io.operation == row.operation), "{name}");
                // And the controller goes on.
                world.write(1000, 4, 0x77);
                world.finish();
                full(&world, 1000, 4, 0x77);
            }
        }
    }
}

fn outs(world: &World) -> impl Iterator<Item = (TestIo, IoOutcome)> {
    world.medium.history().into_iter().filter_map(|event| match event.what {
        TestStep::Out(outcome) => Some((event.io, outcome)),
        _ => None,
    })
}

fn landed(world: &World) -> impl Iterator<Item = (TestIo, u64, u64)> {
    world.medium.history().into_iter().filter_map(|event| match event.what {
        TestStep::Landed { offset, bytes } => Some((event.io, offset, bytes)),
        _ => None,
    })
}

#[test]
fn what_was_done_is_not_done_again() {
    for end in End::BOTH {
        let mut world = World::new();
        world.medium.set_fate(Fate { parts: 4, ..Fate::after(40 * MS) });
        world.write(16, 8, 0x11);
        world.until_held(0, 1);
        world.medium.advance(25 * MS); // two of four parts, 2048 bytes
        let frozen = world.controller().freeze().unwrap();
        world.medium.clear_history();
        end.apply(&mut world, frozen);
        succeeded(&world.finish(), &[4096], "");
        let replayed: Vec<_> = outs(&world).map(|(io, _)| (io.offset, io.bytes)).collect();
        assert_eq!(replayed, [(16 * 512 + 2048, 2048)], "{end:?}");
        full(&world, 16, 8, 0x11);
    }
}

#[test]
fn ranges_that_were_discarded_are_not_discarded_again() {
    for end in End::BOTH {
        for (advance, expected) in [
            (5, vec![(8, 4), (0, 4), (100, 4)]),
            (15, vec![(0, 4), (100, 4)]),
            (25, vec![(100, 4)]),
        ] {
            let mut world = World::new();
            world.medium.set_fate(Fate::after(10 * MS));
            let (parameter_bytes, list) = unmap_list();
            let unmap = Command::Unmap { parameter_bytes };
            world.ask(unmap, DataDirection::Out, parameter_bytes.into(), &list);
            world.until_held(0, 1);
            for step in (5..advance).step_by(10) {
                assert!(step < advance);
                world.medium.advance(10 * MS);
                // The next range is submitted by the thread that took the end of this one.
                common::until("the next range never came", || world.medium.in_flight() == (0, 1));
            }
            let frozen = world.controller().freeze().unwrap();
            assert!(frozen.wait(Some(PATIENCE)));
            world.medium.clear_history();
            end.apply(&mut world, frozen);
            world.finish();
            let replayed: Vec<_> =
                outs(&world).map(|(io, _)| (io.offset / 512, io.bytes / 512)).collect();
            assert_eq!(replayed, expected, "{end:?} after {advance} ms");
            (ROWS.last().unwrap().check)(&world, 0);
        }
    }
}

#[test]
fn a_flush_that_waits_for_writes_still_does() {
    for end in End::BOTH {
        let mut world = World::new();
        world.medium.set_fate(Fate::after(10 * MS));
        world.write(0, 4, 1);
        world.write(8, 4, 2);
        world.flush();
        world.until_held(1, 2);
        let frozen = world.controller().freeze().unwrap();
        assert!(frozen.wait(Some(PATIENCE)));
        assert_eq!(frozen.unfinished(), 3);
        world.medium.clear_history();
        end.apply(&mut world, frozen);
        let answers = world.finish();
        assert_eq!(answers.len(), 3, "{end:?}");
        let order: Vec<_> = outs(&world).map(|(io, _)| io.operation).collect();
        assert_eq!(order, [WRITE, WRITE, IoOperation::Flush], "{end:?}");
        // They came in the order in which they were delivered at first.
        let came: Vec<_> = (world.medium.history().iter())
            .filter(|event| event.what == TestStep::Came)
            .map(|event| event.io.offset)
            .collect();
        assert_eq!(came, [0, 8 * 512, 0], "{end:?}");
    }
}

#[test]
fn requests_that_cannot_be_cancelled_hold_the_save_back_and_say_when_they_are_done() {
    use std::sync::atomic::{AtomicUsize, Ordering};

    struct Count(AtomicUsize);
    impl std::task::Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    let mut world = World::new();
    world.medium.set_fate(Fate::stalled());
    world.write(0, 4, 1);
    world.write(8, 4, 2);
    world.until_held(0, 2);
    let frozen = world.controller().freeze().unwrap();
    let woken = Arc::new(Count(AtomicUsize::new(0)));
    frozen.notify(Arc::clone(&woken).into());
    assert!(!frozen.wait(Some(MS)));
    assert_eq!((frozen.running(), woken.0.load(Ordering::SeqCst)), (2, 0));
    let refused = frozen.streams(&kmcl::SaveOptions::default()).unwrap_err();
    assert_eq!(refused.to_string(), "2 disk requests are still running");
    world.medium.release();
    let readable = || {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let limit = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
        poll(&mut [PollFd::new(&frozen.as_fd(), PollFlags::IN)], Some(&limit)) == Ok(1)
    };
    assert!(readable());
    assert!(frozen.wait(Some(PATIENCE)));
    common::until("nobody was woken", || woken.0.load(Ordering::SeqCst) > 0);
    assert_eq!(world.answered().len(), 0, "the answers are held");
    frozen.thaw();
    succeeded(&world.finish(), &[2048, 2048], "");
}

#[test]
fn freezes_that_end_at_once_lose_nothing() {
    // In the system's time, so that requests finish, are cancelled and go on while channels thaw.
    let mut world = World::with(TestTime::Real);
    world.open_sub_channels(2);
    world.medium.set_slots(12);
    world.medium.choose_fates(|io| Fate {
        parts: 3,
        backwards: io.number.is_multiple_of(3),
        can_cancel: !io.number.is_multiple_of(4),
        ..Fate::after(Duration::from_micros(io.number * 37 % 400))
    });
    let mut expected = world.contents();
    let mut asked = 0;
    for round in 0..60u64 {
        for slot in 0..30 {
            let block = (round * 30 + slot) % 500 * 4;
            let stamp = u8::try_from(round + 1).unwrap();
            let channel = usize::try_from(slot % 3).unwrap();
            let write = Command::write(block, 4, false);
            world.ask_on(channel, write, DataDirection::Out, 2048, &[stamp; 2048]);
            let at = usize::try_from(block * 512).unwrap();
            expected[at..at + 2048].fill(stamp);
            asked += 1;
            if slot % 5 == 0 {
                let frozen = world.controller().freeze().unwrap();
                if slot % 10 == 0 {
                    assert!(frozen.wait(Some(PATIENCE)));
                }
            }
        }
        world.finish();
    }
    let answers = world.finish();
    assert_eq!(answers.len(), asked);
    assert!(answers.iter().all(|(_, srb)| srb.srb_status == SrbStatus::SUCCESS));
    assert!(world.contents() == expected);
    assert_eq!(world.medium.overlaps(), 0);
}

/// A back end that takes its time to say that something was cancelled.
struct Late {
    event: OwnedFd,
    requests: Mutex<Vec<(IoRequest, bool)>>,
}

impl Late {
    fn release(&self) {
        rustix::io::write(&self.event, &1u64.to_ne_bytes()).unwrap();
    }

    /// How many are with it, and how many of those it was asked for.
    fn count(&self) -> (usize, usize) {
        let requests = self.requests.lock().unwrap();
        (requests.len(), requests.iter().filter(|(_, wanted)| *wanted).count())
    }
}

impl Backend for Late {
    fn bytes(&self) -> u64 {
        1 << 20
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn submit(&self, requests: &mut Vec<IoRequest>, _: &mut Vec<IoDone>) {
        self.requests.lock().unwrap().extend(requests.drain(..).map(|request| (request, false)));
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.event.as_fd())
    }

    fn cancel(&self, wanted: &dyn Fn(u64) -> bool, _: &mut Vec<IoDone>) {
        for (request, is_wanted) in self.requests.lock().unwrap().iter_mut() {
            *is_wanted |= wanted(request.token);
        }
    }

    fn reap(&self, done: &mut Vec<IoDone>) {
        if rustix::io::read(&self.event, &mut [0; 8]).is_err() {
            return;
        }
        for (request, is_wanted) in self.requests.lock().unwrap().drain(..) {
            let outcome = match is_wanted {
                true => IoOutcome::Cancelled { moved: 1024 },
                false => IoOutcome::Done(Ok(())),
            };
            done.push(IoDone { request, outcome });
        }
    }
}

#[test]
fn a_request_that_turns_out_to_be_cancelled_after_the_thaw_goes_on() {
    let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
    let late = Arc::new(Late { event, requests: Mutex::default() });
    let mut world = World::new();
    world.controller().detach(common::LUN0).unwrap();
    world.controller().attach(common::LUN0, disk(late.clone())).unwrap();
    let number = world.write(100, 8, 1);
    common::until("it never came", || {
        world.process();
        late.count() == (1, 0)
    });
    let frozen = world.controller().freeze().unwrap();
    assert!(!frozen.wait(Some(MS)));
    assert_eq!(late.count(), (1, 1));
    frozen.thaw();
    late.release();
    common::until("it never goes on", || late.count() == (1, 0));
    {
        let requests = late.requests.lock().unwrap();
        let (request, _) = &requests[0];
        assert_eq!((request.offset, request.bytes), (100 * 512 + 1024, 4096 - 1024));
    }
    assert_eq!(world.answered().len(), 0);
    late.release();
    common::until("it is not answered", || world.answered().len() == 1);
    succeeded(&world.answered(), &[4096], "");
    assert_eq!(world.answered()[0].0, number);
}

#[test]
fn hundreds_of_requests_on_several_channels_move_again_and_again() {
    let mut world = World::new();
    world.open_sub_channels(3);
    let mut number = 0u64;
    let mut seed = 1u64;
    let mut expected = vec![0xffu8; 1 << 20];
    for round in 0..8 {
        world.medium.set_slots(24);
        world.medium.choose_fates(move |io| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(io.number | 1);
            Fate {
                parts: u32::from(seed.to_le_bytes()[5] % 4),
                backwards: seed.to_le_bytes()[6].is_multiple_of(2),
                can_cancel: !seed.to_le_bytes()[4].is_multiple_of(4),
                ..Fate::after(Duration::from_micros(seed >> 40 & 0xfff))
            }
        });
        // Each request has its own sectors, so that what they leave is known.
        for _ in 0..28 {
            for channel in 0..4 {
                let block = number * 4 % 2048;
                let stamp = u8::try_from(number % 251).unwrap();
                let data = vec![stamp; 2048];
                if number.is_multiple_of(9) {
                    let flush = Command::synchronize_cache();
                    world.ask_on(channel, flush, DataDirection::None, 0, &[]);
                } else {
                    let write = Command::write(block, 4, number.is_multiple_of(5));
                    world.ask_on(channel, write, DataDirection::Out, 2048, &data);
                    let at = usize::try_from(block * 512).unwrap();
                    expected[at..at + 2048].fill(stamp);
                }
                number += 1;
                if number.is_multiple_of(32) {
                    world.finish(); // their buffers are used again
                }
            }
        }
        world.medium.advance(Duration::from_micros(100 * round));
        let frozen = world.controller().freeze().unwrap();
        while !frozen.wait(Some(Duration::ZERO)) {
            world.medium.advance(MS);
        }
        if round % 3 == 2 {
            // A save that nobody needs.
            drop(save(&frozen));
            frozen.thaw();
        } else {
            world.go_elsewhere(frozen);
        }
    }
    let answers = world.finish();
    assert_eq!(answers.len() as u64, number);
    assert!(answers.iter().all(|(_, srb)| srb.srb_status == SrbStatus::SUCCESS));
    assert!(world.contents() == expected);
    assert_eq!(world.medium.overlaps(), 0);
    const { assert!(BUFFER_BYTES >= 2048) };
}
