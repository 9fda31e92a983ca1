//! The library in an event loop of one's own, here with `polling`: two things to wait on for each
//! channel, one call when either says something.
//!
//! `cargo run -p kmcl-examples --example event_loop`

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::task::{Wake, Waker};

use kmcl::loopback::LoopbackBus;
use kmcl::{
    Channel, Guid, IncomingPacket, NtStatus, Packet, PacketCompletion, ProcessPacket, SendFlags,
    Side,
};
use polling::{Event, Events, PollMode, Poller};

const TYPE: Guid = Guid::from_u128(0x0f2b_3c4d_1111_4a5b_8c6d_7e8f_9a0b_1c2d);
const PACKETS: usize = 500;
/// Wakes the loop when a channel wants to be processed for another reason than its doorbell.
struct Notify(Arc<Poller>);

impl Wake for Notify {
    fn wake(self: Arc<Self>) {
        self.0.notify().unwrap_or_else(|error| eprintln!("cannot notify the loop: {error}"));
    }
}

/// The device completes each packet; the driver sends it again until it was sent often enough.
struct Peer;

impl ProcessPacket for Peer {
    fn process_packet(&self, _channel: &Channel, packet: IncomingPacket) {
        packet.complete(&[]);
    }
}

impl PacketCompletion for Peer {
    fn completed(&self, mut packet: Packet, status: NtStatus, _payload: &[u8]) {
        let sent = packet.pointer() + 1;
        packet.set_pointer(sent);
        packet.channel().set_pointer(sent); // the loop looks at it
        if status.is_success() && sent < PACKETS {
            let _refused = packet.send(&[1; 16], None, SendFlags::WAIT_FOR_COMPLETION);
        }
    }
}

#[expect(
    unsafe_code,
    reason = "`polling` has its users keep a descriptor open while it is watched"
)]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let bus = LoopbackBus::new(1 << 20)?;
    let server = Channel::allocate(Side::Server, bus.clone());
    server.server_init_set_target_interface_id(TYPE, TYPE)?;
    let client = Channel::allocate(Side::Client, bus);
    client.client_init_set_target_pnp(TYPE, None, None)?;
    let poller = Arc::new(Poller::new()?);
    for (key, channel) in [&server, &client].into_iter().enumerate() {
        channel.init_set_process_packet_callbacks(Arc::new(Peer))?;
        channel.set_waker(Waker::from(Arc::new(Notify(poller.clone()))));
        let (doorbell, event) = (channel.doorbell_fd()?.as_raw_fd(), Event::readable(key));
        // SAFETY: the doorbells are open as long as the channels, which outlive the loop below.
        unsafe { poller.add_with_mode(doorbell, event, PollMode::Level)? };
        channel.enable()?;
        channel.start();
    }
    let mut packet = client.packet_allocate().ok_or("no packet")?;
    packet.set_completion_routine(Arc::new(Peer));
    packet.send(&[1; 16], None, SendFlags::WAIT_FOR_COMPLETION)?; // waits for the opening
    while client.get_pointer() < PACKETS {
        poller.wait(&mut Events::new(), None)?;
        for channel in [&server, &client] {
            channel.acknowledge();
            while channel.process(64).more {}
        }
    }
    println!("{} packets through an event loop", client.get_pointer());
    Ok(())
}
