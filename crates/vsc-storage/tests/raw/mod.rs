//! A server without a library: it writes into the ring whatever a test likes. Client and server take
//! turns on one thread, so that every run is the same.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use kmcl::bus::{Bus, BusEvent, Doorbell, Endpoint, EventSink, Offer, ServerLink};
use kmcl::loopback::LoopbackBus;
use kmcl::{Guid, NtStatus};
use vmbus_ring::{OutgoingPacket, RingReader, RingWriter};
use vmbus_wire::packet::PacketKind;
use vsc_storage::wire::SCSI_INTERFACE;
use vsc_storage::wire::packet::{Operation, VstorPacket};
use vsc_storage::wire::protocol::ChannelProperties;
use vsc_storage::wire::srb::{ScsiRequest, ScsiStatus, SrbStatus};
use vsc_storage::{ClientConfig, StorageClient};
use zerocopy::IntoBytes;

/// The client drives itself here; nobody has to be woken.
struct NoDoorbell;

impl Doorbell for NoDoorbell {
    fn ring(&self) {}

    fn event_fd(&self) -> io::Result<BorrowedFd<'_>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// The server's ends of the rings.
pub(crate) struct RawServer {
    reader: RingReader,
    writer: RingWriter,
    pub(crate) link: Box<dyn ServerLink>,
}

/// A request as it came out of the ring.
pub(crate) struct Asked {
    pub(crate) id: u64,
    pub(crate) packet: VstorPacket,
}

impl RawServer {
    /// The next request, if there is one.
    fn request(&mut self) -> Option<Asked> {
        let packet = self.reader.peek().unwrap()?;
        let mut bytes = [0; 64];
        packet.copy_payload(&mut bytes);
        let (message, _) = VstorPacket::parse(&bytes).unwrap();
        let id = packet.transaction_id;
        self.reader.advance();
        let _ = self.reader.publish();
        Some(Asked { id, packet: message })
    }

    /// All requests there are.
    pub(crate) fn requests(&mut self) -> Vec<Asked> {
        std::iter::from_fn(|| self.request()).collect()
    }

    /// Answers every request with a success that moved `bytes`, and allocates nothing on the way.
    pub(crate) fn succeed_all(&mut self, bytes: u32) {
        while let Some(Asked { id, packet }) = self.request() {
            self.answer(id, &success(&packet, bytes));
        }
    }

    pub(crate) fn put(&mut self, kind: PacketKind, transaction_id: u64, payload: &[u8]) {
        let packet = OutgoingPacket {
            kind,
            wants_completion: false,
            transaction_id,
            extension: &[],
            payload: &[payload],
        };
        self.writer.push(&packet).unwrap();
        let _ = self.writer.publish();
    }

    pub(crate) fn answer(&mut self, id: u64, packet: &VstorPacket) {
        self.put(PacketKind::Completion, id, packet.as_bytes());
    }
}

/// A client that is ready, and its server.
pub(crate) fn connected() -> (StorageClient, RawServer) {
    let bus = LoopbackBus::new(4 << 20).unwrap();
    let (sink, recorder) = EventSink::recorder();
    let endpoint = Endpoint { events: sink, doorbell: Arc::new(NoDoorbell) };
    let link = bus.offer(Offer::new(SCSI_INTERFACE, Guid::ZERO), endpoint).unwrap();
    let mut config = ClientConfig::default();
    config.ring_pages = 4;
    let mut client = StorageClient::open(bus, config).unwrap();
    let opened = std::iter::repeat_with(|| {
        client.process().unwrap();
        recorder.take()
    })
    .flatten()
    .find_map(|event| match event {
        BusEvent::Opened(rings) => Some(rings),
        _ => None,
    });
    let rings = opened.unwrap();
    let (reader, writer) = (rings.incoming, rings.outgoing);
    let reader = RingReader::new(reader).unwrap();
    let writer = RingWriter::new(writer).unwrap();
    link.open_result(NtStatus::SUCCESS);
    let mut server = RawServer { reader, writer, link };
    while !client.is_ready() {
        for Asked { id, packet } in server.requests() {
            let ok = VstorPacket::answer(NtStatus::SUCCESS);
            let mut properties: ChannelProperties = ok.body();
            properties.max_transfer_bytes = 8192.into();
            let is_properties = packet.operation == Operation::QUERY_PROPERTIES;
            server.answer(id, &if is_properties { ok.with_body(&properties) } else { ok });
        }
        client.process().unwrap();
    }
    (client, server)
}

/// The answer that `bytes` bytes were moved.
pub(crate) fn success(request: &VstorPacket, bytes: u32) -> VstorPacket {
    let mut srb: ScsiRequest = request.body();
    srb.finish(SrbStatus::SUCCESS, ScsiStatus::GOOD, bytes);
    VstorPacket::answer(NtStatus::SUCCESS).with_body(&srb)
}
