//! A bus and its channels out of a file.
#![allow(unsafe_code, reason = "exports functions, and writes where C says")]

use core::ffi::{c_char, c_void};
use std::fs::File;
use std::io::{BufReader, Seek as _};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kmcl::bus::Bus;
use kmcl::{NtStatus, RestoreFromError};
use saved_state::StreamKind;
use saved_state::file::{FileError, FileReader, check};
use saved_state::inspect::ALL_KINDS;
use vmbus_unix::{FinishError, HostOptions, NotFinished, RestoreError, RestoringHost, UnixHost};

use super::{Serving, State, UnixBus, bind_status, device_state, path, with_bus};
use crate::boundary;
use crate::channel::{lock, named};
use crate::context::must_be_passive;
use crate::system;
use crate::types::{self, KmclBus, KmclWorker, Status, VmbChannel};

/// A bus that waits for its guest and its channels.
pub(super) struct Restoring {
    /// Gone only while it is being finished.
    host: Option<RestoringHost>,
    device_state: Vec<u8>,
    /// The streams of the channels, until they are restored.
    channels: Vec<Option<Vec<u8>>>,
}

/// What a file has, all of it checked before any of it is used.
struct Saved {
    transport: Vec<u8>,
    bus: Vec<u8>,
    device_state: Vec<u8>,
    channels: Vec<Option<Vec<u8>>>,
}

impl Saved {
    fn read(path: &Path) -> Result<Self, Box<dyn std::error::Error>> {
        let mut file = BufReader::new(File::open(path)?);
        check(&mut file, ALL_KINDS)?;
        file.rewind()?;
        let mut file = FileReader::new(file)?;
        let (mut transport, mut bus, mut device) = (None, None, None);
        let mut channels = Vec::new();
        while let Some(mut stream) = file.next_stream()? {
            let kind = stream.entry().stream;
            let mut bytes = Vec::new();
            while let Some(chunk) = stream.next()? {
                bytes.extend_from_slice(chunk);
            }
            let place = match kind {
                StreamKind::TRANSPORT => &mut transport,
                StreamKind::BUS => &mut bus,
                StreamKind::DEVICE => &mut device,
                StreamKind::CHANNEL => {
                    channels.push(Some(bytes));
                    continue;
                }
                kind => return Err(format!("the state of a {kind} has no place here").into()),
            };
            if place.replace(bytes).is_some() {
                return Err(format!("the state of two of: {kind}").into());
            }
        }
        let (Some(transport), Some(bus), Some(device)) = (transport, bus, device) else {
            return Err("a connection, a bus or a device is missing".into());
        };
        let device_state = device_state::read(&device)?;
        Ok(Self { transport, bus, device_state, channels })
    }
}

/// See `kmcl.h`.
///
/// # Safety
/// Both paths are null or strings that end in a zero; `bus` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclUnixBusRestore(
    socket_path: *const c_char,
    state_path: *const c_char,
    worker: KmclWorker,
    bus: *mut KmclBus,
) -> Status {
    const NAME: &str = "KmclUnixBusRestore";
    boundary::status(NAME, || {
        must_be_passive(NAME);
        // SAFETY: the caller's promises.
        let (socket, state) = unsafe { (path(socket_path), path(state_path)) };
        let Some(socket) = socket else { return NtStatus::INVALID_PARAMETER_1 };
        let Some(state) = state else { return NtStatus::INVALID_PARAMETER_2 };
        let Some(worker) = system::worker(worker) else { return NtStatus::INVALID_PARAMETER_3 };
        if bus.is_null() {
            return NtStatus::INVALID_PARAMETER_4;
        }
        let saved = match Saved::read(&state) {
            Ok(saved) => saved,
            Err(error) => {
                tracing::error!(%error, "a saved bus cannot be read");
                return match error.downcast_ref::<FileError>() {
                    Some(FileError::Source(_)) | None => NtStatus::UNSUCCESSFUL,
                    Some(_) => NtStatus::INVALID_PARAMETER_2,
                };
            }
        };
        let Saved { transport, bus: saved_bus, device_state, channels } = saved;
        let options = HostOptions::default();
        let host = match UnixHost::bind_restoring(socket, options, &transport, &saved_bus) {
            Ok(host) => host,
            Err(RestoreError::Bind(error)) => return bind_status(&error),
            Err(error) => {
                tracing::error!(%error, "a saved bus cannot go on");
                return NtStatus::INVALID_PARAMETER_2;
            }
        };
        let made: Arc<dyn Bus> = Arc::new(host.bus().clone());
        let restoring = Restoring { host: Some(host), device_state, channels };
        let state = Mutex::new(State::Restoring(Box::new(restoring)));
        // SAFETY: not null; the caller's promise.
        unsafe { system::hand_out_unix_bus(UnixBus { bus: made, worker, state }, bus) }
    })
}

