//! The Init setters. Range checks and states are the library's; here are the pointers.
#![allow(unsafe_code, reason = "exports functions, and reads what C points to")]

use core::ffi::c_void;
use std::sync::Arc;

use kmcl::bus::USER_DATA_SIZE;
use kmcl::{ChannelFlags, NtStatus, ServerFlags, Side};

use crate::boundary::outcome;
use crate::callbacks::PnpFailed;
use crate::channel::{CChannel, lock, passive};
use crate::incoming::Deliveries;
use crate::save::SaveCallbacks;
use crate::system;
use crate::types::{
    self, CGuid, FreezeCallbacks, PnpFailure, ProcessPacket, ProcessingComplete, RestorePacket,
    SavePacket, StateChangeCallbacks, Status, UnicodeString, VmbChannel,
};

/// Refuses an argument, unless the channel itself is to be refused: that comes first.
fn bad(it: &CChannel, only: Option<Side>, position: u8) -> NtStatus {
    let is_other_side = only.is_some_and(|side| side != it.channel.side());
    if is_other_side || it.channel.state() != kmcl::ChannelState::Disabled {
        return NtStatus::INVALID_PARAMETER_1;
    }
    NtStatus::invalid_parameter(position)
}

/// VmbChannelInitSetFlags.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelInitSetFlags(channel: VmbChannel, flags: u32) -> Status {
    passive("VmbChannelInitSetFlags", channel, |it| {
        outcome(it.channel.init_set_flags(ChannelFlags::from_bits_retain(flags)))
    })
}

/// VmbChannelInitSetFriendlyName.
///
/// # Safety
/// `name` is null or a string whose buffer has as many bytes as it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbChannelInitSetFriendlyName(
    channel: VmbChannel,
    name: *const UnicodeString,
) -> Status {
    passive("VmbChannelInitSetFriendlyName", channel, |it| {
        // SAFETY: null or valid by the caller's promise.
        let Some(name) = (unsafe { name.as_ref() }) else { return bad(it, None, 2) };
        // SAFETY: the caller's promise; null is taken for nothing.
        let bytes =
            unsafe { types::bytes(name.buffer.cast_const().cast(), u32::from(name.length)) };
        let Some(bytes) = bytes else { return bad(it, None, 2) };
        let (units, _odd) = bytes.as_chunks::<2>();
        let units: Vec<u16> = units.iter().map(|unit| u16::from_ne_bytes(*unit)).collect();
        outcome(it.channel.init_set_friendly_name(&String::from_utf16_lossy(&units)))
    })
}

/// VmbChannelInitSetMaximumPacketSize.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelInitSetMaximumPacketSize(
    channel: VmbChannel,
    packet_size: u32,
) -> Status {
    passive("VmbChannelInitSetMaximumPacketSize", channel, |it| {
        outcome(it.channel.init_set_maximum_packet_size(packet_size))
    })
}

/// VmbChannelInitSetMaximumExternalData.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelInitSetMaximumExternalData(
    channel: VmbChannel,
    data_size: u32,
    chain_length: u32,
) -> Status {
    passive("VmbChannelInitSetMaximumExternalData", channel, |it| {
        outcome(it.channel.init_set_maximum_external_data(data_size, chain_length))
    })
}

/// VmbChannelInitSetClientContextSize.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelInitSetClientContextSize(
    channel: VmbChannel,
    context_size: u32,
) -> Status {
    passive("VmbChannelInitSetClientContextSize", channel, |it| {
        outcome(it.channel.init_set_client_context_size(context_size))
    })
}

/// VmbChannelInitSetProcessPacketCallbacks.
///
/// # Safety
/// The functions may be called as long as the channel is not cleaned up.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbChannelInitSetProcessPacketCallbacks(
    channel: VmbChannel,
    process_packet: Option<ProcessPacket>,
    processing_complete: Option<ProcessingComplete>,
) -> Status {
    passive("VmbChannelInitSetProcessPacketCallbacks", channel, |it| {
        let Some(process_packet) = process_packet else { return bad(it, None, 2) };
        let freeze = *lock(&it.freeze_callbacks);
        let home = Arc::clone(&it.home);
        let deliveries = Deliveries { home, process_packet, processing_complete, freeze };
        outcome(it.channel.init_set_process_packet_callbacks(Arc::new(deliveries)))
    })
}

