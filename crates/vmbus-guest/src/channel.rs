//! A channel's record: how far its ring has come, and who uses it.

use std::collections::BTreeSet;

use kmcl::bus::USER_DATA_SIZE;

use crate::effect::ClientId;
use crate::offer::OfferedChannel;

/// An offer that stands, or that is withdrawn and not yet released.
#[derive(Debug)]
pub(crate) struct Channel {
    pub(crate) offer: OfferedChannel,
    /// The client endpoint it belongs to.
    pub(crate) client: Option<ClientId>,
    pub(crate) phase: Phase,
    /// The host has withdrawn the offer.
    pub(crate) rescinded: bool,
    /// REL_ID_RELEASED is on its way; nothing else happens to the channel any more.
    pub(crate) releasing: bool,
    /// GPADLs that the host knows of or was told of, the ring's included.
    pub(crate) gpadls: BTreeSet<u32>,
    /// GPADLs given up at the rescind before the host answered for them. Its answer may still come.
    pub(crate) given_up: BTreeSet<u32>,
    /// MODIFY_CHANNEL is on its way, or waits for its answer.
    pub(crate) modifying: bool,
}

impl Channel {
    pub(crate) fn new(offer: OfferedChannel) -> Self {
        Self {
            offer,
            client: None,
            phase: Phase::Idle,
            rescinded: false,
            releasing: false,
            gpadls: BTreeSet::new(),
            given_up: BTreeSet::new(),
            modifying: false,
        }
    }

    /// Whether a waiting client may have it.
    pub(crate) fn is_free(&self) -> bool {
        self.client.is_none() && !self.rescinded && self.is_at_rest()
    }

    /// Whether the host has nothing of this channel any more.
    pub(crate) fn is_at_rest(&self) -> bool {
        matches!(self.phase, Phase::Idle) && self.gpadls.is_empty()
    }

    /// For messages: what the channel is doing.
    pub(crate) fn state(&self) -> &'static str {
        match (&self.phase, self.rescinded) {
            (_, true) => "withdrawn",
            (Phase::Idle, _) => "closed",
            (Phase::CreatingRing { .. }, _) => "having its ring described",
            (Phase::Opening { .. }, _) => "being opened",
            (Phase::Open { .. }, _) => "open",
            (Phase::Closing, _) => "being closed",
        }
    }
}

/// How far the ring of a channel has come.
///
/// ```text
/// Idle ──▶ CreatingRing ──▶ Opening ──▶ Open
///  ▲  ◀──── refused │          │ refused  │
///  │                │ given up │ given up │ close
///  └──────────── Closing ◀─────┴──────────┘   (until the host has let go of every GPADL)
/// ```
#[derive(Debug)]
pub(crate) enum Phase {
    /// No ring.
    Idle,
    /// The ring's GPADL is described; OPEN follows the host's answer.
    CreatingRing { gpadl: u32, open: Box<OpenParameters>, given_up: bool },
    /// OPEN is sent.
    Opening { gpadl: u32, open_id: u32, given_up: bool },
    /// The host may use the ring.
    Open { gpadl: u32 },
    /// CLOSE and teardowns are sent, as far as they were needed.
    Closing,
}

/// What OPEN_CHANNEL will say once the ring's GPADL stands.
#[derive(Clone, Debug)]
pub(crate) struct OpenParameters {
    pub(crate) downstream_page_offset: u32,
    pub(crate) target_vp: u32,
    pub(crate) user_data: [u8; USER_DATA_SIZE],
}

/// A client endpoint's record.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) target: kmcl::bus::Target,
    pub(crate) state: ClientState,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ClientState {
    /// No offer matches yet.
    Waiting,
    /// Has the channel of this number.
    Bound(u32),
    /// Was told that the channel is gone. `ring` is what it still uses, and nobody else does.
    Gone { ring: Option<u32> },
}
