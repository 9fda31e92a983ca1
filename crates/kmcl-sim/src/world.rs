//! The world: who is in it, what can happen next, and the choice.

use std::collections::BTreeSet;
use std::sync::Arc;

use vmbus_guest::{ConnectionState, PostStatus};
use vmbus_host::{Connection, OfferState};
use vmbus_memory::GuestMemory;
use vsp_storage::block::{TestBackend, TestMedium};

use crate::disk;
use crate::gadget::{device, driver};
use crate::guest::{Guest, PAGES};
use crate::host::Host;
use crate::log::{Log, Way};
use crate::moves::Hold;
use crate::outcome::Outcome;
use crate::plan::Plan;
use crate::rng::Rng;
use crate::storage;
use crate::trace::Trace;
use crate::wires::{Arrival, Wires, deliver_to_host};
use crate::wiretap::{WireCounts, Wiretap};

/// Steps after which a world that does not come to its end is given up: some hundred times what the
/// plans here take.
const MAX_STEPS: u64 = 200_000;

/// See the [crate].
pub struct World {
    pub(crate) plan: Plan,
    pub(crate) log: Arc<Log>,
    pub(crate) rng: Rng,
    pub(crate) now: u64,
    steps: u64,
    phase: Phase,
    pub(crate) wires: Arc<Wires>,
    pub(crate) medium: TestMedium,
    pub(crate) guest: Guest,
    /// None after the host's end, until another has taken over.
    pub(crate) host: Option<Host>,
    pub(crate) hold: Option<Hold>,
    wiretap: Wiretap,
    /// Back ends of former hosts: what they have begun goes on.
    pub(crate) ghosts: Vec<Arc<TestBackend>>,
}

/// Where the guest is with its work.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Phase {
    Working,
    /// All is done: its channels are closed.
    Closing,
    /// It was told to leave the bus.
    Unloading,
    Over,
}

/// One thing that can happen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Action {
    Arrives(Arrival),
    /// Puts a device on the bus.
    Offers(usize),
    Withdraws,
    HostProcesses(u32),
    GuestProcesses(u32),
    /// Time comes at which something happens on the disk.
    DiskMoves,
    DiskReports,
    Device(device::Chore),
    Driver(driver::Chore),
    Storage(storage::Chore),
    Connects,
    BindsDriver,
    Churns,
    AsksForSocket,
    RefusesSocket,
    Closes,
    Unloads,
}

impl World {
    /// The world of `seed`, before its first step.
    #[must_use]
    pub fn new(seed: u64, plan: Plan) -> Self {
        let mut rng = Rng::new(seed);
        let log = Log::new(Trace::new(plan.traced));
        let memory = GuestMemory::memfd(PAGES * 4096).expect("memory for a guest");
        let wires = Wires::new(memory.clone(), &log, rng.fork());
        let medium = disk::new_medium(rng.fork(), plan.slow_disk);
        let guest = Guest::new(&plan, &log, &wires, &memory, &mut rng);
        let host = Host::new(&plan, &log, &wires, &medium, &mut rng);
        Self {
            plan,
            log,
            rng,
            now: 0,
            steps: 0,
            phase: Phase::Working,
            wires,
            medium,
            guest,
            host: Some(host),
            hold: None,
            wiretap: Wiretap::new(memory),
            ghosts: Vec::new(),
        }
    }

    /// Steps so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// What has happened so far, if the plan says that it is kept.
    #[must_use]
    pub fn trace(&self) -> Trace {
        self.log.trace()
    }

    /// Takes one step; `false` if there is none to take.
    pub fn step(&mut self) -> bool {
        self.guest.churn.listen();
        self.guest.sockets.listen();
        let mut actions = self.actions();
        let Some(soonest) = actions.iter().map(|(due, _)| *due).min() else { return false };
        if self.steps >= MAX_STEPS {
            self.log.violation(format_args!("no end after {MAX_STEPS} steps"));
            return false;
        }
        self.steps += 1;
        self.now = self.now.max(soonest);
        self.wires.set_now(self.now);
        self.log.set_now(self.now);
        disk::advance(&self.medium, self.now);
        let now = self.now;
        actions.retain(|(due, _)| *due <= now);
        let (_, action) = actions[self.rng.index(actions.len())];
        self.log.line(format_args!("{action:?}"));
        self.perform(action);
        self.look();
        self.now += 1;
        true
    }

    /// Goes on until nothing is left to do, and judges.
    pub fn finish(&mut self) -> Outcome {
        while self.step() {}
        self.judge()
    }

