//! Incoming packets: completion contexts, from the process-packet callback to their completion.
//!
//! The way of a packet is the hot one, so it costs one compare-and-swap more than in Rust: the one that
//! makes sure that a handle ends once. A slot that is over before its callback has returned, which is the
//! usual case, goes straight to the next packet; one that ends later, on whatever thread, goes on a list
//! that its channel takes from when it has no other.
#![allow(unsafe_code, reason = "exports functions, calls C's, and writes where C says")]

use core::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32};

use kmcl::{
    Channel, Error, ExternalDataFlags, Fence, IncomingPacket, Level, NtStatus, ResumedPacket,
};

use crate::boundary::{self, guarded};
use crate::context::{self, DISPATCH, PASSIVE, in_packet_callback, in_state_callback};
use crate::handle::{Claim, Content, Found, Handle, Kind, Table, Taken};
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
    type Shared = ();
}

static PACKETS: Table<Incoming> = Table::new(Kind::Incoming);

const NO_PACKET: &str = "names no packet: it is null, of another kind, or over";

/// What the incoming packets of a channel have in common.
pub(crate) struct Home {
    channel: Handle,
    /// First of the free slots that only the delivering thread takes and puts: its index and 1, or 0.
    own: AtomicU32,
    /// First of those that other threads have put.
    returned: AtomicU32,
    is_closed: AtomicBool,
    /// Deliveries are at PASSIVE_LEVEL only.
    passive: AtomicBool,
    /// The next delivery is of a packet that was deferred.
    next_is_deferred: AtomicBool,
    packet_size: AtomicU32,
    completion_size: AtomicU32,
}

/// No completion size was set: it is the packet size.
const SAME: u32 = u32::MAX;

impl Home {
    pub(crate) fn new(channel: Handle) -> Self {
        Self {
            channel,
            own: AtomicU32::new(0),
            returned: AtomicU32::new(0),
            is_closed: AtomicBool::new(false),
            passive: AtomicBool::new(false),
            next_is_deferred: AtomicBool::new(false),
            packet_size: AtomicU32::new(4096), // D-60
            completion_size: AtomicU32::new(SAME),
        }
    }

    pub(crate) fn require_passive(&self, required: bool) {
        self.passive.store(required, Relaxed);
    }

    pub(crate) fn set_packet_size(&self, bytes: u32) {
        self.packet_size.store(bytes, Relaxed);
    }

    pub(crate) fn set_completion_size(&self, bytes: u32) {
        self.completion_size.store(bytes, Relaxed);
    }

    #[inline]
    fn completion_limit(&self) -> u32 {
        match self.completion_size.load(Relaxed) {
            SAME => self.packet_size.load(Relaxed),
            size => size,
        }
    }

    /// A slot for the next packet. Only called while one is delivered.
    #[inline]
    fn take(self: &Arc<Self>) -> Option<Taken<Incoming>> {
        let mut first = self.own.load(Relaxed);
        if first == 0 {
            first = self.returned.swap(0, Acquire);
        }
        let Some(index) = first.checked_sub(1) else {
            let mut taken = PACKETS.take()?;
            taken.content().home = Some(Arc::clone(self));
            return Some(taken);
        };
        // SAFETY: free slots of this channel are in one of its two lists. `own` is only touched while a
        // packet is delivered, and a channel's packet callbacks never overlap (`kmcl::ProcessPacket`);
        // `returned` was taken as a whole. So nobody else takes this one.
        let taken = unsafe { PACKETS.taken(index) }?;
        self.own.store(taken.slot().next.load(Relaxed), Relaxed);
        Some(taken)
    }

    /// Keeps a slot for the next packet. Only called while one is delivered.
    #[inline]
    fn keep(&self, taken: &Taken<Incoming>) {
        taken.slot().next.store(self.own.load(Relaxed), Relaxed);
        self.own.store(taken.index() + 1, Relaxed);
    }

    /// Takes a slot back, from any thread.
    fn put(&self, taken: &Taken<Incoming>) {
        let mut first = self.returned.load(Relaxed);
        loop {
            taken.slot().next.store(first, Relaxed);
            let put =
                self.returned.compare_exchange_weak(first, taken.index() + 1, Release, Relaxed);
            match put {
                Ok(_) => break,
                Err(other) => first = other,
            }
        }
        // Pairs with `close`: one of the two sees the other.
        if self.is_closed.load(SeqCst) {
            self.give_back(self.returned.swap(0, SeqCst));
        }
    }

    /// The channel is gone: its slots are for others.
    pub(crate) fn close(&self) {
        self.is_closed.store(true, SeqCst);
        self.give_back(self.returned.swap(0, SeqCst));
        // Nothing is delivered any more.
        self.give_back(self.own.swap(0, SeqCst));
    }

    fn give_back(&self, mut first: u32) {
        while let Some(index) = first.checked_sub(1) {
            // SAFETY: as for `take`: the whole list was taken.
            let Some(mut taken) = (unsafe { PACKETS.taken(index) }) else { return };
            first = taken.slot().next.load(Relaxed);
            *taken.content() = Incoming::default();
            PACKETS.give_back(index);
        }
    }

