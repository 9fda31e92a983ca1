//! The client: its channels, the steps from opening the first one to being ready, and the loop that
//! everything happens in.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kmcl::bus::Bus;
use kmcl::{Channel, ChannelState, Guid};

use crate::buffer::Buffer;
use crate::config::{ClientConfig, MAX_SUB_CHANNELS, MAX_TRANSFER_BYTES};
use crate::driver::Driver;
use crate::error::Error;
use crate::handshake::{Handshake, Properties, Step};
use crate::inbox::Inbox;
use crate::link;
use crate::notice::Notice;
use crate::request::{Completion, Request, SubmitError};
use crate::requests::{Owner, Requests};

/// Packets that one channel may take from its ring before the next channel has its turn.
const BUDGET: u32 = 256;

/// Where a client is on its way.
#[derive(Clone, Debug)]
enum Phase {
    /// The primary channel waits for its offer, or is being opened.
    Opening,
    /// The primary channel is open and being initialised.
    Handshake(Handshake),
    /// Subchannels are being opened.
    SubChannels(Properties),
    /// Requests are welcome.
    Ready(Properties),
    /// Everything is closed, for this reason.
    Failed(Error),
}

/// A storage controller, as the guest's driver sees it.
///
/// A client is driven by the thread that uses it and makes none of its own. The blocking calls
/// (`read`, `write`, `scan` and so on) drive it while they wait. In an event loop, wait until
/// [`AsFd::as_fd`] is readable, call [`Self::wait`] with no time, and take completions out.
pub struct StorageClient {
    pub(crate) config: ClientConfig,
    bus: Arc<dyn Bus>,
    inbox: Arc<Inbox>,
    driver: Driver,
    /// The primary channel, then subchannels.
    channels: Vec<Channel>,
    phase: Phase,
    /// Its user calls `process` again and again.
    polled: bool,
    pub(crate) requests: Requests,
    /// Buffers of finished blocking calls, for the next ones.
    pub(crate) spare_buffers: Vec<Buffer>,
    /// Private memory that data is judged in.
    pub(crate) scratch: Vec<u8>,
}

/// Most bytes of one request whose packet, with a word for each page, takes at most half of a ring of
/// `ring_pages` pages.
fn largest_transfer(ring_pages: u32) -> u32 {
    let words = ring_pages.saturating_sub(1).saturating_mul(4096 / 8 / 2);
    words.saturating_sub(32).saturating_mul(4096) // descriptor, message and the rest: below 32 words
}

impl StorageClient {
    /// A client that begins to connect over `bus`; [`Self::is_ready`] says when it has.
    ///
    /// # Errors
    /// [`Error::Library`] where the bus or the library refuses, [`Error::System`] without
    /// descriptors.
    pub fn open(bus: Arc<dyn Bus>, config: ClientConfig) -> Result<Self, Error> {
        let config = ClientConfig {
            sub_channels: config.sub_channels.min(MAX_SUB_CHANNELS),
            max_transfer_bytes: config
                .max_transfer_bytes
                .min(largest_transfer(config.ring_pages))
                .clamp(4096, MAX_TRANSFER_BYTES),
            ..config
        };
        let inbox = Arc::new(Inbox::default());
        let mut requests = Requests::new(Arc::clone(&inbox), config.queue_depth);
        requests.set_depth(config.queue_depth);
        let instance = config.instance;
        let mut client = Self {
            config,
            bus,
            inbox,
            driver: Driver::new()?,
            channels: Vec::new(),
            phase: Phase::Opening,
            polled: false,
            requests,
            spare_buffers: Vec::new(),
            scratch: Vec::new(),
        };
        client.add_channel(instance, 0)?;
        Ok(client)
    }

    /// A client that has connected over `bus`, within [`ClientConfig::connect_timeout`].
    ///
    /// # Errors
    /// Those of [`Self::open`] and [`Self::wait_ready`].
    pub fn connect(bus: Arc<dyn Bus>, config: ClientConfig) -> Result<Self, Error> {
        let mut client = Self::open(bus, config)?;
        client.wait_ready()?;
        Ok(client)
    }

