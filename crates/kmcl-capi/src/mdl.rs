//! Memory descriptor lists: the C form of the ranges that external data and GPADLs are made of.
//!
//! A list that the library hands out belongs to a packet or to a GPADL; its `Process` field holds the
//! handle of that, through which its memory is found when the driver asks for an address. A list that C
//! has made describes pages that [`crate::pages`] gave out.
#![allow(unsafe_code, reason = "reads lists that C gave, and maps pages side by side")]

use core::ffi::c_void;
use core::ops::Deref;
use core::ptr::NonNull;

use kmcl::memory::GuestMemory;
use kmcl::{Limits, NtStatus};
use rustix::mm::{MapFlags, ProtFlags};
use vmbus_wire::ranges::{GpaRange, GpaRanges, pages_spanned};
use vmbus_wire::{PAGE_SIZE, PAGE_SIZE_U32};

use crate::boundary::{self, guarded};
use crate::channel;
use crate::handle::{Handle, Kind};
use crate::incoming;
use crate::pages;
use crate::types::{self, Mdl, Status};
use crate::verifier::violation;

/// `MDL_MAPPED_TO_SYSTEM_VA`
const MAPPED: i16 = 0x1;
/// `MDL_PAGES_LOCKED`
const LOCKED: i16 = 0x2;

/// Words of 8 bytes that the structure takes.
const MDL_WORDS: usize = size_of::<Mdl>() / 8;
const _: () = assert!(size_of::<Mdl>() == 48 && align_of::<Mdl>() == 8);

/// A chain of MDLs, one for each range, in one piece of memory that is used again.
#[derive(Default)]
pub(crate) struct MdlChain {
    /// As long as the longest chain so far; the first `used` are this one.
    words: Vec<u64>,
    /// 0 while there is no chain.
    used: usize,
    is_read_only: bool,
    was_mapped: bool,
}

impl MdlChain {
    #[inline]
    pub(crate) fn is_used(&self) -> bool {
        self.used != 0
    }

    #[inline]
    pub(crate) fn first(&mut self) -> *mut Mdl {
        self.words.as_mut_ptr().cast()
    }

    /// Whether the chain begins or goes on at this address.
    pub(crate) fn holds(&self, mdl: u64) -> bool {
        let first = self.words.as_ptr().addr() as u64;
        (first..first + self.used as u64 * 8).contains(&mdl)
    }

    /// Whether C was given an address of any of it.
    #[inline]
    pub(crate) fn was_mapped(&self) -> bool {
        self.was_mapped
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    #[inline]
    pub(crate) fn clear(&mut self) {
        self.used = 0;
        self.was_mapped = false;
    }

    /// Describes one range of one page, which most are, where there is room for it already; without a
    /// call, so that its caller has nothing to keep.
    #[inline(always)]
    pub(crate) fn describe_page(
        &mut self,
        ranges: GpaRanges<'_>,
        owner: Handle,
        is_read_only: bool,
    ) -> Option<*mut Mdl> {
        let range = ranges.single()?;
        let &[pfn] = range.pfns else { return None };
        let room = self.words.first_chunk_mut::<{ MDL_WORDS + 1 }>()?;
        let [a, b, c, d, e, f] = head(&range, owner);
        *room = [a, b, c, d, e, f, pfn];
        self.used = room.len();
        self.is_read_only = is_read_only;
        self.was_mapped = false;
        Some(self.first())
    }

    /// Describes `ranges`, which belong to `owner`. Allocates where no chain was as long before.
    pub(crate) fn describe<'a>(
        &mut self,
        ranges: impl Iterator<Item = GpaRange<'a>>,
        owner: Handle,
        is_read_only: bool,
    ) {
        self.is_read_only = is_read_only;
        self.was_mapped = false;
        let mut at = 0;
        let mut heads = 0_usize;
        for range in ranges {
            let end = at + MDL_WORDS + range.pfns.len();
            if end > self.words.len() {
                self.words.resize(end, 0);
            }
            let room = self.words.get_mut(at..end).unwrap_or_default();
            if let Some((words, pfns)) = room.split_first_chunk_mut::<MDL_WORDS>() {
                *words = head(&range, owner);
                pfns.copy_from_slice(range.pfns);
            }
            at = end;
            heads += 1;
        }
        self.used = at;
        if heads > 1 {
            self.link();
        }
    }

