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
//! Memory: what is kept of a stream that nobody has finished is at most
//! [`RESTORE_BYTES_PER_BYTE`] bytes for each of it, apart from what the driver allocates by itself.
//!
//! Source: kmcl-semantics section 15.4; D-5, D-19, D-24 to D-29.

use std::collections::BTreeMap;
use std::io::Read;

use saved_state::channel::{
    ChannelRecord, INCOMING_PACKET, IncomingPacketRecord, KINDS, OUTGOING_PACKET,
    OutgoingPacketRecord, Place,
};
use saved_state::input::ChunkInput;
use saved_state::{Chunk, ReadError, Record as _, StreamKind, StreamReader};
use vmbus_wire::guid::Guid;
use vmbus_wire::status::NtStatus;

use crate::callbacks::SaveRestorePacket;
use crate::channel::{Channel, lock};
use crate::error::{ChannelError, Error, SendError};
use crate::flags::ServerFlags;
use crate::lifecycle::{ChannelState, Side};
use crate::packet::{Packet, PacketBody};
use crate::receiver::Receiver;
use crate::settings::{Limits, Settings};
use crate::traffic::{ResumeError, RingState, Traffic};
use crate::waiting::{Waiting, Why};

mod error;
mod packets;

pub use error::{RestoreError, RestoreFromError};
pub(crate) use packets::Incoming;
use packets::{check_channel, check_incoming, check_outgoing, fill};

/// Most bytes of memory that a restore takes for each byte that it was given, until it is complete.
pub const RESTORE_BYTES_PER_BYTE: usize = 8;

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

/// A restore that is under way. One that is dropped before its end leaves the channel as it was.
///
/// A channel whose rings are there sends what was queued as soon as its restore is complete. Whoever
/// restores several channels, and wants all of them or none, feeds their states before the bus brings
/// the rings.
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
    /// Taken out by the thread that feeds it, which has the right to step the channel.
    state: Option<Box<RestoreState>>,
    /// The packet whose callback runs.
    current: Option<Current>,
    /// What belongs to rings that have not come yet.
    waiting_for_rings: Option<Box<RestoredRings>>,
}

impl RestoreSlot {
    /// What waits for rings.
    pub(crate) fn waiting_for_rings(&self) -> Option<&RestoredRings> {
        self.waiting_for_rings.as_deref()
    }
}

/// The packet that a driver is asked to restore, as it was told to it.
struct Current {
    /// Where the bytes are: who hands back these very ones need not have them checked.
    address: usize,
    length: usize,
    /// What a copy of them is known by.
    chunk: u32,
    checksum: Option<[u8; 4]>,
    /// Set by [`Packet::restore`].
    restored: Option<Box<PacketBody>>,
}

impl Current {
    fn new(chunk: &Chunk<'_>) -> Self {
        let bytes = chunk.bytes();
        Self {
            address: bytes.as_ptr().addr(),
            length: bytes.len(),
            chunk: chunk.sequence(),
            checksum: bytes.last_chunk().copied(),
            restored: None,
        }
    }

    /// Whether these are the bytes that were handed out, or a copy of them. Nothing is read from them
    /// later: what is done with the packet is up to the original.
    fn is(&self, bytes: &[u8]) -> bool {
        bytes.as_ptr().addr() == self.address
            || (bytes.last_chunk().copied() == self.checksum
                && Chunk::alone(bytes, KINDS).is_ok_and(|copy| copy.sequence() == self.chunk))
    }
}

/// What has come so far.
struct RestoreState {
    reader: StreamReader,
    /// The channel's record, and its chunk.
    record: Option<(u32, ChannelRecord)>,
    in_flight: BTreeMap<u64, Box<PacketBody>>,
    queued: Vec<Box<PacketBody>>,
    /// Outgoing packets, with those that their driver gave up.
    outgoing: u32,
    incoming: Incoming,
    /// Scratch space.
    words: Vec<u64>,
}

/// What belongs to the rings.
pub(crate) struct RestoredRings {
    /// The chunk of the record.
    chunk: u32,
    pub(crate) record: ChannelRecord,
    pub(crate) incoming: Incoming,
}

/// A restore in the hands of the thread that feeds it. Undone when dropped, also by a callback that
/// panics.
struct Feeding<'a> {
    channel: &'a Channel,
    state: Option<Box<RestoreState>>,
}

impl Drop for Feeding<'_> {
    fn drop(&mut self) {
        if let Some(state) = self.state.take() {
            self.channel.end_restore(*state);
        }
    }
}

