//! Restoring a channel: whole chunks in, packets in flight again at the end. All or nothing.
//!
//! What the chunks bring is kept aside, each chunk checked whole, until the last one has come; only
//! then is any of it the channel's. A restore that fails, or that nobody finishes, ends the packets
//! that came back through their completion routines with STATUS_CANCELLED, and the channel is as it
//! was.
//!
//! A channel may be restored before its bus has brought the rings, or after. What belongs to the rings
//! waits for them, and is dropped if the peer opens the channel anew.
//!
//! Source: kmcl-semantics section 15.4; D-5, D-19, D-24 to D-29.

use std::collections::BTreeMap;
use std::io::Read;

use saved_state::channel::{
    ChannelRecord, Fence as SavedFence, HandedBack, INCOMING_PACKET, IncomingPacketRecord, KINDS,
    OUTGOING_PACKET, OutgoingPacketRecord, Place,
};
use saved_state::input::{ChunkInput, InputError};
use saved_state::{Chunk, ReadError, StreamKind, StreamReader};
use vmbus_ring::RingError;
use vmbus_wire::guid::Guid;
use vmbus_wire::packet::ExtensionError;
use vmbus_wire::packet::extension::gpa_direct;
use vmbus_wire::status::NtStatus;

use crate::callbacks::SaveRestorePacket;
use crate::channel::{Channel, lock};
use crate::control::Stepping;
use crate::error::{ChannelError, Error, SendError};
use crate::fenced::Fence;
use crate::flags::ServerFlags;
use crate::lifecycle::{ChannelState, Side};
use crate::packet::{Packet, PacketBody};
use crate::pool::{Body, External};
use crate::settings::{Limits, Settings};
use crate::traffic::{ResumeError, RingState};
use crate::waiting::{Waiting, Why};

/// How far a restore has come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub enum Restored {
    /// The last chunk has come: the channel is restored. STATUS_SUCCESS.
    Complete,
    /// More chunks were saved. STATUS_MORE_PROCESSING_REQUIRED.
    More,
}

impl Restored {
    /// What VmbChannelRestoreFromBuffer returns for it.
    #[must_use]
    pub fn status(self) -> NtStatus {
        match self {
            Self::Complete => NtStatus::SUCCESS,
            Self::More => NtStatus::MORE_PROCESSING_REQUIRED,
        }
    }
}

/// Why a channel was not restored. It is as it was before the first chunk.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The channel cannot be restored in its present state (D-5).
    #[error("a channel that is {state:?}, frozen, or at work cannot be restored")]
    State {
        /// Where it is.
        state: ChannelState,
    },
    /// The bytes are not a channel's saved state, or damaged, or another channel's.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The channel was set up otherwise than the one that was saved.
    #[error("chunk {chunk}: {setting} was {saved}, and is {here} here")]
    Setting {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// What was set, as the record calls it.
        setting: &'static str,
        /// What it was.
        saved: u64,
        /// What it is.
        here: u64,
    },
    /// There are more or fewer packets than the channel's record says, or more than a channel has.
    #[error("{found} {what} packets, {stated} stated, {most} at most")]
    Count {
        /// `incoming` or `outgoing`.
        what: &'static str,
        /// How many there are, or how many at least.
        found: u32,
        /// How many the record states.
        stated: u32,
        /// The bound.
        most: u32,
    },
    /// A packet comes before the channel's record, or that record comes twice.
    #[error("chunk {chunk}: {record} out of order")]
    Order {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// Its record.
        record: &'static str,
    },
    /// A transaction id that cannot be, or comes twice.
    #[error("chunk {chunk}: transaction id {transaction_id:#x} is not possible, or there twice")]
    Transaction {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// The id.
        transaction_id: u64,
    },
    /// A packet is larger than this channel's rings or settings allow.
    #[error("chunk {chunk}: {field} of {bytes} bytes, at most {most}")]
    Size {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// Field of its record.
        field: &'static str,
        /// Bytes.
        bytes: u64,
        /// Most bytes.
        most: u64,
    },
    /// External data that is described wrongly.
    #[error("chunk {chunk}: extension: {why}")]
    Extension {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// What is wrong.
        why: ExtensionError,
    },
    /// There are packets of the driver's, and no callbacks to restore them with (D-24).
    #[error("chunk {chunk}: a packet, and no restore callback is set")]
    NoCallback {
        /// Place of the chunk in the stream.
        chunk: u32,
    },
    /// The driver's callback failed (D-26).
    #[error("chunk {chunk}: the driver cannot restore its packet: {status}")]
    Driver {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// What it said.
        status: NtStatus,
    },
    /// An index that is none in these rings.
    #[error("{0}")]
    Ring(RingError),
    /// The ring has less free room than the packets had promised to them.
    #[error("{promised} bytes promised to completions, {free} free in the ring")]
    Room {
        /// Bytes.
        promised: u64,
        /// Bytes.
        free: u32,
    },
    /// The driver's packets came to use meanwhile, or there is no packet object left.
    #[error("out of resources: {0}")]
    Resources(&'static str),
}

