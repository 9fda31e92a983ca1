//! A connection as a saved state: `docs/saved-state.md`, records `transport.…`.

use std::collections::BTreeSet;

use rustix::io::Errno;
use saved_state::text::Producer;
use saved_state::transport::{
    DOORBELL_BYTES, KINDS, MAX_REGIONS, TransportRecord, TransportRegionRecord,
};
use saved_state::{
    FormatVersion, HeaderFlags, ReadError, Save, SaveStep, Step, StreamInfo, StreamKind,
    StreamReader, StreamWriter, WriteError,
};
use vmbus_wire::PAGE_SIZE;
use vmbus_wire::guid::Guid;

use super::Peer;
use crate::frame::MAX_HELLO_REGIONS;
use crate::resume::{Progress, RegionIdentity, SavedGuest};

const _: () = assert!(MAX_REGIONS == MAX_HELLO_REGIONS);

/// The state of a transport on its way into the caller's buffers. Small: a few hundred bytes, and
/// forty for each region of the guest's memory.
#[derive(Debug)]
pub struct TransportSave {
    writer: StreamWriter,
    record: TransportRecord,
    regions: Vec<TransportRegionRecord>,
}

/// Why a transport cannot be saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportSaveError {
    /// The guest has not asked for it, and would not come back.
    #[error("the guest, process {}, does not outlive this host", peer.pid)]
    GuestCannotResume {
        /// Who.
        peer: Peer,
    },
    /// The guest's memory cannot be told from other memory.
    #[error("the guest's memory cannot be identified: {0}")]
    Memory(std::io::Error),
    /// The stream cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl TransportSave {
    /// `None` where there is no guest.
    pub(super) fn new(
        guest: Option<&SavedGuest>,
        version: FormatVersion,
        producer: Producer,
    ) -> Result<Self, WriteError> {
        let (record, regions) = guest.map(to_records).unwrap_or_default();
        let items = u32::try_from(regions.len()).unwrap_or(u32::MAX); // at most 64
        let info = StreamInfo {
            stream: StreamKind::TRANSPORT,
            flags: HeaderFlags::default(),
            interface_type: Guid::ZERO,
            interface_instance: Guid::ZERO,
            producer,
            chunks: items.saturating_add(3), // header, connection, end
            bytes: 0,
            items,
        };
        Ok(Self { writer: StreamWriter::new(version, info, KINDS)?, record, regions })
    }

    /// The next chunk.
    fn chunk(&mut self, room: &mut [u8]) -> Result<Step, WriteError> {
        let chunks = self.writer.chunks();
        let region = chunks.checked_sub(2).and_then(|region| usize::try_from(region).ok());
        match (chunks, region.and_then(|region| self.regions.get(region))) {
            (0, _) => self.writer.header(room),
            (1, _) => self.writer.record(&self.record, room),
            (_, Some(region)) => self.writer.record(region, room),
            (_, None) => self.writer.end(room),
        }
    }
}

impl Save for TransportSave {
    type Error = WriteError;

    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, WriteError> {
        let mut written = 0;
        let mut needed = 0;
        while !self.writer.is_ended() {
            match self.chunk(buffer.get_mut(written..).unwrap_or_default())? {
                Step::Written { bytes } => written += bytes,
                Step::Needs { bytes } => {
                    needed = bytes;
                    break;
                }
            }
        }
        Ok(SaveStep { written, needed, done: self.writer.is_ended() })
    }
}

fn to_records(guest: &SavedGuest) -> (TransportRecord, Vec<TransportRegionRecord>) {
    let SavedGuest { connection_id, epoch, progress, doorbells, regions } = guest;
    let Progress { posts, post_status, messages } = *progress;
    let last = doorbells.last().map_or(0, |flag| usize::from(flag / 8) + 1);
    let mut bits = vec![0u8; last];
    for flag in doorbells {
        if let Some(byte) = bits.get_mut(usize::from(flag / 8)) {
            *byte |= 1 << (flag % 8);
        }
    }
    let regions: Vec<_> = regions
        .iter()
        .map(|region| {
            let RegionIdentity { gpa, len, file_offset, device, inode } = *region;
            TransportRegionRecord { gpa, len, file_offset, device, inode }
        })
        .collect();
    let record = TransportRecord {
        guest: true,
        connection_id: connection_id.to_bytes().to_vec(),
        epoch: *epoch,
        posts,
        post_status: u32::from(post_status),
        messages,
        doorbells: bits,
        regions: u32::try_from(regions.len()).unwrap_or(u32::MAX), // at most 64
    };
    (record, regions)
}

