//! Devices out of a saved state.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use hyperv_kvm::Partition;
use saved_state::StreamKind;
use vmbus_host::HostBus;
use vsp_storage::{
    AttachError, ControllerRestoreError, Driver, RestoringController, ScsiController,
};

use super::{Devices, Disks, controller_config, services, sockets, wait_for_messages};
use crate::vm::VmError;
use crate::vm::saved::State;
use crate::workers::Workers;

/// Devices that are being restored: offered on a bus that takes them for those that it had. Dropping it
/// gives the restore up.
pub(crate) struct RestoringDevices {
    controllers: Vec<RestoringController>,
    services: services::Restoring,
    sockets: sockets::Restoring,
    bus: HostBus,
    workers: Arc<Workers>,
}

impl RestoringDevices {
    /// Makes all devices that `state` tells of, with `disks`, and offers them on `bus`. `had_sockets` says
    /// whether the guest had sockets, `sockets` where it is to have some.
    pub(crate) fn new(
        bus: &HostBus,
        disks: &Disks,
        (had_sockets, sockets): (bool, Option<&Path>),
        workers: &Arc<Workers>,
        state: &mut State<impl Read>,
    ) -> Result<Self, VmError> {
        let shared = Arc::new(bus.clone());
        let mut controllers = Vec::new();
        let mut differences = Vec::new();
        for number in 0..disks.controllers() {
            let device = state.bytes(StreamKind::DEVICE)?;
            let driver = Arc::clone(workers) as Arc<dyn Driver>;
            // How many subchannels there may be, the state says.
            let config = controller_config(number, 0);
            let restoring =
                ScsiController::restoring(Arc::clone(&shared) as _, driver, config, &device[..]);
            let mut restoring = restoring.map_err(|error| match error {
                ControllerRestoreError::Controller(source) => {
                    VmError::Controller { controller: number, source }
                }
                error => state.wrong(error),
            })?;
            for disk in disks.iter().filter(|disk| disk.place.controller == number) {
                match restoring.attach(disk.place.address(), Arc::clone(&disk.disk)) {
                    Ok(()) => {}
                    Err(AttachError::Controller(source)) => {
                        return Err(VmError::Controller { controller: number, source });
                    }
                    Err(error) => differences.push(format!(
                        "disk {} ({}): {error}",
                        disk.place.id,
                        disk.config.path.display()
                    )),
                }
            }
            if differences.is_empty() {
                restoring.enable().map_err(|error| state.wrong(error))?;
                for index in 0..restoring.channels() {
                    let channel = state.bytes(StreamKind::CHANNEL)?;
                    let restored = restoring.restore_channel(index, &channel[..]);
                    restored.map_err(|error| state.wrong(error))?;
                }
            } else {
                for _ in 0..restoring.channels() {
                    state.bytes(StreamKind::CHANNEL)?;
                }
            }
            controllers.push(restoring);
        }
        if !differences.is_empty() {
            return Err(VmError::Differences(differences));
        }
        let services = services::Restoring::new(bus, workers, state)?;
        let sockets = sockets::Restoring::new(bus, had_sockets, sockets, workers, state)?;
        let (bus, workers) = (bus.clone(), Arc::clone(workers));
        Ok(Self { controllers, services, sockets, bus, workers })
    }

    /// Has them go on: the bus has brought what they had.
    pub(crate) fn start(self, partition: &Partition) -> Result<Devices, VmError> {
        let messages = wait_for_messages(&self.workers, partition)?;
        let mut controllers = Vec::new();
        for (number, controller) in (0_u8..).zip(self.controllers) {
            let started = controller.start().map_err(|error| {
                VmError::State(format!("storage controller {number} cannot go on: {error}"))
            })?;
            controllers.push(started);
        }
        let services = self.services.start(&self.workers, partition)?;
        let sockets = self.sockets.start(&self.bus, &self.workers)?;
        Ok(Devices { sockets, services, controllers, _messages: messages })
    }
}
