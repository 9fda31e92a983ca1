//! A peer that lies about rings and packets: a typed error with the numbers, this channel stopped,
//! other channels at work, this one too after it was closed and opened again, and nothing leaked.
//!
//! Source: vmbus-wire section 5; D-36.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use common::raw::{Descriptor, Peer, RawBus, RawRing, Said, as_bus, push, read_all};
use common::victim::{DATA, Victim};
use common::{Answers, Device, WAIT, in_time, lock, refusal, send, server};
use kmcl::bus::BusEvent;
use kmcl::{
    Channel, ChannelError, ChannelFlags, ChannelState, Error, ExternalDataFlags, NtStatus,
    SendFlags, Side,
};
use proptest::prelude::*;
use vmbus_ring::{Index, RingError, Word};
use vmbus_wire::packet::{ExtensionError, PacketError, PacketKind};
use vmbus_wire::pipe::{PipeError, PipePacketType};
use vmbus_wire::ranges::RangeError;

fn packet_error(at: u32, error: PacketError) -> ChannelError {
    ChannelError::Incoming(RingError::Packet { at, error })
}

/// A lie in the ring that the channel reads, and the error that it is called.
type Lie = (&'static str, fn(&mut RawRing), ChannelError);

/// Tells each lie to a channel of either side, first as the only thing in the ring, then behind an
/// honest packet, which is delivered.
fn tell(lies: &[Lie], set_up: fn(&Channel)) {
    for side in [Side::Server, Side::Client] {
        let victim = Victim::new(side, Device::new(), set_up);
        for (what, lie, reason) in lies {
            let mut peer = victim.open();
            lie(&mut peer.to_channel);
            victim.channel.process(64);
            assert_eq!(victim.device.take_calls(), [], "{what}: nothing is delivered");
            victim.stops(peer, *reason, what);
        }
    }
}

// ---- Indices ----------------------------------------------------------------------------------------

/// The write index of the ring that we read: inside the data area, a multiple of 8, never back, and at
/// least a packet ahead.
#[test]
fn a_write_index_that_is_none() {
    let out_of_range = |value| {
        let index = Index::Write;
        ChannelError::Incoming(RingError::IndexOutOfRange { index, value, data_len: DATA })
    };
    let misaligned =
        |value| ChannelError::Incoming(RingError::IndexMisaligned { index: Index::Write, value });
    let short = |available| packet_error(0, PacketError::NoRoom { available });
    tell(
        &[
            ("the size", |ring| ring.set_word(Word::WriteIndex, DATA), out_of_range(DATA)),
            (
                "far away",
                |ring| ring.set_word(Word::WriteIndex, 0xffff_fff8),
                out_of_range(0xffff_fff8),
            ),
            ("odd", |ring| ring.set_word(Word::WriteIndex, 33), misaligned(33)),
            ("half a unit", |ring| ring.set_word(Word::WriteIndex, DATA - 4), misaligned(DATA - 4)),
            ("8 bytes", |ring| ring.set_word(Word::WriteIndex, 8), short(8)),
            ("16 bytes", |ring| ring.set_word(Word::WriteIndex, 16), short(16)),
        ],
        |_| (),
    );
}

/// A write index that goes back over what was shown, while that is being read.
#[test]
fn a_write_index_that_goes_back() {
    for side in [Side::Server, Side::Client] {
        let victim = Victim::new(side, Device::new(), |_| ());
        let mut peer = victim.open();
        let ring = peer.to_channel.map();
        victim.device.with_packets(move |_, packet| {
            vmbus_ring::ControlWords::store(&ring, Word::WriteIndex, 8, Ordering::SeqCst);
            packet.complete(&[]);
        });
        peer.to_channel.put(Descriptor::in_band(1), &[1]);
        victim.channel.process(64);
        let error = RingError::IndexPassed { index: Index::Write, from: 32, to: 8, other: 0 };
        victim.device.with_packets(|_, packet| packet.complete(&[]));
        victim.stops(peer, ChannelError::Incoming(error), "goes back");
    }
}

/// The read index of the ring that we write: looked at when room is needed, for completions as well as
/// for sends.
#[test]
fn a_read_index_that_is_none() {
    let out_of_range =
        RingError::IndexOutOfRange { index: Index::Read, value: DATA, data_len: DATA };
    let misaligned = RingError::IndexMisaligned { index: Index::Read, value: 20 };
    for (what, value, error) in [
        ("out of range", DATA, Some(out_of_range)),
        ("misaligned", 20, Some(misaligned)),
        ("ahead of what was shown", DATA - 8, None),
    ] {
        let check = |reason: Option<ChannelError>| match (reason, error) {
            (Some(ChannelError::Outgoing(got)), Some(error)) => assert_eq!(got, error, "{what}"),
            (Some(ChannelError::Outgoing(RingError::IndexPassed { index, to, .. })), None) => {
                assert_eq!((index, to), (Index::Read, value), "{what}");
            }
            (reason, _) => panic!("{what}: {reason:?}"),
        };
        // For completions: the device answers with as much as the ring holds.
        let victim =
            Victim::new(Side::Server, Device::on_packet(|_, p| p.complete(&[7; 4096])), |_| ());
        let mut peer = victim.open();
        for n in 0..8 {
            peer.to_channel.put(Descriptor::in_band(1), &[n]);
        }
        peer.from_channel.set_word(Word::ReadIndex, value);
        victim.channel.process(64);
        check(victim.channel.stop_reason());
        victim.stops(peer, victim.channel.stop_reason().unwrap(), what);

        // For sends, in the ring and from the queue.
        let victim = Victim::new(Side::Server, Device::new(), |_| ());
        let peer = victim.open();
        let answers = Arc::new(Answers::default());
        let mut queued = 0;
        while victim.channel.outgoing_in_use().0 == 0 {
            send(&victim.channel, queued, &[0; 4000], &answers);
            queued += 1;
        }
        peer.from_channel.set_word(Word::ReadIndex, value);
        victim.channel.process(64);
        check(victim.channel.stop_reason());
        victim.stops(peer, victim.channel.stop_reason().unwrap(), what);
        assert_eq!(answers.take().len(), queued, "each packet has ended once");

        let victim = Victim::new(Side::Server, Device::new(), |_| ());
        let peer = victim.open();
        peer.from_channel.set_word(Word::ReadIndex, value);
        let refused = loop {
            let packet = victim.channel.packet_allocate().unwrap();
            if let Some(error) = refusal(packet.send(&[0; 4000], None, WAIT)) {
                break error;
            }
        };
        assert_eq!(refused.status(), NtStatus::DEVICE_REMOVED, "{what}");
        check(victim.channel.stop_reason());
        victim.stops(peer, victim.channel.stop_reason().unwrap(), what);
    }
}

/// The words that we own are written and never read back; those that only say when to signal are
/// heeded or not: nothing that the peer puts there disturbs the channel.
#[test]
fn words_that_are_not_believed() {
    for side in [Side::Server, Side::Client] {
        let victim = Victim::new(side, Device::echo(), |_| ());
        let peer = victim.open();
        let (mut reader, mut writer) = (peer.reader(), peer.writer());
        for garbage in [8, 12, DATA, 0x8000_0000, u32::MAX] {
            peer.to_channel.set_word(Word::ReadIndex, garbage);
            peer.from_channel.set_word(Word::WriteIndex, garbage);
            for ring in [&peer.to_channel, &peer.from_channel] {
                ring.set_word(Word::PendingSendSize, garbage);
                ring.set_word(Word::FeatureBits, garbage);
                ring.set_word(Word::InterruptMask, garbage);
            }
            // The packet is written by a writer that remembers; its view of our index is put right.
            peer.to_channel.set_word(Word::ReadIndex, writer.write_index());
            push(&mut writer, PacketKind::InBand, true, 5, &[9; 8]);
            victim.channel.process(8);
            assert_eq!(read_all(&mut reader).len(), 1, "{side:?} {garbage:#x}");
            assert_eq!(victim.channel.stop_reason(), None, "{side:?} {garbage:#x}");
        }
        drop((reader, writer));
        victim.recovers(peer, "words that are not believed");
    }
}

/// Rings that are broken before the channel sees them, and rings too small for what it may have to
/// send: the open is refused, the next one works.
#[test]
fn rings_that_cannot_be_opened() {
    type Break = fn(&Peer);
    let breaks: [(&str, Break); 6] = [
        ("in, out of range", |peer| peer.to_channel.set_word(Word::WriteIndex, DATA)),
        ("in, misaligned", |peer| peer.to_channel.set_word(Word::WriteIndex, 7)),
        ("out, out of range", |peer| peer.to_channel.set_word(Word::ReadIndex, u32::MAX)),
        ("our in, out of range", |peer| peer.from_channel.set_word(Word::WriteIndex, DATA)),
        ("our in, misaligned", |peer| peer.from_channel.set_word(Word::WriteIndex, 1)),
        ("our out, misaligned", |peer| peer.from_channel.set_word(Word::ReadIndex, 9)),
    ];
    for side in [Side::Server, Side::Client] {
        let victim = Victim::new(side, Device::new(), |_| ());
        for (what, break_it) in breaks {
            let peer = victim.open_prepared(break_it);
            refused(&victim, what);
            drop(peer);
            let peer = victim.open();
            victim.recovers(peer, what);
        }
    }
    let victim = Victim::new(Side::Server, Device::new(), |_| ());
    victim.channel.enable().unwrap();
    for (to_server, to_client) in [(2, 2), (8, 2)] {
        let peer = victim.bus.open(to_server, to_client);
        victim.channel.process(1);
        refused(&victim, "a ring too small for 4 KiB packets");
        drop(peer);
    }
    let peer = victim.bus.open(2, 3);
    victim.channel.process(1);
    assert_eq!(victim.bus.take_said(), [Said::OpenResult(NtStatus::SUCCESS)]);
    victim.close(peer);
    victim.ends("small rings");
}

fn refused(victim: &Victim, what: &str) {
    assert_eq!(victim.device.take_calls(), [], "{what}");
    let said = victim.bus.take_said();
    match victim.channel.side() {
        Side::Server => {
            assert_eq!(said.last(), Some(&Said::OpenResult(NtStatus::INVALID_PARAMETER)), "{what}");
            assert_ne!(victim.channel.state(), ChannelState::Active, "{what}");
        }
        Side::Client => {
            assert_eq!(said.last(), Some(&Said::Close), "{what}");
            assert_eq!(victim.channel.state(), ChannelState::Disabled, "{what}");
        }
    }
    victim.honest.works();
}

// ---- Descriptors ------------------------------------------------------------------------------------

/// Every field of a descriptor, one lie at a time.
#[test]
fn a_descriptor_that_makes_no_sense() {
    let data_offset =
        |data_offset, length| packet_error(0, PacketError::DataOffset { data_offset, length });
    let truncated =
        |length, available| packet_error(0, PacketError::Truncated { length, available });
    let extension = |kind, needed, extension_len| {
        packet_error(0, PacketError::Extension { kind, needed, extension_len })
    };
    tell(
        &[
            (
                "no length",
                |ring| ring.put(Descriptor { length: 0, ..Descriptor::in_band(1) }, &[1]),
                data_offset(16, 0),
            ),
            (
                "shorter than its descriptor",
                |ring| ring.put(Descriptor { length: 1, ..Descriptor::in_band(1) }, &[1]),
                data_offset(16, 8),
            ),
            (
                "longer than what is shown",
                |ring| ring.put(Descriptor { length: 100, ..Descriptor::in_band(1) }, &[1]),
                truncated(800, 32),
            ),
            (
                "longer than the ring",
                |ring| ring.put(Descriptor { length: 0xffff, ..Descriptor::in_band(1) }, &[1]),
                truncated(524_280, 32),
            ),
            (
                "without its trailer",
                |ring| ring.put(Descriptor { length: 4, ..Descriptor::in_band(1) }, &[1]),
                truncated(32, 32),
            ),
            (
                "payload inside the descriptor",
                |ring| ring.put(Descriptor { data_offset: 1, ..Descriptor::in_band(1) }, &[1]),
                data_offset(8, 24),
            ),
            (
                "payload behind the packet",
                |ring| ring.put(Descriptor { data_offset: 4, ..Descriptor::in_band(1) }, &[1]),
                data_offset(32, 24),
            ),
            (
                "payload far away",
                |ring| ring.put(Descriptor { data_offset: 0xffff, ..Descriptor::in_band(1) }, &[1]),
                data_offset(524_280, 24),
            ),
            (
                "unknown flag",
                |ring| ring.put(Descriptor { flags: 2, ..Descriptor::in_band(1) }, &[1]),
                packet_error(0, PacketError::Flags { flags: 2 }),
            ),
            (
                "unknown flags",
                |ring| ring.put(Descriptor { flags: 0x8001, ..Descriptor::in_band(1) }, &[1]),
                packet_error(0, PacketError::Flags { flags: 0x8001 }),
            ),
            (
                "kind 0",
                |ring| ring.put(Descriptor { kind: 0, ..Descriptor::in_band(1) }, &[1]),
                packet_error(0, PacketError::Kind { kind: 0 }),
            ),
            (
                "kind 14",
                |ring| ring.put(Descriptor { kind: 14, ..Descriptor::in_band(1) }, &[1]),
                packet_error(0, PacketError::Kind { kind: 14 }),
            ),
            (
                "kind 65535",
                |ring| ring.put(Descriptor { kind: 0xffff, ..Descriptor::in_band(1) }, &[1]),
                packet_error(0, PacketError::Kind { kind: 0xffff }),
            ),
            (
                "external data without a description",
                |ring| ring.put(Descriptor::gpa_direct(0), &[]),
                extension(PacketKind::GpaDirect, 24, 0),
            ),
            (
                "external data without a page",
                |ring| ring.put(Descriptor::gpa_direct(2), &[1 << 32, 8]),
                extension(PacketKind::GpaDirect, 24, 16),
            ),
        ],
        |_| (),
    );
}

/// Packets of kinds that have no meaning on a channel, well formed.
#[test]
fn packets_of_other_kinds() {
    let (mut expected, mut kinds) = (Vec::new(), Vec::new());
    for kind in PacketKind::ALL {
        let known = [PacketKind::InBand, PacketKind::GpaDirect, PacketKind::Completion];
        if !known.contains(&kind) {
            kinds.push(kind);
            expected.push(ChannelError::Kind(kind));
        }
    }
    for side in [Side::Server, Side::Client] {
        let victim = Victim::new(side, Device::new(), |_| ());
        for (kind, reason) in kinds.iter().zip(&expected) {
            let mut peer = victim.open();
            let words = u16::try_from(kind.min_extension_len() / 8).unwrap();
            let descriptor = Descriptor { kind: kind.to_wire(), ..Descriptor::gpa_direct(words) };
            peer.to_channel.put(descriptor, &vec![1 << 32 | 1; words.into()]);
            victim.channel.process(64);
            assert_eq!(victim.device.take_calls(), []);
            victim.stops(peer, *reason, &format!("{kind:?}"));
        }
    }
}

/// An honest packet in front of a lie is delivered and completed; packets that the device has already
/// are completed as well.
#[test]
fn what_came_before_a_lie_is_served() {
    let victim = Victim::new(Side::Server, Device::holding(), |_| ());
    let mut peer = victim.open();
    peer.to_channel.put(Descriptor::in_band(1), &[1]);
    peer.to_channel.put(Descriptor::in_band(1), &[2]);
    peer.to_channel.put(Descriptor { flags: 4, ..Descriptor::in_band(1) }, &[3]);
    victim.channel.process(64);
    assert_eq!(victim.device.take_packets(), [1_u64.to_le_bytes(), 2_u64.to_le_bytes()]);
    let mut reader = peer.reader();
    assert_eq!(read_all(&mut reader), []);
    victim.device.take_held().into_iter().for_each(|packet| packet.complete(&[4; 8]));
    let payloads: Vec<_> = read_all(&mut reader).into_iter().map(|read| read.payload).collect();
    assert_eq!(payloads, [[4; 8], [4; 8]]);
    drop(reader);
    let reason = packet_error(64, PacketError::Flags { flags: 4 });
    victim.stops(peer, reason, "behind honest packets");
}

/// A device that holds packets when the ring breaks: the close waits for them, as ever.
#[test]
fn packets_held_while_the_channel_is_stopped_hold_up_the_close() {
    let victim = Victim::new(Side::Server, Device::holding(), |_| ());
    let mut peer = victim.open();
    peer.to_channel.put(Descriptor::in_band(1), &[1]);
    victim.channel.process(64);
    peer.to_channel.set_word(Word::WriteIndex, 4);
    victim.channel.process(64);
    assert!(victim.channel.stop_reason().is_some());
    assert!(victim.bus.post(BusEvent::PeerClosed));
    victim.channel.process(64);
    assert_eq!(victim.channel.state(), ChannelState::Closing);
    victim.device.take_held().into_iter().for_each(|packet| packet.complete(&[]));
    victim.channel.process(64);
    assert_eq!(victim.channel.state(), ChannelState::Closed);
    drop(peer);
    victim.ends("held");
}

// ---- External data ----------------------------------------------------------------------------------

/// Every lie in a description of external data.
#[test]
fn external_data_that_makes_no_sense() {
    let ranges = |error| ChannelError::ExternalData(ExtensionError::Ranges(error));
    // Count and ranges: header words hold the offset above and the length below.
    tell(
        &[
            (
                "no range",
                |ring| ring.put(Descriptor::gpa_direct(3), &[0, 8, 1]),
                ranges(RangeError::NoRanges),
            ),
            (
                "more ranges than there are",
                |ring| ring.put(Descriptor::gpa_direct(3), &[2 << 32, 8, 1]),
                ranges(RangeError::Truncated { range: 1, pages: 1, words: 0 }),
            ),
            (
                "4294967295 ranges",
                |ring| ring.put(Descriptor::gpa_direct(3), &[0xffff_ffff << 32, 8, 1]),
                ranges(RangeError::Truncated { range: 1, pages: 1, words: 0 }),
            ),
            (
                "no bytes",
                |ring| ring.put(Descriptor::gpa_direct(3), &[1 << 32, 0, 1]),
                ranges(RangeError::Empty { range: 0 }),
            ),
            (
                "an offset behind the page",
                |ring| ring.put(Descriptor::gpa_direct(3), &[1 << 32, 4096 << 32 | 8, 1]),
                ranges(RangeError::ByteOffset { range: 0, byte_offset: 4096 }),
            ),
            (
                "an end beyond 32 bits",
                |ring| ring.put(Descriptor::gpa_direct(3), &[1 << 32, 4095 << 32 | 0xffff_ffff, 1]),
                ranges(RangeError::Overflow { range: 0, byte_count: u32::MAX, byte_offset: 4095 }),
            ),
            (
                "a page missing",
                |ring| ring.put(Descriptor::gpa_direct(3), &[1 << 32, 4097, 1]),
                ranges(RangeError::Truncated { range: 0, pages: 2, words: 1 }),
            ),
            (
                "a million pages missing",
                |ring| ring.put(Descriptor::gpa_direct(3), &[1 << 32, 0xffff_ffff, 1]),
                ranges(RangeError::Truncated { range: 0, pages: 1 << 20, words: 1 }),
            ),
            (
                "a page beyond all addresses",
                |ring| ring.put(Descriptor::gpa_direct(3), &[1 << 32, 8, 1 << 52]),
                ranges(RangeError::Pfn { range: 0, pfn: 1 << 52 }),
            ),
            (
                "a second range that lies, beyond the own bounds",
                |ring| {
                    let mut body = vec![9 << 32];
                    (0..8).for_each(|_| body.extend([8, 1]));
                    body.extend([0, 1]);
                    ring.put(Descriptor::gpa_direct(19), &body);
                },
                ranges(RangeError::Empty { range: 8 }),
            ),
        ],
        |_| (),
    );
}

/// Descriptions that are well formed and name what is not there, or too much of it, are the device's to
/// judge: the channel goes on.
#[test]
fn external_data_that_the_device_has_to_refuse() {
    let results = Arc::new(Mutex::new(Vec::new()));
    let victim = Victim::new(Side::Server, Device::new(), |_| ());
    victim.device.with_packets({
        let results = results.clone();
        move |_, packet| {
            let status = packet.external_data(ExternalDataFlags::empty()).map(|data| data.len());
            lock(&results).push(status.map_err(|error: Error| error.status()));
            packet.complete(&[]);
        }
    });
    let mut peer = victim.open();
    let ram = victim.bus.memory().total_bytes() / 4096;
    let pages = |bytes: u64, pfns: &[u64]| [&[1 << 32, bytes], pfns].concat();
    let rows: [(&str, Vec<u64>, Result<u32, NtStatus>); 8] = [
        ("garbage in the reserved half", vec![1 << 32 | 0xdead, 8, 1], Ok(8)),
        ("words behind the ranges", vec![1 << 32, 8, 1, 77, 77], Ok(8)),
        ("the last page", pages(4096, &[ram - 1]), Ok(4096)),
        ("the page behind it", pages(4096, &[ram]), Err(NtStatus::INVALID_PARAMETER)),
        (
            "RAM and the end of all",
            pages(8192, &[0, (1 << 52) - 1]),
            Err(NtStatus::INVALID_PARAMETER),
        ),
        ("the end of all", pages(8, &[(1 << 52) - 1]), Err(NtStatus::INVALID_PARAMETER)),
        ("RAM around a hole", pages(8192, &[ram - 1, ram + 1]), Err(NtStatus::INVALID_PARAMETER)),
        ("too much", pages(8193, &[1, 2, 3]), Err(NtStatus::INVALID_BUFFER_SIZE)),
    ];
    for (what, body, expected) in rows {
        let words = u16::try_from(body.len()).unwrap();
        peer.to_channel.put(Descriptor::gpa_direct(words), &body);
        victim.channel.process(8);
        assert_eq!(std::mem::take(&mut *lock(&results)), [expected], "{what}");
        assert_eq!(victim.channel.stop_reason(), None, "{what}");
    }
    assert_eq!(read_all(&mut peer.reader()).len(), 8, "each was completed");
    victim.recovers(peer, "external data");
}

/// As much description as a packet can hold is looked at in bounds, or refused by its size.
#[test]
fn external_data_of_any_size_is_bounded() {
    let bus = RawBus::new();
    let victim = server(&as_bus(&bus), &Device::new());
    victim.init_set_maximum_external_data(8192, 2).unwrap();
    victim.enable().unwrap();
    victim.start();
    for (words, fits) in [(16 << 10, true), (16 << 10 | 1, false), (65_000, false)] {
        let mut peer = bus.open(200, 8);
        victim.process(1);
        let ranges = (words - 1) / 2;
        let mut body = vec![u64::from(ranges) << 32];
        (0..ranges).for_each(|_| body.extend([8, 1]));
        body.resize(words as usize, 0);
        peer.to_channel.put(Descriptor::gpa_direct(u16::try_from(words).unwrap()), &body);
        victim.process(64);
        let limit = 16 << 10;
        let reason = (!fits).then_some(ChannelError::ExternalDataSize { words, limit });
        assert_eq!(victim.stop_reason(), reason, "{words}");
        assert!(bus.post(BusEvent::PeerClosed));
        victim.process(1);
    }
    victim.disable();
}

// ---- Pipes ------------------------------------------------------------------------------------------

/// Every lie in a pipe's header.
#[test]
fn a_pipe_header_that_makes_no_sense() {
    // The low half of the header word is the type, the high half the length.
    tell(
        &[
            (
                "no header",
                |ring| ring.put(Descriptor::in_band(0), &[]),
                ChannelError::Pipe(PipeError::NoHeader { len: 0 }),
            ),
            (
                "unknown type",
                |ring| ring.put(Descriptor::in_band(1), &[5]),
                ChannelError::Pipe(PipeError::Type { packet_type: 5 }),
            ),
            (
                "type 0",
                |ring| ring.put(Descriptor::in_band(1), &[0]),
                ChannelError::Pipe(PipeError::Type { packet_type: 0 }),
            ),
            (
                "more than there is",
                |ring| ring.put(Descriptor::in_band(2), &[9 << 32 | 1, 0]),
                ChannelError::Pipe(PipeError::Truncated { length: 9, len: 8 }),
            ),
            (
                "more than a pipe carries",
                |ring| ring.put(Descriptor::in_band(2), &[16_385 << 32 | 1, 0]),
                ChannelError::Pipe(PipeError::TooLong { length: 16_385 }),
            ),
            (
                "as much as 32 bits say",
                |ring| ring.put(Descriptor::in_band(2), &[0xffff_ffff << 32 | 1, 0]),
                ChannelError::Pipe(PipeError::TooLong { length: u32::MAX }),
            ),
            (
                "a partial packet",
                |ring| ring.put(Descriptor::in_band(2), &[8 << 32 | 2, 0]),
                ChannelError::PipeType(PipePacketType::Partial),
            ),
            (
                "a partial packet consumed beyond its end",
                |ring| ring.put(Descriptor::in_band(2), &[(9 << 16 | 8) << 32 | 2, 0]),
                ChannelError::Pipe(PipeError::Consumed { consumed: 9, length: 8 }),
            ),
            (
                "external data set up",
                |ring| ring.put(Descriptor::in_band(2), &[8 << 32 | 3, 0]),
                ChannelError::PipeType(PipePacketType::SetupGpaDirect),
            ),
            (
                "external data torn down",
                |ring| ring.put(Descriptor::in_band(2), &[8 << 32 | 4, 0]),
                ChannelError::PipeType(PipePacketType::TeardownGpaDirect),
            ),
        ],
        |channel| channel.init_set_flags(ChannelFlags::IS_PIPE).unwrap(),
    );
}

// ---- Anything ---------------------------------------------------------------------------------------

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever words are in the ring and whatever the indices are, processing ends: with packets, or
    /// with the channel stopped; and afterwards it works.
    #[test]
    fn any_ring_is_survived(
        words in prop::collection::vec(prop_oneof![any::<u64>(), 0_u64..16, descriptor()], 1..200),
        write in prop_oneof![any::<u32>(), (0..DATA / 8).prop_map(|n| n * 8)],
        read in prop_oneof![Just(0), any::<u32>(), (0..DATA / 8).prop_map(|n| n * 8)],
        server_side in any::<bool>(),
        is_pipe in any::<bool>(),
    ) {
        let side = if server_side { Side::Server } else { Side::Client };
        let victim = Victim::new(side, Device::on_packet(|_, packet| {
            if let Ok(data) = packet.external_data(ExternalDataFlags::empty()) {
                let mut bytes = [0; 64];
                let _gone = data.read_at(0, &mut bytes);
                let _gone = data.write_at(3, &bytes);
            }
            packet.complete(&[1; 8]);
        }), |channel| {
            if is_pipe {
                channel.init_set_flags(ChannelFlags::IS_PIPE).unwrap();
            }
        });
        let mut peer = victim.open();
        let answers = Arc::new(Answers::default());
        (0..3).for_each(|n| send(&victim.channel, n, &[0; 8], &answers));
        peer.to_channel.put_words(&words, 0);
        peer.to_channel.set_word(Word::WriteIndex, write);
        peer.from_channel.set_word(Word::ReadIndex, read);
        let mut packets = 0;
        for _ in 0..10 {
            packets += victim.channel.process(1000).packets;
        }
        prop_assert!(packets <= DATA / 24, "{packets} packets in a ring of {DATA} bytes");
        victim.close(peer);
        prop_assert_eq!(answers.take().len(), 3, "each packet has ended once");
        victim.ends("any ring");
    }
}

