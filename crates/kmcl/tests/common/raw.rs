//! A bus with a channel at one end only: the test holds the other end of both rings, as raw pages
//! that it can fill with anything, and hears what the channel tells its bus.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use kmcl::bus::{
    Bus, BusEvent, ClientLink, Doorbell, Endpoint, EventSink, GpadlPages, Offer, OpenRequest,
    OpenRings, Residency, ServerLink, Signal, Target, USER_DATA_SIZE,
};
use kmcl::memory::{GuestMemory, MappingBudget, PageAllocator, PageRun, RingPages};
use kmcl::{Guid, NtStatus};
use vmbus_ring::{ControlWords, OutgoingPacket, RingReader, RingWriter, Word};
use vmbus_wire::packet::PacketKind;

use super::{INSTANCE, lock, until};

/// What a channel has told its bus.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Said {
    OpenResult(NtStatus),
    Closed,
    Revoke,
    MovedAway,
    InUse(u32, bool),
    /// Pages asked for: incoming and outgoing.
    Open(u32, u32),
    Close,
    CreateGpadl(GpadlPages),
    TeardownGpadl(u32),
    Latency(u16),
}

/// See the module.
pub(crate) struct RawBus {
    memory: GuestMemory,
    pages: PageAllocator,
    mappings: MappingBudget,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    endpoint: Option<Endpoint>,
    offer: Option<Offer>,
    target: Option<Target>,
    request: Option<OpenRequest>,
    said: Vec<Said>,
    /// What the next offer or bind is answered with instead of success.
    refuse: Option<NtStatus>,
    /// What GPADL handles describe.
    gpadls: Vec<(u32, GpadlPages)>,
    residency: Option<Arc<dyn Residency>>,
    latency: u16,
}

/// The test's end of the rings of one opening.
pub(crate) struct Peer {
    /// What the channel reads: ours to write.
    pub(crate) to_channel: RawRing,
    /// What the channel writes: ours to read.
    pub(crate) from_channel: RawRing,
    signals: Arc<Signals>,
    doorbell: Arc<dyn Doorbell>,
    _run: PageRun,
}

/// One ring as its other end sees it: pages to write anything to.
pub(crate) struct RawRing {
    pages: RingPages,
    memory: GuestMemory,
    pfns: Vec<u64>,
    mappings: MappingBudget,
    /// Where the next packet is put.
    position: u32,
}

#[derive(Default)]
struct Signals(AtomicU32);

impl Signal for Signals {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl RawBus {
    pub(crate) fn new() -> Arc<Self> {
        let bytes = 8 << 20;
        let memory = GuestMemory::memfd(bytes).unwrap();
        Arc::new(Self {
            pages: PageAllocator::new(&memory, 0, bytes).unwrap(),
            memory,
            mappings: MappingBudget::default(),
            state: Mutex::default(),
        })
    }

