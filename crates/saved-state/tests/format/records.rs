//! Streams to test with: owned packets beside what `prost` makes of them, and a channel that has them.

use proptest::collection::vec;
use proptest::prelude::*;
use saved_state::channel::{
    ChannelRecord, Fence, HandedBack, IncomingPacketRecord, KINDS, OutgoingPacketRecord, Place,
    Side,
};
use saved_state::text::Producer;
use saved_state::{
    Chunk, Encode, FormatVersion, HeaderFlags, ReadError, Step, StreamInfo, StreamKind,
    StreamReader, StreamWriter,
};
use vmbus_wire::guid::Guid;

pub(crate) const TYPE: Guid = Guid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
pub(crate) const INSTANCE: Guid = Guid::from_u128(0xffee_ddcc_bbaa_9988_7766_5544_3322_1100);

pub(crate) fn info() -> StreamInfo {
    StreamInfo {
        stream: StreamKind::CHANNEL,
        flags: HeaderFlags::FROZEN,
        interface_type: TYPE,
        interface_instance: INSTANCE,
        producer: Producer::new("kmcl 0.1.0").unwrap(),
        chunks: 0,
        bytes: 0,
        items: 0,
    }
}

/// An outgoing packet as `prost` has it.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Outgoing {
    #[prost(uint32, tag = "1")]
    pub(crate) order: u32,
    #[prost(int32, tag = "2")]
    pub(crate) place: i32,
    #[prost(fixed64, tag = "3")]
    pub(crate) transaction_id: u64,
    #[prost(bool, tag = "4")]
    pub(crate) transaction: bool,
    #[prost(bytes = "vec", tag = "5")]
    pub(crate) message: Vec<u8>,
    #[prost(bytes = "vec", tag = "6")]
    pub(crate) extension: Vec<u8>,
    #[prost(bytes = "vec", tag = "7")]
    pub(crate) driver_state: Vec<u8>,
}

impl Outgoing {
    pub(crate) fn record(&self) -> OutgoingPacketRecord<'_> {
        let place = match self.place {
            1 => Place::Queued { message: &self.message, transaction: self.transaction },
            _ => Place::InRing { transaction_id: self.transaction_id },
        };
        OutgoingPacketRecord {
            order: self.order,
            place,
            extension: &self.extension,
            driver_state: &self.driver_state,
        }
    }
}

/// An incoming packet as `prost` has it.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Incoming {
    #[prost(uint32, tag = "1")]
    pub(crate) order: u32,
    #[prost(fixed64, tag = "2")]
    pub(crate) transaction_id: u64,
    #[prost(bool, tag = "3")]
    pub(crate) wants_completion: bool,
    #[prost(int32, tag = "4")]
    pub(crate) fence: i32,
    #[prost(int32, tag = "5")]
    pub(crate) handed_back: i32,
    #[prost(bytes = "vec", tag = "6")]
    pub(crate) payload: Vec<u8>,
    #[prost(bytes = "vec", tag = "7")]
    pub(crate) extension: Vec<u8>,
    #[prost(uint64, tag = "8")]
    pub(crate) refused_external_bytes: u64,
    #[prost(bytes = "vec", tag = "9")]
    pub(crate) client_context: Vec<u8>,
    #[prost(bytes = "vec", tag = "10")]
    pub(crate) completion: Vec<u8>,
    #[prost(bytes = "vec", tag = "11")]
    pub(crate) device_state: Vec<u8>,
}

impl Incoming {
    pub(crate) fn record(&self) -> IncomingPacketRecord<'_> {
        IncomingPacketRecord {
            order: self.order,
            transaction_id: self.transaction_id,
            wants_completion: self.wants_completion,
            fence: match self.fence {
                1 => Fence::NeverStarted,
                2 => Fence::Cancelled,
                _ => Fence::Finished { completion: &self.completion },
            },
            handed_back: match self.handed_back {
                1 => HandedBack::AtPassive,
                2 => HandedBack::AfterMemory,
                _ => HandedBack::No,
            },
            payload: &self.payload,
            extension: &self.extension,
            refused_external_bytes: self.refused_external_bytes,
            client_context: &self.client_context,
            device_state: &self.device_state,
        }
    }
}

/// Lengths around those at which a length takes a byte more.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        3 => vec(any::<u8>(), 0..40),
        1 => vec(any::<u8>(), 120..136),
        1 => (16_380_usize..16_390, any::<u8>()).prop_map(|(len, byte)| vec![byte; len]),
    ]
}

