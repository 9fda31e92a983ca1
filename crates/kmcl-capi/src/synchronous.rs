//! VmbChannelSendSynchronousRequest.
#![allow(unsafe_code, reason = "exports a function, and reads and writes where C says")]

use core::ffi::c_void;
use std::time::{Duration, SystemTime};

use kmcl::{Error, Limits, NtStatus, SendFlags, Timeout};

use crate::boundary;
use crate::channel::named;
use crate::context::must_be_passive;
use crate::mdl;
use crate::types::{self, Mdl, Status, VmbChannel};

/// From the epoch of Windows, the year 1601, to that of Unix, in units of 100 ns.
const EPOCHS_APART: u64 = 116_444_736_000_000_000;

/// The convention of KeWaitForSingleObject, in units of 100 ns.
fn timeout(given: Option<i64>) -> Timeout {
    let duration = |units: u64| {
        let nanoseconds = u32::try_from(units % 10_000_000 * 100).unwrap_or(0);
        Duration::new(units / 10_000_000, nanoseconds)
    };
    match given {
        None => Timeout::Never,
        Some(0) => Timeout::Immediate,
        Some(relative) if relative < 0 => Timeout::After(duration(relative.unsigned_abs())),
        Some(absolute) => {
            let absolute = absolute.unsigned_abs();
            let since_unix = absolute.saturating_sub(EPOCHS_APART);
            let at = SystemTime::UNIX_EPOCH.checked_add(duration(since_unix));
            at.map_or(Timeout::Never, Timeout::At)
        }
    }
}

/// VmbChannelSendSynchronousRequest.
///
/// # Safety
/// `buffer` is null or has `buffer_size` bytes; `external_data_mdl` is null or a chain of MDLs;
/// `completion_buffer_size` is null or can be read and written, and `completion_buffer` is null or has as many
/// bytes as it says; `time_limit` is null or can be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn VmbChannelSendSynchronousRequest(
    channel: VmbChannel,
    buffer: *mut c_void,
    buffer_size: u32,
    external_data_mdl: *mut Mdl,
    flags: u32,
    completion_buffer: *mut c_void,
    completion_buffer_size: *mut u32,
    time_limit: *mut i64,
) -> Status {
    const NAME: &str = "VmbChannelSendSynchronousRequest";
    boundary::status(NAME, || {
        // SAFETY: null or readable by the caller's promise.
        let limit = timeout(unsafe { time_limit.as_ref() }.copied());
        let flags = SendFlags::from_bits_retain(flags);
        if limit != Timeout::Immediate || flags.contains(SendFlags::WAIT_FOR_COMPLETION) {
            must_be_passive(NAME);
        }
        let Some(it) = named(NAME, channel) else { return NtStatus::INVALID_PARAMETER_1 };
        if buffer_size > Limits::PACKET_SIZE {
            return match it.channel.state().accepts_sends() {
                true => NtStatus::INVALID_PARAMETER_3,
                false => NtStatus::DEVICE_REMOVED,
            };
        }
        // SAFETY: the caller's promise.
        let Some(message) = (unsafe { types::bytes(buffer, buffer_size) }) else {
            return NtStatus::INVALID_PARAMETER_2;
        };
        let ranges = match external_data_mdl.is_null() {
            true => None,
            // SAFETY: the caller's promise.
            false => match unsafe { mdl::ranges(external_data_mdl) } {
                Some(ranges) => Some(ranges),
                None => return NtStatus::INVALID_PARAMETER_4,
            },
        };
        // SAFETY: null or valid by the caller's promise.
        let room = unsafe { completion_buffer_size.as_ref() }.copied();
        let completion = match (completion_buffer.is_null(), room) {
            (false, None) => return NtStatus::INVALID_PARAMETER_7,
            // SAFETY: the caller's promise.
            (false, Some(room)) => unsafe { types::bytes_mut(completion_buffer, room) },
            (true, Some(room)) if !room.is_multiple_of(8) => return NtStatus::INVALID_PARAMETER_7,
            (true, _) => None,
        };
        let sent = it.channel.send_synchronous_request(
            message,
            ranges.as_deref(),
            flags,
            completion,
            limit,
        );
        let (status, written) = match sent {
            Ok(bytes) => (NtStatus::SUCCESS, u32::try_from(bytes).ok()),
            // D-48: nothing but the size comes back.
            Err(error @ Error::BufferTooSmall { needed, .. }) => (error.status(), Some(needed)),
            Err(error) => (error.status(), None),
        };
        if let (Some(written), false) = (written, completion_buffer_size.is_null()) {
            // SAFETY: not null; the caller's promise.
            unsafe { completion_buffer_size.write(written) };
        }
        status
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_limits_are_those_of_windows() {
        for (given, expected) in [
            (None, Timeout::Never),
            (Some(0), Timeout::Immediate),
            (Some(-1), Timeout::After(Duration::from_nanos(100))),
            (Some(-10_000_000), Timeout::After(Duration::from_secs(1))),
            (Some(i64::MIN), Timeout::After(Duration::new(922_337_203_685, 477_580_800))),
            (Some(116_444_736_000_000_000), Timeout::At(SystemTime::UNIX_EPOCH)),
            (
                Some(116_444_736_000_000_015),
                Timeout::At(SystemTime::UNIX_EPOCH + Duration::from_nanos(1500)),
            ),
            (Some(1), Timeout::At(SystemTime::UNIX_EPOCH)),
        ] {
            assert_eq!(timeout(given), expected, "{given:?}");
        }
    }
}
