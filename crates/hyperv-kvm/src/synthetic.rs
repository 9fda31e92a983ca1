//! The synthetic registers where KVM keeps them: read from it for a save, and set again.
//!
//! Source: hyperv-host section 5.

use kvm_ioctls::VcpuFd;
use vmbus_wire::synic::SINT_COUNT;

use crate::error::Error;
use crate::msr;
use crate::processor::msrs;
use crate::registers::Globals;
use crate::state::{STIMERS, SynicState};
use crate::synic::Values;

const STIMER0_CONFIG: u32 = 0x4000_00b0;

/// What all VPs share, as any vCPU has it.
pub(crate) fn globals(vcpu: &VcpuFd) -> Result<Globals, Error> {
    // What a KVM does not have its guest has not set.
    let get = |index| Ok::<_, Error>(msrs::get(vcpu, index)?.unwrap_or(0));
    let mut crash = [0; 5];
    for (parameter, index) in crash.iter_mut().zip(msr::CRASH_P0..) {
        *parameter = get(index)?;
    }
    Ok(Globals {
        guest_os_id: get(msr::GUEST_OS_ID)?,
        hypercall: get(msr::HYPERCALL)?,
        reference_tsc: get(msr::REFERENCE_TSC)?,
        tsc_invariant: get(msr::TSC_INVARIANT_CONTROL)?,
        crash,
    })
}

/// The reference time, in units of 100 ns.
pub(crate) fn reference_time(vcpu: &VcpuFd) -> Result<u64, Error> {
    Ok(msrs::get(vcpu, msr::TIME_REF_COUNT)?.unwrap_or(0))
}

/// The registers of one VP.
pub(crate) fn synic(vcpu: &VcpuFd) -> Result<SynicState, Error> {
    let get = |index| Ok::<_, Error>(msrs::get(vcpu, index)?.unwrap_or(0));
    let mut sints = [msr::SINT_RESET; SINT_COUNT as usize];
    for (sint, index) in sints.iter_mut().zip(msr::SINT0..) {
        *sint = get(index)?;
    }
    let mut stimers = [0; STIMERS];
    for (register, index) in stimers.iter_mut().zip(STIMER0_CONFIG..) {
        *register = get(index)?;
    }
    let values = Values {
        scontrol: get(msr::SCONTROL)?,
        siefp: get(msr::SIEFP)?,
        simp: get(msr::SIMP)?,
        sints,
        vp_assist_page: get(msr::VP_ASSIST_PAGE)?,
    };
    Ok(SynicState { values, stimers })
}

/// Sets what all VPs share. KVM writes its code to the hypercall page, if there is one.
pub(crate) fn set_globals(vcpu: &VcpuFd, globals: &Globals) -> Result<(), Error> {
    let Globals { guest_os_id, hypercall, reference_tsc, tsc_invariant, crash } = *globals;
    // The page is for whoever has said who it is.
    let registers = [
        (msr::GUEST_OS_ID, guest_os_id),
        (msr::HYPERCALL, hypercall),
        (msr::REFERENCE_TSC, reference_tsc),
        (msr::TSC_INVARIANT_CONTROL, tsc_invariant),
    ];
    let crash = (msr::CRASH_P0..).zip(crash);
    registers.into_iter().chain(crash).try_for_each(|(index, value)| set(0, vcpu, index, value))
}

/// Sets the registers of one VP, whose SynIC is there. KVM leaves the pages as they are.
pub(crate) fn set_synic(vp: u32, vcpu: &VcpuFd, state: &SynicState) -> Result<(), Error> {
    let SynicState { values, stimers } = *state;
    let Values { scontrol, siefp, simp, sints, vp_assist_page } = values;
    let pages = [(msr::SIEFP, siefp), (msr::SIMP, simp), (msr::VP_ASSIST_PAGE, vp_assist_page)];
    let sints = (msr::SINT0..).zip(sints);
    let timers = (STIMER0_CONFIG..).zip(stimers).filter(|(_, value)| *value != 0);
    let all = [(msr::SCONTROL, scontrol)].into_iter().chain(sints).chain(pages).chain(timers);
    all.into_iter().try_for_each(|(index, value)| set(vp, vcpu, index, value))
}

fn set(vp: u32, vcpu: &VcpuFd, index: u32, value: u64) -> Result<(), Error> {
    match msrs::set(vcpu, index, value)? || value == 0 {
        true => Ok(()),
        false => Err(Error::Msr { vp, msr: index, value }),
    }
}
