//! Whole connections, byte by byte, under every version.

use kmcl::bus::Offer;
use vmbus_host::{Config, Effect, Interrupt, OfferError, OfferId, OfferParams, Rings};
use vmbus_wire::status::NtStatus;

use crate::bytes::*;
use crate::machine::*;

const PFNS: [u64; 8] = [10, 11, 12, 13, 20, 21, 22, 23];

fn opened(offer: OfferId, interrupt: Interrupt, connection_id: u32) -> Effect {
    let rings = Rings {
        incoming: PFNS[..4].to_vec(),
        outgoing: PFNS[4..].to_vec(),
        interrupt,
        connection_id,
        user_data: [0x5a; 120],
    };
    Effect::Open { offer, rings: Box::new(rings) }
}

fn flag(vp: u32, flag: u16) -> Interrupt {
    Interrupt::EventFlag { vp, sint: 2, flag }
}

/// What every guest does with one disk, and what differs by version.
#[test]
fn a_device_is_found_opened_used_closed_and_left_under_every_version() {
    for version in VERSIONS {
        let row = format!("version {version:#x}");
        let mut machine = Machine::new();
        let disk = machine.offer(1);
        let net = machine.offer(2);
        machine.connect(version);

        machine.ok(&request_offers());
        let offers =
            [offered(TYPE, instance(1), 0, 1), offered(TYPE, instance(2), 0, 2), all_offers()];
        assert_eq!(machine.messages(), offers, "{row}");
        assert_eq!(offers[0].len(), 196);

        // The ring GPADL, then the open. Where the version has no target VP, VP 0 it is.
        machine.create_gpadl(1, 0xe1e10, &PFNS);
        machine.ok(&open(1, 0x99, 0xe1e10, 3, 4));
        let vp = if version >= V2_4 { 3 } else { 0 };
        assert_eq!(machine.effects(), [opened(disk, flag(vp, 1), 0x2001)], "{row}");
        assert_eq!(machine.messages(), Vec::<Vec<u8>>::new(), "{row}");
        machine.open_result(disk, NtStatus::SUCCESS);
        assert_eq!(machine.messages(), [open_result(1, 0x99, SUCCESS)], "{row}");

        machine.ok(&close(1));
        machine.ok(&gpadl_teardown(1, 0xe1e10));
        assert_eq!(machine.effects(), [Effect::Close { offer: disk, tell_device: true }], "{row}");
        machine.closed(disk);
        assert_eq!(machine.messages(), [gpadl_torndown(0xe1e10)], "{row}");

        // Again, without a new offer; then the device goes away.
        machine.open(disk, 1, 0xe1e11);
        machine.revoke(disk);
        assert_eq!(machine.messages(), [rescind(1)], "{row}");
        machine.effects();
        machine.ok(&close(1)); // it has crossed the rescind
        machine.ok(&gpadl_teardown(1, 0xe1e11));
        machine.closed(disk);
        assert_eq!(machine.messages(), [gpadl_torndown(0xe1e11)], "{row}");
        machine.ok(&release(1));
        assert!(machine.host.channel(disk).is_none(), "{row}");

        // Leaving waits for the device that is still at work.
        machine.open(net, 2, 0xe1e12);
        machine.ok(&unload());
        assert_eq!(machine.effects(), [Effect::Close { offer: net, tell_device: true }], "{row}");
        assert_eq!(machine.messages(), Vec::<Vec<u8>>::new(), "{row}");
        machine.closed(net);
        let goodbye = if version >= V1_1 { vec![unload_complete()] } else { vec![] };
        assert_eq!(machine.messages(), goodbye, "{row}");
        assert!(machine.post(&request_offers()).is_err(), "{row}");
        machine.wind_down();
    }
}

#[test]
fn no_interrupts_means_none() {
    let (mut machine, offers) = Machine::connected(V4_0, 1);
    machine.create_gpadl(1, 5, &PFNS);
    machine.ok(&open(1, 1, 5, u32::MAX, 4));
    assert_eq!(machine.effects(), [opened(offers[0], Interrupt::None, 0x2001)]);
}

#[test]
fn old_guests_are_signalled_through_the_page_they_name() {
    for version in [V0_13, V1_1, V2_4, V5_3] {
        let mut machine = Machine::new();
        let disk = machine.offer(1);
        let page = if version >= V5_0 { target(2, 0, 0) } else { 0x3000 };
        machine.ok(&contact(version, 0, page).done());
        machine.ok(&request_offers());
        machine.messages();
        machine.create_gpadl(1, 5, &PFNS);
        machine.ok(&open(1, 1, 5, 0, 4));
        let interrupt = if version < V2_4 {
            Interrupt::SharedPage { gpa: 0x3000, bit: 1, vp: 0, sint: 2 }
        } else {
            flag(0, 1)
        };
        assert_eq!(machine.effects(), [opened(disk, interrupt, 0x2001)], "{version:#x}");
    }
}

