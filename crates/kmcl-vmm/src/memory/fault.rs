//! Pages that are brought in when they are first touched: userfaultfd.
//!
//! Only the one mapping is watched that KVM, devices and we ourselves reach memory through. A page that is
//! missing in it and that another mapping of the same file touches first becomes zeros, for good: so
//! whoever makes such a mapping touches the pages here before (`vmbus_memory::RingPages` does).
#![allow(unsafe_code, reason = "has the kernel fill pages of guest memory")]

use std::ffi::c_void;
use std::io;
use std::ptr;
use std::sync::Arc;

use rustix::io::Errno;
use userfaultfd::{Event, FeatureFlags, Uffd, UffdBuilder};
use vm_memory::mmap::GuestMemoryMmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::index::{PAGE, PART_BYTES};

/// How often a copy that the kernel has not begun is tried again.
const MAX_TRIES: u32 = 1000;

/// Where a region is mapped here.
#[derive(Clone, Copy, Debug)]
struct Span {
    address: usize,
    len: usize,
    /// Of its first byte in the memory.
    offset: u64,
}

/// Memory whose missing pages are ours to bring in. Whoever touches one waits, until it is there or this
/// is dropped.
pub(super) struct MissingPages {
    uffd: Uffd,
    spans: Vec<Span>,
    /// A page of zeros, where pages are huge: the kernel has none of that size to map.
    huge_zeros: Option<Vec<u8>>,
    /// Keeps the spans mapped.
    _map: Arc<GuestMemoryMmap>,
}

impl MissingPages {
    /// From now on, nobody gets at a page of `map` that is not there.
    pub(super) fn watch(
        map: &Arc<GuestMemoryMmap>,
        huge_pages: bool,
    ) -> Result<Self, userfaultfd::Error> {
        let feature =
            if huge_pages { FeatureFlags::MISSING_HUGETLBFS } else { FeatureFlags::MISSING_SHMEM };
        let mut builder = UffdBuilder::new();
        // KVM and io_uring touch pages from inside of the kernel.
        builder.close_on_exec(true).non_blocking(true).user_mode_only(false);
        let uffd = builder.require_features(feature).create()?;
        let mut spans = Vec::new();
        let mut offset = 0;
        for region in map.iter() {
            let len = region.size();
            uffd.register(region.as_ptr().cast(), len)?;
            spans.push(Span { address: region.as_ptr().addr(), len, offset });
            offset += region.len();
        }
        let huge_zeros = huge_pages.then(super::part::buffer);
        Ok(Self { uffd, spans, huge_zeros, _map: Arc::clone(map) })
    }

    /// The offset in memory of the next page that somebody waits for; `None` if nobody does.
    pub(super) fn next(&self) -> io::Result<Option<u64>> {
        loop {
            match self.uffd.read_event() {
                Ok(None) => return Ok(None),
                Ok(Some(Event::Pagefault { addr, .. })) => {
                    if let Some(offset) = self.offset_of(addr.addr()) {
                        return Ok(Some(offset / PAGE as u64 * PAGE as u64));
                    }
                }
                // None of the others was asked for.
                Ok(Some(_)) => {}
                Err(userfaultfd::Error::SystemError(errno)) if errno as i32 == INTERRUPTED => {}
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }

    fn offset_of(&self, address: usize) -> Option<u64> {
        self.spans.iter().find_map(|span| {
            let inside = address.checked_sub(span.address).filter(|inside| *inside < span.len)?;
            Some(span.offset + inside as u64)
        })
    }

    /// The address of `len` bytes at `offset` in memory, which lie in one region.
    fn address_of(&self, offset: u64, len: usize) -> io::Result<usize> {
        let found = self.spans.iter().find_map(|span| {
            let inside = usize::try_from(offset.checked_sub(span.offset)?).ok()?;
            let fits = inside.checked_add(len)? <= span.len;
            fits.then(|| span.address + inside)
        });
        found.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Fills the missing ones of the pages at `offset` with `bytes`, which are whole pages, and wakes who
    /// waits for them. Pages that are there stay as they are.
    pub(super) fn fill(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let start = self.address_of(offset, bytes.len())?;
        let page = self.page_bytes();
        let (mut done, mut tries) = (0, 0);
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            let to = to_kernel(start + done);
            // SAFETY: the kernel reads `rest`, which is borrowed. It writes to pages of ours only that
            // are missing, all of them inside of a region (`address_of`) that stays mapped (`_map`); and
            // nobody has a reference into guest memory, as vm-memory and vmbus-memory promise (M2, R2).
            match unsafe { self.uffd.copy(rest.as_ptr().cast(), to, rest.len(), true) } {
                Ok(copied) => done += copied,
                Err(userfaultfd::Error::PartiallyCopied(copied)) if copied <= rest.len() => {
                    done += copied;
                }
                Err(userfaultfd::Error::CopyFailed(errno)) if errno as i32 == THERE_ALREADY => {
                    self.wake(start + done, page)?;
                    done += page;
                }
                // Nothing was copied, because the mappings of this process were changing.
                Err(userfaultfd::Error::PartiallyCopied(_)) if tries < MAX_TRIES => {
                    tries += 1;
                    std::thread::yield_now();
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        Ok(())
    }

    /// Sees to it that the page at `offset` is there: zeros, if it is missing.
    pub(super) fn settle(&self, offset: u64) -> io::Result<()> {
        if let Some(zeros) = &self.huge_zeros {
            return self.fill(offset / PART_BYTES * PART_BYTES, zeros);
        }
        let address = self.address_of(offset, PAGE)?;
        // SAFETY: as in `fill`.
        match unsafe { self.uffd.zeropage(to_kernel(address), PAGE, true) } {
            Ok(_) => Ok(()),
            Err(userfaultfd::Error::ZeropageFailed(errno)) if errno as i32 == THERE_ALREADY => {
                self.wake(address, PAGE)
            }
            Err(error) => Err(io::Error::other(error)),
        }
    }

    fn wake(&self, address: usize, len: usize) -> io::Result<()> {
        self.uffd.wake(to_kernel(address), len).map_err(io::Error::other)
    }

    /// From now on, what is missing is zeros.
    pub(super) fn release(&self) -> io::Result<()> {
        for span in &self.spans {
            self.uffd.unregister(to_kernel(span.address), span.len).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Whether pages come as whole parts only.
    pub(super) fn are_huge(&self) -> bool {
        self.huge_zeros.is_some()
    }

    fn page_bytes(&self) -> usize {
        self.huge_zeros.as_ref().map_or(PAGE, Vec::len)
    }
}

const INTERRUPTED: i32 = Errno::INTR.raw_os_error();
const THERE_ALREADY: i32 = Errno::EXIST.raw_os_error();

/// An address as the kernel takes it; nothing here looks behind it.
fn to_kernel(address: usize) -> *mut c_void {
    ptr::without_provenance_mut(address)
}
