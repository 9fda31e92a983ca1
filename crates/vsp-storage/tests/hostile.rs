//! A guest that lies in every field: it is refused, nothing is left behind, and its next honest
//! request works.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod common;

use common::{Guest, Host, LUN0, ram, until};
use kmcl::NtStatus;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vmbus_wire::ranges::GpaRange;
use vstor_wire::packet::{Operation, VstorPacket};
use vstor_wire::protocol::ProtocolVersion;
use vstor_wire::scsi::cdb::Command;
use vstor_wire::srb::{DataDirection, ScsiRequest, SrbStatus};

const DISK_BYTES: u64 = 1 << 20;

fn start() -> (Host, Guest) {
    let host = Host::with_disk(2, ram(DISK_BYTES));
    let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
    (host, guest)
}

fn read_srb(bytes: u32) -> ScsiRequest {
    let cdb = Command::read(0, bytes / 512).encode().unwrap();
    ScsiRequest::new(LUN0, &cdb, DataDirection::In, bytes)
}

/// The guest still works, and the host holds nothing of what it refused.
fn check(host: &Host, guest: &Guest, what: &str) {
    assert!(guest.can_read(LUN0), "{what}: the disk cannot be read any more");
    assert_eq!(host.controller().in_flight(), (0, 0), "{what}");
    // The guest may have its answer before the host has taken the packet off its books.
    until(what, || host.channel().incoming_outstanding() == 0);
    assert_eq!(host.channel().stop_reason(), None, "{what}");
}

#[test]
fn a_request_that_lies_in_one_field_is_refused_or_harmless() {
    let (host, guest) = start();
    type Lie = fn(&mut ScsiRequest);
    #[rustfmt::skip]
    let rows: [(&str, Lie, SrbStatus); 19] = [
        ("length 0", |srb| srb.length = 0.into(), SrbStatus::SUCCESS),
        ("length 65535", |srb| srb.length = 0xffff.into(), SrbStatus::SUCCESS),
        ("finished already", |srb| srb.srb_status = SrbStatus(0xff), SrbStatus::SUCCESS),
        ("port", |srb| srb.port = 0xff, SrbStatus::SUCCESS),
        ("path", |srb| srb.path_id = 0xff, SrbStatus::INVALID_LUN),
        ("target", |srb| srb.target_id = 0xff, SrbStatus::INVALID_LUN),
        ("LUN", |srb| srb.lun = 0xff, SrbStatus::INVALID_LUN),
        ("CDB of 0", |srb| srb.cdb_length = 0, SrbStatus::INVALID_REQUEST),
        ("CDB of 9", |srb| srb.cdb_length = 9, SrbStatus::ERROR),
        ("CDB of 17", |srb| srb.cdb_length = 17, SrbStatus::INVALID_REQUEST),
        ("CDB of 255", |srb| srb.cdb_length = 0xff, SrbStatus::INVALID_REQUEST),
        ("sense of 255", |srb| srb.sense_info_length = 0xff, SrbStatus::SUCCESS),
        ("direction 3", |srb| srb.data_in = 3, SrbStatus::INVALID_REQUEST),
        ("direction 255", |srb| srb.data_in = 0xff, SrbStatus::INVALID_REQUEST),
        ("the wrong direction", |srb| srb.data_in = 0, SrbStatus::INVALID_REQUEST),
        ("transfers nothing", |srb| srb.data_transfer_length = 0.into(), SrbStatus::INVALID_REQUEST),
        ("transfers one less", |srb| srb.data_transfer_length = 511.into(), SrbStatus::INVALID_REQUEST),
        ("transfers 4 GiB", |srb| srb.data_transfer_length = u32::MAX.into(), SrbStatus::SUCCESS),
        ("flags, tags and times", |srb| {
            srb.srb_flags = u32::MAX.into();
            srb.queue_tag = 0xff;
            srb.queue_action = 0xff;
            srb.timeout_s = u32::MAX.into();
            srb.queue_sort_key = u32::MAX.into();
            srb.reserved = 0xff;
            srb.reserved2 = 0xffff.into();
        }, SrbStatus::SUCCESS),
    ];
    for (what, lie, expected) in rows {
        let mut srb = read_srb(512);
        lie(&mut srb);
        let answer = guest.execute(srb, 512);
        assert_eq!(answer.srb_status.code(), expected, "{what}");
        let moved = if expected == SrbStatus::SUCCESS { 512 } else { 0 };
        assert_eq!(answer.data_transfer_length.get(), moved, "{what}");
        assert!(answer.sense_info_length <= 20, "{what}");
        check(&host, &guest, what);
    }
}

#[test]
fn sense_data_is_cut_to_what_the_guest_takes() {
    let (_host, guest) = start();
    for room in [0u8, 1, 8, 14, 18, 20, 255] {
        let mut srb = read_srb(512);
        srb.cdb_or_sense[2..6].copy_from_slice(&[0xff; 4]); // beyond the end
        srb.sense_info_length = room;
        let answer = guest.execute(srb, 512);
        assert_eq!(answer.sense_info_length, room.min(18), "{room}");
        let expected = if room == 0 { 0x04 } else { 0x84 };
        assert_eq!(answer.srb_status.0, expected, "{room}");
    }
}

