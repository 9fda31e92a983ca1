//! Protocol versions, feature flags, and what each of them brings.
//!
//! Source: vmbus-wire section 2.

use core::fmt;

use bitflags::bitflags;

/// A protocol version, as guest and host agree on it. A closed set: the host accepts exactly these
/// values and never picks another one for the guest.
///
/// Versions are ordered, and each has everything that the ones before it have.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Version {
    /// 0.13: Windows Server 2008, and boot firmware to this day. Shared interrupt page.
    V0_13 = 0x0000_000d,
    /// 1.1: Windows 7, Server 2008 R2. Dedicated interrupts, UNLOAD_COMPLETE.
    V1_1 = 0x0001_0001,
    /// 2.4: Windows 8, Server 2012. Event flags page, target VP per channel, subchannels.
    V2_4 = 0x0002_0004,
    /// 3.0: Windows 8.1, Server 2012 R2. The guest chooses the VP that gets messages.
    V3_0 = 0x0003_0000,
    /// 4.0: Windows 10, Server 2016. hvsock, reserved channels.
    V4_0 = 0x0004_0000,
    /// 4.1: Windows 10 RS3. MODIFY_CHANNEL, TL_CONNECT_RESULT.
    V4_1 = 0x0004_0001,
    /// 5.0: Windows 10 RS3. The guest chooses the SINT; the host names the message connection.
    V5_0 = 0x0005_0000,
    /// 5.1: Windows 10 RS4. The guest names its virtual trust level.
    V5_1 = 0x0005_0001,
    /// 5.2: Windows 10 RS5, Server 2019. Silo id in hvsock connect requests.
    V5_2 = 0x0005_0002,
    /// 5.3: Server 2022. MODIFY_CHANNEL_RESPONSE.
    V5_3 = 0x0005_0003,
    /// 6.0: "Copper". [`FeatureFlags`] and what they bring.
    V6_0 = 0x0006_0000,
}

impl Version {
    /// Every version, oldest first.
    pub const ALL: [Self; 11] = [
        Self::V0_13,
        Self::V1_1,
        Self::V2_4,
        Self::V3_0,
        Self::V4_0,
        Self::V4_1,
        Self::V5_0,
        Self::V5_1,
        Self::V5_2,
        Self::V5_3,
        Self::V6_0,
    ];

    /// The newest version.
    pub const LATEST: Self = Self::V6_0;

    /// The version with this value on the wire, or `None` where there is none.
    #[must_use]
    pub const fn from_wire(value: u32) -> Option<Self> {
        Some(match value {
            0x0000_000d => Self::V0_13,
            0x0001_0001 => Self::V1_1,
            0x0002_0004 => Self::V2_4,
            0x0003_0000 => Self::V3_0,
            0x0004_0000 => Self::V4_0,
            0x0004_0001 => Self::V4_1,
            0x0005_0000 => Self::V5_0,
            0x0005_0001 => Self::V5_1,
            0x0005_0002 => Self::V5_2,
            0x0005_0003 => Self::V5_3,
            0x0006_0000 => Self::V6_0,
            _ => return None,
        })
    }

    /// The value on the wire: major number in the upper, minor number in the lower 16 bits.
    #[must_use]
    pub const fn to_wire(self) -> u32 {
        self as u32
    }

    /// The number before the point.
    #[must_use]
    pub const fn major(self) -> u32 {
        self.to_wire() >> 16
    }

    /// The number behind the point.
    #[must_use]
    pub const fn minor(self) -> u32 {
        self.to_wire() & 0xffff
    }

    /// Offers carry a connection id and say whether the interrupt is the channel's own; 1.1.
    #[must_use]
    pub const fn has_dedicated_interrupts(self) -> bool {
        self.at_least(Self::V1_1)
    }

    /// The host answers UNLOAD with UNLOAD_COMPLETE; 1.1.
    #[must_use]
    pub const fn has_unload_complete(self) -> bool {
        self.at_least(Self::V1_1)
    }

