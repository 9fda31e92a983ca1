//! The ledger against a model of a server that is moved again and again: a correct one is never
//! accused, and a broken one always is.

#![expect(clippy::cast_possible_truncation, reason = "the numbers of these tests are small")]

use proptest::prelude::*;

use super::*;

const BLOCK: usize = 512;
const BLOCKS: u64 = 8;
const DEPTH: usize = 16;

/// What the model does wrong when it is moved.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Fault {
    None,
    /// Requests are done again although their originals may still be done.
    ReplayWithoutFence,
    /// A request is forgotten.
    DroppedPacket,
    /// The end of a request is reported before the move and after it.
    DoubledCompletion,
}

/// A request on its way through the server.
#[derive(Clone, Debug)]
struct Request {
    operation: Operation,
    blocks: Range<u64>,
    /// For a write.
    data: Option<Vec<u8>>,
}

/// A server over a disk: requests wait, run at the disk, and their ends wait to be seen.
struct Server {
    disk: Vec<u8>,
    waiting: Vec<Request>,
    running: Vec<Request>,
    ended: Vec<(Request, Vec<u8>)>,
    /// Originals that nobody waits for and that the disk does nevertheless.
    ghosts: Vec<Request>,
    fault: Fault,
}

/// A small generator of numbers, the same for the same seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }

    fn take<T>(&mut self, from: &mut Vec<T>) -> Option<T> {
        (!from.is_empty()).then(|| from.swap_remove(self.below(from.len() as u64) as usize))
    }
}

impl Server {
    fn bytes(&mut self, blocks: &Range<u64>) -> &mut [u8] {
        &mut self.disk[blocks.start as usize * BLOCK..blocks.end as usize * BLOCK]
    }

    /// The disk does what `request` asks for.
    fn perform(&mut self, request: &Request) -> Vec<u8> {
        let bytes = self.bytes(&request.blocks);
        match &request.data {
            Some(data) => {
                bytes.copy_from_slice(data);
                Vec::new()
            }
            None => bytes.to_vec(),
        }
    }

    fn step(&mut self, dice: &mut Dice) {
        match dice.below(4) {
            0 | 1 => {
                let request = dice.take(&mut self.waiting);
                self.running.extend(request);
            }
            2 => {
                if let Some(request) = dice.take(&mut self.running) {
                    let data = self.perform(&request);
                    self.ended.push((request, data));
                }
            }
            _ if dice.below(4) == 0 => {
                if let Some(ghost) = dice.take(&mut self.ghosts) {
                    self.perform(&ghost);
                }
            }
            _ => {}
        }
    }

    /// The server is frozen, saved, killed and restored. What ran was cancelled before, and is done
    /// again; what had ended is reported by the next server.
    fn r#move(&mut self, dice: &mut Dice) {
        if self.fault == Fault::ReplayWithoutFence {
            self.ghosts.extend(self.running.iter().cloned());
        }
        let again = std::mem::take(&mut self.running);
        self.waiting.extend(again);
        if self.fault == Fault::DroppedPacket {
            dice.take(&mut self.waiting);
        }
        if self.fault == Fault::DoubledCompletion {
            let twice = self.ended.first().cloned();
            self.ended.extend(twice);
        }
    }
}

