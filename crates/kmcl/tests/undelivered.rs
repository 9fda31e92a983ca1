//! What a client leaves in the ring when it closes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::sync::{Arc, Mutex};

use common::raw::{Descriptor, Peer, RawBus, as_bus};
use common::{Call, Device, lock, server};
use kmcl::bus::BusEvent;
use kmcl::{Channel, ChannelError, ChannelFlags, ChannelState, Error};

type Taken = Arc<Mutex<Vec<Vec<u8>>>>;

/// An open channel whose device takes what was not delivered when it is suspended.
fn open(flags: ChannelFlags) -> (Arc<RawBus>, Channel, Peer, Arc<Device>, Taken) {
    let bus = RawBus::new();
    let device = Device::new();
    let channel = server(&as_bus(&bus), &device);
    channel.init_set_flags(flags).unwrap();
    let taken = Taken::default();
    let into = Arc::clone(&taken);
    device.when(move |channel, call| {
        let mut taken = lock(&into);
        let result = channel.take_undelivered(|message| taken.push(message.to_vec()));
        match call {
            Call::Suspend | Call::Closed => assert_eq!(result, Ok(())),
            _ => assert!(matches!(result, Err(Error::State { .. })), "{call:?}: {result:?}"),
        }
        Ok(())
    });
    channel.enable().unwrap();
    channel.start();
    let peer = bus.open(4, 4);
    channel.process(0);
    assert_eq!(channel.state(), ChannelState::Active);
    (bus, channel, peer, device, taken)
}

/// One packet in the ring, shown at once; nobody has signalled.
fn put(peer: &mut Peer, message: &[u64]) {
    let words = u16::try_from(message.len()).unwrap();
    peer.to_channel.put(Descriptor::in_band(words), message);
}

#[test]
fn messages_in_front_of_a_close_can_be_read() {
    let word = |bytes: [u8; 8]| u64::from_le_bytes(bytes);
    let header = |len: u8| word([1, 0, 0, 0, len, 0, 0, 0]);
    let (bus, channel, mut peer, device, taken) = open(ChannelFlags::IS_PIPE);
    put(&mut peer, &[header(3), word(*b"one\0\0\0\0\0")]);
    put(&mut peer, &[header(0)]);
    put(&mut peer, &[header(8), word(*b"twotwo!!")]);
    bus.post(BusEvent::PeerClosed);
    channel.process(64);
    assert_eq!(channel.state(), ChannelState::Closed);
    assert_eq!(*lock(&taken), [&b"one"[..], b"", b"twotwo!!"]);
    assert_eq!(device.delivered(), 0, "none of them was delivered as well");
    channel.disable();
}

#[test]
fn packets_that_lie_end_it() {
    let header = |kind: u64, len: u64| kind | len << 32;
    for (what, bad, reason) in [
        ("too long", header(1, 16385), "pipe packet of 16385 bytes, the longest has 16384"),
        ("truncated", header(1, 9), "pipe packet of 9 bytes, 0 follow its header"),
        ("no data", header(3, 0), "pipe packet of type SetupGpaDirect from the peer"),
    ] {
        let (bus, channel, mut peer, device, taken) = open(ChannelFlags::IS_PIPE);
        put(&mut peer, &[header(1, 0)]);
        put(&mut peer, &[bad]);
        put(&mut peer, &[header(1, 0)]);
        let stopped = Arc::new(Mutex::new(None));
        bus.post(BusEvent::PeerClosed);
        device.when({
            let (taken, stopped) = (Arc::clone(&taken), Arc::clone(&stopped));
            move |channel, call| {
                if *call == Call::Suspend {
                    channel.take_undelivered(|it| lock(&taken).push(it.to_vec())).unwrap();
                    *lock(&stopped) = channel.stop_reason();
                }
                Ok(())
            }
        });
        channel.process(64);
        let stopped: Option<ChannelError> = *lock(&stopped);
        assert_eq!(stopped.map(|it| it.to_string()).as_deref(), Some(reason), "{what}");
        assert_eq!(lock(&taken).len(), 1, "{what}: what came before");
        channel.disable();
    }
}

/// A client that goes on writing while it is read keeps nobody busy for longer than a ring.
#[test]
fn no_more_than_a_ring_is_read() {
    let (bus, channel, peer, device, _taken) = open(ChannelFlags::empty());
    let bytes = peer.to_channel.data_len();
    let count = Arc::new(Mutex::new(0_u32));
    let peer = Mutex::new(peer);
    device.when({
        let count = Arc::clone(&count);
        move |channel, call| {
            if *call == Call::Suspend {
                put(&mut lock(&peer), &[7]);
                channel
                    .take_undelivered(|_| {
                        *lock(&count) += 1;
                        put(&mut lock(&peer), &[7]);
                    })
                    .unwrap();
            }
            Ok(())
        }
    });
    bus.post(BusEvent::PeerClosed);
    channel.process(64);
    assert_eq!(channel.state(), ChannelState::Closed);
    let each = 16 + 8 + 8;
    // The last one would have to be where the first one was, which the client never got back.
    assert_eq!(*lock(&count), bytes / each - 1);
    channel.disable();
}