pub(crate) fn outgoing() -> impl Strategy<Value = Outgoing> {
    let ids = prop_oneof![Just(0), Just(1), any::<u64>()];
    (any::<u32>(), 1..=2, ids, any::<bool>(), bytes(), bytes(), bytes()).prop_map(
        |(order, place, transaction_id, transaction, message, extension, driver_state)| {
            let queued = place == 1;
            Outgoing {
                order,
                place,
                transaction_id: if queued { 0 } else { transaction_id },
                transaction: !queued || transaction,
                message: if queued { message } else { Vec::new() },
                extension,
                driver_state,
            }
        },
    )
}

pub(crate) fn incoming() -> impl Strategy<Value = Incoming> {
    let numbers = (any::<u32>(), any::<u64>(), any::<bool>(), 1..=3, 0..=2, any::<u64>());
    (numbers, any::<bool>(), bytes(), bytes(), bytes(), bytes(), bytes()).prop_map(
        |(numbers, refused, payload, extension, client_context, completion, device_state)| {
            let (order, transaction_id, wants_completion, fence, handed_back, bytes) = numbers;
            Incoming {
                order,
                transaction_id,
                wants_completion,
                fence,
                handed_back,
                payload,
                extension: if refused { Vec::new() } else { extension },
                refused_external_bytes: if refused { bytes } else { 0 },
                client_context,
                completion: if fence == 3 { completion } else { Vec::new() },
                device_state,
            }
        },
    )
}

/// A record of a channel's stream, owned.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Owned {
    Channel(ChannelRecord),
    Outgoing(Outgoing),
    Incoming(Incoming),
}

impl Owned {
    pub(crate) fn write(&self, writer: &mut StreamWriter, out: &mut [u8]) -> Step {
        match self {
            Self::Channel(record) => writer.record(record, out),
            Self::Outgoing(packet) => writer.record(&packet.record(), out),
            Self::Incoming(packet) => writer.record(&packet.record(), out),
        }
        .unwrap()
    }

    pub(crate) fn read(chunk: &Chunk<'_>) -> Result<Self, ReadError> {
        Ok(match chunk.kind() {
            saved_state::channel::CHANNEL => Self::Channel(chunk.decode()?),
            saved_state::channel::OUTGOING_PACKET => {
                let record: OutgoingPacketRecord<'_> = chunk.decode()?;
                Self::Outgoing(outgoing_of(&record))
            }
            _ => {
                let record: IncomingPacketRecord<'_> = chunk.decode()?;
                Self::Incoming(incoming_of(&record))
            }
        })
    }
}

fn outgoing_of(record: &OutgoingPacketRecord<'_>) -> Outgoing {
    let (place, transaction_id, transaction, message) = match record.place {
        Place::Queued { message, transaction } => (1, 0, transaction, message.to_vec()),
        Place::InRing { transaction_id } => (2, transaction_id, true, Vec::new()),
    };
    Outgoing {
        order: record.order,
        place,
        transaction_id,
        transaction,
        message,
        extension: record.extension.to_vec(),
        driver_state: record.driver_state.to_vec(),
    }
}

fn incoming_of(record: &IncomingPacketRecord<'_>) -> Incoming {
    let (fence, completion) = match record.fence {
        Fence::NeverStarted => (1, Vec::new()),
        Fence::Cancelled => (2, Vec::new()),
        Fence::Finished { completion } => (3, completion.to_vec()),
    };
    Incoming {
        order: record.order,
        transaction_id: record.transaction_id,
        wants_completion: record.wants_completion,
        fence,
        handed_back: match record.handed_back {
            HandedBack::No => 0,
            HandedBack::AtPassive => 1,
            HandedBack::AfterMemory => 2,
        },
        payload: record.payload.to_vec(),
        extension: record.extension.to_vec(),
        refused_external_bytes: record.refused_external_bytes,
        client_context: record.client_context.to_vec(),
        completion,
        device_state: record.device_state.to_vec(),
    }
}

pub(crate) fn channel() -> impl Strategy<Value = ChannelRecord> {
    (1..=2, vec(any::<bool>(), 6), vec(any::<u32>(), 15), vec(any::<u8>(), 0..=120)).prop_map(
        |(side, flags, numbers, user_data)| ChannelRecord {
            side,
            started: flags[0],
            open: flags[1],
            frozen: flags[2],
            incoming_ring_bytes: numbers[0],
            outgoing_ring_bytes: numbers[1],
            read_index: numbers[2],
            write_index: numbers[3],
            transaction_quota: numbers[4],
            maximum_packet_size: numbers[5],
            maximum_external_data: numbers[6],
            maximum_external_ranges: numbers[7],
            maximum_completion_size: numbers[8],
            maximum_packet_count: numbers[9],
            client_context_size: numbers[10],
            pipe: flags[3],
            subchannel_index: numbers[11],
            user_data,
            outgoing_packets: numbers[12],
            incoming_packets: numbers[13],
            transaction_uses: numbers[14],
            processing_at_passive: flags[4],
            stopped: flags[5],
        },
    )
}

