//! A walk through damaged streams: what is damaged and where, and everything that is not.

use saved_state::inspect::{ALL_KINDS, Piece, What, inspect};
use saved_state::schema::Value;
use saved_state::testing::{Handmade, chunk, chunk_ranges, format_version, rechain};
use saved_state::{
    Damage, FormatVersion, ReadError, Record, RecordKind, StreamWriter, channel, storage,
};

use crate::records::{info, push, save, small_state};

fn small() -> Vec<u8> {
    save(info(), &small_state())
}

fn walk(bytes: &[u8]) -> Vec<Piece<'_>> {
    let pieces: Vec<_> = inspect(bytes, ALL_KINDS).collect();
    let mut at = 0;
    for piece in &pieces {
        assert_eq!(piece.offset, at, "a gap before byte {}", piece.offset);
        at += piece.length;
    }
    assert_eq!(at, bytes.len() as u64);
    pieces
}

/// A letter for each piece: header, record, stray bytes, what is missing; a capital one if nothing is
/// wrong with it.
fn sketch(pieces: &[Piece<'_>]) -> String {
    let letter = |piece: &Piece<'_>| {
        let letter = match piece.what {
            What::Header(_) => 'h',
            What::Record(_) => 'r',
            What::Stray => 's',
            What::Missing => 'm',
        };
        if piece.damage.is_none() { letter.to_ascii_uppercase() } else { letter }
    };
    pieces.iter().map(letter).collect()
}

#[test]
fn a_whole_stream_is_shown_with_names_and_fields() {
    let stream = small();
    let pieces = walk(&stream);
    assert_eq!(sketch(&pieces), "HRRRRRR");
    let What::Header(Some(header)) = &pieces[0].what else { panic!("no header") };
    assert_eq!(header.info, info());
    let names: Vec<_> = pieces
        .iter()
        .filter_map(|piece| match &piece.what {
            What::Record(seen) => seen.name.as_deref(),
            _ => None,
        })
        .collect();
    let (outgoing, incoming) = ("channel.outgoing_packet", "channel.incoming_packet");
    assert_eq!(names, ["channel.channel", outgoing, outgoing, incoming, incoming, "stream.end"]);
    let What::Record(seen) = &pieces[3].what else { panic!("no record") };
    let fields: Vec<_> = seen
        .fields
        .clone()
        .map(|field| field.unwrap())
        .map(|field| (field.field.unwrap().name, field.value))
        .collect();
    assert_eq!(
        fields,
        [
            ("order", Value::Uint32(1)),
            ("place", Value::Enum { number: 2, name: "in_ring" }),
            ("transaction_id", Value::Uint64(0x1_0000_0002)),
            ("transaction", Value::Bool(true)),
            ("driver_state", Value::Bytes(b"driver")),
        ]
    );
}

#[test]
fn what_is_damaged_is_told_and_all_else_is_shown() {
    let stream = small();
    let ranges = chunk_ranges(&stream);
    let flip = |at: usize| {
        let mut bytes = stream.clone();
        bytes[at] ^= 0x40;
        bytes
    };
    let without = |chunks: &[usize]| -> Vec<u8> {
        let kept = ranges.iter().enumerate().filter(|(at, _)| !chunks.contains(at));
        kept.flat_map(|(_, range)| stream[range.clone()].iter().copied()).collect()
    };
    for (name, bytes, expected) in [
        ("a message", flip(ranges[3].start + 30), "HRRrRRR"),
        ("a checksum", flip(ranges[3].end - 1), "HRRrrRR"),
        ("a magic number", flip(ranges[3].start), "HRRsRRR"),
        ("a length", flip(ranges[3].start + 4), "HRRsRRR"),
        ("the last message", flip(ranges[6].start + 25), "HRRRRRrm"),
        ("the producer", flip(84), "hRRRRRR"),
        ("the header's length", flip(9), "sRRRRRR"),
        ("the magic number of it all", flip(0), "sRRRRRR"),
        ("a chunk is missing", without(&[3]), "HRRrRR"),
        ("the header is missing", without(&[0]), "sRRRRR"),
        ("the end is missing", without(&[6]), "HRRRRRm"),
        ("cut in a chunk", stream[..ranges[3].end - 5].to_vec(), "HRRsm"),
        ("nothing", Vec::new(), "m"),
        ("something after it", [&stream[..], b"more"].concat(), "HRRRRRRs"),
        ("twice", [&stream[..], &stream[..]].concat(), "HRRRRRRs"),
    ] {
        let pieces = walk(&bytes);
        assert_eq!(sketch(&pieces), expected, "{name}: {pieces:#?}");
    }
}