/// Sends `requests` requests of random kinds and places to a server that is moved now and then, and
/// hands back what it is accused of first, and what was counted.
fn run(seed: u64, requests: u64, fault: Fault) -> (Result<(), Violation>, Counts) {
    let mut dice = Dice(seed);
    let mut ledger = Ledger::new(seed, BLOCK as u32, BLOCKS).unwrap();
    let mut server = Server {
        disk: vec![0; BLOCK * BLOCKS as usize],
        waiting: Vec::new(),
        running: Vec::new(),
        ended: Vec::new(),
        ghosts: Vec::new(),
        fault,
    };
    let mut accused = Ok(());
    let mut sent = 0;
    // As many steps as a correct server needs at most, and then some.
    for _ in 0..requests * 40 {
        if sent < requests && ledger.under_way().count() < DEPTH && dice.below(3) == 0 {
            sent += 1;
            let first = dice.below(BLOCKS);
            let blocks = first..(first + 1 + dice.below(3)).min(BLOCKS);
            let mut data = vec![0; BLOCK * (blocks.end - blocks.start) as usize];
            let request = if dice.below(2) == 0 {
                let write = ledger.write(blocks.clone()).unwrap();
                write.fill(&mut data);
                Request { operation: write.operation, blocks, data: Some(data) }
            } else {
                let operation = ledger.read(blocks.clone()).unwrap();
                Request { operation, blocks, data: None }
            };
            server.waiting.push(request);
        }
        if dice.below(20) == 0 {
            server.r#move(&mut dice);
        }
        server.step(&mut dice);
        if dice.below(2) == 0
            && let Some((request, data)) = dice.take(&mut server.ended)
        {
            let judged = match request.data {
                Some(_) => ledger.end_write(request.operation, End::Succeeded),
                None => ledger.end_read(request.operation, &data),
            };
            accused = accused.and(judged);
        }
    }
    for block in 0..BLOCKS {
        let bytes = server.bytes(&(block..block + 1)).to_vec();
        accused = accused.and(ledger.judge(block, &bytes));
    }
    (accused, ledger.counts())
}

#[test]
fn each_fault_is_found() {
    for seed in 0..100 {
        let (accused, counts) = run(seed, 500, Fault::None);
        assert_eq!(accused, Ok(()), "seed {seed}");
        assert_eq!((counts.under_way, counts.duplicated, counts.blocks_accused), (0, 0, 0));
        assert_eq!(counts.ended, 500, "seed {seed}");

        let (accused, _) = run(seed, 500, Fault::ReplayWithoutFence);
        assert!(matches!(accused, Err(Violation::Superseded { .. })), "seed {seed}: {accused:?}");

        let (accused, counts) = run(seed, 500, Fault::DroppedPacket);
        assert_eq!(accused, Ok(()), "seed {seed}: a lost request is no wrong content");
        assert!(counts.under_way > 0, "seed {seed}: {counts:?}");

        let (accused, counts) = run(seed, 500, Fault::DoubledCompletion);
        assert!(matches!(accused, Err(Violation::Duplicate { .. })), "seed {seed}: {accused:?}");
        assert!(counts.duplicated > 0 && counts.under_way == 0, "seed {seed}: {counts:?}");
    }
}

proptest! {
    /// However long it is used and whenever it is moved, a correct server is never accused.
    #[test]
    fn a_correct_server_is_never_accused(seed: u64, requests in 1_u64..400) {
        let (accused, counts) = run(seed, requests, Fault::None);
        prop_assert_eq!(accused, Ok(()));
        prop_assert_eq!((counts.ended, counts.under_way), (requests, 0));
    }

    /// Whatever a disk holds and a server ends, the answer is a judgement.
    #[test]
    fn anything_is_judged(
        bytes in prop::collection::vec(any::<u8>(), 0..1024), block: u64, number: u64,
    ) {
        let mut ledger = Ledger::new(1, 512, 4).unwrap();
        let read = ledger.read(1..3).unwrap();
        prop_assert!(ledger.judge(block, &bytes).is_err() || bytes == [0; 512]);
        let other = Operation::from_number(number);
        prop_assert!(ledger.end_write(other, End::Succeeded).is_err());
        prop_assert!(ledger.end_read(read, &bytes).is_err());
        prop_assert!(ledger.fail_read(other).is_err());
        prop_assert_eq!(ledger.counts().under_way, 0);
    }
}

