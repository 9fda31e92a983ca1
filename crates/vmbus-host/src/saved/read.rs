//! From records to a host.

use saved_state::bus::{
    AfterEnd, BUS_CHANNEL, BUS_CONNECTION, BUS_GPADL, BUS_HOST, BUS_HVSOCK, BUS_MESSAGE, BUS_RAM,
    BusChannelRecord, BusConnectionRecord, BusGpadlRecord, BusHostRecord, BusHvsockRecord,
    BusMessageRecord, BusRamRecord, ConnectionStep, KINDS,
};
use saved_state::{Chunk, StreamKind, StreamReader};

use crate::connection::{Connection, ContactAnswer, Next};
use crate::host::{Config, Host};
use crate::limits::{
    MAX_CHANNEL_ID, MAX_CHANNELS, MAX_GPADLS, MAX_HVSOCK_REQUESTS, MAX_OUTGOING_MESSAGES,
    MAX_RAM_RUNS,
};
use crate::offer::OfferId;
use crate::outgoing::SlotId;
use crate::saved::check::Place;
use crate::saved::error::{Misfit, RestoreError};
use crate::saved::from_records::{self, Around};
use crate::saved::gpadl;
use crate::shape::{GuestShape, RamMap};

/// A host that is being restored. Whatever the bytes, it takes at most
/// [`RESTORED_BYTES_PER_BYTE`](crate::limits::RESTORED_BYTES_PER_BYTE) times as many, and
/// [`RESTORED_BYTES`](crate::limits::RESTORED_BYTES) more.
///
/// ```
/// use saved_state::Save;
/// use vmbus_host::{Config, GuestShape, Host, HostRestore, SaveOptions};
///
/// let host = Host::new(Config::default(), GuestShape::default());
/// let mut saved = Vec::new();
/// host.save(&SaveOptions::default())?.write_to(&mut saved)?;
///
/// let mut restore = HostRestore::new();
/// restore.feed(&saved)?; // or chunk by chunk
/// assert_eq!(restore.finish()?, host);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct HostRestore {
    reader: StreamReader,
    /// What the first record says, once it has come.
    begun: Option<Begun>,
    failed: Option<RestoreError>,
}

/// A host of which records are still to come.
#[derive(Debug)]
struct Begun {
    host: Host,
    record: BusHostRecord,
    /// Records of each kind of [`KINDS`] that are still to come.
    left: [u32; KINDS.len()],
}

impl Default for HostRestore {
    fn default() -> Self {
        Self::new()
    }
}

impl Host {
    /// The host that a state is of.
    ///
    /// It is as it was when it was saved, and no effect is left to be performed: see
    /// [`Host::devices_have_moved`] and [`Host::go_on`].
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn restore(saved: &[u8]) -> Result<Self, RestoreError> {
        let mut restore = HostRestore::new();
        restore.feed(saved)?;
        restore.finish()
    }
}

impl HostRestore {
    /// Before the first chunk.
    #[must_use]
    pub fn new() -> Self {
        Self { reader: StreamReader::new(StreamKind::BUS, KINDS), begun: None, failed: None }
    }

    /// Takes the next chunks: one or more, all of them whole.
    ///
    /// # Errors
    /// [`RestoreError`], for good: the same again for whatever comes next.
    pub fn feed(&mut self, mut chunks: &[u8]) -> Result<(), RestoreError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        let result = self.take(&mut chunks);
        if let Err(error) = &result {
            self.failed = Some(error.clone());
        }
        result
    }

    /// Whether the last chunk has come.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.reader.is_complete()
    }

    /// The host, once everything has come.
    ///
    /// # Errors
    /// [`RestoreError`]: what has failed before, what is missing, or what the records say together and
    /// cannot be.
    pub fn finish(self) -> Result<Host, RestoreError> {
        if let Some(failed) = self.failed {
            return Err(failed);
        }
        self.reader.finish()?;
        let missing = |(info, left): (&&saved_state::KindInfo, &u32)| {
            (*left != 0).then_some(RestoreError::Missing { record: info.name, left: *left })
        };
        let Some(begun) = self.begun else {
            return Err(RestoreError::Missing { record: "bus.host", left: 1 });
        };
        if let Some(missing) = KINDS.iter().zip(&begun.left).find_map(missing) {
            return Err(missing);
        }
        match begun.host.violations().into_iter().next() {
            None => Ok(begun.host),
            Some(what) => Err(RestoreError::Contradiction { what }),
        }
    }

    fn take(&mut self, input: &mut &[u8]) -> Result<(), RestoreError> {
        while let Some(chunk) = self.reader.read(input)? {
            let place = Place { chunk: chunk.sequence(), record: chunk.info().name };
            match &mut self.begun {
                Some(begun) => begun.take(place, &chunk)?,
                None if chunk.kind() == BUS_HOST => {
                    self.begun = Some(Begun::new(place, chunk.decode()?)?);
                }
                None => {
                    let (chunk, found) = (place.chunk, place.record);
                    let (expected, left) = ("bus.host", 1);
                    return Err(RestoreError::Order { chunk, found, expected, left });
                }
            }
        }
        Ok(())
    }
}

