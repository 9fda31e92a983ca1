//! Many reads or writes at once, with their data handed over in order.
//!
//! As many requests as the queue depth allows are in flight. The user sees one extent after the
//! other, in the order in which they were asked for, whatever the order in which the server ends
//! them.

use std::collections::VecDeque;

use vstor_wire::scsi::cdb::Command;

use crate::buffer::Buffer;
use crate::client::StorageClient;
use crate::disk::DiskInfo;
use crate::error::Error;
use crate::request::Request;

/// A run of bytes of a disk, in whole blocks.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// How many.
    pub bytes: u32,
}

impl Extent {
    /// `bytes` bytes from `offset` on, cut into extents of at most `step` bytes, ascending.
    pub fn cut(offset: u64, bytes: u64, step: u32) -> impl Iterator<Item = Self> {
        let end = offset.saturating_add(bytes);
        let step = u64::from(step.max(1));
        let mut at = offset;
        std::iter::from_fn(move || {
            let bytes = u32::try_from((end - at).min(step)).unwrap_or(u32::MAX);
            let extent = Self { offset: at, bytes };
            at += u64::from(bytes);
            (bytes > 0).then_some(extent)
        })
    }
}

/// An extent that was asked for and not handed over yet.
struct Outstanding {
    extent: Extent,
    end: Option<(Option<Buffer>, Result<u32, Error>)>,
}

/// The extents of one call, oldest first.
struct Window {
    call: u64,
    /// Number of the oldest extent.
    first: u64,
    extents: VecDeque<Outstanding>,
    /// Requests of the newest extents, made and not sent yet.
    made: VecDeque<Request>,
}

impl Window {
    fn new(call: u64, depth: usize) -> Self {
        let (extents, made) = (VecDeque::with_capacity(depth), VecDeque::with_capacity(depth));
        Self { call, first: 0, extents, made }
    }

    fn push(&mut self, extent: Extent, request: Request) {
        let index = self.first + self.extents.len() as u64;
        self.extents.push_back(Outstanding { extent, end: None });
        self.made.push_back(request.with_token(index));
    }

    fn end(&mut self, index: u64, buffer: Option<Buffer>, result: Result<u32, Error>) {
        let at = index.checked_sub(self.first).and_then(|at| usize::try_from(at).ok());
        if let Some(outstanding) = at.and_then(|at| self.extents.get_mut(at)) {
            outstanding.end = Some((buffer, result));
        }
    }

    /// The oldest extent, if it has ended.
    fn take_first(&mut self) -> Option<(Extent, Option<Buffer>, Result<u32, Error>)> {
        self.extents.front()?.end.as_ref()?;
        let Outstanding { extent, end } = self.extents.pop_front()?;
        let (buffer, result) = end?;
        self.first += 1;
        Some((extent, buffer, result))
    }

    /// Gives up the requests that were not sent.
    fn forget_made(&mut self) {
        let sent = self.extents.len().saturating_sub(self.made.len());
        self.extents.truncate(sent); // those made last are the newest
        self.made.clear();
    }

    fn in_flight(&self) -> bool {
        self.extents.iter().any(|outstanding| outstanding.end.is_none())
    }
}

/// The first `bytes` bytes of `scratch`, which grows if it has to.
fn first_bytes(scratch: &mut Vec<u8>, bytes: u32) -> &mut [u8] {
    let bytes = bytes as usize;
    if scratch.len() < bytes {
        scratch.resize(bytes, 0);
    }
    scratch.get_mut(..bytes).unwrap_or_default()
}

