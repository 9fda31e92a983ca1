//! What `kvm-ioctls` has no safe call for.
#![allow(unsafe_code, reason = "one ioctl, and fields of unions that KVM filled")]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};

use kvm_bindings::{
    KVM_HYPERV_EVENTFD_DEASSIGN, KVM_IRQ_ROUTING_HV_SINT, KVMIO, kvm_hyperv_eventfd,
    kvm_irq_routing_entry,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_HYPERV_EVENTFD, KVMIO, 0xbd, kvm_hyperv_eventfd);

/// From now on a guest's signal to `connection_id` makes `event` readable, in the kernel; or no longer.
pub(crate) fn set_signal_event(
    vm: &VmFd,
    connection_id: u32,
    event: Option<BorrowedFd<'_>>,
) -> std::io::Result<()> {
    let argument = kvm_hyperv_eventfd {
        conn_id: connection_id,
        fd: event.map_or(-1, |event| event.as_raw_fd()),
        flags: if event.is_some() { 0 } else { KVM_HYPERV_EVENTFD_DEASSIGN },
        ..Default::default()
    };
    // SAFETY: the descriptor is that of a VM, the argument what this ioctl reads, and it lives as long
    // as the call; KVM takes a reference of its own to the eventfd.
    let result = unsafe { ioctl_with_ref(vm, KVM_HYPERV_EVENTFD(), &argument) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Another descriptor of an eventfd, as `kvm-ioctls` takes them.
pub(crate) fn event_of(event: BorrowedFd<'_>) -> std::io::Result<EventFd> {
    let own = event.try_clone_to_owned()?;
    // SAFETY: the descriptor was just made for us, and nobody else closes it.
    Ok(unsafe { EventFd::from_raw_fd(own.into_raw_fd()) })
}

/// The descriptor of an event.
pub(crate) fn descriptor_of(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event has it open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// The route that raises the synthetic interrupt of a VP.
pub(crate) fn sint_route(gsi: u32, vp: u32, sint: u8) -> kvm_irq_routing_entry {
    let mut entry =
        kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_HV_SINT, ..Default::default() };
    entry.u.hv_sint.vcpu = vp;
    entry.u.hv_sint.sint = sint.into();
    entry
}

/// The route to a pin of an interrupt controller.
pub(crate) fn pin_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let type_ = kvm_bindings::KVM_IRQ_ROUTING_IRQCHIP;
    let mut entry = kvm_irq_routing_entry { gsi, type_, ..Default::default() };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

/// Why a vCPU left the kernel for Hyper-V's sake.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum HypervExit {
    /// The guest wrote SCONTROL, SIEFP or SIMP: what all three are now.
    Synic { scontrol: u64, siefp: u64, simp: u64 },
    /// A hypercall: its control word and first parameter.
    Hypercall { control: u64, input: u64 },
    /// Something else.
    Other(u32),
}

/// What a `KVM_EXIT_HYPERV` is about. To be asked after such an exit only.
pub(crate) fn hyperv_exit(vcpu: &mut VcpuFd) -> HypervExit {
    let run = vcpu.get_kvm_run();
    // SAFETY: all variants of the union are plain integers, for which any bytes are valid; the exit
    // reason says that KVM filled this one.
    let exit = unsafe { run.__bindgen_anon_1.hyperv };
    match exit.type_ {
        kvm_bindings::KVM_EXIT_HYPERV_SYNIC => {
            // SAFETY: as above; the type says which.
            let synic = unsafe { exit.u.synic };
            let (siefp, simp) = (synic.evt_page, synic.msg_page);
            HypervExit::Synic { scontrol: synic.control, siefp, simp }
        }
        kvm_bindings::KVM_EXIT_HYPERV_HCALL => {
            // SAFETY: as above.
            let call = unsafe { exit.u.hcall };
            let [input, _output] = call.params;
            HypervExit::Hypercall { control: call.input, input }
        }
        other => HypervExit::Other(other),
    }
}

/// Answers the hypercall that the vCPU has left the kernel for.
pub(crate) fn set_hypercall_result(vcpu: &mut VcpuFd, result: u64) {
    let run = vcpu.get_kvm_run();
    run.__bindgen_anon_1.hyperv.u.hcall.result = result;
}
