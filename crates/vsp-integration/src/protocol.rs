//! The services' protocol, as a pure machine: bytes and time come in, messages and events come out. No
//! channel, no clock, no lock.

mod dialogue;
mod heartbeat;
mod shutdown;
mod state;
mod time_sync;

use std::fmt;

use self::dialogue::{Dialogue, Heard};
use self::heartbeat::Heartbeat;
use self::shutdown::Shutdown;
use self::time_sync::TimeSync;
use crate::wire::{MessageType, Service, Version};

pub use self::dialogue::Message;
pub use self::heartbeat::{ApplicationState, HeartbeatStatus};
pub use self::shutdown::{
    MAX_REASON_BYTES, ShutdownAnswer, ShutdownError, ShutdownKind, ShutdownRequest,
};
pub use self::state::StateError;
pub(crate) use self::state::{Records, Restoring};
pub use self::time_sync::FileTime;

/// A second of reference time.
const SECOND: u64 = 10_000_000;

/// How often a guest is asked whether it is alive, in units of 100 ns of reference time.
pub const HEARTBEAT_PERIOD: u64 = 2 * SECOND;

/// How often a guest is told the time, in units of 100 ns of reference time.
pub const TIME_SAMPLE_PERIOD: u64 = 5 * SECOND;

/// How long the answer to a shutdown is waited for, in units of 100 ns of reference time. Guests answer
/// before they begin.
pub const SHUTDOWN_ANSWER_LIMIT: u64 = 60 * SECOND;

/// The versions that a service speaks with its guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Versions {
    /// Of the framework.
    pub framework: Version,
    /// Of the service's messages.
    pub message: Version,
}

impl Versions {
    /// Whether `service` offers both.
    #[must_use]
    pub fn is_offered_by(self, service: Service) -> bool {
        Service::FRAMEWORKS.contains(&self.framework) && service.versions().contains(&self.message)
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (framework {})", self.message, self.framework)
    }
}

/// How far a service and its guest have come to terms.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Phase {
    /// The guest has not opened the channel.
    Closed,
    /// Versions were offered, and none was chosen yet.
    Offered,
    /// They speak these.
    Agreed(Versions),
    /// The guest wants none of those that were offered. It may close the channel and open it again.
    Refused,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("its channel is not open"),
            Self::Offered => f.write_str("it has not chosen a version"),
            Self::Agreed(versions) => write!(f, "it speaks {versions}"),
            Self::Refused => f.write_str("it knows none of the versions offered"),
        }
    }
}

/// What a service takes note of and otherwise ignores: bytes from a guest that answer nothing.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Unexpected {
    /// Not even a header.
    #[error("{len} bytes, the header alone takes {least}")]
    Short {
        /// Bytes of the message.
        len: usize,
        /// Bytes of a header.
        least: usize,
    },
    /// The header claims more than there is.
    #[error("a body of {size} bytes, {len} follow the header")]
    Truncated {
        /// Bytes that the header claims.
        size: u16,
        /// Bytes there are.
        len: usize,
    },
    /// A guest only answers.
    #[error("flags {flags:#x} are not those of an answer")]
    NoAnswer {
        /// The flags.
        flags: u8,
    },
    /// Nothing was asked.
    #[error("an answer to request {transaction_id}, and none is open")]
    Unasked {
        /// What it is said to answer.
        transaction_id: u8,
    },
    /// An answer to something that is not waited for any more.
    #[error("an answer to request {found}, request {expected} is open")]
    Late {
        /// What it answers.
        found: u8,
        /// What is waited for.
        expected: u8,
    },
    /// An answer to something else.
    #[error("message type {} answers type {}", .found.0, .expected.0)]
    Type {
        /// Its type.
        found: MessageType,
        /// The type of what was asked.
        expected: MessageType,
    },
    /// The body is too short for what it answers. Taken as an answer all the same, unless it is to an
    /// offer of versions.
    #[error("a body of {len} bytes, this answer takes {least}")]
    Body {
        /// Bytes of it.
        len: usize,
        /// Bytes it takes.
        least: usize,
    },
    /// Neither one version of each, nor none.
    #[error("{frameworks} framework and {messages} message versions chosen, instead of 1 and 1")]
    Choice {
        /// Versions of the framework.
        frameworks: u16,
        /// Versions of the messages.
        messages: u16,
    },
    /// Chosen, and never offered.
    #[error("{versions} was not offered")]
    Version {
        /// What was chosen.
        versions: Versions,
    },
}

/// What has happened.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A service and its guest have come to terms.
    Agreed {
        /// Which service.
        service: Service,
        /// What they speak.
        versions: Versions,
    },
    /// The guest wants none of the versions offered.
    Refused {
        /// Which service.
        service: Service,
    },
    /// A shutdown was answered, or will not be.
    ShutdownEnded {
        /// What was asked for.
        request: ShutdownRequest,
        /// What became of it.
        answer: ShutdownAnswer,
    },
}

/// What a step comes to: at most one message for the service's channel, at most one event.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[must_use = "messages are sent and events reported by whoever has the machine"]
pub struct Outcome {
    /// Goes to the guest.
    pub message: Option<Message>,
    /// Goes to the owner.
    pub event: Option<Event>,
}

impl Outcome {
    fn send(message: impl Into<Option<Message>>) -> Self {
        Self { message: message.into(), event: None }
    }

    fn ended(ended: Option<shutdown::Ended>) -> Self {
        let event = ended.map(|(request, answer)| Event::ShutdownEnded { request, answer });
        Self { message: None, event }
    }
}