impl Channel {
    /// Begins a restore: see [`ChannelRestore`]. The channel has to be set up as the one that was
    /// saved, callbacks included.
    ///
    /// Until the restore is complete nothing is sent: what the driver sends waits, and goes behind
    /// what is restored.
    ///
    /// # Errors
    /// [`RestoreError::State`] unless the channel is a server's, not Active, not frozen, without
    /// packets in use (D-5), and no other restore is under way.
    pub fn restore(&self) -> Result<ChannelRestore, RestoreError> {
        let wrong = RestoreError::State { state: self.state() };
        let _stepping = self.stepping().ok_or(wrong)?;
        if self.is_being_restored() {
            return Err(wrong);
        }
        let state = self.new_restore()?;
        lock(&self.shared.restore).state = Some(state);
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

    /// Whether chunks are expected.
    pub(crate) fn is_being_restored(&self) -> bool {
        lock(&self.shared.restore).state.is_some()
    }

    fn new_restore(&self) -> Result<Box<RestoreState>, RestoreError> {
        let in_use = {
            let traffic = self.traffic();
            // Whatever was sent into rings that the peer knows from before would be written over.
            let untouched = traffic.resumable().is_none_or(|(first, now)| first == now);
            !untouched || !traffic.is_idle() || traffic.in_use() != (0, 0)
        };
        let waits = lock(&self.shared.restore).waiting_for_rings.is_some();
        if self.side() != Side::Server || !self.may_be_restored() || in_use || waits {
            return Err(RestoreError::State { state: self.state() });
        }
        let settings = self.settings();
        let instance = settings.interface_instance.unwrap_or(Guid::ZERO);
        let reader = StreamReader::new(StreamKind::CHANNEL, KINDS);
        self.traffic().set_restoring(true);
        Ok(Box::new(RestoreState {
            reader: reader.of_interface(settings.interface_type, instance),
            record: None,
            in_flight: BTreeMap::new(),
            queued: Vec::new(),
            outgoing: 0,
            incoming: Incoming::default(),
            words: Vec::new(),
        }))
    }

    /// D-5: initialised, not Active, and nothing on its way between two states.
    fn may_be_restored(&self) -> bool {
        use ChannelState as S;
        let rests = matches!(self.state(), S::Disabled | S::Enabled | S::Paused | S::Closed);
        rests && !self.shared.hold.is_held()
    }

    fn feed(&self, mut chunks: &[u8], begins: bool) -> Result<Restored, RestoreError> {
        let wrong = RestoreError::State { state: self.state() };
        let _stepping = self.stepping().ok_or(wrong)?;
        let under_way = lock(&self.shared.restore).state.take();
        let state = match under_way {
            Some(state) => state,
            None if begins => self.new_restore()?,
            None => return Err(wrong),
        };
        let mut feeding = Feeding { channel: self, state: Some(state) };
        let Some(state) = &mut feeding.state else { return Err(wrong) };
        // The channel may have been started, or frozen, since the last buffer.
        if !self.may_be_restored() {
            return Err(RestoreError::State { state: self.state() });
        }
        self.take_chunks(state, &mut chunks)?;
        if !state.reader.is_complete() {
            lock(&self.shared.restore).state = feeding.state.take();
            return Ok(Restored::More);
        }
        self.finish_restore(state)?;
        Ok(Restored::Complete)
    }

    fn take_chunks(
        &self,
        state: &mut RestoreState,
        chunks: &mut &[u8],
    ) -> Result<(), RestoreError> {
        let settings = self.settings();
        while let Some(chunk) = state.reader.read(chunks)? {
            let (sequence, record) = (chunk.sequence(), chunk.info().name);
            match (chunk.kind(), &state.record) {
                (OUTGOING_PACKET, Some(_)) => self.take_outgoing(state, &settings, &chunk)?,
                (INCOMING_PACKET, Some((_, channel))) => {
                    let found = u32::try_from(state.incoming.len()).unwrap_or(u32::MAX);
                    count_one(sequence, record, found, channel.incoming_packets)?;
                    let packet: IncomingPacketRecord<'_> = chunk.decode()?;
                    check_incoming(&packet, &settings, sequence, &mut state.words)?;
                    // This chunk is no longer among them; the next one, and all others, may be packets.
                    state.incoming.expect(chunk.message().len() + chunks.len());
                    state.incoming.push(sequence, chunk.message());
                }
                (saved_state::channel::CHANNEL, None) => {
                    let channel: ChannelRecord = chunk.decode()?;
                    check_channel(&channel, &settings, sequence)?;
                    state.record = Some((sequence, channel));
                }
                _ => return Err(RestoreError::Order { chunk: sequence, record }),
            }
        }
        Ok(())
    }

    /// Has the driver bring back one of its packets.
    fn take_outgoing(
        &self,
        state: &mut RestoreState,
        settings: &Settings,
        chunk: &Chunk<'_>,
    ) -> Result<(), RestoreError> {
        let sequence = chunk.sequence();
        let Some((_, channel)) = &state.record else { return Ok(()) };
        count_one(sequence, chunk.info().name, state.outgoing, channel.outgoing_packets)?;
        let packet: OutgoingPacketRecord<'_> = chunk.decode()?;
        check_outgoing(&packet, channel, settings, sequence)?;
        if let Place::InRing { transaction_id } = packet.place
            && (transaction_id & 0xffff_ffff == 0 || state.in_flight.contains_key(&transaction_id))
        {
            return Err(RestoreError::Transaction { chunk: sequence, transaction_id });
        }
        state.outgoing += 1;
        let callbacks = settings.save_restore.as_deref();
        let callbacks = callbacks.ok_or(RestoreError::NoCallback { chunk: sequence })?;
        let (done, restored) = self.call_restore(callbacks, chunk, packet.driver_state);
        // Without a packet the transaction is given up: a late completion finds nobody (D-27).
        if let Some(mut body) = restored {
            match packet.place {
                Place::InRing { transaction_id } => {
                    body.take_over(true, &[]);
                    state.in_flight.insert(transaction_id, body);
                }
                Place::Queued { message, transaction } => {
                    body.take_over(transaction, message);
                    state.queued.push(body);
                }
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
        lock(&self.shared.restore).current = Some(Current::new(chunk));
        let done = callbacks.restore_packet(self, chunk.bytes(), driver_state);
        let current = lock(&self.shared.restore).current.take();
        (done, current.and_then(|current| current.restored))
    }

    /// The last chunk has come: makes what was kept aside the channel's. What is left in `state` is
    /// not.
    fn finish_restore(&self, state: &mut RestoreState) -> Result<(), RestoreError> {
        let end = state.reader.chunks().saturating_sub(1);
        let no_record = RestoreError::Order { chunk: end, record: END };
        let (chunk, channel) = state.record.take().ok_or(no_record)?;
        let incoming = u32::try_from(state.incoming.len()).unwrap_or(u32::MAX);
        for (record, found, stated, most) in [
            // A transaction that its driver gave up counts as come back.
            (error::OUTGOING, state.outgoing, channel.outgoing_packets, Limits::PACKETS),
            (error::INCOMING, incoming, channel.incoming_packets, channel.maximum_packet_count),
        ] {
            if found != stated {
                return Err(RestoreError::Count { chunk: end, record, found, stated, most });
            }
        }
        let flags = self.settings().server_flags;
        if flags.contains(ServerFlags::FORCE_NEW_CHANNEL) {
            // The peer gets a new channel: what was in flight on the old one has nobody (D-5).
            return Ok(());
        }
        let transactions = state.queued.iter().filter(|packet| packet.transaction).count();
        if self.traffic().reserve_transactions(transactions).is_none() {
            return Err(RestoreError::Resources("transactions in flight"));
        }
        let most_uses = channel.transaction_uses;
        let mut in_flight = BTreeMap::new();
        if channel.open {
            let incoming = std::mem::take(&mut state.incoming);
            let rings = RestoredRings { chunk, record: channel, incoming };
            let (has_ring, resumable) = {
                let traffic = self.traffic();
                (traffic.has_ring(), traffic.resumable().is_some())
            };
            if resumable {
                self.install(&rings).inspect_err(|_| {
                    self.traffic().unreserve_transactions(transactions);
                })?;
            } else if !has_ring {
                lock(&self.shared.restore).waiting_for_rings = Some(Box::new(rings));
            }
            // In rings that the peer has opened anew nobody will complete what was in the old ones.
            if resumable || !has_ring {
                in_flight = std::mem::take(&mut state.in_flight);
            }
        }
        let queued = std::mem::take(&mut state.queued);
        self.traffic().restore_outgoing(in_flight, queued, most_uses);
        Ok(())
    }

    /// Ends a restore, however. What it still has is not the channel's.
    fn end_restore(&self, state: RestoreState) {
        self.traffic().set_restoring(false);
        let current = lock(&self.shared.restore).current.take();
        let unfinished = current.and_then(|current| current.restored);
        for packet in state.in_flight.into_values().chain(state.queued).chain(unfinished) {
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
        let rings = lock(&self.shared.restore).waiting_for_rings.take();
        match rings {
            Some(rings) if resumed => self.install(&rings)?,
            // The peer has opened the channel anew: nobody will complete what was in the old rings.
            Some(_) => {
                let stale = self.traffic().take_in_flight();
                for packet in stale {
                    Packet::end(packet, self, NtStatus::CANCELLED, &[]);
                }
            }
            None if resumed => self.signal_anyway(),
            None => {}
        }
        Ok(())
    }

    /// Has the attached rings go on where they were saved, with the incoming packets that were in
    /// flight. Nothing has changed where it fails.
    fn install(&self, rings: &RestoredRings) -> Result<(), RestoreError> {
        let mut result = Ok(());
        self.with_receiver(|mut receiver| {
            if let Some(receiver) = &mut receiver {
                result = install_in(receiver, &mut self.traffic(), rings);
            }
            receiver
        });
        result?;
        if rings.record.stopped {
            self.stop(ChannelError::BeforeRestore);
        }
        // Signals given before the save may have been lost: both sides look once.
        self.signal_anyway();
        self.kick();
        Ok(())
    }

    fn signal_anyway(&self) {
        let ring = self.traffic().signal_anyway();
        ring.give();
    }
}

fn install_in(
    receiver: &mut Receiver,
    traffic: &mut Traffic,
    rings: &RestoredRings,
) -> Result<(), RestoreError> {
    let RestoredRings { chunk, record, incoming } = rings;
    let chunk = *chunk;
    let before = receiver.ring_state();
    let outgoing = traffic.ring_state().unwrap_or_default();
    for (setting, saved, RingState { data_len: here, .. }) in [
        ("incoming_ring_bytes", record.incoming_ring_bytes, before),
        ("outgoing_ring_bytes", record.outgoing_ring_bytes, outgoing),
    ] {
        if saved != here {
            let (saved, here) = (saved.into(), here.into());
            return Err(RestoreError::Setting { chunk, setting, saved, here });
        }
    }
    let mut line = Vec::with_capacity(incoming.len());
    let installed = fill_line(traffic, incoming, &mut line).and_then(|()| {
        receiver
            .resume_at(record.read_index, line.len() as u64)
            .map_err(|why| RestoreError::Ring { chunk, field: "read_index", why })?;
        traffic.resume_ring(record.write_index, line.len()).map_err(|error| {
            let _as_before = receiver.resume_at(before.index, 0);
            match error {
                ResumeError::Ring(why) => RestoreError::Ring { chunk, field: "write_index", why },
                ResumeError::Room { promised, free } => {
                    RestoreError::Room { chunk, promised, free }
                }
            }
        })
    });
    match installed {
        Ok(()) => receiver.line().extend(line),
        Err(_) => traffic.forget_restored(line.into_iter().map(|waiting| waiting.body)),
    }
    installed
}

/// Gives each packet a body.
fn fill_line(
    traffic: &mut Traffic,
    incoming: &Incoming,
    line: &mut Vec<Waiting>,
) -> Result<(), RestoreError> {
    for (order, (chunk, packet)) in (0..).zip(incoming.iter()) {
        let body = traffic.body_for_restored();
        let mut body = body.ok_or(RestoreError::Resources("packets in the pool"))?;
        body.order = order;
        let filled = fill(&mut body, &packet, chunk);
        let (why, failed) = match filled {
            Ok(why) => (why, Ok(())),
            Err(error) => (Why::Completed, Err(error)),
        };
        line.push(Waiting { body, why });
        failed?;
    }
    Ok(())
}

/// Refuses one record more than the channel's record states.
fn count_one(
    chunk: u32,
    record: &'static str,
    found: u32,
    stated: u32,
) -> Result<(), RestoreError> {
    let found = found.saturating_add(1);
    if found > stated {
        // What is stated was held against the bound.
        return Err(RestoreError::Count { chunk, record, found, stated, most: stated });
    }
    Ok(())
}

/// What ends a stream.
const END: &str = saved_state::end::EndRecord::KIND.name;

impl Packet {
    /// Brings the packet back to where it was when it was saved: queued for the ring, or waiting for the
    /// peer's completion. Its completion routine will run later; until then it is not the driver's.
    /// Only in [`SaveRestorePacket::restore_packet`], with the `library_state` given there.
    ///
    /// # Errors
    /// The packet, and why (D-28): [`Error::Argument`] 1 for a packet of a channel that is not asking
    /// for one; [`Error::ForeignState`] 3 for another length, 2 for other bytes than those, or where
    /// they have brought back a packet already.
    ///
    /// Source: VmbPacketRestore; D-25, D-28.
    pub fn restore(self, library_state: &[u8]) -> Result<(), SendError> {
        let channel = self.channel().clone();
        let mut slot = lock(&channel.shared.restore);
        let refused = match &mut slot.current {
            None => Error::Argument { position: 1, name: "PacketObject", value: 0 },
            Some(current) if current.length != library_state.len() => {
                Error::ForeignState { position: 3 }
            }
            Some(current) if current.restored.is_some() || !current.is(library_state) => {
                Error::ForeignState { position: 2 }
            }
            Some(current) => {
                current.restored = self.into_body();
                return Ok(());
            }
        };
        drop(slot);
        Err(SendError { packet: self, error: refused })
    }
}
