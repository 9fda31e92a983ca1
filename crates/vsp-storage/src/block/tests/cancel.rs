//! What comes back of requests that are asked back, and that nothing of them lands afterwards.

use super::harness::{DISK_BYTES, Rig, all, on_each};
use crate::block::{IoDone, IoOperation, IoOutcome, QUEUE_DEPTH};

const SLOT_BYTES: u64 = 2048;
const COUNT: u64 = QUEUE_DEPTH as u64 + 100;
const _: () = assert!(COUNT * SLOT_BYTES <= DISK_BYTES); // every request has bytes of its own

/// What request `token` does to its own [`SLOT_BYTES`] of the disk. Some go past the page cache, some
/// through it, some by hand, so that each place a request can wait in has some.
fn operation(token: u64) -> IoOperation {
    match token % 8 {
        0..4 => IoOperation::Write { fua: token.is_multiple_of(3) },
        4 | 5 => IoOperation::Discard,
        6 => IoOperation::WriteSame,
        _ => IoOperation::Flush,
    }
}

/// The byte that the slot is full of when its request is done; before, it is 0xff.
fn stamp(token: u64) -> Option<u8> {
    match operation(token) {
        IoOperation::Write { .. } | IoOperation::WriteSame => {
            Some(u8::try_from(token % 250).unwrap() + 1)
        }
        IoOperation::Discard => Some(0),
        _ => None,
    }
}

fn submit_all(rig: &Rig, done: &mut Vec<IoDone>) {
    let mut requests: Vec<_> = (0..COUNT)
        .map(|token| {
            let operation = operation(token);
            let gpa = token * 2 * SLOT_BYTES + token % 2; // every other one is not aligned
            let (len, bytes) = match operation {
                IoOperation::Write { .. } => (2048, Some(SLOT_BYTES)),
                IoOperation::WriteSame => (512, Some(SLOT_BYTES)),
                IoOperation::Flush => (0, Some(0)),
                _ => (0, Some(SLOT_BYTES)),
            };
            rig.memory.fill(gpa, u64::from(len), stamp(token).unwrap_or(0)).unwrap();
            let segments = if len > 0 { &[(gpa, len)][..] } else { &[] };
            let mut request = rig.request(operation, token * SLOT_BYTES, bytes, segments);
            request.token = token;
            request
        })
        .collect();
    rig.backend.submit(&mut requests, done);
}

fn prepare(rig: &Rig) {
    let full = DISK_BYTES.min(COUNT * SLOT_BYTES);
    let chunk = 0x4_0000;
    rig.memory.fill(0, chunk, 0xff).unwrap();
    for offset in (0..full).step_by(0x4_0000) {
        let bytes = chunk.min(full - offset);
        let segments = [(0, u32::try_from(bytes).unwrap())];
        assert_eq!(rig.run(IoOperation::Write { fua: false }, offset, None, &segments), Ok(()));
    }
}

/// Checks that the disk has what the outcome says.
fn judge(contents: &[u8], done: &IoDone) {
    let token = done.request.token;
    let Some(stamp) = stamp(token) else { return };
    let start = usize::try_from(token * SLOT_BYTES).unwrap();
    let slot = &contents[start..start + usize::try_from(SLOT_BYTES).unwrap()];
    let full = |bytes: &[u8], value: u8| bytes.iter().all(|&byte| byte == value);
    let row = format!("request {token}, {:?}: {:?}", operation(token), done.outcome);
    match done.outcome {
        IoOutcome::Done(Ok(())) => assert!(full(slot, stamp), "{row}"),
        IoOutcome::NeverStarted => assert!(full(slot, 0xff), "{row}"),
        IoOutcome::Cancelled { moved } => {
            assert!(full(&slot[..usize::try_from(moved).unwrap()], stamp), "{row}");
        }
        IoOutcome::Done(Err(error)) => panic!("{row}: {error}"),
    }
}

