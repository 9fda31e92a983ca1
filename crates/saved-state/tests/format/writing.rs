//! What cannot be written is refused, and changes nothing.

use saved_state::channel::{
    ChannelRecord, IncomingPacketRecord, KINDS, OutgoingPacketRecord, PAUSED_KINDS, Place, Side,
};
use saved_state::error::FieldProblem;
use saved_state::kind::SINCE_V1;
use saved_state::limits::{MAX_CHUNK_BYTES, MAX_KINDS, MAX_PACKET_BYTES};
use saved_state::record::EncodeError;
use saved_state::{
    Encode, Field, FormatVersion, KindInfo, Record, RecordKind, Shape, Step, StreamWriter,
    WriteError,
};

use crate::records::{info, push, restore, save_one, small_state};

fn writer(kinds: &[&'static KindInfo]) -> StreamWriter {
    StreamWriter::new(FormatVersion::NEWEST, info(), kinds).unwrap()
}

const fn packet<'a>(message: &'a [u8], extension: &'a [u8]) -> OutgoingPacketRecord<'a> {
    let place = Place::Queued { message, transaction: false };
    OutgoingPacketRecord { order: 0, place, extension, driver_state: &[] }
}

#[test]
fn steps_out_of_order_are_refused() {
    let mut writer = writer(KINDS);
    let mut room = [0; 1024];
    let order = |asked, chunks, ended| Err(WriteError::Order { asked, chunks, ended });
    assert_eq!(writer.record(&packet(b"", b""), &mut room), order("a record", 0, false));
    assert_eq!(writer.end(&mut room), order("the end", 0, false));
    assert!(matches!(writer.header(&mut room), Ok(Step::Written { .. })));
    assert_eq!(writer.header(&mut room), order("the header", 1, false));
    let end = saved_state::end::EndRecord { chunks: 1, bytes: 1 };
    assert_eq!(writer.record(&end, &mut room), order("a record", 1, false));
    assert!(matches!(writer.end(&mut room), Ok(Step::Written { .. })));
    assert_eq!(writer.end(&mut room), order("the end", 2, true));
    assert_eq!(writer.record(&packet(b"", b""), &mut room), order("a record", 2, true));
}

#[test]
fn a_record_that_no_reader_would_take_is_not_written() {
    let mut writer = writer(PAUSED_KINDS);
    let mut stream = Vec::new();
    push(&mut stream, |out| writer.header(out).unwrap());
    let before = (writer.chunks(), writer.bytes());
    let mut room = vec![0; 1 << 20];

    let long = vec![0; MAX_PACKET_BYTES + 1];
    let why = writer.record(&packet(&long, b""), &mut room).unwrap_err();
    let WriteError::Field { record: "channel.outgoing_packet", why } = why else { panic!("{why}") };
    let (found, most) = (MAX_PACKET_BYTES as u64 + 1, MAX_PACKET_BYTES as u64);
    assert_eq!((why.name, why.problem), ("message", FieldProblem::Length { found, most }));

    let no_side = ChannelRecord::default();
    assert!(matches!(writer.record(&no_side, &mut room), Err(WriteError::Field { .. })));

    let incoming = IncomingPacketRecord {
        order: 0,
        transaction_id: 0,
        wants_completion: false,
        fence: saved_state::channel::Fence::NeverStarted,
        handed_back: saved_state::channel::HandedBack::No,
        payload: &[],
        extension: &[],
        refused_external_bytes: 0,
        client_context: &[],
        device_state: &[],
    };
    let refused = WriteError::NotAnnounced { record: "channel.incoming_packet" };
    assert_eq!(writer.record(&incoming, &mut room), Err(refused));
    let both = IncomingPacketRecord { extension: &[1; 8], refused_external_bytes: 1, ..incoming };
    let mut frozen = self::writer(KINDS);
    assert!(frozen.header(&mut room).is_ok());
    assert!(matches!(frozen.record(&both, &mut room), Err(WriteError::Field { .. })));

    let huge = vec![0; MAX_CHUNK_BYTES as usize];
    let refused = writer.record(&packet(b"", &huge), &mut room);
    let most = MAX_CHUNK_BYTES;
    assert!(matches!(refused, Err(WriteError::TooLarge { most: found, .. }) if found == most));

    // After all that, the stream goes on as if nothing had been asked.
    assert_eq!((writer.chunks(), writer.bytes()), before);
    push(&mut stream, |out| small_state()[0].write(&mut writer, out));
    push(&mut stream, |out| writer.end(out).unwrap());
    assert_eq!(restore(&stream).as_deref(), Ok(&small_state()[..1]));
}

#[test]
fn a_record_at_its_bounds_fits_a_chunk() {
    use saved_state::limits::{MAX_CONTEXT_BYTES, MAX_OWN_STATE_BYTES};
    let (bytes, context) = (vec![1; MAX_PACKET_BYTES], vec![2; MAX_CONTEXT_BYTES]);
    let own = vec![3; MAX_OWN_STATE_BYTES];
    let incoming = IncomingPacketRecord {
        order: u32::MAX,
        transaction_id: u64::MAX,
        wants_completion: true,
        fence: saved_state::channel::Fence::Finished { completion: &bytes },
        handed_back: saved_state::channel::HandedBack::AfterMemory,
        payload: &bytes,
        extension: &bytes,
        refused_external_bytes: 0,
        client_context: &context,
        device_state: &own,
    };
    assert!(save_one(&incoming).len() > 2 << 20);
}

/// A record that says it is shorter than it is.
struct Liar {
    stated: usize,
}

impl Record for Liar {
    const KIND: &'static KindInfo = &KindInfo {
        kind: RecordKind::FIRST_FOREIGN,
        name: "liar",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[Field::new(1, "word", Shape::Fixed64)],
        check: |_| Ok(()),
    };
}

