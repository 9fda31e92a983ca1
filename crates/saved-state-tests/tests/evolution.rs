//! States from before and after this version, at the level of real channels: a field and a record from
//! the future, a record that must not be skipped, a format that is too new, one that is asked for.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at its first surprise"
)]

use kmcl::{ChannelState, Error, NtStatus, RestoreError, RestoreFromError, SaveOptions};
use saved_state::testing::format_version;
use saved_state::text::Producer;
use saved_state::{FormatVersion, ReadError, RecordKind, StreamHeader, WriteError};
use saved_state_tests::channel::{self, Fate, Server, Setup, request};
use saved_state_tests::guest::Standing;
use saved_state_tests::mutate::{Part, Stream, put_together, take_apart};

/// A channel with two requests and a packet of the device's in flight, kept with `options`.
fn saved_with(options: &SaveOptions) -> Vec<u8> {
    let server = Server::new(Setup::default());
    let mut rings = server.open(Standing::default());
    server.channel.start();
    rings.request(1, &[], &request(Fate::Cancelled, 1, 32));
    rings.request(2, &[], &request(Fate::Finished, 2, 32));
    server.run();
    server.send(1, b"message");
    server.move_away_with(options)
}

fn saved() -> Vec<u8> {
    saved_with(&SaveOptions::default())
}

/// The state as a later version might have it.
fn changed(change: impl FnOnce(&mut Stream)) -> Vec<u8> {
    let mut streams = take_apart(&saved());
    change(&mut streams[0]);
    put_together(&streams, true)
}

/// Adds a row to the header's list of kinds, and a record of that kind behind the first.
fn add_record(stream: &mut Stream, kind: u16, name: &str, mandatory: bool) {
    let header = &mut stream.header;
    let checksum = header.len() - 4;
    let mut row = kind.to_le_bytes().to_vec();
    row.extend([1, 0, u8::from(mandatory), 0, 0, 0]);
    row.extend(name.as_bytes());
    row.resize(32, 0);
    header.splice(checksum..checksum, row);
    let length = u32::try_from(header.len()).unwrap();
    header[8..12].copy_from_slice(&length.to_le_bytes());
    header[18] += 1;
    let message = b"\x08\x01 what nobody here knows".to_vec();
    stream.chunks.insert(1, Part { kind, version: 1, mandatory, last: false, message });
}

#[test]
fn a_field_and_a_record_from_the_future_are_passed_over() {
    let state = changed(|stream| {
        for part in &mut stream.chunks {
            part.message.extend([0xf8, 0x07, 0x81, 0x01]); // field 127, a number
            part.message.extend([0xfa, 0x07, 3, 1, 2, 3]); // field 127, bytes
        }
        add_record(stream, 40, "channel.statistics", false);
        stream.header[12] = 2; // a later format, which readers of the first can read
    });
    assert_eq!(StreamHeader::read(&state).unwrap().format_version, 2);
    channel::assert_goes_on(&state);
    channel::assert_goes_on(&saved());
}

/// What a channel answers to a state; it is as it was then, and takes the state that is right.
fn refusal(state: &[u8]) -> RestoreError {
    let server = Server::new(Setup::default());
    let rings = server.open(Standing { resumed: true, ..Standing::default() });
    let before = server.channel.state();
    let error = match server.channel.restore_from(state) {
        Err(RestoreFromError::State(error)) => error,
        other => panic!("{other:?}"),
    };
    server.assert_untouched(before);
    assert_eq!(before, ChannelState::Paused);
    drop(rings);
    server.assert_ends();
    error
}

#[test]
fn an_unknown_mandatory_record_is_refused_by_name() {
    let state = changed(|stream| add_record(stream, 41, "channel.lease", true));
    let error = refusal(&state);
    assert_eq!(error.status(), NtStatus::INVALID_PARAMETER_2);
    assert!(matches!(
        error,
        RestoreError::Read(ReadError::UnknownRecord { kind: RecordKind(41), .. })
    ));
    assert!(error.to_string().contains("channel.lease"), "{error}");
}

#[test]
fn a_record_in_a_version_that_is_too_new_is_refused_by_name() {
    let state = changed(|stream| {
        let row = 128 + 32; // behind that of the end
        stream.header[row + 2] = 2;
        stream.chunks[0].version = 2;
    });
    let error = refusal(&state);
    assert_eq!(error.status(), NtStatus::REVISION_MISMATCH);
    assert!(error.to_string().contains("channel.channel"), "{error}");
}

#[test]
fn a_format_that_is_too_new_is_refused_with_both_numbers() {
    let state = changed(|stream| {
        stream.header[12] = 3;
        stream.header[14] = 2;
    });
    let error = refusal(&state);
    assert_eq!(error.status(), NtStatus::REVISION_MISMATCH);
    assert!(error.to_string().contains("format version 3, for readers of version 2"), "{error}");
}

#[test]
fn an_older_format_is_written_on_request() {
    let producer = Producer::new("another program 7.0").unwrap();
    for format in FormatVersion::ALL {
        let state = saved_with(&SaveOptions { format: *format, producer });
        let header = StreamHeader::read(&state).unwrap();
        assert_eq!(header.format_version, format.number());
        assert_eq!(header.info.producer, producer);
        channel::assert_goes_on(&state);
    }
}

#[test]
fn a_format_that_cannot_say_it_is_refused_by_name_and_the_channel_goes_on() {
    let server = Server::new(Setup::default());
    let mut rings = server.open(Standing::default());
    server.channel.start();
    rings.request(1, &[], &request(Fate::Finished, 1, 32));
    server.run();
    let frozen = server.channel.freeze().unwrap();
    let before_the_first = SaveOptions { format: format_version(0, 0), ..SaveOptions::default() };
    match frozen.save_with(&before_the_first) {
        Err(Error::Format(WriteError::NoSuchRecord { record, format: 0 })) => {
            assert_eq!(record, "stream.end");
        }
        other => panic!("{other:?}"),
    }
    frozen.thaw();
    server.run();
    assert_eq!(rings.take().len(), 1, "what was held has left");
}
