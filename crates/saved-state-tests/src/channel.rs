//! A server's channel that is saved in the middle of its work, and what must come of it wherever it is
//! restored: every transaction that was in flight ends exactly once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use kmcl::{
    Channel, ChannelFlags, ChannelState, ExternalDataFlags, Guid, IncomingPacket, Level, NtStatus,
    Packet, PacketCompletion, ProcessPacket, RestoreFromError, ResumedPacket, Save as _,
    SaveOptions, SaveRestorePacket, SendFlags, Side, StateChange,
};
use saved_state::channel::{
    ChannelRecord, Fence, HandedBack, INCOMING_PACKET, IncomingPacketRecord, KINDS,
    OUTGOING_PACKET, OutgoingPacketRecord, Place,
};
use saved_state::{StreamKind, StreamReader};
use vmbus_wire::packet::PacketKind;

use crate::guest::{HandBus, Rings, Standing, Taken, lock};

/// The protocol of the channels that are saved here.
pub const TYPE: Guid = Guid::from_u128(0x6b6d_636c_5ad5_4000_8000_7374_6174_6573);
/// Their instance.
pub const INSTANCE: Guid = Guid::from_u128(0x6b6d_636c_5ad5_4000_8000_0000_0000_0001);

/// Packets that one turn takes: more than ever are in flight.
const BUDGET: u32 = 4096;
/// Guest memory: rings, and pages for external data at its end.
const MEMORY_BYTES: u64 = 4 << 20;
/// A page of guest memory that no ring is in.
const DATA_PFN: u64 = MEMORY_BYTES / 4096 - 1;

/// How a channel is set up. A channel is restored into one that is set up alike.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Setup {
    /// Largest message, in bytes.
    pub packet_size: u32,
    /// Bytes of a completion.
    pub completion_size: u32,
    /// Incoming packets.
    pub packets: u32,
    /// Bytes of external data, and ranges.
    pub external: (u32, u32),
    /// Bytes of the device's area on a packet.
    pub context: u32,
    /// Whether payloads have a pipe's header.
    pub pipe: bool,
    /// Pages of each ring, control page included: read by the server, written by it.
    pub pages: (u32, u32),
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            packet_size: 512,
            completion_size: 64,
            packets: 256,
            external: (8192, 4),
            context: 8,
            pipe: false,
            pages: (33, 17),
        }
    }
}

impl Setup {
    /// How the channel was set up that has such a record.
    #[must_use]
    pub fn of(record: &ChannelRecord) -> Self {
        let pages = |bytes: u32| if bytes == 0 { 9 } else { bytes / 4096 + 1 };
        Self {
            packet_size: record.maximum_packet_size,
            completion_size: record.maximum_completion_size,
            packets: record.maximum_packet_count,
            external: (record.maximum_external_data, record.maximum_external_ranges),
            context: record.client_context_size,
            pipe: record.pipe,
            pages: (pages(record.incoming_ring_bytes), pages(record.outgoing_ring_bytes)),
        }
    }
}

// ---- The device -----------------------------------------------------------------------------------------

/// What the device does with a request, by the first byte of its payload.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Fate {
    /// Keeps it, and has not begun with it when the channel freezes.
    NeverStarted = 1,
    /// Keeps it, and cancels it when the channel freezes.
    Cancelled = 2,
    /// Keeps it, and completes it when the channel is frozen.
    Finished = 3,
    /// Gives it back, for a thread that may sleep.
    Deferred = 4,
}

/// How a request was seen by the device that it was resumed by.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Resumed {
    /// The peer's id.
    pub transaction_id: u64,
    /// What it says.
    pub payload: Vec<u8>,
    /// What had become of its original I/O; `None` for one that comes as it came first.
    pub fence: Option<kmcl::Fence>,
    /// What the device had kept with it.
    pub device_state: Vec<u8>,
    /// The device's area on it.
    pub context: Vec<u8>,
    /// Bytes of its external data, if it has any that could be looked at.
    pub external_bytes: Option<u32>,
}

