//! Incoming packets: completion contexts, from the process-packet callback to their completion.
//!
//! The way of a packet is the hot one. While its callback runs, its slot is lent to that thread, so that
//! what the callback does with the packet takes no lock and no compare-and-swap (`handle`). A slot that
//! is over before its callback has returned, which is the usual case, goes straight to the next packet; one
//! that ends later, on whatever thread, goes on a list that its channel takes from when it has no other.
#![allow(unsafe_code, reason = "exports functions, calls C's, and writes where C says")]

use core::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8};

use kmcl::{
    Channel, Error, ExternalDataFlags, Fence, IncomingPacket, Level, NtStatus, ResumedPacket,
};

use crate::asymmetric;
use crate::boundary::{self, guarded, to_c};
use crate::context::{self, DISPATCH, Lent, PASSIVE, Place, in_packet_callback, in_state_callback};
use crate::handle::{Claim, Content, Found, Handle, Kind, Slot, Table, Taken};
use crate::mdl::{MdlChain, View};
use crate::types::{
    self, FreezeCallbacks, Mdl, ProcessPacket, ProcessingComplete, Status, VmbPacketCompletion,
};
use crate::verifier::violation;

/// What a completion context names.
#[derive(Default)]
pub(crate) struct Incoming {
    packet: Option<IncomingPacket>,
    /// The external data, once it was asked for.
    mdls: MdlChain,
    views: Vec<(u64, View)>,
    /// The driver was told to wait for its external data: the packet is delivered again.
    comes_again: bool,
    home: Option<Arc<Home>>,
}

impl Content for Incoming {
    const KIND: Kind = Kind::Incoming;
    type Shared = ();
}

static PACKETS: Table<Incoming> = Table::new();

const NO_PACKET: &str = "names no packet: it is null, of another kind, or over";

/// What the incoming packets of a channel have in common.
pub(crate) struct Home {
    channel: Handle,
    /// First of the free slots that only the delivering thread takes and puts.
    own: AtomicPtr<Slot<Incoming>>,
    /// First of those that other threads have put.
    returned: AtomicPtr<Slot<Incoming>>,
    is_closed: AtomicBool,
    /// Slots are lent to the delivering thread: the system has what that takes.
    lends: bool,
    /// [`PASSIVE_ONLY`], [`NEXT_IS_DEFERRED`]; 0 for most deliveries.
    exceptions: AtomicU8,
}

/// Deliveries are at PASSIVE_LEVEL only.
const PASSIVE_ONLY: u8 = 1;
/// The next delivery is of a packet that was deferred.
const NEXT_IS_DEFERRED: u8 = 2;

impl Home {
    pub(crate) fn new(channel: Handle) -> Self {
        Self {
            channel,
            own: AtomicPtr::new(core::ptr::null_mut()),
            returned: AtomicPtr::new(core::ptr::null_mut()),
            is_closed: AtomicBool::new(false),
            lends: asymmetric::prepare(),
            exceptions: AtomicU8::new(0),
        }
    }

    pub(crate) fn require_passive(&self, required: bool) {
        if required {
            self.exceptions.fetch_or(PASSIVE_ONLY, Relaxed);
        } else {
            self.exceptions.fetch_and(!PASSIVE_ONLY, Relaxed);
        }
    }

    /// A slot for the next packet. Only called while one is delivered.
    #[inline]
    fn take(self: &Arc<Self>) -> Option<Taken<Incoming>> {
        // SAFETY: free slots of this channel are in one of its two lists. `own` is only touched while a
        // packet is delivered, and a channel's packet callbacks never overlap (`kmcl::ProcessPacket`), so
        // nobody else takes this one.
        let Some(taken) = (unsafe { Taken::from_link(self.own.load(Relaxed)) }) else {
            return self.take_another();
        };
        self.own.store(taken.slot().next.load(Relaxed), Relaxed);
        Some(taken)
    }

    /// As [`Self::take`], when none is left of the thread's own.
    #[cold]
    fn take_another(self: &Arc<Self>) -> Option<Taken<Incoming>> {
        let first = self.returned.swap(core::ptr::null_mut(), Acquire);
        // SAFETY: as for `take`; this list was taken as a whole.
        if let Some(taken) = unsafe { Taken::from_link(first) } {
            self.own.store(taken.slot().next.load(Relaxed), Relaxed);
            return Some(taken);
        }
        let mut taken = PACKETS.take()?;
        taken.content().home = Some(Arc::clone(self));
        Some(taken)
    }

