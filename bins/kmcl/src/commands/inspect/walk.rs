//! From bytes to what is in them: streams, records, packets, damage. Everything that is undamaged is
//! found, whatever comes before it or after it.

use saved_state::channel::{Fence, IncomingPacketRecord, OutgoingPacketRecord, Place};
use saved_state::file::check;
use saved_state::inspect::{ALL_KINDS, Piece, SeenRecord, What, inspect};
use saved_state::{Decode, HeaderFlags, ReadError, Record, StreamHeader, StreamKind, Value};
use serde::Serialize;
use serde_json::Value as Json;
use vsc_storage::wire::SCSI_INTERFACE;
use vsc_storage::wire::packet::{Operation, VstorPacket};
use vsc_storage::wire::scsi::cdb::Command;

/// The first bytes of every stream.
const MAGIC: &[u8] = &saved_state::header::MAGIC;

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
    /// `never_started`, `cancelled`, `finished`; for outgoing ones `queued`, `in_ring`.
    pub(super) condition: &'static str,
    pub(super) payload_bytes: usize,
    /// Of the description of external data, not of the data.
    pub(super) extension_bytes: usize,
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
        let mut at = 0;
        loop {
            at += state.read_stream(bytes.get(at..).unwrap_or_default(), at as u64);
            if at >= bytes.len() {
                break;
            }
        }
        state.name_streams();
        if state.damage.is_empty() {
            state.damage.extend(state.compare_streams(bytes));
        }
        state
    }

    /// Compares the streams with the file's list of them and with each other, where each by itself is
    /// undamaged and there is a list.
    fn compare_streams(&self, bytes: &[u8]) -> Option<Damage> {
        let kind = |stream: &Stream| stream.header.as_ref().map(|header| header.kind.clone());
        if self.streams.first().and_then(kind) != Some(StreamKind::CONTENTS.to_string()) {
            return None;
        }
        let error = check(bytes, ALL_KINDS).err()?;
        Some(Damage { stream: 0, offset: 0, bytes: 0, what: error.to_string() })
    }

    /// Whether this is no saved state at all.
    pub(super) fn is_foreign(&self) -> bool {
        self.streams.iter().all(|stream| stream.header.is_none() && stream.chunks == 0)
    }

    pub(super) fn chunks(&self) -> u64 {
        self.streams.iter().map(|stream| stream.chunks).sum()
    }

    /// Walks through the stream at the start of `rest`, which is at `base` in the file, and returns
    /// how many bytes it takes.
    fn read_stream(&mut self, rest: &[u8], base: u64) -> usize {
        let mut stream = Stream { offset: base, ..Stream::default() };
        let mut end = rest.len();
        let (mut header_is_damaged, mut before_is_damaged) = (false, false);
        for mut piece in inspect(rest, ALL_KINDS) {
            if follows(&piece, header_is_damaged, before_is_damaged) {
                piece.damage = None;
            }
            before_is_damaged = piece.damage.is_some();
            header_is_damaged |= before_is_damaged && matches!(piece.what, What::Header(_));
            let mut length = piece.length;
            let after = usize::try_from(piece.offset + length).unwrap_or(rest.len());
            let mut over = None;
            if let Some(damage) = &piece.damage {
                if let What::Stray = piece.what {
                    // Where the end of a stream is damaged, the next one is found by its header.
                    let from = usize::try_from(piece.offset).unwrap_or(rest.len());
                    over = next_stream(rest.get(from..after).unwrap_or_default(), rest, from);
                    length = over.map_or(length, |over| over as u64 - piece.offset);
                }
                self.damage.push(Damage {
                    stream: self.streams.len(),
                    offset: base + piece.offset,
                    bytes: length,
                    what: text_of(damage),
                });
            }
            if stream.add(&piece, base) {
                over = Some(after);
            }
            if let Some(over) = over {
                end = over;
                break;
            }
        }
        stream.bytes = end as u64;
        self.streams.push(stream);
        end.max(1)
    }

    /// Gives each stream the name that the list at the start of the file has for it.
    fn name_streams(&mut self) {
        let Some((list, others)) = self.streams.split_first_mut() else { return };
        let entries = list.records.iter().filter(|record| record.record == "file.stream");
        for (stream, entry) in others.iter_mut().zip(entries) {
            let name = entry.fields.iter().find(|(name, _)| name == "name");
            stream.name = name.and_then(|(_, name)| name.as_str()).map(str::to_owned);
        }
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

/// Where in `rest` the next stream begins, looked for in `stray`, which is at `from` in it.
fn next_stream(stray: &[u8], rest: &[u8], from: usize) -> Option<usize> {
    let places = stray.windows(MAGIC.len()).enumerate().skip(1);
    let mut headers = places.filter(|(_, bytes)| *bytes == MAGIC).map(|(at, _)| from + at);
    headers.find(|at| StreamHeader::read(rest.get(*at..).unwrap_or_default()).is_ok())
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
    /// Adds a piece of the stream; says whether it was the last one.
    fn add(&mut self, piece: &Piece<'_>, base: u64) -> bool {
        match &piece.what {
            What::Header(Some(header)) => {
                self.chunks += 1;
                self.header = Some(Header::of(header));
                false
            }
            What::Record(record) if piece.damage.is_none() => {
                self.chunks += 1;
                self.add_record(record, piece, base);
                record.last
            }
            _ => false,
        }
    }

    fn add_record(&mut self, record: &SeenRecord<'_>, piece: &Piece<'_>, base: u64) {
        let name = record.name.clone().unwrap_or_else(|| format!("kind {}", record.kind));
        let (offset, bytes) = (base + piece.offset, piece.length);
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
        match packet(record) {
            Some((packet, payload)) => {
                let scsi = SCSI_INTERFACE.to_string();
                let is_scsi = self.header.as_ref().is_some_and(|h| h.interface_type == scsi);
                let request = if is_scsi { request(payload) } else { None };
                self.packets.push(Packet { offset, bytes, request, ..packet });
            }
            None if record.last => {}
            None => self.records.push(Fields {
                record: name,
                offset,
                fields: record.fields.clone().flatten().map(|found| field(&found)).collect(),
            }),
        }
    }
}

/// The packet in a record, and its message, if it is one.
fn packet<'a>(record: &SeenRecord<'a>) -> Option<(Packet, &'a [u8])> {
    if !record.known {
        return None;
    }
    if record.kind == IncomingPacketRecord::KIND.kind {
        let packet = IncomingPacketRecord::decode(record.payload).ok()?;
        return Some((Packet::incoming(&packet), packet.payload));
    }
    if record.kind == OutgoingPacketRecord::KIND.kind {
        let packet = OutgoingPacketRecord::decode(record.payload).ok()?;
        return Some(Packet::outgoing(&packet));
    }
    None
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
    fn incoming(record: &IncomingPacketRecord<'_>) -> Self {
        let (condition, completion) = match record.fence {
            Fence::NeverStarted => ("never_started", &[][..]),
            Fence::Cancelled => ("cancelled", &[][..]),
            Fence::Finished { completion } => ("finished", completion),
        };
        Self {
            offset: 0,
            bytes: 0,
            incoming: true,
            order: record.order,
            transaction_id: Some(record.transaction_id),
            condition,
            payload_bytes: record.payload.len(),
            extension_bytes: record.extension.len(),
            own_state_bytes: record.device_state.len(),
            completion_bytes: completion.len(),
            request: None,
        }
    }

    fn outgoing<'a>(record: &OutgoingPacketRecord<'a>) -> (Self, &'a [u8]) {
        let (condition, transaction_id, message) = match record.place {
            Place::Queued { message, .. } => ("queued", None, message),
            Place::InRing { transaction_id } => ("in_ring", Some(transaction_id), &[][..]),
        };
        let packet = Self {
            offset: 0,
            bytes: 0,
            incoming: false,
            order: record.order,
            transaction_id,
            condition,
            payload_bytes: message.len(),
            extension_bytes: record.extension.len(),
            own_state_bytes: record.driver_state.len(),
            completion_bytes: 0,
            request: None,
        };
        (packet, message)
    }
}

/// What a packet asks for, if it is one of the storage protocol.
fn request(payload: &[u8]) -> Option<String> {
    let (packet, _) = VstorPacket::parse(payload).ok()?;
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
