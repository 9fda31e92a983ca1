//! Guests and devices that do anything in any order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;
use vmbus_host::limits::MAX_OUTGOING_MESSAGES;
use vmbus_host::{Config, Effect, Host, OfferId, PostError};
use vmbus_wire::message::{HostMessage, MessageType};
use vmbus_wire::status::NtStatus;

use crate::bytes::*;
use crate::machine::*;

/// What a hostile guest, or a device in any mood, can do. Small numbers, so that they meet.
#[derive(Clone, Debug)]
enum Action {
    Post {
        connection: u32,
        message: Vec<u8>,
    },
    TakeMessages(usize),
    /// The slot is full; `next_message` is asked for others.
    SkipSlot,
    Offer {
        number: u32,
        subchannel: u16,
        socket: bool,
    },
    Revoke(u64),
    OpenResult(u64, bool),
    Closed(u64),
    UseGpadl(u64, u32, bool),
    Retargeted(u64, u64, bool),
    HvsockResult(u64, bool),
    Reset,
}

fn any_vp() -> impl Strategy<Value = u32> {
    prop_oneof![8 => 0..4u32, 1 => Just(u32::MAX), 1 => 4..6u32]
}

fn any_version() -> impl Strategy<Value = u32> {
    prop_oneof![12 => proptest::sample::select(VERSIONS.to_vec()), 1 => any::<u32>()]
}

fn any_contact() -> impl Strategy<Value = Vec<u8>> {
    let union = |version: u32| {
        if version >= V5_0 {
            let sint = prop_oneof![9 => Just(2u8), 1 => 0..20u8];
            let vtl = prop_oneof![9 => Just(0u8), 1 => any::<u8>()];
            let features = prop_oneof![Just(0xffu32), any::<u32>()];
            (sint, vtl, features).prop_map(|(a, b, c)| target(a, b, c)).boxed()
        } else {
            prop_oneof![Just(0), Just(0x3000), any::<u64>()].boxed()
        }
    };
    (any_version(), any_vp()).prop_flat_map(move |(version, vp)| {
        union(version).prop_map(move |union| contact(version, vp, union).fill(3, 16).done())
    })
}

fn any_words() -> impl Strategy<Value = Vec<u64>> {
    let pages = prop_oneof![9 => 0..4096u64, 1 => any::<u64>()];
    prop_oneof![
        // A range that is right, but perhaps for its pages.
        6 => proptest::collection::vec(pages, 1..60).prop_map(|pfns| {
            let mut words = vec![pfns.len() as u64 * 4096];
            words.extend(pfns);
            words
        }),
        1 => proptest::collection::vec(any::<u64>(), 0..30),
    ]
}

fn any_message() -> impl Strategy<Value = Vec<u8>> {
    let channel = || prop_oneof![9 => 0..6u32, 1 => any::<u32>()];
    let gpadl = || 0..5u32;
    prop_oneof![
        3 => any_contact(),
        3 => Just(request_offers()),
        1 => Just(unload()),
        8 => (channel(), 0..4u32, gpadl(), any_vp(), 0..6u32)
            .prop_map(|(a, b, c, d, e)| open(a, b, c, d, e)),
        4 => (channel(), gpadl(), any_vp(), 0..10u32, 0..10u16)
            .prop_map(|(a, b, c, d, e)| open_v2(open(a, 1, b, c, 2), d, e)),
        6 => channel().prop_map(close),
        12 => (channel(), gpadl(), any_words(), 0..3u16, 0..27usize).prop_map(|(a, b, words, c, n)| {
            let first = &words[..words.len().min(n)];
            gpadl_header(a, b, u16::try_from(words.len() * 8).unwrap(), c, first)
        }),
        12 => (channel(), gpadl(), any_words())
            .prop_map(|(a, b, words)| gpadl_messages(a, b, 1, &words).remove(0)),
        8 => (gpadl(), proptest::collection::vec(0..4096u64, 0..29))
            .prop_map(|(id, words)| gpadl_body(id, &words)),
        6 => (channel(), gpadl()).prop_map(|(a, b)| gpadl_teardown(a, b)),
        5 => channel().prop_map(release),
        4 => (channel(), any_vp(), 0..18u32, gpadl(), 0..4u32)
            .prop_map(|(a, b, c, d, e)| open_reserved(a, b, c, d, e)),
        3 => (channel(), any_vp(), 0..18u32).prop_map(|(a, b, c)| close_reserved(a, b, c)),
        2 => (0..4u32, 0..4u32).prop_map(|(a, b)| tl_connect(instance(a), instance(b))),
        4 => (channel(), any_vp()).prop_map(|(a, b)| modify(a, b)),
        1 => (0..2u64, 0..2u64).prop_map(|(a, b)| modify_connection(a, b)),
        1 => Just(pause()),
        1 => Just(resume()),
        1 => (0..32u32, proptest::collection::vec(any::<u8>(), 0..240))
            .prop_map(|(kind, body)| message(kind).done().into_iter().chain(body).collect()),
        1 => proptest::collection::vec(any::<u8>(), 0..260),
    ]
}

