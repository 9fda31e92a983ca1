//! Pages of a client's memory that C works with, and the way from an address back to a page.
#![allow(unsafe_code, reason = "exports functions, and writes where C says")]

use core::ffi::c_void;
use std::collections::BTreeMap;
use std::sync::{Mutex, RwLock};

use kmcl::NtStatus;
use kmcl::memory::PageRun;

use crate::boundary::{self, guarded};
use crate::channel::{lock, named};
use crate::types::{Status, VmbChannel};
use crate::verifier::violation;

/// Pages that C has: where they are in this process and in the guest, and how many bytes.
#[derive(Clone, Copy)]
struct Place {
    gpa: u64,
    len: u64,
}

/// All of them by address, of all channels.
static PLACES: RwLock<BTreeMap<u64, Place>> = RwLock::new(BTreeMap::new());

/// The guest physical address of `bytes` bytes at `address`, if C was given them.
pub(crate) fn gpa(address: u64, bytes: u32) -> Option<u64> {
    let places = PLACES.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (base, place) = places.range(..=address).next_back()?;
    let offset = address - base;
    let end = offset.checked_add(u64::from(bytes))?;
    (end <= place.len).then_some(place.gpa + offset)
}

/// The pages of one channel.
#[derive(Default)]
pub(crate) struct Pages(Mutex<BTreeMap<u64, PageRun>>);

impl Pages {
    fn add(&self, run: PageRun) -> Option<u64> {
        let address = run.slice().ok()?.as_ptr().expose_provenance() as u64;
        let place = Place { gpa: run.gpa(), len: run.len() as u64 };
        let mut places = PLACES.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        places.insert(address, place);
        drop(places);
        lock(&self.0).insert(address, run);
        Some(address)
    }

    fn remove(&self, address: u64) -> bool {
        let run = lock(&self.0).remove(&address);
        let mut places = PLACES.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if run.is_some() {
            places.remove(&address);
        }
        run.is_some()
    }

    pub(crate) fn free_all(&self) {
        let addresses: Vec<u64> = lock(&self.0).keys().copied().collect();
        for address in addresses {
            self.remove(address);
        }
    }
}

/// See `kmcl.h`.
///
/// # Safety
/// `address` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclChannelAllocatePages(
    channel: VmbChannel,
    pages: u32,
    address: *mut *mut c_void,
) -> Status {
    const NAME: &str = "KmclChannelAllocatePages";
    boundary::status(NAME, || {
        let Some(it) = named(NAME, channel) else { return NtStatus::INVALID_PARAMETER_1 };
        if address.is_null() {
            return NtStatus::INVALID_PARAMETER_3;
        }
        let run = match it.channel.allocate_pages(pages) {
            Ok(run) => run,
            Err(error) => return error.status(),
        };
        let place = it.pages.add(run).and_then(|place| usize::try_from(place).ok());
        let Some(place) = place else { return NtStatus::INSUFFICIENT_RESOURCES };
        // SAFETY: not null; the caller's promise. The pages are C's from here on.
        unsafe { address.write(core::ptr::with_exposed_provenance_mut(place)) };
        NtStatus::SUCCESS
    })
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclChannelFreePages(channel: VmbChannel, address: *mut c_void) {
    const NAME: &str = "KmclChannelFreePages";
    guarded(NAME, (), || {
        let Some(it) = named(NAME, channel) else { return };
        if !it.pages.remove(address.addr() as u64) {
            violation(NAME, "Address", "is not one that KmclChannelAllocatePages gave out");
        }
    });
}
