//! The judgement against the definition, which tries every order of events out.

#![expect(clippy::cast_possible_truncation, reason = "the numbers of these tests are small")]

use std::collections::HashSet;

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

/// Something done with the block.
#[derive(Clone, Copy, Debug)]
struct Operation {
    begin: Moment,
    /// `Moment::MAX` while it is in flight.
    end: Moment,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    /// A write of the value with this number.
    Write(u64),
    /// A read that saw the value of this write.
    Read(u64),
}

/// Whether there is an order of `operations`, each at one moment between its begin and its end, in
/// which every read sees the last write before it.
fn is_in_order(operations: &[Operation]) -> bool {
    fn rest(
        operations: &[Operation],
        done: u32,
        holds: u64,
        tried: &mut HashSet<(u32, u64)>,
    ) -> bool {
        let left = || (0..operations.len()).filter(|index| done & (1 << index) == 0);
        let Some(first_end) = left().map(|index| operations[index].end).min() else { return true };
        tried.insert((done, holds))
            && left().filter(|index| operations[*index].begin < first_end).any(|index| {
                match operations[index].kind {
                    Kind::Write(value) => rest(operations, done | 1 << index, value, tried),
                    Kind::Read(value) => {
                        holds == value && rest(operations, done | 1 << index, holds, tried)
                    }
                }
            })
    }
    rest(operations, 0, 0, &mut HashSet::new())
}

/// The same, where each of the writes `perhaps` may have been done or not.
fn can_be_in_order(operations: &[Operation], perhaps: &[Operation]) -> bool {
    (0..1_u32 << perhaps.len()).any(|chosen| {
        let chosen = perhaps.iter().enumerate().filter(|(index, _)| chosen & (1 << index) != 0);
        let all: Vec<_> =
            operations.iter().chain(chosen.map(|(_, write)| write)).copied().collect();
        is_in_order(&all)
    })
}

#[derive(Clone, Debug)]
enum Action {
    BeginWrite,
    BeginRead,
    EndWrite(Index, bool),
    /// Ends a read that has seen some write.
    EndRead(Index, Index),
}

fn any_action() -> impl Strategy<Value = Action> {
    prop_oneof![
        3 => Just(Action::BeginWrite),
        4 => Just(Action::BeginRead),
        3 => (any::<Index>(), prop::bool::weighted(0.8)).prop_map(|(a, b)| Action::EndWrite(a, b)),
        6 => (any::<Index>(), any::<Index>()).prop_map(|(a, b)| Action::EndRead(a, b)),
    ]
}

/// Plays `actions`; each read must be judged as the definition has it. Returns whether all were fine.
fn play(actions: &[Action], eager: bool) -> Result<bool, TestCaseError> {
    let mut history = History::default();
    let (mut now, mut writes) = (0, 0);
    let (mut reads, mut running, mut failed, mut ended) = (vec![], vec![], vec![], vec![]);
    for action in actions {
        now += 1;
        if eager {
            history.crowd = 0;
        }
        match action {
            Action::BeginWrite if writes < 6 => {
                writes += 1;
                history.begin_write(writes, now);
                let kind = Kind::Write(writes);
                running.push(Operation { begin: now, end: Moment::MAX, kind });
            }
            Action::BeginRead if reads.len() < 3 => {
                history.begin_read(now);
                reads.push(now);
            }
            Action::EndWrite(index, succeeded) if !running.is_empty() => {
                let mut write = running.remove(index.index(running.len()));
                write.end = now;
                let Kind::Write(number) = write.kind else { unreachable!() };
                history.end_write(number, *succeeded, now);
                if *succeeded { &mut ended } else { &mut failed }.push(write);
            }
            Action::EndRead(index, value) if !reads.is_empty() => {
                let begin = reads.remove(index.index(reads.len()));
                let value = value.index(writes as usize + 1) as u64;
                ended.push(Operation { begin, end: now, kind: Kind::Read(value) });
                let perhaps: Vec<_> = running.iter().chain(&failed).copied().collect();
                let expected = can_be_in_order(&ended, &perhaps);
                let judged = history.saw(value, begin, now);
                history.end_read(begin);
                prop_assert_eq!(judged.is_ok(), expected, "{:?}, {:?}", ended, perhaps);
                if judged.is_err() {
                    return Ok(false);
                }
            }
            _ => {}
        }
    }
    Ok(true)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    /// A read is accused exactly if no order of events has room for it, whether values are forgotten
    /// as early as possible or not at all.
    #[test]
    fn the_judgement_is_exact(actions in prop::collection::vec(any_action(), 0..24)) {
        prop_assert_eq!(play(&actions, true)?, play(&actions, false)?);
    }
}

/// One step of a table: who writes when, and what a read must be told.
enum Step {
    Begin(u64),
    End(u64),
    Fail(u64),
    Sees(u64),
    MustNotSee(u64, u64),
}

#[test]
fn what_a_block_may_hold() {
    use Step::{Begin, End, Fail, MustNotSee, Sees};
    for (name, steps) in [
        ("the last write", vec![Begin(1), End(1), Begin(2), End(2), Sees(2), MustNotSee(1, 2)]),
        ("nothing lost", vec![Begin(1), End(1), MustNotSee(0, 1), Sees(1)]),
        ("in flight: old or new", vec![Begin(1), End(1), Begin(2), Sees(1), Sees(2)]),
        ("in flight and seen", vec![Begin(1), End(1), Begin(2), Sees(2), MustNotSee(1, 2)]),
        ("overlapping: any order", vec![Begin(1), Begin(2), End(2), End(1), Sees(2)]),
        (
            "overlapping: one order",
            vec![Begin(1), Begin(2), End(2), End(1), Sees(1), MustNotSee(2, 1)],
        ),
        ("failed, done", vec![Begin(1), End(1), Begin(2), Fail(2), Sees(2), MustNotSee(1, 2)]),
        ("failed, not done", vec![Begin(1), End(1), Begin(2), Fail(2), Sees(1), MustNotSee(2, 1)]),
        (
            "failed and done late",
            vec![Begin(1), End(1), Begin(2), Fail(2), Begin(3), End(3), MustNotSee(2, 3), Sees(3)],
        ),
    ] {
        let mut history = History::default();
        let mut now = 0;
        for (at, step) in steps.into_iter().enumerate() {
            now += 2;
            let mut see = |write| history.saw(write, now - 1, now);
            match step {
                Begin(write) => history.begin_write(write, now),
                End(write) => history.end_write(write, true, now),
                Fail(write) => history.end_write(write, false, now),
                Sees(write) => assert_eq!(see(write), Ok(()), "{name}, step {at}"),
                MustNotSee(write, by) => assert_eq!(see(write), Err(by), "{name}, step {at}"),
            }
        }
    }
}

#[test]
fn what_cannot_matter_is_forgotten() {
    let mut history = History::default();
    for write in 1..=10_000 {
        let now = write * 10;
        history.begin_write(write, now);
        history.end_write(write, true, now + 1);
        assert!(history.remembered() <= 4 * CROWD, "{} after {write}", history.remembered());
    }
    assert_eq!(history.saw(1, 200_000, 200_001), Err(10_000));
    assert_eq!(history.saw(10_000, 200_002, 200_003), Ok(()));
}
