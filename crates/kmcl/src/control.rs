//! Performs what the life cycle asks for: takes letters out of the mailbox, steps the pure machine,
//! and does the effects in order, callbacks included, with no lock held.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmbus_memory::GuestMemory;
use vmbus_ring::{RingReader, RingWriter};
use vmbus_wire::guid::Guid;
use vmbus_wire::offer::PipeUserDefined;
use vmbus_wire::status::NtStatus;

use crate::bus::{
    BusEvent, ClientLink, Endpoint, EventSink, Offer, OpenRequest, OpenRings, ServerLink, Target,
    USER_DATA_SIZE,
};
use crate::channel::{Channel, lock};
use crate::error::Error;
use crate::events::Letter;
use crate::flags::ServerFlags;
use crate::gpadl::Mappings;
use crate::lifecycle::{ChannelState, Effect, Event, Lifecycle, Side};
use crate::packet::Packet;
use crate::pool;
use crate::receiver::Receiver;
use crate::settings::Settings;
use crate::thread_mark;

/// The life cycle and what goes with it.
pub(crate) struct Control {
    pub(crate) life: Lifecycle,
    pub(crate) link: Link,
    /// Counts enables: events of a former one are stale.
    pub(crate) connection: u32,
    /// The highest ticket of a request that was handled.
    handled: u64,
    /// Rings that came with an open, until they are attached.
    rings: Option<OpenRings>,
    /// Why an open or a connection failed.
    failure: NtStatus,
    pub(crate) memory: Option<GuestMemory>,
    pub(crate) user_data: Option<[u8; USER_DATA_SIZE]>,
    /// The rings are those of an open before a restore.
    pub(crate) resumed: bool,
    pub(crate) instance: Option<Guid>,
    pub(crate) mmio: Option<(u64, u64)>,
}

/// The channel's end of the seam to its bus.
#[derive(Clone)]
pub(crate) enum Link {
    None,
    Server(Arc<dyn ServerLink>),
    Client(Arc<dyn ClientLink>),
}

impl Link {
    pub(crate) fn client(
        &self,
        function: &'static str,
        state: ChannelState,
    ) -> Result<Arc<dyn ClientLink>, Error> {
        match self {
            Self::Client(link) => Ok(Arc::clone(link)),
            Self::None | Self::Server(_) => Err(Error::State { function, state }),
        }
    }
}

impl Control {
    pub(crate) fn new(side: Side) -> Self {
        Self {
            life: Lifecycle::new(side),
            link: Link::None,
            connection: 0,
            handled: 0,
            rings: None,
            failure: NtStatus::UNSUCCESSFUL,
            memory: None,
            user_data: None,
            resumed: false,
            instance: None,
            mmio: None,
        }
    }
}

impl Channel {
    // ---- Who may step -----------------------------------------------------------------------------

    /// Whether a life-cycle call is possible on this thread: not inside a callback, where it could
    /// only wait for itself (D-12).
    pub(crate) fn allowed_here(&self, call: &'static str) -> bool {
        let inside = self.in_control_callback();
        debug_assert!(!inside, "{call} called in a state-change callback");
        if inside {
            tracing::error!(call, "ignored: called in a state-change callback");
        }
        !inside
    }

    /// Whether this very thread is inside one of the channel's state-change callbacks.
    pub(crate) fn in_control_callback(&self) -> bool {
        self.shared.control_thread.load(Ordering::Relaxed) == thread_mark::current()
    }

    /// Asks for `request` and waits until it was handled and no delivered packet is waited for.
    pub(crate) fn request_and_wait(&self, call: &'static str, request: Event) {
        if !self.allowed_here(call) {
            return;
        }
        if self.in_packet_callback() {
            debug_assert!(false, "{call} called in a packet callback");
            tracing::error!(call, "ignored: called in a packet callback");
            return;
        }
        let ticket = self.shared.mailbox.post_request(request);
        loop {
            let seen = self.shared.mailbox.rung();
            if request == Event::Disable {
                // Each time: another thread may have frozen the channel once more meanwhile.
                self.end_hold();
            }
            self.drive_unless_driven();
            let done = {
                let control = lock(&self.shared.control);
                control.handled >= ticket
            };
            // A pause that a disable of another thread overtakes waits with it.
            if done && !matches!(self.state(), ChannelState::Pausing | ChannelState::Closing) {
                return;
            }
            if self.shared.hold.is_held() {
                if request == Event::Disable {
                    continue;
                }
                tracing::debug!(call, "waits for the end of a freeze or a save");
                return;
            }
            self.shared.mailbox.wait(seen, None);
        }
    }