    /// Now that the words stay where they are, each list can name the next.
    fn link(&mut self) {
        let base = self.words.as_mut_ptr().expose_provenance() as u64;
        let mut at = 0;
        while let Some([_, _, _, _, _, extent]) = self.words.get(at..at + MDL_WORDS) {
            #[expect(clippy::cast_possible_truncation, reason = "two 32-bit halves of a word")]
            let (count, offset) = (*extent as u32, (*extent >> 32) as u32);
            let pages = usize::try_from(pages_spanned(offset, count)).unwrap_or(0);
            let next = at + MDL_WORDS + pages;
            if next >= self.used {
                break;
            }
            if let Some(word) = self.words.get_mut(at) {
                *word = base + next as u64 * 8;
            }
            at = next;
        }
    }
}

/// The structure of one list; its page frame numbers follow.
#[inline]
fn head(range: &GpaRange<'_>, owner: Handle) -> [u64; MDL_WORDS] {
    // As on Windows: 16 bits, whatever the list takes.
    #[expect(clippy::cast_possible_truncation, reason = "documented to be cut off")]
    let size = (size_of::<Mdl>() + range.pfns.len() * 8) as u16;
    [
        0,
        u64::from(size) | u64::from(LOCKED.cast_unsigned()) << 16,
        owner.0,
        0,
        0,
        u64::from(range.byte_count) | u64::from(range.byte_offset) << 32,
    ]
}

/// Pages mapped side by side, whatever their numbers are; unmapped when dropped.
pub(crate) struct View {
    base: NonNull<c_void>,
    len: usize,
}

// SAFETY: nothing but the address and length of a mapping, which any thread may unmap.
unsafe impl Send for View {}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: `base..base + len` is the mapping that `View::new` has made; C was told that its address
        // is over by now, and Rust has no reference into it.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr(), self.len) };
        if let Err(error) = unmapped {
            tracing::error!(%error, "a view of guest memory stays mapped");
        }
    }
}

impl View {
    fn new(memory: &GuestMemory, pfns: &[u64]) -> Option<Self> {
        let len = pfns.len().checked_mul(PAGE_SIZE)?;
        // SAFETY: a new mapping where nothing else is, chosen by the system.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                core::ptr::null_mut(),
                len,
                ProtFlags::empty(),
                MapFlags::PRIVATE,
            )
        };
        let view = Self { base: NonNull::new(base.ok()?)?, len };
        for (page, pfn) in pfns.iter().enumerate() {
            let gpa = pfn.checked_mul(PAGE_SIZE as u64)?;
            let mut regions = memory.regions().iter();
            let region = regions.find(|it| gpa >= it.gpa() && gpa - it.gpa() < it.len())?;
            let (fd, offset) = region.backing()?;
            let at = view.base.as_ptr().wrapping_byte_add(page * PAGE_SIZE);
            // SAFETY: a page of the mapping made above, which is ours; nothing refers to it yet.
            let mapped = unsafe {
                rustix::mm::mmap(
                    at,
                    PAGE_SIZE,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::SHARED | MapFlags::FIXED,
                    fd,
                    offset + (gpa - region.gpa()),
                )
            };
            mapped.ok()?;
        }
        Some(view)
    }
}

/// The page frame numbers behind an MDL.
///
/// # Safety
/// `mdl` is one, with as many of them as its bytes span.
unsafe fn pfns<'a>(mdl: *const Mdl) -> &'a [u64] {
    // SAFETY: the caller's promise; the numbers follow the structure.
    unsafe {
        let pages = pages_spanned((*mdl).byte_offset, (*mdl).byte_count);
        let pages = usize::try_from(pages).unwrap_or(0);
        core::slice::from_raw_parts(mdl.add(1).cast(), pages)
    }
}

/// MDLs of a chain that need no memory of their own to be taken in: nearly all chains.
const FEW: usize = 8;

