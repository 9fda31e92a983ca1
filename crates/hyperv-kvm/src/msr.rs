//! The synthetic MSRs: their numbers, and what is in them.
//!
//! Source: hyperv-host section 2.

use std::ops::RangeInclusive;

/// Every synthetic MSR.
pub const RANGE: RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;

/// Which operating system the guest is; 0 turns the hypercall page off.
pub const GUEST_OS_ID: u32 = 0x4000_0000;
/// Where the hypercall page is. Bit 0 enables it, bit 1 locks it.
pub const HYPERCALL: u32 = 0x4000_0001;
/// The index of this virtual processor. Read-only.
pub const VP_INDEX: u32 = 0x4000_0002;
/// Bit 0 resets the machine.
pub const RESET: u32 = 0x4000_0003;
/// Time since the partition's start, in units of 100 ns. Read-only.
pub const TIME_REF_COUNT: u32 = 0x4000_0020;
/// Where the reference TSC page is.
pub const REFERENCE_TSC: u32 = 0x4000_0021;
/// Frequency of the TSC, in Hz. Read-only.
pub const TSC_FREQUENCY: u32 = 0x4000_0022;
/// Frequency of the local APIC's timer, in Hz. Read-only.
pub const APIC_FREQUENCY: u32 = 0x4000_0023;
/// Where the VP assist page is: kept, and not used.
pub const VP_ASSIST_PAGE: u32 = 0x4000_0073;
/// Bit 0 enables the SynIC of this VP.
pub const SCONTROL: u32 = 0x4000_0080;
/// The SynIC's version: 1. Read-only.
pub const SVERSION: u32 = 0x4000_0081;
/// Where the event flags page is.
pub const SIEFP: u32 = 0x4000_0082;
/// Where the message page is.
pub const SIMP: u32 = 0x4000_0083;
/// Written at the end of a message.
pub const EOM: u32 = 0x4000_0084;
/// The first of sixteen synthetic interrupt sources.
pub const SINT0: u32 = 0x4000_0090;
/// The last one.
pub const SINT15: u32 = 0x4000_009f;
/// The first of five registers that say why the guest has crashed.
pub const CRASH_P0: u32 = 0x4000_0100;
/// The last one.
pub const CRASH_P4: u32 = 0x4000_0104;
/// What crash reports the host takes; written to make one.
pub const CRASH_CTL: u32 = 0x4000_0105;
/// Bit 0: the guest takes the TSC as invariant.
pub const TSC_INVARIANT_CONTROL: u32 = 0x4000_0118;

/// The value of a SINT register after reset: masked.
pub const SINT_RESET: u64 = 1 << 16;

/// Bits of [`CRASH_CTL`].
pub mod crash {
    /// A crash is taken notice of; written to report one.
    pub const NOTIFY: u64 = 1 << 63;
    /// A text may come with it.
    pub const MESSAGE: u64 = 1 << 62;
}

/// A register that names a page of guest memory: SIMP, SIEFP, the hypercall and the TSC page.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct PageRegister(pub u64);

impl PageRegister {
    /// Whether bit 0 says that the page is in use.
    #[must_use]
    pub const fn is_enabled(self) -> bool {
        self.0 & 1 != 0
    }

    /// Whether bit 1 says that the register no longer changes.
    #[must_use]
    pub const fn is_locked(self) -> bool {
        self.0 & 2 != 0
    }

    /// The page's guest physical address, if it is in use.
    #[must_use]
    pub const fn page(self) -> Option<u64> {
        if self.is_enabled() { Some(self.0 & !0xfff) } else { None }
    }
}

/// A synthetic interrupt source.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SintRegister(pub u64);

impl SintRegister {
    /// The vector of the local APIC that is raised.
    #[must_use]
    pub const fn vector(self) -> u8 {
        self.0.to_le_bytes()[0]
    }

    /// Whether nothing is raised.
    #[must_use]
    pub const fn is_masked(self) -> bool {
        self.0 & 1 << 16 != 0
    }

    /// Whether a guest may write it: an unmasked source needs a vector that is one.
    #[must_use]
    pub const fn is_valid(self) -> bool {
        self.is_masked() || self.vector() >= 16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_taken_apart() {
        // What Linux writes: SINT 2 with vector 0xf3, a page with the enable bit.
        assert_eq!(SintRegister(0xf3).vector(), 0xf3);
        assert!(SintRegister(0xf3).is_valid() && !SintRegister(0xf3).is_masked());
        assert!(SintRegister(SINT_RESET).is_valid() && SintRegister(SINT_RESET).is_masked());
        assert!(!SintRegister(0x0f).is_valid());
        assert_eq!(PageRegister(0x1234_5001).page(), Some(0x1234_5000));
        assert_eq!(PageRegister(0x1234_5000).page(), None);
    }
}
