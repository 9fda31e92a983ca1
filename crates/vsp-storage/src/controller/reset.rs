//! Resets: answered when the requests that were in flight have ended.
//!
//! Nothing is aborted that runs. A disk keeps no state that a reset would lose, so no unit attention
//! follows: what the guest gets is the certainty that nothing of the past is still under way.
//!
//! A freeze must not have to wait for that, and a reset must not be answered while a request of the
//! past is going to be carried out again. So requests that a freeze finds, and that a reset waits for,
//! end as aborted, as a reset allows; and requests that come again behind a reset do too.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use kmcl::{IncomingPacket, NtStatus};
use vstor_wire::packet::{Operation, PacketForm, VstorPacket};
use vstor_wire::srb::{ScsiAddress, ScsiRequest};

/// What a reset concerns.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum ResetScope {
    Lun(ScsiAddress),
    /// All targets on a bus.
    Path(u8),
    All,
}

impl ResetScope {
    /// That of a reset packet.
    pub(super) fn of(request: &VstorPacket) -> Self {
        let target = request.body::<ScsiRequest>().address();
        match request.operation {
            Operation::RESET_LUN => Self::Lun(target),
            Operation::RESET_BUS => Self::Path(target.path),
            _ => Self::All,
        }
    }

    pub(super) fn concerns(self, address: ScsiAddress) -> bool {
        match self {
            Self::Lun(target) => address == target,
            Self::Path(path) => address.path == path,
            Self::All => true,
        }
    }
}

/// A reset that waits. It is held by each request it waits for, and by the thread that sets it up.
pub(super) struct PendingReset {
    holds: AtomicUsize,
    packet: Mutex<Option<(IncomingPacket, PacketForm)>>,
}

impl PendingReset {
    /// A reset with one hold, that of its maker.
    pub(super) fn new(packet: IncomingPacket, form: PacketForm) -> Self {
        Self { holds: AtomicUsize::new(1), packet: Mutex::new(Some((packet, form))) }
    }

    /// One more request to wait for.
    pub(super) fn hold(&self) {
        self.holds.fetch_add(1, Ordering::Relaxed);
    }

    /// A request has ended, or all holds are made; the last one answers the guest.
    pub(super) fn release(&self) {
        // AcqRel: the answer comes after everything that the other requests did.
        if self.holds.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        let waiting = self.packet.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((packet, form)) = waiting {
            packet.complete(VstorPacket::answer(NtStatus::SUCCESS).bytes(form));
        }
    }
}
