//! A device written against the library, behind this bus, and a guest that speaks to it in raw bytes.

use std::sync::{Arc, Mutex};

use kmcl::bus::Bus;
use kmcl::{Channel, ChannelState, IncomingPacket, NtStatus, ProcessPacket, Side, StateChange};
use vmbus_memory::RingPages;
use vmbus_ring::{OutgoingPacket, RingReader, RingWriter};
use vmbus_wire::packet::PacketKind;

use crate::bytes::*;
use crate::machine::{DEVICE_REMOVED, SUCCESS, TYPE, instance};
use crate::world::*;

/// Answers every packet with its bytes in reverse, and keeps a diary.
#[derive(Default)]
struct Mirror {
    diary: Mutex<Vec<&'static str>>,
    refuses: Mutex<bool>,
}

impl Mirror {
    fn note(&self, what: &'static str) {
        self.diary.lock().unwrap().push(what);
    }

    fn diary(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.diary.lock().unwrap())
    }
}

impl StateChange for Mirror {
    fn opened(&self, _: &Channel) -> Result<(), NtStatus> {
        self.note("opened");
        if *self.refuses.lock().unwrap() { Err(NtStatus::DEVICE_NOT_READY) } else { Ok(()) }
    }

    fn closed(&self, _: &Channel) {
        self.note("closed");
    }
}

impl ProcessPacket for Mirror {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        let mirrored: Vec<u8> = packet.payload().iter().rev().copied().collect();
        packet.complete(&mirrored);
    }
}

/// A world with a mirror, whose guest has been told of it as channel 1.
fn mirror() -> (World, Channel, Arc<Mirror>) {
    let world = World::new();
    let mirror = Arc::new(Mirror::default());
    let bus: Arc<dyn Bus> = Arc::new(world.bus.clone());
    let channel = Channel::allocate(Side::Server, bus);
    channel.server_init_set_target_interface_id(TYPE, instance(1)).unwrap();
    channel.init_set_process_packet_callbacks(Arc::clone(&mirror) as _).unwrap();
    channel.init_set_state_change_callbacks(Arc::clone(&mirror) as _).unwrap();
    channel.enable().unwrap();
    channel.start();
    world.post(&plain_contact(V5_3, 0));
    world.post(&request_offers());
    assert_eq!(world.messages(), [accepted(V5_3), offered(TYPE, instance(1), 0, 1), all_offers()]);
    (world, channel, mirror)
}

fn process(channel: &Channel) {
    while channel.process(64).more {}
}

/// The guest opens the channel in fresh rings.
fn open_channel(world: &World, channel: &Channel) {
    PAGES.iter().for_each(|page| world.memory.write(page << 12, &[0; 4096]).unwrap());
    whole_pages(1, RING, &PAGES).iter().for_each(|message| world.post(message));
    world.post(&open(1, 0x77, RING, 3, 4));
    process(channel);
}

/// The guest sends a packet and signals; the answer comes with an interrupt.
fn mirrored(world: &World, channel: &Channel, payload: &[u8; 8]) -> [u8; 8] {
    let ring = |pfns: &[u64]| RingPages::scattered(&world.memory, pfns).unwrap();
    let mut writer = RingWriter::new(ring(&PAGES[..4])).unwrap();
    let mut reader = RingReader::new(ring(&PAGES[4..])).unwrap();
    assert!(!reader.unmask_and_check().unwrap(), "nothing yet");
    let packet = OutgoingPacket {
        kind: PacketKind::InBand,
        wants_completion: true,
        transaction_id: 0xabcd,
        extension: &[],
        payload: &[payload],
    };
    writer.push(&packet).unwrap();
    if writer.publish() {
        world.bus.guest_signal(0x2001, 0).unwrap();
    }
    process(channel);
    assert_eq!(world.signals(), [(3, 2, 1)]);
    let mut answer = [0; 8];
    let completion = reader.peek().unwrap().unwrap();
    assert_eq!((completion.kind, completion.transaction_id), (PacketKind::Completion, 0xabcd));
    completion.copy_payload(&mut answer);
    reader.advance();
    assert!(!reader.publish(), "nobody waits for space");
    answer
}

#[test]
fn packets_go_through_and_everything_is_given_back() {
    let (world, channel, mirror) = mirror();
    for _ in 0..3 {
        open_channel(&world, &channel);
        let opened = [gpadl_created(1, RING, SUCCESS), open_result(1, 0x77, SUCCESS)];
        assert_eq!(world.messages(), opened);
        assert_eq!(&mirrored(&world, &channel, b"12345678"), b"87654321");
        assert_eq!(&mirrored(&world, &channel, b"abcdefgh"), b"hgfedcba");

        world.post(&close(1));
        world.post(&gpadl_teardown(1, RING));
        assert_eq!(world.messages(), NONE, "the device has not looked yet");
        process(&channel);
        assert_eq!(world.messages(), [gpadl_torndown(RING)]);
        assert_eq!(mirror.diary(), ["opened", "closed"]);
        world.nothing_left(1);
    }
    // The device goes while it is open.
    open_channel(&world, &channel);
    world.messages();
    world.post(&gpadl_teardown(1, RING));
    channel.begin_disable();
    process(&channel);
    assert_eq!(world.messages(), [gpadl_torndown(RING), rescind(1)]);
    assert_eq!(channel.state(), ChannelState::Disabled);
    world.post(&release(1));
    world.nothing_left(0);
}

#[test]
fn an_open_that_the_device_refuses_may_be_tried_again() {
    let (world, channel, mirror) = mirror();
    *mirror.refuses.lock().unwrap() = true;
    open_channel(&world, &channel);
    let refused = open_result(1, 0x77, NtStatus::DEVICE_NOT_READY.0);
    assert_eq!(world.messages(), [gpadl_created(1, RING, SUCCESS), refused]);
    assert_eq!(world.bus.active_channels(), 0);
    world.post(&gpadl_teardown(1, RING));
    *mirror.refuses.lock().unwrap() = false;
    open_channel(&world, &channel);
    assert_eq!(world.messages().pop(), Some(open_result(1, 0x77, SUCCESS)));
    assert_eq!(mirror.diary(), ["opened", "opened"]);

    // The guest goes before the device has looked at its open; then another one comes.
    for refuses in [true, false] {
        *mirror.refuses.lock().unwrap() = refuses;
        world.bus.guest_reset();
        world.post(&plain_contact(V5_3, 0));
        process(&channel);
        assert_eq!(world.messages(), [accepted(V5_3)]);
        world.post(&request_offers());
        whole_pages(1, RING, &PAGES).iter().for_each(|message| world.post(message));
        world.post(&open(1, 0x78, RING, 3, 4));
        world.messages();
        mirror.diary();
    }
    world.bus.guest_reset();
    process(&channel);
    assert_eq!(mirror.diary(), ["opened", "closed"]);
    world.nothing_left(1);
}

#[test]
fn a_device_that_is_disabled_before_it_has_looked_at_an_open() {
    let (world, channel, mirror) = mirror();
    whole_pages(1, RING, &PAGES).iter().for_each(|message| world.post(message));
    world.post(&open(1, 0x77, RING, 3, 4));
    channel.begin_disable();
    process(&channel);
    let messages = world.messages();
    let result = messages.iter().find(|message| u32_at(message, 0) == 6).cloned();
    let looked = mirror.diary().contains(&"opened");
    let status = if looked { SUCCESS } else { DEVICE_REMOVED };
    assert_eq!(result, Some(open_result(1, 0x77, status)), "answered in any case");
    assert_eq!(messages.last(), Some(&rescind(1)));
    world.post(&release(1));
    world.nothing_left(0);
}
