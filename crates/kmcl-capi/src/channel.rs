//! The life of a channel: VmbChannelAllocate to VmbChannelCleanup, and what may be asked of it between.
#![allow(unsafe_code, reason = "exports functions, and writes where C says")]

use core::ffi::c_void;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kmcl::{Channel, ChannelState, Frozen, Level, NtStatus, Side};

use crate::boundary::{self, guarded, outcome};
use crate::callbacks::StateCallbacks;
use crate::context::{self, must_be_passive, outside_callbacks};
use crate::gpadl::Gpadls;
use crate::handle::{Content, Found, Handle, Kind, Table};
use crate::incoming::Home;
use crate::packet::{self, Completion};
use crate::pages::Pages;
use crate::system::{self, Device, LateBus};
use crate::types::{
    CGuid, DeviceObject, FreezeCallbacks, StateChangeCallbacks, Status, VmbChannel,
};
use crate::verifier::violation;

/// A channel, as C's handle stands for it.
pub(crate) struct CChannel {
    pub(crate) handle: Handle,
    pub(crate) channel: Channel,
    pub(crate) bus: Arc<LateBus>,
    device: Arc<Device>,
    /// Where its incoming packets' handles come from.
    pub(crate) home: Arc<Home>,
    /// What ends its outgoing packets.
    pub(crate) completion: Arc<Completion>,
    pub(crate) gpadls: Arc<Gpadls>,
    pub(crate) pages: Pages,
    /// Packets in C's own memory: where, and their handles.
    pub(crate) initialized: Mutex<std::collections::BTreeMap<u64, Handle>>,
    pub(crate) frozen: Mutex<Option<Frozen>>,
    pub(crate) freeze_callbacks: Mutex<FreezeCallbacks>,
}

#[derive(Default)]
pub(crate) struct ChannelSlot(Option<Arc<CChannel>>);

/// What is asked for in every callback: without a lock.
#[derive(Default)]
pub(crate) struct ChannelWords {
    pointer: AtomicUsize,
}

impl Content for ChannelSlot {
    const KIND: Kind = Kind::Channel;
    type Shared = ChannelWords;
}

static CHANNELS: Table<ChannelSlot> = Table::new();

/// The rule that a handle of a channel breaks.
pub(crate) const NO_CHANNEL: &str = "names no channel: it is null, of another kind, or cleaned up";

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The channel of a handle, without a word about one that names none.
pub(crate) fn find(handle: Handle) -> Option<Arc<CChannel>> {
    CHANNELS.find(handle).and_then(Found::claim).and_then(|claim| claim.0.clone())
}

/// The channel of a handle; one that names none is against the rules of `function`.
pub(crate) fn named(function: &'static str, channel: VmbChannel) -> Option<Arc<CChannel>> {
    let found = find(Handle::from_pointer(channel));
    if found.is_none() {
        violation(function, "Channel", NO_CHANNEL);
    }
    found
}

/// Runs `call` for the channel, on a thread that may sleep.
pub(crate) fn passive(
    function: &'static str,
    channel: VmbChannel,
    call: impl FnOnce(&CChannel) -> NtStatus,
) -> Status {
    boundary::status(function, || {
        must_be_passive(function);
        match named(function, channel) {
            Some(channel) => call(&channel),
            None => NtStatus::INVALID_PARAMETER_1,
        }
    })
}

/// As [`passive`], for a call that blocks, and for which the channel's own callbacks must not wait.
fn blocking(function: &'static str, channel: VmbChannel, call: impl FnOnce(&CChannel)) {
    guarded(function, (), || {
        must_be_passive(function);
        let Some(channel) = named(function, channel) else { return };
        if outside_callbacks(function, channel.handle) {
            call(&channel);
        }
    });
}

/// VmbChannelAllocate.
///
/// # Safety
/// `channel` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbChannelAllocate(
    parent_device_object: DeviceObject,
    is_server: u8,
    channel: *mut VmbChannel,
) -> Status {
    const NAME: &str = "VmbChannelAllocate";
    boundary::status(NAME, || {
        must_be_passive(NAME);
        let Some(device) = system::device(parent_device_object) else {
            violation(NAME, "ParentDeviceObject", "names no device");
            return NtStatus::INVALID_PARAMETER_1;
        };
        if channel.is_null() {
            return NtStatus::INVALID_PARAMETER_3;
        }
        match allocate(device, if is_server == 0 { Side::Client } else { Side::Server }) {
            Ok(handle) => {
                // SAFETY: not null; the caller's promise.
                unsafe { channel.write(handle.to_pointer()) };
                NtStatus::SUCCESS
            }
            Err(status) => status,
        }
    })
}

fn allocate(device: Arc<Device>, side: Side) -> Result<Handle, NtStatus> {
    let taken = CHANNELS.take().ok_or(NtStatus::INSUFFICIENT_RESOURCES)?;
    taken.slot().shared.pointer.store(0, Ordering::Relaxed);
    let found = taken.open();
    let handle = found.handle();
    let made = make(handle, device, side);
    let mut claim = found.claim().ok_or(NtStatus::INSUFFICIENT_RESOURCES)?;
    match made {
        Ok(made) => {
            claim.0 = Some(made);
            Ok(handle)
        }
        Err(status) => {
            if let Some(taken) = claim.end() {
                CHANNELS.give_back(&taken);
            }
            Err(status)
        }
    }
}

