//! Deliberate mistakes in moving a controller, for tests of those who have to find them: checkers of a
//! disk's contents, and of completions. All are off until a test switches one on.

use std::sync::atomic::{AtomicBool, Ordering};

use saved_state::channel::{
    ChannelRecord, INCOMING_PACKET, IncomingPacketRecord, KINDS, OutgoingPacketRecord,
};
use saved_state::writer::Step;
use saved_state::{FormatVersion, StreamInfo, StreamKind, StreamReader, StreamWriter, WriteError};

/// A mistake.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// Requests that run are handed over as cancelled without being so: their originals land later, over
    /// what was written meanwhile.
    ReplayWithoutFence,
    /// In the next stream of a channel with requests in flight the first of them is missing: nobody ever
    /// completes it where that is restored.
    DropPacket,
    /// There it stands twice, and is completed twice: two completions of one transaction are in the ring.
    /// (The library's types leave no way to complete a packet twice here, nor to lose one.)
    CompleteTwice,
}

static REPLAY_WITHOUT_FENCE: AtomicBool = AtomicBool::new(false);
static DROP_PACKET: AtomicBool = AtomicBool::new(false);
static COMPLETE_TWICE: AtomicBool = AtomicBool::new(false);

impl Fault {
    fn switch(self) -> &'static AtomicBool {
        match self {
            Self::ReplayWithoutFence => &REPLAY_WITHOUT_FENCE,
            Self::DropPacket => &DROP_PACKET,
            Self::CompleteTwice => &COMPLETE_TWICE,
        }
    }

    /// Switches it on or off, for the whole process.
    pub fn set(self, is_on: bool) {
        self.switch().store(is_on, Ordering::SeqCst);
    }

    pub(crate) fn is_on(self) -> bool {
        self.switch().load(Ordering::SeqCst)
    }
}

/// How often the first incoming packet of the next stream is to stand there.
pub(crate) fn first_packet_stands() -> u32 {
    match (Fault::DropPacket.is_on(), Fault::CompleteTwice.is_on()) {
        (true, _) => 0,
        (false, true) => 2,
        (false, false) => 1,
    }
}

/// The stream of a channel with its first incoming packet so many times; `None` if it has none, or no
/// room for one more. What is to be done is done with this.
pub(crate) fn repeat_first_packet(stream: &[u8], times: u32) -> Option<Vec<u8>> {
    let mut reader = StreamReader::new(StreamKind::CHANNEL, KINDS);
    let mut input = stream;
    let first = reader.read(&mut input).ok()??;
    let mut channel: ChannelRecord = first.decode().ok()?;
    let info = reader.header()?.info;
    if channel.incoming_packets == 0 || channel.incoming_packets == channel.maximum_packet_count {
        return None;
    }
    channel.incoming_packets = channel.incoming_packets + times - 1;
    let (chunks, items) = (info.chunks + times - 1, info.items + times - 1);
    let info = StreamInfo { chunks, items, ..info };
    let mut writer = StreamWriter::new(FormatVersion::NEWEST, info, KINDS).ok()?;
    let mut out = vec![0; stream.len() * 2];
    let mut at = 0;
    let mut put = |step: Result<Step, _>| match step {
        Ok::<_, WriteError>(Step::Written { bytes }) => {
            at += bytes;
            Some(at)
        }
        _ => None,
    };
    let mut is_first = true;
    let mut end = put(writer.header(&mut out))?;
    end = put(writer.record(&channel, out.get_mut(end..)?))?;
    while let Some(chunk) = reader.read(&mut input).ok()? {
        if chunk.kind() != INCOMING_PACKET {
            let packet: OutgoingPacketRecord<'_> = chunk.decode().ok()?;
            end = put(writer.record(&packet, out.get_mut(end..)?))?;
            continue;
        }
        let packet: IncomingPacketRecord<'_> = chunk.decode().ok()?;
        let is_first = std::mem::take(&mut is_first);
        for _ in 0..if is_first { times } else { 1 } {
            end = put(writer.record(&packet, out.get_mut(end..)?))?;
        }
    }
    end = put(writer.end(out.get_mut(end..)?))?;
    out.truncate(end);
    DROP_PACKET.store(false, Ordering::SeqCst);
    COMPLETE_TWICE.store(false, Ordering::SeqCst);
    Some(out)
}
