//! The bus: devices on one side, a port to a guest on the other.

use std::sync::{Arc, Mutex};

use kmcl::bus::{Bus, BusEvent, Endpoint, EventSink, Offer, OpenRings, Target};
use vmbus_host::limits::MAX_WAITING_EFFECTS;
use vmbus_host::{HvsockConnect, HvsockHandler, OfferId, PostError, SignalError};
use vmbus_memory::GuestMemory;
use vmbus_wire::status::NtStatus;

use crate::bytes::*;
use crate::machine::{RAM, SLOT, SUCCESS, TYPE, VP_COUNT, instance};
use crate::world::*;

#[test]
fn a_device_gets_rings_signals_and_memory() {
    let (world, device) = World::connected(V5_3);
    let rings = world.open(&device, 1);
    assert_eq!((rings.incoming.data_len(), rings.outgoing.data_len()), (3 * 4096, 3 * 4096));
    assert!(rings.incoming.is_mapped() && world.budget.left() < MAPPINGS);
    assert_eq!(rings.user_data, [0x5a; 120]);
    assert!(rings.residency.is_none());
    // The guest's first ring is the one the device reads: control page 10, data from page 11 on.
    world.memory.write(11 << 12, b"to the host").unwrap();
    let mut found = [0; 11];
    rings.incoming.read(0, &mut found);
    assert_eq!(&found, b"to the host");
    rings.outgoing.write(0, b"to the guest");
    let mut found = [0; 12];
    world.memory.read(21 << 12, &mut found).unwrap();
    assert_eq!(&found, b"to the guest");
    rings.memory.write(0x5000, b"external").unwrap();

    rings.signal.signal();
    assert_eq!(world.signals(), [(3, 2, 1)]);
    world.port.machine().listening[&0x2001].ring();
    assert_eq!(world.bus.guest_signal(0x2001, 0), Ok(()));
    assert_eq!(world.bus.guest_signal(0xff00_2001, 0), Ok(()), "24 bits count");
    assert_eq!(device.rung(), 3);

    world.post(&close(1));
    world.post(&gpadl_teardown(1, RING));
    assert!(device.is_told_of_the_close());
    rings.signal.signal();
    assert_eq!(world.signals(), [], "the guest has closed the channel");
    assert_eq!(world.messages(), NONE);
    assert!(world.budget.left() < MAPPINGS, "mapped for as long as the device has it");
    drop(rings);
    device.link.closed();
    assert_eq!(world.messages(), [gpadl_torndown(RING)]);
    world.nothing_left(1);
}

#[test]
fn signals_to_nobody() {
    let (world, device) = World::connected(V5_3);
    let unknown = |connection_id| Err(SignalError::UnknownConnection { connection_id });
    assert_eq!(world.bus.guest_signal(0x2001, 0), unknown(0x2001), "closed");
    let _rings = world.open(&device, 1);
    for connection_id in [0, 1, 2, 3, 4, 0x2000, 0x2002] {
        assert_eq!(world.bus.guest_signal(connection_id, 0), unknown(connection_id));
    }
    assert_eq!(unknown(7).unwrap_err().hypercall_status(), 18);
    let flag = world.bus.guest_signal(0x2001, 1).unwrap_err();
    assert_eq!((flag, flag.hypercall_status()), (SignalError::UnknownFlag { flag: 1 }, 5));
    assert_eq!(device.rung(), 0);
}

