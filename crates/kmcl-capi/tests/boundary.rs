//! The boundary, from the other side: a bus whose parts panic, and one whose memory is not there yet.
//! In a process of its own, because it turns the verifier off.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "plays the part of C; a test may stop at its first surprise"
)]

use core::ffi::c_void;
use core::ptr::null_mut;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use kmcl::bus::{
    Bus, BusEvent, ClientLink, Doorbell, Endpoint, EventSink, Offer, Residency, ServerLink, Target,
};
use kmcl::loopback::LoopbackBus;
use kmcl::{Channel, ChannelState, Guid, NtStatus, Packet, PacketCompletion, SendFlags, Side};
use kmcl_capi::channel::{
    KmclChannelGetState, KmclChannelProcess, VmbChannelAllocate, VmbChannelDisable,
    VmbChannelEnable, VmbChannelStart,
};
use kmcl_capi::incoming::{VmbChannelPacketComplete, VmbChannelPacketGetExternalData};
use kmcl_capi::setters::{
    VmbChannelInitSetMaximumExternalData, VmbChannelInitSetProcessPacketCallbacks,
    VmbServerChannelInitSetTargetInterfaceId,
};
use kmcl_capi::system::{KmclDeviceCreate, register_bus};
use kmcl_capi::types::{CGuid, Mdl, VmbChannel, VmbPacketCompletion};
use kmcl_capi::verifier::KmclSetVerifier;

const TYPE: Guid = Guid::from_u128(0x21);
const INSTANCE: Guid = Guid::from_u128(0x22);
const UNSUCCESSFUL: i32 = NtStatus::UNSUCCESSFUL.0.cast_signed();
const PENDING: i32 = NtStatus::PENDING.0.cast_signed();

/// What panics when it is called next.
#[derive(Default)]
struct Traps {
    offer: AtomicBool,
    bell: AtomicBool,
    residency: AtomicBool,
}

fn spring(trap: &AtomicBool) {
    if trap.swap(false, Ordering::Relaxed) {
        panic!("a trap of the test");
    }
}

/// A loopback bus with traps in it.
struct Trapped {
    inner: Arc<LoopbackBus>,
    traps: Arc<Traps>,
}

impl Bus for Trapped {
    fn offer(&self, offer: Offer, endpoint: Endpoint) -> Result<Box<dyn ServerLink>, NtStatus> {
        spring(&self.traps.offer);
        self.inner.offer(offer, endpoint)
    }

    fn bind(&self, target: Target, endpoint: Endpoint) -> Result<Box<dyn ClientLink>, NtStatus> {
        let Endpoint { events, doorbell } = endpoint;
        let doorbell = Arc::new(Bell { inner: doorbell, traps: Arc::clone(&self.traps) });
        self.inner.bind(target, Endpoint { events, doorbell })
    }
}

/// The client's doorbell, which the server rings.
struct Bell {
    inner: Arc<dyn Doorbell>,
    traps: Arc<Traps>,
}

impl Doorbell for Bell {
    fn ring(&self) {
        spring(&self.traps.bell);
        self.inner.ring();
    }

    fn event_fd(&self) -> std::io::Result<BorrowedFd<'_>> {
        self.inner.event_fd()
    }
}

/// Memory that is there from the second time on that somebody asks for it.
struct Slow {
    asked: AtomicU32,
    traps: Arc<Traps>,
    waiting: Mutex<Option<EventSink>>,
}

impl Residency for Slow {
    fn ensure(&self, _: u64, _: u64, events: &EventSink) -> bool {
        spring(&self.traps.residency);
        if self.asked.fetch_add(1, Ordering::Relaxed) == 0 {
            *self.waiting.lock().unwrap() = Some(events.clone());
            return false;
        }
        true
    }
}

/// What the server's callback is to do, and what it has seen.
struct Seen {
    keep: AtomicBool,
    handles: Mutex<Vec<u64>>,
    statuses: Mutex<Vec<i32>>,
}

static SEEN: Seen = Seen {
    keep: AtomicBool::new(false),
    handles: Mutex::new(Vec::new()),
    statuses: Mutex::new(Vec::new()),
};

