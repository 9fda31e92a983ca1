//! A host with a guest and devices that do what a test tells them.

use kmcl::bus::Offer;
use saved_state::Save;
use vmbus_host::{
    Config, Effect, GuestShape, Host, OfferId, OfferParams, PostError, RamMap, SaveOptions, SlotId,
    Usage,
};
use vmbus_wire::guid::Guid;
use vmbus_wire::status::NtStatus;
use vmbus_wire::version::Version;

use crate::bytes::*;

pub(crate) const VP_COUNT: u32 = 4;
/// Pages 0 to 4095 are RAM, and as many from 1 GiB on; nothing in between.
pub(crate) const RAM: [(u64, u64); 2] = [(0, 16 << 20), (1 << 30, 16 << 20)];
pub(crate) const NOT_RAM: u64 = 5000;

pub(crate) const TYPE: Guid = Guid::from_u128(0xba6163d9_04a1_4d29_b605_72e2ffb1dc7f);

pub(crate) const SUCCESS: u32 = 0;
pub(crate) const INVALID_PARAMETER: u32 = 0xc000_000d;
pub(crate) const DEVICE_REMOVED: u32 = 0xc000_02b6;

pub(crate) fn instance(number: u32) -> Guid {
    Guid::from_fields(number, 0, 0, [0; 8])
}

pub(crate) fn plain_offer(number: u32) -> OfferParams {
    OfferParams::try_from(&Offer::new(TYPE, instance(number))).unwrap()
}

pub(crate) fn shape() -> GuestShape {
    GuestShape { vp_count: VP_COUNT, ram: RamMap::new(RAM) }
}

pub(crate) fn config() -> Config {
    Config::default()
}

/// VP 0, SINT 2.
pub(crate) const SLOT: SlotId = SlotId { vp: 0, sint: 2 };

/// The state of a host, as bytes.
pub(crate) fn saved(host: &Host) -> Vec<u8> {
    let mut bytes = Vec::new();
    host.save(&SaveOptions::default()).unwrap().write_to(&mut bytes).unwrap();
    bytes
}

#[derive(Clone)]
pub(crate) struct Machine {
    pub(crate) host: Host,
    effects: Vec<Effect>,
}

impl Machine {
    pub(crate) fn new() -> Self {
        Self::with(config())
    }

    pub(crate) fn with(config: Config) -> Self {
        Self { host: Host::new(config, shape()), effects: Vec::new() }
    }

    /// A host with `offers` plain devices, channels 1 to n, whose guest has connected under `version`
    /// and was told of them.
    pub(crate) fn connected(version: u32, offers: u32) -> (Self, Vec<OfferId>) {
        let mut machine = Self::new();
        let ids = (1..=offers).map(|number| machine.offer(number)).collect();
        machine.connect(version);
        machine.ok(&request_offers());
        assert_eq!(machine.messages().len(), offers as usize + 1);
        (machine, ids)
    }

    /// As `connected`, with 6.0 and all features there are.
    pub(crate) fn connected_v6(offers: u32) -> (Self, Vec<OfferId>) {
        let mut machine = Self::new();
        let ids = (1..=offers).map(|number| machine.offer(number)).collect();
        machine.ok(&contact(V6_0, 0, target(2, 0, 0xff)).fill(7, 16).done());
        machine.ok(&request_offers());
        assert_eq!(machine.messages().len(), offers as usize + 2);
        (machine, ids)
    }

    pub(crate) fn connect(&mut self, version: u32) {
        self.ok(&plain_contact(version, 0));
        let response = if version >= V6_0 { accepted_v6(0) } else { accepted(version) };
        assert_eq!(self.messages(), [response], "{version:#x}");
    }

    /// Posts to the connection that a guest would use.
    pub(crate) fn post(&mut self, message: &[u8]) -> Result<(), PostError> {
        let newer = message.len() >= 12 && u32_at(message, 0) == 14 && u32_at(message, 8) >= V5_0;
        self.post_to(if newer { 4 } else { 1 }, message)
    }

    pub(crate) fn post_to(&mut self, connection: u32, message: &[u8]) -> Result<(), PostError> {
        let before = self.host.clone();
        let result = self.host.guest_message(connection, message, &mut self.effects);
        if matches!(result, Err(PostError::Busy { .. } | PostError::UnknownConnection { .. })) {
            assert_eq!(self.host, before, "{result:?} changed something");
        }
        self.check();
        result
    }

    /// Posts a message that must be accepted.
    #[track_caller]
    pub(crate) fn ok(&mut self, message: &[u8]) {
        let result = self.post(message);
        assert_eq!(result, Ok(()), "message type {}", u32_at(message, 0));
    }

