//! Streams from later versions, and for earlier ones. The versions here exist in this test alone; what
//! they do is what a release does that has them.

use prost::Message;
use saved_state::channel::{self, ChannelRecord, OUTGOING_PACKET, OutgoingPacketRecord, Place};
use saved_state::inspect::{ALL_KINDS, What, inspect};
use saved_state::kind::{RecordVersion, SINCE_V1};
use saved_state::reader::Kinds;
use saved_state::testing::{Handmade, chunk, chunk_ranges, format_version, reads, rechain};
use saved_state::version::Readable;
use saved_state::{
    Chunk, Damage, Encode, Field, FormatVersion, HeaderFlags, KindInfo, ReadError, Record,
    RecordKind, Shape, Step, StreamHeader, StreamInfo, StreamKind, StreamReader, StreamWriter,
    WriteError, record,
};

use crate::records::{Owned, info, push, reader, restore, save, small_state};

/// A record that a later version adds, and that older readers may skip.
#[derive(Clone, PartialEq, prost::Message)]
struct Statistics {
    #[prost(uint64, tag = "1")]
    packets: u64,
}

impl Record for Statistics {
    const KIND: &'static KindInfo = &KindInfo {
        kind: RecordKind(40),
        name: "channel.statistics",
        mandatory: false,
        versions: &[RecordVersion { format: 2, record: 1 }],
        fields: &[Field::new(1, "packets", Shape::Uint64)],
        check: record::check::<Self>,
    };
}

/// One that they must not skip.
#[derive(Clone, PartialEq, prost::Message)]
struct Lease {
    #[prost(uint64, tag = "1")]
    holder: u64,
}

impl Record for Lease {
    const KIND: &'static KindInfo = &KindInfo {
        kind: RecordKind(41),
        name: "channel.lease",
        mandatory: true,
        versions: &[RecordVersion { format: 2, record: 1 }],
        fields: &[Field::new(1, "holder", Shape::Uint64)],
        check: record::check::<Self>,
    };
}

/// A record as an early version has it.
#[derive(Clone, PartialEq, prost::Message)]
struct Early {
    #[prost(uint32, tag = "1")]
    size: u32,
}

impl Record for Early {
    const KIND: &'static KindInfo = &KindInfo {
        kind: RecordKind(42),
        name: "channel.thing",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[Field::new(1, "size", Shape::Uint32).required()],
        check: record::check::<Self>,
    };
}

/// The same as a later one has it: with a field that may be skipped, which needed no new version, and
/// one that must not be, which did.
#[derive(Clone, PartialEq, prost::Message)]
struct Late {
    #[prost(uint32, tag = "1")]
    size: u32,
    #[prost(string, tag = "2")]
    remark: String,
    #[prost(uint32, tag = "3")]
    unit: u32,
}

impl Record for Late {
    const KIND: &'static KindInfo = &KindInfo {
        kind: RecordKind(42),
        name: "channel.thing",
        mandatory: true,
        versions: &[RecordVersion { format: 1, record: 1 }, RecordVersion { format: 2, record: 2 }],
        fields: &[
            Field::new(1, "size", Shape::Uint32).required(),
            Field::new(2, "remark", Shape::Text { most: 100 }),
            Field::new(3, "unit", Shape::Uint32).since(2),
        ],
        check: record::check::<Self>,
    };
}

const EARLY: Kinds = &[Early::KIND];
const LATE: Kinds = &[Late::KIND, Statistics::KIND];

