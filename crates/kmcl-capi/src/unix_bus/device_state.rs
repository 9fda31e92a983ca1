//! What a driver in C wants to know of its device after a restore: bytes of its own, as a stream.

use saved_state::kind::SINCE_V1;
use saved_state::reader::Kinds;
use saved_state::schema::{Field, Shape};
use saved_state::text::Producer;
use saved_state::{
    FormatVersion, HeaderFlags, KindInfo, ReadError, Record, RecordKind, Save, SaveStep, Step,
    StreamInfo, StreamKind, StreamReader, StreamWriter, WriteError, record,
};

/// Most bytes of it: what fits a chunk with room to spare.
pub(super) const MAX_DEVICE_STATE: usize = 1 << 20;

/// Bytes that only the driver understands.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct DeviceStateRecord {
    #[prost(bytes = "vec", tag = "1")]
    bytes: Vec<u8>,
}

impl Record for DeviceStateRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: RecordKind::FIRST_FOREIGN,
        name: "c.device",
        // So that tools for saved states can walk over it.
        mandatory: false,
        versions: SINCE_V1,
        fields: &[Field::new(1, "bytes", Shape::Bytes { most: MAX_DEVICE_STATE })],
        check: record::check::<Self>,
    };
}

const KINDS: Kinds = &[DeviceStateRecord::KIND];

/// The stream of one device's state, being written.
pub(super) struct DeviceStateSave {
    writer: StreamWriter,
    record: DeviceStateRecord,
}

impl DeviceStateSave {
    pub(super) fn new(
        format: FormatVersion,
        producer: Producer,
        bytes: &[u8],
    ) -> Result<Self, WriteError> {
        let info = StreamInfo {
            stream: StreamKind::DEVICE,
            flags: HeaderFlags::default(),
            interface_type: kmcl::Guid::ZERO,
            interface_instance: kmcl::Guid::ZERO,
            producer,
            chunks: 3, // header, record, end
            bytes: 0,
            items: 1,
        };
        let writer = StreamWriter::new(format, info, KINDS)?;
        Ok(Self { writer, record: DeviceStateRecord { bytes: bytes.to_vec() } })
    }
}

impl Save for DeviceStateSave {
    type Error = WriteError;

    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, WriteError> {
        let mut written = 0;
        while !self.writer.is_ended() {
            let room = buffer.get_mut(written..).unwrap_or_default();
            let step = match self.writer.chunks() {
                0 => self.writer.header(room)?,
                1 => self.writer.record(&self.record, room)?,
                _ => self.writer.end(room)?,
            };
            match step {
                Step::Written { bytes } => written += bytes,
                Step::Needs { bytes: needed } => {
                    return Ok(SaveStep { written, needed, done: false });
                }
            }
        }
        Ok(SaveStep { written, needed: 0, done: true })
    }
}

/// The bytes that a whole stream has.
pub(super) fn read(stream: &[u8]) -> Result<Vec<u8>, ReadError> {
    let mut reader = StreamReader::new(StreamKind::DEVICE, KINDS);
    let mut rest = stream;
    let mut bytes = Vec::new();
    while let Some(chunk) = reader.read(&mut rest)? {
        if chunk.kind() == RecordKind::FIRST_FOREIGN {
            bytes = chunk.decode::<DeviceStateRecord>()?.bytes;
        }
    }
    reader.finish()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_damage_is_noticed() {
        for len in [0, 1, 5000, MAX_DEVICE_STATE] {
            let bytes: Vec<u8> = (0..len).map(|at| (at % 251).try_into().unwrap()).collect();
            let mut stream = Vec::new();
            DeviceStateSave::new(FormatVersion::NEWEST, Producer::EMPTY, &bytes)
                .unwrap()
                .write_to(&mut stream)
                .unwrap();
            assert_eq!(read(&stream).unwrap(), bytes);
            let middle = stream.len() / 2;
            stream[middle] ^= 1;
            assert!(read(&stream).is_err(), "{len}");
            assert!(read(&stream[..middle]).is_err(), "{len}");
        }
    }
}
