//! How a guest and the controller come to terms: the initialisation, as a pure state machine.
//!
//! ```text
//! Closed ── BEGIN ──► Begun ── VERSION ──► Agreed ── PROPERTIES ──► Described ── END ──► Ready
//!                      ▲ │ refused                                                       │  │ SRBs,
//!                      │ └──┘                                     BEGIN, once more       │  │ resets,
//!                      └─────────────────────────────────────────────────────────────────┘  ▼ subchannels
//! ```
//!
//! Everything out of this order is refused with STATUS_INVALID_DEVICE_STATE.
//!
//! Source: devices, section 1, init order.

use vmbus_wire::status::NtStatus;
use vstor_wire::packet::{Operation, VstorPacket};
use vstor_wire::protocol::{
    ChannelProperties, ProtocolVersion, ProtocolVersionBody, SubChannelRequest,
};
use zerocopy::little_endian::{U16, U32, U64};

use crate::disk::MAX_TRANSFER_BYTES;

/// Where the initialisation is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) enum Phase {
    /// Nothing was said since the channel was opened.
    #[default]
    Closed,
    /// A version is to be agreed.
    Begun,
    /// A version is agreed.
    Agreed(ProtocolVersion),
    /// The guest knows the controller's properties.
    Described(ProtocolVersion),
    /// SRBs are welcome.
    Ready {
        version: ProtocolVersion,
        /// Subchannels were granted.
        has_sub_channels: bool,
    },
}

/// What follows from a packet of the initialisation, beside its answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Effect {
    None,
    /// The guest starts over: subchannels of the former time go.
    StartOver,
    /// SRBs are welcome from now on.
    Ready(ProtocolVersion),
    /// Offer this many subchannels.
    OfferSubChannels(u16),
}

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(super) struct Handshake {
    phase: Phase,
    max_sub_channels: u16,
}

impl Handshake {
    pub(super) fn new(max_sub_channels: u16) -> Self {
        Self { phase: Phase::Closed, max_sub_channels }
    }

