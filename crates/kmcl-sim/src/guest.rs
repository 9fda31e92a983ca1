//! The guest: its end of the bus, and the users of its devices.

use std::sync::Arc;

use kmcl::Guid;
use vmbus_guest::{ConnectionState, GuestBus, GuestConfig};
use vmbus_memory::{GuestMemory, PageAllocator};

use crate::churn::ChurnUser;
use crate::gadget::driver::GadgetDriver;
use crate::log::Log;
use crate::plan::Plan;
use crate::rng::Rng;
use crate::sockets::SocketUser;
use crate::storage::StorageUser;
use crate::tasks::Tasks;
use crate::wires::Wires;
use crate::world::{Action, Phase};

/// Pages of the guest's memory.
pub(crate) const PAGES: u64 = 1024;

/// See the module.
pub(crate) struct Guest {
    pub(crate) bus: GuestBus,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) storage: StorageUser,
    pub(crate) gadget: Option<GadgetDriver>,
    pub(crate) gadget_rngs: [Rng; 2],
    pub(crate) churn: ChurnUser,
    pub(crate) churn_due: u64,
    pub(crate) sockets: SocketUser,
    pub(crate) sockets_due: u64,
}

impl Guest {
    pub(crate) fn new(
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
        let sockets = SocketUser::new(&bus, log, plan.sockets);
        Self {
            bus,
            tasks,
            storage,
            gadget: None,
            gadget_rngs,
            churn,
            churn_due: 0,
            sockets,
            sockets_due: 0,
        }
    }

    pub(crate) fn is_legacy(&self) -> bool {
        match self.bus.state() {
            ConnectionState::Connected { version, .. } => !version.has_event_flags_page(),
            _ => false,
        }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.storage.is_done()
            && self.gadget.as_ref().is_some_and(GadgetDriver::is_done)
            && self.churn.is_done()
            && self.sockets.is_done()
    }

    pub(crate) fn bind(&mut self, plan: &Plan, log: &Arc<Log>) {
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

    pub(crate) fn close(&mut self) {
        self.storage.close();
        self.churn.close();
        if let Some(driver) = &self.gadget {
            driver.channel().begin_disable();
        }
    }

    pub(crate) fn actions(
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
        if self.sockets.wants_turn() {
            actions.push((self.sockets_due, Action::AsksForSocket));
        }
    }
}
