//! A clock for devices, which have none of their own.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use kmcl_worker::Source;
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::Waited;
use crate::vm::VmError;
use crate::workers::Workers;

/// Something that is done again and again.
pub(super) struct Timer<F> {
    timer: Arc<OwnedFd>,
    due: F,
}

impl<F: Fn() + Send + Sync + 'static> Timer<F> {
    /// Has a worker call `due` once each `period`, until what is returned is dropped.
    pub(super) fn every(
        period: Duration,
        workers: &Arc<Workers>,
        due: F,
    ) -> Result<Waited, VmError> {
        let failed = |source| VmError::Driver { what: "a timer", source };
        let timer = Arc::new(make(period).map_err(|errno| failed(errno.into()))?);
        let source = Arc::new(Self { timer: Arc::clone(&timer), due });
        let source = workers.add_source(timer, source).map_err(failed)?;
        Ok(Waited { workers: Arc::clone(workers), source })
    }
}

fn make(period: Duration) -> Result<OwnedFd, Errno> {
    let timer =
        timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
    let period = Timespec {
        tv_sec: i64::try_from(period.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(period.subsec_nanos()),
    };
    let each = Itimerspec { it_interval: period, it_value: period };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &each)?;
    Ok(timer)
}

impl<F: Fn() + Send + Sync> Source for Timer<F> {
    fn ready(&self) -> bool {
        // A worker calls once at the beginning, too: before the first time it is due.
        if rustix::io::read(&self.timer, &mut [0; 8]).is_ok() {
            (self.due)();
        }
        false
    }
}
