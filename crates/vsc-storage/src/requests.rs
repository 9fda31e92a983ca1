//! The requests of a client, from submission to end: what is in flight, on which channel, and what
//! waits to be taken out.

use std::collections::VecDeque;
use std::sync::Arc;

use kmcl::{Batch, Channel, NtStatus, Packet, SendFlags};
use vstor_wire::packet::{Operation, PacketForm, VstorPacket};
use vstor_wire::srb::{DataDirection, ScsiRequest};

use crate::answer::{self, Asked};
use crate::buffer::Buffer;
use crate::config::{MAX_QUEUE_DEPTH, MAX_SUB_CHANNELS};
use crate::error::Error;
use crate::inbox::{Ended, Inbox};
use crate::request::{Completion, Request, SubmitError, Transfer};
use crate::table::{Table, Ticket};

/// Slots beside those for the queue depth: for the initialisation and resets, one at a time, and for
/// what a blocking call left behind when it gave up waiting.
const SPARE_SLOTS: u16 = 16;

/// Who is told of the end of a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Owner {
    /// The user, by [`StorageClient::next_completion`](crate::StorageClient::next_completion).
    User { token: u64 },
    /// The blocking call number `call`. Nobody, if that call is over.
    Call { call: u64, token: u64 },
    /// The initialisation.
    Handshake,
}

/// A request in flight.
struct Pending {
    owner: Owner,
    asked: Asked,
    buffer: Option<Buffer>,
    /// Index of its channel.
    link: u16,
}

impl Pending {
    fn new(owner: Owner, asked: Asked, buffer: Option<Buffer>, link: usize) -> Self {
        Self { owner, asked, buffer, link: u16::try_from(link).unwrap_or(u16::MAX) }
    }
}

/// The end of a request that a blocking call waits for.
#[derive(Debug)]
pub(crate) struct CallEnd {
    pub(crate) token: u64,
    pub(crate) buffer: Option<Buffer>,
    pub(crate) result: Result<u32, Error>,
}

/// Packets and load of one channel.
#[derive(Default)]
struct Lane {
    idle: Vec<Packet>,
    in_flight: u16,
}

/// See the module.
pub(crate) struct Requests {
    inbox: Arc<Inbox>,
    table: Table<Pending>,
    lanes: Vec<Lane>,
    /// Filled and emptied again and again, so that it allocates nothing.
    ended: Vec<Ended>,
    finished: VecDeque<Completion>,
    call_ends: VecDeque<CallEnd>,
    /// The blocking call that is being made, or the last one.
    call: u64,
    handshake_answer: Option<Result<VstorPacket, Error>>,
    depth: u16,
    /// Commands accepted whose owner has not been told of their end.
    commands: u16,
    form: PacketForm,
    max_transfer_bytes: u32,
    /// Why requests end that the server did not answer.
    failure: Error,
}

impl Requests {
    pub(crate) fn new(inbox: Arc<Inbox>, depth: u16) -> Self {
        let slots = MAX_QUEUE_DEPTH + SPARE_SLOTS;
        inbox.reserve(usize::from(slots));
        Self {
            inbox,
            table: Table::new(slots),
            lanes: Vec::with_capacity(usize::from(MAX_SUB_CHANNELS) + 1),
            ended: Vec::with_capacity(usize::from(slots)),
            finished: VecDeque::with_capacity(usize::from(slots)),
            call_ends: VecDeque::with_capacity(usize::from(slots)),
            call: 0,
            handshake_answer: None,
            depth,
            commands: 0,
            form: PacketForm::Full,
            max_transfer_bytes: 0,
            failure: Error::Disconnected,
        }
    }

    /// Adds a channel that requests may go to.
    pub(crate) fn add_lane(&mut self) {
        self.lanes.push(Lane::default());
    }

    /// What was agreed on: the form of SRBs and their limit.
    pub(crate) fn agree(&mut self, form: PacketForm, max_transfer_bytes: u32) {
        self.form = form;
        self.max_transfer_bytes = max_transfer_bytes;
    }

    pub(crate) fn max_transfer_bytes(&self) -> u32 {
        self.max_transfer_bytes
    }

    pub(crate) fn depth(&self) -> u16 {
        self.depth
    }

    pub(crate) fn set_depth(&mut self, depth: u16) {
        self.depth = depth.clamp(1, MAX_QUEUE_DEPTH);
    }

    /// Commands accepted whose owner has not been told of their end.
    pub(crate) fn in_flight(&self) -> u16 {
        self.commands
    }