pub(crate) fn state() -> impl Strategy<Value = Vec<Owned>> {
    let packet =
        prop_oneof![outgoing().prop_map(Owned::Outgoing), incoming().prop_map(Owned::Incoming)];
    (channel(), vec(packet, 0..12)).prop_map(|(channel, packets)| {
        std::iter::once(Owned::Channel(channel)).chain(packets).collect()
    })
}

/// A small channel with one packet of each sort.
pub(crate) fn small_state() -> Vec<Owned> {
    let channel = ChannelRecord {
        side: Side::Server as i32,
        started: true,
        open: true,
        frozen: true,
        incoming_ring_bytes: 0x8000,
        outgoing_ring_bytes: 0x8000,
        read_index: 0x120,
        write_index: 0x7ff8,
        maximum_packet_size: 64,
        outgoing_packets: 2,
        incoming_packets: 2,
        ..ChannelRecord::default()
    };
    let queued = Outgoing {
        order: 0,
        place: 1,
        transaction: true,
        message: b"message".to_vec(),
        ..Outgoing::default()
    };
    let in_ring = Outgoing {
        order: 1,
        place: 2,
        transaction_id: 0x1_0000_0002,
        transaction: true,
        driver_state: b"driver".to_vec(),
        ..Outgoing::default()
    };
    let waiting = Incoming {
        order: 0,
        transaction_id: u64::MAX,
        wants_completion: true,
        fence: 1,
        handed_back: 2,
        payload: b"payload.".to_vec(),
        extension: vec![1, 0, 0, 0, 0, 0, 0, 0],
        client_context: vec![0xcc; 4],
        ..Incoming::default()
    };
    let finished = Incoming {
        order: 1,
        transaction_id: 7,
        wants_completion: true,
        fence: 3,
        completion: b"result".to_vec(),
        device_state: b"device".to_vec(),
        ..Incoming::default()
    };
    vec![
        Owned::Channel(channel),
        Owned::Outgoing(queued),
        Owned::Outgoing(in_ring),
        Owned::Incoming(waiting),
        Owned::Incoming(finished),
    ]
}

/// Calls `step` with room for one chunk until it is written.
pub(crate) fn push(stream: &mut Vec<u8>, mut step: impl FnMut(&mut [u8]) -> Step) {
    let mut room = Vec::new();
    loop {
        match step(&mut room) {
            Step::Written { bytes } => {
                stream.extend_from_slice(&room[..bytes]);
                return;
            }
            Step::Needs { bytes } => {
                assert!(bytes > room.len(), "{bytes} asked for with {} there", room.len());
                room.resize(bytes, 0xee);
            }
        }
    }
}

/// The stream of a state.
pub(crate) fn save(info: StreamInfo, state: &[Owned]) -> Vec<u8> {
    let mut writer = StreamWriter::new(FormatVersion::NEWEST, info, KINDS).unwrap();
    let mut stream = Vec::new();
    push(&mut stream, |out| writer.header(out).unwrap());
    for record in state {
        push(&mut stream, |out| record.write(&mut writer, out));
    }
    push(&mut stream, |out| writer.end(out).unwrap());
    assert_eq!(writer.bytes(), stream.len() as u64);
    stream
}

/// The stream of one message of any record, with an empty header and an end around it.
pub(crate) fn save_one<R: Encode>(record: &R) -> Vec<u8> {
    let mut writer = StreamWriter::new(FormatVersion::NEWEST, info(), &[R::KIND]).unwrap();
    let mut stream = Vec::new();
    push(&mut stream, |out| writer.header(out).unwrap());
    push(&mut stream, |out| writer.record(record, out).unwrap());
    push(&mut stream, |out| writer.end(out).unwrap());
    stream
}

pub(crate) fn reader() -> StreamReader {
    StreamReader::new(StreamKind::CHANNEL, KINDS)
}

/// Everything in a stream, given in one piece.
pub(crate) fn restore(stream: &[u8]) -> Result<Vec<Owned>, ReadError> {
    let mut reader = reader();
    let mut state = Vec::new();
    let mut input = stream;
    while let Some(chunk) = reader.read(&mut input)? {
        state.push(Owned::read(&chunk)?);
    }
    reader.finish()?;
    Ok(state)
}
