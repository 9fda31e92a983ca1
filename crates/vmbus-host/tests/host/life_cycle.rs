//! The life of a channel: every state that can be, and everything that can happen in it.

use std::fmt::Write as _;

use vmbus_host::{Connection, Effect, OfferId, OfferState, OpenState};
use vmbus_wire::message::MessageType;
use vmbus_wire::status::NtStatus;

use crate::bytes::*;
use crate::machine::*;

const RING: u32 = 5;
const PAGES: [u64; 8] = [10, 11, 12, 13, 20, 21, 22, 23];

/// How to come to each state, with channel 1 and, where it is open, its rings in GPADL 5.
type Prepare = fn() -> (Machine, OfferId);

const STATES: [(&str, Prepare); 16] = [
    ("hidden", || {
        let mut machine = Machine::new();
        let offer = machine.offer(1);
        machine.connect(V5_3);
        (machine, offer)
    }),
    ("offered", offered_with_ring),
    ("opening", opening),
    ("open", opened),
    ("abandoned", || {
        let (mut machine, offer) = opened();
        machine.closed(offer);
        (machine, offer)
    }),
    ("closing", closing),
    ("reopening", || {
        let (mut machine, offer) = closing();
        machine.ok(&open(1, 2, RING, 0, 4));
        (machine, offer)
    }),
    ("rescinded", || {
        let (mut machine, offer) = offered_with_ring();
        machine.revoke(offer);
        (machine, offer)
    }),
    ("rescinded, held", || {
        let (mut machine, offer) = opened();
        machine.revoke(offer);
        (machine, offer)
    }),
    ("released, held", || {
        let (mut machine, offer) = opened();
        machine.revoke(offer);
        machine.ok(&release(1));
        (machine, offer)
    }),
    ("reserved, opening", reserved_opening),
    ("reserved, open", reserved_open),
    ("reserved, closing", || {
        let (mut machine, offer) = reserved_open();
        machine.ok(&close_reserved(1, 3, 7));
        (machine, offer)
    }),
    ("unloaded, reserved opening", || {
        let (mut machine, offer) = reserved_opening();
        machine.ok(&unload());
        (machine, offer)
    }),
    ("unloaded, reserved open", || {
        let (mut machine, offer) = reserved_open();
        machine.ok(&unload());
        (machine, offer)
    }),
    ("unloading", || {
        let (mut machine, offer) = opened();
        machine.ok(&unload());
        (machine, offer)
    }),
];

fn offered_with_ring() -> (Machine, OfferId) {
    let (mut machine, offers) = Machine::connected(V5_3, 1);
    machine.create_gpadl(1, RING, &PAGES);
    (machine, offers[0])
}

fn opening() -> (Machine, OfferId) {
    let (mut machine, offer) = offered_with_ring();
    machine.ok(&open(1, 1, RING, 0, 4));
    (machine, offer)
}

fn opened() -> (Machine, OfferId) {
    let (mut machine, offer) = opening();
    machine.open_result(offer, NtStatus::SUCCESS);
    (machine, offer)
}

fn closing() -> (Machine, OfferId) {
    let (mut machine, offer) = opened();
    machine.ok(&close(1));
    (machine, offer)
}

fn reserved_opening() -> (Machine, OfferId) {
    let (mut machine, offer) = offered_with_ring();
    machine.ok(&open_reserved(1, 3, 7, RING, 4));
    (machine, offer)
}

fn reserved_open() -> (Machine, OfferId) {
    let (mut machine, offer) = reserved_opening();
    machine.open_result(offer, NtStatus::SUCCESS);
    (machine, offer)
}

type Event = fn(&mut Machine, OfferId) -> bool;