unsafe extern "C" fn process(
    _: VmbChannel,
    packet: VmbPacketCompletion,
    buffer: *mut c_void,
    len: u32,
    flags: u32,
) {
    SEEN.handles.lock().unwrap().push(packet.addr() as u64);
    if flags != 0 {
        let mut mdl: *mut Mdl = null_mut();
        // SAFETY: the packet of this callback, and a place for the list.
        let status = unsafe { VmbChannelPacketGetExternalData(packet, 0, &raw mut mdl) };
        SEEN.statuses.lock().unwrap().push(status);
        if status == PENDING {
            return; // it comes again
        }
    }
    if !SEEN.keep.load(Ordering::Relaxed) {
        // SAFETY: the packet and the buffer of this callback.
        unsafe { VmbChannelPacketComplete(packet, buffer, len) };
    }
}

#[derive(Default)]
struct Ends(Mutex<Vec<(NtStatus, Vec<u8>)>>);

impl PacketCompletion for Ends {
    fn completed(&self, _: Packet, status: NtStatus, payload: &[u8]) {
        self.0.lock().unwrap().push((status, payload.to_vec()));
    }
}

struct World {
    traps: Arc<Traps>,
    slow: Arc<Slow>,
    server: VmbChannel,
    client: Channel,
    ends: Arc<Ends>,
    /// Of the client, for external data.
    pages: Vec<u64>,
}

fn c_guid(guid: Guid) -> CGuid {
    // SAFETY: 16 plain bytes each.
    unsafe { core::mem::transmute(guid) }
}

impl World {
    fn serve(&self) {
        // SAFETY: no outputs.
        let status = unsafe { KmclChannelProcess(self.server, 0, 64, null_mut(), null_mut()) };
        assert_eq!(status, 0);
    }

    fn send(&self, external: bool) {
        let mut packet = self.client.packet_allocate().unwrap();
        packet.set_completion_routine(self.ends.clone());
        let wait = SendFlags::WAIT_FOR_COMPLETION;
        let sent = match external {
            true => packet.send_with_external_pfns(&[7; 8], &self.pages, wait),
            false => packet.send(&[7; 8], None, wait),
        };
        assert!(sent.is_ok());
    }

    fn ends(&self) -> Vec<(NtStatus, Vec<u8>)> {
        self.client.process(64);
        std::mem::take(&mut *self.ends.0.lock().unwrap())
    }
}

/// Everything, with the channels open; `VmbChannelEnable` has met its trap on the way.
fn world() -> World {
    let traps = Arc::new(Traps::default());
    let inner = LoopbackBus::new(1 << 20).unwrap();
    let slow = Arc::new(Slow {
        asked: AtomicU32::new(1),
        traps: Arc::clone(&traps),
        waiting: Mutex::new(None),
    });
    inner.set_residency(slow.clone());
    let bus: Arc<dyn Bus> = Arc::new(Trapped { inner, traps: Arc::clone(&traps) });
    let (mut device, mut server) = (null_mut(), null_mut());
    // SAFETY: places for the results, and a callback that fits.
    unsafe {
        let handle = register_bus(Arc::clone(&bus)).unwrap();
        assert_eq!(KmclDeviceCreate(handle, null_mut(), &raw mut device), 0);
        assert_eq!(VmbChannelAllocate(device, 1, &raw mut server), 0);
        let named =
            VmbServerChannelInitSetTargetInterfaceId(server, c_guid(TYPE), c_guid(INSTANCE));
        assert_eq!(named, 0);
        assert_eq!(VmbChannelInitSetMaximumExternalData(server, 64 << 10, 4), 0);
        assert_eq!(VmbChannelInitSetProcessPacketCallbacks(server, Some(process), None), 0);
    }
    traps.offer.store(true, Ordering::Relaxed);
    assert_eq!(VmbChannelEnable(server), UNSUCCESSFUL);
    let client = Channel::allocate(Side::Client, bus);
    client.client_init_set_target_pnp(TYPE, None, None).unwrap();
    client.init_set_maximum_external_data(64 << 10, 4).unwrap();
    World { traps, slow, server, client, ends: Arc::default(), pages: Vec::new() }
}

