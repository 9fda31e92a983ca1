//! A channel whose peer the test plays, to lie to it, and an honest channel of the same guest beside it.

use std::sync::Arc;

use kmcl::bus::BusEvent;
use kmcl::{Channel, ChannelError, ChannelState, Side};
use vmbus_wire::packet::PacketKind;

use super::raw::{Peer, RawBus, as_bus, push, read_all};
use super::{Call, Device, client, open_descriptors, server, until};

/// Bytes of data in the rings: 8 pages each, less the control page.
pub(crate) const DATA: u32 = 7 * 4096;

/// Pages of each ring.
pub(crate) const PAGES: u32 = 8;

/// A channel whose peer the test plays, and an honest one beside it.
pub(crate) struct Victim {
    pub(crate) bus: Arc<RawBus>,
    pub(crate) channel: Channel,
    pub(crate) device: Arc<Device>,
    pub(crate) honest: Honest,
    /// Pages and mappings that were free before the first opening, and open descriptors.
    before: ((u64, usize), usize),
}

impl Victim {
    /// A channel that is Enabled.
    pub(crate) fn new(side: Side, device: Arc<Device>, set_up: impl FnOnce(&Channel)) -> Self {
        let bus = RawBus::new();
        let channel = match side {
            Side::Server => server(&as_bus(&bus), &device),
            Side::Client => client(&as_bus(&bus), &device),
        };
        channel.init_set_maximum_external_data(8192, 2).unwrap();
        set_up(&channel);
        let honest = Honest::open(&bus);
        let before = (bus.free(), open_descriptors());
        Self { bus, channel, device, honest, before }
    }

    /// Opens the channel; `prepare` has the rings before the channel sees them.
    pub(crate) fn open_prepared(&self, prepare: impl FnOnce(&Peer)) -> Peer {
        if self.channel.state() == ChannelState::Disabled {
            self.channel.enable().unwrap();
        }
        self.channel.start();
        let peer = match self.channel.side() {
            Side::Server => self.bus.open_prepared(PAGES, PAGES, prepare),
            Side::Client => {
                self.bus.offered(None);
                self.channel.process(1);
                let (peer, rings) = self.bus.make_rings(PAGES, PAGES);
                prepare(&peer);
                assert!(self.bus.post(BusEvent::OpenCompleted(Ok(rings))));
                peer
            }
        };
        self.channel.process(8);
        peer
    }

    pub(crate) fn open(&self) -> Peer {
        let peer = self.open_prepared(|_| ());
        assert_eq!(self.channel.state(), ChannelState::Active);
        self.device.take_calls();
        self.bus.take_said();
        peer
    }

    pub(crate) fn close(&self, peer: Peer) {
        let ending = match self.channel.side() {
            Side::Server => BusEvent::PeerClosed,
            Side::Client => BusEvent::Rescinded,
        };
        assert!(self.bus.post(ending));
        self.channel.process(8);
        assert!(!self.channel.state().is_open(), "{:?}", self.channel);
        drop(peer);
    }

    /// The channel has stopped for `reason`, says so once, delivers nothing, and lives: it is closed
    /// and opened again, works, and leaves nothing behind. The channel beside it works all the time.
    pub(crate) fn stops(&self, peer: Peer, reason: ChannelError, what: &str) {
        assert_eq!(self.channel.stop_reason(), Some(reason), "{what}");
        assert_eq!(self.channel.state(), ChannelState::Active, "{what}");
        self.honest.works();
        self.device.take_calls();
        // Nothing more is read, whatever comes.
        for _ in 0..3 {
            peer.ring();
            self.channel.process(64);
        }
        assert_eq!(self.device.take_calls(), [], "{what}");
        assert_eq!(self.channel.stop_reason(), Some(reason), "{what}");
        self.recovers(peer, what);
    }

    /// Closes the channel, opens it again, sees it work, and closes it for good.
    pub(crate) fn recovers(&self, peer: Peer, what: &str) {
        self.close(peer);
        assert_eq!(self.device.take_changes(), [Call::Suspend, Call::Closed], "{what}");
        assert_eq!(self.channel.stop_reason(), None, "{what}");
        let peer = self.open();
        self.device.with_packets(|_, packet| packet.complete(&[0xaa; 8]));
        let (mut reader, mut writer) = (peer.reader(), peer.writer());
        // A message of 8 bytes on a pipe, one of 16 elsewhere.
        let message = [1, 0, 0, 0, 8, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
        push(&mut writer, PacketKind::InBand, true, 77, &message);
        self.channel.process(8);
        let answers = read_all(&mut reader);
        assert_eq!(answers.len(), 1, "{what}");
        assert_eq!((answers[0].transaction_id, &*answers[0].payload), (77, &[0xaa; 8][..]));
        drop((reader, writer));
        self.close(peer);
        self.ends(what);
    }

    /// Nothing is left of the openings.
    pub(crate) fn ends(&self, what: &str) {
        self.honest.works();
        assert_eq!(self.channel.incoming_outstanding(), 0, "{what}");
        assert_eq!(self.channel.outgoing_in_use(), (0, 0), "{what}");
        assert_eq!(self.bus.free(), self.before.0, "{what}: pages and mappings");
        until("descriptors are closed", || open_descriptors() <= self.before.1);
        self.device.take_calls();
    }
}

/// A channel of the same guest whose peer is honest.
pub(crate) struct Honest {
    pub(crate) channel: Channel,
    peer: Peer,
}

impl Honest {
    pub(crate) fn open(beside: &RawBus) -> Self {
        let bus = beside.beside();
        let channel = server(&as_bus(&bus), &Device::echo());
        channel.enable().unwrap();
        channel.start();
        let peer = bus.open(PAGES, PAGES);
        channel.process(1);
        Self { channel, peer }
    }

    pub(crate) fn works(&self) {
        let (mut reader, mut writer) = (self.peer.reader(), self.peer.writer());
        push(&mut writer, PacketKind::InBand, true, 3, &[5; 16]);
        self.channel.process(8);
        let answers = read_all(&mut reader);
        assert_eq!(answers.len(), 1);
        assert_eq!((answers[0].transaction_id, &*answers[0].payload), (3, &[5; 16][..]));
        assert_eq!(self.channel.stop_reason(), None);
    }
}
