//! Whether a guest that was told of one processor can go on with another one: what CPUID told it, held
//! against what can be had here.
//!
//! A guest looks once and believes it for ever. So every feature that it was told of must be here; those
//! that it was not told of do not matter, as it goes on being told the same. Family, model and caches are
//! only told.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// A register of a leaf.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

use Register::{Eax, Ebx, Ecx, Edx};

impl Register {
    fn of(self, leaf: &kvm_cpuid_entry2) -> u32 {
        match self {
            Eax => leaf.eax,
            Ebx => leaf.ebx,
            Ecx => leaf.ecx,
            Edx => leaf.edx,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Eax => "EAX",
            Ebx => "EBX",
            Ecx => "ECX",
            Edx => "EDX",
        }
    }
}

/// Registers whose bits are features: leaf, subleaf, register, and the bits that are none: those that follow
/// from other state (OSXSAVE, OSPKE, the local APIC being on), from the topology (HTT), or from what the
/// VMM has made (TSC_DEADLINE).
const FEATURES: [(u32, u32, Register, u32); 23] = [
    (1, 0, Ecx, 1 << 24 | 1 << 27),
    (1, 0, Edx, 1 << 9 | 1 << 28),
    (6, 0, Eax, 0),
    (7, 0, Ebx, 0),
    (7, 0, Ecx, 1 << 4),
    (7, 0, Edx, 0),
    (7, 1, Eax, 0),
    (7, 1, Ecx, 0),
    (7, 1, Edx, 0),
    (7, 2, Edx, 0),
    (0xd, 0, Eax, 0),
    (0xd, 0, Edx, 0),
    (0xd, 1, Eax, 0),
    (0xd, 1, Ecx, 0),
    (0x4000_0003, 0, Eax, 0),
    (0x4000_0003, 0, Ebx, 0),
    (0x4000_0003, 0, Edx, 0),
    (0x8000_0001, 0, Ecx, 0),
    (0x8000_0001, 0, Edx, 1 << 9),
    (0x8000_0007, 0, Edx, 0),
    (0x8000_0008, 0, Ebx, 0),
    (0x8000_000a, 0, Edx, 0),
    (0x8000_0021, 0, Eax, 0),
];

/// Names of features by which processors differ most.
const NAMES: [(u32, u32, Register, u32, &str); 42] = [
    (1, 0, Ecx, 0, "sse3"),
    (1, 0, Ecx, 1, "pclmulqdq"),
    (1, 0, Ecx, 9, "ssse3"),
    (1, 0, Ecx, 12, "fma"),
    (1, 0, Ecx, 13, "cx16"),
    (1, 0, Ecx, 17, "pcid"),
    (1, 0, Ecx, 19, "sse4_1"),
    (1, 0, Ecx, 20, "sse4_2"),
    (1, 0, Ecx, 21, "x2apic"),
    (1, 0, Ecx, 22, "movbe"),
    (1, 0, Ecx, 23, "popcnt"),
    (1, 0, Ecx, 25, "aes"),
    (1, 0, Ecx, 26, "xsave"),
    (1, 0, Ecx, 28, "avx"),
    (1, 0, Ecx, 29, "f16c"),
    (1, 0, Ecx, 30, "rdrand"),
    (7, 0, Ebx, 0, "fsgsbase"),
    (7, 0, Ebx, 3, "bmi1"),
    (7, 0, Ebx, 5, "avx2"),
    (7, 0, Ebx, 7, "smep"),
    (7, 0, Ebx, 8, "bmi2"),
    (7, 0, Ebx, 9, "erms"),
    (7, 0, Ebx, 10, "invpcid"),
    (7, 0, Ebx, 16, "avx512f"),
    (7, 0, Ebx, 18, "rdseed"),
    (7, 0, Ebx, 19, "adx"),
    (7, 0, Ebx, 20, "smap"),
    (7, 0, Ebx, 23, "clflushopt"),
    (7, 0, Ebx, 24, "clwb"),
    (7, 0, Ebx, 29, "sha_ni"),
    (7, 0, Ecx, 2, "umip"),
    (7, 0, Ecx, 3, "pku"),
    (7, 0, Ecx, 9, "vaes"),
    (7, 0, Ecx, 16, "la57"),
    (7, 0, Edx, 4, "fsrm"),
    (7, 0, Edx, 24, "amx_tile"),
    (7, 0, Edx, 26, "spec_ctrl"),
    (0xd, 1, Eax, 3, "xsaves"),
    (0x8000_0001, 0, Edx, 20, "nx"),
    (0x8000_0001, 0, Edx, 26, "pdpe1gb"),
    (0x8000_0001, 0, Edx, 27, "rdtscp"),
    (0x8000_0007, 0, Edx, 8, "invariant tsc"),
];

/// Components of the area that XSAVE writes: each has a subleaf.
const XSAVE_COMPONENTS: u32 = 63;