#[test]
fn a_stream_that_cannot_be_read_is_shown_as_far_as_its_header() {
    let later = format_version(9, 9);
    let mut writer = StreamWriter::new(later, info(), channel::KINDS).unwrap();
    let mut stream = Vec::new();
    push(&mut stream, |out| writer.header(out).unwrap());
    push(&mut stream, |out| small_state()[0].write(&mut writer, out));
    push(&mut stream, |out| writer.end(out).unwrap());
    let pieces = walk(&stream);
    assert_eq!(sketch(&pieces), "hRR");
    assert!(matches!(pieces[0].damage, Some(ReadError::Revision { found: 9, needs: 9, .. })));
    assert!(matches!(&pieces[0].what, What::Header(Some(_))));
}

#[test]
fn records_are_named_by_the_header_where_they_are_unknown_here() {
    let kinds = &[storage::StorageRecord::KIND];
    let mut writer = StreamWriter::new(FormatVersion::NEWEST, info(), kinds).unwrap();
    let mut stream = Vec::new();
    push(&mut stream, |out| writer.header(out).unwrap());
    let record = storage::StorageRecord {
        step: storage::InitStep::Ready as i32,
        protocol_version: 0x0602,
        ..storage::StorageRecord::default()
    };
    push(&mut stream, |out| writer.record(&record, out).unwrap());
    push(&mut stream, |out| writer.end(out).unwrap());
    let pieces: Vec<_> = inspect(&stream, channel::KINDS).collect();
    let What::Record(seen) = &pieces[1].what else { panic!("no record") };
    assert_eq!((seen.name.as_deref(), seen.known), (Some("storage.controller"), false));
    assert!(matches!(
        pieces[1].damage,
        Some(ReadError::UnknownRecord { kind: RecordKind(128), .. })
    ));
    assert_eq!(sketch(&walk(&stream)), "HRR");
}

#[test]
fn fields_that_are_wrong_are_told_where_they_are() {
    let mut stream = small();
    stream.truncate(chunk_ranges(&stream)[2].start);
    let kind = channel::OUTGOING_PACKET;
    let handmade = Handmade { sequence: 2, kind, version: 1, mandatory: true, last: false };
    let at = stream.len() as u64;
    stream.extend(chunk(handmade, &[0x08, 1, 0x10, 2]));
    rechain(&mut stream);
    let pieces = walk(&stream);
    assert_eq!(sketch(&pieces), "HRrm");
    let text = pieces[2].damage.unwrap().to_string();
    assert_eq!(
        text,
        format!(
            "chunk 2 at byte {at}, record channel.outgoing_packet: \
             field transaction (4): contradicts field place"
        )
    );
}

/// Chunks that each claim to be as long as a chunk can be, and are not: the search for the next good one
/// gives up before it has cost much.
#[test]
fn a_stream_made_to_be_searched_in_vain_costs_no_more_than_its_length() {
    let mut bytes = small();
    let ranges = chunk_ranges(&bytes);
    let good = bytes[ranges[1].clone()].to_vec();
    bytes.truncate(ranges[0].end);
    let claim = (3_u32 << 20).to_le_bytes();
    while bytes.len() < 4 << 20 {
        bytes.extend(b"CHNK");
        bytes.extend(claim);
        bytes.extend([0; 20]);
        if bytes.len().is_multiple_of(3) {
            bytes.extend(&good);
        }
    }
    // Searched to the end, it would show thousands of good chunks, and take checksums of a hundred
    // gigabytes. Each claim that is followed in vain costs 3 MiB of four times the input.
    let pieces = walk(&bytes);
    assert!(pieces.len() < 40, "{}", sketch(&pieces));
    assert!(pieces.iter().any(|piece| piece.length > 3 << 20), "given up at some point");
}

#[test]
fn every_kind_of_every_owner_is_known_to_tools() {
    for kind in channel::KINDS.iter().chain(storage::KINDS) {
        assert!(ALL_KINDS.iter().any(|known| known.kind == kind.kind), "{}", kind.name);
    }
    let cut = Damage::Cut { needed: 132, available: 8 };
    let error = ReadError::Damaged { chunk: 0, offset: 0, why: cut };
    let pieces = walk(b"\x89KMCL\r\n\x1a");
    assert_eq!(pieces[0].damage, Some(error));
}
