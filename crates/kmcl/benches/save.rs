//! What saving and restoring a channel costs, beside what no saved state can do without: one copy of its
//! bytes, and one checksum over them.
//!
//! Ours: a channel with 256 packets in flight of about 400 bytes each, outgoing ones that wait for the
//! ring, and incoming ones that their device has handed over, saved into buffers of 64 KiB and restored
//! from them. The peer in the same run: `memcpy` of the same bytes, and CRC-32C over them. Rounds
//! alternate, and medians are compared.
//!
//! Then 1,000 channels with more and more packets: what each packet adds, and that the memory taken beside
//! the buffer does not grow.

#![expect(clippy::panic, reason = "a bench that cannot go on has nothing to measure")]
#![expect(unsafe_code, reason = "an allocator that counts has to be an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kmcl::loopback::LoopbackBus;
use kmcl::{
    Channel, ChannelSave, Guid, IncomingPacket, NtStatus, Packet, ProcessPacket, ResumedPacket,
    Save as _, SaveRestorePacket, SendFlags, Side,
};

const TYPE: Guid = Guid::from_u128(0x20);
const PACKETS: u32 = 256;
const BUFFER: usize = 64 << 10;
const ROUNDS: usize = 2000;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator, unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let in_use = IN_USE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(in_use, Relaxed);
        // SAFETY: the caller keeps the promises that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `ptr` came from `System`, as `alloc` shows, with the same layout.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let in_use = IN_USE.fetch_add(new_size, Relaxed) + new_size;
        PEAK.fetch_max(in_use, Relaxed);
        IN_USE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `ptr` came from `System`, as `alloc` shows, with the same layout; the caller keeps the
        // promises about the new size.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Most bytes in use while `work` runs beyond those before.
fn peak<T>(work: impl FnOnce() -> T) -> (usize, T) {
    let before = IN_USE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = work();
    (PEAK.load(Relaxed) - before, result)
}

/// A device that hands its packets over, and a driver with 64 bytes of state for each of its own.
#[derive(Default)]
struct Device {
    held: Mutex<Vec<IncomingPacket>>,
}

impl ProcessPacket for Device {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).push(packet);
    }

    fn resume_packet(&self, _: &Channel, packet: ResumedPacket) {
        packet.into_packet().complete(&[]);
    }

    fn freeze(&self, _: &Channel) {
        for packet in self.held.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            if let Err(refused) = packet.cancelled().hand_over(&[3; 64]) {
                panic!("{refused}");
            }
        }
    }
}

impl SaveRestorePacket for Device {
    fn state_size(&self, _: &Channel, _: &Packet) -> Result<u32, NtStatus> {
        Ok(64)
    }

    fn save_packet(&self, _: &Channel, _: &Packet, buffer: &mut [u8]) -> Result<u32, NtStatus> {
        buffer.fill(3);
        Ok(64)
    }

    fn restore_packet(&self, channel: &Channel, lib: &[u8], own: &[u8]) -> Result<(), NtStatus> {
        let packet = channel.packet_allocate().ok_or(NtStatus::INSUFFICIENT_RESOURCES)?;
        black_box(own);
        packet.restore(lib).map_err(|refused| refused.error.status())
    }
}

fn server(bus: &Arc<LoopbackBus>, instance: u32) -> Outcome<Channel> {
    let channel = Channel::allocate(Side::Server, bus.clone());
    let device = Arc::new(Device::default());
    channel.server_init_set_target_interface_id(TYPE, Guid::from_u128(instance.into()))?;
    channel.init_set_maximum_packet_size(512)?;
    channel.init_set_maximum_completion_size(64)?;
    channel.init_set_maximum_packet_count(PACKETS)?;
    channel.init_set_maximum_external_data(32 * 4096, 1)?;
    channel.init_set_process_packet_callbacks(device.clone())?;
    channel.server_init_set_save_restore_packet_callbacks(device)?;
    Ok(channel)
}

/// Buffers of the caller's, and how much of each was filled.
struct Buffers(Vec<(Vec<u8>, usize)>);

impl Buffers {
    fn new() -> Self {
        Self((0..4).map(|_| (vec![0; BUFFER], 0)).collect())
    }