/// A device that keeps its requests, settles them when its channel freezes, and sends packets.
#[derive(Default)]
pub struct Device {
    kept: Mutex<Vec<IncomingPacket>>,
    resumed: Mutex<Vec<Resumed>>,
    ended: Arc<Ended>,
    /// What happens to a driver's state that it is asked to bring back.
    refuses: Mutex<Option<NtStatus>>,
}

/// Packets of the device's that have ended.
#[derive(Default)]
struct Ended(Mutex<Vec<(NtStatus, Vec<u8>)>>);

impl PacketCompletion for Ended {
    fn completed(&self, packet: Packet, status: NtStatus, payload: &[u8]) {
        drop(packet);
        lock(&self.0).push((status, payload.to_vec()));
    }
}

impl StateChange for Device {}

/// The device's answer to a request.
fn answer(payload: &[u8]) -> Vec<u8> {
    payload.iter().take(16).map(|byte| !byte).collect()
}

impl ProcessPacket for Device {
    fn process_packet(&self, _: &Channel, mut packet: IncomingPacket) {
        let fate = packet.payload().first().copied().unwrap_or(0);
        if fate == Fate::Deferred as u8 && packet.level() == Level::Dispatch {
            return packet.defer_to_passive();
        }
        let number = packet.payload().get(1).copied().unwrap_or(0);
        packet.client_context().fill(number);
        if fate == Fate::Deferred as u8 {
            lock(&self.resumed).push(seen(&mut packet, None, &[]));
            let answer = answer(packet.payload());
            return packet.complete(&answer);
        }
        lock(&self.kept).push(packet);
    }

    fn resume_packet(&self, _: &Channel, packet: ResumedPacket) {
        let (fence, state) = (packet.fence(), packet.device_state().to_vec());
        let mut packet = packet.into_packet();
        lock(&self.resumed).push(seen(&mut packet, Some(fence), &state));
        let answer = answer(packet.payload());
        packet.complete(&answer);
    }

    fn freeze(&self, _: &Channel) {
        for packet in lock(&self.kept).drain(..) {
            let payload = packet.payload().to_vec();
            match payload.first() {
                Some(&fate) if fate == Fate::Finished as u8 => packet.complete(&answer(&payload)),
                Some(&fate) if fate == Fate::Cancelled as u8 => {
                    packet.cancelled().hand_over(b"half of it is done").unwrap();
                }
                _ => packet.never_started().hand_over(&[]).unwrap(),
            }
        }
    }
}

fn seen(packet: &mut IncomingPacket, fence: Option<kmcl::Fence>, state: &[u8]) -> Resumed {
    let external = packet.external_data(ExternalDataFlags::empty());
    let external_bytes = external.ok().map(|data| data.len());
    Resumed {
        transaction_id: packet.transaction_id(),
        payload: packet.payload().to_vec(),
        fence,
        device_state: state.to_vec(),
        context: packet.client_context().to_vec(),
        external_bytes,
    }
}

impl SaveRestorePacket for Device {
    fn state_size(&self, _: &Channel, packet: &Packet) -> Result<u32, NtStatus> {
        Ok(u32::try_from(packet.pointer() % 3 * 8).unwrap())
    }

    fn save_packet(
        &self,
        _: &Channel,
        packet: &Packet,
        buffer: &mut [u8],
    ) -> Result<u32, NtStatus> {
        buffer.fill(u8::try_from(packet.pointer() % 251).unwrap());
        Ok(u32::try_from(buffer.len()).unwrap())
    }

