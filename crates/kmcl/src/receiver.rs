//! The incoming ring, and the loop that turns what is in it into callbacks.
//!
//! One thread at a time owns the receiver: it takes it out of the channel, works, and puts it back.
//! So no lock is held while a callback runs, and whoever finds it gone knows that somebody is at it.

use std::collections::VecDeque;
use std::sync::Arc;

use vmbus_ring::{RingError, RingPacket, RingReader};
use vmbus_wire::packet::{PacketKind, extension};
use vmbus_wire::pipe::{self, PipePacket, PipePacketType};
use vmbus_wire::status::NtStatus;

use crate::callbacks::ProcessPacket;
use crate::channel::Channel;
use crate::error::ChannelError;
use crate::fenced::ResumedPacket;
use crate::incoming::{IncomingPacket, Level};
use crate::packet::{Packet, PacketBody};
use crate::pool::Body;
use crate::stage::{Running, Stage};
use crate::traffic::{RingState, Starved};
use crate::waiting::{Waiting, Why};

/// Most packets delivered before their ring space and completions are shown to the peer. Larger
/// batches save little and let the peer wait.
const BATCH: u32 = 64;

/// Most 8-byte words of external data in one packet that are looked at. A packet that no ring of
/// reasonable size would carry is a lie.
const EXTENSION_WORDS: u32 = 16 << 10;

/// See the module.
pub(crate) struct Receiver {
    reader: RingReader,
    process: Option<Arc<dyn ProcessPacket>>,
    is_pipe: bool,
    /// Packets are delivered: the channel is Active.
    queue_on: bool,
    /// Packets that come before those in the ring.
    line: VecDeque<Waiting>,
    /// Packets delivered so far.
    delivered: u64,
    /// Where callbacks put completions aside; with the running batch while there is one.
    stage: Option<Box<Stage>>,
    /// Taken from the pool for this batch.
    grant: Vec<Box<Body>>,
    /// The payload of a completion, and the extension of a packet too large for its body.
    scratch: Vec<u8>,
    scratch_words: Vec<u64>,
    /// Queued packets that a flush has finished, to be ended outside the lock.
    done: Vec<Box<PacketBody>>,
}

/// What one run has done, and why it ended.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Turn {
    /// Packets taken from the ring.
    pub(crate) packets: u32,
    /// The budget ended before the ring.
    pub(crate) more: bool,
    /// The next packet needs a thread that may sleep.
    pub(crate) needs_passive: bool,
}

/// Why a batch ended.
enum End {
    /// The ring is empty.
    Empty,
    /// As many packets as a batch holds, or as the budget allows.
    Full,
    /// The queue was turned off, or a packet is waiting for something that will ring the bell.
    Stopped,
    /// A packet waits for a thread that may sleep.
    NeedsPassive,
}

impl Receiver {
    pub(crate) fn new(
        reader: RingReader,
        process: Option<Arc<dyn ProcessPacket>>,
        is_pipe: bool,
    ) -> Self {
        Self {
            reader,
            process,
            is_pipe,
            queue_on: false,
            line: VecDeque::new(),
            delivered: 0,
            stage: Some(Stage::new()),
            grant: Vec::with_capacity(BATCH as usize),
            scratch: Vec::new(),
            scratch_words: Vec::new(),
            done: Vec::new(),
        }
    }

    /// Asks the peer not to signal: nobody is going to look.
    pub(crate) fn mask(&mut self) {
        self.reader.mask();
    }

    pub(crate) fn set_queue_on(&mut self, on: bool) {
        self.queue_on = on;
    }

    /// Puts right what a callback that panicked has left undone.
    pub(crate) fn recover(&mut self, channel: &Channel) {
        channel.set_batch_thread(false);
        let (consequences, ring) = {
            let mut traffic = channel.traffic();
            let consequences = traffic.give_back(&mut self.grant);
            (consequences, traffic.end_batch(self.reader.publish()))
        };
        ring.give();
        channel.follow(consequences);
    }

