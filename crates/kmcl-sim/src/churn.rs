//! A channel that carries nothing and is never left alone: opened, closed, described pages on,
//! moved, withdrawn and offered again. What it is for is the control plane.

use std::collections::BTreeMap;
use std::sync::Arc;

use kmcl::bus::{
    Bus, BusEvent, ClientLink, Doorbell, Endpoint, EventSink, GpadlPages, OpenRequest, PageRange,
    Recorder, Target,
};
use kmcl::{Channel, ChannelState, Guid, NtStatus, Side, StateChange};
use vmbus_guest::GuestBus;
use vmbus_host::HostBus;
use vmbus_memory::PageRun;

use crate::log::Log;
use crate::rng::Rng;
use crate::tasks::Tasks;

const INTERFACE: Guid = Guid::from_u128(0x6368_7572_6e00_0000_0000_0000_0000_0001);
const INSTANCE: Guid = Guid::from_u128(0x6368_7572_6e00_0000_0000_0000_0000_0002);

/// GPADLs that the guest has at a time.
const MAX_GPADLS: usize = 3;

/// The host's end: accepts most opens.
pub(crate) struct ChurnDevice {
    channel: Channel,
}

struct Accepts;

impl StateChange for Accepts {
    fn opened(&self, channel: &Channel) -> Result<(), NtStatus> {
        // The client says what it wants to hear.
        match channel.open_user_data() {
            Some([0, ..]) | None => Ok(()),
            Some(_) => Err(NtStatus::DEVICE_NOT_READY),
        }
    }
}

impl ChurnDevice {
    pub(crate) fn new(bus: &HostBus, tasks: &Tasks) -> Result<Self, kmcl::Error> {
        let channel = Channel::allocate(Side::Server, Arc::new(bus.clone()));
        channel.init_set_friendly_name("churn")?;
        channel.init_set_state_change_callbacks(Arc::new(Accepts))?;
        channel.server_init_set_target_interface_id(INTERFACE, INSTANCE)?;
        tasks.add(&channel);
        Ok(Self { channel })
    }

    pub(crate) fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Makes the offer.
    pub(crate) fn offer(&self) -> Result<(), kmcl::Error> {
        self.channel.enable()?;
        self.channel.start();
        Ok(())
    }

    /// Withdraws the offer, or makes it again.
    pub(crate) fn toggle(&self) -> Result<(), kmcl::Error> {
        match self.channel.state() {
            ChannelState::Disabled => self.offer(),
            _ => {
                self.channel.begin_disable();
                Ok(())
            }
        }
    }

    pub(crate) fn is_offered(&self) -> bool {
        self.channel.state() != ChannelState::Disabled
    }
}

/// The guest's end, below the library: it sees every event of the bus.
pub(crate) struct ChurnUser {
    log: Arc<Log>,
    bus: GuestBus,
    rng: Rng,
    end: Option<End>,
    /// Things still to be done.
    left: u32,
}

struct End {
    link: Box<dyn ClientLink>,
    recorder: Recorder,
    phase: Phase,
    gpadls: BTreeMap<u32, (Described, PageRun)>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    /// Waits for an offer.
    Unbound,
    Closed,
    Opening,
    Open,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Described {
    Creating,
    Created,
    TearingDown,
}

/// Rung by nobody: the channel carries nothing.
pub(crate) struct Silent;

impl Doorbell for Silent {
    fn ring(&self) {}

    fn event_fd(&self) -> std::io::Result<std::os::fd::BorrowedFd<'_>> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

impl ChurnUser {
    pub(crate) fn new(bus: &GuestBus, log: &Arc<Log>, rounds: u32, rng: Rng) -> Self {
        let (log, bus) = (Arc::clone(log), bus.clone());
        Self { log, bus, rng, end: None, left: rounds }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.left == 0 && self.end.as_ref().is_none_or(End::is_at_rest)
    }

    /// Whether there is something to do.
    pub(crate) fn wants_turn(&self) -> bool {
        self.left > 0
    }

    /// Takes in what the bus has said.
    pub(crate) fn listen(&mut self) {
        let Some(end) = &mut self.end else { return };
        let mut is_over = false;
        for event in end.recorder.take() {
            is_over |= end.take(&self.log, event);
        }
        if is_over {
            self.log.line(format_args!("churn: rescinded"));
            self.end = None;
        }
    }

    /// Does one thing.
    pub(crate) fn turn(&mut self) {
        self.listen();
        self.left -= 1;
        let Some(end) = &mut self.end else {
            let target = Target {
                interface_type: INTERFACE,
                interface_instance: Some(INSTANCE),
                subchannel_index: 0,
            };
            let (events, recorder) = EventSink::recorder();
            let endpoint = Endpoint { events, doorbell: Arc::new(Silent) };
            let link = self.bus.bind(target, endpoint).expect("one client more is welcome");
            self.log.line(format_args!("churn: bound"));
            let gpadls = BTreeMap::new();
            self.end = Some(End { link, recorder, phase: Phase::Unbound, gpadls });
            return;
        };
        end.turn(&mut self.rng, &self.log, &self.bus);
    }

