//! The tables of functions, in their documented order, and the query that fills them.
#![allow(unsafe_code, reason = "exports a function and constants, and writes where C says")]

use core::ffi::c_void;
use std::sync::atomic::{AtomicU32, Ordering};

use kmcl::{Guid, NtStatus};

use crate::boundary;
use crate::types::{
    self, CGuid, CompletionRoutine, DeviceObject, Interface, Mdl, PnpFailure, ProcessPacket,
    ProcessingComplete, RestorePacket, SavePacket, StateChangeCallbacks, Status, UnicodeString,
    VmbChannel, VmbPacket, VmbPacketCompletion,
};
use crate::verifier::violation;
use crate::{channel, gpadl, incoming, packet, save, setters, synchronous, system};

/// Makes a table's structure and its value from one list, so that neither can differ.
macro_rules! table {
    ($(#[$doc:meta])* $name:ident, $value:ident {
        $($member:ident = $function:path: $type:ty,)*
    }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub struct $name {
            $(#[doc = concat!("`", stringify!($function), "`")] pub $member: $type,)*
        }

        impl $name {
            /// The names of the members in their order, as C has them.
            pub const MEMBERS: &[&str] = &[$(stringify!($function)),*];
        }

        const $value: $name = $name { $($member: $function,)* };
    };
}

table! {
    /// The functions of `KMCL_CLIENT_INTERFACE_V1`.
    ClientMethods, CLIENT_METHODS {
        channel_allocate = channel::VmbChannelAllocate: unsafe extern "C" fn(DeviceObject, u8, *mut VmbChannel) -> Status,
        channel_cleanup = channel::VmbChannelCleanup: extern "C" fn(VmbChannel),
        channel_create_gpadl_from_buffer = gpadl::VmbChannelCreateGpadlFromBuffer: unsafe extern "C" fn(VmbChannel, u32, *mut c_void, u32, *mut u32) -> Status,
        channel_create_gpadl_from_mdl = gpadl::VmbChannelCreateGpadlFromMdl: unsafe extern "C" fn(VmbChannel, u32, *mut Mdl, u32, u32, *mut u32) -> Status,
        channel_delete_gpadl = gpadl::VmbChannelDeleteGpadl: extern "C" fn(VmbChannel, u32),
        channel_disable = channel::VmbChannelDisable: extern "C" fn(VmbChannel),
        channel_enable = channel::VmbChannelEnable: extern "C" fn(VmbChannel) -> Status,
        channel_get_interface_instance = channel::VmbChannelGetInterfaceInstance: unsafe extern "C" fn(VmbChannel, *mut CGuid),
        channel_get_mmio_space = channel::VmbChannelGetMmioSpace: unsafe extern "C" fn(VmbChannel, *mut u64, *mut u64),
        channel_get_pointer = channel::VmbChannelGetPointer: extern "C" fn(VmbChannel) -> *mut c_void,
        channel_init_set_client_context_size = setters::VmbChannelInitSetClientContextSize: extern "C" fn(VmbChannel, u32) -> Status,
        channel_init_set_flags = setters::VmbChannelInitSetFlags: extern "C" fn(VmbChannel, u32) -> Status,
        channel_init_set_friendly_name = setters::VmbChannelInitSetFriendlyName: unsafe extern "C" fn(VmbChannel, *const UnicodeString) -> Status,
        channel_init_set_maximum_external_data = setters::VmbChannelInitSetMaximumExternalData: extern "C" fn(VmbChannel, u32, u32) -> Status,
        channel_init_set_maximum_packet_size = setters::VmbChannelInitSetMaximumPacketSize: extern "C" fn(VmbChannel, u32) -> Status,
        channel_init_set_process_packet_callbacks = setters::VmbChannelInitSetProcessPacketCallbacks: unsafe extern "C" fn(VmbChannel, Option<ProcessPacket>, Option<ProcessingComplete>) -> Status,
        channel_init_set_state_change_callbacks = setters::VmbChannelInitSetStateChangeCallbacks: unsafe extern "C" fn(VmbChannel, *const StateChangeCallbacks) -> Status,
        channel_packet_complete = incoming::VmbChannelPacketComplete: unsafe extern "C" fn(VmbPacketCompletion, *mut c_void, u32),
        channel_packet_defer_to_passive = incoming::VmbChannelPacketDeferToPassive: extern "C" fn(VmbPacketCompletion),
        channel_packet_fail = incoming::VmbChannelPacketFail: extern "C" fn(VmbPacketCompletion),
        channel_packet_get_external_data = incoming::VmbChannelPacketGetExternalData: unsafe extern "C" fn(VmbPacketCompletion, u32, *mut *mut Mdl) -> Status,
        channel_pause = channel::VmbChannelPause: extern "C" fn(VmbChannel),
        channel_send_synchronous_request = synchronous::VmbChannelSendSynchronousRequest: unsafe extern "C" fn(VmbChannel, *mut c_void, u32, *mut Mdl, u32, *mut c_void, *mut u32, *mut i64) -> Status,
        channel_set_incoming_processing_at_passive = channel::VmbChannelSetIncomingProcessingAtPassive: extern "C" fn(VmbChannel, u8),
        channel_set_interrupt_latency = channel::VmbChannelSetInterruptLatency: unsafe extern "C" fn(VmbChannel, u16, *mut u16) -> Status,
        channel_set_pointer = channel::VmbChannelSetPointer: extern "C" fn(VmbChannel, *mut c_void),
        channel_set_transaction_quota = channel::VmbChannelSetTransactionQuota: extern "C" fn(VmbChannel, u32),
        channel_sizeof_packet = packet::VmbChannelSizeofPacket: extern "C" fn(VmbChannel) -> u32,
        channel_start = channel::VmbChannelStart: extern "C" fn(VmbChannel),
        client_channel_init_set_ring_buffer_page_count = setters::VmbClientChannelInitSetRingBufferPageCount: extern "C" fn(VmbChannel, u32, u32) -> Status,
        client_channel_init_set_target_pnp = setters::VmbClientChannelInitSetTargetPnp: unsafe extern "C" fn(VmbChannel, *const CGuid, *const CGuid, Option<PnpFailure>) -> Status,
        packet_allocate = packet::VmbPacketAllocate: extern "C" fn(VmbChannel) -> VmbPacket,
        packet_free = packet::VmbPacketFree: unsafe extern "C" fn(VmbPacket),
        packet_get_channel = packet::VmbPacketGetChannel: unsafe extern "C" fn(VmbPacket) -> VmbChannel,
        packet_get_pointer = packet::VmbPacketGetPointer: unsafe extern "C" fn(VmbPacket) -> *mut c_void,
        packet_initialize = packet::VmbPacketInitialize: unsafe extern "C" fn(VmbChannel, VmbPacket, u32) -> Status,
        packet_send = packet::VmbPacketSend: unsafe extern "C" fn(VmbPacket, *mut c_void, u32, *mut Mdl, u32) -> Status,
        packet_send_with_external_mdl = packet::VmbPacketSendWithExternalMdl: unsafe extern "C" fn(VmbPacket, *mut c_void, u32, *mut Mdl, u32, u32, u32) -> Status,
        packet_send_with_external_pfns = packet::VmbPacketSendWithExternalPfns: unsafe extern "C" fn(VmbPacket, *mut c_void, u32, *mut u64, u32, u32) -> Status,
        packet_set_completion_routine = packet::VmbPacketSetCompletionRoutine: unsafe extern "C" fn(VmbPacket, Option<CompletionRoutine>),
        packet_set_pointer = packet::VmbPacketSetPointer: unsafe extern "C" fn(VmbPacket, *mut c_void),
    }
}

table! {
    /// `KMCL_SERVER_ONLY_METHODS`
    ServerMethods, SERVER_METHODS {
        channel_map_gpadl = gpadl::VmbChannelMapGpadl: unsafe extern "C" fn(VmbChannel, u32, u32, *mut *mut Mdl) -> Status,
        channel_restore_from_buffer = save::VmbChannelRestoreFromBuffer: unsafe extern "C" fn(VmbChannel, *mut c_void, u32) -> Status,
        channel_save_begin = save::VmbChannelSaveBegin: extern "C" fn(VmbChannel) -> Status,
        channel_save_continue = save::VmbChannelSaveContinue: unsafe extern "C" fn(VmbChannel, *mut c_void, u32, *mut u32, *mut u32) -> Status,
        channel_save_end = save::VmbChannelSaveEnd: extern "C" fn(VmbChannel),
        channel_unmap_gpadl = gpadl::VmbChannelUnmapGpadl: extern "C" fn(VmbChannel, u32),
        convert_vmbus_handle_to_kernel_handle = system::VmbConvertVmbusHandleToKernelHandle: unsafe extern "C" fn(*mut c_void, *mut *mut c_void) -> Status,
        packet_restore = packet::VmbPacketRestore: unsafe extern "C" fn(VmbPacket, *mut c_void, u32) -> Status,
        server_channel_init_set_flags = setters::VmbServerChannelInitSetFlags: extern "C" fn(VmbChannel, u32) -> Status,
        server_channel_init_set_mmio_megabytes = setters::VmbServerChannelInitSetMmioMegabytes: extern "C" fn(VmbChannel, u16, u16) -> Status,
        server_channel_init_set_save_restore_packet_callbacks = setters::VmbServerChannelInitSetSaveRestorePacketCallbacks: unsafe extern "C" fn(VmbChannel, Option<SavePacket>, Option<RestorePacket>) -> Status,
        server_channel_init_set_target_interface_id = setters::VmbServerChannelInitSetTargetInterfaceId: extern "C" fn(VmbChannel, CGuid, CGuid) -> Status,
        server_channel_init_set_target_vtl = setters::VmbServerChannelInitSetTargetVtl: extern "C" fn(VmbChannel, u8) -> Status,
        server_channel_init_set_vmbus_handle = setters::VmbServerChannelInitSetVmbusHandle: extern "C" fn(VmbChannel, *mut c_void) -> Status,
    }
}

/// `KMCL_CLIENT_INTERFACE_V1`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ClientInterface {
    /// The head of every table.
    pub interface: Interface,
    /// For both endpoints.
    pub client: ClientMethods,
}