fn any_action() -> impl Strategy<Value = Action> {
    let offer = || 0..12u64;
    let mutated = (any_message(), any::<prop::sample::Index>(), any::<u8>()).prop_map(
        |(mut message, at, value)| {
            if !message.is_empty() {
                let at = at.index(message.len());
                message[at] = value;
                message.truncate(message.len().max(at + 1));
            }
            message
        },
    );
    let cut = (any_message(), any::<prop::sample::Index>()).prop_map(|(mut message, at)| {
        message.truncate(at.index(message.len() + 1));
        message
    });
    let connection = prop_oneof![20 => Just(1u32), 5 => Just(4u32), 1 => any::<u32>()];
    let posted = prop_oneof![10 => any_message(), 1 => mutated, 1 => cut];
    prop_oneof![
        30 => (connection, posted)
            .prop_map(|(connection, message)| Action::Post { connection, message }),
        4 => (0..20usize).prop_map(Action::TakeMessages),
        1 => Just(Action::SkipSlot),
        4 => (0..4u32, 0..2u16, any::<bool>()).prop_map(|(number, subchannel, socket)| {
            Action::Offer { number, subchannel, socket }
        }),
        2 => offer().prop_map(Action::Revoke),
        8 => (offer(), any::<bool>()).prop_map(|(a, b)| Action::OpenResult(a, b)),
        6 => offer().prop_map(Action::Closed),
        3 => (offer(), 0..5u32, any::<bool>()).prop_map(|(a, b, c)| Action::UseGpadl(a, b, c)),
        2 => (offer(), 0..12u64, any::<bool>()).prop_map(|(a, b, c)| Action::Retargeted(a, b, c)),
        1 => (0..12u64, any::<bool>()).prop_map(|(a, b)| Action::HvsockResult(a, b)),
        1 => Just(Action::Reset),
    ]
}

fn status(success: bool) -> NtStatus {
    if success { NtStatus::SUCCESS } else { NtStatus::UNSUCCESSFUL }
}

/// Takes a message as a guest of the present connection would, which must understand it.
fn take(machine: &mut Machine, full: &[vmbus_host::SlotId]) {
    let Some(message) = machine.host.next_message(full).cloned() else { return };
    machine.host.message_taken(message.serial);
    assert!(!full.contains(&message.slot) && message.slot.vp < VP_COUNT && message.slot.sint < 16);
    let kind = MessageType::from_wire(u32_at(&message.message, 0)).unwrap();
    let negotiated = match kind {
        // About the connection before, or none.
        MessageType::VersionResponse
        | MessageType::UnloadComplete
        | MessageType::OpenChannelResult
        | MessageType::CloseReservedResponse => return,
        _ => machine.host.connection().established().map(|established| established.negotiated()),
    };
    let parsed = HostMessage::parse(&message.message, negotiated);
    assert!(parsed.is_ok(), "{parsed:?} to a guest of {negotiated:?}");
}

