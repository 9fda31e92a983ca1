//! What a worker runs: a channel, or a source of a device's own.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use kmcl::Channel;

use crate::PACKETS_PER_TURN;

/// Something besides channels that a device wants run on the worker's thread when a descriptor
/// becomes readable: completions of disk I/O, a timer, a socket.
pub trait Source: Send + Sync {
    /// Does a bounded amount of work; returns whether there is more, in which case it is called again
    /// after the others had their turn.
    ///
    /// Must read the descriptor empty before it looks for work, so that nothing is missed and the
    /// worker can sleep; a descriptor that stays readable is reported again in every turn.
    fn ready(&self) -> bool;
}

/// One entry of the roster.
pub(crate) enum Task {
    Channel(Channel),
    Source { descriptor: Box<dyn AsFd + Send + Sync>, source: Arc<dyn Source> },
}

impl Task {
    /// What becomes readable when the task is to be run.
    pub(crate) fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        match self {
            Self::Channel(channel) => channel.doorbell_fd(),
            Self::Source { descriptor, .. } => Ok(descriptor.as_fd()),
        }
    }

    /// Runs it once; `rang` says that its descriptor was found readable. Returns whether there is more
    /// to do.
    pub(crate) fn run(&self, rang: bool) -> bool {
        match self {
            Self::Channel(channel) => {
                if rang {
                    // Before the rings are looked at: what is put there later rings again.
                    channel.acknowledge();
                }
                channel.process(PACKETS_PER_TURN).more
            }
            Self::Source { source, .. } => source.ready(),
        }
    }

    /// Tells the channel that nobody drives it any more.
    pub(crate) fn let_go(&self) {
        if let Self::Channel(channel) = self {
            channel.clear_waker();
        }
    }

    /// Whether this is `wanted`, or another handle of it. Each channel has a doorbell of its own for
    /// as long as it lives, and the task keeps it alive: the same descriptor, the same channel.
    pub(crate) fn is_channel(&self, wanted: &Channel) -> bool {
        let number = |channel: &Channel| channel.doorbell_fd().map(|fd| fd.as_raw_fd()).ok();
        matches!(self, Self::Channel(own) if number(own).is_some_and(|own| Some(own) == number(wanted)))
    }
}
