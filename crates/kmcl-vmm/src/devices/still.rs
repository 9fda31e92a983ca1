//! Devices that stand still, to be saved.

use std::time::{Duration, Instant};

use kmcl::SaveOptions;
use saved_state::StreamKind;
use saved_state::file::FileWriter;
use vsp_integration::FrozenServices;
use vsp_socket::FrozenSockets;
use vsp_storage::FrozenController;

use super::{Devices, Sockets};
use crate::vm::VmError;

/// Devices that stand still. They go on when this is dropped.
pub(crate) struct StillDevices {
    controllers: Vec<FrozenController>,
    services: FrozenServices,
    sockets: Option<FrozenSockets>,
}

impl Devices {
    /// Has all of them stand still: nothing new is begun, and what runs is cancelled or waited for.
    pub(crate) fn freeze(&self) -> Result<StillDevices, VmError> {
        let services = self.services.freeze()?;
        let sockets = self.sockets.as_ref().map(Sockets::freeze).transpose()?;
        let mut still = StillDevices { controllers: Vec::new(), services, sockets };
        for (number, controller) in (0..).zip(&self.controllers) {
            let failed = |source| VmError::Controller { controller: number, source };
            still.controllers.push(controller.freeze().map_err(failed)?);
        }
        Ok(still)
    }
}

impl StillDevices {
    /// Waits until nothing runs any more.
    pub(crate) fn wait(&self, limit: Duration) -> Result<(), VmError> {
        let deadline = Instant::now() + limit;
        for controller in &self.controllers {
            let left = deadline.saturating_duration_since(Instant::now());
            if !controller.wait(Some(left)) {
                let requests = controller.running();
                return Err(VmError::Unsettled { requests, seconds: limit.as_secs() });
            }
        }
        Ok(())
    }

    /// Adds what is to be saved of them to `file`, device by device.
    pub(crate) fn add_to(
        &self,
        file: &mut FileWriter<'_>,
        options: &SaveOptions,
    ) -> Result<(), VmError> {
        for (number, controller) in (0..).zip(&self.controllers) {
            let failed = |source| VmError::Controller { controller: number, source };
            for stream in controller.streams(options).map_err(failed)? {
                file.add(&stream.name, stream.index, stream.save);
            }
        }
        for stream in self.services.streams(options)? {
            file.add(&stream.name, stream.index, stream.save);
        }
        if let Some(sockets) = &self.sockets {
            let save = sockets.save(options);
            file.add("sockets", 0, save.map_err(|error| VmError::Unsavable(error.to_string()))?);
        }
        Ok(())
    }

    /// The devices go on elsewhere: nothing of them happens here any more.
    pub(crate) fn move_away(self) {
        self.controllers.into_iter().for_each(FrozenController::move_away);
        self.services.move_away();
        self.sockets.into_iter().for_each(FrozenSockets::move_away);
    }
}

/// Whether a stream of this kind counts requests in flight.
pub(crate) fn counts_requests(kind: StreamKind) -> bool {
    kind == StreamKind::CHANNEL
}