/// Everything that can happen to a channel; `false`: refused.
const EVENTS: [(&str, Event); 16] = [
    ("OPEN", |machine, _| machine.post(&open(1, 2, RING, 0, 4)).is_ok()),
    ("CLOSE", |machine, _| machine.post(&close(1)).is_ok()),
    ("MODIFY", |machine, _| machine.post(&modify(1, 3)).is_ok()),
    ("OPEN_RESERVED", |machine, _| machine.post(&open_reserved(1, 3, 7, RING, 4)).is_ok()),
    ("CLOSE_RESERVED", |machine, _| machine.post(&close_reserved(1, 3, 7)).is_ok()),
    ("GPADL_HEADER", |machine, _| machine.post(&whole_pages(1, 6, &[1])[0]).is_ok()),
    ("TEARDOWN of the ring", |machine, _| machine.post(&gpadl_teardown(1, RING)).is_ok()),
    ("REL_ID_RELEASED", |machine, _| machine.post(&release(1)).is_ok()),
    ("REQUEST_OFFERS", |machine, _| machine.post(&request_offers()).is_ok()),
    ("INITIATE_CONTACT", |machine, _| machine.post(&plain_contact(V5_3, 0)).is_ok()),
    ("UNLOAD", |machine, _| machine.post(&unload()).is_ok()),
    ("guest reset", |machine, _| {
        machine.reset();
        true
    }),
    ("device accepts", |machine, offer| {
        machine.open_result(offer, NtStatus::SUCCESS);
        true
    }),
    ("device refuses", |machine, offer| {
        machine.open_result(offer, NtStatus::UNSUCCESSFUL);
        true
    }),
    ("device lets go", |machine, offer| {
        machine.closed(offer);
        true
    }),
    ("device withdraws", |machine, offer| {
        machine.revoke(offer);
        true
    }),
];

/// The state that a step leads to, and what it causes.
fn outcome(machine: &mut Machine, offer: OfferId, accepted: bool) -> String {
    let mut told = String::new();
    match machine.host.channel(offer) {
        None => told.push_str("gone"),
        Some(channel) => {
            let offer = match channel.offer {
                OfferState::Hidden => "hidden",
                OfferState::Offered => "offered",
                OfferState::Rescinded => "rescinded",
                OfferState::Released => "released",
            };
            let open = match channel.open {
                OpenState::Closed => "closed",
                OpenState::Opening(_) => "opening",
                OpenState::Open(_) => "open",
                OpenState::Abandoned(_) => "abandoned",
                OpenState::Closing(_) => "closing",
                OpenState::Reopening(..) => "reopening",
            };
            let reserved = if channel.is_reserved() { " reserved" } else { "" };
            write!(told, "{offer} {open}{reserved}").unwrap();
        }
    }
    match machine.host.connection() {
        Connection::Connected(_) => {}
        Connection::Disconnected => told.push_str(", disconnected"),
        Connection::Disconnecting { .. } => told.push_str(", disconnecting"),
    }
    if !accepted {
        told.push_str("; refused");
    }
    for (slot, message) in machine.slot_messages() {
        let kind = MessageType::from_wire(u32_at(&message, 0)).unwrap();
        let failed = match kind {
            MessageType::OpenChannelResult | MessageType::GpadlCreated => u32_at(&message, 16) != 0,
            MessageType::ModifyChannelResponse => u32_at(&message, 12) != 0,
            _ => false,
        };
        let elsewhere = if slot == SLOT { "" } else { " to VP 3 SINT 7" };
        let failed = if failed { " (failed)" } else { "" };
        write!(told, "; {kind}{failed}{elsewhere}").unwrap();
    }
    for effect in machine.effects() {
        told.push_str(match effect {
            Effect::Open { .. } => "; device: open",
            Effect::Resume { .. } => "; device: resumed",
            Effect::Close { tell_device: true, .. } => "; device: closed",
            Effect::Close { tell_device: false, .. } => "; signals off",
            Effect::Retarget { .. } => "; retarget",
            Effect::ConnectHvsock(_) => "; hvsock",
        });
    }
    told
}

