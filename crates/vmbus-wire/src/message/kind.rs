//! The types of control messages, and which of them may be sent when.

use core::fmt;

use crate::version::{FeatureFlags, Negotiated, Version};

/// Who sends a message.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Direction {
    /// Posted by the guest.
    GuestToHost,
    /// Put into a message slot by the host.
    HostToGuest,
}

/// One list for the values, names, directions and sizes, so that no message can lack one of them.
macro_rules! message_types {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal, $direction:ident, $size:literal;)*) => {
        /// The type of a control message.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub enum MessageType {
            $($(#[$doc])* $name = $value,)*
        }

        impl MessageType {
            /// Every type, by value.
            pub const ALL: [Self; 29] = [$(Self::$name),*];

            /// The type with this value on the wire, or `None` where there is none.
            #[must_use]
            pub const fn from_wire(value: u32) -> Option<Self> {
                match value {
                    $($value => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// The name in the protocol, such as `OPEN_CHANNEL`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// Who sends it.
            #[must_use]
            pub const fn direction(self) -> Direction {
                match self {
                    $(Self::$name => Direction::$direction,)*
                }
            }

            /// Bytes of its shortest form, the header included.
            #[must_use]
            pub const fn min_size(self) -> usize {
                match self {
                    $(Self::$name => $size,)*
                }
            }
        }
    };
}

message_types! {
    /// A channel is there.
    OfferChannel = 1, "OFFER_CHANNEL", HostToGuest, 196;
    /// A channel goes away.
    RescindChannelOffer = 2, "RESCIND_CHANNEL_OFFER", HostToGuest, 12;
    /// The guest asks which channels there are.
    RequestOffers = 3, "REQUEST_OFFERS", GuestToHost, 8;
    /// All channels of the moment have been offered.
    AllOffersDelivered = 4, "ALL_OFFERS_DELIVERED", HostToGuest, 8;
    /// The guest opens a channel.
    OpenChannel = 5, "OPEN_CHANNEL", GuestToHost, 148;
    /// Whether the channel is open.
    OpenChannelResult = 6, "OPEN_CHANNEL_RESULT", HostToGuest, 20;
    /// The guest closes a channel. No reply.
    CloseChannel = 7, "CLOSE_CHANNEL", GuestToHost, 12;
    /// The guest describes memory: the start of the description.
    GpadlHeader = 8, "GPADL_HEADER", GuestToHost, 20;
    /// The guest describes memory: more of the description.
    GpadlBody = 9, "GPADL_BODY", GuestToHost, 16;
    /// Whether the host took the description.
    GpadlCreated = 10, "GPADL_CREATED", HostToGuest, 20;
    /// The guest wants the memory back.
    GpadlTeardown = 11, "GPADL_TEARDOWN", GuestToHost, 16;
    /// The host has let go of the memory.
    GpadlTorndown = 12, "GPADL_TORNDOWN", HostToGuest, 12;
    /// The guest has let go of a rescinded channel: its id may be used again.
    RelIdReleased = 13, "REL_ID_RELEASED", GuestToHost, 12;
    /// The guest connects, and asks for a version.
    InitiateContact = 14, "INITIATE_CONTACT", GuestToHost, 40;
    /// Whether the version is one the host speaks.
    VersionResponse = 15, "VERSION_RESPONSE", HostToGuest, 16;
    /// The guest disconnects.
    Unload = 16, "UNLOAD", GuestToHost, 8;
    /// The host has forgotten the connection.
    UnloadComplete = 17, "UNLOAD_COMPLETE", HostToGuest, 8;
    /// A guest that crashed opens a channel for its dump.
    OpenReservedChannel = 18, "OPEN_RESERVED_CHANNEL", GuestToHost, 28;
    /// Closes such a channel.
    CloseReservedChannel = 19, "CLOSE_RESERVED_CHANNEL", GuestToHost, 20;
    /// Such a channel is closed.
    CloseReservedResponse = 20, "CLOSE_RESERVED_RESPONSE", HostToGuest, 12;
    /// The guest wants a socket connection.
    TlConnectRequest = 21, "TL_CONNECT_REQUEST", GuestToHost, 40;
    /// The guest moves a channel's interrupts to another VP.
    ModifyChannel = 22, "MODIFY_CHANNEL", GuestToHost, 16;
    /// There is no such socket connection.
    TlConnectResult = 23, "TL_CONNECT_RESULT", HostToGuest, 44;
    /// The interrupts have moved.
    ModifyChannelResponse = 24, "MODIFY_CHANNEL_RESPONSE", HostToGuest, 16;
    /// The guest changes the monitor pages of the connection.
    ModifyConnection = 25, "MODIFY_CONNECTION", GuestToHost, 24;
    /// Whether they have changed.
    ModifyConnectionResponse = 26, "MODIFY_CONNECTION_RESPONSE", HostToGuest, 9;
    /// The guest wants no more messages for now.
    Pause = 27, "PAUSE", GuestToHost, 8;
    /// There will be no more.
    PauseResponse = 28, "PAUSE_RESPONSE", HostToGuest, 8;
    /// The guest wants messages again.
    Resume = 29, "RESUME", GuestToHost, 8;
}

impl MessageType {
    /// The value on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u32 {
        self as u32
    }

    /// Whether the message exists under what was negotiated; with `None`, whether it may be sent
    /// while there is no connection.
    ///
    /// Source: vmbus-wire section 3, table and "Sequences".
    #[must_use]
    pub const fn is_allowed(self, negotiated: Option<Negotiated>) -> bool {
        let Some((version, features)) = negotiated else {
            // A crashed guest's second kernel may unload, or close a dump channel, on a connection
            // that it never made; and each of these has its answer.
            return matches!(
                self,
                Self::InitiateContact
                    | Self::VersionResponse
                    | Self::Unload
                    | Self::UnloadComplete
                    | Self::CloseReservedChannel
                    | Self::CloseReservedResponse
            );
        };
        match self {
            Self::UnloadComplete => version.has_unload_complete(),
            Self::OpenReservedChannel | Self::CloseReservedResponse => {
                version.has_reserved_channels()
            }
            Self::TlConnectRequest => version.has_hvsock(),
            Self::ModifyChannel => version.has_modify_channel(),
            Self::TlConnectResult => version.has_hvsock_connect_result(),
            Self::ModifyChannelResponse => version.has_modify_channel_response(),
            Self::ModifyConnection | Self::ModifyConnectionResponse => {
                has_feature(version, features, FeatureFlags::MODIFY_CONNECTION)
            }
            Self::Pause | Self::PauseResponse | Self::Resume => {
                has_feature(version, features, FeatureFlags::PAUSE_RESUME)
            }
            _ => true,
        }
    }
}

const fn has_feature(version: Version, features: FeatureFlags, wanted: FeatureFlags) -> bool {
    version.has_feature_flags() && features.contains(wanted)
}

impl fmt::Display for MessageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
