//! Files of several streams: written, read, and everything that can be wrong with what is in them.

use std::io::{self, ErrorKind, Read};

use proptest::collection::vec;
use proptest::prelude::*;
use saved_state::contents::{StreamEntry, StreamEntryRecord};
use saved_state::file::{FileError, FileReader, FileWriteError, FileWriter, Written, check};
use saved_state::input::{ChunkInput, InputError};
use saved_state::inspect::ALL_KINDS;
use saved_state::limits::{MAX_STREAM_NAME_BYTES, MAX_STREAMS};
use saved_state::testing::{Handmade, chunk, chunk_ranges, rechain, stream_ranges};
use saved_state::text::Producer;
use saved_state::{
    Damage, FieldProblem, FormatVersion, HeaderFlags, ReadError, Save, SaveStep, StreamInfo,
    StreamKind,
};
use vmbus_wire::guid::Guid;

use crate::records::{info, save, small_state};

/// A stream that is there already, as something to be saved: one chunk after the other.
pub(crate) struct Ready {
    stream: Vec<u8>,
    at: usize,
}

impl Ready {
    pub(crate) fn new(stream: Vec<u8>) -> Self {
        Self { stream, at: 0 }
    }
}

impl Save for Ready {
    type Error = std::fmt::Error;

    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, Self::Error> {
        let ranges = chunk_ranges(&self.stream);
        let mut written = 0;
        let at = self.at;
        for range in ranges.iter().skip_while(|range| range.end <= at) {
            let Some(room) = buffer.get_mut(written..written + range.len()) else {
                return Ok(SaveStep { written, needed: range.len(), done: false });
            };
            room.copy_from_slice(&self.stream[range.clone()]);
            written += range.len();
            self.at = range.end;
        }
        Ok(SaveStep { written, needed: 0, done: true })
    }
}

fn instance(number: u128) -> StreamInfo {
    StreamInfo { interface_instance: Guid::from_u128(number), items: 4, ..info() }
}

/// Two channels and a subchannel of the second.
pub(crate) fn streams() -> [Vec<u8>; 3] {
    let other = StreamInfo { items: 0, ..instance(2) };
    [save(instance(1), &small_state()), save(instance(2), &small_state()), save(other, &[])]
}

fn producer() -> Producer {
    Producer::new("kmcl 0.1.0").unwrap()
}

pub(crate) fn write(
    streams: &[(&str, u32, Vec<u8>)],
) -> Result<(Vec<u8>, Written), FileWriteError> {
    let mut writer = FileWriter::new(FormatVersion::NEWEST, producer());
    for (name, index, stream) in streams {
        writer.add(name, *index, Ready::new(stream.clone()));
    }
    let mut file = Vec::new();
    let written = writer.write_to(&mut file)?;
    Ok((file, written))
}

pub(crate) fn small_file() -> Vec<u8> {
    let [one, two, three] = streams();
    write(&[("disk", 0, one), ("network", 0, two), ("network, 1", 1, three)]).unwrap().0
}

/// The streams of a file, as they are handed out.
fn read(file: &[u8]) -> Result<Vec<(StreamEntry, Vec<u8>)>, FileError> {
    let mut reader = FileReader::new(file)?;
    let mut streams = Vec::new();
    while let Some(mut stream) = reader.next_stream()? {
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.next()? {
            bytes.extend_from_slice(chunk);
        }
        streams.push((stream.entry().clone(), bytes));
    }
    reader.finish()?;
    Ok(streams)
}

