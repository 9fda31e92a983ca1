//! The guest learns the time.

use std::time::{SystemTime, UNIX_EPOCH};

use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::dialogue::{Dialogue, Message};
use super::{Clocks, Phase, TIME_SAMPLE_PERIOD, is_due};
use crate::wire::{OldTimeBody, Service, TimeBody, Version};

/// A time of day: units of 100 ns since 1601-01-01 UTC, as Windows counts.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct FileTime(pub u64);

impl FileTime {
    /// 1970-01-01 UTC.
    pub const UNIX_EPOCH: Self = Self(116_444_736_000_000_000);
}

impl From<SystemTime> for FileTime {
    /// A time that cannot be said is the nearest one that can.
    fn from(time: SystemTime) -> Self {
        let units = |nanos: u128| u64::try_from(nanos / 100).unwrap_or(u64::MAX);
        let epoch = Self::UNIX_EPOCH.0;
        Self(match time.duration_since(UNIX_EPOCH) {
            Ok(since) => epoch.saturating_add(units(since.as_nanos())),
            Err(before) => epoch.saturating_sub(units(before.duration().as_nanos())),
        })
    }
}

/// The service. The first message after the channel was opened, after a restore, and after each
/// [`Self::resync`] has the guest set its clock; the others, each [`TIME_SAMPLE_PERIOD`], tell it how
/// its clock is going.
#[derive(Clone, Copy, Debug)]
pub(super) struct TimeSync {
    pub(super) dialogue: Dialogue,
    is_sync_due: bool,
    /// Reference time of the last message.
    last: Option<u64>,
    /// The clocks of a tick that came before the rings of a restored channel.
    early: Option<Clocks>,
}

impl TimeSync {
    pub(super) fn new() -> Self {
        Self::at(Dialogue::new(Service::TimeSync))
    }

    pub(super) fn at(dialogue: Dialogue) -> Self {
        Self { dialogue, is_sync_due: true, last: None, early: None }
    }

    pub(super) fn open(&mut self) -> Message {
        self.resync();
        self.dialogue.open()
    }

    /// The guest's clock may be wrong: it was not running.
    pub(super) fn resync(&mut self) {
        (self.is_sync_due, self.early) = (true, None);
    }

    /// The restored channel has its rings. What a tick said meanwhile still holds: both clocks together
    /// tell the guest the time, whenever it reads them.
    pub(super) fn resumed(&mut self, can_send: bool) -> Option<Message> {
        self.early.take().and_then(|clocks| self.tick(clocks, can_send))
    }

    /// `can_send`: no message waits for room in the guest's ring.
    ///
    /// A message that has the guest set its clock does not wait for the answer to another: that may
    /// have been asked for before the guest stood still. As long as one waits for room there is no
    /// other, so that a guest which reads nothing is not sent more each time it is restored.
    pub(super) fn tick(&mut self, clocks: Clocks, can_send: bool) -> Option<Message> {
        let Clocks { now, reference_time } = clocks;
        if !self.dialogue.is_open && matches!(self.dialogue.phase, Phase::Agreed(_)) {
            self.early = Some(clocks);
        }
        let versions = self.dialogue.versions()?;
        let is_due = self.is_sync_due
            || !self.dialogue.is_unanswered
                && is_due(self.last, reference_time, TIME_SAMPLE_PERIOD);
        if !is_due || !can_send {
            return None;
        }
        self.last = Some(reference_time);
        let flags = match std::mem::take(&mut self.is_sync_due) {
            true => TimeBody::FLAG_SYNC,
            false => TimeBody::FLAG_SAMPLE,
        };
        let parent_time = U64::new(now.0);
        if versions.message.to_u32() >= Version::new(4, 0).to_u32() {
            let reference_time = U64::new(reference_time);
            let (leap, stratum, reserved) = (0, 0, [0; 5]);
            let body = TimeBody { parent_time, reference_time, flags, leap, stratum, reserved };
            return self.dialogue.request(body.as_bytes());
        }
        let (child_time, round_trip, reserved) = (U64::ZERO, U64::ZERO, [0; 7]);
        let body = OldTimeBody { parent_time, child_time, round_trip, flags, reserved };
        self.dialogue.request(body.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn file_time_counts_from_1601_and_ends_somewhere() {
        const EPOCH: u64 = 116_444_736_000_000_000;
        // 369 years before 1970, of which 89 were leap years.
        let before = Duration::from_secs((369 * 365 + 89) * 86_400);
        for (what, time, expected) in [
            ("1970", UNIX_EPOCH, EPOCH),
            ("1601", UNIX_EPOCH - before, 0),
            ("1600", UNIX_EPOCH - before - Duration::from_secs(1), 0),
            ("a unit", UNIX_EPOCH + Duration::from_nanos(199), EPOCH + 1),
            ("a second", UNIX_EPOCH + Duration::from_secs(1), EPOCH + 10_000_000),
            ("too far", UNIX_EPOCH + Duration::from_secs(1 << 42), u64::MAX),
        ] {
            assert_eq!(FileTime::from(time), FileTime(expected), "{what}");
        }
    }
}