impl Begun {
    fn new(place: Place, record: BusHostRecord) -> Result<Self, RestoreError> {
        let newest_version = place.version("newest_version", record.newest_version)?;
        place.serial("last_serial", record.last_serial)?;
        place.serial("offers_made", record.offers_made)?;
        place.serial("last_message", record.last_message)?;
        place.range("last_channel_id", record.last_channel_id.into(), 0, MAX_CHANNEL_ID.into())?;
        place.count("ram_runs", record.ram_runs, MAX_RAM_RUNS)?;
        place.count("channels", record.channels, MAX_CHANNELS)?;
        place.count("gpadls", record.gpadls, MAX_GPADLS)?;
        place.count("hvsock_requests", record.hvsock_requests, MAX_HVSOCK_REQUESTS)?;
        place.count("messages", record.messages, MAX_OUTGOING_MESSAGES)?;

        let config = Config { newest_version, gpadl_pages: record.gpadl_page_quota };
        let shape = GuestShape { vp_count: record.vp_count, ram: RamMap::default() };
        let mut host = Host::new(config, shape);
        host.last_serial = record.last_serial;
        host.channels.offers_made = record.offers_made;
        host.channels.last_channel_id = record.last_channel_id;
        host.outgoing.serials = record.last_message;
        if record.paused {
            let before = record.before_pause;
            place.range("before_pause", before.into(), 0, record.messages.into())?;
            host.outgoing.before_pause = usize::try_from(before).ok();
        } else {
            place.absent(&[("before_pause", record.before_pause != 0)], "paused")?;
        }
        host.connection = connection_so_far(place, &record)?;
        let agreed = record.connection == ConnectionStep::Connected
            || record.after_end == AfterEnd::Accepted;
        let BusHostRecord { ram_runs, channels, gpadls, hvsock_requests, messages, .. } = record;
        let left = [0, ram_runs, u32::from(agreed), channels, gpadls, hvsock_requests, messages];
        Ok(Self { host, record, left })
    }

    fn take(&mut self, place: Place, chunk: &Chunk<'_>) -> Result<(), RestoreError> {
        self.expect(place, chunk)?;
        match chunk.kind() {
            BUS_RAM => self.take_ram(place, chunk.decode()?),
            BUS_CONNECTION => self.take_connection(place, chunk.decode()?),
            BUS_CHANNEL => self.take_channel(place, &chunk.decode()?),
            BUS_GPADL => self.take_gpadl(place, &chunk.decode()?),
            BUS_HVSOCK => self.take_hvsock(place, chunk.decode()?),
            BUS_MESSAGE => self.take_message(place, &chunk.decode()?),
            _ => Ok(()), // `KINDS` has no others
        }
    }

    /// Whether a record of this kind comes next.
    fn expect(&mut self, place: Place, chunk: &Chunk<'_>) -> Result<(), RestoreError> {
        let Place { chunk: number, record } = place;
        for (info, left) in KINDS.iter().zip(&mut self.left) {
            if info.kind == chunk.kind() {
                *left =
                    left.checked_sub(1).ok_or(RestoreError::TooMany { chunk: number, record })?;
                return Ok(());
            }
            if *left != 0 {
                let (found, expected) = (record, info.name);
                return Err(RestoreError::Order { chunk: number, found, expected, left: *left });
            }
        }
        Ok(())
    }

    fn take_ram(&mut self, place: Place, record: BusRamRecord) -> Result<(), RestoreError> {
        let BusRamRecord { first_pfn, end_pfn } = record;
        let fits = self.host.shape.ram.push_run(first_pfn, end_pfn);
        place.behind("end_pfn", end_pfn, fits)
    }

    fn take_connection(
        &mut self,
        place: Place,
        record: BusConnectionRecord,
    ) -> Result<(), RestoreError> {
        let newest = self.host.config.newest_version;
        let agreed = from_records::connection(place, &record, newest, &self.host.shape)?;
        self.host.connection = match self.record.connection {
            ConnectionStep::Connected => Connection::Connected(agreed),
            _ => {
                let slot = agreed.slot;
                let told = SlotId {
                    vp: self.record.after_end_vp,
                    sint: u8::try_from(self.record.after_end_sint).unwrap_or(u8::MAX),
                };
                if slot != told {
                    let other = "after_end_vp";
                    return Err(place.wrong("slot_vp", Misfit::Contradiction { other }));
                }
                let answer = ContactAnswer::Accepted(agreed);
                Connection::Disconnecting { next: Next::VersionResponse { slot, answer } }
            }
        };
        Ok(())
    }

