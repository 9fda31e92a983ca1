//! Bytes made by somebody who knows the format: every checksum is right, and what it covers is not.

use proptest::collection::vec;
use proptest::prelude::*;
use saved_state::channel::{CHANNEL, INCOMING_PACKET, OUTGOING_PACKET};
use saved_state::end::END;
use saved_state::inspect::{ALL_KINDS, inspect};
use saved_state::limits::{MAX_CHUNK_BYTES, MAX_HEADER_BYTES, MAX_PACKET_BYTES};
use saved_state::testing::{Handmade, chunk, chunk_ranges, rechain};
use saved_state::{Chunk, Damage, FieldError, FieldProblem, ReadError, RecordKind, StreamHeader};

use crate::records::{info, reader, restore, save, small_state};

/// A stream whose only record is `message`, of a kind.
fn stream_with(kind: RecordKind, message: &[u8]) -> Vec<u8> {
    let mut stream = save(info(), &[]);
    stream.truncate(chunk_ranges(&stream)[0].end);
    let handmade = Handmade { sequence: 1, kind, version: 1, mandatory: true, last: false };
    stream.extend(chunk(handmade, message));
    rechain(&mut stream);
    stream
}

fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut stream = save(info(), &small_state());
    change(&mut stream);
    rechain(&mut stream);
    stream
}

fn put(stream: &mut [u8], at: usize, bytes: &[u8]) {
    stream[at..at + bytes.len()].copy_from_slice(bytes);
}

