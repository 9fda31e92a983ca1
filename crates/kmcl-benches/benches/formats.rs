//! Packets in flight as a saved state has them, beside what other encodings make of the same structs.
//!
//! Ours: 256 incoming packets of about 400 bytes each in a stream of chunks: every one framed, numbered,
//! chained, and under a checksum; fields can be added. postcard and bitcode: the same fields without any
//! of that, and without a way to add one. For orientation: nothing is required of the ratio.

#![expect(clippy::panic, reason = "a bench that cannot go on has nothing to measure")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use saved_state::channel::{Fence, HandedBack, INCOMING_PACKET, IncomingPacketRecord, KINDS};
use saved_state::text::Producer;
use saved_state::{
    FormatVersion, HeaderFlags, Step, StreamInfo, StreamKind, StreamReader, StreamWriter,
};
use serde::{Deserialize, Serialize};
use vmbus_wire::guid::Guid;

const PACKETS: u32 = 256;
const ROUNDS: usize = 2000;

/// [`IncomingPacketRecord`], for encodings that know no other.
#[derive(Clone, Deserialize, Serialize, bitcode::Decode, bitcode::Encode)]
struct Packet {
    order: u32,
    transaction_id: u64,
    wants_completion: bool,
    fence: u8,
    handed_back: u8,
    payload: Vec<u8>,
    extension: Vec<u8>,
    refused_external_bytes: u64,
    client_context: Vec<u8>,
    device_state: Vec<u8>,
}

/// Bytes without a pattern: encodings that pack those of all packets together find nothing to pack.
fn bytes(order: u32, count: usize) -> Vec<u8> {
    let mut state = order.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        let [low, ..] = state.to_le_bytes();
        low
    };
    (0..count).map(|_| next()).collect()
}

fn packets() -> Vec<Packet> {
    (0..PACKETS)
        .map(|order| Packet {
            order,
            transaction_id: 0xffff_9000_0000_0000 | u64::from(order) << 8,
            wants_completion: true,
            fence: 2,
            handed_back: 0,
            payload: bytes(order, 64),
            extension: bytes(order, 272),
            refused_external_bytes: 0,
            client_context: Vec::new(),
            device_state: bytes(order, 64),
        })
        .collect()
}

fn record(packet: &Packet) -> IncomingPacketRecord<'_> {
    IncomingPacketRecord {
        order: packet.order,
        transaction_id: packet.transaction_id,
        wants_completion: packet.wants_completion,
        fence: Fence::Cancelled,
        handed_back: HandedBack::No,
        payload: &packet.payload,
        extension: &packet.extension,
        refused_external_bytes: packet.refused_external_bytes,
        client_context: &packet.client_context,
        device_state: &packet.device_state,
    }
}

fn write(packets: &[Packet], out: &mut [u8]) -> usize {
    let info = StreamInfo {
        stream: StreamKind::CHANNEL,
        flags: HeaderFlags::FROZEN,
        interface_type: Guid::from_u128(1),
        interface_instance: Guid::from_u128(2),
        producer: Producer::EMPTY,
        chunks: 0,
        bytes: 0,
        items: PACKETS,
    };
    let Ok(mut writer) = StreamWriter::new(FormatVersion::NEWEST, info, KINDS) else {
        panic!("no writer")
    };
    let mut filled = bytes_of(writer.header(out));
    for packet in packets {
        let rest = out.get_mut(filled..).unwrap_or_default();
        filled += bytes_of(writer.record(&record(packet), rest));
    }
    filled + bytes_of(writer.end(out.get_mut(filled..).unwrap_or_default()))
}

fn bytes_of(step: Result<Step, saved_state::WriteError>) -> usize {
    match step {
        Ok(Step::Written { bytes }) => bytes,
        other => panic!("{other:?}"),
    }
}

fn read(mut stream: &[u8]) -> usize {
    let mut reader = StreamReader::new(StreamKind::CHANNEL, KINDS);
    let mut packets = 0;
    loop {
        match reader.read(&mut stream) {
            Ok(Some(chunk)) if chunk.kind() == INCOMING_PACKET => {
                match chunk.decode::<IncomingPacketRecord<'_>>() {
                    Ok(packet) => drop(black_box(packet)),
                    Err(error) => panic!("{error}"),
                }
                packets += 1;
            }
            Ok(Some(_)) => {}
            Ok(None) => return packets,
            Err(error) => panic!("{error}"),
        }
    }
}

fn timed<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let begun = Instant::now();
    let result = black_box(work());
    (begun.elapsed(), result)
}

#[expect(clippy::cast_precision_loss, reason = "nanoseconds of a round are far below 2^53")]
fn median_ns(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default().as_nanos() as f64
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let rounds = if std::env::args().any(|it| it == "--short") { 200 } else { ROUNDS };
    let packets = packets();
    let mut out = vec![0; 256 << 10];
    let mut times: [Vec<Duration>; 6] = Default::default();
    let mut sizes = [0; 3];
    for _ in 0..rounds {
        let (write_ours, ours) = timed(|| write(&packets, &mut out));
        let (read_ours, found) = timed(|| read(out.get(..ours).unwrap_or_default()));
        assert_eq!(found, packets.len());
        let mut room = std::mem::take(&mut out);
        let (write_postcard, postcard) =
            timed(|| postcard::to_slice(&packets, &mut room).map(|used| used.len()));
        let postcard = postcard?;
        let (read_postcard, back) =
            timed(|| postcard::from_bytes::<Vec<Packet>>(room.get(..postcard).unwrap_or_default()));
        assert_eq!(back?.len(), packets.len());
        out = room;
        let (write_bitcode, bitcode) = timed(|| bitcode::encode(&packets));
        let (read_bitcode, back) = timed(|| bitcode::decode::<Vec<Packet>>(&bitcode));
        assert_eq!(back?.len(), packets.len());
        sizes = [ours, postcard, bitcode.len()];
        for (all, one) in times.iter_mut().zip([
            write_ours,
            read_ours,
            write_postcard,
            read_postcard,
            write_bitcode,
            read_bitcode,
        ]) {
            all.push(one);
        }
    }
    let [write_ours, read_ours, write_postcard, read_postcard, write_bitcode, read_bitcode] =
        times.map(median_ns);
    for (format, bytes) in ["saved-state", "postcard", "bitcode"].iter().zip(sizes) {
        println!("FIGURE formats/{format}/256x400B {bytes} bytes");
    }
    for (what, ours, peer) in [
        ("write-beside-postcard", write_ours, write_postcard),
        ("write-beside-bitcode", write_ours, write_bitcode),
        ("read-beside-postcard", read_ours, read_postcard),
        ("read-beside-bitcode", read_ours, read_bitcode),
    ] {
        let ratio = ours / peer;
        println!("RATIO formats/{what} ours={ours:.0} peer={peer:.0} ratio={ratio:.2} limit=inf");
    }
    Ok(())
}
