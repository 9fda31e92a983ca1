//! A walk through damaged files: what is damaged and where, which streams are not where they should be,
//! and everything that is.

use saved_state::bare;
use saved_state::inspect::{ALL_KINDS, FilePiece, PacketRow, Sizes, What, inspect, inspect_file};
use saved_state::schema::Value;
use saved_state::storage::StorageRequestRecord;
use saved_state::testing::{chunk_ranges, stream_ranges};
use saved_state::{StreamInfo, file};
use vmbus_wire::guid::Guid;

use crate::file::{small_file, streams};
use crate::records::{Incoming, Owned, info, save, small_state};

fn walk(bytes: &[u8]) -> Vec<FilePiece<'_>> {
    let pieces: Vec<_> = inspect_file(bytes, ALL_KINDS).collect();
    let mut at = 0;
    for FilePiece { piece, .. } in &pieces {
        assert_eq!(piece.offset, at, "a gap before byte {}", piece.offset);
        at += piece.length;
    }
    assert_eq!(at, bytes.len() as u64);
    pieces
}

/// A letter for each piece, as for one stream: header, record, stray bytes, what is missing; a capital one
/// if nothing is wrong with it. A bar between streams, and a mark behind what shows that one is not where it
/// should be.
fn sketch(pieces: &[FilePiece<'_>]) -> String {
    let mut sketch = String::new();
    let mut stream = 0;
    for FilePiece { stream: number, piece, misplaced, .. } in pieces {
        if *number != stream {
            sketch.push('|');
            stream = *number;
        }
        let letter = match piece.what {
            What::Header(_) => 'h',
            What::Record(_) => 'r',
            What::Stray => 's',
            What::Missing => 'm',
        };
        sketch.push(if piece.damage.is_none() { letter.to_ascii_uppercase() } else { letter });
        if misplaced.is_some() {
            sketch.push('!');
        }
    }
    sketch
}

#[test]
fn a_whole_file_is_shown_stream_by_stream() {
    let file = small_file();
    let pieces = walk(&file);
    assert_eq!(sketch(&pieces), "HRRRRR|HRRRRRR|HRRRRRR|HR|HRRRRR");
    let listed = |stream: u32| {
        let of_stream = pieces.iter().find(|piece| piece.stream == stream).unwrap();
        of_stream.listed.as_ref().map(|entry| entry.name.to_string())
    };
    assert_eq!(
        [0, 1, 2, 3, 4].map(listed).map(Option::unwrap_or_default),
        ["", "disk", "network", "network, 1", ""]
    );
}

#[test]
fn a_file_of_one_stream_needs_no_list() {
    let [one, two, _] = streams();
    assert_eq!(sketch(&walk(&one)), "HRRRRRR");
    let pieces = walk(&one);
    let alone: Vec<_> = inspect(&one, ALL_KINDS).map(|piece| piece.offset).collect();
    assert_eq!(alone, pieces.iter().map(|piece| piece.piece.offset).collect::<Vec<_>>());
    let both = [&one[..], &two].concat();
    assert_eq!(sketch(&walk(&both)), "HRRRRRR|H!RRRRRR");
    assert_eq!(sketch(&walk(b"")), "m");
    assert_eq!(sketch(&walk(b"a letter to somebody")), "sm");
}

#[test]
fn what_is_damaged_or_misplaced_is_told_and_all_else_is_shown() {
    let file = small_file();
    let streams = stream_ranges(&file);
    let chunk_at = |stream: usize, chunk: usize| {
        let range = streams[stream].clone();
        let chunk = chunk_ranges(&file[range.clone()])[chunk].clone();
        range.start + chunk.start..range.start + chunk.end
    };
    let flip = |at: usize| {
        let mut bytes = file.clone();
        bytes[at] ^= 0x40;
        bytes
    };
    let order = |order: &[usize]| -> Vec<u8> {
        order.iter().flat_map(|&at| file[streams[at].clone()].iter().copied()).collect()
    };
    let without = |stream: usize, chunk: usize| {
        let chunk = chunk_at(stream, chunk);
        [&file[..chunk.start], &file[chunk.end..]].concat()
    };
    for (name, bytes, expected) in [
        ("a message", flip(chunk_at(2, 3).start + 30), "HRRRRR|HRRRRRR|HRRrRRR|HR|HRRRRR"),
        ("a magic number", flip(chunk_at(2, 3).start), "HRRRRR|HRRRRRR|HRRsRRR|HR|HRRRRR"),
        ("a header's text", flip(streams[2].start + 84), "HRRRRR|HRRRRRR|hRRRRRR|HR|HRRRRR"),
        ("a header's magic number", flip(streams[2].start), "HRRRRR|HRRRRRR|sRRRRRR|HR|HRRRRR"),
        ("the list's header", flip(8), "sRRRRR|HRRRRRR|HRRRRRR|HR|HRRRRR"),
        (
            "an entry of the list",
            flip(chunk_at(0, 3).start + 25),
            "HRRrRR|HRRRRRR|HRRRRRR|HR|HRRRRR",
        ),
        ("the sums' header", flip(streams[4].start), "HRRRRR|HRRRRRR|HRRRRRR|HR|sRRRRR"),
        ("a sum", flip(chunk_at(4, 2).start + 25), "HRRRRR|HRRRRRR|HRRRRRR|HR|HRrRRR"),
        ("an end is missing", without(2, 6), "HRRRRR|HRRRRRR|HRRRRRm|HR|HRRRRR"),
        ("a chunk is missing", without(2, 2), "HRRRRR|HRRRRRR|HRrRRR|HR|HRRRRR"),
        ("a stream is missing", order(&[0, 2, 3, 4]), "HRRRRR|M!HRRRRRR|HR|HRRRRR"),
        ("the last one listed is missing", order(&[0, 1, 2, 4]), "HRRRRR|HRRRRRR|HRRRRRR|M!HRRRRR"),
        (
            "a stream came twice",
            order(&[0, 1, 1, 2, 3, 4]),
            "HRRRRR|HRRRRRR|H!RRRRRR|HRRRRRR|HR|HRRRRR",
        ),
        ("two are swapped", order(&[0, 2, 1, 3, 4]), "HRRRRR|M!HRRRRRR|H!RRRRRR|HR|HRRRRR"),
        ("one is too many", order(&[0, 1, 2, 3, 3, 4]), "HRRRRR|HRRRRRR|HRRRRRR|HR|H!R|HRRRRR"),
        ("the sums are missing", order(&[0, 1, 2, 3]), "HRRRRR|HRRRRRR|HRRRRRR|HRm!"),
        ("the list is missing", order(&[1, 2, 3, 4]), "HRRRRRR|H!RRRRRR|H!R|H!RRRRR"),
        ("only the list", order(&[0]), "HRRRRRM!M!M!m!"),
        (
            "something after it",
            order(&[0, 1, 2, 3, 4, 1]),
            "HRRRRR|HRRRRRR|HRRRRRR|HR|HRRRRR|H!RRRRRR",
        ),
        ("cut", file[..chunk_at(2, 3).end - 5].to_vec(), "HRRRRR|HRRRRRR|HRRsmM!m!"),
    ] {
        let pieces = walk(&bytes);
        assert_eq!(sketch(&pieces), expected, "{name}: {pieces:#?}");
        assert!(file::check(&bytes[..], ALL_KINDS).is_err(), "{name}");
    }
}

#[test]
fn a_stream_of_another_save_is_told_at_its_sum() {
    let file = small_file();
    let range = stream_ranges(&file)[2].clone();
    let mut state = small_state();
    state.swap(1, 2);
    let info = StreamInfo { interface_instance: Guid::from_u128(2), items: 4, ..info() };
    let other = save(info, &state);
    let exchanged = [&file[..range.start], &other, &file[range.end..]].concat();
    let pieces = walk(&exchanged);
    assert_eq!(sketch(&pieces), "HRRRRR|HRRRRRR|HRRRRRR|HR|HRRR!RR");
    let told = pieces.iter().find_map(|piece| piece.misplaced.as_ref()).unwrap().to_string();
    assert!(told.starts_with("stream 2 (network) has checksum "), "{told}");
}

#[test]
fn packets_in_flight_are_rows() {
    let request = StorageRequestRecord {
        lun: 3,
        cdb: vec![0x2a; 10],
        transfer_bytes: 4096,
        ..StorageRequestRecord::default()
    };
    let mut own = vec![0; bare::encoded_len(&request)];
    bare::encode(&request, &mut own).unwrap();
    let cancelled = Incoming {
        order: 2,
        transaction_id: 9,
        fence: 2,
        payload: vec![0; 64],
        device_state: own,
        ..Incoming::default()
    };
    let mut state = small_state();
    state.push(Owned::Incoming(cancelled));
    let stream = save(info(), &state);
    let mut rows = Vec::new();
    let mut sizes = Sizes::default();
    for piece in inspect(&stream, ALL_KINDS) {
        sizes.add(&piece);
        if let What::Record(record) = &piece.what {
            rows.extend(PacketRow::of(record));
        }
    }
    let shown: Vec<_> = rows
        .iter()
        .map(|row| (row.incoming, row.order, row.transaction_id, row.condition, row.handed_back))
        .collect();
    assert_eq!(
        shown,
        [
            (false, 0, None, "queued", None),
            (false, 1, Some(0x1_0000_0002), "in ring", None),
            (true, 0, Some(u64::MAX), "never started", Some("after memory")),
            (true, 1, Some(7), "finished", None),
            (true, 2, Some(9), "cancelled", None),
        ]
    );
    let bytes: Vec<_> = rows
        .iter()
        .map(|row| {
            (row.message_bytes, row.external_bytes, row.completion_bytes, row.own_state.len())
        })
        .collect();
    assert_eq!(bytes[..4], [(7, 0, 0, 0), (0, 0, 0, 6), (8, 8, 0, 0), (0, 0, 6, 6)]);
    assert!(rows[3].own_record().is_none(), "bytes of a device that are no record");
    let own = rows[4].own_record().unwrap();
    let fields: Vec<_> = own
        .fields
        .flatten()
        .map(|found| format!("{} {}", found.field.unwrap().name, found.value))
        .collect();
    assert_eq!((own.name, own.version), ("storage.request", 1));
    assert_eq!(fields, ["lun 3", "cdb 2a2a2a2a2a2a2a2a2a2a", "transfer_bytes 4096"]);

    let rows = sizes.rows();
    let counts: Vec<_> = rows.iter().map(|row| (&*row.name, row.records)).collect();
    assert_eq!(
        counts,
        [
            ("header", 1),
            ("stream.end", 1),
            ("channel.channel", 1),
            ("channel.outgoing_packet", 2),
            ("channel.incoming_packet", 3),
        ]
    );
    assert_eq!(rows.iter().map(|row| row.bytes).sum::<u64>(), stream.len() as u64);
    assert!(rows.iter().all(|row| row.largest <= row.bytes && row.bytes != 0));
}

#[test]
fn values_are_shown_for_people() {
    for (value, expected) in [
        (Value::Bool(true), "true"),
        (Value::Uint32(7), "7"),
        (Value::Uint64(u64::MAX), "18446744073709551615"),
        (Value::Enum { number: 1, name: "server" }, "server"),
        (Value::Text("a \"b\""), "\"a \\\"b\\\"\""),
        (Value::Bytes(&[]), "none"),
        (Value::Bytes(&[0, 255]), "00ff"),
        (
            Value::Bytes(&[0xab; 33]),
            "abababababababababababababababababababababababababababababababab… (33 bytes)",
        ),
        (Value::Guid(Guid::from_u128(1)), "00000000-0000-0000-0000-000000000001"),
    ] {
        assert_eq!(value.to_string(), expected);
    }
}
