//! A guest with a host played by the test.

mod contact;
mod hostile;
mod life;
mod messages;
mod random;
mod requests;

use std::collections::VecDeque;

use kmcl::bus::Target;
use vmbus_wire::guid::Guid;
use vmbus_wire::message::ConnectionState as WireState;
use vmbus_wire::message::{
    GpadlCreated, GpadlTorndown, HostMessage, MessageType, OfferChannel, OpenChannelResult,
    RescindChannelOffer, VersionResponse, VersionResponseV2,
};
use vmbus_wire::status::NtStatus;
use vmbus_wire::version::{FeatureFlags, Version};

use super::*;

pub(super) const TYPE: Guid = Guid::from_u128(0xba6163d9_04a1_4d29_b605_72e2ffb1dc7f);
pub(super) const INSTANCE: Guid = Guid::from_u128(0x0d0b5d61_0001_0002_0003_000000000004);
pub(super) const CLIENT_ID: Guid = Guid::from_u128(0x11111111_2222_3333_4444_555555555555);

/// Every version, as in [`GuestConfig::new`], with an interrupt page for the old ones.
pub(super) fn config() -> GuestConfig {
    let mut config = GuestConfig::new(CLIENT_ID);
    config.interrupt_page = Some(0x1000);
    config.versions = Version::ALL.into_iter().rev().collect();
    config
}

pub(super) fn target() -> Target {
    Target { interface_type: TYPE, interface_instance: None, subchannel_index: 0 }
}

pub(super) fn offer(channel_id: u32) -> OfferChannel {
    OfferChannel {
        interface_id: TYPE,
        instance_id: instance(channel_id),
        reserved: [0; 16],
        flags: 0.into(),
        mmio_megabytes: 0.into(),
        user_defined: [0; 120],
        subchannel_index: 0.into(),
        mmio_megabytes_optional: 0.into(),
        channel_id: channel_id.into(),
        monitor_id: 0xff,
        monitor_allocated: 0,
        is_dedicated_interrupt: 1.into(),
        connection_id: (0x2000 | channel_id).into(),
    }
}

/// A different instance for each channel number.
pub(super) fn instance(channel_id: u32) -> Guid {
    Guid::from_u128(INSTANCE.to_u128() + u128::from(channel_id))
}

pub(super) fn ring_request(pages: u64) -> RingRequest {
    RingRequest {
        pfns: (0x100..0x100 + pages).collect(),
        outgoing_pages: u32::try_from(pages / 2).unwrap(),
        target_vp: 3,
        user_data: [0; 120],
    }
}

/// A guest, the messages that it has posted, and what else it wanted.
pub(super) struct Lab {
    pub(super) guest: Guest,
    pub(super) posts: VecDeque<(u32, Vec<u8>)>,
    pub(super) told: VecDeque<(ClientId, ClientEvent)>,
    pub(super) events: VecDeque<ConnectionEvent>,
    pub(super) released: Vec<u32>,
    pub(super) retries: Vec<u32>,
    /// What the host answers to the next posts; then success.
    pub(super) statuses: VecDeque<PostStatus>,
}

impl Lab {
    pub(super) fn new(config: GuestConfig) -> Self {
        Self {
            guest: Guest::new(config).unwrap(),
            posts: VecDeque::new(),
            told: VecDeque::new(),
            events: VecDeque::new(),
            released: Vec::new(),
            retries: Vec::new(),
            statuses: VecDeque::new(),
        }
    }

    /// Connected under `version`, no offers yet, nothing left to look at.
    pub(super) fn connected(version: Version) -> Self {
        Self::connected_with(config(), version)
    }

    pub(super) fn connected_with(config: GuestConfig, version: Version) -> Self {
        let mut lab = Self::new(config.at_most(version));
        lab.guest.connect().unwrap();
        lab.host(accept(version, GuestConfig::FEATURES)).unwrap();
        lab.run();
        lab.posts.clear();
        lab.events.clear();
        lab
    }

    /// Performs effects, taking every post.
    pub(super) fn run(&mut self) {
        while let Some(effect) = self.guest.next_effect() {
            match effect {
                Effect::Post { connection_id, message } => {
                    let status = self.statuses.pop_front().unwrap_or(PostStatus::SUCCESS);
                    if status == PostStatus::SUCCESS {
                        self.posts.push_back((connection_id, message.to_vec()));
                    }
                    self.guest.posted(status).unwrap();
                }
                Effect::RetryPost { attempt } => self.retries.push(attempt),
                Effect::Client { client, event } => self.told.push_back((client, event)),
                Effect::RingReleased { gpadl } => self.released.push(gpadl),
                Effect::Connection(event) => self.events.push_back(event),
            }
        }
    }