    /// A bus for another channel of the same guest: the same memory, the same budgets.
    pub(crate) fn beside(&self) -> Arc<Self> {
        Arc::new(Self {
            memory: self.memory.clone(),
            pages: self.pages.clone(),
            mappings: self.mappings.clone(),
            state: Mutex::default(),
        })
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Pages and mappings that nobody has at present.
    pub(crate) fn free(&self) -> (u64, usize) {
        (self.pages.free_pages(), self.mappings.left())
    }

    pub(crate) fn allocate(&self, pages: u32) -> PageRun {
        self.pages.allocate(pages).unwrap()
    }

    /// Answers the next offer or bind with `status`.
    pub(crate) fn refuse(&self, status: NtStatus) {
        lock(&self.state).refuse = Some(status);
    }

    pub(crate) fn set_residency(&self, residency: Arc<dyn Residency>) {
        lock(&self.state).residency = Some(residency);
    }

    pub(crate) fn set_gpadl(&self, gpadl: u32, pages: GpadlPages) {
        lock(&self.state).gpadls.push((gpadl, pages));
    }

    /// What the channel said since the last look.
    pub(crate) fn take_said(&self) -> Vec<Said> {
        std::mem::take(&mut lock(&self.state).said)
    }

    /// Waits until the channel, on another thread, has said something.
    pub(crate) fn wait_said(&self) -> Vec<Said> {
        until("the channel says something", || !lock(&self.state).said.is_empty());
        self.take_said()
    }

    pub(crate) fn offer_made(&self) -> Offer {
        lock(&self.state).offer.clone().unwrap()
    }

    pub(crate) fn target_wanted(&self) -> Target {
        lock(&self.state).target.unwrap()
    }

    pub(crate) fn request_made(&self) -> OpenRequest {
        lock(&self.state).request.clone().unwrap()
    }

    pub(crate) fn events(&self) -> EventSink {
        lock(&self.state).endpoint.as_ref().unwrap().events.clone()
    }

    pub(crate) fn post(&self, event: BusEvent) -> bool {
        self.events().post(event)
    }

    /// The guest opens the channel that was offered, with rings of so many pages.
    pub(crate) fn open(&self, to_server: u32, to_client: u32) -> Peer {
        let (peer, rings) = self.make_rings(to_server, to_client);
        assert!(self.post(BusEvent::Opened(rings)));
        peer
    }

    /// The guest's page frame numbers for a ring, which the caller fills as it likes first.
    pub(crate) fn open_prepared(
        &self,
        to_server: u32,
        to_client: u32,
        prepare: impl FnOnce(&Peer),
    ) -> Peer {
        let (peer, rings) = self.make_rings(to_server, to_client);
        prepare(&peer);
        assert!(self.post(BusEvent::Opened(rings)));
        peer
    }

    /// The bus brings rings of before once more, to whatever channel is offered now: `resumed`, or as
    /// if the guest had opened the channel anew.
    pub(crate) fn open_again(&self, peer: &Peer, resumed: bool) {
        let rings = OpenRings {
            incoming: peer.to_channel.map(),
            outgoing: peer.from_channel.map(),
            memory: self.memory.clone(),
            signal: Arc::clone(&peer.signals) as _,
            residency: lock(&self.state).residency.clone(),
            user_data: [0x5a; USER_DATA_SIZE],
            resumed,
        };
        assert!(self.post(BusEvent::Opened(rings)));
    }

    /// An offer for the client that is bound.
    pub(crate) fn offered(&self, mmio: Option<(u64, u64)>) {
        assert!(self.post(BusEvent::Offered { interface_instance: INSTANCE, mmio }));
    }

    /// The host has opened the channel that the client asked for.
    pub(crate) fn open_completed(&self) -> Peer {
        let request = self.request_made();
        let (peer, rings) = self.make_rings(request.incoming_pages, request.outgoing_pages);
        assert!(self.post(BusEvent::OpenCompleted(Ok(rings))));
        peer
    }

    /// Rings that the channel reads, of `incoming` pages, and writes, of `outgoing` pages.
    pub(crate) fn make_rings(&self, incoming: u32, outgoing: u32) -> (Peer, OpenRings) {
        let run = self.pages.allocate(incoming + outgoing).unwrap();
        let pfns: Vec<u64> = run.pfns().collect();
        let (incoming, outgoing) = pfns.split_at(incoming as usize);
        let signals = Arc::new(Signals::default());
        let state = lock(&self.state);
        let endpoint = state.endpoint.as_ref().unwrap();
        let peer = Peer {
            to_channel: RawRing::new(self, incoming),
            from_channel: RawRing::new(self, outgoing),
            signals: Arc::clone(&signals),
            doorbell: Arc::clone(&endpoint.doorbell),
            _run: run,
        };
        let rings = OpenRings {
            incoming: peer.to_channel.map(),
            outgoing: peer.from_channel.map(),
            memory: self.memory.clone(),
            signal: signals,
            residency: state.residency.clone(),
            user_data: [0x5a; USER_DATA_SIZE],
            resumed: false,
        };
        (peer, rings)
    }
}

impl Peer {
    /// How often the channel has signalled.
    pub(crate) fn signals(&self) -> u32 {
        self.signals.0.load(Ordering::SeqCst)
    }

    /// Rings the channel's doorbell.
    pub(crate) fn ring(&self) {
        self.doorbell.ring();
    }

