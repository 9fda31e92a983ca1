//! A saved guest goes on: step by step, in the order that guests need.
//!
//! | step | what there is afterwards | why not earlier |
//! |---|---|---|
//! | [`RestoredMemory`] | the guest's memory | |
//! | [`RestoredClock`] | CPUID, the TSCs, KVM's clock, the reference time | the rest counts by them |
//! | [`RestoredSynic`] | the synthetic registers, and the hypercall page | they name pages of the memory; KVM's SynIC knows VPs by what CPUID says |
//! | [`RestoredProcessors`] | registers, local APICs with their timers, interrupt controllers | timers need clocks; what a SynIC has raised must not be lost |
//! | [`RestoredChannels`] | the bus, for the devices to make their offers on | what they signal must find the guest's interrupts |
//! | [`Restored`] | all of it: vCPUs may run | |
//!
//! Each step takes the one before it, and only the last one gives the vCPUs back: another order does not
//! compile. A step that fails drops all of it; nothing of the guest has run then.
//!
//! ```compile_fail,E0599
//! # fn vcpus_before_channels(step: hyperv_kvm::restore::RestoredProcessors) {
//! let _restored = step.finish().unwrap(); // there is no such method yet
//! # }
//! ```
//!
//! A state saved in one [`Mode`] can be restored in the other one. The hypercall page is the difficulty: a
//! vCPU, or an interrupted task of the guest, may be in the middle of it. KVM's code is two instructions,
//! of three bytes and of one; ours leaves these places to it, or takes their meaning over.

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_TSC_CONTROL, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, kvm_clock_data, kvm_irq_routing_entry, kvm_irqchip,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmbus_host::{GuestPort, HostBus};
use vmbus_memory::{GuestMemory, MappingBudget};

use crate::error::Error;
use crate::hypercall::PAGE_CODE_AFTER_KVM;
use crate::kvm;
use crate::msr::{PageRegister, SintRegister};
use crate::partition::{Partition, Parts, Port};
use crate::probe::Mode;
use crate::processor::msrs::{self, TSC};
use crate::processor::{self, features};
use crate::save::PartitionState;
use crate::state::{SharedState, State, StateError};
use crate::synthetic;
use crate::vp::Vp;

pub use crate::processor::msrs::MsrNumbers;

/// A TSC that is off by no more is the same, in parts per million: KVM takes it for the same as well.
const TSC_TOLERANCE_PPM: u64 = 250;

const TSC_IS_BEHIND: &str = "the TSC here is behind where the guest's stood, and KVM cannot set it";

/// What a partition is restored into.
#[derive(Clone, Debug, Default)]
pub struct RestoreConfig {
    /// Who provides the interfaces; `None`: whoever did, or else whoever can.
    pub mode: Option<Mode>,
    /// As for [`PartitionConfig`](crate::PartitionConfig).
    pub routes: Vec<kvm_irq_routing_entry>,
}

/// The guest's memory is there.
pub struct RestoredMemory {
    memory: GuestMemory,
}

/// The clocks go on.
pub struct RestoredClock {
    port: Arc<Port>,
    state: State,
    vcpus: Vec<VcpuFd>,
}

/// The SynICs are there.
pub struct RestoredSynic(RestoredClock);

/// The processors are as they were.
pub struct RestoredProcessors {
    port: Arc<Port>,
    vcpus: Vec<VcpuFd>,
}

/// The bus is there, and waits for its devices.
pub struct RestoredChannels {
    partition: Partition,
    vcpus: Vec<VcpuFd>,
}

/// All of it: vCPUs may run.
pub struct Restored {
    /// The guest.
    pub partition: Partition,
    /// Its processors, in the order of their indices.
    pub processors: Vec<(Vp, VcpuFd)>,
}

impl RestoredMemory {
    /// Begins. `memory` is what is mapped into the VM, and has what it had when the guest was saved; what
    /// of it comes later by itself (`userfaultfd`) counts as being there.
    #[must_use]
    pub fn new(memory: GuestMemory) -> Self {
        Self { memory }
    }

