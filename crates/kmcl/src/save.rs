//! Saving a channel: the documented calls, and the session that they and the Rust interface share.
//!
//! The state is a stream of chunks (`docs/saved-state.md`): the channel, each outgoing packet in flight
//! with what its driver keeps of it, and each incoming packet that nobody has. A channel that was
//! frozen has those of its device as well. The session keeps a place and nothing else, and what it
//! passes does not move: while it lasts nothing is sent and life-cycle events wait.
//!
//! Source: kmcl-semantics section 15; D-5, D-14 to D-24, D-32.

use saved_state::channel::{
    ChannelRecord, Fence as SavedFence, HandedBack, IncomingPacketRecord, KINDS,
    OutgoingPacketRecord, PAUSED_KINDS, Place,
};
use saved_state::text::Producer;
use saved_state::{
    FormatVersion, HeaderFlags, Save, SaveStep, Step, StreamInfo, StreamKind, StreamWriter,
    WriteError,
};
use vmbus_wire::guid::Guid;
use vmbus_wire::status::NtStatus;

use crate::callbacks::SaveRestorePacket;
use crate::channel::{Channel, lock};
use crate::error::Error;
use crate::fenced::Fence;
use crate::lifecycle::{ChannelState, Side};
use crate::packet::{Packet, PacketBody};
use crate::pool::{Body, External};
use crate::traffic::{LentPacket, RingState, SavedPlace, Traffic};
use crate::waiting::Why;

/// Most bytes that a driver keeps with an outgoing packet.
pub const MAX_DRIVER_STATE: u32 = 1 << 20;
const _: () = assert!(MAX_DRIVER_STATE as usize == saved_state::limits::MAX_OWN_STATE_BYTES);

/// How a state is written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SaveOptions {
    /// The version of the format: an older one for an older program that is to read it.
    pub format: FormatVersion,
    /// Name and version of the program that saves; for people.
    pub producer: Producer,
}

impl Default for SaveOptions {
    /// The newest format, by this library.
    fn default() -> Self {
        const NAME: &str = concat!("kmcl ", env!("CARGO_PKG_VERSION"));
        let producer = Producer::new(NAME).unwrap_or(Producer::EMPTY);
        Self { format: FormatVersion::NEWEST, producer }
    }
}

/// Why a save has ended before its time. The channel goes on as if it had not begun.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelSaveError {
    /// It is over already: finished, failed, or ended because the channel was disabled or thawed.
    #[error("the save of the channel is over")]
    Over,
    /// It cannot go on inside a callback of its own channel.
    #[error("a save cannot go on inside a callback of its channel")]
    InCallback,
    /// The driver's callback failed for a packet (D-21).
    #[error("the driver cannot save a packet: {status}")]
    Driver {
        /// What it said.
        status: NtStatus,
    },
    /// The driver says that it wrote more than it was given room for (D-22).
    #[error("the driver wrote {written} bytes of a packet's state into a buffer of {room}")]
    DriverOverran {
        /// Bytes that it claims.
        written: u32,
        /// Bytes of the buffer.
        room: u32,
    },
    /// The driver keeps more than [`MAX_DRIVER_STATE`] bytes with a packet.
    #[error("the driver keeps {bytes} bytes with a packet, limit {MAX_DRIVER_STATE}")]
    DriverState {
        /// Bytes asked for.
        bytes: u32,
    },
    /// The state cannot be said in the format.
    #[error(transparent)]
    Format(#[from] WriteError),
}

impl ChannelSaveError {
    /// What VmbChannelSaveContinue returns for it.
    #[must_use]
    pub fn status(&self) -> NtStatus {
        match self {
            Self::Over | Self::InCallback => NtStatus::INVALID_DEVICE_STATE,
            Self::Driver { status } => *status,
            Self::DriverOverran { .. } | Self::DriverState { .. } => NtStatus::INVALID_BUFFER_SIZE,
            Self::Format(_) => NtStatus::UNSUCCESSFUL,
        }
    }
}

