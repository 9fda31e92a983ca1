//! Memory: none is allocated for a packet on the data path, and an open channel takes little.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]
#![allow(unsafe_code, reason = "an allocator that counts")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use common::WAIT;
use kmcl::loopback::LoopbackBus;
use kmcl::{
    Channel, ChannelState, ExternalDataFlags, IncomingPacket, NtStatus, Packet, PacketCompletion,
    ProcessPacket, SendFlags, Side,
};

/// Counts what each thread allocates, so that tests do not see each other.
struct Counting;

thread_local! {
    /// Allocations, and bytes allocated and not freed.
    static COUNTS: Cell<(u64, i64)> = const { Cell::new((0, 0)) };
}

fn count(allocations: u64, bytes: usize, freed: usize) {
    // A thread that is being torn down has no counts any more.
    let _ = COUNTS.try_with(|counts| {
        let (before, live) = counts.get();
        let change = i64::try_from(bytes).unwrap_or(0) - i64::try_from(freed).unwrap_or(0);
        counts.set((before + allocations, live + change));
    });
}

// SAFETY: every call is handed to `System` as it came, which keeps the contract of `GlobalAlloc`;
// counting allocates nothing and does not unwind.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(1, layout.size(), 0);
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(1, layout.size(), 0);
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(0, 0, layout.size());
        // SAFETY: the caller keeps the contract of `GlobalAlloc::dealloc`.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(1, new_size, layout.size());
        // SAFETY: the caller keeps the contract of `GlobalAlloc::realloc`.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of this thread while `act` runs.
fn allocations(act: impl FnOnce()) -> u64 {
    let (before, _) = COUNTS.get();
    act();
    COUNTS.get().0 - before
}

/// Looks at external data and completes with a part of the payload.
struct Device;

impl ProcessPacket for Device {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        if packet.has_external_data() {
            let data = packet.external_data(ExternalDataFlags::empty()).unwrap();
            let mut bytes = [0; 16];
            data.read_at(0, &mut bytes).unwrap();
            assert!(data.segments().count() > 0);
        }
        let mut answer = [0; 8];
        answer.copy_from_slice(&packet.payload()[..8]);
        packet.complete(&answer);
    }
}

/// Sends each packet again as soon as it has ended, the way `how` says, until it is worn out.
struct Resend {
    payload: usize,
    how: How,
}

#[derive(Clone, Copy, Debug)]
enum How {
    InBand,
    NoCompletion,
    External,
}

impl Resend {
    fn send(&self, packet: Packet) {
        let message = &[0x5a; 4096][..self.payload];
        match self.how {
            How::InBand => packet.send(message, None, WAIT),
            How::NoCompletion => packet.send(message, None, SendFlags::empty()),
            How::External => packet.send_with_external_pfns(message, &[1, 5, 9], WAIT),
        }
        .unwrap();
    }
}

impl PacketCompletion for Resend {
    fn completed(&self, mut packet: Packet, status: NtStatus, _: &[u8]) {
        let left = packet.pointer();
        if status == NtStatus::SUCCESS && left != 0 {
            packet.set_pointer(left - 1);
            self.send(packet);
        }
    }
}

/// Both ends of an open channel; both process packets and send.
fn open(packet_count: u32) -> (Channel, Channel) {
    let bus = LoopbackBus::new(4 << 20).unwrap();
    let server = Channel::allocate(Side::Server, bus.clone());
    server.server_init_set_target_interface_id(common::TYPE, common::INSTANCE).unwrap();
    let client = Channel::allocate(Side::Client, bus);
    client.client_init_set_target_pnp(common::TYPE, None, None).unwrap();
    client.client_init_set_ring_buffer_page_count(16, 16).unwrap();
    for channel in [&server, &client] {
        channel.init_set_process_packet_callbacks(Arc::new(Device)).unwrap();
        channel.init_set_maximum_external_data(64 << 10, 4).unwrap();
        channel.init_set_maximum_packet_count(packet_count).unwrap();
        channel.enable().unwrap();
    }
    server.start();
    for _ in 0..3 {
        server.process(1);
        client.process(1);
    }
    assert_eq!((server.state(), client.state()), (ChannelState::Active, ChannelState::Active));
    (server, client)
}

/// Sends 2,000 packets over `width` packet objects and back.
fn traffic(
    server: &Channel,
    client: &Channel,
    sender: &Channel,
    routine: &Arc<Resend>,
    width: u32,
) {
    const EACH: usize = 2000;
    for _ in 0..width {
        let mut packet = sender.packet_allocate().unwrap();
        packet.set_completion_routine(Arc::clone(routine) as _);
        packet.set_pointer(EACH / width as usize);
        routine.send(packet);
    }
    // The queue may be longer than the ring: until nothing moves any more.
    while server.process(64).packets + client.process(64).packets != 0 {}
    assert_eq!(sender.outgoing_in_use(), (0, 0));
}