    /// The packets that come before those in the ring.
    pub(crate) fn line(&mut self) -> &mut VecDeque<Waiting> {
        &mut self.line
    }

    /// What it takes to read messages without delivering them: the ring, whether they have a pipe's
    /// header, and room for one.
    pub(crate) fn for_undelivered(&mut self) -> (&mut RingReader, bool, &mut Vec<u8>) {
        (&mut self.reader, self.is_pipe, &mut self.scratch)
    }

    /// Where the next packet is read, and the size of the ring, in bytes.
    pub(crate) fn ring_state(&self) -> RingState {
        RingState { data_len: self.reader.data_len(), index: self.reader.read_index() }
    }

    /// Goes on where a saved state says, with so many packets that were delivered already. Nothing has
    /// changed where it fails.
    pub(crate) fn resume_at(&mut self, read_index: u32, delivered: u64) -> Result<(), RingError> {
        self.reader.resume_at(read_index)?;
        self.delivered = delivered;
        Ok(())
    }

    /// Delivers up to `budget` packets.
    pub(crate) fn run(&mut self, channel: &Channel, level: Level, budget: u32) -> Turn {
        let mut turn = Turn::default();
        if channel.take_memory_arrived() {
            self.line.iter_mut().for_each(Waiting::forget_memory);
        }
        if !self.queue_on || channel.is_stopped() {
            self.flush_queue(channel);
            return turn;
        }
        self.reader.mask();
        loop {
            let limit = BATCH.min(budget - turn.packets);
            let end = match self.batch(channel, level, limit, &mut turn.packets) {
                Ok(end) => end,
                Err(error) => {
                    channel.stop(error);
                    return turn;
                }
            };
            match end {
                End::Full if turn.packets >= budget => {
                    turn.more = true;
                    return turn;
                }
                End::Full => {}
                End::Empty if channel.is_polled() => return turn,
                End::Empty => match self.reader.unmask_and_check() {
                    // More has come between the last look and the unmasking: nobody will signal it.
                    Ok(true) => self.reader.mask(),
                    Ok(false) => return turn,
                    Err(error) => {
                        channel.stop(ChannelError::Incoming(error));
                        return turn;
                    }
                },
                End::Stopped => return turn,
                End::NeedsPassive => {
                    turn.needs_passive = true;
                    return turn;
                }
            }
        }
    }

    /// One batch: read and deliver, then show the peer all of it at once.
    fn batch(
        &mut self,
        channel: &Channel,
        level: Level,
        limit: u32,
        taken: &mut u32,
    ) -> Result<End, ChannelError> {
        {
            let mut traffic = channel.traffic();
            traffic.flush(&mut self.done).map_err(ChannelError::Outgoing)?;
            traffic.begin_batch();
        }
        channel.set_batch_thread(true);
        self.end_flushed(channel);
        let running = Running::begin(channel, self.stage.take().unwrap_or_else(Stage::new));
        let mut delivered = 0;
        let end = self.deliver(&running, channel, level, limit, taken, &mut delivered);
        if delivered != 0
            && let Some(process) = &self.process
        {
            process.processing_complete(channel, delivered);
        }
        if channel.callback_asked() {
            let late = channel.traffic().take_handed_back();
            if let Some(late) = late {
                channel.traffic().deliver_again(); // into its owner's hands, to be failed
                channel.refuse_back(late.body);
            }
        }
        channel.set_batch_thread(false);
        let (consequences, written, ring) = {
            let mut traffic = channel.traffic();
            let (mut consequences, written) = running.settle(&mut traffic);
            consequences = consequences.and(traffic.give_back(&mut self.grant));
            let ring = traffic.end_batch(self.reader.publish());
            let room = traffic.await_room();
            consequences.restart |= room == Ok(true);
            (consequences, written.and(room), ring)
        };
        self.stage = running.end();
        ring.give();
        channel.follow(consequences);
        written.map_err(ChannelError::Outgoing).and(end)
    }