    /// Whether something waits to be handled that ends the present connection.
    pub(crate) fn is_ending(&self) -> bool {
        let connection = lock(&self.shared.control).connection;
        self.shared.mailbox.has_ending(connection)
    }

    /// Steps the life cycle here and now, where nobody else was named for that.
    pub(crate) fn drive_unless_driven(&self) {
        if !self.shared.mailbox.has_driver() {
            self.drive_control();
        }
    }

    /// Handles what is in the mailbox. `false` where that is not for this call: another thread is at
    /// it, or this one is inside a callback.
    pub(crate) fn drive_control(&self) -> bool {
        while self.shared.mailbox.is_waiting() {
            // Inside a packet callback a step could wait for that very callback to return.
            if self.in_packet_callback() {
                return false;
            }
            let Some(_stepping) = Stepping::begin(self) else { return false };
            // Looked at with the right to step: whoever holds the channel takes that first.
            if self.shared.hold.is_held() {
                return false;
            }
            while let Some(letter) = self.shared.mailbox.take() {
                self.handle(letter);
                self.shared.mailbox.notify();
            }
        }
        true
    }

    // ---- Letters ----------------------------------------------------------------------------------

    fn handle(&self, letter: Letter) {
        match letter {
            Letter::Request { ticket, event } => {
                self.step(event);
                lock(&self.shared.control).handled = ticket;
            }
            Letter::Bus { connection, event } => {
                if connection == lock(&self.shared.control).connection {
                    self.handle_bus(event);
                }
            }
        }
    }

    fn handle_bus(&self, event: BusEvent) {
        match event {
            BusEvent::Opened(rings) | BusEvent::OpenCompleted(Ok(rings)) => {
                lock(&self.shared.control).rings = Some(rings);
                self.step(Event::PeerOpened);
                // Whatever was not attached is not wanted.
                lock(&self.shared.control).rings = None;
            }
            BusEvent::OpenCompleted(Err(status)) | BusEvent::ConnectFailed(status) => {
                lock(&self.shared.control).failure = status;
                self.step(Event::OpenFailed);
            }
            BusEvent::Offered { interface_instance, mmio } => {
                {
                    let mut control = lock(&self.shared.control);
                    control.instance = Some(interface_instance);
                    control.mmio = mmio;
                }
                self.step(Event::Offered);
            }
            BusEvent::PeerClosed | BusEvent::Rescinded => {
                lock(&self.shared.control).failure = NtStatus::DEVICE_REMOVED;
                self.step(Event::PeerClosed);
            }
            BusEvent::MemoryArrived => self.set_memory_arrived(),
            // Answers go to whoever waits, past the mailbox.
            BusEvent::GpadlCreated { .. } | BusEvent::GpadlTornDown { .. } => {}
        }
    }