    #[inline]
    fn irql(&self, level: Level) -> u8 {
        let deferred = self.next_is_deferred.load(Relaxed);
        if deferred {
            self.next_is_deferred.store(false, Relaxed);
        }
        let passive = level == Level::Passive && (deferred || self.passive.load(Relaxed));
        if passive { PASSIVE } else { DISPATCH }
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
        let irql = home.irql(packet.level());
        let payload = packet.payload();
        // A private copy that stays where it is until the packet is over. C has no way to say that it is
        // only to be read.
        let buffer = payload.as_ptr().cast_mut().cast();
        // Payloads fit a ring.
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let flags = u32::from(packet.has_external_data());
        taken.content().packet = Some(packet);
        let (handle, found) = taken.open(true);
        let arguments = Arguments { packet: handle.to_pointer(), buffer, len, flags };
        in_packet_callback(home.channel, irql, || call(arguments));
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
            let irql = if self.home.passive.load(Relaxed) { PASSIVE } else { DISPATCH };
            // SAFETY: C gave the function for this channel.
            in_packet_callback(channel, irql, || unsafe {
                complete(channel.to_pointer(), packets)
            });
        }
    }
}

/// The content of a completion context; one that names none is against the rules of `function`.
#[inline]
fn claim(function: &'static str, packet: VmbPacketCompletion) -> Option<Claim<Incoming>> {
    let claim = PACKETS.find(Handle::from_pointer(packet)).and_then(Found::claim);
    if claim.is_none() {
        violation(function, "PacketCompletionContext", NO_PACKET);
    }
    claim
}

/// Ends a completion context, and gives its packet.
#[inline]
fn end(mut claim: Claim<Incoming>) -> Option<(IncomingPacket, u32)> {
    let packet = claim.packet.take()?;
    if claim.mdls.is_used() {
        claim.let_go_of_memory(&packet);
    }
    claim.comes_again = false;
    if claim.is_in_callback() {
        let limit = claim.home.as_ref().map_or(0, |home| home.completion_limit());
        claim.end();
        return Some((packet, limit));
    }
    let home = claim.home.clone()?;
    if let Some(taken) = claim.end() {
        home.put(&taken);
    }
    Some((packet, home.completion_limit()))
}

impl Incoming {
    /// The MDLs become invalid. What C has written through addresses is told to whoever tracks writes.
    fn let_go_of_memory(&mut self, packet: &IncomingPacket) {
        self.views.clear();
        if self.mdls.was_mapped_for_writing()
            && let Ok(data) = packet.external_data(ExternalDataFlags::empty())
        {
            for (gpa, len) in data.segments() {
                data.memory().mark_dirty(gpa, u64::from(len));
            }
        }
        self.mdls.clear();
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
    // Not guarded as the others are: a function with C's calling convention ends the process rather than
    // let a panic out, and on the way of every packet that has to do.
    let Some((packet, limit)) = claim(NAME, packet).and_then(end) else { return };
    let size = if size > limit {
        violation(NAME, "BufSize", "is more than the largest completion (D-47)");
        limit
    } else {
        size
    };
    // SAFETY: the caller's promise, for at most `size` bytes.
    let payload = unsafe { types::bytes(buffer, size) };
    if payload.is_none() {
        violation(NAME, "PacketCompletionBuffer", "must not be null");
    }
    packet.complete(payload.unwrap_or_default());
}

/// VmbChannelPacketFail (D-36).
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelPacketFail(packet: VmbPacketCompletion) {
    const NAME: &str = "VmbChannelPacketFail";
    guarded(NAME, (), || {
        if let Some((packet, _)) = claim(NAME, packet).and_then(end) {
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
        if let Some((packet, _)) = end(claim) {
            home.next_is_deferred.store(true, Relaxed);
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
    boundary::status(NAME, || {
        let Some(mut claim) = claim(NAME, packet) else { return NtStatus::INVALID_PARAMETER_1 };
        if mdl.is_null() {
            return NtStatus::INVALID_PARAMETER_3;
        }
        let in_callback = claim.is_in_callback();
        let handle = claim.handle();
        match claim.external_mdls(handle, flags, in_callback) {
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
    fn external_mdls(
        &mut self,
        handle: Handle,
        flags: u32,
        in_callback: bool,
    ) -> Result<*mut Mdl, Error> {
        let late = Error::Argument { position: 1, name: "PacketCompletionContext", value: 0 };
        let flags = ExternalDataFlags::from_bits_retain(flags);
        if !ExternalDataFlags::all().contains(flags) {
            let value = u64::from(flags.bits());
            return Err(Error::Argument { position: 2, name: "Flags", value });
        }
        if self.mdls.is_used() {
            return Ok(self.mdls.first()); // D-43: a second call gives the same
        }
        let packet = self.packet.as_ref().filter(|_| in_callback).ok_or(late)?;
        let data = packet.external_data(flags)?;
        self.mdls.describe(data.ranges(), handle, data.is_read_only());
        self.comes_again = false;
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
    let mut claim = PACKETS.find(handle)?.claim()?;
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
