//! What a VSP costs per packet in C, beside the same VSP in Rust.
//!
//! Both take batches of packets of 64 bytes and complete them inside the callback: an echo, a device that
//! looks at one range of external data, and one that reads 64 bytes of it as well. The C one is what a C compiler makes of it: functions with
//! C's calling convention that call the table's. Clients are the same, and outside the measured time.

#![expect(clippy::panic, reason = "a bench that cannot go on has nothing to measure")]
#![allow(unsafe_code, reason = "plays the part of C")]

use core::ffi::c_void;
use std::hint::black_box;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kmcl::loopback::LoopbackBus;
use kmcl::{
    Channel, ExternalDataFlags, Guid, IncomingPacket, NtStatus, Packet, PacketCompletion,
    ProcessPacket, SendFlags, Side,
};
use kmcl_capi::channel::KmclChannelProcess;
use kmcl_capi::mdl::KmclMdlMap;
use kmcl_capi::system::{KmclDeviceCreate, register_bus};
use kmcl_capi::tables::{KMCL_SERVER_INTERFACE_TYPE, KmclQueryInterface, ServerInterface};
use kmcl_capi::types::{CGuid, Mdl, VmbChannel, VmbPacketCompletion};

const TYPE: Guid = Guid::from_u128(0x10);
const INSTANCE: Guid = Guid::from_u128(0x11);
const BATCH: u32 = 32;
const ROUNDS: usize = 40_000;

// ---- The same two devices, twice --------------------------------------------------------------------

struct Echo;
impl ProcessPacket for Echo {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        let mut answer = [0; 64];
        let payload = packet.payload();
        if let Some(answer) = answer.get_mut(..payload.len()) {
            answer.copy_from_slice(payload);
        }
        packet.complete(&answer);
    }
}

struct Reader;
impl ProcessPacket for Reader {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        match packet.external_data(ExternalDataFlags::empty()) {
            Ok(data) => black_box(data.segments().next()),
            Err(error) => panic!("{error}"),
        };
        packet.complete(&[0; 8]);
    }
}

/// Bytes of external data that a [`Copier`] reads.
const COPIED: usize = 64;

struct Copier;
impl ProcessPacket for Copier {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        let mut data = [0; COPIED];
        let copied = packet
            .external_data(ExternalDataFlags::READ_ONLY)
            .and_then(|external| external.read_at(0, &mut data));
        assert_eq!(copied, Ok(COPIED));
        black_box(data);
        packet.complete(&[0; 8]);
    }
}

/// The table, as a driver keeps it in a global of its own.
static TABLE: AtomicUsize = AtomicUsize::new(0);

fn table() -> &'static ServerInterface {
    // SAFETY: set once, to a leaked table, before the first call.
    unsafe {
        &*core::ptr::with_exposed_provenance::<ServerInterface>(TABLE.load(Ordering::Relaxed))
    }
}

unsafe extern "C" fn echo(
    _: VmbChannel,
    packet: VmbPacketCompletion,
    buffer: *mut c_void,
    len: u32,
    _: u32,
) {
    // SAFETY: the packet and buffer of this very callback.
    unsafe { (table().client.channel_packet_complete)(packet, buffer, len) };
}

unsafe extern "C" fn reader(
    _: VmbChannel,
    packet: VmbPacketCompletion,
    _: *mut c_void,
    _: u32,
    _: u32,
) {
    let mut mdl: *mut Mdl = core::ptr::null_mut();
    let mut answer = [0_u8; 8];
    // SAFETY: the packet of this very callback; the MDL is one when the status is 0.
    unsafe {
        let status = (table().client.channel_packet_get_external_data)(packet, 0, &raw mut mdl);
        assert_eq!(status, 0);
        black_box(((*mdl).byte_count, *mdl.add(1).cast::<u64>()));
        (table().client.channel_packet_complete)(packet, answer.as_mut_ptr().cast(), 8);
    }
}

