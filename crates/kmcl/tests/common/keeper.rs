//! A server endpoint whose device keeps what it gets, whose driver saves and restores its packets as
//! the test says, and whose guest is in the hands of the test.

use std::sync::{Arc, Mutex};

use kmcl::{
    Channel, ChannelState, Fence, IncomingPacket, NtStatus, Packet, ProcessPacket, ResumedPacket,
    Save as _, SaveRestorePacket, Side, StateChange,
};
use vmbus_ring::{RingReader, RingWriter};
use vmbus_wire::packet::PacketKind;

use super::raw::{Peer, RawBus, Read, as_bus, push, read_all};
use super::{Answers, INSTANCE, TYPE, lock, send};

/// Pages of each ring.
pub(crate) const PAGES: u32 = 8;

type OnFreeze = dyn Fn(IncomingPacket) + Send + Sync;
type OnSize = dyn Fn(&Channel, usize) -> Result<u32, NtStatus> + Send + Sync;
type OnSave = dyn Fn(&Channel, usize, &mut [u8]) -> Result<u32, NtStatus> + Send + Sync;
type OnRestore = dyn Fn(&Keeper, &Channel, &[u8], &[u8]) -> Result<(), NtStatus> + Send + Sync;

/// What was asked of a keeper.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Asked {
    /// For the size of a packet's state; its pointer.
    Size(usize),
    /// For the state, with so much room.
    Save(usize, usize),
    /// To restore a packet: bytes of the library's state, and the driver's own.
    Restore(usize, Vec<u8>),
    Freeze,
    Thaw,
}

/// A packet that came again: fence, device state, payload.
pub(crate) type Again = (Fence, Vec<u8>, Vec<u8>);

/// See the module. A packet with pointer n has n bytes of state, all n; restored, it gets the pointer
/// 1000 + n.
pub(crate) struct Keeper {
    pub(crate) held: Mutex<Vec<IncomingPacket>>,
    pub(crate) answers: Arc<Answers>,
    pub(crate) asked: Mutex<Vec<Asked>>,
    pub(crate) again: Mutex<Vec<Again>>,
    pub(crate) on_freeze: Mutex<Arc<OnFreeze>>,
    pub(crate) on_size: Mutex<Arc<OnSize>>,
    pub(crate) on_save: Mutex<Arc<OnSave>>,
    pub(crate) on_restore: Mutex<Arc<OnRestore>>,
}

impl Keeper {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            held: Mutex::default(),
            answers: Arc::default(),
            asked: Mutex::default(),
            again: Mutex::default(),
            on_freeze: Mutex::new(Arc::new(hand_over)),
            on_size: Mutex::new(Arc::new(|_, pointer| Ok(u32::try_from(pointer % 1000).unwrap()))),
            on_save: Mutex::new(Arc::new(|_, pointer, buffer| {
                buffer.fill(u8::try_from(pointer % 1000 % 256).unwrap());
                Ok(u32::try_from(buffer.len()).unwrap())
            })),
            on_restore: Mutex::new(Arc::new(bring_back)),
        })
    }

    pub(crate) fn take_asked(&self) -> Vec<Asked> {
        std::mem::take(&mut *lock(&self.asked))
    }

    pub(crate) fn take_again(&self) -> Vec<Again> {
        std::mem::take(&mut *lock(&self.again))
    }

    pub(crate) fn take_held(&self) -> Vec<IncomingPacket> {
        std::mem::take(&mut *lock(&self.held))
    }

    pub(crate) fn when_frozen(&self, act: impl Fn(IncomingPacket) + Send + Sync + 'static) {
        *lock(&self.on_freeze) = Arc::new(act);
    }

    pub(crate) fn when_restored(
        &self,
        act: impl Fn(&Self, &Channel, &[u8], &[u8]) -> Result<(), NtStatus> + Send + Sync + 'static,
    ) {
        *lock(&self.on_restore) = Arc::new(act);
    }

    fn ask(&self, asked: Asked) {
        lock(&self.asked).push(asked);
    }
}

/// Hands a packet over with its payload as the device's state, reversed.
pub(crate) fn hand_over(packet: IncomingPacket) {
    let state: Vec<u8> = packet.payload().iter().rev().copied().collect();
    packet.never_started().hand_over(&state).unwrap();
}

/// What a driver has to do to restore its packet.
pub(crate) fn bring_back(
    keeper: &Keeper,
    channel: &Channel,
    lib: &[u8],
    own: &[u8],
) -> Result<(), NtStatus> {
    let mut packet = channel.packet_allocate().ok_or(NtStatus::INSUFFICIENT_RESOURCES)?;
    packet.set_pointer(1000 + own.len());
    packet.set_completion_routine(Arc::clone(&keeper.answers) as _);
    packet.restore(lib).map_err(|refused| refused.error.status())
}

