//! Freezing, for C: an extension beside the documented pause.
#![allow(unsafe_code, reason = "exports functions")]

use std::time::Duration;

use kmcl::NtStatus;

use crate::boundary::guarded;
use crate::channel::{lock, named, passive};
use crate::context::{must_be_passive, outside_callbacks};
use crate::types::{Status, VmbChannel};
use crate::verifier::violation;

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclChannelFreeze(channel: VmbChannel) -> Status {
    const NAME: &str = "KmclChannelFreeze";
    passive(NAME, channel, |it| {
        if !outside_callbacks(NAME, it.handle) {
            return NtStatus::INVALID_DEVICE_STATE;
        }
        match it.channel.freeze() {
            Ok(frozen) => {
                *lock(&it.frozen) = Some(frozen);
                NtStatus::SUCCESS
            }
            Err(error) => error.status(),
        }
    })
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclChannelRunning(channel: VmbChannel) -> u32 {
    const NAME: &str = "KmclChannelRunning";
    guarded(NAME, 0, || {
        let it = named(NAME, channel);
        it.and_then(|it| lock(&it.frozen).as_ref().map(kmcl::Frozen::running)).unwrap_or(0)
    })
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclChannelWaitSettled(channel: VmbChannel, milliseconds: u32) -> u8 {
    const NAME: &str = "KmclChannelWaitSettled";
    guarded(NAME, 0, || {
        must_be_passive(NAME);
        let Some(it) = named(NAME, channel) else { return 0 };
        if !outside_callbacks(NAME, it.handle) {
            return 0;
        }
        let limit = Duration::from_millis(u64::from(milliseconds));
        // Others may look at the channel meanwhile, but not end its freeze.
        let settled = lock(&it.frozen).as_ref().is_some_and(|frozen| frozen.wait(Some(limit)));
        u8::from(settled)
    })
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclChannelThaw(channel: VmbChannel) {
    const NAME: &str = "KmclChannelThaw";
    guarded(NAME, (), || {
        must_be_passive(NAME);
        let Some(it) = named(NAME, channel) else { return };
        if !outside_callbacks(NAME, it.handle) {
            return;
        }
        let frozen = lock(&it.frozen).take();
        match frozen {
            Some(frozen) => frozen.thaw(),
            None => violation(NAME, "Channel", "is not frozen"),
        }
    });
}

/// See `kmcl.h`.
#[unsafe(no_mangle)]
pub extern "C" fn KmclChannelMoveAway(channel: VmbChannel) -> Status {
    const NAME: &str = "KmclChannelMoveAway";
    passive(NAME, channel, |it| {
        if !outside_callbacks(NAME, it.handle) {
            return NtStatus::INVALID_DEVICE_STATE;
        }
        let frozen = lock(&it.frozen).take();
        match frozen {
            Some(frozen) => {
                frozen.move_away();
                NtStatus::SUCCESS
            }
            None => NtStatus::INVALID_DEVICE_STATE,
        }
    })
}
