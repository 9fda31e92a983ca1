//! Connecting and disconnecting: messages 14 to 17. UNLOAD and UNLOAD_COMPLETE have no body.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::HEADER_SIZE;
use crate::guid::Guid;
use crate::version::{FeatureFlags, Version};

/// 14 INITIATE_CONTACT, 40 bytes: the guest asks to connect under a version.
///
/// The version asked for, not any negotiated before, decides what the union at 16 is. Versions that
/// do not exist are no error here: the host answers that it does not support them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct InitiateContact {
    /// At 8: the version asked for, see [`Version`].
    pub version: U32,
    /// At 12: the VP that is to get messages; meaningful from 3.0 on.
    pub target_message_vp: U32,
    /// At 16: below 5.0 the address of the interrupt page, from 5.0 on a [`MessageTarget`]. Use
    /// [`InitiateContact::interrupt_page`] and [`InitiateContact::message_target`].
    pub interrupt_page_or_target: [u8; 8],
    /// At 24: guest physical address of the page in which the host triggers notifications, or 0.
    pub parent_to_child_monitor_gpa: U64,
    /// At 32: guest physical address of the page in which the guest does, or 0.
    pub child_to_parent_monitor_gpa: U64,
}

/// 14 INITIATE_CONTACT, 56 bytes: with [`FeatureFlags::CLIENT_ID`] asked for, and so from 6.0 on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct InitiateContactV2 {
    /// At 8: the shorter form.
    pub contact: InitiateContact,
    /// At 40: names the client across connections.
    pub client_id: Guid,
}

/// Where the guest of a newer version takes messages, and what it asks for: bytes 16 to 23 of
/// INITIATE_CONTACT from 5.0 on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct MessageTarget {
    /// At 16: the SINT for messages, usually 2.
    pub sint: u8,
    /// At 17: the virtual trust level for messages; meaningful from 5.1 on.
    pub vtl: u8,
    /// At 18: zero.
    pub reserved: U16,
    /// At 20: the [`FeatureFlags`] asked for; meaningful from 6.0 on.
    pub feature_flags: U32,
}

const _: () = {
    assert!(HEADER_SIZE + size_of::<InitiateContact>() == 40);
    assert!(HEADER_SIZE + size_of::<InitiateContactV2>() == 56);
    assert!(size_of::<MessageTarget>() == 8);
};

impl InitiateContact {
    /// Asks for a version below 5.0, with an interrupt page (0: none) and without monitor pages.
    #[must_use]
    pub fn with_interrupt_page(version: Version, target_message_vp: u32, gpa: u64) -> Self {
        Self {
            version: version.to_wire().into(),
            target_message_vp: target_message_vp.into(),
            interrupt_page_or_target: gpa.to_le_bytes(),
            parent_to_child_monitor_gpa: U64::ZERO,
            child_to_parent_monitor_gpa: U64::ZERO,
        }
    }

    /// Asks for a version from 5.0 on, without monitor pages.
    #[must_use]
    pub fn with_message_target(
        version: Version,
        target_message_vp: u32,
        target: MessageTarget,
    ) -> Self {
        Self {
            version: version.to_wire().into(),
            target_message_vp: target_message_vp.into(),
            interrupt_page_or_target: zerocopy::transmute!(target),
            parent_to_child_monitor_gpa: U64::ZERO,
            child_to_parent_monitor_gpa: U64::ZERO,
        }
    }

    /// The version asked for, or `None` where there is none of this value.
    #[must_use]
    pub const fn requested(&self) -> Option<Version> {
        Version::from_wire(self.version.get())
    }

    /// Below 5.0: guest physical address of the interrupt page, 0 for none.
    #[must_use]
    pub const fn interrupt_page(&self) -> Option<u64> {
        if self.has_target() {
            None
        } else {
            Some(u64::from_le_bytes(self.interrupt_page_or_target))
        }
    }

    /// From 5.0 on, versions included that do not exist: where messages go. Fields that the version
    /// does not have read as zero.
    #[must_use]
    pub const fn message_target(&self) -> Option<MessageTarget> {
        if !self.has_target() {
            return None;
        }
        let mut target: MessageTarget = zerocopy::transmute!(self.interrupt_page_or_target);
        if self.version.get() < Version::V5_1.to_wire() {
            target.vtl = 0;
        }
        if self.version.get() < Version::V6_0.to_wire() {
            target.feature_flags = U32::ZERO;
        }
        Some(target)
    }