#[test]
fn a_guest_that_negotiated_it_chooses_its_signals() {
    let (mut machine, offers) = Machine::connected_v6(2);
    machine.create_gpadl(1, 5, &PFNS);
    machine.ok(&open_v2(open(1, 1, 5, 2, 4), 0x00ab_cdef, 1234));
    assert_eq!(machine.effects(), [opened(offers[0], flag(2, 1234), 0x00ab_cdef)]);
    machine.open_result(offers[0], NtStatus::SUCCESS);
    machine.messages();
    // The flag stays when the VP changes.
    machine.ok(&modify(1, 3));
    assert!(matches!(
        machine.effects()[..],
        [Effect::Retarget { interrupt, .. }] if interrupt == flag(3, 1234)
    ));

    // Without the feature the long form is not there, and the defaults hold.
    let mut machine = Machine::new();
    let disk = machine.offer(1);
    machine.ok(&contact(V6_0, 0, target(2, 0, 0x4)).done());
    machine.ok(&request_offers());
    machine.messages();
    machine.create_gpadl(1, 5, &PFNS);
    machine.ok(&open_v2(open(1, 1, 5, 2, 4), 0x00ab_cdef, 1234));
    assert_eq!(machine.effects(), [opened(disk, flag(2, 1), 0x2001)]);
}

#[test]
fn offers_say_what_the_device_is() {
    let mut machine = Machine::new();
    let mut offer = Offer::new(TYPE, instance(9));
    offer.enumerate_device_interface = true;
    offer.pipe = true;
    offer.tlnpi_provider = true;
    offer.mmio_megabytes = 8;
    offer.mmio_megabytes_optional = 64;
    offer.user_defined = std::array::from_fn(|index| u8::try_from(index).unwrap());
    machine.host.offer(OfferParams::try_from(&offer).unwrap()).unwrap();
    machine.connect(V4_0);
    machine.ok(&request_offers());
    let expected = message(1).guid(TYPE).guid(instance(9)).fill(0, 16).u16(0x2011).u16(8);
    let expected = (0..120).fold(expected, |bytes, index| bytes.u8(index));
    let expected = expected.u16(0).u16(64).u32(1).u8(0xff).u8(0).u16(1).u32(0x2001).done();
    assert_eq!(machine.messages(), [expected, all_offers()]);
}

#[test]
fn offers_this_host_cannot_make_are_refused() {
    let plain = Offer::new(TYPE, instance(1));
    let mut other_level = plain.clone();
    other_level.target_vtl = 2;
    let mut loopback = plain.clone();
    loopback.loopback = true;
    assert_eq!(OfferParams::try_from(&other_level), Err(OfferError::TargetVtl { vtl: 2 }));
    assert_eq!(OfferParams::try_from(&loopback), Err(OfferError::Loopback));

    let mut machine = Machine::new();
    let first = machine.offer(1);
    let key = plain_offer(1).key;
    assert_eq!(machine.host.offer(plain_offer(1)), Err(OfferError::Clash { key }));
    machine.revoke(first);
    machine.offer(1);
}

#[test]
fn what_comes_and_goes_while_the_guest_runs_is_told_at_once() {
    let mut machine = Machine::new();
    machine.connect(V5_3);
    let early = machine.offer(1);
    assert_eq!(machine.messages(), Vec::<Vec<u8>>::new(), "the guest has not asked");
    machine.ok(&request_offers());
    assert_eq!(machine.messages(), [offered(TYPE, instance(1), 0, 1), all_offers()]);
    let hot = machine.offer(2);
    assert_eq!(machine.messages(), [offered(TYPE, instance(2), 0, 2)]);
    machine.revoke(hot);
    machine.revoke(early);
    machine.revoke(early); // says nothing new
    assert_eq!(machine.messages(), [rescind(2), rescind(1)]);
    machine.all_ok(&[release(2), release(1)]);
    assert_eq!(machine.host.usage().channels, 0);
}

#[test]
fn a_device_that_comes_back_waits_until_the_guest_has_let_the_old_one_go() {
    let (mut machine, offers) = Machine::connected(V5_3, 1);
    machine.revoke(offers[0]);
    let again = machine.offer(1);
    assert_eq!(machine.messages(), [rescind(1)], "a guest discards an offer whose name it knows");
    machine.ok(&release(1));
    assert_eq!(machine.messages(), [offered(TYPE, instance(1), 0, 2)]);
    assert!(machine.host.channel(again).is_some());

    // The same, with a device that is slow to let go of the old channel.
    machine.open(again, 2, 7);
    machine.revoke(again);
    machine.offer(1);
    assert_eq!(machine.messages(), [rescind(2)]);
    machine.ok(&release(2));
    assert_eq!(machine.messages(), [offered(TYPE, instance(1), 0, 3)]);
    assert!(machine.host.channel(again).is_some(), "the device holds it");
    machine.closed(again);
    assert!(machine.host.channel(again).is_none());
}