/// Runs `call` for a bus that is being restored.
fn with_restoring(
    function: &'static str,
    bus: KmclBus,
    call: impl FnOnce(&mut Restoring) -> NtStatus,
) -> Status {
    with_bus(function, bus, |it| match &mut *lock(&it.state) {
        State::Restoring(restoring) => call(restoring),
        _ => NtStatus::INVALID_DEVICE_STATE,
    })
}

/// See `kmcl.h`.
///
/// # Safety
/// `buffer` is null or has `size` bytes to write; `needed` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclUnixBusGetDeviceState(
    bus: KmclBus,
    buffer: *mut c_void,
    size: u32,
    needed: *mut u32,
) -> Status {
    with_restoring("KmclUnixBusGetDeviceState", bus, |it| {
        // SAFETY: the caller's promise.
        let Some(buffer) = (unsafe { types::bytes_mut(buffer, size) }) else {
            return NtStatus::INVALID_PARAMETER_2;
        };
        if needed.is_null() {
            return NtStatus::INVALID_PARAMETER_4;
        }
        let len = it.device_state.len();
        // SAFETY: not null; the caller's promise.
        unsafe { needed.write(u32::try_from(len).unwrap_or(u32::MAX)) };
        match buffer.get_mut(..len) {
            Some(room) => {
                room.copy_from_slice(&it.device_state);
                NtStatus::SUCCESS
            }
            None => NtStatus::BUFFER_TOO_SMALL,
        }
    })
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclUnixBusRestoreChannel(
    bus: KmclBus,
    index: u32,
    channel: VmbChannel,
) -> Status {
    const NAME: &str = "KmclUnixBusRestoreChannel";
    with_restoring(NAME, bus, |it| {
        let Some(place) = it.channels.get_mut(index as usize) else {
            return NtStatus::INVALID_PARAMETER_2;
        };
        let Some(channel) = named(NAME, channel) else { return NtStatus::INVALID_PARAMETER_3 };
        let Some(state) = place.as_deref() else { return NtStatus::ALREADY_COMMITTED };
        match channel.channel.restore_from(state) {
            Ok(()) => {
                *place = None;
                NtStatus::SUCCESS
            }
            Err(error) => {
                tracing::error!(%error, "a channel cannot be restored");
                match error {
                    RestoreFromError::State(error) => error.status(),
                    RestoreFromError::Input(_) => NtStatus::UNSUCCESSFUL,
                }
            }
        }
    })
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclUnixBusFinishRestore(bus: KmclBus, milliseconds: u32) -> Status {
    with_bus("KmclUnixBusFinishRestore", bus, |it| {
        let deadline = Instant::now() + Duration::from_millis(milliseconds.into());
        let mut state = lock(&it.state);
        let State::Restoring(restoring) = &mut *state else {
            return NtStatus::INVALID_DEVICE_STATE;
        };
        if restoring.channels.iter().any(Option::is_some) {
            return NtStatus::DEVICE_NOT_READY;
        }
        let host = match restoring.go_on(deadline) {
            Ok(host) => host,
            Err(status) => return status,
        };
        match Serving::new(host, &it.worker) {
            Ok(serving) => {
                *state = State::Serving(serving);
                NtStatus::SUCCESS
            }
            Err(status) => {
                *state = State::Gone;
                status
            }
        }
    })
}

impl Restoring {
    /// The host, once its guest is back.
    fn go_on(&mut self, deadline: Instant) -> Result<UnixHost, NtStatus> {
        loop {
            let host = self.host.take().ok_or(NtStatus::INVALID_DEVICE_STATE)?;
            let left = deadline.saturating_duration_since(Instant::now());
            let is_back = match host.drive_until_back(left) {
                Ok(is_back) => is_back,
                Err(error) => {
                    tracing::error!(%error, "nobody can wait for a guest");
                    self.host = Some(host);
                    return Err(NtStatus::UNSUCCESSFUL);
                }
            };
            if !is_back {
                self.host = Some(host);
                return Err(NtStatus::IO_TIMEOUT);
            }
            match host.finish().map_err(|unfinished| *unfinished) {
                Ok(host) => return Ok(host),
                // It has gone again, and may come back once more.
                Err(NotFinished { restoring, why: FinishError::NoGuest }) => {
                    self.host = Some(restoring);
                    if left.is_zero() {
                        return Err(NtStatus::IO_TIMEOUT);
                    }
                }
                Err(NotFinished { restoring, why }) => {
                    tracing::error!(%why, "the guest of a saved bus cannot go on");
                    self.host = Some(restoring);
                    return Err(NtStatus::UNSUCCESSFUL);
                }
            }
        }
    }
}