/// The time, twice over.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Clocks {
    /// The time of day on the host.
    pub now: FileTime,
    /// The guest's reference time when that was read, in units of 100 ns: what it reads from
    /// HV_X64_MSR_TIME_REF_COUNT or its reference page. It stands still while the guest does.
    pub reference_time: u64,
}

/// The three services of one guest. See the module.
#[derive(Clone, Copy, Debug)]
pub struct Protocol {
    heartbeat: Heartbeat,
    shutdown: Shutdown,
    time_sync: TimeSync,
}

impl Default for Protocol {
    fn default() -> Self {
        Self { heartbeat: Heartbeat::new(), shutdown: Shutdown::new(), time_sync: TimeSync::new() }
    }
}

impl Protocol {
    fn dialogue(&self, service: Service) -> &Dialogue {
        match service {
            Service::Heartbeat => &self.heartbeat.dialogue,
            Service::Shutdown => &self.shutdown.dialogue,
            Service::TimeSync => &self.time_sync.dialogue,
        }
    }

    fn dialogue_mut(&mut self, service: Service) -> &mut Dialogue {
        match service {
            Service::Heartbeat => &mut self.heartbeat.dialogue,
            Service::Shutdown => &mut self.shutdown.dialogue,
            Service::TimeSync => &mut self.time_sync.dialogue,
        }
    }

    /// How far `service` and the guest have come to terms.
    #[must_use]
    pub fn phase(&self, service: Service) -> Phase {
        self.dialogue(service).phase()
    }

    /// What is known of the guest's life.
    #[must_use]
    pub fn heartbeat(&self) -> HeartbeatStatus {
        self.heartbeat.status()
    }

    /// The shutdown that was asked for and not answered.
    #[must_use]
    pub fn shutdown_asked(&self) -> Option<ShutdownRequest> {
        self.shutdown.asked
    }

    /// The guest has opened the channel of `service`.
    pub fn opened(&mut self, service: Service) -> Outcome {
        let before = self.closed(service);
        let message = match service {
            Service::Heartbeat => self.heartbeat.open(),
            Service::Shutdown => self.shutdown.open(),
            Service::TimeSync => self.time_sync.open(),
        };
        Outcome { message: Some(message), ..before }
    }

    /// The channel of `service` is open again after a restore, and the guest knows nothing of that: the
    /// service goes on. `can_send` as for [`Self::tick`].
    pub fn resumed(&mut self, service: Service, can_send: bool) -> Outcome {
        let dialogue = self.dialogue_mut(service);
        if dialogue.phase == Phase::Closed {
            return self.opened(service); // it was, and nobody had noticed
        }
        dialogue.is_open = true;
        match service {
            Service::Heartbeat | Service::Shutdown => Outcome::default(),
            Service::TimeSync => Outcome::send(self.time_sync.resumed(can_send)),
        }
    }

    /// The channel of `service` is closed.
    pub fn closed(&mut self, service: Service) -> Outcome {
        self.dialogue_mut(service).close();
        Outcome::ended(match service {
            Service::Shutdown => self.shutdown.close(),
            Service::Heartbeat | Service::TimeSync => None,
        })
    }

    /// The guest has said `bytes` on the channel of `service`.
    ///
    /// # Errors
    /// [`Unexpected`]: nothing follows from it.
    pub fn received(&mut self, service: Service, bytes: &[u8]) -> Result<Outcome, Unexpected> {
        let heard = self.dialogue_mut(service).take(bytes)?;
        let Heard::Answer { status, body } = heard else {
            let event = match self.phase(service) {
                Phase::Agreed(versions) => Event::Agreed { service, versions },
                _ => Event::Refused { service },
            };
            return Ok(Outcome { message: None, event: Some(event) });
        };
        match service {
            Service::Heartbeat => self.heartbeat.answered(body).map(|()| Outcome::default()),
            Service::Shutdown => Ok(Outcome::ended(self.shutdown.answered(status))),
            Service::TimeSync => Ok(Outcome::default()),
        }
    }

    /// Does for `service` what is due. `can_send` says that no message waits for room in the guest's
    /// ring.
    pub fn tick(&mut self, service: Service, clocks: Clocks, can_send: bool) -> Outcome {
        match service {
            Service::Heartbeat => Outcome::send(self.heartbeat.tick(clocks.reference_time)),
            Service::Shutdown => Outcome::ended(self.shutdown.tick(clocks.reference_time)),
            Service::TimeSync => Outcome::send(self.time_sync.tick(clocks, can_send)),
        }
    }

    /// The guest's clock may be wrong: at the next tick it is told to set it.
    pub fn resync(&mut self) {
        self.time_sync.resync();
    }

    /// Asks the guest for a shutdown. `reason` is for people, and ends at its first zero. `can_send` as
    /// for [`Self::tick`].
    ///
    /// # Errors
    /// [`ShutdownError`]; nothing has changed.
    pub fn request_shutdown(
        &mut self,
        request: ShutdownRequest,
        reason: &str,
        can_send: bool,
    ) -> Result<Outcome, ShutdownError> {
        self.shutdown.request(request, reason, can_send).map(Outcome::send)
    }
}

/// Whether what was last done at `last` is due again. A reference time that has gone back is another
/// clock's.
fn is_due(last: Option<u64>, reference_time: u64, period: u64) -> bool {
    last.is_none_or(|last| reference_time.checked_sub(last).is_none_or(|since| since >= period))
}