    /// What the host is in the middle of, in words.
    #[must_use]
    pub fn conditions(&self) -> BTreeSet<String> {
        let mut conditions = BTreeSet::new();
        let Some(host) = &self.host else { return conditions };
        let mut note = |is_so: bool, what: &str| {
            if is_so {
                conditions.insert(what.to_owned());
            }
        };
        host.bus.inspect(|bus| {
            let connection = bus.connection();
            note(matches!(connection, Connection::Disconnected), "disconnected");
            note(matches!(connection, Connection::Disconnecting { .. }), "disconnecting");
            note(connection.established().is_some(), "connected");
            for (_, channel) in bus.channels() {
                note(true, &format!("a channel {}", channel.open.name()));
                note(channel.modifying.is_some(), "a channel modified");
                note(channel.offer == OfferState::Hidden, "an offer hidden");
                note(channel.offer == OfferState::Rescinded, "an offer rescinded");
            }
            let usage = bus.usage();
            note(usage.incomplete_gpadls > 0, "a GPADL received in part");
            note(usage.messages > 0, "a message waiting");
            note(usage.hvsock_requests > 0, "a socket asked for");
        });
        let (queued, in_flight) = host.gadget.channel().outgoing_in_use();
        note(queued > 0, "outgoing packets queued");
        note(in_flight > 0, "outgoing packets in flight");
        note(host.gadget.channel().incoming_outstanding() > 0, "incoming packets in flight");
        let (gathered, submitted) = host.controller.in_flight();
        note(gathered > 0, "disk requests not begun");
        note(submitted > 0, "disk requests running");
        conditions
    }

    /// Looks at what was written to the rings.
    pub(crate) fn look(&mut self) {
        if let Some(host) = &self.host {
            self.wiretap.look(&host.bus, &self.log);
        }
    }

    /// Packets that were seen in the rings.
    #[must_use]
    pub fn wire_counts(&self) -> WireCounts {
        self.wiretap.counts()
    }

    /// What can happen, and from when on.
    fn actions(&mut self) -> Vec<(u64, Action)> {
        let now = self.now;
        let mut actions = Vec::with_capacity(32);
        let mut arrivals = Vec::new();
        let host_listens = self.host.is_some() && self.hold.is_none();
        self.wires.arrivals(host_listens, &mut arrivals);
        actions.extend(arrivals.into_iter().map(|(due, it)| (due, Action::Arrives(it))));
        actions.extend(disk::next_at(&self.medium).map(|due| (due, Action::DiskMoves)));
        if let Some(host) = &mut self.host {
            host.actions(now, self.hold.is_some(), &mut actions);
        }
        self.guest.actions(now, self.phase, self.bus_is_at_rest(), &mut actions);
        match self.phase {
            Phase::Working if self.is_done() => actions.push((now, Action::Closes)),
            // A guest that is in a hurry does not wait until its channels are closed.
            Phase::Closing if self.plan.hurried || actions.is_empty() => {
                actions.push((now, Action::Unloads));
            }
            _ => {}
        }
        actions
    }

    /// Whether a message that is posted now meets no other one.
    fn bus_is_at_rest(&self) -> bool {
        self.hold.is_none()
            && self.wires.is_quiet()
            && self.guest.bus.counts().guest.messages == 0
            && self.host.as_ref().is_some_and(|host| host.bus.usage().messages == 0)
    }