fn writer(version: FormatVersion, kinds: &[&'static KindInfo]) -> StreamWriter {
    StreamWriter::new(version, info(), kinds).unwrap()
}

fn begin(writer: &mut StreamWriter) -> Vec<u8> {
    let mut stream = Vec::new();
    push(&mut stream, |out| writer.header(out).unwrap());
    stream
}

fn finish(mut writer: StreamWriter, mut stream: Vec<u8>) -> Vec<u8> {
    push(&mut stream, |out| writer.end(out).unwrap());
    stream
}

fn one<R: Encode>(version: FormatVersion, record: &R) -> Result<Vec<u8>, WriteError> {
    let mut writer = writer(version, &[R::KIND]);
    let mut stream = begin(&mut writer);
    let mut room = [0; 512];
    let Step::Written { bytes } = writer.record(record, &mut room)? else { panic!("no room") };
    stream.extend(&room[..bytes]);
    Ok(finish(writer, stream))
}

fn read_one<R: for<'a> saved_state::Decode<'a>>(
    mut reader: StreamReader,
    stream: &[u8],
) -> Result<Option<R>, ReadError> {
    let mut input = stream;
    let mut found = None;
    while let Some(chunk) = reader.read(&mut input)? {
        found = Some(chunk.decode()?);
    }
    reader.finish()?;
    Ok(found)
}

fn knowing(kinds: Kinds) -> StreamReader {
    StreamReader::new(StreamKind::CHANNEL, kinds)
}

#[test]
fn a_field_and_a_record_from_the_future_are_passed_over() {
    let later = format_version(2, 1);
    let kinds: Vec<_> = channel::KINDS.iter().copied().chain([Statistics::KIND]).collect();
    let state = small_state();
    let mut writer = writer(later, &kinds);
    let mut stream = begin(&mut writer);
    for record in &state {
        push(&mut stream, |out| record.write(&mut writer, out));
        push(&mut stream, |out| writer.record(&Statistics { packets: 77 }, out).unwrap());
    }
    let stream = finish(writer, stream);
    assert_eq!(restore(&stream).as_ref(), Ok(&state));

    // The field: one more of each sort, behind those of an outgoing packet.
    let mut with_field = stream[..chunk_ranges(&stream)[3].start].to_vec();
    let Owned::Outgoing(packet) = &state[1] else { panic!("the state has changed") };
    let mut message = packet.encode_to_vec();
    message.extend([0xf8, 0x07, 0x81, 0x01]); // field 127, a number
    message.extend([0xf9, 0x07, 1, 2, 3, 4, 5, 6, 7, 8]); // eight bytes
    message.extend([0xfd, 0x07, 1, 2, 3, 4]); // four bytes
    message.extend([0xfa, 0x07, 3, 1, 2, 3]); // any bytes
    let handmade =
        Handmade { sequence: 3, kind: OUTGOING_PACKET, version: 1, mandatory: true, last: false };
    with_field.extend(chunk(handmade, &message));
    rechain(&mut with_field);
    let mut reader = reader();
    let mut input = &with_field[..];
    let mut read = Vec::new();
    while let Some(chunk) = reader.read(&mut input).unwrap() {
        read.push(Owned::read(&chunk).unwrap());
    }
    assert_eq!(read, state[..2]);
    // A tool shows what it cannot name.
    let What::Record(seen) = inspect(&with_field, ALL_KINDS).nth(3).unwrap().what else {
        panic!("no record")
    };
    let unknown = seen.fields.flatten().filter(|field| field.field.is_none());
    assert_eq!(unknown.map(|field| field.number).collect::<Vec<_>>(), [127; 4]);
}

#[test]
fn an_unknown_mandatory_record_is_refused_by_name_before_anything_is_read() {
    let mut writer = writer(format_version(2, 1), &[ChannelRecord::KIND, Lease::KIND]);
    let mut stream = begin(&mut writer);
    push(&mut stream, |out| small_state()[0].write(&mut writer, out));
    let stream = finish(writer, stream); // none even comes
    let error = restore(&stream).unwrap_err();
    let ReadError::UnknownRecord { kind: RecordKind(41), name } = error else {
        panic!("{error:?}")
    };
    assert_eq!(name.as_str(), "channel.lease");
    assert_eq!(
        error.to_string(),
        "record channel.lease (kind 41) is unknown, and must not be skipped"
    );
    let mut reader = reader();
    assert_eq!(reader.read(&mut &stream[..]).map(|_| ()), Err(error));
    assert_eq!((reader.chunks(), reader.header().is_some()), (0, false));
}

#[test]
fn a_format_that_is_too_new_is_refused_with_both_numbers() {
    let stream = one(format_version(3, 2), &Statistics { packets: 1 }).unwrap();
    let readable = Readable { oldest: 1, newest: 1 };
    let error = ReadError::Revision { found: 3, needs: 2, readable };
    assert_eq!(restore(&stream), Err(error));
    assert_eq!(
        error.to_string(),
        "format version 3, for readers of version 2 or later; this one reads 1 to 1"
    );
    // Its header can be read all the same.
    let header = StreamHeader::read(&stream).unwrap();
    assert_eq!((header.format_version, header.oldest_reader), (3, 2));
    assert_eq!(header.info, info());
    // So can a header that is longer than this version's, whose list of kinds has longer rows.
    let grown = grown_header(&stream);
    let header = StreamHeader::read(&grown).unwrap();
    assert_eq!((header.info, header.kinds().len()), (info(), 2));
    assert_eq!(header.kinds()[1].name.as_str(), "channel.statistics");
    // A release that reads up to version 2 takes it.
    assert!(read_one::<Statistics>(reads(knowing(LATE), 1, 2), &stream).is_ok());
    // One that has given up the oldest versions says so.
    let stream = save(info(), &small_state());
    let given_up = reads(reader(), 2, 3).read(&mut &stream[..]).map(|_| ());
    let readable = Readable { oldest: 2, newest: 3 };
    assert_eq!(given_up, Err(ReadError::Revision { found: 1, needs: 1, readable }));
}

/// The stream's header with eight bytes more in front of its list, and rows of 40 bytes.
fn grown_header(stream: &[u8]) -> Vec<u8> {
    let mut grown = stream[..128].to_vec();
    grown.extend([0xaa; 8]);
    for row in stream[128..128 + 2 * 32].chunks(32) {
        grown.extend(row);
        grown.extend([0xbb; 8]);
    }
    grown.extend([0xcc; 16]);
    grown.extend([0; 4]);
    let length = grown.len() as u32;
    grown[8..12].copy_from_slice(&length.to_le_bytes());
    grown[20..22].copy_from_slice(&40_u16.to_le_bytes());
    grown[22..24].copy_from_slice(&136_u16.to_le_bytes());
    rechain(&mut grown);
    grown
}

#[test]
fn an_older_format_is_written_on_request_and_read_by_its_readers() {
    let (v1, v2) = (FormatVersion::V1, format_version(2, 1));
    let late = Late { size: 5, remark: "new, may be skipped".to_owned(), unit: 0 };
    let stream = one(v1, &late).unwrap();
    assert_eq!(StreamHeader::read(&stream).unwrap().format_version, 1);
    assert_eq!(read_one(knowing(EARLY), &stream), Ok(Some(Early { size: 5 })));
    assert_eq!(read_one(reads(knowing(LATE), 1, 2), &stream), Ok(Some(late.clone())));

    // In the newer format, older readers know that they would miss something.
    let stream = one(v2, &late).unwrap();
    match read_one::<Early>(knowing(EARLY), &stream) {
        Err(ReadError::UnknownRecordVersion { name, found: 2, newest: 1, .. }) => {
            assert_eq!(name.as_str(), "channel.thing");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(read_one(reads(knowing(LATE), 1, 2), &stream), Ok(Some(late.clone())));

    // What the older one cannot say is not left out in silence.
    let late = Late { unit: 9, ..late };
    let refused = WriteError::NoSuchField { record: "channel.thing", field: "unit", version: 1 };
    assert_eq!(one(v1, &late), Err(refused));
    assert!(one(v2, &late).is_ok());
}

#[test]
fn records_that_an_older_format_lacks_are_left_out_or_refused() {
    let (v1, v2) = (FormatVersion::V1, format_version(2, 1));
    let refused = WriteError::NoSuchRecord { record: "channel.lease", format: 1 };
    assert_eq!(StreamWriter::new(v1, info(), &[Lease::KIND]).map(|_| ()), Err(refused));
    assert!(StreamWriter::new(v2, info(), &[Lease::KIND]).is_ok());

    let mut writer = writer(v1, LATE);
    let stream = begin(&mut writer);
    let step = writer.record(&Statistics { packets: 1 }, &mut []);
    assert_eq!(step, Ok(Step::Written { bytes: 0 }));
    let stream = finish(writer, stream);
    assert_eq!(chunk_ranges(&stream).len(), 2);
    let header = StreamHeader::read(&stream).unwrap();
    assert_eq!(header.kind(Statistics::KIND.kind), None, "announced and never there");
    assert_eq!(read_one::<Early>(knowing(EARLY), &stream), Ok(None));
}

#[test]
fn a_record_that_may_be_skipped_is_skipped_in_a_version_too_new() {
    /// [`Statistics`] as a reader knows them that was made before their second version.
    const OLD: Kinds = &[Early::KIND, Statistics::KIND];
    let mut stream = one(format_version(2, 1), &Statistics { packets: 1 }).unwrap();
    assert_eq!(read_one(knowing(OLD), &stream), Ok(Some(Statistics { packets: 1 })));
    let second = chunk_ranges(&stream)[1].start;
    stream[128 + 32 + 2] = 2; // the version in the header's list
    stream[second + 14] = 2; // and in the chunk
    stream[second + 21] = 0xff; // what is in it may be anything
    rechain(&mut stream);
    assert_eq!(read_one::<Statistics>(knowing(OLD), &stream), Ok(None));
    let alone = &stream[chunk_ranges(&stream)[1].clone()];
    assert!(matches!(
        Chunk::alone(alone, OLD).map(|_| ()),
        Err(ReadError::Damaged { why: Damage::NotAnnounced { version: 2, .. }, .. })
    ));
}

#[test]
fn flags_of_the_header_say_which_of_them_may_be_ignored() {
    let with = |flags| save(StreamInfo { flags: HeaderFlags(flags), ..info() }, &small_state());
    assert_eq!(restore(&with(0x8001)), Ok(small_state()), "a flag to be ignored");
    let error = ReadError::UnknownFlags { bits: 0x4000_0000 };
    assert_eq!(restore(&with(0x4000_8001)), Err(error));
}

#[test]
fn an_end_that_cannot_be_read_is_refused_even_if_it_says_it_can_be_skipped() {
    let mut stream = save(info(), &small_state());
    stream[130] = 2; // the version of the first row, the end's
    stream[132] = 0; // not mandatory
    rechain(&mut stream);
    match restore(&stream) {
        Err(ReadError::UnknownRecordVersion { name, found: 2, newest: 1, .. }) => {
            assert_eq!(name.as_str(), "stream.end");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn versions_are_what_they_say() {
    assert_eq!(FormatVersion::try_from(1), Ok(FormatVersion::NEWEST));
    for number in [0, 2, u16::MAX] {
        let error = FormatVersion::try_from(number).unwrap_err();
        assert_eq!(error.to_string(), format!("format version {number} is not one of 1 to 1"));
    }
    assert_eq!(Late::KIND.version_in(FormatVersion::V1), Some(1));
    assert_eq!(Late::KIND.version_in(format_version(7, 1)), Some(2));
    assert_eq!(Lease::KIND.version_in(FormatVersion::V1), None);
    let packet = OutgoingPacketRecord {
        order: 0,
        place: Place::InRing { transaction_id: 1 },
        extension: &[],
        driver_state: &[],
    };
    // A version before the first has none of the records.
    let before = format_version(0, 0);
    assert!(StreamWriter::new(before, info(), &[]).is_err());
    assert!(one(FormatVersion::V1, &packet).is_ok());
}
