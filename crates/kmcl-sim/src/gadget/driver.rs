//! The guest's end of the second device.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kmcl::{
    Channel, ChannelState, GpadlFlags, IncomingPacket, NtStatus, Packet, PacketCompletion,
    ProcessPacket, SendFlags, Side,
};
use vmbus_guest::GuestBus;
use vmbus_memory::PageRun;
use vmbus_wire::ranges::GpaRange;
use zerocopy::IntoBytes;

use super::wire::{self, Answer, Message};
use crate::log::{Log, Way};
use crate::rng::Rng;
use crate::tasks::Tasks;

/// A driver, from its binding to the end of its last packet.
pub(crate) struct GadgetDriver {
    channel: Channel,
    shared: Arc<Shared>,
    /// Decides what is asked for, apart from when: the same in every run of a seed.
    workload: Rng,
    work_left: u64,
    /// Most packets under way.
    depth: u64,
    gpadl: Gpadl,
}

/// Where the driver is with its GPADL.
enum Gpadl {
    None,
    /// The device was told to map it.
    Mapped {
        handle: u32,
        pages: PageRun,
    },
    /// The device was asked to let go.
    Unmapping {
        handle: u32,
        pages: PageRun,
    },
    Gone,
}

struct Shared {
    log: Arc<Log>,
    inner: Mutex<Inner>,
}

struct Inner {
    rng: Rng,
    now: u64,
    /// Pages whose packets are under way, by number.
    pages: BTreeMap<u64, PageRun>,
    /// Events to be completed later.
    held: Vec<(u64, IncomingPacket, u64)>,
    /// Counters that the work done should leave in the GPADL.
    counters: Vec<u64>,
    counting: bool,
}

/// Something that the driver can do by itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Chore {
    /// Sends the next packet.
    Send,
    /// Describes pages to the device and has it map them. Only while the bus is at rest.
    Map,
    /// Takes the pages back.
    Unmap,
    /// Completes an event.
    Complete(u64),
}

impl GadgetDriver {
    /// A driver on `bus`, bound to its device as soon as that is offered.
    pub(crate) fn new(
        bus: &GuestBus,
        tasks: &Tasks,
        log: &Arc<Log>,
        work: u64,
        depth: u64,
        workload: Rng,
        rng: Rng,
    ) -> Result<Self, kmcl::Error> {
        let shared = Arc::new(Shared {
            log: Arc::clone(log),
            inner: Mutex::new(Inner {
                rng,
                now: 0,
                pages: BTreeMap::new(),
                held: Vec::new(),
                counters: vec![0; usize::try_from(wire::COUNTERS).unwrap_or(0)],
                counting: false,
            }),
        });
        let channel = Channel::allocate(Side::Client, Arc::new(bus.clone()));
        channel.init_set_friendly_name("gadget driver")?;
        channel.init_set_maximum_packet_size(wire::MAX_BYTES)?;
        channel.init_set_maximum_completion_size(16)?;
        channel.init_set_maximum_packet_count(8)?;
        channel.init_set_maximum_external_data(4096, 1)?;
        channel.init_set_process_packet_callbacks(Arc::clone(&shared) as _)?;
        channel.client_init_set_ring_buffer_page_count(2, 2)?;
        channel.client_init_set_target_pnp(wire::INTERFACE, None, None)?;
        tasks.add(&channel);
        channel.enable()?;
        channel.start();
        Ok(Self { channel, shared, workload, work_left: work, depth, gpadl: Gpadl::None })
    }

    pub(crate) fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Whether everything was sent and has ended.
    pub(crate) fn is_done(&self) -> bool {
        self.work_left == 0
            && self.shared.log.outstanding(Way::Work) == 0
            && matches!(self.gpadl, Gpadl::Gone)
    }

    /// What the driver can do, and when.
    pub(crate) fn chores(&self, now: u64, bus_is_at_rest: bool, mut found: impl FnMut(u64, Chore)) {
        let mut inner = self.shared.lock();
        inner.now = now;
        for (number, _, due) in &inner.held {
            found(*due, Chore::Complete(*number));
        }
        if self.channel.state() != ChannelState::Active {
            return;
        }
        let outstanding = self.shared.log.outstanding(Way::Work);
        if self.work_left > 0 && outstanding < self.depth {
            found(now, Chore::Send);
        }
        match self.gpadl {
            Gpadl::None if bus_is_at_rest => found(now, Chore::Map),
            Gpadl::Mapped { .. } if self.work_left == 0 && outstanding == 0 => {
                found(now, Chore::Unmap);
            }
            Gpadl::Unmapping { .. } if outstanding == 0 && bus_is_at_rest => {
                found(now, Chore::Unmap);
            }
            _ => {}
        }
    }

    pub(crate) fn do_chore(&mut self, chore: Chore) {
        match chore {
            Chore::Send => self.send_work(),
            Chore::Map => self.map(),
            Chore::Unmap => self.unmap(),
            Chore::Complete(number) => {
                let mut inner = self.shared.lock();
                let at = inner.held.iter().position(|(held, ..)| *held == number);
                let held = at.map(|at| inner.held.swap_remove(at));
                drop(inner);
                if let Some((number, packet, _)) = held {
                    packet.complete(Answer::to(number).as_bytes());
                }
            }
        }
    }

