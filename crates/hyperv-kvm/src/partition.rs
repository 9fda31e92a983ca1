//! A guest as Hyper-V sees it: its virtual processors' SynICs, its hypercall page, its clock, and the
//! VMBus behind them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use kmcl::bus::{Doorbell, Signal};
use kvm_bindings::{
    CpuId, KVM_CAP_HYPERV_SYNIC2, KVM_CAP_X86_USER_SPACE_MSR, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MSR_EXIT_REASON_FILTER, KvmIrqRouting,
    kvm_enable_cap, kvm_irq_routing_entry, kvm_msi,
};
use kvm_ioctls::{
    IoEventAddress, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd,
};
use vmbus_host::{Config, GuestPort, HostBus, Posted, SlotId, VMBUS_SINT};
use vmbus_memory::GuestMemory;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::cpuid::{self, MAX_VPS};
use crate::error::Error;
use crate::hypercall::SIGNAL_PORT;
use crate::kvm;
use crate::msr;
use crate::probe::Mode;
use crate::registers::Globals;
use crate::synic::Synic;
use crate::synic::page::{self, Put};
use crate::vp::Vp;

/// Pins of the interrupt controllers that KVM has: they come first in the table of routes.
const IOAPIC_PINS: u32 = 24;
const PIC_PINS: u32 = 8;

/// What a partition is made of.
#[derive(Clone, Debug)]
pub struct PartitionConfig {
    /// Virtual processors; their indices are those of their vCPUs.
    pub vps: u32,
    /// Who provides the interfaces; `None`: whoever can.
    pub mode: Option<Mode>,
    /// Frequency of the vCPUs' TSC, in kHz.
    pub tsc_khz: u32,
    /// What the VMBus is willing to do.
    pub bus: Config,
    /// Routes of the VMM's own, beside those of the interrupt controllers and the SynIC: KVM takes all
    /// of them at once. Their GSIs are at least [`Partition::first_free_gsi`].
    pub routes: Vec<kvm_irq_routing_entry>,
}

/// See the module. A clone is another handle to it.
#[derive(Clone)]
pub struct Partition {
    port: Arc<Port>,
    bus: HostBus,
}

/// The guest, as the bus reaches it.
pub(crate) struct Port {
    myself: Weak<Self>,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) memory: GuestMemory,
    pub(crate) mode: Mode,
    pub(crate) synics: Vec<Synic>,
    /// Mode [`Mode::Kernel`]: what raises each VP's synthetic interrupt.
    lines: Vec<Line>,
    /// KVM's routes beside those of the interrupt controllers.
    routes: Vec<kvm_irq_routing_entry>,
    /// Readable when a guest has taken a message, where KVM tells it so.
    taken: EventFd,
    pub(crate) globals: Mutex<Globals>,
    /// Mode [`Mode::User`]: what the guest's signals to each connection make readable.
    listening: Mutex<BTreeMap<u32, EventFd>>,
    /// When the reference time was what.
    started: (Instant, u64),
    pub(crate) tsc_khz: u32,
    /// Interrupts raised.
    interrupts: AtomicU64,
}

/// Synthetic interrupt 2 of one VP.
struct Line {
    /// For messages: KVM tells when the guest has handled it.
    message: EventFd,
    event: EventFd,
}

/// What a port is made of.
pub(crate) struct Parts {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) memory: GuestMemory,
    pub(crate) mode: Mode,
    pub(crate) vps: u32,
    pub(crate) tsc_khz: u32,
    pub(crate) routes: Vec<kvm_irq_routing_entry>,
    /// Where the reference time begins, in units of 100 ns.
    pub(crate) reference_time: u64,
}

impl Partition {
    /// Makes a guest of `vm`, which has its interrupt controllers already and no vCPU that has run.
    /// `memory` is what is mapped into it.
    ///
    /// # Errors
    /// [`Error`]: a KVM that lacks something, or refuses a call.
    pub fn new(vm: Arc<VmFd>, memory: GuestMemory, config: PartitionConfig) -> Result<Self, Error> {
        let PartitionConfig { vps, mode, tsc_khz, bus, routes } = config;
        let mode = Mode::of(mode, &vm)?;
        let reference_time = 0;
        let parts = Parts { vm, memory, mode, vps, tsc_khz, routes, reference_time };
        let port = Port::new(parts)?;
        let bus = HostBus::new(Arc::clone(&port) as Arc<dyn GuestPort>, bus);
        Ok(Self { port, bus })
    }