#[test]
fn messages_that_are_none_are_refused_by_chunk_record_and_field() {
    let cut = |needed, left| FieldProblem::Cut { needed, left };
    let wire = |found, expected| FieldProblem::WireType { found, expected };
    let ten_gigabytes = &[0x2a, 0x80, 0x80, 0x80, 0x80, 0x28, 1, 2, 3, 4][..];
    for (kind, message, number, name, problem) in [
        (OUTGOING_PACKET, ten_gigabytes, 5, "message", cut(10 << 30, 4)),
        (OUTGOING_PACKET, &[0x10], 2, "place", cut(1, 0)),
        (OUTGOING_PACKET, &[], 2, "place", FieldProblem::Missing),
        (OUTGOING_PACKET, &[0x10, 0], 2, "place", FieldProblem::Missing),
        (OUTGOING_PACKET, &[0x10, 3], 2, "place", FieldProblem::Enumeration { found: 3 }),
        (OUTGOING_PACKET, &[0x10, 1, 0x19, 1, 2], 3, "transaction_id", cut(8, 2)),
        (OUTGOING_PACKET, &[0x18, 1], 3, "transaction_id", wire(0, Some(1))),
        (OUTGOING_PACKET, &[0x28, 1], 5, "message", wire(0, Some(2))),
        (OUTGOING_PACKET, &[0x20, 2], 4, "transaction", FieldProblem::Range { found: 2, most: 1 }),
        (OUTGOING_PACKET, &[0x0b, 0x0c], 1, "order", wire(3, None)),
        (OUTGOING_PACKET, &[0x9b, 0x06, 0x9c, 0x06], 99, "", wire(3, None)),
        (OUTGOING_PACKET, &[0x02, 0x00], 0, "", FieldProblem::Number { found: 0 }),
        (
            OUTGOING_PACKET,
            &[0x08, 0xff, 0xff, 0xff, 0xff, 0x10],
            1,
            "order",
            FieldProblem::Range { found: 0x1_0fff_ffff, most: 0xffff_ffff },
        ),
        (
            OUTGOING_PACKET,
            &[0x10, 2, 0x20, 1, 0x2a, 1, 7],
            5,
            "message",
            FieldProblem::Contradiction { other: "place" },
        ),
        (
            OUTGOING_PACKET,
            &[0x10, 2],
            4,
            "transaction",
            FieldProblem::Contradiction { other: "place" },
        ),
        (INCOMING_PACKET, &[0x32, 0x05, 1, 2], 6, "payload", cut(5, 2)),
        (INCOMING_PACKET, &[0x08, 1], 4, "fence", FieldProblem::Missing),
        (INCOMING_PACKET, &[0x20, 9], 4, "fence", FieldProblem::Enumeration { found: 9 }),
        (
            INCOMING_PACKET,
            &[0x20, 1, 0x52, 1, 7],
            10,
            "completion",
            FieldProblem::Contradiction { other: "fence" },
        ),
        (
            INCOMING_PACKET,
            &[0x20, 1, 0x3a, 1, 7, 0x40, 1],
            7,
            "extension",
            FieldProblem::Contradiction { other: "refused_external_bytes" },
        ),
        (CHANNEL, &[], 1, "side", FieldProblem::Missing),
        (
            CHANNEL,
            &[0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
            1,
            "side",
            FieldProblem::Enumeration { found: u64::MAX },
        ),
        (
            CHANNEL,
            &[0x08, 1, 0x92, 0x01, 0xff, 0xff, 0xff, 0x7f],
            18,
            "user_data",
            cut(0x0fff_ffff, 0),
        ),
        (CHANNEL, &[0x80; 11], 0, "", FieldProblem::Varint),
    ] {
        let stream = stream_with(kind, message);
        let offset = chunk_ranges(&stream)[1].start as u64;
        match restore(&stream) {
            Err(ReadError::Record { chunk: 1, offset: found, why, .. }) => {
                assert_eq!(why, FieldError { number, name, problem }, "{kind} {message:02x?}");
                assert_eq!(found, offset);
            }
            other => panic!("{kind} {message:02x?}: {other:?}"),
        }
    }
}

#[test]
fn a_field_longer_than_its_bound_is_refused() {
    let mut message = vec![0x10, 1, 0x2a];
    message.extend([0x80 | 0x79, 0x80 | 0x7f, 0x1f]); // MAX_PACKET_BYTES + 1
    message.resize(message.len() + MAX_PACKET_BYTES + 1, 7);
    let (found, most) = (MAX_PACKET_BYTES as u64 + 1, MAX_PACKET_BYTES as u64);
    match restore(&stream_with(OUTGOING_PACKET, &message)) {
        Err(ReadError::Record { record: "channel.outgoing_packet", why, .. }) => {
            assert_eq!(why.problem, FieldProblem::Length { found, most });
            assert_eq!(why.to_string(), "field message (5): 524281 bytes, at most 524280");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_record_inside_a_record_is_just_bytes() {
    // A message in a field of bytes, nested as deep as a chunk is long: nobody follows it.
    let mut message = Vec::new();
    for _ in 0..2000 {
        let mut outer = vec![0x3a];
        prost::encode_length_delimiter(message.len(), &mut outer).unwrap();
        outer.extend(&message);
        message = outer;
    }
    message.extend([0x10, 1]);
    assert_eq!(
        restore(&stream_with(OUTGOING_PACKET, &message)).map_err(|error| match error {
            ReadError::Unfinished { chunks, .. } => chunks,
            other => panic!("{other}"),
        }),
        Err(2)
    );
}

#[test]
fn lengths_of_chunks_at_their_extremes_are_refused() {
    let stream = save(info(), &small_state());
    let second = chunk_ranges(&stream)[1].clone();
    let available = (stream.len() - second.start) as u64;
    let bounds = |found| Damage::Length { found, least: 28, most: MAX_CHUNK_BYTES };
    for (length, expected) in [
        (0, bounds(0)),
        (27, bounds(27)),
        (MAX_CHUNK_BYTES + 1, bounds(MAX_CHUNK_BYTES + 1)),
        (u32::MAX, bounds(u32::MAX)),
        (MAX_CHUNK_BYTES, Damage::Cut { needed: u64::from(MAX_CHUNK_BYTES), available }),
        (available as u32 + 1, Damage::Cut { needed: available + 1, available }),
    ] {
        let mut bytes = stream.clone();
        put(&mut bytes, second.start + 4, &length.to_le_bytes());
        let offset = second.start as u64;
        let error = ReadError::Damaged { chunk: 1, offset, why: expected };
        assert_eq!(restore(&bytes), Err(error), "length {length}");
    }
}

#[test]
fn headers_at_their_extremes_are_refused() {
    let header_length = chunk_ranges(&save(info(), &[]))[0].end as u32;
    let bounds = |found| Damage::Length { found, least: 132, most: MAX_HEADER_BYTES };
    let table =
        |rows, row_bytes, offset| Damage::Table { rows, row_bytes, offset, length: header_length };
    for (at, bytes, expected) in [
        (8, &0_u32.to_le_bytes()[..], bounds(0)),
        (8, &131_u32.to_le_bytes(), bounds(131)),
        (8, &4097_u32.to_le_bytes(), bounds(4097)),
        (8, &u32::MAX.to_le_bytes(), bounds(u32::MAX)),
        (18, &u16::MAX.to_le_bytes(), table(u16::MAX, 32, 128)),
        (18, &5_u16.to_le_bytes(), table(5, 32, 128)),
        (20, &31_u16.to_le_bytes(), table(4, 31, 128)),
        (20, &0_u16.to_le_bytes(), table(4, 0, 128)),
        (20, &u16::MAX.to_le_bytes(), table(4, u16::MAX, 128)),
        (22, &127_u16.to_le_bytes(), table(4, 32, 127)),
        (22, &129_u16.to_le_bytes(), table(4, 32, 129)),
        (22, &u16::MAX.to_le_bytes(), table(4, 32, u16::MAX)),
        (80, b"\x1b[2J", Damage::Text { what: "the producer" }),
        (136, b"\x1b[2J", Damage::Text { what: "the name of a kind" }),
        (160, &1_u16.to_le_bytes(), Damage::Twice { kind: END }),
    ] {
        let stream = changed(|stream| put(stream, at, bytes));
        let error = ReadError::Damaged { chunk: 0, offset: 0, why: expected };
        assert_eq!(restore(&stream), Err(error), "byte {at}: {bytes:02x?}");
        assert_eq!(StreamHeader::read(&stream).err(), Some(error));
    }
}

#[test]
fn chunks_that_contradict_the_header_are_refused() {
    let second = chunk_ranges(&save(info(), &small_state()))[1].start;
    let at = |offset: usize| second + offset;
    for (offset, bytes, expected) in [
        (
            12,
            &[19, 0][..],
            Damage::NotAnnounced { kind: RecordKind(19), version: 1, mandatory: true },
        ),
        (14, &[2, 0], Damage::NotAnnounced { kind: CHANNEL, version: 2, mandatory: true }),
        (16, &[0, 0], Damage::NotAnnounced { kind: CHANNEL, version: 1, mandatory: false }),
        (16, &[3, 0], Damage::Last { kind: CHANNEL, last: true }),
        (12, &[1, 0], Damage::Last { kind: END, last: false }),
        (16, &[6, 0], Damage::Flags { found: 6, known: 3 }),
        (16, &[2, 0x80], Damage::Flags { found: 0x8002, known: 3 }),
        (18, &[1, 0], Damage::Reserved { found: 1 }),
        (8, &[0, 0, 0, 0], Damage::Sequence { found: 0, expected: 1 }),
        (8, &[255; 4], Damage::Sequence { found: u32::MAX, expected: 1 }),
        (0, b"CHNk", Damage::Magic { found: *b"CHNk" }),
    ] {
        let stream = changed(|stream| put(stream, at(offset), bytes));
        let error = ReadError::Damaged { chunk: 1, offset: second as u64, why: expected };
        assert_eq!(restore(&stream), Err(error), "byte {offset} of the chunk: {bytes:02x?}");
    }
}

#[test]
fn an_end_that_lies_is_refused() {
    let stream = save(info(), &small_state());
    let end = chunk_ranges(&stream).pop().unwrap();
    let (chunks, bytes) = (6, end.start as u64);
    let mut message = vec![0x08, chunks, 0x10];
    prost::encode_length_delimiter(end.start, &mut message).unwrap();
    let handmade = Handmade { sequence: 6, kind: END, version: 1, mandatory: true, last: true };
    let with_end = |message: &[u8]| {
        let mut changed = stream[..end.start].to_vec();
        changed.extend(chunk(handmade, message));
        rechain(&mut changed);
        restore(&changed)
    };
    assert_eq!(with_end(&message), Ok(small_state()));
    for (at, stated, what) in
        [(1, 5, "chunks before the last"), (3, 0, "bytes before the last chunk")]
    {
        let mut lie = message.clone();
        lie[at] = if at == 1 { 5 } else { lie[at] ^ 1 };
        match with_end(&lie) {
            Err(ReadError::Damaged {
                chunk: 6,
                why: Damage::Total { what: found, stated: found_stated, counted },
                ..
            }) => {
                assert_eq!(found, what);
                if at == 1 {
                    assert_eq!((found_stated, counted), (stated, 6));
                } else {
                    assert_eq!((found_stated, counted), (bytes ^ 1, bytes));
                }
            }
            other => panic!("{what}: {other:?}"),
        }
    }
    match with_end(&[]) {
        Err(ReadError::Record { record: "stream.end", why, .. }) => {
            assert_eq!((why.name, why.problem), ("chunks", FieldProblem::Missing));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_chunk_on_its_own_is_checked_as_far_as_it_can_be() {
    let stream = save(info(), &small_state());
    let range = chunk_ranges(&stream)[2].clone();
    let mut bytes = stream[range].to_vec();
    let kinds = saved_state::channel::KINDS;
    let chunk = Chunk::alone(&bytes, kinds).unwrap();
    assert_eq!((chunk.kind(), chunk.sequence(), chunk.check()), (OUTGOING_PACKET, 2, Ok(())));
    assert!(Chunk::alone(&bytes[..bytes.len() - 1], kinds).is_err());
    assert!(Chunk::alone(&[], kinds).is_err());
    assert!(Chunk::alone(&bytes, saved_state::storage::KINDS).is_err());
    bytes.push(0);
    let offset = bytes.len() as u64 - 1;
    let error = Chunk::alone(&bytes, kinds).map(|_| ()).unwrap_err();
    assert_eq!(error, ReadError::AfterEnd { offset, bytes: 1 });
}

#[test]
fn another_record_than_asked_for_is_not_decoded() {
    let stream = save(info(), &small_state());
    let chunk = reader()
        .read(&mut &stream[..])
        .unwrap()
        .map(|chunk| chunk.decode::<saved_state::channel::OutgoingPacketRecord<'_>>().map(|_| ()));
    assert_eq!(
        chunk,
        Some(Err(ReadError::OtherRecord {
            chunk: 1,
            found: "channel.channel",
            expected: "channel.outgoing_packet",
        }))
    );
}

/// What somebody who knows the format does to a stream.
#[derive(Clone, Debug)]
enum Change {
    Byte { at: usize, value: u8 },
    Word { at: usize, value: u32 },
    Cut { at: usize },
    Drop { chunk: usize },
    Double { chunk: usize },
    Swap { chunk: usize, with: usize },
    Insert { at: usize, bytes: Vec<u8> },
}

fn change() -> impl Strategy<Value = Change> {
    let place = 0_usize..2000;
    let words = prop_oneof![
        Just(0),
        Just(1),
        Just(u32::MAX),
        Just(MAX_CHUNK_BYTES),
        Just(0x8000_0000),
        any::<u32>()
    ];
    prop_oneof![
        4 => (place.clone(), any::<u8>()).prop_map(|(at, value)| Change::Byte { at, value }),
        4 => (place.clone(), words).prop_map(|(at, value)| Change::Word { at, value }),
        1 => place.clone().prop_map(|at| Change::Cut { at }),
        1 => (0_usize..8).prop_map(|chunk| Change::Drop { chunk }),
        1 => (0_usize..8).prop_map(|chunk| Change::Double { chunk }),
        1 => (0_usize..8, 0_usize..8).prop_map(|(chunk, with)| Change::Swap { chunk, with }),
        1 => (place, vec(any::<u8>(), 1..40)).prop_map(|(at, bytes)| Change::Insert { at, bytes }),
    ]
}

fn apply(stream: &mut Vec<u8>, change: &Change) {
    if stream.is_empty() {
        return;
    }
    let len = stream.len();
    let mut chunks: Vec<_> =
        chunk_ranges(stream).into_iter().map(|range| stream[range].to_vec()).collect();
    let count = chunks.len().max(1);
    match change {
        Change::Byte { at, value } => stream[at % len] = *value,
        Change::Word { at, value } => {
            let at = at % len;
            let room = &mut stream[at..len.min(at + 4)];
            room.copy_from_slice(&value.to_le_bytes()[..room.len()]);
        }
        Change::Cut { at } => stream.truncate(at % len),
        Change::Insert { at, bytes } => {
            let at = at % len;
            stream.splice(at..at, bytes.iter().copied());
        }
        _ if chunks.is_empty() => {}
        Change::Drop { chunk } => {
            chunks.remove(chunk % count);
            *stream = chunks.concat();
        }
        Change::Double { chunk } => {
            let at = chunk % count;
            chunks.insert(at, chunks[at].clone());
            *stream = chunks.concat();
        }
        Change::Swap { chunk, with } => {
            chunks.swap(chunk % count, with % count);
            *stream = chunks.concat();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Whatever is done to a stream, with checksums put right or not: a reader ends, and an inspection
    /// accounts for every byte. Where the reader finds nothing wrong, neither does the inspection.
    #[test]
    fn nothing_that_is_done_to_a_stream_goes_further_than_an_error(
        changes in vec(change(), 1..6),
        put_right in any::<bool>(),
    ) {
        let mut stream = save(info(), &small_state());
        for change in &changes {
            apply(&mut stream, change);
        }
        if put_right {
            rechain(&mut stream);
        }
        let restored = restore(&stream);
        let mut at = 0;
        let mut damage = None;
        for piece in inspect(&stream, ALL_KINDS) {
            prop_assert_eq!(piece.offset, at);
            at += piece.length;
            damage = damage.or(piece.damage);
        }
        prop_assert_eq!(at, stream.len() as u64);
        if restored.is_ok() {
            prop_assert_eq!(damage, None);
        }
    }

    /// Any bytes at all, behind a magic number or not.
    #[test]
    fn any_bytes_end_in_an_error(
        mut bytes in vec(any::<u8>(), 0..400),
        magic in any::<bool>(),
    ) {
        if magic {
            bytes.splice(0..0, *b"\x89KMCL\r\n\x1a");
            rechain(&mut bytes);
        }
        prop_assert!(restore(&bytes).is_err());
        let total: u64 = inspect(&bytes, ALL_KINDS).map(|piece| piece.length).sum();
        prop_assert_eq!(total, bytes.len() as u64);
    }

    /// Any message in an undamaged chunk: decoded, or refused with a field.
    #[test]
    fn any_message_is_decoded_or_refused(
        kind in prop_oneof![Just(CHANNEL), Just(OUTGOING_PACKET), Just(INCOMING_PACKET)],
        message in vec(any::<u8>(), 0..200),
    ) {
        match restore(&stream_with(kind, &message)) {
            Err(ReadError::Record { chunk: 1, .. } | ReadError::Unfinished { chunks: 2, .. }) => {}
            other => prop_assert!(false, "{:?}", other),
        }
    }
}
