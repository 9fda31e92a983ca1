//! Moments at which guest and devices cross each other.

use vmbus_host::{Connection, Effect, HvsockRequest, Interrupt, OfferId, OpenState, SlotId, Usage};
use vmbus_wire::status::NtStatus;

use crate::bytes::*;
use crate::machine::*;

const RING: u32 = 5;
const PAGES: [u64; 8] = [10, 11, 12, 13, 20, 21, 22, 23];
const OTHER_PAGES: [u64; 6] = [30, 31, 32, 33, 34, 35];
const NONE: [Vec<u8>; 0] = [];
/// Where a crashed guest listens.
const DUMP: SlotId = SlotId { vp: 3, sint: 7 };

fn told(offer: OfferId) -> [Effect; 1] {
    [Effect::Close { offer, tell_device: true }]
}

#[test]
fn a_teardown_waits_for_the_device_that_uses_the_pages() {
    let (mut machine, offers) = Machine::connected(V5_3, 2);
    machine.open(offers[0], 1, RING);
    for gpadl in [6, 7, 8] {
        machine.create_gpadl(1, gpadl, &[1, 2]);
    }
    machine.host.set_gpadl_in_use(offers[0], 6, true);
    machine.host.set_gpadl_in_use(offers[0], 7, true);
    machine.host.set_gpadl_in_use(offers[0], 99, true); // there is none
    machine.all_ok(&[gpadl_teardown(1, 6), gpadl_teardown(1, 7), gpadl_teardown(1, 8)]);
    assert_eq!(machine.messages(), [gpadl_torndown(8)], "nobody uses 8");
    assert!(machine.host.gpadl(offers[0], 6).is_err(), "no new use of what is going");
    machine.host.set_gpadl_in_use(offers[0], 6, true); // too late, and no second use
    machine.host.set_gpadl_in_use(offers[0], 6, false);
    machine.check();
    assert_eq!(machine.messages(), [gpadl_torndown(6)]);

    // The last use ends with the channel, at the latest.
    machine.ok(&close(1));
    machine.host.set_gpadl_in_use(offers[0], RING, false);
    machine.ok(&gpadl_teardown(1, RING));
    machine.host.set_gpadl_in_use(offers[0], RING, false); // the ring is not for the device to free
    assert_eq!(machine.messages(), NONE);
    machine.closed(offers[0]);
    assert_eq!(machine.messages(), [gpadl_torndown(5), gpadl_torndown(7)]);

    // A device that holds no channel uses nothing.
    machine.create_gpadl(2, 6, &[1]);
    machine.host.set_gpadl_in_use(offers[1], 6, true);
    machine.ok(&gpadl_teardown(2, 6));
    assert_eq!(machine.messages(), [gpadl_torndown(6)]);
}

#[test]
fn a_rescind_answers_what_the_guest_waits_for() {
    let (mut machine, offers) = Machine::connected(V5_3, 2);
    // A GPADL half received, and an open unanswered.
    machine.create_gpadl(1, RING, &PAGES);
    machine.ok(&open(1, 0x77, RING, 0, 4));
    machine.ok(&gpadl_header(1, 6, 40, 1, &[4 * 4096]));
    machine.effects();
    machine.revoke(offers[0]);
    assert_eq!(
        machine.messages(),
        [open_result(1, 0x77, DEVICE_REMOVED), gpadl_created(1, 6, DEVICE_REMOVED), rescind(1),]
    );
    assert_eq!(machine.effects(), [Effect::Close { offer: offers[0], tell_device: false }]);
    assert!(machine.post(&gpadl_body(6, &[1, 2, 3, 4])).is_err(), "it is over");
    // What the guest sends before it reads the rescind.
    machine.ok(&gpadl_header(1, 8, 16, 1, &[4096, 1]));
    machine.ok(&open(1, 0x78, RING, 0, 4));
    machine.ok(&close(1));
    machine.ok(&gpadl_teardown(1, RING));
    assert_eq!(machine.messages(), [gpadl_created(1, 8, DEVICE_REMOVED)]);
    // The device refuses the open after all, and so never had the ring.
    machine.open_result(offers[0], NtStatus::UNSUCCESSFUL);
    assert_eq!(machine.messages(), [gpadl_torndown(RING)]);
    machine.ok(&release(1));
    assert_eq!(machine.host.usage(), Usage { channels: 1, ..Usage::default() });

    // A change of VP unanswered.
    machine.open(offers[1], 2, RING);
    machine.ok(&modify(2, 1));
    machine.revoke(offers[1]);
    assert_eq!(machine.messages(), [modified(2, DEVICE_REMOVED), rescind(2)]);
}

