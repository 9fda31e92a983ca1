//! Every bound.

use std::time::Duration;

/// Connections at a time, those included that are being made.
pub const MAX_CONNECTIONS: usize = 1024;

/// Bytes of the line with which a program of the host begins: `CONNECT`, ten digits, and white space.
pub const MAX_GREETING_BYTES: usize = 32;

/// Most bytes that go to the guest in one packet, of the 16384 that may. Two such packets fit a ring of six
/// pages, which is what Linux opens: one is read while the next is written. A guest with rings in which not
/// even one fits cannot open a connection.
pub const MAX_PACKET_BYTES: u32 = 8192;

/// Packets of the guest that wait for a slow program of the host, for each connection. What is more stays
/// in the ring, and the guest sees it fill up.
pub const MAX_HELD_PACKETS: u32 = 8;

/// Bytes that are kept for a slow program of the host when the guest has closed: what was held, and what
/// was left in the ring. As much as Linux's largest rings have. A guest with larger ones loses the rest.
pub const MAX_KEPT_BYTES: usize = 384 << 10;

/// Bytes that one connection takes from its program before the others have their turn.
pub const BYTES_PER_TURN: usize = 128 << 10;

/// Connections accepted from programs of the host before the others have their turn.
pub const ACCEPTS_PER_TURN: usize = 16;

/// How long a guest may take to open a connection that was offered to it: Linux opens it at once, or not at
/// all if nobody listens.
///
/// Source: devices section 4.
pub const OPEN_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a guest's request waits for a program whose queue of connections is full. Linux gives up by
/// then.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a guest may go on reading what was sent to it, when the program it writes to is gone.
pub const RESET_DELAY: Duration = Duration::from_secs(2);

/// How long a program may take to say where it wants to be connected. People type it.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(60);

/// How often [`SocketBroker::tick`](crate::SocketBroker::tick) is best called.
pub const TICK_PERIOD: Duration = Duration::from_millis(100);

/// The host's side of the first connection from the host. Those that people choose are lower.
pub const FIRST_HOST_PORT: u32 = 1 << 30;
