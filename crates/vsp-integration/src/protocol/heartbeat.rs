//! Whether the guest is alive.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::dialogue::{Dialogue, Message};
use super::{HEARTBEAT_PERIOD, Unexpected, Versions, is_due};
use crate::wire::{HeartbeatBody, Service};

/// How a guest says its applications are.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum ApplicationState {
    /// It says nothing of them, as Linux.
    #[default]
    Unknown,
    /// All is well.
    Healthy,
    /// One of them needs help.
    Critical,
    /// A number without a meaning.
    Other(u32),
}

impl ApplicationState {
    pub(crate) const fn from_raw(raw: u32) -> Self {
        match raw {
            0 => Self::Unknown,
            1 => Self::Healthy,
            2 => Self::Critical,
            other => Self::Other(other),
        }
    }

    pub(crate) const fn raw(self) -> u32 {
        match self {
            Self::Unknown => 0,
            Self::Healthy => 1,
            Self::Critical => 2,
            Self::Other(raw) => raw,
        }
    }
}

/// What is known of a guest's life.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct HeartbeatStatus {
    /// The versions that are spoken; `None` while there are none, and so no heartbeats.
    pub versions: Option<Versions>,
    /// Heartbeats that were sent.
    pub sent: u64,
    /// Those that were answered.
    pub answered: u64,
    /// Times when one was due and the one before had no answer.
    pub missed: u64,
    /// The same since the last answer: what tells of a guest that hangs.
    pub missed_in_a_row: u64,
    /// How its applications were with the last answer.
    pub applications: ApplicationState,
}

/// The service. A heartbeat is due each [`HEARTBEAT_PERIOD`]; as long as one has no answer there is no
/// other, so that a guest that hangs does not find its ring full of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heartbeat {
    pub(super) dialogue: Dialogue,
    pub(super) sequence: u64,
    pub(super) status: HeartbeatStatus,
    /// Reference time of the last one that was due.
    last: Option<u64>,
}

impl Heartbeat {
    pub(super) fn new() -> Self {
        Self::at(Dialogue::new(Service::Heartbeat), 0, HeartbeatStatus::default())
    }

    pub(super) fn at(dialogue: Dialogue, sequence: u64, status: HeartbeatStatus) -> Self {
        Self { dialogue, sequence, status, last: None }
    }

    pub(super) fn status(&self) -> HeartbeatStatus {
        HeartbeatStatus { versions: self.dialogue.versions(), ..self.status }
    }

    pub(super) fn open(&mut self) -> Message {
        self.last = None;
        self.status.missed_in_a_row = 0;
        self.dialogue.open()
    }

    pub(super) fn tick(&mut self, reference_time: u64) -> Option<Message> {
        self.dialogue.versions()?;
        if !is_due(self.last, reference_time, HEARTBEAT_PERIOD) {
            return None;
        }
        let is_first = self.last.replace(reference_time).is_none();
        let status = &mut self.status;
        if self.dialogue.is_unanswered {
            // One that was sent before a restore has just as long as any other.
            if !is_first {
                status.missed = status.missed.saturating_add(1);
                status.missed_in_a_row = status.missed_in_a_row.saturating_add(1);
            }
            return None;
        }
        self.sequence = self.sequence.wrapping_add(1);
        status.sent = status.sent.saturating_add(1);
        let body = HeartbeatBody {
            sequence: U64::new(self.sequence),
            application_state: U32::ZERO,
            reserved: [U32::ZERO; 7],
        };
        self.dialogue.request(body.as_bytes())
    }

    /// The number in the answer is not looked at: guests count differently, and the transaction id says
    /// which heartbeat it is for.
    pub(super) fn answered(&mut self, body: &[u8]) -> Result<(), Unexpected> {
        self.status.answered = self.status.answered.saturating_add(1);
        self.status.missed_in_a_row = 0;
        let least = size_of::<HeartbeatBody>();
        let short = Unexpected::Body { len: body.len(), least };
        let (body, _) = HeartbeatBody::ref_from_prefix(body).map_err(|_| short)?;
        self.status.applications = ApplicationState::from_raw(body.application_state.get());
        Ok(())
    }
}