    /// Checks all of the saved state, and lets the clocks go on from where they stood: the guest does not
    /// see the time in between. `vm` has its interrupt controllers; `vcpus` are in the order of their
    /// indices, and as they were made.
    ///
    /// # Errors
    /// [`Error::State`], [`Error::Differences`]; [`Error`], of a KVM that lacks something or refuses a
    /// call.
    pub fn clock(
        self,
        kvm: &Kvm,
        vm: Arc<VmFd>,
        vcpus: Vec<VcpuFd>,
        state: PartitionState,
        config: RestoreConfig,
    ) -> Result<RestoredClock, Error> {
        let state = State::try_from(state)?;
        let (found, expected) = (vcpus.len(), state.processors.len());
        if found != expected {
            let what = "vCPUs";
            return Err(StateError::Count { what, found, expected }.into());
        }
        let mode = choose(config.mode, state.shared.mode, &vm)?;
        let differences = differences(&state, mode, kvm, &vm, &vcpus)?;
        if !differences.is_empty() {
            return Err(Error::Differences(differences));
        }
        for (vcpu, saved) in vcpus.iter().zip(&state.processors) {
            vcpu.set_cpuid2(&saved.cpuid).map_err(Error::kvm("KVM_SET_CPUID2"))?;
            set_frequency(vcpu, state.shared.tsc_khz)?;
        }
        let SharedState { tsc_khz, clock_ns, reference_time, globals, .. } = state.shared;
        let port = Port::new(Parts {
            vm,
            memory: self.memory,
            mode,
            vps: u32::try_from(expected).unwrap_or(u32::MAX), // at most 64
            tsc_khz,
            routes: config.routes,
            reference_time,
        })?;
        *port.globals() = globals;
        set_tscs(&vcpus, &state)?;
        // KVM counts the reference time by its clock: where it was counted elsewhere, that one leads.
        let clock = kvm_clock_data {
            clock: clock_ns.max(reference_time.saturating_mul(100)),
            ..Default::default()
        };
        port.vm.set_clock(&clock).map_err(Error::kvm("KVM_SET_CLOCK"))?;
        Ok(RestoredClock { port, state, vcpus })
    }
}

impl RestoredClock {
    /// Sets the synthetic registers of all VPs.
    ///
    /// # Errors
    /// [`Error::Msr`], [`Error::Kvm`].
    pub fn synic(self) -> Result<RestoredSynic, Error> {
        let Self { port, state, vcpus } = &self;
        let mirrored = port.mode == Mode::Kernel;
        for vcpu in vcpus {
            port.enable_synic(vcpu)?;
        }
        for (synic, saved) in port.synics.iter().zip(&state.synics) {
            synic.restore(&saved.values, mirrored);
        }
        if mirrored {
            for vcpu in vcpus.iter().take(1) {
                synthetic::set_globals(vcpu, &state.shared.globals)?;
            }
            for ((vp, vcpu), saved) in (0..).zip(vcpus).zip(&state.synics) {
                synthetic::set_synic(vp, vcpu, saved)?;
            }
        } else if state.shared.mode == Mode::Kernel
            && let Some(page) = PageRegister(state.shared.globals.hypercall).page()
            && let Err(error) = port.memory.write(page, &PAGE_CODE_AFTER_KVM)
        {
            tracing::debug!(%error, "the guest's hypercall page is not memory");
        }
        Ok(RestoredSynic(self))
    }
}

impl RestoredSynic {
    /// Sets the rest of each processor, and the interrupt controllers.
    ///
    /// # Errors
    /// [`Error::Msr`], [`Error::Kvm`].
    pub fn processors(self) -> Result<RestoredProcessors, Error> {
        let RestoredClock { port, state, vcpus } = self.0;
        let xsave_bytes = kvm::xsave_bytes(&port.vm);
        for ((vp, vcpu), saved) in (0..).zip(&vcpus).zip(&state.processors) {
            processor::restore(vp, vcpu, xsave_bytes, saved)?;
        }
        // Behind the local APICs: an I/O APIC gives them what waits in it as soon as it is set.
        let [mut master, mut slave, mut io_apic] =
            [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
                .map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        [master.chip.pic, slave.chip.pic] = state.shared.pics;
        io_apic.chip.ioapic = state.shared.io_apic;
        for chip in [master, slave, io_apic] {
            port.vm.set_irqchip(&chip).map_err(Error::kvm("KVM_SET_IRQCHIP"))?;
        }
        Ok(RestoredProcessors { port, vcpus })
    }
}

impl RestoredProcessors {
    /// Makes the bus, from the stream that was saved of it.
    ///
    /// # Errors
    /// [`Error::Bus`].
    pub fn channels(self, budget: MappingBudget, bus: &[u8]) -> Result<RestoredChannels, Error> {
        let Self { port, vcpus } = self;
        let bus = HostBus::restoring(Arc::clone(&port) as Arc<dyn GuestPort>, budget, bus)?;
        Ok(RestoredChannels { partition: Partition::restored(port, bus), vcpus })
    }
}

impl RestoredChannels {
    /// The bus: devices make on it the offers that were saved.
    #[must_use]
    pub fn bus(&self) -> &HostBus {
        self.partition.bus()
    }

    /// Who provides Hyper-V's interfaces now.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.partition.mode()
    }

    /// Ends the restore: channels go on, and each VP that can be is interrupted once, as an interrupt may
    /// have been on its way when the guest was saved.
    ///
    /// # Errors
    /// [`Error::Finish`]: devices are not those that were saved.
    pub fn finish(self) -> Result<Restored, Error> {
        self.bus().finish_restore()?;
        let Self { partition, vcpus } = self;
        partition.port().interrupt_all();
        let vps = (0..).zip(vcpus).map(|(index, vcpu)| (partition.vp(index), vcpu));
        let processors = vps.collect();
        Ok(Restored { partition, processors })
    }
}

