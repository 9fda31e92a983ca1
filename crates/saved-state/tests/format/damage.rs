//! Bytes that are not those that were written, or not in that order: noticed before anything in the
//! chunk is used.

use saved_state::testing::{chunk_ranges, rechain};
use saved_state::{Damage, ReadError, StreamInfo};
use vmbus_wire::guid::Guid;

use crate::records::{INSTANCE, Owned, TYPE, info, reader, restore, save, small_state};

fn small() -> Vec<u8> {
    save(info(), &small_state())
}

/// What is read of a stream before the error.
fn before_error(stream: &[u8]) -> (Vec<Owned>, Option<ReadError>) {
    let mut reader = reader();
    let mut state = Vec::new();
    let mut input = stream;
    loop {
        match reader.read(&mut input) {
            Ok(Some(chunk)) => match Owned::read(&chunk) {
                Ok(record) => state.push(record),
                Err(error) => return (state, Some(error)),
            },
            Ok(None) => return (state, reader.finish().err()),
            Err(error) => return (state, Some(error)),
        }
    }
}

#[test]
fn a_cut_anywhere_is_noticed_and_all_before_it_is_right() {
    let stream = small();
    let state = small_state();
    let ranges = chunk_ranges(&stream);
    for cut in 0..stream.len() {
        let (read, error) = before_error(&stream[..cut]);
        let whole = ranges.iter().filter(|range| range.end <= cut).count();
        // One chunk is the header, the last one the end.
        assert_eq!(read, state[..whole.saturating_sub(1)], "cut at {cut}");
        let offset = ranges[..whole].last().map_or(0, |range| range.end) as u64;
        let (chunks, bytes) = (whole as u32, offset);
        match error {
            Some(ReadError::Unfinished { chunks: found, bytes: found_bytes }) => {
                assert_eq!((found, found_bytes), (chunks, bytes), "cut at {cut}");
                assert_eq!(offset, cut as u64);
            }
            Some(ReadError::Damaged {
                chunk,
                offset: found,
                why: Damage::Cut { available, .. },
            }) => {
                assert_eq!((chunk, found), (chunks, offset), "cut at {cut}");
                assert_eq!(available, cut as u64 - offset);
            }
            other => panic!("cut at {cut}: {other:?}"),
        }
    }
}

#[test]
fn any_bit_that_flips_is_noticed_in_its_chunk() {
    let stream = small();
    let state = small_state();
    let ranges = chunk_ranges(&stream);
    for bit in 0..stream.len() * 8 {
        let mut flipped = stream.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let at = ranges.iter().position(|range| range.contains(&(bit / 8))).unwrap();
        let (read, error) = before_error(&flipped);
        assert_eq!(read, state[..at.saturating_sub(1).min(state.len())], "bit {bit}");
        match error {
            Some(ReadError::Damaged { chunk, offset, .. }) => {
                assert_eq!((chunk as usize, offset as usize), (at, ranges[at].start), "bit {bit}");
            }
            Some(ReadError::NotASavedState { .. }) => assert!(bit < 64, "bit {bit}"),
            other => panic!("bit {bit}: {other:?}"),
        }
    }
}

fn assemble(stream: &[u8], order: &[usize]) -> Vec<u8> {
    let ranges = chunk_ranges(stream);
    order.iter().flat_map(|&at| stream[ranges[at].clone()].iter().copied()).collect()
}

#[test]
fn chunks_dropped_doubled_or_swapped_are_noticed_at_the_first_one_out_of_place() {
    let stream = small();
    let last = chunk_ranges(&stream).len() - 1;
    assert_eq!(last, 6);
    for (order, place, sequence) in [
        (&[0, 2, 3, 4, 5, 6][..], 1, 2),
        (&[0, 1, 3, 4, 5, 6], 2, 3),
        (&[0, 1, 2, 3, 4, 6], 5, 6),
        (&[0, 1, 1, 2, 3, 4, 5, 6], 2, 1),
        (&[0, 1, 2, 3, 4, 5, 5, 6], 6, 5),
        (&[0, 1, 3, 2, 4, 5, 6], 2, 3),
        (&[0, 6], 1, 6),
        (&[0, 1, 2, 3, 4, 6, 5], 5, 6),
    ] {
        let (read, error) = before_error(&assemble(&stream, order));
        let why = Damage::Sequence { found: sequence, expected: place };
        let found = match error {
            Some(ReadError::Damaged { chunk, why, .. }) => Some((chunk, why)),
            _ => None,
        };
        assert_eq!(found, Some((place, why)), "{order:?}: {error:?}");
        assert_eq!(read, small_state()[..place as usize - 1], "{order:?}");
    }
}

