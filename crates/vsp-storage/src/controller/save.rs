//! The streams of a controller's saved state: first what it and its guest agreed on, and its disks; then
//! each of its channels.

use kmcl::{Channel, ChannelSave, ChannelSaveError, SaveOptions};
use saved_state::storage::{DiskIdentityRecord, InitStep, KINDS, StorageRecord};
use saved_state::writer::Step;
use saved_state::{HeaderFlags, Save, SaveStep, StreamInfo, StreamKind, StreamWriter, WriteError};

use super::handshake::Phase;
use super::{ControllerError, Core, lock};
use crate::disk::{DiskIdentity, FINGERPRINT_BYTES, MAX_TRANSFER_BYTES};
use crate::scsi::bus::{Lun, UNIT_ATTENTION};

/// One stream of a controller's saved state, to be written.
#[derive(Debug)]
pub struct SavedStream {
    /// What it is, for people: the controller's name, and the channel's.
    pub name: String,
    /// 0, or which subchannel it is.
    pub index: u32,
    /// What writes it.
    pub save: StreamSave,
}

/// What writes one stream of a controller's saved state.
#[derive(Debug)]
pub enum StreamSave {
    /// The controller, apart from its channels.
    Controller(Box<ControllerSave>),
    /// One of its channels.
    Channel(ChannelSave),
    /// One of its channels, with a mistake in it.
    #[cfg(feature = "faults")]
    Faulty {
        /// The stream.
        bytes: Vec<u8>,
        /// How much of it is written.
        written: usize,
    },
}

impl StreamSave {
    /// That of a channel.
    pub(super) fn of_channel(
        channel: &Channel,
        options: &SaveOptions,
    ) -> Result<Self, ControllerError> {
        #[cfg(feature = "faults")]
        if crate::faults::first_packet_stands() != 1 {
            let times = crate::faults::first_packet_stands();
            let mut bytes = Vec::new();
            let written = channel.save_with(options)?.write_to(&mut bytes);
            if let (Ok(_), Some(bytes)) =
                (written, crate::faults::repeat_first_packet(&bytes, times))
            {
                return Ok(Self::Faulty { bytes, written: 0 });
            }
        }
        Ok(Self::Channel(channel.save_with(options)?))
    }
}

/// Why a stream cannot be written.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamSaveError {
    /// The controller's.
    #[error(transparent)]
    Controller(#[from] WriteError),
    /// A channel's.
    #[error(transparent)]
    Channel(#[from] ChannelSaveError),
}

impl Save for StreamSave {
    type Error = StreamSaveError;

    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, Self::Error> {
        Ok(match self {
            Self::Controller(save) => save.step(buffer)?,
            Self::Channel(save) => save.step(buffer)?,
            #[cfg(feature = "faults")]
            Self::Faulty { bytes, written } => {
                let left = bytes.get(*written..).unwrap_or_default();
                let fitting = left.len().min(buffer.len());
                for (to, from) in buffer.iter_mut().zip(left) {
                    *to = *from;
                }
                *written += fitting;
                let needed = bytes.len() - *written;
                SaveStep { written: fitting, needed, done: needed == 0 }
            }
        })
    }
}

/// The state of a controller apart from its channels, as it was when the save was made.
#[derive(Debug)]
pub struct ControllerSave {
    writer: StreamWriter,
    controller: StorageRecord,
    disks: Vec<DiskIdentityRecord>,
    /// Chunks written; the header, the controller, the disks, the end.
    next: usize,
}

impl ControllerSave {
    pub(super) fn new(core: &Core, options: &SaveOptions) -> Result<Self, WriteError> {
        let table = core.luns.table();
        let disks: Vec<DiskIdentityRecord> = table.iter().map(|lun| disk_record(lun)).collect();
        let sub_channels = core.read_lanes().present.len().saturating_sub(1);
        let count = u32::try_from(disks.len()).unwrap_or(u32::MAX); // at most 4080 addresses
        let (step, protocol_version, max_sub_channels) = {
            let handshake = lock(&core.handshake);
            let (step, version) = match handshake.phase() {
                Phase::Closed => (InitStep::Idle, 0),
                Phase::Begun => (InitStep::Begun, 0),
                Phase::Agreed(version) => (InitStep::Version, version.0),
                Phase::Described(version) => (InitStep::Properties, version.0),
                Phase::Ready { version, .. } => (InitStep::Ready, version.0),
            };
            (step.into(), version.into(), handshake.max_sub_channels().into())
        };
        let controller = StorageRecord {
            step,
            protocol_version,
            max_sub_channels,
            sub_channels: u32::try_from(sub_channels).unwrap_or(u32::MAX), // at most 64
            max_transfer_bytes: MAX_TRANSFER_BYTES,
            disks: count,
            attachments: core.luns.attachments(),
        };
        let info = StreamInfo {
            stream: StreamKind::DEVICE,
            flags: HeaderFlags::default(),
            interface_type: vstor_wire::SCSI_INTERFACE,
            interface_instance: core.config.instance,
            producer: options.producer,
            chunks: count.saturating_add(3),
            bytes: 0,
            items: count,
        };
        let writer = StreamWriter::new(options.format, info, KINDS)?;
        Ok(Self { writer, controller, disks, next: 0 })
    }

    fn chunk(&mut self, room: &mut [u8]) -> Result<Step, WriteError> {
        match self.next.checked_sub(2) {
            None if self.next == 0 => self.writer.header(room),
            None => self.writer.record(&self.controller, room),
            Some(at) => match self.disks.get(at) {
                Some(disk) => self.writer.record(disk, room),
                None => self.writer.end(room),
            },
        }
    }
}

impl Save for ControllerSave {
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

fn disk_record(lun: &Lun) -> DiskIdentityRecord {
    let DiskIdentity { bytes, sector_bytes, physical_sector_bytes, serial, read_only, fingerprint } =
        lun.disk.identity();
    let unit_attentions = if lun.has_attention() {
        vec![UNIT_ATTENTION.asc, UNIT_ATTENTION.ascq]
    } else {
        Vec::new()
    };
    DiskIdentityRecord {
        path: lun.address.path.into(),
        target: lun.address.target.into(),
        lun: lun.address.lun.into(),
        size_bytes: bytes,
        sector_bytes,
        physical_sector_bytes,
        serial,
        fingerprinted_bytes: fingerprint.map_or(0, |_| bytes.min(FINGERPRINT_BYTES)),
        fingerprint: fingerprint.map_or_else(Vec::new, |it| it.as_bytes().to_vec()),
        read_only,
        unit_attentions,
        attachment: lun.attachment,
    }
}
