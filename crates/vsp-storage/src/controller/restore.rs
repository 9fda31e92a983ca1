//! A controller out of a saved state.
//!
//! ```text
//!   restoring(state) ──► attach each disk ──► enable ──► restore each channel ──► start
//!      │                    │ another disk       │ offers are taken over, rings     │ goes on
//!      └ refused            └ refused            └ come back when the bus is there  └ where it was
//! ```
//!
//! A saved state is not trusted: every number is checked against what this controller can be, and what
//! is wrong is told by chunk, record and field. Requests are checked when they come again.

use std::fmt;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kmcl::bus::Bus;
use kmcl::{Channel, ChannelRestore, RestoreError, RestoreFromError, Restored};
use saved_state::input::{ChunkInput, InputError};
use saved_state::storage::{DISK_IDENTITY, DiskIdentityRecord, InitStep, KINDS, StorageRecord};
use saved_state::{Chunk, ReadError, Record, StreamKind, StreamReader};
use vstor_wire::protocol::ProtocolVersion;
use vstor_wire::srb::ScsiAddress;

use super::handshake::{Handshake, Phase};
use super::{ControllerConfig, ControllerError, Core, MAX_SUB_CHANNELS, ScsiController, lock};
use crate::disk::{
    Disk, DiskDifference, DiskIdentity, FINGERPRINT_BYTES, Fingerprint, MAX_TRANSFER_BYTES,
};
use crate::driver::Driver;
use crate::scsi::bus::{MAX_LUNS, MAX_PATHS, MAX_TARGETS, UNIT_ATTENTION};

/// Most disks of a controller.
const MAX_DISKS: u32 = MAX_PATHS as u32 * MAX_TARGETS as u32 * MAX_LUNS as u32;