    /// Keeps a slot for the next packet. Only called while one is delivered.
    #[inline]
    fn keep(&self, taken: &Taken<Incoming>) {
        taken.slot().next.store(self.own.load(Relaxed), Relaxed);
        self.own.store(taken.slot().as_link(), Relaxed);
    }

    /// Takes a slot back, from any thread.
    fn put(&self, taken: &Taken<Incoming>) {
        let mut first = self.returned.load(Relaxed);
        loop {
            taken.slot().next.store(first, Relaxed);
            let link = taken.slot().as_link();
            match self.returned.compare_exchange_weak(first, link, Release, Relaxed) {
                Ok(_) => break,
                Err(other) => first = other,
            }
        }
        // Pairs with `close`: one of the two sees the other.
        if self.is_closed.load(SeqCst) {
            self.give_back(self.returned.swap(core::ptr::null_mut(), SeqCst));
        }
    }

    /// The channel is gone: its slots are for others.
    pub(crate) fn close(&self) {
        self.is_closed.store(true, SeqCst);
        self.give_back(self.returned.swap(core::ptr::null_mut(), SeqCst));
        // Nothing is delivered any more.
        self.give_back(self.own.swap(core::ptr::null_mut(), SeqCst));
    }

    fn give_back(&self, mut first: *mut Slot<Incoming>) {
        // SAFETY: as for `take`: the whole list was taken.
        while let Some(mut taken) = unsafe { Taken::from_link(first) } {
            first = taken.slot().next.load(Relaxed);
            *taken.content() = Incoming::default();
            PACKETS.give_back(&taken);
        }
    }

    /// What the callback of the next packet may do.
    #[inline]
    fn irql(&self, packet: &IncomingPacket) -> u8 {
        match self.exceptions.load(Relaxed) {
            0 => DISPATCH,
            exceptions => self.exceptional_irql(exceptions, packet.level()),
        }
    }

    #[cold]
    fn exceptional_irql(&self, exceptions: u8, level: Level) -> u8 {
        if exceptions & NEXT_IS_DEFERRED != 0 {
            self.exceptions.fetch_and(!NEXT_IS_DEFERRED, Relaxed);
        }
        if level == Level::Passive { PASSIVE } else { DISPATCH }
    }
}

/// EvtVmbChannelProcessPacket and its relatives.
pub(crate) struct Deliveries {
    pub(crate) home: Arc<Home>,
    pub(crate) process_packet: ProcessPacket,
    pub(crate) processing_complete: Option<ProcessingComplete>,
    pub(crate) freeze: FreezeCallbacks,
}

/// What a callback is given about its packet.
struct Arguments {
    packet: VmbPacketCompletion,
    buffer: *mut c_void,
    len: u32,
    flags: u32,
}

impl Deliveries {
    #[inline]
    fn deliver(&self, packet: IncomingPacket, call: impl FnOnce(Arguments)) {
        let home = &self.home;
        let Some(mut taken) = home.take() else {
            tracing::error!("no handle left for an incoming packet: failed");
            packet.fail();
            return;
        };
        let irql = home.irql(&packet);
        let payload = packet.payload();
        // A private copy that stays where it is until the packet is over. C has no way to say that it is
        // only to be read.
        let buffer = payload.as_ptr().cast_mut().cast();
        let place = Place::from(payload);
        #[expect(clippy::cast_possible_truncation, reason = "payloads fit a ring")]
        let len = payload.len() as u32;
        let flags = u32::from(packet.has_external_data());
        let former = taken.content().packet.replace(packet);
        debug_assert!(former.is_none());
        // Nothing is dropped, and nothing is looked at to find that out.
        std::mem::forget(former);
        let found = if home.lends { taken.lend() } else { taken.open_in_callback() };
        context::with_packet(home.channel, irql, found, place, |handle| {
            call(Arguments { packet: handle.to_pointer(), buffer, len, flags });
        });
        match found.callback_returned(|claim| self.left_pending(claim)) {
            Ok(()) => {}
            Err(taken) => home.keep(&taken),
        }
    }

    /// The callback has not ended its packet.
    fn left_pending(&self, mut claim: Claim<Incoming>) {
        if !claim.comes_again {
            return;
        }
        let packet = claim.packet.take();
        claim.comes_again = false;
        if let Some(taken) = claim.end() {
            self.home.keep(&taken);
        }
        if let Some(packet) = packet {
            packet.redeliver();
        }
    }
}