#[test]
fn an_open_that_cannot_be_prepared_fails_and_leaks_nothing() {
    let (world, device) = World::connected(V5_3);
    whole_pages(1, RING, &PAGES).iter().for_each(|message| world.post(message));
    world.messages();
    let failed = |status: NtStatus| [open_result(1, 0x77, status.0)];
    for what in ["listen", "signal"] {
        world.port.machine().cannot_listen = what == "listen";
        world.port.machine().cannot_signal = what == "signal";
        world.post(&open(1, 0x77, RING, 0, 4));
        assert_eq!(world.messages(), failed(NtStatus::INSUFFICIENT_RESOURCES), "{what}");
        assert!(device.hears_nothing(), "{what}");
        assert_eq!(world.bus.active_channels(), 0, "{what}");
        assert_eq!(world.budget.left(), MAPPINGS, "{what}");
    }
    world.port.machine().cannot_signal = false;
    // A device that refuses.
    world.post(&open(1, 0x77, RING, 0, 4));
    drop(device.rings());
    device.link.open_result(NtStatus::DEVICE_NOT_READY);
    assert_eq!(world.messages(), failed(NtStatus::DEVICE_NOT_READY));
    assert_eq!((world.bus.active_channels(), world.budget.left()), (0, MAPPINGS));
    assert!(device.hears_nothing());
    world.post(&gpadl_teardown(1, RING));
    assert_eq!(world.messages(), [gpadl_torndown(RING)]);
    world.open(&device, 1);
}

#[test]
fn a_message_waits_for_its_slot_and_is_not_lost() {
    let (world, _device) = World::connected(V5_3);
    world.port.machine().full.push(SLOT);
    world.post(&whole_pages(1, 6, &[1])[0]);
    world.post(&gpadl_teardown(1, 6));
    assert_eq!(world.messages(), NONE);
    assert_eq!(world.bus.usage().messages, 2);
    world.bus.messages_drained(); // a false alarm
    assert_eq!(world.messages(), NONE);
    world.port.machine().full.clear();
    world.bus.messages_drained();
    assert_eq!(world.messages(), [gpadl_created(1, 6, SUCCESS), gpadl_torndown(6)]);

    // The guest empties the slot just when the port finds it full.
    world.port.machine().full.push(SLOT);
    let (bus, port) = (world.bus.clone(), Arc::clone(&world.port));
    world.port.machine().during_post = Some(Box::new(move || {
        port.machine().full.clear();
        bus.messages_drained();
    }));
    world.post(&whole_pages(1, 8, &[1])[0]);
    assert_eq!(world.messages().len(), 1, "nobody will say again that the slot is empty");
}

#[test]
fn a_port_may_call_the_bus_from_inside() {
    let (world, device) = World::connected(V5_3);
    // The guest answers each message at once, on the same stack; a reset comes while the bus is
    // preparing an open.
    let bus = world.bus.clone();
    world.port.machine().during_post = Some(Box::new(move || {
        bus.guest_message(&gpadl_teardown(1, RING)).unwrap();
        bus.messages_drained();
    }));
    world.post(&whole_pages(1, RING, &[1])[0]);
    assert_eq!(world.messages(), [gpadl_created(1, RING, SUCCESS), gpadl_torndown(RING)]);

    whole_pages(1, RING, &PAGES).iter().for_each(|message| world.post(message));
    world.messages();
    let bus = world.bus.clone();
    world.port.machine().during_listen = Some(Box::new(move || bus.guest_reset()));
    world.post(&open(1, 0x77, RING, 0, 4));
    let events = device.events.take();
    assert!(matches!(events[..], [BusEvent::Opened(_), BusEvent::PeerClosed]), "in this order");
    drop(events);
    device.link.open_result(NtStatus::UNSUCCESSFUL);
    assert_eq!(world.messages(), NONE);
    world.nothing_left(1);
}

#[test]
fn a_port_that_takes_long_is_not_flooded() {
    let world = World::new();
    let devices = [1, 2].map(|number| world.offer(number));
    world.post(&plain_contact(V4_1, 0)); // whose changes of VP are not answered
    world.post(&request_offers());
    world.messages();
    let _rings = world.open(&devices[0], 1);
    whole_pages(2, RING, &PAGES).iter().for_each(|message| world.post(message));
    let bus = world.bus.clone();
    world.port.machine().during_listen = Some(Box::new(move || {
        let taken = (0..u32::MAX).take_while(|_| bus.guest_message(&modify(1, 2)).is_ok()).count();
        assert_eq!(taken, MAX_WAITING_EFFECTS);
        let busy = PostError::Busy { waiting: MAX_WAITING_EFFECTS };
        assert_eq!(bus.guest_message(&modify(1, 2)), Err(busy));
    }));
    world.post(&open(2, 0x77, RING, 0, 4));
    world.post(&modify(1, 2));
    drop(devices[1].rings());
}