    /// Takes all that a save gives.
    #[inline(never)]
    fn take(&mut self, mut save: ChannelSave) {
        for (buffer, filled) in &mut self.0 {
            *filled = 0;
            match save.step(buffer) {
                Ok(step) => *filled = step.written,
                Err(error) => panic!("{error}"),
            }
            if matches!(save.step(&mut []), Err(kmcl::ChannelSaveError::Over)) {
                return;
            }
        }
        panic!("more than {} buffers", self.0.len());
    }

    fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(|(bytes, filled)| bytes.get(..*filled).unwrap_or_default())
    }

    #[inline(never)]
    fn restore(&self, channel: &Channel) {
        for piece in self.pieces().filter(|piece| !piece.is_empty()) {
            match channel.restore_from_buffer(piece) {
                Ok(restored) => drop(black_box(restored)),
                Err(error) => panic!("{error}"),
            }
        }
    }
}

fn copy_and_sum(stream: &[u8], room: &mut [u8]) -> Duration {
    let begun = Instant::now();
    black_box(&mut *room).copy_from_slice(black_box(stream));
    black_box(crc32c::crc32c(black_box(room)));
    begun.elapsed()
}

fn timed(work: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    work();
    begun.elapsed()
}

/// 256 packets of the server's wait for a ring that never comes.
fn outgoing(rounds: usize) -> Outcome<()> {
    let bus = LoopbackBus::new(1 << 20)?;
    let channel = server(&bus, 1)?;
    channel.enable()?;
    for _ in 0..PACKETS {
        let packet = channel.packet_allocate().ok_or("no packet")?;
        packet.send(&[5; 336], None, SendFlags::WAIT_FOR_COMPLETION).map_err(|it| it.error)?;
    }
    let mut buffers = Buffers::new();
    let other = LoopbackBus::new(1 << 20)?;
    let mut rows = Rows::default();
    for _ in 0..rounds {
        rows.save.push(timed(|| match channel.save() {
            Ok(save) => buffers.take(save),
            Err(error) => panic!("{error}"),
        }));
        rows.peer(&buffers);
        let next = server(&other, 1)?;
        rows.restore.push(timed(|| buffers.restore(&next)));
        assert_eq!(next.outgoing_in_use().0, PACKETS as usize);
        next.disable();
    }
    channel.disable();
    rows.print("outgoing");
    Ok(())
}

/// 256 packets of the client's, handed over; their channel moves with each round.
fn incoming(rounds: usize) -> Outcome<()> {
    let bus = LoopbackBus::new(4 << 20)?;
    let mut channel = server(&bus, 2)?;
    channel.enable()?;
    channel.start();
    let client = Channel::allocate(Side::Client, bus.clone());
    client.client_init_set_target_pnp(TYPE, None, None)?;
    client.init_set_maximum_packet_size(512)?;
    client.init_set_maximum_external_data(32 * 4096, 1)?;
    client.client_init_set_ring_buffer_page_count(32, 64)?;
    client.enable()?;
    while !client.state().is_open() {
        channel.process(1);
        client.process(1);
    }
    let pages = client.allocate_pages(32)?;
    let pfns: Vec<_> = pages.pfns().collect();
    for _ in 0..PACKETS {
        let packet = client.packet_allocate().ok_or("no packet")?;
        let flags = SendFlags::WAIT_FOR_COMPLETION;
        packet.send_with_external_pfns(&[5; 64], &pfns, flags).map_err(|it| it.error)?;
    }
    while channel.process(64).packets != 0 {}
    assert_eq!(channel.incoming_outstanding(), PACKETS);
    let mut buffers = Buffers::new();
    let mut rows = Rows::default();
    for _ in 0..rounds {
        let frozen = channel.freeze()?;
        rows.save.push(timed(|| match frozen.save() {
            Ok(save) => buffers.take(save),
            Err(error) => panic!("{error}"),
        }));
        rows.peer(&buffers);
        frozen.move_away();
        channel = server(&bus, 2)?;
        channel.enable()?;
        channel.process(1);
        rows.restore.push(timed(|| buffers.restore(&channel)));
    }
    channel.start();
    while channel.process(64).packets != 0 {}
    assert_eq!(channel.incoming_outstanding(), 0);
    rows.print("incoming");
    Ok(())
}

#[derive(Default)]
struct Rows {
    save: Vec<Duration>,
    restore: Vec<Duration>,
    peer: Vec<Duration>,
    /// The bytes produced, and where they are copied to: the same memory in every round.
    stream: Vec<u8>,
    room: Vec<u8>,
}

