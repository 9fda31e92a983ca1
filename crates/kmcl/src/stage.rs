//! What packet callbacks have completed, until their batch writes it to the ring.
//!
//! A callback that completes its packet at once is the common case, and the lock of the traffic, and
//! the reference that a packet holds to its channel, would be half of its cost. So completions made
//! on the thread that runs the callbacks are put aside here, in that thread's own memory, and written
//! under one lock when the batch ends, when it needs bodies, or before a send, which must not
//! overtake them. Completions made by other threads go straight to the ring.

use std::cell::Cell;
use std::sync::Arc;

use vmbus_ring::RingError;

use crate::channel::{Channel, Shared};
use crate::error::ChannelError;
use crate::pool::Body;
use crate::traffic::{Consequences, Traffic};

thread_local! {
    /// The innermost batch that runs on this thread.
    static STAGE: Cell<Option<Box<Stage>>> = const { Cell::new(None) };
}

/// Completions put aside at a time, before they are written.
const CAPACITY: usize = 64;

/// See the module. Kept by the receiver between batches, for its memory.
pub(crate) struct Stage {
    /// The channel whose batch it is, as an address: only compared.
    channel: usize,
    completed: Vec<Box<Body>>,
    /// Handles of packets that are over, for packets to come.
    handles: Vec<Channel>,
}

impl Stage {
    pub(crate) fn new() -> Box<Self> {
        Box::new(Self {
            channel: 0,
            completed: Vec::with_capacity(CAPACITY),
            handles: Vec::with_capacity(CAPACITY),
        })
    }
}

/// A batch that runs. Uninstalls its stage when dropped, also by a callback that panics.
pub(crate) struct Running<'a> {
    channel: &'a Channel,
    /// The stage of the batch around this one, if a callback drives another channel.
    outer: Option<Box<Stage>>,
}

impl<'a> Running<'a> {
    /// Installs `stage` as that of this thread.
    pub(crate) fn begin(channel: &'a Channel, mut stage: Box<Stage>) -> Self {
        stage.channel = address(&channel.shared);
        Self { channel, outer: STAGE.replace(Some(stage)) }
    }

    /// A handle for the next packet.
    #[inline]
    pub(crate) fn handle(&self) -> Channel {
        with(|stage| stage.handles.pop()).flatten().unwrap_or_else(|| self.channel.clone())
    }

    /// Writes what was put aside.
    pub(crate) fn settle(&self, traffic: &mut Traffic) -> (Consequences, Result<(), RingError>) {
        settle(traffic)
    }

    /// Takes the stage back, with nothing in it.
    pub(crate) fn end(mut self) -> Option<Box<Stage>> {
        let mut stage = STAGE.replace(self.outer.take());
        if let Some(stage) = &mut stage {
            // Handles keep the channel alive, and the channel keeps the stage: no longer than a batch.
            stage.handles.clear();
        }
        std::mem::forget(self);
        stage
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // A callback has panicked: what others have completed is completed all the same.
        let (consequences, written) = settle(&mut self.channel.traffic());
        drop(STAGE.replace(self.outer.take()));
        if let Err(error) = written {
            self.channel.stop(ChannelError::Outgoing(error));
        }
        self.channel.follow(consequences);
    }
}

#[inline]
fn with<T>(look: impl FnOnce(&mut Stage) -> T) -> Option<T> {
    let mut stage = STAGE.take()?;
    let result = look(&mut stage);
    STAGE.set(Some(stage));
    Some(result)
}

fn address(channel: &Arc<Shared>) -> usize {
    Arc::as_ptr(channel).addr()
}

/// Puts a completion aside; gives everything back where this thread runs no batch of that channel,
/// or the completion does not fit.
#[inline]
pub(crate) fn complete(
    mut body: Box<Body>,
    channel: Channel,
    payload: &[u8],
) -> Result<(), (Box<Body>, Channel)> {
    let Some(mut stage) = STAGE.take() else { return Err((body, channel)) };
    let ours = stage.channel == address(&channel.shared) && stage.completed.len() < CAPACITY;
    let result = if ours && body.keep_completion(payload) {
        stage.completed.push(body);
        stage.handles.push(channel);
        Ok(())
    } else {
        Err((body, channel))
    };
    STAGE.set(Some(stage));
    result
}

/// As [`complete`], for a body that has its completion already.
#[inline]
pub(crate) fn complete_kept(body: Box<Body>, channel: Channel) -> Result<(), (Box<Body>, Channel)> {
    let Some(mut stage) = STAGE.take() else { return Err((body, channel)) };
    let ours = stage.channel == address(&channel.shared) && stage.completed.len() < CAPACITY;
    let result = if ours {
        stage.completed.push(body);
        stage.handles.push(channel);
        Ok(())
    } else {
        Err((body, channel))
    };
    STAGE.set(Some(stage));
    result
}

/// Writes what this thread has put aside for `channel`, so that something else can follow it.
pub(crate) fn settle_before(channel: &Channel, traffic: &mut Traffic) -> Result<(), RingError> {
    let ours = with(|stage| stage.channel == address(&channel.shared)).unwrap_or(false);
    if !ours {
        return Ok(());
    }
    // Whoever runs the batch looks for what follows from it when the batch ends.
    let (consequences, written) = settle(traffic);
    traffic.follow_later(consequences);
    written
}

fn settle(traffic: &mut Traffic) -> (Consequences, Result<(), RingError>) {
    match with(|stage| traffic.complete_all(&mut stage.completed)) {
        Some((consequences, written)) => (consequences.and(traffic.take_followers()), written),
        None => (traffic.take_followers(), Ok(())),
    }
}