impl kmcl::ProcessPacket for Deliveries {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        let channel = self.home.channel.to_pointer();
        self.deliver(packet, |it| {
            // SAFETY: C gave the function for this channel; the arguments are as documented.
            unsafe { (self.process_packet)(channel, it.packet, it.buffer, it.len, it.flags) };
        });
    }

    fn resume_packet(&self, channel: &Channel, packet: ResumedPacket) {
        let Some(resume) = self.freeze.resume_packet else {
            self.process_packet(channel, packet.into_packet());
            return;
        };
        let fence = match packet.fence() {
            Fence::NeverStarted => 0,
            Fence::Cancelled => 1,
        };
        let state = packet.device_state().to_vec();
        let state_len = u32::try_from(state.len()).unwrap_or(u32::MAX);
        let channel = self.home.channel.to_pointer();
        self.deliver(packet.into_packet(), |it| {
            let state = state.as_ptr().cast_mut().cast();
            // SAFETY: as for `process_packet`; the state lives until the call is over.
            unsafe {
                resume(channel, it.packet, it.buffer, it.len, it.flags, fence, state, state_len);
            }
        });
    }

    fn freeze(&self, _: &Channel) {
        if let Some(freeze) = self.freeze.freeze {
            let channel = self.home.channel;
            // SAFETY: C gave the function for this channel.
            in_state_callback(channel, || unsafe { freeze(channel.to_pointer()) });
        }
    }

    fn thaw(&self, _: &Channel) {
        if let Some(thaw) = self.freeze.thaw {
            let channel = self.home.channel;
            // SAFETY: C gave the function for this channel.
            in_state_callback(channel, || unsafe { thaw(channel.to_pointer()) });
        }
    }

    fn processing_complete(&self, _: &Channel, packets: u32) {
        if let Some(complete) = self.processing_complete {
            let channel = self.home.channel;
            let passive_only = self.home.exceptions.load(Relaxed) & PASSIVE_ONLY != 0;
            let irql = if passive_only { PASSIVE } else { DISPATCH };
            // SAFETY: C gave the function for this channel.
            in_packet_callback(channel, irql, || unsafe {
                complete(channel.to_pointer(), packets)
            });
        }
    }
}

/// The content of a packet whose callback this thread runs, and where C was told that its payload is.
#[inline(always)]
fn claim_lent(handle: Handle) -> Option<(Claim<Incoming>, Place)> {
    let Lent { packet, payload } = context::lent(handle)?;
    // SAFETY: this thread runs the packet's callback. Claims of it live within one call of this library,
    // during which it neither claims it again nor calls C.
    let claim = unsafe { packet.claim_lent() }?;
    Some((claim, payload))
}

/// The content of a completion context; one that names none is against the rules of `function`.
#[inline]
fn claim(function: &'static str, packet: VmbPacketCompletion) -> Option<Claim<Incoming>> {
    let handle = Handle::from_pointer(packet);
    match claim_lent(handle) {
        Some((claim, _)) => Some(claim),
        None => claim_anywhere(function, handle),
    }
}

/// As [`claim`], and ends it: its packet, and where C was told that the payload is.
#[inline(always)]
fn take(function: &'static str, packet: VmbPacketCompletion) -> Option<(IncomingPacket, Place)> {
    let handle = Handle::from_pointer(packet);
    let Some((mut claim, payload)) = claim_lent(handle) else {
        return take_anywhere(function, handle);
    };
    claim.let_go_of_memory();
    let packet = claim.packet.take()?;
    claim.end();
    Some((packet, payload))
}

#[inline(never)]
fn take_anywhere(function: &'static str, handle: Handle) -> Option<(IncomingPacket, Place)> {
    let packet = claim_anywhere(function, handle).and_then(end)?;
    let payload = Place::from(packet.payload());
    Some((packet, payload))
}

/// As [`claim`], for a packet whose callback does not run on this thread.
#[inline(never)]
fn claim_anywhere(function: &'static str, handle: Handle) -> Option<Claim<Incoming>> {
    let claim = PACKETS.find(handle).and_then(Found::claim);
    if claim.is_none() {
        violation(function, "PacketCompletionContext", NO_PACKET);
    }
    claim
}

/// Ends a completion context, and gives its packet.
#[inline(never)]
fn end(mut claim: Claim<Incoming>) -> Option<IncomingPacket> {
    claim.let_go_of_memory();
    let packet = claim.packet.take()?;
    if claim.is_in_callback() {
        claim.end();
    } else {
        end_later(claim);
    }
    Some(packet)
}

/// Ends the handle of a packet whose callback has returned.
#[inline(never)]
fn end_later(claim: Claim<Incoming>) {
    let home = claim.home.clone();
    if let (Some(taken), Some(home)) = (claim.end(), home) {
        home.put(&taken);
    }
}

impl Incoming {
    /// The MDLs become invalid, and nothing is waited for any more.
    #[inline]
    fn let_go_of_memory(&mut self) {
        if self.mdls.was_mapped() {
            self.unmap();
        }
        self.mdls.clear();
        self.comes_again = false;
    }

