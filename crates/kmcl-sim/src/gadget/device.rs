//! The host's end of the second device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kmcl::{
    Channel, ExternalDataFlags, Fence, GpadlFlags, GpadlMapping, IncomingPacket, Level, NtStatus,
    Packet, PacketCompletion, ProcessPacket, ResumedPacket, SaveRestorePacket, SendFlags, Side,
    StateChange,
};
use vmbus_host::HostBus;
use zerocopy::IntoBytes as _;

use super::wire::{self, Answer, Message, manner};
use crate::log::{Log, Way};
use crate::rng::Rng;
use crate::tasks::Tasks;

/// Most packets of its own that the device has under way.
const MAX_EVENTS: u64 = 24;

/// A device of one channel.
pub(crate) struct Gadget {
    channel: Channel,
    device: Arc<Device>,
}

struct Device {
    myself: Weak<Self>,
    log: Arc<Log>,
    inner: Mutex<Inner>,
}

struct Inner {
    rng: Rng,
    now: u64,
    held: Vec<Held>,
    /// Events still to be sent.
    events_left: u64,
    mapped: Option<Mapped>,
    is_frozen: bool,
    /// Its channel is being restored.
    is_restoring: bool,
    /// The GPADL that a former device had mapped, and the packet that asked for it.
    to_be_mapped: Option<(u32, u64)>,
}

/// The guest's counters.
struct Mapped {
    gpadl: u32,
    /// The packet that asked for it: later ones are counted.
    since: u64,
    mapping: GpadlMapping,
}

/// A packet that the device completes later.
struct Held {
    number: u64,
    packet: IncomingPacket,
    executed: bool,
    due: u64,
}

impl Gadget {
    /// A device on `bus`, not offered yet, that will send `events` packets.
    pub(crate) fn new(
        bus: &HostBus,
        tasks: &Tasks,
        log: &Arc<Log>,
        events: u64,
        rng: Rng,
    ) -> Result<Self, kmcl::Error> {
        let device = Arc::new_cyclic(|myself| Device {
            myself: myself.clone(),
            log: Arc::clone(log),
            inner: Mutex::new(Inner {
                rng,
                now: 0,
                held: Vec::new(),
                events_left: events,
                mapped: None,
                is_frozen: false,
                is_restoring: false,
                to_be_mapped: None,
            }),
        });
        let channel = Channel::allocate(Side::Server, Arc::new(bus.clone()));
        channel.init_set_friendly_name("gadget")?;
        channel.init_set_maximum_packet_size(wire::MAX_BYTES)?;
        channel.init_set_maximum_completion_size(16)?;
        channel.init_set_maximum_packet_count(32)?;
        channel.init_set_maximum_external_data(4096, 1)?;
        channel.init_set_process_packet_callbacks(Arc::clone(&device) as _)?;
        channel.init_set_state_change_callbacks(Arc::clone(&device) as _)?;
        channel.server_init_set_save_restore_packet_callbacks(Arc::clone(&device) as _)?;
        channel.server_init_set_target_interface_id(wire::INTERFACE, wire::INSTANCE)?;
        tasks.add(&channel);
        Ok(Self { channel, device })
    }

    /// Makes the offer.
    pub(crate) fn offer(&self) -> Result<(), kmcl::Error> {
        self.channel.enable()?;
        self.channel.start();
        Ok(())
    }

    pub(crate) fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Its channel is being restored, or is so no more.
    pub(crate) fn set_restoring(&self, is_restoring: bool) {
        self.device.lock().is_restoring = is_restoring;
    }

    /// What the device keeps apart from its channel and packets.
    pub(crate) fn state(&self) -> DeviceState {
        let inner = self.device.lock();
        DeviceState {
            events_left: inner.events_left,
            mapped: match &inner.mapped {
                Some(mapped) => Some((mapped.gpadl, mapped.since)),
                None => inner.to_be_mapped,
            },
        }
    }

    /// Makes the device what one was that was saved. The guest's counters come with the rings.
    pub(crate) fn set_state(&self, state: &DeviceState) {
        let inner = &mut *self.device.lock();
        inner.events_left = state.events_left;
        inner.to_be_mapped = state.mapped;
    }

    /// What the device can do by itself, and when.
    pub(crate) fn chores(&self, now: u64, mut found: impl FnMut(u64, Chore)) {
        let mut inner = self.device.lock();
        inner.now = now;
        for held in &inner.held {
            found(held.due, Chore::Complete(held.number));
        }
        let room = self.device.log.outstanding(Way::Event) < MAX_EVENTS;
        if inner.events_left > 0 && room && self.channel.state().is_open() {
            found(now, Chore::Send);
        }
    }

    /// Whether every event was sent.
    pub(crate) fn is_done(&self) -> bool {
        self.device.lock().events_left == 0
    }

