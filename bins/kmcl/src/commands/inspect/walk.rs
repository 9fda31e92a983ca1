//! From bytes to what is in them, for a report: streams, records, packets, damage.

use saved_state::channel::{INCOMING_PACKET, IncomingPacketRecord};
use saved_state::inspect::{
    ALL_KINDS, FilePiece, PacketRow, Piece, SeenRecord, What, inspect_file,
};
use saved_state::{Decode, HeaderFlags, ReadError, StreamHeader, Value};
use serde::Serialize;
use serde_json::Value as Json;
use vsc_storage::wire::SCSI_INTERFACE;
use vsc_storage::wire::packet::{Operation, VstorPacket};
use vsc_storage::wire::scsi::cdb::Command;

/// What is in a file.
#[derive(Debug, Default, Serialize)]
pub(super) struct State {
    pub(super) bytes: u64,
    pub(super) streams: Vec<Stream>,
    /// What is wrong, in the order of the bytes. Empty: nothing.
    pub(super) damage: Vec<Damage>,
}

/// One stream of a file.
#[derive(Debug, Default, Serialize)]
pub(super) struct Stream {
    /// Its first byte in the file.
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) chunks: u64,
    /// What the file's list calls it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) name: Option<String>,
    #[serde(flatten)]
    pub(super) header: Option<Header>,
    /// How many records of each kind there are, and how large.
    pub(super) sizes: Vec<Tally>,
    /// The records, except packets.
    pub(super) records: Vec<Fields>,
    pub(super) packets: Vec<Packet>,
}

/// What a stream says of itself.
#[derive(Debug, Serialize)]
pub(super) struct Header {
    pub(super) kind: String,
    pub(super) format_version: u16,
    pub(super) oldest_reader: u16,
    pub(super) producer: String,
    pub(super) interface_type: String,
    pub(super) interface_instance: String,
    pub(super) frozen: bool,
    pub(super) items: u32,
}

/// The records of one kind in a stream.
#[derive(Debug, Serialize)]
pub(super) struct Tally {
    pub(super) record: String,
    pub(super) version: u16,
    pub(super) mandatory: bool,
    /// Whether this program knows it.
    pub(super) known: bool,
    pub(super) count: u64,
    /// With their chunks.
    pub(super) bytes: u64,
    pub(super) largest_bytes: u64,
}

/// A record's fields, by their names, in their order.
#[derive(Debug, Serialize)]
pub(super) struct Fields {
    pub(super) record: String,
    /// The chunk's first byte in the file.
    pub(super) offset: u64,
    pub(super) fields: Vec<(String, Json)>,
}

/// A packet in flight.
#[derive(Debug, Serialize)]
pub(super) struct Packet {
    /// The chunk's first byte in the file.
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) incoming: bool,
    pub(super) order: u32,
    /// Absent for one that was not in the ring yet.
    pub(super) transaction_id: Option<u64>,
    /// `never started`, `cancelled`, `finished`; for outgoing ones `queued`, `in ring`.
    pub(super) condition: &'static str,
    pub(super) message_bytes: usize,
    /// Of the description of external data, not of the data.
    pub(super) external_bytes: usize,
    /// What the device, or the driver, saved with it.
    pub(super) own_state_bytes: usize,
    pub(super) completion_bytes: usize,
    /// What it asks for, where that is understood.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) request: Option<String>,
}

/// Something that is not as it must be.
#[derive(Debug, Serialize)]
pub(super) struct Damage {
    pub(super) stream: usize,
    /// Its first byte in the file.
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) what: String,
}

impl State {
    /// Walks through `bytes` to their end.
    pub(super) fn read(bytes: &[u8]) -> Self {
        let mut state = Self { bytes: bytes.len() as u64, ..Self::default() };
        let (mut header_is_damaged, mut before_is_damaged) = (false, false);
        for FilePiece { stream, listed, mut piece, misplaced } in inspect_file(bytes, ALL_KINDS) {
            let number = stream as usize;
            while state.streams.len() <= number {
                let name = listed.as_ref().map(|entry| entry.name.to_string());
                let offset = piece.offset;
                state.streams.push(Stream { offset, name, ..Stream::default() });
                (header_is_damaged, before_is_damaged) = (false, false);
            }
            if follows(&piece, header_is_damaged, before_is_damaged) {
                piece.damage = None;
            }
            before_is_damaged = piece.damage.is_some();
            header_is_damaged |= before_is_damaged && matches!(piece.what, What::Header(_));
            let what = piece.damage.as_ref().map(text_of);
            for what in what.into_iter().chain(misplaced.map(|error| error.to_string())) {
                let (offset, bytes) = (piece.offset, piece.length);
                state.damage.push(Damage { stream: number, offset, bytes, what });
            }
            if let Some(stream) = state.streams.get_mut(number) {
                stream.add(&piece);
            }
        }
        state
    }

    /// Whether this is no saved state at all.
    pub(super) fn is_foreign(&self) -> bool {
        self.streams.iter().all(|stream| stream.header.is_none() && stream.chunks == 0)
    }

    pub(super) fn chunks(&self) -> u64 {
        self.streams.iter().map(|stream| stream.chunks).sum()
    }
}