    fn restore_packet(&self, channel: &Channel, lib: &[u8], own: &[u8]) -> Result<(), NtStatus> {
        if let Some(status) = *lock(&self.refuses) {
            return Err(status);
        }
        let mut packet = channel.packet_allocate().ok_or(NtStatus::INSUFFICIENT_RESOURCES)?;
        // What the two calls above make the same bytes of again.
        let byte = own.first().map_or(0, |&byte| usize::from(byte));
        let third = own.len() / 8 % 3;
        let again = (0..3).map(|turn| byte + 251 * turn).find(|pointer| pointer % 3 == third);
        packet.set_pointer(if third == 0 { 0 } else { again.unwrap_or(0) });
        packet.set_completion_routine(Arc::clone(&self.ended) as _);
        packet.restore(lib).map_err(|refused| refused.error.status())
    }
}

// ---- The server ------------------------------------------------------------------------------------------

/// A server's channel, its device, and the guest at the other end.
pub struct Server {
    /// What carries it.
    pub bus: Arc<HandBus>,
    /// The channel.
    pub channel: Channel,
    /// Its device.
    pub device: Arc<Device>,
    setup: Setup,
}

impl Server {
    /// A server that is enabled. Nobody has opened its channel.
    #[must_use]
    pub fn new(setup: Setup) -> Self {
        let bus = HandBus::new(MEMORY_BYTES);
        let device = Arc::new(Device::default());
        let channel = Channel::allocate(Side::Server, Arc::clone(&bus) as _);
        channel.server_init_set_target_interface_id(TYPE, INSTANCE).unwrap();
        channel.init_set_maximum_packet_size(setup.packet_size).unwrap();
        channel.init_set_maximum_completion_size(setup.completion_size).unwrap();
        channel.init_set_maximum_packet_count(setup.packets).unwrap();
        if setup.external != (0, 0) {
            channel.init_set_maximum_external_data(setup.external.0, setup.external.1).unwrap();
        }
        channel.init_set_client_context_size(setup.context).unwrap();
        if setup.pipe {
            channel.init_set_flags(ChannelFlags::IS_PIPE).unwrap();
        }
        channel.init_set_state_change_callbacks(Arc::clone(&device) as _).unwrap();
        channel.init_set_process_packet_callbacks(Arc::clone(&device) as _).unwrap();
        channel.server_init_set_save_restore_packet_callbacks(Arc::clone(&device) as _).unwrap();
        channel.enable().unwrap();
        Self { bus, channel, device, setup }
    }

    /// The guest opens the channel.
    #[must_use]
    pub fn open(&self, standing: Standing) -> Rings {
        let rings = self.bus.open(self.setup.pages, standing);
        self.channel.process(BUDGET);
        rings
    }

    /// Lets the channel go on until nothing moves.
    pub fn run(&self) {
        while self.channel.process(BUDGET).more {}
    }

    /// As [`Self::run`], on a thread that must not sleep.
    pub fn run_at_dispatch(&self) {
        while self.channel.process_at(Level::Dispatch, BUDGET).more {}
    }

    /// Sends `count` packets that the peer is to complete, each with a number as its pointer.
    pub fn send(&self, count: usize, message: &[u8]) {
        for number in 0..count {
            let mut packet = self.channel.packet_allocate().unwrap();
            packet.set_pointer(number);
            packet.set_completion_routine(Arc::clone(&self.device.ended) as _);
            packet.send(message, None, SendFlags::WAIT_FOR_COMPLETION).unwrap();
        }
    }

    /// Has every packet of a driver's refused that is brought back.
    pub fn refuse_packets(&self, status: Option<NtStatus>) {
        *lock(&self.device.refuses) = status;
    }

    /// The state of the channel, frozen for it; the channel is gone then.
    #[must_use]
    pub fn move_away(self) -> Vec<u8> {
        self.move_away_with(&SaveOptions::default())
    }

    /// As [`Self::move_away`], in another format or another program's name.
    #[must_use]
    pub fn move_away_with(self, options: &SaveOptions) -> Vec<u8> {
        let frozen = self.channel.freeze().unwrap();
        let mut state = Vec::new();
        frozen.save_with(options).unwrap().write_to(&mut state).unwrap();
        frozen.move_away();
        assert_eq!(self.channel.state(), ChannelState::Disabled);
        state
    }