    /// Interrupts to the guest are flags in its SynIC event page, not bits in the interrupt page
    /// that INITIATE_CONTACT names; 2.4.
    #[must_use]
    pub const fn has_event_flags_page(self) -> bool {
        self.at_least(Self::V2_4)
    }

    /// OPEN_CHANNEL chooses the VP that is interrupted; 2.4. Before, it is VP 0.
    #[must_use]
    pub const fn has_channel_target_vp(self) -> bool {
        self.at_least(Self::V2_4)
    }

    /// Offers carry a subchannel index; 2.4.
    #[must_use]
    pub const fn has_subchannels(self) -> bool {
        self.at_least(Self::V2_4)
    }

    /// A ring's writer may ask to be signalled when there is space (`pending_send_size`); 2.4.
    #[must_use]
    pub const fn has_pending_send_size(self) -> bool {
        self.at_least(Self::V2_4)
    }

    /// VERSION_RESPONSE reports a failure to connect by its connection state; 2.4.
    #[must_use]
    pub const fn has_connection_state(self) -> bool {
        self.at_least(Self::V2_4)
    }

    /// Messages to the guest go to the VP that INITIATE_CONTACT names; 3.0. Before, to VP 0.
    #[must_use]
    pub const fn has_message_target_vp(self) -> bool {
        self.at_least(Self::V3_0)
    }

    /// A guest may unload and connect again; 3.0.
    #[must_use]
    pub const fn has_reconnect(self) -> bool {
        self.at_least(Self::V3_0)
    }

    /// TL_CONNECT_REQUEST; 4.0.
    #[must_use]
    pub const fn has_hvsock(self) -> bool {
        self.at_least(Self::V4_0)
    }

    /// OPEN_RESERVED_CHANNEL and CLOSE_RESERVED_RESPONSE; 4.0.
    #[must_use]
    pub const fn has_reserved_channels(self) -> bool {
        self.at_least(Self::V4_0)
    }

    /// MODIFY_CHANNEL; 4.1.
    #[must_use]
    pub const fn has_modify_channel(self) -> bool {
        self.at_least(Self::V4_1)
    }

    /// TL_CONNECT_RESULT, sent when a connect request fails; 4.1.
    #[must_use]
    pub const fn has_hvsock_connect_result(self) -> bool {
        self.at_least(Self::V4_1)
    }

    /// INITIATE_CONTACT carries the SINT for messages in place of an interrupt page, is posted to
    /// connection 4, and the response names the connection for everything later; 5.0.
    #[must_use]
    pub const fn has_message_sint(self) -> bool {
        self.at_least(Self::V5_0)
    }

    /// INITIATE_CONTACT carries the virtual trust level for messages; 5.1.
    #[must_use]
    pub const fn has_message_vtl(self) -> bool {
        self.at_least(Self::V5_1)
    }

    /// TL_CONNECT_REQUEST may carry a silo id; 5.2.
    #[must_use]
    pub const fn has_hvsock_silo(self) -> bool {
        self.at_least(Self::V5_2)
    }

    /// The host answers MODIFY_CHANNEL; 5.3.
    #[must_use]
    pub const fn has_modify_channel_response(self) -> bool {
        self.at_least(Self::V5_3)
    }

    /// [`FeatureFlags`] are negotiated; 6.0.
    #[must_use]
    pub const fn has_feature_flags(self) -> bool {
        self.at_least(Self::V6_0)
    }

    const fn at_least(self, other: Self) -> bool {
        self.to_wire() >= other.to_wire()
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major(), self.minor())
    }
}

