//! The synthetic registers, where this crate keeps them: what a guest reads from an MSR, and what a write
//! does.
//!
//! Pure: nothing here knows KVM or the bus. Source: hyperv-host sections 2 and 7.

use vmbus_memory::GuestMemory;

use crate::hypercall::PAGE_CODE;
use crate::msr::{self, PageRegister};
use crate::synic::Synic;
use crate::vp::CrashReport;

/// Frequency of KVM's local APIC timer, in Hz.
const APIC_HZ: u64 = 1_000_000_000;

/// Registers that all VPs share.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Globals {
    pub(crate) guest_os_id: u64,
    pub(crate) hypercall: u64,
    pub(crate) reference_tsc: u64,
    pub(crate) tsc_invariant: u64,
    pub(crate) crash: [u64; 5],
}

/// What registers tell that nobody writes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Constants {
    pub(crate) vp_index: u32,
    pub(crate) tsc_khz: u32,
    /// Time since the partition's start, in units of 100 ns.
    pub(crate) reference_time: u64,
}

/// What a write has done.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Written {
    /// Nothing beyond the register, if that.
    Done,
    /// A slot may have become empty, or the SynIC has come to life: what waits for the guest may go.
    Synic,
    /// The machine is to be reset.
    Reset,
    /// The guest has crashed.
    Crash(CrashReport),
    /// The guest may not, and gets a fault.
    Fault,
}

/// What the guest reads; `None`: it has no such register, and gets a fault.
pub(crate) fn read(
    globals: &Globals,
    synic: &Synic,
    constants: Constants,
    index: u32,
) -> Option<u64> {
    if let Some(value) = synic.read(index) {
        return Some(value);
    }
    Some(match index {
        msr::GUEST_OS_ID => globals.guest_os_id,
        msr::HYPERCALL => globals.hypercall,
        msr::VP_INDEX => constants.vp_index.into(),
        msr::TIME_REF_COUNT => constants.reference_time,
        msr::REFERENCE_TSC => globals.reference_tsc,
        msr::TSC_FREQUENCY => u64::from(constants.tsc_khz) * 1000,
        msr::APIC_FREQUENCY => APIC_HZ,
        msr::TSC_INVARIANT_CONTROL => globals.tsc_invariant,
        msr::RESET => 0,
        msr::CRASH_CTL => msr::crash::NOTIFY | msr::crash::MESSAGE,
        msr::CRASH_P0..=msr::CRASH_P4 => {
            globals.crash.get((index - msr::CRASH_P0) as usize).copied()?
        }
        _ => return None,
    })
}