#[test]
fn a_guest_may_release_a_channel_before_its_device_has_let_go() {
    let (mut machine, offers) = Machine::connected(V5_3, 1);
    machine.open(offers[0], 1, RING);
    machine.revoke(offers[0]);
    machine.ok(&release(1));
    machine.ok(&gpadl_teardown(1, RING));
    assert_eq!(machine.messages(), [rescind(1)], "no TORNDOWN while the device has the ring");
    machine.closed(offers[0]);
    assert_eq!(machine.messages(), [gpadl_torndown(RING)]);
    assert_eq!(machine.host.usage(), Usage::default());
}

#[test]
fn a_channel_may_be_opened_again_before_its_device_has_let_go() {
    let (mut machine, offers) = Machine::connected(V5_3, 1);
    machine.open(offers[0], 1, RING);
    machine.ok(&close(1));
    machine.ok(&gpadl_teardown(1, RING));
    machine.create_gpadl(1, 6, &OTHER_PAGES);
    machine.ok(&open(1, 0x78, 6, 0, 3));
    assert_eq!(machine.effects(), told(offers[0]), "one open at a time");
    machine.closed(offers[0]);
    assert_eq!(machine.messages(), [gpadl_torndown(RING)]);
    let effects = machine.effects();
    let [Effect::Open { rings, .. }] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!((&rings.incoming[..], &rings.outgoing[..]), (&[30, 31, 32][..], &[33, 34, 35][..]));
    machine.open_result(offers[0], NtStatus::SUCCESS);
    assert_eq!(machine.messages(), [open_result(1, 0x78, SUCCESS)]);

    // In the same ring, which the guest has kept.
    machine.ok(&close(1));
    machine.ok(&open(1, 0x79, 6, 0, 3));
    machine.closed(offers[0]);
    machine.open_result(offers[0], NtStatus::UNSUCCESSFUL);
    assert_eq!(machine.messages(), [open_result(1, 0x79, NtStatus::UNSUCCESSFUL.0)]);
    machine.ok(&open(1, 0x7a, 6, 0, 3));
    machine.open_result(offers[0], NtStatus::SUCCESS);
    assert_eq!(machine.messages(), [open_result(1, 0x7a, SUCCESS)]);

    // In another ring, which it takes back meanwhile: nobody uses it, and the open fails.
    machine.ok(&close(1));
    machine.create_gpadl(1, 7, &PAGES);
    machine.ok(&open(1, 0x7c, 7, 0, 3));
    machine.ok(&gpadl_teardown(1, 7));
    assert_eq!(machine.messages(), [gpadl_torndown(7)]);
    machine.closed(offers[0]);
    assert_eq!(machine.messages(), [open_result(1, 0x7c, NtStatus::UNSUCCESSFUL.0)]);
    machine.ok(&open(1, 0x7d, 6, 0, 3));
    machine.open_result(offers[0], NtStatus::SUCCESS);
    assert_eq!(machine.messages(), [open_result(1, 0x7d, SUCCESS)]);

    // In the same ring, which it takes back meanwhile: the device still has it.
    machine.ok(&close(1));
    machine.ok(&open(1, 0x7b, 6, 0, 3));
    machine.ok(&gpadl_teardown(1, 6));
    machine.effects();
    machine.closed(offers[0]);
    assert_eq!(
        machine.messages(),
        [gpadl_torndown(6), open_result(1, 0x7b, NtStatus::UNSUCCESSFUL.0)]
    );
    assert_eq!(machine.effects(), []);
}

#[test]
fn a_guest_that_goes_while_its_channel_is_opening() {
    for accepts in [true, false] {
        let (mut machine, offers) = Machine::connected(V5_3, 1);
        machine.create_gpadl(1, RING, &PAGES);
        machine.ok(&open(1, 0x77, RING, 0, 4));
        machine.effects();
        machine.ok(&plain_contact(V5_2, 0));
        assert_eq!(machine.effects(), told(offers[0]));
        let status = if accepts { NtStatus::SUCCESS } else { NtStatus::UNSUCCESSFUL };
        machine.open_result(offers[0], status);
        if accepts {
            assert_eq!(machine.messages(), NONE, "it has accepted, and must let go");
            machine.open_result(offers[0], NtStatus::UNSUCCESSFUL); // that it has said before
            assert_eq!(machine.messages(), NONE);
            machine.closed(offers[0]);
        }
        assert_eq!(machine.messages(), [accepted(V5_2)], "accepts: {accepts}");
    }
}

