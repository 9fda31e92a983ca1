//! GPADLs in many messages, and headers that lie.

use proptest::collection::vec as vec_of;
use proptest::prelude::*;

use super::*;
use crate::message::gpadl::{GpadlHeaderFields, MAX_BODY_WORDS, MAX_GPADL_WORDS, MAX_HEADER_WORDS};
use crate::ranges::GpaRanges;

/// Collects a GPADL as a host does: header, then bodies, up to the number of words announced.
fn collect(messages: &[MessageBuffer]) -> (GpadlHeaderFields, Vec<u64>) {
    let (header, bodies) = messages.split_first().unwrap();
    let GuestMessage::GpadlHeader(header) = GuestMessage::parse(header, V5_3).unwrap() else {
        panic!("no header first");
    };
    let total = header.word_count().unwrap();
    let mut words: Vec<u64> = header.words().iter().map(|word| word.get()).collect();
    for body in bodies {
        let GuestMessage::GpadlBody(body) = GuestMessage::parse(body, V5_3).unwrap() else {
            panic!("no body next");
        };
        assert_eq!(body.fields.gpadl_id, header.fields.gpadl_id);
        assert!(words.len() < total, "a message too many");
        words.extend(body.words().iter().map(|word| word.get()).take(total - words.len()));
    }
    assert_eq!(words.len(), total);
    (header.fields, words)
}

/// One range over `pages` pages.
fn one_range(pages: usize) -> Vec<u64> {
    let mut words = vec![pages as u64 * 4096];
    words.extend((0..pages as u64).map(|page| 0x1000 + page));
    words
}

#[test]
fn a_gpadl_takes_as_few_messages_as_it_can() {
    for (pages, messages) in [(1, 1), (26, 1), (27, 2), (26 + 28, 2), (26 + 29, 3), (8190, 1 + 292)]
    {
        let words = one_range(pages);
        let ranges = GpaRanges::parse(&words, 1).unwrap();
        let split = GpadlMessages::new(7, 0xe1e10, ranges).unwrap();
        assert_eq!(split.len(), messages, "{pages} pages");
        let split: Vec<MessageBuffer> = split.collect();
        assert_eq!(split.len(), messages, "{pages} pages");
        let (fields, collected) = collect(&split);
        assert_eq!(collected, words, "{pages} pages");
        assert_eq!((fields.channel_id.get(), fields.gpadl_id.get()), (7, 0xe1e10));
        assert_eq!(fields.range_count.get(), 1);
        for message in &split[..messages - 1] {
            assert_eq!(message.len(), if message[0] == 8 { 236 } else { 240 }, "{pages} pages");
        }
    }
}

#[test]
fn the_bytes_of_a_small_gpadl() {
    let words = [0x0000_0010_0000_1ff0, 0x0102_0304_0506, 0x9];
    let ranges = GpaRanges::parse(&words, 1).unwrap();
    let messages: Vec<MessageBuffer> = GpadlMessages::new(0x11, 0x22, ranges).unwrap().collect();
    let expected = wire(
        44,
        &[
            (0, &[8]),
            (8, &[0x11]),
            (12, &[0x22]),
            (16, &[24, 0]),
            (18, &[1, 0]),
            (20, &[0xf0, 0x1f, 0, 0, 0x10, 0, 0, 0]),
            (28, &[6, 5, 4, 3, 2, 1, 0, 0]),
            (36, &[9, 0, 0, 0, 0, 0, 0, 0]),
        ],
    );
    assert_eq!(messages.len(), 1);
    assert_eq!(&*messages[0], expected);
}

#[test]
fn a_gpadl_has_a_largest_size() {
    let words = one_range(MAX_GPADL_WORDS);
    let ranges = GpaRanges::parse(&words, 1).unwrap();
    assert_eq!(
        GpadlMessages::new(1, 1, ranges).err(),
        Some(GpadlError::TooManyWords { words: MAX_GPADL_WORDS + 1, most: MAX_GPADL_WORDS })
    );
    let words = [zerocopy::little_endian::U64::ZERO; MAX_BODY_WORDS + 1];
    let header = GpadlHeaderFields {
        channel_id: 1.into(),
        gpadl_id: 1.into(),
        range_buflen: 16.into(),
        range_count: 1.into(),
    };
    assert_eq!(
        GpadlHeader::new(header, &words[..MAX_HEADER_WORDS + 1]).err(),
        Some(GpadlError::TooManyWords { words: MAX_HEADER_WORDS + 1, most: MAX_HEADER_WORDS })
    );
    let body = gpadl::GpadlBodyFields { message_number: 0.into(), gpadl_id: 1.into() };
    assert_eq!(
        GpadlBody::new(body, &words).err(),
        Some(GpadlError::TooManyWords { words: MAX_BODY_WORDS + 1, most: MAX_BODY_WORDS })
    );
    // The longest of both fit their message.
    let header = GpadlHeader::new(header, &words[..MAX_HEADER_WORDS]).unwrap();
    assert_eq!(GuestMessage::GpadlHeader(header).to_buffer().len(), 236);
    let body = GpadlBody::new(body, &words[..MAX_BODY_WORDS]).unwrap();
    assert_eq!(GuestMessage::GpadlBody(body).to_buffer().len(), 240);
}