#[test]
fn external_data_that_lies_is_refused() {
    let (host, guest) = start();
    let pfns = guest.pfns();
    let beyond = host.bus.memory().total_bytes() / 4096;
    let nonsense = [u64::MAX >> 13, beyond, beyond - 1];
    let many: Vec<GpaRange<'_>> = (0..512)
        .map(|i| GpaRange { byte_count: 1, byte_offset: i % 4096, pfns: &pfns[..1] })
        .collect();
    let long = [GpaRange { byte_count: 1 << 20, byte_offset: 0, pfns: &pfns }];
    let rows: [(&str, &[GpaRange<'_>], SrbStatus); 8] = [
        (
            "outside RAM",
            &[GpaRange { byte_count: 512, byte_offset: 0, pfns: &nonsense[..1] }],
            SrbStatus::INVALID_REQUEST,
        ),
        (
            "just behind RAM",
            &[GpaRange { byte_count: 512, byte_offset: 0, pfns: &nonsense[1..2] }],
            SrbStatus::INVALID_REQUEST,
        ),
        (
            "across the end of RAM",
            &[GpaRange { byte_count: 4096, byte_offset: 4000, pfns: &[nonsense[2], nonsense[1]] }],
            SrbStatus::INVALID_REQUEST,
        ),
        (
            "one byte short",
            &[GpaRange { byte_count: 511, byte_offset: 0, pfns: &pfns[..1] }],
            SrbStatus::INVALID_REQUEST,
        ),
        ("512 ranges of one byte", &many, SrbStatus::INVALID_REQUEST),
        ("a mebibyte", &long, SrbStatus::INVALID_REQUEST),
        (
            "in two pieces, unaligned",
            &[
                GpaRange { byte_count: 13, byte_offset: 4090, pfns: &pfns[..2] },
                GpaRange { byte_count: 4000, byte_offset: 1, pfns: &pfns[5..6] },
            ],
            SrbStatus::SUCCESS,
        ),
        (
            "the same page twice",
            &[
                GpaRange { byte_count: 512, byte_offset: 0, pfns: &pfns[..1] },
                GpaRange { byte_count: 512, byte_offset: 0, pfns: &pfns[..1] },
            ],
            SrbStatus::SUCCESS,
        ),
    ];
    for (what, ranges, expected) in rows {
        let mut srb = read_srb(512);
        srb.data_transfer_length = u32::MAX.into();
        let packet = VstorPacket::request(Operation::EXECUTE_SRB).with_body(&srb);
        let answer: ScsiRequest = guest.call_with(&packet, Some(ranges)).body();
        assert_eq!(answer.srb_status.code(), expected, "{what}");
        check(&host, &guest, what);
    }
}

#[test]
fn any_srb_is_answered_and_nothing_outside_is_touched() {
    let (host, guest) = start();
    let outside = guest.channel.allocate_pages(1).unwrap();
    outside.slice().unwrap().fill(0x5a);
    let strategy =
        (proptest::collection::vec(any::<u8>(), 52), 0u32..0x2000, 0u32..4096, any::<bool>());
    let mut runner = TestRunner::new(Config { cases: 512, ..Config::default() });
    runner
        .run(&strategy, |(body, bytes, offset, near)| {
            let mut packet = VstorPacket::request(Operation::EXECUTE_SRB);
            packet.body.copy_from_slice(&body);
            if near {
                // Most random requests are for LUNs that are not there.
                packet.body[5..8].fill(0);
                packet.body[8] = packet.body[8] % 16 + 1;
                packet.body[10] %= 3;
            }
            let pfns = guest.pfns();
            let pages = (offset + bytes).div_ceil(4096) as usize;
            let range = [GpaRange { byte_count: bytes, byte_offset: offset, pfns: &pfns[..pages] }];
            let answer = guest.call_with(&packet, (bytes > 0).then_some(&range[..]));
            prop_assert_eq!(answer.status(), NtStatus::SUCCESS);
            let srb: ScsiRequest = answer.body();
            prop_assert!(srb.data_transfer_length.get() <= bytes.max(1 << 20));
            prop_assert!(srb.srb_status.code() != SrbStatus::PENDING);
            Ok(())
        })
        .unwrap();
    let mut page = [0; 4096];
    outside.slice().unwrap().read_at(0, &mut page).unwrap();
    assert_eq!(page, [0x5a; 4096]);
    check(&host, &guest, "afterwards");
}

#[test]
fn any_packet_is_answered_and_the_controller_goes_on() {
    let (host, guest) = start();
    let strategy = (proptest::collection::vec(any::<u8>(), 64), 0u32..20, any::<bool>());
    let mut runner = TestRunner::new(Config { cases: 512, ..Config::default() });
    runner
        .run(&strategy, |(bytes, operation, known)| {
            let (mut packet, _) = VstorPacket::parse(&bytes).unwrap();
            if known {
                packet.operation = Operation::from_raw(operation);
            }
            guest.call(&packet);
            Ok(())
        })
        .unwrap();
    // Wherever that has led to, the initialisation can be begun again, once it is at an end.
    let begin = VstorPacket::request(Operation::BEGIN_INITIALIZATION);
    if guest.call(&begin).status() != NtStatus::SUCCESS {
        drop(guest);
        let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
        check(&host, &guest, "reopened");
    }
}