#[test]
fn an_open_of_a_guest_that_has_gone_is_not_made_in_the_next_one_s_memory() {
    let world = World::new();
    let devices = [1, 2].map(|number| world.offer(number));
    world.post(&plain_contact(V5_3, 0));
    world.post(&request_offers());
    for channel in [1, 2] {
        whole_pages(channel, RING, &PAGES).iter().for_each(|message| world.post(message));
    }
    world.messages();
    let (bus, port) = (world.bus.clone(), Arc::clone(&world.port));
    world.port.machine().during_listen = Some(Box::new(move || {
        bus.guest_message(&open(2, 0x77, RING, 0, 4)).unwrap();
        port.machine().memory = Some(GuestMemory::memfd(RAM[0].1).unwrap());
        bus.guest_reset();
    }));
    world.post(&open(1, 0x77, RING, 0, 4));
    assert!(devices[1].hears_nothing());
    assert!(matches!(devices[0].events.take()[..], [BusEvent::Opened(_), BusEvent::PeerClosed]));
    devices[0].link.open_result(NtStatus::SUCCESS);
    devices[0].link.closed();
    world.post(&plain_contact(V5_3, 0));
    assert_eq!(world.messages(), [accepted(V5_3)], "it does not wait for the second device");
    world.nothing_left(2);
}

#[test]
fn a_port_that_panics_does_not_stop_the_bus() {
    let (world, _device) = World::connected(V5_3);
    world.port.machine().during_post = Some(Box::new(|| panic!("a port's mistake")));
    let message = whole_pages(1, 6, &[1]).remove(0);
    let posted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.post(&message)));
    assert!(posted.is_err());
    world.bus.messages_drained();
    assert_eq!(world.messages(), [gpadl_created(1, 6, SUCCESS)]);
}

#[test]
fn interrupts_move_before_the_answer_leaves() {
    let (world, device) = World::connected(V5_3);
    let rings = world.open(&device, 1);
    // While the answer is delivered, a signal goes to the new VP already.
    let signal = Arc::clone(&rings.signal);
    world.port.machine().during_post = Some(Box::new(move || signal.signal()));
    world.post(&modify(1, 2));
    assert_eq!(world.messages(), [modified(1, SUCCESS)]);
    assert_eq!(world.signals(), [(2, 2, 1)]);

    world.port.machine().cannot_signal = true;
    world.post(&modify(1, 0));
    assert_eq!(world.messages(), [modified(1, NtStatus::INSUFFICIENT_RESOURCES.0)]);
    rings.signal.signal();
    assert_eq!(world.signals(), [(2, 2, 1)], "where they went before");
}