/// Why a controller was not restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControllerRestoreError {
    /// The bytes are not a controller's saved state, or damaged, or another controller's.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The bytes cannot be had.
    #[error(transparent)]
    Input(#[from] InputError),
    /// A number that this controller cannot have.
    #[error("chunk {chunk}: {record}: {field} is {found:#x}, possible are {least:#x} to {most:#x}")]
    Value {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// Its record.
        record: &'static str,
        /// The field.
        field: &'static str,
        /// What is there.
        found: u64,
        /// Least that may be.
        least: u64,
        /// Most that may be.
        most: u64,
    },
    /// The protocol version was never agreed on by this controller.
    #[error("chunk {chunk}: {record}: protocol version {found:#06x} is not known here")]
    Version {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// Its record.
        record: &'static str,
        /// What is there.
        found: u32,
    },
    /// A disk comes before the controller, or that comes twice.
    #[error("chunk {chunk}: {record} out of order")]
    Order {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// Its record.
        record: &'static str,
    },
    /// Two disks at one address, or one attachment twice.
    #[error("chunk {chunk}: {record}: {field} is there twice, at {address}")]
    Twice {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// Its record.
        record: &'static str,
        /// What is there twice.
        field: &'static str,
        /// Where.
        address: ScsiAddress,
    },
    /// The controller cannot be made.
    #[error(transparent)]
    Controller(#[from] ControllerError),
}

/// Why a disk was not attached to a controller that is being restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// There was none at that address.
    #[error("no disk was saved at LUN {address}")]
    NotSaved {
        /// Where it was to be.
        address: ScsiAddress,
    },
    /// It is another disk.
    #[error("the disk for LUN {address} is not the one that was saved: {}", lines(.differences))]
    Differs {
        /// Where it was to be.
        address: ScsiAddress,
        /// In what it differs; each says a line.
        differences: Vec<DiskDifference>,
    },
    /// The controller refuses.
    #[error(transparent)]
    Controller(#[from] ControllerError),
}

fn lines(differences: &[DiskDifference]) -> String {
    differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Why the channels were not offered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnableError {
    /// Disks are missing.
    #[error("{} disks that were saved are not attached, the first at LUN {first}", .missing.len())]
    DisksMissing {
        /// Where the first one was.
        first: ScsiAddress,
        /// Where they were.
        missing: Vec<ScsiAddress>,
    },
    /// The library or the bus refuses.
    #[error(transparent)]
    Controller(#[from] ControllerError),
}

/// Why a channel was not restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreChannelError {
    /// There are fewer.
    #[error("channel {index} of a controller with {channels}")]
    NoSuchChannel {
        /// Which one was asked for.
        index: u32,
        /// How many there are.
        channels: u32,
    },
    /// It is restored already.
    #[error("channel {index} is restored already")]
    Twice {
        /// Which one was asked for.
        index: u32,
    },
    /// The library refuses.
    #[error("channel {index}: {why}")]
    Channel {
        /// Which one.
        index: u32,
        /// Why.
        #[source]
        why: RestoreFromError,
    },
}

/// Why a controller was not started.
#[derive(Debug, thiserror::Error)]
#[error("channel {index} was not restored")]
pub struct StartError {
    /// The first channel that was not restored.
    pub index: u32,
    /// The controller, to be restored further.
    pub controller: RestoringController,
}

/// A disk as it was saved.
#[derive(Clone, Debug)]
pub struct SavedDisk {
    /// Where the guest knows it.
    pub address: ScsiAddress,
    /// What it is known by.
    pub identity: DiskIdentity,
    attachment: u64,
    has_attention: bool,
    is_attached: bool,
}

impl SavedDisk {
    /// Whether the controller has it again.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.is_attached
    }
}

/// A controller that is being restored: see [`ScsiController::restoring`].
///
/// Dropping it gives the restore up; what the bus has taken over of it is withdrawn.
pub struct RestoringController {
    controller: ScsiController,
    disks: Vec<SavedDisk>,
    /// By index: the channel is restored.
    restored: Vec<bool>,
}

impl ScsiController {
    /// A controller that goes on where `state`, the first of the streams that were saved of it, says. It
    /// has the channels that it had. Next, [attach](RestoringController::attach) its disks.
    ///
    /// Of `config`, the instance must be that of the saved controller. How many subchannels the guest may
    /// ask for is what it was told.
    ///
    /// # Errors
    /// [`ControllerRestoreError`].
    pub fn restoring(
        bus: Arc<dyn Bus>,
        driver: Arc<dyn Driver>,
        config: ControllerConfig,
        state: impl Read,
    ) -> Result<RestoringController, ControllerRestoreError> {
        let saved = Saved::read(state, &config)?;
        let core = Core::new(bus, driver, config);
        *lock(&core.handshake) = Handshake::at(saved.phase, saved.max_sub_channels);
        core.set_form(match saved.phase {
            Phase::Ready { version, .. } => Some(version),
            _ => None,
        });
        core.luns.attachments.store(saved.attachments, Ordering::Relaxed);
        let controller = Self { core };
        for index in 0..=saved.sub_channels {
            controller.core.add_lane(index)?;
        }
        for (_, lane) in controller.core.read_lanes().iter() {
            lane.is_resuming.store(true, Ordering::Relaxed);
        }
        let restored = vec![false; usize::from(saved.sub_channels) + 1];
        Ok(RestoringController { controller, disks: saved.disks, restored })
    }
}

impl RestoringController {
    /// The disks that were saved, by address.
    #[must_use]
    pub fn disks(&self) -> &[SavedDisk] {
        &self.disks
    }

    /// Channels, the primary one included.
    #[must_use]
    pub fn channels(&self) -> u32 {
        u32::try_from(self.restored.len()).unwrap_or(u32::MAX) // at most 65
    }

    /// Channel `index`, to look at.
    #[must_use]
    pub fn channel(&self, index: u32) -> Option<Channel> {
        self.controller.core.channel(u16::try_from(index).ok()?)
    }

    /// Puts `disk` where one was saved, if it is that one.
    ///
    /// # Errors
    /// [`AttachError`]; nothing has changed.
    pub fn attach(&mut self, address: ScsiAddress, disk: Arc<Disk>) -> Result<(), AttachError> {
        let saved = self.disks.iter_mut().find(|saved| saved.address == address);
        let saved = saved.ok_or(AttachError::NotSaved { address })?;
        // Whoever had it last may have written to it since it was opened here.
        disk.forget_header();
        let differences = saved.identity.differences(&disk.identity());
        if !differences.is_empty() {
            return Err(AttachError::Differs { address, differences });
        }
        self.controller.core.attach_as(address, disk, saved.attachment)?;
        saved.is_attached = true;
        Ok(())
    }

    /// Offers the channels, all of them: a bus that was restored takes them for those that it had. Next,
    /// restore each channel, before or after the bus has brought their rings.
    ///
    /// # Errors
    /// [`EnableError::DisksMissing`]; [`EnableError::Controller`], also if they are offered already.
    pub fn enable(&self) -> Result<(), EnableError> {
        let absent = self.disks.iter().filter(|disk| !disk.is_attached);
        let missing: Vec<ScsiAddress> = absent.map(|disk| disk.address).collect();
        if let Some(&first) = missing.first() {
            return Err(EnableError::DisksMissing { first, missing });
        }
        for index in 0..self.channels() {
            if let Some(channel) = self.channel(index) {
                channel.enable().map_err(ControllerError::from)?;
            }
        }
        Ok(())
    }

    /// Restores channel `index` from all of its stream.
    ///
    /// # Errors
    /// [`RestoreChannelError`]; the channel is as before.
    pub fn restore_channel(
        &mut self,
        index: u32,
        state: impl Read,
    ) -> Result<(), RestoreChannelError> {
        let channel = self.begin(index)?;
        let refused = |why| RestoreChannelError::Channel { index, why };
        channel.restore_from(state).map_err(refused)?;
        self.note_restored(index);
        Ok(())
    }

    /// Begins to restore channel `index` chunk by chunk. When [`ChannelRestore::feed`] has answered that
    /// it is complete, [`Self::finish_channel`] takes it.
    ///
    /// # Errors
    /// [`RestoreChannelError`].
    pub fn begin_channel(&self, index: u32) -> Result<ChannelRestore, RestoreChannelError> {
        let channel = self.begin(index)?;
        let refused = |why: RestoreError| RestoreChannelError::Channel { index, why: why.into() };
        channel.restore().map_err(refused)
    }

    /// Takes note that channel `index` is restored, because `last` says so.
    pub fn finish_channel(&mut self, index: u32, last: Restored) {
        if last == Restored::Complete {
            self.note_restored(index);
        }
    }

    fn begin(&self, index: u32) -> Result<Channel, RestoreChannelError> {
        let channels = self.channels();
        let none = RestoreChannelError::NoSuchChannel { index, channels };
        let Some(&is_restored) = self.restored.get(index as usize) else { return Err(none) };
        if is_restored {
            return Err(RestoreChannelError::Twice { index });
        }
        self.channel(index).ok_or(none)
    }

    fn note_restored(&mut self, index: u32) {
        if let Some(restored) = self.restored.get_mut(index as usize) {
            *restored = true;
        }
    }

    /// Lets the controller go on: requests that were in flight come first.
    ///
    /// # Errors
    /// [`StartError`], which has the controller, if a channel was not restored.
    pub fn start(self) -> Result<ScsiController, StartError> {
        if let Some(at) = self.restored.iter().position(|&is_restored| !is_restored) {
            let index = u32::try_from(at).unwrap_or(u32::MAX);
            return Err(StartError { index, controller: self });
        }
        let Self { controller, disks, .. } = self;
        let core = &controller.core;
        let table = core.luns.table();
        for disk in &disks {
            if let Some(lun) = table.get(disk.address) {
                lun.set_attention(disk.has_attention);
            }
        }
        let channels: Vec<Channel> =
            core.read_lanes().iter().map(|(channel, _)| channel.clone()).collect();
        channels.iter().for_each(Channel::start);
        Ok(controller)
    }
}

impl fmt::Debug for RestoringController {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RestoringController")
            .field("disks", &self.disks)
            .field("restored", &self.restored)
            .finish_non_exhaustive()
    }
}

