//! What is written is read back, however it was cut into buffers on either side.

use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;
use saved_state::channel::{IncomingPacketRecord, KINDS, OutgoingPacketRecord};
use saved_state::testing::chunk_ranges;
use saved_state::{Decode, Encode, FormatVersion, Step, StreamWriter};

use crate::records::{Owned, incoming, info, outgoing, reader, restore, save, small_state, state};

/// A stream written into buffers of `sizes`, over and over; where the next chunk needs more, a buffer
/// of just that size.
fn save_into(state: &[Owned], sizes: &[usize]) -> Vec<u8> {
    let mut writer = StreamWriter::new(FormatVersion::NEWEST, info(), KINDS).unwrap();
    let mut stream = Vec::new();
    let mut sizes = sizes.iter().copied().cycle();
    let mut next = 0; // 0 is the header, `state.len() + 1` the end
    let mut needed = 0;
    while !writer.is_ended() {
        let mut buffer = vec![0xee; sizes.next().unwrap().max(needed)];
        needed = 0;
        let mut filled = 0;
        while !writer.is_ended() {
            let before = (writer.chunks(), writer.bytes());
            let room = &mut buffer[filled..];
            let step = match next {
                0 => writer.header(room).unwrap(),
                next if next <= state.len() => state[next - 1].write(&mut writer, room),
                _ => writer.end(room).unwrap(),
            };
            match step {
                Step::Written { bytes } => {
                    filled += bytes;
                    next += 1;
                }
                Step::Needs { bytes } => {
                    assert!(bytes > room.len());
                    assert!(room.iter().all(|&byte| byte == 0xee), "written to a short buffer");
                    assert_eq!((writer.chunks(), writer.bytes()), before);
                    needed = bytes;
                    break;
                }
            }
        }
        stream.extend_from_slice(&buffer[..filled]);
    }
    stream
}

proptest! {
    /// The state alone decides the stream: no sequence of buffer sizes changes a byte of it.
    #[test]
    fn any_buffers_give_the_same_stream(
        state in state(),
        sizes in vec(prop_oneof![0_usize..600, Just(1), Just(1 << 20)], 1..8),
    ) {
        let stream = save(info(), &state);
        prop_assert_eq!(save_into(&state, &sizes), stream);
    }

    /// A reader gives back what the writer was given, with the stream in any whole number of chunks a
    /// buffer, empty buffers included.
    #[test]
    fn any_pieces_give_the_same_state(state in state(), counts in vec(0_usize..4, 1..6)) {
        prop_assume!(counts.iter().any(|&count| count != 0));
        let stream = save(info(), &state);
        let mut reader = reader();
        let mut restored = Vec::new();
        let mut ranges = chunk_ranges(&stream).into_iter();
        for count in counts.iter().cycle() {
            if reader.is_complete() {
                break;
            }
            let taken: Vec<_> = ranges.by_ref().take(*count).collect();
            let mut input = match (taken.first(), taken.last()) {
                (Some(first), Some(last)) => &stream[first.start..last.end],
                _ => &[],
            };
            while let Some(chunk) = reader.read(&mut input).unwrap() {
                prop_assert_eq!(&stream[chunk.offset() as usize..][..chunk.bytes().len()], chunk.bytes());
                restored.push(Owned::read(&chunk).unwrap());
            }
            prop_assert!(input.is_empty());
        }
        prop_assert_eq!(reader.bytes(), stream.len() as u64);
        prop_assert_eq!(reader.finish(), Ok(()));
        prop_assert_eq!(restored, state);
    }

    /// The encoder over borrowed bytes writes what `prost` writes, and reads what `prost` wrote.
    #[test]
    fn an_outgoing_packet_is_what_prost_makes_of_it(packet in outgoing()) {
        let record = packet.record();
        let expected = packet.encode_to_vec();
        prop_assert_eq!(Encode::encoded_len(&record), expected.len());
        let mut bytes = vec![0xee; expected.len()];
        prop_assert_eq!(Encode::encode(&record, &mut bytes), Ok(()));
        prop_assert_eq!(&bytes, &expected);
        prop_assert_eq!(<OutgoingPacketRecord<'_> as Decode<'_>>::decode(&expected), Ok(record));
    }

    /// The same for incoming packets.
    #[test]
    fn an_incoming_packet_is_what_prost_makes_of_it(packet in incoming()) {
        let record = packet.record();
        let expected = packet.encode_to_vec();
        prop_assert_eq!(Encode::encoded_len(&record), expected.len());
        let mut bytes = vec![0xee; expected.len()];
        prop_assert_eq!(Encode::encode(&record, &mut bytes), Ok(()));
        prop_assert_eq!(&bytes, &expected);
        prop_assert_eq!(<IncomingPacketRecord<'_> as Decode<'_>>::decode(&expected), Ok(record));
    }

    /// An encoder given room of another size than it asked for says so, and does not write past it.
    #[test]
    fn a_packet_in_the_wrong_room_is_noticed(packet in incoming(), room in 0_usize..2000) {
        let record = packet.record();
        let fits = Encode::encoded_len(&record) == room;
        prop_assert_eq!(Encode::encode(&record, &mut vec![0; room]).is_ok(), fits);
    }
}

#[test]
fn a_channel_without_packets_is_three_chunks() {
    let state = &small_state()[..1];
    let stream = save(info(), state);
    assert_eq!(chunk_ranges(&stream).len(), 3);
    assert_eq!(restore(&stream).as_deref(), Ok(state));
}

#[test]
fn totals_known_beforehand_are_kept_and_compared() {
    let state = small_state();
    let bytes = save(info(), &state).len() as u64;
    let chunks = state.len() as u32 + 2;
    for (stated_chunks, stated_bytes, fits) in [
        (chunks, bytes, true),
        (0, bytes, true),
        (chunks, 0, true),
        (chunks + 1, bytes, false),
        (chunks, bytes - 1, false),
    ] {
        let info = saved_state::StreamInfo { chunks: stated_chunks, bytes: stated_bytes, ..info() };
        let restored = restore(&save(info, &state));
        assert_eq!(restored.is_ok(), fits, "{stated_chunks} {stated_bytes}: {restored:?}");
    }
}