    /// An honest end of what the channel writes.
    pub(crate) fn reader(&self) -> RingReader {
        RingReader::new(self.from_channel.map()).unwrap()
    }

    /// An honest end of what the channel reads.
    pub(crate) fn writer(&self) -> RingWriter {
        RingWriter::new(self.to_channel.map()).unwrap()
    }
}

/// Puts one packet into a ring, honestly.
pub(crate) fn push(
    writer: &mut RingWriter,
    kind: PacketKind,
    wants_completion: bool,
    transaction_id: u64,
    payload: &[u8],
) {
    let packet = OutgoingPacket {
        kind,
        wants_completion,
        transaction_id,
        extension: &[],
        payload: &[payload],
    };
    writer.push(&packet).unwrap();
    let _the_test_drives_the_channel = writer.publish();
}

/// A packet read out of a ring.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Read {
    pub(crate) kind: PacketKind,
    pub(crate) wants_completion: bool,
    pub(crate) transaction_id: u64,
    pub(crate) extension: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

/// Everything that is in a ring.
pub(crate) fn read_all(reader: &mut RingReader) -> Vec<Read> {
    let mut packets = Vec::new();
    while let Some(packet) = reader.peek().unwrap() {
        let mut read = Read {
            kind: packet.kind,
            wants_completion: packet.wants_completion,
            transaction_id: packet.transaction_id,
            extension: vec![0; packet.extension_len as usize],
            payload: vec![0; packet.payload_len as usize],
        };
        packet.copy_extension(&mut read.extension);
        packet.copy_payload(&mut read.payload);
        packets.push(read);
        reader.advance();
    }
    let _the_test_drives_the_channel = reader.publish();
    packets
}

impl RawRing {
    fn new(bus: &RawBus, pfns: &[u64]) -> Self {
        bus.memory.fill(pfns[0] * 4096, 4096, 0).unwrap();
        let pages = RingPages::map(&bus.memory, pfns, &bus.mappings).unwrap();
        vmbus_ring::initialize(&pages);
        Self {
            pages,
            memory: bus.memory.clone(),
            pfns: pfns.to_vec(),
            mappings: bus.mappings.clone(),
            position: 0,
        }
    }

    /// The same pages once more.
    pub(crate) fn map(&self) -> RingPages {
        RingPages::map(&self.memory, &self.pfns, &self.mappings).unwrap()
    }

    /// Bytes of the data area.
    pub(crate) fn data_len(&self) -> u32 {
        self.pages.data_len()
    }

    pub(crate) fn word(&self, word: Word) -> u32 {
        self.pages.load(word, Ordering::SeqCst)
    }

    pub(crate) fn set_word(&self, word: Word, value: u32) {
        self.pages.store(word, value, Ordering::SeqCst);
    }

    /// Writes `words` where the next packet is, shows the channel `shown` bytes of ring, and moves on.
    pub(crate) fn put_words(&mut self, words: &[u64], shown: u32) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.pages.write(self.position, &bytes);
        self.position = (self.position + shown) % self.data_len();
        self.set_word(Word::WriteIndex, self.position);
    }

    /// Puts a packet of any descriptor: `body` follows the descriptor; the trailer is right.
    pub(crate) fn put(&mut self, descriptor: Descriptor, body: &[u64]) {
        let trailer = u64::from(self.position) << 32;
        let mut words = descriptor.words().to_vec();
        words.extend_from_slice(body);
        words.push(trailer);
        let shown = u32::try_from(words.len() * 8).unwrap();
        self.put_words(&words, shown);
    }
}

/// A descriptor as the wire has it; lengths in units of 8 bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) kind: u16,
    pub(crate) data_offset: u16,
    pub(crate) length: u16,
    pub(crate) flags: u16,
    pub(crate) transaction_id: u64,
}

impl Descriptor {
    /// An in-band packet with `words` words of payload.
    pub(crate) fn in_band(words: u16) -> Self {
        Self { kind: 6, data_offset: 2, length: 2 + words, flags: 1, transaction_id: 0x77 }
    }

