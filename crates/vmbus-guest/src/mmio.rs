//! MMIO space for the channels that want some.

use std::collections::BTreeMap;

/// Bytes in the unit in which offers ask for MMIO space.
const MEGABYTE: u64 = 1 << 20;

/// A part of the guest physical address space that holds no RAM, and that the guest may hand to its
/// devices. A guest learns of it from its firmware.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MmioWindow {
    /// Guest physical address of its first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Who has which part of the window. At most one part per channel.
#[derive(Debug)]
pub(crate) struct MmioSpace {
    window: Option<MmioWindow>,
    /// Start of each part handed out, with its length and the channel that has it.
    taken: BTreeMap<u64, (u64, u32)>,
}

impl MmioSpace {
    pub(crate) fn new(window: Option<MmioWindow>) -> Self {
        Self { window, taken: BTreeMap::new() }
    }

    /// The lowest free part of `required + optional` MiB for `channel`, or of `required` MiB if
    /// that is all there is. `Ok(None)` where nothing is asked for.
    pub(crate) fn allocate(
        &mut self,
        channel: u32,
        required: u16,
        optional: u16,
    ) -> Result<Option<(u64, u64)>, NoMmio> {
        let required = u64::from(required) * MEGABYTE;
        let wanted = required + u64::from(optional) * MEGABYTE;
        for len in [wanted, required] {
            if len != 0
                && let Some(gpa) = self.find(len)
            {
                self.taken.insert(gpa, (len, channel));
                return Ok(Some((gpa, len)));
            }
        }
        if required == 0 { Ok(None) } else { Err(NoMmio) }
    }

    /// Takes back what `channel` has, if anything.
    pub(crate) fn free(&mut self, channel: u32) {
        self.taken.retain(|_, (_, owner)| *owner != channel);
    }

    pub(crate) fn clear(&mut self) {
        self.taken.clear();
    }

    /// First fit: parts are few and live as long as their devices.
    fn find(&self, len: u64) -> Option<u64> {
        let window = self.window?;
        let end = window.gpa.checked_add(window.len)?;
        let mut candidate = window.gpa.checked_next_multiple_of(MEGABYTE)?;
        for (&gpa, &(taken, _)) in &self.taken {
            if candidate.checked_add(len)? <= gpa {
                break;
            }
            candidate = gpa + taken; // both were inside the window, whose end fits
        }
        (candidate.checked_add(len)? <= end).then_some(candidate)
    }
}

/// The window has no room for what an offer requires.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct NoMmio;

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn parts_are_first_fit_and_come_back() {
        let mut space = MmioSpace::new(Some(MmioWindow { gpa: 0x1000, len: 10 * MIB }));
        // The window starts off a MiB boundary, so its first usable MiB is the second.
        assert_eq!(space.allocate(1, 4, 0), Ok(Some((MIB, 4 * MIB))));
        assert_eq!(space.allocate(2, 2, 0), Ok(Some((5 * MIB, 2 * MIB))));
        assert_eq!(space.allocate(3, 4, 0), Err(NoMmio));
        assert_eq!(space.allocate(3, 2, 8), Ok(Some((7 * MIB, 2 * MIB))), "optional part dropped");
        space.free(1);
        assert_eq!(space.allocate(4, 1, 3), Ok(Some((MIB, 4 * MIB))), "optional part granted");
        space.clear();
        assert_eq!(space.allocate(5, 9, 0), Ok(Some((MIB, 9 * MIB))));
    }

    #[test]
    fn no_window_serves_only_those_who_require_nothing() {
        let mut space = MmioSpace::new(None);
        assert_eq!(space.allocate(1, 0, 0), Ok(None));
        assert_eq!(space.allocate(1, 0, 8), Ok(None));
        assert_eq!(space.allocate(1, 1, 0), Err(NoMmio));
    }

    #[test]
    fn a_window_at_the_end_of_the_address_space_does_not_overflow() {
        let mut space = MmioSpace::new(Some(MmioWindow { gpa: u64::MAX - 2 * MIB, len: 2 * MIB }));
        assert_eq!(space.allocate(1, 1, 0), Ok(Some((u64::MAX - 2 * MIB + 1, MIB))));
        assert_eq!(space.allocate(2, u16::MAX, u16::MAX), Err(NoMmio));
        let mut space = MmioSpace::new(Some(MmioWindow { gpa: u64::MAX, len: MIB }));
        assert_eq!(space.allocate(1, 1, 0), Err(NoMmio));
    }
}