fn make(handle: Handle, device: Arc<Device>, side: Side) -> Result<Arc<CChannel>, NtStatus> {
    let bus = Arc::new(LateBus::default());
    bus.set(device.bus.clone());
    let made = Arc::new(CChannel {
        handle,
        channel: Channel::allocate(side, Arc::clone(&bus) as _),
        bus,
        device,
        home: Arc::new(Home::new(handle)),
        completion: Arc::new(Completion),
        gpadls: Arc::new(Gpadls::new(handle)),
        pages: Pages::default(),
        initialized: Mutex::default(),
        frozen: Mutex::default(),
        freeze_callbacks: Mutex::default(),
    });
    made.set_state_callbacks(StateChangeCallbacks::default()).map_err(|error| error.status())?;
    if let Some(worker) = &made.device.worker {
        worker.add(&made.channel).map_err(|error| {
            tracing::error!(%error, "a worker does not take a channel");
            NtStatus::INSUFFICIENT_RESOURCES
        })?;
    }
    Ok(made)
}

impl CChannel {
    pub(crate) fn set_state_callbacks(
        &self,
        callbacks: StateChangeCallbacks,
    ) -> Result<(), kmcl::Error> {
        let gpadls = Arc::clone(&self.gpadls);
        self.channel.init_set_state_change_callbacks(Arc::new(StateCallbacks {
            handle: self.handle,
            callbacks,
            closed: Arc::new(move || gpadls.release()),
        }))
    }
}

/// VmbChannelCleanup.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelCleanup(channel: VmbChannel) {
    const NAME: &str = "VmbChannelCleanup";
    blocking(NAME, channel, |it| {
        if it.channel.state() != ChannelState::Disabled {
            violation(NAME, "Channel", "must be Disabled (D-12)");
            disable(it);
        }
        // Only one of several threads goes on from here.
        let Some(mut claim) = CHANNELS.find(it.handle).and_then(Found::claim) else { return };
        let Some(owned) = claim.0.take() else { return };
        if let Some(taken) = claim.end() {
            CHANNELS.give_back(&taken);
        }
        if let Some(worker) = &owned.device.worker {
            worker.remove(&owned.channel);
        }
        packet::forget_all_of(owned.handle);
        owned.home.close();
        owned.pages.free_all();
        owned.channel.clone().cleanup();
    });
}

/// VmbChannelEnable.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelEnable(channel: VmbChannel) -> Status {
    passive("VmbChannelEnable", channel, |it| outcome(it.channel.enable()))
}

/// VmbChannelDisable.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelDisable(channel: VmbChannel) {
    blocking("VmbChannelDisable", channel, disable);
}

fn disable(it: &CChannel) {
    // A frozen channel thaws first, as the library has it.
    let frozen = lock(&it.frozen).take();
    drop(frozen);
    it.channel.disable();
}

/// VmbChannelStart.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelStart(channel: VmbChannel) {
    blocking("VmbChannelStart", channel, |it| it.channel.start());
}

/// VmbChannelPause.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelPause(channel: VmbChannel) {
    blocking("VmbChannelPause", channel, |it| it.channel.pause());
}

/// VmbChannelGetInterfaceInstance.
///
/// # Safety
/// `interface_instance` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbChannelGetInterfaceInstance(
    channel: VmbChannel,
    interface_instance: *mut CGuid,
) {
    const NAME: &str = "VmbChannelGetInterfaceInstance";
    guarded(NAME, (), || {
        let Some(it) = named(NAME, channel) else { return };
        if interface_instance.is_null() {
            violation(NAME, "InterfaceInstance", "must not be null");
            return;
        }
        let instance = CGuid::new(it.channel.get_interface_instance());
        // SAFETY: not null; the caller's promise.
        unsafe { interface_instance.write(instance) };
    });
}

/// VmbChannelGetMmioSpace; 0 and 0 where there is none (D-52).
///
/// # Safety
/// Both pointers are null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbChannelGetMmioSpace(
    channel: VmbChannel,
    mmio_address: *mut u64,
    mmio_size: *mut u64,
) {
    const NAME: &str = "VmbChannelGetMmioSpace";
    guarded(NAME, (), || {
        let Some(it) = named(NAME, channel) else { return };
        if mmio_address.is_null() || mmio_size.is_null() {
            violation(NAME, "MmioAddress, MmioSize", "must not be null");
            return;
        }
        let (address, size) = it.channel.get_mmio_space();
        // SAFETY: neither is null; the caller's promise.
        unsafe {
            mmio_address.write(address);
            mmio_size.write(size);
        }
    });
}

