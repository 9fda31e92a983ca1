//! What a tool shows as tables: packets in flight, and sizes.

use std::collections::BTreeMap;

use crate::bare;
use crate::channel::{
    Fence, HandedBack, INCOMING_PACKET, IncomingPacketRecord, OUTGOING_PACKET,
    OutgoingPacketRecord, Place,
};
use crate::inspect::{ALL_KINDS, Piece, SeenRecord, What};
use crate::kind::RecordKind;
use crate::record::Decode;
use crate::schema::Fields;

/// A packet in flight, in the words of its channel. All sizes are bytes.
#[derive(Clone, Debug)]
pub struct PacketRow<'a> {
    /// It came from the peer; otherwise it was sent there.
    pub incoming: bool,
    /// Its place in the order of delivery, or of sending.
    pub order: u32,
    /// The id under which it is completed; `None` for one that has none yet.
    pub transaction_id: Option<u64>,
    /// Whether a completion is due.
    pub wants_completion: bool,
    /// How far it is: `"queued"`, `"in ring"`; `"never started"`, `"cancelled"`, `"finished"`.
    pub condition: &'static str,
    /// Why its device had it not, should it have been handed back: `"at passive"`, `"after memory"`.
    pub handed_back: Option<&'static str>,
    /// Its message, as far as it is saved.
    pub message_bytes: usize,
    /// The description of its external data.
    pub external_bytes: usize,
    /// The completion that it gets.
    pub completion_bytes: usize,
    /// What its driver or device saved with it.
    pub own_state: &'a [u8],
}

/// What a device saved with a packet, where it is a record of a known kind ([`bare`]).
#[derive(Clone, Debug)]
pub struct OwnRecord<'a> {
    /// Its name.
    pub name: &'static str,
    /// Its version.
    pub version: u16,
    /// Its fields.
    pub fields: Fields<'a>,
}

impl<'a> PacketRow<'a> {
    /// The row of a record, if it is an undamaged one of a packet.
    #[must_use]
    pub fn of(record: &SeenRecord<'a>) -> Option<Self> {
        match record.kind {
            _ if !record.known => None,
            OUTGOING_PACKET => {
                OutgoingPacketRecord::decode(record.payload).ok().map(Self::outgoing)
            }
            INCOMING_PACKET => {
                IncomingPacketRecord::decode(record.payload).ok().map(Self::incoming)
            }
            _ => None,
        }
    }

    fn outgoing(packet: OutgoingPacketRecord<'a>) -> Self {
        let OutgoingPacketRecord { order, place, extension, driver_state } = packet;
        let (transaction_id, wants_completion, condition, message) = match place {
            Place::Queued { message, transaction } => (None, transaction, "queued", message),
            Place::InRing { transaction_id } => (Some(transaction_id), true, "in ring", &[][..]),
        };
        Self {
            incoming: false,
            order,
            transaction_id,
            wants_completion,
            condition,
            handed_back: None,
            message_bytes: message.len(),
            external_bytes: extension.len(),
            completion_bytes: 0,
            own_state: driver_state,
        }
    }

    fn incoming(packet: IncomingPacketRecord<'a>) -> Self {
        let (condition, completion) = match packet.fence {
            Fence::NeverStarted => ("never started", &[][..]),
            Fence::Cancelled => ("cancelled", &[][..]),
            Fence::Finished { completion } => ("finished", completion),
        };
        Self {
            incoming: true,
            order: packet.order,
            transaction_id: Some(packet.transaction_id),
            wants_completion: packet.wants_completion,
            condition,
            handed_back: match packet.handed_back {
                HandedBack::No => None,
                HandedBack::AtPassive => Some("at passive"),
                HandedBack::AfterMemory => Some("after memory"),
            },
            message_bytes: packet.payload.len(),
            external_bytes: packet.extension.len(),
            completion_bytes: completion.len(),
            own_state: packet.device_state,
        }
    }

    /// What is in [`Self::own_state`], where that is a record of this project's.
    #[must_use]
    pub fn own_record(&self) -> Option<OwnRecord<'a>> {
        let (kind, version, message) = bare::split(self.own_state)?;
        let info = ALL_KINDS.iter().find(|info| info.kind == kind && version <= info.newest())?;
        let fields = Fields::new(message, info.fields);
        (info.check)(message).ok()?;
        Some(OwnRecord { name: info.name, version, fields })
    }
}

/// How many records there are of each kind, and what they take.
#[derive(Clone, Debug, Default)]
pub struct Sizes {
    kinds: BTreeMap<RecordKind, SizeRow>,
    headers: SizeRow,
    stray: SizeRow,
}

/// One row of [`Sizes`].
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SizeRow {
    /// Name of the kind, or what else it is: `"header"`, `"no chunk"`; a number where a kind has no name.
    pub name: String,
    /// How many.
    pub records: u64,
    /// Bytes of all of them, framing included.
    pub bytes: u64,
    /// Bytes of the largest.
    pub largest: u64,
}

impl SizeRow {
    fn add(&mut self, bytes: u64) {
        self.records += 1;
        self.bytes += bytes;
        self.largest = self.largest.max(bytes);
    }
}

impl Sizes {
    /// Counts a piece.
    pub fn add(&mut self, piece: &Piece<'_>) {
        let row = match &piece.what {
            What::Header(_) => &mut self.headers,
            What::Stray => &mut self.stray,
            What::Missing => return,
            What::Record(record) => self.kinds.entry(record.kind).or_insert_with(|| SizeRow {
                name: record.name.clone().unwrap_or_else(|| record.kind.to_string()),
                ..SizeRow::default()
            }),
        };
        row.add(piece.length);
    }

    /// What was counted: headers, then the kinds in the order of their numbers, then bytes that are no
    /// chunk. Together it is every byte.
    #[must_use]
    pub fn rows(&self) -> Vec<SizeRow> {
        let named = |row: &SizeRow, name: &str| SizeRow { name: name.to_owned(), ..row.clone() };
        let headers = std::iter::once(named(&self.headers, "header"));
        let stray = std::iter::once(named(&self.stray, "no chunk"));
        let rows = headers.chain(self.kinds.values().cloned()).chain(stray);
        rows.filter(|row| row.records != 0).collect()
    }
}