    /// The features asked for, unknown ones included; none below 6.0.
    #[must_use]
    pub const fn requested_features(&self) -> FeatureFlags {
        match self.message_target() {
            Some(target) => FeatureFlags::from_bits_retain(target.feature_flags.get()),
            None => FeatureFlags::empty(),
        }
    }

    /// Whether the message must be an [`InitiateContactV2`]. Of versions that do not exist nothing
    /// is known, and nothing is asked.
    pub(super) fn has_client_id(&self) -> bool {
        self.requested().is_some_and(Version::has_feature_flags)
            && self.requested_features().contains(FeatureFlags::CLIENT_ID)
    }

    const fn has_target(&self) -> bool {
        self.version.get() >= Version::V5_0.to_wire()
    }
}

/// 15 VERSION_RESPONSE, 16 bytes: the answer to INITIATE_CONTACT below 6.0, or to one whose version
/// is not supported.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct VersionResponse {
    /// At 8: nonzero if the host speaks the version.
    pub version_supported: u8,
    /// At 9: [`ConnectionState`]; meaningful from 2.4 on.
    pub connection_state: u8,
    /// At 10: zero.
    pub padding: U16,
    /// At 12: from 5.0 on the connection id to which the guest posts everything later, never 0.
    /// Below, the version; guests ignore it.
    pub selected_version_or_connection_id: U32,
}

/// 15 VERSION_RESPONSE, 20 bytes: from 6.0 on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct VersionResponseV2 {
    /// At 8: the shorter form.
    pub response: VersionResponse,
    /// At 16: the [`FeatureFlags`] that both sides have.
    pub supported_features: U32,
}

/// 15 VERSION_RESPONSE, 40 bytes: with [`FeatureFlags::SERVER_SPECIFIED_MONITOR_PAGES`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct VersionResponseV3 {
    /// At 8: the shorter form.
    pub response: VersionResponseV2,
    /// At 20: zero.
    pub padding: U32,
    /// At 24: guest physical address of the page in which the host triggers notifications.
    pub parent_to_child_monitor_gpa: U64,
    /// At 32: guest physical address of the page in which the guest does.
    pub child_to_parent_monitor_gpa: U64,
}

const _: () = {
    assert!(HEADER_SIZE + size_of::<VersionResponse>() == 16);
    assert!(HEADER_SIZE + size_of::<VersionResponseV2>() == 20);
    assert!(HEADER_SIZE + size_of::<VersionResponseV3>() == 40);
};

impl VersionResponse {
    /// The host does not speak the version. The guest asks for the next one.
    pub const UNSUPPORTED: Self = Self {
        version_supported: 0,
        connection_state: 0,
        padding: U16::ZERO,
        selected_version_or_connection_id: U32::ZERO,
    };

    /// The host speaks the version; `state` says whether there is a connection now.
    #[must_use]
    pub fn supported(state: ConnectionState, selected_version_or_connection_id: u32) -> Self {
        Self {
            version_supported: 1,
            connection_state: state.to_wire(),
            padding: U16::ZERO,
            selected_version_or_connection_id: selected_version_or_connection_id.into(),
        }
    }

    /// Whether the host speaks the version.
    #[must_use]
    pub const fn is_supported(&self) -> bool {
        self.version_supported != 0
    }

    /// How connecting went, for a version that is supported.
    #[must_use]
    pub const fn state(&self) -> ConnectionState {
        ConnectionState::from_wire(self.connection_state)
    }
}

impl VersionResponseV2 {
    /// The features that both sides have, bits without a name included.
    #[must_use]
    pub const fn features(&self) -> FeatureFlags {
        FeatureFlags::from_bits_retain(self.supported_features.get())
    }
}

/// How connecting went, or changing the connection.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum ConnectionState {
    /// It worked.
    Successful,
    /// The host is short of something.
    LowResources,
    /// The host does not say why it failed. Also what an undefined value means.
    UnknownFailure,
}

impl ConnectionState {
    /// From the value on the wire.
    #[must_use]
    pub const fn from_wire(value: u8) -> Self {
        match value {
            0 => Self::Successful,
            1 => Self::LowResources,
            _ => Self::UnknownFailure,
        }
    }

    /// The value on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u8 {
        match self {
            Self::Successful => 0,
            Self::LowResources => 1,
            Self::UnknownFailure => 2,
        }
    }
}