    /// Lets go of packets and channel, which hold each other.
    pub(crate) fn abandon(&self) {
        self.channel.clear_waker();
        let held = std::mem::take(&mut self.device.lock().held);
        for held in held {
            held.packet.complete(&[]);
        }
        self.channel.disable();
    }

    pub(crate) fn do_chore(&self, chore: Chore) {
        match chore {
            Chore::Complete(number) => {
                let mut inner = self.device.lock();
                let at = inner.held.iter().position(|held| held.number == number);
                let Some(held) = at.map(|at| inner.held.swap_remove(at)) else { return };
                let settles = inner.is_frozen && !inner.rng.once_in(3);
                drop(inner);
                match settles {
                    true => self.device.hand_over(held),
                    false => self.device.finish(held),
                }
            }
            Chore::Send => self.send(),
        }
    }

    fn send(&self) {
        let Some(mut packet) = self.channel.packet_allocate() else { return };
        self.device.lock().events_left -= 1;
        let number = self.device.log.sent(Way::Event);
        packet.set_pointer(usize::try_from(number).unwrap_or(0));
        packet.set_completion_routine(Arc::clone(&self.device) as _);
        let wanted = !number.is_multiple_of(5);
        let flags = if wanted { SendFlags::WAIT_FOR_COMPLETION } else { SendFlags::empty() };
        let message = Message::new(wire::EVENT, 0, number, 0).padded();
        if let Err(refused) = packet.send(&message, None, flags) {
            self.device.log.violation(format_args!("event {number} refused: {}", refused.error));
        }
    }
}

/// What the device keeps apart from its channel and packets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct DeviceState {
    events_left: u64,
    /// The counters' GPADL, and the packet that asked for it.
    mapped: Option<(u32, u64)>,
}

/// Something that the device does by itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Chore {
    /// Completes the packet of this number.
    Complete(u64),
    /// Sends the next event.
    Send,
}

impl Device {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what a packet asks for.
    fn execute(&self, number: u64, packet: &IncomingPacket) {
        self.log.executed(number);
        if packet.has_external_data() {
            let value = wire::expected(number).to_le_bytes();
            let written = packet
                .external_data(ExternalDataFlags::empty())
                .and_then(|data| data.write_at(0, &value));
            if written != Ok(value.len()) {
                self.log.violation(format_args!("external data of work {number}: {written:?}"));
            }
        }
        if let Some(Mapped { since, mapping, .. }) = &self.lock().mapped
            && number > *since
        {
            let offset = u32::try_from(number % wire::COUNTERS).unwrap_or(0) * 8;
            let data = mapping.data().expect("a mapping stays");
            let mut count = [0; 8];
            let counted = data.read_at(offset, &mut count).and_then(|_| {
                let count = u64::from_le_bytes(count) + 1;
                data.write_at(offset, &count.to_le_bytes())
            });
            if counted != Ok(8) {
                self.log.violation(format_args!("counter of work {number}: {counted:?}"));
            }
        }
    }

    fn finish(&self, held: Held) {
        if !held.executed {
            self.execute(held.number, &held.packet);
        }
        held.packet.complete(Answer::to(held.number).as_bytes());
    }

    /// Gives a packet to its frozen channel, with what there is to know of it.
    fn hand_over(&self, held: Held) {
        let Held { number, packet, executed, .. } = held;
        self.log.handed_over(number);
        // What was executed has no more to come; the rest was not begun.
        let fenced = if executed { packet.cancelled() } else { packet.never_started() };
        if let Err(refused) = fenced.hand_over(&[u8::from(executed)]) {
            self.log.violation(format_args!("work {number} not handed over: {}", refused.why));
            refused.packet.complete(Answer::to(number).as_bytes());
        }
    }

    fn hold(&self, number: u64, packet: IncomingPacket, executed: bool, long: bool) {
        let inner = &mut *self.lock();
        let delay = inner.rng.delay() + if long { inner.rng.between(200, 800) } else { 0 };
        let due = inner.now + delay;
        inner.held.push(Held { number, packet, executed, due });
    }

    fn map(&self, channel: &Channel, gpadl: u32, since: u64) {
        match channel.map_gpadl(GpadlFlags::empty(), gpadl) {
            Ok(mapping) => self.lock().mapped = Some(Mapped { gpadl, since, mapping }),
            Err(error) => self.log.violation(format_args!("GPADL {gpadl:#x}: {error}")),
        }
    }
}

