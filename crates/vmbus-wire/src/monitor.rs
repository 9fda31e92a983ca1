//! Monitor pages: signalling by a bit in shared memory that the other side looks at every so often,
//! instead of by a hypercall. A host without them offers channels with no monitor.
//!
//! There are two pages per connection, one for each direction, of the same layout. 128 monitors form
//! four groups of 32.
//!
//! Source: vmbus-wire section 4, "Monitored notifications".

use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Groups of monitors in a page.
pub const GROUPS: usize = 4;

/// Monitors in a group.
pub const MONITORS_PER_GROUP: usize = 32;

/// Layout of a monitor page. Both sides write it while the other reads: it describes bytes, and is
/// never borrowed from shared memory.
#[repr(C)]
#[derive(Clone, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct MonitorPage {
    /// At 0x000: bit g enables group g.
    pub trigger_state: U32,
    /// At 0x004: zero.
    pub reserved: U32,
    /// At 0x008: which monitors are triggered.
    pub trigger_groups: [TriggerGroup; GROUPS],
    /// At 0x028: zero.
    pub reserved2: [U64; 3],
    /// At 0x040: when the monitor is looked at next.
    pub next_check_time: [[I32; MONITORS_PER_GROUP]; GROUPS],
    /// At 0x240: the longest time from trigger to signal, in units of 100 ns.
    pub latency_100ns: [[U16; MONITORS_PER_GROUP]; GROUPS],
    /// At 0x340: zero.
    pub reserved3: [U64; 32],
    /// At 0x440: what each monitor signals.
    pub parameters: [[MonitorParameter; MONITORS_PER_GROUP]; GROUPS],
    /// At 0x840: zero.
    pub reserved4: [u8; 0x7c0],
}

/// The bits of 32 monitors.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct TriggerGroup {
    /// Bit m: monitor m is triggered. Set by the sender, cleared by whoever signals for it.
    pub pending: U32,
    /// Bit m: monitor m is armed.
    pub armed: U32,
}

/// What a monitor signals.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct MonitorParameter {
    /// The connection to signal.
    pub connection_id: U32,
    /// The event flag of the connection.
    pub flag_number: U16,
    /// Zero.
    pub reserved: U16,
}

const _: () = {
    use core::mem::offset_of;
    assert!(offset_of!(MonitorPage, trigger_groups) == 0x008);
    assert!(offset_of!(MonitorPage, reserved2) == 0x028);
    assert!(offset_of!(MonitorPage, next_check_time) == 0x040);
    assert!(offset_of!(MonitorPage, latency_100ns) == 0x240);
    assert!(offset_of!(MonitorPage, reserved3) == 0x340);
    assert!(offset_of!(MonitorPage, parameters) == 0x440);
    assert!(offset_of!(MonitorPage, reserved4) == 0x840);
    assert!(size_of::<MonitorPage>() == crate::PAGE_SIZE);
};

/// A monitor, 0 to 127, as an offer names it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct MonitorId(u8);

impl MonitorId {
    /// The monitor of this number, or `None` beyond 127.
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        if (number as usize) < GROUPS * MONITORS_PER_GROUP { Some(Self(number)) } else { None }
    }

    /// The number, 0 to 127.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0
    }

    /// The group, 0 to 3.
    #[must_use]
    pub const fn group(self) -> u8 {
        self.0 / 32
    }

    /// The bit within the group, 0 to 31.
    #[must_use]
    pub const fn bit(self) -> u8 {
        self.0 % 32
    }

    /// Byte offset of the group's `pending` word in a [`MonitorPage`].
    #[must_use]
    pub const fn pending_offset(self) -> u32 {
        0x008 + self.group() as u32 * 8
    }

    /// Byte offset of the monitor's latency in a [`MonitorPage`].
    #[must_use]
    pub const fn latency_offset(self) -> u32 {
        0x240 + self.0 as u32 * 2
    }

    /// Byte offset of the monitor's [`MonitorParameter`] in a [`MonitorPage`].
    #[must_use]
    pub const fn parameter_offset(self) -> u32 {
        0x440 + self.0 as u32 * 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitor_has_its_place_in_the_page() {
        for (number, group, bit, pending, latency, parameter) in [
            (0, 0, 0, 0x008, 0x240, 0x440),
            (31, 0, 31, 0x008, 0x27e, 0x538),
            (32, 1, 0, 0x010, 0x280, 0x540),
            (127, 3, 31, 0x020, 0x33e, 0x838),
        ] {
            let monitor = MonitorId::new(number).unwrap();
            assert_eq!(monitor.number(), number);
            assert_eq!((monitor.group(), monitor.bit()), (group, bit), "monitor {number}");
            assert_eq!(monitor.pending_offset(), pending, "monitor {number}");
            assert_eq!(monitor.latency_offset(), latency, "monitor {number}");
            assert_eq!(monitor.parameter_offset(), parameter, "monitor {number}");
        }
        assert_eq!(MonitorId::new(128), None);
    }

    #[test]
    fn the_offsets_are_those_of_the_page() {
        let mut bytes = [0_u8; crate::PAGE_SIZE];
        let monitor = MonitorId::new(70).unwrap();
        let (group, bit) = (usize::from(monitor.group()), usize::from(monitor.bit()));
        bytes[monitor.pending_offset() as usize] = 0x11;
        bytes[monitor.latency_offset() as usize] = 0x22;
        bytes[monitor.parameter_offset() as usize] = 0x33;
        let page = MonitorPage::read_from_bytes(&bytes).unwrap();
        assert_eq!(page.trigger_groups[group].pending.get(), 0x11);
        assert_eq!(page.latency_100ns[group][bit].get(), 0x22);
        assert_eq!(page.parameters[group][bit].connection_id.get(), 0x33);
    }
}
