//! Outgoing packets: VmbPacketAllocate to VmbPacketFree, and the three sends.
//!
//! A packet is named by a handle, or, where C has initialised memory of its own as one, by the address of
//! that memory, which then begins with a stamp: its handle, and a mark that fits no other address. The
//! packet itself is never in C's memory.
#![allow(unsafe_code, reason = "exports functions, calls C's, and reads where C says")]

use core::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicPtr, AtomicU64};

use kmcl::{Error, Limits, NtStatus, Packet, PacketCompletion, SendError, SendFlags};

use crate::boundary::{self, guarded, to_c};
use crate::channel::{CChannel, lock, named};
use crate::context::at_dispatch;
use crate::handle::{Claim, Content, Found, Handle, Kind, Table};
use crate::mdl;
use crate::types::{self, CompletionRoutine, Mdl, Status, VmbChannel, VmbPacket};
use crate::verifier::violation;

/// What a packet's handle names.
#[derive(Default)]
pub(crate) struct Outgoing {
    /// Absent while it is in flight.
    packet: Option<Packet>,
}

/// What any thread may look at.
#[derive(Default)]
pub(crate) struct PacketWords {
    pointer: AtomicPtr<c_void>,
    /// The completion routine; null for the default one, which frees the packet.
    routine: AtomicPtr<()>,
    /// The handle of its channel.
    channel: AtomicU64,
    /// Where C keeps it; 0 for a packet of the channel's pool.
    address: AtomicU64,
}

impl Content for Outgoing {
    const KIND: Kind = Kind::Packet;
    type Shared = PacketWords;
}

static PACKETS: Table<Outgoing> = Table::new();

const NO_PACKET: &str = "names no packet: it is null, of another kind, or freed";

/// What C's memory begins with.
#[repr(C)]
#[derive(Clone, Copy)]
struct Stamp {
    mark: u64,
    handle: u64,
}

const MARK: u64 = 0x6b6d_636c_5061_636b;

/// The packet that C names.
///
/// # Safety
/// `packet` is any number that is no address, or 16 bytes can be read there.
unsafe fn find(packet: VmbPacket) -> Option<Found<Outgoing>> {
    let named = Handle::from_pointer(packet);
    if !named.is_address() {
        return PACKETS.find(named);
    }
    let stamp = packet.cast::<Stamp>();
    if stamp.is_null() || !stamp.is_aligned() {
        return None;
    }
    // SAFETY: not null, aligned, and readable by the caller's promise.
    let stamp = unsafe { stamp.read() };
    if stamp.mark != MARK ^ named.0 {
        return None;
    }
    let found = PACKETS.find(Handle(stamp.handle))?;
    (found.shared().address.load(Relaxed) == named.0).then_some(found)
}

/// As [`find`]; one that names none is against the rules of `function`.
///
/// # Safety
/// As for [`find`].
unsafe fn find_or_report(function: &'static str, packet: VmbPacket) -> Option<Found<Outgoing>> {
    // SAFETY: the caller's promise.
    let found = unsafe { find(packet) };
    if found.is_none() {
        violation(function, "PacketObject", NO_PACKET);
    }
    found
}

/// What C calls the packet.
fn name(found: &Found<Outgoing>) -> VmbPacket {
    match found.shared().address.load(Relaxed) {
        0 => found.handle().to_pointer(),
        address => Handle(address).to_pointer(),
    }
}

/// What C calls a packet that the library shows; `None` for one of the library's own.
pub(crate) fn name_of(packet: &Packet) -> Option<VmbPacket> {
    PACKETS.find(Handle(packet.pointer() as u64)).map(|found| name(&found))
}

fn make(it: &CChannel, mut packet: Packet, address: u64) -> Option<Handle> {
    let mut taken = PACKETS.take()?;
    let words = &taken.slot().shared;
    words.pointer.store(core::ptr::null_mut(), Relaxed);
    words.routine.store(core::ptr::null_mut(), Relaxed);
    words.channel.store(it.handle.0, Relaxed);
    words.address.store(address, Relaxed);
    taken.content().packet = None;
    let found = taken.open();
    let handle = found.handle();
    // The library keeps one word with a packet. It is ours: C's is in the slot.
    packet.set_pointer(usize::try_from(handle.0).unwrap_or(0));
    packet.set_completion_routine(Arc::clone(&it.completion) as _);
    found.claim()?.packet = Some(packet);
    Some(handle)
}

fn end(claim: Claim<Outgoing>) {
    if let Some(taken) = claim.end() {
        PACKETS.give_back(&taken);
    }
}

