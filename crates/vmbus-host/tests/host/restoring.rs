//! Buses that are held, saved, moved away, and restored; their devices and guests.

use std::sync::{Arc, Mutex};

use kmcl::bus::{Bus, BusEvent, Endpoint, EventSink, Offer};
use saved_state::Save;
use vmbus_host::{
    ChangedOffer, FinishRestoreError, GuestPort, HostBus, HvsockConnect, HvsockHandler, OfferKey,
    OffersDiffer, PostError, RestoreError, SaveOptions,
};
use vmbus_memory::{GuestMemory, MappingBudget};
use vmbus_wire::status::NtStatus;

use crate::bytes::*;
use crate::machine::{DEVICE_REMOVED, RAM, SUCCESS, TYPE, VP_COUNT, instance};
use crate::world::*;

const BUSY: PostError = PostError::Busy { waiting: 0 };

fn key(number: u32) -> OfferKey {
    OfferKey { interface_type: TYPE, interface_instance: instance(number), subchannel_index: 0 }
}

/// The state of a bus, saved as a program does it.
fn saved(bus: &HostBus) -> Vec<u8> {
    let held = bus.hold();
    let mut bytes = Vec::new();
    held.save(&SaveOptions::default()).unwrap().write_to(&mut bytes).unwrap();
    bytes
}

impl World {
    /// Saves the bus and moves it away; what the guest has of it goes on in another process.
    fn move_away(&self) -> Vec<u8> {
        let held = self.bus.hold();
        let mut bytes = Vec::new();
        held.save(&SaveOptions::default()).unwrap().write_to(&mut bytes).unwrap();
        held.move_away();
        bytes
    }

    /// The other process: the guest's memory, another port, no devices yet.
    fn restoring(&self, saved: &[u8]) -> Self {
        let world = Self::new();
        let memory = self.memory.clone();
        world.port.machine().memory = Some(memory.clone());
        let port: Arc<dyn GuestPort> = Arc::clone(&world.port) as _;
        let budget = MappingBudget::new(MAPPINGS);
        let bus = HostBus::restoring(port, budget.clone(), saved).unwrap();
        Self { bus, memory, budget, ..world }
    }