unsafe extern "C" fn copier(
    _: VmbChannel,
    packet: VmbPacketCompletion,
    _: *mut c_void,
    _: u32,
    _: u32,
) {
    const READ_ONLY: u32 = ExternalDataFlags::READ_ONLY.bits();
    let mut mdl: *mut Mdl = core::ptr::null_mut();
    let mut answer = [0_u8; 8];
    // SAFETY: as for `reader`; an address that the library gives has as many bytes as the MDL says.
    unsafe {
        let table = table();
        let status =
            (table.client.channel_packet_get_external_data)(packet, READ_ONLY, &raw mut mdl);
        assert_eq!(status, 0);
        let address = KmclMdlMap(mdl).cast::<[u8; COPIED]>();
        assert!(!address.is_null() && (*mdl).byte_count as usize >= COPIED);
        black_box(address.read());
        (table.client.channel_packet_complete)(packet, answer.as_mut_ptr().cast(), 8);
    }
}

// ---- What drives them -------------------------------------------------------------------------------

struct Discard;
impl PacketCompletion for Discard {
    fn completed(&self, _packet: Packet, status: NtStatus, _payload: &[u8]) {
        assert_eq!(status, NtStatus::SUCCESS);
    }
}

enum Server {
    Rust(Channel),
    C(VmbChannel),
}

impl Server {
    fn serve(&self, budget: u32) -> u32 {
        match self {
            Self::Rust(channel) => serve_rust(channel, budget),
            Self::C(channel) => serve_c(*channel, budget),
        }
    }
}

/// Under a name of its own, for whoever counts the instructions of one side.
#[inline(never)]
fn serve_rust(channel: &Channel, budget: u32) -> u32 {
    channel.process(budget).packets
}

/// As [`serve_rust`].
#[inline(never)]
fn serve_c(channel: VmbChannel, budget: u32) -> u32 {
    let mut packets = 0;
    // SAFETY: a channel, and a place for the number.
    let status =
        unsafe { KmclChannelProcess(channel, 0, budget, &raw mut packets, core::ptr::null_mut()) };
    assert_eq!(status, 0);
    packets
}

struct Pair {
    server: Server,
    client: Channel,
    pfn: Option<u64>,
    routine: Arc<Discard>,
}

impl Pair {
    fn new(
        external: bool,
        server: impl FnOnce(&Arc<LoopbackBus>) -> Result<Server, Box<dyn std::error::Error>>,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let bus = LoopbackBus::new(1 << 20)?;
        let server = server(&bus)?;
        let client = Channel::allocate(Side::Client, bus);
        client.client_init_set_target_pnp(TYPE, None, None)?;
        client.init_set_maximum_packet_size(64)?;
        client.init_set_maximum_external_data(64 << 10, 1)?;
        client.client_init_set_ring_buffer_page_count(16, 16)?;
        client.enable()?;
        while !client.state().is_open() {
            server.serve(1);
            client.process(1);
        }
        let pfn = if external {
            let page = client.allocate_pages(1)?;
            let pfn = page.pfns().next();
            std::mem::forget(page);
            pfn
        } else {
            None
        };
        Ok(Self { server, client, pfn, routine: Arc::new(Discard) })
    }

    fn round(&self) -> Duration {
        let message = [7; 64];
        for _ in 0..BATCH {
            let Some(mut packet) = self.client.packet_allocate() else { panic!("no packet") };
            packet.set_completion_routine(self.routine.clone());
            let flags = SendFlags::WAIT_FOR_COMPLETION;
            let sent = match self.pfn {
                Some(pfn) => packet.send_with_external_pfns(&message, &[pfn], flags),
                None => packet.send(&message, None, flags),
            };
            if let Err(error) = sent {
                panic!("{error}");
            }
        }
        let start = Instant::now();
        let packets = self.server.serve(BATCH);
        let took = start.elapsed();
        assert_eq!(packets, BATCH);
        while self.client.process(BATCH).packets != 0 {}
        took
    }
}