impl StateChange for Keeper {}

impl ProcessPacket for Keeper {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        lock(&self.held).push(packet);
    }

    fn resume_packet(&self, _: &Channel, packet: ResumedPacket) {
        let payload = packet.packet().payload().to_vec();
        lock(&self.again).push((packet.fence(), packet.device_state().to_vec(), payload));
        lock(&self.held).push(packet.into_packet());
    }

    fn freeze(&self, _: &Channel) {
        self.ask(Asked::Freeze);
        let act = Arc::clone(&lock(&self.on_freeze));
        self.take_held().into_iter().for_each(|packet| act(packet));
    }

    fn thaw(&self, _: &Channel) {
        self.ask(Asked::Thaw);
    }
}

impl SaveRestorePacket for Keeper {
    fn state_size(&self, channel: &Channel, packet: &Packet) -> Result<u32, NtStatus> {
        self.ask(Asked::Size(packet.pointer()));
        let act = Arc::clone(&lock(&self.on_size));
        act(channel, packet.pointer())
    }

    fn save_packet(
        &self,
        channel: &Channel,
        packet: &Packet,
        buffer: &mut [u8],
    ) -> Result<u32, NtStatus> {
        self.ask(Asked::Save(packet.pointer(), buffer.len()));
        let act = Arc::clone(&lock(&self.on_save));
        act(channel, packet.pointer(), buffer)
    }

    fn restore_packet(&self, channel: &Channel, lib: &[u8], own: &[u8]) -> Result<(), NtStatus> {
        self.ask(Asked::Restore(lib.len(), own.to_vec()));
        let act = Arc::clone(&lock(&self.on_restore));
        act(self, channel, lib, own)
    }
}

/// A server's channel, its device, and its guest.
pub(crate) struct Kept {
    pub(crate) bus: Arc<RawBus>,
    pub(crate) channel: Channel,
    pub(crate) keeper: Arc<Keeper>,
    pub(crate) guest: Option<Guest>,
}

/// The guest's end of a channel that is open.
pub(crate) struct Guest {
    pub(crate) peer: Peer,
    pub(crate) reader: RingReader,
    pub(crate) writer: RingWriter,
}

impl Guest {
    /// Sends a packet with the id and a payload of so many words of it.
    pub(crate) fn send(&mut self, id: u64, words: usize) {
        let payload = id.to_le_bytes().repeat(words);
        push(&mut self.writer, PacketKind::InBand, true, id, &payload);
    }

    /// Completes a transaction of the server's.
    pub(crate) fn complete(&mut self, id: u64, payload: &[u8]) {
        push(&mut self.writer, PacketKind::Completion, false, id, payload);
    }

    /// What the server has sent.
    pub(crate) fn read(&mut self) -> Vec<Read> {
        read_all(&mut self.reader)
    }

    /// The ids and payloads of completions that have come.
    pub(crate) fn completions(&mut self) -> Vec<(u64, Vec<u8>)> {
        let read = self.read().into_iter();
        let done = read.filter(|read| read.kind == PacketKind::Completion);
        done.map(|read| (read.transaction_id, read.payload)).collect()
    }
}

impl Kept {
    /// Disabled.
    pub(crate) fn disabled() -> Self {
        Self::on(&RawBus::new(), |_| ())
    }

    /// As [`Self::disabled`], on a bus that may be another's, and set up.
    pub(crate) fn on(bus: &Arc<RawBus>, set_up: impl FnOnce(&Channel)) -> Self {
        let keeper = Keeper::new();
        let channel = Channel::allocate(Side::Server, as_bus(bus));
        channel.server_init_set_target_interface_id(TYPE, INSTANCE).unwrap();
        channel.init_set_process_packet_callbacks(keeper.clone()).unwrap();
        channel.init_set_state_change_callbacks(keeper.clone()).unwrap();
        channel.server_init_set_save_restore_packet_callbacks(keeper.clone()).unwrap();
        channel.init_set_maximum_external_data(8192, 2).unwrap();
        set_up(&channel);
        Self { bus: bus.clone(), channel, keeper, guest: None }
    }

    /// Open and Paused.
    pub(crate) fn paused() -> Self {
        Self::paused_with(|_| ())
    }

    pub(crate) fn paused_with(set_up: impl FnOnce(&Channel)) -> Self {
        let mut kept = Self::on(&RawBus::new(), set_up);
        kept.channel.enable().unwrap();
        kept.open();
        kept
    }

    /// Open and Active.
    pub(crate) fn active() -> Self {
        let kept = Self::paused();
        kept.start();
        kept
    }

