//! Packets to the peer: the three sends, their refusals, the queue, pipes, the packets themselves.
//!
//! Source: kmcl-semantics sections 7, 8 and 13; D-33, D-35, D-37 to D-41, D-50, D-51.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::sync::Arc;

use common::raw::{Peer, RawBus, Read, as_bus, read_all};
use common::{Answers, Device, Pair, WAIT, client, in_time, packet, padded, refusal, send, server};
use kmcl::bus::BusEvent;
use kmcl::{
    Channel, ChannelFlags, ChannelState, Error, Limits, NtStatus, SendFlags, ServerFlags, Side,
};
use vmbus_ring::Word;
use vmbus_wire::packet::PacketKind;
use vmbus_wire::ranges::GpaRange;

const NONE: SendFlags = SendFlags::empty();

/// A client whose other end the test reads, with rings of 8 pages and external data of 64 KiB in 4
/// ranges.
struct RawClient {
    bus: Arc<RawBus>,
    client: Channel,
    peer: Peer,
    answers: Arc<Answers>,
}

impl RawClient {
    fn open(set_up: impl FnOnce(&Channel)) -> Self {
        let bus = RawBus::new();
        let client = client(&as_bus(&bus), &Device::new());
        client.init_set_maximum_external_data(64 << 10, 4).unwrap();
        set_up(&client);
        client.enable().unwrap();
        bus.offered(None);
        client.process(1);
        let peer = bus.open_completed();
        client.process(1);
        assert_eq!(client.state(), ChannelState::Active);
        Self { bus, client, peer, answers: Arc::default() }
    }

    fn packet(&self) -> kmcl::Packet {
        packet(&self.client, 0, &self.answers)
    }

    /// The only packet in the ring.
    fn sent(&self) -> Read {
        let [read] = <[_; 1]>::try_from(read_all(&mut self.peer.reader())).unwrap();
        read
    }
}

