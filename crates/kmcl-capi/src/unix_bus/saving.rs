//! A bus and its channels, saved to a file: whole, or not at all.
#![allow(unsafe_code, reason = "exports a function, and reads where C says")]

use core::ffi::{c_char, c_void};
use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::Path;

use kmcl::{NtStatus, SaveOptions};
use saved_state::FormatVersion;
use saved_state::file::FileWriter;
use saved_state::text::Producer;

use super::device_state::{DeviceStateSave, MAX_DEVICE_STATE};
use super::{Held, State, path, with_bus};
use crate::channel::{lock, named};
use crate::types::{self, KmclBus, Status, VmbChannel};

/// Most channels of a saved bus: more than a device has.
const MAX_CHANNELS: u32 = 1024;

/// See `kmcl.h`.
///
/// # Safety
/// `channels` is null or has `count` entries; `device_state` is null or has `device_state_size` bytes;
/// `state_path` is null or a string that ends in a zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn KmclUnixBusSave(
    bus: KmclBus,
    channels: *const VmbChannel,
    count: u32,
    device_state: *const c_void,
    device_state_size: u32,
    state_path: *const c_char,
) -> Status {
    const NAME: &str = "KmclUnixBusSave";
    with_bus(NAME, bus, |it| {
        if count > MAX_CHANNELS || (channels.is_null() && count != 0) {
            return NtStatus::INVALID_PARAMETER_2;
        }
        let channels = match count {
            0 => &[],
            // SAFETY: not null, and as long by the caller's promise.
            count => unsafe { core::slice::from_raw_parts(channels, count as usize) },
        };
        // SAFETY: the caller's promise.
        let Some(device_state) = (unsafe { types::bytes(device_state, device_state_size) }) else {
            return NtStatus::INVALID_PARAMETER_4;
        };
        if device_state.len() > MAX_DEVICE_STATE {
            return NtStatus::invalid_parameter(5);
        }
        // SAFETY: the caller's promise.
        let Some(path) = (unsafe { path(state_path) }) else {
            return NtStatus::invalid_parameter(6);
        };
        let state = lock(&it.state);
        let State::Held(held) = &*state else { return NtStatus::INVALID_DEVICE_STATE };
        match save(NAME, held, channels, device_state, &path) {
            Ok(()) => NtStatus::SUCCESS,
            Err(status) => status,
        }
    })
}

fn save(
    function: &'static str,
    held: &Held,
    channels: &[VmbChannel],
    device_state: &[u8],
    path: &Path,
) -> Result<(), NtStatus> {
    let failed = |error: &dyn std::fmt::Display| {
        tracing::error!(%error, "a bus cannot be saved");
        NtStatus::UNSUCCESSFUL
    };
    const PRODUCER: &str = concat!("kmcl-capi ", env!("CARGO_PKG_VERSION"));
    let producer = Producer::new(PRODUCER).unwrap_or(Producer::EMPTY);
    let options = SaveOptions { format: FormatVersion::NEWEST, producer };
    let mut file = FileWriter::new(options.format, options.producer);
    let still = held.still.as_ref().ok_or(NtStatus::INVALID_DEVICE_STATE)?;
    file.add("connection", 0, still.save(&options).map_err(|error| failed(&error))?);
    file.add("bus", 0, still.bus().save(&options).map_err(|error| failed(&error))?);
    let device = DeviceStateSave::new(options.format, options.producer, device_state);
    file.add("device", 0, device.map_err(|error| failed(&error))?);
    for (index, channel) in (0..).zip(channels) {
        let it = named(function, *channel).ok_or(NtStatus::INVALID_PARAMETER_2)?;
        let frozen = lock(&it.frozen);
        let save = match &*frozen {
            Some(frozen) => frozen.save_with(&options).map_err(|error| error.status())?,
            None => return Err(NtStatus::INVALID_DEVICE_STATE),
        };
        file.add("channel", index, save);
    }
    write_whole(path, |out| file.write_to(out).map(drop).map_err(io::Error::other))
        .map_err(|error| failed(&error))
}

/// Writes a file that is there as a whole, and on the medium, or is as it was.
fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let file = File::create(&beside)?;
    let mut out = BufWriter::with_capacity(64 << 10, &file);
    let written = write(&mut out)
        .and_then(|()| out.flush())
        .and_then(|()| file.sync_all())
        .and_then(|()| std::fs::rename(&beside, path));
    drop(out);
    if let Err(error) = written {
        // What is left of it is of no use; that it stays does no harm.
        let _ = std::fs::remove_file(&beside);
        return Err(error);
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}