/// A save of one channel that is under way. It ends when it is dropped, and the channel goes on; one
/// that was frozen stays so.
///
/// ```no_run
/// # fn example(channel: &kmcl::Channel) -> Result<(), Box<dyn std::error::Error>> {
/// use kmcl::Save as _;
///
/// channel.pause();
/// let mut state = Vec::new();
/// channel.save()?.write_to(&mut state)?;
/// channel.start();
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ChannelSave {
    channel: Channel,
    state: Box<SaveState>,
}

impl Save for ChannelSave {
    type Error = ChannelSaveError;

    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, ChannelSaveError> {
        self.state.step(&self.channel, buffer)
    }
}

impl Drop for ChannelSave {
    fn drop(&mut self) {
        self.channel.end_session(&self.state);
    }
}

/// What [`Channel::save_continue`] answers: VmbChannelSaveContinue's status and both of its outputs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub struct SaveContinue {
    /// STATUS_SUCCESS: all is saved. STATUS_BUFFER_OVERFLOW: go on. STATUS_BUFFER_TOO_SMALL: go on with
    /// a larger buffer. Anything else: the save has failed (D-14, D-17, D-21).
    pub status: NtStatus,
    /// Bytes written; 0 on failure (D-16).
    pub bytes_filled: u32,
    /// Bytes that the next call needs; 0 on success and on failure (D-15, D-16).
    pub bytes_required: u32,
}

impl Channel {
    /// Begins a save: see [`ChannelSave`].
    ///
    /// # Errors
    /// As for [`Self::save_begin`].
    pub fn save(&self) -> Result<ChannelSave, Error> {
        self.save_with(&SaveOptions::default())
    }

    /// As [`Self::save`], in another version of the format or another program's name.
    ///
    /// # Errors
    /// As for [`Self::save_begin`].
    pub fn save_with(&self, options: &SaveOptions) -> Result<ChannelSave, Error> {
        let state = self.begin_session(options)?;
        Ok(ChannelSave { channel: self.clone(), state })
    }

    /// Begins a save. The packets that are in flight now are in it (D-20).
    ///
    /// # Errors
    /// [`Error::State`] unless the channel is a server's and Enabled, Paused or Closed (D-5, D-32) or
    /// frozen, and while a save (D-17) or a restore is under way; [`Error::Running`] for a frozen channel whose
    /// device has packets that it has neither completed nor handed over; [`Error::Format`] where the
    /// version of the format that was asked for cannot say what is to be saved.
    ///
    /// Source: VmbChannelSaveBegin.
    pub fn save_begin(&self) -> Result<(), Error> {
        let state = self.begin_session(&SaveOptions::default())?;
        *lock(&self.shared.save) = Some(state);
        Ok(())
    }

    /// Goes on with the save: writes as many whole chunks as `buffer` holds. At most 4 GiB of it are
    /// used (D-30).
    ///
    /// Source: VmbChannelSaveContinue; D-14 to D-17, D-21.
    pub fn save_continue(&self, buffer: &mut [u8]) -> SaveContinue {
        let answer = |status, filled: usize, required: usize| SaveContinue {
            status,
            bytes_filled: u32::try_from(filled).unwrap_or(u32::MAX),
            bytes_required: u32::try_from(required).unwrap_or(u32::MAX),
        };
        let most = buffer.len().min(u32::MAX as usize);
        let buffer = buffer.get_mut(..most).unwrap_or_default();
        // Taken out: callbacks run in the step, and no lock is held across one.
        let Some(mut state) = lock(&self.shared.save).take() else {
            return answer(NtStatus::INVALID_DEVICE_STATE, 0, 0);
        };
        let step = state.step(self, buffer);
        // Unless another save was begun meanwhile, which ends this one.
        lock(&self.shared.save).get_or_insert(state);
        match step {
            Ok(SaveStep { written, done: true, .. }) => answer(NtStatus::SUCCESS, written, 0),
            Ok(SaveStep { written: 0, needed, .. }) => {
                answer(NtStatus::BUFFER_TOO_SMALL, 0, needed)
            }
            Ok(SaveStep { written, needed, .. }) => {
                answer(NtStatus::BUFFER_OVERFLOW, written, needed)
            }
            Err(error) => answer(error.status(), 0, 0),
        }
    }