    fn add_channel(&mut self, instance: Option<Guid>, subchannel: u16) -> Result<(), Error> {
        let channel = link::prepare(&self.bus, &self.config, instance, subchannel, &self.inbox)?;
        self.driver.add(self.channels.len(), &channel)?;
        channel.enable()?;
        self.channels.push(channel);
        self.requests.add_lane();
        Ok(())
    }

    /// Whether requests are welcome.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        matches!(self.phase, Phase::Ready(_))
    }

    /// What was agreed on with the server, once the client is ready.
    #[must_use]
    pub fn properties(&self) -> Option<Properties> {
        match self.phase {
            Phase::Ready(properties) => Some(properties),
            _ => None,
        }
    }

    /// The controller's instance; all zeroes before an offer has matched.
    #[must_use]
    pub fn instance(&self) -> Guid {
        self.channels.first().map_or(Guid::ZERO, Channel::get_interface_instance)
    }

    /// Why the client has failed, if it has. It stays that way; requests have all ended.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        match self.phase {
            Phase::Failed(error) => Some(error),
            _ => None,
        }
    }

    /// Most bytes of one request: the server's limit or the client's, whichever is lower.
    #[must_use]
    pub fn max_transfer_bytes(&self) -> u32 {
        self.requests.max_transfer_bytes()
    }

    /// Most requests in flight at once.
    #[must_use]
    pub fn queue_depth(&self) -> u16 {
        self.requests.depth()
    }

    /// Sets how many requests may be in flight at once, from now on: 1 to
    /// [`MAX_QUEUE_DEPTH`](crate::MAX_QUEUE_DEPTH); other values are brought into that range.
    pub fn set_queue_depth(&mut self, depth: u16) {
        self.requests.set_depth(depth);
    }

    /// Requests that were accepted and whose completions were not taken out yet.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.requests.in_flight()
    }

    /// A buffer of at least `bytes` bytes, in memory that the server reaches.
    ///
    /// # Errors
    /// [`Error::NotReady`] before the channel is open; [`Error::Library`] when memory is used up.
    pub fn allocate(&self, bytes: u32) -> Result<Buffer, Error> {
        match self.channels.first() {
            Some(channel) if self.is_ready() => Buffer::allocate(channel, bytes),
            _ => Err(Error::NotReady),
        }
    }

    /// Sends `request` on the channel with the least to do. Its end comes out of
    /// [`Self::next_completion`], exactly once.
    ///
    /// # Errors
    /// The request, and why it was refused: [`Error::QueueFull`], [`Error::TransferTooLong`],
    /// [`Error::OutsideBuffer`], [`Error::NotReady`], or the failure of the client.
    #[expect(clippy::result_large_err, reason = "hands the request and its buffer back")]
    pub fn submit(&mut self, request: Request) -> Result<(), SubmitError> {
        let mut request = Some(request);
        let result = self.submit_each(|| request.take());
        match (result, request) {
            (Err(refused), _) => Err(refused),
            (Ok(_), None) => Ok(()),
            (Ok(_), Some(request)) => {
                Err(SubmitError { request, error: Error::QueueFull { depth: self.queue_depth() } })
            }
        }
    }

    /// Sends requests as long as `next` gives some and the queue depth allows, all with at most one
    /// signal to the server. Returns how many.
    ///
    /// # Errors
    /// As for [`Self::submit`]; requests before the one that comes back were sent.
    #[expect(clippy::result_large_err, reason = "hands the request and its buffer back")]
    pub fn submit_each(
        &mut self,
        next: impl FnMut() -> Option<Request>,
    ) -> Result<usize, SubmitError> {
        self.submit_owned(None, next)
    }

    /// As [`Self::submit_each`], for the blocking call `call` if there is one: it finds its requests
    /// again by their tokens.
    #[expect(clippy::result_large_err, reason = "hands the request and its buffer back")]
    #[inline]
    pub(crate) fn submit_owned(
        &mut self,
        call: Option<u64>,
        mut next: impl FnMut() -> Option<Request>,
    ) -> Result<usize, SubmitError> {
        let not_ready = match self.phase {
            Phase::Ready(_) => None,
            Phase::Failed(error) => Some(error),
            _ => Some(Error::NotReady),
        };
        let link = self.requests.best_link();
        let mut batch = None;
        let mut sent = 0;
        while self.requests.in_flight() < self.requests.depth() {
            let Some(request) = next() else { break };
            if let Some(error) = not_ready {
                return Err(SubmitError { request, error });
            }
            let Some(channel) = self.channels.get(link) else {
                return Err(SubmitError { request, error: Error::NotReady });
            };
            let batch = batch.get_or_insert_with(|| channel.batch());
            self.requests.submit(batch, channel, link, call, request)?;
            sent += 1;
        }
        Ok(sent)
    }

    /// The end of a request, in the order in which they came.
    pub fn next_completion(&mut self) -> Option<Completion> {
        self.requests.next_completion()
    }

    /// What the server has said unasked, oldest first.
    pub fn next_notice(&mut self) -> Option<Notice> {
        self.inbox.take_notice()
    }

    /// Does what there is to do, without waiting. Returns whether there is more to do at once.
    ///
    /// # Errors
    /// The failure of the client: its channels are closed, every request has ended and its
    /// completion can be taken out.
    pub fn process(&mut self) -> Result<bool, Error> {
        if let Phase::Failed(error) = self.phase {
            return Err(error);
        }
        let (mut more, mut checked) = (false, Ok(()));
        for channel in &self.channels {
            let progress = channel.process(BUDGET);
            more |= progress.more || progress.packets != 0;
            // A channel that brings packets is alive. One that has stopped or gone brings none, and is
            // found out in the next turn, which `more` asks for.
            if progress.packets == 0 && checked.is_ok() {
                checked = self.check(channel);
            }
        }
        self.requests.collect();
        match checked.and_then(|()| self.advance()) {
            Ok(advanced) => Ok(more || advanced),
            Err(error) => {
                self.fail(error);
                Err(error)
            }
        }
    }

    /// Says that [`Self::process`] is called again and again: the server is asked not to signal, and
    /// its answers cost no system call. Waiting turns it off.
    pub fn set_polled(&mut self, polled: bool) {
        self.polled = polled;
        for channel in &self.channels {
            channel.set_polled(polled);
        }
    }

    /// Sleeps until there is something to do, at most `limit`. A client that was polled looks once
    /// more instead, so that the server knows that it has to signal from now on.
    fn sleep(&mut self, limit: Duration) -> Result<(), Error> {
        if self.polled {
            self.set_polled(false);
            return Ok(());
        }
        self.driver.wait(limit, &self.channels)
    }

    /// Waits until there is something to do, at most `limit`, and does it. Returns whether there is
    /// more to do at once.
    ///
    /// # Errors
    /// As for [`Self::process`]; [`Error::System`].
    pub fn wait(&mut self, limit: Duration) -> Result<bool, Error> {
        self.sleep(limit)?;
        self.process()
    }

    /// Waits until the client is ready, within [`ClientConfig::connect_timeout`].
    ///
    /// # Errors
    /// [`Error::Timeout`]; the failure of the client.
    pub fn wait_ready(&mut self) -> Result<(), Error> {
        self.drive_until(self.config.connect_timeout, Self::is_ready)
    }

    /// Waits until a completion can be taken out, within `limit`.
    ///
    /// # Errors
    /// [`Error::Timeout`]; the failure of the client, once all completions were taken out.
    pub fn wait_completion(&mut self, limit: Duration) -> Result<(), Error> {
        let result = self.drive_until(limit, |client| client.requests.has_completion());
        if self.requests.has_completion() { Ok(()) } else { result }
    }

    /// Drives the client until `done`, within `limit`.
    pub(crate) fn drive_until(
        &mut self,
        limit: Duration,
        mut done: impl FnMut(&Self) -> bool,
    ) -> Result<(), Error> {
        let started = Instant::now();
        loop {
            let more = self.process()?;
            if done(self) {
                return Ok(());
            }
            // Looked at in every turn: a server that keeps us busy may still not do what it was asked.
            let left = limit.saturating_sub(started.elapsed());
            if left.is_zero() {
                return Err(Error::Timeout(limit));
            }
            if !more {
                self.sleep(left)?;
            }
        }
    }

    /// Whether a channel was closed under us, or stopped.
    fn check(&self, channel: &Channel) -> Result<(), Error> {
        if let Some(reason) = channel.stop_reason() {
            return Err(reason.into());
        }
        if channel.state() == ChannelState::Disabled {
            return Err(self.inbox.connect_failure().map_or(Error::Disconnected, Error::Connect));
        }
        Ok(())
    }

    /// Takes the next step towards being ready, if it is due. Returns whether it was.
    fn advance(&mut self) -> Result<bool, Error> {
        let is_active = |channel: &Channel| channel.state() == ChannelState::Active;
        match &mut self.phase {
            Phase::Opening => {
                if !self.channels.first().is_some_and(is_active) {
                    return Ok(false);
                }
                let (handshake, request) =
                    Handshake::new(self.config.newest_version, self.config.sub_channels);
                self.phase = Phase::Handshake(handshake);
                self.send_handshake(&request)?;
                Ok(true)
            }
            Phase::Handshake(handshake) => {
                let Some(answer) = self.requests.take_handshake_answer() else { return Ok(false) };
                match handshake.on_answer(&answer?)? {
                    Step::Send(request) => self.send_handshake(&request)?,
                    Step::Done(properties) => self.agree(properties)?,
                }
                Ok(true)
            }
            Phase::SubChannels(properties) => {
                if !self.channels.iter().all(is_active) {
                    return Ok(false);
                }
                self.phase = Phase::Ready(*properties);
                Ok(true)
            }
            Phase::Ready(_) | Phase::Failed(_) => Ok(false),
        }
    }

    fn send_handshake(&mut self, request: &vstor_wire::packet::VstorPacket) -> Result<(), Error> {
        let channel = self.channels.first().ok_or(Error::NotReady)?;
        self.requests.submit_operation(channel, 0, Owner::Handshake, request)
    }

    fn agree(&mut self, properties: Properties) -> Result<(), Error> {
        let limit = properties.max_transfer_bytes.min(self.config.max_transfer_bytes);
        self.requests.agree(properties.version.packet_form(), limit);
        self.phase = Phase::SubChannels(properties);
        let instance = self.instance();
        for subchannel in 1..=properties.sub_channels {
            self.add_channel(Some(instance), subchannel)?;
        }
        Ok(())
    }

    /// Closes everything and ends every request with `error`.
    fn fail(&mut self, error: Error) {
        tracing::debug!(%error, "storage client failed");
        self.phase = Phase::Failed(error);
        self.requests.set_failure(error);
        for channel in &self.channels {
            channel.clear_waker();
            channel.disable();
        }
        self.requests.collect(); // what the channels have ended while they closed
        self.requests.end_all();
    }

    /// Sends an operation that is no SRB, and waits for its answer.
    pub(crate) fn call_operation(
        &mut self,
        packet: &vstor_wire::packet::VstorPacket,
    ) -> Result<(), Error> {
        self.ready()?;
        let call = self.requests.begin_call();
        let channel = self.channels.first().ok_or(Error::NotReady)?;
        self.requests.submit_operation(channel, 0, Owner::Call { call, token: 0 }, packet)?;
        self.wait_call_end()?;
        match self.requests.next_call_end() {
            Some(end) => end.result.map(|_| ()),
            None => Err(Error::NotReady),
        }
    }

    /// Waits until a request of the present blocking call has ended.
    pub(crate) fn wait_call_end(&mut self) -> Result<(), Error> {
        let limit = self.config.request_timeout;
        let result = self.drive_until(limit, |client| client.requests.has_call_end());
        // A client that fails ends its requests: their own ends say more than the failure does.
        if self.requests.has_call_end() { Ok(()) } else { result }
    }

    pub(crate) fn ready(&self) -> Result<(), Error> {
        match self.phase {
            Phase::Ready(_) => Ok(()),
            Phase::Failed(error) => Err(error),
            _ => Err(Error::NotReady),
        }
    }
}

/// Readable when [`StorageClient::wait`] has something to do.
impl AsFd for StorageClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.driver.as_fd()
    }
}

impl std::fmt::Debug for StorageClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StorageClient")
            .field("phase", &self.phase)
            .field("channels", &self.channels.len())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

impl Drop for StorageClient {
    fn drop(&mut self) {
        self.requests.close();
        for channel in self.channels.drain(..) {
            link::close(channel);
        }
    }
}
