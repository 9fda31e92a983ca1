//! GPADLs: created by clients from their pages, mapped by servers as MDLs.
#![allow(unsafe_code, reason = "exports functions, reads MDLs, and writes where C says")]

use core::ffi::c_void;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use kmcl::memory::GuestMemory;
use kmcl::{Error, GpadlFlags, GpadlMapping, NtStatus, Side};

use crate::boundary::guarded;
use crate::channel::{CChannel, lock, named, passive};
use crate::context::{is_in_packet_callback, must_be_passive};
use crate::handle::Handle;
use crate::mdl::{self, MdlChain, View};
use crate::pages;
use crate::types::{Mdl, Status, VmbChannel};
use crate::verifier::violation;

/// The GPADLs of one channel.
pub(crate) struct Gpadls {
    channel: Handle,
    /// Those that a client has created.
    created: Mutex<BTreeSet<u32>>,
    /// Those that a server has mapped.
    mapped: Mutex<BTreeMap<u32, Mapped>>,
}

struct Mapped {
    mapping: GpadlMapping,
    mdls: MdlChain,
    views: Vec<(u64, View)>,
}

impl Gpadls {
    pub(crate) fn new(channel: Handle) -> Self {
        Self { channel, created: Mutex::default(), mapped: Mutex::default() }
    }

    /// EvtVmbChannelClosed has returned: the library undoes what is left, and so do we (D-58).
    pub(crate) fn release(&self) {
        let created = std::mem::take(&mut *lock(&self.created));
        let mapped = std::mem::take(&mut *lock(&self.mapped));
        if !created.is_empty() || !mapped.is_empty() {
            drop(mapped);
            violation("EvtVmbChannelClosed", "Channel", "still has GPADLs when it returns (D-58)");
        }
    }

    /// The memory of a mapped GPADL, by one of its MDLs.
    pub(crate) fn with_memory<R>(
        &self,
        mdl: u64,
        use_it: impl FnOnce(&GuestMemory, &mut Vec<(u64, View)>) -> R,
    ) -> Option<R> {
        let mut mapped = lock(&self.mapped);
        let gpadl = mapped.values_mut().find(|gpadl| gpadl.mdls.holds(mdl))?;
        let memory = gpadl.mapping.data().ok()?.memory();
        Some(use_it(memory, &mut gpadl.views))
    }
}

/// Creates one, and writes its handle to `*out`.
///
/// # Safety
/// `out` is null or can be written.
unsafe fn create(
    it: &CChannel,
    out: *mut u32,
    create: impl FnOnce() -> Result<u32, Error>,
) -> NtStatus {
    // The answer comes through the bus, which the thread in a packet callback keeps from being looked at.
    if is_in_packet_callback(it.handle) {
        return NtStatus::INVALID_DEVICE_STATE;
    }
    match create() {
        Ok(gpadl) => {
            lock(&it.gpadls.created).insert(gpadl);
            // SAFETY: not null, as its callers have seen; their caller's promise.
            unsafe { out.write(gpadl) };
            NtStatus::SUCCESS
        }
        Err(error) => error.status(),
    }
}

/// VmbChannelCreateGpadlFromBuffer: of memory from `KmclChannelAllocatePages`.
///
/// # Safety
/// `gpadl_handle` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbChannelCreateGpadlFromBuffer(
    channel: VmbChannel,
    flags: u32,
    buffer: *mut c_void,
    byte_count: u32,
    gpadl_handle: *mut u32,
) -> Status {
    passive("VmbChannelCreateGpadlFromBuffer", channel, |it| {
        if gpadl_handle.is_null() {
            return NtStatus::INVALID_PARAMETER_5;
        }
        let flags = GpadlFlags::from_bits_retain(flags);
        let gpa = pages::gpa(buffer.addr() as u64, byte_count);
        // SAFETY: not null; the caller's promise.
        unsafe {
            create(it, gpadl_handle, || match gpa {
                Some(gpa) => it.channel.create_gpadl_from_buffer(flags, gpa, byte_count),
                None => Err(Error::Argument { position: 3, name: "Buffer", value: 0 }),
            })
        }
    })
}