bitflags! {
    /// Features of version 6.0: asked for in INITIATE_CONTACT, granted (the intersection with what
    /// the host has) in VERSION_RESPONSE. Bits without a name here may come from a newer peer; a host
    /// does not grant them. Always empty below 6.0.
    #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
    pub struct FeatureFlags: u32 {
        /// OPEN_CHANNEL carries an event flag and a connection id of the guest's choice.
        const GUEST_SPECIFIED_SIGNAL_PARAMETERS = 0x01;
        /// OPEN_CHANNEL carries flags that may redirect the channel's interrupt.
        const CHANNEL_INTERRUPT_REDIRECTION = 0x02;
        /// MODIFY_CONNECTION and its response.
        const MODIFY_CONNECTION = 0x04;
        /// INITIATE_CONTACT carries a client id.
        const CLIENT_ID = 0x08;
        /// Offers say which memory of a channel is confidential (isolated VMs).
        const CONFIDENTIAL_CHANNELS = 0x10;
        /// PAUSE, its response, and RESUME.
        const PAUSE_RESUME = 0x20;
        /// VERSION_RESPONSE names monitor pages that the host provides.
        const SERVER_SPECIFIED_MONITOR_PAGES = 0x40;
        /// Offers say whether external memory must be pinned.
        const GPA_PINNING = 0x80;
    }
}

impl FeatureFlags {
    /// Whether OPEN_CHANNEL has its longer form of 156 bytes.
    #[must_use]
    pub const fn has_open_v2(self) -> bool {
        self.intersects(
            Self::GUEST_SPECIFIED_SIGNAL_PARAMETERS.union(Self::CHANNEL_INTERRUPT_REDIRECTION),
        )
    }
}

/// What guest and host have agreed on.
pub type Negotiated = (Version, FeatureFlags);

#[cfg(test)]
mod tests {
    use std::format;

    use super::*;

    #[test]
    fn versions_are_in_order_and_read_back() {
        assert!(Version::ALL.is_sorted_by(|a, b| a < b && a.to_wire() < b.to_wire()));
        assert_eq!(Version::ALL.last(), Some(&Version::LATEST));
        for version in Version::ALL {
            assert_eq!(Version::from_wire(version.to_wire()), Some(version), "{version}");
        }
        for value in [0, 0xc, 0xe, 0x0001_0000, 0x0005_0004, 0x0006_0001, u32::MAX] {
            assert_eq!(Version::from_wire(value), None, "{value:#x}");
        }
        assert_eq!(format!("{} {}", Version::V0_13, Version::V5_3), "0.13 5.3");
    }

    #[test]
    fn each_ability_comes_with_its_version() {
        type Has = fn(Version) -> bool;
        let table: [(&str, Has, Version); 19] = [
            ("dedicated interrupts", Version::has_dedicated_interrupts, Version::V1_1),
            ("unload complete", Version::has_unload_complete, Version::V1_1),
            ("event flags page", Version::has_event_flags_page, Version::V2_4),
            ("channel target VP", Version::has_channel_target_vp, Version::V2_4),
            ("subchannels", Version::has_subchannels, Version::V2_4),
            ("pending send size", Version::has_pending_send_size, Version::V2_4),
            ("connection state", Version::has_connection_state, Version::V2_4),
            ("message target VP", Version::has_message_target_vp, Version::V3_0),
            ("reconnect", Version::has_reconnect, Version::V3_0),
            ("hvsock", Version::has_hvsock, Version::V4_0),
            ("reserved channels", Version::has_reserved_channels, Version::V4_0),
            ("modify channel", Version::has_modify_channel, Version::V4_1),
            ("connect result", Version::has_hvsock_connect_result, Version::V4_1),
            ("message SINT", Version::has_message_sint, Version::V5_0),
            ("message VTL", Version::has_message_vtl, Version::V5_1),
            ("silo", Version::has_hvsock_silo, Version::V5_2),
            ("modify response", Version::has_modify_channel_response, Version::V5_3),
            ("feature flags", Version::has_feature_flags, Version::V6_0),
            ("latest", |version| version == Version::LATEST, Version::V6_0),
        ];
        for (what, has, since) in table {
            for version in Version::ALL {
                assert_eq!(has(version), version >= since, "{what} in {version}");
            }
        }
    }

    #[test]
    fn the_longer_open_comes_with_either_of_two_features() {
        for bit in 0..8 {
            let flags = FeatureFlags::from_bits_retain(1 << bit);
            assert_eq!(flags.has_open_v2(), bit < 2, "bit {bit}");
        }
        assert_eq!(FeatureFlags::all().bits(), 0xff);
    }
}
