//! The streams of the services' saved state: first what each has agreed on with the guest, then their
//! channels.

use kmcl::{ChannelSave, ChannelSaveError, Guid, SaveOptions};
use saved_state::integration::KINDS;
use saved_state::writer::Step;
use saved_state::{HeaderFlags, Save, SaveStep, StreamInfo, StreamKind, StreamWriter, WriteError};

use super::STATE_INTERFACE;
use crate::protocol::Records;

/// One stream of the services' saved state, to be written.
#[derive(Debug)]
pub struct SavedStream {
    /// What it is, for people: the services' name, and the channel's.
    pub name: String,
    /// 0, or the channel's place in [`Service::ALL`](crate::Service::ALL).
    pub index: u32,
    /// What writes it.
    pub save: StreamSave,
}

/// What writes one stream of the services' saved state.
#[derive(Debug)]
pub enum StreamSave {
    /// The services, apart from their channels.
    Services(Box<ServicesSave>),
    /// One of their channels.
    Channel(ChannelSave),
}

/// Why a stream cannot be written.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamSaveError {
    /// That of the services.
    #[error(transparent)]
    Services(#[from] WriteError),
    /// A channel's.
    #[error(transparent)]
    Channel(#[from] ChannelSaveError),
}

impl Save for StreamSave {
    type Error = StreamSaveError;

    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, Self::Error> {
        Ok(match self {
            Self::Services(save) => save.step(buffer)?,
            Self::Channel(save) => save.step(buffer)?,
        })
    }
}

/// The state of the services apart from their channels, as it was when the save was made.
#[derive(Debug)]
pub struct ServicesSave {
    writer: StreamWriter,
    records: Records,
    /// Chunks written: the header, the services, the heartbeat, the shutdown, the end.
    next: usize,
}

impl ServicesSave {
    pub(super) fn new(records: Records, options: &SaveOptions) -> Result<Self, WriteError> {
        let requests = u32::from(records.shutdown.is_some());
        let services = u32::try_from(records.services.len()).unwrap_or(u32::MAX); // three
        let info = StreamInfo {
            stream: StreamKind::DEVICE,
            flags: HeaderFlags::default(),
            interface_type: STATE_INTERFACE,
            interface_instance: Guid::ZERO,
            producer: options.producer,
            chunks: services.saturating_add(requests).saturating_add(3),
            bytes: 0,
            items: requests,
        };
        let writer = StreamWriter::new(options.format, info, KINDS)?;
        Ok(Self { writer, records, next: 0 })
    }

    fn chunk(&mut self, room: &mut [u8]) -> Result<Step, WriteError> {
        let Self { writer, records, next } = self;
        let Some(at) = next.checked_sub(1) else { return writer.header(room) };
        if let Some(service) = records.services.get(at) {
            return writer.record(service, room);
        }
        match (at - records.services.len(), &records.shutdown) {
            (0, _) => writer.record(&records.heartbeat, room),
            (1, Some(shutdown)) => writer.record(shutdown, room),
            _ => writer.end(room),
        }
    }
}

impl Save for ServicesSave {
    type Error = WriteError;

    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, WriteError> {
        let mut written = 0;
        while !self.writer.is_ended() {
            match self.chunk(buffer.get_mut(written..).unwrap_or_default())? {
                Step::Written { bytes } => {
                    written += bytes;
                    self.next += 1;
                }
                Step::Needs { bytes: needed } => {
                    return Ok(SaveStep { written, needed, done: false });
                }
            }
        }
        Ok(SaveStep { written, needed: 0, done: true })
    }
}
