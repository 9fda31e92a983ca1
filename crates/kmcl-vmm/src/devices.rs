//! What is offered to a guest on its bus: storage controllers with their disks, services, sockets.

mod disks;
mod restore;
mod services;
mod sockets;
mod still;
mod timer;

use std::path::PathBuf;
use std::sync::Arc;

use hyperv_kvm::Partition;
use kmcl::Guid;
use kmcl_worker::Source;
use vmbus_host::HostBus;
use vsp_storage::{ControllerConfig, Driver, ScsiController};

use crate::config::VmConfig;
use crate::vm::VmError;
use crate::workers::{Workers, WorkersSource};

pub use disks::DiskConfigError;
pub(crate) use disks::{Disks, OpenDisk, Place};
pub(crate) use restore::RestoringDevices;
pub(crate) use services::{Services, Ticking};
use sockets::Sockets;
pub(crate) use still::{StillDevices, counts_requests};

/// The instance by which a guest knows its first controller: always the same, so that it knows it again.
/// Those of the others follow.
const FIRST_CONTROLLER: u128 = 0x6b6d_636c_0000_4000_8000_0000_0000_0001;

/// The devices of a guest that runs. Fields are dropped in this order.
pub(crate) struct Devices {
    sockets: Option<Sockets>,
    services: Services,
    controllers: Vec<ScsiController>,
    _messages: Waited,
}

/// Something that a worker waits for, until this is dropped.
#[derive(Debug)]
pub(crate) struct Waited {
    workers: Arc<Workers>,
    source: WorkersSource,
}

impl Drop for Waited {
    fn drop(&mut self) {
        self.workers.remove_source(self.source);
    }
}

/// The guest has taken messages: the next ones may go.
struct MessagesTaken(Partition);

impl Source for MessagesTaken {
    fn ready(&self) -> bool {
        self.0.messages_taken();
        false
    }
}

/// How controller `number` shows itself.
fn controller_config(number: u8, sub_channels: u16) -> ControllerConfig {
    let instance = Guid::from_u128(FIRST_CONTROLLER + u128::from(number));
    let mut config = ControllerConfig::new(instance);
    config.max_sub_channels = sub_channels;
    config.name = format!("scsi{number}");
    config
}

impl Devices {
    /// Offers everything on the bus of a machine that has not started yet.
    pub(crate) fn offer(
        bus: &HostBus,
        disks: &Disks,
        config: &VmConfig,
        workers: &Arc<Workers>,
        partition: &Partition,
    ) -> Result<Self, VmError> {
        let messages = wait_for_messages(workers, partition)?;
        let services = Services::offer(bus, workers, partition)?;
        let serve = |path: &PathBuf| Sockets::serve(bus, path, workers);
        let sockets = config.sockets.as_ref().map(serve).transpose()?;
        let bus = Arc::new(bus.clone());
        let mut controllers = Vec::new();
        for number in 0..disks.controllers() {
            let failed = |source| VmError::Controller { controller: number, source };
            let driver = Arc::clone(workers) as Arc<dyn Driver>;
            let config = controller_config(number, config.sub_channels);
            let controller = ScsiController::new(Arc::clone(&bus) as _, driver, config);
            let controller = controller.map_err(failed)?;
            for disk in disks.iter().filter(|disk| disk.place.controller == number) {
                let attached = controller.attach(disk.place.address(), Arc::clone(&disk.disk));
                attached.map_err(failed)?;
            }
            controller.offer().map_err(failed)?;
            controllers.push(controller);
        }
        Ok(Self { sockets, services, controllers, _messages: messages })
    }

    /// The integration services.
    pub(crate) fn services(&self) -> &Services {
        &self.services
    }

    /// Of each controller the requests in flight: waiting, and with a back end.
    pub(crate) fn in_flight(&self) -> impl Iterator<Item = (usize, usize)> {
        self.controllers.iter().map(ScsiController::in_flight)
    }

    /// Gives the guest a disk.
    pub(crate) fn attach(&self, disk: &OpenDisk) -> Result<(), VmError> {
        let (number, controller) = self.controller(&disk.place)?;
        let attached = controller.attach(disk.place.address(), Arc::clone(&disk.disk));
        attached.map_err(|source| VmError::Controller { controller: number, source })
    }

    /// Takes a disk away from the guest. Requests under way finish.
    pub(crate) fn detach(&self, place: &Place) -> Result<(), VmError> {
        let (number, controller) = self.controller(place)?;
        let detached = controller.detach(place.address());
        let failed = |source| VmError::Controller { controller: number, source };
        detached.map(drop).map_err(|error| failed(error.into()))
    }

    fn controller(&self, place: &Place) -> Result<(u8, &ScsiController), VmError> {
        let (number, count) = (place.controller, self.controllers.len());
        let count = u8::try_from(count).unwrap_or(u8::MAX);
        let missing = DiskConfigError::NoController { controller: number, count };
        let found = self.controllers.get(usize::from(number));
        found.map(|controller| (number, controller)).ok_or(VmError::Disk(missing))
    }
}

pub(crate) fn wait_for_messages(
    workers: &Arc<Workers>,
    partition: &Partition,
) -> Result<Waited, VmError> {
    let source = Arc::new(MessagesTaken(partition.clone()));
    let source = workers.add_source(partition.clone(), source);
    let source = source
        .map_err(|source| VmError::Driver { what: "waiting for the guest's messages", source })?;
    Ok(Waited { workers: Arc::clone(workers), source })
}