    /// One that has come to `phase`.
    pub(super) fn at(phase: Phase, max_sub_channels: u16) -> Self {
        Self { phase, max_sub_channels }
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    pub(super) fn max_sub_channels(&self) -> u16 {
        self.max_sub_channels
    }

    /// The version that was agreed, once SRBs are welcome.
    #[cfg(test)]
    fn ready(&self) -> Option<ProtocolVersion> {
        match self.phase {
            Phase::Ready { version, .. } => Some(version),
            _ => None,
        }
    }

    /// The channel was opened or closed.
    pub(super) fn reset(&mut self) {
        self.phase = Phase::Closed;
    }

    /// Subchannels that were granted could not be offered.
    pub(super) fn take_sub_channels_back(&mut self) {
        if let Phase::Ready { has_sub_channels, .. } = &mut self.phase {
            *has_sub_channels = false;
        }
    }

    /// Takes a packet of the initialisation; gives its answer, and what follows.
    pub(super) fn on(&mut self, packet: &VstorPacket) -> (VstorPacket, Effect) {
        let (status, phase, effect) = match (packet.operation, self.phase) {
            (Operation::BEGIN_INITIALIZATION, Phase::Closed) => {
                (NtStatus::SUCCESS, Phase::Begun, Effect::None)
            }
            (Operation::BEGIN_INITIALIZATION, Phase::Ready { .. }) => {
                (NtStatus::SUCCESS, Phase::Begun, Effect::StartOver)
            }
            (Operation::QUERY_PROTOCOL_VERSION, Phase::Begun) => {
                let version = packet.body::<ProtocolVersionBody>().version();
                if version.is_known() {
                    (NtStatus::SUCCESS, Phase::Agreed(version), Effect::None)
                } else {
                    // The guest goes on with an older one.
                    (NtStatus::REVISION_MISMATCH, Phase::Begun, Effect::None)
                }
            }
            (Operation::QUERY_PROPERTIES, Phase::Agreed(version)) => {
                self.phase = Phase::Described(version);
                let answer = VstorPacket::answer(NtStatus::SUCCESS);
                return (answer.with_body(&self.properties(version)), Effect::None);
            }
            (Operation::END_INITIALIZATION, Phase::Described(version)) => {
                let ready = Phase::Ready { version, has_sub_channels: false };
                (NtStatus::SUCCESS, ready, Effect::Ready(version))
            }
            (Operation::CREATE_SUB_CHANNELS, Phase::Ready { version, has_sub_channels: false }) => {
                let count = packet.body::<SubChannelRequest>().count.get();
                match count {
                    _ if count > self.sub_channels(version) => {
                        (NtStatus::INVALID_PARAMETER, self.phase, Effect::None)
                    }
                    0 => (NtStatus::SUCCESS, self.phase, Effect::None),
                    _ => (
                        NtStatus::SUCCESS,
                        Phase::Ready { version, has_sub_channels: true },
                        Effect::OfferSubChannels(count),
                    ),
                }
            }
            _ => (NtStatus::INVALID_DEVICE_STATE, self.phase, Effect::None),
        };
        self.phase = phase;
        (VstorPacket::answer(status), effect)
    }

    /// Most subchannels a guest of this version may have.
    fn sub_channels(&self, version: ProtocolVersion) -> u16 {
        if version.has_sub_channels() { self.max_sub_channels } else { 0 }
    }

    fn properties(&self, version: ProtocolVersion) -> ChannelProperties {
        let sub_channels = self.sub_channels(version);
        let flags = if sub_channels > 0 { ChannelProperties::MULTI_CHANNEL } else { 0 };
        ChannelProperties {
            reserved: U32::ZERO,
            max_sub_channel_count: U16::new(sub_channels),
            reserved2: U16::ZERO,
            flags: U32::new(flags),
            max_transfer_bytes: U32::new(MAX_TRANSFER_BYTES),
            reserved3: U64::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGIN: Operation = Operation::BEGIN_INITIALIZATION;
    const VERSION: Operation = Operation::QUERY_PROTOCOL_VERSION;
    const PROPERTIES: Operation = Operation::QUERY_PROPERTIES;
    const END: Operation = Operation::END_INITIALIZATION;
    const CREATE: Operation = Operation::CREATE_SUB_CHANNELS;

    const V: ProtocolVersion = ProtocolVersion::WIN8;
    const READY: Phase = Phase::Ready { version: V, has_sub_channels: false };
    const WIDE: Phase = Phase::Ready { version: V, has_sub_channels: true };

    fn packet(operation: Operation) -> VstorPacket {
        let packet = VstorPacket::request(operation);
        match operation {
            VERSION => packet.with_body(&ProtocolVersionBody::new(V)),
            CREATE => packet.with_body(&SubChannelRequest { count: U16::new(3) }),
            _ => packet,
        }
    }

    #[test]
    fn every_step_out_of_order_is_refused_and_changes_nothing() {
        let phases =
            [Phase::Closed, Phase::Begun, Phase::Agreed(V), Phase::Described(V), READY, WIDE];
        for phase in phases {
            for operation in [BEGIN, VERSION, PROPERTIES, END, CREATE] {
                let expected = match (phase, operation) {
                    (Phase::Closed, BEGIN) => Some((Phase::Begun, Effect::None)),
                    (Phase::Begun, VERSION) => Some((Phase::Agreed(V), Effect::None)),
                    (Phase::Agreed(_), PROPERTIES) => Some((Phase::Described(V), Effect::None)),
                    (Phase::Described(_), END) => Some((READY, Effect::Ready(V))),
                    (READY, CREATE) => Some((WIDE, Effect::OfferSubChannels(3))),
                    (READY | WIDE, BEGIN) => Some((Phase::Begun, Effect::StartOver)),
                    _ => None,
                };
                let mut handshake = Handshake { phase, max_sub_channels: 8 };
                let (answer, effect) = handshake.on(&packet(operation));
                let row = format!("{operation:?} in {phase:?}");
                assert_eq!(answer.operation, Operation::COMPLETE_IO, "{row}");
                match expected {
                    Some((next, follows)) => {
                        assert_eq!(answer.status(), NtStatus::SUCCESS, "{row}");
                        assert_eq!((handshake.phase, effect), (next, follows), "{row}");
                    }
                    None => {
                        assert_eq!(answer.status(), NtStatus::INVALID_DEVICE_STATE, "{row}");
                        assert_eq!((handshake.phase, effect), (phase, Effect::None), "{row}");
                    }
                }
            }
        }
    }

    #[test]
    fn versions_are_agreed_downwards() {
        for (raw, ok) in [
            (0x0200, true),
            (0x0402, true),
            (0x0501, true),
            (0x0600, true),
            (0x0602, true),
            (0x0700, false),
            (0x0601, false),
            (0x0000, false),
            (0xffff, false),
        ] {
            let mut handshake = Handshake { phase: Phase::Begun, max_sub_channels: 0 };
            let query = VstorPacket::request(VERSION)
                .with_body(&ProtocolVersionBody::new(ProtocolVersion(raw)));
            let (answer, _) = handshake.on(&query);
            let status = if ok { NtStatus::SUCCESS } else { NtStatus::REVISION_MISMATCH };
            assert_eq!(answer.status(), status, "{raw:#x}");
            let next = if ok { Phase::Agreed(ProtocolVersion(raw)) } else { Phase::Begun };
            assert_eq!(handshake.phase, next, "{raw:#x}");
        }
    }

    #[test]
    fn properties_say_what_the_version_can_have() {
        for (version, limit, sub_channels, flags) in [
            (ProtocolVersion::WIN10, 8, 8, 1),
            (ProtocolVersion::WIN8, 1, 1, 1),
            (ProtocolVersion::WIN10, 0, 0, 0),
            (ProtocolVersion::WIN7, 8, 0, 0),
        ] {
            let mut handshake =
                Handshake { phase: Phase::Agreed(version), max_sub_channels: limit };
            let (answer, _) = handshake.on(&packet(PROPERTIES));
            let properties: ChannelProperties = answer.body();
            assert_eq!(properties.max_sub_channel_count.get(), sub_channels, "{version} {limit}");
            assert_eq!(properties.flags.get(), flags, "{version} {limit}");
            assert_eq!(properties.max_transfer_bytes.get(), 0x40000, "{version} {limit}");
        }
    }

    #[test]
    fn subchannels_are_granted_up_to_the_limit_and_once() {
        for (count, status, effect) in [
            (0, NtStatus::SUCCESS, Effect::None),
            (1, NtStatus::SUCCESS, Effect::OfferSubChannels(1)),
            (4, NtStatus::SUCCESS, Effect::OfferSubChannels(4)),
            (5, NtStatus::INVALID_PARAMETER, Effect::None),
            (u16::MAX, NtStatus::INVALID_PARAMETER, Effect::None),
        ] {
            let mut handshake = Handshake { phase: READY, max_sub_channels: 4 };
            let create = VstorPacket::request(CREATE)
                .with_body(&SubChannelRequest { count: U16::new(count) });
            let (answer, follows) = handshake.on(&create);
            assert_eq!((answer.status(), follows), (status, effect), "{count}");
            assert_eq!(handshake.ready(), Some(V), "{count}");
        }
        let mut handshake = Handshake { phase: WIDE, max_sub_channels: 4 };
        handshake.take_sub_channels_back();
        assert_eq!(handshake.on(&packet(CREATE)).1, Effect::OfferSubChannels(3));
    }
}