#[test]
fn a_guest_of_old_is_signalled_and_signals_through_its_page() {
    let page = 0x3000;
    let world = World::new();
    let devices = [1, 2, 3].map(|number| world.offer(number));
    world.post(&contact(V0_13, 0, page).done());
    world.post(&request_offers());
    world.messages();
    for (channel, device) in (1..).zip(&devices[..2]) {
        let gpadl = RING + channel;
        whole_pages(channel, gpadl, &PAGES).iter().for_each(|message| world.post(message));
        world.post(&open(channel, 1, gpadl, 0, 4));
        device.link.open_result(NtStatus::SUCCESS);
    }
    let rings: Vec<OpenRings> = devices[..2].iter().map(Device::rings).collect();
    let word = |offset: u64| world.memory.read_obj::<u32>(page + offset).unwrap();
    world.memory.write_obj(page, &0x8000_0000_u32).unwrap();
    rings[1].signal.signal();
    assert_eq!(word(0), 0x8000_0004, "bit 2, and what was there");
    assert_eq!(world.signals(), [(0, 2, 0)]);

    // The guest sets bits of channel 2, which is open, of 3, which is not, and of 70 and 1000.
    world.memory.write_obj(page + 2048, &0b1100_u32).unwrap();
    world.memory.write_obj(page + 2048 + 8, &(1_u32 << 6)).unwrap();
    world.memory.write_obj(page + 2048 + 124, &(1_u32 << 8)).unwrap();
    assert_eq!(world.bus.guest_signal(2, 0), Ok(()));
    assert_eq!(devices.each_ref().map(Device::rung), [0, 1, 0]);
    assert_eq!((word(2048), word(2048 + 8), word(2048 + 124)), (0, 0, 0), "taken");
    assert_eq!(world.bus.guest_signal(2, 0), Ok(()));
    assert_eq!(devices.each_ref().map(Device::rung), [0, 0, 0]);
    // It may also use the connection of the channel itself.
    assert_eq!(world.bus.guest_signal(0x2001, 0), Ok(()));
    assert_eq!(devices.each_ref().map(Device::rung), [1, 0, 0]);

    // When it has gone, its page is not touched.
    world.memory.write_obj(page, &0_u32).unwrap();
    world.post(&unload());
    rings[0].signal.signal();
    assert_eq!((word(0), world.signals().len()), (0, 0));
    assert!(world.bus.guest_signal(2, 0).is_err());
}

#[test]
fn the_next_guest_finds_its_own_memory_when_devices_have_let_go() {
    let (world, device) = World::connected(V5_3);
    let rings = world.open(&device, 1);
    let next_memory = GuestMemory::memfd(RAM[0].1).unwrap();
    world.port.machine().memory = Some(next_memory.clone());
    world.bus.guest_reset();
    assert!(device.is_told_of_the_close());
    world.post(&plain_contact(V5_3, 0));
    assert_eq!(world.messages(), NONE, "the device has the former guest's rings");
    drop(rings);
    device.link.closed();
    assert_eq!(world.messages(), [accepted(V5_3)]);
    world.post(&request_offers());
    world.messages();
    let rings = world.open(&device, 1);
    rings.outgoing.write(0, b"next");
    let mut found = [0; 4];
    next_memory.read(21 << 12, &mut found).unwrap();
    assert_eq!(&found, b"next");
    drop(rings);
    // No guest at all.
    world.port.machine().memory = None;
    world.bus.guest_reset();
    device.link.closed();
    let refused = world.bus.post_message(4, &plain_contact(V5_3, 0));
    assert!(matches!(refused, Err(PostError::Refused(_))), "{refused:?}");
    world.nothing_left(1);
}

#[test]
fn a_device_that_is_dropped_is_withdrawn() {
    let (world, device) = World::connected(V5_3);
    let rings = world.open(&device, 1);
    world.post(&gpadl_teardown(1, RING));
    drop(rings);
    let Device { link, events, .. } = device;
    drop(link);
    assert_eq!(world.messages(), [gpadl_torndown(RING), rescind(1)]);
    assert!(events.take().is_empty());
    world.post(&release(1));
    world.nothing_left(0);

    // By itself, and then dropped; while the guest is opening it.
    let device = world.offer(1);
    whole_pages(2, RING, &PAGES).iter().for_each(|message| world.post(message));
    world.post(&open(2, 0x77, RING, 0, 4));
    world.messages();
    device.link.revoke();
    let expected = [open_result(2, 0x77, NtStatus::DEVICE_REMOVED.0), rescind(2)];
    assert_eq!(world.messages(), expected);
    drop(device);
    assert_eq!(world.messages(), NONE);
    world.post(&release(2));
    world.nothing_left(0);
}

