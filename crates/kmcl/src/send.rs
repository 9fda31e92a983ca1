//! The three sends.
//!
//! Source: kmcl-semantics section 8; D-33, D-35, D-38 to D-41.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU32};

use vmbus_wire::PAGE_SIZE_U32;
use vmbus_wire::pipe::{self, PipeHeader};
use vmbus_wire::ranges::GpaRange;
use vmbus_wire::status::NtStatus;
use zerocopy::IntoBytes;

use crate::channel::Channel;
use crate::clip::clip;
use crate::error::{ChannelError, Error, SendError};
use crate::flags::SendFlags;
use crate::lifecycle::Side;
use crate::packet::{Message, Packet, PacketBody};
use crate::settings::Settings;
use crate::stage;
use crate::traffic::{SendRefused, Sent};

/// Which argument the flags of VmbPacketSend are.
const SEND_FLAGS: u8 = 5;

/// The limits that a send is checked against. A copy of the settings that takes no lock to read;
/// written only while the channel is Disabled, when nothing is sent.
#[derive(Default)]
pub(crate) struct SendBounds {
    message: AtomicU32,
    external_bytes: AtomicU32,
    external_ranges: AtomicU32,
    is_pipe: AtomicBool,
}

impl SendBounds {
    pub(crate) fn set(&self, settings: &Settings) {
        let message = settings.maximum_packet_size;
        let is_pipe = settings.is_pipe();
        let message = if is_pipe { message.min(pipe::MAX_PAYLOAD) } else { message };
        self.message.store(message, Relaxed);
        self.external_bytes.store(settings.external_data_size, Relaxed);
        self.external_ranges.store(settings.external_data_ranges, Relaxed);
        self.is_pipe.store(is_pipe, Relaxed);
    }

    /// Room that a packet object needs for its message.
    pub(crate) fn message_room(&self) -> u32 {
        self.message.load(Relaxed) + pipe::HEADER_SIZE
    }

    /// Bytes that the library puts in front of each message.
    pub(crate) fn header_len(&self) -> usize {
        if self.is_pipe.load(Relaxed) { pipe::HEADER_SIZE as usize } else { 0 }
    }
}