    /// A guest that was saved, with its bus.
    pub(crate) fn restored(port: Arc<Port>, bus: HostBus) -> Self {
        Self { port, bus }
    }

    /// The bus on which devices are offered to the guest.
    #[must_use]
    pub fn bus(&self) -> &HostBus {
        &self.bus
    }

    /// Who provides the interfaces.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.port.mode
    }

    /// The guest's reference time, in units of 100 ns: what it reads from HV_X64_MSR_TIME_REF_COUNT.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    pub fn reference_time(&self) -> Result<u64, Error> {
        Ok(match self.port.mode {
            Mode::Kernel => {
                let clock = self.port.vm.get_clock().map_err(Error::kvm("KVM_GET_CLOCK"))?;
                clock.clock / 100
            }
            Mode::User => self.port.reference_time(),
        })
    }

    /// The first GSI that neither an interrupt controller nor the SynIC of `vps` processors uses.
    #[must_use]
    pub fn first_free_gsi(vps: u32) -> u32 {
        IOAPIC_PINS + 2 * vps
    }

    /// The CPUID of each vCPU, from what KVM supports.
    ///
    /// # Errors
    /// [`Error::TooMany`].
    pub fn cpuid(supported: &CpuId) -> Result<CpuId, Error> {
        cpuid::apply(supported).map_err(|_| Error::TooMany { what: "CPUID leaves" })
    }

    /// The guest has taken a message: the next one may go into its slot.
    pub fn messages_taken(&self) {
        let _spurious = self.port.taken.read();
        self.bus.messages_drained();
    }

    /// Makes a virtual processor of a vCPU, before it first runs. Its CPUID has been set.
    ///
    /// # Errors
    /// [`Error::NoVp`], [`Error::Kvm`].
    pub fn add_vp(&self, index: u32, vcpu: &VcpuFd) -> Result<Vp, Error> {
        let count = self.port.vp_count();
        if index >= count {
            return Err(Error::NoVp { index, count });
        }
        self.port.enable_synic(vcpu)?;
        Ok(self.vp(index))
    }

    /// The virtual processor of an index that is below the count, whose SynIC is there.
    pub(crate) fn vp(&self, index: u32) -> Vp {
        Vp::new(index, Arc::clone(&self.port), self.bus.clone())
    }

    /// Interrupts that were raised in the guest, for messages and for events.
    #[must_use]
    pub fn interrupts(&self) -> u64 {
        self.port.interrupts.load(Ordering::Relaxed)
    }

    pub(crate) fn port(&self) -> &Arc<Port> {
        &self.port
    }
}

impl AsFd for Partition {
    /// Readable when [`Partition::messages_taken`] has something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        kvm::descriptor_of(&self.port.taken)
    }
}

impl std::fmt::Debug for Partition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (mode, vps) = (self.port.mode, self.port.synics.len());
        f.debug_struct("Partition").field("mode", &mode).field("vps", &vps).finish_non_exhaustive()
    }
}

fn event() -> Result<EventFd, Error> {
    EventFd::new(EFD_NONBLOCK).map_err(Error::Event)
}

/// What raises the synthetic interrupts of all VPs.
fn make_lines(vm: &VmFd, vps: u32, taken: &EventFd) -> Result<Vec<Line>, Error> {
    let mut lines = Vec::new();
    for vp in 0..vps {
        let (event_gsi, message_gsi) = gsis(vp);
        let line = Line { message: event()?, event: event()? };
        vm.register_irqfd_with_resample(&line.message, taken, message_gsi)
            .map_err(Error::kvm("KVM_IRQFD (resample)"))?;
        vm.register_irqfd(&line.event, event_gsi).map_err(Error::kvm("KVM_IRQFD"))?;
        lines.push(line);
    }
    Ok(lines)
}

/// The GSIs of a VP's source: for events, for messages. KVM knows one of each source, the last one: that
/// is the one whose end it tells.
fn gsis(vp: u32) -> (u32, u32) {
    (IOAPIC_PINS + 2 * vp, IOAPIC_PINS + 2 * vp + 1)
}

