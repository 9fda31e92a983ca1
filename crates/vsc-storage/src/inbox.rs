//! Where the callbacks of all channels of a client leave what has come, for the client to take out:
//! packets that have ended, notices, and failures to connect.

use std::sync::{Mutex, MutexGuard, PoisonError};

use kmcl::{
    Channel, IncomingPacket, NtStatus, Packet, PacketCompletion, PnpFailure, ProcessPacket,
};

use crate::answer::Payload;
use crate::notice::{Notice, Notices};

/// A packet that has ended, with its answer.
pub(crate) struct Ended {
    pub(crate) packet: Packet,
    pub(crate) status: NtStatus,
    pub(crate) answer: Payload,
}

#[derive(Default)]
struct Contents {
    /// Never longer than the packets the client has made.
    ended: Vec<Ended>,
    notices: Notices,
    connect_failure: Option<NtStatus>,
    /// Nobody will take anything out any more.
    closed: bool,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Inbox(Mutex<Contents>);

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for `packets` ended packets, so that none of them costs an allocation.
    pub(crate) fn reserve(&self, packets: usize) {
        let mut contents = self.lock();
        let more = packets.saturating_sub(contents.ended.len());
        contents.ended.reserve(more);
    }

    /// Exchanges `empty` for the packets that have ended.
    pub(crate) fn take_ended(&self, empty: &mut Vec<Ended>) {
        std::mem::swap(&mut self.lock().ended, empty);
    }

    pub(crate) fn take_notice(&self) -> Option<Notice> {
        self.lock().notices.pop()
    }

    pub(crate) fn connect_failure(&self) -> Option<NtStatus> {
        self.lock().connect_failure
    }

    /// Drops what is inside, and what comes later.
    pub(crate) fn close(&self) {
        let ended = {
            let mut contents = self.lock();
            contents.closed = true;
            std::mem::take(&mut contents.ended)
        };
        drop(ended); // packets go back to their channel, which has locks of its own
    }
}

impl PacketCompletion for Inbox {
    fn completed(&self, packet: Packet, status: NtStatus, payload: &[u8]) {
        let ended = Ended { packet, status, answer: Payload::new(payload) };
        let mut contents = self.lock();
        if !contents.closed {
            contents.ended.push(ended);
        }
    }
}

impl ProcessPacket for Inbox {
    fn process_packet(&self, _channel: &Channel, packet: IncomingPacket) {
        match Notice::parse(packet.payload()) {
            Some(notice) => self.lock().notices.push(notice),
            None => tracing::debug!(bytes = packet.payload().len(), "packet without meaning"),
        }
        packet.complete(&[]);
    }
}

impl PnpFailure for Inbox {
    fn pnp_failure(&self, _channel: &Channel, status: NtStatus) {
        self.lock().connect_failure = Some(status);
    }
}
