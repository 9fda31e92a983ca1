//! What a client waits on: one descriptor that is readable when any of its channels has something
//! to do, whether its peer rang or its bus has news.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::time::Duration;

use kmcl::Channel;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::{Errno, read, write};

use crate::config::MAX_SUB_CHANNELS;
use crate::error::Error;

/// Stands for the wake event among the indices of channels.
const WAKE: u64 = u64::MAX;

/// Most descriptors that can be readable at once.
const MAX_EVENTS: usize = MAX_SUB_CHANNELS as usize + 2;

/// Wakes the thread that waits, from any thread.
struct WakeEvent(OwnedFd);

impl Wake for WakeEvent {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // A counter that is full is as readable as can be.
        let _ = write(&self.0, &1u64.to_ne_bytes());
    }
}

/// See the module.
pub(crate) struct Driver {
    epoll: OwnedFd,
    wake: Arc<WakeEvent>,
}

fn system(call: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::System { call, errno }
}

impl Driver {
    pub(crate) fn new() -> Result<Self, Error> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(system("epoll_create1"))?;
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(system("eventfd"))?;
        epoll::add(&epoll, &event, EventData::new_u64(WAKE), EventFlags::IN)
            .map_err(system("epoll_ctl"))?;
        Ok(Self { epoll, wake: Arc::new(WakeEvent(event)) })
    }

    /// Waits on `channel` from now on, too; `index` is what [`Self::wait`] calls it.
    pub(crate) fn add(&self, index: usize, channel: &Channel) -> Result<(), Error> {
        let doorbell = channel.doorbell_fd().map_err(|error| Error::System {
            call: "eventfd",
            errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
        })?;
        epoll::add(&self.epoll, doorbell, EventData::new_u64(index as u64), EventFlags::IN)
            .map_err(system("epoll_ctl"))?;
        channel.set_waker(Waker::from(Arc::clone(&self.wake)));
        Ok(())
    }

    /// Waits until there is something to do, at most `limit`, and quiets what rang.
    pub(crate) fn wait(&self, limit: Duration, channels: &[Channel]) -> Result<(), Error> {
        let limit = Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        };
        let none = epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) };
        let mut events = [none; MAX_EVENTS];
        let ready = match epoll::wait(&self.epoll, &mut events[..], Some(&limit)) {
            Ok(ready) => ready,
            Err(Errno::INTR) => 0, // the caller looks at its clock and comes back
            Err(errno) => return Err(system("epoll_wait")(errno)),
        };
        for event in events.iter().take(ready) {
            match event.data.u64() {
                WAKE => {
                    // Empty when somebody else was quicker; either way it is quiet now.
                    let _ = read(&self.wake.0, &mut [0u8; 8]);
                }
                index => {
                    let channel = usize::try_from(index).ok().and_then(|index| channels.get(index));
                    if let Some(channel) = channel {
                        channel.acknowledge();
                    }
                }
            }
        }
        Ok(())
    }
}

impl AsFd for Driver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