#[test]
fn a_file_gives_back_the_streams_that_were_put_in() {
    let [one, two, three] = streams();
    let put_in =
        [("disk", 0, one.clone()), ("network", 0, two.clone()), ("network, 1", 1, three.clone())];
    let (file, written) = write(&put_in).unwrap();
    assert_eq!(written.bytes, file.len() as u64);
    let names: Vec<_> = written.streams.iter().map(|(entry, _)| &*entry.name).collect();
    assert_eq!(names, ["disk", "network", "network, 1"]);
    assert_eq!(check(&file[..], ALL_KINDS).unwrap().len(), 3);
    let found = read(&file).unwrap();
    for ((entry, bytes), ((name, index, stream), listed)) in
        found.iter().zip(put_in.iter().zip(&written.streams))
    {
        assert_eq!((&*entry.name, entry.index, bytes), (*name, *index, stream));
        assert_eq!((entry, bytes.len() as u64), (&listed.0, listed.1));
        assert_eq!(
            (entry.stream, entry.interface_type),
            (StreamKind::CHANNEL, info().interface_type)
        );
    }
    assert_eq!(found.iter().map(|(entry, _)| entry.items).collect::<Vec<_>>(), [4, 4, 0]);
}

#[test]
fn a_file_with_nothing_in_it_is_a_file() {
    let (file, written) = write(&[]).unwrap();
    assert_eq!((written.bytes, written.streams.len()), (file.len() as u64, 0));
    assert_eq!(read(&file).unwrap(), []);
}

#[test]
fn a_stream_can_be_taken_as_a_reader_or_left_alone() {
    let file = small_file();
    let [one, two, three] = streams();
    let mut reader = FileReader::new(&file[..]).unwrap();
    let mut first = reader.next_stream().unwrap().unwrap();
    assert_eq!((first.number(), first.header().info.items), (1, 4));
    let mut bytes = Vec::new();
    first.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, one);
    assert!(first.next().unwrap().is_none());
    // A chunk, a byte of the next one, and no more.
    let mut second = reader.next_stream().unwrap().unwrap();
    let mut bytes = second.next().unwrap().unwrap().to_vec();
    let mut byte = [0];
    second.read_exact(&mut byte).unwrap();
    bytes.extend(byte);
    assert!(two.starts_with(&bytes));
    let mut third = reader.next_stream().unwrap().unwrap();
    assert_eq!(&*third.entry().name, "network, 1");
    let mut bytes = Vec::new();
    third.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, three);
    assert!(reader.next_stream().unwrap().is_none());
    assert!(reader.next_stream().unwrap().is_none(), "and again");
    reader.finish().unwrap();
}

/// A file of some of `file`'s streams, in that order.
fn assemble(file: &[u8], order: &[usize]) -> Vec<u8> {
    let ranges = stream_ranges(file);
    order.iter().flat_map(|&at| file[ranges[at].clone()].iter().copied()).collect()
}

#[test]
fn streams_dropped_doubled_swapped_or_added_are_told_by_name() {
    let file = small_file();
    let at = |stream: usize| stream_ranges(&file)[stream].start;
    assert_eq!(stream_ranges(&file).len(), 5);
    for (order, expected) in [
        (
            &[0, 2, 3, 4][..],
            format!(
                "stream 1 (disk) at byte {} is not as listed: its header has another \
                 interface_instance; it is {}, listed is {}; it would fit as stream 2",
                at(1),
                "channel of 00112233-4455-6677-8899-aabbccddeeff, \
                 instance 00000000-0000-0000-0000-000000000002, 4 items",
                "channel of 00112233-4455-6677-8899-aabbccddeeff, \
                 instance 00000000-0000-0000-0000-000000000001, 4 items",
            ),
        ),
        (&[0, 1, 3, 4], "stream 2 (network) at byte".to_owned()),
        (&[0, 1, 2, 4], "stream 3 (network, 1) is missing at byte".to_owned()),
        (&[0, 1, 2], "stream 3 (network, 1) is missing at byte".to_owned()),
        (&[0, 4], "stream 1 (disk) is missing at byte".to_owned()),
        (&[0, 1, 1, 2, 3, 4], "stream 2 (network) at byte".to_owned()),
        (&[0, 1, 3, 2, 4], "stream 2 (network) at byte".to_owned()),
        (&[0, 2, 1, 3, 4], "stream 1 (disk) at byte".to_owned()),
        (&[0, 1, 2, 3, 3, 4], "a stream that is not listed at byte".to_owned()),
        (&[0, 1, 2, 3], "stream 4 (sums): the end is missing after 0 chunks, 0 bytes".to_owned()),
        (&[0, 1, 2, 3, 4, 1], "bytes after the last stream, at byte".to_owned()),
        (&[0, 1, 2, 3, 4, 4], "bytes after the last stream, at byte".to_owned()),
        (&[1, 2, 3], "stream 0 (contents): state of a channel, not of a contents".to_owned()),
        (
            &[4],
            "stream 0 (contents): record file.sum (kind 4) is unknown, and must not be skipped"
                .to_owned(),
        ),
        (&[], "stream 0 (contents): the end is missing after 0 chunks, 0 bytes".to_owned()),
    ] {
        let found = read(&assemble(&file, order)).unwrap_err().to_string();
        assert!(found.starts_with(&expected), "{order:?}: {found}");
        let found = check(&assemble(&file, order)[..], ALL_KINDS).unwrap_err().to_string();
        assert!(found.starts_with(&expected), "{order:?}: {found}");
    }
}

