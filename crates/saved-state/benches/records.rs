//! What framing and encoding packets cost, beside what no saved state can do without: one copy of its
//! bytes, and one checksum over them.
//!
//! Ours: a stream of 256 packets of about 400 bytes each, written into buffers of 64 KiB, and read from
//! them again, each packet decoded. The peer in the same run: `memcpy` of the same bytes, and CRC-32C over
//! them in one go. Rounds alternate, and medians are compared.

use std::hint::black_box;
use std::time::{Duration, Instant};

use saved_state::channel::{
    ChannelRecord, Fence, HandedBack, INCOMING_PACKET, IncomingPacketRecord, KINDS, Side,
};
use saved_state::inspect::{ALL_KINDS, inspect};
use saved_state::text::Producer;
use saved_state::{
    FormatVersion, HeaderFlags, Step, StreamInfo, StreamKind, StreamReader, StreamWriter,
};
use vmbus_wire::guid::Guid;

const PACKETS: u32 = 256;
const BUFFER: usize = 64 << 10;
const ROUNDS: usize = 4000;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// A read of 128 KiB, as a disk has it in flight.
struct State {
    payload: [u8; 64],
    extension: [u8; 272],
    device_state: [u8; 64],
}

impl State {
    fn packet(&self, order: u32) -> IncomingPacketRecord<'_> {
        IncomingPacketRecord {
            order,
            transaction_id: 0xffff_9000_0000_0000 | u64::from(order) << 8,
            wants_completion: true,
            fence: Fence::Cancelled,
            handed_back: HandedBack::No,
            payload: &self.payload,
            extension: &self.extension,
            refused_external_bytes: 0,
            client_context: &[],
            device_state: &self.device_state,
        }
    }
}

/// Buffers of the caller's, and how much of each was filled.
struct Buffers {
    filled: Vec<(Vec<u8>, usize)>,
    used: usize,
}

impl Buffers {
    fn new() -> Self {
        Self { filled: (0..4).map(|_| (vec![0; BUFFER], 0)).collect(), used: 0 }
    }

    fn clear(&mut self) {
        self.used = 0;
        self.filled.iter_mut().for_each(|(_, filled)| *filled = 0);
    }

    /// One step into the buffer at hand, or into the next one where that is full.
    fn put(&mut self, mut step: impl FnMut(&mut [u8]) -> Outcome<Step>) -> Outcome<()> {
        loop {
            let (buffer, filled) = self.filled.get_mut(self.used).ok_or("no buffer")?;
            match step(buffer.get_mut(*filled..).unwrap_or_default())? {
                Step::Written { bytes } => {
                    *filled += bytes;
                    return Ok(());
                }
                Step::Needs { .. } => self.used += 1,
            }
        }
    }

    fn whole(&self) -> Vec<u8> {
        let pieces = self.filled.iter().map(|(bytes, filled)| bytes.get(..*filled));
        pieces.map(Option::unwrap_or_default).collect::<Vec<_>>().concat()
    }
}

fn write(state: &State, channel: &ChannelRecord, buffers: &mut Buffers) -> Outcome<Duration> {
    let info = StreamInfo {
        stream: StreamKind::CHANNEL,
        flags: HeaderFlags::FROZEN,
        interface_type: Guid::from_u128(1),
        interface_instance: Guid::from_u128(2),
        producer: Producer::new("bench")?,
        chunks: 0,
        bytes: 0,
        items: PACKETS,
    };
    buffers.clear();
    let begun = Instant::now();
    let mut writer = StreamWriter::new(FormatVersion::NEWEST, info, KINDS)?;
    buffers.put(|out| Ok(writer.header(out)?))?;
    buffers.put(|out| Ok(writer.record(channel, out)?))?;
    for order in 0..PACKETS {
        let packet = state.packet(order);
        buffers.put(|out| Ok(writer.record(&packet, out)?))?;
    }
    buffers.put(|out| Ok(writer.end(out)?))?;
    Ok(begun.elapsed())
}

fn read(buffers: &Buffers) -> Outcome<Duration> {
    let begun = Instant::now();
    let mut reader = StreamReader::new(StreamKind::CHANNEL, KINDS);
    let mut packets = 0;
    for (buffer, filled) in &buffers.filled {
        let mut input = buffer.get(..*filled).unwrap_or_default();
        while let Some(chunk) = reader.read(&mut input)? {
            if chunk.kind() == INCOMING_PACKET {
                black_box(chunk.decode::<IncomingPacketRecord<'_>>()?);
                packets += 1;
            }
        }
    }
    reader.finish()?;
    let took = begun.elapsed();
    assert_eq!(packets, PACKETS);
    Ok(took)
}

fn copy_and_sum(stream: &[u8], room: &mut [u8]) -> Duration {
    let begun = Instant::now();
    black_box(&mut *room).copy_from_slice(black_box(stream));
    black_box(crc32c::crc32c(black_box(room)));
    begun.elapsed()
}

fn walk(stream: &[u8]) -> Duration {
    let begun = Instant::now();
    let damaged = inspect(stream, ALL_KINDS).filter(|piece| piece.damage.is_some()).count();
    assert_eq!(damaged, 0);
    begun.elapsed()
}

fn median_us(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    let middle = times.get(times.len() / 2).copied().unwrap_or_default();
    middle.as_secs_f64() * 1e6
}

fn main() -> Outcome<()> {
    let rounds = if std::env::args().any(|arg| arg == "--short") { 400 } else { ROUNDS };
    let state = State { payload: [1; 64], extension: [2; 272], device_state: [3; 64] };
    let channel =
        ChannelRecord { side: Side::Server as i32, open: true, ..ChannelRecord::default() };
    let mut buffers = Buffers::new();
    write(&state, &channel, &mut buffers)?;
    let stream = buffers.whole();
    let mut room = vec![0; stream.len()];
    let (mut written, mut read_back, mut peer, mut walked) = (vec![], vec![], vec![], vec![]);
    for _ in 0..rounds {
        written.push(write(&state, &channel, &mut buffers)?);
        peer.push(copy_and_sum(&stream, &mut room));
        read_back.push(read(&buffers)?);
        walked.push(walk(&stream));
    }
    let peer = median_us(peer);
    println!("FIGURE saved-state/stream/256x400B {} bytes", stream.len());
    println!("FIGURE saved-state/memcpy+crc32c/256x400B {peer:.1} us");
    for (name, times, limit) in
        [("write", written, 4.0), ("read+decode", read_back, 8.0), ("inspect", walked, 0.0)]
    {
        let ours = median_us(times);
        let ratio = ours / peer;
        let name = format!("saved-state/{name}/256x400B/64KiB");
        if limit == 0.0 {
            println!("FIGURE {name} {ours:.1} us");
        } else {
            let (ours, peer) = (ours * 1e3, peer * 1e3);
            println!(
                "RATIO {name} ours={ours:.0} peer={peer:.0} ratio={ratio:.2} limit={limit:.1}"
            );
        }
    }
    Ok(())
}