    fn is_done(&self) -> bool {
        self.guest.is_done()
            && self.hold.is_none()
            && self
                .host
                .as_ref()
                .is_some_and(|host| host.offered == [true; 3] && host.gadget.is_done())
            && self.log.outstanding(Way::Event) == 0
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Arrives(arrival) => self.arrive(arrival),
            Action::GuestProcesses(id) => {
                self.guest.tasks.run(id);
            }
            Action::DiskMoves => {} // it has, with the time
            Action::Driver(chore) => self.drive(chore),
            Action::Storage(chore) => self.guest.storage.do_chore(chore),
            Action::Connects => self.guest.bus.connect().expect("not connected yet"),
            Action::BindsDriver => self.guest.bind(&self.plan, &self.log),
            Action::Churns => {
                self.guest.churn_due = self.now + self.rng.between(1, 30);
                self.guest.churn.turn();
            }
            Action::AsksForSocket => {
                self.guest.sockets_due = self.now + self.rng.between(1, 60);
                self.guest.sockets.turn();
            }
            Action::Closes => {
                self.phase = Phase::Closing;
                self.guest.close();
            }
            Action::Unloads => {
                self.phase = Phase::Unloading;
                self.guest.bus.unload().expect("connected");
            }
            Action::Offers(_)
            | Action::Withdraws
            | Action::HostProcesses(_)
            | Action::DiskReports
            | Action::Device(_)
            | Action::RefusesSocket => {
                let host = self.host.as_mut().expect("its own action");
                host.perform(action, self.now, &mut self.rng);
            }
        }
        if self.phase == Phase::Unloading && self.guest.bus.state() == ConnectionState::Unloaded {
            self.phase = Phase::Over;
        }
    }

    fn arrive(&mut self, arrival: Arrival) {
        let Self { wires, guest, host, log, .. } = self;
        match arrival {
            Arrival::Post => {
                let (Some(post), Some(host)) = (wires.take_post(), host) else { return };
                let busy = self.rng.once_in(16);
                let status = match busy {
                    true => PostStatus::INSUFFICIENT_BUFFERS,
                    false => deliver_to_host(&host.bus, post.connection_id, &post.message),
                };
                log.line(format_args!("{:?}: {status}", post.message.first()));
                guest.bus.message_posted(status).expect("a message was posted");
            }
            Arrival::Retry => {
                wires.take_retry();
                guest.bus.retry_post();
            }
            Arrival::Slot(slot) => {
                let Some((message, is_awaited)) = wires.take_slot(slot) else { return };
                log.line(format_args!("message {:?}", message.first()));
                wires.deliver_to_guest(&message);
                if let (Some(host), true) = (host, is_awaited) {
                    host.bus.messages_drained();
                }
            }
            Arrival::Connection(id) => {
                wires.take_connection(id);
                // Of a channel that was closed meanwhile: a signal to nobody.
                let _known = host.as_ref().map(|host| host.bus.guest_signal(id, 0));
            }
            Arrival::Flag(flag) => {
                wires.take_flag(flag);
                let (_, _, number) = flag;
                match guest.is_legacy() {
                    true => guest.bus.legacy_interrupt(),
                    false => guest.bus.interrupt(number),
                }
            }
        }
    }

    /// A chore of the second device's driver. GPADLs are made and taken back by calls that wait for
    /// the host, so the host is there at once.
    fn drive(&mut self, chore: driver::Chore) {
        let Some(driver) = &mut self.guest.gadget else { return };
        let waits = matches!(chore, driver::Chore::Map | driver::Chore::Unmap);
        if waits {
            let host = self.host.as_ref().expect("the bus is at rest");
            self.wires.set_direct(Some(host.bus.clone()));
        }
        driver.do_chore(chore);
        self.wires.set_direct(None);
    }

    fn judge(&mut self) -> Outcome {
        if self.phase != Phase::Over {
            self.log.violation(format_args!(
                "stuck: {:?}, {:?}, {:?}, {:?}, storage {} under way, work {}, events {}",
                self.phase,
                self.guest.bus.state(),
                self.guest.bus.counts(),
                self.host.as_ref().map(|host| host.bus.usage()),
                self.guest.storage.in_flight(),
                self.log.outstanding(Way::Work),
                self.log.outstanding(Way::Event),
            ));
        } else if let Some(host) = &self.host {
            let usage = host.bus.usage();
            let left = (usage.held, usage.gpadls, usage.incomplete_gpadls, usage.messages);
            if left != (0, 0, 0, 0) {
                self.log.violation(format_args!("the host keeps {usage:?}"));
            }
            let counts = self.guest.bus.counts();
            if counts.rings != 0 || counts.guest.gpadls != 0 {
                self.log.violation(format_args!("the guest keeps {counts:?}"));
            }
        }
        let medium = &self.medium;
        if medium.overlaps() != 0 {
            let writes = medium.overlaps();
            self.log.violation(format_args!("{writes} writes came while others could still land"));
        }
        self.guest.storage.judge(|block| disk::block(medium, block));
        Outcome {
            storage: self.guest.storage.ends().clone(),
            blocks: (0..disk::BLOCKS).map(|block| disk::block(medium, block)).collect(),
            packets: self.log.ends(),
            violations: self.log.violations(),
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() || !self.log.violations().is_empty() {
            // Something is lost or broken, and a device could wait for it for ever.
            std::mem::forget((self.hold.take(), self.host.take()));
            return;
        }
        self.hold = None;
        // What is under way lands, so that nothing waits for it when the devices go.
        disk::settle(&self.medium);
        if let Some(host) = &self.host {
            host.abandon();
        }
        if let Some(driver) = &self.guest.gadget {
            driver.abandon();
        }
    }
}
