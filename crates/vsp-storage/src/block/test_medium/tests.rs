//! The medium does what its fates say.

use super::*;
use crate::block::Buffers;

const MS: Duration = Duration::from_millis(1);
const WRITE: IoOperation = IoOperation::Write { fua: false };

struct Rig {
    medium: TestMedium,
    backend: Arc<TestBackend>,
    memory: GuestMemory,
}

impl Rig {
    fn new() -> Self {
        let medium = TestMedium::new(1 << 20, TestTime::Simulated).unwrap();
        let backend = medium.backend().unwrap();
        let memory = GuestMemory::memfd(1 << 20).unwrap();
        memory.fill(0, 1 << 20, 7).unwrap();
        Self { medium, backend, memory }
    }

    fn submit(&self, backend: &TestBackend, token: u64, offset: u64, bytes: u32) -> Vec<IoDone> {
        let mut buffers = Buffers::new();
        buffers.set(&self.memory, [(0, bytes)], bytes.into()).unwrap();
        let bytes = bytes.into();
        let mut done = Vec::new();
        let request = IoRequest { token, operation: WRITE, offset, bytes, buffers };
        backend.submit(&mut vec![request], &mut done);
        done
    }

    /// What has come out of `backend`: tokens and outcomes.
    fn out(&self, backend: &TestBackend) -> Vec<(u64, IoOutcome)> {
        let mut done = Vec::new();
        backend.reap(&mut done);
        done.iter().map(|done| (done.request.token, done.outcome)).collect()
    }

    fn landed(&self) -> Vec<(u128, u64, u64)> {
        let landed = |event: TestEvent| match event.what {
            TestStep::Landed { offset, bytes } => Some((event.at.as_millis(), offset, bytes)),
            _ => None,
        };
        self.medium.history().into_iter().filter_map(landed).collect()
    }

    fn byte(&self, at: u64) -> u8 {
        let mut byte = [0];
        self.medium.contents().read(at, &mut byte).unwrap();
        byte[0]
    }
}

#[test]
fn parts_land_when_and_where_their_fate_says() {
    for (backwards, expected) in [
        (false, [(10, 0, 1024), (20, 1024, 1536), (30, 2560, 1536)]),
        (true, [(10, 2560, 1536), (20, 1024, 1536), (30, 0, 1024)]),
    ] {
        let rig = Rig::new();
        rig.medium.set_fate(Fate { parts: 3, backwards, ..Fate::after(30 * MS) });
        assert!(rig.submit(&rig.backend, 1, 0, 4096).is_empty());
        assert_eq!(rig.medium.next_at(), Some(10 * MS));
        rig.medium.advance(29 * MS);
        assert_eq!(rig.out(&rig.backend), []);
        assert_eq!(rig.landed(), expected[..2]);
        rig.medium.advance(MS);
        assert_eq!(rig.out(&rig.backend), [(1, IoOutcome::Done(Ok(())))]);
        assert_eq!(rig.landed(), expected);
    }
}

#[test]
fn a_cancelled_request_says_how_far_it_came_and_goes_no_further() {
    for (fate, after_ms, expected, byte) in [
        (Fate { parts: 4, ..Fate::after(40 * MS) }, 25, Some(2048), 7),
        (Fate { parts: 4, backwards: true, ..Fate::after(40 * MS) }, 25, Some(0), 0),
        (Fate::after(40 * MS), 39, Some(0), 0),
        (Fate::after(40 * MS).uncancellable(), 39, None, 7),
        (Fate { stalls: true, parts: 4, ..Fate::after(40 * MS) }, 100, Some(3072), 7),
    ] {
        let rig = Rig::new();
        rig.medium.set_fate(fate);
        rig.submit(&rig.backend, 1, 0, 4096);
        rig.medium.advance(after_ms * MS);
        let mut done = Vec::new();
        rig.backend.cancel(&|token| token == 1, &mut done);
        let outcome = done.first().map(|done| done.outcome);
        let cancelled = expected.map(|moved| IoOutcome::Cancelled { moved });
        assert_eq!(outcome, cancelled, "{fate:?}");
        let landed = rig.landed().len();
        rig.medium.advance(100 * MS);
        if expected.is_some() {
            assert_eq!(rig.landed().len(), landed, "{fate:?}");
        } else {
            assert_eq!(rig.out(&rig.backend), [(1, IoOutcome::Done(Ok(())))]);
        }
        assert_eq!(rig.byte(0), byte, "{fate:?}");
    }
}

#[test]
fn what_has_no_slot_has_not_started_and_what_stalls_waits_for_its_release() {
    let rig = Rig::new();
    rig.medium.set_slots(1);
    rig.medium.set_fate(Fate::stalled());
    rig.submit(&rig.backend, 1, 0, 512);
    rig.submit(&rig.backend, 2, 512, 512);
    rig.submit(&rig.backend, 3, 1024, 512);
    rig.medium.advance(1000 * MS);
    assert_eq!((rig.out(&rig.backend), rig.medium.in_flight()), (vec![], (2, 1)));
    let mut done = Vec::new();
    rig.backend.cancel(&|token| token != 2, &mut done);
    let done: Vec<_> = done.iter().map(|done| (done.request.token, done.outcome)).collect();
    assert_eq!(done, [(3, IoOutcome::NeverStarted)]);
    rig.medium.release();
    let ok = IoOutcome::Done(Ok(()));
    assert_eq!(rig.out(&rig.backend), [(1, ok), (2, ok)]);
    assert_eq!((rig.byte(512), rig.byte(1024)), (7, 0));
}

#[test]
fn errors_come_at_the_end_and_instead_of_the_last_part() {
    let rig = Rig::new();
    let result = Err(IoError::NoSpace);
    rig.medium.set_fate(Fate { parts: 2, result, ..Fate::after(10 * MS) });
    rig.submit(&rig.backend, 1, 0, 4096);
    rig.medium.advance(10 * MS);
    assert_eq!(rig.out(&rig.backend), [(1, IoOutcome::Done(result))]);
    assert_eq!((rig.byte(0), rig.byte(2048)), (7, 0));
}

#[test]
fn the_work_of_one_back_end_goes_on_beside_the_next() {
    let rig = Rig::new();
    let second = rig.medium.backend().unwrap();
    rig.medium.set_fate(Fate::after(10 * MS));
    rig.submit(&rig.backend, 1, 0, 4096);
    rig.submit(&second, 2, 4096, 4096);
    assert_eq!(rig.medium.overlaps(), 0);
    rig.medium.advance(MS);
    rig.submit(&second, 3, 4095 - 511, 512);
    assert_eq!(rig.medium.overlaps(), 1, "the first is still under way");
    assert_eq!(rig.backend.kill(), 1);
    rig.submit(&second, 4, 0, 512);
    assert_eq!(rig.medium.overlaps(), 1, "the first has gone with its process");
    rig.medium.advance(20 * MS);
    assert_eq!(rig.landed().iter().map(|landed| landed.1).collect::<Vec<_>>(), [4096, 3584, 0]);
    assert_eq!(rig.out(&rig.backend), []);
}