/// A chain as ranges.
pub(crate) enum Ranges<'a> {
    Few { ranges: [GpaRange<'a>; FEW], count: usize },
    Many(Vec<GpaRange<'a>>),
}

impl<'a> Deref for Ranges<'a> {
    type Target = [GpaRange<'a>];

    fn deref(&self) -> &[GpaRange<'a>] {
        match self {
            Self::Few { ranges, count } => ranges.get(..*count).unwrap_or_default(),
            Self::Many(ranges) => ranges,
        }
    }
}

impl<'a> Ranges<'a> {
    fn push(&mut self, range: GpaRange<'a>) {
        match self {
            Self::Few { ranges, count } => match ranges.get_mut(*count) {
                Some(place) => {
                    *place = range;
                    *count += 1;
                }
                None => {
                    let mut many = ranges.to_vec();
                    many.push(range);
                    *self = Self::Many(many);
                }
            },
            Self::Many(ranges) => ranges.push(range),
        }
    }
}

/// A chain as ranges; `None` where an MDL has no bytes, a strange offset or no pages, and for a chain with
/// more of them than any packet.
///
/// # Safety
/// `mdl` is null or a chain of MDLs, each with as many page frame numbers as its bytes span, for `'a`.
pub(crate) unsafe fn ranges<'a>(mdl: *const Mdl) -> Option<Ranges<'a>> {
    const NONE: GpaRange<'_> = GpaRange { byte_count: 0, byte_offset: 0, pfns: &[] };
    let mut ranges = Ranges::Few { ranges: [NONE; FEW], count: 0 };
    let mut next = mdl;
    while !next.is_null() {
        if ranges.len() >= Limits::EXTERNAL_RANGES as usize {
            return None;
        }
        // SAFETY: the caller's promise.
        let (byte_count, byte_offset, flags, behind) =
            unsafe { ((*next).byte_count, (*next).byte_offset, (*next).flags, (*next).next) };
        if byte_count == 0 || byte_offset >= PAGE_SIZE_U32 || flags & LOCKED == 0 {
            return None;
        }
        // SAFETY: the caller's promise.
        ranges.push(GpaRange { byte_count, byte_offset, pfns: unsafe { pfns(next) } });
        next = behind;
    }
    (!ranges.is_empty()).then_some(ranges)
}

/// Runs `use_it` with the memory of what the MDL belongs to, and with a place to keep views of it.
fn with_memory<R>(
    owner: Handle,
    mdl: u64,
    use_it: impl FnOnce(&GuestMemory, &mut Vec<(u64, View)>) -> R,
) -> Option<R> {
    if owner.is_of(Kind::Incoming) {
        return incoming::with_memory(owner, |memory, views, chain| {
            chain.was_mapped = true;
            use_it(memory, views)
        });
    }
    channel::find(owner)?.gpadls.with_memory(mdl, use_it)
}

/// Behind MmGetSystemAddressForMdlSafe.
///
/// # Safety
/// `mdl` is null or an MDL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclMdlMap(mdl: *mut Mdl) -> *mut c_void {
    const NAME: &str = "MmGetSystemAddressForMdlSafe";
    let none = core::ptr::null_mut();
    guarded(NAME, none, || {
        // SAFETY: null or one by the caller's promise; C leaves it alone meanwhile.
        let Some(list) = (unsafe { mdl.as_mut() }) else {
            violation(NAME, "Mdl", "must not be null");
            return none;
        };
        if list.flags & MAPPED != 0 {
            return list.mapped_system_va;
        }
        let offset = list.byte_offset as usize;
        if list.process == 0 {
            // C's own list, of memory that has an address already.
            return list.start_va.wrapping_byte_add(offset);
        }
        // SAFETY: the caller's promise.
        let pfns = unsafe { pfns(mdl) };
        let key = mdl.addr() as u64;
        let len = list.byte_count as usize;
        let address = with_memory(Handle(list.process), key, |memory, views| {
            if let Some(address) = in_one_piece(memory, pfns, offset, len) {
                return Some(address);
            }
            let view = View::new(memory, pfns)?;
            let address = view.base.as_ptr().wrapping_byte_add(offset);
            views.push((key, view));
            Some(address)
        });
        if address.is_none() {
            violation(NAME, "Mdl", "belongs to a packet or GPADL that is over");
        }
        let Some(address) = address.flatten() else { return none };
        list.mapped_system_va = address;
        list.flags |= MAPPED;
        address
    })
}

/// The address of pages whose numbers follow each other.
fn in_one_piece(
    memory: &GuestMemory,
    pfns: &[u64],
    offset: usize,
    len: usize,
) -> Option<*mut c_void> {
    let first = *pfns.first()?;
    if !(first..).zip(pfns).all(|(expected, pfn)| expected == *pfn) {
        return None;
    }
    let gpa = first.checked_mul(PAGE_SIZE as u64)?.checked_add(offset as u64)?;
    Some(memory.slice(gpa, len).ok()?.as_ptr().cast())
}

/// Behind MmUnmapLockedPages.
///
/// # Safety
/// `mdl` is null or an MDL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclMdlUnmap(mdl: *mut Mdl) {
    const NAME: &str = "MmUnmapLockedPages";
    guarded(NAME, (), || {
        // SAFETY: as for `KmclMdlMap`.
        let Some(list) = (unsafe { mdl.as_mut() }) else {
            violation(NAME, "Mdl", "must not be null");
            return;
        };
        if list.flags & MAPPED == 0 {
            return;
        }
        list.flags &= !MAPPED;
        list.mapped_system_va = core::ptr::null_mut();
        let key = mdl.addr() as u64;
        with_memory(Handle(list.process), key, |_, views| views.retain(|(mdl, _)| *mdl != key));
    });
}

/// Behind MmProbeAndLockPages and MmBuildMdlForNonPagedPool.
///
/// # Safety
/// `mdl` is null or an MDL that IoAllocateMdl or MmInitializeMdl has made.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclMdlLock(mdl: *mut Mdl) -> Status {
    const NAME: &str = "MmProbeAndLockPages";
    boundary::status(NAME, || {
        // SAFETY: as for `KmclMdlMap`.
        let Some(list) = (unsafe { mdl.as_mut() }) else {
            return NtStatus::INVALID_PARAMETER_1;
        };
        let address = list.start_va.addr() as u64 + u64::from(list.byte_offset);
        let Some(gpa) = pages::gpa(address, list.byte_count) else {
            violation(NAME, "Mdl", "describes memory that KmclChannelAllocatePages did not give");
            return NtStatus::ACCESS_DENIED;
        };
        let pages = pages_spanned(list.byte_offset, list.byte_count);
        for page in 0..usize::try_from(pages).unwrap_or(0) {
            // SAFETY: the list was made with as many entries behind it as its bytes span.
            unsafe {
                mdl.add(1).cast::<u64>().add(page).write(gpa / PAGE_SIZE as u64 + page as u64)
            };
        }
        list.flags |= LOCKED;
        NtStatus::SUCCESS
    })
}