/// Runs `actions`; checks the books after each of them, and that nothing is left at the end.
fn drive(actions: &[Action], config: Config) {
    let mut machine = Machine::with(config);
    for number in 0..3 {
        machine.offer(number);
    }
    // Most guests begin so, and most of what there is to find comes later.
    machine.connect(V5_3);
    machine.ok(&request_offers());
    for action in actions {
        match action {
            Action::Post { connection, message } => {
                let waiting = machine.host.usage().messages;
                let posted = machine.post_to(*connection, message);
                if let Err(PostError::Busy { waiting: told }) = posted {
                    assert_eq!(told, waiting);
                }
            }
            Action::TakeMessages(count) => {
                (0..*count).for_each(|_| take(&mut machine, &[]));
            }
            Action::SkipSlot => take(&mut machine, &[SLOT]),
            Action::Offer { number, subchannel, socket } => {
                let mut params = plain_offer(*number);
                params.key.subchannel_index = *subchannel;
                params.tlnpi_provider = *socket;
                let _clash_or_full = machine.host.offer(params);
            }
            Action::Revoke(offer) => machine.revoke(OfferId(*offer)),
            Action::OpenResult(offer, success) => {
                machine.open_result(OfferId(*offer), status(*success));
            }
            Action::Closed(offer) => machine.closed(OfferId(*offer)),
            Action::UseGpadl(offer, gpadl, in_use) => {
                machine.host.set_gpadl_in_use(OfferId(*offer), *gpadl, *in_use);
            }
            Action::Retargeted(offer, serial, success) => {
                machine.host.retargeted(OfferId(*offer), *serial, status(*success));
            }
            Action::HvsockResult(id, success) => {
                let result = if *success { Ok(()) } else { Err(NtStatus::CONNECTION_REFUSED) };
                machine.host.hvsock_result(*id, result);
            }
            Action::Reset => machine.reset(),
        }
        machine.check();
        assert!(machine.host.usage().messages <= MAX_OUTGOING_MESSAGES);
    }
    machine.wind_down();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    /// Whatever a guest posts and devices do, the host's books stay right and bounded, its messages
    /// make sense to the guest, and nothing is left when the guest is gone.
    #[test]
    fn nothing_breaks_the_host(actions in proptest::collection::vec(any_action(), 1..150)) {
        drive(&actions, config());
    }

    /// The same with little memory to describe, so that the quota is met.
    #[test]
    fn nothing_breaks_a_host_with_a_small_quota(
        actions in proptest::collection::vec(any_action(), 1..150),
    ) {
        drive(&actions, Config { gpadl_pages: 70, ..config() });
    }

    /// An honest guest gets every answer it waits for exactly once, whenever devices find the time, and no
    /// memory back that a device still uses; however often its host is saved and goes on elsewhere, with
    /// other devices, at whatever step, and with effects that were not performed.
    #[test]
    fn an_honest_guest_gets_every_answer(
        steps in proptest::collection::vec((0..16u8, 0..3u8), 1..300),
    ) {
        let mut world = World::new();
        for (step, which) in steps {
            world.step(step, which.into());
        }
        world.settle();
    }
}

/// What the honest guest knows of a channel.
#[derive(Debug, Default)]
struct GuestChannel {
    number: u32,
    open: bool,
    ring: Option<u32>,
    rescinded: bool,
}

/// What a device knows.
#[derive(Debug, Default)]
struct Device {
    offer: Option<OfferId>,
    told: VecDeque<bool>, // true: opened, false: closed
    ring: Option<u32>,
}

/// An answer that the guest waits for.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Awaited {
    Created(u32, u32),
    Torndown(u32),
    Opened(u32, u32),
    Modified(u32),
    UnloadComplete,
    VersionResponse,
}