/// VmbChannelCreateGpadlFromMdl.
///
/// # Safety
/// `mdl` is null or a chain of MDLs; `gpadl_handle` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbChannelCreateGpadlFromMdl(
    channel: VmbChannel,
    flags: u32,
    mdl: *mut Mdl,
    start_offset_within_mdl: u32,
    data_length_within_mdl: u32,
    gpadl_handle: *mut u32,
) -> Status {
    passive("VmbChannelCreateGpadlFromMdl", channel, |it| {
        if gpadl_handle.is_null() {
            return NtStatus::INVALID_PARAMETER_6;
        }
        let flags = GpadlFlags::from_bits_retain(flags);
        let (offset, length) = (start_offset_within_mdl, data_length_within_mdl);
        // SAFETY: a chain by the caller's promise; the handle is not null, and as promised.
        unsafe {
            let ranges = mdl::ranges(mdl);
            create(it, gpadl_handle, || match &ranges {
                Some(ranges) => it.channel.create_gpadl_from_mdl(flags, ranges, offset, length),
                None => Err(Error::Argument { position: 3, name: "Mdl", value: 0 }),
            })
        }
    })
}

/// VmbChannelDeleteGpadl: blocks while the server has it mapped.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelDeleteGpadl(channel: VmbChannel, gpadl_handle: u32) {
    const NAME: &str = "VmbChannelDeleteGpadl";
    guarded(NAME, (), || {
        must_be_passive(NAME);
        let Some(it) = named(NAME, channel) else { return };
        if is_in_packet_callback(it.handle) {
            violation(NAME, "Channel", "must not be called in a packet callback of its channel");
            return;
        }
        if !lock(&it.gpadls.created).remove(&gpadl_handle) {
            violation(NAME, "GpadlHandle", "names no GPADL that this channel has created");
            return;
        }
        it.channel.delete_gpadl(gpadl_handle);
    });
}

/// VmbChannelMapGpadl (D-57).
///
/// # Safety
/// `mdl` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbChannelMapGpadl(
    channel: VmbChannel,
    flags: u32,
    gpadl_handle: u32,
    mdl: *mut *mut Mdl,
) -> Status {
    passive("VmbChannelMapGpadl", channel, |it| {
        if mdl.is_null() {
            return NtStatus::INVALID_PARAMETER_4;
        }
        if it.channel.side() == Side::Server && lock(&it.gpadls.mapped).contains_key(&gpadl_handle)
        {
            return NtStatus::ALREADY_COMMITTED;
        }
        let flags = GpadlFlags::from_bits_retain(flags);
        let mapping = match it.channel.map_gpadl(flags, gpadl_handle) {
            Ok(mapping) => mapping,
            Err(error) => return error.status(),
        };
        let mut mdls = MdlChain::default();
        match mapping.data() {
            Ok(data) => mdls.describe(data.ranges(), it.gpadls.channel, data.is_read_only()),
            Err(error) => return error.status(),
        }
        let first = mdls.first();
        lock(&it.gpadls.mapped).insert(gpadl_handle, Mapped { mapping, mdls, views: Vec::new() });
        // SAFETY: not null; the caller's promise.
        unsafe { mdl.write(first) };
        NtStatus::SUCCESS
    })
}

/// VmbChannelUnmapGpadl: its MDL is over.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelUnmapGpadl(channel: VmbChannel, gpadl_handle: u32) {
    const NAME: &str = "VmbChannelUnmapGpadl";
    guarded(NAME, (), || {
        must_be_passive(NAME);
        let Some(it) = named(NAME, channel) else { return };
        let Some(mapped) = lock(&it.gpadls.mapped).remove(&gpadl_handle) else {
            violation(NAME, "GpadlHandle", "names no GPADL that this channel has mapped");
            return;
        };
        if let Ok(data) = mapped.mapping.data()
            && !data.is_read_only()
        {
            // C has written through addresses, if at all.
            for (gpa, len) in data.segments() {
                data.memory().mark_dirty(gpa, u64::from(len));
            }
        }
        drop(mapped);
        it.channel.unmap_gpadl(gpadl_handle);
    });
}