    /// Addresses become invalid. What C has written through them is told to whoever tracks writes.
    #[inline(never)]
    fn unmap(&mut self) {
        self.views.clear();
        if !self.mdls.is_read_only()
            && let Some(packet) = &self.packet
            && let Ok(data) = packet.external_data(ExternalDataFlags::empty())
        {
            for (gpa, len) in data.segments() {
                data.memory().mark_dirty(gpa, u64::from(len));
            }
        }
    }
}

/// VmbChannelPacketComplete.
///
/// # Safety
/// `buffer` is null or has `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbChannelPacketComplete(
    packet: VmbPacketCompletion,
    buffer: *mut c_void,
    size: u32,
) {
    const NAME: &str = "VmbChannelPacketComplete";
    guarded(NAME, (), || {
        let Some((packet, place)) = take(NAME, packet) else { return };
        let limit = packet.completion_limit();
        let mut size = size as usize;
        if size > limit {
            violation(NAME, "BufSize", "is more than the largest completion (D-47)");
            size = limit;
        }
        let start = buffer.addr().wrapping_sub(place.address);
        if start < place.len {
            // Drivers answer in the buffer that they were given.
            let end = start + size;
            if end > place.len {
                violation(NAME, "BufSize", "goes beyond the end of the packet's own buffer");
            }
            packet.complete_with_own(start..end.min(place.len));
        } else if !buffer.is_null() {
            // SAFETY: the caller's promise, for at most as many bytes; none of them is the packet's own.
            packet.complete(unsafe { core::slice::from_raw_parts(buffer.cast(), size) });
        } else {
            if size != 0 {
                violation(NAME, "PacketCompletionBuffer", "must not be null");
            }
            packet.complete(&[]);
        }
    });
}

/// VmbChannelPacketFail (D-36).
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelPacketFail(packet: VmbPacketCompletion) {
    const NAME: &str = "VmbChannelPacketFail";
    guarded(NAME, (), || {
        if let Some(packet) = claim(NAME, packet).and_then(end) {
            packet.fail();
        }
    });
}

/// VmbChannelPacketDeferToPassive: the packet comes again, under another handle, at PASSIVE_LEVEL.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelPacketDeferToPassive(packet: VmbPacketCompletion) {
    const NAME: &str = "VmbChannelPacketDeferToPassive";
    guarded(NAME, (), || {
        let Some(claim) = claim(NAME, packet) else { return };
        let Some(home) = claim.home.clone() else { return };
        if !claim.is_in_callback() || !context::is_in_packet_callback(home.channel) {
            drop(claim);
            violation(NAME, "PacketCompletionContext", "must be deferred inside its own callback");
            return;
        }
        if let Some(packet) = end(claim) {
            home.exceptions.fetch_or(NEXT_IS_DEFERRED, Relaxed);
            packet.defer_to_passive();
        }
    });
}

/// VmbChannelPacketGetExternalData.
///
/// # Safety
/// `mdl` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbChannelPacketGetExternalData(
    packet: VmbPacketCompletion,
    flags: u32,
    mdl: *mut *mut Mdl,
) -> Status {
    const NAME: &str = "VmbChannelPacketGetExternalData";
    let handle = Handle::from_pointer(packet);
    if !mdl.is_null()
        && let Some(page) = guarded(NAME, None, || page_of_lent(handle, flags))
    {
        // SAFETY: not null; the caller's promise.
        unsafe { mdl.write(page) };
        return to_c(NtStatus::SUCCESS);
    }
    // SAFETY: the caller's promise.
    unsafe { any_external_data(NAME, packet, flags, mdl) }
}

/// VmbChannelPacketGetExternalData as nearly all calls need it: the first one, inside the callback, for one
/// page that needs no looking for. `None` for all others, with nothing done.
#[inline(always)]
fn page_of_lent(handle: Handle, flags: u32) -> Option<*mut Mdl> {
    let flags = ExternalDataFlags::from_bits(flags)?;
    let (mut claim, _) = claim_lent(handle)?;
    let Incoming { packet, mdls, .. } = &mut *claim;
    if mdls.is_used() {
        return None;
    }
    let ranges = packet.as_ref()?.resident_ranges()?;
    mdls.describe_page(ranges, handle, flags.contains(ExternalDataFlags::READ_ONLY))
}