struct World {
    machine: Machine,
    guest: BTreeMap<u32, GuestChannel>,
    devices: [Device; 3],
    awaited: BTreeSet<Awaited>,
    connected: bool,
    last_id: u32,
    bodies: Vec<Vec<u8>>,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            machine: Machine::new(),
            guest: BTreeMap::new(),
            devices: Default::default(),
            awaited: BTreeSet::new(),
            connected: false,
            last_id: 0x100,
            bodies: Vec::new(),
        };
        (0..3).for_each(|number| world.plug(number));
        world.connect();
        world
    }

    fn plug(&mut self, number: usize) {
        if self.devices[number].offer.is_none() {
            let mut params = plain_offer(u32::try_from(number).unwrap());
            params.force_new_channel = number == 2;
            let id = self.machine.host.offer(params).unwrap();
            self.devices[number] = Device { offer: Some(id), ..Device::default() };
        }
    }

    fn connect(&mut self) {
        if self.awaited.is_empty() && !self.connected {
            self.machine.ok(&plain_contact(V5_3, 0));
            self.awaited.insert(Awaited::VersionResponse);
        }
    }

    fn wait_for(&mut self, awaited: Awaited) {
        assert!(self.awaited.insert(awaited), "{awaited:?} awaited twice");
    }

    fn fresh(&mut self) -> u32 {
        self.last_id += 1;
        self.last_id
    }

    fn step(&mut self, step: u8, which: usize) {
        match step {
            0..=2 => self.take(),
            3..=4 => self.device(which, which != 1),
            5 => self.device(which, true),
            6 => self.unplug(which),
            7 => self.plug(which),
            8 => {
                for body in std::mem::take(&mut self.bodies) {
                    // Refused where its header has crossed a rescind that the guest has yet to read.
                    let _refused = self.machine.post(&body);
                }
            }
            9 if which == 0 => self.unload(),
            14 => self.migrate(),
            15 => {
                // What the guest asks for has not been done when the host is saved.
                let step = 9 + u8::try_from(self.fresh() % 5).unwrap();
                self.act_on(which, step);
                self.migrate();
            }
            _ => self.act_on(which, step),
        }
        self.effects();
    }

    fn act_on(&mut self, which: usize, step: u8) {
        let channels: Vec<u32> = self.guest.keys().copied().collect();
        if self.connected
            && let Some(channel) = channels.get(which)
        {
            self.act(*channel, step);
        }
    }

    /// The host is saved, and goes on elsewhere. What was to be done is lost, and so are the devices;
    /// others take their places.
    fn migrate(&mut self) {
        self.machine.effects();
        self.machine.host = Host::restore(&saved(&self.machine.host)).unwrap();
        for device in &mut self.devices {
            (device.ring, device.told) = (None, VecDeque::new());
        }
        for params in self.machine.host.devices_have_moved() {
            assert_eq!(params.key.interface_instance, instance(2));
            self.devices[2].offer = Some(self.machine.host.offer(params).unwrap());
        }
        self.machine.check();
        self.machine.go_on();
    }

    /// The guest does something about a channel that it knows.
    fn act(&mut self, channel: u32, step: u8) {
        let id = self.fresh();
        let Some(known) = self.guest.get_mut(&channel) else { return };
        let opening =
            self.awaited.iter().any(|it| matches!(it, Awaited::Opened(of, _) if *of == channel));
        let creating =
            self.awaited.iter().any(|it| matches!(it, Awaited::Created(of, _) if *of == channel));
        let modifying = self.awaited.contains(&Awaited::Modified(channel));
        match (step, known.ring) {
            _ if opening || creating => {}
            (9 | 10, None) if !known.rescinded => {
                // 40 pages: a header and a body, which may come much later.
                let pages: Vec<u64> = (0..40).collect();
                let mut messages = whole_pages(channel, id, &pages);
                self.machine.ok(&messages.remove(0));
                self.bodies.append(&mut messages);
                self.wait_for(Awaited::Created(channel, id));
            }
            (9 | 10, Some(ring)) if !known.open && !known.rescinded => {
                self.machine.ok(&open(channel, id, ring, 0, 20));
                self.wait_for(Awaited::Opened(channel, id));
            }
            (11, Some(ring)) if known.open => {
                known.open = false;
                // Half of the time it keeps the ring for the next open.
                if id.is_multiple_of(2) {
                    known.ring = None;
                }
                self.machine.ok(&close(channel));
                if id.is_multiple_of(2) {
                    self.machine.ok(&gpadl_teardown(channel, ring));
                    self.wait_for(Awaited::Torndown(ring));
                }
            }
            (12, _) if known.open && !modifying && !known.rescinded => {
                self.machine.ok(&modify(channel, id % VP_COUNT));
                self.wait_for(Awaited::Modified(channel));
            }
            (13, ring) if known.rescinded && !known.open && !modifying => {
                if let Some(ring) = ring {
                    known.ring = None;
                    self.machine.ok(&gpadl_teardown(channel, ring));
                    self.wait_for(Awaited::Torndown(ring));
                } else if !self.awaited.iter().any(|it| matches!(it, Awaited::Torndown(_))) {
                    self.machine.ok(&release(channel));
                    self.guest.remove(&channel);
                }
            }
            _ => {}
        }
    }

    fn unload(&mut self) {
        if self.connected {
            self.machine.ok(&unload());
            self.forget();
            self.wait_for(Awaited::UnloadComplete);
        } else {
            self.connect();
        }
    }

    fn forget(&mut self) {
        self.connected = false;
        self.guest.clear();
        self.awaited.clear();
        self.bodies.clear();
    }

    /// The guest takes one message.
    fn take(&mut self) {
        let Some(next) = self.machine.host.next_message(&[]).cloned() else { return };
        self.machine.host.message_taken(next.serial);
        let message = &next.message[..];
        let word = |offset| u32_at(message, offset);
        let kind = MessageType::from_wire(word(0)).unwrap();
        let answered = match kind {
            MessageType::OfferChannel => {
                let number = word(24);
                let known = self.guest.values().any(|channel| channel.number == number);
                assert!(!known, "two channels of one name");
                let channel = GuestChannel { number, ..GuestChannel::default() };
                assert!(self.guest.insert(word(184), channel).is_none(), "id reused too early");
                return;
            }
            MessageType::AllOffersDelivered => return,
            MessageType::RescindChannelOffer => {
                self.guest.get_mut(&word(8)).unwrap().rescinded = true;
                self.guest.get_mut(&word(8)).unwrap().open = false;
                // An open that has crossed the rescind is not answered; nor are bodies.
                self.awaited.retain(|it| !matches!(it, Awaited::Opened(of, _) if *of == word(8)));
                return;
            }
            MessageType::OpenChannelResult => {
                self.guest.get_mut(&word(8)).unwrap().open = word(16) == 0;
                Awaited::Opened(word(8), word(12))
            }
            MessageType::GpadlCreated => {
                if word(16) == 0 {
                    self.guest.get_mut(&word(8)).unwrap().ring = Some(word(12));
                } else {
                    // The rescind that is behind it has ended the assembly.
                    self.bodies.retain(|body| u32_at(body, 12) != word(12));
                }
                Awaited::Created(word(8), word(12))
            }
            MessageType::GpadlTorndown => {
                let ring = word(8);
                assert!(self.devices.iter().all(|device| device.ring != Some(ring)), "still used");
                Awaited::Torndown(ring)
            }
            MessageType::ModifyChannelResponse => Awaited::Modified(word(8)),
            MessageType::UnloadComplete => Awaited::UnloadComplete,
            MessageType::VersionResponse => {
                assert_eq!(message, accepted(V5_3));
                self.connected = true;
                self.machine.ok(&request_offers());
                Awaited::VersionResponse
            }
            other => panic!("{other}"),
        };
        if matches!(answered, Awaited::UnloadComplete | Awaited::VersionResponse) {
            assert!(self.devices.iter().all(|device| device.ring.is_none()), "still used");
        }
        assert!(self.awaited.remove(&answered), "{answered:?} was not awaited");
    }

    /// A device looks at what it was told.
    fn device(&mut self, which: usize, accepts: bool) {
        let Some(offer) = self.devices[which].offer else { return };
        match self.devices[which].told.pop_front() {
            None => {}
            Some(true) => {
                if !accepts {
                    self.devices[which].ring = None;
                }
                self.machine.open_result(offer, status(accepts));
            }
            // After an open that it has refused, it has nothing to let go.
            Some(false) if self.devices[which].ring.take().is_none() => {}
            Some(false) => self.machine.closed(offer),
        }
    }

    fn unplug(&mut self, which: usize) {
        let Some(offer) = self.devices[which].offer.take() else { return };
        self.machine.revoke(offer);
        self.devices[which].ring = None;
        self.devices[which].told.clear();
        self.machine.closed(offer);
    }

    fn effects(&mut self) {
        for effect in self.machine.effects() {
            let device = |offer| self.devices.iter().position(|device| device.offer == Some(offer));
            match effect {
                Effect::Open { offer, .. } => {
                    let device = &mut self.devices[device(offer).unwrap()];
                    assert!(device.ring.is_none(), "opened twice");
                    let channel = self.machine.host.channel(offer).unwrap();
                    let vmbus_host::OpenState::Opening(open) = &channel.open else { panic!() };
                    device.ring = Some(open.ring_gpadl);
                    device.told.push_back(true);
                }
                Effect::Resume { offer, .. } => {
                    let device = &mut self.devices[device(offer).unwrap()];
                    assert!(device.ring.is_none() && device.told.is_empty(), "resumed twice");
                    let channel = self.machine.host.channel(offer).unwrap();
                    let vmbus_host::OpenState::Open(open) = &channel.open else { panic!() };
                    device.ring = Some(open.ring_gpadl);
                    let before = self.machine.host.clone();
                    self.machine.open_result(offer, NtStatus::SUCCESS);
                    assert_eq!(self.machine.host, before, "the guest knows that it is open");
                }
                Effect::Close { offer, tell_device: true } => {
                    self.devices[device(offer).unwrap()].told.push_back(false);
                }
                Effect::Close { .. } => {}
                Effect::Retarget { offer, serial, .. } => {
                    self.machine.host.retargeted(offer, serial, NtStatus::SUCCESS);
                }
                Effect::ConnectHvsock(_) => unreachable!(),
            }
        }
    }

    /// Everybody does what there is to do, until nobody waits for anything.
    fn settle(&mut self) {
        for _ in 0..50 {
            for which in 0..3 {
                self.step(8, which);
                self.step(5, which);
                (0..20).for_each(|_| self.step(0, which));
            }
        }
        assert!(
            self.awaited.is_empty(),
            "still awaited: {:?}\n{:#?}",
            self.awaited,
            self.machine.host
        );
    }
}
