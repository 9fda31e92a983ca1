//! The world: who is in it, what can happen next, and the choice.

use std::sync::Arc;

use kmcl::Guid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmbus_guest::{ConnectionState, GuestBus, GuestConfig, PostStatus};
use vmbus_host::{Config, HostBus};
use vmbus_memory::{GuestMemory, PageAllocator};
use vsp_storage::block::{Backend as _, TestBackend, TestMedium};
use vsp_storage::{ControllerConfig, Disk, DiskOptions, ScsiController};

use crate::churn::{ChurnDevice, ChurnUser};
use crate::disk;
use crate::gadget::device::{self, Gadget};
use crate::gadget::driver::{self, GadgetDriver};
use crate::log::{Log, Way};
use crate::outcome::Outcome;
use crate::plan::Plan;
use crate::rng::Rng;
use crate::storage::{self, StorageUser};
use crate::tasks::Tasks;
use crate::trace::Trace;
use crate::wires::{Arrival, Wires, deliver_to_host};

/// Pages of the guest's memory.
const PAGES: u64 = 1024;

/// Steps after which a world that does not come to its end is given up: some hundred times what the
/// plans here take.
const MAX_STEPS: u64 = 200_000;

/// See the [crate].
pub struct World {
    plan: Plan,
    log: Arc<Log>,
    rng: Rng,
    now: u64,
    steps: u64,
    phase: Phase,
    wires: Arc<Wires>,
    medium: TestMedium,
    guest: Guest,
    host: Host,
}

/// Where the guest is with its work.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    Working,
    /// All is done: its channels are closed.
    Closing,
    /// It was told to leave the bus.
    Unloading,
    Over,
}

struct Guest {
    bus: GuestBus,
    tasks: Arc<Tasks>,
    storage: StorageUser,
    gadget: Option<GadgetDriver>,
    gadget_rngs: [Rng; 2],
    churn: ChurnUser,
    churn_due: u64,
}

struct Host {
    bus: HostBus,
    tasks: Arc<Tasks>,
    backend: Arc<TestBackend>,
    controller: ScsiController,
    gadget: Gadget,
    churn: ChurnDevice,
    /// Which devices are offered: controller, gadget, churn.
    offered: [bool; 3],
    withdrawals_left: u32,
    withdrawal_due: u64,
}

