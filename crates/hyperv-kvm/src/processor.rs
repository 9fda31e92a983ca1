//! A vCPU as KVM keeps it: what it takes to save one, and to set another one to the same state.
//!
//! KVM's calls are not independent. When saving, MP_STATE comes first, since asking for it settles
//! interrupts that are on their way, and the events last, since other calls may change them. When
//! restoring, CPUID decides what all others may set; the special registers have the local APIC's mode, which
//! its state must fit; the deadline of its timer counts only once the state says that there is one.
//!
//! Source: KVM's interface (`Documentation/virt/kvm/api.rst` in Linux).

pub(crate) mod features;
pub(crate) mod msrs;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_mp_state};
use kvm_ioctls::VcpuFd;
use saved_state::machine::ProcessorRecord;
use zerocopy::IntoBytes;

use crate::error::Error;
use crate::kvm;
use crate::processor::msrs::{MsrNumbers, TSC, TSC_DEADLINE};
use crate::state::{ProcessorState, leaf_bytes, msr_bytes};

/// What a processor is saved as, but for its TSC. `xsave_bytes` is [`kvm::xsave_bytes`].
pub(crate) fn save(
    index: u32,
    vcpu: &VcpuFd,
    xsave_bytes: usize,
    numbers: &MsrNumbers,
) -> Result<ProcessorRecord, Error> {
    let mp_state = vcpu.get_mp_state().map_err(Error::kvm("KVM_GET_MP_STATE"))?.mp_state;
    let registers = vcpu.get_regs().map_err(Error::kvm("KVM_GET_REGS"))?;
    let special_registers = vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
    let mut xsave = kvm::xsave(vcpu, xsave_bytes).map_err(Error::kvm("KVM_GET_XSAVE2"))?;
    let used = xsave.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    xsave.truncate(used);
    let xcrs = vcpu.get_xcrs().map_err(Error::kvm("KVM_GET_XCRS"))?;
    let debug_registers = vcpu.get_debug_regs().map_err(Error::kvm("KVM_GET_DEBUGREGS"))?;
    let local_apic = vcpu.get_lapic().map_err(Error::kvm("KVM_GET_LAPIC"))?;
    let tsc_deadline = msrs::get(vcpu, TSC_DEADLINE)?.unwrap_or(0);
    let msrs = msrs::get_all(vcpu, numbers.iter())?;
    let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(Error::kvm("KVM_GET_CPUID2"))?;
    let events = vcpu.get_vcpu_events().map_err(Error::kvm("KVM_GET_VCPU_EVENTS"))?;
    Ok(ProcessorRecord {
        index,
        mp_state,
        cpuid: cpuid.as_slice().iter().flat_map(leaf_bytes).collect(),
        registers: registers.as_bytes().to_vec(),
        special_registers: special_registers.as_bytes().to_vec(),
        debug_registers: debug_registers.as_bytes().to_vec(),
        xcrs: xcrs.as_bytes().to_vec(),
        xsave,
        local_apic: local_apic.as_bytes().to_vec(),
        events: events.as_bytes().to_vec(),
        msrs: msrs.iter().flat_map(msr_bytes).collect(),
        tsc_ahead: 0,
        tsc_deadline,
    })
}

/// Sets everything but CPUID, the TSC and the synthetic registers, which have been set.
pub(crate) fn restore(
    index: u32,
    vcpu: &VcpuFd,
    xsave_bytes: usize,
    state: &ProcessorState,
) -> Result<(), Error> {
    let ProcessorState {
        mp_state,
        cpuid: _,
        registers,
        special_registers,
        debug_registers,
        xcrs,
        xsave,
        local_apic,
        events,
        msrs,
        tsc_ahead: _,
        tsc_deadline,
    } = state;
    vcpu.set_sregs(special_registers).map_err(Error::kvm("KVM_SET_SREGS"))?;
    vcpu.set_regs(registers).map_err(Error::kvm("KVM_SET_REGS"))?;
    if xcrs.nr_xcrs != 0 {
        vcpu.set_xcrs(xcrs).map_err(Error::kvm("KVM_SET_XCRS"))?;
    }
    kvm::set_xsave(vcpu, xsave_bytes, xsave).map_err(Error::kvm("KVM_SET_XSAVE"))?;
    vcpu.set_debug_regs(debug_registers).map_err(Error::kvm("KVM_SET_DEBUGREGS"))?;
    vcpu.set_lapic(local_apic).map_err(Error::kvm("KVM_SET_LAPIC"))?;
    msrs::set_all(index, vcpu, msrs)?;
    vcpu.set_vcpu_events(events).map_err(Error::kvm("KVM_SET_VCPU_EVENTS"))?;
    let mp_state = kvm_mp_state { mp_state: *mp_state };
    vcpu.set_mp_state(mp_state).map_err(Error::kvm("KVM_SET_MP_STATE"))?;
    set_deadline(vcpu, local_apic, *tsc_deadline)
}

/// Arms the local APIC's timer, if it is one with a deadline. A deadline that has passed reads as 0, whether
/// or not its interrupt has arrived: it passes again. A guest takes an interrupt of its timer for which
/// there is nothing to do; one that never comes stops it.
fn set_deadline(
    vcpu: &VcpuFd,
    local_apic: &kvm_bindings::kvm_lapic_state,
    deadline: u64,
) -> Result<(), Error> {
    const LVT_TIMER: usize = 0x320;
    const MASKED: u32 = 1 << 16;
    const MODE: u32 = 3 << 17;
    const DEADLINE: u32 = 2 << 17;
    let register = local_apic.as_bytes().get(LVT_TIMER..).and_then(|bytes| bytes.first_chunk());
    let lvt = register.map_or(0, |bytes| u32::from_le_bytes(*bytes));
    if lvt & MODE != DEADLINE {
        return Ok(());
    }
    let deadline = match deadline {
        0 if lvt & MASKED != 0 => return Ok(()),
        0 => msrs::get(vcpu, TSC)?.unwrap_or(1),
        later => later,
    };
    msrs::set(vcpu, TSC_DEADLINE, deadline).map(drop)
}
