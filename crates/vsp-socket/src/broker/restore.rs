//! Sockets out of a saved state: the connections there were are taken over, and withdrawn once the bus goes
//! on.
//!
//! ```text
//!   restoring(state) ──► HostBus::finish_restore ──► start
//!      │ offers are taken over, programs may connect    │ these connections are reset, others are made
//!      └ refused                                        └ SocketBroker
//! ```

use std::fmt;
use std::io::Read;
use std::sync::Arc;

use kmcl::{Channel, Side};
use saved_state::input::{ChunkInput, InputError};
use saved_state::sockets::{KINDS, SOCKET_CONNECTION, SocketConnectionRecord, SocketsRecord};
use saved_state::{Chunk, ReadError, Record, StreamKind, StreamReader};
use vmbus_host::HostBus;
use vmbus_wire::guid::Guid;

use super::frozen::SAVED_INTERFACE;
use super::{Core, SocketBroker, SocketConfig, prepare};
use crate::connection::Names;
use crate::driver::Driver;
use crate::error::SocketError;
use crate::limits::{FIRST_HOST_PORT, MAX_CONNECTIONS};

/// Why sockets were not restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketRestoreError {
    /// The bytes are not the saved state of sockets, or damaged.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The bytes cannot be had.
    #[error(transparent)]
    Input(#[from] InputError),
    /// A number that cannot be.
    #[error("chunk {chunk}: {record}: {field} is {found}, possible are {least} to {most}")]
    Value {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// Its record.
        record: &'static str,
        /// The field.
        field: &'static str,
        /// What is there.
        found: u32,
        /// Least that may be.
        least: u32,
        /// Most that may be.
        most: u32,
    },
    /// A connection comes before the sockets, or these come twice or not at all.
    #[error("chunk {chunk}: {record} out of order")]
    Order {
        /// Place of the chunk in the stream.
        chunk: u32,
        /// Its record.
        record: &'static str,
    },
    /// The bus does not take a connection over: it is there twice.
    #[error("connection of {endpoint} to {service}: {why}")]
    Offer {
        /// The offer's interface type.
        service: Guid,
        /// Its instance.
        endpoint: Guid,
        /// What the bus says.
        #[source]
        why: kmcl::Error,
    },
    /// The broker cannot be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
}

/// The connections of a saved state, offered to a bus that is being restored. By itself for a guest that
/// goes on without sockets: the bus would miss the offers.
///
/// Dropping it withdraws them.
#[derive(Debug)]
pub struct AdoptedSockets {
    channels: Vec<Channel>,
    next_port: u32,
}

impl AdoptedSockets {
    /// Offers the connections that `state` has to `bus`, which takes them for those that the guest knows.
    ///
    /// # Errors
    /// [`SocketRestoreError`]; nothing is offered then.
    pub fn adopt(bus: &HostBus, state: impl Read) -> Result<Self, SocketRestoreError> {
        let saved = Saved::read(state)?;
        let mut adopted = Self { channels: Vec::new(), next_port: saved.next_port };
        for names in saved.connections {
            let Names { service, endpoint, .. } = names;
            let refused = |why| SocketRestoreError::Offer { service, endpoint, why };
            let channel = Channel::allocate(Side::Server, Arc::new(bus.clone()));
            prepare(&channel, names).map_err(refused)?;
            channel.enable().map_err(refused)?;
            adopted.channels.push(channel);
        }
        Ok(adopted)
    }

    /// How many there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.channels.len()
    }

    /// Withdraws them, after [`HostBus::finish_restore`]: the guest takes it for a reset.
    pub fn withdraw(self) {
        drop(self);
    }
}

impl Drop for AdoptedSockets {
    fn drop(&mut self) {
        // Nobody drives them: this does, here and now.
        for channel in self.channels.drain(..) {
            channel.disable();
            channel.cleanup();
        }
    }
}

