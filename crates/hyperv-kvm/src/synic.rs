//! The SynIC of one virtual processor: where its pages are, and whether they are in use.
//!
//! Where KVM emulates the SynIC these registers mirror its own, as its exits tell of them; else they
//! are the only ones.

pub(crate) mod page;

use std::sync::{Mutex, MutexGuard, PoisonError};

use vmbus_memory::GuestMemory;
use vmbus_wire::synic::SINT_COUNT;

use crate::msr::{self, PageRegister, SintRegister};

/// The registers of one VP.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Registers {
    /// Bit 0: the SynIC works at all.
    scontrol: u64,
    /// Event flags page.
    siefp: PageRegister,
    /// Message page.
    simp: PageRegister,
    /// The interrupt sources. Where KVM emulates them they are not known here, and look unmasked.
    sints: [SintRegister; SINT_COUNT as usize],
    /// Kept, and not used.
    vp_assist_page: u64,
}

impl Registers {
    /// After reset: enabled, no pages, every source masked.
    const RESET: Self = Self {
        scontrol: 1,
        siefp: PageRegister(0),
        simp: PageRegister(0),
        sints: [SintRegister(msr::SINT_RESET); SINT_COUNT as usize],
        vp_assist_page: 0,
    };

    /// The page in `register`, if messages or events can go there.
    fn page(&self, register: PageRegister) -> Option<u64> {
        if self.scontrol & 1 != 0 { register.page() } else { None }
    }

    /// The vector of a source, or `None` while it is masked.
    fn vector(&self, sint: u8) -> Option<u8> {
        let register = self.sints.get(usize::from(sint))?;
        (!register.is_masked()).then(|| register.vector())
    }
}

/// The registers of one VP, as their MSRs have them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Values {
    pub(crate) scontrol: u64,
    pub(crate) siefp: u64,
    pub(crate) simp: u64,
    pub(crate) sints: [u64; SINT_COUNT as usize],
    pub(crate) vp_assist_page: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Synic {
    registers: Mutex<Registers>,
}

impl Synic {
    pub(crate) fn new() -> Self {
        Self { registers: Mutex::new(Registers::RESET) }
    }

    /// All registers, as their MSRs have them.
    pub(crate) fn values(&self) -> Values {
        let Registers { scontrol, siefp, simp, sints, vp_assist_page } = *self.lock();
        let sints = sints.map(|sint| sint.0);
        Values { scontrol, siefp: siefp.0, simp: simp.0, sints, vp_assist_page }
    }