/// Replaces KVM's table of routes: those of the interrupt controllers, and `more`.
fn set_routes(vm: &VmFd, more: &[kvm_irq_routing_entry]) -> Result<(), Error> {
    let mut routes = Vec::new();
    for pin in 0..IOAPIC_PINS {
        if pin < 2 * PIC_PINS {
            let chip = if pin < PIC_PINS { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
            routes.push(kvm::pin_route(pin, chip, pin % PIC_PINS));
        }
        routes.push(kvm::pin_route(pin, KVM_IRQCHIP_IOAPIC, pin));
    }
    routes.extend_from_slice(more);
    let table =
        KvmIrqRouting::from_entries(&routes).map_err(|_| Error::TooMany { what: "routes" })?;
    vm.set_gsi_routing(&table).map_err(Error::kvm("KVM_SET_GSI_ROUTING"))
}

/// Has every access to a synthetic MSR leave the kernel.
fn trap_msrs(vm: &VmFd) -> Result<(), Error> {
    let cap = kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [u64::from(KVM_MSR_EXIT_REASON_FILTER), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&cap).map_err(Error::kvm("KVM_CAP_X86_USER_SPACE_MSR"))?;
    let nothing_allowed = [0_u8; 512 / 8];
    let range = MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base: *msr::RANGE.start(),
        msr_count: 512,
        bitmap: &nothing_allowed,
    };
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[range])
        .map_err(Error::kvm("KVM_X86_SET_MSR_FILTER"))
}

impl Port {
    pub(crate) fn new(parts: Parts) -> Result<Arc<Self>, Error> {
        let Parts { vm, memory, mode, vps: count, tsc_khz, mut routes, reference_time } = parts;
        if count == 0 || count > MAX_VPS {
            return Err(Error::VpCount { count });
        }
        let taken = event()?;
        let lines = match mode {
            Mode::Kernel => {
                for vp in 0..count {
                    let (event, message) = gsis(vp);
                    routes.extend([event, message].map(|gsi| kvm::sint_route(gsi, vp, VMBUS_SINT)));
                }
                make_lines(&vm, count, &taken)?
            }
            Mode::User => {
                trap_msrs(&vm)?;
                Vec::new()
            }
        };
        set_routes(&vm, &routes)?;
        Ok(Arc::new_cyclic(|myself| Self {
            myself: Weak::clone(myself),
            vm,
            memory,
            mode,
            synics: (0..count).map(|_| Synic::new()).collect(),
            lines,
            routes,
            taken,
            globals: Mutex::default(),
            listening: Mutex::default(),
            started: (Instant::now(), reference_time),
            tsc_khz,
            interrupts: AtomicU64::new(0),
        }))
    }

    /// Has KVM emulate the SynIC of a vCPU, where it is KVM that does.
    pub(crate) fn enable_synic(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        if self.mode == Mode::User {
            return Ok(());
        }
        let cap = kvm_enable_cap { cap: KVM_CAP_HYPERV_SYNIC2, ..Default::default() };
        vcpu.enable_cap(&cap).map_err(Error::kvm("KVM_CAP_HYPERV_SYNIC2"))?;
        // A SynIC learns its GSIs when routes are set, and from then on only: now that it is there.
        set_routes(&self.vm, &self.routes)
    }

    /// Interrupts each VP that can be, as for a message and as for an event. One that was raised before
    /// and had not arrived is made up for by this.
    pub(crate) fn interrupt_all(&self) {
        for (vp, synic) in (0..).zip(&self.synics) {
            let ways =
                [(true, synic.message_page(VMBUS_SINT)), (false, synic.event_page(VMBUS_SINT))];
            for (message, page) in ways {
                if let Some((_, vector)) = page {
                    self.interrupt(vp, vector, message);
                }
            }
        }
    }

    pub(crate) fn synic(&self, vp: u32) -> Option<&Synic> {
        self.synics.get(vp as usize)
    }

