//! Records of the sockets between a guest and its host, written by `vsp-socket`. A connection does not
//! go on elsewhere: its other end stays where it is. What is saved is enough to know its offer again, and
//! to withdraw it.

use crate::kind::{KindInfo, RecordKind, SINCE_V1};
use crate::reader::Kinds;
use crate::record::{self, Record};
use crate::schema::{Field, Shape};

/// The kind of [`SocketsRecord`].
pub const SOCKETS: RecordKind = RecordKind(352);
/// The kind of [`SocketConnectionRecord`].
pub const SOCKET_CONNECTION: RecordKind = RecordKind(353);

/// The kinds of the sockets' stream.
pub const KINDS: Kinds = &[SocketsRecord::KIND, SocketConnectionRecord::KIND];

/// The sockets of a guest. Once, before the connections.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SocketsRecord {
    /// The port that the next connection from the host has on the host's side.
    #[prost(uint32, tag = "1")]
    pub next_port: u32,
    /// Connections that follow.
    #[prost(uint32, tag = "2")]
    pub connections: u32,
}

impl Record for SocketsRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: SOCKETS,
        name: "sockets.sockets",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "next_port", Shape::Uint32),
            Field::new(2, "connections", Shape::Uint32),
        ],
        check: record::check::<Self>,
    };
}

/// A connection whose offer stands.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SocketConnectionRecord {
    /// The service that is connected to, which is the offer's interface type: 16 bytes as Windows stores
    /// them.
    #[prost(bytes = "vec", tag = "1")]
    pub service: Vec<u8>,
    /// The connecting end, which is the offer's instance.
    #[prost(bytes = "vec", tag = "2")]
    pub endpoint: Vec<u8>,
    /// The host has connected to the guest, not the guest to the host.
    #[prost(bool, tag = "3")]
    pub from_host: bool,
}

impl Record for SocketConnectionRecord {
    const KIND: &'static KindInfo = &KindInfo {
        kind: SOCKET_CONNECTION,
        name: "sockets.connection",
        mandatory: true,
        versions: SINCE_V1,
        fields: &[
            Field::new(1, "service", Shape::Guid).required(),
            Field::new(2, "endpoint", Shape::Guid),
            Field::new(3, "from_host", Shape::Bool),
        ],
        check: record::check::<Self>,
    };
}