    /// What a save of the frozen channel gives. The channel goes on.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        let frozen = self.channel.freeze().unwrap();
        let mut state = Vec::new();
        frozen.save().unwrap().write_to(&mut state).unwrap();
        state
    }

    /// That nothing of a restore that failed is left.
    pub fn assert_untouched(&self, before: ChannelState) {
        assert_eq!(self.channel.state(), before);
        assert_eq!(self.channel.outgoing_in_use(), (0, 0));
        assert_eq!(self.channel.incoming_outstanding(), 0);
        assert_eq!(self.channel.stop_reason(), None);
    }

    /// Ends the channel, and sees to it that nothing is left. The guest has dropped its rings.
    pub fn assert_ends(&self) {
        // A channel waits for its device before it is disabled.
        let kept = std::mem::take(&mut *lock(&self.device.kept));
        drop(kept);
        self.channel.disable();
        assert_eq!(self.channel.outgoing_in_use(), (0, 0));
        assert_eq!(self.channel.incoming_outstanding(), 0);
        assert_eq!(self.bus.free_pages(), MEMORY_BYTES / 4096);
    }

    /// Requests that have come to the device again since the last look, in their order.
    #[must_use]
    pub fn take_resumed(&self) -> Vec<Resumed> {
        std::mem::take(&mut *lock(&self.device.resumed))
    }

    /// How packets of the device's have ended since the last look.
    #[must_use]
    pub fn take_ended(&self) -> Vec<(NtStatus, Vec<u8>)> {
        std::mem::take(&mut *lock(&self.device.ended.0))
    }
}

/// The payload of a request: what becomes of it, a number, and `len` bytes in all.
#[must_use]
pub fn request(fate: Fate, number: u8, len: usize) -> Vec<u8> {
    let mut payload = vec![fate as u8, number];
    payload.resize(len.max(8).next_multiple_of(8), number.wrapping_mul(7));
    payload
}

/// The extension of a request whose external data is `bytes` of the last page.
#[must_use]
pub fn external(bytes: u32) -> [u64; 3] {
    [1 << 32, u64::from(bytes), DATA_PFN]
}

// ---- What is in a state, and what must come of it ------------------------------------------------------

/// A channel's state, taken apart.
#[derive(Clone, Debug)]
pub struct Parts<'a> {
    /// The channel.
    pub record: ChannelRecord,
    /// Outgoing packets, in their order.
    pub outgoing: Vec<OutgoingPacketRecord<'a>>,
    /// Incoming packets, in their order.
    pub incoming: Vec<IncomingPacketRecord<'a>>,
}

/// Takes a channel's state apart.
///
/// # Errors
/// What a reader says.
pub fn parts(state: &[u8]) -> Result<Parts<'_>, saved_state::ReadError> {
    let mut reader = StreamReader::new(StreamKind::CHANNEL, KINDS);
    let (mut record, mut outgoing, mut incoming) = (ChannelRecord::default(), vec![], vec![]);
    let mut input = state;
    while let Some(chunk) = reader.read(&mut input)? {
        match chunk.kind() {
            OUTGOING_PACKET => outgoing.push(chunk.decode()?),
            INCOMING_PACKET => incoming.push(chunk.decode()?),
            _ => record = chunk.decode()?,
        }
    }
    reader.finish()?;
    Ok(Parts { record, outgoing, incoming })
}

/// Restores a state in a process where nothing is left of the one that saved it: the rings stand where
/// they stood, and are empty.
///
/// # Errors
/// The channel does not take it; it is as it was then.
pub fn restore(state: &[u8]) -> Result<(Server, Option<Rings>), RestoreFromError> {
    let record = parts(state).map(|parts| parts.record).unwrap_or_default();
    let server = Server::new(Setup::of(&record));
    let standing =
        Standing { read_index: record.read_index, write_index: record.write_index, resumed: true };
    let rings = record.open.then(|| server.open(standing));
    server.channel.restore_from(state)?;
    Ok((server, rings))
}