    pub(crate) fn globals(&self) -> MutexGuard<'_, Globals> {
        self.globals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listening(&self) -> MutexGuard<'_, BTreeMap<u32, EventFd>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time since the partition's start, in units of 100 ns.
    pub(crate) fn reference_time(&self) -> u64 {
        let (at, then) = self.started;
        then.wrapping_add(u64::try_from(at.elapsed().as_nanos() / 100).unwrap_or(u64::MAX))
    }

    /// Raises the synthetic interrupt of a VP: a message is there.
    fn interrupt(&self, vp: u32, vector: u8, message: bool) {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
        let raised = match self.mode {
            Mode::Kernel => match self.lines.get(vp as usize) {
                Some(line) if message => line.message.write(1),
                Some(line) => line.event.write(1),
                None => Ok(()),
            },
            Mode::User => {
                // A VP's index is the id of its local APIC, and below 256.
                let msi = kvm_msi {
                    address_lo: 0xfee0_0000 | vp << 12,
                    data: u32::from(vector),
                    ..Default::default()
                };
                self.vm.signal_msi(msi).map(drop).map_err(io::Error::from)
            }
        };
        if let Err(error) = raised {
            // As often as a guest likes that has turned its local APIC off: not for the log.
            tracing::debug!(%error, vp, "the guest cannot be interrupted");
        }
    }
}

/// A signal to the guest: a flag in a VP's event page, and an interrupt if it was clear.
struct EventFlag {
    /// The bus has the signal, and the port has the bus's way to the guest: no circle.
    port: Weak<Port>,
    vp: u32,
    sint: u8,
    flag: u16,
}

impl Signal for EventFlag {
    fn signal(&self) {
        let Some(port) = self.port.upgrade() else { return };
        let Some((page, vector)) = port.synic(self.vp).and_then(|it| it.event_page(self.sint))
        else {
            return;
        };
        if page::set_flag(&port.memory, page, self.sint, self.flag) {
            port.interrupt(self.vp, vector, false);
        }
    }
}

impl GuestPort for Port {
    fn memory(&self) -> Option<GuestMemory> {
        Some(self.memory.clone())
    }

    fn vp_count(&self) -> u32 {
        u32::try_from(self.synics.len()).unwrap_or(u32::MAX)
    }

    fn post_message(&self, slot: SlotId, message: &[u8]) -> Posted {
        let Some(synic) = self.synic(slot.vp) else { return Posted::Taken };
        // The guest says by its next write to an MSR when it is ready.
        let Some((page, vector)) = synic.message_page(slot.sint) else { return Posted::Busy };
        match page::put_message(&self.memory, page, slot.sint, message) {
            Put::Done => {
                self.interrupt(slot.vp, vector, true);
                Posted::Taken
            }
            Put::Full => Posted::Busy,
            Put::NoPage => Posted::Taken,
        }
    }

    fn event_flag(&self, vp: u32, sint: u8, flag: u16) -> io::Result<Arc<dyn Signal>> {
        if self.mode == Mode::Kernel && sint != VMBUS_SINT {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Arc::new(EventFlag { port: Weak::clone(&self.myself), vp, sint, flag }))
    }

    fn listen(&self, connection_id: u32, doorbell: Arc<dyn Doorbell>) -> io::Result<()> {
        let event = doorbell.event_fd()?;
        match self.mode {
            Mode::Kernel => kvm::set_signal_event(&self.vm, connection_id, Some(event)),
            Mode::User => {
                let event = kvm::event_of(event)?;
                let address = IoEventAddress::Pio(SIGNAL_PORT.into());
                self.vm.register_ioevent(&event, &address, connection_id)?;
                self.listening().insert(connection_id, event);
                Ok(())
            }
        }
    }

    fn unlisten(&self, connection_id: u32) {
        let ended = match self.mode {
            Mode::Kernel => kvm::set_signal_event(&self.vm, connection_id, None),
            Mode::User => match self.listening().remove(&connection_id) {
                Some(event) => {
                    let address = IoEventAddress::Pio(SIGNAL_PORT.into());
                    let ended = self.vm.unregister_ioevent(&event, &address, connection_id);
                    ended.map_err(io::Error::from)
                }
                None => Ok(()),
            },
        };
        if let Err(error) = ended {
            tracing::error!(%error, connection_id, "a connection cannot be taken back");
        }
    }
}