/// VmbChannelInitSetStateChangeCallbacks.
///
/// # Safety
/// `callbacks` is null or can be read; its functions may be called as long as the channel is not cleaned up.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbChannelInitSetStateChangeCallbacks(
    channel: VmbChannel,
    callbacks: *const StateChangeCallbacks,
) -> Status {
    passive("VmbChannelInitSetStateChangeCallbacks", channel, |it| {
        // The head first: what follows is there only if the size says so.
        // SAFETY: null or readable by the caller's promise.
        let head = unsafe { callbacks.cast::<[u32; 2]>().as_ref() };
        if head != Some(&[1, types::size_u32::<StateChangeCallbacks>()]) {
            return bad(it, None, 2);
        }
        // SAFETY: not null, and as large as it says.
        outcome(it.set_state_callbacks(unsafe { callbacks.read() }))
    })
}

/// VmbClientChannelInitSetRingBufferPageCount.
#[unsafe(no_mangle)]
pub extern "C" fn VmbClientChannelInitSetRingBufferPageCount(
    channel: VmbChannel,
    incoming_page_count: u32,
    outgoing_page_count: u32,
) -> Status {
    passive("VmbClientChannelInitSetRingBufferPageCount", channel, |it| {
        let set = it
            .channel
            .client_init_set_ring_buffer_page_count(incoming_page_count, outgoing_page_count);
        outcome(set)
    })
}

/// VmbClientChannelInitSetTargetPnp.
///
/// # Safety
/// Both pointers are null or can be read; the function may be called as long as the channel is not cleaned up.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbClientChannelInitSetTargetPnp(
    channel: VmbChannel,
    interface_type: *const CGuid,
    interface_instance: *const CGuid,
    pnp_failure: Option<PnpFailure>,
) -> Status {
    passive("VmbClientChannelInitSetTargetPnp", channel, |it| {
        // SAFETY: each is null or readable by the caller's promise.
        let (kind, instance) = unsafe { (interface_type.as_ref(), interface_instance.as_ref()) };
        let Some(kind) = kind else { return bad(it, Some(Side::Client), 2) };
        let failure = pnp_failure
            .map(|callback| Arc::new(PnpFailed { handle: it.handle, callback }) as Arc<_>);
        let instance = instance.map(|guid| guid.guid());
        outcome(it.channel.client_init_set_target_pnp(kind.guid(), instance, failure))
    })
}

/// VmbServerChannelInitSetFlags.
#[unsafe(no_mangle)]
pub extern "C" fn VmbServerChannelInitSetFlags(channel: VmbChannel, flags: u32) -> Status {
    passive("VmbServerChannelInitSetFlags", channel, |it| {
        outcome(it.channel.server_init_set_flags(ServerFlags::from_bits_retain(flags)))
    })
}

/// VmbServerChannelInitSetMmioMegabytes.
#[unsafe(no_mangle)]
pub extern "C" fn VmbServerChannelInitSetMmioMegabytes(
    channel: VmbChannel,
    mmio_megabytes: u16,
    mmio_megabytes_optional: u16,
) -> Status {
    passive("VmbServerChannelInitSetMmioMegabytes", channel, |it| {
        let set =
            it.channel.server_init_set_mmio_megabytes(mmio_megabytes, mmio_megabytes_optional);
        outcome(set)
    })
}

/// VmbServerChannelInitSetSaveRestorePacketCallbacks.
///
/// # Safety
/// The functions may be called as long as the channel is not cleaned up.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbServerChannelInitSetSaveRestorePacketCallbacks(
    channel: VmbChannel,
    save_packet: Option<SavePacket>,
    restore_packet: Option<RestorePacket>,
) -> Status {
    passive("VmbServerChannelInitSetSaveRestorePacketCallbacks", channel, |it| {
        let Some(save) = save_packet else { return bad(it, Some(Side::Server), 2) };
        let Some(restore) = restore_packet else { return bad(it, Some(Side::Server), 3) };
        let callbacks = SaveCallbacks { handle: it.handle, save, restore };
        outcome(it.channel.server_init_set_save_restore_packet_callbacks(Arc::new(callbacks)))
    })
}