impl RestoreError {
    /// What VmbChannelRestoreFromBuffer returns for it (D-5, D-19, D-24, D-26, D-29).
    #[must_use]
    pub fn status(&self) -> NtStatus {
        match self {
            Self::State { .. } | Self::NoCallback { .. } => NtStatus::INVALID_DEVICE_STATE,
            Self::Read(
                ReadError::Revision { .. }
                | ReadError::UnknownFlags { .. }
                | ReadError::UnknownRecordVersion { .. },
            ) => NtStatus::REVISION_MISMATCH,
            Self::Driver { status, .. } => *status,
            Self::Resources(_) => NtStatus::INSUFFICIENT_RESOURCES,
            _ => NtStatus::INVALID_PARAMETER_2,
        }
    }
}

/// Why a channel was not restored from a [`Read`].
#[derive(Debug, thiserror::Error)]
pub enum RestoreFromError {
    /// The state does not fit the channel, or is none.
    #[error(transparent)]
    State(#[from] RestoreError),
    /// The bytes cannot be read.
    #[error(transparent)]
    Input(#[from] InputError),
}

/// A restore that is under way. One that is dropped before its end leaves the channel as it was.
#[derive(Debug)]
#[must_use = "a restore that is dropped is undone"]
pub struct ChannelRestore {
    channel: Channel,
    complete: bool,
}

impl ChannelRestore {
    /// Takes one or more whole chunks.
    ///
    /// # Errors
    /// [`RestoreError`]; the restore is undone.
    pub fn feed(&mut self, chunks: &[u8]) -> Result<Restored, RestoreError> {
        let fed = self.channel.feed(chunks, false);
        self.complete |= fed == Ok(Restored::Complete);
        fed
    }
}

impl ChannelRestore {
    /// Chunks and bytes read so far.
    fn progress(&self) -> (u32, u64) {
        let slot = lock(&self.channel.shared.restore);
        slot.state.as_ref().map_or((0, 0), |state| (state.reader.chunks(), state.reader.bytes()))
    }
}

impl Drop for ChannelRestore {
    fn drop(&mut self) {
        if !self.complete {
            self.channel.abandon_restore();
        }
    }
}

/// The restore of a channel, if one is under way.
#[derive(Default)]
pub(crate) struct RestoreSlot {
    state: Option<Box<RestoreState>>,
    /// The packet whose callback runs.
    current: Option<Current>,
    /// What belongs to rings that have not come yet.
    waiting_for_rings: Option<Box<RestoredRings>>,
}

/// The packet that a driver is asked to restore.
struct Current {
    /// Place in the stream and checksum of its chunk: what the driver has to hand back.
    chunk: u32,
    checksum: [u8; 4],
    length: usize,
    /// Set by [`Packet::restore`].
    restored: Option<Box<PacketBody>>,
}

/// What has come so far.
struct RestoreState {
    reader: StreamReader,
    record: Option<ChannelRecord>,
    in_flight: BTreeMap<u64, Box<PacketBody>>,
    queued: Vec<Box<PacketBody>>,
    outgoing: u32,
    /// The chunks of incoming packets, each with its place.
    incoming: Vec<SavedIncoming>,
}

/// An incoming packet, until there is a body for it: its chunk, checked.
struct SavedIncoming {
    sequence: u32,
    chunk: Box<[u8]>,
}

/// What belongs to the rings.
struct RestoredRings {
    record: ChannelRecord,
    incoming: Vec<SavedIncoming>,
}

impl Channel {
    /// Begins a restore: see [`ChannelRestore`]. The channel has to be set up as the one that was
    /// saved, callbacks included.
    ///
    /// # Errors
    /// [`RestoreError::State`] unless the channel is a server's, not Active, not frozen, without
    /// packets in use (D-5), and no other restore is under way.
    pub fn restore(&self) -> Result<ChannelRestore, RestoreError> {
        let wrong = RestoreError::State { state: self.state() };
        let _stepping = Stepping::wait(self).ok_or(wrong)?;
        let state = self.new_restore()?;
        let mut slot = lock(&self.shared.restore);
        if slot.state.is_some() {
            return Err(wrong);
        }
        slot.state = Some(state);
        drop(slot);
        self.traffic().set_still(true);
        Ok(ChannelRestore { channel: self.clone(), complete: false })
    }

    /// Restores the channel from all that `input` has for it: one stream.
    ///
    /// # Errors
    /// [`RestoreFromError`].
    pub fn restore_from(&self, input: impl Read) -> Result<(), RestoreFromError> {
        let mut restore = self.restore()?;
        let mut input = ChunkInput::new(input);
        while let Some(chunk) = input.next()? {
            if restore.feed(chunk)? == Restored::Complete {
                return Ok(());
            }
        }
        let (chunks, bytes) = restore.progress();
        Err(RestoreError::Read(ReadError::Unfinished { chunks, bytes }).into())
    }

    /// Restores what is in `buffer`: one or more whole chunks. The first call begins the restore, the
    /// one with the last chunk ends it.
    ///
    /// # Errors
    /// [`RestoreError`]: the channel is as it was before the first call.
    ///
    /// Source: VmbChannelRestoreFromBuffer; D-5, D-19, D-29, D-31.
    pub fn restore_from_buffer(&self, buffer: &[u8]) -> Result<Restored, RestoreError> {
        self.feed(buffer, true)
    }

    fn new_restore(&self) -> Result<Box<RestoreState>, RestoreError> {
        let state = self.state();
        let idle = {
            let traffic = self.traffic();
            traffic.is_idle() && traffic.in_use() == (0, 0)
        };
        if self.side() != Side::Server || !self.may_be_restored() || !idle {
            return Err(RestoreError::State { state });
        }
        let settings = self.settings();
        let instance = settings.interface_instance.unwrap_or(Guid::ZERO);
        let reader = StreamReader::new(StreamKind::CHANNEL, KINDS);
        Ok(Box::new(RestoreState {
            reader: reader.of_interface(settings.interface_type, instance),
            record: None,
            in_flight: BTreeMap::new(),
            queued: Vec::new(),
            outgoing: 0,
            incoming: Vec::new(),
        }))
    }

    /// D-5: initialised, not Active, and nothing on its way between two states.
    fn may_be_restored(&self) -> bool {
        let state = self.state();
        let rests = matches!(
            state,
            ChannelState::Disabled
                | ChannelState::Enabled
                | ChannelState::Paused
                | ChannelState::Closed
        );
        rests && !self.shared.hold.is_held()
    }

    fn feed(&self, mut chunks: &[u8], begins: bool) -> Result<Restored, RestoreError> {
        let wrong = RestoreError::State { state: self.state() };
        if self.in_packet_callback() {
            return Err(wrong);
        }
        let _stepping = Stepping::wait(self).ok_or(wrong)?;
        let under_way = lock(&self.shared.restore).state.take();
        let mut state = match under_way {
            Some(state) => state,
            None if begins => {
                let state = self.new_restore()?;
                self.traffic().set_still(true);
                state
            }
            None => return Err(wrong),
        };
        let fed = self.take_chunks(&mut state, &mut chunks);
        match fed {
            Ok(()) if !state.reader.is_complete() => {
                lock(&self.shared.restore).state = Some(state);
                Ok(Restored::More)
            }
            Ok(()) => {
                let finished = self.finish_restore(&mut state);
                self.end_restore(*state);
                finished.map(|()| Restored::Complete)
            }
            Err(error) => {
                self.end_restore(*state);
                Err(error)
            }
        }
    }

    fn take_chunks(
        &self,
        state: &mut RestoreState,
        chunks: &mut &[u8],
    ) -> Result<(), RestoreError> {
        let settings = self.settings();
        while let Some(chunk) = state.reader.read(chunks)? {
            let (sequence, name) = (chunk.sequence(), chunk.info().name);
            let out_of_order = RestoreError::Order { chunk: sequence, record: name };
            match (chunk.kind(), &state.record) {
                (OUTGOING_PACKET, Some(record)) => {
                    let stated = record.outgoing_packets;
                    state.outgoing = next("outgoing", state.outgoing, stated, Limits::PACKETS)?;
                    self.take_outgoing_chunk(state, &settings, &chunk)?;
                }
                (INCOMING_PACKET, Some(record)) => {
                    let found = u32::try_from(state.incoming.len()).unwrap_or(u32::MAX);
                    let most = settings.maximum_packet_count;
                    next("incoming", found, record.incoming_packets, most)?;
                    let packet: IncomingPacketRecord<'_> = chunk.decode()?;
                    check_incoming(&packet, &settings, sequence)?;
                    state.incoming.push(SavedIncoming { sequence, chunk: chunk.bytes().into() });
                }
                (_, None) if chunk.kind() == saved_state::channel::CHANNEL => {
                    let record: ChannelRecord = chunk.decode()?;
                    self.check_record(&record, &settings, sequence)?;
                    state.record = Some(record);
                }
                _ => return Err(out_of_order),
            }
        }
        Ok(())
    }

    /// Has the driver bring back one of its packets.
    fn take_outgoing_chunk(
        &self,
        state: &mut RestoreState,
        settings: &Settings,
        chunk: &Chunk<'_>,
    ) -> Result<(), RestoreError> {
        let sequence = chunk.sequence();
        let packet: OutgoingPacketRecord<'_> = chunk.decode()?;
        check_outgoing(&packet, settings, self.side(), sequence)?;
        let in_flight = match packet.place {
            Place::InRing { transaction_id } => {
                if transaction_id & 0xffff_ffff == 0
                    || state.in_flight.contains_key(&transaction_id)
                {
                    return Err(RestoreError::Transaction { chunk: sequence, transaction_id });
                }
                Some(transaction_id)
            }
            Place::Queued { .. } => None,
        };
        let callbacks = settings.save_restore.as_deref();
        let callbacks = callbacks.ok_or(RestoreError::NoCallback { chunk: sequence })?;
        let (done, restored) = self.call_restore(callbacks, chunk, packet.driver_state);
        // Without a packet the transaction is given up: a late completion finds nobody (D-27).
        if let Some(body) = restored {
            match in_flight {
                Some(id) => drop(state.in_flight.insert(id, body)),
                None => state.queued.push(body),
            }
        }
        done.map_err(|status| RestoreError::Driver { chunk: sequence, status })
    }

    fn call_restore(
        &self,
        callbacks: &dyn SaveRestorePacket,
        chunk: &Chunk<'_>,
        driver_state: &[u8],
    ) -> (Result<(), NtStatus>, Option<Box<PacketBody>>) {
        let bytes = chunk.bytes();
        let checksum = bytes.last_chunk().copied().unwrap_or_default();
        lock(&self.shared.restore).current = Some(Current {
            chunk: chunk.sequence(),
            checksum,
            length: bytes.len(),
            restored: None,
        });
        let done = callbacks.restore_packet(self, bytes, driver_state);
        let current = lock(&self.shared.restore).current.take();
        (done, current.and_then(|current| current.restored))
    }

    /// Holds a channel's record against the channel: both must have been set up alike.
    fn check_record(
        &self,
        record: &ChannelRecord,
        settings: &Settings,
        chunk: u32,
    ) -> Result<(), RestoreError> {
        let side = saved_state::channel::Side::Server as i32;
        for (setting, saved, here) in [
            ("side", u64::try_from(record.side).unwrap_or(0), u64::try_from(side).unwrap_or(0)),
            (
                "maximum_packet_size",
                record.maximum_packet_size.into(),
                settings.maximum_packet_size.into(),
            ),
            (
                "maximum_external_data",
                record.maximum_external_data.into(),
                settings.external_data_size.into(),
            ),
            (
                "maximum_external_ranges",
                record.maximum_external_ranges.into(),
                settings.external_data_ranges.into(),
            ),
            (
                "maximum_completion_size",
                record.maximum_completion_size.into(),
                settings.completion_size().into(),
            ),
            (
                "maximum_packet_count",
                record.maximum_packet_count.into(),
                settings.maximum_packet_count.into(),
            ),
            (
                "client_context_size",
                record.client_context_size.into(),
                settings.client_context_size.into(),
            ),
            ("pipe", record.pipe.into(), settings.is_pipe().into()),
            ("subchannel_index", record.subchannel_index.into(), settings.subchannel_index.into()),
        ] {
            if saved != here {
                return Err(RestoreError::Setting { chunk, setting, saved, here });
            }
        }
        next_count("outgoing", record.outgoing_packets, Limits::PACKETS)?;
        next_count("incoming", record.incoming_packets, settings.maximum_packet_count)
    }

    /// The last chunk has come: makes what was kept aside the channel's.
    fn finish_restore(&self, state: &mut RestoreState) -> Result<(), RestoreError> {
        if !self.may_be_restored() {
            return Err(RestoreError::State { state: self.state() });
        }
        let settings = self.settings();
        let record = state.record.take().ok_or(RestoreError::Order { chunk: 1, record: "end" })?;
        // A transaction that its driver gave up counts as come back.
        let incoming = u32::try_from(state.incoming.len()).unwrap_or(u32::MAX);
        for (what, found, stated) in [
            ("outgoing", state.outgoing, record.outgoing_packets),
            ("incoming", incoming, record.incoming_packets),
        ] {
            if found != stated {
                return Err(RestoreError::Count { what, found, stated, most: Limits::PACKETS });
            }
        }
        if !self.traffic().is_idle() {
            return Err(RestoreError::Resources("packets came to use during the restore"));
        }
        if settings.server_flags.contains(ServerFlags::FORCE_NEW_CHANNEL) {
            // The peer gets a new channel: what was in flight on the old one has nobody (D-5).
            return Ok(());
        }
        let transactions = state.queued.iter().filter(|packet| packet.transaction).count();
        if self.traffic().reserve_transactions(transactions).is_none() {
            return Err(RestoreError::Resources("transactions in flight"));
        }
        let rings = RestoredRings { record, incoming: std::mem::take(&mut state.incoming) };
        let most_uses = rings.record.transaction_uses;
        if self.traffic().has_ring() {
            self.install(&rings).inspect_err(|_| {
                self.traffic().unreserve_transactions(transactions);
            })?;
        } else if rings.record.open {
            lock(&self.shared.restore).waiting_for_rings = Some(Box::new(rings));
        }
        let in_flight = std::mem::take(&mut state.in_flight);
        let queued = std::mem::take(&mut state.queued);
        self.traffic().restore_outgoing(in_flight, queued, most_uses);
        Ok(())
    }

    /// Ends a restore, however. What it still has is not the channel's.
    fn end_restore(&self, state: RestoreState) {
        self.traffic().set_still(false);
        for packet in state.in_flight.into_values().chain(state.queued) {
            Packet::end(packet, self, NtStatus::CANCELLED, &[]);
        }
        self.flush_outgoing();
        self.kick();
    }

    /// Undoes a restore that nobody has finished, or whose rings have not come.
    pub(crate) fn abandon_restore(&self) {
        let state = {
            let mut slot = lock(&self.shared.restore);
            slot.waiting_for_rings = None;
            slot.state.take()
        };
        if let Some(state) = state {
            self.end_restore(*state);
        }
    }

    /// The rings have come: makes that part of a restore theirs. `resumed`: they are the ones that it
    /// was saved with.
    pub(crate) fn install_restored(&self, resumed: bool) -> Result<(), RestoreError> {
        let Some(rings) = lock(&self.shared.restore).waiting_for_rings.take() else {
            if resumed {
                self.signal_anyway();
            }
            return Ok(());
        };
        if resumed {
            return self.install(&rings);
        }
        // The peer has opened the channel anew: nobody will complete what was in the old rings.
        let stale = self.traffic().take_in_flight();
        for packet in stale {
            Packet::end(packet, self, NtStatus::CANCELLED, &[]);
        }
        Ok(())
    }

    /// Has the attached rings go on where they were saved, with the incoming packets that were in
    /// flight. Nothing has changed where it fails.
    fn install(&self, rings: &RestoredRings) -> Result<(), RestoreError> {
        let RestoredRings { record, incoming } = rings;
        let mut result = Ok(());
        self.with_receiver(|mut receiver| {
            if let Some(receiver) = &mut receiver {
                result = self.install_in(receiver, record, incoming);
            }
            receiver
        });
        result?;
        if record.stopped {
            self.stop(ChannelError::BeforeRestore);
        }
        // Signals given before the save may have been lost: both sides look once.
        self.signal_anyway();
        self.kick();
        Ok(())
    }

    fn install_in(
        &self,
        receiver: &mut crate::receiver::Receiver,
        record: &ChannelRecord,
        incoming: &[SavedIncoming],
    ) -> Result<(), RestoreError> {
        let mut traffic = self.traffic();
        let here = (receiver.ring_state(), traffic.ring_state().unwrap_or_default());
        let (RingState { data_len: incoming_len, index: read_index }, outgoing) = here;
        for (setting, saved, here) in [
            ("incoming_ring_bytes", record.incoming_ring_bytes, incoming_len),
            ("outgoing_ring_bytes", record.outgoing_ring_bytes, outgoing.data_len),
        ] {
            if saved != here {
                let (saved, here) = (saved.into(), here.into());
                return Err(RestoreError::Setting { chunk: 1, setting, saved, here });
            }
        }
        let mut line = Vec::with_capacity(incoming.len());
        let filled: Result<(), RestoreError> =
            (0..).zip(incoming).try_for_each(|(order, saved)| {
                let body = traffic.body_for_restored();
                let mut body = body.ok_or(RestoreError::Resources("packets in the pool"))?;
                let why = fill(&mut body, saved);
                body.order = order;
                let (failed, why) = match why {
                    Ok(why) => (Ok(()), why),
                    Err(error) => (Err(error), Why::Completed),
                };
                line.push(Waiting { body, why });
                failed
            });
        let resumed = filled.and_then(|()| {
            receiver
                .resume(record.read_index, line.len() as u64, [])
                .map_err(RestoreError::Ring)?;
            traffic.resume_ring(record.write_index, line.len()).map_err(|error| {
                let _as_before = receiver.resume(read_index, 0, []);
                explain(error)
            })
        });
        if resumed.is_err() {
            traffic.forget_restored(line.into_iter().map(|waiting| waiting.body));
            return resumed;
        }
        receiver.line().extend(line);
        Ok(())
    }

    fn signal_anyway(&self) {
        let ring = self.traffic().signal_anyway();
        ring.give();
    }
}

impl Packet {
    /// Brings the packet back to where it was when it was saved: queued for the ring, or waiting for the
    /// peer's completion. Its completion routine will run later; until then it is not the driver's.
    /// Only in [`SaveRestorePacket::restore_packet`], with the `library_state` given there.
    ///
    /// # Errors
    /// The packet, and why: [`Error::Argument`] 1 for a packet of another channel;
    /// [`Error::ForeignState`] for other bytes than those (D-28); [`Error::State`] outside the
    /// callback.
    ///
    /// Source: VmbPacketRestore; D-25, D-28.
    pub fn restore(self, library_state: &[u8]) -> Result<(), SendError> {
        let channel = self.channel().clone();
        let mut slot = lock(&channel.shared.restore);
        let refused = match &slot.current {
            None => Some(Error::State { function: "restore", state: channel.state() }),
            Some(current) if current.length != library_state.len() => {
                Some(Error::ForeignState { position: 3 })
            }
            Some(_) => None,
        };
        if let Some(error) = refused {
            drop(slot);
            return Err(SendError { packet: self, error });
        }
        let record = Chunk::alone(library_state, KINDS).ok().filter(|chunk| {
            let checksum = library_state.last_chunk().copied().unwrap_or_default();
            slot.current.as_ref().is_some_and(|current| {
                current.restored.is_none()
                    && (current.chunk, current.checksum) == (chunk.sequence(), checksum)
            })
        });
        let record = record.and_then(|chunk| chunk.decode::<OutgoingPacketRecord<'_>>().ok());
        let Some(record) = record else {
            drop(slot);
            return Err(SendError { packet: self, error: Error::ForeignState { position: 2 } });
        };
        let Some(mut body) = self.into_body() else { return Ok(()) };
        match record.place {
            Place::InRing { .. } => body.take_over(true, &[], record.extension),
            Place::Queued { message, transaction } => {
                body.take_over(transaction, message, record.extension);
            }
        }
        if let Some(current) = &mut slot.current {
            current.restored = Some(body);
        }
        Ok(())
    }
}

/// Counts one packet more, within what was stated and what is possible.
fn next(what: &'static str, found: u32, stated: u32, most: u32) -> Result<u32, RestoreError> {
    let found = found.saturating_add(1);
    if found > stated || found > most {
        return Err(RestoreError::Count { what, found, stated, most });
    }
    Ok(found)
}

fn next_count(what: &'static str, stated: u32, most: u32) -> Result<(), RestoreError> {
    if stated > most {
        return Err(RestoreError::Count { what, found: stated, stated, most });
    }
    Ok(())
}

fn within(chunk: u32, field: &'static str, bytes: usize, most: u64) -> Result<(), RestoreError> {
    let bytes = bytes as u64;
    if bytes <= most { Ok(()) } else { Err(RestoreError::Size { chunk, field, bytes, most }) }
}

fn check_outgoing(
    packet: &OutgoingPacketRecord<'_>,
    settings: &Settings,
    side: Side,
    chunk: u32,
) -> Result<(), RestoreError> {
    // External data is the guest's to donate (D-41).
    within(chunk, "extension", packet.extension.len(), 0)?;
    if let Place::Queued { message, .. } = packet.place {
        let len = u32::try_from(message.len()).unwrap_or(u32::MAX);
        let bytes = vmbus_ring::packet_ring_bytes(0, len) as usize;
        within(chunk, "message", bytes, settings.largest_packet(side).into())?;
    }
    Ok(())
}

fn check_incoming(
    packet: &IncomingPacketRecord<'_>,
    settings: &Settings,
    chunk: u32,
) -> Result<(), RestoreError> {
    if let SavedFence::Finished { completion } = packet.fence {
        return within(chunk, "completion", completion.len(), settings.completion_size().into());
    }
    let context = settings.client_context_size;
    if packet.client_context.len() != context as usize {
        let (bytes, most) = (packet.client_context.len() as u64, u64::from(context));
        return Err(RestoreError::Size { chunk, field: "client_context", bytes, most });
    }
    let words = settings.external_words() as u64 + 1;
    within(chunk, "extension", packet.extension.len(), words * 8)?;
    if !packet.extension.len().is_multiple_of(8) {
        let (bytes, most) = (packet.extension.len() as u64, words * 8);
        return Err(RestoreError::Size { chunk, field: "extension", bytes, most });
    }
    if packet.extension.is_empty() {
        return Ok(());
    }
    let words: Vec<u64> =
        packet.extension.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    gpa_direct(&words).map(drop).map_err(|why| RestoreError::Extension { chunk, why })
}

/// Makes `body` the packet that was saved, and says why it waits.
fn fill(body: &mut Body, saved: &SavedIncoming) -> Result<Why, RestoreError> {
    let chunk = saved.sequence;
    let record = Chunk::alone(&saved.chunk, KINDS)?;
    let packet: IncomingPacketRecord<'_> = record.decode()?;
    let (id, wants_completion) = (packet.transaction_id, packet.wants_completion);
    body.begin(id, wants_completion, packet.payload.len()).copy_from_slice(packet.payload);
    if let SavedFence::Finished { completion } = packet.fence {
        body.hold_completion(completion);
        return Ok(Why::Completed);
    }
    if body.context().len() == packet.client_context.len() {
        body.context().copy_from_slice(packet.client_context);
    }
    if packet.refused_external_bytes != 0 {
        body.external = External::TooMuch { bytes: packet.refused_external_bytes };
    } else if !packet.extension.is_empty() {
        let words = packet.extension.len() / 8;
        let (bytes, most) = (packet.extension.len() as u64, 0);
        let too_long = RestoreError::Size { chunk, field: "extension", bytes, most };
        let room = body.extension_room(words).ok_or(too_long)?;
        for (word, bytes) in room.iter_mut().zip(packet.extension.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        body.check_external(words).map_err(|why| RestoreError::Extension { chunk, why })?;
    }
    let fence = match packet.fence {
        SavedFence::Cancelled => Fence::Cancelled,
        SavedFence::NeverStarted | SavedFence::Finished { .. } => Fence::NeverStarted,
    };
    Ok(match packet.handed_back {
        HandedBack::No => Why::HandedOver { fence, state: packet.device_state.into() },
        HandedBack::AtPassive => Why::HandedBack { at_passive: true, after_memory: false },
        // Asked for anew: whether the memory is there is not known here.
        HandedBack::AfterMemory => Why::HandedBack { at_passive: false, after_memory: false },
    })
}

fn explain(error: ResumeError) -> RestoreError {
    match error {
        ResumeError::Ring(error) => RestoreError::Ring(error),
        ResumeError::Room { promised, free } => RestoreError::Room { promised, free },
        ResumeError::Pool { .. } => RestoreError::Resources("packets in the pool"),
    }
}