/// No allocation per packet in steady state, on both sides: in band, with and without completion, with
/// external data, large packets, more packets than the ring holds.
#[test]
fn no_packet_is_allocated_for() {
    let (server, client) = open(256);
    for how in [How::InBand, How::NoCompletion, How::External] {
        for (side, width, payload) in [
            (Side::Client, 1, 64),
            (Side::Client, 16, 64),
            (Side::Client, 200, 64),
            (Side::Client, 40, 4096),
            (Side::Server, 1, 64),
            (Side::Server, 200, 64),
            (Side::Server, 40, 4096),
        ] {
            if side == Side::Server && matches!(how, How::External) {
                continue; // a server has no memory to describe (D-41)
            }
            // A packet that ends in the ring ends on its sender's stack: sent again by the loop.
            let width = if matches!(how, How::NoCompletion) { 1 } else { width };
            let sender = if side == Side::Server { &server } else { &client };
            let routine = Arc::new(Resend { payload, how });
            let run = || match how {
                How::NoCompletion => {
                    for _ in 0..2000 {
                        routine.send(sender.packet_allocate().unwrap());
                        server.process(64);
                        client.process(64);
                    }
                }
                How::InBand | How::External => traffic(&server, &client, sender, &routine, width),
            };
            run(); // pools and buffers grow to their size
            let made = allocations(run);
            assert_eq!(made, 0, "{how:?} {side:?} width={width} payload={payload}");
        }
    }
    client.disable();
    server.disable();
}

/// None either where packets are completed later, in batches of another kind.
#[test]
fn no_allocation_where_packets_are_completed_later() {
    struct Keep(std::sync::Mutex<Vec<IncomingPacket>>);
    impl ProcessPacket for Keep {
        fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
            self.0.lock().unwrap().push(packet);
        }
    }
    let (server, client) = open(64);
    client.disable();
    server.disable();
    let keep = Arc::new(Keep(std::sync::Mutex::new(Vec::with_capacity(64))));
    server.init_set_process_packet_callbacks(keep.clone()).unwrap();
    server.init_set_maximum_completion_size(64).unwrap();
    server.enable().unwrap();
    server.start();
    client.enable().unwrap();
    for _ in 0..3 {
        server.process(1);
        client.process(1);
    }
    let round = || {
        for _ in 0..32 {
            client.packet_allocate().unwrap().send(&[1; 64], None, WAIT).unwrap();
        }
        server.process(64);
        let mut batch = server.batch();
        while let Some(packet) = keep.0.lock().unwrap().pop() {
            batch.complete(packet, &[2; 64]);
        }
        drop(batch);
        client.process(64);
        assert_eq!(client.outgoing_in_use(), (0, 0));
    };
    round();
    assert_eq!(allocations(|| (0..100).for_each(|_| round())), 0);
    client.disable();
    server.disable();
}

/// An open channel with rings of 16 and 16 pages and 256 packets takes at most 512 KiB beside its rings,
/// on either side, also after traffic; closed it gives that back. Outgoing packet objects are the
/// driver's, each with room for its largest message: their size is reported apart.
#[test]
fn an_open_channel_takes_at_most_512_kib() {
    const BOUND: i64 = 512 << 10;
    let live = || COUNTS.get().1;
    let grows = |act: &dyn Fn()| {
        let before = live();
        act();
        live() - before
    };
    let (server, client) = open(256);
    let close = || {
        client.disable();
        server.process(1);
        server.disable();
    };
    close();
    let closed = live();
    let enabled = grows(&|| {
        server.enable().unwrap();
        server.start();
        client.enable().unwrap();
        client.process(1); // bound; asks for the rings
    });
    assert!(enabled < 16 << 10, "channels not open yet take {enabled} bytes");
    let of_server = grows(&|| _ = server.process(1));
    let of_client = grows(&|| _ = client.process(1));
    for (side, bytes) in [("server", of_server), ("client", of_client)] {
        println!("an open {side}, 256 packets: {} KiB of at most {} KiB", bytes >> 10, BOUND >> 10);
        assert!((1..=BOUND).contains(&bytes), "{side}: {bytes} bytes");
    }
    // Four at a time: what grows is the channel's, not the driver's.
    let routine = Arc::new(Resend { payload: 1024, how: How::External });
    let worked = grows(&|| traffic(&server, &client, &client, &routine, 4));
    println!("two open ends after traffic of 1 KiB packets: {} KiB more", worked >> 10);
    assert!(of_server + of_client + worked <= 2 * BOUND, "{worked} bytes more after traffic");
    let objects = grows(&|| {
        let packets: Vec<_> = (0..256).map(|_| client.packet_allocate().unwrap()).collect();
        drop(packets); // into the pool
    });
    println!("256 outgoing packet objects for 4 KiB messages: {} KiB", objects >> 10);
    assert!(objects <= 256 * i64::from(client.sizeof_packet() + 64), "{objects} bytes");

    close();
    let kept = live() - closed - objects;
    assert!(kept < 32 << 10, "closed channels keep {kept} bytes");
    server.cleanup();
    client.cleanup();
    let left = live() - closed;
    assert!(left <= 0, "channels that were cleaned up keep {left} bytes");
}