    fn take_channel(
        &mut self,
        place: Place,
        record: &BusChannelRecord<'_>,
    ) -> Result<(), RestoreError> {
        let offer = OfferId(record.offer);
        place.range("offer", record.offer, 1, self.record.offers_made)?;
        let last = self.host.channels.table.last_key_value().map(|(last, _)| *last);
        place.behind("offer", record.offer, last < Some(offer))?;
        let around =
            Around { vp_count: self.record.vp_count, last_serial: self.record.last_serial };
        let channel = from_records::channel(place, record, around)?;
        let found = channel.channel_id.into();
        match self.host.channels.put_back(offer, channel) {
            true => Ok(()),
            false => Err(place.wrong("channel_id", Misfit::Taken { found })),
        }
    }

    fn take_gpadl(
        &mut self,
        place: Place,
        record: &BusGpadlRecord<&[u8]>,
    ) -> Result<(), RestoreError> {
        let offer = OfferId(record.offer);
        if self.host.channels.get(offer).is_none() {
            return Err(place.wrong("offer", Misfit::Unknown { found: record.offer }));
        }
        let key = (offer, record.gpadl);
        let last = self.host.gpadls.table.last_key_value().map(|(last, _)| *last);
        place.behind("gpadl", record.gpadl.into(), last < Some(key))?;
        let state = gpadl::from_record(place, record, &self.host.shape.ram)?;
        match self.host.gpadls.put_back(offer, record.gpadl, state, record.in_use) {
            true => Ok(()),
            false => Err(place.wrong("gpadl", Misfit::Taken { found: record.gpadl.into() })),
        }
    }

    fn take_hvsock(&mut self, place: Place, record: BusHvsockRecord) -> Result<(), RestoreError> {
        place.range("id", record.id, 1, self.record.last_serial)?;
        let waiting = &mut self.host.hvsock.waiting;
        let last = waiting.last_key_value().map(|(last, _)| *last);
        place.behind("id", record.id, last < Some(record.id))?;
        waiting.insert(record.id, from_records::hvsock(place, &record)?);
        Ok(())
    }

    fn take_message(
        &mut self,
        place: Place,
        record: &BusMessageRecord<'_>,
    ) -> Result<(), RestoreError> {
        place.range("serial", record.serial, 1, self.record.last_message)?;
        let queue = &mut self.host.outgoing.queue;
        let last = queue.back().map(|last| last.serial);
        place.behind("serial", record.serial, last < Some(record.serial))?;
        queue.push_back(from_records::message(place, record, self.record.vp_count)?);
        Ok(())
    }
}

/// The connection as far as the first record says; what was agreed on follows.
fn connection_so_far(place: Place, record: &BusHostRecord) -> Result<Connection, RestoreError> {
    let is_ending = record.connection == ConnectionStep::Disconnecting;
    if is_ending != (record.after_end != AfterEnd::None) {
        let other = "connection";
        return Err(place.wrong("after_end", Misfit::Contradiction { other }));
    }
    let (vp, sint) =
        (("after_end_vp", record.after_end_vp), ("after_end_sint", record.after_end_sint));
    if record.after_end != AfterEnd::Failed {
        place.absent(&[("failed_version", record.failed_version != 0)], "after_end")?;
    }
    let next = match record.after_end {
        AfterEnd::None | AfterEnd::Nothing | AfterEnd::UnloadUntold => {
            place.absent(&[(vp.0, vp.1 != 0), (sint.0, sint.1 != 0)], "after_end")?;
            match record.after_end {
                AfterEnd::Nothing => Next::Nothing,
                AfterEnd::UnloadUntold => Next::UnloadComplete(None),
                _ => return Ok(Connection::Disconnected), // or connected, which a record will say
            }
        }
        told => {
            let slot = place.slot(vp, sint, record.vp_count)?;
            match told {
                AfterEnd::UnloadComplete => Next::UnloadComplete(Some(slot)),
                AfterEnd::Failed => {
                    let version = place.version("failed_version", record.failed_version)?;
                    Next::VersionResponse { slot, answer: ContactAnswer::Failed { version } }
                }
                // Where it is accepted, a record will say.
                _ => Next::VersionResponse { slot, answer: ContactAnswer::Unsupported },
            }
        }
    };
    Ok(Connection::Disconnecting { next })
}
