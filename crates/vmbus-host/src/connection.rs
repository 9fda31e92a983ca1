//! The connection: what guest and host have agreed on, and how a guest comes to it.
//!
//! Source: vmbus-wire section 2, "Rules for the host on INITIATE_CONTACT".

use vmbus_wire::guid::Guid;
use vmbus_wire::message::{
    ConnectionState, HostMessage, InitiateContact, MessageType, VersionResponse, VersionResponseV2,
};
use vmbus_wire::version::{FeatureFlags, Negotiated, Version};

use crate::error::Refusal;
use crate::limits::SINT_COUNT;
use crate::outgoing::{SlotId, VMBUS_SINT};
use crate::shape::GuestShape;

/// The connection to which a guest posts messages, under every version.
pub const MESSAGE_CONNECTION: u32 = 1;
/// The connection that a guest signals after it has set bits in the shared interrupt page.
pub const INTERRUPT_PAGE_CONNECTION: u32 = 2;
/// The connection to which a guest posts INITIATE_CONTACT for a version from 5.0 on.
pub const MULTI_CLIENT_CONNECTION: u32 = 4;
/// Connection ids at and below this one have a meaning of their own.
pub(crate) const LAST_RESERVED_CONNECTION: u32 = 4;
/// Connection ids have 24 bits.
pub(crate) const CONNECTION_ID_MASK: u32 = 0x00ff_ffff;

/// Features that this host grants.
pub const SUPPORTED_FEATURES: FeatureFlags = FeatureFlags::CLIENT_ID
    .union(FeatureFlags::MODIFY_CONNECTION)
    .union(FeatureFlags::PAUSE_RESUME)
    .union(FeatureFlags::GUEST_SPECIFIED_SIGNAL_PARAMETERS);

/// How far the connection has come.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Connection {
    /// No guest is connected. No device has anything of a guest's, except in reserved channels.
    #[default]
    Disconnected,
    /// The guest's connection is over: it has unloaded, asked for another one, or is gone. Devices
    /// were told, and some of them have not let go of its memory.
    Disconnecting {
        /// What to do once they have.
        next: Next,
    },
    /// The guest was told that its version is accepted.
    Connected(Established),
}

/// What follows when a connection has ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Next {
    /// Nothing: the guest was reset.
    Nothing,
    /// The guest waits for UNLOAD_COMPLETE; `None` if its version has no such message.
    UnloadComplete(Option<SlotId>),
    /// The guest waits for the VERSION_RESPONSE to a new INITIATE_CONTACT.
    VersionResponse {
        /// Where it waits.
        slot: SlotId,
        /// What it will be told.
        answer: ContactAnswer,
    },
}

/// What the host says to INITIATE_CONTACT.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ContactAnswer {
    /// There is a connection.
    Accepted(Established),
    /// The host does not speak this version.
    Unsupported,
    /// The host speaks it, but there is no connection.
    Failed {
        /// The version asked for.
        version: Version,
    },
}

/// A connection as agreed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Established {
    /// The version.
    pub version: Version,
    /// The features that both sides have.
    pub features: FeatureFlags,
    /// Where the guest takes messages.
    pub slot: SlotId,
    /// The client's own name for itself; with [`FeatureFlags::CLIENT_ID`].
    pub client_id: Option<Guid>,
    /// Guest physical address of the shared interrupt page; below version 2.4.
    pub interrupt_page: Option<u64>,
    /// Guest physical addresses of the parent-to-child and the child-to-parent monitor page. Kept as
    /// the guest gave them: this host offers no monitored channels, and never looks at the pages.
    pub monitor_pages: Option<(u64, u64)>,
    /// Whether the guest has asked for offers, and so is told of every new one.
    pub offers_requested: bool,
}

impl Established {
    /// What the wire formats depend on.
    #[must_use]
    pub fn negotiated(&self) -> Negotiated {
        (self.version, self.features)
    }
}

impl Connection {
    /// The connection, if there is one.
    #[must_use]
    pub fn established(&self) -> Option<&Established> {
        match self {
            Self::Connected(established) => Some(established),
            Self::Disconnected | Self::Disconnecting { .. } => None,
        }
    }

    pub(crate) fn established_mut(&mut self) -> Option<&mut Established> {
        match self {
            Self::Connected(established) => Some(established),
            Self::Disconnected | Self::Disconnecting { .. } => None,
        }
    }
}