impl StorageClient {
    /// Reads `extents` of `disk`, and hands the data of each to `take` with its offset, in order. The
    /// data is a private copy. Returns the bytes read.
    ///
    /// # Errors
    /// The first error: of a request, of an extent that is no part of the disk or longer than
    /// [`Self::max_transfer_bytes`], or of `take`. All requests have ended then.
    pub fn read_extents<E: From<Error>>(
        &mut self,
        disk: &DiskInfo,
        extents: impl IntoIterator<Item = Extent>,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<u64, E> {
        self.run_extents(
            extents,
            |_, extent, buffer| {
                let (lba, blocks) = disk.short_run(extent)?;
                let cdb = Command::read(lba, blocks).encode().map_err(Error::from)?;
                Ok(Request::new(disk.address, cdb).reading(buffer, 0, extent.bytes))
            },
            |scratch, extent, buffer| {
                let data = first_bytes(scratch, extent.bytes);
                buffer.copy_to(data)?;
                take(extent.offset, data)
            },
        )
    }

    /// Writes `extents` of `disk` with the data that `fill` puts into the slice it is given, together
    /// with its offset, in order. Returns the bytes written.
    ///
    /// # Errors
    /// As for [`Self::read_extents`].
    pub fn write_extents<E: From<Error>>(
        &mut self,
        disk: &DiskInfo,
        extents: impl IntoIterator<Item = Extent>,
        mut fill: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<u64, E> {
        self.run_extents(
            extents,
            |scratch, extent, buffer| {
                let (lba, blocks) = disk.short_run(extent)?;
                let cdb = Command::write(lba, blocks, false).encode().map_err(Error::from)?;
                let data = first_bytes(scratch, extent.bytes);
                fill(extent.offset, data)?;
                buffer.copy_from(data)?;
                Ok(Request::new(disk.address, cdb).writing(buffer, 0, extent.bytes))
            },
            |_, _, _| Ok(()),
        )
    }

    /// Keeps the queue filled with the requests that `make` makes of `extents`, and gives each to
    /// `done` in order. Both get private memory to work in.
    fn run_extents<E: From<Error>>(
        &mut self,
        extents: impl IntoIterator<Item = Extent>,
        mut make: impl FnMut(&mut Vec<u8>, Extent, Buffer) -> Result<Request, E>,
        mut done: impl FnMut(&mut Vec<u8>, Extent, &Buffer) -> Result<(), E>,
    ) -> Result<u64, E> {
        self.ready()?;
        let mut window = Window::new(self.requests.begin_call(), usize::from(self.queue_depth()));
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut extents = extents.into_iter();
        let mut moved = 0;
        let result = loop {
            let filled = self.fill_window(&mut window, &mut extents, |extent, buffer| {
                make(&mut scratch, extent, buffer)
            });
            if let Err(error) = filled {
                break Err(error);
            }
            if window.extents.is_empty() {
                break Ok(moved);
            }
            if let Err(error) = self.wait_window(&mut window) {
                window.extents.clear(); // a server that is silent is not waited for twice
                break Err(error.into());
            }
            let handed_over = self.empty_window(&mut window, |extent, buffer| {
                moved += u64::from(extent.bytes);
                done(&mut scratch, extent, buffer)
            });
            if let Err(error) = handed_over {
                break Err(error);
            }
        };
        self.scratch = scratch;
        self.abandon(&mut window);
        result
    }

    /// Sends as many requests as there is room for, with one signal for all of them.
    fn fill_window<E: From<Error>>(
        &mut self,
        window: &mut Window,
        extents: &mut impl Iterator<Item = Extent>,
        mut make: impl FnMut(Extent, Buffer) -> Result<Request, E>,
    ) -> Result<(), E> {
        while window.extents.len() < usize::from(self.queue_depth()) {
            let Some(extent) = extents.next() else { break };
            let buffer = self.take_buffer(extent.bytes)?;
            window.push(extent, make(extent, buffer)?);
        }
        let Window { call, made, .. } = window;
        self.submit_owned(Some(*call), || made.pop_front())
            .map(|_| ())
            .map_err(|refused| refused.error.into())
    }

    /// Waits until a request has ended, and takes in all that have.
    fn wait_window(&mut self, window: &mut Window) -> Result<(), Error> {
        self.wait_call_end()?;
        while let Some(end) = self.requests.next_call_end() {
            window.end(end.token, end.buffer, end.result);
        }
        Ok(())
    }

    /// Hands over the oldest extents, as far as they have ended.
    fn empty_window<E: From<Error>>(
        &mut self,
        window: &mut Window,
        mut done: impl FnMut(Extent, &Buffer) -> Result<(), E>,
    ) -> Result<(), E> {
        while let Some((extent, buffer, result)) = window.take_first() {
            let moved = result?;
            if moved != extent.bytes {
                return Err(Error::ShortTransfer { asked: extent.bytes, moved }.into());
            }
            let Some(buffer) = buffer else { continue }; // every extent has one
            let handed_over = done(extent, &buffer);
            self.put_buffer(buffer);
            handed_over?;
        }
        Ok(())
    }

    /// Waits for what is in flight still: after a call, nothing of it moves data any more. Gives up
    /// when the server does; its buffers stay with the requests until they end.
    fn abandon(&mut self, window: &mut Window) {
        window.forget_made();
        while window.in_flight() {
            if self.wait_window(window).is_err() {
                break;
            }
        }
    }

    /// A buffer of at least `bytes` bytes, from an earlier call if one is large enough.
    pub(crate) fn take_buffer(&mut self, bytes: u32) -> Result<Buffer, Error> {
        while let Some(buffer) = self.spare_buffers.pop() {
            if buffer.bytes() >= bytes {
                return Ok(buffer);
            }
        }
        self.allocate(bytes)
    }

    /// Keeps a buffer for the next call; as many as can be in use at once.
    pub(crate) fn put_buffer(&mut self, buffer: Buffer) {
        if self.spare_buffers.len() < usize::from(self.queue_depth()) {
            self.spare_buffers.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_range_is_cut_into_extents() {
        let cut = |offset, bytes, step| Extent::cut(offset, bytes, step).collect::<Vec<_>>();
        let extent = |offset, bytes| Extent { offset, bytes };
        for (name, got, expected) in [
            ("nothing", cut(5, 0, 4), vec![]),
            ("even", cut(0, 8, 4), vec![extent(0, 4), extent(4, 4)]),
            ("a rest", cut(1, 9, 4), vec![extent(1, 4), extent(5, 4), extent(9, 1)]),
            ("one", cut(7, 3, u32::MAX), vec![extent(7, 3)]),
            ("a step of nothing", cut(0, 2, 0), vec![extent(0, 1), extent(1, 1)]),
            (
                "beyond the end of all numbers",
                cut(u64::MAX - 1, 9, 4),
                vec![extent(u64::MAX - 1, 1)],
            ),
        ] {
            assert_eq!(got, expected, "{name}");
        }
    }

    proptest! {
        /// The extents are the range: in order, without gap or overlap, none longer than the step.
        #[test]
        fn extents_cover_the_range(offset in 0u64..1 << 40, bytes in 0u64..100_000, step in 1u32..9_000) {
            let mut at = offset;
            for extent in Extent::cut(offset, bytes, step) {
                prop_assert_eq!(extent.offset, at);
                prop_assert!(extent.bytes > 0 && extent.bytes <= step);
                at += u64::from(extent.bytes);
            }
            prop_assert_eq!(at, offset + bytes);
        }
    }
}