/// VmbChannelPacketGetExternalData for every call.
///
/// # Safety
/// `mdl` is null or can be written.
#[inline(never)]
unsafe fn any_external_data(
    function: &'static str,
    packet: VmbPacketCompletion,
    flags: u32,
    mdl: *mut *mut Mdl,
) -> Status {
    boundary::status(function, || {
        let Some(mut claim) = claim(function, packet) else { return NtStatus::INVALID_PARAMETER_1 };
        if mdl.is_null() {
            return NtStatus::INVALID_PARAMETER_3;
        }
        let in_callback = claim.is_in_callback();
        match claim.external_mdls(Handle::from_pointer(packet), flags, in_callback) {
            Ok(first) => {
                // SAFETY: not null; the caller's promise.
                unsafe { mdl.write(first) };
                NtStatus::SUCCESS
            }
            Err(Error::Pending) => {
                claim.comes_again = true;
                NtStatus::PENDING
            }
            Err(error) => error.status(),
        }
    })
}

impl Incoming {
    #[inline]
    fn external_mdls(
        &mut self,
        handle: Handle,
        flags: u32,
        in_callback: bool,
    ) -> Result<*mut Mdl, Error> {
        let flags = ExternalDataFlags::from_bits_retain(flags);
        if self.mdls.is_used() {
            return self.mdls_again(flags);
        }
        let late = Error::Argument { position: 1, name: "PacketCompletionContext", value: 0 };
        let packet = self.packet.as_ref().filter(|_| in_callback).ok_or(late)?;
        let data = packet.external_data(flags)?;
        self.mdls.describe(data.ranges(), handle, data.is_read_only());
        self.comes_again = false;
        Ok(self.mdls.first())
    }

    /// A second call gives the same (D-43).
    #[cold]
    fn mdls_again(&mut self, flags: ExternalDataFlags) -> Result<*mut Mdl, Error> {
        if !ExternalDataFlags::all().contains(flags) {
            let value = u64::from(flags.bits());
            return Err(Error::Argument { position: 2, name: "Flags", value });
        }
        Ok(self.mdls.first())
    }
}

/// VmbChannelPacketGetClientContext (D-62); null where its size is 0.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelPacketGetClientContext(packet: VmbPacketCompletion) -> *mut c_void {
    const NAME: &str = "VmbChannelPacketGetClientContext";
    guarded(NAME, core::ptr::null_mut(), || {
        let Some(mut claim) = claim(NAME, packet) else { return core::ptr::null_mut() };
        let area = claim.packet.as_mut().map_or(&mut [][..], |packet| packet.client_context());
        // In the packet's own memory, which stays where it is until the packet is over.
        if area.is_empty() { core::ptr::null_mut() } else { area.as_mut_ptr().cast() }
    })
}

/// The guest memory of a packet, and where views of it are kept until the packet is over; `None` for a
/// handle that names no packet with external data.
pub(crate) fn with_memory<R>(
    handle: Handle,
    use_it: impl FnOnce(&kmcl::memory::GuestMemory, &mut Vec<(u64, View)>, &mut MdlChain) -> R,
) -> Option<R> {
    let mut claim = match claim_lent(handle) {
        Some((claim, _)) => claim,
        None => PACKETS.find(handle)?.claim()?,
    };
    let Incoming { packet, views, mdls, .. } = &mut *claim;
    let packet = packet.as_ref()?;
    let memory = packet.external_data(ExternalDataFlags::empty()).ok()?.memory();
    Some(use_it(memory, views, mdls))
}

/// See `kmcl.h`.
///
/// # Safety
/// `device_state` is null or has as many bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclPacketHandOver(
    packet: VmbPacketCompletion,
    fence: u32,
    device_state: *const c_void,
    device_state_size: u32,
) -> Status {
    const NAME: &str = "KmclPacketHandOver";
    boundary::status(NAME, || {
        let Some(mut claim) = claim(NAME, packet) else { return NtStatus::INVALID_PARAMETER_1 };
        if fence > 1 {
            return NtStatus::INVALID_PARAMETER_2;
        }
        // SAFETY: the caller's promise.
        let Some(state) = (unsafe { types::bytes(device_state, device_state_size) }) else {
            return NtStatus::INVALID_PARAMETER_3;
        };
        let Some(packet) = claim.packet.take() else { return NtStatus::INVALID_PARAMETER_1 };
        let fenced = if fence == 0 { packet.never_started() } else { packet.cancelled() };
        match fenced.hand_over(state) {
            Ok(()) => {
                let home = claim.home.clone();
                claim.views.clear();
                claim.mdls.clear();
                if let (Some(taken), Some(home)) = (claim.end(), home) {
                    home.put(&taken);
                }
                NtStatus::SUCCESS
            }
            Err(refused) => {
                claim.packet = Some(refused.packet);
                refused.why.status()
            }
        }
    })
}