#[test]
fn a_stream_of_another_save_of_the_same_channel_is_told_from_its_own() {
    let file = small_file();
    let mut state = small_state();
    state.swap(1, 2); // as many bytes, another order
    let ranges = stream_ranges(&file);
    let other = save(instance(2), &state);
    assert_eq!(other.len(), ranges[2].len());
    let exchanged = [&file[..ranges[2].start], &other, &file[ranges[2].end..]].concat();
    match read(&exchanged) {
        Err(FileError::Exchanged { stream: 2, name, field: "checksum", found, stated }) => {
            let last = |stream: &[u8]| u64::from(u32::from_le_bytes(*stream.last_chunk().unwrap()));
            assert_eq!((&*name, found, stated), ("network", last(&other), last(&streams()[1])));
        }
        other => panic!("{other:?}"),
    }
    state.pop();
    let shorter = save(instance(2), &state);
    let exchanged = [&file[..ranges[2].start], &shorter, &file[ranges[2].end..]].concat();
    let expected = format!(
        "stream 2 (network) has bytes {}, saved with the others was {}",
        shorter.len(),
        ranges[2].len()
    );
    assert_eq!(read(&exchanged).unwrap_err().to_string(), expected);
    // The list of another file, even if it lists the same.
    let list = write(&[
        ("disk!", 0, streams()[0].clone()),
        ("network", 0, streams()[1].clone()),
        ("network, 1", 1, streams()[2].clone()),
    ])
    .unwrap()
    .0;
    let exchanged = [&list[stream_ranges(&list)[0].clone()], &file[ranges[0].end..]].concat();
    let found = read(&exchanged).unwrap_err().to_string();
    assert!(found.starts_with("stream 0 (contents) has bytes"), "{found}");
}

#[test]
fn a_cut_anywhere_is_told_with_the_stream_it_is_in() {
    let file = small_file();
    let ranges = stream_ranges(&file);
    for cut in 0..file.len() {
        let stream = ranges.iter().take_while(|range| range.end <= cut).count() as u32;
        let start = ranges[stream as usize].start as u64;
        for error in [read(&file[..cut]).unwrap_err(), check(&file[..cut], ALL_KINDS).unwrap_err()]
        {
            match error {
                FileError::Stream { stream: found, why, .. } => {
                    assert_eq!(found, stream, "cut at {cut}: {why}");
                    let offset = match why {
                        ReadError::Damaged {
                            offset, why: Damage::Cut { available, .. }, ..
                        } => offset + available,
                        ReadError::Unfinished { bytes, .. } => bytes,
                        other => panic!("cut at {cut}: {other}"),
                    };
                    assert_eq!(offset, cut as u64 - start, "cut at {cut}");
                }
                FileError::Missing { stream: found, offset, .. } => {
                    assert_eq!((found, offset), (stream, cut as u64), "cut at {cut}");
                }
                other => panic!("cut at {cut}: {other}"),
            }
        }
    }
}