    pub(crate) fn start(&self) {
        self.channel.start();
        assert_eq!(self.channel.state(), ChannelState::Active);
    }

    /// The guest opens the channel.
    pub(crate) fn open(&mut self) {
        let peer = self.bus.open(PAGES, PAGES);
        self.channel.process(8);
        assert!(self.channel.state().is_open());
        self.bus.take_said();
        let (reader, writer) = (peer.reader(), peer.writer());
        self.guest = Some(Guest { peer, reader, writer });
    }

    pub(crate) fn guest(&mut self) -> &mut Guest {
        self.guest.as_mut().unwrap()
    }

    /// Sends a transaction of the server's with that pointer, and 8 bytes of it.
    pub(crate) fn send(&self, pointer: usize) {
        send(&self.channel, pointer, &pointer.to_le_bytes(), &self.keeper.answers);
    }

    /// Delivers what the guest has sent.
    pub(crate) fn process(&self) {
        while self.channel.process(64).packets != 0 {}
    }

    /// Another channel for the same guest, as another process has it: Disabled.
    pub(crate) fn successor(&mut self) -> Self {
        let mut next = Self::on(&self.bus, |_| ());
        next.guest = self.guest.take();
        next
    }

    /// Enabled, and its rings have come: `resumed`, or as if opened anew.
    pub(crate) fn reopen(&self, resumed: bool) {
        if self.channel.state() == ChannelState::Disabled {
            self.channel.enable().unwrap();
        }
        self.bus.open_again(&self.guest.as_ref().unwrap().peer, resumed);
        self.channel.process(8);
    }

    /// The guest closes the channel.
    pub(crate) fn close(&self) {
        assert!(self.bus.post(kmcl::bus::BusEvent::PeerClosed));
        self.channel.process(8);
    }

    /// Ends everything, and shows that nothing is left of it.
    pub(crate) fn end(self) {
        drop(self.keeper.take_held());
        self.channel.disable();
        assert_eq!(self.channel.outgoing_in_use(), (0, 0));
        assert_eq!(self.channel.incoming_outstanding(), 0);
        assert_eq!(self.channel.state(), ChannelState::Disabled);
    }
}

/// What a save of the channel gives.
pub(crate) fn saved(channel: &Channel) -> Vec<u8> {
    let mut state = Vec::new();
    channel.save().unwrap().write_to(&mut state).unwrap();
    state
}

/// The chunks of a stream, one by one.
pub(crate) fn chunks(state: &[u8]) -> Vec<&[u8]> {
    let ranges = saved_state::testing::chunk_ranges(state);
    let chunks: Vec<_> = ranges.into_iter().map(|range| &state[range]).collect();
    assert_eq!(chunks.concat(), state, "chunks from the first byte to the last");
    chunks
}

/// The pieces of a state, as a reader that gives no more than `most` bytes at a time.
pub(crate) struct Trickle<'a>(pub(crate) &'a [u8], pub(crate) usize);

impl std::io::Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let most = buffer.len().min(self.1);
        self.0.read(&mut buffer[..most])
    }
}

// ---- Moves --------------------------------------------------------------------------------------------

/// A state with so many packets in flight, and the guest that has them.
pub(crate) fn state_of(outgoing: usize) -> (Kept, Vec<u8>) {
    let kept = Kept::paused();
    (0..outgoing).for_each(|pointer| kept.send(pointer));
    let state = saved(&kept.channel);
    (kept, state)
}

/// The channel in another process: its rings have come, nothing is restored yet.
pub(crate) fn successor(mut kept: Kept) -> Kept {
    let next = kept.successor();
    kept.channel.freeze().unwrap().move_away();
    assert_eq!(kept.keeper.answers.take(), [], "they end elsewhere");
    next.reopen(true);
    next
}

/// A successor of a channel with so many packets, and its state.
pub(crate) fn moved(outgoing: usize) -> (Kept, Vec<u8>) {
    let (kept, state) = state_of(outgoing);
    (successor(kept), state)
}

/// As a channel is before anything was restored, and after everything was undone.
pub(crate) fn is_untouched(kept: &Kept, what: &str) {
    assert_eq!(kept.channel.outgoing_in_use(), (0, 0), "{what}");
    assert_eq!(kept.channel.incoming_outstanding(), 0, "{what}");
    assert_eq!(kept.channel.stop_reason(), None, "{what}");
}

/// The guest completes all that is in its ring; the server starts and hears of it.
pub(crate) fn all_complete(kept: &mut Kept) -> Vec<super::Answer> {
    if kept.channel.state() != ChannelState::Active {
        kept.start();
    }
    for read in kept.guest().read() {
        kept.guest().complete(read.transaction_id, &[7; 8]);
    }
    kept.process();
    kept.keeper.answers.take()
}