/// The channel is cleaned up: nobody may use its packets any more.
pub(crate) fn forget_all_of(channel: Handle) {
    for found in PACKETS.all() {
        if found.shared().channel.load(Relaxed) == channel.0
            && let Some(mut claim) = found.claim()
        {
            let packet = claim.packet.take();
            end(claim);
            drop(packet);
        }
    }
}

/// VmbPacketAllocate; null at the channel's bound.
#[unsafe(no_mangle)]
pub extern "C" fn VmbPacketAllocate(channel: VmbChannel) -> VmbPacket {
    const NAME: &str = "VmbPacketAllocate";
    guarded(NAME, core::ptr::null_mut(), || {
        let made = named(NAME, channel).and_then(|it| make(&it, it.channel.packet_allocate()?, 0));
        made.map_or(core::ptr::null_mut(), Handle::to_pointer)
    })
}

/// VmbPacketFree.
///
/// # Safety
/// `packet` is a packet, or a number that is no address.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbPacketFree(packet: VmbPacket) {
    const NAME: &str = "VmbPacketFree";
    guarded(NAME, (), || {
        // SAFETY: the caller's promise.
        let Some(found) = (unsafe { find_or_report(NAME, packet) }) else { return };
        if found.shared().address.load(Relaxed) != 0 {
            violation(NAME, "VmbPacket", "must come from VmbPacketAllocate (D-50)");
            return;
        }
        let Some(mut claim) = found.claim() else {
            violation(NAME, "VmbPacket", "must not be in flight (D-50)");
            return;
        };
        let freed = claim.packet.take();
        end(claim);
        drop(freed);
    });
}

/// VmbChannelSizeofPacket; 0 for a bad handle.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelSizeofPacket(channel: VmbChannel) -> u32 {
    const NAME: &str = "VmbChannelSizeofPacket";
    guarded(NAME, 0, || named(NAME, channel).map_or(0, |it| it.channel.sizeof_packet()))
}

/// VmbPacketInitialize; the same memory may be initialised again while its packet is not in flight.
///
/// # Safety
/// `packet` is null, or `byte_count` bytes are C's own there, for as long as the packet is used.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbPacketInitialize(
    channel: VmbChannel,
    packet: VmbPacket,
    byte_count: u32,
) -> Status {
    const NAME: &str = "VmbPacketInitialize";
    boundary::status(NAME, || {
        let Some(it) = named(NAME, channel) else { return NtStatus::INVALID_PARAMETER_1 };
        let address = Handle::from_pointer(packet);
        let stamp = packet.cast::<Stamp>();
        if stamp.is_null() || !stamp.is_aligned() || !address.is_address() {
            return NtStatus::INVALID_PARAMETER_2;
        }
        let made = match it.channel.packet_initialize(byte_count) {
            Ok(made) => made,
            Err(error) => return error.status(),
        };
        let mut initialized = lock(&it.initialized);
        if let Some(former) = initialized.get(&address.0).and_then(|former| PACKETS.find(*former)) {
            let Some(mut claim) = former.claim() else {
                drop(initialized);
                violation(NAME, "VmbPacket", "must not be in flight");
                return NtStatus::INVALID_PARAMETER_2;
            };
            let packet = claim.packet.take();
            end(claim);
            drop(packet);
            initialized.remove(&address.0);
        }
        if initialized.len() >= Limits::PACKETS as usize {
            return NtStatus::INSUFFICIENT_RESOURCES;
        }
        let Some(handle) = make(&it, made, address.0) else {
            return NtStatus::INSUFFICIENT_RESOURCES;
        };
        initialized.insert(address.0, handle);
        // SAFETY: not null, aligned, and C's own to write: `packet_initialize` has seen that it is larger.
        unsafe { stamp.write(Stamp { mark: MARK ^ address.0, handle: handle.0 }) };
        NtStatus::SUCCESS
    })
}

/// VmbPacketSetCompletionRoutine.
///
/// # Safety
/// `packet` is a packet, or a number that is no address; the function may be called until the packet is freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbPacketSetCompletionRoutine(
    packet: VmbPacket,
    routine: Option<CompletionRoutine>,
) {
    const NAME: &str = "VmbPacketSetCompletionRoutine";
    guarded(NAME, (), || {
        // SAFETY: the caller's promise.
        let Some(found) = (unsafe { find_or_report(NAME, packet) }) else { return };
        let Some(routine) = routine else {
            violation(NAME, "CompletionRoutine", "must not be null");
            return;
        };
        found.shared().routine.store(routine as *mut (), Release);
    });
}