    fn deliver(
        &mut self,
        running: &Running<'_>,
        channel: &Channel,
        level: Level,
        limit: u32,
        taken: &mut u32,
        delivered: &mut u32,
    ) -> Result<End, ChannelError> {
        let first = *taken;
        while *taken - first < limit {
            if !channel.queue_is_on() {
                return Ok(End::Stopped);
            }
            if channel.requires_passive() && level == Level::Dispatch {
                return Ok(End::NeedsPassive);
            }
            if !self.line.is_empty() {
                if let Some(end) = self.may_not_deliver(level) {
                    return Ok(end);
                }
                *taken += 1;
                *delivered += 1;
                self.deliver_waiting(running, channel, level)?;
                continue;
            }
            let Some(packet) = self.reader.peek().map_err(ChannelError::Incoming)? else {
                return Ok(End::Empty);
            };
            match packet.kind {
                PacketKind::Completion => {
                    read_payload(&packet, &mut self.scratch);
                    let transaction_id = packet.transaction_id;
                    self.reader.advance();
                    *taken += 1;
                    self.end_transaction(channel, transaction_id);
                }
                PacketKind::InBand | PacketKind::GpaDirect => {
                    let Some(mut body) = self.grant.pop() else {
                        let wanted = limit - (*taken - first);
                        let (consequences, written, granted) = {
                            let mut traffic = channel.traffic();
                            let (consequences, written) = running.settle(&mut traffic);
                            (consequences, written, traffic.grant(wanted, &mut self.grant))
                        };
                        channel.follow(consequences);
                        written.map_err(ChannelError::Outgoing)?;
                        match granted.map_err(ChannelError::Outgoing)? {
                            Ok(()) => continue,
                            Err(Starved::Packets | Starved::Room) => return Ok(End::Stopped),
                        }
                    };
                    let filled = fill(&mut body, &packet, &mut self.scratch_words, self.is_pipe);
                    if let Err(error) = filled {
                        self.grant.push(body);
                        return Err(error);
                    }
                    self.reader.advance();
                    *taken += 1;
                    *delivered += 1;
                    body.order = self.delivered;
                    self.delivered += 1;
                    self.hand_over(running, channel, level, body)?;
                }
                kind => return Err(ChannelError::Kind(kind)),
            }
        }
        Ok(End::Full)
    }

    /// Why the first packet in the line cannot be delivered now, if so.
    fn may_not_deliver(&self, level: Level) -> Option<End> {
        let Why::HandedBack { at_passive, after_memory } = self.line.front()?.why else {
            return None;
        };
        match (after_memory, at_passive && level == Level::Dispatch) {
            (true, _) => Some(End::Stopped),
            (false, true) => Some(End::NeedsPassive),
            (false, false) => None,
        }
    }

    /// Delivers the first packet in the line.
    fn deliver_waiting(
        &mut self,
        running: &Running<'_>,
        channel: &Channel,
        level: Level,
    ) -> Result<(), ChannelError> {
        let Some(Waiting { body, why }) = self.line.pop_front() else { return Ok(()) };
        match why {
            Why::Completed => channel.complete_again(body),
            Why::HandedBack { .. } => {
                channel.traffic().deliver_again();
                return self.hand_over(running, channel, level, body);
            }
            Why::HandedOver { fence, state } => {
                channel.traffic().deliver_again();
                let packet = IncomingPacket::new(body, running.handle(), level);
                let packet = ResumedPacket::new(packet, fence, state);
                match &self.process {
                    Some(process) => process.resume_packet(channel, packet),
                    None => drop(packet),
                }
                return self.after_callback(channel);
            }
        }
        Ok(())
    }

    /// Calls the device with one packet.
    fn hand_over(
        &mut self,
        running: &Running<'_>,
        channel: &Channel,
        level: Level,
        body: Box<Body>,
    ) -> Result<(), ChannelError> {
        let packet = IncomingPacket::new(body, running.handle(), level);
        match &self.process {
            Some(process) => process.process_packet(channel, packet),
            None => drop(packet),
        }
        self.after_callback(channel)
    }