    #[track_caller]
    pub(crate) fn all_ok(&mut self, messages: &[Vec<u8>]) {
        messages.iter().for_each(|message| self.ok(message));
    }

    #[track_caller]
    pub(crate) fn check(&self) {
        assert_eq!(self.host.violations(), Vec::<String>::new(), "{:#?}", self.host);
        // Whatever step it is: it could be saved here, and would go on elsewhere as if nothing had been.
        assert_eq!(Host::restore(&saved(&self.host)).as_ref(), Ok(&self.host));
    }

    /// Takes the messages that wait, which must all go to VP 0, SINT 2.
    #[track_caller]
    pub(crate) fn messages(&mut self) -> Vec<Vec<u8>> {
        let messages = self.slot_messages();
        assert!(messages.iter().all(|(slot, _)| *slot == SLOT), "{messages:?}");
        messages.into_iter().map(|(_, message)| message).collect()
    }

    pub(crate) fn slot_messages(&mut self) -> Vec<(SlotId, Vec<u8>)> {
        let mut messages = Vec::new();
        while let Some(message) = self.host.next_message(&[]).cloned() {
            self.host.message_taken(message.serial);
            messages.push((message.slot, message.message.to_vec()));
        }
        self.check();
        messages
    }

    pub(crate) fn effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// What a restored host wants done.
    pub(crate) fn go_on(&mut self) {
        self.host.go_on(&mut self.effects);
        self.check();
    }

    pub(crate) fn offer(&mut self, number: u32) -> OfferId {
        let offer = self.host.offer(plain_offer(number)).unwrap();
        self.check();
        offer
    }

    pub(crate) fn revoke(&mut self, offer: OfferId) {
        self.host.revoke(offer, &mut self.effects);
        self.check();
    }

    pub(crate) fn open_result(&mut self, offer: OfferId, status: NtStatus) {
        self.host.open_result(offer, status, &mut self.effects);
        self.check();
    }

    pub(crate) fn closed(&mut self, offer: OfferId) {
        self.host.closed(offer, &mut self.effects);
        self.check();
    }

    pub(crate) fn reset(&mut self) {
        self.host.guest_reset(shape(), &mut self.effects);
        self.check();
    }

    /// The guest creates a GPADL of whole pages.
    #[track_caller]
    pub(crate) fn create_gpadl(&mut self, channel: u32, gpadl: u32, pfns: &[u64]) {
        self.all_ok(&whole_pages(channel, gpadl, pfns));
        assert_eq!(self.messages(), [gpadl_created(channel, gpadl, SUCCESS)]);
    }

    /// The guest makes a ring GPADL of 4 + 4 pages and opens the channel; the device accepts.
    #[track_caller]
    pub(crate) fn open(&mut self, offer: OfferId, channel: u32, gpadl: u32) {
        self.create_gpadl(channel, gpadl, &[10, 11, 12, 13, 20, 21, 22, 23]);
        self.ok(&open(channel, 0x77, gpadl, 0, 4));
        assert!(matches!(&*self.effects(), [Effect::Open { offer: told, .. }] if *told == offer));
        self.open_result(offer, NtStatus::SUCCESS);
        assert_eq!(self.messages(), [open_result(channel, 0x77, SUCCESS)]);
    }

    /// The guest closes the channel and takes the ring back; the device lets go.
    #[track_caller]
    pub(crate) fn close(&mut self, offer: OfferId, channel: u32, gpadl: u32) {
        self.ok(&close(channel));
        self.ok(&gpadl_teardown(channel, gpadl));
        assert_eq!(self.effects(), [Effect::Close { offer, tell_device: true }]);
        assert_eq!(self.messages(), Vec::<Vec<u8>>::new(), "the device has not let go");
        self.closed(offer);
        assert_eq!(self.messages(), [gpadl_torndown(gpadl)]);
    }

    /// Whatever has happened: when the guest is reset and every device has let go, nothing is left
    /// but the offers that stand.
    #[track_caller]
    pub(crate) fn wind_down(&mut self) {
        self.reset();
        self.effects();
        let offers: Vec<OfferId> = self.host.channels().map(|(offer, _)| offer).collect();
        for offer in offers {
            self.closed(offer);
        }
        let channels = self.host.channels().count();
        assert_eq!(self.host.usage(), Usage { channels, ..Usage::default() });
        assert_eq!(self.host.connection(), &vmbus_host::Connection::Disconnected);
        assert_eq!(self.effects(), []);
    }
}

pub(crate) fn newest(newest_version: Version) -> Config {
    Config { newest_version, ..Config::default() }
}