impl Rows {
    fn peer(&mut self, buffers: &Buffers) {
        self.stream.clear();
        buffers.pieces().for_each(|piece| self.stream.extend_from_slice(piece));
        self.room.resize(self.stream.len(), 0);
        self.peer.push(copy_and_sum(&self.stream, &mut self.room));
    }

    fn print(self, direction: &str) {
        println!("FIGURE kmcl/state/{direction}/256x400B {} bytes", self.stream.len());
        let peer = median_ns(self.peer);
        for (what, times, factor, more) in
            [("save", self.save, 4.0, 20_000.0), ("restore", self.restore, 8.0, 40_000.0)]
        {
            let ours = median_ns(times);
            // The limit is a multiple and a constant: the constant in units of the peer.
            println!(
                "RATIO kmcl/{what}/{direction}/256x400B/64KiB ours={ours:.0} peer={peer:.0} ratio={:.2} limit={:.2}",
                ours / peer,
                factor + more / peer
            );
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "nanoseconds of a round are far below 2^53")]
fn median_ns(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default().as_nanos() as f64
}

/// 1,000 channels with ever more packets: the time for each packet more, and the memory beside the buffer.
fn many(short: bool) -> Outcome<()> {
    const CHANNELS: u32 = 1000;
    let bus = LoopbackBus::new(1 << 20)?;
    let channels: Vec<_> = (0..CHANNELS)
        .map(|instance| {
            let channel = Channel::allocate(Side::Server, bus.clone());
            let instance = Guid::from_u128(u128::from(instance) + 1);
            channel.server_init_set_target_interface_id(TYPE, instance)?;
            channel.init_set_maximum_packet_size(64)?;
            let device = Arc::new(Device::default());
            channel.server_init_set_save_restore_packet_callbacks(device)?;
            Ok(channel)
        })
        .collect::<Outcome<_>>()?;
    let mut buffer = vec![0; BUFFER];
    let mut points = Vec::new();
    let mut each = 0;
    for packets in [1, 10, 100, 1000] {
        for channel in &channels {
            // Queued for a channel that is enabled, and whose offer nobody has opened.
            if each == 0 {
                channel.enable()?;
            }
            for _ in each..packets {
                let packet = channel.packet_allocate().ok_or("no packet")?;
                let flags = SendFlags::WAIT_FOR_COMPLETION;
                packet.send(&[5; 64], None, flags).map_err(|it| it.error)?;
            }
        }
        each = packets;
        let mut best = Duration::MAX;
        let mut extra = 0;
        for _ in 0..if short { 2 } else { 5 } {
            let begun = Instant::now();
            let (bytes, ()) = peak(|| {
                for channel in &channels {
                    let Ok(mut save) = channel.save() else { panic!("no save") };
                    while !save.step(&mut buffer).is_ok_and(|step| step.done) {}
                }
            });
            best = best.min(begun.elapsed());
            extra = extra.max(bytes);
        }
        let total = CHANNELS * packets;
        println!("FIGURE kmcl/save/memory/{total}-packets {extra} bytes limit=16384");
        points.push((f64::from(total), best.as_secs_f64() * 1e9));
    }
    let mut slopes = Vec::new();
    for pair in points.windows(2) {
        if let [(fewer, sooner), (more, later)] = pair {
            let slope = (later - sooner) / (more - fewer);
            println!("FIGURE kmcl/save/slope/{fewer:.0}-{more:.0} {slope:.1} ns/packet");
            slopes.push(slope);
        }
    }
    if let [first, .., last] = slopes.as_slice() {
        println!(
            // A million packets are far more than any cache holds; a cost that grows with their number
            // would show as a factor of a hundred.
            "RATIO kmcl/save/linear/10k-1M ours={last:.1} peer={first:.1} ratio={:.2} limit=8.0",
            last / first
        );
    }
    channels.iter().for_each(Channel::disable);
    Ok(())
}

fn main() -> Outcome<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let short = arguments.iter().any(|argument| argument == "--short");
    let rounds = if short { 200 } else { ROUNDS };
    // `cargo bench --bench save -- incoming` runs that part alone.
    let only = arguments.iter().find(|argument| !argument.starts_with("--"));
    let wanted = |part: &str| only.is_none_or(|only| only == part);
    if wanted("outgoing") {
        outgoing(rounds)?;
    }
    if wanted("incoming") {
        incoming(rounds)?;
    }
    if wanted("many") {
        many(short)?;
    }
    Ok(())
}