/// `KMCL_SERVER_INTERFACE_V1`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ServerInterface {
    /// The head of every table.
    pub interface: Interface,
    /// For both endpoints.
    pub client: ClientMethods,
    /// For server endpoints.
    pub server: ServerMethods,
}

/// The type of [`ClientInterface`]. Windows does not document its value: this is the library's own.
#[unsafe(no_mangle)]
pub static KMCL_CLIENT_INTERFACE_TYPE: CGuid =
    CGuid::new(Guid::from_u128(0x9f3c_1d62_7a48_4b0e_8d51_6b6d_636c_0001));
/// The type of [`ServerInterface`].
#[unsafe(no_mangle)]
pub static KMCL_SERVER_INTERFACE_TYPE: CGuid =
    CGuid::new(Guid::from_u128(0x9f3c_1d62_7a48_4b0e_8d51_6b6d_636c_0002));
/// `KMCL_CLIENT_INTERFACE_VERSION_V1` and `KMCL_SERVER_INTERFACE_VERSION_V1` (D-65).
pub const VERSION_V1: u16 = 1;

/// References to the interface.
static REFERENCES: AtomicU32 = AtomicU32::new(0);

extern "C" fn reference(_context: *mut c_void) {
    REFERENCES.fetch_add(1, Ordering::Relaxed);
}