    /// The channel with the least to do.
    pub(crate) fn best_link(&self) -> usize {
        let lanes = self.lanes.iter().enumerate();
        lanes.min_by_key(|(_, lane)| lane.in_flight).map_or(0, |(index, _)| index)
    }

    /// Sends `request` in `batch`, a batch of channel `link`, for the user or for a blocking call.
    #[expect(clippy::result_large_err, reason = "hands the request and its buffer back")]
    pub(crate) fn submit(
        &mut self,
        batch: &mut Batch<'_>,
        channel: &Channel,
        link: usize,
        call: Option<u64>,
        request: Request,
    ) -> Result<(), SubmitError> {
        if let Err(error) = self.check(&request) {
            return Err(SubmitError { request, error });
        }
        let packet = match self.take_packet(channel, link) {
            Ok(packet) => packet,
            Err(error) => return Err(SubmitError { request, error }),
        };
        let Request { address, cdb, data, token } = request;
        let owner = match call {
            None => Owner::User { token },
            Some(call) => Owner::Call { call, token },
        };
        let (direction, buffer, span) = match data {
            Some(data) => (data.direction, Some(data.buffer), (data.offset, data.bytes)),
            None => (DataDirection::None, None, (0, 0)),
        };
        let (offset, bytes) = span;
        let mut srb = ScsiRequest::new(address, &cdb, direction, bytes);
        srb.length = self.form.srb_bytes().into();
        let message = VstorPacket::request(Operation::EXECUTE_SRB).with_body(&srb);
        let opcode = cdb.as_bytes().first().copied().unwrap_or_default();
        let asked = Asked::Command { address, opcode, bytes };
        match self.launch(
            batch,
            packet,
            link,
            Pending::new(owner, asked, buffer, link),
            &message,
            span,
        ) {
            Ok(()) => {
                self.commands += 1;
                Ok(())
            }
            Err((pending, error)) => {
                let transfer = |buffer| Transfer { direction, buffer, offset, bytes };
                let data = pending.buffer.map(transfer);
                Err(SubmitError { request: Request { address, cdb, data, token }, error })
            }
        }
    }

    /// Whether `request` can be sent at all, and now.
    fn check(&self, request: &Request) -> Result<(), Error> {
        if self.commands >= self.depth {
            return Err(Error::QueueFull { depth: self.depth });
        }
        let Some(data) = &request.data else { return Ok(()) };
        let (offset, bytes, limit) = (data.offset, data.bytes, self.max_transfer_bytes);
        if bytes > limit {
            return Err(Error::TransferTooLong { asked: bytes, limit });
        }
        if data.buffer.range(offset, bytes).is_none() {
            return Err(Error::OutsideBuffer { offset, bytes, buffer: data.buffer.bytes() });
        }
        Ok(())
    }

    /// Sends an operation that is no SRB on channel `link`.
    pub(crate) fn submit_operation(
        &mut self,
        channel: &Channel,
        link: usize,
        owner: Owner,
        message: &VstorPacket,
    ) -> Result<(), Error> {
        let packet = self.take_packet(channel, link)?;
        let pending = Pending::new(owner, Asked::Operation(message.operation), None, link);
        let mut batch = channel.batch();
        let launched = self.launch(&mut batch, packet, link, pending, message, (0, 0));
        launched.map_err(|(_, error)| error)
    }

    fn take_packet(&mut self, channel: &Channel, link: usize) -> Result<Packet, Error> {
        if let Some(packet) = self.lanes.get_mut(link).and_then(|lane| lane.idle.pop()) {
            return Ok(packet);
        }
        let mut packet = channel.packet_allocate().ok_or(Error::QueueFull { depth: self.depth })?;
        packet.set_completion_routine(Arc::clone(&self.inbox) as _);
        Ok(packet)
    }

    fn put_packet(&mut self, link: usize, packet: Packet) {
        if let Some(lane) = self.lanes.get_mut(link) {
            lane.idle.push(packet);
        }
    }

    /// Sends `message` in `packet`, with `span` of the buffer (offset and bytes) where there is one.
    #[expect(clippy::result_large_err, reason = "hands what is pending and its buffer back")]
    fn launch(
        &mut self,
        batch: &mut Batch<'_>,
        mut packet: Packet,
        link: usize,
        pending: Pending,
        message: &VstorPacket,
        (offset, bytes): (u32, u32),
    ) -> Result<(), (Pending, Error)> {
        let ticket = match self.table.insert(pending) {
            Ok(ticket) => ticket,
            Err(pending) => {
                self.put_packet(link, packet);
                return Err((pending, Error::QueueFull { depth: self.depth }));
            }
        };
        packet.set_pointer(ticket.to_word());
        // The buffer is in the table already: nothing is left to do once the packet is sent.
        let buffer = self.table.get(ticket).and_then(|pending| pending.buffer.as_ref());
        let external = buffer.and_then(|buffer| buffer.range(offset, bytes));
        let external = external.as_ref().map(std::slice::from_ref);
        let sent =
            batch.send(packet, message.bytes(self.form), external, SendFlags::WAIT_FOR_COMPLETION);
        let Err(refused) = sent else {
            if let Some(lane) = self.lanes.get_mut(link) {
                lane.in_flight += 1;
            }
            return Ok(());
        };
        self.put_packet(link, refused.packet);
        match self.table.take(ticket) {
            Some(pending) => Err((pending, refused.error.into())),
            None => Ok(()), // it was put there a moment ago
        }
    }