/// Whether all that is wrong with a record follows from damage that was told already: its kind is not in
/// a list that is damaged, or it does not fit a checksum that is.
fn follows(piece: &Piece<'_>, header_is_damaged: bool, before_is_damaged: bool) -> bool {
    use saved_state::Damage;
    match (&piece.what, &piece.damage) {
        (What::Record(_), Some(ReadError::Damaged { why, .. })) => match why {
            Damage::NotAnnounced { .. } => header_is_damaged,
            Damage::Chain { .. } => before_is_damaged,
            _ => false,
        },
        _ => false,
    }
}

/// What is wrong, without the place: that is told from the start of the file.
fn text_of(error: &ReadError) -> String {
    match error {
        ReadError::Damaged { chunk, why, .. } => format!("chunk {chunk}: {why}"),
        ReadError::Record { chunk, record, why, .. } => {
            format!("chunk {chunk}, record {record}: {why}")
        }
        error => error.to_string(),
    }
}

impl Stream {
    fn add(&mut self, piece: &Piece<'_>) {
        self.bytes += piece.length;
        match &piece.what {
            What::Header(Some(header)) => {
                self.chunks += 1;
                self.header = Some(Header::of(header));
            }
            What::Record(record) if piece.damage.is_none() => {
                self.chunks += 1;
                self.add_record(record, piece);
            }
            _ => {}
        }
    }

    fn add_record(&mut self, record: &SeenRecord<'_>, piece: &Piece<'_>) {
        let name = record.name.clone().unwrap_or_else(|| format!("kind {}", record.kind));
        let (offset, bytes) = (piece.offset, piece.length);
        match self.sizes.iter_mut().find(|tally| tally.record == name) {
            Some(tally) => {
                tally.count += 1;
                tally.bytes += bytes;
                tally.largest_bytes = tally.largest_bytes.max(bytes);
            }
            None => self.sizes.push(Tally {
                record: name.clone(),
                version: record.version,
                mandatory: record.mandatory,
                known: record.known,
                count: 1,
                bytes,
                largest_bytes: bytes,
            }),
        }
        if let Some(row) = PacketRow::of(record) {
            let scsi = SCSI_INTERFACE.to_string();
            let is_scsi = self.header.as_ref().is_some_and(|h| h.interface_type == scsi);
            let request = if is_scsi { request(record) } else { None };
            self.packets.push(Packet { offset, bytes, request, ..Packet::of(&row) });
        } else if !record.last {
            self.records.push(Fields {
                record: name,
                offset,
                fields: record.fields.clone().flatten().map(|found| field(&found)).collect(),
            });
        }
    }
}

/// A field's name and value; of bytes, only how many.
fn field(found: &saved_state::schema::Found<'_>) -> (String, Json) {
    let name = found.field.map_or_else(|| format!("field {}", found.number), |f| f.name.to_owned());
    let value = match found.value {
        Value::Bool(value) => value.into(),
        Value::Uint32(value) => value.into(),
        Value::Uint64(value) => value.into(),
        Value::Enum { name, .. } => name.into(),
        Value::Bytes(bytes) => format!("{} bytes", bytes.len()).into(),
        Value::Text(text) => text.into(),
        Value::Guid(guid) => guid.to_string().into(),
    };
    (name, value)
}

impl Header {
    fn of(header: &StreamHeader) -> Self {
        let info = &header.info;
        Self {
            kind: info.stream.to_string(),
            format_version: header.format_version,
            oldest_reader: header.oldest_reader,
            producer: info.producer.to_string(),
            interface_type: info.interface_type.to_string(),
            interface_instance: info.interface_instance.to_string(),
            frozen: info.flags.contains(HeaderFlags::FROZEN),
            items: info.items,
        }
    }
}

impl Packet {
    fn of(row: &PacketRow<'_>) -> Self {
        Self {
            offset: 0,
            bytes: 0,
            incoming: row.incoming,
            order: row.order,
            transaction_id: row.transaction_id,
            condition: row.condition,
            message_bytes: row.message_bytes,
            external_bytes: row.external_bytes,
            own_state_bytes: row.own_state.len(),
            completion_bytes: row.completion_bytes,
            request: None,
        }
    }
}

/// What a guest's packet asks for, if it is one of the storage protocol.
fn request(record: &SeenRecord<'_>) -> Option<String> {
    if record.kind != INCOMING_PACKET {
        return None;
    }
    let packet = IncomingPacketRecord::decode(record.payload).ok()?;
    let (packet, _) = VstorPacket::parse(packet.payload).ok()?;
    if packet.operation != Operation::EXECUTE_SRB {
        return packet.operation.name().map(|name| name.to_lowercase().replace('_', " "));
    }
    let on = |verb: &str, lba: u64, blocks: u32| format!("{verb} {blocks} blocks at {lba}");
    Some(match packet.srb().command().ok()? {
        Command::Read(transfer) => on("read", transfer.extent.lba, transfer.extent.blocks),
        Command::Write(transfer) => on("write", transfer.extent.lba, transfer.extent.blocks),
        Command::WriteSame { extent, .. } => on("write same", extent.lba, extent.blocks),
        Command::Verify { extent, .. } => on("verify", extent.lba, extent.blocks),
        Command::SynchronizeCache { .. } => "synchronize cache".into(),
        Command::Unmap { .. } => "unmap".into(),
        Command::Inquiry { .. } => "inquiry".into(),
        Command::TestUnitReady => "test unit ready".into(),
        Command::ReportLuns { .. } => "report luns".into(),
        _ => format!("SCSI command {:#04x}", packet.srb().cdb().ok()?.first()?),
    })
}

#[cfg(test)]
mod tests;