/// VmbChannelSetPointer.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelSetPointer(channel: VmbChannel, pointer: *mut c_void) {
    const NAME: &str = "VmbChannelSetPointer";
    guarded(NAME, (), || match CHANNELS.find(Handle::from_pointer(channel)) {
        Some(found) => {
            found.shared().pointer.store(pointer.expose_provenance(), Ordering::Release);
        }
        None => violation(NAME, "Channel", NO_CHANNEL),
    });
}

/// VmbChannelGetPointer; null at first (D-51).
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelGetPointer(channel: VmbChannel) -> *mut c_void {
    const NAME: &str = "VmbChannelGetPointer";
    guarded(NAME, core::ptr::null_mut(), || {
        let Some(found) = CHANNELS.find(Handle::from_pointer(channel)) else {
            violation(NAME, "Channel", NO_CHANNEL);
            return core::ptr::null_mut();
        };
        core::ptr::with_exposed_provenance_mut(found.shared().pointer.load(Ordering::Acquire))
    })
}

/// VmbChannelSetTransactionQuota; 0 is ignored (D-61).
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelSetTransactionQuota(channel: VmbChannel, quota: u32) {
    const NAME: &str = "VmbChannelSetTransactionQuota";
    guarded(NAME, (), || {
        let Some(it) = named(NAME, channel) else { return };
        if quota == 0 {
            violation(NAME, "Quota", "must be greater than 0 (D-61)");
            return;
        }
        it.channel.set_transaction_quota(quota);
    });
}

/// VmbChannelSetIncomingProcessingAtPassive.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelSetIncomingProcessingAtPassive(
    channel: VmbChannel,
    require_passive: u8,
) {
    const NAME: &str = "VmbChannelSetIncomingProcessingAtPassive";
    guarded(NAME, (), || {
        let Some(it) = named(NAME, channel) else { return };
        it.home.require_passive(require_passive != 0);
        it.channel.set_incoming_processing_at_passive(require_passive != 0);
    });
}

/// VmbChannelSetInterruptLatency.
///
/// # Safety
/// `original_latency` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbChannelSetInterruptLatency(
    channel: VmbChannel,
    latency: u16,
    original_latency: *mut u16,
) -> Status {
    const NAME: &str = "VmbChannelSetInterruptLatency";
    boundary::status(NAME, || {
        let Some(it) = named(NAME, channel) else { return NtStatus::INVALID_PARAMETER_1 };
        if original_latency.is_null() {
            return NtStatus::INVALID_PARAMETER_3;
        }
        match it.channel.set_interrupt_latency(latency) {
            Ok(former) => {
                // SAFETY: not null; the caller's promise.
                unsafe { original_latency.write(former) };
                NtStatus::SUCCESS
            }
            Err(error) => error.status(),
        }
    })
}

// ---- Extensions -------------------------------------------------------------------------------------

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclChannelGetState(channel: VmbChannel) -> u32 {
    const INVALID: u32 = 255;
    guarded("KmclChannelGetState", INVALID, || {
        // A way to ask whether the handle is good: no violation.
        find(Handle::from_pointer(channel)).map_or(INVALID, |it| it.channel.state() as u32)
    })
}

/// See `kmcl.h`.
///
/// # Safety
/// `packets` and `progress` are null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclChannelProcess(
    channel: VmbChannel,
    irql: u8,
    budget: u32,
    packets: *mut u32,
    progress: *mut u32,
) -> Status {
    const NAME: &str = "KmclChannelProcess";
    boundary::status(NAME, || {
        let Some(it) = named(NAME, channel) else { return NtStatus::INVALID_PARAMETER_1 };
        let level = if irql == context::PASSIVE { Level::Passive } else { Level::Dispatch };
        let done = it.channel.process_at(level, budget);
        let flags = u32::from(done.more) | u32::from(done.needs_passive) << 1;
        for (to, value) in [(packets, done.packets), (progress, flags)] {
            if !to.is_null() {
                // SAFETY: not null; the caller's promise.
                unsafe { to.write(value) };
            }
        }
        NtStatus::SUCCESS
    })
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclChannelDoorbell(channel: VmbChannel) -> i32 {
    const NAME: &str = "KmclChannelDoorbell";
    guarded(NAME, -1, || {
        let it = named(NAME, channel);
        it.and_then(|it| Some(it.channel.doorbell_fd().ok()?.as_raw_fd())).unwrap_or(-1)
    })
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclChannelAcknowledge(channel: VmbChannel) {
    const NAME: &str = "KmclChannelAcknowledge";
    guarded(NAME, (), || {
        if let Some(it) = named(NAME, channel) {
            it.channel.acknowledge();
        }
    });
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclChannelIncomingOutstanding(channel: VmbChannel) -> u32 {
    const NAME: &str = "KmclChannelIncomingOutstanding";
    guarded(NAME, 0, || named(NAME, channel).map_or(0, |it| it.channel.incoming_outstanding()))
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclChannelIsResumed(channel: VmbChannel) -> u8 {
    const NAME: &str = "KmclChannelIsResumed";
    guarded(NAME, 0, || named(NAME, channel).map_or(0, |it| u8::from(it.channel.is_resumed())))
}