#[test]
fn every_event_in_every_state() {
    let mut expected = EXPECTED.trim().lines();
    for (state, prepare) in STATES {
        for (event, step) in EVENTS {
            let (mut machine, offer) = prepare();
            machine.effects();
            machine.slot_messages();
            let accepted = step(&mut machine, offer);
            let row = format!("{state} + {event} = {}", outcome(&mut machine, offer, accepted));
            assert_eq!(Some(row.as_str()), expected.next().map(str::trim));
            // Nothing is left behind, whatever comes after.
            machine.wind_down();
        }
    }
    assert_eq!(expected.next(), None);
}

const EXPECTED: &str = "
hidden + OPEN = hidden closed; refused; OPEN_CHANNEL_RESULT (failed)
hidden + CLOSE = hidden closed; refused
hidden + MODIFY = hidden closed; refused; MODIFY_CHANNEL_RESPONSE (failed)
hidden + OPEN_RESERVED = hidden closed; refused; OPEN_CHANNEL_RESULT (failed) to VP 3 SINT 7
hidden + CLOSE_RESERVED = hidden closed; CLOSE_RESERVED_RESPONSE to VP 3 SINT 7
hidden + GPADL_HEADER = hidden closed; refused; GPADL_CREATED (failed)
hidden + TEARDOWN of the ring = hidden closed; refused; GPADL_TORNDOWN
hidden + REL_ID_RELEASED = hidden closed; refused
hidden + REQUEST_OFFERS = offered closed; OFFER_CHANNEL; ALL_OFFERS_DELIVERED
hidden + INITIATE_CONTACT = hidden closed; VERSION_RESPONSE
hidden + UNLOAD = hidden closed, disconnected; UNLOAD_COMPLETE
hidden + guest reset = hidden closed, disconnected
hidden + device accepts = hidden closed
hidden + device refuses = hidden closed
hidden + device lets go = hidden closed
hidden + device withdraws = gone
offered + OPEN = offered opening; device: open
offered + CLOSE = offered closed; refused
offered + MODIFY = offered closed; refused; MODIFY_CHANNEL_RESPONSE (failed)
offered + OPEN_RESERVED = offered opening reserved; device: open
offered + CLOSE_RESERVED = offered closed; CLOSE_RESERVED_RESPONSE to VP 3 SINT 7
offered + GPADL_HEADER = offered closed; GPADL_CREATED
offered + TEARDOWN of the ring = offered closed; GPADL_TORNDOWN
offered + REL_ID_RELEASED = offered closed; refused
offered + REQUEST_OFFERS = offered closed; refused
offered + INITIATE_CONTACT = hidden closed; VERSION_RESPONSE
offered + UNLOAD = hidden closed, disconnected; UNLOAD_COMPLETE
offered + guest reset = hidden closed, disconnected
offered + device accepts = offered closed
offered + device refuses = offered closed
offered + device lets go = offered closed
offered + device withdraws = rescinded closed; RESCIND_CHANNEL_OFFER
opening + OPEN = offered opening; refused; OPEN_CHANNEL_RESULT (failed)
opening + CLOSE = offered opening; refused
opening + MODIFY = offered opening; refused; MODIFY_CHANNEL_RESPONSE (failed)
opening + OPEN_RESERVED = offered opening; refused; OPEN_CHANNEL_RESULT (failed) to VP 3 SINT 7
opening + CLOSE_RESERVED = offered opening; refused
opening + GPADL_HEADER = offered opening; GPADL_CREATED
opening + TEARDOWN of the ring = offered opening
opening + REL_ID_RELEASED = offered opening; refused
opening + REQUEST_OFFERS = offered opening; refused
opening + INITIATE_CONTACT = hidden closing, disconnecting; device: closed
opening + UNLOAD = hidden closing, disconnecting; device: closed
opening + guest reset = hidden closing, disconnecting; device: closed
opening + device accepts = offered open; OPEN_CHANNEL_RESULT
opening + device refuses = offered closed; OPEN_CHANNEL_RESULT (failed); signals off
opening + device lets go = offered closed; OPEN_CHANNEL_RESULT (failed); signals off
opening + device withdraws = rescinded closing; OPEN_CHANNEL_RESULT (failed); RESCIND_CHANNEL_OFFER; signals off
open + OPEN = offered open; refused; OPEN_CHANNEL_RESULT (failed)
open + CLOSE = offered closing; device: closed
open + MODIFY = offered open; retarget
open + OPEN_RESERVED = offered open; refused; OPEN_CHANNEL_RESULT (failed) to VP 3 SINT 7
open + CLOSE_RESERVED = offered open; refused
open + GPADL_HEADER = offered open; GPADL_CREATED
open + TEARDOWN of the ring = offered open
open + REL_ID_RELEASED = offered open; refused
open + REQUEST_OFFERS = offered open; refused
open + INITIATE_CONTACT = hidden closing, disconnecting; device: closed
open + UNLOAD = hidden closing, disconnecting; device: closed
open + guest reset = hidden closing, disconnecting; device: closed
open + device accepts = offered open
open + device refuses = offered abandoned; signals off
open + device lets go = offered abandoned; signals off
open + device withdraws = rescinded closing; RESCIND_CHANNEL_OFFER; signals off
abandoned + OPEN = offered abandoned; refused; OPEN_CHANNEL_RESULT (failed)
abandoned + CLOSE = offered closed
abandoned + MODIFY = offered abandoned; refused; MODIFY_CHANNEL_RESPONSE (failed)
abandoned + OPEN_RESERVED = offered abandoned; refused; OPEN_CHANNEL_RESULT (failed) to VP 3 SINT 7
abandoned + CLOSE_RESERVED = offered abandoned; refused
abandoned + GPADL_HEADER = offered abandoned; GPADL_CREATED
abandoned + TEARDOWN of the ring = offered abandoned; GPADL_TORNDOWN
abandoned + REL_ID_RELEASED = offered abandoned; refused
abandoned + REQUEST_OFFERS = offered abandoned; refused
abandoned + INITIATE_CONTACT = hidden closed; VERSION_RESPONSE
abandoned + UNLOAD = hidden closed, disconnected; UNLOAD_COMPLETE
abandoned + guest reset = hidden closed, disconnected
abandoned + device accepts = offered abandoned
abandoned + device refuses = offered abandoned
abandoned + device lets go = offered abandoned
abandoned + device withdraws = rescinded closed; RESCIND_CHANNEL_OFFER
closing + OPEN = offered reopening
closing + CLOSE = offered closing; refused
closing + MODIFY = offered closing; refused; MODIFY_CHANNEL_RESPONSE (failed)
closing + OPEN_RESERVED = offered reopening
closing + CLOSE_RESERVED = offered closing; refused
closing + GPADL_HEADER = offered closing; GPADL_CREATED
closing + TEARDOWN of the ring = offered closing
closing + REL_ID_RELEASED = offered closing; refused
closing + REQUEST_OFFERS = offered closing; refused
closing + INITIATE_CONTACT = hidden closing, disconnecting
closing + UNLOAD = hidden closing, disconnecting
closing + guest reset = hidden closing, disconnecting
closing + device accepts = offered closing
closing + device refuses = offered closing
closing + device lets go = offered closed
closing + device withdraws = rescinded closing; RESCIND_CHANNEL_OFFER
reopening + OPEN = offered reopening; refused; OPEN_CHANNEL_RESULT (failed)
reopening + CLOSE = offered reopening; refused
reopening + MODIFY = offered reopening; refused; MODIFY_CHANNEL_RESPONSE (failed)
reopening + OPEN_RESERVED = offered reopening; refused; OPEN_CHANNEL_RESULT (failed) to VP 3 SINT 7
reopening + CLOSE_RESERVED = offered reopening; refused
reopening + GPADL_HEADER = offered reopening; GPADL_CREATED
reopening + TEARDOWN of the ring = offered reopening
reopening + REL_ID_RELEASED = offered reopening; refused
reopening + REQUEST_OFFERS = offered reopening; refused
reopening + INITIATE_CONTACT = hidden closing, disconnecting
reopening + UNLOAD = hidden closing, disconnecting
reopening + guest reset = hidden closing, disconnecting
reopening + device accepts = offered reopening
reopening + device refuses = offered reopening
reopening + device lets go = offered opening; device: open
reopening + device withdraws = rescinded closing; OPEN_CHANNEL_RESULT (failed); RESCIND_CHANNEL_OFFER
rescinded + OPEN = rescinded closed
rescinded + CLOSE = rescinded closed
rescinded + MODIFY = rescinded closed; MODIFY_CHANNEL_RESPONSE (failed)
rescinded + OPEN_RESERVED = rescinded closed; OPEN_CHANNEL_RESULT (failed) to VP 3 SINT 7
rescinded + CLOSE_RESERVED = rescinded closed; CLOSE_RESERVED_RESPONSE to VP 3 SINT 7
rescinded + GPADL_HEADER = rescinded closed; GPADL_CREATED (failed)
rescinded + TEARDOWN of the ring = rescinded closed; GPADL_TORNDOWN
rescinded + REL_ID_RELEASED = gone
rescinded + REQUEST_OFFERS = rescinded closed; refused
rescinded + INITIATE_CONTACT = gone; VERSION_RESPONSE
rescinded + UNLOAD = gone, disconnected; UNLOAD_COMPLETE
rescinded + guest reset = gone, disconnected
rescinded + device accepts = rescinded closed
rescinded + device refuses = rescinded closed
rescinded + device lets go = rescinded closed
rescinded + device withdraws = rescinded closed
rescinded, held + OPEN = rescinded closing
rescinded, held + CLOSE = rescinded closing
rescinded, held + MODIFY = rescinded closing; MODIFY_CHANNEL_RESPONSE (failed)
rescinded, held + OPEN_RESERVED = rescinded closing; OPEN_CHANNEL_RESULT (failed) to VP 3 SINT 7
rescinded, held + CLOSE_RESERVED = rescinded closing
rescinded, held + GPADL_HEADER = rescinded closing; GPADL_CREATED (failed)
rescinded, held + TEARDOWN of the ring = rescinded closing
rescinded, held + REL_ID_RELEASED = released closing
rescinded, held + REQUEST_OFFERS = rescinded closing; refused
rescinded, held + INITIATE_CONTACT = released closing, disconnecting
rescinded, held + UNLOAD = released closing, disconnecting
rescinded, held + guest reset = released closing, disconnecting
rescinded, held + device accepts = rescinded closing
rescinded, held + device refuses = rescinded closing
rescinded, held + device lets go = rescinded closed
rescinded, held + device withdraws = rescinded closing
released, held + OPEN = released closing; refused; OPEN_CHANNEL_RESULT (failed)
released, held + CLOSE = released closing; refused
released, held + MODIFY = released closing; refused; MODIFY_CHANNEL_RESPONSE (failed)
released, held + OPEN_RESERVED = released closing; refused; OPEN_CHANNEL_RESULT (failed) to VP 3 SINT 7
released, held + CLOSE_RESERVED = released closing; refused
released, held + GPADL_HEADER = released closing; refused; GPADL_CREATED (failed)
released, held + TEARDOWN of the ring = released closing
released, held + REL_ID_RELEASED = released closing; refused
released, held + REQUEST_OFFERS = released closing; refused
released, held + INITIATE_CONTACT = released closing, disconnecting
released, held + UNLOAD = released closing, disconnecting
released, held + guest reset = released closing, disconnecting
released, held + device accepts = released closing
released, held + device refuses = released closing
released, held + device lets go = gone
released, held + device withdraws = released closing
reserved, opening + OPEN = offered opening reserved; refused; OPEN_CHANNEL_RESULT (failed)
reserved, opening + CLOSE = offered opening reserved; refused
reserved, opening + MODIFY = offered opening reserved; refused; MODIFY_CHANNEL_RESPONSE (failed)
reserved, opening + OPEN_RESERVED = offered opening reserved; refused; OPEN_CHANNEL_RESULT (failed) to VP 3 SINT 7
reserved, opening + CLOSE_RESERVED = offered opening reserved; refused
reserved, opening + GPADL_HEADER = offered opening reserved; GPADL_CREATED
reserved, opening + TEARDOWN of the ring = offered opening reserved
reserved, opening + REL_ID_RELEASED = offered opening reserved; refused
reserved, opening + REQUEST_OFFERS = offered opening reserved; refused
reserved, opening + INITIATE_CONTACT = hidden closing, disconnecting; device: closed
reserved, opening + UNLOAD = hidden opening reserved, disconnected; UNLOAD_COMPLETE
reserved, opening + guest reset = hidden closing, disconnecting; device: closed
reserved, opening + device accepts = offered open reserved; OPEN_CHANNEL_RESULT to VP 3 SINT 7
reserved, opening + device refuses = offered closed; OPEN_CHANNEL_RESULT (failed) to VP 3 SINT 7; signals off
reserved, opening + device lets go = offered closed; OPEN_CHANNEL_RESULT (failed) to VP 3 SINT 7; signals off
reserved, opening + device withdraws = rescinded closing; OPEN_CHANNEL_RESULT (failed) to VP 3 SINT 7; RESCIND_CHANNEL_OFFER; signals off
reserved, open + OPEN = offered open reserved; refused; OPEN_CHANNEL_RESULT (failed)
reserved, open + CLOSE = offered open reserved; refused
reserved, open + MODIFY = offered open reserved; refused; MODIFY_CHANNEL_RESPONSE (failed)
reserved, open + OPEN_RESERVED = offered open reserved; refused; OPEN_CHANNEL_RESULT (failed) to VP 3 SINT 7
reserved, open + CLOSE_RESERVED = offered closing; device: closed
reserved, open + GPADL_HEADER = offered open reserved; GPADL_CREATED
reserved, open + TEARDOWN of the ring = offered open reserved
reserved, open + REL_ID_RELEASED = offered open reserved; refused
reserved, open + REQUEST_OFFERS = offered open reserved; refused
reserved, open + INITIATE_CONTACT = hidden closing, disconnecting; device: closed
reserved, open + UNLOAD = hidden open reserved, disconnected; UNLOAD_COMPLETE
reserved, open + guest reset = hidden closing, disconnecting; device: closed
reserved, open + device accepts = offered open reserved
reserved, open + device refuses = offered abandoned reserved; signals off
reserved, open + device lets go = offered abandoned reserved; signals off
reserved, open + device withdraws = rescinded closing; RESCIND_CHANNEL_OFFER; signals off
reserved, closing + OPEN = offered reopening
reserved, closing + CLOSE = offered closing; refused
reserved, closing + MODIFY = offered closing; refused; MODIFY_CHANNEL_RESPONSE (failed)
reserved, closing + OPEN_RESERVED = offered reopening
reserved, closing + CLOSE_RESERVED = offered closing; refused
reserved, closing + GPADL_HEADER = offered closing; GPADL_CREATED
reserved, closing + TEARDOWN of the ring = offered closing
reserved, closing + REL_ID_RELEASED = offered closing; refused
reserved, closing + REQUEST_OFFERS = offered closing; refused
reserved, closing + INITIATE_CONTACT = hidden closing, disconnecting
reserved, closing + UNLOAD = hidden closing, disconnecting
reserved, closing + guest reset = hidden closing, disconnecting
reserved, closing + device accepts = offered closing
reserved, closing + device refuses = offered closing
reserved, closing + device lets go = offered closed; CLOSE_RESERVED_RESPONSE to VP 3 SINT 7
reserved, closing + device withdraws = rescinded closing; RESCIND_CHANNEL_OFFER
unloaded, reserved opening + OPEN = hidden opening reserved, disconnected; refused
unloaded, reserved opening + CLOSE = hidden opening reserved, disconnected; refused
unloaded, reserved opening + MODIFY = hidden opening reserved, disconnected; refused
unloaded, reserved opening + OPEN_RESERVED = hidden opening reserved, disconnected; refused
unloaded, reserved opening + CLOSE_RESERVED = hidden opening reserved, disconnected; refused
unloaded, reserved opening + GPADL_HEADER = hidden opening reserved, disconnected; refused
unloaded, reserved opening + TEARDOWN of the ring = hidden opening reserved, disconnected; refused
unloaded, reserved opening + REL_ID_RELEASED = hidden opening reserved, disconnected; refused
unloaded, reserved opening + REQUEST_OFFERS = hidden opening reserved, disconnected; refused
unloaded, reserved opening + INITIATE_CONTACT = hidden closing, disconnecting; device: closed
unloaded, reserved opening + UNLOAD = hidden opening reserved, disconnected; UNLOAD_COMPLETE
unloaded, reserved opening + guest reset = hidden closing, disconnecting; device: closed
unloaded, reserved opening + device accepts = hidden open reserved, disconnected; OPEN_CHANNEL_RESULT to VP 3 SINT 7
unloaded, reserved opening + device refuses = hidden closed, disconnected; OPEN_CHANNEL_RESULT (failed) to VP 3 SINT 7; signals off
unloaded, reserved opening + device lets go = hidden closed, disconnected; OPEN_CHANNEL_RESULT (failed) to VP 3 SINT 7; signals off
unloaded, reserved opening + device withdraws = released closing, disconnected; OPEN_CHANNEL_RESULT (failed) to VP 3 SINT 7; signals off
unloaded, reserved open + OPEN = hidden open reserved, disconnected; refused
unloaded, reserved open + CLOSE = hidden open reserved, disconnected; refused
unloaded, reserved open + MODIFY = hidden open reserved, disconnected; refused
unloaded, reserved open + OPEN_RESERVED = hidden open reserved, disconnected; refused
unloaded, reserved open + CLOSE_RESERVED = hidden closing, disconnected; device: closed
unloaded, reserved open + GPADL_HEADER = hidden open reserved, disconnected; refused
unloaded, reserved open + TEARDOWN of the ring = hidden open reserved, disconnected; refused
unloaded, reserved open + REL_ID_RELEASED = hidden open reserved, disconnected; refused
unloaded, reserved open + REQUEST_OFFERS = hidden open reserved, disconnected; refused
unloaded, reserved open + INITIATE_CONTACT = hidden closing, disconnecting; device: closed
unloaded, reserved open + UNLOAD = hidden open reserved, disconnected; UNLOAD_COMPLETE
unloaded, reserved open + guest reset = hidden closing, disconnecting; device: closed
unloaded, reserved open + device accepts = hidden open reserved, disconnected
unloaded, reserved open + device refuses = hidden closed, disconnected; signals off
unloaded, reserved open + device lets go = hidden closed, disconnected; signals off
unloaded, reserved open + device withdraws = released closing, disconnected; signals off
unloading + OPEN = hidden closing, disconnecting; refused
unloading + CLOSE = hidden closing, disconnecting; refused
unloading + MODIFY = hidden closing, disconnecting; refused
unloading + OPEN_RESERVED = hidden closing, disconnecting; refused
unloading + CLOSE_RESERVED = hidden closing, disconnecting; refused
unloading + GPADL_HEADER = hidden closing, disconnecting; refused
unloading + TEARDOWN of the ring = hidden closing, disconnecting; refused
unloading + REL_ID_RELEASED = hidden closing, disconnecting; refused
unloading + REQUEST_OFFERS = hidden closing, disconnecting; refused
unloading + INITIATE_CONTACT = hidden closing, disconnecting
unloading + UNLOAD = hidden closing, disconnecting; refused
unloading + guest reset = hidden closing, disconnecting
unloading + device accepts = hidden closing, disconnecting
unloading + device refuses = hidden closing, disconnecting
unloading + device lets go = hidden closed, disconnected; UNLOAD_COMPLETE
unloading + device withdraws = released closing, disconnecting
";