#[test]
fn the_last_contact_counts_and_waits_for_every_device() {
    let (mut machine, offers) = Machine::connected(V5_3, 3);
    machine.open(offers[0], 1, RING);
    machine.open(offers[2], 3, RING);
    machine.ok(&plain_contact(V5_2, 1));
    assert_eq!(machine.effects(), [told(offers[0]), told(offers[2])].concat());
    machine.ok(&plain_contact(0x9999_0000, 2)); // a version that is not
    machine.ok(&plain_contact(V4_0, 3));
    machine.closed(offers[2]);
    assert_eq!(machine.slot_messages(), []);
    assert!(matches!(machine.host.connection(), Connection::Disconnecting { .. }));
    machine.closed(offers[0]);
    let slot = SlotId { vp: 3, sint: 2 };
    assert_eq!(machine.slot_messages(), [(slot, accepted(V4_0))]);
    assert_eq!(machine.effects(), []);
    // The same offers are there for the new guest, by the same ids.
    machine.ok(&request_offers());
    let messages = machine.slot_messages();
    let ids: Vec<u32> = messages[..3].iter().map(|(_, message)| u32_at(message, 184)).collect();
    assert_eq!(ids, [1, 2, 3]);
}

#[test]
fn what_ends_a_connection_that_is_ending() {
    let ending = || {
        let (mut machine, offers) = Machine::connected(V5_3, 1);
        machine.open(offers[0], 1, RING);
        machine.ok(&plain_contact(V5_2, 1));
        (machine, offers[0])
    };
    // An UNLOAD instead of the contact: the second kernel has changed its mind.
    let (mut machine, offer) = ending();
    machine.ok(&unload());
    machine.closed(offer);
    let slot = SlotId { vp: 1, sint: 2 };
    assert_eq!(machine.slot_messages(), [(slot, unload_complete())]);
    // A contact instead of the UNLOAD's end.
    let (mut machine, offers) = Machine::connected(V5_3, 1);
    machine.open(offers[0], 1, RING);
    machine.ok(&unload());
    machine.ok(&plain_contact(V5_2, 0));
    machine.closed(offers[0]);
    assert_eq!(machine.messages(), [accepted(V5_2)]);
    // A reset: nobody is there to be answered.
    let (mut machine, offer) = ending();
    machine.reset();
    machine.closed(offer);
    assert_eq!(machine.slot_messages(), []);
    assert_eq!(machine.host.connection(), &Connection::Disconnected);
    // An UNLOAD of a guest that was reset, before its devices have noticed.
    let (mut machine, offer) = ending();
    machine.reset();
    machine.ok(&unload());
    machine.closed(offer);
    assert_eq!(machine.messages(), [unload_complete()]);
    // A device that is unplugged instead of letting go.
    let (mut machine, offer) = ending();
    machine.revoke(offer);
    machine.closed(offer);
    assert_eq!(machine.slot_messages(), [(slot, accepted(V5_2))]);
    assert_eq!(machine.host.usage(), Usage::default());
}

#[test]
fn an_unload_without_a_connection_is_answered() {
    let mut machine = Machine::new();
    machine.ok(&unload());
    assert_eq!(machine.messages(), [unload_complete()]);
    // 0.13 has no such message.
    let (mut machine, _) = Machine::connected(V0_13, 1);
    machine.ok(&unload());
    assert_eq!(machine.messages(), NONE);
}

fn target_vp(machine: &Machine, offer: OfferId) -> Option<u32> {
    match &machine.host.channel(offer).unwrap().open {
        OpenState::Open(open) => open.target_vp,
        other => panic!("{other:?}"),
    }
}