#[test]
fn what_is_asked_back_comes_back_once_and_is_what_it_says() {
    on_each(&all(), |rig| {
        for round in 0..8 {
            prepare(rig);
            rig.forget_cache();
            let mut done = Vec::new();
            submit_all(rig, &mut done);
            let before = done.len();
            // All, or some, or all in two goes.
            match round % 3 {
                0 => rig.backend.cancel(&|_| true, &mut done),
                1 => rig.backend.cancel(&|token| token % 5 < 2, &mut done),
                _ => {
                    rig.backend.cancel(&|token| token.is_multiple_of(2), &mut done);
                    rig.backend.cancel(&|_| true, &mut done);
                }
            }
            let at_once = done.len() - before;
            rig.wait(&mut done, usize::try_from(COUNT).unwrap());
            let contents = rig.contents();
            let mut counts = [0; 3];
            let mut tokens: Vec<u64> = Vec::new();
            for done in &done {
                judge(&contents, done);
                tokens.push(done.request.token);
                counts[match done.outcome {
                    IoOutcome::Done(_) => 0,
                    IoOutcome::NeverStarted => 1,
                    IoOutcome::Cancelled { .. } => 2,
                }] += 1;
                let is_wanted = round % 3 != 1 || done.request.token % 5 < 2;
                assert!(is_wanted || matches!(done.outcome, IoOutcome::Done(_)), "{done:?}");
            }
            let [finished, never, cancelled] = counts;
            eprintln!(
                "done {finished}, never started {never}, cancelled {cancelled}; {at_once} at once"
            );
            tokens.sort_unstable();
            assert_eq!(tokens, (0..COUNT).collect::<Vec<_>>());
            // The back end goes on as before, and nothing comes late.
            assert_eq!(rig.run(IoOperation::Flush, 0, Some(0), &[]), Ok(()));
            assert!(rig.contents() == contents);
        }
    });
}

#[test]
fn a_request_that_was_asked_back_can_be_performed_again_from_where_it_was() {
    on_each(&all(), |rig| {
        prepare(rig);
        let mut done = Vec::new();
        submit_all(rig, &mut done);
        rig.backend.cancel(&|_| true, &mut done);
        rig.wait(&mut done, usize::try_from(COUNT).unwrap());
        let mut again = Vec::new();
        for IoDone { mut request, outcome } in done {
            let moved = match outcome {
                IoOutcome::Done(result) => {
                    assert_eq!(result, Ok(()));
                    continue;
                }
                IoOutcome::NeverStarted => 0,
                IoOutcome::Cancelled { moved } => moved,
            };
            let token = request.token;
            let (offset, bytes) = (request.offset + moved, request.bytes - moved);
            let gpa = token * 2 * SLOT_BYTES + token % 2;
            let segments = match request.operation {
                IoOperation::Write { .. } => vec![(gpa + moved, u32::try_from(bytes).unwrap())],
                IoOperation::WriteSame => vec![(gpa, 512)],
                _ => vec![],
            };
            request = rig.request(request.operation, offset, Some(bytes), &segments);
            request.token = token;
            again.push(request);
        }
        let done = rig.run_all(again);
        assert!(done.iter().all(|done| done.outcome == IoOutcome::Done(Ok(()))));
        let contents = rig.contents();
        for (token, slot) in (0..COUNT).zip(contents.chunks(usize::try_from(SLOT_BYTES).unwrap())) {
            let expected = stamp(token).unwrap_or(0xff);
            assert!(slot.iter().all(|&byte| byte == expected), "{token}");
        }
    });
}

#[test]
fn bytes_are_read_past_the_queues() {
    on_each(&all(), |rig| {
        rig.memory.write(0, b"the first bytes of the disk").unwrap();
        assert_eq!(rig.run(IoOperation::Write { fua: false }, 0, None, &[(0, 512)]), Ok(()));
        let mut bytes = [0; 9];
        assert_eq!(rig.backend.read_now(4, &mut bytes), Some(Ok(())));
        assert_eq!(&bytes, b"first byt");
        let beyond = rig.backend.read_now(DISK_BYTES - 4, &mut bytes);
        assert!(matches!(beyond, Some(Err(_))), "{beyond:?}");
    });
}
