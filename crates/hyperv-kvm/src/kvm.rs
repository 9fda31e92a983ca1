//! What `kvm-ioctls` has no safe call for.
#![allow(unsafe_code, reason = "ioctls, and fields of unions that KVM filled")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};

use kvm_bindings::{
    KVM_HYPERV_EVENTFD_DEASSIGN, KVM_IRQ_ROUTING_HV_SINT, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET,
    KVMIO, Xsave, kvm_device_attr, kvm_hyperv_eventfd, kvm_irq_routing_entry, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr};

ioctl_iow_nr!(KVM_HYPERV_EVENTFD, KVMIO, 0xbd, kvm_hyperv_eventfd);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// From now on a guest's signal to `connection_id` makes `event` readable, in the kernel; or no longer.
pub(crate) fn set_signal_event(
    vm: &VmFd,
    connection_id: u32,
    event: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let argument = kvm_hyperv_eventfd {
        conn_id: connection_id,
        fd: event.map_or(-1, |event| event.as_raw_fd()),
        flags: if event.is_some() { 0 } else { KVM_HYPERV_EVENTFD_DEASSIGN },
        ..Default::default()
    };
    // SAFETY: the descriptor is that of a VM, the argument what this ioctl reads, and it lives as long
    // as the call; KVM takes a reference of its own to the eventfd.
    let result = unsafe { ioctl_with_ref(vm, KVM_HYPERV_EVENTFD(), &argument) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Another descriptor of an eventfd, as `kvm-ioctls` takes them.
pub(crate) fn event_of(event: BorrowedFd<'_>) -> io::Result<EventFd> {
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

/// What the TSC of a vCPU adds to the machine's own. Linux 5.16 and later.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut offset = 0_u64;
    let attribute = tsc_attribute(&mut offset);
    // SAFETY: the descriptor is that of a vCPU, the argument what this ioctl reads; it names eight bytes
    // that are ours to be written and live as long as the call.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) };
    if result == 0 { Ok(offset) } else { Err(io::Error::last_os_error()) }
}

/// Sets [`tsc_offset`].
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let mut offset = offset;
    let attribute = tsc_attribute(&mut offset);
    // SAFETY: as in `tsc_offset`; the eight bytes are read.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn tsc_attribute(offset: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: std::ptr::from_mut(offset).expose_provenance() as u64,
    }
}

/// Bytes of what KVM takes and gives as the area that XSAVE writes, in a VM.
pub(crate) fn xsave_bytes(vm: &VmFd) -> usize {
    usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(size_of::<kvm_xsave>())
}

/// The area that XSAVE writes: `bytes` of it, which is [`xsave_bytes`].
pub(crate) fn xsave(vcpu: &VcpuFd, bytes: usize) -> Result<Vec<u8>, kvm_ioctls::Error> {
    let mut area = xsave_area(bytes)?;
    if bytes > size_of::<kvm_xsave>() {
        // SAFETY: the area is as long as KVM says that it is in this VM; nothing in this process asks
        // for features that would make it longer.
        unsafe { vcpu.get_xsave2(&mut area) }?;
    } else {
        // SAFETY: the area's length is not changed, nor anything in it but its words.
        unsafe { area.as_mut_fam_struct() }.xsave.region = vcpu.get_xsave()?.region;
    }
    let first = area.as_fam_struct_ref().xsave.region.iter();
    Ok(first.chain(area.as_slice()).flat_map(|word| word.to_le_bytes()).collect())
}

/// Sets the area that XSAVE writes: the first `saved.len()` of `bytes`, which is [`xsave_bytes`]; the rest
/// is zeros.
pub(crate) fn set_xsave(
    vcpu: &VcpuFd,
    bytes: usize,
    saved: &[u8],
) -> Result<(), kvm_ioctls::Error> {
    let mut area = xsave_area(bytes)?;
    let words = |bytes: &[u8]| -> Vec<u32> {
        let (words, rest) = bytes.as_chunks::<4>();
        let mut last = [0; 4];
        last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        words.iter().chain([&last]).map(|word| u32::from_le_bytes(*word)).collect()
    };
    let (first, behind) = saved.split_at(saved.len().min(size_of::<kvm_xsave>()));
    // SAFETY: the area's length is not changed, nor anything in it but its words.
    let region = &mut unsafe { area.as_mut_fam_struct() }.xsave.region;
    region.iter_mut().zip(words(first)).for_each(|(to, from)| *to = from);
    area.as_mut_slice().iter_mut().zip(words(behind)).for_each(|(to, from)| *to = from);
    // SAFETY: the area is as long as KVM says that it is in this VM.
    unsafe { vcpu.set_xsave2(&area) }
}

fn xsave_area(bytes: usize) -> Result<Xsave, kvm_ioctls::Error> {
    let behind = bytes.saturating_sub(size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
    Xsave::new(behind).map_err(|_| kvm_ioctls::Error::new(ENOMEM))
}

const ENOMEM: i32 = 12;

/// Where KVM keeps its statistics of a VM or a vCPU. Linux 5.14 and later.
pub(crate) fn statistics(of: &impl AsRawFd) -> io::Result<File> {
    // SAFETY: the descriptor is that of a VM or a vCPU, and this ioctl has no argument.
    let descriptor = unsafe { ioctl(of, KVM_GET_STATS_FD()) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: KVM has just made the descriptor for us, and nobody else closes it.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}