#[test]
fn a_device_that_is_dropped_while_the_guest_waits_to_open_it_again() {
    let (world, device) = World::connected(V5_3);
    drop(world.open(&device, 1));
    world.post(&close(1));
    world.post(&open(1, 0x78, RING, 0, 4));
    assert!(device.is_told_of_the_close());
    drop(device);
    let removed = NtStatus::DEVICE_REMOVED.0;
    assert_eq!(world.messages(), [open_result(1, 0x78, removed), rescind(1)]);
    world.post(&release(1));
    world.nothing_left(0);
}

#[test]
fn a_device_that_has_let_go_by_itself_is_not_told_of_the_close() {
    let world = World::new();
    let [first, second] = [1, 2].map(|number| world.offer(number));
    world.post(&plain_contact(V5_3, 0));
    world.post(&request_offers());
    world.messages();
    drop(world.open(&first, 1));
    whole_pages(2, RING, &PAGES).iter().for_each(|message| world.post(message));
    // The two cross while the bus is busy with another channel.
    let bus = world.bus.clone();
    let Device { link, events, .. } = first;
    world.port.machine().during_listen = Some(Box::new(move || {
        bus.guest_message(&close(1)).unwrap();
        link.closed();
        std::mem::forget(link); // keeps the offer
    }));
    world.post(&open(2, 0x77, RING, 0, 4));
    drop(second.rings());
    assert!(events.take().is_empty());
    assert_eq!(world.bus.active_channels(), 1, "but its signals are off");
}

#[test]
fn a_device_looks_up_the_gpadls_of_its_channel() {
    let (world, device) = World::connected(V5_3);
    let _rings = world.open(&device, 1);
    whole_pages(1, 6, &[1, 2]).iter().for_each(|message| world.post(message));
    world.post(&gpadl_header(1, 7, 40, 1, &[4 * 4096]));
    world.messages();
    device.link.set_gpadl_in_use(6, true);
    let pages = device.link.gpadl(6).unwrap();
    assert_eq!((pages.ranges[0].byte_count, &pages.ranges[0].pfns[..]), (8192, &[1, 2][..]));
    for absent in [7, 8] {
        assert_eq!(device.link.gpadl(absent).unwrap_err(), NtStatus::INVALID_PARAMETER_3);
    }
    world.post(&gpadl_teardown(1, 6));
    assert_eq!(world.messages(), NONE);
    device.link.set_gpadl_in_use(6, false);
    assert_eq!(world.messages(), [gpadl_torndown(6)]);
}

#[test]
fn what_this_bus_cannot_do() {
    let world = World::new();
    let endpoint =
        || Endpoint { events: EventSink::recorder().0, doorbell: Arc::<Bell>::default() };
    let offer = |change: fn(&mut Offer)| {
        let mut offer = Offer::new(TYPE, instance(1));
        change(&mut offer);
        world.bus.offer(offer, endpoint()).map(|_link| ()).unwrap_err()
    };
    let _first = world.offer(1);
    assert_eq!(offer(|_| {}), NtStatus::INVALID_PARAMETER, "it stands");
    assert_eq!(offer(|offer| offer.loopback = true), NtStatus::NOT_SUPPORTED);
    assert_eq!(offer(|offer| offer.target_vtl = 1), NtStatus::NOT_SUPPORTED);
    let target = Target { interface_type: TYPE, interface_instance: None, subchannel_index: 0 };
    let bound = world.bus.bind(target, endpoint()).map(|_link| ());
    assert_eq!(bound.unwrap_err(), NtStatus::NOT_SUPPORTED);
    let many: Vec<Device> = (2..=2047).map(|number| world.offer(number)).collect();
    let one_more = world.bus.offer(Offer::new(TYPE, instance(5000)), endpoint());
    assert_eq!(one_more.map(|_link| ()).unwrap_err(), NtStatus::INSUFFICIENT_RESOURCES);
    drop(many);
    world.offer(2);
}