impl ProcessPacket for Device {
    fn process_packet(&self, channel: &Channel, packet: IncomingPacket) {
        let Some(message) = Message::parse(packet.payload()) else {
            self.log.violation(format_args!("work of {} bytes", packet.payload().len()));
            return packet.complete(&[]);
        };
        let number = message.number.get();
        self.log.seen(Way::Work, number);
        match (message.kind.get(), message.manner.get()) {
            (wire::WORK, manner::LATER) => self.hold(number, packet, false, false),
            (wire::WORK, manner::LONG) => self.hold(number, packet, false, true),
            (wire::WORK, manner::COMPLETED_LATER) => {
                self.execute(number, &packet);
                self.hold(number, packet, true, false);
            }
            (wire::WORK, manner::PASSIVE) if packet.level() == Level::Dispatch => {
                self.log.deferred(number);
                packet.defer_to_passive();
            }
            (kind, _) => {
                match kind {
                    wire::MAP => {
                        let gpadl = u32::try_from(message.argument.get()).unwrap_or(0);
                        self.map(channel, gpadl, number);
                    }
                    wire::UNMAP => {
                        let mapped = self.lock().mapped.take();
                        if let Some(Mapped { gpadl, .. }) = mapped {
                            channel.unmap_gpadl(gpadl);
                        }
                    }
                    _ => self.execute(number, &packet),
                }
                packet.complete(Answer::to(number).as_bytes());
            }
        }
    }

    fn resume_packet(&self, _channel: &Channel, resumed: ResumedPacket) {
        let number = Message::parse(resumed.packet().payload()).map_or(0, |it| it.number.get());
        self.log.resumed(number);
        let executed = resumed.device_state() == [1];
        let expected = if executed { Fence::Cancelled } else { Fence::NeverStarted };
        if resumed.fence() != expected || resumed.device_state().len() != 1 {
            let (fence, state) = (resumed.fence(), resumed.device_state());
            self.log.violation(format_args!("work {number} resumed as {fence:?}, {state:x?}"));
        }
        self.hold(number, resumed.into_packet(), executed, false);
    }

    /// Settles some packets at once, and leaves the others for later.
    fn freeze(&self, _channel: &Channel) {
        self.log.set_frozen(true);
        let inner = &mut *self.lock();
        inner.is_frozen = true;
        let (now, rng) = (inner.now, &mut inner.rng);
        for held in &mut inner.held {
            held.due = now + if rng.once_in(2) { 0 } else { rng.delay() };
        }
    }

    fn thaw(&self, _channel: &Channel) {
        self.log.set_frozen(false);
        self.lock().is_frozen = false;
    }
}

impl StateChange for Device {
    fn opened(&self, channel: &Channel) -> Result<(), NtStatus> {
        let to_be_mapped = self.lock().to_be_mapped.take();
        if let Some((gpadl, since)) = to_be_mapped {
            self.map(channel, gpadl, since);
        }
        Ok(())
    }

    fn closed(&self, _channel: &Channel) {
        let inner = &mut *self.lock();
        (inner.mapped, inner.to_be_mapped) = (None, None);
    }

    fn suspend(&self, _channel: &Channel) {
        // The guest does not wait for work of a channel that it closes.
        let held = std::mem::take(&mut self.lock().held);
        for held in held {
            self.finish(held);
        }
    }
}

impl PacketCompletion for Device {
    fn completed(&self, packet: Packet, status: NtStatus, payload: &[u8]) {
        if status == NtStatus::CANCELLED && self.lock().is_restoring {
            return; // the restore has failed: the packet is the other host's again
        }
        let mut number = packet.pointer() as u64;
        if number == 0 {
            // One that came back without a state of ours.
            number = Answer::parse(payload).unwrap_or(0);
        }
        self.log.ended(Way::Event, number, status);
        let wanted = !number.is_multiple_of(5);
        if status == NtStatus::SUCCESS && wanted && Answer::parse(payload) != Some(number) {
            self.log.violation(format_args!("event {number} ended with {payload:02x?}"));
        }
    }
}

impl SaveRestorePacket for Device {
    /// Of every third event that has an answer nothing is kept: the answer says which it was.
    fn state_size(&self, _channel: &Channel, packet: &Packet) -> Result<u32, NtStatus> {
        let number = packet.pointer();
        Ok(if number.is_multiple_of(3) && !number.is_multiple_of(5) { 0 } else { 8 })
    }

    fn save_packet(
        &self,
        _channel: &Channel,
        packet: &Packet,
        buffer: &mut [u8],
    ) -> Result<u32, NtStatus> {
        let number = (packet.pointer() as u64).to_le_bytes();
        let room = buffer.get_mut(..number.len()).ok_or(NtStatus::BUFFER_TOO_SMALL)?;
        room.copy_from_slice(&number);
        Ok(8)
    }

    fn restore_packet(
        &self,
        channel: &Channel,
        library_state: &[u8],
        own_state: &[u8],
    ) -> Result<(), NtStatus> {
        let mut packet = channel.packet_allocate().ok_or(NtStatus::INSUFFICIENT_RESOURCES)?;
        let number = own_state.first_chunk().copied().map_or(0, u64::from_le_bytes);
        packet.set_pointer(usize::try_from(number).unwrap_or(0));
        packet.set_completion_routine(self.myself.upgrade().ok_or(NtStatus::UNSUCCESSFUL)? as _);
        packet.restore(library_state).map_err(|refused| refused.error.status())
    }
}
