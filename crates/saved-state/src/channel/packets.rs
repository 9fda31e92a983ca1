//! Packets in flight. These come by the hundred, so they are written from the channel's own memory and
//! read as slices of the input, without a copy in between.

use crate::channel::{INCOMING_PACKET, OUTGOING_PACKET, PACKET_BYTES};
use crate::error::{FieldError, FieldProblem};
use crate::kind::{KindInfo, SINCE_V1};
use crate::limits::{MAX_CONTEXT_BYTES, MAX_OWN_STATE_BYTES};
use crate::protobuf::{Counter, Message, Sink};
use crate::record::{Decode, Encode, EncodeError, Record};
use crate::schema::{Field, Fields, Found, Shape, Value};

/// Where an outgoing packet was.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Place<'a> {
    /// It waited for room in the ring.
    Queued {
        /// The message to send.
        message: &'a [u8],
        /// Whether the peer is to complete it.
        transaction: bool,
    },
    /// It was in the ring, or read from there; the peer has not completed it.
    InRing {
        /// The id under which the peer will complete it.
        transaction_id: u64,
    },
}

/// A packet that was sent and not completed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OutgoingPacketRecord<'a> {
    /// Its place among the outgoing packets, in the order of sending.
    pub order: u32,
    /// Where it was.
    pub place: Place<'a>,
    /// The description of its external data as the ring has it; empty without any.
    pub extension: &'a [u8],
    /// What the driver saved with it (`EvtVmbChannelSavePacket`); empty if it has none.
    pub driver_state: &'a [u8],
}

const QUEUED: u32 = 1;
const IN_RING: u32 = 2;

const OUTGOING_FIELDS: &[Field] = &[
    Field::new(1, "order", Shape::Uint32),
    Field::new(2, "place", Shape::Enum(&["unspecified", "queued", "in_ring"])).required(),
    Field::new(3, "transaction_id", Shape::Fixed64),
    Field::new(4, "transaction", Shape::Bool),
    Field::new(5, "message", PACKET_BYTES),
    Field::new(6, "extension", PACKET_BYTES),
    Field::new(7, "driver_state", Shape::Bytes { most: MAX_OWN_STATE_BYTES }),
];

impl OutgoingPacketRecord<'_> {
    #[inline]
    fn put(&self, to: &mut impl Message) {
        to.uint32(1, self.order);
        match self.place {
            Place::Queued { message, transaction } => {
                to.uint32(2, QUEUED);
                to.bool(4, transaction);
                to.bytes(5, message);
            }
            Place::InRing { transaction_id } => {
                to.uint32(2, IN_RING);
                to.fixed64(3, transaction_id);
                to.bool(4, true);
            }
        }
        to.bytes(6, self.extension);
        to.bytes(7, self.driver_state);
    }
}

impl OutgoingPacketRecord<'_> {
    /// Whether it is within the bounds of its fields.
    #[inline]
    fn check(&self) -> Result<(), FieldError> {
        let message = match self.place {
            Place::Queued { message, .. } => message,
            Place::InRing { .. } => &[],
        };
        within(OUTGOING_FIELDS, 5, message)?;
        within(OUTGOING_FIELDS, 6, self.extension)?;
        within(OUTGOING_FIELDS, 7, self.driver_state)
    }
}

impl Record for OutgoingPacketRecord<'_> {
    const KIND: &'static KindInfo = &KindInfo {
        kind: OUTGOING_PACKET,
        name: "channel.outgoing_packet",
        mandatory: true,
        versions: SINCE_V1,
        fields: OUTGOING_FIELDS,
        check: |payload| OutgoingPacketRecord::decode(payload).map(drop),
    };
}

impl Encode for OutgoingPacketRecord<'_> {
    #[inline]
    fn encoded_len(&self) -> usize {
        let mut counter = Counter::default();
        self.put(&mut counter);
        counter.bytes
    }

    #[inline]
    fn encode(&self, out: &mut [u8]) -> Result<(), EncodeError> {
        self.check().map_err(EncodeError::Field)?;
        let mut sink = Sink::new(out);
        self.put(&mut sink);
        if sink.is_full() { Ok(()) } else { Err(EncodeError::Length) }
    }
}

