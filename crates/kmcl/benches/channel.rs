//! What a channel costs per packet, beside what a virtio queue costs per chain.
//!
//! Ours: a server endpoint takes a batch of packets of 64 bytes with one external range of one page,
//! checks them, looks at the range, and completes them inside the callback. The peer in the same run:
//! `virtio-queue` pops, walks and `add_used`s as many chains of two descriptors. Both are fed and
//! drained outside the measured time; rounds alternate, and medians are compared.

#![expect(clippy::panic, reason = "a bench that cannot go on has nothing to measure")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kmcl::loopback::LoopbackBus;
use kmcl::{
    Channel, ExternalDataFlags, Guid, IncomingPacket, NtStatus, Packet, PacketCompletion,
    ProcessPacket, SendFlags, Side,
};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const TYPE: Guid = Guid::from_u128(0x10);
const INSTANCE: Guid = Guid::from_u128(0x11);
const BATCH: u32 = 32;
const ROUNDS: usize = 40_000;

struct Device;

impl ProcessPacket for Device {
    fn process_packet(&self, _channel: &Channel, packet: IncomingPacket) {
        match packet.external_data(ExternalDataFlags::empty()) {
            Ok(data) => black_box(data.segments().next()),
            Err(error) => panic!("{error}"),
        };
        packet.complete(&[0; 8]);
    }
}

struct Resend;

impl PacketCompletion for Resend {
    fn completed(&self, _packet: Packet, status: NtStatus, _payload: &[u8]) {
        assert_eq!(status, NtStatus::SUCCESS);
    }
}

struct Pair {
    server: Channel,
    client: Channel,
    pfn: u64,
    routine: Arc<Resend>,
}

impl Pair {
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        let bus = LoopbackBus::new(1 << 20)?;
        let server = Channel::allocate(Side::Server, bus.clone());
        server.server_init_set_target_interface_id(TYPE, INSTANCE)?;
        server.init_set_maximum_packet_size(64)?;
        server.init_set_maximum_external_data(64 << 10, 1)?;
        server.init_set_process_packet_callbacks(Arc::new(Device))?;
        server.enable()?;
        server.start();
        let client = Channel::allocate(Side::Client, bus);
        client.client_init_set_target_pnp(TYPE, None, None)?;
        client.init_set_maximum_packet_size(64)?;
        client.init_set_maximum_external_data(64 << 10, 1)?;
        client.client_init_set_ring_buffer_page_count(16, 16)?;
        client.enable()?;
        while !client.state().is_open() {
            server.process(1);
            client.process(1);
        }
        let page = client.allocate_pages(1)?;
        let pfn = page.pfns().next().ok_or("no page")?;
        std::mem::forget(page);
        Ok(Self { server, client, pfn, routine: Arc::new(Resend) })
    }

    /// What is measured; a function of its own so that a profiler finds it.
    #[inline(never)]
    fn serve(&self) -> u32 {
        self.server.process(BATCH).packets
    }

    fn round(&self) -> Duration {
        let message = [7; 64];
        for _ in 0..BATCH {
            let Some(mut packet) = self.client.packet_allocate() else { panic!("no packet") };
            packet.set_completion_routine(self.routine.clone());
            let flags = SendFlags::WAIT_FOR_COMPLETION;
            if let Err(error) = packet.send_with_external_pfns(&message, &[self.pfn], flags) {
                panic!("{error}");
            }
        }
        let start = Instant::now();
        let packets = self.serve();
        let took = start.elapsed();
        assert_eq!(packets, BATCH);
        while self.client.process(BATCH).packets != 0 {}
        took
    }
}

struct Virtio {
    memory: GuestMemoryMmap,
}

impl Virtio {
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        Ok(Self { memory: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])? })
    }

    fn chains() -> Vec<RawDescriptor> {
        const NEXT: u16 = 1;
        (0..BATCH)
            .flat_map(|chain| {
                let data = 0x10000 + u64::from(chain) * 0x1000;
                let next = u16::try_from(chain * 2 + 1).unwrap_or(0);
                [Descriptor::new(data, 64, NEXT, next), Descriptor::new(data + 64, 4096, 0, 0)]
            })
            .map(RawDescriptor::from)
            .collect()
    }

    fn round(&self, chains: &[RawDescriptor]) -> Duration {
        let mock = MockSplitQueue::new(&self.memory, 256);
        let mut queue: Queue = match mock.create_queue() {
            Ok(queue) => queue,
            Err(error) => panic!("{error}"),
        };
        if let Err(error) = mock.add_desc_chains(chains, 0) {
            panic!("{error}");
        }
        let start = Instant::now();
        let mut popped = 0;
        while let Some(mut chain) = queue.pop_descriptor_chain(&self.memory) {
            let head = chain.head_index();
            let mut bytes = 0;
            for descriptor in &mut chain {
                bytes += descriptor.len();
            }
            if let Err(error) = queue.add_used(&self.memory, head, black_box(bytes)) {
                panic!("{error}");
            }
            popped += 1;
        }
        let took = start.elapsed();
        assert_eq!(popped, BATCH);
        took
    }
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    let middle = times.get(times.len() / 2).copied().unwrap_or_default();
    #[expect(clippy::cast_precision_loss, reason = "nanoseconds of a batch are far below 2^53")]
    let nanoseconds = middle.as_nanos() as f64;
    nanoseconds / f64::from(BATCH)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let rounds = if std::env::args().any(|arg| arg == "--short") { 2_000 } else { ROUNDS };
    let pair = Pair::new()?;
    let virtio = Virtio::new()?;
    let chains = Virtio::chains();
    let mut ours = Vec::with_capacity(rounds);
    let mut peer = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        ours.push(pair.round());
        peer.push(virtio.round(&chains));
    }
    let (ours, peer) = (median(ours), median(peer));
    println!(
        "RATIO channel/receive-complete/64B+1range/batch32 ours={ours:.1} peer={peer:.1} ratio={:.2} limit=1.0",
        ours / peer
    );
    Ok(())
}