    /// Does what a packet callback has asked for.
    #[inline]
    fn after_callback(&mut self, channel: &Channel) -> Result<(), ChannelError> {
        if channel.callback_asked() {
            if let Some(handed_back) = channel.traffic().take_handed_back() {
                self.line.push_front(handed_back);
            }
            if let Some(error) = channel.stop_reason() {
                return Err(error);
            }
        }
        Ok(())
    }

    fn end_transaction(&mut self, channel: &Channel, transaction_id: u64) {
        let packet = channel.traffic().end_transaction(transaction_id);
        match packet {
            Some(packet) => Packet::end(packet, channel, NtStatus::SUCCESS, &self.scratch),
            // A late answer to a request given up, or a peer's invention.
            None => tracing::debug!(transaction_id, "completion of an unknown transaction ignored"),
        }
    }

    /// Sends what waits, while no packet is delivered.
    fn flush_queue(&mut self, channel: &Channel) {
        let flushed = channel.traffic().flush_now(&mut self.done);
        match flushed {
            Ok(ring) => ring.give(),
            Err(error) => channel.stop(ChannelError::Outgoing(error)),
        }
        // A completion routine that calls the channel must not wait for this very turn.
        channel.set_batch_thread(true);
        self.end_flushed(channel);
        channel.set_batch_thread(false);
    }

    fn end_flushed(&mut self, channel: &Channel) {
        for packet in self.done.drain(..) {
            Packet::end(packet, channel, NtStatus::SUCCESS, &[]);
        }
    }
}

/// Copies what the peer cannot change any more afterwards, once, and checks the copy.
fn fill(
    body: &mut Body,
    packet: &RingPacket<'_>,
    words_scratch: &mut Vec<u64>,
    is_pipe: bool,
) -> Result<(), ChannelError> {
    let payload_len = packet.payload_len as usize; // below 512 KiB: 16 bits of 8-byte units
    packet.copy_payload(body.begin(packet.transaction_id, packet.wants_completion, payload_len));
    if packet.kind == PacketKind::GpaDirect {
        fill_external(body, packet, words_scratch)?;
    }
    if is_pipe {
        narrow_to_pipe_message(body)?;
    }
    Ok(())
}

fn fill_external(
    body: &mut Body,
    packet: &RingPacket<'_>,
    scratch: &mut Vec<u64>,
) -> Result<(), ChannelError> {
    let words = packet.extension_len / 8;
    if let Some(room) = body.extension_room(words as usize) {
        packet.copy_extension_words(room);
        return body.check_external(words as usize).map_err(ChannelError::ExternalData);
    }
    // More than the channel is set up for: it is checked and counted, and the device decides (D-40).
    if words > EXTENSION_WORDS {
        return Err(ChannelError::ExternalDataSize { words, limit: EXTENSION_WORDS });
    }
    scratch.resize(words as usize, 0);
    packet.copy_extension_words(scratch);
    let ranges = extension::gpa_direct(scratch).map_err(ChannelError::ExternalData)?;
    body.external = crate::pool::External::TooMuch { bytes: ranges.total_bytes() };
    Ok(())
}

/// Takes a pipe's header off. The message's length is exact, unlike that of a packet.
fn narrow_to_pipe_message(body: &mut Body) -> Result<(), ChannelError> {
    let packet = PipePacket::parse(body.payload()).map_err(ChannelError::Pipe)?;
    if packet.packet_type != PipePacketType::Data {
        return Err(ChannelError::PipeType(packet.packet_type));
    }
    let len = packet.data.len();
    body.narrow(pipe::HEADER_SIZE as usize, len);
    Ok(())
}

fn read_payload(packet: &RingPacket<'_>, into: &mut Vec<u8>) {
    into.resize(packet.payload_len as usize, 0);
    packet.copy_payload(into);
}
