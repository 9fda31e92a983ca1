//! A connection as a saved state: `docs/saved-state.md`, records `transport.…`.

use std::collections::BTreeSet;

use kmcl::SaveOptions;
use rustix::io::Errno;
use saved_state::transport::{
    DOORBELL_BYTES, KINDS, MAX_REGIONS, TransportRecord, TransportRegionRecord,
};
use saved_state::{
    HeaderFlags, ReadError, Save, SaveStep, Step, StreamInfo, StreamKind, StreamReader,
    StreamWriter, WriteError,
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
        options: &SaveOptions,
    ) -> Result<Self, WriteError> {
        let (record, regions) = guest.map(to_records).unwrap_or_default();
        let info = info(options, record.regions);
        Ok(Self { writer: StreamWriter::new(options.format, info, KINDS)?, record, regions })
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

fn info(options: &SaveOptions, regions: u32) -> StreamInfo {
    StreamInfo {
        stream: StreamKind::TRANSPORT,
        flags: HeaderFlags::default(),
        interface_type: Guid::ZERO,
        interface_instance: Guid::ZERO,
        producer: options.producer,
        chunks: regions.saturating_add(3), // header, connection, end
        bytes: 0,
        items: regions,
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

/// Checks the whole state of a transport, without a host being made from it. Returns whether it has a
/// guest, which will have to come back.
///
/// # Errors
/// [`TransportReadError`].
pub fn check_saved_transport(stream: &[u8]) -> Result<bool, TransportReadError> {
    read(stream).map(|guest| guest.is_some())
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

#[cfg(test)]
mod tests {
    use saved_state::FormatVersion;
    use saved_state::testing::{chunk_ranges, rechain};

    use super::*;

    const REGION: RegionIdentity =
        RegionIdentity { gpa: 0, len: 0x4000, file_offset: 0, device: 1, inode: 77 };

    fn guest() -> SavedGuest {
        SavedGuest {
            connection_id: Guid::from_u128(0x0123_4567_89ab_cdef),
            epoch: 3,
            progress: Progress { posts: 10, post_status: 19, messages: 20 },
            doorbells: BTreeSet::from([1, 8, 15, 2047]),
            regions: vec![REGION, RegionIdentity { gpa: 0x4000, file_offset: 0x4000, ..REGION }],
        }
    }

    fn save(guest: Option<&SavedGuest>) -> TransportSave {
        TransportSave::new(guest, &SaveOptions::default()).unwrap()
    }

    fn bytes(mut save: TransportSave) -> Vec<u8> {
        let mut bytes = Vec::new();
        save.write_to(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_is_written_is_read_again_through_buffers_of_any_size() {
        let bare = SavedGuest {
            epoch: u64::MAX,
            progress: Progress { posts: u64::MAX, post_status: u16::MAX, messages: u64::MAX },
            doorbells: (1..=2047).collect(),
            ..guest()
        };
        let none = SavedGuest { doorbells: BTreeSet::new(), ..guest() };
        for guest in [None, Some(guest()), Some(bare), Some(none)] {
            let whole = bytes(save(guest.as_ref()));
            assert_eq!(read(&whole), Ok(guest.clone()));
            for size in [1, 40, 100, 300] {
                let mut save = save(guest.as_ref());
                let mut pieces = Vec::new();
                let mut room = vec![0; size];
                loop {
                    let step = save.step(&mut room).unwrap();
                    pieces.extend_from_slice(&room[..step.written]);
                    if step.done {
                        break;
                    }
                    room.resize(room.len().max(step.needed), 0);
                }
                assert_eq!(pieces, whole, "{size}");
            }
        }
    }

    /// Records that are each what they may be, and together make no sense.
    #[test]
    fn each_nonsense_has_its_error() {
        use TransportReadError::*;
        type Change = fn(&mut TransportRecord, &mut Vec<TransportRegionRecord>);
        let nobody = |field| NoGuest { field };
        let region = |index, gpa, len| Region { index, gpa, len };
        let table: [(&str, Change, TransportReadError); 17] = [
            ("no guest, with a name", |c, _| c.guest = false, nobody("a name")),
            (
                "no guest, with regions",
                |c, _| *c = TransportRecord { regions: 2, ..TransportRecord::default() },
                nobody("regions"),
            ),
            (
                "no guest, with a doorbell",
                |c, r| {
                    r.clear();
                    *c = TransportRecord { doorbells: vec![2], ..TransportRecord::default() };
                },
                nobody("doorbells"),
            ),
            (
                "no guest, with posts",
                |c, r| {
                    r.clear();
                    *c = TransportRecord { posts: 2, ..TransportRecord::default() };
                },
                nobody("posts"),
            ),
            ("no name", |c, _| c.connection_id.clear(), NoName),
            ("a status", |c, _| c.post_status = 0x1_0000, Status { status: 0x1_0000 }),
            ("flag 0", |c, _| c.doorbells = vec![1], FlagZero),
            ("one region fewer", |_, r| r.truncate(1), Regions { found: 1, announced: 2 }),
            ("one more", |_, r| r.push(r[1].clone()), Regions { found: 3, announced: 2 }),
            (
                "none",
                |c, r| {
                    c.regions = 0;
                    r.clear();
                },
                Regions { found: 0, announced: 0 },
            ),
            ("a claim", |c, _| c.regions = u32::MAX, Regions { found: 2, announced: u32::MAX }),
            (
                "too many",
                |c, r| {
                    c.regions = 65;
                    *r = vec![r[0].clone(); 65];
                },
                Regions { found: 65, announced: 65 },
            ),
            ("half a page", |_, r| r[0].len = 0x4001, region(0, 0, 0x4001)),
            ("a crooked address", |_, r| r[1].gpa = 0x4001, region(1, 0x4001, 0x4000)),
            ("a crooked offset", |_, r| r[1].file_offset = 1, region(1, 0x4000, 0x4000)),
            (
                "beyond all addresses",
                |_, r| r[1].gpa = u64::MAX - 0xfff,
                region(1, u64::MAX - 0xfff, 0x4000),
            ),
            ("overlap", |_, r| r[1].gpa = 0x3000, RegionOrder { index: 1, gpa: 0x3000 }),
        ];
        for (what, change, expected) in table {
            let mut save = save(Some(&guest()));
            save.writer = StreamWriter::new(
                FormatVersion::NEWEST,
                StreamInfo { chunks: 0, ..info(&SaveOptions::default(), 0) },
                KINDS,
            )
            .unwrap();
            change(&mut save.record, &mut save.regions);
            assert_eq!(read(&bytes(save)), Err(expected), "{what}");
        }
    }

    #[test]
    fn records_in_another_order_or_number_are_refused() {
        let whole = bytes(save(Some(&guest())));
        let ranges = chunk_ranges(&whole);
        let put = |order: &[usize]| {
            let mut stream: Vec<u8> =
                order.iter().flat_map(|&chunk| whole[ranges[chunk].clone()].to_vec()).collect();
            let mut sequence = 0u32;
            for range in chunk_ranges(&stream).into_iter().skip(1) {
                sequence += 1;
                stream[range.start + 8..range.start + 12].copy_from_slice(&sequence.to_le_bytes());
            }
            rechain(&mut stream);
            read(&stream)
        };
        assert!(put(&[0, 1, 2, 3, 4]).is_ok());
        assert_eq!(put(&[0, 2, 1, 3, 4]), Err(TransportReadError::NoConnection));
        assert_eq!(put(&[0, 1, 1, 2, 4]), Err(TransportReadError::SecondConnection));
        assert!(matches!(put(&[0, 1, 2, 4]), Err(TransportReadError::Stream(_))));
    }

    #[test]
    fn no_damage_goes_unnoticed_or_panics() {
        let whole = bytes(save(Some(&guest())));
        for cut in 0..whole.len() {
            assert!(read(&whole[..cut]).is_err(), "cut at {cut}");
        }
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut flipped = whole.clone();
                flipped[at] ^= 1 << bit;
                assert!(read(&flipped).is_err(), "bit {bit} of byte {at}");
                // With checksums put right, whatever comes out of it is within the bounds.
                rechain(&mut flipped);
                if let Ok(Some(guest)) = read(&flipped) {
                    assert!(guest.regions.len() <= MAX_REGIONS && !guest.doorbells.contains(&0));
                }
            }
        }
        let mut doubled = whole.clone();
        doubled.extend_from_slice(&whole);
        assert!(matches!(read(&doubled), Err(TransportReadError::Stream(_))));
        assert_eq!(read(&[]), Err(ReadError::Unfinished { chunks: 0, bytes: 0 }.into()));
    }
}