    /// Ends the save, finished or not; nothing where there is none (D-17).
    ///
    /// Source: VmbChannelSaveEnd.
    pub fn save_end(&self) {
        let state = lock(&self.shared.save).take();
        if let Some(state) = state {
            self.end_session(&state);
        }
    }

    fn begin_session(&self, options: &SaveOptions) -> Result<Box<SaveState>, Error> {
        let wrong = || Error::State { function: "save", state: self.state() };
        let _stepping = self.stepping().ok_or_else(wrong)?;
        if self.side() != Side::Server || self.is_being_restored() {
            return Err(wrong());
        }
        let frozen = self.shared.hold.is_frozen();
        if frozen {
            let packets = self.traffic().running();
            if packets != 0 {
                return Err(Error::Running { packets });
            }
        } else if !can_be_saved(self.state()) {
            return Err(wrong());
        }
        let number = self.shared.hold.begin_save().ok_or_else(wrong)?;
        self.with_line(|traffic, line| {
            if !frozen {
                traffic.stand_still(line);
            }
            traffic.sort_waiting();
        });
        match SaveState::new(self, options, frozen, number) {
            Ok(state) => Ok(Box::new(state)),
            Err(error) => {
                if self.shared.hold.end_save(Some(number)) {
                    self.resume_traffic();
                }
                Err(Error::Format(error))
            }
        }
    }

    fn end_session(&self, state: &SaveState) {
        if !self.shared.hold.is_saving(state.number) {
            return;
        }
        // There is none inside a callback that a save calls: it is in the hands of that very save.
        let Some(stepping) = self.stepping() else { return };
        if self.shared.hold.end_save(Some(state.number)) {
            self.resume_traffic();
        }
        drop(stepping);
        self.drive_unless_driven();
    }
}

/// D-5, D-32: enabled and not Active, and nothing on its way between two states.
fn can_be_saved(state: ChannelState) -> bool {
    matches!(state, ChannelState::Enabled | ChannelState::Paused | ChannelState::Closed)
}

/// Where a save is, and nothing of what it has passed.
#[derive(Debug)]
pub(crate) struct SaveState {
    /// Which save of its channel it is.
    number: u64,
    writer: StreamWriter,
    record: ChannelRecord,
    next: Next,
    /// Packets written, in each direction.
    order: u32,
    /// The last packet that was queued when the save began.
    last_queued: u64,
    /// What the driver keeps with the packet at hand.
    driver_state: Vec<u8>,
    /// Whose it is, if the buffer was too small for its chunk: the driver is not asked again.
    asked: Option<SavedPlace>,
    over: bool,
}

/// The chunk to write next.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Next {
    Header,
    Channel,
    /// The outgoing packet behind this one.
    Outgoing(Option<SavedPlace>),
    /// A completion that is held.
    Held(usize),
    /// A packet that waits.
    Waiting(usize),
    /// A packet from a restore whose rings have not come yet.
    Restored(usize),
    End,
}

impl SaveState {
    fn new(
        channel: &Channel,
        options: &SaveOptions,
        frozen: bool,
        number: u64,
    ) -> Result<Self, WriteError> {
        let record = channel.record(frozen);
        let settings = channel.settings();
        let items = record.outgoing_packets.saturating_add(record.incoming_packets);
        let flags = if frozen { HeaderFlags::FROZEN } else { HeaderFlags::default() };
        let info = StreamInfo {
            stream: StreamKind::CHANNEL,
            flags,
            interface_type: settings.interface_type,
            interface_instance: settings.interface_instance.unwrap_or(Guid::ZERO),
            producer: options.producer,
            chunks: items.saturating_add(3),
            bytes: 0,
            items,
        };
        let kinds = if record.incoming_packets == 0 && !frozen { PAUSED_KINDS } else { KINDS };
        let writer = StreamWriter::new(options.format, info, kinds)?;
        let last_queued = channel.traffic().last_queued();
        Ok(Self {
            number,
            writer,
            record,
            next: Next::Header,
            order: 0,
            last_queued,
            driver_state: Vec::new(),
            asked: None,
            over: false,
        })
    }