/// What a guest was told and is not so here, a line for each; nothing: it can go on.
pub(crate) fn differences(told: &CpuId, here: &CpuId) -> Vec<String> {
    let (told, here) = (Leaves(told), Leaves(here));
    let mut lines = Vec::new();
    if told.vendor() != here.vendor() {
        let line = format!("processor of {}, {} when saved", here.vendor(), told.vendor());
        lines.push(line);
    }
    for (leaf, subleaf, register, no_features) in FEATURES {
        let of =
            |leaves: &Leaves<'_>| leaves.find(leaf, subleaf).map_or(0, |leaf| register.of(&leaf));
        let missing = of(&told) & !of(&here) & !no_features;
        lines.extend((0..u32::BITS).filter(|bit| missing >> bit & 1 != 0).map(|bit| {
            let mut names = NAMES
                .iter()
                .filter(|(l, s, r, b, _)| (*l, *s, *r, *b) == (leaf, subleaf, register, bit));
            let register = register.name();
            let place = format!("CPUID {leaf:#x}.{subleaf} {register} bit {bit}");
            match names.next() {
                Some((.., name)) => format!("no processor feature {name} ({place}) here"),
                None => format!("no processor feature {place} here"),
            }
        }));
    }
    for component in 2..XSAVE_COMPONENTS {
        let layout = |leaves: &Leaves<'_>| {
            leaves.find(0xd, component).map_or((0, 0), |leaf| (leaf.eax, leaf.ebx))
        };
        let (then, now) = (layout(&told), layout(&here));
        if then.0 != 0 && then != now {
            lines.push(format!(
                "XSAVE component {component} has {} bytes at {} here, {} at {} when saved",
                now.0, now.1, then.0, then.1
            ));
        }
    }
    let width =
        |leaves: &Leaves<'_>| leaves.find(0x8000_0008, 0).map_or(36, |leaf| leaf.eax & 0xff);
    let (then, now) = (width(&told), width(&here));
    if then > now {
        lines.push(format!("physical addresses of {now} bits here, {then} when saved"));
    }
    lines
}

struct Leaves<'a>(&'a CpuId);

impl Leaves<'_> {
    fn find(&self, leaf: u32, subleaf: u32) -> Option<kvm_cpuid_entry2> {
        let mut leaves = self.0.as_slice().iter();
        leaves.find(|entry| entry.function == leaf && entry.index == subleaf).copied()
    }

    fn vendor(&self) -> String {
        let leaf = self.find(0, 0).unwrap_or_default();
        let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
        bytes.escape_ascii().to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processor(change: impl Fn(&mut kvm_cpuid_entry2)) -> CpuId {
        let leaf = |function, index, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        let text = |four: [u8; 4]| u32::from_le_bytes(four);
        let mut leaves = vec![
            leaf(0, 0, [0xd, text(*b"Genu"), text(*b"ntel"), text(*b"ineI")]),
            leaf(1, 0, [0x306a9, 0x0010_0800, 1 << 28 | 1 << 31, 1]),
            leaf(7, 0, [0, 1 << 5, 0, 0]),
            leaf(0xd, 0, [7, 832, 832, 0]),
            leaf(0xd, 2, [256, 576, 0, 0]),
            leaf(0x8000_0008, 0, [46, 0, 0, 0]),
        ];
        leaves.iter_mut().for_each(change);
        CpuId::from_entries(&leaves).unwrap()
    }

    #[test]
    fn what_the_guest_was_told_of_must_be_here() {
        type Change = fn(&mut kvm_cpuid_entry2);
        let same: Change = |_| {};
        let rows: [(&str, Change, Change, &str); 10] = [
            ("the same", same, same, ""),
            (
                "another model",
                same,
                |leaf| leaf.eax = if leaf.function == 1 { 9 } else { leaf.eax },
                "",
            ),
            ("more here", same, |leaf| leaf.edx |= u32::from(leaf.function == 7), ""),
            (
                "one less",
                same,
                |leaf| leaf.ebx &= if leaf.function == 7 { 0 } else { u32::MAX },
                "no processor feature avx2 (CPUID 0x7.0 EBX bit 5) here",
            ),
            (
                "one without a name",
                |leaf| leaf.ecx |= u32::from(leaf.function == 7) << 30,
                same,
                "no processor feature CPUID 0x7.0 ECX bit 30 here",
            ),
            (
                "OSXSAVE follows from CR4",
                |leaf| leaf.ecx |= u32::from(leaf.function == 1) << 27,
                same,
                "",
            ),
            (
                "another vendor",
                same,
                |leaf| {
                    leaf.ecx =
                        if leaf.function == 0 { u32::from_le_bytes(*b"nten") } else { leaf.ecx }
                },
                "processor of GenuineInten, GenuineIntel when saved",
            ),
            (
                "another layout",
                same,
                |leaf| leaf.ebx += u32::from(leaf.index == 2) * 64,
                "XSAVE component 2 has 256 bytes at 640 here, 256 at 576 when saved",
            ),
            (
                "fewer addresses",
                same,
                |leaf| leaf.eax -= u32::from(leaf.function == 0x8000_0008) * 7,
                "physical addresses of 39 bits here, 46 when saved",
            ),
            (
                "two at once",
                |leaf| {
                    leaf.ebx |=
                        u32::from(leaf.function == 7) << 8 | u32::from(leaf.function == 7) << 16
                },
                same,
                "no processor feature bmi2 (CPUID 0x7.0 EBX bit 8) here\n\
                 no processor feature avx512f (CPUID 0x7.0 EBX bit 16) here",
            ),
        ];
        for (what, then, now, expected) in rows {
            let lines = differences(&processor(then), &processor(now)).join("\n");
            assert_eq!(lines, expected, "{what}");
        }
    }

    #[test]
    fn a_machine_without_any_leaf_misses_everything() {
        let none = CpuId::from_entries(&[]).unwrap();
        assert_eq!(differences(&none, &processor(|_| {})).len(), 1, "the vendor");
        assert!(differences(&processor(|_| {}), &none).len() > 8);
    }
}
