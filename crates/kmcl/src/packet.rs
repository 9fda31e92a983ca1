//! A packet to the peer: an object that holds everything its send needs, so that a send cannot fail
//! for lack of resources, and that can be used again and again.

use std::sync::Arc;

use vmbus_ring::packet_ring_bytes;
use vmbus_wire::packet::{GpaDirectHeader, PacketKind};
use vmbus_wire::ranges::GpaRange;
use vmbus_wire::status::NtStatus;
use zerocopy::IntoBytes;

use crate::callbacks::PacketCompletion;
use crate::channel::Channel;
use crate::error::{Error, SendError};
use crate::flags::SendFlags;

/// One outgoing packet, owned by whoever may use it: the driver, until a send; the channel, while it
/// is queued or in flight; the driver again, in its completion routine. Dropping it frees it.
///
/// Source: VMBPACKET; VmbPacketAllocate, VmbPacketFree.
pub struct Packet {
    body: Option<Box<PacketBody>>,
    channel: Channel,
}

/// What a packet says: a pipe's header, or nothing, and the sender's message behind it.
#[derive(Clone, Copy)]
pub(crate) struct Message<'a> {
    pub(crate) header: &'a [u8],
    pub(crate) body: &'a [u8],
}

impl Message<'_> {
    pub(crate) fn len(&self) -> u32 {
        // Senders have checked the message against a limit far below 4 GiB.
        u32::try_from(self.header.len() + self.body.len()).unwrap_or(u32::MAX)
    }
}

/// What travels between driver, queue and table of transactions.
pub(crate) struct PacketBody {
    routine: Option<Arc<dyn PacketCompletion>>,
    pointer: usize,
    pub(crate) transaction: bool,
    /// Tells apart the packets of synchronous requests; 0 on others.
    pub(crate) tag: u64,
    /// One of the channel's pool, and counted there.
    pub(crate) pooled: bool,
    /// Its number in the order of queueing; 0 if it never was queued.
    pub(crate) queued: u64,
    /// The message, while the packet waits for room in the ring.
    message: Vec<u8>,
    /// The description of external data as it goes into the ring, in little-endian words; empty
    /// without any.
    extension: Vec<u64>,
}

impl PacketBody {
    pub(crate) fn new(message_size: u32) -> Self {
        Self {
            routine: None,
            pointer: 0,
            transaction: false,
            tag: 0,
            pooled: true,
            queued: 0,
            message: Vec::with_capacity(message_size as usize),
            extension: Vec::new(),
        }
    }

    /// Makes a freed packet like a new one, its memory kept.
    pub(crate) fn reset(&mut self) {
        self.routine = None;
        self.pointer = 0;
        self.tag = 0;
        self.queued = 0;
    }

    pub(crate) fn kind(&self) -> PacketKind {
        if self.extension.is_empty() { PacketKind::InBand } else { PacketKind::GpaDirect }
    }

    pub(crate) fn extension(&self) -> &[u8] {
        self.extension.as_bytes()
    }

    pub(crate) fn extension_len(&self) -> u32 {
        u32::try_from(self.extension.len() * 8).unwrap_or(u32::MAX)
    }

    /// Keeps the message until there is room in the ring.
    pub(crate) fn keep(&mut self, message: Message<'_>) {
        self.message.clear();
        self.message.extend_from_slice(message.header);
        self.message.extend_from_slice(message.body);
    }

    /// Takes over what a server's packet was elsewhere: its whole message, headers included.
    pub(crate) fn take_over(&mut self, transaction: bool, message: &[u8]) {
        self.transaction = transaction;
        self.without_external_data();
        self.keep(Message { header: &[], body: message });
    }

    pub(crate) fn message(&self) -> &[u8] {
        &self.message
    }

    /// Bytes of ring that the packet needs with the message it keeps.
    pub(crate) fn ring_bytes(&self) -> u32 {
        let message = u32::try_from(self.message.len()).unwrap_or(u32::MAX);
        packet_ring_bytes(self.extension_len(), message)
    }

    /// Describes external data the way the ring wants it: a count, then each range's words.
    pub(crate) fn describe<'a>(&mut self, ranges: impl IntoIterator<Item = GpaRange<'a>>) {
        self.extension.clear();
        self.extension.push(0);
        let mut count = 0;
        for range in ranges {
            count += 1;
            self.extension.push(range.header_word().to_le());
            self.extension.extend_from_slice(range.pfns);
            if cfg!(target_endian = "big") {
                let pfns = self.extension.iter_mut().rev().take(range.pfns.len());
                pfns.for_each(|pfn| *pfn = pfn.to_le());
            }
        }
        if let Some(first) = self.extension.first_mut() {
            *first = GpaDirectHeader::new(count).to_word().to_le();
        }
    }

    pub(crate) fn without_external_data(&mut self) {
        self.extension.clear();
    }

    /// The routine to call at the end; the default one just frees the packet.
    pub(crate) fn routine(&self) -> Option<Arc<dyn PacketCompletion>> {
        self.routine.clone()
    }

    pub(crate) fn set_routine(&mut self, routine: Option<Arc<dyn PacketCompletion>>) {
        self.routine = routine;
    }
}

impl Channel {
    /// An outgoing packet from the channel's pool, or `None` at the bound
    /// ([`Limits::PACKETS`](crate::Limits::PACKETS)).
    ///
    /// Source: VmbPacketAllocate.
    #[must_use]
    pub fn packet_allocate(&self) -> Option<Packet> {
        let size = self.shared.bounds.message_room();
        let body = self.traffic().allocate_packet(size)?;
        Some(Packet::new(body, self.clone()))
    }