#[test]
fn what_cannot_be_asked_for() {
    for (block_bytes, expected) in [
        (0, false),
        (32, false),
        (64, true),
        (512, true),
        (4096, true),
        (5000, false),
        (65536, true),
        (131_072, false),
    ] {
        assert_eq!(Ledger::new(1, block_bytes, 1).is_ok(), expected, "{block_bytes}");
    }
    let mut ledger = Ledger::new(1, 512, 4).unwrap();
    for (blocks, expected) in
        [(0..4, true), (3..4, true), (3..5, false), (2..2, false), (0..u64::MAX, false)]
    {
        assert_eq!(ledger.write(blocks.clone()).is_some(), expected, "{blocks:?}");
        assert_eq!(ledger.read(blocks.clone()).is_some(), expected, "{blocks:?}");
    }
}

#[test]
fn what_a_block_is_accused_of() {
    let mut ledger = Ledger::new(1, 512, 4).unwrap();
    let stamped = |ledger: &mut Ledger, blocks: Range<u64>| {
        let mut data = vec![0; 512 * (blocks.end - blocks.start) as usize];
        let write = ledger.write(blocks).unwrap();
        write.fill(&mut data);
        (write.operation, data)
    };
    let (first, old) = stamped(&mut ledger, 1..3);
    let (second, new) = stamped(&mut ledger, 2..3);
    ledger.end_write(first, End::Succeeded).unwrap();
    ledger.end_write(second, End::Failed).unwrap();
    let elsewhere = Violation::Misplaced { block: 1, byte: 0, write: 1, home: 2, home_byte: 0 };
    let torn =
        Violation::Torn { block: 2, byte: 64, before: Writer::Write(2), after: Writer::Write(1) };
    let lost = Violation::Superseded { block: 2, found: Writer::Nobody, by: Writer::Write(2) };
    let mut other = Ledger::new(2, 512, 4).unwrap();
    let mut third = ledger.clone();
    let (_, from_the_future) = stamped(&mut third, 2..3);
    for (block, bytes, expected) in [
        (1, old[..512].to_vec(), Ok(())),
        (2, new.clone(), Ok(())), // the second write has failed: done or not
        (1, old[512..].to_vec(), Err(elsewhere)),
        (2, [&new[..64], &old[576..]].concat(), Err(torn)),
        (2, vec![0; 512], Err(lost)),
        (2, vec![9; 512], Err(Violation::Unknown { block: 2 })),
        (2, from_the_future, Err(Violation::Unissued { block: 2, write: 3 })),
        (2, stamped(&mut other, 2..3).1, Err(Violation::OtherSeed { block: 2, seed: 2 })),
        (2, vec![0; 511], Err(Violation::BlockLength { block: 2, got: 511 })),
        (
            2,
            old[512..].to_vec(),
            Err(Violation::Superseded {
                block: 2,
                found: Writer::Write(1),
                by: Writer::Write(2), // it was seen, so it was done
            }),
        ),
    ] {
        assert_eq!(ledger.judge(block, &bytes), expected, "block {block}");
    }
    assert_eq!(
        ledger.end_write(first, End::Succeeded),
        Err(Violation::Duplicate { operation: first })
    );
    let counts = ledger.counts();
    assert_eq!((counts.blocks_judged, counts.blocks_accused, counts.duplicated), (10, 8, 1));
    assert_eq!((counts.writes, counts.ended, counts.failed), (2, 2, 1));
}

#[test]
fn busy_blocks_are_known() {
    let mut ledger = Ledger::new(1, 512, 16).unwrap();
    let write = ledger.write(4..8).unwrap().operation;
    for (blocks, expected) in
        [(0..4, false), (0..5, true), (5..6, true), (7..9, true), (8..9, false)]
    {
        assert_eq!(ledger.is_busy(blocks.clone()), expected, "{blocks:?}");
    }
    assert_eq!(ledger.under_way().collect::<Vec<_>>(), [(write, 4..8)]);
    ledger.end_write(write, End::Succeeded).unwrap();
    assert!(!ledger.is_busy(0..16));
}