fn in_rust(
    device: Arc<dyn ProcessPacket>,
) -> impl FnOnce(&Arc<LoopbackBus>) -> Result<Server, Box<dyn std::error::Error>> {
    move |bus| {
        let server = Channel::allocate(Side::Server, bus.clone());
        server.server_init_set_target_interface_id(TYPE, INSTANCE)?;
        server.init_set_maximum_packet_size(64)?;
        server.init_set_maximum_external_data(64 << 10, 1)?;
        server.init_set_process_packet_callbacks(device)?;
        server.enable()?;
        server.start();
        Ok(Server::Rust(server))
    }
}

fn in_c(
    device: kmcl_capi::types::ProcessPacket,
) -> impl FnOnce(&Arc<LoopbackBus>) -> Result<Server, Box<dyn std::error::Error>> {
    fn guid(guid: Guid) -> CGuid {
        // SAFETY: 16 plain bytes each.
        unsafe { core::mem::transmute(guid) }
    }
    move |bus| {
        let bus = register_bus(bus.clone())?;
        let (mut parent, mut channel) = (core::ptr::null_mut(), core::ptr::null_mut());
        // SAFETY: places for the results; the callback fits the channel.
        let statuses = unsafe {
            [
                KmclDeviceCreate(bus, core::ptr::null_mut(), &raw mut parent),
                (table().client.channel_allocate)(parent, 1, &raw mut channel),
                (table().server.server_channel_init_set_target_interface_id)(
                    channel,
                    guid(TYPE),
                    guid(INSTANCE),
                ),
                (table().client.channel_init_set_maximum_packet_size)(channel, 64),
                (table().client.channel_init_set_maximum_external_data)(channel, 64 << 10, 1),
                (table().client.channel_init_set_process_packet_callbacks)(
                    channel,
                    Some(device),
                    None,
                ),
                (table().client.channel_enable)(channel),
            ]
        };
        assert_eq!(statuses, [0; 7]);
        (table().client.channel_start)(channel);
        Ok(Server::C(channel))
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
    // As with other benches: only rows whose name has the given part.
    let only = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let mut made = Box::new(MaybeUninit::<ServerInterface>::uninit());
    let size = u16::try_from(size_of::<ServerInterface>())?;
    // SAFETY: a place of that size; it is written when the status is 0.
    unsafe {
        let to = made.as_mut_ptr().cast();
        assert_eq!(KmclQueryInterface(&raw const KMCL_SERVER_INTERFACE_TYPE, size, 1, to), 0);
    }
    TABLE.store(Box::leak(made).as_mut_ptr().expose_provenance(), Ordering::Relaxed);
    for (name, pairs) in [
        (
            "capi/echo/64B/batch32",
            (Pair::new(false, in_c(echo))?, Pair::new(false, in_rust(Arc::new(Echo)))?),
        ),
        (
            "capi/external/64B+1range/batch32",
            (Pair::new(true, in_c(reader))?, Pair::new(true, in_rust(Arc::new(Reader)))?),
        ),
        (
            "capi/external/64B+1range+read/batch32",
            (Pair::new(true, in_c(copier))?, Pair::new(true, in_rust(Arc::new(Copier)))?),
        ),
    ] {
        if only.as_ref().is_some_and(|part| !name.contains(part)) {
            continue;
        }
        let (c, rust) = pairs;
        let (mut ours, mut peer) = (Vec::with_capacity(rounds), Vec::with_capacity(rounds));
        for _ in 0..rounds {
            ours.push(c.round());
            peer.push(rust.round());
        }
        let (ours, peer) = (median(ours), median(peer));
        println!("RATIO {name} ours={ours:.1} peer={peer:.1} ratio={:.3} limit=1.1", ours / peer);
    }
    Ok(())
}
