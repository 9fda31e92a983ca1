//! Sockets that stand still while their guest is saved.
//!
//! A connection does not move with its guest: the program at its other end stays where it is. So nothing of
//! what is in flight is saved, but only which connections there are. Where the guest goes on they are
//! withdrawn, which it takes for a reset; here they go on after a thaw as if nothing had been.

use std::fmt;
use std::sync::Arc;

use kmcl::{ChannelState, Frozen, SaveOptions};
use saved_state::sockets::{KINDS, SocketConnectionRecord, SocketsRecord};
use saved_state::writer::Step;
use saved_state::{HeaderFlags, Save, SaveStep, StreamInfo, StreamKind, StreamWriter, WriteError};
use vmbus_wire::guid::Guid;
use vmbus_wire::hvsock::VSOCK_TEMPLATE;

use super::{Core, SocketBroker};
use crate::connection::Names;
use crate::error::FreezeError;

/// The interface type of the sockets' stream in a saved state; its instance is all zeros.
pub const SAVED_INTERFACE: Guid = VSOCK_TEMPLATE;

impl SocketBroker {
    /// Freezes all connections: see [`FrozenSockets`]. Waits for callbacks that run, and for nothing else.
    ///
    /// # Errors
    /// [`FreezeError`]; the broker is at work then.
    pub fn freeze(&self) -> Result<FrozenSockets, FreezeError> {
        let mut turn = self.core.turn();
        if turn.stands_still {
            return Err(FreezeError::Held);
        }
        let mut channels = Vec::new();
        for channel in turn.connections.values().filter_map(|entry| entry.channel.as_ref()) {
            if channel.state() != ChannelState::Disabled {
                channels.push(channel.freeze()?);
            }
        }
        turn.stands_still = true;
        drop(turn);
        Ok(FrozenSockets { channels, core: Arc::clone(&self.core) })
    }
}

/// Frozen sockets. They thaw when dropped.
///
/// Nothing goes through them, no connection is made or ended, and no time passes for them. Programs of the
/// host can connect, and wait.
#[must_use = "sockets that are not kept frozen thaw at once"]
pub struct FrozenSockets {
    channels: Vec<Frozen>,
    core: Arc<Core>,
}

impl FrozenSockets {
    /// The state to be saved: a stream of kind [`StreamKind::DEVICE`] with [`SAVED_INTERFACE`].
    ///
    /// # Errors
    /// [`WriteError`] where the state cannot be said in the version of the format that is asked for.
    pub fn save(&self, options: &SaveOptions) -> Result<SocketsSave, WriteError> {
        let turn = self.core.turn();
        let connections: Vec<_> = turn
            .connections
            .values()
            .filter(|entry| entry.channel.is_some())
            .map(|entry| {
                let Names { service, endpoint, from_host } = entry.connection.names;
                let bytes = |guid: Guid| match guid {
                    Guid::ZERO => Vec::new(),
                    guid => guid.to_bytes().to_vec(),
                };
                SocketConnectionRecord {
                    service: bytes(service),
                    endpoint: bytes(endpoint),
                    from_host,
                }
            })
            .collect();
        SocketsSave::new(turn.next_port, connections, options)
    }

    /// Lets the sockets go on as if nothing had happened.
    pub fn thaw(self) {
        drop(self);
    }

    /// Ends the sockets here, because their guest goes on elsewhere: it learns nothing, and for programs of
    /// the host their connections are over. What is left of the broker can only be dropped.
    pub fn move_away(mut self) {
        for channel in std::mem::take(&mut self.channels) {
            channel.move_away();
        }
        self.core.close();
    }
}

impl Drop for FrozenSockets {
    fn drop(&mut self) {
        self.channels.clear(); // they thaw
        let mut turn = self.core.turn();
        if turn.listener.is_some() {
            turn.go_on(&self.core);
        }
    }
}

impl fmt::Debug for FrozenSockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrozenSockets").field("channels", &self.channels).finish_non_exhaustive()
    }
}

/// The state of a guest's sockets, as it was when the save was made.
#[derive(Debug)]
pub struct SocketsSave {
    writer: StreamWriter,
    sockets: SocketsRecord,
    connections: Vec<SocketConnectionRecord>,
    /// Chunks written: the header, the sockets, the connections, the end.
    next: usize,
}

impl SocketsSave {
    fn new(
        next_port: u32,
        connections: Vec<SocketConnectionRecord>,
        options: &SaveOptions,
    ) -> Result<Self, WriteError> {
        let count = u32::try_from(connections.len()).unwrap_or(u32::MAX); // at most `MAX_CONNECTIONS`
        let info = StreamInfo {
            stream: StreamKind::DEVICE,
            flags: HeaderFlags::default(),
            interface_type: SAVED_INTERFACE,
            interface_instance: Guid::ZERO,
            producer: options.producer,
            chunks: count.saturating_add(3),
            bytes: 0,
            items: count,
        };
        let writer = StreamWriter::new(options.format, info, KINDS)?;
        let sockets = SocketsRecord { next_port, connections: count };
        Ok(Self { writer, sockets, connections, next: 0 })
    }

    fn chunk(&mut self, room: &mut [u8]) -> Result<Step, WriteError> {
        match self.next.checked_sub(2) {
            None if self.next == 0 => self.writer.header(room),
            None => self.writer.record(&self.sockets, room),
            Some(at) => match self.connections.get(at) {
                Some(connection) => self.writer.record(connection, room),
                None => self.writer.end(room),
            },
        }
    }
}

impl Save for SocketsSave {
    type Error = WriteError;

    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, WriteError> {
        let mut written = 0;
        while !self.writer.is_ended() {
            match self.chunk(buffer.get_mut(written..).unwrap_or_default())? {
                Step::Written { bytes } => {
                    written += bytes;
                    self.next += 1;
                }
                Step::Needs { bytes: needed } => {
                    return Ok(SaveStep { written, needed, done: false });
                }
            }
        }
        Ok(SaveStep { written, needed: 0, done: true })
    }
}