#[test]
fn any_bit_that_flips_is_told_with_the_stream_it_is_in() {
    let file = small_file();
    let ranges = stream_ranges(&file);
    for bit in 0..file.len() * 8 {
        let mut flipped = file.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let stream = ranges.iter().position(|range| range.contains(&(bit / 8))).unwrap();
        match check(&flipped[..], ALL_KINDS) {
            Err(FileError::Stream { stream: found, .. }) => {
                assert_eq!(found as usize, stream, "bit {bit}");
            }
            other => panic!("bit {bit}: {other:?}"),
        }
        // Streams that nobody reads are checked all the same.
        let mut unread = FileReader::new(&flipped[..]);
        if let Ok(reader) = &mut unread {
            while matches!(reader.next_stream(), Ok(Some(_))) {}
            assert!(unread.and_then(FileReader::finish).is_err(), "bit {bit}");
        }
    }
}

/// The file with another list: `messages` are records of the kinds 2 and 3, put into chunks.
fn with_list(messages: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let file = small_file();
    let first = stream_ranges(&file)[0].clone();
    let mut list = file[..chunk_ranges(&file[first.clone()])[0].end].to_vec();
    for ((kind, message), sequence) in messages.iter().zip(1..) {
        let kind = saved_state::RecordKind(*kind);
        let handmade = Handmade { sequence, kind, version: 1, mandatory: true, last: false };
        list.extend(chunk(handmade, message));
    }
    let sequence = messages.len() as u32 + 1;
    let mut end = vec![0x08];
    prost::encode_length_delimiter(sequence as usize, &mut end).unwrap();
    end.push(0x10);
    prost::encode_length_delimiter(list.len(), &mut end).unwrap();
    let kind = saved_state::end::END;
    list.extend(chunk(Handmade { sequence, kind, version: 1, mandatory: true, last: true }, &end));
    rechain(&mut list);
    list.extend(&file[first.end..]);
    list
}

fn entry_message(entry: &StreamEntry) -> Vec<u8> {
    prost::Message::encode_to_vec(&StreamEntryRecord::from(entry))
}

#[test]
fn a_list_that_lies_is_refused_by_record_and_field() {
    let entries = check(&small_file()[..], ALL_KINDS).unwrap();
    let message = |at: usize| (3, entry_message(&entries[at]));
    let changed = |change: fn(&mut StreamEntry)| {
        let mut entry = entries[1].clone();
        change(&mut entry);
        vec![(2, vec![0x08, 3]), message(0), (3, entry_message(&entry)), message(2)]
    };
    let most = MAX_STREAMS.to_string();
    for (name, messages, expected) in [
        (
            "too few",
            vec![(2, vec![0x08, 3]), message(0), message(1)],
            "stream 0, record file.contents, field streams: 3 stated, 2 there".to_owned(),
        ),
        (
            "too many",
            vec![(2, vec![0x08, 1]), message(0), message(1)],
            "stream 0, record file.contents, field streams: 1 stated, 2 there".to_owned(),
        ),
        (
            "far too many",
            vec![(2, vec![0x08, 0xff, 0xff, 0xff, 0xff, 0x0f])],
            format!("stream 0, record file.contents, field streams: 4294967295, at most {most}"),
        ),
        (
            "nothing",
            vec![],
            "stream 0 (contents), chunk 1: a record stream.end, where file.contents is due"
                .to_owned(),
        ),
        (
            "no count",
            vec![message(0)],
            "stream 0 (contents), chunk 1: a record file.stream, where file.contents is due"
                .to_owned(),
        ),
        (
            "two counts",
            vec![(2, vec![0x08, 3]), (2, vec![0x08, 3])],
            "stream 0 (contents), chunk 2: a record file.contents, where file.stream is due"
                .to_owned(),
        ),
        (
            "twice the same",
            vec![(2, vec![0x08, 3]), message(0), message(1), message(0)],
            format!("streams 1 and 3 are both listed as {}", entries[0]),
        ),
        ("other items", changed(|entry| entry.items = 5), "stream 2 (network) at byte".to_owned()),
        (
            "another kind of stream",
            changed(|entry| entry.stream = StreamKind::BUS),
            "stream 2 (network) at byte".to_owned(),
        ),
        (
            "another name",
            changed(|entry| entry.name = "netw0rk".into()),
            "stream 0 (contents) has checksum".to_owned(),
        ),
        (
            "a kind that no header has",
            vec![(2, vec![0x08, 1]), (3, vec![0x08, 0x80, 0x80, 0x04])],
            "stream 0 (contents): chunk 2 at byte 258, record file.stream: \
             field stream (1): 65536, at most 65535"
                .to_owned(),
        ),
        (
            "half a GUID",
            vec![(2, vec![0x08, 1]), (3, vec![0x08, 1, 0x12, 8, 1, 2, 3, 4, 5, 6, 7, 8])],
            "stream 0 (contents): chunk 2 at byte 258, record file.stream: \
             field interface_type (2): 8 bytes, a GUID has 16"
                .to_owned(),
        ),
        (
            "a name that is a command to a terminal",
            vec![(2, vec![0x08, 1]), (3, vec![0x08, 1, 0x32, 4, 0x1b, b'[', b'2', b'J'])],
            "stream 0 (contents): chunk 2 at byte 258, record file.stream: \
             field name (6): control character U+001B"
                .to_owned(),
        ),
    ] {
        let found = read(&with_list(&messages)).unwrap_err().to_string();
        assert!(found.starts_with(&expected), "{name}: {found}");
    }
    // The same list put together again is the list.
    let again = with_list(&[(2, vec![0x08, 3]), message(0), message(1), message(2)]);
    assert_eq!(again, small_file());
}