impl<'a> Decode<'a> for OutgoingPacketRecord<'a> {
    fn decode(payload: &'a [u8]) -> Result<Self, FieldError> {
        let (mut order, mut place, mut transaction_id, mut transaction) = (0, 0, 0, false);
        let (mut message, mut extension, mut driver_state): (&[u8], &[u8], &[u8]) =
            Default::default();
        for found in Fields::new(payload, OUTGOING_FIELDS) {
            let Found { number, value, .. } = found?;
            match (number, value) {
                (1, Value::Uint32(found)) => order = found,
                (2, Value::Enum { number, .. }) => place = number,
                (3, Value::Uint64(found)) => transaction_id = found,
                (4, Value::Bool(found)) => transaction = found,
                (5, Value::Bytes(found)) => message = found,
                (6, Value::Bytes(found)) => extension = found,
                (7, Value::Bytes(found)) => driver_state = found,
                _ => {} // from a later version
            }
        }
        let place = if place == IN_RING {
            absent(5, "message", message.is_empty(), "place")?;
            absent(4, "transaction", transaction, "place")?;
            Place::InRing { transaction_id }
        } else {
            absent(3, "transaction_id", transaction_id == 0, "place")?;
            Place::Queued { message, transaction }
        };
        Ok(Self { order, place, extension, driver_state })
    }
}

/// What is known of the original I/O of an incoming packet: nothing of it can happen any more.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fence<'a> {
    /// The device had not begun with it.
    NeverStarted,
    /// It was cancelled: whatever it has not done by now it will not do.
    Cancelled,
    /// It is over; only its completion has not left.
    Finished {
        /// The payload of the completion.
        completion: &'a [u8],
    },
}

/// Whether a packet callback handed the packet back, to be delivered again.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum HandedBack {
    /// No: the device had it.
    #[default]
    No,
    /// By a thread that may sleep (`VmbChannelPacketDeferToPassive`).
    AtPassive,
    /// Once its memory is there (STATUS_PENDING).
    AfterMemory,
}

/// A packet that was delivered and not completed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct IncomingPacketRecord<'a> {
    /// Its place among the incoming packets, in the order of delivery.
    pub order: u32,
    /// The peer's id: any 64 bits.
    pub transaction_id: u64,
    /// Whether the peer waits for a completion.
    pub wants_completion: bool,
    /// What became of its original I/O.
    pub fence: Fence<'a>,
    /// Whether it was on its way back to the device.
    pub handed_back: HandedBack,
    /// The message, without a pipe's header.
    pub payload: &'a [u8],
    /// The description of external data as the ring had it, as little-endian words; empty without any.
    pub extension: &'a [u8],
    /// Bytes of external data that the channel was not set up for (D-40); the extension was not
    /// kept then. Else 0.
    pub refused_external_bytes: u64,
    /// The area of the channel's user.
    pub client_context: &'a [u8],
    /// What the device saved with it; empty if it has none.
    pub device_state: &'a [u8],
}

const NEVER_STARTED: u32 = 1;
const CANCELLED: u32 = 2;
const FINISHED: u32 = 3;

const AT_PASSIVE: u32 = 1;
const AFTER_MEMORY: u32 = 2;

const INCOMING_FIELDS: &[Field] = &[
    Field::new(1, "order", Shape::Uint32),
    Field::new(2, "transaction_id", Shape::Fixed64),
    Field::new(3, "wants_completion", Shape::Bool),
    Field::new(4, "fence", Shape::Enum(&["unspecified", "never_started", "cancelled", "finished"]))
        .required(),
    Field::new(5, "handed_back", Shape::Enum(&["no", "at_passive", "after_memory"])),
    Field::new(6, "payload", PACKET_BYTES),
    Field::new(7, "extension", PACKET_BYTES),
    Field::new(8, "refused_external_bytes", Shape::Uint64),
    Field::new(9, "client_context", Shape::Bytes { most: MAX_CONTEXT_BYTES }),
    Field::new(10, "completion", PACKET_BYTES),
    Field::new(11, "device_state", Shape::Bytes { most: MAX_OWN_STATE_BYTES }),
];

impl IncomingPacketRecord<'_> {
    #[inline]
    fn put(&self, to: &mut impl Message) {
        let (fence, completion): (_, &[u8]) = match self.fence {
            Fence::NeverStarted => (NEVER_STARTED, &[]),
            Fence::Cancelled => (CANCELLED, &[]),
            Fence::Finished { completion } => (FINISHED, completion),
        };
        to.uint32(1, self.order);
        to.fixed64(2, self.transaction_id);
        to.bool(3, self.wants_completion);
        to.uint32(4, fence);
        to.uint32(
            5,
            match self.handed_back {
                HandedBack::No => 0,
                HandedBack::AtPassive => AT_PASSIVE,
                HandedBack::AfterMemory => AFTER_MEMORY,
            },
        );
        to.bytes(6, self.payload);
        to.bytes(7, self.extension);
        to.varint(8, self.refused_external_bytes);
        to.bytes(9, self.client_context);
        to.bytes(10, completion);
        to.bytes(11, self.device_state);
    }
}

