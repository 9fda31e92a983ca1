//! A request, as its user makes it, and its end, as the user gets it back.

use vstor_wire::scsi::cdb::Cdb;
use vstor_wire::srb::{DataDirection, ScsiAddress};

use crate::buffer::Buffer;
use crate::error::Error;

/// One SCSI command for one logical unit, with the buffer for its data.
#[derive(Debug)]
pub struct Request {
    pub(crate) address: ScsiAddress,
    pub(crate) cdb: Cdb,
    pub(crate) data: Option<Transfer>,
    pub(crate) token: u64,
}

/// The data of a request: a part of a buffer, and which way it goes.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) direction: DataDirection,
    pub(crate) buffer: Buffer,
    pub(crate) offset: u32,
    pub(crate) bytes: u32,
}

impl Request {
    /// A command without data.
    #[must_use]
    pub fn new(address: ScsiAddress, cdb: Cdb) -> Self {
        Self { address, cdb, data: None, token: 0 }
    }

    /// The command reads `bytes` bytes into `buffer`, from byte `offset` of the buffer on.
    #[must_use]
    pub fn reading(mut self, buffer: Buffer, offset: u32, bytes: u32) -> Self {
        self.data = Some(Transfer { direction: DataDirection::In, buffer, offset, bytes });
        self
    }

    /// The command writes `bytes` bytes of `buffer`, from byte `offset` of the buffer on.
    #[must_use]
    pub fn writing(mut self, buffer: Buffer, offset: u32, bytes: u32) -> Self {
        self.data = Some(Transfer { direction: DataDirection::Out, buffer, offset, bytes });
        self
    }

    /// A word that comes back with the completion.
    #[must_use]
    pub fn with_token(mut self, token: u64) -> Self {
        self.token = token;
        self
    }

    /// The buffer, for a request that was refused and is not wanted any more.
    #[must_use]
    pub fn into_buffer(self) -> Option<Buffer> {
        self.data.map(|data| data.buffer)
    }
}

/// A request that was not accepted: it comes back whole.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct SubmitError {
    /// The request, still the caller's.
    pub request: Request,
    /// Why.
    pub error: Error,
}

/// How a request ended. Each request that was accepted ends exactly once.
#[derive(Debug)]
pub struct Completion {
    /// The word given with [`Request::with_token`].
    pub token: u64,
    /// The buffer, the caller's again.
    pub buffer: Option<Buffer>,
    /// Bytes that were moved, or why it failed.
    pub result: Result<u32, Error>,
}