/// One thing that can happen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Action {
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
        let medium = disk::new_medium(rng.fork());
        let guest = Guest::new(&plan, &log, &wires, &memory, &mut rng);
        let host = Host::new(&plan, &log, &wires, &medium, &mut rng);
        Self { plan, log, rng, now: 0, steps: 0, phase: Phase::Working, wires, medium, guest, host }
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
        self.now += 1;
        true
    }

    /// Goes on until nothing is left to do, and judges.
    pub fn finish(&mut self) -> Outcome {
        while self.step() {}
        self.judge()
    }

    /// What can happen, and from when on.
    fn actions(&mut self) -> Vec<(u64, Action)> {
        let now = self.now;
        let mut actions = Vec::with_capacity(32);
        let mut arrivals = Vec::new();
        self.wires.arrivals(true, &mut arrivals);
        actions.extend(arrivals.into_iter().map(|(due, it)| (due, Action::Arrives(it))));
        actions.extend(disk::next_at(&self.medium).map(|due| (due, Action::DiskMoves)));
        self.host.actions(now, &mut actions);
        self.guest.actions(now, self.phase, self.bus_is_at_rest(), &mut actions);
        match self.phase {
            Phase::Working if self.is_done() => actions.push((now, Action::Closes)),
            Phase::Closing if actions.is_empty() => actions.push((now, Action::Unloads)),
            _ => {}
        }
        actions
    }

    /// Whether a message that is posted now meets no other one.
    fn bus_is_at_rest(&self) -> bool {
        self.wires.is_quiet()
            && self.guest.bus.counts().guest.messages == 0
            && self.host.bus.usage().messages == 0
    }

    fn is_done(&self) -> bool {
        self.guest.is_done()
            && self.host.offered == [true; 3]
            && self.host.gadget.is_done()
            && self.log.outstanding(Way::Event) == 0
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Arrives(arrival) => self.arrive(arrival),
            Action::Offers(which) => self.host.offer(which),
            Action::Withdraws => self.host.withdraw(&mut self.rng, self.now),
            Action::HostProcesses(id) => {
                self.host.tasks.run(id);
            }
            Action::GuestProcesses(id) => {
                self.guest.tasks.run(id);
            }
            Action::DiskMoves => {} // it has, with the time
            Action::DiskReports => {
                for completions in self.host.tasks.completions() {
                    completions.ready();
                }
            }
            Action::Device(chore) => self.host.gadget.do_chore(chore),
            Action::Driver(chore) => self.drive(chore),
            Action::Storage(chore) => self.guest.storage.do_chore(chore),
            Action::Connects => self.guest.bus.connect().expect("not connected yet"),
            Action::BindsDriver => self.guest.bind(&self.plan, &self.log),
            Action::Churns => {
                self.guest.churn_due = self.now + self.rng.between(1, 30);
                self.guest.churn.turn();
            }
            Action::Closes => {
                self.phase = Phase::Closing;
                self.guest.close();
            }
            Action::Unloads => {
                self.phase = Phase::Unloading;
                self.guest.bus.unload().expect("connected");
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
                let Some(post) = wires.take_post() else { return };
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
                if is_awaited {
                    host.bus.messages_drained();
                }
            }
            Arrival::Connection(id) => {
                wires.take_connection(id);
                // Of a channel that was closed meanwhile: a signal to nobody.
                let _known = host.bus.guest_signal(id, 0);
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
            self.wires.set_direct(Some(self.host.bus.clone()));
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
                self.host.bus.usage(),
                self.guest.storage.in_flight(),
                self.log.outstanding(Way::Work),
                self.log.outstanding(Way::Event),
            ));
        } else {
            let usage = self.host.bus.usage();
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
        self.guest.storage.judge(|block| disk::block(medium, block));
        Outcome {
            storage: self.guest.storage.ends().clone(),
            blocks: (0..disk::BLOCKS).map(|block| disk::block(medium, block)).collect(),
            packets: self.log.ends(),
            violations: self.log.violations(),
        }
    }
}

impl Guest {
    fn new(
        plan: &Plan,
        log: &Arc<Log>,
        wires: &Arc<Wires>,
        memory: &GuestMemory,
        rng: &mut Rng,
    ) -> Self {
        let mut config = GuestConfig::new(Guid::from_u128(0x6775_6573_7400));
        config.versions = match plan.guest_version {
            Some(version) => vec![version],
            None => config.versions,
        };
        let pages = PageAllocator::new(memory, 0, PAGES * 4096).expect("whole pages");
        let bus = GuestBus::new(config, pages, wires.guest_end()).expect("a sound configuration");
        wires.set_guest(&bus);
        let tasks = Tasks::new(rng.fork());
        let sub_channels = match plan.guest_version {
            Some(version) if !version.has_subchannels() => 0,
            _ => plan.sub_channels,
        };
        let storage = StorageUser::new(
            &bus,
            log,
            plan.storage_requests,
            plan.storage_depth,
            sub_channels,
            plan.storage_ring_pages,
            rng.fork(),
        );
        let gadget_rngs = [rng.fork(), rng.fork()];
        let churn = ChurnUser::new(&bus, log, plan.churn, rng.fork());
        Self { bus, tasks, storage, gadget: None, gadget_rngs, churn, churn_due: 0 }
    }

    fn is_legacy(&self) -> bool {
        match self.bus.state() {
            ConnectionState::Connected { version, .. } => !version.has_event_flags_page(),
            _ => false,
        }
    }

    fn is_done(&self) -> bool {
        self.storage.is_done()
            && self.gadget.as_ref().is_some_and(GadgetDriver::is_done)
            && self.churn.is_done()
    }

    fn bind(&mut self, plan: &Plan, log: &Arc<Log>) {
        let [workload, rng] = self.gadget_rngs.clone();
        let driver = GadgetDriver::new(
            &self.bus,
            &self.tasks,
            log,
            plan.work,
            plan.work_depth,
            workload,
            rng,
        );
        self.gadget = Some(driver.expect("a bus with room"));
    }

    fn close(&mut self) {
        self.storage.close();
        self.churn.close();
        if let Some(driver) = &self.gadget {
            driver.channel().begin_disable();
        }
    }