#[derive(Default)]
struct Sockets(Mutex<Vec<HvsockConnect>>);

impl HvsockHandler for Sockets {
    fn connect(&self, request: HvsockConnect) {
        self.0.lock().unwrap().push(request);
    }
}

#[test]
fn socket_requests_go_to_their_handler() {
    let (world, _device) = World::connected(V5_3);
    let (endpoint, service) = (instance(7), instance(8));
    let refused = |status: NtStatus| tl_result(endpoint, service, status.0);
    world.post(&tl_connect(endpoint, service));
    assert_eq!(world.messages(), [refused(NtStatus::CONNECTION_REFUSED)], "nobody is there");

    let sockets = Arc::new(Sockets::default());
    world.bus.set_hvsock_handler(Arc::clone(&sockets) as _);
    (0..3).for_each(|_| world.post(&tl_connect(endpoint, service)));
    assert_eq!(world.messages(), NONE);
    assert_eq!(world.bus.usage().hvsock_requests, 3);
    let mut requests = sockets.0.lock().unwrap().drain(..).collect::<Vec<_>>().into_iter();
    let mut next = || requests.next().unwrap();
    let first = next();
    assert_eq!(
        (first.endpoint_id(), first.service_id(), first.silo_id()),
        (endpoint, service, None)
    );
    first.accept();
    assert_eq!(world.messages(), NONE);
    next().refuse(NtStatus::ACCESS_DENIED);
    assert_eq!(world.messages(), [refused(NtStatus::ACCESS_DENIED)]);
    drop(next());
    assert_eq!(world.messages(), [refused(NtStatus::CONNECTION_REFUSED)]);
    assert_eq!(world.bus.usage().hvsock_requests, 0);
}

/// Four guests' processors, each opening and closing a channel of its own, and its device: whoever
/// comes first does the work for all.
#[test]
fn many_threads_at_once() {
    let world = World::new();
    let devices: Vec<Device> = (1..=4).map(|number| world.offer(number)).collect();
    world.post(&plain_contact(V5_3, 0));
    world.post(&request_offers());
    let rounds = 200;
    std::thread::scope(|scope| {
        for (channel, device) in (1..).zip(&devices) {
            let world = &world;
            scope.spawn(move || {
                let pages = PAGES.map(|page| page + u64::from(channel) * 100);
                for round in 0..rounds {
                    let gpadl = channel * 1000 + round;
                    whole_pages(channel, gpadl, &pages).iter().for_each(|m| world.post(m));
                    world.post(&open(channel, round, gpadl, 0, 4));
                    let rings = wait(device, |event| match event {
                        BusEvent::Opened(rings) => Some(rings),
                        _ => None,
                    });
                    rings.signal.signal();
                    device.link.open_result(NtStatus::SUCCESS);
                    world.post(&modify(channel, round % VP_COUNT));
                    world.post(&close(channel));
                    world.post(&gpadl_teardown(channel, gpadl));
                    drop(rings);
                    wait(device, |event| matches!(event, BusEvent::PeerClosed).then_some(()));
                    device.link.closed();
                }
            });
        }
    });
    // Created, opened, modified, torn down, for each.
    assert_eq!(world.messages().len(), 1 + 5 + 4 * 4 * rounds as usize);
    world.nothing_left(4);
    let ids: Vec<OfferId> = world.bus.inspect(|host| host.channels().map(|(id, _)| id).collect());
    assert_eq!(ids.len(), 4);
}

/// The next event of a device, which another thread may be about to post.
fn wait<T>(device: &Device, wanted: impl Fn(BusEvent) -> Option<T>) -> T {
    loop {
        let mut events = device.events.take();
        match (events.pop(), events.len()) {
            (None, _) => std::thread::yield_now(),
            (Some(event), 0) => return wanted(event).unwrap(),
            (Some(_), more) => panic!("{more} events too many"),
        }
    }
}