#[test]
fn interrupts_move_before_the_guest_is_told_so() {
    for (version, is_answered) in [(V4_1, false), (V5_2, false), (V5_3, true)] {
        let (mut machine, offers) = Machine::connected(version, 1);
        machine.open(offers[0], 1, RING);
        let mut moves = Vec::new();
        machine.ok(&modify(1, 2));
        if !is_answered {
            machine.ok(&modify(1, 3)); // supersedes the first
        }
        for effect in machine.effects() {
            let Effect::Retarget { offer, interrupt, serial } = effect else {
                panic!("{effect:?}")
            };
            assert_eq!(offer, offers[0]);
            moves.push((interrupt, serial));
        }
        let (interrupt, serial) = moves.pop().unwrap();
        let vp = if is_answered { 2 } else { 3 };
        assert_eq!(interrupt, Interrupt::EventFlag { vp, sint: 2, flag: 1 });
        assert_eq!(machine.messages(), NONE, "{version:#x}");

        for (_, stale) in moves {
            machine.host.retargeted(offers[0], stale, NtStatus::SUCCESS);
        }
        assert_eq!(target_vp(&machine, offers[0]), Some(0), "{version:#x}");
        machine.host.retargeted(offers[0], serial, NtStatus::SUCCESS);
        assert_eq!(target_vp(&machine, offers[0]), Some(vp), "{version:#x}");
        let answers = if is_answered { vec![modified(1, SUCCESS)] } else { vec![] };
        assert_eq!(machine.messages(), answers, "{version:#x}");
        machine.host.retargeted(offers[0], serial, NtStatus::SUCCESS); // once
        assert_eq!(machine.messages(), NONE, "{version:#x}");
    }
}

#[test]
fn a_change_of_vp_is_answered_whatever_becomes_of_the_channel() {
    let (mut machine, offers) = Machine::connected(V5_3, 1);
    machine.open(offers[0], 1, RING);
    machine.ok(&modify(1, 2));
    let effects = machine.effects();
    let [Effect::Retarget { serial, .. }] = effects[..] else { panic!("{effects:?}") };
    machine.ok(&close(1));
    machine.host.retargeted(offers[0], serial, NtStatus::CANCELLED);
    assert_eq!(machine.messages(), [modified(1, NtStatus::CANCELLED.0)]);

    // One that belongs to a former connection is not the new one's.
    let (mut machine, offers) = Machine::connected(V5_3, 1);
    machine.open(offers[0], 1, RING);
    machine.ok(&modify(1, 2));
    let effects = machine.effects();
    let [Effect::Retarget { serial: stale, .. }] = effects[..] else { panic!("{effects:?}") };
    machine.ok(&unload());
    machine.closed(offers[0]);
    machine.messages();
    machine.connect(V5_3);
    machine.ok(&request_offers());
    machine.messages();
    machine.effects();
    machine.open(offers[0], 1, RING);
    machine.ok(&modify(1, 2));
    machine.host.retargeted(offers[0], stale, NtStatus::SUCCESS);
    assert_eq!(machine.messages(), NONE);
}

#[test]
fn a_crashed_guest_writes_its_dump() {
    for when in ["before the unload", "after it"] {
        let (mut machine, offers) = Machine::connected(V5_3, 2);
        machine.open(offers[1], 2, 9);
        machine.create_gpadl(1, RING, &PAGES);
        machine.ok(&open_reserved(1, 3, 7, RING, 4));
        let effects = machine.effects();
        let [Effect::Open { rings, .. }] = &effects[..] else { panic!("{effects:?}") };
        assert_eq!((rings.interrupt, rings.connection_id), (Interrupt::None, 0x2001));
        machine.open_result(offers[0], NtStatus::SUCCESS);
        assert_eq!(machine.slot_messages(), [(DUMP, open_result(1, 0, SUCCESS))]);
        if when == "after it" {
            machine.ok(&unload());
            assert_eq!(machine.effects(), told(offers[1]), "the other channel only");
            machine.closed(offers[1]);
            assert_eq!(machine.messages(), [unload_complete()]);
            assert_eq!(machine.host.usage().gpadls, 1, "the ring is in use");
        }
        machine.ok(&close_reserved(1, 3, 7));
        assert_eq!(machine.effects(), told(offers[0]), "{when}");
        assert_eq!(machine.slot_messages(), [], "{when}");
        machine.closed(offers[0]);
        assert_eq!(machine.slot_messages(), [(DUMP, reserved_closed(1))], "{when}");
        machine.ok(&plain_contact(V5_3, 0));
        machine.closed(offers[1]);
        assert_eq!(machine.messages(), [accepted(V5_3)], "{when}");
        machine.wind_down();
    }
}

