//! The guest powers off, starts anew, or hibernates, because the host asks it to.

use std::fmt;

use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;

use super::dialogue::{Dialogue, Message};
use super::{Phase, SHUTDOWN_ANSWER_LIMIT, Versions};
use crate::wire::{IcStatus, SHUTDOWN_TEXT_BYTES, Service, ShutdownBody, Version};

/// Longest reason of a shutdown, in bytes of UTF-8: a zero follows.
pub const MAX_REASON_BYTES: usize = SHUTDOWN_TEXT_BYTES - 1;

/// What a guest is asked to do.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum ShutdownKind {
    /// To power off.
    PowerOff,
    /// To start anew: since version 3.1.
    Reboot,
    /// To write its memory to its disk, and power off: since version 3.2.
    Hibernate,
}

impl ShutdownKind {
    /// The first version of the messages that has it.
    ///
    /// Before 3.1 a guest powers off whatever the flags say.
    #[must_use]
    pub const fn since(self) -> Version {
        match self {
            Self::PowerOff => Version::new(1, 0),
            Self::Reboot => Version::new(3, 1),
            Self::Hibernate => Version::new(3, 2),
        }
    }

    /// Whether a guest of this version can be asked.
    pub(crate) const fn is_known_in(self, version: Version) -> bool {
        version.to_u32() >= self.since().to_u32()
    }

    const fn flags(self) -> u32 {
        match self {
            Self::PowerOff => 0,
            Self::Reboot => ShutdownBody::FLAG_RESTART,
            Self::Hibernate => ShutdownBody::FLAG_HIBERNATE,
        }
    }
}

impl fmt::Display for ShutdownKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::PowerOff => "power off",
            Self::Reboot => "reboot",
            Self::Hibernate => "hibernate",
        })
    }
}

/// A shutdown that was asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ShutdownRequest {
    /// What the guest is to do.
    pub kind: ShutdownKind,
    /// Applications that object are not heard.
    pub force: bool,
}

/// Why a shutdown cannot be asked for now.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ShutdownError {
    /// The guest's driver is not there, or not yet.
    #[error("the guest's shutdown service is not ready: {phase}")]
    NotReady {
        /// How far it has come.
        phase: Phase,
    },
    /// Another one has no answer yet.
    #[error("the guest was asked to {} and has not answered", .asked.kind)]
    Busy {
        /// Which one.
        asked: ShutdownRequest,
    },
    /// The guest reads nothing: a former request still waits for room in its ring.
    #[error("the guest reads nothing: a former request waits for room in its ring")]
    Unread,
    /// The guest is too old.
    #[error("{kind}: the guest speaks shutdown {version}, this came with {}", .kind.since())]
    Unsupported {
        /// What was to be asked for.
        kind: ShutdownKind,
        /// The version that it speaks.
        version: Version,
    },
    /// The text does not fit.
    #[error("a reason of {bytes} bytes, at most {MAX_REASON_BYTES} fit")]
    ReasonTooLong {
        /// Bytes of it.
        bytes: usize,
    },
    /// The services are frozen, to be saved.
    #[error("the integration services are being saved")]
    Held,
}

/// What became of a shutdown that was asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ShutdownAnswer {
    /// The guest does it. When it has, the VM ends or is reset.
    Accepted,
    /// It does not.
    Refused(IcStatus),
    /// It has closed the channel without an answer: its driver was unloaded, or it is gone already.
    Closed,
    /// It has said nothing for [`SHUTDOWN_ANSWER_LIMIT`]. It may do it yet.
    Silent,
}

impl fmt::Display for ShutdownAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accepted => f.write_str("accepted"),
            Self::Refused(status) => write!(f, "refused with {status}"),
            Self::Closed => f.write_str("not answered: the guest has closed the channel"),
            Self::Silent => f.write_str("not answered in time"),
        }
    }
}

/// A shutdown, and what became of it.
pub(super) type Ended = (ShutdownRequest, ShutdownAnswer);

/// The service.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shutdown {
    pub(super) dialogue: Dialogue,
    /// What was asked for and not answered.
    pub(super) asked: Option<ShutdownRequest>,
    /// Reference time when that was noticed first.
    since: Option<u64>,
}

impl Shutdown {
    pub(super) fn new() -> Self {
        Self::at(Dialogue::new(Service::Shutdown), None)
    }

    pub(super) fn at(dialogue: Dialogue, asked: Option<ShutdownRequest>) -> Self {
        Self { dialogue, asked, since: None }
    }

    pub(super) fn open(&mut self) -> Message {
        self.dialogue.open()
    }

    /// The channel is closed.
    pub(super) fn close(&mut self) -> Option<Ended> {
        self.end(ShutdownAnswer::Closed)
    }

    pub(super) fn request(
        &mut self,
        request: ShutdownRequest,
        reason: &str,
        can_send: bool,
    ) -> Result<Message, ShutdownError> {
        let bytes = reason.len();
        let phase = self.dialogue.phase();
        let Phase::Agreed(Versions { message: version, .. }) = phase else {
            return Err(ShutdownError::NotReady { phase });
        };
        if let Some(asked) = self.asked {
            return Err(ShutdownError::Busy { asked });
        }
        if !can_send {
            return Err(ShutdownError::Unread);
        }
        let ShutdownRequest { kind, force } = request;
        if !kind.is_known_in(version) {
            return Err(ShutdownError::Unsupported { kind, version });
        }
        let mut text = [0; SHUTDOWN_TEXT_BYTES];
        let room = text.get_mut(..bytes).filter(|_| bytes <= MAX_REASON_BYTES);
        room.ok_or(ShutdownError::ReasonTooLong { bytes })?.copy_from_slice(reason.as_bytes());
        let force = if force { ShutdownBody::FLAG_FORCE } else { 0 };
        let body = ShutdownBody {
            reason: U32::new(ShutdownBody::REASON_PLANNED),
            timeout_seconds: U32::ZERO,
            flags: U32::new(kind.flags() | force),
            text,
        };
        let message = self.dialogue.request(body.as_bytes());
        let message = message.ok_or(ShutdownError::NotReady { phase })?;
        (self.asked, self.since) = (Some(request), None);
        Ok(message)
    }

    pub(super) fn answered(&mut self, status: IcStatus) -> Option<Ended> {
        self.end(if status.is_success() {
            ShutdownAnswer::Accepted
        } else {
            ShutdownAnswer::Refused(status)
        })
    }

    pub(super) fn tick(&mut self, reference_time: u64) -> Option<Ended> {
        self.asked?;
        let since = *self.since.get_or_insert(reference_time);
        if reference_time < since {
            // The clock is another one since a restore.
            self.since = Some(reference_time);
        } else if reference_time - since >= SHUTDOWN_ANSWER_LIMIT {
            self.dialogue.give_up();
            return self.end(match self.dialogue.is_open {
                true => ShutdownAnswer::Silent,
                false => ShutdownAnswer::Closed,
            });
        }
        None
    }

    fn end(&mut self, answer: ShutdownAnswer) -> Option<Ended> {
        self.asked.take().map(|request| (request, answer))
    }
}