impl IncomingPacketRecord<'_> {
    /// Whether it is within the bounds of its fields, and does not contradict itself.
    #[inline]
    fn check(&self) -> Result<(), FieldError> {
        within(INCOMING_FIELDS, 6, self.payload)?;
        within(INCOMING_FIELDS, 7, self.extension)?;
        within(INCOMING_FIELDS, 9, self.client_context)?;
        if let Fence::Finished { completion } = self.fence {
            within(INCOMING_FIELDS, 10, completion)?;
        }
        within(INCOMING_FIELDS, 11, self.device_state)?;
        let kept = self.refused_external_bytes == 0 || self.extension.is_empty();
        absent(7, "extension", kept, "refused_external_bytes")
    }
}

impl Record for IncomingPacketRecord<'_> {
    const KIND: &'static KindInfo = &KindInfo {
        kind: INCOMING_PACKET,
        name: "channel.incoming_packet",
        mandatory: true,
        versions: SINCE_V1,
        fields: INCOMING_FIELDS,
        check: |payload| IncomingPacketRecord::decode(payload).map(drop),
    };
}

impl Encode for IncomingPacketRecord<'_> {
    #[inline]
    fn encoded_len(&self) -> usize {
        let mut counter = Counter::default();
        self.put(&mut counter);
        counter.bytes
    }

    #[inline]
    fn encode(&self, out: &mut [u8]) -> Result<(), EncodeError> {
        self.check().map_err(EncodeError::Field)?;
        let mut sink = Sink::new(out);
        self.put(&mut sink);
        if sink.is_full() { Ok(()) } else { Err(EncodeError::Length) }
    }
}

impl<'a> Decode<'a> for IncomingPacketRecord<'a> {
    fn decode(payload: &'a [u8]) -> Result<Self, FieldError> {
        let mut record = Self {
            order: 0,
            transaction_id: 0,
            wants_completion: false,
            fence: Fence::NeverStarted,
            handed_back: HandedBack::No,
            payload: &[],
            extension: &[],
            refused_external_bytes: 0,
            client_context: &[],
            device_state: &[],
        };
        let (mut fence, mut completion): (_, &[u8]) = (0, &[]);
        for found in Fields::new(payload, INCOMING_FIELDS) {
            let Found { number, value, .. } = found?;
            match (number, value) {
                (1, Value::Uint32(found)) => record.order = found,
                (2, Value::Uint64(found)) => record.transaction_id = found,
                (3, Value::Bool(found)) => record.wants_completion = found,
                (4, Value::Enum { number, .. }) => fence = number,
                (5, Value::Enum { number, .. }) => {
                    record.handed_back = match number {
                        AT_PASSIVE => HandedBack::AtPassive,
                        AFTER_MEMORY => HandedBack::AfterMemory,
                        _ => HandedBack::No,
                    };
                }
                (6, Value::Bytes(found)) => record.payload = found,
                (7, Value::Bytes(found)) => record.extension = found,
                (8, Value::Uint64(found)) => record.refused_external_bytes = found,
                (9, Value::Bytes(found)) => record.client_context = found,
                (10, Value::Bytes(found)) => completion = found,
                (11, Value::Bytes(found)) => record.device_state = found,
                _ => {} // from a later version
            }
        }
        record.fence = match fence {
            FINISHED => Fence::Finished { completion },
            fence => {
                absent(10, "completion", completion.is_empty(), "fence")?;
                if fence == CANCELLED { Fence::Cancelled } else { Fence::NeverStarted }
            }
        };
        let kept = record.refused_external_bytes == 0 || record.extension.is_empty();
        absent(7, "extension", kept, "refused_external_bytes")?;
        Ok(record)
    }
}

/// Refuses bytes beyond the bound of their field; numbers count from 1 in both tables.
#[inline]
fn within(table: &'static [Field], number: usize, bytes: &[u8]) -> Result<(), FieldError> {
    table.get(number - 1).map_or(Ok(()), |field| field.holds(bytes))
}

/// Refuses a field that another one rules out.
#[inline]
fn absent(
    number: u32,
    name: &'static str,
    holds: bool,
    other: &'static str,
) -> Result<(), FieldError> {
    let problem = FieldProblem::Contradiction { other };
    if holds { Ok(()) } else { Err(FieldError { number, name, problem }) }
}