impl Channel {
    pub(crate) fn send(
        &self,
        packet: Packet,
        message: &[u8],
        external: Option<&[GpaRange<'_>]>,
        flags: SendFlags,
    ) -> Result<(), SendError> {
        let ranges = external.unwrap_or_default().iter().copied();
        let sent = self.put(packet, message, ranges, flags, SEND_FLAGS);
        self.publish();
        self.end_if_done(sent)
    }

    /// As [`Self::send`], shown to the peer later.
    pub(crate) fn send_staged(
        &self,
        packet: Packet,
        message: &[u8],
        external: Option<&[GpaRange<'_>]>,
        flags: SendFlags,
    ) -> Result<(), SendError> {
        let ranges = external.unwrap_or_default().iter().copied();
        let sent = self.put(packet, message, ranges, flags, SEND_FLAGS);
        self.end_if_done(sent)
    }

    pub(crate) fn send_with_external_mdl(
        &self,
        packet: Packet,
        message: &[u8],
        ranges: &[GpaRange<'_>],
        offset: u32,
        length: u32,
        flags: SendFlags,
    ) -> Result<(), SendError> {
        const FLAGS: u8 = 7;
        if !flags.contains(SendFlags::WAIT_FOR_COMPLETION) {
            return Err(SendError { packet, error: bad_flags(FLAGS, flags) });
        }
        let forced = flags.contains(SendFlags::FORCE_MDL_LENGTH);
        let sent = match clip(ranges, offset, length, forced) {
            Ok(clipped) => self.put(packet, message, clipped, flags, FLAGS),
            Err(error) => {
                let error = error.at(4, ["ExternalDataMdl", "MdlOffset", "MdlLength"]);
                return Err(SendError { packet, error });
            }
        };
        self.publish();
        self.end_if_done(sent)
    }

    pub(crate) fn send_with_external_pfns(
        &self,
        packet: Packet,
        message: &[u8],
        pfns: &[u64],
        flags: SendFlags,
    ) -> Result<(), SendError> {
        const FLAGS: u8 = 6;
        if !flags.contains(SendFlags::WAIT_FOR_COMPLETION) {
            return Err(SendError { packet, error: bad_flags(FLAGS, flags) });
        }
        let bytes = u32::try_from(pfns.len()).ok().and_then(|n| n.checked_mul(PAGE_SIZE_U32));
        let Some(byte_count) = bytes.filter(|bytes| *bytes != 0) else {
            let error =
                Error::Argument { position: 5, name: "PfnLength", value: pfns.len() as u64 };
            return Err(SendError { packet, error });
        };
        let range = GpaRange { byte_count, byte_offset: 0, pfns };
        let sent = self.put(packet, message, std::iter::once(range), flags, FLAGS);
        self.publish();
        self.end_if_done(sent)
    }

    /// Checks, describes, and puts the packet into the ring or the queue.
    fn put<'r>(
        &self,
        mut packet: Packet,
        message: &[u8],
        ranges: impl Iterator<Item = GpaRange<'r>> + Clone,
        flags: SendFlags,
        flags_position: u8,
    ) -> Result<Sent, SendError> {
        let Some(body) = packet.body_mut() else {
            return Err(SendError { packet, error: Error::Cancelled });
        };
        if let Err(error) = self.prepare(body, message, ranges, flags, flags_position) {
            return Err(SendError { packet, error });
        }
        let Some(body) = packet.into_body() else { return Ok(Sent::Kept) };
        let header = match self.shared.bounds.is_pipe.load(Relaxed) {
            true => u32::try_from(message.len()).ok().and_then(PipeHeader::data),
            false => None,
        };
        let header = header.as_ref().map_or(&[][..], |header| header.as_bytes());
        let message = Message { header, body: message };
        let sent = {
            let mut traffic = self.traffic();
            // A completion that a callback has made before this send must not be overtaken by it.
            match stage::settle_before(self, &mut traffic) {
                // Looked at again under the lock that cancelling takes: what it does not find any
                // more would never end.
                Ok(()) if self.state().accepts_sends() => traffic.send(body, message),
                Ok(()) => Err((body, SendRefused::Removed)),
                Err(error) => Err((body, SendRefused::Ring(error))),
            }
        };
        sent.map_err(|(body, refused)| SendError {
            packet: Packet::new(body, self.clone()),
            error: self.explain(refused),
        })
    }

    /// Whether a message of this length may be sent now.
    pub(crate) fn may_send(&self, len: usize) -> Result<(), Error> {
        let state = self.state();
        if !state.accepts_sends() {
            return Err(Error::Removed { state });
        }
        if len > self.shared.bounds.message.load(Relaxed) as usize {
            let value = len as u64;
            return Err(Error::Argument { position: 3, name: "BufferLength", value });
        }
        Ok(())
    }

    fn prepare<'r>(
        &self,
        body: &mut PacketBody,
        message: &[u8],
        ranges: impl Iterator<Item = GpaRange<'r>> + Clone,
        flags: SendFlags,
        flags_position: u8,
    ) -> Result<(), Error> {
        self.may_send(message.len())?;
        let bounds = &self.shared.bounds;
        if SendFlags::all().bits() & flags.bits() != flags.bits() {
            return Err(bad_flags(flags_position, flags));
        }
        body.transaction = flags.contains(SendFlags::WAIT_FOR_COMPLETION);
        if ranges.clone().next().is_none() {
            body.without_external_data();
            return Ok(());
        }
        if self.side() == Side::Server {
            return Err(Error::ServerExternalData);
        }
        let too_much = |value| Error::Argument { position: 4, name: "ExternalDataMdl", value };
        let (mut bytes, mut count) = (0_u64, 0_u32);
        for range in ranges.clone() {
            range.check().map_err(|_| too_much(u64::from(range.byte_count)))?;
            bytes += u64::from(range.byte_count);
            count = count.saturating_add(1);
        }
        if bytes > u64::from(bounds.external_bytes.load(Relaxed))
            || count > bounds.external_ranges.load(Relaxed)
            || bounds.is_pipe.load(Relaxed)
        {
            return Err(too_much(bytes));
        }
        body.describe(ranges);
        Ok(())
    }

    fn end_if_done(&self, sent: Result<Sent, SendError>) -> Result<(), SendError> {
        match sent? {
            Sent::Done(body) => Packet::end(body, self, NtStatus::SUCCESS, &[]),
            Sent::Kept => {}
            Sent::Blocked => self.kick(),
        }
        Ok(())
    }

    fn explain(&self, refused: SendRefused) -> Error {
        match refused {
            SendRefused::Removed => Error::Removed { state: self.state() },
            SendRefused::TooManyTransactions => Error::Resources("transactions in flight"),
            SendRefused::TooLarge => {
                Error::Argument { position: 3, name: "BufferLength", value: u64::MAX }
            }
            SendRefused::Ring(error) => {
                self.stop(ChannelError::Outgoing(error));
                Error::Removed { state: self.state() }
            }
        }
    }
}

fn bad_flags(position: u8, flags: SendFlags) -> Error {
    Error::Argument { position, name: "Flags", value: u64::from(flags.bits()) }
}