    #[track_caller]
    fn differ(&self) -> OffersDiffer {
        match self.bus.finish_restore() {
            Err(FinishRestoreError::OffersDiffer(differ)) => differ,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_bus_that_is_held_stands_still() {
    let (world, device) = World::connected(V5_3);
    let first = world.bus.hold();
    let second = world.bus.hold();
    assert_eq!(world.bus.guest_message(&whole_pages(1, 6, &[1])[0]), Err(BUSY));
    assert_eq!(BUSY.hypercall_status(), 19);
    // Devices are heard, and wait for nothing; the guest hears of it later.
    let late = world.offer(2);
    drop(device);
    assert_eq!(world.messages(), NONE);
    assert!(first.bus().usage().messages == 2);
    drop(first);
    assert_eq!(world.messages(), NONE, "held by another");
    drop(second);
    assert_eq!(world.messages(), [offered(TYPE, instance(2), 0, 2), rescind(1)]);
    world.post(&whole_pages(2, 6, &[1])[0]);
    assert_eq!(world.messages(), [gpadl_created(2, 6, SUCCESS)]);
    drop(late);
}

#[test]
fn what_a_step_has_begun_is_done_before_the_bus_stands_still() {
    let (world, device) = World::connected(V5_3);
    whole_pages(1, RING, &PAGES).iter().for_each(|message| world.post(message));
    world.messages();
    // A call of the port is under way when another thread holds the bus: that waits for the call, and for
    // what comes of it.
    let (called, wait) = std::sync::mpsc::channel();
    let bus = world.bus.clone();
    world.port.machine().during_listen = Some(Box::new(move || {
        called.send(()).unwrap();
        while !matches!(bus.guest_message(&[]), Err(PostError::Busy { .. })) {
            std::thread::yield_now();
        }
    }));
    let bus = world.bus.clone();
    let holder = std::thread::spawn(move || {
        wait.recv().unwrap();
        let held = bus.hold();
        (bus.active_channels(), held)
    });
    world.post(&open(1, 0x77, RING, 0, 4));
    let (active, held) = holder.join().unwrap();
    assert_eq!(active, 1, "the bus stood still in the middle of an open");
    drop(device.rings());
    drop(held);

    // From inside of a call it does not wait for that call.
    let (bus, held) = (world.bus.clone(), Arc::new(Mutex::new(None)));
    let result = Arc::clone(&held);
    world.port.machine().during_post = Some(Box::new(move || {
        *result.lock().unwrap() = Some(bus.hold());
    }));
    device.link.open_result(NtStatus::SUCCESS);
    assert_eq!(world.messages(), [open_result(1, 0x77, SUCCESS)]);
    assert_eq!(world.bus.guest_message(&close(1)), Err(BUSY));
    drop(held.lock().unwrap().take());
    world.post(&close(1));
}

#[test]
fn a_save_that_is_thrown_away_changes_nothing() {
    let (world, device) = World::connected(V5_3);
    let rings = world.open(&device, 1);
    let before = world.bus.inspect(Clone::clone);
    assert_eq!(saved(&world.bus), saved(&world.bus));
    world.bus.inspect(|host| assert_eq!(*host, before));
    rings.signal.signal();
    assert_eq!(world.signals(), [(3, 2, 1)]);
    world.post(&close(1));
    assert!(device.is_told_of_the_close());
}

#[test]
fn a_save_has_the_state_of_its_moment() {
    let (world, device) = World::connected(V5_3);
    let held = world.bus.hold();
    let mut save = held.save(&SaveOptions::default()).unwrap();
    let mut bytes = vec![0; 400];
    let step = save.step(&mut bytes).unwrap();
    bytes.truncate(step.written);
    let moment = world.bus.inspect(Clone::clone);
    // A device says something between two steps.
    device.link.revoke();
    save.write_to(&mut bytes).unwrap();
    assert_eq!(vmbus_host::Host::restore(&bytes), Ok(moment));
}

#[test]
fn a_bus_that_has_moved_away_does_nothing() {
    let (world, device) = World::connected(V5_3);
    let rings = world.open(&device, 1);
    world.port.machine().full.push(crate::machine::SLOT);
    world.post(&gpadl_teardown(1, RING)); // held back by the ring
    let _state = world.move_away();
    world.port.machine().full.clear();

    assert!(matches!(world.bus.guest_message(&close(1)), Err(PostError::Busy { .. })));
    assert!(world.bus.guest_signal(0x2001, 0).is_err());
    rings.signal.signal();
    assert_eq!(world.signals(), []);
    device.link.closed();
    device.link.revoke();
    device.link.set_gpadl_in_use(RING, true);
    drop(device);
    world.bus.messages_drained();
    world.bus.guest_reset();
    assert_eq!(world.messages(), NONE);
    assert_eq!(world.port.machine().listening.len(), 1, "the port was left alone");
    assert_eq!(world.bus.active_channels(), 0);
}

#[test]
fn an_open_channel_goes_on_elsewhere() {
    let (world, device) = World::connected(V5_3);
    let rings = world.open(&device, 1);
    rings.outgoing.write(0, b"before the move");
    world.post(&whole_pages(1, 6, &[1])[0]); // its answer was given
    world.messages();
    world.port.machine().full.push(crate::machine::SLOT);
    world.post(&gpadl_teardown(1, 6)); // this one's was not
    let state = world.move_away();

    let next = world.restoring(&state);
    let device = next.offer(1);
    assert!(device.hears_nothing());
    assert_eq!(next.bus.guest_message(&close(1)), Err(PostError::Busy { waiting: 0 }));
    assert_eq!(next.messages(), NONE);
    next.bus.finish_restore().unwrap();
    assert_eq!(next.messages(), [gpadl_torndown(6)], "what waited goes out");

    let rings = device.rings();
    assert!(rings.resumed);
    assert_eq!(rings.user_data, [0x5a; 120]);
    let mut found = [0; 15];
    rings.outgoing.read(0, &mut found);
    assert_eq!(&found, b"before the move");
    device.link.open_result(NtStatus::SUCCESS);
    assert_eq!(next.messages(), NONE, "the guest knows that it is open");
    rings.signal.signal();
    assert_eq!(next.signals(), [(3, 2, 1)]);
    next.port.machine().listening[&0x2001].ring();
    assert_eq!(next.bus.guest_signal(0x2001, 0), Ok(()));
    assert_eq!(device.rung(), 2);

    // And on, as if nothing had been.
    next.post(&close(1));
    next.post(&gpadl_teardown(1, RING));
    assert!(device.is_told_of_the_close());
    drop(rings);
    device.link.closed();
    assert_eq!(next.messages(), [gpadl_torndown(RING)]);
    next.nothing_left(1);
    assert!(matches!(next.bus.finish_restore(), Err(FinishRestoreError::NotRestoring)));
}

#[test]
fn a_device_that_cannot_go_on_has_let_go_of_its_channel() {
    let (world, device) = World::connected(V5_3);
    let _rings = world.open(&device, 1);
    let next = world.restoring(&world.move_away());
    let device = next.offer(1);
    next.bus.finish_restore().unwrap();
    drop(device.rings());
    device.link.open_result(NtStatus::UNSUCCESSFUL);
    assert_eq!((next.bus.active_channels(), next.budget.left()), (0, MAPPINGS));
    assert!(device.hears_nothing());
    drop(device);
    assert_eq!(next.messages(), [rescind(1)]);
}

#[derive(Default)]
struct Requests(Mutex<Vec<HvsockConnect>>);

impl HvsockHandler for Requests {
    fn connect(&self, request: HvsockConnect) {
        self.0.lock().unwrap().push(request);
    }
}

#[test]
fn what_was_not_answered_is_asked_again() {
    let world = World::new();
    let devices = [1, 2, 3].map(|number| world.offer(number));
    let requests = Arc::new(Requests::default());
    world.bus.set_hvsock_handler(Arc::clone(&requests) as _);
    world.post(&plain_contact(V5_3, 0));
    world.post(&request_offers());
    world.messages();
    let _rings = world.open(&devices[0], 1);
    for channel in [2, 3] {
        whole_pages(channel, RING, &PAGES).iter().for_each(|message| world.post(message));
    }
    // 2 is being opened; 3 was opened, and closed before its device has answered, and opened again.
    world.post(&open(2, 0x78, RING, 0, 4));
    world.post(&open(3, 0x79, RING, 0, 4));
    devices[2].link.open_result(NtStatus::SUCCESS);
    world.post(&close(3));
    world.post(&open(3, 0x7a, RING, 0, 4));
    world.post(&tl_connect(instance(10), instance(11)));
    // Half a GPADL.
    let mut half = whole_pages(1, 6, &(0..40).collect::<Vec<_>>());
    world.post(&half.remove(0));
    world.messages();
    let state = world.move_away();
    requests.0.lock().unwrap().clear(); // refused, and nobody hears of it
    assert_eq!(world.messages(), NONE);

    let next = world.restoring(&state);
    let requests = Arc::new(Requests::default());
    next.bus.set_hvsock_handler(Arc::clone(&requests) as _);
    // In another order than before.
    let [third, first, second] = [3, 1, 2].map(|number| next.offer(number));
    next.bus.finish_restore().unwrap();
    assert!(first.rings().resumed);
    assert!(!second.rings().resumed);
    assert!(!third.rings().resumed, "its former device has let go with the move");
    assert_eq!(next.messages(), NONE);
    second.link.open_result(NtStatus::SUCCESS);
    third.link.open_result(NtStatus::DEVICE_NOT_READY);
    let not_ready = NtStatus::DEVICE_NOT_READY.0;
    let results = [open_result(2, 0x78, SUCCESS), open_result(3, 0x7a, not_ready)];
    assert_eq!(next.messages(), results);
    let request = requests.0.lock().unwrap().pop().unwrap();
    assert_eq!((request.endpoint_id(), request.service_id()), (instance(10), instance(11)));
    request.refuse(NtStatus::CONNECTION_REFUSED);
    let refused = tl_result(instance(10), instance(11), NtStatus::CONNECTION_REFUSED.0);
    assert_eq!(next.messages(), [refused]);
    next.post(&half.remove(0));
    assert_eq!(next.messages(), [gpadl_created(1, 6, SUCCESS)]);
}

#[test]
fn an_interrupt_that_was_being_moved_is_moved() {
    let (world, device) = World::connected(V5_3);
    let _rings = world.open(&device, 1);
    // Saved before the effect of MODIFY_CHANNEL was performed: as the machine alone says.
    let mut host = world.bus.inspect(Clone::clone);
    host.guest_message(1, &modify(1, 1), &mut Vec::new()).unwrap();
    let mut state = Vec::new();
    host.save(&SaveOptions::default()).unwrap().write_to(&mut state).unwrap();

    let next = world.restoring(&state);
    let device = next.offer(1);
    next.bus.finish_restore().unwrap();
    let rings = device.rings();
    assert_eq!(next.messages(), [modified(1, SUCCESS)]);
    rings.signal.signal();
    assert_eq!(next.signals(), [(1, 2, 1)]);
}

#[test]
fn other_offers_than_those_saved_are_refused_one_by_one() {
    let world = World::new();
    let mut changing = Offer::new(TYPE, instance(3));
    changing.user_defined[0] = 7;
    changing.mmio_megabytes = 4;
    let devices = (world.offer(1), world.offer(2), world.offer_as(changing.clone()));
    let state = world.move_away();
    drop(devices);

    let next = world.restoring(&state);
    let second = next.offer(2);
    changing.mmio_megabytes = 5;
    changing.pipe = true;
    let third = next.offer_as(changing.clone());
    let (fourth, fifth) = (next.offer(4), next.offer(5));
    let changed = |field, saved: &str, offered: &str| ChangedOffer {
        key: key(3),
        field,
        saved: saved.into(),
        offered: offered.into(),
    };
    let mut expected = OffersDiffer {
        missing: vec![key(1)],
        extra: vec![key(5), key(4)],
        changed: vec![changed("pipe", "false", "true"), changed("mmio_megabytes", "4", "5")],
    };
    assert_eq!(next.differ(), expected);
    let name = |number: u32| {
        format!("{TYPE} instance {number:08x}-0000-0000-0000-000000000000 subchannel 0")
    };
    assert_eq!(
        expected.to_string(),
        [
            format!("missing: {}", name(1)),
            format!("extra: {}", name(5)),
            format!("extra: {}", name(4)),
            format!("changed: {}: pipe was false, is true", name(3)),
            format!("changed: {}: mmio_megabytes was 4, is 5", name(3)),
        ]
        .join("\n")
    );
    // Twice is as wrong as anywhere.
    for number in [2, 4] {
        let (events, _recorder) = EventSink::recorder();
        let endpoint = Endpoint { events, doorbell: Arc::new(Bell::default()) };
        let refused = next.bus.offer(Offer::new(TYPE, instance(number)), endpoint);
        assert_eq!(refused.err(), Some(NtStatus::INVALID_PARAMETER));
    }
    drop(fourth);
    fifth.link.revoke();
    drop(third);
    expected.extra.clear();
    expected.changed.clear();
    expected.missing.push(key(3));
    assert_eq!(next.differ(), expected);
    changing.mmio_megabytes = 4;
    changing.pipe = false;
    let third = next.offer_as(changing);
    second.link.revoke(); // takes the offer back
    let first = next.offer(1);
    assert_eq!(next.differ().missing, [key(2)]);
    let again = next.offer(2);
    drop(second); // of which the bus has known nothing for a while
    next.bus.finish_restore().unwrap();
    assert_eq!(next.bus.usage().channels, 3);
    assert_eq!(next.messages(), NONE);
    drop((first, third, again, fifth));
}

/// A device that takes its offer back, and is dropped, leaves the offer as it was.
#[test]
fn an_offer_that_was_taken_back_can_be_made_again() {
    let (world, device) = World::connected(V5_3);
    let _rings = world.open(&device, 1);
    let next = world.restoring(&world.move_away());
    let given_up = next.offer(1);
    given_up.link.revoke();
    drop(given_up);
    let device = next.offer(1);
    next.bus.finish_restore().unwrap();
    assert_eq!(next.bus.usage().channels, 1);
    assert_eq!(next.messages(), NONE);
    drop(device);
}

#[test]
fn another_machine_is_refused() {
    let (world, device) = World::connected(V5_3);
    let _rings = world.open(&device, 1);
    let next = world.restoring(&world.move_away());
    let device = next.offer(1);
    next.port.machine().memory = None;
    assert!(matches!(next.bus.finish_restore(), Err(FinishRestoreError::NoGuest)));
    next.port.machine().memory = Some(GuestMemory::memfd(RAM[0].1 / 2).unwrap());
    let error = next.bus.finish_restore().unwrap_err();
    assert!(
        matches!(
            error,
            FinishRestoreError::Ram {
                saved_pages: 4096,
                found_pages: 2048,
                pfn: 2048,
                saved: true
            }
        ),
        "{error:?}"
    );
    assert_eq!(
        error.to_string(),
        "the guest has 2048 pages of RAM, saved were 4096; page frame 0x800 was RAM, and is none now"
    );
    next.port.machine().memory = Some(GuestMemory::memfd(RAM[0].1 * 2).unwrap());
    let error = next.bus.finish_restore().unwrap_err();
    let more = matches!(error, FinishRestoreError::Ram { pfn: 4096, saved: false, .. });
    assert!(more, "{error:?}");
    next.port.machine().memory = Some(world.memory.clone());
    next.port.machine().vp_count = Some(VP_COUNT + 1);
    let error = next.bus.finish_restore().unwrap_err();
    let count = matches!(error, FinishRestoreError::VpCount { saved: VP_COUNT, found: 5 });
    assert!(count, "{error:?}");
    next.port.machine().vp_count = None;
    assert!(device.hears_nothing());
    next.bus.finish_restore().unwrap();
    assert!(device.rings().resumed);
}

#[test]
fn a_channel_that_cannot_be_resumed_leaves_everything_as_it_was() {
    let world = World::new();
    let devices = [1, 2].map(|number| world.offer(number));
    world.post(&plain_contact(V5_3, 0));
    world.post(&request_offers());
    world.messages();
    let _rings = [world.open(&devices[0], 1), world.open(&devices[1], 2)];
    let next = world.restoring(&world.move_away());
    let devices = [1, 2].map(|number| next.offer(number));
    let port = Arc::clone(&next.port);
    // The second of two.
    next.port.machine().during_listen = Some(Box::new(move || {
        let again = Arc::clone(&port);
        port.machine().during_listen = Some(Box::new(move || again.machine().cannot_listen = true));
    }));
    let error = next.bus.finish_restore().unwrap_err();
    let FinishRestoreError::Resume { key: whose, why } = &error else { panic!("{error:?}") };
    assert_eq!((*whose, why.contains("no signals")), (key(2), true), "{why}");
    assert!(devices.iter().all(Device::hears_nothing));
    assert_eq!(next.port.machine().listening.len(), 0);
    assert_eq!((next.bus.active_channels(), next.budget.left()), (0, MAPPINGS));
    next.port.machine().cannot_listen = false;
    next.bus.finish_restore().unwrap();
    assert!(devices.iter().all(|device| device.rings().resumed));
}

#[test]
fn a_guest_that_is_reset_before_the_restore_is_finished_finds_everything_closed() {
    let (world, device) = World::connected(V5_3);
    let _rings = world.open(&device, 1);
    let next = world.restoring(&world.move_away());
    let device = next.offer(1);
    next.bus.guest_reset();
    next.bus.finish_restore().unwrap();
    assert!(device.hears_nothing());
    next.post(&plain_contact(V5_3, 0));
    assert_eq!(next.messages(), [accepted(V5_3)]);
    next.nothing_left(1);
}

#[test]
fn the_guest_changes_while_a_restore_is_finished() {
    // A reset comes in the middle of preparing the rings: they are given back, and not told of.
    let (world, device) = World::connected(V5_3);
    let _rings = world.open(&device, 1);
    let next = world.restoring(&world.move_away());
    let device = next.offer(1);
    let bus = next.bus.clone();
    next.port.machine().during_listen = Some(Box::new(move || {
        bus.guest_reset();
        let second = bus.finish_restore();
        assert!(matches!(second, Err(FinishRestoreError::NotRestoring)), "under way");
    }));
    next.bus.finish_restore().unwrap();
    assert!(device.hears_nothing());
    next.nothing_left(1);
}

#[test]
fn a_channel_that_is_to_be_new_is_offered_anew() {
    let world = World::new();
    let mut offer = Offer::new(TYPE, instance(1));
    offer.force_new_channel = true;
    let device = world.offer_as(offer.clone());
    world.post(&plain_contact(V5_3, 0));
    world.post(&request_offers());
    world.messages();
    let _rings = world.open(&device, 1);
    let state = world.move_away();

    let next = world.restoring(&state);
    assert_eq!(next.differ().missing, [key(1)]);
    let dropped = next.offer_as(offer.clone());
    drop(dropped);
    assert_eq!(next.differ().missing, [key(1)]);
    let device = next.offer_as(offer);
    next.bus.finish_restore().unwrap();
    assert!(device.hears_nothing(), "nobody has opened it");
    assert_eq!(next.messages(), [rescind(1)]);
    next.post(&release(1));
    let messages = next.messages();
    assert_eq!(messages.len(), 1);
    assert_eq!(messages[0][..32], offered(TYPE, instance(1), 0, 3)[..32]);
    assert_eq!(DEVICE_REMOVED, NtStatus::DEVICE_REMOVED.0);
}

#[test]
fn a_bus_without_a_guest_is_saved_and_gets_one() {
    let world = World::new();
    world.port.machine().memory = None;
    world.bus.guest_reset();
    let _device = world.offer(1);
    let next = world.restoring(&world.move_away());
    let _device = next.offer(1);
    next.bus.finish_restore().unwrap();
    next.post(&plain_contact(V5_3, 3)); // its processors are known
    assert_eq!(next.bus.usage().messages, 0);
}

#[test]
fn a_restored_bus_can_be_saved_before_it_goes_on() {
    let (world, device) = World::connected(V5_3);
    let _rings = world.open(&device, 1);
    let state = world.move_away();
    let next = world.restoring(&state);
    assert_eq!(saved(&next.bus), state);
    let third = next.restoring(&saved(&next.bus));
    let device = third.offer(1);
    third.bus.finish_restore().unwrap();
    assert!(device.rings().resumed);
}

#[test]
fn a_channel_that_goes_on_elsewhere_by_itself_leaves_its_guest_a_closed_one() {
    let (world, device) = World::connected(V5_3);
    let rings = world.open(&device, 1);
    device.link.moved_away();
    drop(device.link);
    assert_eq!(world.messages(), NONE);
    rings.signal.signal();
    assert_eq!(world.signals(), []);
    world.post(&gpadl_teardown(1, RING));
    world.post(&close(1));
    assert_eq!(world.messages(), [gpadl_torndown(RING)], "nobody else would say so");
    assert_eq!(world.bus.active_channels(), 0);
    whole_pages(1, RING, &PAGES).iter().for_each(|message| world.post(message));
    world.post(&open(1, 0x77, RING, 0, 4));
    let cancelled = open_result(1, 0x77, NtStatus::CANCELLED.0);
    assert_eq!(world.messages(), [gpadl_created(1, RING, SUCCESS), cancelled]);
    assert!(matches!(device.events.take()[..], [] | [BusEvent::PeerClosed]));
}

#[test]
fn bytes_that_are_no_state_make_no_bus() {
    let world = World::new();
    let port: Arc<dyn GuestPort> = Arc::clone(&world.port) as _;
    let refused = HostBus::restoring(port, MappingBudget::new(1), b"not a state");
    assert!(matches!(refused.err(), Some(RestoreError::Stream(_))));
}
