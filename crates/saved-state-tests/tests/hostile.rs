//! Bytes that are not what was saved, given to a real channel and a real host: an error with a status, the
//! channel as it was before, and what is right is taken afterwards.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at its first surprise"
)]

use std::collections::BTreeMap;

use kmcl::{NtStatus, RestoreError, Restored};
use saved_state::ReadError;
use saved_state::testing::{chunk_ranges, rechain};
use saved_state_tests::channel::{Fate, Server, Setup, request};
use saved_state_tests::guest::{Rings, Standing};
use saved_state_tests::mutate::{Stream, put_together, take_apart};

/// A channel with four requests and three packets of the device's in flight.
fn saved() -> Vec<u8> {
    let server = Server::new(Setup::default());
    let mut rings = server.open(Standing::default());
    server.channel.start();
    for (number, fate) in [Fate::NeverStarted, Fate::Cancelled, Fate::Finished, Fate::Deferred]
        .into_iter()
        .enumerate()
    {
        let number = u8::try_from(number).unwrap();
        rings.request(u64::from(number), &[], &request(fate, number, 24));
    }
    server.run_at_dispatch();
    server.send(3, b"message");
    server.move_away()
}

/// A channel that waits for a state, and is given one after another.
struct Victim {
    server: Server,
    rings: Rings,
}

impl Victim {
    fn new(right: &[u8]) -> Self {
        let record = saved_state_tests::channel::parts(right).unwrap().record;
        let server = Server::new(Setup::of(&record));
        let standing = Standing {
            read_index: record.read_index,
            write_index: record.write_index,
            resumed: true,
        };
        let rings = server.open(standing);
        Self { server, rings }
    }

    /// What the channel answers to `state`. It is as it was.
    fn refuses(&self, state: &[u8]) -> Option<RestoreError> {
        let before = self.server.channel.state();
        let refused = self.restore(state).err();
        if refused.is_some() {
            self.server.assert_untouched(before);
            for (status, payload) in self.server.take_ended() {
                // Packets that came before what is wrong: they end, and not as if they had been done.
                assert_eq!((status, payload), (NtStatus::CANCELLED, vec![]));
            }
        }
        refused
    }

    /// Gives the channel all of it at once: also what comes behind its end.
    fn restore(&self, state: &[u8]) -> Result<(), RestoreError> {
        let mut restore = self.server.channel.restore()?;
        match restore.feed(state)? {
            Restored::Complete => Ok(()),
            Restored::More => {
                let (chunks, bytes) = (0, state.len() as u64);
                Err(RestoreError::Read(ReadError::Unfinished { chunks, bytes }))
            }
        }
    }

    /// The right state is taken after all that.
    fn takes(self, right: &[u8]) {
        self.restore(right).unwrap();
        drop(self.rings);
        self.server.assert_ends();
    }
}

#[test]
fn a_cut_anywhere_and_a_flip_of_any_bit_leave_the_channel_as_it_was() {
    let right = saved();
    let victim = Victim::new(&right);
    for cut in 0..right.len() {
        assert!(victim.refuses(&right[..cut]).is_some(), "cut at {cut}");
    }
    for bit in 0..right.len() * 8 {
        let mut wrong = right.clone();
        wrong[bit / 8] ^= 1 << (bit % 8);
        assert!(victim.refuses(&wrong).is_some(), "bit {bit}");
    }
    victim.takes(&right);
}

#[test]
fn chunks_dropped_doubled_swapped_or_of_another_channel_leave_the_channel_as_it_was() {
    let right = saved();
    let ranges = chunk_ranges(&right);
    let victim = Victim::new(&right);
    let of = |order: &[usize]| -> Vec<u8> {
        order.iter().flat_map(|&at| right[ranges[at].clone()].to_vec()).collect()
    };
    let all: Vec<_> = (0..ranges.len()).collect();
    let mut orders = Vec::new();
    for at in 0..all.len() {
        let mut dropped = all.clone();
        dropped.remove(at);
        orders.push(dropped);
        let mut doubled = all.clone();
        doubled.insert(at, at);
        orders.push(doubled);
        for with in 0..at {
            let mut swapped = all.clone();
            swapped.swap(at, with);
            orders.push(swapped);
        }
    }
    for order in orders {
        assert!(victim.refuses(&of(&order)).is_some(), "{order:?}");
        // The same by somebody who puts checksums right, but not what is counted.
        let mut wrong = of(&order);
        rechain(&mut wrong);
        assert!(victim.refuses(&wrong).is_some(), "{order:?}, chained");
    }
    // A chunk of another save of the same channel, in its place.
    let other = saved_with_other_packets();
    let other_ranges = chunk_ranges(&other);
    for at in 1..ranges.len().min(other_ranges.len()) {
        let mixed = [
            &right[..ranges[at].start],
            &other[other_ranges[at].clone()],
            &right[ranges[at].end..],
        ]
        .concat();
        if mixed != right {
            assert!(victim.refuses(&mixed).is_some(), "chunk {at}");
        }
    }
    victim.takes(&right);
}

fn saved_with_other_packets() -> Vec<u8> {
    let server = Server::new(Setup::default());
    let mut rings = server.open(Standing::default());
    server.channel.start();
    for number in 10..14 {
        rings.request(u64::from(number), &[], &request(Fate::Cancelled, number, 24));
    }
    server.run();
    server.send(3, b"other");
    server.move_away()
}

