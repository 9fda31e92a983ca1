//! The documented save and restore, with EvtVmbChannelSavePacket and EvtVmbChannelRestorePacket.
#![allow(unsafe_code, reason = "exports functions, calls C's, and reads and writes where C says")]

use core::ffi::c_void;

use kmcl::{Channel, NtStatus, Packet, SaveRestorePacket, Side};

use crate::boundary::{from_c, guarded, outcome};
use crate::channel::{named, passive};
use crate::context::{in_state_callback, must_be_passive, outside_callbacks};
use crate::handle::Handle;
use crate::packet;
use crate::types::{self, RestorePacket, SavePacket, Status, VmbChannel};

/// The two callbacks of VmbServerChannelInitSetSaveRestorePacketCallbacks.
pub(crate) struct SaveCallbacks {
    pub(crate) handle: Handle,
    pub(crate) save: SavePacket,
    pub(crate) restore: RestorePacket,
}

impl SaveCallbacks {
    /// Calls EvtVmbChannelSavePacket: its status and `*BytesNeeded`. A packet that is none of C's has no
    /// state.
    fn save(&self, packet: &Packet, buffer: *mut c_void, size: u32) -> (NtStatus, u32) {
        let Some(packet) = packet::name_of(packet) else { return (NtStatus::SUCCESS, 0) };
        let mut needed = 0;
        let channel = self.handle.to_pointer();
        // SAFETY: C gave the function for this channel; `buffer` has `size` bytes, or both are none.
        let status = in_state_callback(self.handle, || unsafe {
            (self.save)(channel, packet, buffer, size, &raw mut needed)
        });
        (from_c(status), needed)
    }
}

impl SaveRestorePacket for SaveCallbacks {
    fn state_size(&self, _: &Channel, packet: &Packet) -> Result<u32, NtStatus> {
        match self.save(packet, core::ptr::null_mut(), 0) {
            (status, _) if status.is_success() => Ok(0),
            (status, 0) => Err(status), // D-21
            (_, needed) => Ok(needed),
        }
    }

    fn save_packet(
        &self,
        _: &Channel,
        packet: &Packet,
        buffer: &mut [u8],
    ) -> Result<u32, NtStatus> {
        let size = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
        match self.save(packet, buffer.as_mut_ptr().cast(), size) {
            (status, needed) if status.is_success() => Ok(needed), // D-22
            (status, _) => Err(status),
        }
    }

    fn restore_packet(
        &self,
        _: &Channel,
        library_state: &[u8],
        own_state: &[u8],
    ) -> Result<(), NtStatus> {
        let parts = |bytes: &[u8]| {
            let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let start = bytes.as_ptr().cast_mut().cast::<c_void>();
            (if len == 0 { core::ptr::null_mut() } else { start }, len) // D-23
        };
        let ((lib, lib_size), (own, own_size)) = (parts(library_state), parts(own_state));
        let channel = self.handle.to_pointer();
        // SAFETY: C gave the function for this channel; both buffers are valid during the call.
        let status = in_state_callback(self.handle, || unsafe {
            (self.restore)(channel, lib, lib_size, own, own_size)
        });
        let status = from_c(status);
        if status.is_success() { Ok(()) } else { Err(status) }
    }
}

/// VmbChannelSaveBegin.
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelSaveBegin(channel: VmbChannel) -> Status {
    const NAME: &str = "VmbChannelSaveBegin";
    passive(NAME, channel, |it| {
        if it.channel.side() != Side::Server {
            return NtStatus::INVALID_PARAMETER_1;
        }
        if !outside_callbacks(NAME, it.handle) {
            return NtStatus::INVALID_DEVICE_STATE;
        }
        outcome(it.channel.save_begin())
    })
}

/// VmbChannelSaveContinue; both outputs are always written (D-16).
///
/// # Safety
/// `save_buffer` is null or has `save_buffer_size` bytes; the outputs are null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbChannelSaveContinue(
    channel: VmbChannel,
    save_buffer: *mut c_void,
    save_buffer_size: u32,
    bytes_filled: *mut u32,
    bytes_required: *mut u32,
) -> Status {
    const NAME: &str = "VmbChannelSaveContinue";
    let write = |filled: u32, required: u32| {
        for (to, value) in [(bytes_filled, filled), (bytes_required, required)] {
            if !to.is_null() {
                // SAFETY: not null; the caller's promise.
                unsafe { to.write(value) };
            }
        }
    };
    write(0, 0);
    passive(NAME, channel, |it| {
        if bytes_filled.is_null() {
            return NtStatus::INVALID_PARAMETER_4;
        }
        if bytes_required.is_null() {
            return NtStatus::invalid_parameter(5);
        }
        if !outside_callbacks(NAME, it.handle) {
            return NtStatus::INVALID_DEVICE_STATE;
        }
        // SAFETY: the caller's promise.
        let buffer = unsafe { types::bytes_mut(save_buffer, save_buffer_size) };
        let Some(buffer) = buffer else { return NtStatus::INVALID_PARAMETER_2 };
        let step = it.channel.save_continue(buffer);
        write(step.bytes_filled, step.bytes_required);
        step.status
    })
}

/// VmbChannelSaveEnd; nothing where there is no save (D-17).
#[unsafe(no_mangle)]
pub extern "C" fn VmbChannelSaveEnd(channel: VmbChannel) {
    const NAME: &str = "VmbChannelSaveEnd";
    guarded(NAME, (), || {
        must_be_passive(NAME);
        let Some(it) = named(NAME, channel) else { return };
        if outside_callbacks(NAME, it.handle) {
            it.channel.save_end();
        }
    });
}

/// VmbChannelRestoreFromBuffer.
///
/// # Safety
/// `buffer` is null or has `buffer_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbChannelRestoreFromBuffer(
    channel: VmbChannel,
    buffer: *mut c_void,
    buffer_size: u32,
) -> Status {
    const NAME: &str = "VmbChannelRestoreFromBuffer";
    passive(NAME, channel, |it| {
        if it.channel.side() != Side::Server {
            return NtStatus::INVALID_PARAMETER_1;
        }
        if !outside_callbacks(NAME, it.handle) {
            return NtStatus::INVALID_DEVICE_STATE;
        }
        // SAFETY: the caller's promise.
        let Some(bytes) = (unsafe { types::bytes(buffer, buffer_size) }) else {
            return NtStatus::INVALID_PARAMETER_2;
        };
        match it.channel.restore_from_buffer(bytes) {
            Ok(restored) => restored.status(),
            Err(error) => {
                tracing::error!(%error, "a channel cannot be restored");
                error.status()
            }
        }
    })
}