    fn actions(
        &mut self,
        now: u64,
        phase: Phase,
        bus_is_at_rest: bool,
        actions: &mut Vec<(u64, Action)>,
    ) {
        self.tasks.ready(now, |due, id| actions.push((due, Action::GuestProcesses(id))));
        if phase != Phase::Working {
            return;
        }
        if self.bus.state() == ConnectionState::Disconnected {
            actions.push((now, Action::Connects));
        }
        if !matches!(self.bus.state(), ConnectionState::Connected { .. }) {
            return;
        }
        self.storage.chores(|chore| actions.push((now, Action::Storage(chore))));
        match &self.gadget {
            None => actions.push((now, Action::BindsDriver)),
            Some(driver) => driver.chores(now, bus_is_at_rest, |due, chore| {
                actions.push((due, Action::Driver(chore)));
            }),
        }
        if self.churn.wants_turn() {
            actions.push((self.churn_due, Action::Churns));
        }
    }
}

impl Host {
    fn new(
        plan: &Plan,
        log: &Arc<Log>,
        wires: &Arc<Wires>,
        medium: &TestMedium,
        rng: &mut Rng,
    ) -> Self {
        let config = Config { newest_version: plan.host_version, ..Config::default() };
        let bus = HostBus::new(wires.new_host_end(), config);
        let tasks = Tasks::new(rng.fork());
        let backend = medium.backend().expect("a descriptor");
        let mut config = ControllerConfig::new(storage::INSTANCE);
        config.max_sub_channels = plan.sub_channels;
        let controller =
            ScsiController::new(Arc::new(bus.clone()), Arc::clone(&tasks) as _, config)
                .expect("a controller");
        let disk = Disk::new(Arc::clone(&backend) as _, &DiskOptions::new("simulated"))
            .expect("a disk of whole sectors");
        controller.attach(storage::ADDRESS, disk).expect("a free address");
        let gadget =
            Gadget::new(&bus, &tasks, log, plan.events, rng.fork()).expect("a device's channel");
        let churn = ChurnDevice::new(&bus, &tasks).expect("a device's channel");
        Self {
            bus,
            tasks,
            backend,
            controller,
            gadget,
            churn,
            offered: [false; 3],
            withdrawals_left: plan.withdrawals,
            withdrawal_due: 0,
        }
    }

    fn offer(&mut self, which: usize) {
        self.offered[which] = true;
        match which {
            0 => self.controller.offer().expect("a bus with room"),
            1 => self.gadget.offer().expect("a bus with room"),
            _ => self.churn.offer().expect("a bus with room"),
        }
    }

    fn withdraw(&mut self, rng: &mut Rng, now: u64) {
        self.withdrawals_left = self.withdrawals_left.saturating_sub(1);
        self.withdrawal_due = now + rng.between(1, 100);
        if let Err(error) = self.churn.toggle() {
            // The former offer is not released yet: another time.
            assert!(matches!(error, kmcl::Error::Bus(_)), "{error}");
        }
    }

    fn actions(&mut self, now: u64, actions: &mut Vec<(u64, Action)>) {
        for (which, offered) in self.offered.iter().enumerate() {
            if !offered {
                actions.push((now, Action::Offers(which)));
            }
        }
        let is_offered = self.churn.is_offered();
        if self.offered[2] && (self.withdrawals_left > 0 || !is_offered) {
            actions.push((self.withdrawal_due, Action::Withdraws));
        }
        self.tasks.ready(now, |due, id| actions.push((due, Action::HostProcesses(id))));
        if is_readable(&self.backend) {
            actions.push((now, Action::DiskReports));
        }
        self.gadget.chores(now, |due, chore| actions.push((due, Action::Device(chore))));
    }
}

/// Whether the disk has something to say. Asks the system, and does not wait.
fn is_readable(backend: &TestBackend) -> bool {
    let Some(fd) = backend.completion_fd() else { return false };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1)
}

impl Drop for World {
    fn drop(&mut self) {
        // What is under way lands, so that nothing waits for it when the devices go.
        disk::settle(&self.medium);
        self.host.gadget.abandon();
        if let Some(driver) = &self.guest.gadget {
            driver.abandon();
        }
    }
}