    pub(super) fn host(&mut self, message: HostMessage) -> Result<(), HostError> {
        let result = self.guest.host_message(&message.to_buffer());
        self.run();
        result
    }

    /// The types of the messages posted since the last look.
    pub(super) fn posted(&mut self) -> Vec<MessageType> {
        self.posts
            .drain(..)
            .map(|(_, bytes)| {
                let kind = u32::from_le_bytes(bytes.first_chunk().copied().unwrap());
                MessageType::from_wire(kind).unwrap()
            })
            .collect()
    }

    /// What clients were told since the last look.
    pub(super) fn heard(&mut self) -> Vec<ClientEvent> {
        self.told.drain(..).map(|(_, event)| event).collect()
    }

    /// A client that is bound to `channel_id`, freshly offered.
    pub(super) fn bound(&mut self, channel_id: u32) -> ClientId {
        let client = self.guest.bind(target()).unwrap();
        self.host(HostMessage::OfferChannel(offer(channel_id))).unwrap();
        assert!(matches!(self.heard()[..], [ClientEvent::Offered { .. }]));
        assert_eq!(self.events.pop_back(), Some(ConnectionEvent::ChannelOffered { channel_id }));
        client
    }

    /// A client whose channel is open, and the GPADL of its ring.
    pub(super) fn opened(&mut self, channel_id: u32) -> (ClientId, u32) {
        let client = self.bound(channel_id);
        let gpadl = self.guest.open(client, ring_request(8)).unwrap();
        self.run();
        self.created(channel_id, gpadl, NtStatus::SUCCESS).unwrap();
        let open_id = self.open_id(channel_id);
        self.opened_with(channel_id, open_id, NtStatus::SUCCESS).unwrap();
        assert_eq!(self.heard(), [ClientEvent::Opened { gpadl }]);
        self.posts.clear();
        (client, gpadl)
    }

    /// The open id of the last OPEN posted for the channel.
    pub(super) fn open_id(&self, channel_id: u32) -> u32 {
        let open = self.posts.iter().rev().find(|(_, bytes)| {
            bytes.starts_with(&[5, 0, 0, 0]) && bytes[8..12] == channel_id.to_le_bytes()
        });
        u32::from_le_bytes(open.unwrap().1[12..16].try_into().unwrap())
    }

    pub(super) fn created(
        &mut self,
        channel_id: u32,
        gpadl: u32,
        status: NtStatus,
    ) -> Result<(), HostError> {
        self.host(HostMessage::GpadlCreated(GpadlCreated::new(channel_id, gpadl, status)))
    }

    pub(super) fn torn_down(&mut self, gpadl: u32) -> Result<(), HostError> {
        self.host(HostMessage::GpadlTorndown(GpadlTorndown { gpadl_id: gpadl.into() }))
    }

    pub(super) fn opened_with(
        &mut self,
        channel_id: u32,
        open_id: u32,
        status: NtStatus,
    ) -> Result<(), HostError> {
        let result = OpenChannelResult::new(channel_id, open_id, status);
        self.host(HostMessage::OpenChannelResult(result))
    }

    pub(super) fn rescind(&mut self, channel_id: u32) -> Result<(), HostError> {
        let message = RescindChannelOffer { channel_id: channel_id.into() };
        self.host(HostMessage::RescindChannelOffer(message))
    }

    /// Nothing is kept but `clients` client endpoints and `channels` offers.
    #[track_caller]
    pub(super) fn assert_rest(&self, clients: usize, channels: usize) {
        let expected = GuestCounts { clients, channels, ..GuestCounts::default() };
        assert_eq!(self.guest.counts(), expected);
    }
}

/// The host takes `version`, and grants `features` where there are any.
pub(super) fn accept(version: Version, features: FeatureFlags) -> HostMessage {
    let word = if version.has_message_sint() { 1 } else { version.to_wire() };
    let response = VersionResponse::supported(WireState::Successful, word);
    if version.has_feature_flags() {
        let supported_features = features.bits().into();
        HostMessage::VersionResponseV2(VersionResponseV2 { response, supported_features })
    } else {
        HostMessage::VersionResponse(response)
    }
}

pub(super) const REFUSE: HostMessage = HostMessage::VersionResponse(VersionResponse::UNSUPPORTED);