/// What a controller's stream says, checked.
struct Saved {
    phase: Phase,
    max_sub_channels: u16,
    sub_channels: u16,
    attachments: u64,
    disks: Vec<SavedDisk>,
}

impl Saved {
    fn read(state: impl Read, config: &ControllerConfig) -> Result<Self, ControllerRestoreError> {
        let reader = StreamReader::new(StreamKind::DEVICE, KINDS);
        let mut reader = reader.of_interface(vstor_wire::SCSI_INTERFACE, config.instance);
        let mut input = ChunkInput::new(state);
        let mut saved: Option<(Self, u32)> = None;
        let mut last = 0;
        while let Some(mut bytes) = input.next()? {
            while let Some(chunk) = reader.read(&mut bytes)? {
                last = chunk.sequence();
                let order =
                    ControllerRestoreError::Order { chunk: last, record: chunk.info().name };
                saved = Some(match saved {
                    Some((mut saved, disks)) if chunk.kind() == DISK_IDENTITY => {
                        saved.add_disk(&chunk, disks)?;
                        (saved, disks)
                    }
                    None if chunk.kind() != DISK_IDENTITY => Self::of_controller(&chunk)?,
                    _ => return Err(order),
                });
            }
        }
        reader.finish()?;
        let order = ControllerRestoreError::Order { chunk: last, record: StorageRecord::KIND.name };
        let (mut saved, disks) = saved.ok_or(order)?;
        let found = saved.disks.len() as u64;
        if found != u64::from(disks) {
            let (chunk, record) = (last, StorageRecord::KIND.name);
            let (field, disks) = ("disks", u64::from(disks));
            return Err(ControllerRestoreError::Value {
                chunk,
                record,
                field,
                found: disks,
                least: found,
                most: found,
            });
        }
        saved.disks.sort_by_key(|disk| disk.address);
        Ok(saved)
    }

