//! A bus whose guest is another process, at a Unix socket: served, held still and saved, and restored in
//! another process.
//!
//! ```text
//! Create ──► Serving ── Hold ──► Held ── Save ──► … ── MoveAway ──► Gone
//!               ▲  ▲               │ Release
//!               │  └───────────────┘
//! Restore ──► Restoring ── RestoreChannel each ── Finish ──► Serving
//! ```
#![allow(unsafe_code, reason = "exports functions, and writes where C says")]

mod device_state;
pub mod restoring;
pub mod saving;

use core::ffi::{CStr, c_char};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use kmcl::NtStatus;
use kmcl::bus::Bus;
use kmcl_worker::{Source, SourceId, Worker};
use vmbus_unix::{BindError, HeldHost, HoldError, UnixHost};

use self::restoring::Restoring;
use crate::boundary::{self, guarded};
use crate::channel::lock;
use crate::context::must_be_passive;
use crate::system;
use crate::types::{KmclBus, KmclWorker, Status};
use crate::verifier::violation;

/// A bus of this module, as C's handle stands for it.
pub(crate) struct UnixBus {
    /// What channels live on.
    pub(crate) bus: Arc<dyn Bus>,
    /// Drives the socket.
    worker: Arc<Worker>,
    state: Mutex<State>,
}

enum State {
    Serving(Serving),
    Held(Held),
    Restoring(Box<Restoring>),
    /// Its guest goes on elsewhere; or it is between two states.
    Gone,
}

/// A host that a worker drives; taken from it when dropped.
struct Serving {
    host: Arc<UnixHost>,
    worker: Arc<Worker>,
    source: SourceId,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.worker.remove_source(self.source);
    }
}

/// A host that stands still. Fields are dropped in this order: what borrows from the host goes first.
struct Held {
    still: Option<HeldHost<'static>>,
    serving: Serving,
}

impl Held {
    fn new(serving: Serving) -> Result<Self, (Serving, HoldError)> {
        // SAFETY: the host is in an `Arc`, so that it stays where it is, and `serving` has one as long as
        // `still` exists: both are in one `Held`, which drops `still` first and never gives it away.
        let host: &'static UnixHost = unsafe { &*Arc::as_ptr(&serving.host) };
        match host.hold() {
            Ok(still) => Ok(Self { still: Some(still), serving }),
            Err(error) => Err((serving, error)),
        }
    }

    /// The host goes on.
    fn release(self) -> Serving {
        let Self { still, serving } = self;
        drop(still);
        serving
    }

    /// The guest goes on elsewhere.
    fn move_away(self) {
        let Self { still, serving } = self;
        if let Some(still) = still {
            still.move_away();
        }
        drop(serving);
    }
}

/// Control messages of the guest.
struct Messages(Arc<UnixHost>);

impl Source for Messages {
    fn ready(&self) -> bool {
        self.0.ready()
    }
}

impl Serving {
    fn new(host: UnixHost, worker: &Arc<Worker>) -> Result<Self, NtStatus> {
        let host = Arc::new(host);
        let messages = Arc::new(Messages(Arc::clone(&host)));
        let source = worker.add_source(Arc::clone(&host), messages).map_err(|error| {
            tracing::error!(%error, "a worker does not take a bus");
            NtStatus::INSUFFICIENT_RESOURCES
        })?;
        Ok(Self { host, worker: Arc::clone(worker), source })
    }
}

/// The path that C gave, if it gave one.
///
/// # Safety
/// `path` is null or a string that ends in a zero.
unsafe fn path(path: *const c_char) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt as _;
    if path.is_null() {
        return None;
    }
    // SAFETY: not null, and a string by the caller's promise.
    let bytes = unsafe { CStr::from_ptr(path) }.to_bytes();
    (!bytes.is_empty()).then(|| std::ffi::OsStr::from_bytes(bytes).into())
}