/// Words that look like descriptors.
fn descriptor() -> impl Strategy<Value = u64> {
    (0_u64..16, 0_u64..8, 0_u64..40, 0_u64..3)
        .prop_map(|(kind, offset, length, flags)| kind | offset << 16 | length << 32 | flags << 48)
}

/// A peer that scribbles over everything while the channel works: no panic, no hang, nothing leaked.
#[test]
fn a_peer_that_scribbles_all_the_time_is_survived() {
    let victim = Victim::new(
        Side::Server,
        Device::on_packet(|_, packet| {
            if let Ok(data) = packet.external_data(ExternalDataFlags::empty()) {
                let _gone = data.write_at(0, &[1; 100]);
            }
            let n = packet.payload().len().min(4096);
            let answer = packet.payload()[..n].to_vec();
            packet.complete(&answer);
        }),
        |_| (),
    );
    let over = Arc::new(AtomicBool::new(false));
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut stops = 0;
    for _ in 0..200 {
        let mut peer = victim.open();
        over.store(false, Ordering::SeqCst);
        let scribbling = thread::spawn({
            let over = over.clone();
            move || {
                while !over.load(Ordering::SeqCst) {
                    // xorshift: any numbers will do
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    let n = u16::try_from(state % 4).unwrap();
                    let word = u32::try_from(state >> 32).unwrap();
                    match state >> 8 & 7 {
                        0 => peer.to_channel.put_words(&[state; 4], 32),
                        1 => peer.from_channel.set_word(Word::ReadIndex, word % DATA),
                        2 => peer.to_channel.set_word(Word::PendingSendSize, word),
                        3 => peer
                            .to_channel
                            .put(Descriptor::gpa_direct(3), &[1 << 32, 9, state >> 40]),
                        _ => peer.to_channel.put(Descriptor::in_band(n), &vec![state; n.into()]),
                    }
                }
                (peer, state)
            }
        });
        let answers = Arc::new(Answers::default());
        for n in 0..200 {
            let packet = common::packet(&victim.channel, n, &answers);
            let _refused = packet.send(&[0; 64], None, SendFlags::empty());
            victim.channel.process(64);
            if victim.channel.stop_reason().is_some() {
                stops += 1;
                break;
            }
        }
        over.store(true, Ordering::SeqCst);
        (peer, state) = in_time(move || scribbling.join().unwrap());
        victim.close(peer);
    }
    assert!(stops > 0, "the peer never got through");
    victim.ends("scribbled");
}
