//! What comes out of the state machine: things to do, and things to tell.

use vmbus_wire::guid::Guid;
use vmbus_wire::message::{ConnectionState, MessageBuffer};
use vmbus_wire::status::NtStatus;
use vmbus_wire::version::{FeatureFlags, Version};

use crate::error::LossReason;
use crate::offer::OfferedChannel;

/// Names a client endpoint to its [`Guest`](crate::Guest). Never used twice.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ClientId(pub(crate) u64);

/// What the owner of a [`Guest`](crate::Guest) has to do, in the order given.
#[expect(clippy::large_enum_variant, reason = "a message in place is what most effects are")]
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Effect {
    /// Post `message` to `connection_id`, and answer with [`Guest::posted`](crate::Guest::posted).
    /// No further `Post` comes before that answer: a message that the host has no buffer for is
    /// posted again, and none may overtake it.
    Post {
        /// Where to: 1, 4, or what the host asked for. Only the low 24 bits count.
        connection_id: u32,
        /// At most 240 bytes.
        message: MessageBuffer,
    },
    /// The host was short of buffers: call [`Guest::retry_post`](crate::Guest::retry_post) after a
    /// while that grows with `attempt`, which counts from 1.
    RetryPost {
        /// How often the message was refused in a row.
        attempt: u32,
    },
    /// Tell a client endpoint.
    Client {
        /// Which.
        client: ClientId,
        /// What.
        event: ClientEvent,
    },
    /// Host and client have both let go of the ring that GPADL `gpadl` describes: its pages are
    /// free.
    RingReleased {
        /// As returned by [`Guest::open`](crate::Guest::open).
        gpadl: u32,
    },
    /// Tell whoever looks after the connection.
    Connection(ConnectionEvent),
}

/// What a client endpoint is told.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ClientEvent {
    /// An offer matches, and is the client's from now on.
    Offered {
        /// The offer.
        offer: Box<OfferedChannel>,
        /// Guest physical address and size in bytes of its MMIO space.
        mmio: Option<(u64, u64)>,
    },
    /// The host has opened the channel whose ring is `gpadl`.
    Opened {
        /// The ring's GPADL.
        gpadl: u32,
    },
    /// The open failed. The client stays bound to the offer.
    OpenFailed {
        /// The ring's GPADL; its pages come back by [`Effect::RingReleased`].
        gpadl: u32,
        /// Never a success.
        status: NtStatus,
    },
    /// The host's answer to [`Guest::create_gpadl`](crate::Guest::create_gpadl).
    GpadlCreated {
        /// Its handle.
        gpadl: u32,
        /// [`NtStatus::SUCCESS`], or why not.
        status: NtStatus,
    },
    /// The host has let go of a GPADL, or never had it.
    GpadlTornDown {
        /// Its handle.
        gpadl: u32,
    },
    /// The offer is withdrawn, or the connection is gone. The client has to close or unbind.
    Rescinded,
    /// The client cannot be bound: no connection, no MMIO space, or an hvsock request refused.
    ConnectFailed(NtStatus),
}

/// What happens to the connection as a whole.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum ConnectionEvent {
    /// The host accepted a version. Offers follow.
    Connected {
        /// The version.
        version: Version,
        /// What the host granted of the features asked for.
        features: FeatureFlags,
    },
    /// All channels that the host had when it was asked are offered; later ones are hot-added.
    OffersDelivered,
    /// An offer came, whether a client waits for it or not.
    ChannelOffered {
        /// Its number.
        channel_id: u32,
    },
    /// The connection failed or is gone, and every client has been told.
    Lost(LossReason),
    /// The host has answered an unload: it keeps nothing of this guest.
    Unloaded,
    /// The host sends no message until it is told to resume.
    Paused,
    /// The host's answer to new monitor pages.
    ConnectionModified {
        /// How it went.
        connection_state: ConnectionState,
    },
    /// The host's answer to a new target virtual processor; below 5.3 the request was taken.
    ChannelModified {
        /// The channel.
        channel_id: u32,
        /// [`NtStatus::SUCCESS`], or why not.
        status: NtStatus,
    },
    /// Nobody on the host accepted an hvsock connect request.
    HvsockRefused {
        /// The guest's end, as asked for.
        endpoint_id: Guid,
        /// The host's end, as asked for.
        service_id: Guid,
        /// Never a success.
        status: NtStatus,
    },
}
