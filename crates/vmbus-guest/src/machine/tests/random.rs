//! Whatever host, client and transport do, in whatever order: no panic, tables within their bounds,
//! every question answered once, every ring given back once and not before its time.

use std::collections::{BTreeMap, BTreeSet};

use kmcl::bus::{GpadlPages, PageRange};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::gpadl::FIRST_GPADL;
use vmbus_wire::message::{ModifyChannelResponse, TlConnectRequest, TlConnectResult};

#[derive(Clone, Debug)]
enum Step {
    Bind,
    Unbind(usize),
    Open(usize),
    Close(usize),
    Create(usize),
    Teardown(usize, u32),
    Modify(u32),
    Connect,
    Unload,
    HostGone,
    Retry,
    Posted(PostStatus),
    Bytes(Vec<u8>),
    Host(HostMessage),
}

fn status() -> impl Strategy<Value = u32> {
    prop_oneof![6 => Just(0), 1 => Just(0xc000_0001), 1 => Just(1)]
}

fn channel() -> impl Strategy<Value = u32> {
    1..4u32
}

fn gpadl() -> impl Strategy<Value = u32> {
    FIRST_GPADL..FIRST_GPADL + 6
}

fn host_message() -> impl Strategy<Value = HostMessage> {
    let status_of = |status| NtStatus(status);
    prop_oneof![
        4 => channel().prop_map(|id| HostMessage::OfferChannel(offer(id))),
        2 => channel().prop_map(|id| {
            HostMessage::RescindChannelOffer(RescindChannelOffer { channel_id: id.into() })
        }),
        1 => Just(HostMessage::AllOffersDelivered),
        8 => (channel(), gpadl(), status()).prop_map(move |(id, gpadl, status)| {
            HostMessage::GpadlCreated(GpadlCreated::new(id, gpadl, status_of(status)))
        }),
        8 => (channel(), 1..5u32, status()).prop_map(move |(id, open, status)| {
            HostMessage::OpenChannelResult(OpenChannelResult::new(id, open, status_of(status)))
        }),
        6 => gpadl().prop_map(|id| {
            HostMessage::GpadlTorndown(GpadlTorndown { gpadl_id: id.into() })
        }),
        2 => (any::<bool>(), any::<u8>()).prop_map(|(yes, features)| {
            let features = FeatureFlags::from_bits_retain(u32::from(features & 0x2d));
            if yes { accept(Version::V6_0, features) } else { REFUSE }
        }),
        1 => Just(HostMessage::UnloadComplete),
        1 => Just(HostMessage::PauseResponse),
        1 => (channel(), status()).prop_map(move |(id, status)| {
            HostMessage::ModifyChannelResponse(ModifyChannelResponse::new(id, status_of(status)))
        }),
        1 => status().prop_map(move |status| {
            let request = TlConnectRequest { endpoint_id: instance(1), service_id: TYPE };
            HostMessage::TlConnectResult(TlConnectResult::new(&request, status_of(status)))
        }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let client = || 0..4usize;
    prop_oneof![
        3 => Just(Step::Bind),
        2 => client().prop_map(Step::Unbind),
        6 => client().prop_map(Step::Open),
        3 => client().prop_map(Step::Close),
        4 => client().prop_map(Step::Create),
        2 => (client(), gpadl()).prop_map(|(client, gpadl)| Step::Teardown(client, gpadl)),
        1 => channel().prop_map(Step::Modify),
        1 => Just(Step::Connect),
        1 => Just(Step::Unload),
        1 => Just(Step::HostGone),
        2 => Just(Step::Retry),
        16 => Just(Step::Posted(PostStatus::SUCCESS)),
        2 => Just(Step::Posted(PostStatus::INSUFFICIENT_BUFFERS)),
        1 => prop_oneof![Just(18), Just(5)].prop_map(|code| Step::Posted(PostStatus(code))),
        1 => vec(any::<u8>(), 0..250).prop_map(Step::Bytes),
        24 => host_message().prop_map(Step::Host),
    ]
}

/// What clients are owed, kept beside the guest.
#[derive(Default)]
struct Ledger {
    clients: Vec<ClientId>,
    /// Opens that are not answered.
    opening: BTreeMap<u32, ClientId>,
    /// Rings that a client uses: told open, and not closed.
    in_use: BTreeMap<u32, ClientId>,
    /// Rings that were not given back.
    rings: BTreeSet<u32>,
    /// GPADLs whose creation is not answered.
    creating: BTreeMap<u32, ClientId>,
    in_flight: bool,
}

impl Ledger {
    fn let_go(&mut self, client: ClientId) {
        self.opening.retain(|_, owner| *owner != client);
        self.in_use.retain(|_, owner| *owner != client);
        self.creating.retain(|_, owner| *owner != client);
    }

    fn look(&mut self, guest: &mut Guest) {
        while let Some(effect) = guest.next_effect() {
            match effect {
                Effect::Post { message, .. } => {
                    assert!(!self.in_flight, "two messages at a time");
                    assert!(message.len() <= 240);
                    self.in_flight = true;
                }
                Effect::RingReleased { gpadl } => {
                    assert!(self.rings.remove(&gpadl), "ring {gpadl:#x} released twice");
                    assert!(!self.in_use.contains_key(&gpadl), "ring {gpadl:#x} still in use");
                    assert!(!self.opening.contains_key(&gpadl), "ring {gpadl:#x} not answered for");
                }
                Effect::Client { client, event } => {
                    assert!(self.clients.contains(&client), "{event:?} for a client that left");
                    self.told(client, &event);
                }
                Effect::RetryPost { .. } | Effect::Connection(_) => {}
            }
        }
        let counts = guest.counts();
        assert!(counts.channels <= 3 && counts.clients == self.clients.len());
        assert!(counts.messages < 400 && counts.gpadls < 400);
    }

    fn told(&mut self, client: ClientId, event: &ClientEvent) {
        match event {
            ClientEvent::Opened { gpadl } => {
                assert_eq!(self.opening.remove(gpadl), Some(client), "{event:?}");
                self.in_use.insert(*gpadl, client);
            }
            ClientEvent::OpenFailed { gpadl, status } => {
                assert!(!status.is_success(), "{event:?}");
                assert_eq!(self.opening.remove(gpadl), Some(client), "{event:?}");
            }
            ClientEvent::GpadlCreated { gpadl, status } => {
                assert!(*status == NtStatus::SUCCESS || !status.is_success(), "{event:?}");
                assert_eq!(self.creating.remove(gpadl), Some(client), "{event:?}");
            }
            _ => {}
        }
    }

    fn step(&mut self, guest: &mut Guest, step: Step) {
        let client = |index: usize| self.clients.get(index).copied();
        match step {
            Step::Bind => {
                if let Ok(id) = guest.bind(target()) {
                    self.clients.push(id);
                }
            }
            Step::Unbind(index) => {
                if let Some(id) = client(index) {
                    self.clients.remove(index);
                    self.let_go(id);
                    guest.unbind(id);
                }
            }
            Step::Open(index) => {
                if let Some(id) = client(index)
                    && let Ok(gpadl) = guest.open(id, ring_request(60))
                {
                    assert!(self.rings.insert(gpadl), "handle {gpadl:#x} given twice");
                    self.opening.insert(gpadl, id);
                }
            }
            Step::Close(index) => {
                if let Some(id) = client(index) {
                    self.let_go(id);
                    guest.close(id);
                }
            }
            Step::Create(index) => {
                let page = PageRange { byte_count: 4096, byte_offset: 0, pfns: vec![1] };
                let pages = GpadlPages { ranges: vec![page], read_only: false };
                if let Some(id) = client(index)
                    && let Ok(gpadl) = guest.create_gpadl(id, &pages)
                {
                    self.creating.insert(gpadl, id);
                }
            }
            Step::Teardown(index, gpadl) => {
                if let Some(id) = client(index) {
                    if self.creating.get(&gpadl) == Some(&id) {
                        self.creating.remove(&gpadl); // the teardown answers
                    }
                    guest.teardown_gpadl(id, gpadl).unwrap();
                }
            }
            Step::Modify(channel) => _ = guest.modify_channel(channel, 1),
            Step::Connect => _ = guest.connect(),
            Step::Unload => _ = guest.unload(),
            Step::HostGone => {
                guest.host_gone();
                self.in_flight = false;
            }
            Step::Retry => guest.retry_post(),
            Step::Posted(status) => {
                assert_eq!(guest.posted(status).is_ok(), std::mem::take(&mut self.in_flight));
            }
            Step::Bytes(bytes) => _ = guest.host_message(&bytes),
            Step::Host(message) => _ = guest.host_message(&message.to_buffer()),
        }
    }
}

/// Plays `steps`; then the host goes and every client leaves: nothing may be left.
fn drive(version: Version, steps: Vec<Step>) {
    let Lab { mut guest, .. } = Lab::connected(version);
    let mut ledger = Ledger::default();
    ledger.look(&mut guest);
    for step in steps {
        ledger.step(&mut guest, step);
        ledger.look(&mut guest);
    }
    ledger.step(&mut guest, Step::HostGone);
    ledger.look(&mut guest);
    assert!(ledger.opening.is_empty(), "opens never answered: {:?}", ledger.opening);
    assert!(ledger.creating.is_empty(), "creations never answered: {:?}", ledger.creating);
    while !ledger.clients.is_empty() {
        ledger.step(&mut guest, Step::Unbind(0));
        ledger.look(&mut guest);
    }
    assert!(ledger.rings.is_empty(), "rings never given back: {:?}", ledger.rings);
    assert_eq!(guest.counts(), GuestCounts::default());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    /// For every order of events, in an old, a usual and the newest version.
    #[test]
    fn nothing_is_lost_leaked_or_answered_twice(
        version in prop_oneof![Just(Version::V1_1), Just(Version::V5_3), Just(Version::V6_0)],
        steps in vec(step(), 0..120),
    ) {
        drive(version, steps);
    }

    /// Whatever bytes come, in whatever state.
    #[test]
    fn no_bytes_panic(messages in vec(vec(any::<u8>(), 0..260), 0..20), kind in 0..32u8) {
        let mut lab = Lab::connected(Version::V6_0);
        lab.opened(1);
        for mut message in messages {
            if let Some(first) = message.first_chunk_mut::<4>() {
                *first = [kind, 0, 0, 0];
            }
            let _refused = lab.guest.host_message(&message);
            lab.run();
        }
    }
}