/// The guest writes.
pub(crate) fn write(
    globals: &mut Globals,
    synic: &Synic,
    memory: &GuestMemory,
    index: u32,
    value: u64,
) -> Written {
    match index {
        msr::GUEST_OS_ID => {
            globals.guest_os_id = value;
            if value == 0 {
                globals.hypercall &= !1; // the page goes with the identity
            }
        }
        // Ignored while nobody has said who it is for.
        msr::HYPERCALL if globals.guest_os_id == 0 => {}
        msr::HYPERCALL if PageRegister(globals.hypercall).is_locked() => {}
        msr::HYPERCALL => {
            if let Some(page) = PageRegister(value).page()
                && memory.write(page, &PAGE_CODE).is_err()
            {
                return Written::Fault;
            }
            globals.hypercall = value;
        }
        msr::REFERENCE_TSC => globals.reference_tsc = value,
        msr::TSC_INVARIANT_CONTROL => globals.tsc_invariant = value,
        msr::RESET if value & 1 != 0 => return Written::Reset,
        msr::RESET => {}
        msr::CRASH_P0..=msr::CRASH_P4 => {
            if let Some(parameter) = globals.crash.get_mut((index - msr::CRASH_P0) as usize) {
                *parameter = value;
            }
        }
        msr::CRASH_CTL if value & msr::crash::NOTIFY != 0 => {
            let has_message = value & msr::crash::MESSAGE != 0;
            return Written::Crash(CrashReport { parameters: globals.crash, has_message });
        }
        msr::CRASH_CTL => {}
        _ if synic.write(index, value, memory) => return Written::Synic,
        _ => return Written::Fault,
    }
    Written::Done
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM_BYTES: u64 = 0x8000;
    const CONSTANTS: Constants =
        Constants { vp_index: 3, tsc_khz: 2_000_000, reference_time: 77_000 };

    /// What a guest has done before.
    #[derive(Clone, Copy, Debug)]
    enum Before {
        Reset,
        Named,
        Page,
        Locked,
    }

    fn made(before: Before) -> (Globals, Synic, GuestMemory) {
        let (mut globals, synic) = (Globals::default(), Synic::new());
        let memory = GuestMemory::memfd(RAM_BYTES).unwrap();
        let steps: &[(u32, u64)] = match before {
            Before::Reset => &[],
            Before::Named => &[(msr::GUEST_OS_ID, 0x8100)],
            Before::Page => &[(msr::GUEST_OS_ID, 0x8100), (msr::HYPERCALL, 0x3001)],
            Before::Locked => &[(msr::GUEST_OS_ID, 0x8100), (msr::HYPERCALL, 0x3003)],
        };
        for (index, value) in steps {
            assert_eq!(write(&mut globals, &synic, &memory, *index, *value), Written::Done);
        }
        (globals, synic, memory)
    }

    /// MSR, state before, value; what the write does, and what is read afterwards.
    #[test]
    fn writes_do_what_they_may() {
        use Before::{Locked, Named, Page, Reset};
        use Written::{Done, Fault, Synic};
        const NOTIFY: u64 = msr::crash::NOTIFY;
        const MESSAGE: u64 = msr::crash::MESSAGE;
        let crash = |has_message| Written::Crash(CrashReport { parameters: [0; 5], has_message });
        for (index, before, value, expected, read_back) in [
            (msr::GUEST_OS_ID, Reset, 0x8100, Done, Some(0x8100)),
            (msr::GUEST_OS_ID, Page, 0, Done, Some(0)),
            (msr::HYPERCALL, Reset, 0x3001, Done, Some(0)), // nobody has said who it is for
            (msr::HYPERCALL, Named, 0x3001, Done, Some(0x3001)),
            (msr::HYPERCALL, Named, 0x3000, Done, Some(0x3000)),
            (msr::HYPERCALL, Named, RAM_BYTES | 1, Fault, Some(0)), // no memory there
            (msr::HYPERCALL, Named, !0xfff | 1, Fault, Some(0)),
            (msr::HYPERCALL, Named, RAM_BYTES, Done, Some(RAM_BYTES)), // not enabled
            (msr::HYPERCALL, Page, 0x4001, Done, Some(0x4001)),
            (msr::HYPERCALL, Locked, 0x4001, Done, Some(0x3003)),
            (msr::VP_INDEX, Reset, 0, Fault, Some(3)),
            (msr::TIME_REF_COUNT, Reset, 0, Fault, Some(77_000)),
            (msr::TSC_FREQUENCY, Reset, 0, Fault, Some(2_000_000_000)),
            (msr::APIC_FREQUENCY, Reset, 0, Fault, Some(1_000_000_000)),
            (msr::SVERSION, Reset, 2, Fault, Some(1)),
            (msr::REFERENCE_TSC, Reset, 0x5001, Done, Some(0x5001)),
            (msr::TSC_INVARIANT_CONTROL, Reset, 1, Done, Some(1)),
            (msr::RESET, Reset, 1, Written::Reset, Some(0)),
            (msr::RESET, Reset, 2, Done, Some(0)),
            (msr::CRASH_P0, Reset, 7, Done, Some(7)),
            (msr::CRASH_P4, Reset, 8, Done, Some(8)),
            (msr::CRASH_CTL, Reset, NOTIFY, crash(false), Some(NOTIFY | MESSAGE)),
            (msr::CRASH_CTL, Reset, NOTIFY | MESSAGE, crash(true), Some(NOTIFY | MESSAGE)),
            (msr::CRASH_CTL, Reset, MESSAGE, Done, Some(NOTIFY | MESSAGE)), // not said that it crashed
            (msr::VP_ASSIST_PAGE, Reset, 0x6001, Synic, Some(0x6001)),
            (msr::SCONTROL, Reset, 0, Synic, Some(0)),
            (msr::SIMP, Reset, 0x1001, Synic, Some(0x1001)),
            (msr::SIMP, Reset, RAM_BYTES | 1, Synic, Some(RAM_BYTES | 1)), // nothing goes there
            (msr::SIEFP, Reset, 0x2001, Synic, Some(0x2001)),
            (msr::EOM, Reset, 0, Synic, Some(0)),
            (msr::SINT0, Reset, 0xf3, Synic, Some(0xf3)),
            (msr::SINT15, Reset, msr::SINT_RESET | 5, Synic, Some(msr::SINT_RESET | 5)),
            (msr::SINT15, Reset, 15, Fault, Some(msr::SINT_RESET)), // no such vector
            (0x4000_0004, Reset, 0, Fault, None),
            (0x4000_0010, Reset, 0, Fault, None),
            (0x4000_00b0, Reset, 1, Fault, None), // timers are not offered
            (*msr::RANGE.end(), Reset, 0, Fault, None),
        ] {
            let row = format!("{value:#x} to {index:#x}, before: {before:?}");
            let (mut globals, synic, memory) = made(before);
            assert_eq!(write(&mut globals, &synic, &memory, index, value), expected, "{row}");
            assert_eq!(read(&globals, &synic, CONSTANTS, index), read_back, "{row}");
        }
    }

    #[test]
    fn a_crash_is_told_with_what_the_guest_wrote_of_it() {
        let (mut globals, synic, memory) = made(Before::Reset);
        for (index, value) in (msr::CRASH_P0..=msr::CRASH_P4).zip(1..) {
            assert_eq!(write(&mut globals, &synic, &memory, index, value), Written::Done);
        }
        let told = write(&mut globals, &synic, &memory, msr::CRASH_CTL, msr::crash::NOTIFY);
        let report = CrashReport { parameters: [1, 2, 3, 4, 5], has_message: false };
        assert_eq!(told, Written::Crash(report));
    }

    #[test]
    fn the_hypercall_page_has_its_code_while_there_is_one() {
        let (mut globals, synic, memory) = made(Before::Page);
        let mut code = [0; PAGE_CODE.len()];
        memory.read(0x3000, &mut code).unwrap();
        assert_eq!(code, PAGE_CODE);
        assert_eq!(write(&mut globals, &synic, &memory, msr::GUEST_OS_ID, 0), Written::Done);
        assert_eq!(globals.hypercall, 0x3000, "it is not enabled any more");
    }
}