    fn of_controller(chunk: &Chunk<'_>) -> Result<(Self, u32), ControllerRestoreError> {
        let record: StorageRecord = chunk.decode()?;
        let within = |field, found: u64, least, most| within(chunk, field, found, least, most);
        let version = || {
            let found = record.protocol_version;
            let version = u16::try_from(found).ok().map(ProtocolVersion);
            version.filter(|version| version.is_known()).ok_or(ControllerRestoreError::Version {
                chunk: chunk.sequence(),
                record: chunk.info().name,
                found,
            })
        };
        let has_sub_channels = record.sub_channels > 0;
        let phase = match InitStep::try_from(record.step).unwrap_or(InitStep::Unspecified) {
            InitStep::Begun => Phase::Begun,
            InitStep::Version => Phase::Agreed(version()?),
            InitStep::Properties => Phase::Described(version()?),
            InitStep::Ready => Phase::Ready { version: version()?, has_sub_channels },
            // The record's check has refused the first.
            InitStep::Unspecified | InitStep::Idle => Phase::Closed,
        };
        let most = MAX_SUB_CHANNELS.into();
        let max_sub_channels = within("max_sub_channels", record.max_sub_channels.into(), 0, most)?;
        // None before they can be asked for.
        let most = match phase {
            Phase::Ready { version, .. } if version.has_sub_channels() => max_sub_channels.into(),
            _ => 0,
        };
        let sub_channels = within("sub_channels", record.sub_channels.into(), 0, most)?;
        let transfer = u64::from(record.max_transfer_bytes);
        within("max_transfer_bytes", transfer, 0, MAX_TRANSFER_BYTES.into())?;
        within("disks", record.disks.into(), 0, MAX_DISKS.into())?;
        let attachments = record.attachments;
        let saved = Self { phase, max_sub_channels, sub_channels, attachments, disks: Vec::new() };
        Ok((saved, record.disks))
    }

    fn add_disk(&mut self, chunk: &Chunk<'_>, disks: u32) -> Result<(), ControllerRestoreError> {
        let record: DiskIdentityRecord = chunk.decode()?;
        let within = |field, found: u64, least, most| within(chunk, field, found, least, most);
        let byte = |field, found: u32, most: u64| {
            within(field, found.into(), 0, most - 1).map(|found| found.to_le_bytes()[0])
        };
        let address = ScsiAddress::new(
            byte("path", record.path, MAX_PATHS.into())?,
            byte("target", record.target, MAX_TARGETS.into())?,
            byte("lun", record.lun, MAX_LUNS.into())?,
        );
        let there = self.disks.len() as u64 + 1;
        within("disks", there, 0, disks.into())?;
        within("attachment", record.attachment, 1, self.attachments)?;
        for (field, is_there) in [
            ("address", self.disks.iter().any(|disk| disk.address == address)),
            ("attachment", self.disks.iter().any(|disk| disk.attachment == record.attachment)),
        ] {
            if is_there {
                let (chunk, record) = (chunk.sequence(), chunk.info().name);
                return Err(ControllerRestoreError::Twice { chunk, record, field, address });
            }
        }
        let fingerprint = match *record.fingerprint.as_slice() {
            [] => None,
            ref bytes => {
                let found = bytes.len() as u64;
                let whole = FINGERPRINT_BYTES.min(record.size_bytes);
                within("fingerprinted_bytes", record.fingerprinted_bytes, whole, whole)?;
                within("fingerprint", found, 16, 16)?;
                <[u8; 16]>::try_from(bytes).ok().map(Fingerprint)
            }
        };
        let attention = [UNIT_ATTENTION.asc, UNIT_ATTENTION.ascq];
        let has_attention = match *record.unit_attentions.as_slice() {
            [] => false,
            ref bytes if bytes == attention => true,
            ref bytes => {
                let code = |bytes: &[u8]| bytes.iter().fold(0, |n, &byte| n << 8 | u64::from(byte));
                let (found, known) = (code(bytes.get(..2).unwrap_or(bytes)), code(&attention));
                within("unit_attentions", found, known, known)?;
                // More than one, or the same one twice.
                within("unit_attentions", bytes.len() as u64, 2, 2)?;
                true
            }
        };
        let identity = DiskIdentity {
            bytes: record.size_bytes,
            sector_bytes: record.sector_bytes,
            physical_sector_bytes: record.physical_sector_bytes,
            serial: record.serial,
            read_only: record.read_only,
            fingerprint,
        };
        let attachment = record.attachment;
        let disk = SavedDisk { address, identity, attachment, has_attention, is_attached: false };
        self.disks.push(disk);
        Ok(())
    }
}

/// The number in a field, if it is one that may be there and fits 16 bits or is only looked at.
fn within(
    chunk: &Chunk<'_>,
    field: &'static str,
    found: u64,
    least: u64,
    most: u64,
) -> Result<u16, ControllerRestoreError> {
    if (least..=most).contains(&found) {
        return Ok(u16::try_from(found).unwrap_or(u16::MAX));
    }
    let (chunk, record) = (chunk.sequence(), chunk.info().name);
    Err(ControllerRestoreError::Value { chunk, record, field, found, least, most })
}