/// VmbPacketGetChannel; null for a bad handle.
///
/// # Safety
/// `packet` is a packet, or a number that is no address.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbPacketGetChannel(packet: VmbPacket) -> VmbChannel {
    const NAME: &str = "VmbPacketGetChannel";
    guarded(NAME, core::ptr::null_mut(), || {
        // SAFETY: the caller's promise.
        let found = unsafe { find_or_report(NAME, packet) };
        let channel = found.map_or(0, |found| found.shared().channel.load(Relaxed));
        Handle(channel).to_pointer()
    })
}

/// VmbPacketSetPointer.
///
/// # Safety
/// `packet` is a packet, or a number that is no address.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbPacketSetPointer(packet: VmbPacket, pointer: *mut c_void) {
    const NAME: &str = "VmbPacketSetPointer";
    guarded(NAME, (), || {
        // SAFETY: the caller's promise.
        if let Some(found) = unsafe { find_or_report(NAME, packet) } {
            found.shared().pointer.store(pointer, Release);
        }
    });
}

/// VmbPacketGetPointer; null at first (D-51).
///
/// # Safety
/// `packet` is a packet, or a number that is no address.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbPacketGetPointer(packet: VmbPacket) -> *mut c_void {
    const NAME: &str = "VmbPacketGetPointer";
    guarded(NAME, core::ptr::null_mut(), || {
        // SAFETY: the caller's promise.
        let found = unsafe { find_or_report(NAME, packet) };
        found.map_or(core::ptr::null_mut(), |found| found.shared().pointer.load(Acquire))
    })
}

/// Takes a packet on its way by `start`, which may give it back.
///
/// # Safety
/// `packet` is a packet, or a number that is no address.
unsafe fn start(
    function: &'static str,
    packet: VmbPacket,
    start: impl FnOnce(Packet) -> Result<(), SendError>,
) -> NtStatus {
    // SAFETY: the caller's promise.
    let Some(found) = (unsafe { find_or_report(function, packet) }) else {
        return NtStatus::INVALID_PARAMETER_1;
    };
    let words = found.shared();
    if words.address.load(Relaxed) != 0 && words.routine.load(Relaxed).is_null() {
        violation(function, "PacketObject", "has no completion routine yet");
        return NtStatus::INVALID_PARAMETER_1;
    }
    let Some(mut claim) = found.claim() else {
        violation(function, "PacketObject", "must not be in flight");
        return NtStatus::INVALID_PARAMETER_1;
    };
    let Some(packet) = claim.packet.take() else { return NtStatus::INVALID_PARAMETER_1 };
    // Away before the start: the completion may come before `start` returns.
    claim.away();
    match start(packet) {
        Ok(()) => NtStatus::SUCCESS,
        Err(SendError { packet, error }) => {
            if let Some(mut claim) = found.back() {
                claim.packet = Some(packet);
            }
            error.status()
        }
    }
}

/// The message that C gave.
///
/// # Safety
/// `buffer` is null or has `len` bytes.
unsafe fn message<'a>(packet: &Packet, buffer: *const c_void, len: u32) -> Result<&'a [u8], Error> {
    // A length that no message has is refused before anything is made of it.
    if len > Limits::PACKET_SIZE {
        let state = packet.channel().state();
        return Err(match state.accepts_sends() {
            true => Error::Argument { position: 3, name: "BufferLength", value: len.into() },
            false => Error::Removed { state },
        });
    }
    // SAFETY: the caller's promise.
    let bytes = unsafe { types::bytes(buffer, len) };
    bytes.ok_or(Error::Argument { position: 2, name: "Buffer", value: 0 })
}

const BAD_MDL: Error = Error::Argument { position: 4, name: "ExternalDataMdl", value: 0 };

/// VmbPacketSend.
///
/// # Safety
/// `packet` is a packet, or a number that is no address; `buffer` is null or has `buffer_length` bytes;
/// `external_data_mdl` is null or a chain of MDLs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbPacketSend(
    packet: VmbPacket,
    buffer: *mut c_void,
    buffer_length: u32,
    external_data_mdl: *mut Mdl,
    flags: u32,
) -> Status {
    const NAME: &str = "VmbPacketSend";
    let flags = SendFlags::from_bits_retain(flags);
    // SAFETY: the caller's promises, in each call.
    boundary::status(NAME, || unsafe {
        start(NAME, packet, |packet| {
            let message = match message(&packet, buffer, buffer_length) {
                Ok(message) => message,
                Err(error) => return Err(SendError { packet, error }),
            };
            if external_data_mdl.is_null() {
                return packet.send(message, None, flags);
            }
            match mdl::ranges(external_data_mdl) {
                Some(ranges) => packet.send(message, Some(&ranges), flags),
                None => Err(SendError { packet, error: BAD_MDL }),
            }
        })
    })
}