    /// Takes out of the inbox what has ended, and hands it to its owner.
    pub(crate) fn collect(&mut self) {
        let mut ended = std::mem::take(&mut self.ended);
        self.inbox.take_ended(&mut ended);
        for end in ended.drain(..) {
            self.settle(end);
        }
        self.ended = ended;
    }

    fn settle(&mut self, end: Ended) {
        let Some(pending) = self.table.take(Ticket::from_word(end.packet.pointer())) else {
            return; // ended before, when the client gave up on its channels
        };
        let Ended { packet, status, answer } = end;
        self.put_packet(usize::from(pending.link), packet);
        let answer = match status {
            NtStatus::SUCCESS => answer::read(&answer, self.form).map_err(Error::from),
            _ => Err(self.failure),
        };
        self.finish(pending, answer);
    }

    /// Tells the owner of `pending` that it has ended with `answer`.
    fn finish(&mut self, pending: Pending, answer: Result<&VstorPacket, Error>) {
        let Pending { owner, asked, buffer, link } = pending;
        if let Some(lane) = self.lanes.get_mut(usize::from(link)) {
            lane.in_flight = lane.in_flight.saturating_sub(1);
        }
        // A user's command counts until its completion is taken: so the queue of completions is
        // bounded by the queue depth, too.
        if matches!((owner, asked), (Owner::Call { .. }, Asked::Command { .. })) {
            self.commands = self.commands.saturating_sub(1);
        }
        let result = |answer: Result<&VstorPacket, Error>| {
            answer.and_then(|packet| answer::judge(asked, packet))
        };
        match owner {
            // A success is made where it goes: an error's room is large, and would be copied.
            Owner::User { token } => match answer.ok().and_then(|it| answer::success(asked, it)) {
                Some(moved) => {
                    self.finished.push_back(Completion { token, buffer, result: Ok(moved) });
                }
                None => {
                    self.finished.push_back(Completion { token, buffer, result: result(answer) });
                }
            },
            Owner::Call { call, token } if call == self.call => {
                self.call_ends.push_back(CallEnd { token, buffer, result: result(answer) });
            }
            Owner::Call { .. } => {} // nobody waits for it any more; its buffer is free now
            Owner::Handshake => self.handshake_answer = Some(answer.copied()),
        }
    }

    /// From now on requests that the server does not answer end with `error`.
    pub(crate) fn set_failure(&mut self, error: Error) {
        self.failure = error;
    }

    /// Ends everything in flight: the channels are closed, nothing will come any more.
    pub(crate) fn end_all(&mut self) {
        while let Some(pending) = self.table.take_any() {
            self.finish(pending, Err(self.failure));
        }
    }

    /// The next completion of the user's.
    pub(crate) fn next_completion(&mut self) -> Option<Completion> {
        let completion = self.finished.pop_front()?;
        self.commands = self.commands.saturating_sub(1);
        Some(completion)
    }

    pub(crate) fn has_completion(&self) -> bool {
        !self.finished.is_empty()
    }

    /// Begins a blocking call: ends of an earlier one are of no interest any more.
    pub(crate) fn begin_call(&mut self) -> u64 {
        self.call += 1;
        self.call_ends.clear();
        self.call
    }

    /// The next end of a request of the present blocking call.
    pub(crate) fn next_call_end(&mut self) -> Option<CallEnd> {
        self.call_ends.pop_front()
    }

    pub(crate) fn has_call_end(&self) -> bool {
        !self.call_ends.is_empty()
    }

    pub(crate) fn take_handshake_answer(&mut self) -> Option<Result<VstorPacket, Error>> {
        self.handshake_answer.take()
    }

    /// Gives packets and buffers up.
    pub(crate) fn close(&mut self) {
        self.inbox.close();
        self.end_all();
        self.lanes.clear();
        self.finished.clear();
        self.call_ends.clear();
    }
}