#[test]
fn answers_about_reserved_channels_survive_an_unload_and_a_pause() {
    // The result was not taken when the guest unloads.
    let (mut machine, offers) = Machine::connected_v6(2);
    machine.create_gpadl(1, RING, &PAGES);
    machine.ok(&open_reserved(1, 3, 7, RING, 4));
    machine.open_result(offers[0], NtStatus::SUCCESS);
    machine.ok(&modify_connection(0, 0)); // whose answer nobody will wait for
    machine.ok(&unload());
    assert_eq!(
        machine.slot_messages(),
        [(DUMP, open_result(1, 0, SUCCESS)), (SLOT, unload_complete())]
    );

    // The channel was being closed when the guest unloads.
    let (mut machine, offers) = Machine::connected(V5_3, 1);
    machine.create_gpadl(1, RING, &PAGES);
    machine.ok(&open_reserved(1, 3, 7, RING, 4));
    machine.open_result(offers[0], NtStatus::SUCCESS);
    machine.slot_messages();
    machine.ok(&close_reserved(1, 3, 7));
    machine.ok(&unload());
    machine.closed(offers[0]);
    let expected = [(DUMP, reserved_closed(1)), (SLOT, unload_complete())];
    assert_eq!(machine.slot_messages(), expected);

    // The channel was closing when the crash wanted it: the unload ends that.
    let (mut machine, offers) = Machine::connected(V5_3, 1);
    machine.open(offers[0], 1, RING);
    machine.ok(&close(1));
    machine.ok(&open_reserved(1, 3, 7, RING, 4));
    machine.ok(&unload());
    assert_eq!(machine.slot_messages(), [(DUMP, open_result(1, 0, NtStatus::CANCELLED.0))]);
    machine.closed(offers[0]);
    assert_eq!(machine.messages(), [unload_complete()]);

    // A paused connection.
    let (mut machine, offers) = Machine::connected_v6(1);
    machine.create_gpadl(1, RING, &PAGES);
    machine.ok(&pause());
    machine.ok(&open_reserved(1, 3, 7, RING, 4));
    machine.open_result(offers[0], NtStatus::SUCCESS);
    let expected = [(SLOT, paused()), (DUMP, open_result(1, 0, SUCCESS))];
    assert_eq!(machine.slot_messages(), expected);
    machine.ok(&unload());
    assert_eq!(machine.messages(), [unload_complete()], "an unload ends the pause");
}

#[test]
fn a_new_contact_closes_reserved_channels_as_well() {
    let (mut machine, offers) = Machine::connected(V5_3, 1);
    machine.create_gpadl(1, RING, &PAGES);
    machine.ok(&open_reserved(1, 3, 7, RING, 4));
    machine.open_result(offers[0], NtStatus::SUCCESS);
    machine.slot_messages();
    machine.ok(&unload());
    machine.messages();
    machine.effects();
    machine.ok(&plain_contact(V5_3, 0));
    assert_eq!(machine.effects(), told(offers[0]));
    assert_eq!(machine.messages(), NONE);
    machine.closed(offers[0]);
    assert_eq!(machine.messages(), [accepted(V5_3)]);
    assert_eq!(machine.host.usage(), Usage { channels: 1, ..Usage::default() });
}

#[test]
fn a_reserved_channel_whose_device_goes_away() {
    // Rescinded while open; the close crosses it and waits for the device.
    let (mut machine, offers) = Machine::connected(V5_3, 1);
    machine.create_gpadl(1, RING, &PAGES);
    machine.ok(&open_reserved(1, 3, 7, RING, 4));
    machine.open_result(offers[0], NtStatus::SUCCESS);
    machine.revoke(offers[0]);
    machine.ok(&close_reserved(1, 3, 7));
    assert_eq!(machine.slot_messages(), [(DUMP, open_result(1, 0, SUCCESS)), (SLOT, rescind(1))]);
    machine.closed(offers[0]);
    assert_eq!(machine.slot_messages(), [(DUMP, reserved_closed(1))]);
    // Let go by the device: closed, and so the guest is told.
    let (mut machine, offers) = Machine::connected(V5_3, 1);
    machine.create_gpadl(1, RING, &PAGES);
    machine.ok(&open_reserved(1, 3, 7, RING, 4));
    machine.open_result(offers[0], NtStatus::SUCCESS);
    machine.closed(offers[0]);
    machine.ok(&close_reserved(1, 3, 7));
    assert_eq!(machine.slot_messages().pop(), Some((DUMP, reserved_closed(1))));
}