/// Copies between C's bytes and the chain's, from `offset` on.
///
/// # Safety
/// `mdl` is null or a chain of MDLs.
unsafe fn copy(
    mdl: *const Mdl,
    offset: u32,
    bytes: u32,
    mut piece: impl FnMut(&GuestMemory, u64, usize, usize) -> bool,
) -> u32 {
    let mut skip = u64::from(offset);
    let mut done = 0_u32;
    let mut next = mdl;
    while !next.is_null() && done < bytes {
        // SAFETY: the caller's promise.
        let (list, pages) = unsafe { (&*next, pfns(next)) };
        let mut in_list = u64::from(list.byte_offset);
        let mut left = u64::from(list.byte_count);
        let owner = Handle(list.process);
        let copied = with_memory(owner, next.addr() as u64, |memory, _| {
            for pfn in pages {
                let here = left.min(PAGE_SIZE as u64 - in_list);
                let from = skip.min(here);
                skip -= from;
                let len = (here - from).min(u64::from(bytes - done));
                if len != 0 {
                    let gpa = pfn * PAGE_SIZE as u64 + in_list + from;
                    if !piece(memory, gpa, done as usize, usize::try_from(len).unwrap_or(0)) {
                        return false;
                    }
                    done += u32::try_from(len).unwrap_or(0);
                }
                left -= here;
                in_list = 0;
            }
            true
        });
        if copied != Some(true) {
            break;
        }
        next = list.next;
    }
    done
}

/// See `kmcl.h`.
///
/// # Safety
/// `mdl` is null or a chain of MDLs; `buffer` is null or has `bytes` bytes to write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclMdlRead(
    mdl: *mut Mdl,
    offset: u32,
    buffer: *mut c_void,
    bytes: u32,
) -> u32 {
    guarded("KmclMdlRead", 0, || {
        // SAFETY: the caller's promises.
        let Some(buffer) = (unsafe { types::bytes_mut(buffer, bytes) }) else { return 0 };
        // SAFETY: the caller's promise.
        unsafe {
            copy(mdl, offset, bytes, |memory, gpa, at, len| {
                buffer.get_mut(at..at + len).is_some_and(|to| memory.read(gpa, to).is_ok())
            })
        }
    })
}

/// See `kmcl.h`.
///
/// # Safety
/// `mdl` is null or a chain of MDLs; `buffer` is null or has `bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclMdlWrite(
    mdl: *mut Mdl,
    offset: u32,
    buffer: *const c_void,
    bytes: u32,
) -> u32 {
    guarded("KmclMdlWrite", 0, || {
        // SAFETY: the caller's promises.
        let Some(buffer) = (unsafe { types::bytes(buffer, bytes) }) else { return 0 };
        // SAFETY: the caller's promise.
        unsafe {
            copy(mdl, offset, bytes, |memory, gpa, at, len| {
                buffer.get(at..at + len).is_some_and(|from| memory.write(gpa, from).is_ok())
            })
        }
    })
}
