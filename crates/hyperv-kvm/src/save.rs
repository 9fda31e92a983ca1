//! A partition as records: everything of a guest but its memory and its devices.

use kvm_ioctls::VcpuFd;
use saved_state::machine::{PartitionRecord, ProcessorRecord, SynicMode, SynicRecord};
use vmbus_host::GuestPort;
use zerocopy::IntoBytes;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_ioapic_state,
    kvm_irqchip, kvm_pic_state,
};

use crate::error::Error;
use crate::kvm;
use crate::partition::{Partition, Port};
use crate::probe::Mode;
use crate::processor;
use crate::processor::msrs::{self, MsrNumbers, TSC};
use crate::state::SynicState;
use crate::synic::Values;
use crate::synthetic;

/// The saved state of a partition and its vCPUs, as records. What is in them comes from the guest; they
/// are checked when a partition is [restored](crate::restore).
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct PartitionState {
    /// What all processors share.
    pub partition: PartitionRecord,
    /// Each processor, in the order of their indices.
    pub processors: Vec<ProcessorRecord>,
    /// The synthetic registers of each, in the same order.
    pub synics: Vec<SynicRecord>,
}

/// Where the clocks of a guest stand.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Clocks {
    tsc: u64,
    clock_ns: u64,
    reference_time: u64,
}

impl Partition {
    /// Where the clocks stand now. `first` is the vCPU of index 0.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    pub fn clocks(&self, first: &VcpuFd) -> Result<Clocks, Error> {
        let port = self.port();
        let tsc = msrs::get(first, TSC)?.unwrap_or(0);
        let clock_ns = port.vm.get_clock().map_err(Error::kvm("KVM_GET_CLOCK"))?.clock;
        let reference_time = match port.mode {
            Mode::Kernel => synthetic::reference_time(first)?,
            Mode::User => port.reference_time(),
        };
        Ok(Clocks { tsc, clock_ns, reference_time })
    }

    /// Saves the partition and its `vcpus`, in the order of their indices.
    ///
    /// All of them stand, each with its last exit completed: KVM_RUN was called again with *immediate
    /// exit* set, and said EINTR. The bus is saved by itself: [`HostBus::hold`](vmbus_host::HostBus::hold).
    /// Nothing changes by being saved, and the guest may go on afterwards.
    ///
    /// `clocks` are of a moment since which no vCPU has run: for who restores the guest, no time has passed
    /// from then on.
    ///
    /// # Errors
    /// [`Error::NoVp`] where `vcpus` are too few or too many; [`Error::Kvm`].
    pub fn save(
        &self,
        numbers: &MsrNumbers,
        clocks: Clocks,
        vcpus: &[&VcpuFd],
    ) -> Result<PartitionState, Error> {
        let port = self.port();
        let (found, count) = (u32::try_from(vcpus.len()).unwrap_or(u32::MAX), port.vp_count());
        let Some(first) = vcpus.first().filter(|_| found == count) else {
            return Err(Error::NoVp { index: found, count });
        };
        let xsave_bytes = kvm::xsave_bytes(&port.vm);
        let mut processors = Vec::with_capacity(vcpus.len());
        let mut synics = Vec::with_capacity(vcpus.len());
        for (index, vcpu) in (0..).zip(vcpus) {
            let mut record = processor::save(index, vcpu, xsave_bytes, numbers)?;
            record.tsc_ahead = tsc_ahead(first, vcpu);
            processors.push(record);
            synics.push(save_synic(index, port, vcpu)?);
        }
        Ok(PartitionState { partition: save_shared(port, clocks, first)?, processors, synics })
    }
}

/// How far the TSC of a vCPU is before that of the `first`. Without a way to ask, they are the same: KVM
/// keeps them so unless the guest sets them apart.
fn tsc_ahead(first: &VcpuFd, vcpu: &VcpuFd) -> u64 {
    let offsets = kvm::tsc_offset(vcpu).and_then(|own| Ok((own, kvm::tsc_offset(first)?)));
    offsets.map_or(0, |(own, first)| own.wrapping_sub(first))
}

fn save_shared(port: &Port, clocks: Clocks, first: &VcpuFd) -> Result<PartitionRecord, Error> {
    let vm = &port.vm;
    let (mode, globals) = match port.mode {
        Mode::Kernel => (SynicMode::Kernel, synthetic::globals(first)?),
        Mode::User => (SynicMode::User, *port.globals()),
    };
    let crash = globals.crash.iter().any(|parameter| *parameter != 0);
    let crash = if crash { globals.crash.map(u64::to_le_bytes).concat() } else { Vec::new() };
    let chip = |chip_id, bytes| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(Error::kvm("KVM_GET_IRQCHIP"))?;
        let all = chip.chip.as_bytes().get(..bytes).unwrap_or_default();
        Ok::<_, Error>(all.to_vec())
    };
    let pic_master = chip(KVM_IRQCHIP_PIC_MASTER, size_of::<kvm_pic_state>())?;
    let pic_slave = chip(KVM_IRQCHIP_PIC_SLAVE, size_of::<kvm_pic_state>())?;
    let io_apic = chip(KVM_IRQCHIP_IOAPIC, size_of::<kvm_ioapic_state>())?;
    let Clocks { tsc, clock_ns, reference_time } = clocks;
    Ok(PartitionRecord {
        mode: mode.into(),
        tsc_khz: port.tsc_khz,
        tsc,
        clock_ns,
        reference_time,
        guest_os_id: globals.guest_os_id,
        hypercall: globals.hypercall,
        reference_tsc: globals.reference_tsc,
        tsc_invariant: globals.tsc_invariant,
        crash,
        pic_master,
        pic_slave,
        io_apic,
    })
}

fn save_synic(index: u32, port: &Port, vcpu: &VcpuFd) -> Result<SynicRecord, Error> {
    let SynicState { values, stimers } = match port.mode {
        Mode::Kernel => synthetic::synic(vcpu)?,
        Mode::User => {
            let (count, synic) = (port.vp_count(), port.synic(index));
            let values = synic.ok_or(Error::NoVp { index, count })?.values();
            SynicState { values, stimers: Default::default() }
        }
    };
    let Values { scontrol, siefp, simp, sints, vp_assist_page } = values;
    let timers = stimers.iter().any(|register| *register != 0);
    let stimers = if timers { stimers.map(u64::to_le_bytes).concat() } else { Vec::new() };
    let sints = sints.map(u64::to_le_bytes).concat();
    Ok(SynicRecord { index, scontrol, siefp, simp, sints, vp_assist_page, stimers })
}