    /// Bytes that a packet object of this channel takes, with room for its largest message.
    ///
    /// Source: VmbChannelSizeofPacket; D-37.
    #[must_use]
    pub fn sizeof_packet(&self) -> u32 {
        let object = u32::try_from(size_of::<PacketBody>()).unwrap_or(u32::MAX);
        object.saturating_add(self.shared.bounds.message_room())
    }

    /// An outgoing packet apart from the channel's pool and its bound: for a driver that keeps the
    /// count of its packets itself. `byte_count` is what it has set aside for the packet; the memory
    /// is given back when the packet is dropped.
    ///
    /// # Errors
    /// [`Error::Argument`] 3 for fewer bytes than [`Self::sizeof_packet`].
    ///
    /// Source: VmbPacketInitialize; D-37, D-50.
    pub fn packet_initialize(&self, byte_count: u32) -> Result<Packet, Error> {
        if byte_count < self.sizeof_packet() {
            let value = u64::from(byte_count);
            return Err(Error::Argument { position: 3, name: "ByteCount", value });
        }
        let mut body = Box::new(PacketBody::new(self.shared.bounds.message_room()));
        body.pooled = false;
        Ok(Packet::new(body, self.clone()))
    }
}

impl Packet {
    pub(crate) fn new(body: Box<PacketBody>, channel: Channel) -> Self {
        Self { body: Some(body), channel }
    }

    /// Ends `body` with `status`: its completion routine, or the pool.
    pub(crate) fn end(body: Box<PacketBody>, channel: &Channel, status: NtStatus, payload: &[u8]) {
        let routine = body.routine();
        let packet = Self::new(body, channel.clone());
        match routine {
            Some(routine) => routine.completed(packet, status, payload),
            None => drop(packet),
        }
    }

    /// Sets what is called when the packet has ended. Without one the packet is freed then.
    ///
    /// Source: VmbPacketSetCompletionRoutine.
    pub fn set_completion_routine(&mut self, routine: Arc<dyn PacketCompletion>) {
        if let Some(body) = &mut self.body {
            body.set_routine(Some(routine));
        }
    }

    /// The channel that the packet belongs to.
    ///
    /// Source: VmbPacketGetChannel.
    #[must_use]
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Keeps a word for the driver; 0 at first (D-51).
    ///
    /// Source: VmbPacketSetPointer.
    pub fn set_pointer(&mut self, pointer: usize) {
        if let Some(body) = &mut self.body {
            body.pointer = pointer;
        }
    }

    /// The word kept by [`Self::set_pointer`].
    ///
    /// Source: VmbPacketGetPointer.
    #[must_use]
    pub fn pointer(&self) -> usize {
        self.body.as_ref().map_or(0, |body| body.pointer)
    }

    /// Sends `message`, or queues it where the ring is full or the channel not open yet. `external`
    /// describes memory that the peer may use until it completes the packet; clients only.
    ///
    /// # Errors
    /// The packet and why it was refused (D-33): a message above the maximum packet size, external
    /// data above its maximum or malformed (D-40), a server's external data (D-41), or a channel
    /// that is disabled or closing.
    ///
    /// Source: VmbPacketSend.
    pub fn send(
        self,
        message: &[u8],
        external: Option<&[GpaRange<'_>]>,
        flags: SendFlags,
    ) -> Result<(), SendError> {
        let channel = self.channel.clone();
        channel.send(self, message, external, flags)
    }

    /// Sends `message` with `length` bytes of the memory that `ranges` describe, from `offset` on;
    /// a length of 0 means all that follows. [`SendFlags::FORCE_MDL_LENGTH`] takes `length` from the
    /// first range even beyond its own length, at most up to the end of its last page.
    ///
    /// # Errors
    /// As for [`Self::send`], and where [`SendFlags::WAIT_FOR_COMPLETION`] is missing (D-35).
    ///
    /// Source: VmbPacketSendWithExternalMdl.
    pub fn send_with_external_mdl(
        self,
        message: &[u8],
        ranges: &[GpaRange<'_>],
        offset: u32,
        length: u32,
        flags: SendFlags,
    ) -> Result<(), SendError> {
        let channel = self.channel.clone();
        channel.send_with_external_mdl(self, message, ranges, offset, length, flags)
    }

    /// Sends `message` with whole pages of external data.
    ///
    /// # Errors
    /// As for [`Self::send`]; no page at all (D-39); a missing
    /// [`SendFlags::WAIT_FOR_COMPLETION`] (D-35).
    ///
    /// Source: VmbPacketSendWithExternalPfns; D-38, D-39.
    pub fn send_with_external_pfns(
        self,
        message: &[u8],
        pfns: &[u64],
        flags: SendFlags,
    ) -> Result<(), SendError> {
        let channel = self.channel.clone();
        channel.send_with_external_pfns(self, message, pfns, flags)
    }

    pub(crate) fn body_mut(&mut self) -> Option<&mut PacketBody> {
        self.body.as_deref_mut()
    }

    /// The packet in the hands of one who has its body, for as long as that is put into it.
    pub(crate) fn empty(channel: Channel) -> Self {
        Self { body: None, channel }
    }

    pub(crate) fn put_body(&mut self, body: Box<PacketBody>) {
        self.body = Some(body);
    }

    pub(crate) fn body(&self) -> Option<&PacketBody> {
        self.body.as_deref()
    }

    pub(crate) fn take_body(&mut self) -> Option<Box<PacketBody>> {
        self.body.take()
    }

    pub(crate) fn into_body(mut self) -> Option<Box<PacketBody>> {
        self.body.take()
    }
}

impl Drop for Packet {
    fn drop(&mut self) {
        if let Some(body) = self.body.take() {
            self.channel.traffic().free_packet(body);
        }
    }
}

impl std::fmt::Debug for Packet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packet").field("pointer", &self.pointer()).finish_non_exhaustive()
    }
}