    /// Lets go of the channel.
    pub(crate) fn close(&mut self) {
        self.end = None;
    }
}

impl End {
    fn is_at_rest(&self) -> bool {
        self.phase != Phase::Opening
            && self.gpadls.values().all(|(described, _)| *described == Described::Created)
    }

    /// Takes an event in; whether it was the last one.
    fn take(&mut self, log: &Log, event: BusEvent) -> bool {
        let before = self.phase;
        match (event, before) {
            (BusEvent::Offered { .. }, Phase::Unbound) => self.phase = Phase::Closed,
            (BusEvent::OpenCompleted(result), Phase::Opening) => {
                log.line(format_args!("churn: open {:?}", result.as_ref().map(|_| ())));
                self.phase = if result.is_ok() { Phase::Open } else { Phase::Closed };
            }
            (BusEvent::GpadlCreated { gpadl, status }, _) => {
                log.line(format_args!("churn: GPADL {gpadl:#x} created: {status}"));
                match self.gpadls.get_mut(&gpadl) {
                    Some((described @ Described::Creating, _)) if status.is_success() => {
                        *described = Described::Created;
                    }
                    // It has crossed a rescind, which is still to come.
                    Some((Described::Creating, _)) if status == NtStatus::DEVICE_REMOVED => {
                        self.gpadls.remove(&gpadl);
                    }
                    other => {
                        let state = other.map(|(described, _)| *described);
                        log.violation(format_args!("GPADL {gpadl:#x}: {status} when {state:?}"));
                    }
                }
            }
            (BusEvent::GpadlTornDown { gpadl }, _) => {
                log.line(format_args!("churn: GPADL {gpadl:#x} torn down"));
                let state = self.gpadls.remove(&gpadl).map(|(described, _)| described);
                if state != Some(Described::TearingDown) {
                    log.violation(format_args!("GPADL {gpadl:#x} torn down when {state:?}"));
                }
            }
            (BusEvent::Rescinded, _) => return true,
            (event, _) => {
                let name = match event {
                    BusEvent::Offered { .. } => "offered",
                    BusEvent::OpenCompleted(_) => "open completed",
                    BusEvent::ConnectFailed(_) => "connect failed",
                    _ => "something for hosts",
                };
                log.violation(format_args!("churn: {name} when {before:?}"));
            }
        }
        false
    }

    fn turn(&mut self, rng: &mut Rng, log: &Log, bus: &GuestBus) {
        let channel_id = bus.offers().into_iter().find(|offer| offer.interface_type == INTERFACE);
        match (rng.below(6), self.phase) {
            (_, Phase::Unbound) | (_, Phase::Opening) => {}
            (0 | 1, Phase::Closed) => {
                let mut user_data = [0; kmcl::bus::USER_DATA_SIZE];
                user_data[0] = u8::from(rng.once_in(4));
                let request = OpenRequest {
                    incoming_pages: u32::try_from(rng.between(2, 24)).unwrap_or(2),
                    outgoing_pages: u32::try_from(rng.between(2, 24)).unwrap_or(2),
                    target_vp: u32::try_from(rng.below(2)).unwrap_or(0),
                    user_data,
                };
                log.line(format_args!("churn: opens"));
                self.phase = Phase::Opening;
                self.link.open(request);
            }
            (0, Phase::Open) => {
                log.line(format_args!("churn: closes"));
                self.phase = Phase::Closed;
                self.link.close();
                // That takes back what was described, and nobody hears of it.
                self.gpadls.retain(|_, (described, _)| *described == Described::TearingDown);
            }
            (1, Phase::Open) => {
                if let Some(offer) = channel_id {
                    let vp = u32::try_from(rng.below(2)).unwrap_or(0);
                    let asked = bus.modify_channel(offer.channel_id, vp);
                    log.line(format_args!("churn: moves to VP {vp}: {asked:?}"));
                }
            }
            (2 | 3, _) if self.gpadls.len() < MAX_GPADLS => {
                let count = u32::try_from(rng.between(1, 70)).unwrap_or(1);
                let Ok(pages) = bus.pages().allocate(count) else { return };
                let byte_count = count * 4096;
                let pfns = pages.pfns().collect();
                let ranges = vec![PageRange { byte_count, byte_offset: 0, pfns }];
                match self.link.create_gpadl(GpadlPages { ranges, read_only: false }) {
                    Ok(gpadl) => {
                        log.line(format_args!("churn: GPADL {gpadl:#x} of {count} pages"));
                        self.gpadls.insert(gpadl, (Described::Creating, pages));
                    }
                    Err(status) => log.line(format_args!("churn: no GPADL: {status}")),
                }
            }
            _ => {
                let created = |(_, (described, _)): &(&u32, &mut (Described, PageRun))| {
                    *described == Described::Created
                };
                if let Some((&gpadl, (described, _))) = self.gpadls.iter_mut().find(created) {
                    log.line(format_args!("churn: tears GPADL {gpadl:#x} down"));
                    *described = Described::TearingDown;
                    self.link.teardown_gpadl(gpadl);
                }
            }
        }
    }
}