#[test]
fn a_stream_that_goes_on_or_begins_again_is_noticed() {
    let stream = small();
    let offset = stream.len() as u64;
    for (order, bytes) in
        [(&[0, 1, 2, 3, 4, 5, 6, 6][..], 34), (&[0, 1, 2, 3, 4, 5, 6, 0, 1], 260 + 54)]
    {
        let doubled = assemble(&stream, order);
        let bytes_after = (doubled.len() - stream.len()) as u64;
        assert!(bytes_after.abs_diff(bytes) < 8, "the sizes of this test are about {bytes}");
        assert_eq!(restore(&doubled), Err(ReadError::AfterEnd { offset, bytes: bytes_after }));
    }
    // A second header in the middle is no chunk.
    let again = assemble(&stream, &[0, 1, 0]);
    let found = Damage::Magic { found: *b"\x89KMC" };
    match restore(&again) {
        Err(ReadError::Damaged { chunk: 2, why, .. }) => assert_eq!(why, found),
        other => panic!("{other:?}"),
    }
    // Chunks without a header are no saved state.
    match restore(&assemble(&stream, &[1, 2])) {
        Err(ReadError::NotASavedState { found }) => assert_eq!(&found[..4], b"CHNK"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_chunk_of_another_save_is_noticed_without_a_random_number() {
    let stream = small();
    let ranges = chunk_ranges(&stream);
    let mut earlier = small_state();
    if let Owned::Channel(channel) = &mut earlier[0] {
        channel.write_index -= 8; // the same channel a moment before
    }
    let other_channel = StreamInfo { interface_instance: Guid::from_u128(5), ..info() };
    for (name, other) in [
        ("another save", save(info(), &earlier)),
        ("another channel", save(other_channel, &small_state())),
        ("another flag", save(StreamInfo { items: 1, ..info() }, &small_state())),
    ] {
        assert_eq!(chunk_ranges(&other), ranges, "{name}: of the same shape");
        for at in 2..ranges.len() {
            let mut mixed = stream.clone();
            mixed[ranges[at].clone()].copy_from_slice(&other[ranges[at].clone()]);
            match restore(&mixed) {
                Err(ReadError::Damaged { chunk, why: Damage::Chain { .. }, .. }) => {
                    assert_eq!(chunk as usize, at, "{name}");
                }
                other => panic!("{name}, chunk {at}: {other:?}"),
            }
        }
    }
}

#[test]
fn the_state_of_something_else_is_refused_before_anything_is_read() {
    let stream = small();
    let ok = reader().of_interface(TYPE, INSTANCE).read(&mut &stream[..]).map(|_| ());
    assert_eq!(ok, Ok(()));
    let other = Guid::from_u128(9);
    let error = reader().of_interface(TYPE, other).read(&mut &stream[..]).map(|_| ());
    assert_eq!(
        error,
        Err(ReadError::OtherInterface {
            found_type: TYPE,
            found_instance: INSTANCE,
            expected_type: TYPE,
            expected_instance: other,
        })
    );
    let bus = saved_state::StreamReader::new(saved_state::StreamKind::BUS, &[]);
    assert_eq!(
        bus.clone().read(&mut &stream[..]).map(|_| ()),
        Err(ReadError::OtherStream {
            found: saved_state::StreamKind::CHANNEL,
            expected: saved_state::StreamKind::BUS,
        })
    );
}

#[test]
fn an_error_leaves_the_reader_where_it_was() {
    let stream = small();
    let ranges = chunk_ranges(&stream);
    let mut reader = reader();
    let mut state = Vec::new();
    for range in &ranges {
        // Cut first, then damaged, then whole.
        let mut cut = &stream[range.start..range.end - 1];
        assert!(reader.read(&mut cut).is_err());
        assert_eq!(cut.len(), range.len() - 1);
        let mut damaged = stream[range.clone()].to_vec();
        damaged[range.len() / 2] ^= 0x10;
        assert!(reader.read(&mut &damaged[..]).is_err());
        let mut whole = &stream[range.clone()];
        if let Some(chunk) = reader.read(&mut whole).unwrap() {
            state.push(Owned::read(&chunk).unwrap());
        }
    }
    assert!(reader.is_complete());
    assert_eq!(state, small_state());
}

#[test]
fn rechaining_what_is_right_changes_nothing() {
    let stream = small();
    let mut again = stream.clone();
    rechain(&mut again);
    assert_eq!(again, stream);
}