/// Everything valid but what one field says.
fn with_message(right: &[u8], at: usize, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut streams = take_apart(right);
    change(&mut streams[0].chunks[at].message);
    put_together(&streams, true)
}

#[test]
fn valid_checksums_over_nonsense_are_refused_by_what_is_wrong() {
    let right = saved();
    let victim = Victim::new(&right);
    // The channel's record is the first, the outgoing packets follow, then the incoming ones.
    let last = |bytes: &'static [u8]| move |message: &mut Vec<u8>| message.extend(bytes);
    let parameter = NtStatus::INVALID_PARAMETER_2;
    for (name, state, status) in [
        ("no side", with_message(&right, 0, |it| it.clear()), parameter),
        ("a client's", with_message(&right, 0, last(&[0x08, 2])), parameter),
        ("a ring of another size", with_message(&right, 0, last(&[0x28, 0x80, 0x20])), parameter),
        (
            "a read index past the ring",
            with_message(&right, 0, last(&[0x38, 0xff, 0xff, 0xff, 0x7f])),
            parameter,
        ),
        ("an odd read index", with_message(&right, 0, last(&[0x38, 3])), parameter),
        (
            "a write index past the ring",
            with_message(&right, 0, last(&[0x40, 0xff, 0xff, 0xff, 0x7f])),
            parameter,
        ),
        ("another packet size", with_message(&right, 0, last(&[0x50, 1])), parameter),
        ("more packets than there are", with_message(&right, 0, last(&[0x98, 0x01, 4])), parameter),
        (
            "fewer packets than there are",
            with_message(&right, 0, last(&[0xa0, 0x01, 3])),
            parameter,
        ),
        (
            "four billion packets",
            with_message(&right, 0, last(&[0xa0, 0x01, 0xff, 0xff, 0xff, 0xff, 0x0f])),
            parameter,
        ),
        ("a place that is none", with_message(&right, 1, last(&[0x10, 9])), parameter),
        (
            "ten gigabytes in ten bytes",
            with_message(&right, 1, |it| {
                it.clear();
                it.extend([0x3a, 0x80, 0x80, 0x80, 0x80, 0x28, 1, 2, 3, 4]);
            }),
            parameter,
        ),
        (
            "a record inside a record",
            with_message(&right, 5, |it| {
                let inner = it.clone();
                it.extend([0x42]);
                it.extend(inner);
            }),
            parameter,
        ),
        (
            "a completion of what has not finished",
            with_message(&right, 5, last(&[0x52, 1, 7])),
            parameter,
        ),
        (
            "external data that cannot be",
            with_message(
                &right,
                5,
                last(&[0x3a, 8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
            ),
            parameter,
        ),
        (
            "nine bytes of external data",
            with_message(&right, 5, last(&[0x3a, 9, 0, 0, 0, 0, 1, 0, 0, 0, 0])),
            parameter,
        ),
        ("an area of another size", with_message(&right, 5, last(&[0x4a, 2, 1, 2])), parameter),
        (
            "a transaction twice",
            {
                let mut streams = take_apart(&right);
                let Stream { chunks, .. } = &mut streams[0];
                let first = chunks[1].message.clone();
                chunks[2].message = first;
                put_together(&streams, true)
            },
            parameter,
        ),
    ] {
        let error = victim.refuses(&state).unwrap_or_else(|| panic!("{name}: taken"));
        assert_eq!(error.status(), status, "{name}: {error}");
        let text = error.to_string();
        assert!(!text.is_empty() && !text.contains("Undecodable"), "{name}: {text}");
        println!("{name}: {text}");
    }
    victim.takes(&right);
}

/// Each number of each record at its extremes: a state, or an error; never more than that.
#[test]
fn every_number_at_its_extremes_is_an_error_or_a_state() {
    let right = saved();
    let mut answers = BTreeMap::<String, u32>::new();
    let chunks = take_apart(&right)[0].chunks.len();
    let mut victim = Victim::new(&right);
    for chunk in 0..chunks - 1 {
        for field in 1..=23_u8 {
            for value in [
                &[0][..],
                &[1],
                &[0xff, 0xff, 0xff, 0xff, 0x0f],
                &[0x80, 0x80, 0x80, 0x80, 0x10],
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
            ] {
                let state = with_message(&right, chunk, |message| {
                    prost::encoding::encode_key(
                        u32::from(field),
                        prost::encoding::WireType::Varint,
                        message,
                    );
                    message.extend(value);
                });
                match victim.refuses(&state) {
                    Some(error) => {
                        let text = format!("{error:?}");
                        let kind = text.split([' ', '(', '{']).next().unwrap().to_owned();
                        *answers.entry(kind).or_default() += 1;
                        assert!(!matches!(error, RestoreError::State { .. }), "{error}");
                    }
                    None => {
                        // Taken: it ends as well as any, and the next one is given to another channel.
                        drop(victim.rings);
                        victim.server.assert_ends();
                        victim = Victim::new(&right);
                    }
                }
            }
        }
    }
    assert!(answers.len() > 2, "{answers:?}");
    victim.takes(&right);
}