    /// Goes on with registers that were saved: pages that are in use have what the guest and this host
    /// have left in them. Where `mirrored`, KVM has the interrupt sources.
    pub(crate) fn restore(&self, values: &Values, mirrored: bool) {
        let Values { scontrol, siefp, simp, sints, vp_assist_page } = *values;
        let sints = if mirrored { [0; SINT_COUNT as usize] } else { sints };
        let (siefp, simp) = (PageRegister(siefp), PageRegister(simp));
        let sints = sints.map(SintRegister);
        *self.lock() = Registers { scontrol, siefp, simp, sints, vp_assist_page };
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The page for messages, and the vector to raise for `sint`.
    pub(crate) fn message_page(&self, sint: u8) -> Option<(u64, u8)> {
        let registers = self.lock();
        Some((registers.page(registers.simp)?, registers.vector(sint)?))
    }

    /// The page for event flags, and the vector to raise for `sint`.
    pub(crate) fn event_page(&self, sint: u8) -> Option<(u64, u8)> {
        let registers = self.lock();
        Some((registers.page(registers.siefp)?, registers.vector(sint)?))
    }

    /// What the guest reads from one of the SynIC's MSRs, or `None` if it is none.
    pub(crate) fn read(&self, index: u32) -> Option<u64> {
        let registers = self.lock();
        Some(match index {
            msr::SCONTROL => registers.scontrol,
            msr::SVERSION => 1,
            msr::SIEFP => registers.siefp.0,
            msr::SIMP => registers.simp.0,
            msr::EOM => 0,
            msr::VP_ASSIST_PAGE => registers.vp_assist_page,
            msr::SINT0..=msr::SINT15 => {
                registers.sints.get((index - msr::SINT0) as usize).map(|sint| sint.0)?
            }
            _ => return None,
        })
    }

    /// Takes what the guest writes to one of the SynIC's MSRs; `false` where it may not.
    pub(crate) fn write(&self, index: u32, value: u64, memory: &GuestMemory) -> bool {
        let mut registers = self.lock();
        let page = |register: &mut PageRegister| {
            let (before, now) = (register.page(), PageRegister(value));
            *register = now;
            now.page().filter(|page| before != Some(*page))
        };
        let fresh = match index {
            msr::SCONTROL => {
                registers.scontrol = value;
                None
            }
            msr::SIEFP => page(&mut registers.siefp),
            msr::SIMP => page(&mut registers.simp),
            msr::EOM => None,
            msr::VP_ASSIST_PAGE => {
                registers.vp_assist_page = value;
                None
            }
            msr::SINT0..=msr::SINT15 if SintRegister(value).is_valid() => {
                if let Some(sint) = registers.sints.get_mut((index - msr::SINT0) as usize) {
                    *sint = SintRegister(value);
                }
                None
            }
            _ => return false,
        };
        drop(registers);
        if let Some(page) = fresh {
            page::clear(memory, page);
        }
        true
    }

    /// Mirrors what KVM tells of its own registers.
    pub(crate) fn mirror(&self, scontrol: u64, siefp: u64, simp: u64, memory: &GuestMemory) {
        let mut fresh = [None; 2];
        {
            let mut registers = self.lock();
            let before = [registers.siefp, registers.simp];
            let now = [PageRegister(siefp), PageRegister(simp)];
            registers.scontrol = scontrol;
            [registers.siefp, registers.simp] = now;
            // KVM delivers by the vector in its own register, or not at all.
            registers.sints = [SintRegister(0); SINT_COUNT as usize];
            for ((fresh, before), now) in fresh.iter_mut().zip(before).zip(now) {
                *fresh = now.page().filter(|page| before.page() != Some(*page));
            }
        }
        for page in fresh.into_iter().flatten() {
            page::clear(memory, page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_delivered_before_everything_is_set_up() {
        let memory = GuestMemory::memfd(0x8000).unwrap();
        memory.fill(0x1000, 0x2000, 0xff).unwrap();
        let synic = Synic::new();
        assert_eq!(synic.message_page(2), None);
        // As Linux does it: SIMP, SIEFP, SINT 2, SCONTROL.
        assert!(synic.write(msr::SCONTROL, 0, &memory));
        assert!(synic.write(msr::SIMP, 0x1001, &memory));
        assert!(synic.write(msr::SIEFP, 0x2001, &memory));
        assert_eq!(synic.message_page(2), None, "masked");
        assert!(synic.write(msr::SINT0 + 2, 0xf3, &memory));
        assert_eq!(synic.message_page(2), None, "disabled");
        assert!(synic.write(msr::SCONTROL, 1, &memory));
        assert_eq!(synic.message_page(2), Some((0x1000, 0xf3)));
        assert_eq!(synic.event_page(2), Some((0x2000, 0xf3)));
        assert_eq!(synic.event_page(3), None);
        let mut pages = [0xff_u8; 0x2000];
        memory.read(0x1000, &mut pages).unwrap();
        assert!(pages.iter().all(|byte| *byte == 0), "pages come into use empty");

        memory.write(0x1200, &[1]).unwrap();
        assert!(synic.write(msr::SIMP, 0x1001, &memory));
        memory.read(0x1200, &mut pages[..1]).unwrap();
        assert_eq!(pages[0], 1, "the same page again is not cleared");
        assert!(!synic.write(msr::SINT0, 0x0f, &memory), "no such vector");
        assert!(!synic.write(msr::SVERSION, 1, &memory), "read-only");
        assert_eq!(synic.read(msr::SINT0 + 2), Some(0xf3));
        assert_eq!(synic.read(msr::GUEST_OS_ID), None);
    }

    #[test]
    fn restored_registers_are_the_same_and_pages_keep_what_is_in_them() {
        let memory = GuestMemory::memfd(0x8000).unwrap();
        let synic = Synic::new();
        for (index, value) in [
            (msr::SIMP, 0x1001),
            (msr::SIEFP, 0x2001),
            (msr::SINT0 + 2, 0xf3),
            (msr::VP_ASSIST_PAGE, 0x3001),
        ] {
            assert!(synic.write(index, value, &memory));
        }
        memory.write(0x1200, &[1]).unwrap();
        for mirrored in [false, true] {
            let other = Synic::new();
            other.restore(&synic.values(), mirrored);
            let vector = if mirrored { 0 } else { 0xf3 };
            assert_eq!(other.message_page(2), Some((0x1000, vector)), "mirrored: {mirrored}");
            assert_eq!(other.values() == synic.values(), !mirrored);
            other.mirror(1, 0x2001, 0x1001, &memory);
            let mut message = [0];
            memory.read(0x1200, &mut message).unwrap();
            assert_eq!(message, [1], "a message that waits is not lost");
        }
    }
}
