//! The model-specific registers of a processor: which of them make up its state, and how they are read and
//! written.
//!
//! KVM lists what it has beyond the architectural state; not all that it lists can be read on every vCPU,
//! nor set on every other one. Hyper-V's are not among them: they have their own places in a saved state,
//! as has the TSC, which is set by other means.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::error::Error;
use crate::msr;

/// The time stamp counter.
pub(crate) const TSC: u32 = 0x10;
/// When the local APIC's timer interrupts.
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;

/// KVM's own, for guests that know KVM: the old numbers and the new ones. A guest of Hyper-V does not.
const KVM_OLD: RangeInclusive<u32> = 0x11..=0x12;
const KVM: RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;

/// Part of the state, and not in KVM's list: memory types, machine checks.
const ALSO: [RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff, 0x400..=0x47f];

/// As many as KVM takes in one call, and a few less.
const AT_ONCE: usize = 200;

/// Which MSRs are saved: those that KVM has beside Hyper-V's. To be made while the KVM device can be
/// opened.
#[derive(Clone, Debug)]
pub struct MsrNumbers(BTreeSet<u32>);

impl MsrNumbers {
    /// Asks KVM.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    pub fn new(kvm: &Kvm) -> Result<Self, Error> {
        let listed = kvm.get_msr_index_list().map_err(Error::kvm("KVM_GET_MSR_INDEX_LIST"))?;
        let also = ALSO.into_iter().flatten();
        let all = listed.as_slice().iter().copied().chain(also);
        Ok(Self(all.filter(|index| is_listed(*index)).collect()))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        self.0.iter().copied()
    }
}

/// Whether an MSR may be in the list of a processor's.
pub(crate) fn is_listed(index: u32) -> bool {
    let others = [&msr::RANGE, &KVM_OLD, &KVM];
    !others.iter().any(|range| range.contains(&index)) && !matches!(index, TSC | TSC_DEADLINE)
}

/// Reads those that can be read.
pub(crate) fn get_all(
    vcpu: &VcpuFd,
    numbers: impl Iterator<Item = u32>,
) -> Result<Vec<kvm_msr_entry>, Error> {
    let numbers: Vec<_> =
        numbers.map(|index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut found = Vec::with_capacity(numbers.len());
    let mut rest = numbers.as_slice();
    while !rest.is_empty() {
        let (some, _) = rest.split_at(rest.len().min(AT_ONCE));
        let mut msrs = entries(some)?;
        let read = vcpu.get_msrs(&mut msrs).map_err(Error::kvm("KVM_GET_MSRS"))?;
        found.extend(msrs.as_slice().iter().take(read));
        // The one at which KVM has stopped cannot be read.
        let passed = if read < some.len() { read + 1 } else { read };
        rest = rest.get(passed..).unwrap_or_default();
    }
    Ok(found)
}

/// Reads one; `None` where it cannot be read.
pub(crate) fn get(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, Error> {
    Ok(get_all(vcpu, [index].into_iter())?.first().map(|msr| msr.data))
}

/// Writes one. `false`: it does not take the value.
pub(crate) fn set(vcpu: &VcpuFd, index: u32, data: u64) -> Result<bool, Error> {
    let msrs = entries(&[kvm_msr_entry { index, data, ..Default::default() }])?;
    Ok(vcpu.set_msrs(&msrs).map_err(Error::kvm("KVM_SET_MSRS"))? == 1)
}

/// Writes all. One that does not take its value must have it already, or it must be 0.
pub(crate) fn set_all(vp: u32, vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), Error> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let (some, _) = rest.split_at(rest.len().min(AT_ONCE));
        let msrs = entries(some)?;
        let written = vcpu.set_msrs(&msrs).map_err(Error::kvm("KVM_SET_MSRS"))?;
        rest = rest.get(written..).unwrap_or_default();
        if written == some.len() {
            continue;
        }
        let Some((refused, behind)) = rest.split_first() else { break };
        let kvm_msr_entry { index: msr, data: value, .. } = *refused;
        if value != 0 && get(vcpu, msr)? != Some(value) {
            return Err(Error::Msr { vp, msr, value });
        }
        rest = behind;
    }
    Ok(())
}

fn entries(msrs: &[kvm_msr_entry]) -> Result<Msrs, Error> {
    Msrs::from_entries(msrs).map_err(|_| Error::TooMany { what: "MSRs" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_place_of_its_own_is_not_listed() {
        for (index, expected) in [
            (TSC, false),
            (TSC_DEADLINE, false),
            (0x11, false),
            (0x13, true),
            (0x3b, true),  // TSC_ADJUST
            (0x277, true), // PAT
            (msr::GUEST_OS_ID, false),
            (*msr::RANGE.end(), false),
            (0x4000_0200, true),
            (0x4b56_4d01, false),
            (0xc000_0102, true), // KERNEL_GS_BASE
        ] {
            assert_eq!(is_listed(index), expected, "{index:#x}");
        }
    }
}