    /// One step of the life cycle, and those that follow from its effects.
    pub(crate) fn step(&self, event: Event) {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let stepped = {
                let mut control = lock(&self.shared.control);
                control.life.on(event).map(|effects| (effects, control.life.state()))
            };
            let (effects, state) = match stepped {
                Ok(step) => step,
                Err(refused) => {
                    tracing::debug!(channel = %self.name(), %refused, "event ignored");
                    return;
                }
            };
            // While callbacks run the channel is seen on its way; it is seen to rest only after them.
            // One that goes down takes no packet any more once the others are cancelled.
            if is_passing(state) {
                self.show(state);
            } else if state == ChannelState::Disabled && !effects.is_empty() {
                self.show(ChannelState::Closing);
            }
            next = effects.into_iter().find_map(|effect| self.perform(effect));
            if next.is_none() {
                self.show(state);
            }
        }
    }

    fn show(&self, state: ChannelState) {
        self.shared.state.store(state as u8, Ordering::Release);
    }

    // ---- Effects ----------------------------------------------------------------------------------

    /// Does one thing. A result is the event to go on with, and leaves later effects out.
    fn perform(&self, effect: Effect) -> Option<Event> {
        let callbacks = || lock(&self.shared.settings).state_change.clone();
        match effect {
            Effect::Connect => {} // done by `connect`, which can report its failure
            Effect::RequestOpen => self.request_open(),
            Effect::Attach => {
                if let Err(status) = self.attach() {
                    lock(&self.shared.control).failure = status;
                    return Some(Event::OpenRefused);
                }
            }
            Effect::CallOpened => return Some(self.call_opened()),
            Effect::AcceptOpen => self.with_server_link(|link| link.open_result(NtStatus::SUCCESS)),
            Effect::RefuseOpen => {
                let status = lock(&self.shared.control).failure;
                self.with_server_link(|link| link.open_result(status));
            }
            Effect::TransmitOn => {
                self.traffic().transmit_on();
                self.flush_outgoing();
            }
            Effect::CallStarted => {
                if let Some(callbacks) = callbacks() {
                    callbacks.started(self);
                }
            }
            Effect::QueueOn => self.set_queue_on(true),
            Effect::CallPostStarted => {
                if let Some(callbacks) = callbacks() {
                    callbacks.post_started(self);
                }
            }
            Effect::QueueOff => self.set_queue_on(false),
            Effect::CallSuspend => {
                if let Some(callbacks) = callbacks() {
                    callbacks.suspend(self);
                }
            }
            Effect::CancelOutgoing(status) => self.cancel_outgoing(status),
            Effect::AwaitDrain => {
                if self.traffic().await_drain() {
                    return Some(Event::Drained);
                }
            }
            Effect::CallClosed => {
                if let Some(callbacks) = callbacks() {
                    callbacks.closed(self);
                }
            }
            Effect::ReleaseGpadls => self.release_gpadls(),
            Effect::Detach => self.detach(),
            Effect::ReportClosed => self.with_server_link(|link| link.closed()),
            Effect::Disconnect => self.disconnect(),
            Effect::LetGo => self.let_go(),
            Effect::CallPnpFailure => {
                self.show(ChannelState::Disabled);
                let status = lock(&self.shared.control).failure;
                let failure = lock(&self.shared.settings).pnp_failure.clone();
                if let Some(failure) = failure {
                    failure.pnp_failure(self, status);
                }
            }
        }
        None
    }

    /// Enable: the only step whose caller waits for the bus's verdict.
    pub(crate) fn connect(&self) -> Result<(), Error> {
        let wrong = |state| Error::State { function: "enable", state };
        let _stepping = Stepping::wait(self).ok_or_else(|| wrong(self.state()))?;
        let settings = self.settings();
        if settings.interface_type == Guid::ZERO {
            return Err(wrong(self.state()));
        }
        let connection = {
            let mut control = lock(&self.shared.control);
            control.life.on(Event::Enable).map_err(|refused| wrong(refused.state))?;
            control.connection = control.connection.wrapping_add(1);
            control.instance = settings.interface_instance;
            control.mmio = None;
            control.connection
        };
        self.show(ChannelState::Enabled);
        let endpoint = Endpoint {
            events: EventSink::new(Arc::clone(&self.shared.mailbox), connection),
            doorbell: Arc::clone(&self.shared.doorbell) as _,
        };
        let link = match self.side() {
            Side::Server => {
                self.shared.bus.offer(offer(&settings), endpoint).map(|l| Link::Server(l.into()))
            }
            Side::Client => {
                self.shared.bus.bind(target(&settings), endpoint).map(|l| Link::Client(l.into()))
            }
        };
        match link {
            Ok(link) => {
                lock(&self.shared.control).link = link;
                Ok(())
            }
            Err(status) => {
                self.step(Event::ConnectRefused);
                Err(Error::Bus(status))
            }
        }
    }

    fn request_open(&self) {
        let settings = self.settings();
        let link = lock(&self.shared.control).link.client("open", ChannelState::Connecting);
        let (incoming_pages, outgoing_pages) = settings.ring_pages();
        if let Ok(link) = link {
            link.open(OpenRequest {
                incoming_pages,
                outgoing_pages,
                target_vp: settings.target_vp,
                user_data: settings.user_data,
            });
        }
    }

    fn attach(&self) -> Result<(), NtStatus> {
        let settings = self.settings();
        let rings = lock(&self.shared.control).rings.take().ok_or(NtStatus::UNSUCCESSFUL)?;
        let ends = RingReader::new(rings.incoming)
            .and_then(|reader| Ok((reader, RingWriter::new(rings.outgoing)?)));
        let (reader, writer) = ends.map_err(|error| {
            tracing::warn!(channel = %self.name(), %error, "open refused: bad ring");
            NtStatus::INVALID_PARAMETER
        })?;
        // From here on whatever may be sent or promised fits an empty ring.
        let (largest, most) = (settings.largest_packet(self.side()), writer.max_packet_bytes());
        if largest > most {
            tracing::warn!(channel = %self.name(), largest, most, "open refused: ring too small");
            return Err(NtStatus::INVALID_PARAMETER);
        }
        self.clear_stop();
        let bodies = pool::fill(&settings, &rings.memory, rings.residency.as_ref());
        let completion_size = settings.completion_size();
        self.traffic().attach(writer, rings.signal, bodies, completion_size, rings.resumed);
        let is_pipe = settings.is_pipe();
        let mut receiver = Box::new(Receiver::new(reader, settings.process_packet, is_pipe));
        receiver.mask();
        self.with_receiver(|_| Some(receiver));
        lock(&self.shared.control).resumed = rings.resumed;
        self.install_restored(rings.resumed).map_err(|error| {
            tracing::warn!(channel = %self.name(), %error, "open refused: the saved state does not fit");
            error.status()
        })?;
        let mut control = lock(&self.shared.control);
        control.memory = Some(rings.memory);
        control.user_data = Some(rings.user_data);
        Ok(())
    }

    fn call_opened(&self) -> Event {
        let callbacks = lock(&self.shared.settings).state_change.clone();
        match callbacks.map_or(Ok(()), |callbacks| callbacks.opened(self)) {
            Ok(()) => Event::OpenAccepted,
            Err(status) => {
                lock(&self.shared.control).failure = status;
                Event::OpenRefused
            }
        }
    }

    pub(crate) fn flush_outgoing(&self) {
        let mut done = Vec::new();
        let flushed = self.traffic().flush_now(&mut done);
        match flushed {
            Ok(ring) => ring.give(),
            Err(error) => self.stop(crate::ChannelError::Outgoing(error)),
        }
        for packet in done {
            Packet::end(packet, self, NtStatus::SUCCESS, &[]);
        }
    }

    fn cancel_outgoing(&self, status: NtStatus) {
        self.abandon_restore();
        let packets = self.traffic().take_outgoing();
        for packet in packets {
            Packet::end(packet, self, status, &[]);
        }
    }

    fn detach(&self) {
        // With what waits in front of the ring: it belonged to this opening.
        self.with_receiver(|_| None);
        self.traffic().detach();
        self.clear_stop();
        self.shared.mailbox.clear_answers();
        {
            let mut control = lock(&self.shared.control);
            control.memory = None;
            control.user_data = None;
            control.resumed = false;
        }
        // What slipped in between the cancelling and now.
        self.cancel_outgoing(NtStatus::DEVICE_REMOVED);
    }

    /// The channel goes on elsewhere. What the driver has of it is forgotten without a word: it ends
    /// there.
    fn let_go(&self) {
        let link = std::mem::replace(&mut lock(&self.shared.control).link, Link::None);
        if let Link::Server(link) = &link {
            link.moved_away();
        }
        drop(link);
        *lock(&self.shared.mappings) = Mappings::default();
        self.with_receiver(|_| None);
        let forgotten = {
            let mut traffic = self.traffic();
            traffic.detach();
            traffic.take_outgoing()
        };
        for packet in forgotten {
            drop(Packet::new(packet, self.clone()));
        }
        self.clear_stop();
        self.shared.mailbox.clear_answers();
        let mut control = lock(&self.shared.control);
        (control.memory, control.user_data, control.resumed) = (None, None, false);
    }

    fn disconnect(&self) {
        let link = std::mem::replace(&mut lock(&self.shared.control).link, Link::None);
        match link {
            Link::None => {}
            Link::Server(link) => link.revoke(),
            Link::Client(link) => link.close(),
        }
    }

    pub(crate) fn with_server_link(&self, call: impl FnOnce(&dyn ServerLink)) {
        let link = match &lock(&self.shared.control).link {
            Link::Server(link) => Some(Arc::clone(link)),
            _ => None,
        };
        if let Some(link) = link {
            call(&*link);
        }
    }
}