    fn step(&mut self, channel: &Channel, buffer: &mut [u8]) -> Result<SaveStep, ChannelSaveError> {
        // With it nothing else can end the save, or change what is being saved.
        let _stepping = channel.stepping().ok_or(ChannelSaveError::InCallback)?;
        if self.over || !channel.shared.hold.is_saving(self.number) {
            return Err(ChannelSaveError::Over);
        }
        let callbacks = lock(&channel.shared.settings).save_restore.clone();
        let mut lender = Lender::new(channel, callbacks.as_deref());
        let mut written = 0;
        loop {
            let room = buffer.get_mut(written..).unwrap_or_default();
            match self.chunk(&mut lender, room) {
                Ok(Step::Written { bytes }) => written += bytes,
                Ok(Step::Needs { bytes: needed }) => {
                    return Ok(SaveStep { written, needed, done: false });
                }
                Err(error) => {
                    self.over = true;
                    return Err(error);
                }
            }
            if self.writer.is_ended() {
                self.over = true;
                return Ok(SaveStep { written, needed: 0, done: true });
            }
        }
    }

    /// Writes the next chunk, or says what room it takes.
    fn chunk(
        &mut self,
        lender: &mut Lender<'_>,
        room: &mut [u8],
    ) -> Result<Step, ChannelSaveError> {
        let channel = lender.channel;
        let (step, then) = loop {
            break match self.next {
                Next::Header => (self.writer.header(room)?, Next::Channel),
                Next::Channel => (self.writer.record(&self.record, room)?, Next::Outgoing(None)),
                Next::Outgoing(after) => {
                    if !lender.lend_next(after, self.last_queued) {
                        self.order = 0;
                        self.next = Next::Held(0);
                        continue;
                    }
                    (self.outgoing(lender, room)?, Next::Outgoing(lender.place))
                }
                Next::Held(at) => match self.held(&channel.traffic(), at, room) {
                    Some(step) => (step?, Next::Held(at + 1)),
                    None => {
                        self.next = Next::Waiting(0);
                        continue;
                    }
                },
                Next::Waiting(at) => match self.waiting(&channel.traffic(), at, room) {
                    Some(step) => (step?, Next::Waiting(at + 1)),
                    None => {
                        self.next = Next::Restored(0);
                        continue;
                    }
                },
                Next::Restored(at) => match self.restored(channel, at, room) {
                    Some(step) => (step?, Next::Restored(at + 1)),
                    None => {
                        self.next = Next::End;
                        continue;
                    }
                },
                Next::End => (self.writer.end(room)?, Next::End),
            };
        };
        if matches!(step, Step::Written { .. }) {
            if !matches!(self.next, Next::Header | Next::Channel | Next::End) {
                self.order += 1;
            }
            self.next = then;
            self.asked = None;
        }
        Ok(step)
    }

    fn outgoing(&mut self, lender: &Lender<'_>, room: &mut [u8]) -> Result<Step, ChannelSaveError> {
        match lender.callbacks {
            Some(callbacks) if self.asked != lender.place => {
                ask(callbacks, lender.channel, &lender.packet, &mut self.driver_state)?;
                self.asked = lender.place;
            }
            Some(_) => {}
            None => self.driver_state.clear(), // D-24
        }
        let packet = lender.packet.body().ok_or(ChannelSaveError::Over)?;
        let record = OutgoingPacketRecord {
            order: self.order,
            place: saved_place(lender.id, packet),
            extension: packet.extension(),
            driver_state: &self.driver_state,
        };
        Ok(self.writer.record(&record, room)?)
    }

    fn held(
        &mut self,
        traffic: &Traffic,
        at: usize,
        room: &mut [u8],
    ) -> Option<Result<Step, WriteError>> {
        let body = traffic.held_at(at)?;
        Some(self.writer.record(&finished(body, self.order), room))
    }