extern "C" fn dereference(_context: *mut c_void) {
    let one_less = |count: u32| count.checked_sub(1);
    if REFERENCES.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_err() {
        violation("InterfaceDereference", "Context", "has no reference left to give back");
    }
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclInterfaceReferences() -> u32 {
    REFERENCES.load(Ordering::Relaxed)
}

/// See `kmcl.h`.
///
/// # Safety
/// `interface_type` is null or can be read; `interface` is null, or `size` bytes can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclQueryInterface(
    interface_type: *const CGuid,
    size: u16,
    version: u16,
    interface: *mut Interface,
) -> Status {
    boundary::status("KmclQueryInterface", || {
        // SAFETY: null or readable by the caller's promise.
        let Some(&kind) = (unsafe { interface_type.as_ref() }) else {
            return NtStatus::INVALID_PARAMETER_1;
        };
        let is_client = kind == KMCL_CLIENT_INTERFACE_TYPE;
        let needed = if is_client {
            types::size_u32::<ClientInterface>()
        } else if kind == KMCL_SERVER_INTERFACE_TYPE {
            types::size_u32::<ServerInterface>()
        } else {
            return NtStatus::NOT_SUPPORTED;
        };
        if version != VERSION_V1 {
            return NtStatus::NOT_SUPPORTED;
        }
        if u32::from(size) != needed {
            return NtStatus::INVALID_BUFFER_SIZE;
        }
        if interface.is_null() {
            return NtStatus::INVALID_PARAMETER_4;
        }
        let head =
            Interface { size, version, context: core::ptr::null_mut(), reference, dereference };
        let (client, server) = (CLIENT_METHODS, SERVER_METHODS);
        // SAFETY: not null, and as large as the table by `size` and the caller's promise.
        unsafe {
            if is_client {
                let table = ClientInterface { interface: head, client };
                interface.cast::<ClientInterface>().write_unaligned(table);
            } else {
                let table = ServerInterface { interface: head, client, server };
                interface.cast::<ServerInterface>().write_unaligned(table);
            }
        }
        reference(core::ptr::null_mut());
        NtStatus::SUCCESS
    })
}