#[test]
fn socket_requests_are_answered_by_an_offer_or_a_refusal() {
    for (version, is_told) in [(V4_0, false), (V4_1, true), (V6_0, true)] {
        let (mut machine, _) = Machine::connected(version, 0);
        let (endpoint, service) = (instance(1), instance(2));
        machine.ok(&tl_connect(endpoint, service));
        let effects = machine.effects();
        let [Effect::ConnectHvsock(request)] = effects[..] else { panic!("{effects:?}") };
        let HvsockRequest { id, endpoint_id, service_id, silo_id } = request;
        assert_eq!((endpoint_id, service_id, silo_id), (endpoint, service, None));
        machine.host.hvsock_result(id, Err(NtStatus::CONNECTION_REFUSED));
        let refusal = tl_result(endpoint, service, 0xc000_0236);
        let expected = if is_told { vec![refusal] } else { vec![] };
        assert_eq!(machine.messages(), expected, "{version:#x}");
        machine.host.hvsock_result(id, Err(NtStatus::CONNECTION_REFUSED)); // once
        assert_eq!(machine.messages(), NONE, "{version:#x}");
    }
    // The silo, from 5.2 on, by the size of the message.
    for (version, silo) in [(V5_1, None), (V5_2, Some(instance(3)))] {
        let (mut machine, _) = Machine::connected(version, 0);
        let mut request = tl_connect(instance(1), instance(2));
        request.extend(instance(3).to_bytes());
        machine.ok(&request);
        let effects = machine.effects();
        assert!(
            matches!(effects[..], [Effect::ConnectHvsock(HvsockRequest { silo_id, .. })] if silo_id == silo),
            "{effects:?}"
        );
    }
    // Accepted: an offer, and no other word. An answer that comes too late reaches nobody.
    let (mut machine, _) = Machine::connected(V5_3, 0);
    machine.ok(&tl_connect(instance(1), TYPE));
    machine.ok(&tl_connect(instance(2), TYPE));
    let ids: Vec<u64> = machine
        .effects()
        .iter()
        .map(|effect| match effect {
            Effect::ConnectHvsock(request) => request.id,
            other => panic!("{other:?}"),
        })
        .collect();
    machine.offer(1);
    machine.host.hvsock_result(ids[0], Ok(()));
    assert_eq!(machine.messages(), [offered(TYPE, instance(1), 0, 1)]);
    machine.ok(&unload());
    machine.messages();
    machine.connect(V5_3);
    machine.host.hvsock_result(ids[1], Err(NtStatus::CONNECTION_REFUSED));
    assert_eq!(machine.messages(), NONE);
}

#[test]
fn sockets_are_not_shown_to_guests_that_know_none() {
    for (version, is_shown) in [(V3_0, false), (V4_0, true)] {
        let mut machine = Machine::new();
        let mut socket = plain_offer(1);
        socket.tlnpi_provider = true;
        machine.host.offer(socket).unwrap();
        machine.connect(version);
        machine.ok(&request_offers());
        assert_eq!(machine.messages().len(), 1 + usize::from(is_shown), "{version:#x}");
    }
}

#[test]
fn a_paused_guest_gets_nothing_and_loses_nothing() {
    let (mut machine, _) = Machine::connected_v6(1);
    machine.offer(2);
    machine.ok(&pause());
    machine.offer(3);
    machine.create_gpadl_unanswered(1, 6);
    // What was queued before the pause leaves, and the answer to it.
    assert_eq!(machine.messages(), [offered(TYPE, instance(2), 0, 2), paused()]);
    machine.offer(4);
    assert_eq!(machine.messages(), NONE);
    machine.ok(&resume());
    assert_eq!(
        machine.messages(),
        [
            offered(TYPE, instance(3), 0, 3),
            gpadl_created(1, 6, SUCCESS),
            offered(TYPE, instance(4), 0, 4),
        ]
    );
    // A contact, too, ends a pause.
    machine.ok(&pause());
    machine.connect(V6_0);
    machine.offer(5);
    machine.ok(&request_offers());
    assert_eq!(machine.messages().len(), 6);
}

impl Machine {
    fn create_gpadl_unanswered(&mut self, channel: u32, gpadl: u32) {
        self.all_ok(&whole_pages(channel, gpadl, &[1]));
    }
}

#[test]
fn monitor_pages_may_change() {
    let (mut machine, _) = Machine::connected_v6(0);
    let pages = |machine: &Machine| machine.host.connection().established().unwrap().monitor_pages;
    machine.ok(&modify_connection(0x1000, 0x2000));
    assert_eq!(pages(&machine), Some((0x1000, 0x2000)));
    assert!(machine.post(&modify_connection(0x3000, 0)).is_err());
    assert_eq!(pages(&machine), Some((0x1000, 0x2000)));
    machine.ok(&modify_connection(0, 0));
    assert_eq!(pages(&machine), None);
    let states = [0, 2, 0].map(connection_modified);
    assert_eq!(machine.messages(), states);
}