    fn waiting(
        &mut self,
        traffic: &Traffic,
        at: usize,
        room: &mut [u8],
    ) -> Option<Result<Step, WriteError>> {
        let waiting = traffic.waiting_at(at)?;
        let body = &*waiting.body;
        let (fence, handed_back, device_state): (_, _, &[u8]) = match &waiting.why {
            Why::Completed => {
                return Some(self.writer.record(&finished(body, self.order), room));
            }
            Why::HandedBack { after_memory: true, .. } => {
                (SavedFence::NeverStarted, HandedBack::AfterMemory, &[])
            }
            Why::HandedBack { .. } => (SavedFence::NeverStarted, HandedBack::AtPassive, &[]),
            Why::HandedOver { fence, state } => {
                let fence = match fence {
                    Fence::NeverStarted => SavedFence::NeverStarted,
                    Fence::Cancelled => SavedFence::Cancelled,
                };
                (fence, HandedBack::No, state)
            }
        };
        let refused_external_bytes = match body.external {
            External::TooMuch { bytes } => bytes,
            _ => 0,
        };
        // Where it is too much it was not kept.
        let extension = if refused_external_bytes == 0 { body.extension() } else { &[] };
        let record = IncomingPacketRecord {
            order: self.order,
            transaction_id: body.transaction_id,
            wants_completion: body.wants_completion,
            fence,
            handed_back,
            payload: body.payload(),
            extension: zerocopy::IntoBytes::as_bytes(extension),
            refused_external_bytes,
            client_context: body.saved_context(),
            device_state,
        };
        Some(self.writer.record(&record, room))
    }

    fn restored(
        &mut self,
        channel: &Channel,
        at: usize,
        room: &mut [u8],
    ) -> Option<Result<Step, WriteError>> {
        let slot = lock(&channel.shared.restore);
        let (_, record) = slot.waiting_for_rings()?.incoming.get(at)?;
        Some(self.writer.record(&IncomingPacketRecord { order: self.order, ..record }, room))
    }
}

/// A packet whose completion waits to leave. Nothing else of it is needed any more.
fn finished(body: &Body, order: u32) -> IncomingPacketRecord<'_> {
    IncomingPacketRecord {
        order,
        transaction_id: body.transaction_id,
        wants_completion: body.wants_completion,
        fence: SavedFence::Finished { completion: body.payload() },
        handed_back: HandedBack::No,
        payload: &[],
        extension: &[],
        refused_external_bytes: 0,
        client_context: &[],
        device_state: &[],
    }
}

fn saved_place(id: Option<u64>, packet: &PacketBody) -> Place<'_> {
    match id {
        Some(transaction_id) => Place::InRing { transaction_id },
        None => Place::Queued { message: packet.message(), transaction: packet.transaction },
    }
}

/// The two calls of EvtVmbChannelSavePacket: how much, then what.
fn ask(
    callbacks: &dyn SaveRestorePacket,
    channel: &Channel,
    packet: &Packet,
    into: &mut Vec<u8>,
) -> Result<(), ChannelSaveError> {
    into.clear();
    let driver = |status| ChannelSaveError::Driver { status };
    let bytes = callbacks.state_size(channel, packet).map_err(driver)?;
    if bytes == 0 {
        return Ok(());
    }
    if bytes > MAX_DRIVER_STATE {
        return Err(ChannelSaveError::DriverState { bytes });
    }
    into.resize(bytes as usize, 0);
    let written = callbacks.save_packet(channel, packet, into).map_err(driver)?;
    if written > bytes {
        return Err(ChannelSaveError::DriverOverran { written, room: bytes });
    }
    into.truncate(written as usize);
    Ok(())
}

/// Lends packets in flight to their driver, one at a time, for a look: no lock is held while it has one.
/// Whoever has the lender has the right to step the channel, so that nothing comes for a packet that is
/// lent.
struct Lender<'a> {
    channel: &'a Channel,
    callbacks: Option<&'a dyn SaveRestorePacket>,
    /// The one that is lent, in the shape in which its driver knows it.
    packet: Packet,
    place: Option<SavedPlace>,
    id: Option<u64>,
    /// Keeps a place that cannot be empty.
    stand_in: Option<Box<PacketBody>>,
}