#[test]
fn what_cannot_be_listed_is_not_written() {
    let [one, ..] = streams();
    let twice = write(&[("a", 0, one.clone()), ("b", 1, one.clone()), ("c", 0, one.clone())]);
    assert!(matches!(twice, Err(FileWriteError::Twice { first: 1, second: 3, .. })), "{twice:?}");
    for name in ["x".repeat(MAX_STREAM_NAME_BYTES + 1).as_str(), "two\nlines"] {
        let refused = write(&[(name, 0, one.clone())]).unwrap_err();
        assert!(matches!(refused, FileWriteError::List(_)), "{refused}");
    }
    assert!(write(&[("x".repeat(MAX_STREAM_NAME_BYTES).as_str(), 0, one)]).is_ok());
}

/// Something to be saved that does not keep the rules.
struct Wrong(fn(&mut [u8]) -> Result<SaveStep, std::fmt::Error>);

impl Save for Wrong {
    type Error = std::fmt::Error;

    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, Self::Error> {
        self.0(buffer)
    }
}

#[test]
fn what_does_not_give_a_stream_is_told_by_name() {
    let refusal = |save| {
        let mut writer = FileWriter::new(FormatVersion::NEWEST, producer());
        writer.add("disk", 0, save);
        writer.write_to(&mut Vec::new()).unwrap_err()
    };
    let failed = refusal(Wrong(|_| Err(std::fmt::Error)));
    assert!(matches!(failed, FileWriteError::Stream { stream: 1, .. }), "{failed}");
    let nothing = refusal(Wrong(|_| Ok(SaveStep { written: 0, needed: 0, done: true })));
    assert!(matches!(nothing, FileWriteError::NotAStream { stream: 1, .. }), "{nothing}");
    let stuck = refusal(Wrong(|buffer| {
        let stream = save(info(), &[]);
        let header = &stream[..chunk_ranges(&stream)[0].end];
        let written = if buffer.len() == header.len() {
            buffer.copy_from_slice(header);
            header.len()
        } else {
            0
        };
        Ok(SaveStep { written, needed: header.len(), done: false })
    }));
    assert!(
        matches!(stuck, FileWriteError::Stuck { stream: 1, room, .. } if room >= 4096),
        "{stuck}"
    );
    let mut writer = FileWriter::new(FormatVersion::NEWEST, producer());
    writer.add("disk", 0, Ready::new(streams()[0].clone()));
    let mut room = [0; 1000];
    let full = writer.write_to(&mut &mut room[..]).unwrap_err();
    assert!(matches!(full, FileWriteError::Output(_)), "{full}");
}

