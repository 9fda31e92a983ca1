//! A timer that can be polled.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// Becomes readable once, after a while. Nobody but this process has it.
#[derive(Debug)]
pub(crate) struct Timer(OwnedFd);

impl Timer {
    pub(crate) fn new() -> Result<Self, Errno> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        timerfd_create(TimerfdClockId::Monotonic, flags).map(Self)
    }

    /// Goes off after `delay`, in place of whatever it was set to; never, if `None`.
    pub(crate) fn set(&self, delay: Option<Duration>) -> Result<(), Errno> {
        let nothing = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = match delay {
            None => nothing,
            // Zero would mean never.
            Some(delay) => Timespec::try_from(delay.max(Duration::from_nanos(1)))
                .unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 }),
        };
        let spec = Itimerspec { it_interval: nothing, it_value: value };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &spec).map(drop)
    }

    /// Makes it quiet.
    pub(crate) fn acknowledge(&self) {
        let mut count = [0; 8];
        let _expirations = rustix::io::read(&self.0, &mut count); // non-blocking, and ours alone
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