/// Restores a state, lets the channel go on, and holds what comes of it against what is in the state:
/// requests come to their device again as what they were, results leave, packets of the device's are sent
/// or awaited, and each transaction ends once.
pub fn assert_goes_on(state: &[u8]) {
    let Parts { record, outgoing, incoming } = parts(state).unwrap();
    let (server, rings) = restore(state).unwrap();
    let queued = outgoing.iter().filter(|packet| matches!(packet.place, Place::Queued { .. }));
    let queued = queued.count();
    // The ring is empty here: what was queued may have gone into it at once.
    let (waits, sent) = server.channel.outgoing_in_use();
    assert_eq!(waits + sent, outgoing.len());
    let Some(mut rings) = rings else {
        assert_eq!(incoming.len(), 0, "a channel that is not open has no request");
        return;
    };
    server.channel.start();
    server.run();
    assert_eq!(server.channel.stop_reason().is_some(), record.stopped);
    if record.stopped {
        // It delivers nothing until the guest has closed it and opened it again.
        drop(rings);
        return server.assert_ends();
    }

    let header = if record.pipe { vmbus_wire::pipe::HEADER_SIZE as usize } else { 0 };
    let (mut completions, mut sent) = (BTreeMap::<u64, Vec<Taken>>::new(), Vec::new());
    let mut take = |rings: &mut Rings| {
        let mut ids = Vec::new();
        for taken in rings.take() {
            if taken.kind == PacketKind::Completion {
                completions.entry(taken.transaction_id).or_default().push(taken);
            } else {
                if taken.wants_completion {
                    ids.push(taken.transaction_id);
                }
                sent.push(taken);
            }
        }
        ids
    };
    // The guest completes what it has, and then what comes because there is room now.
    let mut due: Vec<u64> = outgoing
        .iter()
        .filter_map(|packet| match packet.place {
            Place::InRing { transaction_id } => Some(transaction_id),
            Place::Queued { .. } => None,
        })
        .collect();
    due.extend(take(&mut rings));
    while !due.is_empty() {
        for id in due.drain(..) {
            rings.complete(id, b"done.   ");
            server.run();
        }
        due.extend(take(&mut rings));
    }

    assert_resumed(&incoming, &server.take_resumed());
    let mut expected = BTreeMap::<u64, usize>::new();
    for packet in incoming.iter().filter(|packet| packet.wants_completion) {
        *expected.entry(packet.transaction_id).or_default() += 1;
        if let Fence::Finished { completion } = packet.fence {
            let ends = completions.get(&packet.transaction_id).unwrap();
            assert!(ends.iter().any(|end| end.payload.starts_with(completion)), "{ends:?}");
        }
    }
    let ended: BTreeMap<_, _> = completions.iter().map(|(id, ends)| (*id, ends.len())).collect();
    assert_eq!(ended, expected, "each transaction of the peer's ends once");
    for packet in &outgoing {
        if let Place::Queued { message, .. } = packet.place {
            let is_it = |taken: &Taken| taken.payload.get(header..).unwrap().starts_with(message);
            assert!(sent.iter().any(is_it), "a message that was queued was sent");
        }
    }
    assert_eq!(sent.len(), queued);
    let ends = server.take_ended();
    let awaited = outgoing.iter().filter(|packet| match packet.place {
        Place::Queued { transaction, .. } => transaction,
        Place::InRing { .. } => true,
    });
    let awaited = awaited.count();
    let done = ends.iter().filter(|(status, payload)| {
        *status == NtStatus::SUCCESS && payload.as_slice() == b"done.   "
    });
    assert_eq!(done.count(), awaited, "{ends:?}");
    assert_eq!((ends.len(), server.channel.outgoing_in_use()), (outgoing.len(), (0, 0)));
    drop(rings);
    server.assert_ends();
}

