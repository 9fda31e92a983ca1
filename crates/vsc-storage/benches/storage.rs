//! What a 4 KiB read costs from end to end, beside the least that a virtio device has to do for one.
//!
//! Ours: this crate's client and a `vsp-storage` controller with a RAM disk, on two ends of a loopback
//! bus, both driven by this one thread: request made, sent, received, judged, copied, answered,
//! answer checked. The baseline in the same run: `virtio-queue` pops, walks and `add_used`s a chain of
//! three descriptors, and 4 KiB are copied into guest memory; nothing is sent, judged or answered.
//! Rounds alternate, and medians are compared.

#![expect(clippy::panic, reason = "a bench that cannot go on has nothing to measure")]

use std::error::Error;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kmcl::loopback::LoopbackBus;
use kmcl::{Channel, Guid};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vsc_storage::wire::scsi::cdb::Command;
use vsc_storage::{Buffer, ClientConfig, Request, StorageClient};
use vsp_storage::block::RamBackend;
use vsp_storage::{
    Completions, ControllerConfig, Disk, DiskOptions, Driver, ScsiAddress, ScsiController,
};

const BLOCK: u32 = 4096;
const BLOCKS: u32 = 256;
const DISK_BYTES: u64 = BLOCK as u64 * BLOCKS as u64;
const INSTANCE: Guid = Guid::from_u128(0x20);
const LUN: ScsiAddress = ScsiAddress { path: 0, target: 0, lun: 0 };
/// Reads of one round.
const READS: u32 = 256;

/// Drives nothing: the bench does. A RAM disk has no completions to wait for.
struct ByHand;

impl Driver for ByHand {
    fn add_channel(&self, _channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(())
    }
    fn remove_channel(&self, _channel: &Channel) {}
    fn add_completions(
        &self,
        _completions: Arc<Completions>,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(())
    }
    fn remove_completions(&self, _completions: &Arc<Completions>) {}
}

struct Ours {
    client: StorageClient,
    server: Channel,
    _controller: ScsiController,
    idle: Vec<Buffer>,
    next_block: u32,
}

impl Ours {
    fn new() -> Result<Self, Box<dyn Error>> {
        let bus = LoopbackBus::new(4 << 20)?;
        let controller =
            ScsiController::new(bus.clone(), Arc::new(ByHand), ControllerConfig::new(INSTANCE))?;
        let disk = Disk::new(Arc::new(RamBackend::new(DISK_BYTES)?), &DiskOptions::new("bench"))?;
        controller.attach(LUN, disk)?;
        controller.offer()?;
        let server = controller.channel().ok_or("no channel")?;
        server.set_polled(true);
        let mut client = StorageClient::open(bus, ClientConfig::default())?;
        while !client.is_ready() {
            server.process(64);
            client.process()?;
        }
        client.set_polled(true);
        let idle = (0..16).map(|_| client.allocate(BLOCK)).collect::<Result<_, _>>()?;
        Ok(Self { client, server, _controller: controller, idle, next_block: 0 })
    }

    #[inline(never)]
    fn round(&mut self, depth: u16) -> Duration {
        self.client.set_queue_depth(depth);
        let (mut sent, mut done) = (0, 0);
        let start = Instant::now();
        while done < READS {
            let (idle, next_block) = (&mut self.idle, &mut self.next_block);
            let submitted = self.client.submit_each(|| {
                if sent == READS {
                    return None;
                }
                sent += 1;
                *next_block = (*next_block + 1) % BLOCKS;
                let lba = u64::from(*next_block * (BLOCK / 512));
                let cdb = Command::read(lba, BLOCK / 512).encode().ok()?;
                Some(Request::new(LUN, cdb).reading(idle.pop()?, 0, BLOCK))
            });
            if let Err(refused) = submitted {
                panic!("{refused}");
            }
            self.server.process(64);
            if let Err(error) = self.client.process() {
                panic!("{error}");
            }
            while let Some(completion) = self.client.next_completion() {
                assert_eq!(completion.result, Ok(BLOCK));
                self.idle.extend(completion.buffer);
                done += 1;
            }
        }
        start.elapsed()
    }
}

struct Baseline {
    memory: GuestMemoryMmap,
    disk: Vec<u8>,
}

impl Baseline {
    fn new() -> Result<Self, Box<dyn Error>> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)])?;
        Ok(Self { memory, disk: vec![7; (BLOCKS * BLOCK) as usize] })
    }

    /// Chains of request header, data, status: what virtio-blk has.
    fn chains(depth: u16) -> Vec<RawDescriptor> {
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        let chain = |at: u16| {
            let data = 0x10_0000 + u64::from(at) * 0x2000;
            [
                Descriptor::new(data, 16, NEXT, at * 3 + 1),
                Descriptor::new(data + 0x1000, BLOCK, NEXT | WRITE, at * 3 + 2),
                Descriptor::new(data + 16, 1, WRITE, 0),
            ]
        };
        (0..depth).flat_map(chain).map(RawDescriptor::from).collect()
    }

    fn round(&self, chains: &[RawDescriptor], depth: u16) -> Duration {
        let mut took = Duration::ZERO;
        let mut block = 0;
        for _ in 0..READS / u32::from(depth) {
            let mock = MockSplitQueue::new(&self.memory, 256);
            let queue: Result<Queue, _> = mock.create_queue();
            let Ok(mut queue) = queue else { panic!("no queue") };
            if let Err(error) = mock.add_desc_chains(chains, 0) {
                panic!("{error}");
            }
            let start = Instant::now();
            while let Some(chain) = queue.pop_descriptor_chain(&self.memory) {
                let head = chain.head_index();
                for descriptor in chain {
                    if descriptor.len() == BLOCK {
                        block = (block + 1) % BLOCKS;
                        let from = (block * BLOCK) as usize;
                        let bytes = self.disk.get(from..from + BLOCK as usize).unwrap_or_default();
                        if let Err(error) = self.memory.write_slice(bytes, descriptor.addr()) {
                            panic!("{error}");
                        }
                    }
                    black_box(descriptor.flags());
                }
                if let Err(error) = queue.add_used(&self.memory, head, BLOCK + 1) {
                    panic!("{error}");
                }
            }
            took += start.elapsed();
        }
        took
    }
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    let middle = times.get(times.len() / 2).copied().unwrap_or_default();
    middle.as_secs_f64() * 1e9 / f64::from(READS)
}

fn main() -> Result<(), Box<dyn Error>> {
    let rounds = if std::env::args().any(|arg| arg == "--short") { 50 } else { 3_000 };
    let mut ours = Ours::new()?;
    let baseline = Baseline::new()?;
    for (depth, limit) in [(1, 4.0), (4, 2.5), (16, 2.0)] {
        let chains = Baseline::chains(depth);
        let (mut own, mut other) = (Vec::with_capacity(rounds), Vec::with_capacity(rounds));
        for _ in 0..rounds {
            own.push(ours.round(depth));
            other.push(baseline.round(&chains, depth));
        }
        let (own, other) = (median(own), median(other));
        println!(
            "RATIO storage/read/4KiB/depth{depth} ours={own:.0} peer={other:.0} ratio={:.2} limit={limit:.1}",
            own / other
        );
    }
    Ok(())
}