fn bind_status(error: &BindError) -> NtStatus {
    tracing::error!(%error, "a bus cannot be served");
    match error {
        BindError::InUse { .. } => NtStatus::OBJECT_NAME_COLLISION,
        BindError::NotASocket { .. } | BindError::PathTooLong { .. } => {
            NtStatus::INVALID_PARAMETER_1
        }
        _ => NtStatus::UNSUCCESSFUL,
    }
}

/// Runs `call` for a bus of this module, on a thread that may sleep.
fn with_bus(
    function: &'static str,
    bus: KmclBus,
    call: impl FnOnce(&UnixBus) -> NtStatus,
) -> Status {
    boundary::status(function, || {
        must_be_passive(function);
        match system::unix_bus(bus) {
            Some(bus) => call(&bus),
            None => {
                violation(function, "Bus", "names no bus at a socket");
                NtStatus::INVALID_PARAMETER_1
            }
        }
    })
}

/// See `kmcl.h`.
///
/// # Safety
/// `socket_path` is null or a string that ends in a zero; `bus` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclUnixBusCreate(
    socket_path: *const c_char,
    worker: KmclWorker,
    bus: *mut KmclBus,
) -> Status {
    const NAME: &str = "KmclUnixBusCreate";
    boundary::status(NAME, || {
        must_be_passive(NAME);
        // SAFETY: the caller's promise.
        let Some(path) = (unsafe { path(socket_path) }) else {
            return NtStatus::INVALID_PARAMETER_1;
        };
        let Some(worker) = system::worker(worker) else { return NtStatus::INVALID_PARAMETER_2 };
        if bus.is_null() {
            return NtStatus::INVALID_PARAMETER_3;
        }
        let host = match UnixHost::bind(path) {
            Ok(host) => host,
            Err(error) => return bind_status(&error),
        };
        let made: Arc<dyn Bus> = Arc::new(host.bus().clone());
        let state = match Serving::new(host, &worker) {
            Ok(serving) => Mutex::new(State::Serving(serving)),
            Err(status) => return status,
        };
        // SAFETY: not null; the caller's promise.
        unsafe { system::hand_out_unix_bus(UnixBus { bus: made, worker, state }, bus) }
    })
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclUnixBusHold(bus: KmclBus) -> Status {
    with_bus("KmclUnixBusHold", bus, |it| {
        let mut state = lock(&it.state);
        let (next, status) = match std::mem::replace(&mut *state, State::Gone) {
            State::Serving(serving) => match Held::new(serving) {
                Ok(held) => (State::Held(held), NtStatus::SUCCESS),
                Err((serving, error)) => {
                    tracing::error!(%error, "a bus cannot be held");
                    (State::Serving(serving), NtStatus::INVALID_DEVICE_STATE)
                }
            },
            other => (other, NtStatus::INVALID_DEVICE_STATE),
        };
        *state = next;
        status
    })
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclUnixBusRelease(bus: KmclBus) {
    const NAME: &str = "KmclUnixBusRelease";
    guarded(NAME, (), || {
        must_be_passive(NAME);
        let released = system::unix_bus(bus).is_some_and(|it| {
            let mut state = lock(&it.state);
            let (next, released) = match std::mem::replace(&mut *state, State::Gone) {
                State::Held(held) => (State::Serving(held.release()), true),
                other => (other, false),
            };
            *state = next;
            released
        });
        if !released {
            violation(NAME, "Bus", "is not held");
        }
    });
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclUnixBusMoveAway(bus: KmclBus) -> Status {
    with_bus("KmclUnixBusMoveAway", bus, |it| {
        let mut state = lock(&it.state);
        match std::mem::replace(&mut *state, State::Gone) {
            State::Held(held) => {
                drop(state);
                held.move_away();
                NtStatus::SUCCESS
            }
            other => {
                *state = other;
                NtStatus::INVALID_DEVICE_STATE
            }
        }
    })
}