/// An INITIATE_CONTACT, judged.
pub(crate) struct Contact {
    /// Where the answer goes.
    pub(crate) slot: SlotId,
    pub(crate) answer: ContactAnswer,
    /// It is not about the connection of this host, which goes on: a client of another SINT or trust
    /// level tries whether somebody serves it.
    pub(crate) foreign: bool,
    /// What was wrong with it, apart from a version that the host does not speak.
    pub(crate) refusal: Option<Refusal>,
}

/// Judges an INITIATE_CONTACT.
///
/// # Errors
/// [`Refusal::Vp`] and [`Refusal::Sint`] where there is nowhere to send an answer to.
pub(crate) fn judge(
    contact: &InitiateContact,
    client_id: Option<Guid>,
    newest: Version,
    shape: &GuestShape,
) -> Result<Contact, Refusal> {
    const MESSAGE: MessageType = MessageType::InitiateContact;
    // The slot must be found for versions that do not exist, too: their guest waits for an answer.
    let number = contact.version.get();
    let target = contact.message_target();
    let sint = target.map_or(VMBUS_SINT, |target| target.sint);
    if sint >= SINT_COUNT {
        return Err(Refusal::Sint { message: MESSAGE, sint: sint.into() });
    }
    let has_vp = number >= Version::V3_0.to_wire();
    let vp = if has_vp { contact.target_message_vp.get() } else { SlotId::DEFAULT.vp };
    let vp_count = shape.vp_count;
    if vp >= vp_count {
        return Err(Refusal::Vp { message: MESSAGE, vp, vp_count });
    }
    let slot = SlotId { vp, sint };
    let unsupported =
        |foreign| Ok(Contact { slot, answer: ContactAnswer::Unsupported, foreign, refusal: None });

    if sint != VMBUS_SINT || target.is_some_and(|target| target.vtl != 0) {
        return unsupported(true);
    }
    let Some(version) = contact.requested().filter(|version| *version <= newest) else {
        return unsupported(false);
    };
    let failed = |refusal| {
        let answer = if version.has_connection_state() {
            ContactAnswer::Failed { version }
        } else {
            ContactAnswer::Unsupported
        };
        Ok(Contact { slot, answer, foreign: false, refusal: Some(refusal) })
    };
    let monitor_pages = match monitor_pages(
        MESSAGE,
        contact.parent_to_child_monitor_gpa.get(),
        contact.child_to_parent_monitor_gpa.get(),
    ) {
        Ok(pages) => pages,
        Err(refusal) => return failed(refusal),
    };
    let interrupt_page = if version.has_event_flags_page() {
        None
    } else {
        contact.interrupt_page().filter(|gpa| *gpa != 0)
    };
    if let Some(gpa) = interrupt_page
        && !shape.ram.is_page(gpa)
    {
        return failed(Refusal::InterruptPage { gpa });
    }
    let features = contact.requested_features() & SUPPORTED_FEATURES;
    let answer = ContactAnswer::Accepted(Established {
        version,
        features,
        slot,
        client_id,
        interrupt_page,
        monitor_pages,
        offers_requested: false,
    });
    Ok(Contact { slot, answer, foreign: false, refusal: None })
}

/// Both monitor pages or none.
pub(crate) fn monitor_pages(
    message: MessageType,
    parent_to_child: u64,
    child_to_parent: u64,
) -> Result<Option<(u64, u64)>, Refusal> {
    match (parent_to_child, child_to_parent) {
        (0, 0) => Ok(None),
        (0, _) | (_, 0) => Err(Refusal::MonitorPages { message, parent_to_child, child_to_parent }),
        pages => Ok(Some(pages)),
    }
}

/// The message that tells a guest the answer.
pub(crate) fn version_response(answer: &ContactAnswer) -> HostMessage {
    let (version, features, state) = match answer {
        ContactAnswer::Unsupported => {
            return HostMessage::VersionResponse(VersionResponse::UNSUPPORTED);
        }
        ContactAnswer::Accepted(established) => {
            (established.version, established.features, ConnectionState::Successful)
        }
        ContactAnswer::Failed { version } => {
            (*version, FeatureFlags::empty(), ConnectionState::UnknownFailure)
        }
    };
    let selected = if version.has_message_sint() { MESSAGE_CONNECTION } else { version.to_wire() };
    let response = VersionResponse::supported(state, selected);
    if version.has_feature_flags() {
        let supported_features = features.bits().into();
        HostMessage::VersionResponseV2(VersionResponseV2 { response, supported_features })
    } else {
        HostMessage::VersionResponse(response)
    }
}
