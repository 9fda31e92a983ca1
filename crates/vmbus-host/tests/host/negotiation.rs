//! INITIATE_CONTACT and its answer.

use vmbus_host::limits::MAX_WAITING_MESSAGES;
use vmbus_host::{Connection, PostError, Refusal, SUPPORTED_FEATURES, SlotId};
use vmbus_wire::guid::Guid;
use vmbus_wire::message::MessageType;
use vmbus_wire::version::{FeatureFlags, Version};

use crate::bytes::*;
use crate::machine::*;

fn slot(vp: u32, sint: u8) -> SlotId {
    SlotId { vp, sint }
}

#[test]
fn the_answer_to_every_version_goes_where_the_guest_listens() {
    // (version, slot of the answer when the guest names VP 3)
    let table = VERSIONS.map(|version| (version, slot(if version >= V3_0 { 3 } else { 0 }, 2)));
    for (version, expected) in table {
        let mut machine = Machine::new();
        machine.ok(&plain_contact(version, 3));
        let response = if version == V6_0 { accepted_v6(0) } else { accepted(version) };
        assert_eq!(machine.slot_messages(), [(expected, response)], "{version:#x}");
        // So does everything after it.
        machine.ok(&request_offers());
        assert_eq!(machine.slot_messages(), [(expected, all_offers())], "{version:#x}");
    }
}

#[test]
fn a_version_is_accepted_exactly_or_not_at_all() {
    let table = [
        // (newest spoken, asked for, accepted)
        (Version::V6_0, 0x0000_000c, false),
        (Version::V6_0, 0x0001_0000, false),
        (Version::V6_0, 0x0005_0004, false),
        (Version::V6_0, 0x0006_0001, false),
        (Version::V6_0, 0xffff_ffff, false),
        (Version::V5_3, V6_0, false),
        (Version::V5_3, V5_3, true),
        (Version::V4_1, V4_1, true),
        (Version::V2_4, V3_0, false),
        (Version::V2_4, V0_13, true),
    ];
    for (newest_spoken, asked, is_accepted) in table {
        let row = format!("{newest_spoken} {asked:#x}");
        let mut machine = Machine::with(newest(newest_spoken));
        assert_eq!(machine.post_to(1, &plain_contact(asked, 0)), Ok(()), "{row}");
        let expected = if is_accepted { accepted(asked) } else { unsupported() };
        assert_eq!(machine.messages(), [expected], "{row}");
        assert_eq!(machine.host.connection().established().is_some(), is_accepted, "{row}");
        machine.wind_down();
    }
}

#[test]
fn a_linux_guest_walks_down_to_what_the_host_speaks() {
    let mut machine = Machine::with(newest(Version::V4_0));
    // It posts newer versions to connection 4; the error makes it go down at once.
    for version in [V5_3, V5_2, V5_1, V5_0] {
        let refused = machine.post_to(4, &plain_contact(version, 0)).unwrap_err();
        assert_eq!(refused, PostError::UnknownConnection { connection_id: 4 });
        assert_eq!(refused.hypercall_status(), 18);
    }
    machine.ok(&plain_contact(V4_1, 0));
    machine.ok(&plain_contact(V4_0, 0));
    assert_eq!(machine.messages(), [accepted(V4_0)], "the first answer nobody has waited for");
}

#[test]
fn messages_are_taken_at_the_connections_of_vmbus_only() {
    let mut machine = Machine::new();
    for connection_id in [0, 2, 3, 5, 0x0080_0074, 0x2001, 0x00ff_ffff] {
        let refused = machine.post_to(connection_id, &plain_contact(V5_3, 0));
        assert_eq!(refused, Err(PostError::UnknownConnection { connection_id }));
    }
    // 24 bits count. A guest that was told connection 1 may go on with 4.
    assert_eq!(machine.post_to(0xab00_0004, &plain_contact(V5_3, 0)), Ok(()));
    assert_eq!(machine.post_to(4, &request_offers()), Ok(()));
    assert_eq!(machine.messages(), [accepted(V5_3), all_offers()]);
}

#[test]
fn features_are_granted_as_far_as_the_host_has_them() {
    let supported = 0x1 | 0x4 | 0x8 | 0x20;
    assert_eq!(SUPPORTED_FEATURES.bits(), supported);
    let client_id = Guid::from_bytes([7; 16]);
    for asked in [0, 0x1, 0x2, 0x4, 0x8, 0x10, 0x20, 0x40, 0x80, 0xff, 0xffff_ff00, 0xffff_ffff] {
        let mut machine = Machine::new();
        machine.ok(&contact(V6_0, 0, target(2, 0, asked)).guid(client_id).done());
        assert_eq!(machine.messages(), [accepted_v6(asked & supported)], "{asked:#x}");
        let established = machine.host.connection().established().unwrap();
        assert_eq!(established.features.bits(), asked & supported, "{asked:#x}");
        let expected = (asked & 0x8 != 0).then_some(client_id);
        assert_eq!(established.client_id, expected, "{asked:#x}");
    }
    // Below 6.0 the same bytes mean nothing.
    let mut machine = Machine::new();
    machine.ok(&contact(V5_3, 0, target(2, 0, 0xff)).done());
    assert_eq!(machine.messages(), [accepted(V5_3)]);
    let features = machine.host.connection().established().unwrap().features;
    assert_eq!(features, FeatureFlags::empty());
}