#[test]
fn flags_and_producer_of_a_stream_are_its_own() {
    let stream = save(StreamInfo { flags: HeaderFlags(0x8001), ..instance(7) }, &small_state());
    let (file, _) = write(&[("one", 0, stream)]).unwrap();
    let mut reader = FileReader::new(&file[..]).unwrap();
    let stream = reader.next_stream().unwrap().unwrap();
    assert_eq!(stream.header().info.flags, HeaderFlags(0x8001));
}

/// Gives what it has in pieces of these sizes, with an interruption or a failure between any two.
struct Pieces<'a> {
    bytes: &'a [u8],
    sizes: std::iter::Cycle<std::slice::Iter<'a, usize>>,
    turn: u32,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.turn += 1;
        match self.turn % 5 {
            1 => return Err(ErrorKind::Interrupted.into()),
            3 => return Err(ErrorKind::WouldBlock.into()),
            _ => {}
        }
        let size = *self.sizes.next().unwrap();
        let len = size.min(buffer.len()).min(self.bytes.len());
        buffer[..len].copy_from_slice(&self.bytes[..len]);
        self.bytes = &self.bytes[len..];
        Ok(len)
    }
}

proptest! {
    /// However a source gives its bytes, the chunks are the same, and nothing behind the stream is asked
    /// for.
    #[test]
    fn chunks_do_not_depend_on_the_pieces_they_come_in(sizes in vec(1_usize..300, 1..8)) {
        let [stream, ..] = streams();
        let bytes = [&stream[..], b"more"].concat();
        let source = Pieces { bytes: &bytes, sizes: sizes.iter().cycle(), turn: 0 };
        let mut input = ChunkInput::new(source);
        let mut ranges = chunk_ranges(&stream).into_iter();
        loop {
            match input.next() {
                Ok(Some(chunk)) => prop_assert_eq!(Some(chunk), ranges.next().map(|at| &stream[at])),
                Ok(None) => break,
                Err(InputError::Source(error)) => prop_assert_eq!(error.kind(), ErrorKind::WouldBlock),
                Err(error) => prop_assert!(false, "{}", error),
            }
        }
        prop_assert_eq!(ranges.next(), None);
        prop_assert!(input.is_complete());
        prop_assert_eq!((input.chunks(), input.bytes()), (7, stream.len() as u64));
        prop_assert_eq!(input.into_source().bytes, b"more");
    }
}

#[test]
fn what_is_no_chunk_is_said_again_and_again() {
    let [stream, ..] = streams();
    let second = chunk_ranges(&stream)[1].clone();
    let mut damaged = stream.clone();
    damaged[second.start] = b'c';
    let offset = second.start as u64;
    for (bytes, why) in [
        (&damaged[..], Damage::Magic { found: *b"cHNK" }),
        (&stream[..second.start + 7], Damage::Cut { needed: 28, available: 7 }),
        (
            &stream[..second.end - 1],
            Damage::Cut { needed: second.len() as u64, available: second.len() as u64 - 1 },
        ),
    ] {
        let mut input = ChunkInput::new(bytes);
        assert_eq!(input.next().unwrap().unwrap(), &stream[..second.start]);
        for _ in 0..3 {
            match input.next() {
                Err(InputError::Stream(error)) => {
                    assert_eq!(error, ReadError::Damaged { chunk: 1, offset, why });
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(!input.is_complete());
    }
    // A length that no record needs is refused as the field it is.
    let mut long = stream.clone();
    long[second.start + 4..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut input = ChunkInput::new(&long[..]);
    input.next().unwrap();
    assert!(matches!(
        input.next(),
        Err(InputError::Stream(ReadError::Damaged { why: Damage::Length { .. }, .. }))
    ));
    // A wrong field of a list's record, with all checksums right.
    let problem = FieldProblem::Guid { found: 8 };
    assert_eq!(problem.to_string(), "8 bytes, a GUID has 16");
}
