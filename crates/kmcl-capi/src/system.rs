//! Buses, workers and devices: what a channel of a C driver lives on.
#![allow(unsafe_code, reason = "exports functions, and writes where C says")]

use core::ffi::{CStr, c_char, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use kmcl::NtStatus;
use kmcl::bus::{Bus, ClientLink, Endpoint, Offer, ServerLink, Target};
use kmcl::loopback::LoopbackBus;
use kmcl_worker::Worker;

use crate::boundary::{self, guarded};
use crate::handle::{Content, Found, Handle, Kind, Table};
use crate::types::{DeviceObject, KmclBus, KmclWorker, Status};
use crate::unix_bus::UnixBus;
use crate::verifier::violation;

/// What a handle of this module names.
#[derive(Clone)]
enum Object {
    Bus(Arc<dyn Bus>),
    /// One at a socket; a bus like any other for channels.
    UnixBus(Arc<UnixBus>),
    Worker(Arc<Worker>),
    Device(Arc<Device>),
}

#[derive(Default)]
struct ObjectSlot(Option<Object>);
impl Content for ObjectSlot {
    const KIND: Kind = Kind::Object;
    type Shared = ();
}

static OBJECTS: Table<ObjectSlot> = Table::new();

fn register(object: Object) -> Result<Handle, NtStatus> {
    let mut taken = OBJECTS.take().ok_or(NtStatus::INSUFFICIENT_RESOURCES)?;
    taken.content().0 = Some(object);
    Ok(taken.open().handle())
}

fn find(handle: Handle) -> Option<Object> {
    OBJECTS.find(handle).and_then(Found::claim).and_then(|claim| claim.0.clone())
}

fn let_go(handle: Handle) -> Option<Object> {
    let mut claim = OBJECTS.find(handle)?.claim()?;
    let object = claim.0.take();
    if let Some(taken) = claim.end() {
        OBJECTS.give_back(&taken);
    }
    object
}

/// What a channel belongs to.
pub(crate) struct Device {
    pub(crate) bus: Option<Arc<dyn Bus>>,
    pub(crate) worker: Option<Arc<Worker>>,
}

pub(crate) fn device(device: DeviceObject) -> Option<Arc<Device>> {
    match find(Handle::from_pointer(device)) {
        Some(Object::Device(device)) => Some(device),
        _ => None,
    }
}

/// The bus of a handle, of either kind that Windows knows.
pub(crate) fn bus(handle: *mut c_void) -> Option<Arc<dyn Bus>> {
    match find(Handle::from_pointer(handle)) {
        Some(Object::Bus(bus)) => Some(bus),
        Some(Object::UnixBus(unix)) => Some(Arc::clone(&unix.bus)),
        _ => None,
    }
}

/// The bus at a socket that a handle names.
pub(crate) fn unix_bus(handle: KmclBus) -> Option<Arc<UnixBus>> {
    match find(Handle::from_pointer(handle)) {
        Some(Object::UnixBus(bus)) => Some(bus),
        _ => None,
    }
}

pub(crate) fn worker(handle: KmclWorker) -> Option<Arc<Worker>> {
    match find(Handle::from_pointer(handle)) {
        Some(Object::Worker(worker)) => Some(worker),
        _ => None,
    }
}

/// Gives a bus that Rust made to C drivers: a VMM's, a simulator's. The handle is let go with `KmclClose`.
///
/// # Errors
/// [`NtStatus::INSUFFICIENT_RESOURCES`] when no handle is left.
pub fn register_bus(bus: Arc<dyn Bus>) -> Result<KmclBus, NtStatus> {
    register(Object::Bus(bus)).map(Handle::to_pointer)
}

/// The bus of a channel, which may be named after the channel was made.
#[derive(Default)]
pub(crate) struct LateBus(Mutex<Option<Arc<dyn Bus>>>);

impl LateBus {
    pub(crate) fn set(&self, bus: Option<Arc<dyn Bus>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = bus;
    }

    fn get(&self) -> Result<Arc<dyn Bus>, NtStatus> {
        let bus = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        bus.ok_or(NtStatus::INVALID_DEVICE_STATE)
    }
}

impl Bus for LateBus {
    fn offer(&self, offer: Offer, endpoint: Endpoint) -> Result<Box<dyn ServerLink>, NtStatus> {
        self.get()?.offer(offer, endpoint)
    }

    fn bind(&self, target: Target, endpoint: Endpoint) -> Result<Box<dyn ClientLink>, NtStatus> {
        self.get()?.bind(target, endpoint)
    }
}

/// Registers `object` and writes its handle to `*out`.
///
/// # Safety
/// `out` can be written.
unsafe fn hand_out<T>(object: Object, out: *mut *mut T) -> NtStatus {
    match register(object) {
        Ok(handle) => {
            // SAFETY: the caller's promise.
            unsafe { out.write(handle.to_pointer()) };
            NtStatus::SUCCESS
        }
        Err(status) => status,
    }
}

/// Registers a bus at a socket and writes its handle to `*out`.
///
/// # Safety
/// `out` can be written.
pub(crate) unsafe fn hand_out_unix_bus(bus: UnixBus, out: *mut KmclBus) -> NtStatus {
    // SAFETY: the caller's promise.
    unsafe { hand_out(Object::UnixBus(Arc::new(bus)), out) }
}

/// See `kmcl.h`.
///
/// # Safety
/// `bus` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclLoopbackCreate(memory_bytes: u64, bus: *mut KmclBus) -> Status {
    boundary::status("KmclLoopbackCreate", || {
        if bus.is_null() {
            return NtStatus::invalid_parameter(2);
        }
        match LoopbackBus::new(memory_bytes) {
            // SAFETY: not null; the caller's promise.
            Ok(loopback) => unsafe { hand_out(Object::Bus(loopback), bus) },
            Err(error) => {
                tracing::error!(%error, "no memory for a loopback bus");
                NtStatus::invalid_parameter(1)
            }
        }
    })
}