    /// Lets go of packets and channel, which hold each other.
    pub(crate) fn abandon(&self) {
        self.channel.clear_waker();
        let held = std::mem::take(&mut self.shared.lock().held);
        for (_, packet, _) in held {
            packet.complete(&[]);
        }
        self.channel.disable();
    }

    fn send_work(&mut self) {
        self.work_left -= 1;
        let manner = u32::try_from(self.workload.below(wire::manner::COUNT)).unwrap_or(0);
        let kind = if self.workload.once_in(8) { wire::NOTE } else { wire::WORK };
        let with_page = kind == wire::WORK && self.workload.once_in(3);
        let pages = with_page.then(|| self.channel.allocate_pages(1).expect("pages enough"));
        self.send(kind, manner, 0, pages);
    }

    fn send(&mut self, kind: u32, manner: u32, argument: u64, pages: Option<PageRun>) {
        let log = &self.shared.log;
        let mut packet = self.channel.packet_allocate().expect("far below the bound");
        let number = log.sent(Way::Work);
        packet.set_pointer(usize::try_from(number).unwrap_or(0));
        packet.set_completion_routine(Arc::clone(&self.shared) as _);
        let wanted = kind != wire::NOTE;
        let flags = if wanted { SendFlags::WAIT_FOR_COMPLETION } else { SendFlags::empty() };
        let message = Message::new(kind, manner, number, argument).padded();
        let pfns: Vec<u64> = pages.iter().flat_map(PageRun::pfns).collect();
        let range = GpaRange { byte_count: 4096, byte_offset: 0, pfns: &pfns };
        let external = pages.is_some().then_some(std::slice::from_ref(&range));
        {
            let inner = &mut *self.shared.lock();
            inner.pages.extend(pages.map(|pages| (number, pages)));
            if inner.counting && matches!(kind, wire::WORK | wire::NOTE) {
                let at = usize::try_from(number % wire::COUNTERS).unwrap_or(0);
                inner.counters[at] += 1;
            }
        }
        if let Err(refused) = packet.send(&message, external, flags) {
            log.violation(format_args!("work {number} refused: {}", refused.error));
        }
    }

    fn map(&mut self) {
        let pages = self.channel.allocate_pages(wire::GPADL_PAGES).expect("pages enough");
        pages.slice().expect("pages of a run").fill(0);
        match self.channel.create_gpadl_from_pages(GpadlFlags::empty(), &pages) {
            Ok(handle) => {
                self.send(wire::MAP, 0, u64::from(handle), None);
                // What is sent from here on is counted.
                self.shared.lock().counting = true;
                self.gpadl = Gpadl::Mapped { handle, pages };
            }
            Err(error) => self.shared.log.violation(format_args!("no GPADL: {error}")),
        }
    }

    fn unmap(&mut self) {
        self.gpadl = match std::mem::replace(&mut self.gpadl, Gpadl::Gone) {
            Gpadl::Mapped { handle, pages } => {
                self.send(wire::UNMAP, 0, 0, None);
                Gpadl::Unmapping { handle, pages }
            }
            Gpadl::Unmapping { handle, pages } => {
                self.channel.delete_gpadl(handle);
                self.check_counters(&pages);
                Gpadl::Gone
            }
            other => other,
        };
    }

    /// Everything was done once.
    fn check_counters(&self, pages: &PageRun) {
        let inner = self.shared.lock();
        let slice = pages.slice().expect("pages of a run");
        for (at, expected) in inner.counters.iter().enumerate() {
            let found = slice.load_u64(at * 8);
            if found != Some(*expected) {
                let log = &self.shared.log;
                log.violation(format_args!("counter {at} is {found:?}, not {expected}"));
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PacketCompletion for Shared {
    fn completed(&self, packet: Packet, status: NtStatus, payload: &[u8]) {
        let number = packet.pointer() as u64;
        self.log.ended(Way::Work, number, status);
        let inner = &mut *self.lock();
        let pages = inner.pages.remove(&number);
        if status != NtStatus::SUCCESS || payload.is_empty() {
            return; // a note, or a channel that went down
        }
        if Answer::parse(payload) != Some(number) {
            self.log.violation(format_args!("work {number} ended with {payload:02x?}"));
        }
        if let Some(pages) = pages {
            let found = pages.slice().ok().and_then(|slice| slice.load_u64(0));
            if found != Some(wire::expected(number)) {
                self.log.violation(format_args!("work {number} left {found:x?} in its page"));
            }
        }
    }
}

impl ProcessPacket for Shared {
    fn process_packet(&self, _channel: &Channel, packet: IncomingPacket) {
        let number = Message::parse(packet.payload()).map_or(0, |message| message.number.get());
        self.log.seen(Way::Event, number);
        let inner = &mut *self.lock();
        if packet.wants_completion() && !inner.rng.once_in(3) {
            let due = inner.now + inner.rng.delay();
            inner.held.push((number, packet, due));
        } else {
            packet.complete(Answer::to(number).as_bytes());
        }
    }
}
