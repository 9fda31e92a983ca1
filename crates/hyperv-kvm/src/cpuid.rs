//! The CPUID leaves by which a guest knows Hyper-V.
//!
//! Linux asks every hypervisor it knows of and takes the one with the highest leaf. So KVM's own
//! signature must not be there at all: a guest that sees it takes the host for KVM, and its VMBus
//! driver does not load.
//!
//! Source: hyperv-host section 1.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// First leaf of a hypervisor.
const FIRST: u32 = 0x4000_0000;
/// The last leaf that says something.
const LAST: u32 = 0x4000_0005;
/// Leaves of any hypervisor, KVM's copy of its own included.
const ALL: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4fff_ffff;

/// Most virtual processors that a guest is told it may have.
pub const MAX_VPS: u32 = 64;

bitflags::bitflags! {
    /// What the guest may use: leaf 0x40000003, EAX.
    #[derive(Clone, Copy, Debug, Eq, PartialEq)]
    pub struct Privileges: u32 {
        /// The reference counter, as an MSR.
        const TIME_REF_COUNT = 1 << 1;
        /// The SynIC's MSRs.
        const SYNIC = 1 << 2;
        /// The hypercall page and the guest's identity: nothing works without.
        const HYPERCALL = 1 << 5;
        /// The VP's own index: nothing works without.
        const VP_INDEX = 1 << 6;
        /// The frequencies of TSC and APIC timer.
        const FREQUENCIES = 1 << 11;
        /// The guest may rely on the TSC.
        const TSC_INVARIANT = 1 << 15;
    }
}

/// Leaf 0x40000003, EBX: messages may be posted, events signalled.
const POST_AND_SIGNAL: u32 = 1 << 4 | 1 << 5;
/// Leaf 0x40000003, EDX: the frequency MSRs are there, and the crash MSRs.
const FREQUENCY_MSRS: u32 = 1 << 8;
const CRASH_MSRS: u32 = 1 << 10;
/// Leaf 0x40000004, EAX: timing is relaxed; the guest ends its interrupts itself.
const RELAXED_TIMING: u32 = 1 << 5;
const DEPRECATE_AUTO_EOI: u32 = 1 << 9;
/// Leaf 0x40000004, EBX: never tell the host that a lock spins.
const NEVER_NOTIFY: u32 = u32::MAX;

/// What guests are offered, whatever way the SynIC is provided.
pub const PRIVILEGES: Privileges = Privileges::TIME_REF_COUNT
    .union(Privileges::SYNIC)
    .union(Privileges::HYPERCALL)
    .union(Privileges::VP_INDEX)
    .union(Privileges::FREQUENCIES)
    .union(Privileges::TSC_INVARIANT);

/// Leaf 1, ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, ECX, and leaf 0x80000001, ECX: the guest may be a hypervisor itself. What KVM keeps for such a
/// guest is not saved, so it is not to be had.
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;

/// The hypervisor's leaves.
#[must_use]
pub fn leaves() -> Vec<kvm_cpuid_entry2> {
    let leaf = |function, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    let text = |four: [u8; 4]| u32::from_le_bytes(four);
    vec![
        leaf(FIRST, [LAST, text(*b"Micr"), text(*b"osof"), text(*b"t Hv")]),
        leaf(0x4000_0001, [text(*b"Hv#1"), 0, 0, 0]),
        leaf(0x4000_0002, [0, 0, 0, 0]),
        leaf(0x4000_0003, [PRIVILEGES.bits(), POST_AND_SIGNAL, 0, FREQUENCY_MSRS | CRASH_MSRS]),
        leaf(0x4000_0004, [RELAXED_TIMING | DEPRECATE_AUTO_EOI, NEVER_NOTIFY, 0, 0]),
        leaf(LAST, [MAX_VPS, MAX_VPS, 0, 0]),
    ]
}

/// Turns what a processor may have (`KVM_GET_SUPPORTED_CPUID`) into what one of a Hyper-V guest has: a
/// hypervisor is present, it is this one and no other, and the guest is none itself.
///
/// # Errors
/// As many leaves as KVM takes are there already.
pub fn apply(supported: &CpuId) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !ALL.contains(&entry.function))
        .copied()
        .collect();
    for entry in &mut entries {
        match entry.function {
            1 => entry.ecx = entry.ecx & !VMX | HYPERVISOR,
            0x8000_0001 => entry.ecx &= !SVM,
            _ => {}
        }
    }
    entries.extend(leaves());
    CpuId::from_entries(&entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ..Default::default() }
    }

    /// Leaf 0x40000003 as a Debian kernel was seen to boot with it.
    #[test]
    fn a_guest_finds_hyper_v_and_nothing_else() {
        let kvm = [entry(0, 1), entry(1, 7), entry(0x4000_0000, 9), entry(0x4000_0100, 9)];
        let supported = CpuId::from_entries(&kvm).unwrap();
        let applied = apply(&supported).unwrap();
        let find = |function| {
            let mut found = applied.as_slice().iter().filter(|e| e.function == function);
            let entry = *found.next().unwrap();
            assert!(found.next().is_none(), "{function:#x} twice");
            entry
        };
        assert_eq!(find(1).ecx >> 31, 1);
        let signature = find(0x4000_0000);
        let text = [signature.ebx, signature.ecx, signature.edx].map(u32::to_le_bytes).concat();
        assert_eq!(text, b"Microsoft Hv");
        assert_eq!(find(0x4000_0001).eax, 0x3123_7648);
        let features = find(0x4000_0003);
        assert_eq!((features.eax, features.ebx, features.edx), (0x8866, 0x30, 0x500));
        assert!(applied.as_slice().iter().all(|e| e.function != 0x4000_0100));
    }
}
