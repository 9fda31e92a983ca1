//! The host: its end of the bus, and its devices.

use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmbus_host::{Config, HostBus};
use vsp_storage::block::{Backend as _, TestBackend, TestMedium};
use vsp_storage::{ControllerConfig, Disk, DiskOptions, ScsiController};

use crate::churn::ChurnDevice;
use crate::gadget::device::Gadget;
use crate::log::Log;
use crate::plan::Plan;
use crate::rng::Rng;
use crate::sockets::SocketHost;
use crate::storage;
use crate::tasks::Tasks;
use crate::wires::Wires;
use crate::world::Action;

/// See the module.
pub(crate) struct Host {
    pub(crate) bus: HostBus,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) backend: Arc<TestBackend>,
    pub(crate) controller: ScsiController,
    pub(crate) gadget: Gadget,
    pub(crate) churn: ChurnDevice,
    pub(crate) sockets: Arc<SocketHost>,
    /// Which devices are offered: controller, gadget, churn.
    pub(crate) offered: [bool; 3],
    pub(crate) withdrawals_left: u32,
    pub(crate) withdrawal_due: u64,
}

/// The devices beside the controller.
pub(crate) struct Devices {
    pub(crate) gadget: Gadget,
    pub(crate) churn: ChurnDevice,
    pub(crate) sockets: Arc<SocketHost>,
}

impl Devices {
    /// Devices that are not offered yet.
    pub(crate) fn new(
        plan: &Plan,
        log: &Arc<Log>,
        bus: &HostBus,
        tasks: &Tasks,
        rng: &mut Rng,
    ) -> Self {
        let gadget = Gadget::new(bus, tasks, log, plan.events, rng.fork());
        let sockets = SocketHost::new(rng.fork());
        bus.set_hvsock_handler(Arc::clone(&sockets) as _);
        Self {
            gadget: gadget.expect("a device's channel"),
            churn: ChurnDevice::new(bus, tasks).expect("a device's channel"),
            sockets,
        }
    }

    /// Lets go of what holds itself.
    pub(crate) fn abandon(&self) {
        self.gadget.abandon();
        self.sockets.abandon();
    }
}

impl Host {
    /// A host whose devices are not offered yet.
    pub(crate) fn new(
        plan: &Plan,
        log: &Arc<Log>,
        wires: &Arc<Wires>,
        medium: &TestMedium,
        rng: &mut Rng,
    ) -> Self {
        let config = Config { newest_version: plan.host_version, ..Config::default() };
        let end = wires.new_host_end();
        wires.take_over(&end);
        let bus = HostBus::new(end, config);
        let tasks = Tasks::new(rng.fork());
        let controller = ScsiController::new(
            Arc::new(bus.clone()),
            Arc::clone(&tasks) as _,
            controller_config(plan),
        );
        let controller = controller.expect("a controller");
        let (backend, disk) = new_disk(medium);
        controller.attach(storage::ADDRESS, disk).expect("a free address");
        let devices = Devices::new(plan, log, &bus, &tasks, rng);
        let host = Self::of(bus, tasks, backend, controller, devices);
        Self { withdrawals_left: plan.withdrawals, ..host }
    }

    /// A host of these parts.
    pub(crate) fn of(
        bus: HostBus,
        tasks: Arc<Tasks>,
        backend: Arc<TestBackend>,
        controller: ScsiController,
        devices: Devices,
    ) -> Self {
        let Devices { gadget, churn, sockets } = devices;
        let (withdrawals_left, withdrawal_due) = (0, 0);
        Self {
            bus,
            tasks,
            backend,
            controller,
            gadget,
            churn,
            sockets,
            offered: [false; 3],
            withdrawals_left,
            withdrawal_due,
        }
    }

    /// Does what only concerns the host.
    pub(crate) fn perform(&mut self, action: Action, now: u64, rng: &mut Rng) {
        match action {
            Action::Offers(which) => self.offer(which),
            Action::Withdraws => self.withdraw(rng, now),
            Action::HostProcesses(id) => {
                self.tasks.run(id);
            }
            Action::DiskReports => {
                for completions in self.tasks.completions() {
                    completions.ready();
                }
            }
            Action::Device(chore) => self.gadget.do_chore(chore),
            Action::RefusesSocket => self.sockets.refuse(),
            _ => {}
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

    pub(crate) fn actions(&mut self, now: u64, is_frozen: bool, actions: &mut Vec<(u64, Action)>) {
        for (which, offered) in self.offered.iter().enumerate() {
            if !offered && !is_frozen {
                actions.push((now, Action::Offers(which)));
            }
        }
        let is_offered = self.churn.is_offered();
        if self.offered[2] && !is_frozen && (self.withdrawals_left > 0 || !is_offered) {
            actions.push((self.withdrawal_due, Action::Withdraws));
        }
        if !is_frozen {
            let due = self.sockets.next_at(now);
            actions.extend(due.map(|due| (due, Action::RefusesSocket)));
        }
        self.tasks.ready(now, |due, id| actions.push((due, Action::HostProcesses(id))));
        if is_readable(&self.backend) {
            actions.push((now, Action::DiskReports));
        }
        self.gadget.chores(now, |due, chore| actions.push((due, Action::Device(chore))));
    }

    /// Lets go of what holds itself.
    pub(crate) fn abandon(&self) {
        self.gadget.abandon();
        self.sockets.abandon();
    }
}

/// The controller as `plan` has it.
pub(crate) fn controller_config(plan: &Plan) -> ControllerConfig {
    let mut config = ControllerConfig::new(storage::INSTANCE);
    config.max_sub_channels = plan.sub_channels;
    config
}

/// A back end on the medium, and the disk that it is.
pub(crate) fn new_disk(medium: &TestMedium) -> (Arc<TestBackend>, Arc<Disk>) {
    let backend = medium.backend().expect("a descriptor");
    let disk = Disk::new(Arc::clone(&backend) as _, &DiskOptions::new("simulated"));
    (backend, disk.expect("a disk of whole sectors"))
}

/// Whether the disk has something to say. Asks the system, and does not wait.
fn is_readable(backend: &TestBackend) -> bool {
    let Some(fd) = backend.completion_fd() else { return false };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1)
}