#[test]
fn clients_of_other_sints_and_trust_levels_are_turned_away_and_disturb_nobody() {
    // (version, SINT, VTL, whether it is turned away, and where)
    let table = [
        (V5_0, 5, 0, Some(slot(1, 5))),
        (V6_0, 0, 0, Some(slot(1, 0))),
        (0x0007_0000, 5, 0, Some(slot(1, 5))),
        (V5_0, 2, 2, None), // 5.0 has no trust level
        (V5_1, 2, 2, Some(slot(1, 2))),
        (V5_3, 2, 1, Some(slot(1, 2))),
    ];
    for (version, sint, vtl, expected) in table {
        let row = format!("{version:#x} SINT {sint} VTL {vtl}");
        let (mut machine, offers) = Machine::connected(V5_3, 1);
        machine.open(offers[0], 1, 100);
        let before = machine.host.connection().clone();
        machine.ok(&contact(version, 1, target(sint, vtl, 0)).done());
        let Some(expected) = expected else {
            assert_ne!(machine.host.connection(), &before, "{row}");
            continue;
        };
        assert_eq!(machine.slot_messages(), [(expected, unsupported())], "{row}");
        assert_eq!(machine.host.connection(), &before, "{row}");
        assert_eq!(machine.effects(), [], "{row}");
    }
    // They do not end a connection, so their answers count as the guest's: bounded.
    let mut machine = Machine::new();
    let foreign = contact(V5_3, 0, target(7, 0, 0)).done();
    for _ in 0..MAX_WAITING_MESSAGES {
        machine.ok(&foreign);
    }
    let busy = PostError::Busy { waiting: MAX_WAITING_MESSAGES };
    assert_eq!(machine.post(&foreign), Err(busy));
    assert_eq!(machine.post(&plain_contact(V5_3, 0)), Ok(()), "this one begins anew");
}

#[test]
fn a_contact_that_lies_is_answered_and_leaves_no_connection() {
    let message = MessageType::InitiateContact;
    let failed = |version: u32| message_15(1, 2, if version >= V5_0 { 1 } else { version });
    fn message_15(supported: u8, state: u8, selected: u32) -> Vec<u8> {
        super::bytes::message(15).u8(supported).u8(state).u16(0).u32(selected).done()
    }
    let one_page = |version: u32, union: u64, pages: [u64; 2]| {
        super::bytes::message(14).u32(version).u32(0).u64(union).words(&pages).done()
    };
    let monitor = |pages: [u64; 2]| Refusal::MonitorPages {
        message,
        parent_to_child: pages[0],
        child_to_parent: pages[1],
    };
    let pages = 0x40_0000;
    let table = [
        ("one monitor page", one_page(V4_0, 0, [pages, 0]), monitor([pages, 0]), failed(V4_0)),
        ("the other", one_page(V5_3, target(2, 0, 0), [0, 1]), monitor([0, 1]), failed(V5_3)),
        ("before failures had a name", one_page(V1_1, 0, [1, 0]), monitor([1, 0]), unsupported()),
        (
            "an unaligned interrupt page",
            contact(V0_13, 0, 0x1008).done(),
            Refusal::InterruptPage { gpa: 0x1008 },
            unsupported(),
        ),
        (
            "an interrupt page that is not RAM",
            contact(V1_1, 0, NOT_RAM << 12).done(),
            Refusal::InterruptPage { gpa: NOT_RAM << 12 },
            unsupported(),
        ),
    ];
    for (name, contact, refusal, answer) in table {
        let mut machine = Machine::new();
        machine.connect(V4_0);
        assert_eq!(machine.post(&contact), Err(PostError::Refused(refusal)), "{name}");
        assert_eq!(machine.messages(), [answer], "{name}");
        assert_eq!(machine.host.connection(), &Connection::Disconnected, "{name}");
    }
    // Two monitor pages are fine, and nobody looks at them.
    let mut machine = Machine::new();
    machine.ok(&one_page(V4_0, 0, [u64::MAX, 1]));
    assert_eq!(machine.messages(), [accepted(V4_0)]);
}

#[test]
fn a_contact_with_nowhere_to_answer_to_is_refused_and_changes_nothing() {
    let message = MessageType::InitiateContact;
    let table = [
        (plain_contact(V3_0, 4), Refusal::Vp { message, vp: 4, vp_count: 4 }),
        (plain_contact(V5_3, u32::MAX), Refusal::Vp { message, vp: u32::MAX, vp_count: 4 }),
        (contact(V5_0, 0, target(16, 0, 0)).done(), Refusal::Sint { message, sint: 16 }),
        (contact(V6_0, 0, target(255, 0, 0)).done(), Refusal::Sint { message, sint: 255 }),
    ];
    for (contact, refusal) in table {
        let (mut machine, _) = Machine::connected(V5_3, 1);
        let before = machine.host.clone();
        assert_eq!(machine.post(&contact), Err(PostError::Refused(refusal)));
        assert_eq!(machine.host, before, "{refusal}");
    }
    // Below 3.0 the VP does not count.
    let mut machine = Machine::new();
    machine.ok(&plain_contact(V2_4, u32::MAX));
    assert_eq!(machine.messages(), [accepted(V2_4)]);
}

#[test]
fn trailing_bytes_are_tolerated_whatever_the_version() {
    for version in VERSIONS {
        let mut machine = Machine::new();
        let mut padded = plain_contact(version, 0);
        padded.resize(240, 0);
        machine.ok(&padded);
        assert_eq!(machine.messages().len(), 1, "{version:#x}");
        assert!(machine.host.connection().established().is_some(), "{version:#x}");
    }
}