/// One test: the parts share the process's verifier and the callback's notes.
#[test]
fn a_panic_becomes_the_documented_status_and_pending_packets_come_again() {
    KmclSetVerifier(0);
    let loud = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // The traps are what is tested.
        if !panic.payload_as_str().is_some_and(|said| said.contains("a trap of the test")) {
            loud(panic);
        }
    }));
    let mut world = world();
    // The call has failed; the channel can be disabled, and enabled again.
    VmbChannelDisable(world.server);
    assert_eq!(KmclChannelGetState(world.server), ChannelState::Disabled as u32);
    assert_eq!(VmbChannelEnable(world.server), 0);
    VmbChannelStart(world.server);
    world.client.enable().unwrap();
    while !world.client.state().is_open() {
        world.serve();
        world.client.process(1);
    }
    let run = world.client.allocate_pages(1).unwrap();
    world.pages = run.pfns().collect();
    world.serve();

    // STATUS_PENDING: the packet keeps its place and comes again, under another handle, when its memory is
    // there.
    world.slow.asked.store(0, Ordering::Relaxed);
    world.send(true);
    world.send(false);
    world.serve();
    assert_eq!(*SEEN.statuses.lock().unwrap(), [PENDING]);
    assert_eq!(world.ends(), [], "the second packet waits for the first");
    let waiting = world.slow.waiting.lock().unwrap().take().unwrap();
    waiting.post(BusEvent::MemoryArrived);
    world.serve();
    assert_eq!(*SEEN.statuses.lock().unwrap(), [PENDING, 0]);
    let handles = std::mem::take(&mut *SEEN.handles.lock().unwrap());
    assert_eq!(handles.len(), 3);
    assert_ne!(handles[0], handles[1], "a handle ends with the callback that gave it back");
    assert_eq!(world.ends(), [(NtStatus::SUCCESS, vec![7; 8]), (NtStatus::SUCCESS, vec![7; 8])]);
    // The handle of the first delivery is over.
    let stale = core::ptr::without_provenance_mut(usize::try_from(handles[0]).unwrap());
    let mut mdl: *mut Mdl = null_mut();
    // SAFETY: a number that names nothing, and a place for the list.
    let status = unsafe { VmbChannelPacketGetExternalData(stale, 0, &raw mut mdl) };
    assert_eq!(status, NtStatus::INVALID_PARAMETER_1.0.cast_signed());

    // A panic in GetExternalData: its status; the packet is the driver's still, and is completed.
    SEEN.statuses.lock().unwrap().clear();
    world.traps.residency.store(true, Ordering::Relaxed);
    world.send(true);
    world.serve();
    assert_eq!(*SEEN.statuses.lock().unwrap(), [UNSUCCESSFUL]);
    assert_eq!(world.ends(), [(NtStatus::SUCCESS, vec![7; 8])]);

    // A panic in PacketComplete, outside of callbacks: it returns, the handle is over, the channel goes on.
    SEEN.handles.lock().unwrap().clear();
    SEEN.keep.store(true, Ordering::Relaxed);
    world.send(false);
    world.serve();
    let kept = SEEN.handles.lock().unwrap()[0];
    let kept = core::ptr::without_provenance_mut(usize::try_from(kept).unwrap());
    world.traps.bell.store(true, Ordering::Relaxed);
    let mut answer = [9_u8; 8];
    // SAFETY: a packet that was kept, and 8 bytes; the second time, a number that names nothing.
    unsafe {
        VmbChannelPacketComplete(kept, answer.as_mut_ptr().cast(), 8);
        VmbChannelPacketComplete(kept, answer.as_mut_ptr().cast(), 8);
    }
    assert!(!world.traps.bell.load(Ordering::Relaxed), "nobody rang");
    SEEN.keep.store(false, Ordering::Relaxed);
    world.send(false);
    world.serve();
    assert_eq!(world.ends(), [(NtStatus::SUCCESS, vec![9; 8]), (NtStatus::SUCCESS, vec![7; 8])]);
}
