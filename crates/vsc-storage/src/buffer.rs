//! Memory that a request's data moves through: pages that the server reaches.

use kmcl::Channel;
use vmbus_memory::{PageRun, SharedSlice};
use vmbus_wire::PAGE_SIZE_U32;
use vmbus_wire::ranges::GpaRange;

use crate::error::Error;

/// Whole pages of guest memory for the data of requests. A request owns its buffer until it has
/// ended, so that pages a server may still write are never handed to anyone else.
///
/// The server can change the bytes at any time while a request is in flight: copy them out after its
/// completion, and judge the copy.
#[derive(Debug)]
pub struct Buffer {
    run: PageRun,
    /// Page frame numbers of the run, kept so that a request need not list them.
    pfns: Box<[u64]>,
}

impl Buffer {
    /// A buffer of at least `bytes` bytes, from the pages of `channel`'s bus.
    pub(crate) fn allocate(channel: &Channel, bytes: u32) -> Result<Self, Error> {
        let pages = bytes.div_ceil(PAGE_SIZE_U32).max(1);
        let run = channel.allocate_pages(pages)?;
        let pfns = run.pfns().collect();
        Ok(Self { run, pfns })
    }

    /// Length in bytes: a multiple of 4096.
    #[must_use]
    pub fn bytes(&self) -> u32 {
        self.run.pages().saturating_mul(PAGE_SIZE_U32)
    }

    /// All bytes.
    ///
    /// # Errors
    /// [`Error::Memory`]; never for a buffer that was allocated by this crate.
    pub fn slice(&self) -> Result<SharedSlice<'_>, Error> {
        Ok(self.run.slice()?)
    }

    /// Copies the first bytes out, as many as `into` has.
    ///
    /// # Errors
    /// [`Error::Memory`] if the buffer is shorter.
    pub fn copy_to(&self, into: &mut [u8]) -> Result<(), Error> {
        Ok(self.slice()?.read_at(0, into)?)
    }

    /// Copies `from` to the beginning.
    ///
    /// # Errors
    /// [`Error::Memory`] if the buffer is shorter.
    pub fn copy_from(&self, from: &[u8]) -> Result<(), Error> {
        Ok(self.slice()?.write_at(0, from)?)
    }

    /// `bytes` bytes from byte `offset` on, as a packet describes them; `None` where they are not all
    /// inside, or none.
    pub(crate) fn range(&self, offset: u32, bytes: u32) -> Option<GpaRange<'_>> {
        let end = offset.checked_add(bytes).filter(|end| *end <= self.bytes() && bytes > 0)?;
        let pfns = self
            .pfns
            .get((offset / PAGE_SIZE_U32) as usize..end.div_ceil(PAGE_SIZE_U32) as usize)?;
        Some(GpaRange { byte_count: bytes, byte_offset: offset % PAGE_SIZE_U32, pfns })
    }
}
