//! A stream, byte by byte, put together from the layout in `docs/saved-state.md` without the crate's help.

use saved_state::channel::{ChannelRecord, Side};
use saved_state::{HeaderFlags, StreamHeader, StreamKind};

use crate::records::{Outgoing, Owned, info, restore, save};

/// CRC-32C, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0_u32;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

fn seal(mut chunk: Vec<u8>) -> Vec<u8> {
    let checksum = crc32c(&chunk);
    chunk.extend(checksum.to_le_bytes());
    chunk
}

fn last_four(chunk: &[u8]) -> [u8; 4] {
    *chunk.last_chunk().unwrap()
}

fn row(kind: u16, name: &str) -> Vec<u8> {
    let mut row = Vec::new();
    row.extend(kind.to_le_bytes());
    row.extend([1, 0]); // version
    row.extend([1, 0]); // mandatory
    row.extend([0, 0]);
    row.extend(name.as_bytes());
    row.resize(32, 0);
    row
}

fn header() -> Vec<u8> {
    let mut bytes = b"\x89KMCL\r\n\x1a".to_vec();
    bytes.extend([0x04, 0x01, 0, 0]); // 260 bytes
    bytes.extend([1, 0]); // format version
    bytes.extend([1, 0]); // oldest reader
    bytes.extend([1, 0]); // a channel
    bytes.extend([4, 0]); // rows
    bytes.extend([32, 0]); // bytes of a row
    bytes.extend([128, 0]); // where they begin
    bytes.extend([1, 0, 0, 0]); // frozen
    bytes.extend([0; 4]); // chunks: not known
    bytes.extend([0; 8]); // bytes: not known
    bytes.extend([3, 0, 0, 0]); // items
    bytes.extend([0; 4]);
    // GUIDs as Windows stores them: 00112233-4455-6677-8899-aabbccddeeff
    bytes.extend([0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66]);
    bytes.extend([0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff]);
    // ffeeddcc-bbaa-9988-7766-554433221100
    bytes.extend([0xcc, 0xdd, 0xee, 0xff, 0xaa, 0xbb, 0x88, 0x99]);
    bytes.extend([0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0x00]);
    bytes.extend(b"kmcl 0.1.0");
    bytes.resize(128, 0);
    bytes.extend(row(1, "stream.end"));
    bytes.extend(row(16, "channel.channel"));
    bytes.extend(row(17, "channel.outgoing_packet"));
    bytes.extend(row(18, "channel.incoming_packet"));
    seal(bytes)
}

fn chunk(sequence: u8, kind: u8, flags: u8, previous: &[u8], message: &[u8]) -> Vec<u8> {
    let mut bytes = b"CHNK".to_vec();
    bytes.extend((20 + message.len() as u32 + 8).to_le_bytes());
    bytes.extend([sequence, 0, 0, 0]);
    bytes.extend([kind, 0]);
    bytes.extend([1, 0]); // version
    bytes.extend([flags, 0]);
    bytes.extend([0, 0]);
    bytes.extend(message);
    bytes.extend(last_four(previous));
    seal(bytes)
}

#[test]
fn a_stream_is_what_the_document_says() {
    let header = header();
    assert_eq!(header.len(), 260);
    let channel = chunk(
        1,
        16,
        2,
        &header,
        &[
            0x08, 0x01, // side: server
            0x18, 0x01, // open
            0x28, 0x80, 0x80, 0x02, // incoming_ring_bytes: 32768
            0x98, 0x01, 0x01, // outgoing_packets: 1
        ],
    );
    let packet = chunk(
        2,
        17,
        2,
        &channel,
        &[
            0x08, 0x05, // order: 5
            0x10, 0x02, // place: in_ring
            0x19, 0x02, 0, 0, 0, 0x01, 0, 0, 0, // transaction_id
            0x20, 0x01, // transaction
            0x3a, 0x03, b'o', b'w', b'n', // driver_state
        ],
    );
    let bytes = header.len() + channel.len() + packet.len();
    let end = chunk(
        3,
        1,
        3,
        &packet,
        &[
            0x08,
            0x03, // chunks: 3
            0x10,
            (bytes % 128) as u8 | 0x80,
            (bytes / 128) as u8,
        ],
    );
    let expected = [header, channel, packet, end].concat();

    let state = [
        Owned::Channel(ChannelRecord {
            side: Side::Server as i32,
            open: true,
            incoming_ring_bytes: 32768,
            outgoing_packets: 1,
            ..ChannelRecord::default()
        }),
        Owned::Outgoing(Outgoing {
            order: 5,
            place: 2,
            transaction_id: 0x1_0000_0002,
            transaction: true,
            driver_state: b"own".to_vec(),
            ..Outgoing::default()
        }),
    ];
    let info = saved_state::StreamInfo { items: 3, ..info() };
    assert_eq!(save(info, &state), expected);
    assert_eq!(restore(&expected).as_deref(), Ok(&state[..]));

    let seen = StreamHeader::read(&expected).unwrap();
    assert_eq!((seen.format_version, seen.oldest_reader, seen.length), (1, 1, 260));
    assert_eq!(seen.info, info);
    assert_eq!(seen.info.stream, StreamKind::CHANNEL);
    assert!(seen.info.flags.contains(HeaderFlags::FROZEN));
    let names: Vec<_> = seen.kinds().iter().map(|kind| kind.name.as_str()).collect();
    assert_eq!(
        names,
        ["stream.end", "channel.channel", "channel.outgoing_packet", "channel.incoming_packet"]
    );
}

#[test]
fn the_checksum_is_crc_32c() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}