/// That the requests that had not finished have come again, as what they were.
fn assert_resumed(incoming: &[IncomingPacketRecord<'_>], resumed: &[Resumed]) {
    let unfinished = incoming.iter().filter(|it| !matches!(it.fence, Fence::Finished { .. }));
    let expected: Vec<_> = unfinished
        .map(|packet| {
            let handed_back = packet.handed_back != HandedBack::No;
            let fence = match packet.fence {
                Fence::Cancelled => kmcl::Fence::Cancelled,
                _ => kmcl::Fence::NeverStarted,
            };
            let fence = (!handed_back).then_some(fence);
            (packet.transaction_id, packet.payload, fence, packet.device_state)
        })
        .collect();
    let found: Vec<_> = resumed
        .iter()
        .map(|it| (it.transaction_id, &*it.payload, it.fence, &*it.device_state))
        .collect();
    assert_eq!(found, expected);
    for packet in incoming {
        let came = resumed.iter().find(|it| it.transaction_id == packet.transaction_id);
        let Some(came) = came else { continue };
        if packet.handed_back == HandedBack::No {
            assert_eq!(came.context, packet.client_context);
        }
        assert_eq!(came.external_bytes.is_some(), !packet.extension.is_empty());
    }
}

/// That two states say the same, one of them saved from a channel that was restored from the other.
///
/// What may differ: packets that were queued may be in the ring now, or over; ids count on from where they were; a
/// packet that waited for memory waits as one that came first; and the restored channel was frozen.
pub fn assert_same(before: &Parts<'_>, after: &Parts<'_>) {
    let (was, is) = (&before.record, &after.record);
    let expected = ChannelRecord {
        frozen: is.frozen,
        started: is.started,
        open: is.open,
        incoming_ring_bytes: is.incoming_ring_bytes,
        outgoing_ring_bytes: is.outgoing_ring_bytes,
        read_index: if was.open { was.read_index } else { is.read_index },
        write_index: is.write_index,
        user_data: is.user_data.clone(),
        transaction_quota: is.transaction_quota,
        transaction_uses: is.transaction_uses.max(was.transaction_uses),
        processing_at_passive: is.processing_at_passive,
        incoming_packets: if was.open { was.incoming_packets } else { 0 },
        outgoing_packets: is.outgoing_packets,
        ..was.clone()
    };
    assert_eq!(*is, expected);
    if was.open {
        assert_eq!(before.incoming.len(), after.incoming.len());
        for (was, is) in before.incoming.iter().zip(&after.incoming) {
            let expected = match was.fence {
                // Nothing but its completion is needed any more.
                Fence::Finished { .. } => IncomingPacketRecord { order: is.order, ..*is },
                _ => IncomingPacketRecord {
                    order: is.order,
                    handed_back: is.handed_back,
                    device_state: if was.handed_back == HandedBack::No {
                        was.device_state
                    } else {
                        &[]
                    },
                    ..*was
                },
            };
            assert_eq!(*is, expected);
            assert_eq!(is.fence, was.fence);
            assert_eq!(is.handed_back == HandedBack::No, was.handed_back == HandedBack::No);
        }
    }
    // A message that nobody is to complete is over once it is in the ring.
    let may_be_over = before
        .outgoing
        .iter()
        .filter(|packet| matches!(packet.place, Place::Queued { transaction: false, .. }));
    let least = before.outgoing.len() - may_be_over.count();
    assert!((least..=before.outgoing.len()).contains(&after.outgoing.len()));
    let ids = |parts: &Parts<'_>| {
        let ids = parts.outgoing.iter().filter_map(|packet| match packet.place {
            Place::InRing { transaction_id } => Some(transaction_id),
            Place::Queued { .. } => None,
        });
        ids.collect::<std::collections::BTreeSet<_>>()
    };
    assert!(ids(after).is_superset(&ids(before)), "an id that is awaited was forgotten");
}
