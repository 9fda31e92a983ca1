//! How a client connects, and how much it asks for.

use std::time::Duration;

use kmcl::Guid;
use vstor_wire::protocol::ProtocolVersion;

/// Most requests a client has in flight.
pub const MAX_QUEUE_DEPTH: u16 = 256;

/// Most subchannels a client asks for.
pub const MAX_SUB_CHANNELS: u16 = 16;

/// Most bytes a client transfers with one request, whatever the server allows.
pub const MAX_TRANSFER_BYTES: u32 = 4 << 20;

/// How a [`StorageClient`](crate::StorageClient) connects. Start from the default and change what
/// matters.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ClientConfig {
    /// The type of channel: SCSI by default.
    pub interface: Guid,
    /// Which controller; by default the first one offered.
    pub instance: Option<Guid>,
    /// The newest protocol version to ask for.
    pub newest_version: ProtocolVersion,
    /// Subchannels to ask for, at most [`MAX_SUB_CHANNELS`]; none by default.
    pub sub_channels: u16,
    /// Requests in flight at once, over all channels: 1 to [`MAX_QUEUE_DEPTH`]; 32 by default.
    pub queue_depth: u16,
    /// Pages of each ring, the control page included; 32 by default, as in Linux. Small rings limit
    /// how long a transfer can be.
    pub ring_pages: u32,
    /// Most bytes of one request, at most [`MAX_TRANSFER_BYTES`]; the server's limit counts if it is
    /// lower.
    pub max_transfer_bytes: u32,
    /// How long the whole initialisation may take.
    pub connect_timeout: Duration,
    /// How long the blocking calls wait for an answer.
    pub request_timeout: Duration,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            interface: vstor_wire::SCSI_INTERFACE,
            instance: None,
            newest_version: ProtocolVersion::WIN10,
            sub_channels: 0,
            queue_depth: 32,
            ring_pages: 32,
            max_transfer_bytes: 1 << 20,
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(30),
        }
    }
}