/// The way that was asked for; else that of the one who saved, if it is possible here.
fn choose(asked: Option<Mode>, saved: Mode, vm: &VmFd) -> Result<Mode, Error> {
    match asked {
        Some(_) => Mode::of(asked, vm),
        None => Mode::of(Some(saved), vm).or_else(|_| Mode::of(None, vm)),
    }
}

/// Why the guest cannot go on here, a line for each reason.
fn differences(
    state: &State,
    mode: Mode,
    kvm: &Kvm,
    vm: &VmFd,
    vcpus: &[VcpuFd],
) -> Result<Vec<String>, Error> {
    let mut lines = Vec::new();
    let Some(vcpu) = vcpus.first() else { return Ok(lines) };
    let here = told_here(kvm, vcpu)?;
    for processor in &state.processors {
        for line in features::differences(&processor.cpuid, &here) {
            if !lines.contains(&line) {
                lines.push(line);
            }
        }
    }
    let found = vcpu.get_tsc_khz().map_err(Error::kvm("KVM_GET_TSC_KHZ"))?;
    let saved = state.shared.tsc_khz;
    let scales = vm.check_extension_raw(KVM_CAP_TSC_CONTROL.into()) > 0;
    if !scales && !is_same_frequency(saved, found) {
        lines.push(format!(
            "TSC of {found} kHz here, {saved} kHz when saved, and this processor cannot scale it"
        ));
    }
    if mode == Mode::User {
        const AUTO_EOI: u64 = 1 << 17;
        const TIMER_ENABLED: u64 = 1;
        let auto_eoi = |sint: u64| sint & AUTO_EOI != 0 && !SintRegister(sint).is_masked();
        let synics = || state.synics.iter();
        if synics().any(|synic| synic.values.sints.into_iter().any(auto_eoi)) {
            lines.push("the guest has interrupts end by themselves, which mode user cannot".into());
        }
        let mut configs = synics().flat_map(|synic| synic.stimers.into_iter().step_by(2));
        if configs.any(|config| config & TIMER_ENABLED != 0) {
            lines.push("the guest uses synthetic timers, which mode user does not have".into());
        }
    }
    Ok(lines)
}

/// What a new guest is told here. What KVM supports is not all of it: it goes by what comes back from a
/// vCPU.
fn told_here(kvm: &Kvm, vcpu: &VcpuFd) -> Result<CpuId, Error> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let cpuid = Partition::cpuid(&supported)?;
    vcpu.set_cpuid2(&cpuid).map_err(Error::kvm("KVM_SET_CPUID2"))?;
    vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(Error::kvm("KVM_GET_CPUID2"))
}

fn is_same_frequency(saved_khz: u32, found_khz: u32) -> bool {
    let off = u64::from(saved_khz.abs_diff(found_khz)) * 1_000_000;
    off <= u64::from(found_khz) * TSC_TOLERANCE_PPM
}

fn set_frequency(vcpu: &VcpuFd, khz: u32) -> Result<(), Error> {
    let found = vcpu.get_tsc_khz().map_err(Error::kvm("KVM_GET_TSC_KHZ"))?;
    if is_same_frequency(khz, found) {
        return Ok(());
    }
    vcpu.set_tsc_khz(khz).map_err(Error::kvm("KVM_SET_TSC_KHZ"))
}

/// Sets all TSCs to where they stood, at one moment: each is ahead of the first as it was.
///
/// The offset of a TSC is set, not the TSC: KVM takes a value that is near to where a new TSC would be for
/// an attempt to bring TSCs together, and lets it be. That is where the TSC of a guest is that was saved
/// soon after its start.
fn set_tscs(vcpus: &[VcpuFd], state: &State) -> Result<(), Error> {
    let Some(first) = vcpus.first() else { return Ok(()) };
    let tsc = state.shared.tsc;
    let now = msrs::get(first, TSC)?.unwrap_or(0);
    let offset = kvm::tsc_offset(first).map(|offset| offset.wrapping_add(tsc.wrapping_sub(now)));
    for ((vp, vcpu), saved) in (0..).zip(vcpus).zip(&state.processors) {
        let ahead = saved.tsc_ahead;
        let set = offset
            .as_ref()
            .is_ok_and(|offset| kvm::set_tsc_offset(vcpu, offset.wrapping_add(ahead)).is_ok());
        let value = tsc.wrapping_add(ahead);
        if !set && !msrs::set(vcpu, TSC, value)? {
            return Err(Error::Msr { vp, msr: TSC, value });
        }
    }
    // A KVM that leaves guests the machine's own TSC takes any value, and nothing comes of it.
    let now = msrs::get(first, TSC)?.unwrap_or(0);
    match now.wrapping_sub(tsc) < 1 << 63 {
        true => Ok(()),
        false => Err(Error::Differences(vec![TSC_IS_BEHIND.into()])),
    }
}

#[cfg(test)]
mod tests;
