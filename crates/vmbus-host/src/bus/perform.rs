//! What a step of the machine wants done, performed: with the port on one side and devices on the other.

use std::sync::Arc;

use kmcl::bus::{BusEvent, Endpoint, OpenRings};
use vmbus_memory::{GuestMemory, MemoryError, RingPages};
use vmbus_wire::status::NtStatus;

use crate::bus::{Active, HostBus};
use crate::channel::OpenState;
use crate::effect::{Effect, Interrupt, Rings};
use crate::hvsock_handler::HvsockConnect;
use crate::offer::OfferId;
use crate::signal::{self, ChannelSignal};

impl HostBus {
    pub(super) fn perform(&self, effect: Effect) {
        match effect {
            Effect::Open { offer, rings } => self.open(offer, &rings, false),
            Effect::Resume { offer, rings } => self.open(offer, &rings, true),
            Effect::Close { offer, tell_device } => self.close(offer, tell_device),
            Effect::Retarget { offer, interrupt, serial } => {
                let status = self.retarget(offer, interrupt);
                self.feed(|host, _| host.retargeted(offer, serial, status));
            }
            Effect::ConnectHvsock(request) => {
                let handler = self.lock().hvsock.clone();
                let connect = HvsockConnect::new(self.clone(), request);
                match handler {
                    Some(handler) => handler.connect(connect),
                    None => connect.refuse(NtStatus::CONNECTION_REFUSED),
                }
            }
        }
    }

    /// Prepares everything for an open, and tells the device of it; or tells the machine that it cannot
    /// be.
    fn open(&self, offer: OfferId, rings: &Rings, resumed: bool) {
        if let Err(status) = self.try_open(offer, rings, resumed) {
            self.feed(|host, effects| host.open_result(offer, status, effects));
        }
    }

    fn try_open(&self, offer: OfferId, rings: &Rings, resumed: bool) -> Result<(), NtStatus> {
        let inner = self.lock();
        // The guest may have gone in the meantime, and another be there with other memory.
        let is_wanted = inner.host.channel(offer).is_some_and(|channel| match channel.open {
            OpenState::Opening(_) => !resumed,
            OpenState::Open(_) => resumed,
            _ => false,
        });
        let device = inner.devices.get(&offer).filter(|_| is_wanted).cloned();
        let (Some(device), Some(memory)) = (device, inner.memory.clone()) else {
            return Err(NtStatus::CANCELLED);
        };
        drop(inner);
        let (active, opened) =
            self.prepare(&device, &memory, rings, resumed).map_err(|refused| {
                tracing::warn!(%refused, "a channel cannot be opened");
                refused.status()
            })?;
        self.lock().active.insert(offer, active);
        self.tell_opened(offer, &device, opened)
    }

    pub(super) fn tell_opened(
        &self,
        offer: OfferId,
        device: &Endpoint,
        opened: OpenRings,
    ) -> Result<(), NtStatus> {
        if device.events.post(BusEvent::Opened(opened)) {
            return Ok(());
        }
        self.close(offer, false);
        Err(NtStatus::INSUFFICIENT_RESOURCES)
    }

    /// Maps the rings of a channel, and finds the ways for its signals.
    pub(super) fn prepare(
        &self,
        device: &Endpoint,
        memory: &GuestMemory,
        rings: &Rings,
        resumed: bool,
    ) -> Result<(Active, OpenRings), CannotOpen> {
        let ring = |pfns: &[u64]| RingPages::map(memory, pfns, &self.shared.budget);
        let incoming = ring(&rings.incoming).map_err(CannotOpen::Rings)?;
        let outgoing = ring(&rings.outgoing).map_err(CannotOpen::Rings)?;
        let port = &*self.shared.port;
        let target = signal::target(port, memory, rings.interrupt).map_err(CannotOpen::Signals)?;
        let signal = Arc::new(ChannelSignal::new(target));
        let connection_id = rings.connection_id;
        port.listen(connection_id, Arc::clone(&device.doorbell)).map_err(CannotOpen::Signals)?;
        let doorbell = Arc::clone(&device.doorbell);
        let active = Active { signal: Arc::clone(&signal), connection_id, doorbell };
        let (memory, residency, user_data) = (memory.clone(), None, rings.user_data);
        let opened =
            OpenRings { incoming, outgoing, memory, signal, residency, user_data, resumed };
        Ok((active, opened))
    }

    /// Undoes [`HostBus::open`], if it came so far.
    pub(super) fn close(&self, offer: OfferId, tell_device: bool) {
        let mut inner = self.lock();
        let active = inner.active.remove(&offer);
        // It may have let go in the meantime, by itself.
        let is_closing = inner.host.channel(offer).is_some_and(|channel| {
            matches!(channel.open, OpenState::Closing(_) | OpenState::Reopening(..))
        });
        let device = inner.devices.get(&offer).cloned();
        drop(inner);
        let Some(active) = active else { return };
        active.signal.set_target(None);
        self.shared.port.unlisten(active.connection_id);
        if !tell_device || !is_closing {
            return;
        }
        match device {
            Some(device) => {
                device.events.post(BusEvent::PeerClosed);
            }
            // It went on elsewhere, without its guest.
            None => self.feed(|host, effects| host.closed(offer, effects)),
        }
    }

    fn retarget(&self, offer: OfferId, interrupt: Interrupt) -> NtStatus {
        let inner = self.lock();
        let signal = inner.active.get(&offer).map(|active| Arc::clone(&active.signal));
        let (Some(signal), Some(memory)) = (signal, inner.memory.clone()) else {
            return NtStatus::CANCELLED;
        };
        drop(inner);
        match signal::target(&*self.shared.port, &memory, interrupt) {
            Ok(target) => {
                signal.set_target(target);
                NtStatus::SUCCESS
            }
            Err(error) => {
                tracing::error!(%error, "cannot move a channel's interrupts");
                NtStatus::INSUFFICIENT_RESOURCES
            }
        }
    }
}

/// Why a channel cannot be opened, or resumed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CannotOpen {
    /// Its rings cannot be where the guest says.
    #[error("its rings cannot be mapped: {0}")]
    Rings(#[source] MemoryError),
    /// The port has no way for signals.
    #[error("no signals can be exchanged: {0}")]
    Signals(#[source] std::io::Error),
}

impl CannotOpen {
    /// What the guest is told.
    fn status(&self) -> NtStatus {
        match self {
            Self::Rings(_) => NtStatus::INVALID_PARAMETER,
            Self::Signals(_) => NtStatus::INSUFFICIENT_RESOURCES,
        }
    }
}
