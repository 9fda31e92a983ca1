//! A guest that does not take its messages.

use vmbus_host::limits::MAX_WAITING_MESSAGES;
use vmbus_host::{PostError, SlotId};
use vmbus_wire::status::NtStatus;

use crate::bytes::*;
use crate::machine::*;

/// A guest of 6.0 that has asked so much that as many messages wait as may.
fn full() -> Machine {
    let (mut machine, _) = Machine::connected_v6(1);
    for _ in 0..MAX_WAITING_MESSAGES {
        machine.ok(&modify_connection(0, 0));
    }
    assert_eq!(machine.host.usage().messages, MAX_WAITING_MESSAGES);
    machine
}

#[test]
fn it_is_told_to_come_again_and_loses_nothing() {
    let mut machine = full();
    let busy = PostError::Busy { waiting: MAX_WAITING_MESSAGES };
    let message = whole_pages(1, 6, &[1]).remove(0);
    assert_eq!(machine.post(&message), Err(busy));
    assert_eq!(busy.hypercall_status(), 19);
    // It takes one, and the same message is accepted, and answered last.
    let first = machine.host.next_message(&[]).unwrap().serial;
    machine.host.message_taken(first);
    machine.ok(&message);
    assert_eq!(machine.post(&message), Err(busy));
    let mut expected = vec![connection_modified(0); MAX_WAITING_MESSAGES - 1];
    expected.push(gpadl_created(1, 6, SUCCESS));
    assert_eq!(machine.messages(), expected);
}

#[test]
fn lies_are_told_from_bad_times() {
    // A message that is none is none, however full the queue.
    let mut machine = full();
    assert!(matches!(machine.post(&message(99).done()), Err(PostError::Refused(_))));
    assert!(matches!(machine.post(&[]), Err(PostError::Refused(_))));
}

#[test]
fn what_ends_the_trouble_is_always_taken() {
    let mut machine = full();
    machine.ok(&unload());
    assert_eq!(machine.messages(), [unload_complete()], "nobody waits for the rest");
    let mut machine = full();
    machine.ok(&plain_contact(V5_3, 0));
    assert_eq!(machine.messages(), [accepted(V5_3)]);
    let mut machine = full();
    machine.ok(&plain_contact(0x7777_0000, 0));
    assert_eq!(machine.messages(), [unsupported()]);

    let (mut machine, _) = Machine::connected_v6(1);
    machine.ok(&pause());
    while machine.post(&modify_connection(0, 0)).is_ok() {}
    machine.ok(&resume());
    assert_eq!(machine.messages().len(), MAX_WAITING_MESSAGES);
}

#[test]
fn devices_are_not_held_up() {
    let (mut machine, offers) = Machine::connected_v6(2);
    machine.create_gpadl(1, 5, &[10, 11, 12, 13]);
    machine.ok(&open_v2(open(1, 0x77, 5, 0, 2), 0x2001, 1));
    while machine.post(&modify_connection(0, 0)).is_ok() {}
    machine.open_result(offers[0], NtStatus::SUCCESS);
    machine.revoke(offers[1]);
    machine.offer(3);
    let messages = machine.messages();
    assert_eq!(
        messages[MAX_WAITING_MESSAGES..],
        [open_result(1, 0x77, SUCCESS), rescind(2), offered(TYPE, instance(3), 0, 3)]
    );
}

#[test]
fn a_full_slot_holds_up_no_other_one() {
    let dump = SlotId { vp: 3, sint: 7 };
    let (mut machine, offers) = Machine::connected_v6(1);
    machine.ok(&modify_connection(0, 0));
    machine.create_gpadl_for(1, 5);
    machine.ok(&open_reserved(1, 3, 7, 5, 2));
    machine.open_result(offers[0], NtStatus::SUCCESS);
    machine.ok(&close_reserved(1, 3, 7));
    machine.closed(offers[0]);

    let host = &mut machine.host;
    let next = host.next_message(&[SLOT]).unwrap().clone();
    assert_eq!((next.slot, &*next.message), (dump, &*open_result(1, 0, SUCCESS)));
    assert_eq!(host.next_message(&[SLOT, dump]), None);
    let other = host.next_message(&[dump]).unwrap().clone();
    assert_eq!((other.slot, &*other.message), (SLOT, &*connection_modified(0)));
    host.message_taken(next.serial);
    let next = host.next_message(&[SLOT]).unwrap().clone();
    assert_eq!((next.slot, &*next.message), (dump, &*reserved_closed(1)), "in order");
}

impl Machine {
    fn create_gpadl_for(&mut self, channel: u32, gpadl: u32) {
        self.all_ok(&whole_pages(channel, gpadl, &[10, 11, 12, 13]));
    }
}

#[test]
fn a_message_dropped_while_it_was_delivered_is_not_mistaken_for_its_successor() {
    let mut machine = full();
    let on_its_way = machine.host.next_message(&[]).unwrap().serial;
    machine.ok(&plain_contact(V5_3, 0));
    machine.host.message_taken(on_its_way);
    assert_eq!(machine.messages(), [accepted(V5_3)]);
}