impl SocketBroker {
    /// Sockets for a guest that goes on where it was saved; `bus` is being restored. Programs of the host may
    /// connect from now on, and wait until [`RestoringSockets::start`].
    ///
    /// # Errors
    /// [`SocketRestoreError`]; nothing is offered then.
    pub fn restoring(
        bus: HostBus,
        driver: Arc<dyn Driver>,
        config: SocketConfig,
        state: impl Read,
    ) -> Result<RestoringSockets, SocketRestoreError> {
        let adopted = AdoptedSockets::adopt(&bus, state)?;
        let broker = Self { core: Core::new(bus, driver, config)? };
        broker.core.turn().next_port = adopted.next_port;
        Ok(RestoringSockets { adopted, broker })
    }
}

/// Sockets that are being restored: see [`SocketBroker::restoring`]. Dropping them gives the restore up.
pub struct RestoringSockets {
    adopted: AdoptedSockets,
    broker: SocketBroker,
}

impl RestoringSockets {
    /// The connections that there were.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.adopted.connections()
    }

    /// Withdraws those, after [`HostBus::finish_restore`], and begins to serve.
    #[must_use]
    pub fn start(self) -> SocketBroker {
        let Self { adopted, broker } = self;
        adopted.withdraw();
        broker.core.turn().go_on(&broker.core);
        broker
    }
}

impl fmt::Debug for RestoringSockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RestoringSockets")
            .field("connections", &self.connections())
            .finish_non_exhaustive()
    }
}

/// What the stream says, checked.
struct Saved {
    next_port: u32,
    connections: Vec<Names>,
}

impl Saved {
    fn read(state: impl Read) -> Result<Self, SocketRestoreError> {
        let reader = StreamReader::new(StreamKind::DEVICE, KINDS);
        let mut reader = reader.of_interface(SAVED_INTERFACE, Guid::ZERO);
        let mut input = ChunkInput::new(state);
        let mut saved: Option<(Self, u32)> = None;
        let mut last = 0;
        while let Some(mut bytes) = input.next()? {
            while let Some(chunk) = reader.read(&mut bytes)? {
                last = chunk.sequence();
                let order = SocketRestoreError::Order { chunk: last, record: chunk.info().name };
                match &mut saved {
                    Some((saved, count)) if chunk.kind() == SOCKET_CONNECTION => {
                        saved.add(&chunk, *count)?;
                    }
                    None if chunk.kind() != SOCKET_CONNECTION => saved = Some(Self::of(&chunk)?),
                    _ => return Err(order),
                }
            }
        }
        reader.finish()?;
        let record = SocketsRecord::KIND.name;
        let (saved, count) = saved.ok_or(SocketRestoreError::Order { chunk: last, record })?;
        let found = u32::try_from(saved.connections.len()).unwrap_or(u32::MAX); // no more than `count`
        match found == count {
            true => Ok(saved),
            false => Err(SocketRestoreError::Value {
                chunk: last,
                record,
                field: "connections",
                found: count,
                least: found,
                most: found,
            }),
        }
    }

    fn of(chunk: &Chunk<'_>) -> Result<(Self, u32), SocketRestoreError> {
        let SocketsRecord { next_port, connections } = chunk.decode()?;
        within(chunk, "next_port", next_port, FIRST_HOST_PORT, u32::MAX - 1)?;
        let most = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX); // a constant
        within(chunk, "connections", connections, 0, most)?;
        Ok((Self { next_port, connections: Vec::new() }, connections))
    }

    fn add(&mut self, chunk: &Chunk<'_>, count: u32) -> Result<(), SocketRestoreError> {
        let there = u32::try_from(self.connections.len()).unwrap_or(u32::MAX);
        within(chunk, "connections", there.saturating_add(1), 0, count)?;
        let SocketConnectionRecord { service, endpoint, from_host } = chunk.decode()?;
        // The record's check has seen that they are 16 bytes, or none for zeros.
        let guid = |bytes: Vec<u8>| bytes.try_into().map_or(Guid::ZERO, Guid::from_bytes);
        let (service, endpoint) = (guid(service), guid(endpoint));
        self.connections.push(Names { service, endpoint, from_host });
        Ok(())
    }
}

fn within(
    chunk: &Chunk<'_>,
    field: &'static str,
    found: u32,
    least: u32,
    most: u32,
) -> Result<(), SocketRestoreError> {
    if (least..=most).contains(&found) {
        return Ok(());
    }
    let (chunk, record) = (chunk.sequence(), chunk.info().name);
    Err(SocketRestoreError::Value { chunk, record, field, found, least, most })
}