/// The words of an extension that describes these ranges.
fn description(ranges: &[(u32, u32, &[u64])]) -> Vec<u8> {
    let mut words = vec![(ranges.len() as u64) << 32];
    for (byte_offset, byte_count, pfns) in ranges {
        words.push(u64::from(*byte_offset) << 32 | u64::from(*byte_count));
        words.extend_from_slice(pfns);
    }
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

// ---- The three sends --------------------------------------------------------------------------------

/// VmbPacketSend: without WAIT_FOR_COMPLETION the packet has ended, with success, when it is in the
/// ring; with it, when the peer has completed it. PAGED_BUFFER changes nothing.
#[test]
fn a_plain_send_ends_in_the_ring_or_with_its_completion() {
    let pair = Pair::open(Device::echo());
    let answers = Arc::new(Answers::default());
    for (n, flags) in [NONE, SendFlags::PAGED_BUFFER].into_iter().enumerate() {
        packet(&pair.client, n, &answers).send(b"in the ring", None, flags).unwrap();
        assert_eq!(answers.take(), [(n, NtStatus::SUCCESS, vec![])], "{flags:?}");
        assert_eq!(pair.client.outgoing_in_use(), (0, 0));
    }
    for (n, flags) in [WAIT, WAIT | SendFlags::PAGED_BUFFER].into_iter().enumerate() {
        packet(&pair.client, n, &answers).send(b"a transaction", None, flags).unwrap();
        assert_eq!(answers.take(), []);
        assert_eq!(pair.client.outgoing_in_use(), (0, 1));
        pair.pump();
        assert_eq!(answers.take(), [(n, NtStatus::SUCCESS, padded(b"a transaction"))]);
    }
    let expected = [b"in the ring".as_slice(), b"in the ring", b"a transaction", b"a transaction"];
    assert_eq!(pair.device.take_packets(), expected.map(padded));
    pair.close();
}

/// Messages of every length arrive whole, padded to a multiple of 8.
#[test]
fn every_length_arrives() {
    for side in [Side::Server, Side::Client] {
        let pair = Pair::open(Device::new());
        let (sender, receiver) = match side {
            Side::Server => (&pair.server, &pair.driver),
            Side::Client => (&pair.client, &pair.device),
        };
        let message: Vec<u8> = (0..4096).map(|n| (n % 253) as u8).collect();
        for len in (0..40).chain([1023, 1024, 1025, 4088, 4095, 4096]) {
            let packet = sender.packet_allocate().unwrap();
            packet.send(&message[..len], None, NONE).unwrap();
            pair.pump();
            assert_eq!(receiver.take_packets(), [padded(&message[..len])], "{side:?} {len}");
        }
        pair.close();
    }
}

/// VmbPacketSend with an MDL, VmbPacketSendWithExternalMdl, VmbPacketSendWithExternalPfns: what the
/// peer finds in the ring.
#[test]
fn external_data_is_described_as_it_was_given() {
    let raw = RawClient::open(|_| ());
    let ranges = [
        GpaRange { byte_count: 0x1800, byte_offset: 0x400, pfns: &[10, 12] },
        GpaRange { byte_count: 0x20, byte_offset: 0xff0, pfns: &[20, 21] },
    ];
    let check = |what: &str, expected: &[(u32, u32, &[u64])]| {
        let read = raw.sent();
        assert_eq!(read.kind, PacketKind::GpaDirect, "{what}");
        assert!(read.wants_completion, "{what}");
        assert_eq!(read.payload, padded(b"message"), "{what}");
        assert_eq!(read.extension, description(expected), "{what}");
    };
    let whole: [(u32, u32, &[u64]); 2] = [(0x400, 0x1800, &[10, 12]), (0xff0, 0x20, &[20, 21])];

    raw.packet().send(b"message", Some(&ranges), WAIT).unwrap();
    check("VmbPacketSend", &whole);
    let mdl = |offset, length, flags| {
        raw.packet().send_with_external_mdl(b"message", &ranges, offset, length, flags).unwrap();
    };
    mdl(0, 0, WAIT);
    check("all of it", &whole);
    mdl(0xc00, 0, WAIT);
    check("from an offset", &[(0, 0xc00, &[12]), (0xff0, 0x20, &[20, 21])]);
    mdl(0x17f8, 0x18, WAIT);
    check("across ranges", &[(0xbf8, 8, &[12]), (0xff0, 0x10, &[20])]);
    mdl(0, 0x1c00, WAIT | SendFlags::FORCE_MDL_LENGTH);
    check("forced to the end of the page", &[(0x400, 0x1c00, &[10, 12])]);
    raw.packet().send_with_external_pfns(b"message", &[7, 3], WAIT).unwrap();
    check("VmbPacketSendWithExternalPfns", &[(0, 0x2000, &[7, 3])]);

    raw.packet().send(b"message", Some(&[]), NONE).unwrap();
    assert_eq!(raw.sent().kind, PacketKind::InBand, "no range is no external data");
    raw.client.disable();
}

/// D-33, D-35, D-38 to D-41: every refusal with its status; nothing is sent and the packet comes back
/// fit for use.
#[test]
fn each_misuse_is_refused_with_its_status() {
    let raw = RawClient::open(|_| ());
    let bus = RawBus::new();
    let server = server(&as_bus(&bus), &Device::new());
    server.init_set_maximum_external_data(4096, 1).unwrap();
    server.enable().unwrap();
    let server_peer = bus.open(8, 8);
    server.process(1);

    let page = |byte_count, byte_offset, pfns| [GpaRange { byte_count, byte_offset, pfns }];
    let good = page(4096, 0, &[1]);
    let many = [good[0]; 5];
    let large: Vec<u64> = (0..17).collect();
    let unknown = SendFlags::from_bits_retain(0x8);
    let long = vec![0; 4097];
    let m = b"12345678".as_slice();
    let by = NtStatus::invalid_parameter;
    type Send<'a> = &'a dyn Fn(kmcl::Packet) -> Result<(), kmcl::SendError>;
    let rows: [(&str, Send<'_>, NtStatus); 21] = [
        ("long message", &|p| p.send(&long, None, NONE), by(3)),
        ("long message, Mdl", &|p| p.send_with_external_mdl(&long, &good, 0, 0, WAIT), by(3)),
        ("long message, Pfns", &|p| p.send_with_external_pfns(&long, &[1], WAIT), by(3)),
        ("unknown flag", &|p| p.send(m, None, unknown), by(5)),
        ("unknown flag, Mdl", &|p| p.send_with_external_mdl(m, &good, 0, 0, WAIT | unknown), by(7)),
        ("unknown flag, Pfns", &|p| p.send_with_external_pfns(m, &[1], WAIT | unknown), by(6)),
        ("no WAIT, Mdl (D-35)", &|p| p.send_with_external_mdl(m, &good, 0, 0, NONE), by(7)),
        ("no WAIT, Pfns (D-35)", &|p| p.send_with_external_pfns(m, &[1], NONE), by(6)),
        ("no page (D-39)", &|p| p.send_with_external_pfns(m, &[], WAIT), by(5)),
        ("too much (D-40)", &|p| p.send_with_external_pfns(m, &large, WAIT), by(4)),
        ("too many ranges (D-40)", &|p| p.send(m, Some(&many), WAIT), by(4)),
        ("empty range", &|p| p.send(m, Some(&page(0, 0, &[1])), WAIT), by(4)),
        ("offset beyond a page", &|p| p.send(m, Some(&page(8, 4096, &[1])), WAIT), by(4)),
        ("page missing", &|p| p.send(m, Some(&page(4097, 0, &[1])), WAIT), by(4)),
        ("page too many", &|p| p.send(m, Some(&page(8, 0, &[1, 2])), WAIT), by(4)),
        ("page beyond memory", &|p| p.send(m, Some(&page(8, 0, &[1 << 60])), WAIT), by(4)),
        ("offset behind the end", &|p| p.send_with_external_mdl(m, &good, 4096, 0, WAIT), by(5)),
        ("length behind the end", &|p| p.send_with_external_mdl(m, &good, 0, 4097, WAIT), by(6)),
        (
            "page missing, Mdl",
            &|p| p.send_with_external_mdl(m, &page(4097, 0, &[1]), 0, 0, WAIT),
            by(4),
        ),
        ("no range, Mdl", &|p| p.send_with_external_mdl(m, &[], 0, 0, WAIT), by(5)),
        (
            "length forced behind the page",
            &|p| p.send_with_external_mdl(m, &good, 0, 4097, WAIT | SendFlags::FORCE_MDL_LENGTH),
            by(6),
        ),
    ];
    for (what, send, status) in rows {
        let refused = send(raw.packet()).expect_err(what);
        assert_eq!(refused.error.status(), status, "{what}: {refused}");
        assert_eq!(read_all(&mut raw.peer.reader()), [], "{what}");
        refused.packet.send(m, None, NONE).unwrap();
        assert_eq!(raw.sent().payload, m, "{what}");
    }
    let by_server = server.packet_allocate().unwrap().send(m, Some(&good), WAIT);
    assert_eq!(refusal(by_server), Some(Error::ServerExternalData));
    assert_eq!(Error::ServerExternalData.status(), NtStatus::NOT_SUPPORTED, "D-41");
    drop(server_peer);
    server.disable();
    raw.client.disable();
}

/// Message and external data within their bounds can be more than a packet holds: refused, with
/// nothing kept for it.
#[test]
fn more_than_a_packet_can_hold_is_refused() {
    let raw = RawClient::open(|client| {
        client.init_set_maximum_packet_size(Limits::PACKET_SIZE).unwrap();
        client.init_set_maximum_external_data(4 << 20, 1).unwrap();
    });
    let pfns: Vec<u64> = (0..1024).collect();
    let message = vec![0; Limits::PACKET_SIZE as usize];
    for _ in 0..3 {
        let sent = raw.packet().send_with_external_pfns(&message, &pfns, WAIT);
        let status = refusal(sent).unwrap().status();
        assert_eq!(status, NtStatus::INVALID_PARAMETER_3);
        assert_eq!(raw.client.outgoing_in_use(), (0, 0));
    }
    raw.packet().send(&message, None, WAIT).unwrap();
    assert_eq!(raw.sent().payload.len(), message.len());
    raw.client.disable();
}

// ---- When packets wait ------------------------------------------------------------------------------

/// Section 8: packets wait while the ring is full, keep their order, and go when the peer has made
/// room.
#[test]
fn packets_wait_for_room_in_their_order() {
    let pair = Pair::open(Device::new());
    let answers = Arc::new(Answers::default());
    let count = 100;
    for n in 0..count {
        let mut message = vec![0; 1000];
        message[0] = n;
        packet(&pair.client, n.into(), &answers).send(&message, None, NONE).unwrap();
    }
    let in_ring = answers.take().len();
    assert_eq!(pair.client.outgoing_in_use(), (usize::from(count) - in_ring, 0));
    assert!((20..30).contains(&in_ring), "28 KiB hold {in_ring} packets of 1024 bytes");
    pair.pump();
    let delivered: Vec<_> = pair.device.take_packets().iter().map(|message| message[0]).collect();
    assert_eq!(delivered, (0..count).collect::<Vec<_>>());
    let ended: Vec<_> = answers.take().into_iter().map(|(n, status, _)| (n, status)).collect();
    let expected: Vec<_> = (in_ring..usize::from(count)).map(|n| (n, NtStatus::SUCCESS)).collect();
    assert_eq!(ended, expected);
    pair.close();
}

/// A packet that waits has the peer signal when there is room, without anything else happening: the
/// driver is woken to ask for it.
#[test]
fn the_peer_is_asked_for_room() {
    let raw = RawClient::open(|client| client.init_set_maximum_completion_size(0).unwrap());
    let ring = &raw.peer.from_channel;
    while raw.client.outgoing_in_use().0 == 0 {
        raw.packet().send(&[0; 1000], None, NONE).unwrap();
    }
    assert_eq!(ring.word(Word::PendingSendSize), 0, "the receiver asks");
    raw.client.process(1);
    // The packet's, and those of the completion that always has room.
    assert_eq!(ring.word(Word::PendingSendSize), 1024 + 24);
    let mut reader = raw.peer.reader();
    let in_ring = read_all(&mut reader).len();
    raw.client.process(1);
    assert_eq!(ring.word(Word::PendingSendSize), 0, "nothing waits any more");
    assert_eq!(read_all(&mut reader).len(), 1);
    assert!(in_ring > 20);
    raw.client.disable();
}

/// The same with a driver asleep: the send wakes it.
#[test]
fn a_send_that_has_to_wait_wakes_the_driver() {
    let pair = Pair::open(Device::new());
    let drivers = [common::Driver::spawn(&pair.server), common::Driver::spawn(&pair.client)];
    let answers = Arc::new(Answers::default());
    let pair = in_time(move || {
        for _ in 0..50 {
            for n in 0..64 {
                packet(&pair.client, n, &answers).send(&[0; 4000], None, NONE).unwrap();
            }
            answers.wait(64);
        }
        pair
    });
    drop(drivers);
    pair.close();
}

/// Section 8, EvtVmbChannelOpened and Closed: before the opening and after the peer's closing packets
/// wait, more of them than a ring holds, and go with the next opening, in order.
#[test]
fn packets_wait_for_the_opening() {
    let pair = Pair::new(Device::new());
    let answers = Arc::new(Answers::default());
    pair.server.enable().unwrap();
    pair.server.start();
    for round in 0..2 {
        let ended = |n: u8| (usize::from(n), NtStatus::SUCCESS, vec![]);
        for n in 0..40 {
            packet(&pair.server, n.into(), &answers).send(&[n; 2000], None, NONE).unwrap();
        }
        assert_eq!(pair.server.outgoing_in_use(), (40, 0), "round {round}");
        pair.pump();
        assert_eq!(answers.take(), []);
        pair.client.enable().unwrap();
        pair.pump();
        let order: Vec<_> = pair.driver.take_packets().iter().map(|m| m[0]).collect();
        assert_eq!(order, (0..40).collect::<Vec<_>>(), "round {round}");
        assert_eq!(answers.take(), (0..40).map(ended).collect::<Vec<_>>());
        pair.client.disable();
        pair.pump();
        assert_eq!(pair.server.state(), ChannelState::Closed);
    }
    pair.close();
}

/// EvtVmbChannelOpened, EvtVmbChannelStarted: a send in a callback before the queue is on goes its way.
#[test]
fn sends_inside_the_callbacks_of_the_opening_are_transmitted() {
    let pair = Pair::new(Device::new());
    pair.device.when(|channel, call| {
        if !matches!(call, common::Call::Suspend | common::Call::Closed) {
            let packet = channel.packet_allocate().unwrap();
            packet.send(format!("{call:?}").as_bytes(), None, NONE).unwrap();
        }
        Ok(())
    });
    pair.server.enable().unwrap();
    pair.server.start();
    pair.client.enable().unwrap();
    pair.pump();
    let expected = ["Opened", "Started", "PostStarted"].map(|name| padded(name.as_bytes()));
    assert_eq!(pair.driver.take_packets(), expected);
    pair.close();
}

/// D-33: STATUS_DEVICE_REMOVED while the channel is Disabled, and in its last callbacks.
#[test]
fn a_channel_that_goes_down_takes_no_packet() {
    let pair = Pair::new(Device::new());
    let try_send = |channel: &Channel| {
        let packet = channel.packet_allocate().unwrap();
        refusal(packet.send(&[0; 8], None, NONE)).map(|error| error.status())
    };
    for channel in [&pair.server, &pair.client] {
        assert_eq!(try_send(channel), Some(NtStatus::DEVICE_REMOVED), "{channel:?}");
    }
    pair.enable();
    for device in [&pair.device, &pair.driver] {
        device.when(move |channel, _| {
            assert_eq!(try_send(channel), Some(NtStatus::DEVICE_REMOVED), "{channel:?}");
            Ok(())
        });
    }
    pair.client.disable();
    pair.pump();
    assert_eq!(pair.device.take_calls().len() + pair.driver.take_calls().len(), 4);
    pair.close();
}

/// A device may hold as many packets as the outgoing ring has room to complete: the receiver waits
/// for a completion then, not for the peer.
#[test]
fn a_ring_full_of_promises_waits_for_completions() {
    let pair = Pair::open(Device::holding());
    let answers = Arc::new(Answers::default());
    (0..40).for_each(|n| send(&pair.client, n, &[0; 8], &answers));
    pair.pump();
    let room = 28 * 1024 / (16 + 4096 + 8);
    for left in (0..40_usize).rev() {
        let outstanding = pair.server.incoming_outstanding() as usize;
        assert_eq!(outstanding, room.min(left + 1));
        let mut held = pair.device.take_held();
        held.remove(0).complete(&[]);
        held.into_iter().for_each(|packet| pair.device.hold(packet));
        pair.pump();
    }
    assert_eq!(answers.take().len(), 40);
    pair.close();
}

/// Two ends that send until their rings are full can still take each other's packets: each keeps room
/// to complete one.
#[test]
fn two_ends_that_flood_each_other_both_go_on() {
    let pair = Pair::open(Device::echo());
    pair.driver.with_packets(|_, packet| {
        let payload = packet.payload().to_vec();
        packet.complete(&payload);
    });
    let (of_server, of_client) = (Arc::new(Answers::default()), Arc::new(Answers::default()));
    for len in [8, 100, 1000, 4096] {
        for n in 0..1000 {
            send(&pair.server, n, &vec![1; len], &of_server);
            send(&pair.client, n, &vec![2; len], &of_client);
        }
        assert_ne!(pair.server.outgoing_in_use().0, 0, "{len}: more than a ring");
        assert_ne!(pair.client.outgoing_in_use().0, 0, "{len}: more than a ring");
        pair.pump();
        for answers in [&of_server, &of_client] {
            assert_eq!(answers.take().len(), 1000, "{len}");
        }
    }
    pair.close();
}

/// A packet that is sent while completions are promised all the room waits for them, and is not
/// passed by promises made later.
#[test]
fn a_queued_packet_is_not_starved_by_promises() {
    let pair = Pair::open(Device::holding());
    let answers = Arc::new(Answers::default());
    let notices = Arc::new(Answers::default());
    (0..10).for_each(|n| send(&pair.client, n, &[0; 8], &answers));
    pair.pump();
    packet(&pair.server, 1, &notices).send(&[7; 4096], None, NONE).unwrap();
    assert_eq!(pair.server.outgoing_in_use(), (1, 0));
    let mut completed = 0;
    while notices.take().is_empty() {
        // The busiest client: for each packet completed it sends another.
        let mut held = pair.device.take_held();
        held.remove(0).complete(&[]);
        held.into_iter().for_each(|packet| pair.device.hold(packet));
        send(&pair.client, 100 + completed, &[0; 8], &answers);
        completed += 1;
        assert!(completed < 20, "the notice is starved");
        pair.pump();
    }
    pair.pump();
    assert_eq!(pair.driver.take_packets(), [vec![7; 4096]]);
    pair.device.with_packets(|_, packet| packet.complete(&[]));
    pair.device.take_held().into_iter().for_each(|packet| packet.complete(&[]));
    pair.pump();
    assert_eq!(answers.take().len(), 10 + completed);
    pair.close();
}

// ---- Signals ----------------------------------------------------------------------------------------

/// A batch shows the peer nothing before it is dropped, then all of it, with one signal.
#[test]
fn a_batch_is_shown_with_one_signal() {
    let raw = RawClient::open(|_| ());
    let ring = &raw.peer.from_channel;
    let (before, signals) = (ring.word(Word::WriteIndex), raw.peer.signals());
    let mut batch = raw.client.batch();
    for _ in 0..5 {
        batch.send(raw.packet(), &[0; 8], None, NONE).unwrap();
    }
    assert_eq!((ring.word(Word::WriteIndex), raw.peer.signals()), (before, signals));
    drop(batch);
    assert_eq!(ring.word(Word::WriteIndex), before + 5 * 32);
    assert_eq!(raw.peer.signals(), signals + 1);
    assert_eq!(read_all(&mut raw.peer.reader()).len(), 5);

    ring.set_word(Word::InterruptMask, 1);
    raw.packet().send(&[0; 8], None, NONE).unwrap();
    assert_eq!(raw.peer.signals(), signals + 1, "the peer polls");
    raw.client.disable();
}

/// While a batch of another thread is unpublished, a full ring is no reason to fall over.
#[test]
fn a_batch_may_fill_the_ring() {
    let raw = RawClient::open(|_| ());
    let mut reader = raw.peer.reader();
    let mut batch = raw.client.batch();
    let mut sent = 0;
    while raw.client.outgoing_in_use().0 < 3 {
        batch.send(raw.packet(), &[0; 1000], None, NONE).unwrap();
        sent += 1;
    }
    raw.client.process(8);
    drop(batch);
    let mut read = 0;
    while read < sent {
        let now = read_all(&mut reader).len();
        assert_ne!(now, 0, "{read} of {sent}");
        read += now;
        raw.client.process(8);
    }
    assert_eq!(raw.answers.take().len(), sent);
    raw.client.disable();
}

/// Completions and sends made in a packet callback are shown together, with one signal.
#[test]
fn what_callbacks_send_is_shown_with_one_signal() {
    let bus = RawBus::new();
    let device = Device::on_packet(|channel, packet| {
        let notice = channel.packet_allocate().unwrap();
        packet.complete(&[1; 8]);
        notice.send(&[2; 8], None, NONE).unwrap();
    });
    let server = server(&as_bus(&bus), &device);
    server.enable().unwrap();
    server.start();
    let peer = bus.open(8, 8);
    server.process(8);
    let mut writer = peer.writer();
    for id in 0..4 {
        common::raw::push(&mut writer, PacketKind::InBand, true, id, &[0; 8]);
    }
    let signals = peer.signals();
    assert_eq!(server.process(8).packets, 4);
    assert_eq!(peer.signals(), signals + 1);
    let kinds: Vec<_> = read_all(&mut peer.reader()).iter().map(|read| read.kind).collect();
    let (done, notice) = (PacketKind::Completion, PacketKind::InBand);
    assert_eq!(kinds, [done, notice, done, notice, done, notice, done, notice], "in order");
    server.disable();
}

// ---- Pipes ------------------------------------------------------------------------------------------

/// VMBUS_CHANNEL_INIT_FLAG_IS_PIPE, VMBUS_SERVER_CHANNEL_INIT_FLAG_OFFER_AS_PIPE: messages arrive with
/// their exact lengths; there is no external data.
#[test]
fn a_pipe_keeps_exact_lengths() {
    let pipes: [fn(&Channel); 2] = [
        |server| server.init_set_flags(ChannelFlags::IS_PIPE).unwrap(),
        |server| server.server_init_set_flags(ServerFlags::OFFER_AS_PIPE).unwrap(),
    ];
    for as_pipe in pipes {
        let pair = Pair::open_with(Device::new(), |pair| {
            as_pipe(&pair.server);
            pair.client.init_set_flags(ChannelFlags::IS_PIPE).unwrap();
            for channel in [&pair.server, &pair.client] {
                channel.init_set_maximum_packet_size(20_000).unwrap();
            }
            pair.client.init_set_maximum_external_data(4096, 1).unwrap();
        });
        let message: Vec<u8> = (0..16_384).map(|n| (n % 251) as u8).collect();
        for len in (0..20).chain([4095, 16_383, 16_384]) {
            for (sender, receiver) in [(&pair.client, &pair.device), (&pair.server, &pair.driver)] {
                let packet = sender.packet_allocate().unwrap();
                packet.send(&message[..len], None, NONE).unwrap();
                pair.pump();
                assert_eq!(receiver.take_packets(), [&message[..len]], "{sender:?} {len}");
            }
        }
        let answers = Arc::new(Answers::default());
        let too_long = packet(&pair.client, 0, &answers).send(&[0; 16_385], None, NONE);
        assert_eq!(refusal(too_long).unwrap().status(), NtStatus::INVALID_PARAMETER_3);
        let external = packet(&pair.client, 0, &answers).send_with_external_pfns(&[], &[1], WAIT);
        assert_eq!(refusal(external).unwrap().status(), NtStatus::INVALID_PARAMETER_4);
        pair.close();
    }
}

/// A pipe's messages keep their lengths also when they had to wait for room.
#[test]
fn a_pipe_keeps_exact_lengths_of_queued_messages() {
    let pair = Pair::open_with(Device::new(), |pair| {
        for channel in [&pair.server, &pair.client] {
            channel.init_set_flags(ChannelFlags::IS_PIPE).unwrap();
        }
    });
    let messages: Vec<_> = (0..40_u8).map(|n| vec![n; 997 + 3 * usize::from(n)]).collect();
    for message in &messages {
        pair.client.packet_allocate().unwrap().send(message, None, NONE).unwrap();
    }
    assert_ne!(pair.client.outgoing_in_use().0, 0);
    pair.pump();
    assert_eq!(pair.device.take_packets(), messages);
    pair.close();
}

// ---- Packet objects ---------------------------------------------------------------------------------

/// VmbPacketAllocate gives a packet or nothing at the bound; VmbPacketFree gives it back.
#[test]
fn packets_are_bounded_and_come_back() {
    let channel = Channel::allocate(Side::Client, as_bus(&RawBus::new()));
    channel.init_set_maximum_packet_size(8).unwrap();
    let mut packets: Vec<_> =
        (0..Limits::PACKETS).map(|n| channel.packet_allocate().ok_or(n).unwrap()).collect();
    assert!(channel.packet_allocate().is_none());
    packets.pop();
    packets.push(channel.packet_allocate().unwrap());
    assert!(channel.packet_allocate().is_none());
    drop(packets);
    let packets: Vec<_> = std::iter::from_fn(|| channel.packet_allocate()).collect();
    assert_eq!(packets.len(), Limits::PACKETS as usize);
}

/// Section 7: after its completion routine a packet can be sent again; VmbPacketSetPointer,
/// VmbPacketGetPointer, VmbPacketGetChannel and the routine itself stay with it.
#[test]
fn a_packet_can_be_sent_again_from_its_completion_routine() {
    struct Again;
    impl kmcl::PacketCompletion for Again {
        fn completed(&self, mut packet: kmcl::Packet, status: NtStatus, payload: &[u8]) {
            assert_eq!(status, NtStatus::SUCCESS);
            let round = packet.pointer();
            assert_eq!(payload, (round as u64).to_le_bytes());
            let count = packet.channel().get_pointer();
            packet.channel().set_pointer(count + 1);
            if round != 10 {
                packet.set_pointer(round + 1);
                packet.send(&(round as u64 + 1).to_le_bytes(), None, WAIT).unwrap();
            }
        }
    }
    let pair = Pair::open(Device::echo());
    let mut packet = pair.client.packet_allocate().unwrap();
    assert_eq!(packet.pointer(), 0, "D-51");
    packet.set_completion_routine(Arc::new(Again));
    packet.send(&[0; 8], None, WAIT).unwrap();
    pair.pump();
    assert_eq!(pair.client.get_pointer(), 11);
    assert_eq!(pair.client.outgoing_in_use(), (0, 0));
    pair.close();
}

/// VmbPacketAllocate: without a completion routine the packet is freed when it has ended; a freed
/// packet comes back like a new one.
#[test]
fn the_default_routine_frees_the_packet() {
    let pair = Pair::open_with(Device::new(), |pair| {
        pair.client.init_set_maximum_external_data(4096, 1).unwrap();
    });
    let answers = Arc::new(Answers::default());
    for _ in 0..3 {
        packet(&pair.client, 9, &answers).send_with_external_pfns(&[0; 8], &[1], WAIT).unwrap();
        pair.pump();
        assert_eq!(answers.take().len(), 1);
        let packet = pair.client.packet_allocate().unwrap();
        assert_eq!(packet.pointer(), 0, "nothing is left of its former use");
        packet.send(&[0; 8], None, WAIT).unwrap();
        pair.pump();
        assert_eq!(answers.take(), [], "nor its routine");
    }
    pair.close();
}

/// VmbPacketFree of a packet that was never sent, in every state of its channel; a packet keeps its
/// channel alive.
#[test]
fn a_packet_outlives_the_handles_of_its_channel() {
    let pair = Pair::open(Device::new());
    let idle = pair.client.packet_allocate().unwrap();
    let bus = pair.bus.clone();
    pair.close();
    assert_eq!(idle.channel().state(), ChannelState::Disabled);
    assert_ne!(Arc::strong_count(&bus), 1);
    drop(idle);
    assert_eq!(Arc::strong_count(&bus), 1);
}

/// The peer closes with packets queued and in flight: queued ones end as well, and the channel's next
/// opening begins with none.
#[test]
fn a_close_ends_queued_packets_too() {
    let raw = RawClient::open(|_| ());
    let mut sent = 0;
    while raw.client.outgoing_in_use().0 < 2 {
        raw.packet().send(&[0; 1000], None, WAIT).unwrap();
        sent += 1;
    }
    assert!(raw.bus.post(BusEvent::Rescinded));
    raw.client.process(1);
    assert_eq!(raw.client.outgoing_in_use(), (0, 0));
    let ended = raw.answers.take();
    assert_eq!(ended.len(), sent);
    assert!(ended.iter().all(|(_, status, _)| *status == NtStatus::DEVICE_REMOVED));
}
