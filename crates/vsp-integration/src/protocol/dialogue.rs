//! What every service does alike: it negotiates versions when the guest opens its channel, and then
//! sends one request at a time, which the guest answers with a packet of its own.
//!
//! ```text
//!            opened: versions offered         answer: two of them
//!   Closed ───────────────────────► Offered ──────────────────────► Agreed ── request ──► unanswered
//!      ▲                               │ answer: none                  ▲                      │
//!      └──────── closed ───────────────┴──► Refused                    └────── answer ────────┘
//! ```
//!
//! What a guest says out of turn changes nothing.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

use super::{Phase, Unexpected, Versions};
use crate::wire::{
    IcHeader, IcStatus, MessageType, NegotiateAnswer, NegotiateHead, Service, Version,
};

/// A message to the guest, behind the pipe's header.
pub type Message = Vec<u8>;

/// What an answer comes to.
#[derive(Debug)]
pub(super) enum Heard<'a> {
    /// The guest has chosen versions, or none.
    Negotiated,
    /// It has answered the request.
    Answer { status: IcStatus, body: &'a [u8] },
}

/// See the module.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Dialogue {
    pub(super) service: Service,
    pub(super) phase: Phase,
    /// The channel is open here. After a restore it is not before the bus has brought its rings; never,
    /// if the guest had closed it and nobody here had noticed.
    pub(super) is_open: bool,
    /// Number of the last request, negotiations included.
    pub(super) transaction_id: u8,
    /// The last request has no answer yet, once versions are agreed on.
    pub(super) is_unanswered: bool,
}

impl Dialogue {
    pub(super) const fn new(service: Service) -> Self {
        let phase = Phase::Closed;
        Self { service, phase, is_open: false, transaction_id: 0, is_unanswered: false }
    }

    /// How far it has come, here.
    pub(super) const fn phase(&self) -> Phase {
        if self.is_open { self.phase } else { Phase::Closed }
    }

    /// The versions that are spoken, once they are.
    pub(super) const fn versions(&self) -> Option<Versions> {
        match self.phase() {
            Phase::Agreed(versions) => Some(versions),
            _ => None,
        }
    }

    /// The guest has opened the channel: what to send it.
    pub(super) fn open(&mut self) -> Message {
        let (frameworks, messages) = (Service::FRAMEWORKS, self.service.versions());
        let count = |versions: &[Version]| {
            U16::new(u16::try_from(versions.len()).unwrap_or(u16::MAX)) // at most 4
        };
        let head = NegotiateHead {
            frameworks: count(frameworks),
            messages: count(messages),
            reserved: U32::ZERO,
        };
        let mut body = head.as_bytes().to_vec();
        body.extend_from_slice(frameworks.as_bytes());
        body.extend_from_slice(messages.as_bytes());
        (self.phase, self.is_open, self.is_unanswered) = (Phase::Offered, true, false);
        let none = Version::new(0, 0);
        let versions = Versions { framework: none, message: none };
        self.message(MessageType::NEGOTIATE, versions, &body)
    }

    /// The channel is closed.
    pub(super) fn close(&mut self) {
        (self.phase, self.is_open, self.is_unanswered) = (Phase::Closed, false, false);
    }

    /// A request with this body, the answer to which is waited for from now on; `None` if versions are
    /// not agreed on.
    pub(super) fn request(&mut self, body: &[u8]) -> Option<Message> {
        let versions = self.versions()?;
        self.is_unanswered = true;
        Some(self.message(self.service.message_type(), versions, body))
    }

    /// The answer to the last request is not waited for any more.
    pub(super) fn give_up(&mut self) {
        self.is_unanswered = false;
    }

    fn message(&mut self, kind: MessageType, versions: Versions, body: &[u8]) -> Message {
        self.transaction_id = self.transaction_id.wrapping_add(1);
        let header = IcHeader {
            framework: versions.framework,
            message_type: U16::new(kind.0),
            message: versions.message,
            size: U16::new(u16::try_from(body.len()).unwrap_or(u16::MAX)), // at most 2060
            status: U32::new(IcStatus::SUCCESS.0),
            transaction_id: self.transaction_id,
            flags: IcHeader::FLAG_TRANSACTION | IcHeader::FLAG_REQUEST,
            reserved: [0; 2],
        };
        let mut message = Vec::with_capacity(size_of::<IcHeader>() + body.len());
        message.extend_from_slice(header.as_bytes());
        message.extend_from_slice(body);
        message
    }

    /// Takes what the guest says.
    pub(super) fn take<'a>(&mut self, bytes: &'a [u8]) -> Result<Heard<'a>, Unexpected> {
        let short = Unexpected::Short { len: bytes.len(), least: size_of::<IcHeader>() };
        let (header, rest) = IcHeader::ref_from_prefix(bytes).map_err(|_| short)?;
        let size = header.size.get();
        let Some(body) = rest.get(..size.into()) else {
            return Err(Unexpected::Truncated { size, len: rest.len() });
        };
        if header.flags & IcHeader::FLAG_RESPONSE == 0 {
            return Err(Unexpected::NoAnswer { flags: header.flags });
        }
        let expected = match self.phase() {
            Phase::Offered => MessageType::NEGOTIATE,
            Phase::Agreed(_) if self.is_unanswered => self.service.message_type(),
            _ => return Err(Unexpected::Unasked { transaction_id: header.transaction_id }),
        };
        if header.transaction_id != self.transaction_id {
            let (found, expected) = (header.transaction_id, self.transaction_id);
            return Err(Unexpected::Late { found, expected });
        }
        let found = MessageType(header.message_type.get());
        if found != expected {
            return Err(Unexpected::Type { found, expected });
        }
        let status = IcStatus(header.status.get());
        if expected == MessageType::NEGOTIATE {
            self.phase = self.chosen(status, body)?;
            return Ok(Heard::Negotiated);
        }
        self.is_unanswered = false;
        Ok(Heard::Answer { status, body })
    }

    /// What a guest's answer to the offer of versions comes to.
    fn chosen(&self, status: IcStatus, body: &[u8]) -> Result<Phase, Unexpected> {
        if !status.is_success() {
            return Ok(Phase::Refused);
        }
        let least = size_of::<NegotiateAnswer>();
        let short = Unexpected::Body { len: body.len(), least };
        let (answer, _) = NegotiateAnswer::ref_from_prefix(body).map_err(|_| short)?;
        match (answer.head.frameworks.get(), answer.head.messages.get()) {
            (1, 1) => {}
            (0, _) | (_, 0) => return Ok(Phase::Refused),
            (frameworks, messages) => return Err(Unexpected::Choice { frameworks, messages }),
        }
        let versions = Versions { framework: answer.framework, message: answer.message };
        if !versions.is_offered_by(self.service) {
            return Err(Unexpected::Version { versions });
        }
        Ok(Phase::Agreed(versions))
    }
}
