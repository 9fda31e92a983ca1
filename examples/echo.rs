//! An echo device and its driver in one process: the smallest whole use of the library.
//!
//! `cargo run -p kmcl-examples --example echo`

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kmcl::loopback::LoopbackBus;
use kmcl::{
    Channel, Guid, IncomingPacket, NtStatus, Packet, PacketCompletion, ProcessPacket, SendFlags,
    Side,
};

const ECHO: Guid = Guid::from_u128(0x6c8d_9f5e_3a41_4c0b_9d0e_2f1b_7a60_11ec);
const INSTANCE: Guid = Guid::from_u128(1);
const PACKETS: u32 = 1000;

/// The device (VSP): completes each packet with its own payload.
struct Echo;

impl ProcessPacket for Echo {
    fn process_packet(&self, _channel: &Channel, packet: IncomingPacket) {
        let payload = packet.payload().to_vec();
        packet.complete(&payload);
    }
}

/// The driver (VSC): counts the answers that are right.
#[derive(Default)]
struct Driver {
    answers: AtomicU32,
}

impl PacketCompletion for Driver {
    fn completed(&self, packet: Packet, status: NtStatus, payload: &[u8]) {
        let sent = u64::try_from(packet.pointer()).unwrap_or_default().to_le_bytes();
        assert_eq!((status, payload), (NtStatus::SUCCESS, &sent[..]));
        self.answers.fetch_add(1, Ordering::Relaxed);
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let bus = LoopbackBus::new(1 << 20)?;

    let server = Channel::allocate(Side::Server, bus.clone());
    server.server_init_set_target_interface_id(ECHO, INSTANCE)?;
    server.init_set_process_packet_callbacks(Arc::new(Echo))?;
    server.enable()?;
    server.start();

    let client = Channel::allocate(Side::Client, bus);
    client.client_init_set_target_pnp(ECHO, None, None)?;
    client.enable()?;

    // Nobody else drives these two: one loop turns both, as a simulator or a test would.
    let driver = Arc::new(Driver::default());
    let mut sent = 0;
    while driver.answers.load(Ordering::Relaxed) < PACKETS {
        if sent < PACKETS && client.state().is_open() {
            let mut packet = client.packet_allocate().ok_or("no packet left")?;
            packet.set_completion_routine(driver.clone());
            packet.set_pointer(sent as usize);
            packet.send(&u64::from(sent).to_le_bytes(), None, SendFlags::WAIT_FOR_COMPLETION)?;
            sent += 1;
        }
        server.process(64);
        client.process(64);
    }
    client.disable();
    server.disable();
    println!("{PACKETS} packets echoed");
    Ok(())
}
