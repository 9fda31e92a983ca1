//! The C types, as the headers have them. Offsets and sizes are compared with the headers' by a test.
#![allow(unsafe_code, reason = "turns pointers and lengths from C into slices")]

use core::ffi::c_void;
use core::marker::{PhantomData, PhantomPinned};

use kmcl::Guid;

/// What an opaque handle points to, as far as C knows: nothing can be reached through it.
#[repr(C)]
pub struct Opaque<Kind> {
    none: [u8; 0],
    marker: PhantomData<(Kind, *mut u8, PhantomPinned)>,
}

/// Marks handles of channels.
pub enum ChannelKind {}
/// Marks handles of packets.
pub enum PacketKind {}
/// Marks handles of completion contexts.
pub enum CompletionKind {}
/// Marks handles of devices.
pub enum DeviceKind {}
/// Marks handles of buses.
pub enum BusKind {}
/// Marks handles of workers.
pub enum WorkerKind {}

/// `VMBCHANNEL`
pub type VmbChannel = *mut Opaque<ChannelKind>;
/// `VMBPACKET`
pub type VmbPacket = *mut Opaque<PacketKind>;
/// `VMBPACKETCOMPLETION`
pub type VmbPacketCompletion = *mut Opaque<CompletionKind>;
/// `PDEVICE_OBJECT`
pub type DeviceObject = *mut Opaque<DeviceKind>;
/// `KMCL_BUS`
pub type KmclBus = *mut Opaque<BusKind>;
/// `KMCL_WORKER`
pub type KmclWorker = *mut Opaque<WorkerKind>;
/// `NTSTATUS`
pub type Status = i32;

/// `GUID`: the bytes are those of [`Guid`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct CGuid {
    /// First group, little-endian in memory.
    pub data1: u32,
    /// Second group.
    pub data2: u16,
    /// Third group.
    pub data3: u16,
    /// The last two groups in reading order.
    pub data4: [u8; 8],
}

impl CGuid {
    pub(crate) const fn new(guid: Guid) -> Self {
        let [a, b, c, d, e, f, g, h, data4 @ ..] = guid.to_bytes();
        Self {
            data1: u32::from_le_bytes([a, b, c, d]),
            data2: u16::from_le_bytes([e, f]),
            data3: u16::from_le_bytes([g, h]),
            data4,
        }
    }

    pub(crate) const fn guid(self) -> Guid {
        Guid::from_fields(self.data1, self.data2, self.data3, self.data4)
    }
}

/// `UNICODE_STRING`
#[repr(C)]
pub struct UnicodeString {
    /// Bytes of text.
    pub length: u16,
    /// Bytes of buffer.
    pub maximum_length: u16,
    /// UTF-16 in the machine's byte order.
    pub buffer: *mut u16,
}

/// `MDL`; page frame numbers follow it.
#[repr(C)]
pub struct Mdl {
    /// The next of the chain.
    pub next: *mut Mdl,
    /// Bytes of the structure and its page frame numbers, as far as 16 bits say it.
    pub size: i16,
    /// `MDL_*`
    pub flags: i16,
    /// What it belongs to: a handle, or 0.
    pub process: u64,
    /// Where it is mapped, if it is.
    pub mapped_system_va: *mut c_void,
    /// The page that the bytes start in, for memory of this process.
    pub start_va: *mut c_void,
    /// Bytes described.
    pub byte_count: u32,
    /// Where they start in the first page.
    pub byte_offset: u32,
}

/// `INTERFACE`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Interface {
    /// Bytes of the table.
    pub size: u16,
    /// Its version.
    pub version: u16,
    /// To be passed to the two functions.
    pub context: *mut c_void,
    /// Takes a reference.
    pub reference: extern "C" fn(*mut c_void),
    /// Gives one back.
    pub dereference: extern "C" fn(*mut c_void),
}