#[test]
fn padding_behind_the_words_is_not_taken_for_words() {
    for (range_buflen, len, words) in [
        (16_u16, 36, 2), // exact
        (16, 240, 2),    // padded, as boot firmware does
        (16, 35, 1),     // the second word is in a body, and 7 bytes are nothing
        (16, 20, 0),     // all words are in bodies
        (24, 240, 3),
        (0xfff8, 240, 27), // as many as fit; 4 bytes are left
        (0, 240, 0),
    ] {
        let bytes = wire(len, &[(0, &[8]), (16, &range_buflen.to_le_bytes()), (18, &[1, 0])]);
        let Ok(GuestMessage::GpadlHeader(header)) = GuestMessage::parse(&bytes, V5_3) else {
            panic!("{range_buflen} in {len}");
        };
        assert_eq!(header.words().len(), words, "{range_buflen} in {len}");
    }
    for (len, words) in [(16, 0), (23, 0), (24, 1), (239, 27), (240, 28)] {
        let bytes = wire(len, &[(0, &[9])]);
        let Ok(GuestMessage::GpadlBody(body)) = GuestMessage::parse(&bytes, V5_3) else {
            panic!("{len}");
        };
        assert_eq!(body.words().len(), words, "{len}");
    }
}

#[test]
fn a_header_that_cannot_hold_its_ranges_is_refused() {
    for (range_buflen, range_count, expected) in [
        (16, 1, Ok(2)),
        (32, 2, Ok(4)),
        (0xfff8, 1, Ok(8191)),
        (0xfff0, 4095, Ok(8190)),
        (16, 0, Err(GpadlError::NoRanges)),
        (0, 0, Err(GpadlError::NoRanges)),
        (20, 1, Err(GpadlError::OddLength { range_buflen: 20 })),
        (0xffff, 1, Err(GpadlError::OddLength { range_buflen: 0xffff })),
        (8, 1, Err(GpadlError::TooShort { range_buflen: 8, range_count: 1 })),
        (0, 1, Err(GpadlError::TooShort { range_buflen: 0, range_count: 1 })),
        (24, 2, Err(GpadlError::TooShort { range_buflen: 24, range_count: 2 })),
        (0xfff8, 0xffff, Err(GpadlError::TooShort { range_buflen: 0xfff8, range_count: 0xffff })),
    ] {
        let fields = GpadlHeaderFields {
            channel_id: 1.into(),
            gpadl_id: 1.into(),
            range_buflen: u16::into(range_buflen),
            range_count: u16::into(range_count),
        };
        let header = GpadlHeader::new(fields, &[]).unwrap();
        assert_eq!(header.word_count(), expected, "{range_count} ranges in {range_buflen} bytes");
    }
}

/// Ranges of up to three pages each, starting anywhere in their first page.
fn any_ranges() -> impl Strategy<Value = (Vec<u64>, u32)> {
    vec_of((0..4096_u64, 1..8192_u64), 1..60).prop_map(|ranges| {
        let count = ranges.len() as u64;
        let words = ranges.into_iter().flat_map(|(offset, length)| {
            let pages = (offset + length).div_ceil(4096);
            std::iter::once(offset << 32 | length).chain((0..pages).map(|page| page + 0x55))
        });
        (words.collect(), u32::try_from(count).unwrap())
    })
}

proptest! {
    #[test]
    fn a_gpadl_arrives_as_it_was_sent((words, count) in any_ranges()) {
        let ranges = GpaRanges::parse(&words, count).unwrap();
        let messages: Vec<MessageBuffer> = GpadlMessages::new(3, 9, ranges).unwrap().collect();
        let (fields, collected) = collect(&messages);
        prop_assert_eq!(u32::from(fields.range_count.get()), count);
        let arrived = GpaRanges::parse(&collected, count).unwrap();
        prop_assert!(arrived.iter().eq(ranges.iter()));
    }
}