    /// A packet with `extension` words of external data and no payload.
    pub(crate) fn gpa_direct(extension: u16) -> Self {
        let length = 2 + extension;
        Self { kind: 9, data_offset: length, length, flags: 1, transaction_id: 0x99 }
    }

    pub(crate) fn words(self) -> [u64; 2] {
        let word = u64::from(self.kind)
            | u64::from(self.data_offset) << 16
            | u64::from(self.length) << 32
            | u64::from(self.flags) << 48;
        [word, self.transaction_id]
    }
}

// ---- The seam ---------------------------------------------------------------------------------------

/// The bus, as a link to it sees it.
struct Line(Arc<RawBus>);

impl Line {
    fn say(&self, said: Said) {
        lock(&self.0.state).said.push(said);
    }
}

impl Bus for BusHandle {
    fn offer(&self, offer: Offer, endpoint: Endpoint) -> Result<Box<dyn ServerLink>, NtStatus> {
        let mut state = lock(&self.0.state);
        if let Some(status) = state.refuse.take() {
            return Err(status);
        }
        state.offer = Some(offer);
        state.endpoint = Some(endpoint);
        Ok(Box::new(Line(Arc::clone(&self.0))))
    }

    fn bind(&self, target: Target, endpoint: Endpoint) -> Result<Box<dyn ClientLink>, NtStatus> {
        let mut state = lock(&self.0.state);
        if let Some(status) = state.refuse.take() {
            return Err(status);
        }
        state.target = Some(target);
        state.endpoint = Some(endpoint);
        Ok(Box::new(Line(Arc::clone(&self.0))))
    }
}

/// What a channel holds of a [`RawBus`].
struct BusHandle(Arc<RawBus>);

/// `bus` as channels want it.
pub(crate) fn as_bus(bus: &Arc<RawBus>) -> Arc<dyn Bus> {
    Arc::new(BusHandle(Arc::clone(bus)))
}

impl ServerLink for Line {
    fn open_result(&self, status: NtStatus) {
        self.say(Said::OpenResult(status));
    }
    fn closed(&self) {
        self.say(Said::Closed);
    }
    fn revoke(&self) {
        self.say(Said::Revoke);
    }
    fn moved_away(&self) {
        self.say(Said::MovedAway);
    }
    fn gpadl(&self, gpadl: u32) -> Result<GpadlPages, NtStatus> {
        let state = lock(&self.0.state);
        let found = state.gpadls.iter().find(|(handle, _)| *handle == gpadl);
        found.map(|(_, pages)| pages.clone()).ok_or(NtStatus::INVALID_PARAMETER_3)
    }
    fn set_gpadl_in_use(&self, gpadl: u32, in_use: bool) {
        self.say(Said::InUse(gpadl, in_use));
    }
}

impl ClientLink for Line {
    fn open(&self, request: OpenRequest) {
        self.say(Said::Open(request.incoming_pages, request.outgoing_pages));
        lock(&self.0.state).request = Some(request);
    }
    fn close(&self) {
        self.say(Said::Close);
    }
    /// Handles count from 1; the test answers.
    fn create_gpadl(&self, pages: GpadlPages) -> Result<u32, NtStatus> {
        self.say(Said::CreateGpadl(pages.clone()));
        let mut state = lock(&self.0.state);
        let handle = u32::try_from(state.gpadls.len()).unwrap() + 1;
        state.gpadls.push((handle, pages));
        Ok(handle)
    }
    fn teardown_gpadl(&self, gpadl: u32) {
        self.say(Said::TeardownGpadl(gpadl));
    }
    fn set_interrupt_latency(&self, latency_100ns: u16) -> Result<u16, NtStatus> {
        self.say(Said::Latency(latency_100ns));
        let latency = &mut lock(&self.0.state).latency;
        Ok(std::mem::replace(latency, latency_100ns))
    }
    fn allocate_pages(&self, pages: u32) -> Result<PageRun, NtStatus> {
        self.0.pages.allocate(pages).map_err(|_| NtStatus::INSUFFICIENT_RESOURCES)
    }
}

/// Some other instance than [`INSTANCE`].
pub(crate) const OTHER: Guid = Guid::from_u128(0x6b6d_636c_0000_4000_8000_7465_7374_0003);