/// `PFN_VMB_CHANNEL_OPENED`
pub type Opened = unsafe extern "C" fn(VmbChannel) -> Status;
/// The other state-change callbacks.
pub type StateChanged = unsafe extern "C" fn(VmbChannel);
/// `PFN_VMB_CHANNEL_PROCESS_PACKET`
pub type ProcessPacket =
    unsafe extern "C" fn(VmbChannel, VmbPacketCompletion, *mut c_void, u32, u32);
/// `PFN_VMB_CHANNEL_PROCESSING_COMPLETE`
pub type ProcessingComplete = unsafe extern "C" fn(VmbChannel, u32);
/// `PFN_VMB_CHANNEL_SAVE_PACKET`
pub type SavePacket =
    unsafe extern "C" fn(VmbChannel, VmbPacket, *mut c_void, u32, *mut u32) -> Status;
/// `PFN_VMB_CHANNEL_RESTORE_PACKET`
pub type RestorePacket =
    unsafe extern "C" fn(VmbChannel, *mut c_void, u32, *mut c_void, u32) -> Status;
/// `PFN_VMB_PACKET_COMPLETION_ROUTINE`
pub type CompletionRoutine = unsafe extern "C" fn(VmbPacket, Status, *mut c_void, u32);
/// `PFN_VMB_CHANNEL_PNP_FAILURE`
pub type PnpFailure = unsafe extern "C" fn(VmbChannel, Status);
/// `EVT_KMCL_CHANNEL_RESUME_PACKET`
pub type ResumePacket = unsafe extern "C" fn(
    VmbChannel,
    VmbPacketCompletion,
    *mut c_void,
    u32,
    u32,
    u32,
    *mut c_void,
    u32,
);

/// `VMB_CHANNEL_STATE_CHANGE_CALLBACKS`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct StateChangeCallbacks {
    /// 1
    pub version: u32,
    /// Bytes of this structure.
    pub size: u32,
    /// EvtVmbChannelOpened
    pub opened: Option<Opened>,
    /// EvtVmbChannelClosed
    pub closed: Option<StateChanged>,
    /// EvtVmbChannelSuspend
    pub suspend: Option<StateChanged>,
    /// EvtVmbChannelStarted
    pub started: Option<StateChanged>,
    /// EvtVmbChannelPostStarted
    pub post_started: Option<StateChanged>,
}

/// `KMCL_FREEZE_CALLBACKS`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct FreezeCallbacks {
    /// Bytes of this structure.
    pub size: u32,
    /// The channel was frozen.
    pub freeze: Option<StateChanged>,
    /// It goes on.
    pub thaw: Option<StateChanged>,
    /// A packet that was handed over comes again.
    pub resume_packet: Option<ResumePacket>,
}

/// `size` of a structure that C gave with its size.
#[expect(clippy::cast_possible_truncation, reason = "structures here are far below 4 GiB")]
pub(crate) const fn size_u32<T>() -> u32 {
    size_of::<T>() as u32
}

/// The bytes that C gave, or `None` for a null pointer with a length.
///
/// # Safety
/// `bytes` is null, or `len` bytes can be read there for `'a` and nobody changes them.
#[inline]
pub(crate) unsafe fn bytes<'a>(bytes: *const c_void, len: u32) -> Option<&'a [u8]> {
    if len == 0 {
        return Some(&[]);
    }
    if bytes.is_null() {
        return None;
    }
    // SAFETY: not null, and the caller's promise.
    Some(unsafe { core::slice::from_raw_parts(bytes.cast(), len as usize) })
}

/// The buffer that C gave, or `None` for a null pointer with a length.
///
/// # Safety
/// `bytes` is null, or `len` bytes can be written there for `'a` and nobody else touches them.
pub(crate) unsafe fn bytes_mut<'a>(bytes: *mut c_void, len: u32) -> Option<&'a mut [u8]> {
    if len == 0 {
        return Some(&mut []);
    }
    if bytes.is_null() {
        return None;
    }
    // SAFETY: not null, and the caller's promise.
    Some(unsafe { core::slice::from_raw_parts_mut(bytes.cast(), len as usize) })
}