/// VmbPacketSendWithExternalMdl.
///
/// # Safety
/// As for [`VmbPacketSend`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbPacketSendWithExternalMdl(
    packet: VmbPacket,
    buffer: *mut c_void,
    buffer_length: u32,
    external_data_mdl: *mut Mdl,
    mdl_offset: u32,
    mdl_length: u32,
    flags: u32,
) -> Status {
    const NAME: &str = "VmbPacketSendWithExternalMdl";
    let flags = SendFlags::from_bits_retain(flags);
    // SAFETY: the caller's promises, in each call.
    boundary::status(NAME, || unsafe {
        start(NAME, packet, |packet| {
            let message = match message(&packet, buffer, buffer_length) {
                Ok(message) => message,
                Err(error) => return Err(SendError { packet, error }),
            };
            match mdl::ranges(external_data_mdl) {
                Some(ranges) => {
                    packet.send_with_external_mdl(message, &ranges, mdl_offset, mdl_length, flags)
                }
                None => Err(SendError { packet, error: BAD_MDL }),
            }
        })
    })
}

/// VmbPacketSendWithExternalPfns; six parameters (D-38).
///
/// # Safety
/// `packet` and `buffer` as for [`VmbPacketSend`]; `external_data_pfns` is null or has `pfn_length` entries.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbPacketSendWithExternalPfns(
    packet: VmbPacket,
    buffer: *mut c_void,
    buffer_length: u32,
    external_data_pfns: *mut u64,
    pfn_length: u32,
    flags: u32,
) -> Status {
    const NAME: &str = "VmbPacketSendWithExternalPfns";
    let flags = SendFlags::from_bits_retain(flags);
    // SAFETY: the caller's promises, in each call.
    boundary::status(NAME, || unsafe {
        start(NAME, packet, |packet| {
            let message = match message(&packet, buffer, buffer_length) {
                Ok(message) => message,
                Err(error) => return Err(SendError { packet, error }),
            };
            // More pages than any packet's are refused before they are looked at.
            let too_many = pfn_length > Limits::EXTERNAL_DATA / vmbus_wire::PAGE_SIZE_U32;
            if pfn_length != 0 && (external_data_pfns.is_null() || too_many) {
                return Err(SendError { packet, error: BAD_MDL });
            }
            let pfns = match pfn_length {
                0 => &[],
                count => core::slice::from_raw_parts(external_data_pfns, count as usize),
            };
            packet.send_with_external_pfns(message, pfns, flags)
        })
    })
}

/// VmbPacketRestore, inside EvtVmbChannelRestorePacket (D-25, D-28).
///
/// # Safety
/// `packet` is a packet, or a number that is no address; `buffer` is null or has `buffer_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbPacketRestore(
    packet: VmbPacket,
    buffer: *mut c_void,
    buffer_size: u32,
) -> Status {
    const NAME: &str = "VmbPacketRestore";
    boundary::status(NAME, || {
        // SAFETY: the caller's promises.
        let (found, state) = unsafe { (find(packet), types::bytes(buffer, buffer_size)) };
        if found.is_some_and(|found| found.is_away()) {
            return NtStatus::INVALID_PARAMETER_1; // D-28: a used packet
        }
        let Some(state) = state else { return NtStatus::INVALID_PARAMETER_2 };
        // SAFETY: the caller's promise.
        unsafe { start(NAME, packet, |packet| packet.restore(state)) }
    })
}

/// Ends the outgoing packets of C drivers.
pub(crate) struct Completion;

impl PacketCompletion for Completion {
    fn completed(&self, packet: Packet, status: NtStatus, payload: &[u8]) {
        let found = PACKETS.find(Handle(packet.pointer() as u64));
        let Some((found, mut claim)) = found.and_then(|found| Some((found, found.back()?))) else {
            return; // its channel was cleaned up: the packet is freed
        };
        let routine = found.shared().routine.load(Acquire);
        if routine.is_null() {
            end(claim);
            return;
        }
        claim.packet = Some(packet);
        drop(claim);
        // SAFETY: what `VmbPacketSetCompletionRoutine` has stored, from this very type.
        let routine = unsafe { core::mem::transmute::<*mut (), CompletionRoutine>(routine) };
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let buffer = match len {
            0 => core::ptr::null_mut(),
            _ => payload.as_ptr().cast_mut().cast(),
        };
        let packet = name(&found);
        // SAFETY: C gave the function for this packet; the arguments are as documented.
        at_dispatch(|| unsafe { routine(packet, to_c(status), buffer, len) });
    }
}