/// Why bytes are not the saved state of a transport.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TransportReadError {
    /// They are no stream, another one, or damaged.
    #[error(transparent)]
    Stream(#[from] ReadError),
    /// The record of the connection is missing, or not the first.
    #[error("no record of a connection")]
    NoConnection,
    /// A second one.
    #[error("a second record of a connection")]
    SecondConnection,
    /// Something is said of a guest that is not there.
    #[error("no guest, and yet {field}")]
    NoGuest {
        /// What is said.
        field: &'static str,
    },
    /// A guest without its name.
    #[error("a connection without a name")]
    NoName,
    /// A status that no hypercall has.
    #[error("post status {status:#x} does not fit 16 bits")]
    Status {
        /// The number.
        status: u32,
    },
    /// Event flag 0 is not a channel's.
    #[error("a doorbell of event flag 0")]
    FlagZero,
    /// Not as many regions as were announced, or as there can be.
    #[error("{found} regions, {announced} announced, 1 to {MAX_REGIONS} can be")]
    Regions {
        /// How many came; one more than can be, where more came.
        found: usize,
        /// How many were announced.
        announced: u32,
    },
    /// A region that no memory has.
    #[error(
        "region {index} of {len:#x} bytes at {gpa:#x}: not whole pages, or beyond all addresses"
    )]
    Region {
        /// Which, counted from 0.
        index: usize,
        /// Its address.
        gpa: u64,
        /// Its length.
        len: u64,
    },
    /// Regions that overlap, or are out of order.
    #[error("region {index} at {gpa:#x} begins before the end of the one before it")]
    RegionOrder {
        /// Which, counted from 0.
        index: usize,
        /// Its address.
        gpa: u64,
    },
}

/// Reads the whole state of a transport: `None` where there was no guest.
pub(super) fn read(mut stream: &[u8]) -> Result<Option<SavedGuest>, TransportReadError> {
    let mut reader = StreamReader::new(StreamKind::TRANSPORT, KINDS);
    let mut connection: Option<TransportRecord> = None;
    let mut regions = Vec::new();
    while let Some(chunk) = reader.read(&mut stream)? {
        match &connection {
            None if chunk.kind() == saved_state::transport::TRANSPORT => {
                connection = Some(chunk.decode()?);
            }
            None => return Err(TransportReadError::NoConnection),
            Some(_) if chunk.kind() == saved_state::transport::TRANSPORT => {
                return Err(TransportReadError::SecondConnection);
            }
            Some(record) => {
                regions.push(chunk.decode::<TransportRegionRecord>()?);
                if regions.len() > MAX_REGIONS {
                    let (found, announced) = (regions.len(), record.regions);
                    return Err(TransportReadError::Regions { found, announced });
                }
            }
        }
    }
    reader.finish()?;
    from_records(connection.ok_or(TransportReadError::NoConnection)?, &regions)
}

fn from_records(
    record: TransportRecord,
    regions: &[TransportRegionRecord],
) -> Result<Option<SavedGuest>, TransportReadError> {
    let TransportRecord {
        guest,
        connection_id,
        epoch,
        posts,
        post_status,
        messages,
        doorbells,
        regions: announced,
    } = record;
    let found = regions.len();
    if usize::try_from(announced) != Ok(found) {
        return Err(TransportReadError::Regions { found, announced });
    }
    if !guest {
        let table = [
            ("a name", !connection_id.is_empty()),
            ("an epoch", epoch != 0),
            ("posts", posts != 0),
            ("a post status", post_status != 0),
            ("messages", messages != 0),
            ("doorbells", !doorbells.is_empty()),
            ("regions", found != 0),
        ];
        return match table.iter().find(|(_, is_said)| *is_said) {
            Some((field, _)) => Err(TransportReadError::NoGuest { field }),
            None => Ok(None),
        };
    }
    let name = <[u8; 16]>::try_from(connection_id).map_err(|_| TransportReadError::NoName)?;
    let status = post_status;
    let post_status = u16::try_from(status).map_err(|_| TransportReadError::Status { status })?;
    if found == 0 {
        return Err(TransportReadError::Regions { found, announced });
    }
    let progress = Progress { posts, post_status, messages };
    let doorbells = flags(&doorbells);
    if doorbells.contains(&0) {
        return Err(TransportReadError::FlagZero);
    }
    let regions = checked_regions(regions)?;
    let connection_id = Guid::from_bytes(name);
    Ok(Some(SavedGuest { connection_id, epoch, progress, doorbells, regions }))
}

/// The event flags whose bits are set.
fn flags(bits: &[u8]) -> BTreeSet<u16> {
    let bytes = (0u16..).step_by(8).zip(bits.iter().take(DOORBELL_BYTES));
    bytes
        .flat_map(|(first, byte)| {
            (0..8u16).filter(move |bit| byte & 1 << bit != 0).map(move |bit| first + bit)
        })
        .collect()
}

fn checked_regions(
    regions: &[TransportRegionRecord],
) -> Result<Vec<RegionIdentity>, TransportReadError> {
    let mut checked: Vec<RegionIdentity> = Vec::with_capacity(regions.len()); // at most 64
    let mut free = 0;
    for (index, region) in regions.iter().enumerate() {
        let &TransportRegionRecord { gpa, len, file_offset, device, inode } = region;
        let page = PAGE_SIZE as u64;
        let whole = [gpa, len, file_offset].iter().all(|value| value % page == 0);
        let end = gpa.checked_add(len).filter(|_| whole && len != 0);
        let wrong = TransportReadError::Region { index, gpa, len };
        let end = end.ok_or(wrong)?;
        if gpa < free {
            return Err(TransportReadError::RegionOrder { index, gpa });
        }
        free = end;
        checked.push(RegionIdentity { gpa, len, file_offset, device, inode });
    }
    Ok(checked)
}

impl From<Errno> for TransportSaveError {
    fn from(error: Errno) -> Self {
        Self::Memory(error.into())
    }
}