impl Encode for Liar {
    fn encoded_len(&self) -> usize {
        self.stated
    }

    fn encode(&self, out: &mut [u8]) -> Result<(), EncodeError> {
        let room = out.first_chunk_mut().ok_or(EncodeError::Length)?;
        *room = [0x09, 1, 2, 3, 4, 5, 6, 7, 8];
        if out.len() == 9 { Ok(()) } else { Err(EncodeError::Length) }
    }
}

#[test]
fn a_record_that_states_a_wrong_length_is_not_written() {
    for (stated, fits) in [(9, true), (8, false), (10, false), (0, false)] {
        let mut writer = writer(&[Liar::KIND]);
        let mut room = [0; 512];
        assert!(matches!(writer.header(&mut room), Ok(Step::Written { .. })));
        let written = writer.record(&Liar { stated }, &mut room);
        assert_eq!(written.is_ok(), fits, "{stated}: {written:?}");
        assert_eq!(writer.chunks(), if fits { 2 } else { 1 });
    }
    // And one that states more than there can be is not even asked to encode.
    let mut writer = writer(&[Liar::KIND]);
    let mut room = [0; 512];
    assert!(writer.header(&mut room).is_ok());
    let refused = writer.record(&Liar { stated: usize::MAX }, &mut room);
    assert!(matches!(refused, Err(WriteError::TooLarge { .. })), "{refused:?}");
}

#[test]
fn kinds_are_announced_once_each_under_a_name_that_fits() {
    let twice = [ChannelRecord::KIND, ChannelRecord::KIND];
    let refused = WriteError::Kinds { found: 2, most: MAX_KINDS };
    assert_eq!(StreamWriter::new(FormatVersion::NEWEST, info(), &twice).map(|_| ()), Err(refused));
    let many: Vec<&'static KindInfo> = (0..MAX_KINDS as u16)
        .map(|at| {
            let kind = RecordKind(0x8000 + at);
            &*Box::leak(Box::new(KindInfo { kind, ..named("many") }))
        })
        .collect();
    assert!(StreamWriter::new(FormatVersion::NEWEST, info(), &many).is_err());
    assert!(StreamWriter::new(FormatVersion::NEWEST, info(), &many[1..]).is_ok());
    for (name, fits) in [
        ("a.name.of.24.characters.", true),
        ("a.name.of.25.characters..", false),
        ("umlaut.\u{fc}", false),
    ] {
        let kind = &*Box::leak(Box::new(named(name)));
        let header = writer(&[kind]).header(&mut [0; 512]);
        let expected = if fits { Ok(()) } else { Err(WriteError::Name { name }) };
        assert_eq!(header.map(|_| ()), expected);
    }
}

fn named(name: &'static str) -> KindInfo {
    KindInfo {
        kind: RecordKind::FIRST_FOREIGN,
        name,
        mandatory: true,
        versions: SINCE_V1,
        fields: &[],
        check: |_| Ok(()),
    }
}

#[test]
fn a_record_without_a_chunk_travels_in_the_bytes_of_another() {
    use saved_state::bare::{self, BareError};
    use saved_state::storage::{DiskIdentityRecord, StorageRequestRecord};
    let request = StorageRequestRecord {
        lun: 3,
        cdb: vec![0x2a, 0, 0, 0, 1, 0, 0, 0, 8, 0],
        transfer_bytes: 4096,
        moved_bytes: 512,
        ..StorageRequestRecord::default()
    };
    let mut bytes = vec![0; bare::encoded_len(&request)];
    assert_eq!(bare::encode(&request, &mut bytes), Some(bytes.len()));
    assert_eq!(bytes[..4], [130, 0, 1, 0]);
    assert_eq!(bare::decode(&bytes), Ok(request.clone()));
    let short = bytes.len() - 1;
    assert_eq!(bare::encode(&request, &mut vec![0; short]), None);

    let decode = |bytes: &[u8]| bare::decode::<StorageRequestRecord>(bytes).unwrap_err();
    for cut in 0..4 {
        assert_eq!(decode(&bytes[..cut]), BareError::Cut { found: cut });
    }
    for cut in 4..bytes.len() {
        let cut_short = bare::decode::<StorageRequestRecord>(&bytes[..cut]);
        // A cut between two fields leaves a record that lacks some: only the outer one can tell.
        assert!(cut_short.is_err() || cut_short != Ok(request.clone()));
    }
    let other = bare::decode::<DiskIdentityRecord>(&bytes).unwrap_err();
    let (found, expected) = (RecordKind(130), RecordKind(129));
    assert_eq!(other, BareError::Kind { found, expected });
    let mut later = bytes.clone();
    later[2] = 2;
    let version = BareError::Version { record: "storage.request", found: 2, newest: 1 };
    assert_eq!(decode(&later), version);
}

#[test]
fn sides_are_said() {
    for side in [Side::Server, Side::Client] {
        let record = ChannelRecord { side: side as i32, ..ChannelRecord::default() };
        let state = restore(&save_one(&record)).map_err(|error| error.to_string());
        assert_eq!(state.map(|state| state.len()), Ok(1));
    }
}