/// States that are seen while callbacks are still to come.
fn is_passing(state: ChannelState) -> bool {
    matches!(state, ChannelState::Opening | ChannelState::Pausing | ChannelState::Closing)
}

fn offer(settings: &Settings) -> Offer {
    let flags = settings.server_flags;
    let mut offer =
        Offer::new(settings.interface_type, settings.interface_instance.unwrap_or(Guid::ZERO));
    offer.subchannel_index = settings.subchannel_index;
    offer.enumerate_device_interface = flags.contains(ServerFlags::ENUMERATE_DEVICE_INTERFACE);
    offer.pipe = settings.is_pipe();
    offer.tlnpi_provider = flags.contains(ServerFlags::TLNPI_PROVIDER_OFFER);
    offer.loopback = flags.contains(ServerFlags::LOOPBACK_OFFER);
    offer.force_new_channel = flags.contains(ServerFlags::FORCE_NEW_CHANNEL);
    offer.mmio_megabytes = settings.mmio_megabytes;
    offer.mmio_megabytes_optional = settings.mmio_megabytes_optional;
    offer.target_vtl = settings.target_vtl;
    offer.user_defined = settings.user_data;
    if offer.pipe && !offer.tlnpi_provider && offer.user_defined == [0; USER_DATA_SIZE] {
        // Pipe mode here is one message a packet; zeroes would offer a stream of bytes, which is what a
        // socket connection is.
        offer.user_defined = zerocopy::transmute!(PipeUserDefined::message_pipe());
    }
    offer
}

