//! The guest's end of the VMBus storage protocol, in user space: a SCSI host adapter for tests,
//! tools and demonstrations.
//!
//! [`StorageClient`] opens a controller's channel over any [`Bus`](kmcl::bus::Bus), initialises it as
//! a guest's driver does, opens its subchannels, and then moves data:
//!
//! | what for | how |
//! |---|---|
//! | finding disks | [`StorageClient::scan`], [`StorageClient::identify`] |
//! | one thing at a time | [`StorageClient::read`], [`write`](StorageClient::write), [`flush`](StorageClient::flush), [`unmap`](StorageClient::unmap), [`execute`](StorageClient::execute), [`reset`](StorageClient::reset) |
//! | a lot of data, in order | [`StorageClient::read_extents`], [`write_extents`](StorageClient::write_extents) |
//! | full control | [`StorageClient::submit`], [`wait`](StorageClient::wait), [`next_completion`](StorageClient::next_completion) |
//! | hot add and removal | [`StorageClient::next_notice`] |
//! | proving that nothing is lost | [`ledger::Ledger`] |
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use vsc_storage::{ClientConfig, Error, StorageClient};
//!
//! # fn show(bus: Arc<dyn kmcl::bus::Bus>) -> Result<(), Error> {
//! let mut client = StorageClient::connect(bus, ClientConfig::default())?;
//! for disk in client.scan()? {
//!     let mut first = vec![0; disk.block_bytes as usize];
//!     client.read(&disk, 0, &mut first)?;
//!     println!("{} has {} bytes and begins with {:?}", disk.address, disk.bytes(), first.first());
//! }
//! # Ok(()) }
//! ```
//!
//! The client makes no thread: whoever uses it drives it. A request allocates nothing on its way, and
//! each request that was accepted ends exactly once, whatever the server does. What a server sends is
//! never trusted: an answer that cannot be is a typed error, and never a panic.
//!
//! Source: devices, section 1.

#![forbid(unsafe_code)]

mod answer;
mod blocking;
mod buffer;
mod client;
mod config;
mod disk;
mod driver;
mod error;
mod handshake;
mod inbox;
pub mod ledger;
mod link;
mod notice;
mod pipeline;
mod request;
mod requests;
mod scan;
mod table;

pub use blocking::{Data, Reset};
pub use buffer::Buffer;
pub use client::StorageClient;
pub use config::{ClientConfig, MAX_QUEUE_DEPTH, MAX_SUB_CHANNELS, MAX_TRANSFER_BYTES};
pub use disk::{DiskInfo, UnmapLimits};
pub use error::{AnswerError, Error, ScsiError};
pub use handshake::{HandshakeError, Properties};
pub use notice::Notice;
pub use pipeline::Extent;
pub use request::{Completion, Request, SubmitError};

pub use vstor_wire as wire;
