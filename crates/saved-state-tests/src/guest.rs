//! The guest's end of one channel, by hand: pages for its rings, packets put in, packets taken out.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kmcl::bus::{
    Bus, BusEvent, ClientLink, Endpoint, GpadlPages, Offer, OpenRings, ServerLink, Signal, Target,
    USER_DATA_SIZE,
};
use kmcl::memory::{GuestMemory, MappingBudget, PageAllocator, PageRun, RingPages};
use kmcl::{Guid, NtStatus};
use vmbus_ring::{ControlWords, OutgoingPacket, RingReader, RingWriter, Word};
use vmbus_wire::packet::PacketKind;

/// What a lock guards is whole at every step, also after a panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A bus with nobody behind it: it takes one offer after another, and the test plays the guest.
pub struct HandBus {
    memory: GuestMemory,
    pages: PageAllocator,
    mappings: MappingBudget,
    /// The newest of each instance, the last one offered last.
    endpoints: Mutex<Vec<(Guid, Endpoint)>>,
}

/// Where the rings of an opening stand: the index of the next packet in each, both empty.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Standing {
    /// In the ring that the server reads.
    pub read_index: u32,
    /// In the ring that the server writes.
    pub write_index: u32,
    /// They are rings that were saved, and go on.
    pub resumed: bool,
}

/// The guest's end of the rings of one opening.
#[derive(Debug)]
pub struct Rings {
    /// Into the ring that the server reads.
    pub to_server: RingWriter,
    /// Out of the ring that the server writes.
    pub from_server: RingReader,
    _run: PageRun,
}

/// A packet that the server wrote.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Taken {
    /// A message or a completion.
    pub kind: PacketKind,
    /// Its id.
    pub transaction_id: u64,
    /// Whether the server wants it completed.
    pub wants_completion: bool,
    /// What it says.
    pub payload: Vec<u8>,
}

struct Nobody;

impl Signal for Nobody {
    fn signal(&self) {}
}

impl ServerLink for Nobody {
    fn open_result(&self, _: NtStatus) {}
    fn closed(&self) {}
    fn revoke(&self) {}
    fn moved_away(&self) {}
    fn gpadl(&self, _: u32) -> Result<GpadlPages, NtStatus> {
        Err(NtStatus::INVALID_PARAMETER_1)
    }
    fn set_gpadl_in_use(&self, _: u32, _: bool) {}
}

impl Bus for HandBus {
    fn offer(&self, offer: Offer, endpoint: Endpoint) -> Result<Box<dyn ServerLink>, NtStatus> {
        let mut endpoints = lock(&self.endpoints);
        endpoints.retain(|(instance, _)| *instance != offer.interface_instance);
        endpoints.push((offer.interface_instance, endpoint));
        Ok(Box::new(Nobody))
    }

    fn bind(&self, _: Target, _: Endpoint) -> Result<Box<dyn ClientLink>, NtStatus> {
        Err(NtStatus::NOT_SUPPORTED)
    }
}

impl HandBus {
    /// A bus over guest memory of so many bytes, of which none is in use.
    #[must_use]
    pub fn new(bytes: u64) -> Arc<Self> {
        let memory = GuestMemory::memfd(bytes).unwrap();
        let pages = PageAllocator::new(&memory, 0, bytes).unwrap();
        let mappings = MappingBudget::default();
        Arc::new(Self { memory, pages, mappings, endpoints: Mutex::default() })
    }

    /// The guest opens the channel that was offered last, with rings of so many pages each, the one that
    /// the server reads first.
    #[must_use]
    pub fn open(&self, pages: (u32, u32), standing: Standing) -> Rings {
        let last = lock(&self.endpoints).last().unwrap().0;
        self.open_instance(last, pages, standing)
    }

    /// The same with the channel of `instance`, where there are several.
    #[must_use]
    pub fn open_instance(&self, instance: Guid, pages: (u32, u32), standing: Standing) -> Rings {
        let run = self.pages.allocate(pages.0 + pages.1).unwrap();
        let pfns: Vec<u64> = run.pfns().collect();
        let (incoming, outgoing) = pfns.split_at(pages.0 as usize);
        let map = |pfns: &[u64], index: u32| {
            let ring = RingPages::map(&self.memory, pfns, &self.mappings).unwrap();
            vmbus_ring::initialize(&ring);
            ring.store(Word::WriteIndex, index, Ordering::SeqCst);
            ring.store(Word::ReadIndex, index, Ordering::SeqCst);
            ring
        };
        let to_server = RingWriter::new(map(incoming, standing.read_index)).unwrap();
        let from_server = RingReader::new(map(outgoing, standing.write_index)).unwrap();
        let again = |pfns| RingPages::map(&self.memory, pfns, &self.mappings).unwrap();
        let opened = OpenRings {
            incoming: again(incoming),
            outgoing: again(outgoing),
            memory: self.memory.clone(),
            signal: Arc::new(Nobody),
            residency: None,
            user_data: [0x5a; USER_DATA_SIZE],
            resumed: standing.resumed,
        };
        let endpoints = lock(&self.endpoints);
        let events = endpoints.iter().find(|(offered, _)| *offered == instance).unwrap();
        let events = events.1.events.clone();
        drop(endpoints);
        assert!(events.post(BusEvent::Opened(opened)));
        Rings { to_server, from_server, _run: run }
    }

    /// Pages that nobody has.
    #[must_use]
    pub fn free_pages(&self) -> u64 {
        self.pages.free_pages()
    }
}

impl Rings {
    /// Sends the server a request that it is to complete.
    pub fn request(&mut self, transaction_id: u64, extension: &[u64], payload: &[u8]) {
        let kind = match extension {
            [] => PacketKind::InBand,
            _ => PacketKind::GpaDirect,
        };
        let extension: Vec<u8> = extension.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.push(kind, true, transaction_id, &extension, payload);
    }

    /// Sends the server a message that it is not to complete.
    pub fn say(&mut self, payload: &[u8]) {
        self.push(PacketKind::InBand, false, 0, &[], payload);
    }

    /// Completes one of the server's packets.
    pub fn complete(&mut self, transaction_id: u64, payload: &[u8]) {
        self.push(PacketKind::Completion, false, transaction_id, &[], payload);
    }

    fn push(
        &mut self,
        kind: PacketKind,
        wants_completion: bool,
        transaction_id: u64,
        extension: &[u8],
        payload: &[u8],
    ) {
        let (extension, payload) = (&[extension][..], &[payload][..]);
        let packet = OutgoingPacket { kind, wants_completion, transaction_id, extension, payload };
        self.to_server.push(&packet).unwrap();
        let _the_test_drives_the_channel = self.to_server.publish();
    }

    /// Shows the server a write index that cannot be.
    pub fn damage(&self) {
        self.to_server.pages().store(Word::WriteIndex, 3, Ordering::SeqCst);
    }

    /// Takes everything that the server has written.
    pub fn take(&mut self) -> Vec<Taken> {
        let mut taken = Vec::new();
        while let Some(packet) = self.from_server.peek().unwrap() {
            let mut payload = vec![0; packet.payload_len as usize];
            packet.copy_payload(&mut payload);
            taken.push(Taken {
                kind: packet.kind,
                transaction_id: packet.transaction_id,
                wants_completion: packet.wants_completion,
                payload,
            });
            self.from_server.advance();
        }
        let _the_test_drives_the_channel = self.from_server.publish();
        taken
    }
}