impl<'a> Lender<'a> {
    fn new(channel: &'a Channel, callbacks: Option<&'a dyn SaveRestorePacket>) -> Self {
        Self {
            channel,
            callbacks,
            packet: Packet::empty(channel.clone()),
            place: None,
            id: None,
            stand_in: Some(Box::new(PacketBody::new(0))),
        }
    }

    /// Takes the next one, up to number `last` of those that are queued, and puts the one before back.
    fn lend_next(&mut self, after: Option<SavedPlace>, last: u64) -> bool {
        let mut traffic = self.channel.traffic();
        self.put_back(&mut traffic);
        let Some(lent) = traffic.lend_next(after, last, &mut self.stand_in) else { return false };
        let LentPacket { place, id, body } = lent;
        (self.place, self.id) = (Some(place), id);
        self.packet.put_body(body);
        true
    }

    fn put_back(&mut self, traffic: &mut Traffic) {
        if let (Some(place), Some(body)) = (self.place.take(), self.packet.take_body()) {
            traffic.put_back(place, body, &mut self.stand_in);
        }
    }
}

impl Drop for Lender<'_> {
    fn drop(&mut self) {
        let channel = self.channel;
        self.put_back(&mut channel.traffic());
    }
}

impl Channel {
    /// What is saved of the channel beside its packets.
    fn record(&self, frozen: bool) -> ChannelRecord {
        let settings = self.settings();
        let mut incoming = None;
        self.with_receiver(|receiver| {
            incoming = receiver.as_ref().map(|receiver| receiver.ring_state());
            receiver
        });
        let (started, user_data) = {
            let control = lock(&self.shared.control);
            (control.life.is_started(), control.user_data)
        };
        let mut record = {
            let traffic = self.traffic();
            let outgoing = traffic.ring_state();
            let RingState { data_len: incoming_ring_bytes, index: read_index } =
                incoming.unwrap_or_default();
            let RingState { data_len: outgoing_ring_bytes, index: write_index } =
                outgoing.unwrap_or_default();
            ChannelRecord {
                side: saved_state::channel::Side::Server.into(),
                started,
                open: outgoing.is_some(),
                frozen,
                incoming_ring_bytes,
                outgoing_ring_bytes,
                read_index,
                write_index,
                transaction_quota: traffic.quota,
                maximum_packet_size: settings.maximum_packet_size,
                maximum_external_data: settings.external_data_size,
                maximum_external_ranges: settings.external_data_ranges,
                maximum_completion_size: settings.completion_size(),
                maximum_packet_count: settings.maximum_packet_count,
                client_context_size: settings.client_context_size,
                pipe: settings.is_pipe(),
                subchannel_index: u32::from(settings.subchannel_index),
                user_data: user_data.map_or_else(Vec::new, Vec::from),
                outgoing_packets: count(traffic.saved_outgoing()),
                incoming_packets: count(traffic.saved_incoming()),
                transaction_uses: traffic.most_uses(),
                processing_at_passive: self.requires_passive(),
                stopped: self.is_stopped(),
            }
        };
        // Rings that a restore waits for are still where they were.
        if let Some(rings) = lock(&self.shared.restore).waiting_for_rings() {
            let before = &rings.record;
            record.open = true;
            record.incoming_ring_bytes = before.incoming_ring_bytes;
            record.outgoing_ring_bytes = before.outgoing_ring_bytes;
            record.read_index = before.read_index;
            record.write_index = before.write_index;
            record.user_data.clone_from(&before.user_data);
            record.incoming_packets = count(rings.incoming.len());
            record.stopped = before.stopped;
        }
        record
    }
}

/// Bounded by [`Limits::PACKETS`](crate::Limits::PACKETS).
fn count(packets: usize) -> u32 {
    u32::try_from(packets).unwrap_or(u32::MAX)
}