fn target(settings: &Settings) -> Target {
    Target {
        interface_type: settings.interface_type,
        interface_instance: settings.interface_instance,
        subchannel_index: settings.subchannel_index,
    }
}

/// The right to step, given back on drop.
pub(crate) struct Stepping<'a>(&'a Channel);

impl<'a> Stepping<'a> {
    fn begin(channel: &'a Channel) -> Option<Self> {
        channel
            .shared
            .control_thread
            .compare_exchange(0, thread_mark::current(), Ordering::Acquire, Ordering::Relaxed)
            .ok()
            .map(|_| Self(channel))
    }

    /// Waits for its turn; `None` inside a callback, where the turn would never come.
    pub(crate) fn wait(channel: &'a Channel) -> Option<Self> {
        loop {
            let seen = channel.shared.mailbox.rung();
            if let Some(stepping) = Self::begin(channel) {
                return Some(stepping);
            }
            if channel.in_control_callback() || channel.in_packet_callback() {
                return None;
            }
            channel.shared.mailbox.wait(seen, None);
        }
    }
}

impl Channel {
    /// The right to step, for calls that change the channel beside its life cycle. `None` inside a
    /// callback.
    pub(crate) fn stepping(&self) -> Option<Stepping<'_>> {
        if self.in_packet_callback() { None } else { Stepping::wait(self) }
    }
}

impl Drop for Stepping<'_> {
    fn drop(&mut self) {
        self.0.shared.control_thread.store(0, Ordering::Release);
        self.0.shared.mailbox.pass_on();
        // Asked for by a callback, which could not wait for its own end.
        if let Some(number) = self.0.shared.hold.take_thaw_later() {
            self.0.thaw(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::ChannelFlags;

    /// A pipe here carries one message a packet, and says so in its offer, unless it is a socket
    /// connection or the device says something else (vmbus-wire section 3, `user_defined` in pipe mode).
    #[test]
    fn a_pipe_is_offered_as_a_message_pipe() {
        let mut own = [0; USER_DATA_SIZE];
        own[4] = 9;
        let (device, socket) = (ServerFlags::empty(), ServerFlags::TLNPI_PROVIDER_OFFER);
        for (flags, server_flags, user_data, expected) in [
            (ChannelFlags::empty(), device, [0; USER_DATA_SIZE], [0, 0, 0, 0, 0]),
            (ChannelFlags::IS_PIPE, device, [0; USER_DATA_SIZE], [4, 0, 0, 0, 0]),
            (ChannelFlags::IS_PIPE, device, own, [0, 0, 0, 0, 9]),
            (ChannelFlags::IS_PIPE, socket, [0; USER_DATA_SIZE], [0, 0, 0, 0, 0]),
        ] {
            let settings = Settings { flags, server_flags, user_data, ..Settings::default() };
            let got = offer(&settings).user_defined;
            assert_eq!(got[..5], expected, "{flags:?} {server_flags:?} {user_data:?}");
        }
    }
}