#[test]
fn a_channel_id_comes_again_only_when_both_sides_have_let_go() {
    let limit = Config::default();
    let mut machine = Machine::with(limit);
    let offers: Vec<OfferId> =
        (1..=2047).map(|number| machine.host.offer(plain_offer(number)).unwrap()).collect();
    machine.connect(V5_3);
    machine.ok(&request_offers());
    assert_eq!(machine.messages().len(), 2048);
    let full = Err(OfferError::TooManyChannels { count: 2047 });
    assert_eq!(machine.host.offer(plain_offer(3000)), full);

    machine.open(offers[99], 100, 7);
    machine.revoke(offers[99]);
    assert_eq!(machine.messages(), [rescind(100)]);
    assert_eq!(machine.host.offer(plain_offer(3000)), full, "neither has let go");
    machine.ok(&release(100));
    assert_eq!(machine.host.offer(plain_offer(3000)), full, "the device has not");
    machine.closed(offers[99]);
    machine.offer(3000);
    assert_eq!(machine.messages(), [offered(TYPE, instance(3000), 0, 100)]);
}

#[test]
fn subchannels_are_told_after_primaries_and_to_guests_that_know_them() {
    for version in VERSIONS {
        let mut machine = Machine::new();
        let mut sub = plain_offer(1);
        sub.key.subchannel_index = 3;
        machine.host.offer(sub).unwrap();
        machine.offer(1);
        machine.connect(version);
        machine.ok(&request_offers());
        let mut expected = vec![offered(TYPE, instance(1), 0, 2)];
        if version >= V2_4 {
            expected.push(offered(TYPE, instance(1), 3, 1));
        }
        expected.push(all_offers());
        assert_eq!(machine.messages(), expected, "{version:#x}");
        // What the guest was not told of is not there for it.
        let knows = machine.post(&whole_pages(1, 5, &PFNS)[0]).is_ok();
        assert_eq!(knows, version >= V2_4, "{version:#x}");
    }
}

#[test]
fn gpadls_of_any_shape_arrive_in_any_interleaving() {
    let (mut machine, offers) = Machine::connected(V5_3, 2);
    // 8190 pages: the longest there is; its words fill the header, 291 bodies and 16 words of one.
    let long: Vec<u64> = (0..8190).map(|page| page % 4096).collect();
    let long = whole_pages(1, 0xa, &long);
    assert_eq!(long.len(), 1 + 292);
    // Three ranges: inside a page, over a boundary, and pages far apart.
    let words = [100 | 50 << 32, 7, 4096 | 1 << 32, 8, 9, 8192, 0, (1 << 18) + 4095];
    let ranges = gpadl_messages(2, 0xb, 3, &words);
    // No words in the header at all, and 240 bytes in every message, as firmware sends them.
    let padded = [
        gpadl_header(2, 0xc, 8 * 30, 1, &[]),
        gpadl_body(0xc, &[29 * 4096]),
        gpadl_body(0xc, &[5; 28]),
        gpadl_body(0xc, &[6]),
    ];
    let mut padded = padded.to_vec();
    padded.iter_mut().skip(3).for_each(|message| message.resize(240, 0xee));

    machine.all_ok(&long[..100]);
    machine.ok(&padded[0]);
    machine.all_ok(&long[100..200]);
    machine.all_ok(&ranges);
    machine.all_ok(&padded[1..2]);
    assert_eq!(machine.host.usage().incomplete_gpadls, 2);
    machine.all_ok(&long[200..]);
    machine.all_ok(&padded[2..]);
    assert_eq!(
        machine.messages(),
        [gpadl_created(2, 0xb, 0), gpadl_created(1, 0xa, 0), gpadl_created(2, 0xc, 0)]
    );
    let usage = machine.host.usage();
    assert_eq!((usage.gpadls, usage.gpadl_pages), (3, 8190 + 5 + 29));

    let pages = machine.host.gpadl(offers[1], 0xb).unwrap();
    let found: Vec<(u32, u32, &[u64])> = pages
        .ranges
        .iter()
        .map(|range| (range.byte_count, range.byte_offset, &range.pfns[..]))
        .collect();
    let expected: [(u32, u32, &[u64]); 3] =
        [(100, 50, &[7]), (4096, 1, &[8, 9]), (8192, 0, &[0, (1 << 18) + 4095])];
    assert_eq!(found, expected);
    let last = machine.host.gpadl(offers[1], 0xc).unwrap().ranges[0].pfns[28];
    assert_eq!(last, 6, "the padding is no word");
    machine.wind_down();
}

#[test]
fn the_same_gpadl_id_may_live_on_two_channels() {
    let (mut machine, offers) = Machine::connected(V5_3, 2);
    machine.create_gpadl(1, 5, &[1, 2]);
    machine.create_gpadl(2, 5, &[3, 4, 6]);
    assert_eq!(machine.host.gpadl(offers[0], 5).unwrap().ranges[0].pfns, [1, 2]);
    machine.ok(&gpadl_teardown(1, 5));
    assert_eq!(machine.messages(), [gpadl_torndown(5)]);
    assert_eq!(machine.host.gpadl(offers[1], 5).unwrap().ranges[0].pfns, [3, 4, 6]);
    assert!(machine.host.gpadl(offers[0], 5).is_err());
}