/// VmbServerChannelInitSetTargetInterfaceId; by value (D-54).
#[unsafe(no_mangle)]
pub extern "C" fn VmbServerChannelInitSetTargetInterfaceId(
    channel: VmbChannel,
    interface_type: CGuid,
    interface_instance: CGuid,
) -> Status {
    passive("VmbServerChannelInitSetTargetInterfaceId", channel, |it| {
        let (kind, instance) = (interface_type.guid(), interface_instance.guid());
        outcome(it.channel.server_init_set_target_interface_id(kind, instance))
    })
}

/// VmbServerChannelInitSetTargetVtl.
#[unsafe(no_mangle)]
pub extern "C" fn VmbServerChannelInitSetTargetVtl(channel: VmbChannel, target_vtl: u8) -> Status {
    passive("VmbServerChannelInitSetTargetVtl", channel, |it| {
        outcome(it.channel.server_init_set_target_vtl(target_vtl))
    })
}

/// VmbServerChannelInitSetVmbusHandle: the bus that the offer goes to, in place of the device's.
#[unsafe(no_mangle)]
pub extern "C" fn VmbServerChannelInitSetVmbusHandle(
    channel: VmbChannel,
    vmbus_handle: *mut c_void,
) -> Status {
    passive("VmbServerChannelInitSetVmbusHandle", channel, |it| {
        let bus = system::bus(vmbus_handle);
        let refused = bad(it, Some(Side::Server), 2);
        if refused == NtStatus::INVALID_PARAMETER_1 || bus.is_none() {
            return refused;
        }
        it.bus.set(bus);
        NtStatus::SUCCESS
    })
}

// ---- Extensions -------------------------------------------------------------------------------------

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclChannelInitSetMaximumCompletionSize(
    channel: VmbChannel,
    bytes: u32,
) -> Status {
    passive("KmclChannelInitSetMaximumCompletionSize", channel, |it| {
        outcome(it.channel.init_set_maximum_completion_size(bytes))
    })
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclChannelInitSetMaximumPacketCount(
    channel: VmbChannel,
    packets: u32,
) -> Status {
    passive("KmclChannelInitSetMaximumPacketCount", channel, |it| {
        outcome(it.channel.init_set_maximum_packet_count(packets))
    })
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclChannelInitSetSubchannelIndex(channel: VmbChannel, index: u16) -> Status {
    passive("KmclChannelInitSetSubchannelIndex", channel, |it| {
        outcome(it.channel.init_set_subchannel_index(index))
    })
}

/// See `kmcl.h`.
///
/// # Safety
/// `user_data` is null, or 120 bytes can be read there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclChannelInitSetUserData(
    channel: VmbChannel,
    user_data: *const c_void,
) -> Status {
    passive("KmclChannelInitSetUserData", channel, |it| {
        // SAFETY: the caller's promise.
        let data = unsafe { user_data.cast::<[u8; USER_DATA_SIZE]>().as_ref() };
        let Some(data) = data else { return bad(it, None, 2) };
        outcome(it.channel.init_set_user_data(data))
    })
}

/// See `kmcl.h`.
///
/// # Safety
/// `callbacks` is null or can be read; its functions may be called as long as the channel is not cleaned up.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclChannelInitSetFreezeCallbacks(
    channel: VmbChannel,
    callbacks: *const FreezeCallbacks,
) -> Status {
    passive("KmclChannelInitSetFreezeCallbacks", channel, |it| {
        // SAFETY: null or readable by the caller's promise.
        let size = unsafe { callbacks.cast::<u32>().as_ref() };
        if size != Some(&types::size_u32::<FreezeCallbacks>()) {
            return bad(it, None, 2);
        }
        if it.channel.state() != kmcl::ChannelState::Disabled {
            return NtStatus::INVALID_PARAMETER_1;
        }
        // SAFETY: not null, and as large as it says.
        *lock(&it.freeze_callbacks) = unsafe { callbacks.read() };
        NtStatus::SUCCESS
    })
}