/// See `kmcl.h`.
///
/// # Safety
/// `name` is null or a string that ends in a zero; `worker` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclWorkerCreate(name: *const c_char, worker: *mut KmclWorker) -> Status {
    boundary::status("KmclWorkerCreate", || {
        if worker.is_null() {
            return NtStatus::invalid_parameter(2);
        }
        let name = match name.is_null() {
            true => "kmcl".into(),
            // SAFETY: not null, and a string by the caller's promise.
            false => unsafe { CStr::from_ptr(name) }.to_string_lossy(),
        };
        match Worker::spawn(&name) {
            // SAFETY: not null; the caller's promise.
            Ok(made) => unsafe { hand_out(Object::Worker(Arc::new(made)), worker) },
            Err(error) => {
                tracing::error!(%error, "no thread for a worker");
                NtStatus::INSUFFICIENT_RESOURCES
            }
        }
    })
}

/// See `kmcl.h`.
///
/// # Safety
/// `device` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclDeviceCreate(
    bus: KmclBus,
    worker: KmclWorker,
    device: *mut DeviceObject,
) -> Status {
    boundary::status("KmclDeviceCreate", || {
        let found_bus = self::bus(bus.cast());
        let found_worker = self::worker(worker);
        if !bus.is_null() && found_bus.is_none() {
            return NtStatus::invalid_parameter(1);
        }
        if !worker.is_null() && found_worker.is_none() {
            return NtStatus::invalid_parameter(2);
        }
        if device.is_null() {
            return NtStatus::invalid_parameter(3);
        }
        let made = Device { bus: found_bus, worker: found_worker };
        // SAFETY: not null; the caller's promise.
        unsafe { hand_out(Object::Device(Arc::new(made)), device) }
    })
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclDeviceDelete(device: DeviceObject) {
    const NAME: &str = "KmclDeviceDelete";
    guarded(NAME, (), || match find(Handle::from_pointer(device)) {
        Some(Object::Device(_)) => drop(let_go(Handle::from_pointer(device))),
        _ => violation(NAME, "Device", "names no device"),
    });
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclClose(handle: *mut c_void) {
    const NAME: &str = "KmclClose";
    guarded(NAME, (), || match find(Handle::from_pointer(handle)) {
        Some(Object::Bus(_) | Object::UnixBus(_) | Object::Worker(_)) => {
            drop(let_go(Handle::from_pointer(handle)))
        }
        _ => violation(NAME, "Handle", "names no bus and no worker"),
    });
}

/// VmbConvertVmbusHandleToKernelHandle: another handle of the same bus, closed by the caller.
///
/// # Safety
/// `kernel_handle` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbConvertVmbusHandleToKernelHandle(
    vmbus_handle: *mut c_void,
    kernel_handle: *mut *mut c_void,
) -> Status {
    boundary::status("VmbConvertVmbusHandleToKernelHandle", || {
        let Some(bus) = bus(vmbus_handle) else { return NtStatus::INVALID_HANDLE };
        if kernel_handle.is_null() {
            return NtStatus::invalid_parameter(2);
        }
        // SAFETY: not null; the caller's promise.
        unsafe { hand_out(Object::Bus(bus), kernel_handle) }
    })
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclVersion() -> u32 {
    fn part(text: &str) -> u32 {
        text.parse().unwrap_or(0)
    }
    part(env!("CARGO_PKG_VERSION_MAJOR")) << 16
        | part(env!("CARGO_PKG_VERSION_MINOR")) << 8
        | part(env!("CARGO_PKG_VERSION_PATCH"))
}
